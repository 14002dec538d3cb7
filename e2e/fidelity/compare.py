"""Simulates what was sent, and holds the figures against what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from servingtiers.performance import engine_kernel as kernel
from servingtiers.performance.engine_sim import EngineConfig, PoolConfig, Routing, make_pool, make_requests
from servingtiers.performance.profile import Profile
from servingtiers.performance.steps import GridStepModel, SourceKind, StepSource
from servingtiers.performance.tables import grid_from_rows, hull_of

__all__ = ["METRICS", "Engine", "Row", "pool_of", "rows", "simulated", "verdicts"]

METRICS = ("ttftMs", "tpotMs", "e2eMs")
PERCENTILES = ("p50", "p99")
LIMIT = 0.15


@dataclass(frozen=True, slots=True)
class Engine:
    """What the engines were started with, as far as the simulator knows it."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    async_scheduling: bool = False
    """vLLM switches it off on CPUs (``platforms/cpu.py``)."""


def step_model(profile: Profile) -> GridStepModel:
    """Return the step times of a profile and nothing else: no table and no roofline has a say."""
    if profile.kv_capacity_tokens is None:
        raise ValueError("the profile does not say how many tokens the KV cache holds")
    return GridStepModel(
        source=StepSource(SourceKind.PROFILE, profile.describe(), 5.0),
        kv_capacity_tokens=profile.kv_capacity_tokens,
        # This engine's attention is bound by no accelerator's peak.
        grid=grid_from_rows(profile.rows, ideal_pair_ms=0.0),
        hull=hull_of(profile.rows),
    )


def pool_of(profile: Profile, engine: Engine, replicas: int = 1) -> PoolConfig:
    """Return engines of a profile and a configuration, which the router takes in turn."""
    return PoolConfig(
        step_model(profile),
        EngineConfig(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            block_size=engine.block_size,
            async_scheduling=engine.async_scheduling,
        ),
        replicas,
        Routing.ROUND_ROBIN,
    )


def simulated(
    sent: Sequence[Mapping[str, Any]], profile: Profile, engine: Engine, *, replicas: int, overhead_ms: float
) -> dict[str, Any]:
    """Return the figures of the requests that were sent, in the simulator.

    Args:
        sent: Records of ``servingtiers bench --record``: when each request left, and its lengths.
        profile: The engine's.
        engine: Its configuration.
        replicas: Engines behind the router, which takes them in turn.
        overhead_ms: Network, HTTP and client of one request, as the profile measured it.
    """
    pool = pool_of(profile, engine, replicas)
    arrival = np.array([row["sent"] for row in sent]) * 1e3
    order = np.argsort(arrival, kind="stable")
    requests = make_requests(
        arrival[order],
        np.array([row["promptTokens"] for row in sent], dtype=np.int64)[order],
        np.array([row["outputTokens"] for row in sent], dtype=np.int64)[order],
    )
    kernel.run_open(make_pool(pool), requests, overhead_ms, False)  # noqa: FBT003 - compiled: by position
    several = requests.output > 1
    tpot = (requests.last - requests.first)[several] / (requests.output[several] - 1)
    seconds = float(arrival.max() - arrival.min()) / 1e3
    # What came while traffic was sent, as the client counts it: answers in proportion.
    part = np.clip(
        (arrival.max() - requests.first) / np.maximum(requests.last - requests.first, 1e-9), 0.0, 1.0
    )
    return {
        "ttftMs": _figures(requests.first - requests.arrival),
        "tpotMs": _figures(tpot),
        "e2eMs": _figures(requests.last - requests.arrival),
        "tokensPerSecond": round(float((requests.output * part).sum()) / seconds, 2),
    }


def _figures(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    found = {"mean": float(values.mean())}
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        found[name] = float(np.quantile(values, share, method="inverted_cdf"))
    return {name: round(value, 2) for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure at one load point: measured several times, and simulated for each of the runs."""

    case: str
    load: float
    metric: str
    percentile: str
    measured: tuple[float, ...]
    simulated: tuple[float, ...]

    @property
    def error(self) -> float:
        """Simulated over measured, less one; medians over the runs."""
        measured = median(self.measured)
        return median(self.simulated) / measured - 1.0 if measured > 0 else math.inf

    @property
    def spread(self) -> float:
        """Half the range of the measured runs over their median."""
        measured = median(self.measured)
        return (max(self.measured) - min(self.measured)) / 2.0 / measured if measured > 0 else 0.0

    @property
    def kept(self) -> bool:
        """Whether it is within the limit."""
        return abs(self.error) <= max(LIMIT, 2.0 * self.spread)


def rows(points: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return every figure of every load point."""
    found = []
    for point in points:
        for metric in METRICS:
            for percentile in PERCENTILES:
                measured = tuple(run["measured"][metric][percentile] for run in point["runs"])
                if any(value is None or not math.isfinite(value) for value in measured):
                    continue  # a percentile among requests that were never answered; the page says how many
                simulated_ = tuple(run["simulated"][metric][percentile] for run in point["runs"])
                found.append(Row(point["case"], point["load"], metric, percentile, measured, simulated_))
    return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """The criterion: the median over the load points of one figure."""

    case: str
    metric: str
    percentile: str
    points: int
    error: float
    spread: float
    kept: bool


def verdicts(found: Sequence[Row]) -> list[Verdict]:
    """Return one verdict per case, metric and percentile: the median absolute error over its load points."""
    made = []
    for case in dict.fromkeys(row.case for row in found):
        for metric in METRICS:
            for percentile in PERCENTILES:
                mine = [
                    row
                    for row in found
                    if (row.case, row.metric, row.percentile) == (case, metric, percentile)
                ]
                if not mine:
                    continue
                error = median(abs(row.error) for row in mine)
                spread = median(row.spread for row in mine)
                made.append(
                    Verdict(
                        case,
                        metric,
                        percentile,
                        len(mine),
                        error,
                        spread,
                        error <= max(LIMIT, 2.0 * spread),
                    )
                )
    return made
