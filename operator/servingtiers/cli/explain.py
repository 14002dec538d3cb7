"""``servingtiers explain``: the story of a tier, told from its status."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from servingtiers.api.spec import ServingTier
from servingtiers.api.status import Condition, EffectivePool, ObjectiveStatus, PoolStatus, ServingTierStatus
from servingtiers.cli._cluster import tier_from_cluster
from servingtiers.cli._options import InputError, OneLineCommand

__all__ = ["command", "tell"]

_VERSION = "v1alpha1"
_QUIET_WHEN_FALSE = {"Reconciling", "Stalled", "ScalingLimited", "Conflict", "PlanOutdated"}
"""Conditions that are worth a line only when they are not False."""


@click.command("explain", cls=OneLineCommand)
@click.argument("name", required=False)
@click.option("-n", "--namespace", help="Namespace of the tier; the kubeconfig's own when left out.")
@click.option("--context", help="Context of the kubeconfig; the current one when left out.")
@click.option(
    "-f",
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Read the tier, with its status, from a YAML or JSON file instead of the cluster (- for standard input).",
)
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(
    name: str | None, namespace: str | None, context: str | None, path: Path | None, output: str
) -> None:
    """Tell what was decided for a tier, and why.

    Everything told comes from the tier's status, which the operator keeps: the settings it chose, conditions,
    pools, objectives, cost, and the latest decisions, newest first. The operator itself is not asked.
    """
    if path is not None:
        raw = _from_file(path, name)
    elif name is not None:
        raw = tier_from_cluster(name, namespace, context)
    else:
        raise InputError("name a tier, or a file with -f (see servingtiers explain --help)")
    try:
        tier = ServingTier.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"not a ServingTier of {_VERSION}: {where}: {first['msg']}") from error
    click.echo(json.dumps(_as_json(tier), indent=2) if output == "json" else "\n".join(tell(tier)))


def _from_file(path: Path, name: str | None) -> dict[str, Any]:
    import yaml

    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        documents = [document for document in yaml.safe_load_all(text) if document]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    items: list[dict[str, Any]] = []
    for document in documents:
        if isinstance(document, dict):
            # `kubectl get servingtiers -o yaml` gives a List.
            listed = document.get("items", [document])
            items += [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    tiers = [item for item in items if item.get("kind") == "ServingTier"]
    if name is not None:
        tiers = [item for item in tiers if _name_of(item) == name]
    if len(tiers) == 1:
        return tiers[0]
    if not tiers:
        raise InputError(f"{path} holds no ServingTier{f' named {name}' if name else ''}")
    known = ", ".join(str(_name_of(item)) for item in tiers)
    raise InputError(f"{path} holds several tiers: name one of {known}")


def _name_of(item: dict[str, Any]) -> Any:
    metadata = item.get("metadata")
    return metadata.get("name") if isinstance(metadata, dict) else None


def _as_json(tier: ServingTier) -> dict[str, Any]:
    status = tier.status.model_dump(mode="json", by_alias=True, exclude_none=True) if tier.status else {}
    for objective in status.get("slo", []):
        objective.pop("hours", None)
    for pool in status.get("pools", []):
        pool.pop("memory", None)
    return {
        "name": tier.metadata.name,
        "namespace": tier.metadata.namespace,
        "tier": tier.spec.tier.value,
        "model": tier.spec.model.name,
        "mode": tier.spec.scaling.mode.value,
        "suspended": tier.spec.suspend,
        "upToDate": status.get("observedGeneration") == tier.metadata.generation,
        **status,
    }


def tell(tier: ServingTier) -> Iterator[str]:
    """Yield the lines of a tier's story."""
    spec = tier.spec
    yield f"{tier.metadata.namespace}/{tier.metadata.name}: {spec.tier.value} tier of {spec.model.name}"
    mode = "suspended: nothing is changed" if spec.suspend else f"scaling {spec.scaling.mode.value}"
    status = tier.status
    if status is None or status.observed_generation is None:
        yield f"  {mode}"
        yield "  no status yet: the operator has not seen this tier; is it running, and does it watch this namespace?"
        return
    endpoint = f", endpoint {status.endpoint}" if status.endpoint else ""
    yield f"  {mode}{endpoint}"
    if status.observed_generation < tier.metadata.generation:
        yield (
            f"  what follows is of generation {status.observed_generation}; the spec is at"
            f" {tier.metadata.generation}, the operator has not got to it yet"
        )
    for section in (_conditions, _settings, _pools, _objectives, _cost, _decisions):
        lines = list(section(status))
        if lines:
            yield ""
            yield from lines


def _conditions(status: ServingTierStatus) -> Iterator[str]:
    shown = [each for each in status.conditions if _worth_a_line(each)]
    if shown:
        yield "Conditions"
    for each in shown:
        yield f"  {each.type} {each.status} ({each.reason}) since {each.last_transition_time}: {each.message}"


