"""How much load there may be by the time an engine that is ordered now could serve it.

The load is kept as the peaks of half minutes over the last hour, in replicas. Each of them was followed by others: how
the peak of the next so many seconds went with the load at the time is a line, fitted to that hour, and what the line did
not foretell, as a share of it, is the margin. So a load that climbs and falls slowly is followed closely; one that comes and goes within
a start-up has no slope, and what is kept for it is what its rushes need. A spike that came once is left out of both until
another comes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BUCKET_SECONDS", "KEPT_BUCKETS", "Forecast", "History", "ahead"]

BUCKET_SECONDS = 30.0
KEPT_BUCKETS = 120
"""An hour."""
_SET_BACK_BUCKETS = 4
"""A clock that goes back by so little, as that of another replica of the operator may, has forgotten nothing."""
_MISSING = -1
_SCALE = 100.0
"""The history is kept in hundredths of a replica."""
_LEAST_PAIRS = 6
"""Fewer pairs of a load and what followed it make no line."""
_MANY_PAIRS = 24
"""With fewer than these the first guess still counts for a part."""
_LEAST_LEVEL = 0.1
"""No peak is measured against less than this share of the mean one."""
_FORGET_BUCKETS = 80.0
"""After so many buckets a pair weighs half."""
_FLOOR = 0.12
"""Least margin, as a share of the load, for a start-up of three minutes; an hour without a rise proves nothing."""
_SWINGS, _FOLLOWED = 1.5, 0.3
"""A load whose highest is more than so many times its mean, and whose peaks follow it with less than this slope, comes
and goes."""
_UNKNOWN, _ENOUGH_PAIRS = 0.1, 100.0
"""By how much an hour may be higher than the first minutes of it, and the pairs from which on it is known."""
_CONFIDENCE = 0.93
"""Share of the hour's peaks, weighted by their load, that the margin covers."""
_EVENT = 0.5
"""Share of what was foretold by which a peak must exceed it to be an event of its own, not a waver."""
_FIRST_MARGIN = 0.1
"""Margin of a load of which nothing is known yet, as a share of it, for a start-up of a minute or more."""


@dataclass(frozen=True, slots=True)
class History:
    """Peaks of the load per half minute."""

    peaks: tuple[int, ...] = ()
    """Hundredths of a replica, oldest first; -1: not known."""
    last: int | None = None
    """Index of the newest half minute, counted from the epoch."""

    def with_load(self, now: float, load: float) -> History:
        """Return the history with the load of now, replicas."""
        index = math.floor(now / BUCKET_SECONDS)
        value = round(load * _SCALE)
        if self.last is None or not self.peaks or not -_SET_BACK_BUCKETS <= index - self.last < KEPT_BUCKETS:
            return History((value,), index)
        if index <= self.last:
            return History((*self.peaks[:-1], max(self.peaks[-1], value)), self.last)
        gap = (_MISSING,) * (index - self.last - 1)
        return History((*self.peaks, *gap, value)[-KEPT_BUCKETS:], index)

    def latest(self, now: float) -> tuple[float, float] | None:
        """Return the newest load, replicas, and how old it is, seconds; None: no load, or one from before the hour."""
        if self.last is None or not self.peaks or self.peaks[-1] <= 0:
            return None
        age = max(now - (self.last + 1) * BUCKET_SECONDS, 0.0)
        return (self.peaks[-1] / _SCALE, age) if age < KEPT_BUCKETS * BUCKET_SECONDS else None

    def highest(self, begin: float, end: float) -> float | None:
        """Return the highest load between two times, replicas; None: none is known."""
        if self.last is None:
            return None
        first = self.last - len(self.peaks) + 1
        low, high = math.floor(begin / BUCKET_SECONDS) - first, math.floor(end / BUCKET_SECONDS) - first
        known = [peak for peak in self.peaks[max(low, 0) : max(high + 1, 0)] if peak >= 0]
        return max(known) / _SCALE if known else None

    @property
    def peak(self) -> float:
        """The highest load that is known, replicas."""
        return max((*self.peaks, 0)) / _SCALE

    @property
    def rushes(self) -> int:
        """How often in the last hour the load rose from its mean or less far above it."""
        known = [peak for peak in self.peaks if peak >= 0]
        mean = math.fsum(known) / max(len(known), 1)
        sides = [peak > mean for peak in known if peak <= mean or peak > _SWINGS * mean]
        return sum(after and not before for before, after in itertools.pairwise(sides))

    @property
    def empty(self) -> bool:
        """Whether nothing but zeros is known."""
        return not any(peak > 0 for peak in self.peaks)


@dataclass(frozen=True, slots=True)
class Forecast:
    """The peak to be expected, in replicas."""

    level: float
    """What the load of now was followed by, on average."""
    margin: float
    """By how much more it was, in nearly all of the last hour."""
    pairs: int
    """Half minutes that it rests on; 0: a first guess."""

    @property
    def peak(self) -> float:
        """What there should be engines for."""
        return self.level + self.margin


