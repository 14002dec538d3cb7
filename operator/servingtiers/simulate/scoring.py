"""What a run was worth: attainment first, then GPU-hours.

Every request that arrived counts. One that was refused, lost or not finished misses every objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servingtiers.simulate.fleet import Move, PoolHistory, RunResult, TierOutcome
from servingtiers.simulate.scenario import slo_of

__all__ = ["Score", "missed", "reversals", "score", "score_tier", "worst_five_minutes"]

_LEAST_REQUESTS = 20
"""A window of five minutes with fewer requests has no attainment worth a number."""


@dataclass(frozen=True, slots=True)
class Score:
    """Figures of one run (or one tier of it)."""

    policy: str
    seed: int
    requests: int
    attainment: Mapping[str, float]
    """Share of requests that kept each objective, and all of them (``joint``), 0–1."""
    worst5min: float
    """Least joint attainment of any five minutes with 20 requests or more, by arrival; 1 without any."""
    gpu_hours: float
    scale_ups: int
    scale_downs: int
    reversals: int
    """Changes of direction of a pool's replicas."""
    rejected: int
    """503s, and requests lost with their engine."""
    unfinished: int
    peak_replicas: int
    mean_ready: float
    """Ready replicas, averaged over scrapes."""
    p99: Mapping[str, float]
    """99th percentile of TTFT, TPOT and end-to-end latency, seconds; what never finished counts as infinite."""
    mean_completion: float = 0.0
    """Mean end-to-end latency, seconds; what never finished counts as the rest of the run and its grace."""
    borrowed: int = 0
    """Engines that came from another tier, each time it did."""
    complete: bool = True
    gpu_hours_over_clairvoyant: float | None = None
    tiers: Mapping[str, Score] = field(default_factory=dict)
    """Figures of each tier by its key, where several were simulated."""

    @property
    def violations(self) -> float:
        """Share of requests that missed an objective."""
        return 1.0 - self.attainment["joint"]

    def to_json(self) -> dict[str, Any]:
        """As an object of ``servingtiers simulate -o json``."""
        made = self._figures()
        if self.tiers:
            made["tiers"] = {key: score._figures() for key, score in self.tiers.items()}  # noqa: SLF001 - its own kind
        return made

    def _figures(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "seed": self.seed,
            "requests": self.requests,
            "attainment": {name: round(value, 6) for name, value in self.attainment.items()},
            "worst5min": round(self.worst5min, 6),
            "gpuHours": round(self.gpu_hours, 4),
            "gpuHoursOverClairvoyant": None
            if self.gpu_hours_over_clairvoyant is None
            else round(self.gpu_hours_over_clairvoyant, 4),
            "scaleUps": self.scale_ups,
            "scaleDowns": self.scale_downs,
            "reversals": self.reversals,
            "rejected": self.rejected,
            "unfinished": self.unfinished,
            "peakReplicas": self.peak_replicas,
            "meanReadyReplicas": round(self.mean_ready, 3),
            "p99Seconds": {
                name: round(value, 4) if np.isfinite(value) else None for name, value in self.p99.items()
            },
            "meanCompletionSeconds": round(self.mean_completion, 4),
            "borrowed": self.borrowed,
            "complete": self.complete,
        }


def _latencies(outcome: TierOutcome) -> dict[str, NDArray[np.float64]]:
    """Return TTFT, TPOT and E2E of every request, seconds; infinite where it was not answered to the end."""
    lost = np.isnan(outcome.last) | outcome.refused
    first = np.where(lost, np.inf, outcome.first)
    last = np.where(lost, np.inf, outcome.last)
    with np.errstate(invalid="ignore"):
        tpot = np.where(
            np.isinf(last),
            np.inf,
            np.where(outcome.output > 1, (last - first) / np.maximum(outcome.output - 1, 1), 0.0),
        )
    return {"ttft": first - outcome.arrival, "tpot": tpot, "e2e": last - outcome.arrival}


def missed(outcome: TierOutcome) -> NDArray[np.bool_]:
    """Return which requests missed an objective; a tier without objectives asks to be answered at all."""
    found = _latencies(outcome)
    bad = np.isinf(found["e2e"])
    for metric, limit in slo_of(outcome.plan.targets).items():
        # Single inter-token gaps of single requests are not kept: their mean stands in.
        bad |= found["tpot" if metric == "itl" else metric] > limit
    return bad


def reversals(moves: Iterable[Move]) -> int:
    """Return how often a pool's replicas changed direction."""
    count = 0
    last: dict[tuple[str, str], int] = {}
    for move in moves:
        direction = 1 if move.after > move.before else -1
        key = move.tier, move.pool
        if last.get(key, direction) != direction:
            count += 1
        last[key] = direction
    return count


