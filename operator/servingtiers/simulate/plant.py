"""The compiled part of the fleet: a router that dispatches at once, and replicas that run the event engine.

Replicas are rows of the event simulation's state (:mod:`servingtiers.performance.engine_kernel`), advanced only
when the router or a scrape looks at them. Real time is milliseconds since the start of the run. Each row runs on a
clock of its own that is faster or slower than real time by a factor (``rate``) that changes from segment to
segment: this is how one GPU is a little slower than another, and today slower than yesterday, without touching the
step model. Times that the kernel writes are turned into real time by :func:`observe`, which must be called before a
row's rate changes.

Tiers that lend each other engines are one plant: their rows, requests and journal are the same arrays, each row runs
with the flags of its home (an own step table and configuration: one kernel pool per home), and each tier's router
has members of its own among all rows. A row is a member of one router at most, so routers may dispatch one after the
other.

Counters and histograms are what an engine would expose: cumulative since the row's pod started, in vLLM's own
buckets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from servingtiers.performance import engine_kernel as kernel

__all__ = [
    "DISPATCHED",
    "DROPPED",
    "LEAST_LOAD",
    "LOST",
    "MET_FIRST",
    "MET_LAST",
    "NOWHERE",
    "POWER_OF_TWO",
    "ROUND_ROBIN",
    "UNSENT",
    "Journal",
    "Rows",
    "advance_all",
    "dispatch",
    "fail_row",
    "observe",
    "rebase",
]

_F = TypeVar("_F", bound=Callable[..., object])
_compiled: Callable[[_F], _F] = njit(cache=True, _nrt=False)

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

Pools = tuple[kernel.Pool, ...]
"""One per home; their state arrays are the same, their configuration and step table are not."""

ROUND_ROBIN, POWER_OF_TWO, LEAST_LOAD = 0, 1, 2

# --- where a request is (Journal.row); rows are 0 and above ----------------------------------------------------
UNSENT = -1
NOWHERE = -2
"""No engine was ready: the client got 503."""
DROPPED = -3
"""The engine's queue limit was reached: 503."""
LOST = -4
"""Its engine died, or was killed at the end of its grace period."""

# --- what was seen of a request (bits of Journal.seen) ---------------------------------------------------------
MET_SCHEDULED, MET_FIRST, MET_LAST = 1, 2, 4

# --- columns of Rows.counters -----------------------------------------------------------------------------------
DISPATCHED = 0  # by the router to this row
FIRST = 1  # first tokens
PROMPT = 2  # prompt tokens, cached ones included
HIT = 3  # of these, found in the prefix cache
ITL_COUNT = 4  # gaps between tokens
DONE = 5
REFUSED = 6  # by the queue limit
COUNTERS = 7

# --- histograms: index of Rows.sums -----------------------------------------------------------------------------
TTFT, TPOT, ITL, E2E, QUEUE, PROMPT_LENGTH, OUTPUT_LENGTH = 0, 1, 2, 3, 4, 5, 6
HISTOGRAMS = 7


class Rows(NamedTuple):
    """The replicas of one pool and, where it lends, those of the pools it shares with."""

    members: I64
    """Rows that the router sends to, the first ``state[0]`` of them, shape ``(rows,)``."""
    home: I64
    """Which kernel pool each row belongs to, shape ``(rows,)``."""
    state: I64
    """[members, round-robin position, random state, requests that found no engine, queue limit or 0, whether a
    new engine's first request finds nothing in its prefix cache]."""
    tau0: F64
    """Own clock at the start of the segment, ms."""
    real0: F64
    """Real time at the start of the segment, ms."""
    rate: F64
    """Own ms per real ms."""
    counters: I64
    """Shape ``(rows, COUNTERS)``."""
    buckets: I64
    """Observations by upper bound, not cumulative, shape ``(rows, HISTOGRAMS, width)``."""
    sums: F64
    """Sum of the observations, seconds or tokens, shape ``(rows, HISTOGRAMS)``."""
    itl_seen: I64
    """The kernel's ITL bins at the last :func:`observe`, shape ``(rows, ITL_BINS)``."""
    bounds: F64
    """Finite upper bounds, padded with infinity, shape ``(HISTOGRAMS, width)``."""


class Journal(NamedTuple):
    """What became of every request in one pool; times are real ms, NaN until they are known."""

    row: I64
    seen: I64
    scheduled: F64
    first: F64
    last: F64
    sent: F64
    """When the router sent it."""
    open: I64
    """Requests in flight, the first ``open_count[0]``."""
    open_count: I64
    closed: I64
    """Requests that ended in the latest :func:`observe`, the first ``open_count[1]``."""


