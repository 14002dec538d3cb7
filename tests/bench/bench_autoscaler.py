"""The autoscaler study: the operator's policy against fourteen rivals and two limits, on one frozen configuration.

Run ``make bench-autoscaler`` for the quick form (at most 10 minutes), ``python tests/bench/bench_autoscaler.py --full``
for the whole grid. Results are one JSON object per run in ``build/autoscaler-study.jsonl``; a run that is there and was
made by the same code is not made again, so an interrupted study goes on where it stopped. ``--judge`` only reads them.

What is printed at the end is the verdict: every acceptance line with the figures it rests on, losses as plainly as wins.
Streams made from ServeGen's statistics are re-drawn, and called so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import servingtiers
from servingtiers.simulate.fleet import RunResult, run
from servingtiers.simulate.limits import TARGET, clairvoyant, static_optimal, static_run
from servingtiers.simulate.policies import Policy
from servingtiers.simulate.rivals import KNOBS, RIVALS, UNSHARED, make_policy
from servingtiers.simulate.rivals.hpa import EppKeda
from servingtiers.simulate.scenario import Delay, Noise, Scenario
from servingtiers.simulate.scoring import missed, score
from servingtiers.simulate.telemetry import FaultKind, MetricFault
from servingtiers.simulate.tiers import parse_tier, tier_plan
from servingtiers.simulate.traces import Trace, load_trace

OURS = "servingtiers"
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "autoscaler-study.jsonl"

# --- workloads ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """A tier and its traffic."""

    tier: str
    """Key of :data:`TIERS`."""
    trace: str
    scale: float = 1.0
    start: float = 0.0
    end: float = math.inf
    prompt: float = 1024.0
    output: float = 256.0
    family: str = ""
    """Trace that rivals are tuned for: one setting per family."""


def _tier(
    kind: str, model: str, accelerator: str, parallel: int, ttft: str, tpot: str, **rest: Any
) -> dict[str, Any]:
    return {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "metadata": {"name": "study", "namespace": "default"},
        "spec": {
            "tier": kind,
            "model": {"name": model},
            "slo": {"ttft": {"p99": ttft}, "tpot": {"p99": tpot}},
            "pool": {
                "hardware": {"accelerators": [accelerator], "tensorParallel": parallel},
                "engine": {"maxNumSeqs": 64},  # the batch is no part of this question
                "scaling": {"minReplicas": 1, "maxReplicas": 32},
            },
            **rest,
        },
    }


_8B, _32B = "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-32B"
TIERS = {
    "8b-a100-balanced": _tier("Balanced", _8B, "a100-sxm-80gb", 1, "2s", "100ms"),
    "8b-h100-latency": _tier("Latency", _8B, "h100-sxm-80gb", 1, "500ms", "50ms"),
    "8b-a100-long": _tier("Balanced", _8B, "a100-sxm-80gb", 1, "4s", "250ms"),
    "32b-h100x2-balanced": _tier("Balanced", _32B, "h100-sxm-80gb", 2, "3s", "150ms"),
}

LOADS = {
    "conv-8b": Load("8b-a100-balanced", "azure-conv", 8, family="conv"),
    "conv-8b-large": Load("8b-a100-balanced", "azure-conv", 20, family="conv"),
    "conv-latency": Load("8b-h100-latency", "azure-conv", 20, family="conv"),
    "conv-32b": Load("32b-h100x2-balanced", "azure-conv", 6, family="conv"),
    "code-8b": Load("8b-a100-long", "azure-code", 8, family="code"),
    "code-32b": Load("32b-h100x2-balanced", "azure-code", 4, family="code"),
    "servegen-10h": Load("8b-a100-long", "servegen", 0.01, 9 * 3600, 11 * 3600, family="servegen"),
    "servegen-53h": Load("8b-a100-long", "servegen", 0.01, 52 * 3600, 54 * 3600, family="servegen"),
    "servegen-100h": Load("8b-a100-long", "servegen", 0.01, 99 * 3600, 101 * 3600, family="servegen"),
    "servegen-40h": Load("8b-a100-long", "servegen", 0.01, 39 * 3600, 41 * 3600, family="servegen"),
}
SHAPES = {
    "sawtooth": Load("8b-a100-balanced", "sawtooth:10:60:3600:600", family="synthetic"),
    "step": Load("8b-a100-balanced", "step:10:50:3600:1200", family="synthetic"),
    "spike": Load("8b-a100-balanced", "spike:15:70:3600:120", family="synthetic"),
    "diurnal": Load("8b-a100-balanced", "diurnal:10:60:7200", family="synthetic"),
}
QUICK = ("conv-8b", "conv-latency", "code-8b", "servegen-10h")
START_UPS = (5.0, 30.0, 130.0, 300.0)
QUICK_START_UPS = (30.0, 130.0)
WARM_UP = 600.0
"""Seconds that are simulated and not scored: what a fleet began with is nobody's merit or fault."""
GAP = (1500.0, 2400.0)
"""The 15 minutes without metrics, seconds of the run."""
FAULT = (1500.0, 1800.0)
"""Every other metric fault."""


@dataclass(frozen=True)
class Cell:
    """One place of the grid."""

    load: str
    start_up: float
    model_error: float = 1.0
    fault: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Job:
    """One run, or one search for a limit."""

    cell: Cell
    policy: str
    knob: float | None = None

    @property
    def key(self) -> str:
        """What identifies it in the results."""
        return json.dumps(asdict(self), sort_keys=True)


@lru_cache(maxsize=8)
def _trace(name: str, seed: int) -> Trace:
    load = (LOADS | SHAPES)[name]
    return load_trace(
        load.trace,
        scale=load.scale,
        start=load.start,
        end=load.end,
        seed=seed,
        prompt=load.prompt,
        output=load.output,
    )


def _hinted(document: dict[str, Any], trace: Trace) -> dict[str, Any]:
    """Return the tier with the lengths of its traffic as a hint, as somebody knows them who has served it before."""

    def lengths(values: Any) -> dict[str, int]:
        mean = max(round(float(values.mean())), 1)
        return {"mean": mean, "p95": max(round(float(np.quantile(values, 0.95))), mean)}

    hint = {"promptTokens": lengths(trace.prompt), "outputTokens": lengths(trace.output)}
    return {**document, "spec": {**document["spec"], "workload": hint}}


