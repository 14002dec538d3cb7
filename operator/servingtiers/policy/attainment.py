"""How the objectives fare over their window, counted in hours so that no metrics history is needed.

Every tick adds the requests that ended since the one before. Telemetry gives histograms over a window, so a tick
adds ``elapsed / window`` of the window's counts: over regular ticks every request is counted once on average. The
error is that of the window's own extrapolation; a tick that comes later than a window after the last one counts the
window only, what ended before it was not seen.

Buckets say how many requests met a target only where the target is a bucket edge. Elsewhere the count is an
interval, and so is attainment; status keeps both ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from servingtiers.api.base import format_duration
from servingtiers.api.status import HourCount, ObjectiveStatus
from servingtiers.core.decisions import Targets
from servingtiers.core.findings import SloVerdict
from servingtiers.core.signals import Distribution, Histogram, Unknown, Zero
from servingtiers.core.times import from_time, in_words, to_time

__all__ = [
    "WRITE_SECONDS",
    "Bin",
    "Count",
    "Measured",
    "Tally",
    "count",
    "count_disaggregated",
    "report",
    "restore",
    "should_write",
    "update",
    "verdicts",
]

WRITE_SECONDS = 300.0
"""Attainment is written to status at most this often."""
_HOUR, _DAY = 3600.0, 86_400.0
_FOLD_AFTER = 3 * _DAY
_QUANTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99, "p999": 0.999}


@dataclass(frozen=True, slots=True)
class Count:
    """Requests of one window; fractions are Prometheus' extrapolation."""

    total: float
    good: float
    """Requests that certainly met the target."""
    possible: float
    """Requests that can have met it."""


@dataclass(frozen=True, slots=True)
class Bin:
    """Requests of one hour, or of one UTC day once it is three days old."""

    start: float
    """Unix time."""
    length: float
    """3600 or 86400 seconds."""
    total: float
    good: float
    possible: float


@dataclass(frozen=True, slots=True)
class Tally:
    """One objective and what was counted of it, oldest first."""

    metric: str
    percentile: str
    target: float
    """Seconds."""
    bins: tuple[Bin, ...] = ()

    @property
    def objective(self) -> str:
        """Name in status, such as ``ttft.p99``."""
        return f"{self.metric}.{self.percentile}"

    @property
    def allowed(self) -> float:
        """Share of requests that may miss."""
        return 1.0 - _QUANTILES[self.percentile]

    @property
    def enough(self) -> float:
        """Requests needed before a verdict means anything.

        By the rule of three, n requests without a miss bound the share of misses below 3/n with 95 % confidence.
        """
        return 3.0 / self.allowed


@dataclass(frozen=True, slots=True)
class Measured:
    """One objective in the latest window."""

    source: Distribution
    count: Count | None
    """None where the source is Unknown."""
    note: str = ""
    """What limits the precision beyond the buckets."""
    before: Histogram | None = None
    """The engines that every request passed before those of ``source``; None: there are none."""


# --- counting ---------------------------------------------------------------------------------------------------


def count(source: Distribution, target: float) -> Measured:
    """Return how many requests of a window met a target, seconds."""
    match source:
        case Unknown():
            return Measured(source, None)
        case Zero():
            return Measured(source, Count(0.0, 0.0, 0.0))
        case Histogram():
            least, most = source.count_at_most(target)
            return Measured(source, Count(source.total, least, most))


def count_disaggregated(prefill: Distribution, decode: Distribution, target: float) -> Measured:
    """Return how many requests met a TTFT or E2E target when two engines serve each of them.

    The client waits for prefill end to end and then for decode; which prefill belongs to which decode is not
    recorded. Whatever the pairing, a request that misses ``a + b`` misses ``a`` in prefill or ``b`` in decode, so the
    misses are at most ``min over a of misses_P(a) + misses_D(target - a)`` (union bound), and at least the misses of
    either engine alone.

    Args:
        prefill: End-to-end times of the prefill engines.
        decode: TTFT (or E2E) of the decode engines.
        target: Seconds.
    """
    note = (
        "a lower bound, at least so many, from prefill E2E + decode: requests are not paired across engines"
    )
    if isinstance(prefill, Unknown):
        return Measured(prefill, None, note)
    if isinstance(decode, Unknown):
        return Measured(decode, None, note)
    if isinstance(decode, Zero) or isinstance(prefill, Zero) or decode.total <= 0 or prefill.total <= 0:
        return Measured(Zero(), Count(0.0, 0.0, 0.0), note)
    edges = {0.0, target}
    edges.update(bound for bound in prefill.bounds if bound < target)
    edges.update(target - bound for bound in decode.bounds if bound < target)
    worst = min(
        (1.0 - prefill.count_at_most(split)[0] / prefill.total)
        + (1.0 - decode.count_at_most(target - split)[0] / decode.total)
        for split in edges
    )
    best = min(
        prefill.count_at_most(target)[1] / prefill.total,
        decode.count_at_most(target)[1] / decode.total,
    )
    total = decode.total
    least = total * max(0.0, 1.0 - worst)
    return Measured(decode, Count(total, least, max(least, total * best)), note, prefill)


