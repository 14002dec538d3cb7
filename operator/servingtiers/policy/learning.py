"""What a pool's traffic teaches: the cost of a request, the speed of the engines, the load of the last hour, the budget.

Everything is kept in :class:`~servingtiers.api.status.PoolMemory` in round numbers. Time enters as data, and asking
twice within a scrape teaches nothing twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from servingtiers.api.status import PoolMemory
from servingtiers.core.decisions import EngineCurve, PoolRole
from servingtiers.core.signals import Histogram, Load
from servingtiers.core.times import from_time, to_time
from servingtiers.policy.budget import FIRST, LEAST, MOST, Budget, spend
from servingtiers.policy.forecast import History

__all__ = ["Lesson", "Missed", "budget_of", "history_of", "learn", "of_these", "rps_of", "slowness_of"]

_LEAST_SECONDS = 10.0
"""Readings nearer together than this are the same reading."""
_MOST_SECONDS = 60.0
"""A gap longer than this teaches as much as this."""
_LEAST_REQUESTS = 20.0
_WORK_REQUESTS = 400.0
"""Requests that are half a new opinion of what a request costs."""
_OTHER, _OTHER_REQUESTS = 1.6, 200.0
"""Requests that cost so many times more or less than those before are a new mix, where a window has so many."""
_ANOTHER = 2.5
"""The same, beyond which they are another traffic: the mix of a few clients wanders, and their misses stay theirs."""
_SPEED_SHARE = 0.12
"""Weight of one reading of the engines' speed."""
_LEARNED_OF_THEM = (
    "work_micros",
    "slowness_permille",
    "headroom_micros",
    "asked",
    "missed_milli",
    "low_since",
    "low_peak",
    "kept",
    "regrets",
    "regretted_at",
)
"""What is true of some engines and objectives only."""
_SLOWEST, _FASTEST = 2.0, 0.5
_LEAST_USED = 0.1
"""Engines with less to do than this share of what they could would miss no less if there were more of them."""
_LEAST_BUSY = 0.15
"""At a smaller share of what an engine can do its pace says nothing about its capacity."""


@dataclass(frozen=True, slots=True)
class Missed:
    """Requests of the window that missed an objective, in requests of an objective that allows 1 %."""

    asked: float
    missed: float
    complete: bool = True
    """False: some engines did not answer, or an objective is unknown. What was seen to miss may buy headroom; what was
    not seen gives none back."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One reading of a pool."""

    role: PoolRole
    load: Load
    curve: EngineCurve
    arrivals: float | None
    """Requests per second right now; None: unknown, or known of some routers only."""
    serving: int
    """Engines that the pool holds."""
    excused: bool
    """What is missed now tells of a start-up or of a backlog that is being worked off, not of too little headroom."""
    steady: bool
    """The engines of the window are those of now, and none of them was crowded."""
    standing: bool
    """A queue has stood over the whole window with the same engines: they do what they can."""
    missed: Missed | None
    """None: unknown, or no objective that could be kept."""


def rps_of(memory: PoolMemory, curve: EngineCurve) -> float:
    """Return what one replica carries within the objectives, requests per second, as far as is known."""
    return 1e6 / ((_work_of(memory) or _told(curve)) * slowness_of(memory))


def _work_of(memory: PoolMemory) -> int | None:
    # A status is a text that anybody with the right may edit: what cannot be is not known.
    return memory.work_micros if memory.work_micros is not None and memory.work_micros > 0 else None


def _told(curve: EngineCurve) -> float:
    """Return the engine time of a request by the model, microseconds."""
    return 1e6 / min(curve.rps, curve.saturation)


def slowness_of(memory: PoolMemory) -> float:
    """Return how much longer engines take than the model says; 1 until that is known."""
    if memory.slowness_permille is None:
        return 1.0
    return min(max(memory.slowness_permille / 1e3, _FASTEST), _SLOWEST)


def history_of(memory: PoolMemory) -> History:
    """Return the load of the last hour, in replicas of the model's speed."""
    return History(tuple(memory.load_peaks), memory.load_bucket)


def budget_of(memory: PoolMemory) -> Budget:
    """Return what was missed lately."""
    headroom = FIRST if memory.headroom_micros is None else memory.headroom_micros / 1e6
    asked, missed = max(memory.asked or 0, 0), max(memory.missed_milli or 0, 0)
    return Budget(min(max(headroom, LEAST), MOST), float(asked), missed / 1e3)


def of_these(memory: PoolMemory, engines: str, curve: EngineCurve | None, now: float) -> PoolMemory:
    """Return the memory without what was learned of other engines or under other objectives.

    The load of the last hour is the clients', and stays: it is only told in other replicas.

    Args:
        memory: Before.
        engines: What the engines are and what is asked of them, as a short text; empty: not told.
        curve: What the performance model says of one of them; None: nothing.
        now: Unix time, seconds.
    """
    if not engines or memory.learned_of == engines:
        return memory
    update: dict[str, object] = {"learned_of": engines}
    if memory.learned_of is not None:
        work = _work_of(memory)
        peaks = [] if curve is None or work is None else _told_anew(memory, _told(curve) / work)
        # The engines of this moment are still those of before, so nothing is learned from them now.
        update |= {"learned_at": to_time(now), "load_peaks": peaks}
        update |= dict.fromkeys(_LEARNED_OF_THEM)
        update["load_bucket"] = memory.load_bucket if peaks else None
    return memory.model_copy(update=update)


