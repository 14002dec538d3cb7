"""From what simulated pods count to the ``Load`` that policies are given.

Scrapes are kept as arrays, one row per replica. Two paths turn them into a :class:`~servingtiers.core.signals.Load`:

* the *plain* path builds :class:`~servingtiers.core.telemetry.Scan` objects and calls the operator's own
  ``engine_window`` and ``pool_load``: always right, slow for a fleet;
* the *fast* path does the same arithmetic for all pods at once, and hands over to the plain one as soon as anything
  is out of the ordinary (a fault, a gap, a restart, an absent or absurd sample). A test holds both to the same loads.

Faults are put between the engines and the samples, as they are in a cluster.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from servingtiers.core.signals import (
    Coverage,
    Distribution,
    Histogram,
    Load,
    RouterLoad,
    Signal,
    Unknown,
    Value,
    Zero,
)
from servingtiers.core.telemetry import (
    STALE_INTERVALS,
    PodTarget,
    PodWindow,
    PoolTargets,
    RouterScan,
    RouterWindow,
    Scan,
    TierTargets,
    engine_window,
    pool_load,
    router_load,
    router_window,
)
from servingtiers.core.vllm_metrics import ENGINE_METRICS, Kind

__all__ = [
    "HISTOGRAM_KEYS",
    "FaultKind",
    "MetricFault",
    "PoolRecorder",
    "PoolScrape",
    "RouterRecorder",
    "bucket_bounds",
]

HISTOGRAM_KEYS = ("ttft", "tpot", "itl", "e2e", "queue_time", "prompt_tokens", "output_tokens")
"""Keys of :data:`~servingtiers.core.vllm_metrics.ENGINE_METRICS` in the order of the plant's histograms."""

GAUGES = ("running", "waiting", "kv_usage")
COUNTERS = (
    "requests",
    "prompt_token_count",
    "output_token_count",
    "prefix_queries",
    "prefix_hits",
    "preemptions",
    "rejections",
)
SCALARS = GAUGES + COUNTERS

_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)


def bucket_bounds(max_model_len: int) -> tuple[tuple[float, ...], ...]:
    """Return vLLM's finite bucket bounds of every histogram in the order of :data:`HISTOGRAM_KEYS`.

    They are those of vLLM 0.32's ``/metrics``. Token buckets are 1, 2, 5, 10, … up to the longest sequence.
    """
    tokens = tuple(
        float(mantissa * 10**scale)
        for scale in range(9)
        for mantissa in (1, 2, 5)
        if mantissa * 10**scale <= max_model_len
    )
    return (_TTFT, _PER_TOKEN, _PER_TOKEN, _LATENCY, _LATENCY, tokens, tokens)


_LATE, _AHEAD = 120.0, 300.0
"""Seconds by which samples are late, or ahead of the reader's clock."""
_KEPT = 180.0
"""Seconds of scrapes that are kept beyond the window."""


class FaultKind(StrEnum):
    """What goes wrong with metrics; the numbers are classes of the fault catalogue."""

    DOWN = "down"
    """No answer from engines and routers (connection refused, DNS, hang, 4xx, 5xx, truncated: M1–M6, M29)."""
    EMPTY = "empty"
    """Prometheus answers with an empty vector (M8): to the operator the same, to some autoscalers a 0."""
    PARTIAL = "partial"
    """Every second engine does not answer (M7, M9)."""
    NAN = "nan"
    """Gauges and counters are NaN (M10)."""
    INFINITE = "infinite"
    """Gauges and counters are +Inf (M11)."""
    NEGATIVE = "negative"
    """Gauges are -1 (M12)."""
    ABSURD = "absurd"
    """Gauges are 1e18 (M12)."""
    FROZEN = "frozen"
    """Engines repeat their last sample with fresh times (M13)."""
    LATE = "late"
    """What can be read is two minutes old (M13, a lagging Prometheus)."""
    AHEAD = "ahead"
    """Samples are five minutes in the future: the clocks differ (M19)."""
    RESET = "reset"
    """Counters began anew in every engine at the start of the fault (M15, V11)."""
    RENAMED = "renamed"
    """The engines expose none of the names that are read (M20)."""
    NO_HISTORY = "no-history"
    """Prometheus restarted: samples before the start of the fault are gone (M16)."""
    SLOW_SCRAPE = "slow-scrape"
    """A scrape a minute, less than the window needs for a rate (M21)."""
    TWICE = "twice"
    """An HA pair: half of the scrapes are lost, seen by no one (M18 as de-duplication leaves it)."""


