"""The error budget as an integral: what was missed lately says how much headroom the next hour needs.

Capacity says how many requests an engine carries when they come at random. Real ones come in bursts, engines differ,
models err, and how much that takes is not known beforehand. So replicas are multiplied by a headroom that grows with
the share of the last hour's budget that was used, as long as more than may be is missed still, and shrinks slowly while
that is no longer so, whatever the hour remembers: an objective of 99 % is kept, not 100 %, which would be the dearest way to miss the point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["FIRST", "LEAST", "MOST", "Budget", "spend"]

FIRST = 1.0
"""Headroom until something was seen."""
LEAST, MOST = 0.92, 4.0
"""A pool of many engines carries a little more than each of them alone under random arrivals. Bursts of seconds, which no
forecast sees and no start-up is short enough for, take engines that are idle most of the time."""
_MEMORY_SECONDS = 3600.0
"""What was missed so long ago counts 1/e."""
_FREE = 0.45
"""So much of the budget may be used before headroom grows: a budget is there to be used."""
_GAIN = 3.0
"""Headroom for each budget that was used beyond that."""
_EVENT = 3.0
"""No reading counts for more than so many times what may be missed: a minute in which all requests miss is one event, and
what it tells of the next hour is little more than a bad minute does. Bursts of seconds that come all the time add up."""
_STEEP, _NEARLY = 6.0, 0.85
"""Headroom for each budget used beyond nearly all of it, besides: 1 % is a limit, not an aim."""
_RISE_SECONDS, _SINK_SECONDS = 240.0, 1500.0
"""Time constants at which headroom follows, up and down."""
_FIRST_SECONDS = 900.0
"""The budget is that of so long at least, at the rate of now: in the first minutes a handful of requests is no hour."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What was asked and missed lately, and the headroom that follows."""

    headroom: float = FIRST
    asked: float = 0.0
    """Requests of the last hour or so; what is old counts less."""
    missed: float = 0.0
    """Those of them that missed an objective."""

    def share(self, allowed: float) -> float:
        """Return how much of the budget is used: 1 is all of it."""
        budget = self.asked * allowed
        return self.missed / budget if budget > 0 else 0.0


def spend(
    budget: Budget, *, asked: float, missed: float, allowed: float, seconds: float, excused: bool, busy: bool
) -> Budget:
    """Return the budget after some more seconds.

    Args:
        budget: Before.
        asked: Requests in these seconds.
        missed: Those of them that missed an objective.
        allowed: Share that may miss, such as 0.01.
        seconds: How long these seconds were.
        excused: Whether what was missed tells of something else than too little headroom.
        busy: Whether the engines had enough to do for more of them to have helped.
    """
    keep = math.exp(-seconds / _MEMORY_SECONDS)
    counted = min(missed, _EVENT * allowed * asked) if busy and not excused else 0.0
    after_asked, after_missed = keep * budget.asked + asked, keep * budget.missed + counted
    may = allowed * max(after_asked, asked / max(seconds, 1.0) * _FIRST_SECONDS)
    used = after_missed / may if may > 0 else 0.0
    target = LEAST + _GAIN * max(used - _FREE, 0.0) + _STEEP * max(used - _NEARLY, 0.0)
    target = min(target, MOST)
    if counted <= _FREE * allowed * asked:
        # Enough stands by for what comes now. What was missed before it was there is no reason to keep it for an hour: if
        # it comes again, what the hour has used brings headroom back sooner than it went.
        target = LEAST
    pace = _RISE_SECONDS if target > budget.headroom else _SINK_SECONDS
    headroom = budget.headroom + (target - budget.headroom) * min(seconds / pace, 1.0)
    return Budget(headroom, after_asked, after_missed)
