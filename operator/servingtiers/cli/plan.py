"""``servingtiers plan``: the cheapest fleet that keeps the objectives, or why none can."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servingtiers.cli._options import InputError, OneLineCommand, input_errors, warn_of_quantized_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from servingtiers.catalog.models import ModelShape
    from servingtiers.performance.planner import Choice, Constraints, Demand, Objective, Plan, Rejection

__all__ = ["command"]

_PERCENTILES = ("p50", "p90", "p95", "p99", "p999")
_TARGET_TPOT_MS = 50.0
"""Time per token that goes with an unqualified "p99": 20 tokens a second, faster than people read."""
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_LONGEST_NAME = 63
_MOST_REPLICAS = 1000
"""Bound of maxReplicas in the API."""


@click.command("plan", cls=OneLineCommand)
@click.option(
    "--model", "models", multiple=True, metavar="NAME", help="Model id or config.json; several compete."
)
@click.option("--rate", type=float, help="Requests per second of the whole fleet.")
@click.option("--prompt-tokens", type=float, help="Mean prompt length.  [default: 512]")
@click.option("--output-tokens", type=float, help="Mean output length.  [default: 128]")
@click.option("--length-cv", type=float, help="Spread of both lengths (log-normal).  [default: 0]")
@click.option("--prefix-hit-rate", type=float, help="Cached share of a prompt, 0-1.  [default: 0]")
@click.option(
    "--arrivals", default="poisson", show_default=True, metavar="KIND", help="poisson, constant, gamma:CV."
)
@click.option(
    "--slo",
    "slos",
    multiple=True,
    metavar="METRIC.PERCENTILE=TIME",
    help="Objective, such as ttft.p99=500ms, tpot.p99=50ms, itl.p99=100ms or e2e.p95=10s; several hold at once.",
)
@click.option(
    "--p99",
    metavar="TIME",
    help="An unqualified p99, such as 200ms: answered in three readings, as end-to-end, as TTFT, and as TTFT with "
    "TPOT p99 ≤ 50 ms.",
)
@click.option(
    "--accelerator", "accelerators", multiple=True, metavar="KEY", help="Allowed; all when left out."
)
@click.option("--tensor-parallel", type=int, multiple=True, help="Allowed; 1, 2, 4 and 8 when left out.")
@click.option("--weights", multiple=True, metavar="TYPE", help="bf16, fp8, int8 or int4; several compete.")
@click.option(
    "--kv-dtype", type=click.Choice(["bf16", "fp8"]), help="Data type of the KV cache.  [default: bf16]"
)
@click.option(
    "--kv-link", type=float, default=25.0, show_default=True, help="Link that KV caches move over, GB/s."
)
@click.option("--max-num-seqs", type=int, multiple=True, help="Batch limits to try; chosen when left out.")
@click.option("--max-num-batched-tokens", type=int, help="Token budget of a step; chosen when left out.")
@click.option("--price", "prices", multiple=True, metavar="KEY=USD", help="Price of an accelerator per hour.")
@click.option(
    "--profile",
    type=click.Path(dir_okay=False),
    help="Measured profile (CSV) of the one model, accelerator and tensor parallelism that are allowed.",
)
@click.option("--spare", type=int, default=1, show_default=True, help="Replicas beyond the load, per pool.")
@click.option("--tail-margin", type=float, help="Factor on predicted TTFT p99 and p99.9.  [default: 1.4]")
@click.option(
    "--disaggregation",
    type=click.Choice(["auto", "never", "only"]),
    default="auto",
    show_default=True,
    help="Separate prefill and decode pools.",
)
@click.option(
    "-f",
    "--file",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Plan for the ServingTier in this YAML file; flags override what it says.",
)
@click.option("--name", help="Name of the ServingTier that -o yaml prints.")
@click.option("--namespace", default="default", show_default=True, help="Its namespace.")
@click.option(
    "--top", type=int, default=5, show_default=True, help="Fleets to check by simulation, and to print."
)
@click.option(
    "--no-simulation", is_flag=True, help="Closed forms only: faster, and without the simulator extra."
)
@click.option(
    "-o", "--output", type=click.Choice(["table", "json", "yaml", "html"]), default="table", show_default=True
)
def command(output: str, path: Path | None, name: str | None, namespace: str, top: int, **flags: Any) -> None:
    """Find the cheapest fleet that keeps the objectives.

    Every model × weights × accelerator × tensor parallelism × batch limit, aggregated or disaggregated, is sized for
    the load with a spare replica, priced and ranked; the cheapest are checked by simulating their engines token by
    token. When nothing can keep the objectives the answer says why, and which nearest ones can be kept.
    """
    with input_errors():
        _check_identity(name, namespace)
        document = _tier(path)
        models = _models(flags["models"], document)
        demand = _demand(flags, document)
        constraints = _profiled(_constraints(flags, document), models, demand, flags["profile"])
        constraints = _within_budget(constraints)
        questions = _questions(flags, document)
        if top < 1:
            raise ValueError(f"--top {top}: use 1 or more")
        plans = [
            (
                heading,
                _plan(models, demand, objectives, constraints, top, simulate=not flags["no_simulation"]),
            )
            for heading, objectives in questions
        ]
    _say_what_has_no_effect(flags)
    with input_errors():
        _print(plans, constraints, output, name, namespace, top, document, _engine_fields(flags))
    if not any(plan.feasible for _, plan in plans):
        raise SystemExit(3)


def _plan(
    models: Sequence[ModelShape],
    demand: Demand,
    objectives: tuple[Objective, ...],
    constraints: Constraints,
    top: int,
    *,
    simulate: bool,
) -> Plan:
    from servingtiers.performance.planner import plan

    if not simulate:
        return plan(models, demand, objectives, constraints)
    try:
        from servingtiers.performance.confirmation import confirm
    except ImportError as error:
        raise ValueError(
            "the simulator is not installed: pip install 'servingtiers[simulator]', or add --no-simulation"
        ) from error
    return plan(models, demand, objectives, constraints, confirm=confirm, top=top)


# --- what is asked --------------------------------------------------------------------------------------------
def _tier(path: Path | None) -> Any:
    """Read a ServingTier; None when there is no file.

    Raises:
        ValueError: It is no ServingTier; the message names the field.
    """
    if path is None:
        return None
    import yaml
    from pydantic import ValidationError

    from servingtiers.api.spec import ServingTier

    try:
        documents = [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if isinstance(d, dict)]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {str(error).splitlines()[0]}") from error
    tiers = [d for d in documents if d.get("kind") == "ServingTier"]
    if len(tiers) != 1:
        raise ValueError(f"{path} holds {len(tiers)} ServingTiers: give a file with exactly one")
    try:
        return ServingTier.model_validate(tiers[0])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}") from error


def _models(names: tuple[str, ...], document: Any) -> list[ModelShape]:
    from servingtiers.catalog.models import model_as_asked

    if not names and document is not None:
        names = (document.spec.model.name,)
    if not names:
        raise ValueError("--model is missing: name one or more, or give a tier with -f")
    return list(dict.fromkeys(map(model_as_asked, names)))


def _demand(flags: dict[str, Any], document: Any) -> Demand:
    from servingtiers.performance.planner import Demand
    from servingtiers.performance.workload import Arrivals

    work = document.spec.workload if document is not None else None
    rate = flags["rate"]
    if rate is None and work is not None and work.requests_per_second is not None:
        rate = float(work.requests_per_second)
    if rate is None:
        raise ValueError("--rate is missing: give the requests per second to plan for")

    def lengths(given: float | None, said: Any, default: float) -> tuple[float, float]:
        if given is not None:
            return given, flags["length_cv"] or 0.0
        if said is None:
            return default, flags["length_cv"] or 0.0
        return float(said.mean), _spread(said) if flags["length_cv"] is None else flags["length_cv"]

    prompt, prompt_cv = lengths(flags["prompt_tokens"], work.prompt_tokens if work else None, 512.0)
    output, output_cv = lengths(flags["output_tokens"], work.output_tokens if work else None, 128.0)
    hits = flags["prefix_hit_rate"]
    if hits is None:
        hits = work.prefix_hit_percent / 100.0 if work is not None else 0.0
    return Demand(rate, prompt, output, prompt_cv, output_cv, hits, Arrivals.parse(flags["arrivals"]))


def _spread(said: Any) -> float:
    """Return the coefficient of variation of lengths as a tier says them; without a 95th percentile they vary as usual."""
    from servingtiers.performance.workload import length_cv_from_p95

    return length_cv_from_p95(said.mean, said.p95 if said.p95 is not None else 2.5 * said.mean)


def _constraints(flags: dict[str, Any], document: Any) -> Constraints:
    from servingtiers.catalog.accelerators import accelerator, accelerators
    from servingtiers.catalog.models import WEIGHT_BYTES
    from servingtiers.performance.planner import BATCH_LIMITS, TAIL_MARGIN, Constraints

    prices = {}
    for text in flags["prices"]:
        key, _, value = text.partition("=")
        price = _number(value)
        if not 0.0 < price < math.inf:
            raise ValueError(f"--price {text!r}: write it like h100-sxm-80gb=2.50")
        prices[accelerator(key).key] = price
    limits = tuple(sorted(set(flags["max_num_seqs"])))
    if any(not 1 <= limit <= 4096 for limit in limits):
        raise ValueError(f"--max-num-seqs {limits[0] if limits[0] < 1 else limits[-1]}: use 1 to 4096")
    for dtype in flags["weights"]:
        if dtype not in WEIGHT_BYTES:
            raise ValueError(f"unknown weights data type {dtype!r}: use one of {', '.join(WEIGHT_BYTES)}")
    sizes = tuple(sorted(set(flags["tensor_parallel"])))
    if any(size < 1 for size in sizes):
        raise ValueError(f"--tensor-parallel {sizes[0]}: use 1, 2, 4 or 8")
    budget = flags["max_num_batched_tokens"]
    if budget is not None and not 32 <= budget <= 262_144:
        raise ValueError(f"--max-num-batched-tokens {budget}: use 32 to 262144")
    if not 0.0 < flags["kv_link"] < math.inf:
        raise ValueError(f"--kv-link {flags['kv_link']:g}: use a number of GB/s above 0")
    if flags["spare"] < 0:
        raise ValueError(f"--spare {flags['spare']}: use 0 or more")
    margin = flags["tail_margin"] if flags["tail_margin"] is not None else TAIL_MARGIN
    if not 1.0 <= margin <= 10.0:
        raise ValueError(f"--tail-margin {margin:g}: use 1 to 10")
    chosen = tuple(dict.fromkeys(accelerator(key) for key in flags["accelerators"])) or accelerators()
    constraints = Constraints(
        accelerators=chosen,
        tensor_parallel=sizes or (1, 2, 4, 8),
        weights=tuple(dict.fromkeys(flags["weights"])) or ("bf16",),
        kv_dtype=flags["kv_dtype"] or "bf16",
        batch_limits=limits or BATCH_LIMITS,
        max_num_batched_tokens=flags["max_num_batched_tokens"],
        aggregated=flags["disaggregation"] != "only",
        disaggregation=flags["disaggregation"] != "never",
        prices=prices,
        spare=flags["spare"],
        tail_margin=margin,
        link_gb_s=flags["kv_link"],
    )
    return constraints if document is None else _constrained(constraints, document, flags)


def _profiled(
    constraints: Constraints, models: list[ModelShape], demand: Demand, path: str | None
) -> Constraints:
    """Take over a profile, which is of one engine, and plan for no larger batches than it can tell of.

    Raises:
        ValueError: More than one engine is allowed, or the profile is malformed.
    """
    from servingtiers.performance.planner import BATCH_LIMITS
    from servingtiers.performance.profile import load_profile
    from servingtiers.performance.tables import hull_of

    if path is None:
        return constraints
    keys = {gpu.key for gpu in constraints.accelerators}
    if constraints.by_role:
        keys &= frozenset().union(*constraints.by_role.values())
    for what, allowed in (
        ("--model", len(models)),
        ("--accelerator", len(keys)),
        ("--tensor-parallel", len(constraints.tensor_parallel)),
        ("--weights", len(constraints.weights)),
    ):
        if allowed != 1:
            raise ValueError(f"--profile is of one engine, and {allowed} {what} values are allowed: give one")
    profile, limits = load_profile(path), constraints.batch_limits
    if limits is BATCH_LIMITS:  # nobody asked for certain ones
        largest = hull_of(profile.rows).largest_batch(demand.context)
        limits = tuple(limit for limit in limits if limit <= largest) or limits[:1]
    return replace(constraints, profile=profile, batch_limits=limits)


def _within_budget(constraints: Constraints) -> Constraints:
    """Leave out batches that a given token budget has no room for: every running sequence needs a token of each step.

    Raises:
        ValueError: None is left.
    """
    budget, limits = constraints.max_num_batched_tokens, constraints.batch_limits
    if budget is None or limits[-1] <= budget:
        return constraints
    kept = tuple(limit for limit in limits if limit <= budget)
    if not kept:
        raise ValueError(
            f"max-num-batched-tokens {budget} is below max-num-seqs {limits[0]}: raise it, every running sequence "
            "needs a token of each step's budget"
        )
    return replace(constraints, batch_limits=kept)


def _check_identity(name: str | None, namespace: str) -> None:
    """Refuse names that the API server would refuse."""
    for option, text in (("--name", name), ("--namespace", namespace)):
        if text is not None and not (_LABEL.fullmatch(text) and len(text) <= _LONGEST_NAME):
            raise ValueError(
                f"{option} {text!r}: use up to {_LONGEST_NAME} of a-z, 0-9 and -, a letter or digit at both ends"
            )


def _say_what_has_no_effect(flags: dict[str, Any]) -> None:
    """Name on standard error what was given and changes nothing here, and weights that a name contradicts."""
    if flags["no_simulation"] and flags["arrivals"].strip().lower() != "poisson":
        click.echo(
            "note: --arrivals counts in simulation only; with --no-simulation they are Poisson", err=True
        )
    if not flags["weights"]:
        for name in flags["models"]:
            warn_of_quantized_name(name, "bf16")


def _engine_fields(flags: dict[str, Any]) -> frozenset[str]:
    """Return the fields of a tier's engine that flags have overridden."""
    fields = {
        "max_num_seqs": "maxNumSeqs",
        "max_num_batched_tokens": "maxNumBatchedTokens",
        "weights": "quantization",
        "kv_dtype": "kvCacheDtype",
    }
    return frozenset(field for flag, field in fields.items() if flags[flag])