def worst_five_minutes(
    arrival: NDArray[np.float64], bad: NDArray[np.bool_], start: float, end: float
) -> float:
    """Return the least attainment of any five minutes with enough requests to tell, by arrival; 1 without any."""
    worst = 1.0
    for begin in np.arange(start, end, 300.0):
        window = bad[(arrival >= begin) & (arrival < begin + 300.0)]
        if len(window) >= _LEAST_REQUESTS:
            worst = min(worst, 1.0 - float(window.mean()))
    return worst


def score_tier(result: RunResult, outcome: TierOutcome) -> Score:
    """Return the figures of one tier."""
    found = _latencies(outcome)
    bad = missed(outcome)
    limits = slo_of(outcome.plan.targets)
    attainment = {
        name: float((found[name] <= limits.get(name, np.inf)).mean()) if len(bad) else 1.0
        for name in ("ttft", "tpot", "e2e")
    }
    # Without an objective of its own a metric is kept by every request that was answered.
    for name in ("ttft", "tpot", "e2e"):
        if name not in limits and len(bad):
            attainment[name] = float(np.isfinite(found[name]).mean())
    attainment["joint"] = float(1.0 - bad.mean()) if len(bad) else 1.0
    worst = worst_five_minutes(outcome.arrival, bad, result.warm_up, result.seconds)
    moves = [move for move in result.moves if move.tier == outcome.plan.key and move.time >= result.warm_up]
    unfinished = np.isnan(outcome.last) & ~outcome.refused
    spent = np.where(np.isinf(found["e2e"]), result.seconds + result.grace - outcome.arrival, found["e2e"])
    return Score(
        policy=result.policy,
        seed=result.seed,
        requests=len(bad),
        attainment=attainment,
        worst5min=worst,
        gpu_hours=sum(pool.gpu_seconds for pool in outcome.pools) / 3600.0,
        scale_ups=sum(move.after > move.before for move in moves),
        scale_downs=sum(move.after < move.before for move in moves),
        reversals=reversals(moves),
        rejected=int(outcome.refused.sum()),
        unfinished=int(unfinished.sum()),
        peak_replicas=sum(pool.peak for pool in outcome.pools),
        mean_ready=sum(_mean_ready(pool, result.warm_up) for pool in outcome.pools),
        p99={name: _quantile(values) for name, values in found.items()},
        mean_completion=float(spent.mean()) if len(spent) else 0.0,
        borrowed=sum(
            passage.holder == outcome.plan.key != passage.home and passage.time >= result.warm_up
            for passage in result.passages
        ),
        complete=result.complete,
    )


def _mean_ready(pool: PoolHistory, since: float) -> float:
    counted = pool.ready[pool.time >= since]
    return float(counted.mean()) if len(counted) else 0.0


def _quantile(values: NDArray[np.float64]) -> float:
    if not len(values):
        return 0.0
    # The inverted distribution function: infinite only where 1 % never finished.
    return float(np.quantile(values, 0.99, method="inverted_cdf"))


def score(result: RunResult) -> Score:
    """Return the figures of a run, all tiers together: attainment weighted by requests, the rest added up."""
    parts = [score_tier(result, outcome) for outcome in result.tiers]
    if len(parts) == 1:
        return parts[0]
    total = max(sum(part.requests for part in parts), 1)
    return Score(
        policy=result.policy,
        seed=result.seed,
        requests=sum(part.requests for part in parts),
        attainment={
            name: sum(part.attainment[name] * part.requests for part in parts) / total
            for name in ("ttft", "tpot", "e2e", "joint")
        },
        worst5min=min(part.worst5min for part in parts),
        gpu_hours=sum(part.gpu_hours for part in parts),
        scale_ups=sum(part.scale_ups for part in parts),
        scale_downs=sum(part.scale_downs for part in parts),
        reversals=sum(part.reversals for part in parts),
        rejected=sum(part.rejected for part in parts),
        unfinished=sum(part.unfinished for part in parts),
        peak_replicas=sum(part.peak_replicas for part in parts),
        mean_ready=sum(part.mean_ready for part in parts),
        p99={name: max(part.p99[name] for part in parts) for name in ("ttft", "tpot", "e2e")},
        mean_completion=sum(part.mean_completion * part.requests for part in parts) / total,
        borrowed=sum(part.borrowed for part in parts),
        complete=result.complete,
        tiers={outcome.plan.key: part for outcome, part in zip(result.tiers, parts, strict=True)},
    )
