"""From what single pods said to the load of a tier: the pure half of reading telemetry.

Two adapters read pods, one by scraping them and one through Prometheus. Both hand over the same
:class:`PodWindow`, so both mean the same by "no data".

When a signal is what:

* ``Value``: at least one ready pod gave a sound number. ``partial`` unless all of them did and their samples reach
  back over the whole window (or to the pod's readiness) without a gap: a sum over some pods is a lower bound,
  which is enough to grow on and never enough to shrink on.
* ``Zero``: every ready pod gave a sound 0 over the whole window.
* ``Unknown``: anything else: no answer, stale, NaN, Inf, negative, absurd, two series where one is expected, the
  engine does not expose the metric, or partial data that shows nothing.

A pool without ready pods is the case where "every ready pod answered" is true and worthless: the pods may all have
crashed. Its signals are Unknown while any replica is wanted. With no replica wanted they are Zero only where the
routers, which outlive the engines, prove that nothing arrived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol, TypeVar

from servingtiers.core.decisions import PoolRole
from servingtiers.core.signals import (
    Coverage,
    Distribution,
    Histogram,
    Load,
    RouterLoad,
    Signal,
    TierLoad,
    Unknown,
    Value,
    Zero,
    merge,
)
from servingtiers.core.vllm_metrics import ENGINE_METRICS, ROUTER_METRICS, Kind, Metric

__all__ = [
    "MAX_FUTURE",
    "STALE_INTERVALS",
    "LoadSource",
    "PodTarget",
    "PodWindow",
    "PoolTargets",
    "RouterScan",
    "RouterWindow",
    "Scan",
    "TierTargets",
    "engine_window",
    "increase",
    "pool_load",
    "router_load",
    "router_window",
    "tier_load",
]

STALE_INTERVALS = 2.5
"""Scrape intervals after which a sample is no news: one lost scrape is forgiven, two are not."""
MAX_FUTURE = 30.0
"""Seconds a sample may be ahead of the operator's clock before the clocks count as different."""


@dataclass(frozen=True, slots=True)
class PodTarget:
    """One ready pod that can be asked for metrics."""

    name: str
    ip: str
    port: int
    ready_since: float | None = None
    """Unix time at which it became ready; None: long ago."""
    held_since: float | None = None
    """Unix time at which it came to the tier that it serves; None: long ago, or never away from it."""
    engine_version: str | None = None
    """vLLM's version where the image names it; only used to say why a metric is missing."""


@dataclass(frozen=True, slots=True)
class PoolTargets:
    """The ready pods that serve as one pool, whoever owns them."""

    name: str
    role: PoolRole
    desired: int
    """Engines wanted now (`spec.replicas` of the Deployment, less what is lent, and what is borrowed)."""
    pods: tuple[PodTarget, ...]


@dataclass(frozen=True, slots=True)
class TierTargets:
    """Whom to ask about one tier."""

    namespace: str
    name: str
    pools: tuple[PoolTargets, ...]
    routers: tuple[PodTarget, ...] = ()
    unheld: tuple[PodTarget, ...] = ()
    """Engines of this tier that serve nobody at the moment: they finish what they have before they move on."""

    @property
    def engines(self) -> tuple[PodTarget, ...]:
        """Every engine to ask."""
        return (*(pod for pool in self.pools for pod in pool.pods), *self.unheld)

    @property
    def key(self) -> str:
        """Namespace and name."""
        return f"{self.namespace}/{self.name}"


class LoadSource(Protocol):
    """Reads the load of all tiers at once."""

    async def read(
        self, tiers: Sequence[TierTargets], now: float, *, complete: bool = True
    ) -> Mapping[str, TierLoad]:
        """Return the load of every tier by :attr:`TierTargets.key`.

        Never raises for what the network or a pod does: that is an ``Unknown`` with its reason.

        Args:
            tiers: The tiers that are asked for.
            now: Unix time, seconds.
            complete: These are all tiers there are: pods that are missing here are forgotten.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


@dataclass(frozen=True, slots=True)
class Scan:
    """One scrape of one engine, its data-parallel ranks already put together."""

    time: float
    """Unix time of the samples, seconds."""
    scalars: Mapping[str, float]
    """Metric key to value: gauges and counters."""
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    """Metric key to cumulative counts since the engine started."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Metric key to why its samples cannot be used."""
    start_time: float | None = None
    """When the engine's process started, where it says so."""