def _constrained(constraints: Constraints, document: Any, flags: dict[str, Any]) -> Constraints:
    """Take over what a tier allows, where no flag says otherwise."""
    from servingtiers.catalog.accelerators import accelerator
    from servingtiers.performance.planner import Role

    spec = document.spec
    if spec.disaggregation is not None:
        pools = {Role.PREFILL: spec.disaggregation.prefill, Role.DECODE: spec.disaggregation.decode}
        constraints = replace(constraints, aggregated=False)
    else:
        pools = {Role.AGGREGATED: spec.pool} if spec.pool is not None else {}
        constraints = replace(constraints, disaggregation=flags["disaggregation"] == "only")
    by_role = {
        role: frozenset(accelerator(key).key for key in pool.hardware.accelerators)
        for role, pool in pools.items()
        if pool.hardware.accelerators
    }
    if by_role and not flags["accelerators"]:
        constraints = replace(constraints, by_role=by_role)
    engines = [pool.engine for pool in pools.values()]
    sizes = {pool.hardware.tensor_parallel for pool in pools.values()} - {None}
    if sizes and not flags["tensor_parallel"]:
        constraints = replace(constraints, tensor_parallel=tuple(sorted(sizes)))
    batches = {engine.max_num_seqs for engine in engines} - {None}
    if batches and not flags["max_num_seqs"]:
        constraints = replace(constraints, batch_limits=tuple(sorted(batches)))
    budgets = {engine.max_num_batched_tokens for engine in engines} - {None}
    if budgets and constraints.max_num_batched_tokens is None:
        constraints = replace(constraints, max_num_batched_tokens=min(budgets))
    named = {"FP8": ("fp8",), "INT8": ("int8",), "INT4": ("int4",), "Auto": ("bf16", "fp8")}
    if flags["kv_dtype"] is None and any(engine.kv_cache_dtype.value == "FP8" for engine in engines):
        constraints = replace(constraints, kv_dtype="fp8")
    if not flags["weights"]:
        for engine in engines:
            if engine.quantization is not None and engine.quantization.value in named:
                constraints = replace(constraints, weights=named[engine.quantization.value])
    return constraints