def restore(status: Iterable[ObjectiveStatus], targets: Targets, now: float) -> tuple[Tally, ...]:
    """Return the tallies that a status holds for the objectives in force.

    Counts of another target say nothing of this one and are dropped. An hour that does not say how many can have
    met the target was written before status knew: there the others are open, unless the target is a bucket edge.
    """
    known = {entry.objective: entry for entry in status}
    tallies = []
    for (metric, percentile), seconds in sorted(targets.seconds.items()):
        if percentile not in _QUANTILES:
            continue
        tally = Tally(metric, percentile, seconds)
        entry = known.get(tally.objective)
        if entry is not None and entry.target == format_duration(seconds):
            exact = _EXACT in (entry.resolution or "")
            bins = tuple(
                Bin(
                    from_time(hour.hour),
                    _HOUR,
                    float(hour.total),
                    float(hour.good),
                    float(_most(hour, exact=exact)),
                )
                for hour in entry.hours
            )
            tally = replace(tally, bins=_fold(bins, now))
        tallies.append(tally)
    return tuple(tallies)


def _most(hour: HourCount, *, exact: bool) -> int:
    if hour.good_most is not None:
        return min(max(hour.good_most, hour.good), hour.total)
    return hour.good if exact else hour.total


def update(
    tallies: Iterable[Tally],
    measured: dict[str, Measured],
    *,
    elapsed: float,
    load_window: float,
    slo_window: float,
    now: float,
) -> tuple[Tally, ...]:
    """Add what ended since the last update and drop what has left the window.

    Args:
        tallies: What was counted so far, from :func:`restore` or the last update.
        measured: The latest window by objective (``ttft.p99``).
        elapsed: Seconds since the last update; the first update after a start passes the tick.
        load_window: Seconds over which the histograms were taken.
        slo_window: Seconds of ``spec.slo.window``.
        now: Unix time, seconds.
    """
    share = min(max(elapsed, 0.0) / load_window, 1.0) if load_window > 0 else 0.0
    hour = now // _HOUR * _HOUR
    updated = []
    for tally in tallies:
        bins = tally.bins
        found = measured.get(tally.objective)
        if found is not None and found.count is not None and found.count.total > 0 and share > 0:
            new = found.count
            added = Bin(hour, _HOUR, new.total * share, new.good * share, new.possible * share)
            if bins and bins[-1].start == hour and bins[-1].length == _HOUR:
                bins = (*bins[:-1], _sum((bins[-1], added), hour, _HOUR))
            else:
                bins = (*bins, added)
        kept = tuple(each for each in _fold(bins, now) if each.start + each.length > now - slo_window)
        updated.append(replace(tally, bins=kept))
    return tuple(updated)


def _sum(bins: Iterable[Bin], start: float, length: float) -> Bin:
    total = good = possible = 0.0
    for each in bins:
        total, good, possible = total + each.total, good + each.good, possible + each.possible
    return Bin(start, length, total, good, possible)


def _fold(bins: Iterable[Bin], now: float) -> tuple[Bin, ...]:
    """Put the hours of a UTC day together once all of it is three days old; folding twice changes nothing."""
    days: dict[float, list[Bin]] = {}
    hours: list[Bin] = []
    for each in bins:
        day = each.start // _DAY * _DAY
        if day + _DAY <= now - _FOLD_AFTER:
            days.setdefault(day, []).append(each)
        else:
            hours.append(each)
    folded = [_sum(members, day, _DAY) for day, members in sorted(days.items())]
    return (*folded, *sorted(hours, key=lambda each: each.start))


# --- saying -----------------------------------------------------------------------------------------------------

_EXACT = "the target is a bucket edge"


def report(tallies: Iterable[Tally], measured: dict[str, Measured]) -> tuple[ObjectiveStatus, ...]:
    """Return the objectives as status shows them."""
    return tuple(_status(tally, measured.get(tally.objective)) for tally in tallies)


def _status(tally: Tally, found: Measured | None) -> ObjectiveStatus:
    total, good, possible = _totals(tally)
    attainment = budget = None
    if total > 0:
        low, high = good / total, possible / total
        attainment = _range(100 * low, 100 * high)
        left = [max(100 * (1 - (1 - met) / tally.allowed), -999.0) for met in (low, high)]
        budget = _range(left[0], left[1], digits=0)
    return ObjectiveStatus(
        objective=tally.objective,
        target=format_duration(tally.target),
        observed=_observed(tally, found),
        attainment_percent=attainment,
        error_budget_left_percent=budget,
        resolution=_resolution(tally, found),
        hours=[_hour(each) for each in tally.bins if round(each.total) > 0][-160:],
    )


def _hour(each: Bin) -> HourCount:
    total = round(each.total)
    good, most = min(round(each.good), total), min(round(each.possible), total)
    return HourCount(hour=to_time(each.start), total=total, good=good, good_most=max(good, most))


