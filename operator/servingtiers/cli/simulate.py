"""``servingtiers simulate``: real traffic against a tier before it is applied, under the operator's policy or a rival's."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from servingtiers.cli._cluster import tier_from_cluster
from servingtiers.cli._options import InputError, OneLineCommand, input_errors

if TYPE_CHECKING:
    from servingtiers.api.pool import TierPool
    from servingtiers.api.spec import ServingTier
    from servingtiers.simulate.fleet import RunResult
    from servingtiers.simulate.limits import Clairvoyant
    from servingtiers.simulate.scenario import Scenario
    from servingtiers.simulate.scoring import Score
    from servingtiers.simulate.traces import Trace

__all__ = ["MOMENT", "command", "tier_documents"]

_MOST_TOKENS = 10_000_000
_LEAST_RECORDED = 120.0
_DURATION = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class _Moment(click.ParamType[float]):
    """Seconds, or a number with s, m, h or d."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, int | float):
            return float(value)
        text = str(value).strip()
        factor = _DURATION.get(text[-1:], 1.0)
        digits = text[:-1] if text[-1:] in _DURATION else text
        try:
            seconds = float(digits) * factor
        except ValueError:
            seconds = math.nan
        if not (0 <= seconds < math.inf):
            self.fail(
                f"{text!r} is no time: write seconds or a number with s, m, h or d, such as 90 or 15m",
                param,
                ctx,
            )
        return seconds


MOMENT = _Moment()
"""The type of options that are a time."""


def _span(text: str, option: str) -> tuple[float, float]:
    start, separator, end = text.partition(":")
    if not separator:
        raise InputError(f"{option} {text!r}: write FROM:TO, such as 20m:35m")
    try:
        first, last = (MOMENT.convert(part, None, None) for part in (start, end))
    except click.BadParameter as error:
        raise InputError(f"{option} {text!r}: {error.message}") from error
    if not first < last:
        raise InputError(f"{option} {text!r}: FROM must come before TO")
    return first, last