@dataclass(frozen=True, slots=True)
class PodWindow:
    """What one engine said over the window."""

    time: float
    """Unix time of its newest sample."""
    gauges: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    """Counter key to increase per second."""
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    """Histogram key to the observations of the window."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """Metric key to why there is no number."""
    whole: bool = True
    """Samples reach back over the whole window, or to the pod's readiness, without a gap."""
    reset: bool = False
    """Counters began anew within the window."""


def increase(times: Sequence[float], values: Sequence[float], start: float, end: float) -> float:
    """Return a counter's increase from ``start`` to ``end``, extrapolated as Prometheus' ``increase`` does.

    A fall counts as a reset. The increase between the first and the last sample is extended to the ends of the
    window where the samples reach to within 1.1 mean intervals of them, else by half an interval; and at the start
    by no more than back to where the counter would have been 0 (``extrapolatedRate`` in promql/functions.go).

    Args:
        times: Ascending sample times within ``(start, end]``, seconds; two or more.
        values: The counter at those times.
        start: Start of the window, seconds.
        end: End of the window, seconds.

    Raises:
        ValueError: There are fewer than two samples, or no time between them.
    """
    if len(times) < 2 or not times[-1] > times[0]:
        raise ValueError("an increase needs two samples and time between them")
    delta = values[-1] - values[0]
    for before, after in pairwise(values):
        if after < before:
            delta += before
    return delta * _stretch(times, start, end, first=values[0], delta=delta)


def _stretch(times: Sequence[float], start: float, end: float, *, first: float, delta: float) -> float:
    span = times[-1] - times[0]
    mean = span / (len(times) - 1)
    near = 1.1 * mean
    before = times[0] - start
    if before >= near:
        before = mean / 2
    if delta > 0 and first >= 0:
        before = min(before, span * first / delta)
    after = end - times[-1]
    if after >= near:
        after = mean / 2
    return (span + before + after) / span


def engine_window(
    scans: Sequence[Scan],
    *,
    window: float,
    interval: float,
    now: float,
    ready_since: float | None = None,
    histograms: Mapping[str, Histogram | str] | None = None,
) -> PodWindow | Unknown:
    """Return what one engine said over the last ``window`` seconds.

    Args:
        scans: Its scrapes, ascending in time; those before the window are ignored.
        window: Seconds.
        interval: Seconds between scrapes.
        now: Unix time, seconds.
        ready_since: When the pod became ready; its history need not reach further back.
        histograms: The window's histograms, or why there is none, where the source has made them itself; by
            default they are made from ``scans``.
    """
    start = now - window
    # Half an interval of slack: with a window of four intervals the fifth sample back must not be lost to jitter.
    scans = _in_order([scan for scan in scans if scan.time > start - interval / 2])
    stale = _stale(scans[-1].time if scans else None, interval=interval, now=now)
    if stale is not None:
        return stale
    newest = scans[-1]
    times = [scan.time for scan in scans]
    resets = [_restarted(before, after) for before, after in pairwise(scans)]
    gauges: dict[str, float] = {}
    rates: dict[str, float] = {}
    made: dict[str, Histogram] = {}
    faults: dict[str, str] = {}
    for metric in ENGINE_METRICS:
        key = metric.key
        fault = newest.faults.get(key)
        if fault is not None:
            faults[key] = fault
            continue
        if metric.kind is Kind.HISTOGRAM:
            found = (
                _histogram(metric, scans, resets, start, now) if histograms is None else histograms.get(key)
            )
            if isinstance(found, Histogram):
                if found.total > metric.limit * window:
                    faults[key] = f"{found.total:g} observations in {window:g} s cannot be"
                else:
                    made[key] = found
            else:
                faults[key] = found or _missing(metric)
            continue
        if key not in newest.scalars:
            faults[key] = _missing(metric)
        elif metric.kind is Kind.GAUGE:
            value = newest.scalars[key]
            fault = _unsound(value, metric)
            if fault is None:
                gauges[key] = value
            else:
                faults[key] = fault
        else:
            rate = _rate(metric, scans, resets)
            if isinstance(rate, str):
                faults[key] = rate
            else:
                rates[key] = rate
    for key in ("flops", "read_bytes", "write_bytes"):
        if rates.get(key) == 0 and (rates.get("output_token_count") or rates.get("prompt_token_count")):
            del rates[key]
            faults[key] = "the engine estimates none: start it with --enable-mfu-metrics"
    return PodWindow(
        time=newest.time,
        gauges=gauges,
        rates=rates,
        histograms=made,
        faults=faults,
        whole=_whole(times, interval=interval, now=now, window=window, ready_since=ready_since)
        and not any(scan.faults for scan in scans[:-1])
        and not _frozen(scans, rates, made, window),
        reset=any(resets),
    )


