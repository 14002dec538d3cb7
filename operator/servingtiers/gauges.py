"""From what was reported of a tier to the operator's own metrics."""

from __future__ import annotations

from dataclasses import fields

from servingtiers.adapters.operator_metrics import ObjectiveGauges, PoolGauges, TierGauges
from servingtiers.api.status import PoolStatus
from servingtiers.core.findings import SloVerdict
from servingtiers.core.signals import Load, TierLoad, Unknown, Value, number
from servingtiers.policy import attainment
from servingtiers.report import Remembered

__all__ = ["gauges"]


def gauges(key: tuple[str, str], seen: Remembered, load: TierLoad, load_age: float | None) -> TierGauges:
    """Return what ``/metrics`` shows of one tier; ``load_age`` is the age of its reading, seconds."""
    status = seen.status
    cost = status.cost
    batch = {pool.name: pool.max_num_seqs for pool in status.effective.pools} if status.effective else {}
    return TierGauges(
        namespace=key[0],
        name=key[1],
        pools=[_pool(pool, batch.get(pool.name), load.pools.get(pool.name)) for pool in status.pools],
        objectives=[_objective(verdict, seen) for verdict in attainment.verdicts(seen.tallies)],
        currency=cost.currency if cost else "USD",
        cost_per_hour=_float(cost.per_hour if cost else None),
        idle_cost_per_hour=_float(cost.idle_per_hour if cost else None),
        cost_per_million_output_tokens=_float(cost.per_million_output_tokens if cost else None),
        arrivals_per_second=number(load.router.arrival_rate),
        load_age=_oldest(load, load_age),
        unknown_signals=sum(_unknown(each) for each in load.pools.values()),
    )


def _pool(pool: PoolStatus, batch: int | None, load: Load | None) -> PoolGauges:
    running = number(load.running) if load is not None else None
    slots = (pool.ready - (pool.lent or 0) + (pool.borrowed or 0)) * (batch or 0)
    return PoolGauges(
        name=pool.name,
        desired=pool.desired,
        ready=pool.ready,
        lent=pool.lent,
        borrowed=pool.borrowed,
        utilization=running / slots if running is not None and slots > 0 else None,
        running=running,
        waiting=number(load.waiting) if load is not None else None,
    )


def _objective(verdict: SloVerdict, seen: Remembered) -> ObjectiveGauges:
    allowed = next(tally.allowed for tally in seen.tallies if tally.objective == verdict.objective)
    low = verdict.attainment_low
    return ObjectiveGauges(
        objective=verdict.objective,
        target_seconds=verdict.target_seconds,
        attainment=low,
        error_budget_left=None if low is None else 1 - (1 - low) / allowed,
    )


def _unknown(load: Load) -> int:
    return sum(1 for each in fields(load) if isinstance(getattr(load, each.name), Unknown))


def _oldest(load: TierLoad, reading: float | None) -> float | None:
    if reading is None or not load.pools:
        return None
    ages = [each.running.age for each in load.pools.values() if isinstance(each.running, Value)]
    return reading + max(ages, default=0.0)


def _float(text: str | None) -> float | None:
    return None if text is None else float(text)