@click.command("simulate", cls=OneLineCommand)
@click.option(
    "--trace",
    "traces",
    multiple=True,
    metavar="FILE",
    help="Traffic: an Azure CSV, a Mooncake JSONL, azure-conv, azure-code or servegen (shipped), or a shape such as "
    "step:2:20:1800. One for all tiers, or one for each --tier.",
)
@click.option(
    "--from-prometheus",
    "prometheus",
    metavar="URL",
    help="Traffic: what this Prometheus recorded of the tier of the same name and namespace, re-drawn.",
)
@click.option(
    "--last",
    type=MOMENT,
    default=6 * 3600.0,
    help="With --from-prometheus, how far to look back (6h).",
    metavar="TIME",
)
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    help="Factor on the rate: below 1 thins at random, above 1 superposes copies jittered by ±30 s.",
)
@click.option("--from", "start", type=MOMENT, default=0.0, help="Where in the trace to begin (90, 15m, 2h).")
@click.option("--to", "end", type=MOMENT, default=math.inf, help="Where in the trace to end.")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    metavar="FILE.yaml",
    help="The ServingTier to try: a file, or the name of one in the cluster. Several share the accelerators; those of one "
    "sharedPool lend each other engines.",
)
@click.option(
    "-n", "--namespace", help="Where to look for a --tier NAME; the kubeconfig's own when left out."
)
@click.option(
    "--policy",
    default="servingtiers",
    show_default=True,
    metavar="NAME[,NAME…]",
    help="Policies to compare; 'all' for every one. See --list-policies.",
)
@click.option("--list-policies", is_flag=True, help="Name every policy with its source, and leave.")
@click.option("--seeds", type=click.IntRange(1, 1000), default=1, show_default=True, help="Runs per policy.")
@click.option(
    "--start-up-seconds",
    default="lognormal:130:0.2",
    show_default=True,
    metavar="DIST",
    help="From node to readiness: seconds, constant:S or lognormal:MEDIAN:SIGMA.",
)
@click.option(
    "--warm-up", type=MOMENT, default=0.0, help="Time at the start that is simulated and not scored (10m)."
)
@click.option("--max-replicas", type=click.IntRange(1, 1000), help="Overrides every pool's maxReplicas.")
@click.option("--min-replicas", type=click.IntRange(0, 1000), help="Overrides every pool's minReplicas.")
@click.option(
    "--accelerators",
    type=click.IntRange(1),
    help="Accelerators there are for all tiers; no limit if left out.",
)
@click.option(
    "--model-error",
    type=float,
    default=1.0,
    show_default=True,
    help="Capacity the controller believes in over what its model says: 1.4 is 40 % too much.",
)
@click.option(
    "--metric-gap",
    "gaps",
    multiple=True,
    metavar="FROM:TO",
    help="No metrics from engines and routers in this time.",
)
@click.option(
    "--metric-fault",
    "faults",
    multiple=True,
    metavar="KIND:FROM:TO",
    help="A fault of the metrics: nan, infinite, negative, absurd, frozen, late, ahead, reset, renamed, partial, empty, "
    "no-history, slow-scrape or twice.",
)
@click.option(
    "--crash", "crashes", multiple=True, type=MOMENT, metavar="TIME", help="One engine dies at this time."
)
@click.option(
    "--outage", "outages", multiple=True, metavar="FROM:TO", help="The autoscaler does not run in this time."
)
@click.option(
    "--shortage",
    "shortages",
    multiple=True,
    metavar="FROM:TO",
    help="New pods find no accelerator in this time.",
)
@click.option(
    "--prompt-tokens", type=float, default=1024.0, show_default=True, help="Mean prompt of a synthetic shape."
)
@click.option(
    "--output-tokens", type=float, default=256.0, show_default=True, help="Mean output of a synthetic shape."
)
@click.option(
    "--prefix-cache",
    is_flag=True,
    help="Count prompt tokens that earlier requests shared (Mooncake's hash_ids) as cache hits.",
)
@click.option(
    "--clairvoyant/--no-clairvoyant",
    default=None,
    help="Search the limit that knows the future, for gpuHoursOverClairvoyant; by default with several policies.",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "html"]),
    default="table",
    show_default=True,
    help="html is a page with plots, on standard output.",
)
@click.option("--quiet", is_flag=True, help="No progress bar.")
def command(
    traces: tuple[str, ...],
    tiers: tuple[str, ...],
    policy: str,
    seeds: int,
    output: str,
    *,
    list_policies: bool,
    clairvoyant: bool | None,
    quiet: bool,
    **flags: Any,
) -> None:
    r"""Replay traffic against tiers on a virtual clock, before they are applied.

    The engines serve from the shipped step tables with a little noise; the controller starts from the roofline and sees
    nothing but metrics, in vLLM's buckets, scraped every 15 s. Requests that were refused, lost or not finished count as
    violations; start-up and drain cost GPU-hours. Ctrl-C keeps what is done.

    \b
    Example:
      servingtiers simulate --trace azure-conv --scale 8 --tier tier.yaml --policy servingtiers,keda-waiting
    """
    if list_policies:
        _list()
        return
    if not tiers:
        raise InputError("no tier: give --tier FILE.yaml, a ServingTier")
    if bool(traces) == bool(flags["prometheus"]):
        raise InputError(
            "no traffic, or two: give --trace, such as azure-conv or a CSV file, or --from-prometheus URL"
        )
    names = _names(policy)
    _check(flags)
    documents = [
        (where, document) for each in tiers for where, document in tier_documents(each, flags["namespace"])
    ]
    results: list[tuple[Score, RunResult]] = []
    limits: list[Clairvoyant | None] = []
    want_limit = len(names) > 1 if clairvoyant is None else clairvoyant
    interrupted = False
    # In sum: per seed the limit's sweep (about ten runs) and one run per policy.
    with _progress(quiet, seeds * (len(names) + (10 if want_limit else 0))) as step:
        for seed in range(seeds):
            with input_errors():
                scenario = _scenario(documents, traces, seed, flags)
            try:
                with input_errors():
                    limit = _limit(scenario, seed, step) if want_limit or "clairvoyant" in names else None
            except KeyboardInterrupt:
                interrupted = True
                break
            limits.append(limit)
            for name in names:
                try:
                    with input_errors():
                        found = _run(name, scenario, seed, limit, step)
                except KeyboardInterrupt:
                    interrupted = True
                    break
                if found is None:
                    continue
                results.append(found)
                if not found[1].complete:
                    interrupted = True
                    break
            if interrupted:
                break
    scores = [replace(score, gpu_hours_over_clairvoyant=_over(score, limits)) for score, _ in results]
    if not scores:
        raise click.ClickException("interrupted before the first run was over: nothing to show")
    if output == "json":
        click.echo(json.dumps({"runs": [score.to_json() for score in scores]}, indent=1))
    elif output == "html":
        from servingtiers.reporting.simulation import simulation_page

        click.echo(simulation_page(scores, [result for _, result in results], limits))
    else:
        click.echo(_table(scores))
    if interrupted:
        click.echo("Interrupted: the last run is shown up to then, later ones are missing.", err=True)
        sys.exit(130)