def ahead(history: History, load: float, seconds: float) -> Forecast:
    """Return the peak of the load within the next ``seconds``.

    Args:
        history: The last hour; its newest half minute is the load of now.
        load: The load of now, replicas.
        seconds: How far ahead: until an engine ordered now could serve.
    """
    steps = max(1, math.ceil(seconds / BUCKET_SECONDS - 0.2))
    first = _FIRST_MARGIN * min(seconds / 60.0, 1.0) * load
    # Without the newest: more load must never change what the hour before it has taught.
    pairs = _pairs(history.peaks[:-1], steps)
    if len(pairs) < _LEAST_PAIRS:
        return Forecast(load, first, 0)
    line = _line(pairs, len(history.peaks))
    event = line.event(steps)
    rest = [pair for pair in pairs if pair[0] not in event]
    once = bool(event) and len(rest) >= _LEAST_PAIRS
    if once:
        # What came once need not come again, and does not make the rest a load that comes and goes.
        line = _line(rest, len(history.peaks))
    slope, mean_x = line.slope, line.mean_x
    level = max(line.mean_y + slope * (load - mean_x), load)
    margin = line.margin * max(level, line.least)
    floor = _FLOOR * min(seconds / 180.0, 1.0) * level
    highest = max(history.peaks) / _SCALE
    if not once and max(history.peaks[:-1]) / _SCALE > _SWINGS * mean_x:
        # The hour has shown what there is, and after a peak it falls: a higher one need not come. As far as it is known.
        goes = 1.0 - min(slope / _FOLLOWED, 1.0)
        floor *= 1.0 - goes
        highest *= 1.0 + _UNKNOWN * goes * (1.0 - min(len(pairs) / _ENOUGH_PAIRS, 1.0))
    if len(pairs) < _MANY_PAIRS:
        # A few minutes cannot know what an hour brings.
        margin = max(margin, first * (1.0 - len(pairs) / _MANY_PAIRS))
    return Forecast(level, max(min(margin, highest - level), floor), len(pairs))


@dataclass(frozen=True, slots=True)
class _Line:
    """What loads were followed by, as a line."""

    slope: float
    mean_x: float
    """Mean load, replicas."""
    mean_y: float
    """Mean peak that followed, replicas."""
    least: float
    """No peak is measured against less, replicas."""
    misses: tuple[tuple[float, float, int], ...]
    """By how much of what the line foretells a peak was higher, its weight, and which half minute it followed; ascending."""

    @property
    def margin(self) -> float:
        """What covers nearly all misses, as a share of what is foretold."""
        return max(_quantile(self.misses, _CONFIDENCE), 0.0)

    def event(self, steps: int) -> frozenset[int]:
        """Return the half minutes that call for the margin if they are all of one event; empty: of several, or none."""
        if self.margin <= _EVENT:
            return frozenset()
        at = sorted(index for miss, _, index in self.misses if miss >= _EVENT)
        # A peak is what each of the steps before it was followed by.
        if any(later - sooner > steps + 1 for sooner, later in itertools.pairwise(at)):
            return frozenset()
        return frozenset(at)


def _line(pairs: Sequence[tuple[int, float, float]], count: int) -> _Line:
    """Fit the line to pairs of a history of so many half minutes; what is old weighs less."""
    weights = [0.5 ** ((count - at) / _FORGET_BUCKETS) for at, _, _ in pairs]
    total = math.fsum(weights)
    mean_x = math.fsum(w * x for w, (_, x, _) in zip(weights, pairs, strict=True)) / total
    mean_y = math.fsum(w * y for w, (_, _, y) in zip(weights, pairs, strict=True)) / total
    across = math.fsum(w * (x - mean_x) * (y - mean_y) for w, (_, x, y) in zip(weights, pairs, strict=True))
    spread = math.fsum(w * (x - mean_x) ** 2 for w, (_, x, _) in zip(weights, pairs, strict=True))
    slope = min(max(across / spread, 0.0), 1.0) if spread > 1e-9 else 1.0
    # A missed peak is a miss of all its requests, so peaks count by their height. Loads err in proportion: what a busy
    # hour wavered by is no margin for a calm one.
    least = max(_LEAST_LEVEL * mean_y, 1e-3)
    misses = sorted(
        (y / max(mean_y + slope * (x - mean_x), least) - 1.0, w * max(y, 1e-3), at)
        for w, (at, x, y) in zip(weights, pairs, strict=True)
    )
    return _Line(slope, mean_x, mean_y, least, tuple(misses))


def _pairs(peaks: Sequence[int], steps: int) -> list[tuple[int, float, float]]:
    """Return (index, load, peak of the next ``steps``) wherever all of them are known."""
    found = []
    for at in range(len(peaks) - steps):
        window = peaks[at : at + steps + 1]
        if min(window) >= 0:
            found.append((at, window[0] / _SCALE, max(window[1:]) / _SCALE))
    return found


def _quantile(values: Sequence[tuple[float, float, int]], share: float) -> float:
    """Return the value below which ``share`` of the weights lie; ``values`` ascend and carry their weights."""
    rest = share * math.fsum(weight for _, weight, _ in values)
    for value, weight, _ in values:
        rest -= weight
        if rest <= 0:
            return value
    return values[-1][0]
