"""What a scale-down that had to be taken back teaches: load that comes and goes keeps what its peaks need.

An engine that is stopped and started again within the hour has cost a start-up, and its clients a queue. One small regret
is chance; after a large one, a second one, or one under a load that is known to swing, what was taken back stays. For how
long a regret is remembered goes with what it costs, time and accelerators: with the square of the start-up, for an hour where
engines take two minutes. What was taken back was for the load of then: where that has fallen since, as much less of it stays.
"""

from __future__ import annotations

import math

from servingtiers.api.status import PoolMemory
from servingtiers.core.decisions import Binding, Decision
from servingtiers.core.times import from_time, to_time
from servingtiers.policy.learning import history_of

__all__ = ["after_growth", "after_shrinking", "kept", "quiet_left"]

_LONG_HOLD = 160.0
_LEAST_SECONDS, _MOST_SECONDS = 300.0, 3600.0
_LULL_SECONDS = 1200.0
"""A load that comes and goes has not fallen before it has stayed away for so long."""
_SWING = 3.0
"""A load whose high is so many times its low, without the tenth beyond either, comes and goes."""
_LARGE = 0.4
"""Share of a pool from which on what was given up, and taken back, is kept."""


def _patience(hold: float) -> float:
    """Return for how long a regret is remembered, and how soon after a scale-down a scale-up is one, seconds."""
    return min(max(_MOST_SECONDS * (hold / _LONG_HOLD) ** 2, _LEAST_SECONDS), _MOST_SECONDS)


def after_growth(memory: PoolMemory, decision: Decision, now: float, hold: float) -> dict[str, object]:
    """Return what to remember of a scale-up: whether it takes back what was given up not long ago.

    Args:
        memory: Before.
        decision: The scale-up.
        now: Unix time, seconds.
        hold: The pool's hold before a scale-down, seconds.
    """
    found: dict[str, object] = {"last_scale_up": to_time(now)}
    down = memory.last_scale_down
    if decision.binding is Binding.MIN_REPLICAS:  # the user's order takes nothing back
        return found
    if down is None or memory.given_up_from is None or not 0 <= now - from_time(down) < _patience(hold):
        return found
    found["regretted_at"] = to_time(now)
    regrets = memory.regrets or 0
    if memory.last_scale_up is None or from_time(memory.last_scale_up) < from_time(down):
        before = (memory.regrets or 0) if quiet_left(memory, now, hold) else 0
        regrets = before + (2 if _swings(memory) else 1)
    found["regrets"] = regrets
    lost = memory.given_up_from - (memory.given_up_to or 0)
    held = kept(memory, now, hold)
    if held or regrets > 1 or lost >= max(2, _LARGE * memory.given_up_from):
        found["kept"] = max(min(decision.desired, memory.given_up_from), held)
    else:
        found["kept"] = None
    return found


def _swings(memory: PoolMemory) -> bool:
    """Return whether the load of the last hour comes and goes: what went once will be wanted again."""
    known = sorted(peak for peak in memory.load_peaks if peak >= 0)
    if not known:
        return True
    tenth = len(known) // 10
    return known[-1 - tenth] >= _SWING * max(known[tenth], 1)


def after_shrinking(memory: PoolMemory, decision: Decision, now: float) -> dict[str, object]:
    """Return what to remember of a scale-down; several in a row are one."""
    found: dict[str, object] = {"last_scale_down": to_time(now), "given_up_to": decision.desired}
    if decision.binding is Binding.MAX_REPLICAS:  # the user's order, not a hope that proved wrong
        return found | {"given_up_from": None, "given_up_to": None}
    up, down = memory.last_scale_up, memory.last_scale_down
    if down is None or (up is not None and from_time(up) >= from_time(down)):
        found["given_up_from"] = decision.current
    return found


def quiet_left(memory: PoolMemory, now: float, hold: float) -> float:
    """Return for how much longer a regret is remembered, seconds; 0: there is none."""
    if memory.regretted_at is None:
        return 0.0
    passed = now - from_time(memory.regretted_at)
    # A regret in the future is a clock that was set back: it must not stop anything for hours.
    return max(_patience(hold) - passed, 0.0) if passed >= 0 else 0.0


def kept(memory: PoolMemory, now: float, hold: float) -> int:
    """Return the replicas that do not go for now; 0: all may.

    Args:
        memory: What was remembered.
        now: Unix time, seconds.
        hold: The pool's hold before a scale-down, seconds.
    """
    if not memory.kept or memory.regretted_at is None or not quiet_left(memory, now, hold):
        return 0
    span = max(hold, _LULL_SECONDS) if _swings(memory) else hold
    history = history_of(memory)
    then = history.highest(from_time(memory.regretted_at) - span, from_time(memory.regretted_at))
    lately = history.highest(now - span, now)
    if not then or lately is None:
        return memory.kept
    return math.ceil(memory.kept * min(lately / then, 1.0))