def _list() -> None:
    from servingtiers.simulate.rivals import RIVALS, UNSHARED

    click.echo(f"{'servingtiers':21} The operator's own policy code.")
    click.echo(f"{UNSHARED:21} The same with lending between the tiers of a TierPool switched off.")
    for name, rival in RIVALS.items():
        summary = " ".join((rival.__doc__ or "").split("\n\n", maxsplit=1)[0].split())
        click.echo(f"{name:21} {summary}")
    click.echo(
        f"{'static-optimal':21} Limit: the fewest replicas, never changed, that keep violations at 1 %."
    )
    click.echo(f"{'clairvoyant':21} Limit: fewest GPU-hours with every arrival and start-up known.")


def _names(text: str) -> list[str]:
    from servingtiers.simulate.rivals import POLICIES, UNSHARED

    # Without a TierPool it is the same as the operator's policy.
    every = [name for name in POLICIES if name != UNSHARED]
    names = every if text == "all" else [each.strip() for each in text.split(",") if each.strip()]
    unknown = [name for name in names if name not in POLICIES]
    if unknown or not names:
        raise InputError(f"--policy {', '.join(unknown) or text!r}: use {', '.join(POLICIES)} or all")
    return list(dict.fromkeys(names))


def _check(flags: dict[str, Any]) -> None:
    """Refuse numbers that no simulation can be made of."""
    for option in ("prompt_tokens", "output_tokens"):
        if not 1 <= flags[option] <= _MOST_TOKENS:
            raise InputError(f"--{option.replace('_', '-')} {flags[option]:g}: use 1 to {_MOST_TOKENS}")
    if not 0.01 <= flags["model_error"] <= 100:
        raise InputError(
            f"--model-error {flags['model_error']:g}: use a factor from 0.01 to 100, such as 1.4"
        )
    if not 0 < flags["scale"] < math.inf:
        raise InputError(f"--scale {flags['scale']:g}: use a number above 0, such as 0.5 or 8")
    if not flags["start"] < flags["end"]:
        raise InputError(
            f"--from {flags['start']:g} s is not before --to {flags['end']:g} s: give --from below --to"
        )
    least, most = flags["min_replicas"], flags["max_replicas"]
    if least is not None and most is not None and least > most:
        raise InputError(f"--min-replicas {least} is above --max-replicas {most}: give a smaller one")
    if flags["prometheus"] and flags["last"] < _LEAST_RECORDED:
        raise InputError(f"--last {flags['last']:g} s: look back for {_LEAST_RECORDED:g} s or more")