@lru_cache(maxsize=64)
def scenario(cell: Cell) -> Scenario:
    """Return what a cell simulates."""
    trace = _trace(cell.load, cell.seed)
    document = _hinted(TIERS[(LOADS | SHAPES)[cell.load].tier], trace)
    plan = tier_plan(parse_tier(document), trace, model_error=cell.model_error)
    faults: tuple[MetricFault, ...] = ()
    if cell.fault == "gap":
        faults = (MetricFault(FaultKind.DOWN, *GAP),)
    elif cell.fault:
        faults = (MetricFault(FaultKind(cell.fault), *FAULT),)
    return Scenario((plan,), start_up=Delay(cell.start_up, 0.2), metric_faults=faults, warm_up=WARM_UP)


# --- running --------------------------------------------------------------------------------------------------------


def execute(job: Job) -> dict[str, Any]:
    """Run a job and return its record."""
    begin = time.process_time()
    try:
        made = _execute(job)
    except Exception as error:  # noqa: BLE001 - one run that fails must not end a study of hours; it is reported
        made = {"error": f"{type(error).__name__}: {error}"}
    return {
        "key": job.key,
        "code": code_of(job.policy),
        "cpu": round(time.process_time() - begin, 3),
        **made,
    }


def _execute(job: Job) -> dict[str, Any]:
    if job.policy in SPECIAL:
        return SPECIAL[job.policy](job)
    place = scenario(job.cell)
    if job.policy == "static-optimal":
        best = static_optimal(place, job.cell.seed)
        return {
            "score": best.score.to_json(),
            "replicas": best.total,
            "level": best.level,
            "feasible": best.feasible,
        }
    if job.policy == "clairvoyant":
        found = clairvoyant(place, job.cell.seed)
        return {"front": [[each.violations, each.gpu_hours] for each in found.scores]}
    result = run(place, make_policy(job.policy, place, job.knob), job.cell.seed)
    return {"score": score(result).to_json(), "down": _downs(result), "decideMs": _decide_ms(result)}


def _downs(result: RunResult) -> list[float]:
    return [move.time for move in result.moves if move.after < move.before]


def _decide_ms(result: RunResult) -> float:
    return round(1e3 * result.decide_seconds / max(result.decisions, 1), 4)


@cache
def _digest(*patterns: str) -> str:
    package = Path(servingtiers.__file__).parent
    found = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(package.glob(pattern)):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def code_of(policy: str) -> str:
    """Return a digest of the code that a policy's figures depend on."""
    plant = ("performance/*.py", "performance/data/*", "catalog/data/*.json", "simulate/*.py")
    if policy in {OURS, *SPECIAL}:
        return _digest(*plant, "simulate/rivals/*.py", "policy/*.py", "core/*.py")
    return _digest(*plant, "simulate/rivals/*.py")


# --- special scenarios ------------------------------------------------------------------------------------------------

LLMD_COLD, LLMD_HOT = 183.0, 4.7
LLMD_P99 = {LLMD_COLD: 101.9, LLMD_HOT: 22.8}
LLMD_REPLICAS = {LLMD_COLD: 2.00, LLMD_HOT: 2.46}
"""Published for llm-d's KEDA saturation triggers on H100 / Qwen3-32B: 1 → 4 requests/s, at most 6 accelerators."""
LLMD_SLOWER = 1.2
"""Step times of the plant over the shipped table's: with the lag below, llm-d's own policy then shows both tails."""
LLMD_LAG = 30.0
"""Seconds from an engine to the number that llm-d's autoscaler acts on, besides the HPA's own tick."""
LLMD_SEQUENCES = 41
"""Sequences that fit: the shared prefix of 4,000 tokens is in the KV cache once, (24,994 - 4,000) / 512 fit beside it."""


def llmd_scenario(start_up: float) -> Scenario:
    """Return llm-d's published step: 120 s at 1 request/s, 300 s at 4, 4,256 tokens in (4,000 shared), 256 out."""
    arrival = np.concatenate([np.arange(0.0, 120.0, 1.0), 120.0 + np.arange(0.0, 300.0, 0.25)])
    count = len(arrival)

    def of(value: int) -> Any:
        return np.full(count, value, dtype=np.int64)

    trace = Trace("llm-d step", "synthetic", 420.0, arrival, of(4256), of(256), of(4000))
    document = _tier("Balanced", _32B, "h100-sxm-80gb", 1, "2s", "100ms")
    document["spec"]["pool"]["engine"] = {"maxNumSeqs": 256, "maxModelLen": 8192}
    document["spec"]["pool"]["scaling"] = {"minReplicas": 1, "maxReplicas": 6}
    document["spec"]["workload"] = {
        "promptTokens": {"mean": 4256, "p95": 4256},
        "outputTokens": {"mean": 256, "p95": 256},
        "prefixHitPercent": 94,
    }
    plan = tier_plan(parse_tier(document), trace, shared_prefix=True)
    pool = plan.pools[0]
    fits = replace(pool.model, kv_capacity_tokens=LLMD_SEQUENCES * (4256 + 256 + 16))
    known = replace(pool.operator.engine.step, kv_capacity_tokens=fits.kv_capacity_tokens)
    told = replace(pool.operator, engine=replace(pool.operator.engine, step=known))
    plan = replace(plan, pools=(replace(pool, model=fits, operator=told),), initial={pool.name: 1})
    return Scenario((plan,), start_up=Delay(start_up), noise=Noise(0.0, 0.0, LLMD_SLOWER), metric_age=7.5)