def _worth_a_line(condition: Condition) -> bool:
    return condition.type not in _QUIET_WHEN_FALSE or condition.status != "False"


def _settings(status: ServingTierStatus) -> Iterator[str]:
    if status.effective is None:
        return
    yield "Settings in force"
    for pool in status.effective.pools:
        yield from _pool_settings(pool)
    if status.effective.slo:
        goals = ", ".join(f"{name} {value}" for name, value in status.effective.slo.items())
        yield f"  objectives: {goals} ({status.effective.slo_reason})"
    elif status.effective.slo_reason:
        yield f"  objectives: none ({status.effective.slo_reason})"
    plan = status.plan
    if plan is not None and plan.requests_per_second_per_replica is not None:
        text = f"  one replica carries {plan.requests_per_second_per_replica} requests/s"
        if plan.band_percent is not None:
            text += f" ± {plan.band_percent} %"
        if plan.source:
            text += f" ({plan.source})"
        yield text


def _pool_settings(pool: EffectivePool) -> Iterator[str]:
    yield f"  {pool.name}: {pool.image}" + (f", vLLM {pool.engine_version}" if pool.engine_version else "")
    shown = pool.model_dump(
        by_alias=True, exclude={"name", "image", "engine_version", "reasons"}, exclude_none=True
    )
    width = max(map(len, shown | pool.reasons))
    for field, value in shown.items():
        reason = pool.reasons.get(field)
        yield f"    {field:<{width}}  {value}" + (f"  ({reason})" if reason else "")
    for field, reason in pool.reasons.items():
        if field not in shown:
            yield f"    {field:<{width}}  not set  ({reason})"


def _pools(status: ServingTierStatus) -> Iterator[str]:
    if status.pools:
        yield "Pools"
    for pool in status.pools:
        yield from _pool(pool)


def _pool(pool: PoolStatus) -> Iterator[str]:
    text = f"  {pool.name} ({pool.role}): {pool.ready} ready of {pool.replicas}, wanted {pool.desired}"
    if pool.recommended is not None and pool.recommended != pool.desired:
        text += f", recommended {pool.recommended}"
    if pool.lent:
        text += f", {pool.lent} of them lent or on their way"
    if pool.borrowed:
        text += f", and {pool.borrowed} borrowed of other tiers"
    if pool.scale_target_ref is not None:
        text += f"; an HPA may target {pool.scale_target_ref.kind} {pool.scale_target_ref.name}"
    yield text
    if pool.signals:
        yield "    " + ", ".join(f"{name} {value}" for name, value in pool.signals.items())


def _objectives(status: ServingTierStatus) -> Iterator[str]:
    if status.slo:
        yield "Objectives"
    for each in status.slo:
        yield f"  {_objective(each)}"
        if each.resolution:
            yield f"    {each.resolution}"


def _objective(each: ObjectiveStatus) -> str:
    text = f"{each.objective} within {each.target}: now {each.observed or 'not measured'}"
    if each.attainment_percent is not None:
        text += f"; met by {_percent(each.attainment_percent)} over the window"
    if each.error_budget_left_percent is not None:
        text += f", {_percent(each.error_budget_left_percent)} of the error budget left"
    return text


def _percent(text: str) -> str:
    """Return a percentage of the status; where it is an interval, what is proved comes first."""
    least, _, most = text.partition("–")
    if not most:
        return f"{text} %"
    return f"at least {least} %" + ("" if float(most) >= 100 else f" and at most {most} %")


def _cost(status: ServingTierStatus) -> Iterator[str]:
    cost = status.cost
    if cost is None or cost.per_hour is None:
        return
    yield "Cost"
    text = f"  {cost.per_hour} {cost.currency} an hour"
    if cost.idle_per_hour is not None:
        text += f", {cost.idle_per_hour} of it idle"
    if cost.per_million_output_tokens is not None:
        text += f"; {cost.per_million_output_tokens} per 1M output tokens"
    yield f"{text} (prices: {cost.price_source})"


def _decisions(status: ServingTierStatus) -> Iterator[str]:
    yield "Decisions, newest first"
    if not status.decisions:
        yield "  none yet"
    for each in status.decisions:
        move = (
            f"{each.from_replicas} → {each.to_replicas}"
            if each.from_replicas != each.to_replicas
            else "stays"
        )
        acted = "" if each.acted else ", not carried out"
        subject = each.pool
        if each.engine is not None:
            came = each.to_replicas > each.from_replicas
            subject = f"engine {each.engine} {'came' if came else 'left'}, engines that serve"
        yield f"  {each.time}  {subject} {move} ({each.binding}{acted}): {each.reason}"
        if each.would_change:
            yield f"      what would change it: {each.would_change}"
