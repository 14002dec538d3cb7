"""Writes docs/explanation/rival.md from the results beside this file: ``python -m rival.page [FILE]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

__all__ = ["RESULTS", "page", "write"]

RESULTS = Path(__file__).parent / "results.json"

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "rival.md"
_WHO = {"operator": "ServingTiers", "keda": "KEDA + HPA"}
_Run = Mapping[str, Any]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _seconds(value: float | None, *, never: str = "never") -> str:
    return never if value is None else f"{value:.0f} s"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _phase(run: _Run, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(each for each in run["phases"] if each["name"] == name)
    return found


def _middle(values: Sequence[float | None]) -> float | None:
    """Return the median; None, which is "never", where it lies among those that never came."""
    never = float("inf")
    value = median(never if each is None else each for each in values)
    return None if value == never else value


def _rows(
    results: Mapping[str, Any],
) -> list[tuple[str, Callable[[_Run], float | None], Callable[..., str], bool]]:
    """Return what is compared: its name, how to read it, how to write it, and whether less is better."""
    objectives = results["objectives"]
    first, peak = (each["name"] for each in results["load"]["phases"][1:3])
    last = results["load"]["phases"][-1]["seconds"]

    def back(value: float | None) -> str:
        return _seconds(value, never=f"not in {last:g} s")

    return [
        ("all three objectives kept", lambda run: run["joint"], _share, False),
        (f"TTFT ≤ {objectives['ttft']:g} s kept", lambda run: run["ttft"], _share, False),
        (f"TPOT ≤ {objectives['tpot'] * 1e3:g} ms kept", lambda run: run["tpot"], _share, False),
        (f"E2E ≤ {objectives['e2e']:g} s kept", lambda run: run["e2e"], _share, False),
        ("failed requests", lambda run: run["failed"], _number, True),
        ("replica-seconds held (paid)", lambda run: run["replicaSeconds"]["held"], _number, True),
        ("replica-seconds asked", lambda run: run["replicaSeconds"]["asked"], _number, True),
        ("replica-seconds ready", lambda run: run["replicaSeconds"]["ready"], _number, True),
        *(
            (f"{name}: {label}", lambda run, n=name, k=key: _phase(run, n)[k], _seconds, True)
            for name in (first, peak)
            for label, key in (
                ("more asked for after", "decidedAfter"),
                ("one more ready after", "addedAfter"),
            )
        ),
        ("load down: one asked for again after", lambda run: run["backAsked"], back, True),
        ("load down: one held again after", lambda run: run["backHeld"], back, True),
        ("direction reversals", lambda run: run["reversals"], _number, True),
    ]


def _better(ours: float | None, theirs: float | None, *, less: bool) -> str:
    if ours == theirs:
        return "level"
    worst = float("inf") if less else float("-inf")
    a, b = (worst if each is None else each for each in (ours, theirs))
    return _WHO["operator"] if (a < b) is less else _WHO["keda"]


def _comparison(results: Mapping[str, Any]) -> list[str]:
    runs = {who: [each for each in results["runs"] if each["who"] == who] for who in _WHO}
    lines = [
        f"| figure ({_counted(len(runs['operator']), len(runs['keda']))}) | {' | '.join(_WHO.values())} | better |",
        "|---|---|---|---|",
    ]
    for label, read, told, less in _rows(results):
        values = {who: [read(each) for each in mine] for who, mine in runs.items()}
        middles = {who: _middle(each) for who, each in values.items()}
        cells = [
            told(middles[who]) + (f" ({', '.join(map(told, each))})" if len(each) > 1 else "")
            for who, each in values.items()
        ]
        lines.append(
            f"| {label} | {' | '.join(cells)} | {_better(middles['operator'], middles['keda'], less=less)} |"
        )
    return lines


def _counted(ours: int, theirs: int) -> str:
    return "one run each" if ours == theirs == 1 else f"median of {ours} and {theirs} runs, and each run"


def _noise(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each phase in which all runs had the same engines: what differs there is no scaler's doing."""
    lines = []
    for shape in results["load"]["phases"]:
        phases = [_phase(run, shape["name"]) for run in results["runs"]]
        ready = [each["readyMean"] for each in phases]
        kept = [each["joint"] for each in phases]
        if max(ready) - min(ready) <= 0.02 and max(kept) - min(kept) >= 0.01:
            lines.append(
                f"In *{shape['name']}* as many engines were ready in every run ({ready[0]:g}), and they kept all objectives for"
                f" {min(kept):.1%} to {max(kept):.1%} of the requests: that much is noise, no scaler's doing."
            )
    return lines