@_compiled
def _own(rows: Rows, row: int, now: float) -> float:
    return float(rows.tau0[row] + (now - rows.real0[row]) * rows.rate[row])


@_compiled
def _real(rows: Rows, row: int, own: float) -> float:
    return float(rows.real0[row] + (own - rows.tau0[row]) / rows.rate[row])


@_compiled
def _draw(rows: Rows, limit: int) -> int:
    """A pseudo-random whole number below ``limit``: Knuth's MMIX congruential generator, upper bits."""
    state = rows.state[2] * 6364136223846793005 + 1442695040888963407
    rows.state[2] = state
    return int(((state >> 33) & 0x7FFFFFFF) % limit)


@_compiled
def _load(pools: Pools, requests: kernel.Requests, rows: Rows, row: int, now: float) -> int:
    """Unanswered requests of a row at ``now``."""
    pool = pools[rows.home[row]]
    kernel.advance(pool, requests, row, _own(rows, row, now), stop_at_finish=False)
    return int(pool.ints[row, kernel.INJECTED] - pool.ints[row, kernel.FINISHED])


@_compiled
def dispatch(
    pools: Pools,
    requests: kernel.Requests,
    rows: Rows,
    journal: Journal,
    ids: I64,
    times: F64,
    start: int,
    until: float,
    delay: float,
    policy: int,
) -> int:
    """Send every request due before ``until`` to a replica, as vllm-router does: at once, nothing is held back.

    Args:
        pools: State of the replicas, by home.
        requests: The requests of the run, by id.
        rows: The pool's rows; only members are sent to.
        journal: Where each request goes is written here.
        ids: Requests in the order in which they arrive at this pool.
        times: When, ms, ascending, shape of ``ids``.
        start: First entry of ``ids`` that is not sent yet.
        until: Real time, ms.
        delay: From the router to the engine's scheduler, ms.
        policy: ``ROUND_ROBIN``, ``POWER_OF_TWO`` or ``LEAST_LOAD``.

    Returns:
        The first entry of ``ids`` that is still not sent.
    """
    at = start
    while at < ids.shape[0] and times[at] < until:
        request = ids[at]
        now = times[at] + delay
        at += 1
        members = rows.state[0]
        journal.sent[request] = times[at - 1]
        if members == 0:
            rows.state[3] += 1
            journal.row[request] = NOWHERE
            continue
        if policy == ROUND_ROBIN or members == 1:
            row = rows.members[rows.state[1] % members]
            rows.state[1] += 1
        elif policy == POWER_OF_TWO:
            first = _draw(rows, members)
            second = _draw(rows, members - 1)
            if second >= first:
                second += 1
            row = rows.members[first]
            other = rows.members[second]
            if _load(pools, requests, rows, other, now) < _load(pools, requests, rows, row, now):
                row = other
        else:
            lowest = 1 << 62
            row = rows.members[0]
            for step in range(members):
                # Ties go round robin.
                each = rows.members[(rows.state[1] + step) % members]
                load = _load(pools, requests, rows, each, now)
                if load < lowest:
                    lowest = load
                    row = each
            rows.state[1] += 1
        pool = pools[rows.home[row]]
        kernel.advance(pool, requests, row, _own(rows, row, now), stop_at_finish=False)
        limit = rows.state[4]
        rows.counters[row, DISPATCHED] += 1
        if limit > 0 and pool.ints[row, kernel.INJECTED] - pool.ints[row, kernel.FINISHED] >= limit:
            rows.counters[row, REFUSED] += 1
            journal.row[request] = DROPPED
            continue
        journal.row[request] = row
        journal.open[journal.open_count[0]] = request
        journal.open_count[0] += 1
        if rows.state[5] == 1 and rows.counters[row, DISPATCHED] == 1:
            requests.cached[request] = 0
        kernel.inject(pool, requests, row, request, _own(rows, row, now))
    return at


@_compiled
def advance_all(pool: kernel.Pool, requests: kernel.Requests, rows: Rows, active: I64, now: float) -> None:
    """Let every row of ``active`` run up to ``now``, real ms."""
    for index in range(active.shape[0]):
        row = active[index]
        kernel.advance(pool, requests, row, _own(rows, row, now), stop_at_finish=False)