def _llmd(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for start_up in (LLMD_COLD, LLMD_HOT):
        place = llmd_scenario(start_up)
        policies: dict[str, Policy] = {
            "llm-d": EppKeda(place, lag=LLMD_LAG),
            OURS: make_policy(OURS, place),
        }
        for name, policy in policies.items():
            result = run(place, policy, job.cell.seed)
            figures = score(result)
            pool = result.tiers[0].pools[0]
            found[f"{name}@{start_up:g}"] = {
                "p99": figures.p99["ttft"],
                "paid": pool.gpu_seconds / 420.0,
                "ready": figures.mean_ready,
                "failures": figures.rejected + figures.unfinished,
            }
    return {"llmd": found}


_MIXES = {"prompt-heavy": (4000.0, 80.0, 48.0), "decode-heavy": (400.0, 500.0, 80.0)}
"""Mean prompt and output tokens, requests per second."""
_PD_HALF = "p/d mixes, half"
"""The same at half the rate, where the best prefill pool of the decode-heavy mix is one engine: shown, not judged."""
PD_SEEDS = range(6)
"""Whether the best fixed ratio has 2 or 3 prefill engines hangs on the speed of one of them: ratios are means over seeds."""
_PHASE = 1800.0
"""Seconds of each mix; the shifting mix is one after the other."""
_PD_START_UP = Delay(30.0)


def _pd_tier(*, split: bool) -> dict[str, Any]:
    document = _tier("Balanced", _8B, "a100-sxm-80gb", 1, "2s", "50ms")
    pool = document["spec"]["pool"]
    pool["scaling"] = {"minReplicas": 1, "maxReplicas": 48}
    if split:
        del document["spec"]["pool"]
        document["spec"]["disaggregation"] = {"prefill": pool, "decode": pool}
    return document


def _pd_scenario(trace: Trace, *, split: bool) -> Scenario:
    plan = tier_plan(parse_tier(_hinted(_pd_tier(split=split), trace)), trace)
    return Scenario((plan,), start_up=_PD_START_UP)


def _mix(name: str, seed: int, share: float = 1.0) -> Trace:
    prompt, output, rate = _MIXES[name]
    return load_trace(f"step:{share * rate}:{share * rate}:{_PHASE}", seed=seed, prompt=prompt, output=output)


def _joined(first: Trace, second: Trace) -> Trace:
    return Trace(
        "shifting mix",
        "synthetic",
        first.seconds + second.seconds,
        np.concatenate([first.arrival, first.seconds + second.arrival]),
        np.concatenate([first.prompt, second.prompt]),
        np.concatenate([first.output, second.output]),
        np.concatenate([first.shared, second.shared]),
    )


def _fixed(place: Scenario, seed: int, *counts: int) -> dict[str, float]:
    """Return what a fleet gives that is never changed: one count for each pool."""
    (tier,) = place.tiers
    replicas = {(tier.key, pool.name): count for pool, count in zip(tier.pools, counts, strict=True)}
    found = score(static_run(place, replicas, seed))
    return {"violations": found.violations, "gpuHours": found.gpu_hours}


def _splits(place: Scenario, seed: int, prefill: int, decode: int) -> dict[str, float]:
    """Return the violations of divisions of so many engines, those around a given one and half and half."""
    total = prefill + decode
    near = {total // 2, *range(max(prefill - 3, 1), min(prefill + 4, total))}
    return {
        f"{each}:{total - each}": _fixed(place, seed, each, total - each)["violations"]
        for each in sorted(near)
    }


def _pd(job: Job) -> dict[str, Any]:
    """Compare with fixed ratios, for each mix and for a shift between them; the first seed with aggregated fleets, too."""
    seed = job.cell.seed
    parts = {name: _mix(name, seed, 0.5 if job.policy == _PD_HALF else 1.0) for name in _MIXES}
    mixes: dict[str, Any] = {}
    for name, trace in parts.items():
        apart, together = (_pd_scenario(trace, split=split) for split in (True, False))
        best = static_optimal(apart, seed)
        prefill, decode = (best.replicas["default/study", pool] for pool in ("prefill", "decode"))
        mixes[name] = {
            "prefill": prefill,
            "decode": decode,
            "level": best.level,
            "splits": _splits(apart, seed, prefill, decode),
        }
        if seed == 0:
            mixes[name]["aggregated"] = static_optimal(together, seed).total
            mixes[name]["aggregatedAtSame"] = _fixed(together, seed, prefill + decode)["violations"]
    shifting = _joined(*parts.values())
    apart, together = (_pd_scenario(shifting, split=split) for split in (True, False))
    result = run(apart, make_policy(OURS, apart), seed)
    figures = score(result)
    runs = {f"{OURS}, P/D": {"violations": figures.violations, "gpuHours": figures.gpu_hours}}
    if seed == 0:
        whole = static_optimal(apart, seed)
        pair = tuple(whole.replicas["default/study", pool] for pool in ("prefill", "decode"))
        runs[f"fixed {pair[0]}:{pair[1]}, the least that keeps both phases"] = _fixed(apart, seed, *pair)
        for name, each in mixes.items():
            counts = each["prefill"], each["decode"]
            runs[f"fixed {counts[0]}:{counts[1]}, best for the {name} phase"] = _fixed(apart, seed, *counts)
        least = static_optimal(together, seed).total
        runs[f"aggregated, fixed {least}"] = _fixed(together, seed, least)
        figures = score(run(together, make_policy(OURS, together), seed))
        runs[f"{OURS}, aggregated"] = {"violations": figures.violations, "gpuHours": figures.gpu_hours}
    prefill_pool, decode_pool = result.tiers[0].pools
    phases = {}
    for index, name in enumerate(_MIXES):
        # The second half of each phase: the first is the way there.
        begin, end = _PHASE * (index + 0.5), _PHASE * (index + 1)
        inside = (prefill_pool.time >= begin) & (prefill_pool.time < end)
        arrival = result.tiers[0].arrival
        requests = (arrival >= begin) & (arrival < end)
        phases[name] = {
            "prefill": float(prefill_pool.ready[inside].mean()),
            "decode": float(decode_pool.ready[inside].mean()),
            "violations": float(missed(result.tiers[0])[requests].mean()),
        }
    return {"pd": {"mixes": mixes, "shifting": runs, "ours": phases}}


# --- lending ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lending:
    """Two tiers of one model that share a pool: a latency tier, and a throughput tier that is its burst buffer."""

    latency: str
    """Trace."""
    latency_scale: float
    throughput: str
    throughput_scale: float
    fleets: tuple[int, int] | None
    """Engines of each tier, never started or stopped: the same accelerators with and without lending. None: both tiers
    are scaled, within the accelerators there are."""
    start_up: float = 130.0
    keep: int = 18
    """Engines that the throughput tier keeps (minKeep)."""
    most: int = 3
    """Engines that the latency tier may borrow (maxBorrowed)."""
    real: bool = True
    """Judged: a real burst with a start-up of 130 s. The others show where lending buys nothing."""


_LENDING_ACCELERATORS = 32
_NOTHING_TO_HALVE = 0.001
"""Violations without lending below which a cell cannot tell."""
LENDING = {
    "conversations beside code": Lending("azure-conv", 8, "azure-code", 8, (8, 24)),
    "conversations beside conversations": Lending("azure-conv", 8, "azure-conv", 16, (8, 24)),
    "code beside conversations": Lending("azure-code", 2, "azure-conv", 16, (5, 24)),
    "conversations beside code, scaled": Lending("azure-conv", 8, "azure-code", 8, None, keep=2),
    "code beside conversations, scaled": Lending("azure-code", 2, "azure-conv", 16, None, keep=2),
    "conversations beside code, scaled, 5 s": Lending(
        "azure-conv", 8, "azure-code", 8, None, start_up=5.0, keep=2, real=False
    ),
    "steady beside conversations": Lending("step:30:30:3500", 1, "azure-conv", 16, (9, 24), real=False),
    "nothing to spare": Lending("azure-conv", 8, "azure-conv", 16, (8, 15), keep=15, real=False),
}


def lending_scenario(cell: Lending, seed: int) -> Scenario:
    """Return the two tiers; only batch and share of the pool differ."""
    plans = []
    for index, (name, kind, batch, priority, trace, scale) in enumerate(
        (
            ("chat", "Latency", 64, 200, cell.latency, cell.latency_scale),
            ("batch", "Throughput", 128, 50, cell.throughput, cell.throughput_scale),
        )
    ):
        document = _tier(kind, _8B, "a100-sxm-80gb", 1, "2s", "100ms")
        document["metadata"]["name"] = name
        spec = document["spec"]
        if kind == "Throughput":
            del spec["slo"]
        spec["sharedPool"] = {"name": "shared", "priority": priority, "maxBorrowed": cell.most}
        spec["sharedPool"]["minKeep"] = cell.keep if kind == "Throughput" else 1
        spec["pool"]["engine"] = {"maxNumSeqs": batch, "maxModelLen": 16384}
        made = load_trace(trace, scale=scale, seed=seed + 1000 * index, prompt=1155, output=211)
        plan = tier_plan(parse_tier(_hinted(document, made)), made)
        if cell.fleets is not None:
            count = cell.fleets[index]
            (pool,) = plan.pools
            bounds = pool.scaling.model_copy(update={"min_replicas": count, "max_replicas": count})
            plan = replace(plan, pools=(replace(pool, scaling=bounds),), initial={pool.name: count})
        plans.append(plan)
    return Scenario(
        tuple(plans),
        start_up=Delay(cell.start_up, 0.2),
        warm_up=WARM_UP,
        accelerators=sum(cell.fleets) if cell.fleets else _LENDING_ACCELERATORS,
    )


def _lending(job: Job) -> dict[str, Any]:
    cell = LENDING[job.policy.removeprefix(_LENDING_JOB)]
    place = lending_scenario(cell, job.cell.seed)
    found = {}
    for name in (OURS, UNSHARED):
        figures = score(run(place, make_policy(name, place), job.cell.seed))
        chat, batch = figures.tiers["default/chat"], figures.tiers["default/batch"]
        found[name] = {
            "violations": chat.violations,
            "worst5min": chat.worst5min,
            "completion": batch.mean_completion,
            "unfinished": batch.unfinished + batch.rejected,
            "gpuHours": figures.gpu_hours,
            "latencyGpuHours": chat.gpu_hours,
            "borrowed": chat.borrowed,
        }
    return {"lending": found}


def _speed(job: Job) -> dict[str, Any]:
    del job
    place = scenario(Cell("conv-8b-large", 30.0))
    run(place, make_policy(OURS, place), 0)  # compiled code is loaded by the first run
    begin = time.process_time()  # one core's time: the machine has other work
    result = run(place, make_policy(OURS, place), 0)
    wall = time.process_time() - begin
    pool = result.tiers[0].pools[0]
    return {
        "speed": {
            "wall": wall,
            "traceSeconds": result.seconds,
            "requests": len(result.tiers[0].arrival),
            "peak": pool.peak,
            "decideMs": _decide_ms(result),
        }
    }


_LENDING_JOB = "lending: "
SPECIAL: dict[str, Callable[[Job], dict[str, Any]]] = {
    "llm-d step": _llmd,
    "p/d mixes": _pd,
    _PD_HALF: _pd,
    "speed": _speed,
    **{_LENDING_JOB + name: _lending for name in LENDING},
}

# --- the grid ---------------------------------------------------------------------------------------------------------


def base_cells(*, full: bool) -> list[Cell]:
    """Return the cells without faults."""
    if full:
        return [Cell(load, start) for load in LOADS for start in START_UPS] + [
            Cell(load, 130.0) for load in SHAPES
        ]
    return [Cell(load, start) for load in QUICK for start in QUICK_START_UPS]


def jobs(*, full: bool, seeds: int) -> Iterator[Job]:
    """Yield every job of a form of the study, the most telling first."""
    base = base_cells(full=full)
    anywhere = Cell("conv-8b", 130.0)
    for policy in (OURS, "static-optimal", "clairvoyant", *RIVALS):
        for cell in base:
            yield Job(cell, policy)
    for special in SPECIAL:
        yield Job(anywhere, special)
    for special in ("p/d mixes", _PD_HALF):
        for seed in PD_SEEDS[1:]:
            yield Job(replace(anywhere, seed=seed), special)
    for load in () if full else ("sawtooth", "step", "spike"):  # the full base has them
        yield Job(Cell(load, 130.0), OURS)
    for kind in FaultKind:
        yield Job(Cell("conv-8b", 130.0, fault=str(kind)), OURS)
    for cell in base:
        for changed in (
            replace(cell, model_error=1.4),
            replace(cell, model_error=0.6),
            replace(cell, fault="gap"),
        ):
            yield Job(changed, OURS)
    for cell in base:
        if full or cell.start_up == 130.0:
            for policy, knobs in KNOBS.items():
                for knob in knobs:
                    yield Job(cell, policy, knob)
    for seed in range(1, seeds):
        for cell in base:
            for policy in (OURS, "static-optimal", *RIVALS):
                yield Job(replace(cell, seed=seed), policy)
    if full:
        for cell in base:
            for policy in ("static-peak", "epp-keda", "dynamo"):
                for changed in (
                    replace(cell, model_error=1.4),
                    replace(cell, model_error=0.6),
                    replace(cell, fault="gap"),
                ):
                    yield Job(changed, policy)


def study(todo: Sequence[Job], path: Path, *, workers: int, limit: float) -> bool:
    """Run what is not in the results yet; returns whether all of it is.

    Args:
        todo: The jobs.
        path: The results, appended to.
        workers: Processes.
        limit: Seconds after which no further job is begun.
    """
    known = read(path)
    left = [job for job in todo if known.get(job.key, {}).get("code") != code_of(job.policy)]
    print(f"{len(todo)} runs, {len(left)} to make, {workers} at a time", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    done = failed = 0
    queue = iter(left)
    with path.open("a", encoding="utf-8") as stream, ProcessPoolExecutor(workers) as pool:
        waiting = {pool.submit(execute, job) for _, job in zip(range(2 * workers), queue, strict=False)}
        try:
            while waiting:
                ready = next(as_completed(waiting))
                waiting.remove(ready)
                record = ready.result()
                if "error" in record:
                    print(f"\n{record['key']}: {record['error']}", file=sys.stderr)
                    failed += 1
                    record["code"] = "failed"  # made again the next time
                stream.write(json.dumps(record) + "\n")
                stream.flush()
                done += 1
                spent = time.monotonic() - begin
                if sys.stderr.isatty():
                    rest = spent / done * (len(left) - done)
                    print(f"\r{done}/{len(left)}, about {rest / 60:.0f} min left ", end="", file=sys.stderr)
                following = next(queue, None) if spent < limit else None
                if following is not None:
                    waiting.add(pool.submit(execute, following))
        except KeyboardInterrupt:
            for future in waiting:
                future.cancel()
            print("\ninterrupted: run it again to go on", file=sys.stderr)
    print(f"\n{done} runs in {time.monotonic() - begin:.0f} s, {failed} failed", file=sys.stderr)
    return done == len(left)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the latest record of every key."""
    found: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of an interrupted study
            found[record["key"]] = record
    return found


# --- the verdict --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One acceptance line."""

    name: str
    passed: bool | None
    """None: cannot be told from the results."""
    figures: str


class Results:
    """The records of a study."""

    def __init__(self, records: dict[str, dict[str, Any]]) -> None:
        self.records = records

    def of(self, cell: Cell, policy: str, knob: float | None = None) -> dict[str, Any] | None:
        """Return a record; None where the run is missing or failed."""
        record = self.records.get(Job(cell, policy, knob).key)
        return None if record is None or "error" in record else record

    def cpu_seconds(self) -> float:
        """Return the CPU time that all runs took."""
        return math.fsum(float(record.get("cpu", 0.0)) for record in self.records.values())

    def score(self, cell: Cell, policy: str, knob: float | None = None) -> tuple[float, float] | None:
        """Return (violations, GPU-hours)."""
        record = self.of(cell, policy, knob)
        if record is None:
            return None
        return 1.0 - record["score"]["attainment"]["joint"], record["score"]["gpuHours"]

    def level(self, cell: Cell) -> float | None:
        """Return the share of violations that a cell must keep: 1 %, or static-optimal's where that is infeasible."""
        record = self.of(cell, "static-optimal")
        return None if record is None else max(TARGET, float(record["level"]))

    def limit(self, cell: Cell, violations: float) -> float | None:
        """Return the clairvoyant's GPU-hours at no more violations."""
        record = self.of(cell, "clairvoyant")
        if record is None:
            return None
        return min((hours for missed, hours in record["front"] if missed <= violations + 1e-12), default=None)


def judge(results: Results, cells: Sequence[Cell]) -> list[Line]:
    """Return every acceptance line with its figures."""
    large = [
        cell for cell in cells if (results.of(cell, "static-optimal") or {"replicas": 0})["replicas"] >= 5
    ]
    return [
        _against_defaults(results, large),
        _dominated(results, large),
        _against_tuned(results, large),
        _against_fixed(results, large),
        _against_clairvoyant(results, cells),
        _robust(results, cells),
        _llmd_line(results),
        _lending_line(results),
        _pd_line(results),
        _calm(results),
        _blind(results),
        _fast(results),
    ]


def _meets(found: tuple[float, float] | None, level: float | None) -> bool:
    return found is not None and level is not None and found[0] <= level


def _against_defaults(results: Results, cells: Sequence[Cell]) -> Line:
    good, told, worst = 0, 0, []
    for cell in cells:
        ours, level = results.score(cell, OURS), results.level(cell)
        if ours is None or level is None:
            continue
        told += 1
        rivals = {
            name: found
            for name in RIVALS
            if _meets(found := results.score(cell, name), level) and found is not None
        }
        cheapest = min(rivals, key=lambda name: rivals[name][1], default=None)
        if _meets(ours, level) and (cheapest is None or ours[1] <= 0.9 * rivals[cheapest][1]):
            good += 1
        else:
            beside = f", {cheapest} {rivals[cheapest][1]:.1f}" if cheapest else ""
            worst.append(
                f"{_name(cell)}: {100 * ours[0]:.2f} % {ours[1]:.1f} GPU-h (level {100 * level:.1f} %{beside})"
            )
    return Line(
        "≥ 90 % of cells: violations kept at ≥ 10 % fewer GPU-hours than the best default rival that keeps them",
        good >= 0.9 * told if told else None,
        f"{good} of {told} cells; not: {_some(worst)}",
    )


def _dominated(results: Results, cells: Sequence[Cell]) -> Line:
    lost = []
    for cell in cells:
        ours = results.score(cell, OURS)
        for name in RIVALS:
            found = results.score(cell, name)
            if ours is not None and found is not None and found[0] < ours[0] and found[1] < ours[1]:
                lost.append(
                    f"{_name(cell)}: {name} {100 * found[0]:.2f} % {found[1]:.1f} < {100 * ours[0]:.2f} % {ours[1]:.1f}"
                )
    return Line(
        "no cell where a default rival has fewer violations and fewer GPU-hours",
        not lost if cells else None,
        _some(lost) or "none",
    )


def _tuned(results: Results, cell: Cell) -> dict[tuple[str, float], tuple[float, float]]:
    found = {}
    for name, knobs in KNOBS.items():
        for knob in knobs:
            figures = results.score(cell, name, knob)
            if figures is not None:
                found[name, knob] = figures
    return found


def _against_tuned(results: Results, cells: Sequence[Cell]) -> Line:
    """Compare with the best rival whose knob was chosen for the cell's trace."""
    told, good, notes = 0, 0, []
    for cell in cells:
        ours, level, tuned = results.score(cell, OURS), results.level(cell), _tuned(results, cell)
        if ours is None or level is None or not tuned:
            continue
        told += 1
        bar = max(level, ours[0])
        rivals = {key: value for key, value in tuned.items() if value[0] <= bar}
        best = min(rivals, key=lambda key: rivals[key][1], default=None)
        if best is None or ours[1] <= 1.03 * rivals[best][1]:
            good += 1
        else:
            notes.append(
                f"{_name(cell)}: {best[0]}@{best[1]:g} {rivals[best][1]:.1f}, ours {ours[1]:.1f} GPU-h at {100 * ours[0]:.2f} %"
            )
    return Line(
        "within 3 % GPU-hours of the best rival tuned per trace, at equal violations",
        good == told if told else None,
        f"{good} of {told} cells; not: {_some(notes)}",
    )


def _against_fixed(results: Results, cells: Sequence[Cell]) -> Line:
    """Compare with every rival held to one setting over all traces."""
    told = [
        cell for cell in cells if results.score(cell, OURS) and results.level(cell) and _tuned(results, cell)
    ]
    if not told:
        return Line("≥ 10 % below any rival held to one setting over all traces", None, "no sweep yet")
    kept = sum(_meets(results.score(cell, OURS), results.level(cell)) for cell in told)
    hours = math.fsum((results.score(cell, OURS) or (0, 0))[1] for cell in told)
    beaten, cheapest = True, None
    for name, knobs in KNOBS.items():
        for knob in knobs:
            found = [results.score(cell, name, knob) for cell in told]
            if any(each is None for each in found):
                continue
            keeps = sum(_meets(each, results.level(cell)) for each, cell in zip(found, told, strict=True))
            total = math.fsum(each[1] for each in found if each is not None)
            # Only a setting that keeps the objectives on as many cells is a rival.
            if keeps >= kept and (cheapest is None or total < cheapest[2]):
                cheapest = name, knob, total, keeps
            beaten = beaten and not (keeps >= kept and hours > 0.9 * total)
    rival = (
        "none keeps as many"
        if cheapest is None
        else f"{cheapest[0]}@{cheapest[1]:g}: {cheapest[2]:.1f} GPU-h, {cheapest[3]} kept"
    )
    return Line(
        "≥ 10 % below any rival held to one setting over all traces",
        beaten,
        f"ours: {hours:.1f} GPU-h, {kept} of {len(told)} cells kept; {rival}",
    )


def _against_clairvoyant(results: Results, cells: Sequence[Cell]) -> Line:
    ratios: dict[str, list[tuple[float, str]]] = {}
    for cell in cells:
        family = (LOADS | SHAPES)[cell.load].family
        ours, level = results.score(cell, OURS), results.level(cell)
        if ours is None or level is None or cell.start_up > 130 or family not in {"conv", "servegen", "code"}:
            continue
        least = results.limit(cell, max(ours[0], level))
        if least:
            ratios.setdefault(family, []).append((ours[1] / least, _name(cell)))
    if not ratios:
        return Line("GPU-hours ≤ 1.25 × clairvoyant (code: 1.6)", None, "no limits yet")
    worst = {family: max(values) for family, values in ratios.items()}
    return Line(
        "GPU-hours ≤ 1.25 × clairvoyant on conversation and ServeGen (re-drawn), ≤ 1.6 × on code, start-up ≤ 130 s",
        all(value <= (1.6 if family == "code" else 1.25) for family, (value, _) in worst.items()),
        "; ".join(f"{family}: worst {value:.2f} ({name})" for family, (value, name) in worst.items()),
    )


def _robust(results: Results, cells: Sequence[Cell]) -> Line:
    told, notes = 0, []
    for cell in cells:
        ours = results.score(cell, OURS)
        for label, changed in (
            ("+40 %", replace(cell, model_error=1.4)),
            ("-40 %", replace(cell, model_error=0.6)),
            ("gap", replace(cell, fault="gap")),
        ):
            found = results.score(changed, OURS)
            if ours is None or found is None:
                continue
            told += 1
            if found[0] > ours[0] + 0.01 or found[1] > 1.15 * ours[1]:
                notes.append(
                    f"{_name(cell)} {label}: {100 * (found[0] - ours[0]):+.2f} points, {100 * (found[1] / ours[1] - 1):+.0f} % GPU-h"
                )
    return Line(
        "±40 % model error or a 15-minute metric gap: ≤ 1 point more violations, ≤ 15 % more GPU-hours",
        not notes if told else None,
        f"{told - len(notes)} of {told} runs; not: {_some(notes)}",
    )


def _special(results: Results, name: str, seed: int = 0) -> dict[str, Any] | None:
    return results.of(Cell("conv-8b", 130.0, seed=seed), name)


def _llmd_line(results: Results) -> Line:
    name = "llm-d step: plant calibrated within 15 %, then below both tails at no more replicas, no failures"
    record = _special(results, "llm-d step")
    if record is None:
        return Line(name, None, "not run")
    good, texts = True, []
    for start, published in LLMD_P99.items():
        theirs, ours = record["llmd"][f"llm-d@{start:g}"], record["llmd"][f"{OURS}@{start:g}"]
        calibrated = abs(theirs["p99"] / published - 1) <= 0.15
        good = good and calibrated and ours["p99"] < published and ours["failures"] == 0
        good = (
            good
            and min(ours["paid"], ours["ready"]) <= LLMD_REPLICAS[start]
            and ours["paid"] <= theirs["paid"]
        )
        texts.append(
            f"start {start:g} s: llm-d here {theirs['p99']:.1f} s (published {published} s), paid {theirs['paid']:.2f} ready "
            f"{theirs['ready']:.2f} (published {LLMD_REPLICAS[start]:.2f}); ours {ours['p99']:.1f} s, paid {ours['paid']:.2f} "
            f"ready {ours['ready']:.2f}, {ours['failures']} failures"
        )
    return Line(name, good, "; ".join(texts))


def _lending_line(results: Results) -> Line:
    name = (
        "lending, two tiers on real bursts, start-up 130 s: at the same GPU-hours (+1 %), latency-tier violations ≤ half, "
        "throughput-tier completion ≤ 10 % longer"
    )
    told, good, texts = 0, 0, []
    for label, cell in LENDING.items():
        record = _special(results, _LENDING_JOB + label)
        if record is None:
            continue
        ours, apart = record["lending"][OURS], record["lending"][UNSHARED]
        longer = ours["completion"] / max(apart["completion"], 1e-9) - 1
        more = ours["gpuHours"] / max(apart["gpuHours"], 1e-9) - 1
        kept = (
            ours["violations"] <= 0.5 * apart["violations"]
            and longer <= 0.10
            and more <= 0.01
            and ours["unfinished"] <= apart["unfinished"]
        )
        verdict = "shown, not judged"
        if cell.real and apart["violations"] < _NOTHING_TO_HALVE:
            verdict = "nothing to halve"
        elif cell.real:
            told += 1
            good += kept
            verdict = "kept" if kept else "not kept"
        texts.append(
            f"{label}: {100 * apart['violations']:.2f} → {100 * ours['violations']:.2f} % missed, completion "
            f"{apart['completion']:.2f} → {ours['completion']:.2f} s ({100 * longer:+.0f} %), GPU-hours "
            f"{apart['gpuHours']:.1f} → {ours['gpuHours']:.1f} ({100 * more:+.1f} %), {ours['borrowed']} loans: {verdict}"
        )
    return Line(
        name,
        good == told if len(texts) == len(LENDING) and told else None,
        f"{good} of {told} cells" + "".join(f"\n      {text}" for text in texts),
    )


def _pd_line(results: Results) -> Line:
    name = (
        "P/D: engines for prefill per engine for decode within 10 % of the best fixed ones in each phase of a shifting mix,"
        " means over seeds"
    )
    known = [found for seed in PD_SEEDS if (found := _special(results, "p/d mixes", seed))]
    if not known or known[0] is not _special(results, "p/d mixes"):
        return Line(name, None, "not run")
    good, texts = True, []
    for mix, fixed in known[0]["pd"]["mixes"].items():
        total = fixed["prefill"] + fixed["decode"]
        even = fixed["splits"].get(f"{total // 2}:{total - total // 2}", math.nan)
        off, text = _pd_phase(known, mix)
        good = good and off <= 0.10
        texts.append(
            f"{mix}: {text}; with the best {total} engines of the first seed 1:1 misses {100 * even:.1f} %, aggregated "
            f"{100 * fixed['aggregatedAtSame']:.1f} % (aggregated needs {fixed['aggregated']})"
        )
    half = [found for seed in PD_SEEDS if (found := _special(results, _PD_HALF, seed))]
    if half:
        texts.extend(f"{mix} at half the rate, not judged: {_pd_phase(half, mix)[1]}" for mix in _MIXES)
    shifts = [found["pd"]["shifting"][f"{OURS}, P/D"] for found in known]
    mean = {key: float(np.mean([each[key] for each in shifts])) for key in ("violations", "gpuHours")}
    first = known[0]["pd"]["shifting"] | {f"{OURS}, P/D, mean of {len(known)} seeds": mean}
    texts.extend(
        f"shifting mix, {label}: {100 * each['violations']:.2f} % missed, {each['gpuHours']:.2f} GPU-hours"
        for label, each in first.items()
    )
    return Line(name, good if len(known) == len(PD_SEEDS) else None, "\n      ".join(texts))


def _pd_phase(records: Sequence[dict[str, Any]], mix: str) -> tuple[float, str]:
    """Return by how much the ratio of one phase is off the best fixed one, and that in words."""
    ours = [record["pd"]["ours"][mix] for record in records]
    ratio = sum(each["prefill"] for each in ours) / sum(each["decode"] for each in ours)
    best = []
    for record, mine in zip(records, ours, strict=True):
        fixed = record["pd"]["mixes"][mix]
        # Several divisions of the fewest engines may keep the level: each of them is a best one.
        kept = [
            tuple(map(int, split.split(":")))
            for split, missed_ in fixed["splits"].items()
            if missed_ <= fixed["level"]
        ] or [(fixed["prefill"], fixed["decode"])]
        best.append(min(kept, key=lambda pair: abs(pair[0] / pair[1] - mine["prefill"] / mine["decode"])))
    goal = sum(pair[0] for pair in best) / sum(pair[1] for pair in best)
    off = abs(ratio / goal - 1.0)
    worst = max(each["violations"] for each in ours)
    fleets = ", ".join(
        f"{mine['prefill']:.1f}:{mine['decode']:.1f} ({pair[0]}:{pair[1]})"
        for mine, pair in zip(ours, best, strict=True)
    )
    return off, (
        f"{ratio:.2f} where {goal:.2f} is best, {100 * off:.0f} % off (ours and best fixed by seed: {fleets}), "
        f"{100 * float(np.mean([each['violations'] for each in ours])):.2f} % missed, {100 * worst:.2f} % at worst"
    )


def _calm(results: Results) -> Line:
    found = {}
    for load in ("sawtooth", "step", "spike"):
        record = results.of(Cell(load, 130.0), OURS)
        if record is not None:
            minutes = float(SHAPES[load].trace.split(":")[3]) / 60
            found[load] = record["score"]["reversals"] / (minutes / 30)
    return Line(
        "≤ 1 direction reversal per 30 minutes on sawtooth, step and spike",
        max(found.values()) <= 1 if len(found) == 3 else None,
        ", ".join(f"{load} {value:.1f}" for load, value in found.items()),
    )


def _blind(results: Results) -> Line:
    told, notes = 0, []
    for kind in FaultKind:
        record = results.of(Cell("conv-8b", 130.0, fault=str(kind)), OURS)
        if record is None:
            continue
        told += 1
        late = [at for at in record["down"] if FAULT[0] <= at < FAULT[1] + 300]
        if late:
            notes.append(f"{kind}: {len(late)} at {late[0]:.0f} s")
    return Line(
        "0 scale-downs during and 300 s after any metric fault",
        not notes if told == len(FaultKind) else None,
        f"{told} fault classes; {_some(notes) or 'none shrank'}",
    )


def _fast(results: Results) -> Line:
    name = "a decision ≤ 2 ms with 32 replicas; an hour of Azure conversation traffic in ≤ 2 s on one core"
    record = _special(results, "speed")
    if record is None:
        return Line(name, None, "not run")
    speed = record["speed"]
    return Line(
        name,
        speed["decideMs"] <= 2 and speed["wall"] * 3600 / speed["traceSeconds"] <= 2,
        f"{speed['decideMs']:.2f} ms; {speed['wall']:.2f} s of one core for {speed['traceSeconds'] / 60:.0f} minutes, "
        f"{speed['requests']:,} requests, up to {speed['peak']} replicas",
    )


def _name(cell: Cell) -> str:
    return f"{cell.load}/{cell.start_up:g} s"


def _some(texts: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + rest


# --- tables -------------------------------------------------------------------------------------------------------------


def tables(results: Results, cells: Iterable[Cell]) -> Iterator[str]:
    """Yield a Markdown table: violations % / GPU-hours of every policy per cell."""
    names = (OURS, *RIVALS)
    yield "| cell | static-optimal | clairvoyant | " + " | ".join(names) + " |"
    yield "|" + "---|" * (len(names) + 3)
    for cell in cells:
        static = results.of(cell, "static-optimal")
        level = results.level(cell)
        first = "–"
        if static is not None:
            first = f"{static['replicas']}: {100 * (1 - static['score']['attainment']['joint']):.2f}/{static['score']['gpuHours']:.1f}"
        least = None if level is None else results.limit(cell, level)
        row = [_name(cell), first, "–" if least is None else f"{least:.1f}"]
        for name in names:
            found = results.score(cell, name)
            row.append("–" if found is None else f"{100 * found[0]:.2f}/{found[1]:.1f}")
        yield "| " + " | ".join(row) + " |"


def pareto_page(results: Results, cells: Sequence[Cell]) -> str:
    """Return a page with one Pareto plot per cell: every rival's sweep, ours, and the limits."""
    from servingtiers.reporting.page import PALETTE, Figure, Page, Text

    sections: list[tuple[str, Sequence[Any]]] = []
    for cell in cells:
        traces: list[dict[str, Any]] = []
        for index, name in enumerate((OURS, *RIVALS)):
            points = [results.score(cell, name)] + [
                results.score(cell, name, knob) for knob in KNOBS.get(name, ())
            ]
            known = sorted({(hours, max(100 * missed, 0.01)) for missed, hours in filter(None, points)})
            if known:
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines+markers",
                        "name": name,
                        "x": [each[0] for each in known],
                        "y": [each[1] for each in known],
                        "marker": {"size": 14 if name == OURS else 7, "color": PALETTE[index % len(PALETTE)]},
                        "line": {"width": 1, "dash": "solid" if index < len(PALETTE) else "dash"},
                    }
                )
        record = results.of(cell, "clairvoyant")
        if record is not None:
            front = sorted((hours, max(100 * missed, 0.01)) for missed, hours in record["front"])
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": "clairvoyant",
                    "x": [each[0] for each in front],
                    "y": [each[1] for each in front],
                    "line": {"dash": "dot", "color": "#8a8880"},
                }
            )
        layout = {
            "xaxis": {"title": {"text": "GPU-hours"}},
            "yaxis": {"title": {"text": "violations, %"}, "type": "log"},
        }
        if traces:
            sections.append((_name(cell), [Figure(traces, layout, f"Pareto plot of {_name(cell)}")]))
    return Page(
        "Autoscaler study",
        "Violations against GPU-hours; lines join the values of a rival's main setting. ServeGen streams are re-drawn.",
        sections or [("", [Text("no results yet")])],
    ).html()