def _told_anew(memory: PoolMemory, ratio: float) -> list[int]:
    """Return the load of the last hour where a request takes ``ratio`` times the engines it took."""
    return [round(peak * ratio) if peak > 0 else peak for peak in memory.load_peaks]


def learn(memory: PoolMemory, lesson: Lesson, now: float) -> PoolMemory:
    """Return the memory with what a reading teaches.

    Args:
        memory: Before.
        lesson: The reading.
        now: Unix time, seconds.
    """
    since = math.inf if memory.learned_at is None else now - from_time(memory.learned_at)
    if 0 <= since < _LEAST_SECONDS:
        return memory
    seconds = min(since, _MOST_SECONDS) if since >= 0 else _LEAST_SECONDS
    update: dict[str, object] = {}
    before = memory
    finished = lesson.load.e2e.total if isinstance(lesson.load.e2e, Histogram) else 0.0
    work = _work_of(memory)
    if finished >= _OTHER_REQUESTS and work is not None:
        ratio = _told(lesson.curve) / work
        change = max(ratio, 1.0 / ratio)
        if change > _OTHER:
            memory = memory.model_copy(update={"work_micros": None})
        if change > _ANOTHER:
            # An hour of requests that cost ten times as much foretells nothing of these but how many may come. What was
            # missed, and how much room that took, is the other traffic's.
            forgotten = dict.fromkeys(("headroom_micros", "asked", "missed_milli"))
            memory = memory.model_copy(update=forgotten | {"load_peaks": _told_anew(memory, ratio)})
    update["work_micros"] = _work(memory, lesson.curve, finished * min(seconds / lesson.load.window, 1.0))
    slowness = _slowness(lesson, finished)
    if slowness is not None:
        share = 1.0 if memory.slowness_permille is None else _SPEED_SHARE
        mixed = share * slowness + (1.0 - share) * slowness_of(memory)
        update["slowness_permille"] = round(1e3 * mixed)
    if lesson.arrivals is not None:
        at = memory.model_copy(update=update)
        micros = at.work_micros or 0
        history = history_of(memory).with_load(now, lesson.arrivals * micros / 1e6)
        update["load_peaks"] = [] if history.empty else list(history.peaks)
        update["load_bucket"] = None if history.empty else history.last
        if history.empty:
            # An hour without a request leaves nothing of that hour's budget.
            update |= {"asked": None, "missed_milli": None}
            if memory.headroom_micros is not None:
                update["headroom_micros"] = min(memory.headroom_micros, round(1e6 * FIRST))
        if lesson.missed is not None and lesson.missed.asked > 0:
            share = min(seconds / lesson.load.window, 1.0)
            load = lesson.arrivals * micros / 1e6 * slowness_of(at)
            after = spend(
                budget_of(memory),
                asked=share * lesson.missed.asked,
                missed=share * lesson.missed.missed,
                allowed=0.01,
                seconds=seconds,
                excused=lesson.excused,
                busy=load > _LEAST_USED * lesson.serving,
            )
            headroom = after.headroom
            if not lesson.missed.complete:
                headroom = max(headroom, budget_of(memory).headroom)
            update["headroom_micros"] = round(1e6 * headroom)
            update["asked"] = round(after.asked)
            update["missed_milli"] = round(1e3 * after.missed)
    memory = memory.model_copy(update=update)
    # An idle pool learns nothing, and so its status is written no more: the time of a lesson is no lesson.
    return memory if memory == before else memory.model_copy(update={"learned_at": to_time(now)})


def _work(memory: PoolMemory, curve: EngineCurve, finished: float) -> int:
    told, work = _told(curve), _work_of(memory)
    if work is None:
        return max(round(told), 1)
    share = finished / (finished + _WORK_REQUESTS)
    return max(round(math.exp(share * math.log(told) + (1.0 - share) * math.log(work))), 1)


def _slowness(lesson: Lesson, finished: float) -> float | None:
    """Return how much longer engines take than the model says; None where this reading does not tell.

    At a given rate an engine that is ``s`` times slower is as busy as the model's at ``s`` times the rate, and each of
    its steps takes ``s`` times as long. Engines with a queue that stands do what they can, which is said by what they
    finish.
    """
    load, curve = lesson.load, lesson.curve
    if not load.coverage.complete or lesson.serving < 1 or finished < _LEAST_REQUESTS:
        return None
    rate = finished / load.window / lesson.serving
    if lesson.standing:
        return min(max(curve.saturation / rate, _FASTEST), _SLOWEST)
    if not lesson.steady or rate / curve.saturation < _LEAST_BUSY:
        return None
    found = 0.0
    for share, seen, times in (
        (curve.prefill_share, load.ttft, curve.ttft),
        (1.0 - curve.prefill_share, load.itl, curve.tpot),
    ):
        if share <= 0.0:
            continue
        if not isinstance(seen, Histogram) or not seen.mean:
            return None
        found += share * math.log(_times_slower(curve, times, rate, seen.mean))
    return math.exp(found)


def _times_slower(curve: EngineCurve, times: tuple[float, ...], rate: float, seen: float) -> float:
    low, high = _FASTEST, _SLOWEST
    for _ in range(12):
        middle = math.sqrt(low * high)
        if middle * curve.at(middle * rate / curve.saturation, times) < seen:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