@_compiled
def _count(rows: Rows, row: int, histogram: int, value: float) -> None:
    bounds = rows.bounds[histogram]
    low = 0
    high = bounds.shape[0]
    while low < high:
        middle = (low + high) >> 1
        if bounds[middle] < value:
            low = middle + 1
        else:
            high = middle
    rows.buckets[row, histogram, low] += 1
    rows.sums[row, histogram] += value


@_compiled
def observe(pool: kernel.Pool, requests: kernel.Requests, rows: Rows, journal: Journal, active: I64) -> None:
    """Count what happened in the segment and turn its times into real time.

    TTFT and prompt tokens count at the first token, end-to-end latency, TPOT, queue time and lengths at the last
    one, as vLLM does. Requests that ended are then in ``journal.closed``.
    """
    count = journal.open_count[0]
    closed = 0
    at = 0
    while at < count:
        request = journal.open[at]
        row = journal.row[request]
        seen = journal.seen[request]
        if seen & MET_SCHEDULED == 0 and not math.isnan(requests.scheduled[request]):
            journal.scheduled[request] = _real(rows, row, requests.scheduled[request])
            seen |= MET_SCHEDULED
        if seen & MET_FIRST == 0 and not math.isnan(requests.first[request]):
            journal.first[request] = _real(rows, row, requests.first[request])
            seen |= MET_FIRST
            _count(rows, row, TTFT, (journal.first[request] - journal.sent[request]) / 1e3)
            rows.counters[row, FIRST] += 1
            rows.counters[row, PROMPT] += requests.prompt[request]
            rows.counters[row, HIT] += requests.cached[request]
        if not math.isnan(requests.last[request]):
            last = _real(rows, row, requests.last[request])
            journal.last[request] = last
            seen |= MET_LAST
            _count(rows, row, E2E, (last - journal.sent[request]) / 1e3)
            _count(rows, row, QUEUE, (journal.scheduled[request] - journal.sent[request]) / 1e3)
            output = requests.output[request]
            # vLLM observes 0 for answers of one token.
            _count(
                rows,
                row,
                TPOT,
                (last - journal.first[request]) / 1e3 / (output - 1) if output > 1 else 0.0,
            )
            _count(rows, row, PROMPT_LENGTH, float(requests.prompt[request]))
            _count(rows, row, OUTPUT_LENGTH, float(output))
            rows.counters[row, DONE] += 1
            journal.closed[closed] = request
            closed += 1
            count -= 1
            journal.open[at] = journal.open[count]
        else:
            at += 1
        journal.seen[request] = seen
    journal.open_count[0] = count
    journal.open_count[1] = closed
    for index in range(active.shape[0]):
        _observe_gaps(pool, rows, active[index])


@_compiled
def _observe_gaps(pool: kernel.Pool, rows: Rows, row: int) -> None:
    """Count the inter-token latencies of the segment, from the kernel's fine bins."""
    place = 0
    bounds = rows.bounds[ITL]
    rate = rows.rate[row]
    for each in range(kernel.ITL_BINS):
        new = pool.itl[row, each] - rows.itl_seen[row, each]
        if new == 0:
            continue
        rows.itl_seen[row, each] = pool.itl[row, each]
        # The middle of the bin: 32 bins an octave from 2**-10 ms on.
        octave = each >> 5
        low = math.ldexp(1.0 + (each & 31) / 32.0, octave - 10)
        seconds = (low + math.ldexp(1.0 / 64.0, octave - 10)) / rate / 1e3
        while bounds[place] < seconds:
            place += 1
        rows.buckets[row, ITL, place] += new
        rows.sums[row, ITL] += new * seconds
        rows.counters[row, ITL_COUNT] += new


@_compiled
def rebase(rows: Rows, row: int, now: float, rate: float) -> None:
    """Begin a new segment with another rate at ``now``, real ms. First :func:`observe`."""
    rows.tau0[row] = _own(rows, row, now)
    rows.real0[row] = now
    rows.rate[row] = rate


@_compiled
def fail_row(pool: kernel.Pool, rows: Rows, journal: Journal, row: int, now: float) -> int:
    """Lose all requests in flight on a row and make it empty, as when its process dies; returns how many.

    Counters are kept: forget them with the pod.
    """
    lost = 0
    count = journal.open_count[0]
    at = 0
    while at < count:
        request = journal.open[at]
        if journal.row[request] == row:
            journal.row[request] = LOST
            lost += 1
            count -= 1
            journal.open[at] = journal.open[count]
        else:
            at += 1
    journal.open_count[0] = count
    kernel.reset(pool, row, _own(rows, row, now))
    rows.itl_seen[row, :] = 0
    return lost
