"""What a policy is in the simulator: the operator's own code, a rival, or a limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from servingtiers.core.decisions import TierDecision, TierObservation
from servingtiers.core.sharing import Group, GroupDecision
from servingtiers.policy import lending, scaling

__all__ = ["Lender", "OperatorPolicy", "PodReadings", "Policy", "PoolReadings", "TierReadings"]


@dataclass(frozen=True, slots=True)
class PodReadings:
    """Gauges of the ready pods of a pool at one instant; arrays have one entry per pod."""

    serial: NDArray[np.int64]
    """Which pod, counted from the start of the run."""
    running: NDArray[np.float64]
    waiting: NDArray[np.float64]
    kv_tokens: NDArray[np.float64]
    """KV-cache tokens in use."""
    kv_capacity: float
    """KV-cache tokens of one engine."""
    waiting_tokens: NDArray[np.float64]
    """Prompt tokens that wait to be computed."""


@dataclass(frozen=True, slots=True)
class PoolReadings:
    """What peers with samples of their own read of one pool."""

    name: str
    pods: PodReadings | None
    """None: the metrics could not be read."""
    empty: bool
    """The metrics store answered, with nothing in it."""
    replicas: int
    """Replicas asked for."""
    ready: int
    starting: int
    """Pods that exist and are not ready."""
    done: int
    """Requests finished since the start, all pods ever; likewise below."""
    prompt_tokens: float
    """Of finished requests."""
    output_tokens: float
    ttft_sum: float
    """Seconds."""
    ttft_count: int
    itl_sum: float
    itl_count: int


@dataclass(frozen=True, slots=True)
class TierReadings:
    """What peers read of one tier."""

    key: str
    now: float
    arrivals: int
    """Requests that came to the router since the start, those it could not send included."""
    unserved: int
    """Of these, those that found no engine."""
    pools: tuple[PoolReadings, ...]


class Policy(Protocol):
    """Decides replicas.

    The operator's own code needs nothing but :meth:`decide`. Peers read metrics in ways of their own (per pod, every
    two seconds, maxima over a minute): they set ``samples`` and are shown :class:`TierReadings` at that period.
    """

    @property
    def name(self) -> str:
        """Short name, for tables."""
        ...

    @property
    def interval(self) -> float:
        """Seconds between decisions."""
        ...

    @property
    def samples(self) -> float | None:
        """Seconds between :meth:`sample` calls; None: it needs none."""
        ...

    @property
    def reads_load(self) -> bool:
        """Whether it reads the ``Load`` of its observations; where not, none is made and they are Unknown."""
        ...

    def sample(self, readings: tuple[TierReadings, ...]) -> None:
        """Take note of metrics."""
        ...

    def decide(self, observations: tuple[TierObservation, ...], now: float) -> tuple[TierDecision, ...]:
        """Return the replicas of every pool; a pool without a decision keeps what it has."""
        ...


@runtime_checkable
class Lender(Protocol):
    """A policy that also moves engines between the tiers of a TierPool."""

    @property
    def lends(self) -> bool:
        """Whether it does; where not, the members of a TierPool keep what is theirs."""
        ...

    def lend(self, group: Group, decided: tuple[TierDecision, ...], now: float) -> GroupDecision:
        """Return what a group does, given what each tier would do on its own."""
        ...


Decide = Callable[[tuple[TierObservation, ...], float], tuple[TierDecision, ...]]
Lend = Callable[[Group, tuple[TierDecision, ...], float], GroupDecision]


@dataclass(frozen=True, slots=True)
class OperatorPolicy:
    """The operator's own policy code, as the operator calls it."""

    name: str = "servingtiers"
    interval: float = 15.0
    function: Decide = scaling.decide
    lending: Lend | None = lending.decide
    """Decides what tiers of a TierPool lend; None: nothing."""

    @property
    def samples(self) -> float | None:
        """It reads the ``Load`` of its observations and nothing else."""
        return None

    @property
    def reads_load(self) -> bool:
        """It does."""
        return True

    def sample(self, readings: tuple[TierReadings, ...]) -> None:
        """Never called."""

    def decide(self, observations: tuple[TierObservation, ...], now: float) -> tuple[TierDecision, ...]:
        """Return what the operator would do."""
        return self.function(observations, now)

    @property
    def lends(self) -> bool:
        """Whether tiers of a TierPool lend each other engines."""
        return self.lending is not None

    def lend(self, group: Group, decided: tuple[TierDecision, ...], now: float) -> GroupDecision:
        """Return what the operator would do in a group."""
        if self.lending is None:
            return GroupDecision(decided)
        return self.lending(group, decided, now)
