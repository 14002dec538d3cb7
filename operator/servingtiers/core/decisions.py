"""What scaling decides, in the form that status, events, logs and the command line share.

A decision is a number with its reason: what was decided, which limit was binding, what would change it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from enum import StrEnum

from servingtiers.api.spec import PoolScaling, ScalingMode, ServingTierSpec
from servingtiers.api.status import PoolMemory
from servingtiers.core.signals import TierLoad

__all__ = [
    "Binding",
    "Decision",
    "EngineCurve",
    "PoolFacts",
    "PoolRole",
    "Targets",
    "TierDecision",
    "TierObservation",
    "acts",
]


class PoolRole(StrEnum):
    """What a pool does."""

    AGGREGATED = "Aggregated"
    PREFILL = "Prefill"
    DECODE = "Decode"


class Binding(StrEnum):
    """The limit that set the number."""

    TTFT = "TTFT"
    TPOT = "TPOT"
    ITL = "ITL"
    E2E = "E2E"
    QUEUE = "Queue"
    KV_CACHE = "KVCache"
    FORECAST = "Forecast"
    MIN_REPLICAS = "MinReplicas"
    MAX_REPLICAS = "MaxReplicas"
    HOLD_UNKNOWN = "HoldUnknown"
    """Data is missing: nothing shrinks."""
    HOLD_DOWN = "HoldDown"
    """Fewer would do, but not for long enough yet."""
    HOLD_PENDING = "HoldPending"
    """Added replicas are not ready yet: the same need is not met twice."""
    IDLE = "Idle"
    WAKE = "Wake"
    STEADY = "Steady"
    BORROWED = "Borrowed"
    """Engines of other tiers serve what would else be started, or go back before any of its own is stopped."""
    LENT = "Lent"
    """Engines that are lent, or kept for a tier that expects to need them, are neither replaced nor stopped."""
    MAX_ACCELERATORS = "MaxAccelerators"
    """The TierPool has no accelerator left."""
    INFEASIBLE = "Infeasible"
    """More replicas would not help: one request alone misses the objective."""


@dataclass(frozen=True, slots=True)
class EngineCurve:
    """What the performance model says of one engine at the lengths of the traffic, for every load."""

    rps: float
    """Requests per second that it carries within the objectives that other engines beside it do not help to keep: how
    long a token takes depends on the engine's own batch."""
    saturation: float
    """Requests per second at which its queue grows without end; ``rps`` or more."""
    loads: tuple[float, ...]
    """Ascending shares of ``saturation``, 0 to 1."""
    tpot: tuple[float, ...]
    """Mean time of an output token at each of them, seconds."""
    ttft: tuple[float, ...]
    """Mean time to the first token at each of them, seconds."""
    prefill_share: float
    """Share of a saturated engine's time that goes into prompts, 0 to 1."""
    source: str = "the performance model"

    def at(self, load: float, times: tuple[float, ...]) -> float:
        """Return ``tpot`` or ``ttft`` at a share of saturation; beyond the ends the nearest that is known."""
        index = bisect_left(self.loads, load)
        if index == 0:
            return times[0]
        if index == len(self.loads):
            return times[-1]
        low, high = self.loads[index - 1], self.loads[index]
        share = (load - low) / (high - low)
        return times[index - 1] + share * (times[index] - times[index - 1])


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """What Kubernetes says of one pool."""

    name: str
    role: PoolRole
    scaling: PoolScaling
    replicas: int
    """`spec.replicas` of the Deployment."""
    ready: int
    pending: int = 0
    """Pods that exist and are not ready, without those that cannot be scheduled."""
    unschedulable: int = 0
    terminating: int = 0
    rolling: bool = False
    """A rollout of the pod template is under way."""
    max_num_seqs: int = 0
    """Largest batch of one replica."""
    startup_seconds: float | None = None
    """Median start-up time seen, seconds; None: none seen, or taken from the memory's list."""
    settled_seconds: float | None = None
    """Seconds since the newest ready pod became ready; None: not known, taken as long ago. Latencies of a window
    that began before it still tell of the smaller pool."""
    curve: EngineCurve | None = None
    """What the performance model says one replica does; None: not modelled, or nobody knows the lengths."""
    lent: int = 0
    """Ready replicas of its own that another tier holds, or that are on their way there or back."""
    borrowed: int = 0
    """Ready engines of other tiers that this pool's routers select. Telemetry tells of the engines a pool holds:
    ``ready - lent + borrowed``."""
    engines: str = ""
    """What its engines are and what is asked of them, as a hash: what was learned of others is not believed."""
    borrowed_share: float = 1.0
    """What a borrowed engine carries of what one of its own does: its batch and step budget are its home's."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Objectives in force: (metric, percentile) to seconds, e.g. ``("ttft", "p99"): 0.5``."""

    seconds: dict[tuple[str, str], float] = field(default_factory=dict)
    reason: str = "given in spec.slo"


@dataclass(frozen=True, slots=True)
class TierObservation:
    """What one tier's scaling is decided from."""

    key: str
    spec: ServingTierSpec
    targets: Targets
    pools: tuple[PoolFacts, ...]
    load: TierLoad
    """Loads by pool name; a pool that is missing is Unknown."""
    memory: dict[str, PoolMemory]
    """Pool name to what was remembered."""
    watching_since: float | None = None
    """Unix time since which this process has watched the tier without a break (its start, or the moment it became
    leader). Holds never reach back before it: what was not watched was not low. None: the memory is trusted."""
    feasible: bool | None = None
    """Whether one request alone keeps the objectives, by the performance model; None: it cannot tell."""
    rivalled: bool = False
    """An autoscaler of somebody else's sets the replicas: what is decided is not carried out."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Replicas of one pool, with the reason."""

    pool: str
    current: int
    """Replicas of the pool's Deployment."""
    desired: int
    """Replicas that its Deployment should have, with what is lent and borrowed as it is: ``desired - current`` is what
    the pool lacks, or can do without, beside the engines that serve it."""
    reason: str
    binding: Binding
    would_change: str
    limited: str | None = None
    """Why less (or more) was decided than wanted, e.g. maxReplicas; None when nothing limited it."""
    signals: dict[str, str] = field(default_factory=dict)
    """Rounded inputs, for people."""
    needed: int | None = None
    """Replicas that the load of now calls for, whoever owns them: before bounds, holds and pacing. None: not known."""
    expected: int | None = None
    """The same for the load until an engine ordered now could serve. None: not known."""
    highest: int | None = None
    """The same for the highest load of the last hour. None: not known."""
    standby: int | None = None
    """The same for the next rush of a load that comes and goes, which is over before an engine has moved. None: it is no
    such load, or not known."""


@dataclass(frozen=True, slots=True)
class TierDecision:
    """All pools of one tier, decided together, and what to remember."""

    key: str
    decisions: tuple[Decision, ...]
    """In the order they should be carried out: decode first up, prefill first down."""
    memory: dict[str, PoolMemory]


def acts(mode: ScalingMode, *, suspended: bool) -> bool:
    """Return whether a decision is carried out."""
    return mode is ScalingMode.AUTO and not suspended