def _check_times(seconds: float, flags: dict[str, Any]) -> None:
    """Refuse events that would never come."""
    for option, values in (
        ("metric-gap", flags["gaps"]),
        ("metric-fault", [text.partition(":")[2] for text in flags["faults"]]),
        ("outage", flags["outages"]),
        ("shortage", flags["shortages"]),
    ):
        for text in values:
            if _span(text, f"--{option}")[0] >= seconds:
                raise InputError(
                    f"--{option} {text}: the traffic ends at {seconds:g} s: choose an earlier time"
                )
    for time_ in flags["crashes"]:
        if time_ >= seconds:
            raise InputError(f"--crash {time_:g}: the traffic ends at {seconds:g} s: choose an earlier time")


def tier_documents(given: str, namespace: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where it is from, ServingTier or TierPool) of a file, or of the cluster."""
    path = Path(given)
    if not path.exists() and re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", given):
        try:
            yield given, tier_from_cluster(given, namespace, None)
        except InputError as error:
            raise InputError(f"--tier {given}: no such file, and {error.message}") from error
        return
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: no YAML that can be read ({' '.join(str(error).split())})") from error
    kinds = [each.get("kind") for each in documents if isinstance(each, dict)]
    if "ServingTier" not in kinds:
        raise InputError(f"{path} holds no ServingTier: give a document with kind: ServingTier")
    for each in documents:
        if isinstance(each, dict) and each.get("kind") in {"ServingTier", "TierPool"}:
            yield str(path), each


def _pools(documents: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, TierPool]:
    """Return the TierPools that were given, by namespace and name."""
    from servingtiers.api.pool import TierPool

    pools = {}
    for where, document in documents:
        if document.get("kind") != "TierPool":
            continue
        meta = {"namespace": "default", **(document.get("metadata") or {})}
        with input_errors(f"{where}: TierPool {meta.get('name')}"):
            pool = TierPool.model_validate({**document, "metadata": meta})
        pools[f"{meta['namespace']}/{meta['name']}"] = pool
    return pools


def _check_members(tiers: Sequence[ServingTier], pools: Mapping[str, TierPool]) -> None:
    """Refuse tiers that share a pool and that the operator would not let lend; a pool that is not given suits all."""
    from servingtiers.api.pool import TierPool
    from servingtiers.policy.membership import judge

    members: dict[str, list[ServingTier]] = {}
    for tier in tiers:
        if tier.spec.shared_pool is not None:
            members.setdefault(f"{tier.metadata.namespace}/{tier.spec.shared_pool.name}", []).append(tier)
    for key, group in members.items():
        served = group[0].spec.model.served_name or group[0].spec.model.name
        pool = pools.get(key)
        if pool is None:
            made = {
                "apiVersion": group[0].api_version,
                "kind": "TierPool",
                "spec": {"servedModelName": served},
            }
            pool = TierPool.model_validate({**made, "metadata": {"name": key.rpartition("/")[2]}})
        for name, problem in judge(pool, group).items():
            raise InputError(f"{name}: {problem.message}")


def _scenario(
    given: Sequence[tuple[str, dict[str, Any]]], traces: Sequence[str], seed: int, flags: dict[str, Any]
) -> Scenario:
    from servingtiers.simulate.scenario import Crash, Delay, NodeShortage, Outage, Scenario
    from servingtiers.simulate.telemetry import FaultKind, MetricFault
    from servingtiers.simulate.tiers import parse_tier, tier_plan
    from servingtiers.simulate.traces import load_trace

    faults = [MetricFault(FaultKind.DOWN, *_span(text, "--metric-gap")) for text in flags["gaps"]]
    for text in flags["faults"]:
        kind, _, span = text.partition(":")
        if kind not in set(FaultKind):
            raise InputError(f"--metric-fault {text!r}: the kinds are {', '.join(FaultKind)}")
        faults.append(MetricFault(FaultKind(kind), *_span(span, "--metric-fault")))
    plans = []
    documents = [each for each in given if each[1].get("kind") != "TierPool"]
    if traces and len(traces) not in {1, len(documents)}:
        raise InputError(
            f"{len(traces)} traces for {len(documents)} tiers: give one for all, or one for each"
        )
    for index, (path, document) in enumerate(documents):
        if traces:
            trace = load_trace(
                traces[index if len(traces) > 1 else 0],
                scale=flags["scale"],
                start=flags["start"],
                end=flags["end"],
                seed=seed + 1000 * index,
                prompt=flags["prompt_tokens"],
                output=flags["output_tokens"],
            )
        else:
            with input_errors(path):
                trace = _recorded(parse_tier(document), seed, flags)
        with input_errors(path):
            plans.append(
                tier_plan(
                    parse_tier(document),
                    trace,
                    model_error=flags["model_error"],
                    max_replicas=flags["max_replicas"],
                    min_replicas=flags["min_replicas"],
                    shared_prefix=flags["prefix_cache"],
                )
            )
        left = len(trace) - len(plans[-1].trace)
        if left and not seed:
            click.echo(
                f"left out: {left} of {len(trace)} requests are longer than {plans[-1].key} takes (its maxModelLen, or "
                "what its KV cache holds)",
                err=True,
            )
    pools = _pools(given)
    _check_members([parse_tier(document) for _, document in documents], pools)
    keys = [plan.key for plan in plans]
    if len(set(keys)) != len(keys):
        raise InputError("two tiers have the same namespace and name: rename one")
    _check_times(max(plan.trace.seconds for plan in plans), flags)
    shortest = min(plan.trace.seconds for plan in plans)
    if flags["warm_up"] >= shortest:
        raise InputError(
            f"--warm-up {flags['warm_up']:g} s leaves nothing of {shortest:g} s of traffic: shorten it"
        )
    return Scenario(
        tiers=tuple(plans),
        start_up=Delay.parse(flags["start_up_seconds"]),
        accelerators=flags["accelerators"],
        pool_accelerators={
            key: pool.spec.max_accelerators
            for key, pool in pools.items()
            if pool.spec.max_accelerators is not None
        },
        warm_up=flags["warm_up"],
        metric_faults=tuple(faults),
        crashes=tuple(Crash(time) for time in flags["crashes"]),
        outages=tuple(Outage(*_span(text, "--outage")) for text in flags["outages"]),
        shortages=tuple(NodeShortage(*_span(text, "--shortage")) for text in flags["shortages"]),
    )


def _recorded(tier: ServingTier, seed: int, flags: dict[str, Any]) -> Trace:
    """Return the traffic that Prometheus recorded of a tier, scaled."""
    import requests
    from prometheus_api_client import PrometheusApiClientException

    from servingtiers.core.effective import pools_asked
    from servingtiers.render import names
    from servingtiers.simulate.recorded import connect, draw_recorded, queries, read_recording

    meta = tier.metadata
    pools = pools_asked(tier.spec)
    asked = queries(
        meta.namespace,
        [names.engine_deployment(meta.name, pool.name) for pool in pools],
        names.router_deployment(meta.name),
    )
    # Whole minutes, so that every seed and every run of the same minute sees the same steps.
    now = time.time() // 60 * 60
    try:
        found = read_recording(
            connect(flags["prometheus"]), asked, start=now - flags["last"], end=now, paired=len(pools) > 1
        )
    except (requests.RequestException, PrometheusApiClientException) as error:
        raise InputError(
            f"--from-prometheus {flags['prometheus']}: no answer ({type(error).__name__}): check the address"
        ) from error
    trace = draw_recorded(found, name=f"recorded traffic of {meta.namespace}/{meta.name}", seed=seed)
    if flags["start"] > 0 or flags["end"] < trace.seconds:
        trace = trace.between(flags["start"], flags["end"])
    return trace if flags["scale"] == 1 else trace.scaled(flags["scale"], seed)


def _limit(scenario: Scenario, seed: int, step: Callable[[float, str], None]) -> Clairvoyant:
    from servingtiers.simulate.limits import clairvoyant

    return clairvoyant(scenario, seed, progress=lambda: step(1.0, "clairvoyant"))


def _run(
    name: str, scenario: Scenario, seed: int, limit: Clairvoyant | None, step: Callable[[float, str], None]
) -> tuple[Score, RunResult] | None:
    """Run one policy; None where a limit found nothing."""
    from servingtiers.simulate.fleet import run
    from servingtiers.simulate.limits import TARGET, clairvoyant_run, static_optimal, static_run
    from servingtiers.simulate.rivals import make_policy
    from servingtiers.simulate.scoring import score

    if name == "static-optimal":
        best = static_optimal(scenario, seed)
        result = static_run(scenario, best.replicas, seed)
    elif name == "clairvoyant":
        chosen = limit.best(TARGET) if limit is not None else None
        if limit is None or chosen is None:
            click.echo("clairvoyant: no schedule keeps violations at 1 % here", err=True)
            return None
        result = clairvoyant_run(scenario, seed, limit, chosen)
    else:
        length, before = scenario.seconds, 0.0

        def moved(now: float) -> None:
            nonlocal before
            step((now - before) / length, name)
            before = now

        result = run(scenario, make_policy(name, scenario), seed, moved)
        step(max(0.0, 1.0 - before / length), name)
        return score(result), result
    step(1.0, name)
    return score(result), result


def _over(score: Score, limits: Sequence[Clairvoyant | None]) -> float | None:
    """Return the GPU-hours over those of the clairvoyant with no more violations, of the same seed."""
    limit = limits[score.seed] if score.seed < len(limits) else None
    least = limit.gpu_hours(score.violations) if limit is not None else None
    return score.gpu_hours / least if least else None


_COUNTS = ("scale_ups", "scale_downs", "reversals", "rejected", "unfinished", "peak_replicas")


def _share(metric: str, score: Score) -> float:
    return score.attainment[metric]


def _table(scores: Sequence[Score]) -> str:
    """Return one row per policy and, where there are several, one for each of its tiers: the mean over its seeds."""
    columns = (
        "policy", "violations", "ttft", "tpot", "e2e", "worst 5 min", "GPU-hours", "÷ clairvoyant", "ups", "downs",
        "reversals", "rejected", "unfinished", "peak",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [columns]
    groups: list[tuple[str, Sequence[Score]]] = []
    for name in dict.fromkeys(score.policy for score in scores):
        own = [score for score in scores if score.policy == name]
        groups.append((name, own))
        groups.extend((f"  {key}", [score.tiers[key] for score in own]) for key in own[0].tiers)
    for name, mine in groups:

        def mean(of: Callable[[Score], float], mine: Sequence[Score] = mine) -> float:
            return math.fsum(of(score) for score in mine) / len(mine)

        over = [score.gpu_hours_over_clairvoyant for score in mine if score.gpu_hours_over_clairvoyant]
        rows.append(
            (
                name,
                f"{100 * mean(lambda s: s.violations):.2f} %",
                *(f"{100 * mean(partial(_share, metric)):.2f} %" for metric in ("ttft", "tpot", "e2e")),
                f"{100 * mean(lambda s: s.worst5min):.1f} %",
                f"{mean(lambda s: s.gpu_hours):.2f}",
                f"{sum(over) / len(over):.2f}" if over else "–",
                *(f"{mean(attrgetter(field)):.4g}" for field in _COUNTS),
            )
        )
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


@contextmanager
def _progress(quiet: bool, runs: int) -> Iterator[Callable[[float, str], None]]:
    """Show a bar on standard error where that is a terminal; yields a function of (runs done more, label)."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, label: None  # noqa: ARG005 - the bar's signature
        return
    with click.progressbar(length=1000 * runs, file=sys.stderr, label="simulating") as bar:
        left = 0.0

        def step(done: float, label: str) -> None:
            nonlocal left
            left += 1000.0 * done
            whole = int(left)
            left -= whole
            bar.label = label
            bar.update(whole)

        yield step
