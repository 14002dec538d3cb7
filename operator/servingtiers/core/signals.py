"""What telemetry says of a pool, with "no data" as a value of its own.

A signal is :class:`Value`, :class:`Zero` (proved: every ready pod answered) or :class:`Unknown` (missing, stale,
NaN, Inf, negative, partial). Unknown never shrinks anything.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import le, lt

__all__ = [
    "Coverage",
    "Distribution",
    "Histogram",
    "Interval",
    "Load",
    "RouterLoad",
    "Signal",
    "TierLoad",
    "Unknown",
    "Value",
    "Zero",
    "merge",
    "number",
]


@dataclass(frozen=True, slots=True)
class Value:
    """A measured, finite, positive number."""

    value: float
    age: float = 0.0
    """Seconds since the oldest sample it is made of."""
    partial: bool = False
    """True where some ready pods did not answer: enough to grow on, never to shrink on."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value < 0:
            raise ValueError(f"{self.value} is no value: report it as Unknown")


@dataclass(frozen=True, slots=True)
class Zero:
    """A proved zero: every ready pod answered, and there was nothing."""

    age: float = 0.0


@dataclass(frozen=True, slots=True)
class Unknown:
    """No usable data, and why."""

    reason: str


Signal = Value | Zero | Unknown


def number(signal: Signal) -> float | None:
    """Return the number of a signal; None when it is unknown."""
    match signal:
        case Value(value=value):
            return value
        case Zero():
            return 0.0
        case Unknown():
            return None