def _questions(flags: dict[str, Any], document: Any) -> list[tuple[str, tuple[Objective, ...]]]:
    """The objectives, or three readings of them."""
    from servingtiers.performance.planner import Metric, Objective

    given = tuple(_objective(text) for text in flags["slos"])
    if flags["p99"] is not None:
        if given:
            raise ValueError(
                "--p99 and --slo exclude each other: qualify the p99 as --slo ttft.p99=… or e2e.p99=…"
            )
        target = _milliseconds(flags["p99"])
        text = flags["p99"]
        return [
            (f"As end-to-end p99 ≤ {text}", (Objective(Metric.E2E, "p99", target),)),
            (f"As TTFT p99 ≤ {text}", (Objective(Metric.TTFT, "p99", target),)),
            (
                f"As TTFT p99 ≤ {text} and TPOT p99 ≤ 50 ms",
                (Objective(Metric.TTFT, "p99", target), Objective(Metric.TPOT, "p99", _TARGET_TPOT_MS)),
            ),
        ]
    if not given and document is not None:
        given = _objectives_of(document)
    heading = " and ".join(str(o) for o in given) or "No objective: the cheapest tokens"
    return [(heading, given)]


def _objectives_of(document: Any) -> tuple[Objective, ...]:
    from servingtiers.api.base import parse_duration
    from servingtiers.performance.planner import Metric, Objective

    slo = document.spec.slo
    if slo is None:
        defaults = {"Latency": (500.0, 50.0), "Balanced": (2000.0, 100.0)}.get(document.spec.tier.value)
        if defaults is None:
            return ()
        return (Objective(Metric.TTFT, "p99", defaults[0]), Objective(Metric.TPOT, "p99", defaults[1]))
    found = []
    for metric in Metric:
        targets = getattr(slo, metric.value)
        for percentile in _PERCENTILES:
            value = getattr(targets, percentile) if targets is not None else None
            if value is not None:
                found.append(Objective(metric, percentile, 1e3 * parse_duration(value)))
    return tuple(found)