def _phases(results: Mapping[str, Any]) -> list[str]:
    lines = [
        "| phase | who, run | requests | failed | TTFT kept | TPOT kept | E2E kept | all kept | TTFT p50 / p99 s | TPOT p50 / p99 ms | E2E p50 / p99 s | engines ready, mean |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def pair(phase: Mapping[str, Any], name: str, factor: float, digits: int) -> str:
        both = (phase[f"{name}P50"], phase[f"{name}P99"])
        return " / ".join("never" if each is None else f"{each * factor:.{digits}f}" for each in both)

    for shape in results["load"]["phases"]:
        for run in sorted(results["runs"], key=lambda each: (list(_WHO).index(each["who"]), each["round"])):
            phase = _phase(run, shape["name"])
            kept = (_share(phase[name]) for name in ("ttft", "tpot", "e2e", "joint"))
            lines.append(
                f"| {shape['name']} | {_WHO[run['who']]}, {run['round']} | {phase['requests']} | {phase['failed']} |"
                f" {' | '.join(kept)} | {pair(phase, 'ttft', 1, 2)} | {pair(phase, 'tpot', 1e3, 1)} |"
                f" {pair(phase, 'e2e', 1, 2)} | {phase['readyMean']:.2f} |"
            )
    return lines


def _courses(results: Mapping[str, Any]) -> list[str]:
    lines = ["| who, run | the pool: second: asked/held/ready |", "|---|---|"]
    for run in sorted(results["runs"], key=lambda each: (list(_WHO).index(each["who"]), each["round"])):
        course = ", ".join(f"{at:.0f}: {asked}/{held}/{ready}" for at, asked, held, ready in run["course"])
        lines.append(f"| {_WHO[run['who']]}, {run['round']} | {course} |")
    return lines


def page(results: Mapping[str, Any]) -> str:
    """Return the page."""
    load, engine, recipe, versions = (results[name] for name in ("load", "engine", "recipe", "versions"))
    low, high = engine["replicas"]
    shape = ", ".join(
        f"{each['seconds']:g} s {each['name']} ({each['share']:.0%})" for each in load["phases"]
    )
    loads = [each["loadAverage"][0] for each in results["runs"]]
    late = [each["client"]["lateP99"] for each in results["runs"]]
    lines = [
        "# Beside KEDA, on real engines",
        "",
        "Generated by `make e2e-rival` (`python -m rival.page` writes it anew from the committed results). The same load on the",
        "same engines behind the same router, scaled once by this operator and once by KEDA, which drives the Kubernetes HPA,",
        "with the recipe of vLLM's production stack. Whoever was better is named in every row, us or them.",
        "",
        *_comparison(results),
        "",
        "## What was run",
        "",
        (
            f"One real cluster of one node (Kubernetes {versions['kubernetes']}); vLLM {versions['engine']} on CPU with a tiny random model,"
            f" `--max-num-seqs {engine['batch']}`, a CPU limit of {engine['cpuLimit']} per engine, {low} to {high} engines; vllm-router"
            f" {versions['router']}; Prometheus scraping every 5 s. Both runs use the Deployment, router and Service that the operator"
            " renders, from nothing: for KEDA the tier is in mode External, in which the operator leaves replicas alone. Both"
            " programs run all the time; only one of them scales."
        ),
        "",
        (
            f"**Load.** {load['requests']} requests of {load['prompt_tokens']} prompt and {load['output_tokens']} output tokens, Poisson"
            f" arrivals in open loop by `servingtiers bench`, the same ones in every run: {shape}, as shares of the"
            f" {load['capacity']:g} requests/s that one engine sustained with its batch full just before. Runs in order:"
            f" {', '.join(_WHO[each['who']] for each in results['runs'])}. Load and objectives are chosen so that a full batch misses"
            " the objectives before a queue stands, which is what a scaler that knows objectives can see and a queue's length cannot;"
            " with objectives that a full batch keeps there would be less between the two."
        ),
        "",
        (
            f"**KEDA** {versions['keda']}, operator and metrics adapter by their own manifests. A ScaledObject on the Deployment with a"
            f" `prometheus` trigger on `{recipe['query']}`, threshold {recipe['threshold']}, `pollingInterval:"
            f" {recipe['pollingInterval']}`, `cooldownPeriod: {recipe['cooldownPeriod']}`, the HPA's defaults for everything else"
            " (15 s between its looks, 300 s of stabilization before it scales down). These are the values of production-stack's"
            " documentation (`docs/source/use_cases/autoscaling-keda.rst`, `tutorials/20-keda-autoscaling.md`) and of its chart"
            " (`helm/templates/scaledobject-vllm.yaml`), with one change in KEDA's favor: the recipe's query is"
            " `vllm:num_requests_waiting`, a series per pod, and KEDA refuses a query that returns several"
            " (`pkg/scalers/prometheus_scaler.go`), so as printed it would stop scaling at the second engine; here it is summed."
        ),
        "",
        (
            f"**The operator** with the chart's defaults, reading the pods themselves every {results['telemetry']['interval']}, the tier's"
            ' objectives as its `slo` at p99, and nothing else. Its catalog knows neither this model nor this "accelerator", so it steers by batches, queues and'
            " percentiles, without its performance model and with no history to forecast from."
        ),
        "",
        (
            "**Figures.** Latencies are the client's. A request that failed keeps no objective. Replica-seconds are integrals over the"
            f" {sum(each['seconds'] for each in load['phases']):g} s of load, sampled each second:"
            " *held* counts pods from their placement until they are gone, which is what an accelerator is paid for."
        ),
        "",
        (
            f"Machine: {results['processor']}, {results['cores']} cores that engines, router, client, Prometheus, both scalers and the"
            f" whole cluster share; load average at the end of the runs {', '.join(map(str, loads))}; requests left the client at most"
            f" {max(late):.0f} ms late at the 99th percentile. Measured {results['measured']}, commit {results['commit']}."
        ),
        "",
        "## By phase",
        "",
        *_phases(results),
        "",
        *(part for line in _noise(results) for part in (line, "")),
        "## What each did",
        "",
        "Every change of the pool, in seconds after the load began: asked for / held / ready.",
        "",
        *_courses(results),
        "",
        "## How far to trust it",
        "",
        "One node, engines on CPU under a CPU limit, a model of random weights, engines that start in about a minute, one shape of",
        "load, few runs: this shows that both work on real parts and how they move, not what either saves on a fleet of",
        "GPUs. An engine asked for in one phase is ready in the next: read the phases with the course of the pool above. Both hold",
        "what they have for minutes after the load has gone (the HPA for 300 s), so replica-seconds over so short a load say little",
        "about a day. For many traces, start-up times and rivals there is",
        "[the autoscaler study](autoscaler-study.md), which is simulated.",
        "",
    ]
    return "\n".join(lines)


def write(to: Path = PAGE) -> None:
    """Write the page of the results that are there."""
    to.write_text(page(json.loads(RESULTS.read_text())), encoding="utf-8")


if __name__ == "__main__":
    write(*map(Path, sys.argv[1:]))