_Timed = TypeVar("_Timed", "Scan", "RouterScan")


def _in_order(scans: Sequence[_Timed]) -> list[_Timed]:
    """Return the scans without those whose time is not before that of a later one.

    Two scans carry one time where a store keeps coarse times or a clock was set back: the later is the news, and no rate
    is taken over no time.
    """
    kept: list[_Timed] = []
    for scan in reversed(scans):
        if not kept or scan.time < kept[-1].time:
            kept.append(scan)
    return kept[::-1]


def _stale(time: float | None, *, interval: float, now: float) -> Unknown | None:
    if time is None:
        return Unknown("no sample within the window")
    age = now - time
    if not math.isfinite(age) or age < -MAX_FUTURE:
        return Unknown(f"its newest sample is {-age:.0f} s in the future: the clocks differ")
    if age > STALE_INTERVALS * interval:
        return Unknown(f"its newest sample is {age:.0f} s old, and one is due every {interval:g} s")
    return None


def _whole(
    times: Sequence[float], *, interval: float, now: float, window: float, ready_since: float | None
) -> bool:
    needed = window if ready_since is None else min(window, max(0.0, now - ready_since))
    if len(times) < 2 or now - times[0] < needed - 1.5 * interval:
        return False
    return all(after - before <= STALE_INTERVALS * interval for before, after in pairwise(times))


def _restarted(before: Scan, after: Scan) -> bool:
    """Whether the engine started anew in between: then all its counters did, also those that overtook again."""
    if (
        before.start_time is not None
        and after.start_time is not None
        and after.start_time > before.start_time + 1
    ):
        return True
    counters = (metric.key for metric in ENGINE_METRICS if metric.kind is Kind.COUNTER)
    if any(after.scalars.get(key, math.inf) < before.scalars.get(key, 0.0) for key in counters):
        return True
    return any(
        key in after.histograms and after.histograms[key].total < histogram.total
        for key, histogram in before.histograms.items()
    )


def _frozen(
    scans: Sequence[Scan], rates: Mapping[str, float], histograms: Mapping[str, Histogram], window: float
) -> bool:
    """Whether the engine says it is at work while nothing it counts moves: it hangs, or its metrics are a copy."""
    if scans[-1].time - scans[0].time < window / 2 or "output_token_count" not in rates:
        return False
    at_work = all(scan.scalars.get("running", 0.0) > 0 for scan in scans)
    return at_work and not any(rates.values()) and not any(h.total for h in histograms.values())


def _unsound(value: float, metric: Metric) -> str | None:
    if not math.isfinite(value):
        return f"{metric.names[0]} is {value}"
    if value < 0:
        return f"{metric.names[0]} is negative"
    if metric.kind is Kind.GAUGE and value > metric.limit:
        return f"{metric.names[0]} is {value:g}, which cannot be"
    return None


def _missing(metric: Metric) -> str:
    return f"the engine exposes no {metric.names[0]} (vLLM {metric.since} or newer does)"


_ONE_SAMPLE = "one sample only: a rate needs two within the window"


