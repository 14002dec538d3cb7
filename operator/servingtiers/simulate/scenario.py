"""What is simulated: tiers on a plant, and everything that goes wrong around them. Plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from servingtiers.api.spec import PoolScaling, ServingTierSpec
from servingtiers.core.decisions import PoolRole, Targets
from servingtiers.performance.engine_sim import EngineConfig, Transfer
from servingtiers.performance.steps import GridStepModel
from servingtiers.simulate.capacity import Belief, OperatorCapacity
from servingtiers.simulate.telemetry import MetricFault
from servingtiers.simulate.traces import Trace

__all__ = ["Crash", "Delay", "NodeShortage", "Noise", "Outage", "PoolPlan", "Scenario", "TierPlan", "slo_of"]


@dataclass(frozen=True, slots=True)
class Delay:
    """How long an engine takes from creation to readiness: log-normal around its median."""

    median: float
    """Seconds."""
    sigma: float = 0.0
    """Standard deviation of the logarithm; 0: always the median."""

    @classmethod
    def parse(cls, text: str) -> Delay:
        """Read ``SECONDS``, ``constant:SECONDS`` or ``lognormal:MEDIAN:SIGMA``.

        Raises:
            ValueError: Anything else; the message shows the forms.
        """
        usage = f"start-up {text!r}: write seconds (130), constant:130 or lognormal:130:0.25 (median, sigma)"
        kind, _, rest = text.strip().lower().partition(":")
        numbers = rest.split(":") if rest else [kind]
        expected = {"constant": 1, "lognormal": 2}.get(kind, 0 if rest else 1)
        try:
            made = cls(*(float(each) for each in numbers)) if len(numbers) == expected else None
        except ValueError as error:
            raise ValueError(usage) from error
        if made is None:
            raise ValueError(usage)
        if not (0 <= made.median < math.inf and 0 <= made.sigma <= 3):
            raise ValueError(f"start-up {text!r}: a median of 0 s or more and a sigma of 0 to 3")
        return made

    def draw(self, seed: int, ordinal: int) -> float:
        """Return the start-up of the ``ordinal``-th pod of a run: the same for every policy."""
        if self.sigma == 0:
            return self.median
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0xB007, ordinal])))
        return float(self.median * math.exp(self.sigma * generator.standard_normal()))

    def quantile(self, z: float) -> float:
        """Return the delay ``z`` standard deviations above the median of the logarithm."""
        return self.median * math.exp(self.sigma * z)

    def __str__(self) -> str:
        return f"lognormal:{self.median:g}:{self.sigma:g}" if self.sigma else f"{self.median:g}"


@dataclass(frozen=True, slots=True)
class Noise:
    """How the plant's speed differs from its tables, per replica and over time."""

    replica: float = 0.03
    """Standard deviation of the logarithm of a replica's own speed."""
    drift: float = 0.02
    """The same of a slow wander around it, redrawn every scrape with a memory of about five minutes."""
    bias: float = 1.0
    """Step times of every replica times this."""


@dataclass(frozen=True, slots=True)
class Crash:
    """An engine's process dies; its container starts again on the same node."""

    time: float
    tier: str = ""
    """Tier key; empty: the first."""
    pool: str = ""


@dataclass(frozen=True, slots=True)
class NodeShortage:
    """No accelerator can be had for new pods in this time."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Outage:
    """The autoscaler does not run; afterwards it knows what it wrote down, and that it was away."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One pool: what it runs on, and what its controller believes of it."""

    name: str
    role: PoolRole
    scaling: PoolScaling
    model: GridStepModel
    """The plant's step model."""
    engine: EngineConfig
    gpus: int
    """Accelerators per replica."""
    belief: Belief
    """What rivals and limits are set up with."""
    operator: OperatorCapacity
    """What the operator tells its policy."""
    max_queued: int = 0
    """Requests in flight beyond which an engine answers 503; 0: no limit."""


@dataclass(frozen=True, slots=True)
class TierPlan:
    """One tier with its traffic."""

    key: str
    spec: ServingTierSpec
    targets: Targets
    pools: tuple[PoolPlan, ...]
    trace: Trace
    routing: str
    """vllm-router's policy; ``cache_aware`` is simulated by its balancing half, least load."""
    drain_seconds: float
    max_model_len: int
    transfer: Transfer | None = None
    """Between prefill and decode."""
    initial: Mapping[str, int] = field(default_factory=dict)
    """Replicas that are ready at the start, by pool; others start with what the first minutes need."""
    prefix_hit: float | None = None
    """Share of each prompt found in the prefix cache; None: the trace's own shared tokens count for nothing."""
    shared_prefix: bool = False
    """Use the trace's shared tokens as prefix-cache hits; a new engine's first request still finds none."""

    @property
    def shared_pool(self) -> str:
        """Namespace and name of the TierPool whose members it lends to and borrows from; empty: it does not."""
        if self.spec.shared_pool is None:
            return ""
        return f"{self.key.rpartition('/')[0]}/{self.spec.shared_pool.name}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything but the policy and the seed."""

    tiers: tuple[TierPlan, ...]
    start_up: Delay = Delay(130.0, 0.2)
    scheduling: float = 1.0
    """Seconds from a pod's creation to its node."""
    termination: float = 5.0
    """Seconds a drained engine still holds its accelerators."""
    accelerators: int | None = None
    """Accelerators there are for all tiers; None: no limit."""
    scrape: float = 15.0
    window: float = 60.0
    metric_age: float = 5.0
    """Seconds between a scrape and the decision that uses it."""
    front_end_ms: float = 1.0
    relabel: float = 5.0
    """Seconds from a change of an engine's routing label until routers heed it. vllm-router watches pods and was seen to
    follow within seconds; it then waits for a health check, which the operator sets to every 5 s."""
    pool_accelerators: Mapping[str, int] = field(default_factory=dict)
    """``maxAccelerators`` of TierPools, by namespace and name; one that is missing has no limit."""
    noise: Noise = Noise()
    metric_faults: tuple[MetricFault, ...] = ()
    crashes: tuple[Crash, ...] = ()
    shortages: tuple[NodeShortage, ...] = ()
    outages: tuple[Outage, ...] = ()
    warm_up: float = 0.0
    """Seconds at the start that are simulated and not scored: neither requests nor accelerators nor moves count. Whatever
    a fleet began with, a policy has had its say by then."""
    grace: float = 300.0
    """Seconds after the trace in which requests may still finish; no policy acts and no GPU time counts then."""

    @property
    def seconds(self) -> float:
        """Length of the run."""
        return max(tier.trace.seconds for tier in self.tiers)

    def groups(self) -> list[list[TierPlan]]:
        """Return the tiers, those that lend each other engines together."""
        found: dict[str, list[TierPlan]] = {}
        for tier in self.tiers:
            found.setdefault(tier.shared_pool or f"tier {tier.key}", []).append(tier)
        return list(found.values())


def slo_of(targets: Targets) -> dict[str, float]:
    """Return the limit of each metric that a single request must keep: the target of its highest percentile, seconds."""
    found: dict[str, tuple[str, float]] = {}
    for (metric, percentile), seconds in targets.seconds.items():
        # p50 < p90 < p95 < p99 < p999, as text too.
        if metric not in found or percentile > found[metric][0]:
            found[metric] = (percentile, seconds)
    return {metric: seconds for metric, (_, seconds) in found.items()}