@dataclass(frozen=True, slots=True)
class Interval:
    """What buckets allow to say of a quantile: it lies in ``(low, high]``; seconds."""

    low: float
    high: float
    estimate: float
    """Linear interpolation inside the bucket, as Prometheus' histogram_quantile does; ``high`` may be infinite."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Requests of a window counted by cumulative upper bounds, as Prometheus histograms are.

    ``bounds`` are ascending and end with infinity; ``counts`` are cumulative, so ``counts[-1]`` is the total.
    Counts may be fractional: increases are extrapolated to the window.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    sum: float
    """Sum of the observations (seconds or tokens)."""
    partial: bool = False
    """True where some ready pods did not answer for the whole window: enough to grow on, never to shrink on."""

    def __post_init__(self) -> None:
        if len(self.bounds) != len(self.counts) or not self.bounds or self.bounds[-1] != math.inf:
            raise ValueError("a histogram has one count per bound and its last bound is +Inf")
        # A NaN fails every comparison. Mapped, because a tick of a large fleet makes tens of thousands of these.
        if not (all(map(lt, self.bounds, self.bounds[1:])) and all(map(le, self.counts, self.counts[1:]))):
            raise ValueError("bounds ascend and cumulative counts never fall")
        if not (self.counts[0] >= 0 and math.isfinite(self.counts[-1]) and math.isfinite(self.sum)):
            raise ValueError("counts and their sum are finite and counts are not negative")

    @property
    def total(self) -> float:
        """Number of observations."""
        return self.counts[-1]

    @property
    def mean(self) -> float | None:
        """Mean of the observations; None without any."""
        return self.sum / self.total if self.total > 0 else None

    def quantile(self, q: float) -> Interval | None:
        """Return where the ``q`` quantile lies; None without observations.

        The estimate is that of Prometheus' ``histogram_quantile``: linear inside the bucket, from 0 in the first
        one, and the highest finite bound where the quantile lies beyond it.

        Raises:
            ValueError: ``q`` is not within 0 and 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"{q} is no quantile: give one from 0 to 1")
        if self.total <= 0:
            return None
        rank = q * self.total
        index = bisect_left(self.counts, rank)
        while self.counts[index] <= 0:  # q = 0: the least observation is in the first bucket that holds one
            index += 1
        low = self.bounds[index - 1] if index else min(0.0, self.bounds[0])
        high = self.bounds[index]
        if math.isinf(high):
            return Interval(low, high, low)
        below = self.counts[index - 1] if index else 0.0
        share = (rank - below) / (self.counts[index] - below)
        return Interval(low, high, low + (high - low) * min(max(share, 0.0), 1.0))

    def count_at_most(self, threshold: float) -> tuple[float, float]:
        """Return the least and the most observations that can be ``<= threshold``, as the buckets allow.

        Both are the same where the threshold is a bucket's edge.
        """
        index = bisect_left(self.bounds, threshold)
        if self.bounds[index] == threshold:
            return self.counts[index], self.counts[index]
        return (self.counts[index - 1] if index else 0.0), self.counts[index]

    def likely_at_most(self, threshold: float) -> float:
        """Return how many observations are ``<= threshold`` if they lie evenly inside their buckets."""
        index = bisect_left(self.bounds, threshold)
        below, upto = (self.counts[index - 1] if index else 0.0), self.counts[index]
        low, high = (self.bounds[index - 1] if index else 0.0), self.bounds[index]
        if math.isinf(high) or high <= low:
            return below
        return below + (upto - below) * min(max((threshold - low) / (high - low), 0.0), 1.0)

    def tail_beyond(self, threshold: float) -> float:
        """Return how many observations are ``> threshold`` if their tail falls exponentially inside its bucket.

        So waits in a queue are spread: of those beyond a second most are little beyond it, where an even spread over a
        bucket of 1 to 2.5 s has as many beyond two.
        """
        index = bisect_left(self.bounds, threshold)
        begin, end = self._tail(index)
        low, high = (self.bounds[index - 1] if index else 0.0), self.bounds[index]
        if math.isinf(high) or begin <= 0.0 or high <= low:
            return begin
        share = min(max((threshold - low) / (high - low), 0.0), 1.0)
        return begin * (end / begin) ** share if share < 1.0 else self.total - self.counts[index]

    def tail_quantile(self, q: float) -> float | None:
        """Return the ``q`` quantile if the tail falls exponentially inside its bucket; None without observations.

        It is that of :meth:`quantile` where that lies beyond the highest finite bound.
        """
        found = self.quantile(q)
        if found is None or math.isinf(found.high):
            return None if found is None else found.estimate
        index = bisect_left(self.bounds, found.high)
        begin, end = self._tail(index)
        beyond = (1.0 - q) * self.total
        if beyond <= end or begin <= end:
            return found.high if beyond <= end else found.estimate
        return found.low + (found.high - found.low) * math.log(begin / beyond) / math.log(begin / end)

    def _tail(self, index: int) -> tuple[float, float]:
        """Return the observations beyond the lower and beyond the upper bound of a bucket.

        Where none lies beyond the upper one, as many do as would not be seen: half an observation, or half of the bucket.
        """
        begin = self.total - (self.counts[index - 1] if index else 0.0)
        end = self.total - self.counts[index]
        return begin, max(end, min(0.5, begin / 2.0))

    def bucket_around(self, threshold: float) -> tuple[float, float]:
        """Return the edges that the buckets know on either side of ``threshold``; twice itself where it is one."""
        index = bisect_left(self.bounds, threshold)
        if self.bounds[index] == threshold:
            return threshold, threshold
        return (self.bounds[index - 1] if index else min(0.0, threshold)), self.bounds[index]

    def scaled(self, factor: float) -> Histogram:
        """Return the histogram with every count and the sum times ``factor`` (a finite number, 0 or more).

        Scaling by ``interval / window`` gives the share of a sliding window that belongs to one tick.
        """
        return Histogram(self.bounds, tuple(c * factor for c in self.counts), self.sum * factor, self.partial)

    def on_bounds(self, bounds: tuple[float, ...]) -> Histogram:
        """Return the same observations counted by fewer bounds.

        Args:
            bounds: A subset of this histogram's bounds that ends with infinity.

        Raises:
            ValueError: A bound is not among this histogram's.
        """
        if bounds == self.bounds:
            return self
        at = dict(zip(self.bounds, self.counts, strict=True))
        if not at.keys() >= set(bounds):
            raise ValueError("counts are known at a histogram's own bounds only")
        return Histogram(bounds, tuple(at[b] for b in bounds), self.sum, self.partial)