@dataclass(frozen=True, slots=True)
class MetricFault:
    """A metric fault from ``start`` to ``end``, seconds of the run."""

    kind: FaultKind
    start: float
    end: float

    def active(self, now: float) -> bool:
        """Whether it holds at ``now``."""
        return self.start <= now < self.end


@dataclass(slots=True)
class PoolScrape:
    """All engines of a pool at one instant."""

    time: float
    """Seconds, as the sample says."""
    serial: NDArray[np.int64]
    """Pod behind each row; -1: none was scraped, shape ``(rows,)``."""
    scalars: NDArray[np.float64]
    """:data:`SCALARS`, shape ``(rows, 10)``."""
    buckets: NDArray[np.int64]
    """Cumulative since the pod's start, not cumulative over the bounds, shape ``(rows, 7, width)``."""
    sums: NDArray[np.float64]
    """Shape ``(rows, 7)``."""
    odd: bool = False
    """Whether a fault touched it."""
    renamed: bool = False


@dataclass(slots=True)
class PoolRecorder:
    """The recent scrapes of one pool."""

    bounds: tuple[tuple[float, ...], ...]
    window: float
    interval: float
    scrapes: deque[PoolScrape] = field(default_factory=deque)
    _frozen: PoolScrape | None = None
    _offsets: dict[int, tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]] = field(
        default_factory=dict
    )

    def add(self, scrape: PoolScrape, faults: Sequence[MetricFault], now: float) -> None:
        """Keep a scrape as the faults leave it.

        Args:
            scrape: What the engines counted.
            faults: All faults of the run.
            now: Seconds of the run.
        """
        held = [fault for fault in faults if fault.active(now)]
        scrape = self._reset(scrape, faults, now)
        kept: PoolScrape | None = scrape
        for fault in held:
            if kept is None:
                break
            kept = self._spoil(kept, fault, now)
        if FaultKind.FROZEN not in {fault.kind for fault in held}:
            self._frozen = scrape
        if kept is not None:
            self.scrapes.append(kept)
        while self.scrapes and self.scrapes[0].time < scrape.time - self.window - _KEPT:
            self.scrapes.popleft()

    def _reset(self, scrape: PoolScrape, faults: Sequence[MetricFault], now: float) -> PoolScrape:
        """Take off what had been counted when a reset struck; engines never get that back."""
        for fault in faults:
            if fault.kind is not FaultKind.RESET or now < fault.start:
                continue
            for row in range(len(scrape.serial)):
                serial = int(scrape.serial[row])
                if serial < 0:
                    continue
                if serial not in self._offsets and now < fault.start + 2 * self.interval:
                    self._offsets[serial] = (
                        scrape.scalars[row].copy(),
                        scrape.buckets[row].copy(),
                        scrape.sums[row].copy(),
                    )
                if serial in self._offsets:
                    scalars, buckets, sums = self._offsets[serial]
                    count = len(GAUGES)
                    scrape.scalars[row, count:] -= scalars[count:]
                    scrape.buckets[row] -= buckets
                    scrape.sums[row] -= sums
                    scrape.odd = True
        return scrape

    def _spoil(self, scrape: PoolScrape, fault: MetricFault, now: float) -> PoolScrape | None:
        match fault.kind:
            case FaultKind.DOWN | FaultKind.EMPTY:
                return None
            case FaultKind.TWICE:
                return None if round(now / self.interval) % 2 else scrape
            case FaultKind.SLOW_SCRAPE:
                return None if round(now / self.interval) % max(round(60.0 / self.interval), 1) else scrape
            case FaultKind.PARTIAL:
                scrape.serial = np.where(scrape.serial % 2 == 0, scrape.serial, -1)
            case FaultKind.NAN:
                scrape.scalars[:] = math.nan
            case FaultKind.INFINITE:
                scrape.scalars[:] = math.inf
            case FaultKind.NEGATIVE:
                scrape.scalars[:, : len(GAUGES)] = -1.0
            case FaultKind.ABSURD:
                scrape.scalars[:, : len(GAUGES)] = 1e18
            case FaultKind.FROZEN:
                if self._frozen is not None:
                    old = self._frozen
                    scrape = PoolScrape(
                        scrape.time, old.serial, old.scalars.copy(), old.buckets, old.sums, odd=True
                    )
            case FaultKind.LATE | FaultKind.AHEAD:
                pass  # it is the reader who sees them late, or ahead of its clock
            case FaultKind.RENAMED:
                scrape.renamed = True
            case FaultKind.NO_HISTORY:
                since = scrape.time - (now - fault.start)
                self.scrapes = deque(each for each in self.scrapes if each.time >= since)
        scrape.odd = True
        return scrape

    # --- to a Load -------------------------------------------------------------------------------------------

    def load(
        self,
        pool: PoolTargets,
        rows: Sequence[int],
        *,
        now: float,
        routers: RouterLoad,
        held: Collection[FaultKind] = (),
        plain: bool = False,
    ) -> Load:
        """Return what the pool's ready pods said.

        Args:
            pool: The pool with its ready pods.
            rows: Row of each of these pods.
            now: On the clock of the samples, seconds.
            routers: What the routers said.
            held: Faults that hold now.
            plain: Take the operator's own path, whatever the case.
        """
        latest = now
        if FaultKind.LATE in held:
            latest = now - _LATE
        if FaultKind.AHEAD in held:
            now -= _AHEAD
        if not plain and not held:
            quick = self._fast(pool, rows, now)
            if quick is not None:
                return quick
        windows: dict[str, PodWindow | Unknown] = {}
        for pod, row in zip(pool.pods, rows, strict=True):
            windows[pod.name] = engine_window(
                self._scans(row, _serial(pod), latest),
                window=self.window,
                interval=self.interval,
                now=now,
                ready_since=pod.ready_since,
            )
        return pool_load(pool, windows, window=self.window, now=now, routers=routers)

    def _scans(self, row: int, serial: int, latest: float) -> list[Scan]:
        scans = []
        for scrape in self.scrapes:
            if scrape.serial[row] != serial or scrape.time > latest:
                continue
            if scrape.renamed:
                scans.append(Scan(scrape.time, {}))
                continue
            scans.append(
                Scan(
                    scrape.time,
                    dict(zip(SCALARS, scrape.scalars[row].tolist(), strict=True)),
                    {
                        key: _histogram(
                            self.bounds[index], scrape.buckets[row, index], scrape.sums[row, index]
                        )
                        for index, key in enumerate(HISTOGRAM_KEYS)
                    },
                )
            )
        return scans

    def _fast(self, pool: PoolTargets, rows: Sequence[int], now: float) -> Load | None:
        if not pool.pods:
            return None
        if any(pod.held_since is not None and now - pod.held_since < self.window for pod in pool.pods):
            return None  # what they counted is another tier's too
        scans = [scrape for scrape in self.scrapes if scrape.time > now - self.window - self.interval / 2]
        if not scans or any(scrape.odd for scrape in scans):
            return None
        times = np.array([scrape.time for scrape in scans])
        if not 0.0 <= now - times[-1] <= STALE_INTERVALS * self.interval or (
            len(times) > 1 and float(np.diff(times).max()) > STALE_INTERVALS * self.interval
        ):
            return None
        at = np.asarray(rows)
        serial = np.array([_serial(pod) for pod in pool.pods])
        here = np.stack([scrape.serial[at] == serial for scrape in scans])
        answered = here[-1]
        # A pod that missed a scrape in the middle, or has none at all, is out of the ordinary.
        first = here.argmax(axis=0)
        if not bool((here.sum(axis=0) == np.where(answered, len(scans) - first, 0)).all()):
            return None
        newest = scans[-1].scalars[at]
        rated = answered & (first < len(scans) - 1)
        if not rated.any():
            return None
        begun = np.stack(
            [scans[min(f, len(scans) - 1)].scalars[row] for f, row in zip(first, at, strict=True)]
        )
        span = times[-1] - times[first]
        count = len(GAUGES)
        growth = (newest - begun)[:, count:]
        if bool((growth[rated] < 0).any()):
            return None
        ready = np.array([-math.inf if p.ready_since is None else p.ready_since for p in pool.pods])
        needed = np.minimum(self.window, np.maximum(0.0, now - ready))
        whole = rated & (now - times[first] >= needed - 1.5 * self.interval)
        expected, age = len(pool.pods), max(0.0, now - float(times[-1]))
        all_answered, all_whole = bool(answered.all()), bool(whole[rated].all() and rated.all())
        silent = [
            f"{pod.name}: no sample within the window"
            for pod, said in zip(pool.pods, answered.tolist(), strict=True)
            if not said
        ]
        unrated = ["one sample only: a rate needs two within the window"] * int((answered & ~rated).sum())
        no_gauge, no_rate = _unknown(silent, expected), _unknown([*silent, *unrated], expected)

        def signal(value: float, complete: bool, lacking: Unknown) -> Signal:
            if value > 0:
                return Value(value, age, partial=not complete)
            return Zero(age) if complete else lacking

        gauges: dict[str, Signal] = {}
        for index, key in enumerate(GAUGES):
            total = math.fsum(newest[answered, index].tolist())
            if key == "kv_usage":
                total /= int(answered.sum())
            gauges[key] = signal(total, all_answered, no_gauge)
        with np.errstate(divide="ignore", invalid="ignore"):
            per_second = np.where(rated[:, None], growth / span[:, None], 0.0)
        rates = {
            key: signal(math.fsum(per_second[rated, index].tolist()), all_whole, no_rate)
            for index, key in enumerate(COUNTERS)
        }
        if bool(
            (
                (per_second[rated].sum(axis=1) == 0)
                & (np.stack([scrape.scalars[at][rated, 0] for scrape in scans]) > 0).all(axis=0)
            ).any()
        ):
            return None  # it may hang: the operator's own path decides
        lacking = None if all_whole else no_rate
        histograms = self._histograms(scans, at, first, rated, times, now, lacking)
        if histograms is None:
            return None
        hits, queries = rates["prefix_hits"], rates["prefix_queries"]
        share: Signal = hits
        if isinstance(hits, Value) and isinstance(queries, Value):
            share = Value(min(1.0, hits.value / queries.value), age, hits.partial or queries.partial)
        elif isinstance(queries, Zero) and not isinstance(hits, Unknown):
            share = queries
        unknown = Unknown("the simulated engines do not estimate FLOPs and bytes")
        known = gauges | rates
        return Load(
            window=self.window,
            coverage=Coverage(int(answered.sum()), expected),
            running=known["running"],
            waiting=known["waiting"],
            kv_usage=known["kv_usage"],
            request_rate=known["requests"],
            prompt_token_rate=known["prompt_token_count"],
            output_token_rate=known["output_token_count"],
            prefix_hit_share=share,
            preemption_rate=known["preemptions"],
            rejection_rate=known["rejections"],
            flops_utilization=unknown,
            bytes_rate=unknown,
            ttft=histograms["ttft"],
            tpot=histograms["tpot"],
            itl=histograms["itl"],
            e2e=histograms["e2e"],
            queue_time=histograms["queue_time"],
            prompt_tokens=histograms["prompt_tokens"],
            output_tokens=histograms["output_tokens"],
        )

    def _histograms(
        self,
        scans: Sequence[PoolScrape],
        at: NDArray[np.int64],
        first: NDArray[np.int64],
        rated: NDArray[np.bool_],
        times: NDArray[np.float64],
        now: float,
        lacking: Unknown | None,
    ) -> dict[str, Distribution] | None:
        """Return the window's histograms, all pods together; None where the plain path must decide.

        ``lacking`` says why pods are missing; None: none is.
        """
        start = now - self.window
        rows, begin = at[rated], first[rated]
        last_buckets, last_sums = scans[-1].buckets[rows], scans[-1].sums[rows]
        first_buckets = np.stack([scans[f].buckets[row] for f, row in zip(begin, rows, strict=True)])
        first_sums = np.stack([scans[f].sums[row] for f, row in zip(begin, rows, strict=True)])
        grown, sums = last_buckets - first_buckets, last_sums - first_sums
        if (grown < 0).any():
            return None
        # Prometheus' extrapolation, as core.telemetry does it for one pod.
        totals, delta = first_buckets.sum(axis=2), grown.sum(axis=2)
        span = (times[-1] - times[begin])[:, None]
        mean = span / (len(scans) - 1 - begin)[:, None]
        before = (times[begin] - start)[:, None] + np.zeros_like(totals, dtype=np.float64)
        before = np.where(before >= 1.1 * mean, mean / 2, before)
        with np.errstate(divide="ignore", invalid="ignore"):
            cap = np.where(delta > 0, span * totals / delta, np.inf)
        before = np.minimum(before, cap)
        after = np.where(now - times[-1] >= 1.1 * mean, mean / 2, now - times[-1])
        stretch = (span + before + after) / span
        merged = (grown * stretch[:, :, None]).sum(axis=0)
        together = (np.maximum(sums, 0.0) * stretch).sum(axis=0)
        found: dict[str, Distribution] = {}
        age = max(0.0, now - float(times[-1]))
        for index, key in enumerate(HISTOGRAM_KEYS):
            bounds = self.bounds[index]
            cumulative = np.cumsum(merged[index, : len(bounds) + 1]).tolist()
            if cumulative[-1] > 0:
                found[key] = Histogram(
                    (*bounds, math.inf), tuple(cumulative), float(together[index]), lacking is not None
                )
            else:
                found[key] = Zero(age) if lacking is None else lacking
        return found