def _objective(text: str) -> Objective:
    from servingtiers.performance.planner import Metric, Objective

    matched = re.fullmatch(
        r"(ttft|tpot|itl|e2e)\.(mean|p50|p90|p95|p99|p999)\s*(?:=|<=|≤)\s*(.+)", text.strip().lower()
    )
    if matched is None:
        raise ValueError(f"--slo {text!r}: write it like ttft.p99=500ms, tpot.p99=50ms or e2e.p95=10s")
    return Objective(Metric(matched[1]), matched[2], _milliseconds(matched[3]))


def _milliseconds(text: str) -> float:
    matched = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(us|ms|s|m)", text.strip().lower())
    if matched is None or float(matched[1]) <= 0.0:
        raise ValueError(f"{text!r} is no time: write it like 200ms, 1.5s or 800us")
    return float(matched[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}[matched[2]]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


# --- what is answered -----------------------------------------------------------------------------------------
def _print(
    plans: list[tuple[str, Plan]],
    constraints: Constraints,
    output: str,
    name: str | None,
    namespace: str,
    top: int,
    document: Any,
    overridden: frozenset[str],
) -> None:
    if output == "json":
        answers = [_json(heading, plan, constraints, top) for heading, plan in plans]
        click.echo(json.dumps(answers[0] if len(answers) == 1 else {"readings": answers}, indent=2))
    elif output == "yaml":
        _print_yaml(plans, name, namespace, document, overridden)
    elif output == "html":
        try:
            from servingtiers.reporting.planning import plan_page

            click.echo(plan_page(plans, constraints), nl=False)
        except ModuleNotFoundError as error:
            raise InputError(
                "the reports extra is not installed: pip install 'servingtiers[reports]'"
            ) from error
    else:
        click.echo("\n\n".join(_table(heading, plan, top) for heading, plan in plans))
        used = [p.option.accelerator for _, plan in plans for c in plan.choices[:top] for p in c.pools]
        for source in dict.fromkeys(constraints.price_source(accelerator) for accelerator in used):
            click.echo(f"prices: {source if source != 'given' else 'as given with --price'}")


def _table(heading: str, plan: Plan, top: int) -> str:
    from servingtiers.reporting.planning import CHOICE_COLUMNS, choice_cells

    lines = [heading, plan.verdict]
    shown = plan.choices[:top]
    if shown:
        several = len({choice.model.name for choice in plan.choices}) > 1
        rows = [CHOICE_COLUMNS, *(choice_cells(choice, with_model=several) for choice in shown)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(CHOICE_COLUMNS))]
        left = {CHOICE_COLUMNS.index("fleet"), CHOICE_COLUMNS.index("bound by")}
        lines += [
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.append(f"source of the first: {'; '.join(pool.source for pool in shown[0].pools)}")
    else:
        lines += [f"  {r.what}: {r.reason}" for r in _telling(plan, 2 * top)]
    if plan.nearest_choice is not None:
        choice = plan.nearest_choice
        fleet = " + ".join(f"{pool.replicas} x ({pool.option.hardware})" for pool in choice.pools)
        lines.append(f"the nearest feasible objectives take {fleet} at {choice.cost_per_hour:,.2f} USD/hour")
    return "\n".join(lines)


def _telling(plan: Plan, count: int) -> list[Rejection]:
    """The rejections worth showing: of each accelerator the fastest option and the smallest, fastest first."""
    shown: dict[str, list[Rejection]] = {}
    for rejection in plan.rejections:
        shown.setdefault(rejection.what.rsplit(" x ", 1)[-1], []).append(rejection)
    return [
        rejection
        for members in list(shown.values())[: max(count // 2, 1)]
        for rejection in dict.fromkeys((members[0], min(members, key=lambda r: r.what)))
    ]


def _json(heading: str, plan: Plan, constraints: Constraints, top: int) -> dict[str, Any]:
    return {
        "question": heading,
        "feasible": plan.feasible,
        "verdict": plan.verdict,
        "objectives": [_objective_json(o) for o in plan.objectives],
        "nearestFeasible": [_objective_json(o) for o in plan.nearest],
        "nearestChoice": _choice_json(plan.nearest_choice, constraints) if plan.nearest_choice else None,
        "choices": [_choice_json(choice, constraints) for choice in plan.choices[:top]],
        "rejections": [{"option": r.what, "reason": r.reason} for r in plan.rejections],
    }


def _objective_json(objective: Objective) -> dict[str, Any]:
    return {
        "metric": objective.metric.value,
        "percentile": objective.percentile,
        "targetMs": objective.target_ms,
    }


def _choice_json(choice: Choice, constraints: Constraints) -> dict[str, Any]:
    return {
        "model": choice.model.name,
        "kind": choice.kind,
        "pools": [
            {
                "role": pool.role.value,
                "accelerator": pool.option.accelerator.key,
                "tensorParallel": pool.option.tensor_parallel,
                "weights": pool.option.weights,
                "maxNumSeqs": pool.option.max_num_seqs,
                "maxNumBatchedTokens": pool.option.max_num_batched_tokens,
                "requestsPerSecondPerReplica": round(pool.replica_rate, 4),
                "replicasNeeded": pool.needed,
                "replicas": pool.replicas,
                "pricePerAcceleratorHour": constraints.price(pool.option.accelerator),
                "priceSource": constraints.price_source(pool.option.accelerator),
                "source": pool.source,
                "bandPercent": round(pool.band_percent, 2),
            }
            for pool in choice.pools
        ],
        "accelerators": choice.accelerators,
        "costPerHour": round(choice.cost_per_hour, 4),
        "costPerMillionOutputTokens": round(choice.cost_per_million_output, 5),
        "costPerMillionTokens": round(choice.cost_per_million_tokens, 5),
        "currency": "USD",
        "ttftMs": choice.ttft.to_json(),
        "tpotMs": choice.tpot.to_json(),
        "e2eMs": choice.e2e.to_json(),
        "binding": choice.binding,
        "bandPercent": round(choice.band_percent, 2),
        "confirmedBySimulation": choice.confirmed,
    }


def _print_yaml(
    plans: list[tuple[str, Plan]],
    name: str | None,
    namespace: str,
    document: Any,
    overridden: frozenset[str],
) -> None:
    """Print the cheapest choice of the last feasible reading as a ServingTier; without one, only say why."""
    import yaml

    feasible = [(heading, plan) for heading, plan in plans if plan.feasible]
    if not feasible:
        click.echo(f"Error: {plans[-1][1].verdict}", err=True)
        return
    heading, plan = feasible[-1]
    tier = tier_document(plan, name=name, namespace=namespace, given=document, overridden=overridden)
    lines = [heading, plan.verdict, f"source: {plan.choices[0].pools[-1].source}", *_cautions(plan, tier)]
    comment = "".join(f"# {line}\n" for line in lines)
    click.echo(comment + yaml.safe_dump(tier, sort_keys=False, allow_unicode=True, width=110), nl=False)


def _cautions(plan: Plan, tier: dict[str, Any]) -> Iterator[str]:
    """Yield what of a plan its ServingTier cannot say, or says otherwise."""
    spec, choice = tier["spec"], plan.choices[0]
    for pool in choice.pools:
        written = spec["pool"] if "pool" in spec else spec["disaggregation"][pool.role.value]
        most = written["scaling"].get("maxReplicas", 8)
        if most < pool.replicas:
            yield (
                f"CAUTION: maxReplicas {most} is below the {pool.replicas} replicas of this plan: raise it"
                if most < _MOST_REPLICAS
                else f"CAUTION: a pool has {_MOST_REPLICAS} replicas at most, this plan {pool.replicas}: "
                "split the traffic over several tiers"
            )
    for objective in plan.objectives:
        if objective.percentile == "mean":
            yield f"CAUTION: {objective} is left out: a tier's objectives are percentiles"
    if Path(spec["model"]["name"]).exists():
        yield "CAUTION: model.name is a path: write the model's id in its place"


def tier_document(
    plan: Plan,
    *,
    name: str | None,
    namespace: str,
    given: Any = None,
    overridden: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Return the ServingTier that asks for a plan's cheapest choice.

    Args:
        plan: A feasible plan.
        name: Its name; made from the model and tier when None.
        namespace: Its namespace.
        given: The ServingTier that was planned for; what it says is kept where the plan is not of something else.
        overridden: Fields of its engines that the plan has other values for.
    """
    from servingtiers.api.spec import ServingTier
    from servingtiers.catalog.models import published_name
    from servingtiers.performance.planner import Role

    choice = plan.choices[0]
    spec: dict[str, Any] = {}
    if given is not None:
        spec = given.model_dump(by_alias=True, exclude_unset=True, mode="json")["spec"]
        name = name or given.metadata.name
        said = given.spec.model.name
        if choice.model.name != (published_name(said) or said):
            # Another model: its revision and source are the old one's; clients go on using the served name.
            served = spec["model"].get("servedName")
            spec["model"] = {"name": choice.model.name} | ({"servedName": served} if served else {})
    spec.setdefault("tier", _tier_name(plan))
    spec.setdefault("model", {"name": choice.model.name})
    slo = _slo_document(plan)
    if slo and (
        "slo" not in spec or (given is not None and set(_objectives_of(given)) != set(plan.objectives))
    ):
        window = spec.get("slo", {}).get("window")
        spec["slo"] = ({"window": window} if window else {}) | slo
    spec["workload"] = _workload_document(plan.demand, given)
    spec.pop("pool", None)
    spec.pop("disaggregation", None)
    pools = {pool.role: _pool_document(pool, given, overridden) for pool in choice.pools}
    if Role.AGGREGATED in pools:
        spec["pool"] = pools[Role.AGGREGATED]
    else:
        spec["disaggregation"] = {"prefill": pools[Role.PREFILL], "decode": pools[Role.DECODE]}
    document = {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "metadata": {"name": name or _name(choice.model.name, str(spec["tier"])), "namespace": namespace},
        "spec": spec,
    }
    ServingTier.model_validate(document)  # what is printed can be applied
    return document


def _slo_document(plan: Plan) -> dict[str, dict[str, str]]:
    from servingtiers.api.base import format_duration

    slo: dict[str, dict[str, str]] = {}
    for objective in plan.objectives:
        if objective.percentile != "mean":
            target = format_duration(objective.target_ms / 1e3)
            slo.setdefault(objective.metric.value, {})[objective.percentile] = target
    return slo


def _workload_document(demand: Demand, given: Any) -> dict[str, Any]:
    """Return the traffic that was planned for, in the given tier's words where it says the same."""
    planned: dict[str, Any] = {
        "requestsPerSecond": f"{demand.rate:.6f}".rstrip("0").rstrip("."),
        "promptTokens": _lengths(demand.prompt_tokens, demand.prompt_cv),
        "outputTokens": _lengths(demand.output_tokens, demand.output_cv),
        "prefixHitPercent": round(100 * demand.prefix_hit_rate),
    }
    said = given.spec.workload if given is not None else None
    if said is None:
        return planned
    kept = said.model_dump(by_alias=True, exclude_unset=True, mode="json")
    if said.requests_per_second is not None and float(said.requests_per_second) == demand.rate:
        planned["requestsPerSecond"] = kept["requestsPerSecond"]
    for field, lengths, mean, cv in (
        ("promptTokens", said.prompt_tokens, demand.prompt_tokens, demand.prompt_cv),
        ("outputTokens", said.output_tokens, demand.output_tokens, demand.output_cv),
    ):
        if lengths is not None and (float(lengths.mean), _spread(lengths)) == (mean, cv):
            planned[field] = kept[field]
    return planned


def _tier_name(plan: Plan) -> str:
    if not plan.objectives:
        return "Throughput"
    fast = any(
        (o.metric.value == "ttft" and o.target_ms <= 1000.0)
        or (o.metric.value in {"tpot", "itl"} and o.target_ms <= 60.0)
        for o in plan.objectives
    )
    return "Latency" if fast else "Balanced"


def _lengths(mean: float, cv: float) -> dict[str, int]:
    spread = math.log1p(cv * cv)
    p95 = mean * math.exp(1.6448536269514722 * math.sqrt(spread) - spread / 2.0)
    return {"mean": max(round(mean), 1), "p95": max(round(p95), round(mean), 1)}


def _pool_document(pool: Any, given: Any, overridden: frozenset[str]) -> dict[str, Any]:
    from servingtiers.performance.planner import Role

    option = pool.option
    engine: dict[str, Any] = {
        "maxNumSeqs": option.max_num_seqs,
        "maxNumBatchedTokens": option.max_num_batched_tokens,
    }
    if option.weights != "bf16":
        engine["quantization"] = option.weights.upper()
    if option.kv_dtype == "fp8":
        engine["kvCacheDtype"] = "FP8"
    most = min(max(math.ceil(1.5 * pool.replicas), 2), _MOST_REPLICAS)
    document: dict[str, Any] = {
        "hardware": {"accelerators": [option.accelerator.key], "tensorParallel": option.tensor_parallel},
        "engine": engine,
        "scaling": {"minReplicas": 1, "maxReplicas": most},
    }
    if given is None:
        return document
    spec = given.spec
    old = spec.pool if pool.role is Role.AGGREGATED else getattr(spec.disaggregation, pool.role.value, None)
    if old is None:
        return document
    kept = old.model_dump(by_alias=True, exclude_unset=True, mode="json")
    own = {field: value for field, value in kept.get("engine", {}).items() if field not in overridden}
    return {
        "hardware": kept.get("hardware", {}) | document["hardware"],
        "engine": engine | own,
        "scaling": document["scaling"] | kept.get("scaling", {}),
    }


def _name(model: str, tier: str) -> str:
    text = re.sub(r"[^a-z0-9]+", "-", f"{model.rsplit('/', 1)[-1]}-{tier}".lower()).strip("-")
    return text[:63].rstrip("-")
