"""Policies that do not look: a fixed number, and a schedule written before the run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from servingtiers.core.decisions import PoolFacts
from servingtiers.simulate.fleet import EPOCH
from servingtiers.simulate.rivals.base import Key, Rival
from servingtiers.simulate.scenario import PoolPlan, Scenario, TierPlan

__all__ = ["Scheduled", "StaticByPeak", "StaticReplicas", "work_seconds"]


def work_seconds(tier: TierPlan, pool: PoolPlan) -> NDArray[np.float64]:
    """Return the replica-seconds of every request by the pool's belief."""
    work = pool.belief.work
    prompt = tier.trace.prompt.astype(np.float64)
    if tier.prefix_hit:
        prompt *= 1.0 - tier.prefix_hit
    if tier.shared_prefix:
        prompt -= tier.trace.shared
    cost = work.prompt * prompt + work.output * tier.trace.output
    found: NDArray[np.float64] = np.maximum(cost, 1e-6) / pool.belief.error
    return found


class StaticReplicas(Rival):
    """The same replicas all the time."""

    samples = None

    def __init__(self, scenario: Scenario, replicas: Mapping[Key, int] | int, name: str = "static") -> None:
        super().__init__(scenario)
        self.replicas = dict.fromkeys(self.pools, replicas) if isinstance(replicas, int) else dict(replicas)
        self.name = name

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Return the fixed number."""
        del facts, now
        return self.replicas[key], "fixed"


class StaticByPeak(StaticReplicas):
    """Capacity planning: the busiest minute of the trace at what the model says one replica carries.

    It knows the trace, as a team that sizes by last week's peak does.
    """

    knob = "margin over the peak"

    def __init__(self, scenario: Scenario, margin: float = 1.0) -> None:
        found: dict[Key, int] = {}
        for tier in scenario.tiers:
            edges = np.arange(0.0, tier.trace.seconds + 60.0, 60.0)
            for pool in tier.pools:
                load = np.histogram(tier.trace.arrival, edges, weights=work_seconds(tier, pool))[0] / 60.0
                found[tier.key, pool.name] = max(1, math.ceil(margin * float(load.max())))
        super().__init__(scenario, found, "static-peak")


class Scheduled(Rival):
    """A schedule of wanted replicas, written before the run."""

    samples = None

    def __init__(
        self,
        scenario: Scenario,
        plan: Mapping[Key, tuple[NDArray[np.float64], NDArray[np.int64]]],
        name: str,
        interval: float,
    ) -> None:
        super().__init__(scenario)
        self.plan = plan
        self.name = name
        self.interval = interval
        self.start: float | None = None

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Return what the schedule says for now."""
        del facts
        times, replicas = self.plan[key]
        at = int(np.searchsorted(times, now - EPOCH, side="right")) - 1
        return int(replicas[max(at, 0)]), "scheduled"