def _unknown(reasons: Sequence[str], expected: int) -> Unknown:
    """Say why a signal is lacking, in the words of the operator's own path."""
    if not reasons:
        return Unknown("samples do not reach back over the whole window yet")
    others = f" (and {len(reasons) - 1} more of {expected} pods)" if len(reasons) > 1 else ""
    return Unknown(reasons[0][:200] + others)


def _serial(pod: PodTarget) -> int:
    return int(pod.name.rsplit("-", 1)[1])


def _histogram(bounds: tuple[float, ...], buckets: NDArray[np.int64], total: float) -> Histogram:
    counts = np.cumsum(buckets[: len(bounds) + 1]).astype(float).tolist()
    return Histogram((*bounds, math.inf), tuple(counts), float(max(total, 0.0)))


assert set(SCALARS) | set(HISTOGRAM_KEYS) >= {  # noqa: S101 - a metric that is read must be made here
    metric.key for metric in ENGINE_METRICS if metric.key not in {"flops", "read_bytes", "write_bytes"}
}
assert all(  # noqa: S101 - likewise
    (metric.kind is Kind.HISTOGRAM) == (metric.key in HISTOGRAM_KEYS) for metric in ENGINE_METRICS
)


@dataclass(slots=True)
class RouterRecorder:
    """The recent scrapes of a tier's router."""

    window: float
    interval: float
    scans: deque[RouterScan] = field(default_factory=deque)

    def add(
        self, time: float, dispatched: int, unserved: int, *, paired: bool, faults: Sequence[MetricFault]
    ) -> None:
        """Keep a scrape; the counters exist from their first increment on, as vllm-router's do."""
        series: dict[str, dict[str, float]] = {}
        if dispatched:
            series["vllm_router_processed_requests_total"] = {'worker="all"': float(dispatched)}
        if unserved and paired:
            series["vllm_router_pd_errors_total"] = {'error_type="server_selection"': float(unserved)}
        elif unserved:
            series["vllm_router_retries_exhausted_total"] = {'route="/v1/completions"': float(unserved)}
            # The router tries five times before it gives up.
            series["vllm_router_request_errors_total"] = {'error_type="no_available_workers"': 5.0 * unserved}
        for fault in faults:
            if not fault.active(time):
                continue
            match fault.kind:
                case FaultKind.DOWN | FaultKind.EMPTY:
                    return
                case FaultKind.TWICE if round(time / self.interval) % 2:
                    return
                case FaultKind.SLOW_SCRAPE if round(time / self.interval) % max(
                    round(60.0 / self.interval), 1
                ):
                    return
                case FaultKind.NAN | FaultKind.INFINITE:
                    bad = math.nan if fault.kind is FaultKind.NAN else math.inf
                    series = {name: dict.fromkeys(values, bad) for name, values in series.items()}
                case FaultKind.FROZEN if self.scans:
                    series = {name: dict(values) for name, values in self.scans[-1].series.items()}
                case FaultKind.NO_HISTORY:
                    self.scans = deque(each for each in self.scans if each.time >= fault.start)
                case _:
                    pass
        self.scans.append(RouterScan(time, series))
        while self.scans and self.scans[0].time < time - self.window - _KEPT:
            self.scans.popleft()

    def load(self, tier: TierTargets, now: float, held: Collection[FaultKind] = ()) -> RouterLoad:
        """Return what the router said, by the operator's own path."""
        latest = now
        if FaultKind.LATE in held:
            latest = now - _LATE
        if FaultKind.AHEAD in held:
            now -= _AHEAD
        scans = [scan for scan in self.scans if scan.time <= latest]
        windows: dict[str, RouterWindow | Unknown] = {
            pod.name: router_window(scans, window=self.window, interval=self.interval, now=now)
            for pod in tier.routers
        }
        return router_load(tier, windows, now=now)