def _totals(tally: Tally) -> tuple[float, float, float]:
    summed = _sum(tally.bins, 0.0, 0.0)
    return summed.total, summed.good, summed.possible


def _range(low: float, high: float, digits: int = 2) -> str:
    """Return a percentage, or an interval where no more is known."""
    first, last = f"{low:.{digits}f}", f"{high:.{digits}f}"
    return first if first == last else f"{first}–{last}"


def _observed(tally: Tally, found: Measured | None) -> str | None:
    if found is None:
        return None
    match found.source:
        case Unknown(reason=reason):
            return f"unknown: {reason}"[:256]
        case Zero():
            return "no requests"
        case Histogram() as histogram:
            q = _QUANTILES[tally.percentile]
            interval = (
                _bounds(histogram, q) if found.before is None else _sum_bounds(found.before, histogram, q)
            )
            if interval is None:
                return "no requests"
            low, high = interval
            if high == float("inf"):
                return f"above {in_words(low)}"
            return f"{in_words(low)}–{in_words(high)}"


def _bounds(histogram: Histogram, q: float) -> tuple[float, float] | None:
    interval = histogram.quantile(q)
    return (interval.low, interval.high) if interval else None


def _sum_bounds(first: Histogram, second: Histogram, q: float) -> tuple[float, float] | None:
    """Return what two engines' buckets say of the ``q`` quantile of the time that requests spend in both.

    A sum is no less than either part. And where ``misses_1(a) + misses_2(b) <= 1 - q``, at least ``q`` of the
    requests are done within ``a + b`` whatever the pairing (union bound).
    """
    one, two = _bounds(first, q), _bounds(second, q)
    if one is None or two is None:
        return None
    # Shares of counts are floats: 1 - 0.99 - 0.01 is no miss.
    allowed = 1.0 - q + 1e-9
    high = min(
        (
            a + b
            for a, below in zip(first.bounds, first.counts, strict=True)
            for b, under in zip(second.bounds, second.counts, strict=True)
            if (1.0 - below / first.total) + (1.0 - under / second.total) <= allowed
        ),
        default=float("inf"),
    )
    return max(one[0], two[0]), high


def _resolution(tally: Tally, found: Measured | None) -> str | None:
    if found is None or not isinstance(found.source, Histogram):
        return None
    bounds = found.source.bounds
    notes = [found.note] if found.note else []
    if not found.note:
        if tally.target in bounds:
            notes.append(_EXACT)
        else:
            below = max((bound for bound in bounds if bound < tally.target), default=0.0)
            above = next(bound for bound in bounds if bound > tally.target)
            upper = "∞" if above == float("inf") else format_duration(above)
            edges = [format_duration(edge) for edge in (below, above) if 0 < edge < float("inf")]
            notes.append(
                f"buckets {format_duration(below)}–{upper}: a target of {' or '.join(edges)} is judged exactly"
            )
    total = _totals(tally)[0]
    if total < tally.enough:
        notes.append(f"{total:.0f} requests counted, a verdict needs {tally.enough:.0f}")
    return "; ".join(notes)


def verdicts(tallies: Iterable[Tally]) -> tuple[SloVerdict, ...]:
    """Return whether each objective is met over the window; Unknown is said where the counts do not tell."""
    found = []
    for tally in tallies:
        total, good, possible = _totals(tally)
        name, target = tally.objective, format_duration(tally.target)
        if total <= 0:
            found.append(SloVerdict(name, tally.target, None, f"{name} {target}: no requests in the window"))
            continue
        low, high = good / total, possible / total
        certain_misses, open_misses = total - possible, total - good
        text = f"{name} {target}: {_range(100 * low, 100 * high)} % of {total:.0f} requests"
        # With few requests, more misses than the least meaningful number could ever allow settle it early.
        if certain_misses > tally.allowed * max(total, tally.enough):
            met: bool | None = False
        elif total < tally.enough:
            met, text = None, f"{text}; a verdict needs {tally.enough:.0f}"
        elif open_misses <= tally.allowed * total:
            met = True
        else:
            met, text = None, f"{text}; the buckets tell no more"
        found.append(SloVerdict(name, tally.target, met, text, low, high, total))
    return tuple(found)


def should_write(
    previous: tuple[ObjectiveStatus, ...],
    new: tuple[ObjectiveStatus, ...],
    now: float,
    last_write: float | None,
) -> bool:
    """Return whether the counters are worth a write to status: every five minutes, and only on traffic.

    Args:
        previous: What status holds.
        new: What would be written.
        now: Unix time, seconds.
        last_write: Unix time of the last write of these counters; None: not known, or never.
    """
    if [(each.objective, each.target) for each in previous] != [
        (each.objective, each.target) for each in new
    ]:
        return True
    if [each.hours for each in previous] == [each.hours for each in new]:
        return False
    # A clock that was set back must not silence the counters until it has caught up.
    return last_write is None or not 0 <= now - last_write < WRITE_SECONDS