def _rate(metric: Metric, scans: Sequence[Scan], resets: Sequence[bool]) -> float | str:
    """Return the counter's increase per second between its first and last sample, or why there is none."""
    key = metric.key
    have = [index for index, scan in enumerate(scans) if key in scan.scalars]
    for index in have:
        fault = _unsound(scans[index].scalars[key], metric)
        if fault is not None:
            return fault
    if len(have) < 2:
        return _ONE_SAMPLE
    delta = 0.0
    for a, b in pairwise(have):
        after = scans[b].scalars[key]
        delta += after if any(resets[a:b]) else after - scans[a].scalars[key]
    rate = delta / (scans[have[-1]].time - scans[have[0]].time)
    return (
        rate if rate <= metric.limit else f"{metric.names[0]} grows by {rate:g} per second, which cannot be"
    )


def _histogram(
    metric: Metric, scans: Sequence[Scan], resets: Sequence[bool], start: float, end: float
) -> Histogram | str | None:
    key = metric.key
    have = [index for index, scan in enumerate(scans) if key in scan.histograms]
    if not have or have[-1] != len(scans) - 1:
        return None
    if len(have) < 2:
        return _ONE_SAMPLE
    first, last = scans[have[0]].histograms[key], scans[have[-1]].histograms[key]
    if any(resets[have[0] :]) or any(scans[i].histograms[key].bounds != first.bounds for i in have):
        parts: list[Histogram] = []
        for a, b in pairwise(have):
            before, after = scans[a].histograms[key], scans[b].histograms[key]
            parts.append(after if any(resets[a:b]) else _minus(after, before))
        grown = merge(parts)
    else:
        grown = _minus(last, first)
    times = [scans[i].time for i in have]
    return grown.scaled(_stretch(times, start, end, first=first.total, delta=grown.total))


def _minus(after: Histogram, before: Histogram) -> Histogram:
    if after.bounds != before.bounds:
        common = tuple(sorted(set(after.bounds).intersection(before.bounds)))
        after, before = after.on_bounds(common), before.on_bounds(common)
    counts: list[float] = []
    highest = 0.0
    for a, b in zip(after.counts, before.counts, strict=True):
        # Buckets are read while requests finish: a bucket may be one ahead of its neighbour.
        highest = max(highest, a - b)
        counts.append(highest)
    return Histogram(after.bounds, tuple(counts), max(0.0, after.sum - before.sum))


def pool_load(
    pool: PoolTargets,
    windows: Mapping[str, PodWindow | Unknown],
    *,
    window: float,
    now: float,
    routers: RouterLoad | None = None,
    ahead: float = 0.0,
) -> Load:
    """Return the load of one pool from what its ready pods said.

    What a pod that came from another tier counted within the window is of both: its gauges count, its rates and
    histograms are not known.

    Args:
        pool: The pool and its ready pods.
        windows: Pod name to what it said; a ready pod that is missing here did not answer. Pods that are not ready
            are ignored: Prometheus shows the dead for five minutes.
        window: Seconds.
        now: Seconds, on the clock of the windows' samples.
        routers: What the tier's routers said, for a pool without engines.
        ahead: What Unix time is ahead of ``now``, seconds.
    """
    if not pool.pods:
        return _load_without_pods(pool, window, routers)
    said: list[PodWindow] = []
    silent: list[str] = []
    for pod in pool.pods:
        answer = windows.get(pod.name, Unknown("did not answer"))
        if isinstance(answer, PodWindow):
            held = math.inf if pod.held_since is None else now + ahead - pod.held_since
            if held < -MAX_FUTURE:
                held = math.inf  # the clock was set back since: it is not known, and not to be waited for
            said.append(answer if held >= window else _of_both(answer, held))
        else:
            silent.append(f"{pod.name}: {answer.reason}")
    pods = _Pods(len(pool.pods), said, silent, now)
    hits, queries = pods.total("prefix_hits"), pods.total("prefix_queries")
    read, write = pods.signal("read_bytes"), pods.signal("write_bytes")
    return Load(
        window=window,
        coverage=Coverage(len(said), len(pool.pods)),
        running=pods.signal("running"),
        waiting=pods.signal("waiting"),
        kv_usage=pods.signal("kv_usage"),
        request_rate=pods.signal("requests"),
        prompt_token_rate=pods.signal("prompt_token_count"),
        output_token_rate=pods.signal("output_token_count"),
        prefix_hit_share=_share(hits, queries),
        preemption_rate=pods.signal("preemptions"),
        rejection_rate=pods.signal("rejections"),
        flops_utilization=pods.signal("flops"),
        bytes_rate=_sum(read, write),
        resets=sum(pod.reset for pod in said),
        prompt_tokens=pods.distribution("prompt_tokens"),
        output_tokens=pods.distribution("output_tokens"),
        ttft=pods.distribution("ttft"),
        tpot=pods.distribution("tpot"),
        itl=pods.distribution("itl"),
        e2e=pods.distribution("e2e"),
        queue_time=pods.distribution("queue_time"),
    )


