"""How much load there may be by the time an engine that is ordered now could serve it.

The load is kept as the peaks of half minutes over the last hour, in replicas. Each of them was followed by others: how
the peak of the next so many seconds went with the load at the time is a line, fitted to that hour, and what the line did
not foretell, as a share of it, is the margin. So a load that climbs and falls slowly is followed closely; one that comes and goes within
a start-up has no slope, and what is kept for it is what its rushes need.
"""

from __future__ import annotations

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
    weights = [0.5 ** ((len(history.peaks) - at) / _FORGET_BUCKETS) for at, _, _ in pairs]
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
        (y / max(mean_y + slope * (x - mean_x), least) - 1.0, w * max(y, 1e-3))
        for w, (_, x, y) in zip(weights, pairs, strict=True)
    )
    level = max(mean_y + slope * (load - mean_x), load)
    margin = max(_quantile(misses, _CONFIDENCE), 0.0) * max(level, least)
    floor = _FLOOR * min(seconds / 180.0, 1.0) * level
    highest = max(history.peaks) / _SCALE
    if max(history.peaks[:-1]) / _SCALE > _SWINGS * mean_x:
        # The hour has shown what there is, and after a peak it falls: a higher one need not come. As far as it is known.
        goes = 1.0 - min(slope / _FOLLOWED, 1.0)
        floor *= 1.0 - goes
        highest *= 1.0 + _UNKNOWN * goes * (1.0 - min(len(pairs) / _ENOUGH_PAIRS, 1.0))
    if len(pairs) < _MANY_PAIRS:
        # A few minutes cannot know what an hour brings.
        margin = max(margin, first * (1.0 - len(pairs) / _MANY_PAIRS))
    return Forecast(level, max(min(margin, highest - level), floor), len(pairs))


def _pairs(peaks: Sequence[int], steps: int) -> list[tuple[int, float, float]]:
    """Return (index, load, peak of the next ``steps``) wherever all of them are known."""
    found = []
    for at in range(len(peaks) - steps):
        window = peaks[at : at + steps + 1]
        if min(window) >= 0:
            found.append((at, window[0] / _SCALE, max(window[1:]) / _SCALE))
    return found


def _quantile(values: Sequence[tuple[float, float]], share: float) -> float:
    """Return the value below which ``share`` of the weights lie; ``values`` ascend and carry their weights."""
    rest = share * math.fsum(weight for _, weight in values)
    for value, weight in values:
        rest -= weight
        if rest <= 0:
            return value
    return values[-1][0]
