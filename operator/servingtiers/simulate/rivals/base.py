"""What rivals share: their readings, their bounds, and how a number becomes a decision."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from servingtiers.api.spec import PoolScaling
from servingtiers.core.decisions import Binding, Decision, PoolFacts, PoolRole, TierDecision, TierObservation
from servingtiers.simulate.policies import PoolReadings, TierReadings
from servingtiers.simulate.scenario import PoolPlan, Scenario, TierPlan, slo_of

__all__ = ["Key", "PoolContext", "Rival", "Window", "contexts"]

Key = tuple[str, str]
"""Tier key and pool name."""


@dataclass(frozen=True, slots=True)
class PoolContext:
    """What a rival's user would have configured for a pool."""

    tier: TierPlan
    pool: PoolPlan
    limits: dict[str, float]
    """Limit of each metric, seconds."""

    @property
    def prompt(self) -> float:
        """Mean prompt length that the pool was profiled for, tokens."""
        return self.pool.belief.prompt

    @property
    def output(self) -> float:
        """Mean output length that the pool was profiled for, tokens."""
        return self.pool.belief.output

    def step_ms(self, prompt: float, past: float, decoding: float, kv: float) -> float:
        """Return a step's time as the rival's offline profile has it: the plant's own tables, times the model error."""
        return self.pool.model.step_ms(prompt, past, decoding, kv) / self.pool.belief.error


def contexts(scenario: Scenario) -> dict[Key, PoolContext]:
    """Return the configuration of every pool of a scenario."""
    return {
        (tier.key, pool.name): PoolContext(tier, pool, slo_of(tier.targets))
        for tier in scenario.tiers
        for pool in tier.pools
    }


@dataclass(slots=True)
class Window:
    """Samples of the last ``seconds``."""

    seconds: float
    samples: deque[tuple[float, float]]

    @classmethod
    def of(cls, seconds: float) -> Window:
        """Return an empty window."""
        return cls(seconds, deque())

    def add(self, now: float, value: float) -> None:
        """Take a sample and forget those that are too old."""
        self.samples.append((now, value))
        while self.samples and self.samples[0][0] <= now - self.seconds:
            self.samples.popleft()

    @property
    def mean(self) -> float | None:
        """Mean of the samples; None without any."""
        if not self.samples:
            return None
        return math.fsum(value for _, value in self.samples) / len(self.samples)

    @property
    def highest(self) -> float | None:
        """Largest sample; None without any."""
        return max((value for _, value in self.samples), default=None)


class Rival:
    """A policy that decides each pool by a rule of its own.

    Subclasses define :meth:`desired` and, where they keep samples, :meth:`read`.
    """

    name: str = "rival"
    interval: float = 15.0
    samples: float | None = 15.0
    reads_load: bool = False
    knob: str = ""
    """Name of the setting that a sweep varies."""

    def __init__(self, scenario: Scenario) -> None:
        self.pools = contexts(scenario)
        self.latest: dict[Key, PoolReadings] = {}
        self.tiers: dict[str, TierReadings] = {}
        self.now = 0.0

    def sample(self, readings: tuple[TierReadings, ...]) -> None:
        """Keep the latest readings and let the rule take what it needs."""
        for tier in readings:
            self.tiers[tier.key] = tier
            for pool in tier.pools:
                key = tier.key, pool.name
                self.latest[key] = pool
                self.read(key, pool, tier.now)

    def read(self, key: Key, pool: PoolReadings, now: float) -> None:
        """Take note of a pool's metrics."""

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Return the replicas that the rule wants, and why."""
        raise NotImplementedError

    def decide(self, observations: tuple[TierObservation, ...], now: float) -> tuple[TierDecision, ...]:
        """Decide every pool, within its bounds."""
        return tuple(
            TierDecision(
                obs.key,
                tuple(self._decision((obs.key, facts.name), facts, now) for facts in obs.pools),
                {},
            )
            for obs in observations
        )

    def _decision(self, key: Key, facts: PoolFacts, now: float) -> Decision:
        wanted, reason = self.desired(key, facts, now)
        bounded = bound(wanted, facts.scaling)
        return Decision(facts.name, facts.replicas, bounded, reason, Binding.STEADY, "")


def bound(wanted: int, scaling: PoolScaling) -> int:
    """Return a number of replicas within the pool's bounds; never below 1, as no rival here sleeps."""
    return max(1, scaling.min_replicas, min(wanted, scaling.max_replicas))


def is_prefill(context: PoolContext) -> bool:
    """Whether the pool computes prompts only."""
    return context.pool.role is PoolRole.PREFILL