_METRICS = {metric.key: metric for metric in ENGINE_METRICS}
_COUNTED = tuple(metric.key for metric in ENGINE_METRICS if metric.kind is not Kind.GAUGE)


def _of_both(answer: PodWindow, held: float) -> PodWindow:
    """Return what a pod said without what it counted for another tier, which cannot be told apart."""
    reason = f"came from another tier {max(held, 0.0):.0f} s ago: what it counted is of both"
    return replace(
        answer, rates={}, histograms={}, faults={**answer.faults, **dict.fromkeys(_COUNTED, reason)}
    )


def _load_without_pods(pool: PoolTargets, window: float, routers: RouterLoad | None) -> Load:
    verdict: Zero | Unknown
    if pool.desired > 0:
        verdict = Unknown(f"none of {pool.desired} pods is ready")
    elif (
        routers is not None and isinstance(routers.arrival_rate, Zero) and isinstance(routers.unserved, Zero)
    ):
        verdict = Zero(max(routers.arrival_rate.age, routers.unserved.age))
    else:
        verdict = Unknown("no replica, and the routers do not prove that nothing arrives")
    return Load(
        window=window,
        coverage=Coverage(0, 0),
        running=verdict,
        waiting=verdict,
        kv_usage=verdict,
        request_rate=verdict,
        prompt_token_rate=verdict,
        output_token_rate=verdict,
        prefix_hit_share=verdict,
        preemption_rate=verdict,
        rejection_rate=verdict,
        flops_utilization=verdict,
        bytes_rate=verdict,
        prompt_tokens=verdict,
        output_tokens=verdict,
        ttft=verdict,
        tpot=verdict,
        itl=verdict,
        e2e=verdict,
        queue_time=verdict,
    )


@dataclass(frozen=True, slots=True)
class _Pods:
    """The answers of one pool's ready pods."""

    expected: int
    said: Sequence[PodWindow]
    silent: Sequence[str]
    now: float

    def signal(self, key: str) -> Signal:
        metric = _METRICS[key]
        total = self.total(key)
        if isinstance(total, Value) and metric.mean:
            count = sum(key not in pod.faults for pod in self.said)
            return replace(total, value=total.value / count)
        return total

    def total(self, key: str) -> Signal:
        """Add a gauge or a rate up over the pods."""
        gauge = _METRICS[key].kind is Kind.GAUGE
        pods = [pod for pod in self.said if key not in pod.faults]
        if not pods:
            return self._unknown(key)
        value = math.fsum((pod.gauges if gauge else pod.rates)[key] for pod in pods)
        partial = len(pods) < self.expected or not (gauge or all(pod.whole for pod in pods))
        if value > 0:
            return Value(value, self._age(pods), partial)
        return self._unknown(key) if partial else Zero(self._age(pods))

    def distribution(self, key: str) -> Distribution:
        pods = [pod for pod in self.said if key not in pod.faults]
        if not pods:
            return self._unknown(key)
        merged = merge(pod.histograms[key] for pod in pods)
        partial = len(pods) < self.expected or not all(pod.whole for pod in pods)
        if merged.total > 0:
            return replace(merged, partial=partial)
        return self._unknown(key) if partial else Zero(self._age(pods))

    def _age(self, pods: Iterable[PodWindow]) -> float:
        return max(0.0, self.now - min(pod.time for pod in pods))

    def _unknown(self, key: str) -> Unknown:
        reasons = [*self.silent, *(pod.faults[key] for pod in self.said if key in pod.faults)]
        if not reasons:
            return Unknown("samples do not reach back over the whole window yet")
        others = f" (and {len(reasons) - 1} more of {self.expected} pods)" if len(reasons) > 1 else ""
        return Unknown(reasons[0][:200] + others)