def main() -> int:
    """Run the study and print the verdict; returns 1 where a line failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the whole grid (hours of CPU time)")
    parser.add_argument("--seeds", type=int, default=None, help="seeds per base cell: 1 quick, 3 full")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--minutes", type=float, default=None, help="begin no run after this: 9 quick, 145 full"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="cells whose load contains this text")
    parser.add_argument(
        "--policies",
        default="",
        help="policies to run, comma-separated, or lending, p/d mixes, llm-d step, speed; default all",
    )
    parser.add_argument("--judge", action="store_true", help="run nothing, judge what there is")
    parser.add_argument("--page", type=Path, help="write Pareto plots to this HTML file")
    given = parser.parse_args()
    seeds = given.seeds or (3 if given.full else 1)
    todo = [
        job
        for job in jobs(full=given.full, seeds=seeds)
        if given.only in job.cell.load
        and (not given.policies or job.policy.partition(":")[0] in given.policies.split(","))
    ]
    if not given.judge:
        minutes = given.minutes or (145.0 if given.full else 9.0)
        study(todo, given.results, workers=given.workers, limit=60 * minutes)
    # What other code has made is no result of this code's.
    records = {
        key: record
        for key, record in read(given.results).items()
        if record["code"] == code_of(json.loads(key)["policy"])
    }
    results = Results(records)
    cells = [cell for cell in base_cells(full=given.full) if given.only in cell.load]
    print("\n".join(tables(results, cells)))
    print(
        "\nviolations % / GPU-hours; static-optimal also its replicas; clairvoyant: GPU-hours at the cell's level\n"
    )
    failed = 0
    for line in judge(results, cells):
        verdict = {True: "PASS", False: "FAIL", None: "----"}[line.passed]
        failed += line.passed is False
        print(f"{verdict}  {line.name}\n      {line.figures}")
    if given.page:
        given.page.write_text(pareto_page(results, cells), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