def merge(histograms: Iterable[Histogram]) -> Histogram:
    """Return all observations together, counted by the bounds that every histogram has.

    Engines of different versions, or of different maximum lengths, count by different buckets: only what is known
    of all of them is kept. The result is partial where one of the parts is.

    Raises:
        ValueError: There is nothing to merge.
    """
    parts = list(histograms)
    if not parts:
        raise ValueError("there is no histogram to merge")
    bounds = parts[0].bounds
    if any(part.bounds != bounds for part in parts):
        common = set(bounds).intersection(*(part.bounds for part in parts))
        bounds = tuple(sorted(common))
    counts = zip(*(part.on_bounds(bounds).counts for part in parts), strict=True)
    return Histogram(
        bounds,
        tuple(math.fsum(column) for column in counts),
        math.fsum(part.sum for part in parts),
        any(part.partial for part in parts),
    )


Distribution = Histogram | Zero | Unknown
"""A histogram of the window, a proved absence of requests, or no data."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many of the pool's ready pods answered with fresh samples."""

    answered: int
    expected: int

    @property
    def complete(self) -> bool:
        """Every ready pod answered."""
        return self.answered >= self.expected


_NO_DATA = Unknown("not measured")


@dataclass(frozen=True, slots=True)
class Load:
    """Everything telemetry says of one pool over one window."""

    window: float
    """Seconds over which rates and histograms are taken."""
    coverage: Coverage
    running: Signal = _NO_DATA
    """Sequences being served, all replicas together."""
    waiting: Signal = _NO_DATA
    """Requests waiting inside the engines, all replicas together."""
    kv_usage: Signal = _NO_DATA
    """Mean KV-cache use of the replicas, 0 to 1."""
    request_rate: Signal = _NO_DATA
    """Requests finished per second (arrivals are in :class:`RouterLoad`)."""
    prompt_token_rate: Signal = _NO_DATA
    """Prompt tokens per second, cached ones included."""
    output_token_rate: Signal = _NO_DATA
    """Generated tokens per second."""
    prefix_hit_share: Signal = _NO_DATA
    """Share of prompt tokens found in the prefix cache, 0 to 1."""
    preemption_rate: Signal = _NO_DATA
    """Preemptions per second."""
    rejection_rate: Signal = _NO_DATA
    """Requests per second that engines refused with 503."""
    flops_utilization: Signal = _NO_DATA
    """Estimated FLOP/s per accelerator, from vLLM's counters (divide by the peak for MFU)."""
    bytes_rate: Signal = _NO_DATA
    """Estimated bytes per second read and written per accelerator (divide by the bandwidth for MBU)."""
    resets: int = 0
    """Pods whose counters began anew within the window: their container restarted."""
    prompt_tokens: Distribution = _NO_DATA
    """Prompt lengths."""
    output_tokens: Distribution = _NO_DATA
    """Output lengths."""
    ttft: Distribution = _NO_DATA
    tpot: Distribution = _NO_DATA
    itl: Distribution = _NO_DATA
    e2e: Distribution = _NO_DATA
    queue_time: Distribution = _NO_DATA


@dataclass(frozen=True, slots=True)
class RouterLoad:
    """What the tier's routers say: arrivals are counted here, not at completion."""

    coverage: Coverage
    arrival_rate: Signal = _NO_DATA
    """Requests dispatched per second over the window, retries included."""
    unserved: Signal = _NO_DATA
    """Requests in the window that found no engine: the call to wake a tier at zero."""
    recent_rate: Signal = _NO_DATA
    """Arrivals at the end of the window, the last scrapes: tells of a rise before the window does, with more noise."""


@dataclass(frozen=True, slots=True)
class TierLoad:
    """All telemetry of one tier."""

    pools: dict[str, Load] = field(default_factory=dict)
    router: RouterLoad = RouterLoad(Coverage(0, 0))
    in_flight: dict[str, Signal] = field(default_factory=dict)
    """Engine pod to its requests running and waiting: of those that serve the tier, and of its own that serve nobody."""