def _share(part: Signal, whole: Signal) -> Signal:
    """Return part / whole; the share of a proved zero is Zero: there was nothing to share."""
    if isinstance(part, Unknown) or isinstance(whole, Unknown | Zero):
        return part if isinstance(part, Unknown) else whole
    if isinstance(part, Zero):
        return part
    partial = part.partial or whole.partial
    return Value(min(1.0, part.value / whole.value), max(part.age, whole.age), partial)


def _sum(one: Signal, other: Signal) -> Signal:
    match one, other:
        case Unknown(), _:
            return one
        case _, Unknown():
            return other
        case Value(), Value():
            return Value(one.value + other.value, max(one.age, other.age), one.partial or other.partial)
        case Value(), _:
            return one
        case _:
            return other


@dataclass(frozen=True, slots=True)
class RouterScan:
    """One scrape of one router."""

    time: float
    series: Mapping[str, Mapping[str, float]]
    """Counter name to label set (as text) to value."""


@dataclass(frozen=True, slots=True)
class RouterWindow:
    """What one router said over the window; counts are increases."""

    time: float
    span: float
    """Seconds between the first and the last sample."""
    dispatched: float
    """Requests sent to engines, retries included; for each side in prefill/decode mode."""
    ended: float
    """Requests that ended, and what more is in flight now than was at the start: the arrivals of a router that does
    not count dispatches."""
    exhausted: float
    no_engine: float
    whole: bool
    recent: Recent | None = None
    """The end of the window; None where it cannot be told."""


@dataclass(frozen=True, slots=True)
class Recent:
    """What one router counted between its last scrapes; see :class:`RouterWindow`."""

    span: float
    dispatched: float
    ended: float


_RECENT_INTERVALS = 2
"""Scrape intervals at the end of the window that tell of arrivals right now: with one, a late scrape is a rush."""


def router_window(
    scans: Sequence[RouterScan],
    *,
    window: float,
    interval: float,
    now: float,
    ready_since: float | None = None,
) -> RouterWindow | Unknown:
    """Return what one router counted over the last ``window`` seconds.

    Its counters appear with their first increment. So a series that an earlier scrape of the same router did not
    have began at 0, and its first value is an increase: without this the very request that should wake a sleeping
    tier would be missed, as Prometheus' ``increase`` misses it.

    Args:
        scans: Its scrapes, ascending in time.
        window: Seconds.
        interval: Seconds between scrapes.
        now: Unix time, seconds.
        ready_since: When the pod became ready; its history need not reach further back.
    """
    scans = _in_order([scan for scan in scans if scan.time > now - window - interval / 2])
    stale = _stale(scans[-1].time if scans else None, interval=interval, now=now)
    if stale is not None:
        return stale
    if len(scans) < 2:
        return Unknown(_ONE_SAMPLE)
    names = ROUTER_METRICS
    counts = dict.fromkeys(names.counters, 0.0)
    no_engine = 0.0
    for before, after in pairwise(scans):
        for name in names.counters:
            earlier = before.series.get(name, {})
            for labels, value in after.series.get(name, {}).items():
                if not math.isfinite(value) or value < 0:
                    return Unknown(f"{name} is {value}")
                base = earlier.get(labels, 0.0)
                grown = value - base if value >= base else value
                counts[name] += grown
                if name in {names.errors, names.pd_errors} and any(
                    f'"{e}"' in labels for e in names.no_engine
                ):
                    no_engine += grown
    times = [scan.time for scan in scans]
    span = times[-1] - times[0]
    if max(counts.values()) > 1e7 * span:
        return Unknown(f"{max(counts.values()):g} requests in {span:g} s cannot be")
    in_flight = [math.fsum(scan.series.get(names.running, {}).values()) for scan in (scans[0], scans[-1])]
    if not all(math.isfinite(each) and each >= 0 for each in in_flight):
        return Unknown(f"{names.running} is {in_flight[-1]}")
    ended = counts[names.completed] + counts[names.pd_completed]
    last = [scan for scan in scans if scan.time > times[-1] - (_RECENT_INTERVALS + 0.5) * interval]
    recent = None
    if len(last) == len(scans):
        recent = Recent(span, counts[names.dispatched], max(0.0, ended + in_flight[1] - in_flight[0]))
    elif len(last) >= 2:
        end = router_window(last, window=window, interval=interval, now=now)
        if isinstance(end, RouterWindow):
            recent = Recent(end.span, end.dispatched, end.ended)
    return RouterWindow(
        time=times[-1],
        span=span,
        dispatched=counts[names.dispatched],
        ended=max(0.0, ended + in_flight[1] - in_flight[0]),
        exhausted=counts[names.exhausted],
        no_engine=no_engine,
        whole=_whole(times, interval=interval, now=now, window=window, ready_since=ready_since),
        recent=recent,
    )


def router_load(
    tier: TierTargets, windows: Mapping[str, RouterWindow | Unknown], *, now: float
) -> RouterLoad:
    """Return what a tier's routers say together.

    In prefill/decode mode vllm-router counts each request at both engines, so half of the dispatches are arrivals.
    A router that has counted fewer dispatches than requests ended or came into flight does not count them all (see
    ``RouterMetrics.completed``), and then those are its arrivals.
    """
    said: list[RouterWindow] = []
    silent: list[str] = []
    for pod in tier.routers:
        answer = windows.get(pod.name, Unknown("did not answer"))
        if isinstance(answer, RouterWindow):
            said.append(answer)
        else:
            silent.append(f"{pod.name}: {answer.reason}")
    coverage = Coverage(len(said), len(tier.routers))
    if not said:
        reason = Unknown(silent[0][:200] if silent else "no router is ready")
        return RouterLoad(coverage, reason, reason)
    age = max(0.0, now - min(router.time for router in said))
    partial = not coverage.complete or not all(router.whole for router in said)
    paired = any(pool.role is PoolRole.PREFILL for pool in tier.pools)
    unknown = Unknown(silent[0][:200] if silent else "samples do not reach back over the whole window yet")

    def signal(of: Callable[[RouterWindow], float]) -> Signal:
        value = math.fsum(of(router) for router in said)
        if value > 0:
            return Value(value, age, partial)
        return unknown if partial else Zero(age)

    return RouterLoad(
        coverage=coverage,
        arrival_rate=signal(lambda r: _arrivals(r, paired=paired) / r.span),
        recent_rate=signal(
            lambda r: (
                _arrivals(r, paired=paired) / r.span
                if r.recent is None
                else _arrivals(r.recent, paired=paired) / r.recent.span
            )
        ),
        # One request without an engine fails several attempts and is given up once: attempts only count where
        # nothing was given up (yet, or because retries are off).
        unserved=signal(lambda r: r.exhausted or r.no_engine),
    )


def _arrivals(router: RouterWindow | Recent, *, paired: bool) -> float:
    if paired:
        # Both engines of a request are in flight at once; the change of that is noise beside what was dispatched.
        return router.dispatched / 2 if router.dispatched > 0 else router.ended
    return max(router.dispatched, router.ended)


def tier_load(
    tier: TierTargets,
    engines: Mapping[str, PodWindow | Unknown],
    routers: Mapping[str, RouterWindow | Unknown],
    *,
    window: float,
    now: float,
    ahead: float = 0.0,
) -> TierLoad:
    """Return the load of one tier.

    Args:
        tier: Its pods.
        engines: Engine pod name to what it said.
        routers: Router pod name to what it said.
        window: Seconds.
        now: Seconds, on the clock of the windows' samples.
        ahead: What Unix time is ahead of ``now``, seconds.
    """
    router = router_load(tier, routers, now=now)
    pools = {
        pool.name: pool_load(pool, engines, window=window, now=now, routers=router, ahead=ahead)
        for pool in tier.pools
    }
    return TierLoad(pools, router, {pod.name: _in_flight(engines.get(pod.name), now) for pod in tier.engines})


def _in_flight(answer: PodWindow | Unknown | None, now: float) -> Signal:
    """Return what one engine has in flight: running and waiting."""
    if not isinstance(answer, PodWindow):
        return answer or Unknown("did not answer")
    for key in ("running", "waiting"):
        if key in answer.faults:
            return Unknown(answer.faults[key])
    age = max(0.0, now - answer.time)
    count = answer.gauges["running"] + answer.gauges["waiting"]
    return Value(count, age) if count > 0 else Zero(age)
