"""The compiled heart of the event simulation: continuous batching, one engine step at a time.

Only the command line and the simulator import this module (through ``engine_sim``); it needs numba and numpy.
:mod:`servingtiers.performance.engine_reference` says the same thing slowly and readably; a test holds both to
the same result on hundreds of random configurations. Read that one first.

How it is fast: between two scheduling events (an arrival, a completion, the end of a prompt chunk) the batch
is constant. Every decoding sequence then grows by one token a step, so the sum of their KV tokens grows by a
constant, the next completion is the top of a heap keyed by *step number*, and the KV blocks needed in a step
are a counter per block phase. A step costs O(1) instead of O(batch), and the step time is one look-up in a
table row chosen once per run of steps.

State is arrays, one row per replica, so that a fleet simulator can drive thousands of replicas: it calls
:func:`advance` up to the next event of its own, :func:`inject` for each request it routes, and reads load from
the scalar rows. Times are milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = [
    "BLOCKS_FREE",
    "BUSY_MS",
    "CLOCK",
    "FINISHED",
    "INJECTED",
    "ITL_BINS",
    "OUTPUT_TOKENS",
    "PREEMPTIONS",
    "PROMPT_TOKENS",
    "RUNNING",
    "STEPS",
    "WAITING",
    "Pool",
    "Requests",
    "StepTable",
    "advance",
    "inject",
    "itl_bin",
    "itl_edges",
    "reset",
    "run_closed",
    "run_open",
    "step_time",
]

# The kernel allocates nothing and its callers keep the arrays alive, so reference counting inside it is pure
# cost: with it, each call between these functions touches some forty atomic counters, twelve times the rest.
_F = TypeVar("_F", bound=Callable[..., object])
_compiled: Callable[[_F], _F] = njit(cache=True, _nrt=False)
_inlined: Callable[[_F], _F] = njit(cache=True, _nrt=False, inline="always")

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# --- integer state of one replica (columns of Pool.ints) ------------------------------------------------------
STEPS = 0  # steps executed since reset; also the clock of the completion heap
DECODING = 1  # sequences that decode one token a step
RUNNING = 2  # sequences holding a slot: decoding ones and those whose prompt is being computed
BLOCKS_FREE = 3
IN_FLIGHT = 4  # 1: a step is under way and ends at END
PREFILLED = 5  # prompts that will be complete when the step in flight ends
PARTIAL_SLOT = 6  # slot whose prompt is only partly computed, or -1
PARTIAL_LEFT = 7  # its prompt tokens still to compute
PARTIAL_PAST = 8  # its tokens already in the cache
HEAD0, TAIL0, HEAD1, TAIL1 = 9, 10, 11, 12  # waiting queues of the interactive and the batch class
WAITING = 13
ORDER = 14  # admission counter
FREE_SLOTS = 15
INJECTED = 16
FINISHED = 17
PREEMPTIONS = 18
PROMPT_TOKENS = 19  # prompt tokens computed (recomputation included, prefix hits left out)
OUTPUT_TOKENS = 20
PADDED = 21  # static batching: sequences that are done but still occupy the batch
JUST_FINISHED = 22  # requests finished in the last step, their ids in Pool.finished
WAITING_TOKENS = 23  # prompt tokens waiting to be computed
ELIGIBLE = 24  # waiting requests that the next step may admit (asynchronous scheduling)
INTS = 25

# --- real-valued state of one replica (columns of Pool.reals) -------------------------------------------------
CLOCK = 0
END = 1  # end of the step in flight
KV = 2  # KV tokens read by the decoding sequences
GROWTH = 3  # KV tokens added per step: the number of decoding sequences, more under speculation
BUSY_MS = 4
BATCH_MS = 5  # integral of the number of decoding sequences over busy time
BLOCKS_MS = 6  # integral of used blocks over busy time
REALS = 8

# --- configuration (Pool.config) ------------------------------------------------------------------------------
MAX_SEQS = 0
BUDGET = 1
BLOCK = 2
BLOCKS = 3
PRIORITY = 4  # 1: the interactive class is admitted first and preempted last
RESERVE = 5  # 1: KV for the whole answer is reserved at admission, so nothing is ever preempted
STATIC = 6  # 1: a batch is admitted only when the batch before it is done
SPECULATED = 7  # draft tokens verified per step
ASYNC = 8  # 1: a step is composed while the step before it runs, so it misses what arrives meanwhile
CONFIG = 9

ITL_BINS = 1024
_MANTISSA_BITS = 5  # 32 bins an octave: 2.2 % wide
_ITL_BASE = (1023 - 10) << _MANTISSA_BITS  # bin 0 starts at 2**-10 ms


class StepTable(NamedTuple):
    """A :class:`~servingtiers.performance.steps.StepGrid` as arrays, with one decode row per batch size."""

    context: F64
    """Knots of mean context length, tokens, ascending from 0, shape ``(K,)``."""
    decode: F64
    """Decode step time, ms, shape ``(B + 1, K)``: row ``b`` for ``b`` sequences; row 0 is unused."""
    slope: F64
    """Slope of each decode segment, ms per token of mean context, shape ``(B + 1, K - 1)``."""
    tokens: F64
    """Knots of tokens in a step with prompt tokens, ascending, shape ``(N,)``."""
    linear: F64
    """Time of such a step without its attention at those knots, ms, shape ``(N,)``."""
    scalars: F64
    """ms per (new prompt token, token it reads) pair; tokens a decoding sequence feeds into a step."""


class Pool(NamedTuple):
    """Replicas of one engine configuration."""

    config: I64
    table: StepTable
    ints: I64
    """Shape ``(replicas, INTS)``."""
    reals: F64
    """Shape ``(replicas, REALS)``."""
    heap: I64
    """Completion heap, ``finish step << 16 | slot``, shape ``(replicas, max_num_seqs)``."""
    slot_request: I64
    slot_order: I64
    slot_length: F64
    """KV tokens of the sequence when its decoding began."""
    slot_start: I64
    """Step number when its decoding began."""
    slot_steps: I64
    """Decode steps it takes from there."""
    slot_blocks: I64
    """Blocks reserved at admission."""
    slot_free: I64
    """Stack of free slots."""
    prefilled: I64
    """Slots whose prompt is complete when the step in flight ends."""
    phase: I64
    """Decoding sequences by ``(length - steps) mod block``, shape ``(replicas, block)``."""
    finished: I64
    itl: I64
    """Inter-token latencies, counted per token in :func:`itl_bin` bins, shape ``(replicas, ITL_BINS)``."""


class Requests(NamedTuple):
    """All requests of a run; one row each."""

    arrival: F64
    prompt: I64
    cached: I64
    """Prompt tokens found in the prefix cache."""
    output: I64
    steps: I64
    """Decode steps after the first token: ``output - 1`` without speculation."""
    klass: I64
    """0 interactive, 1 batch."""
    generated: I64
    """Tokens emitted before the last preemption."""
    scheduled: F64
    first: F64
    last: F64
    preempted: I64
    following: I64
    """Intrusive list: the request behind this one in its waiting queue, or -1."""


@_inlined
def _search(knots: F64, x: float) -> int:
    """Index of the segment of ``knots`` that holds ``x``; the outer segments reach to infinity."""
    low = 0
    high = knots.shape[0] - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if x >= knots[middle]:
            low = middle
        else:
            high = middle
    return low


@_compiled
def _linear(table: StepTable, tokens: float) -> float:
    if tokens <= table.tokens[0]:
        return float(table.linear[0])
    i = _search(table.tokens, tokens)
    share = (tokens - table.tokens[i]) / (table.tokens[i + 1] - table.tokens[i])
    return float(table.linear[i] + share * (table.linear[i + 1] - table.linear[i]))


@_compiled
def step_time(table: StepTable, prompt: float, pairs: float, decoding: int, kv: float) -> float:
    """Time of one step, ms; the formula of :class:`~servingtiers.performance.steps.StepGrid`.

    Args:
        table: The step model.
        prompt: New prompt tokens.
        pairs: Sum over the chunks of ``chunk × (past + chunk / 2)``: token pairs of prompt attention.
        decoding: Decoding sequences.
        kv: KV tokens they read, summed.
    """
    if decoding == 0:
        if prompt == 0.0:
            return 0.0
        return float(_linear(table, prompt) + table.scalars[0] * pairs)
    mean = kv / decoding
    i = _search(table.context, mean)
    decode = table.decode[decoding, i] + (mean - table.context[i]) * table.slope[decoding, i]
    if prompt == 0.0:
        return float(decode)
    mixed = _linear(table, prompt + table.scalars[1] * decoding) + table.scalars[0] * pairs
    mixed += decode - table.decode[decoding, 0]
    return float(max(mixed, decode))


@_inlined
def itl_bin(ms: float) -> int:
    """Histogram bin of an inter-token latency: the top bits of the float, so 32 bins an octave."""
    place = (int(np.float64(ms).view(np.int64)) >> (52 - _MANTISSA_BITS)) - _ITL_BASE
    return min(max(place, 0), ITL_BINS - 1)


def itl_edges() -> F64:
    """Lower edges of the inter-token-latency bins, ms, shape ``(ITL_BINS + 1,)``."""
    bits = (np.arange(ITL_BINS + 1, dtype=np.int64) + _ITL_BASE) << (52 - _MANTISSA_BITS)
    return bits.view(np.float64)


# --- completion heap ------------------------------------------------------------------------------------------
@_compiled
def _push(heap: I64, size: int, key: int) -> None:
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if heap[parent] <= key:
            break
        heap[i] = heap[parent]
        i = parent
    heap[i] = key


@_compiled
def _sift(heap: I64, size: int, i: int, key: int) -> None:
    """Put ``key`` at ``i`` or below, in a heap of ``size``."""
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = key


@_compiled
def _remove(heap: I64, size: int, key: int) -> None:
    """Take one known key out of a heap of ``size``; the heap then has ``size - 1``."""
    i = 0
    while heap[i] != key:
        i += 1
    last = heap[size - 1]
    if i == size - 1:
        return
    if i > 0 and heap[(i - 1) >> 1] > last:
        _push(heap, i, last)  # moves up from i; what is below i stays in order
    else:
        _sift(heap, size - 1, i, last)


# --- waiting queues -------------------------------------------------------------------------------------------
@_compiled
def _to_front(pool: Pool, requests: Requests, replica: int, request: int) -> None:
    ints = pool.ints[replica]
    queue = HEAD0 + 2 * (requests.klass[request] if pool.config[PRIORITY] == 1 else 0)
    requests.following[request] = ints[queue]
    ints[queue] = request
    if ints[queue + 1] < 0:
        ints[queue + 1] = request
    ints[WAITING] += 1
    ints[WAITING_TOKENS] += requests.prompt[request] + requests.generated[request] - requests.cached[request]


@_compiled
def inject(pool: Pool, requests: Requests, replica: int, request: int, now: float) -> None:
    """Hand a request to a replica at ``now`` (ms). First :func:`advance` the replica up to ``now``."""
    ints = pool.ints[replica]
    reals = pool.reals[replica]
    if ints[IN_FLIGHT] == 0 and reals[CLOCK] < now:
        reals[CLOCK] = now
    queue = HEAD0 + 2 * (requests.klass[request] if pool.config[PRIORITY] == 1 else 0)
    requests.following[request] = -1
    if ints[queue + 1] >= 0:
        requests.following[ints[queue + 1]] = request
    else:
        ints[queue] = request
    ints[queue + 1] = request
    ints[WAITING] += 1
    ints[INJECTED] += 1
    ints[WAITING_TOKENS] += requests.prompt[request] + requests.generated[request] - requests.cached[request]


@_compiled
def reset(pool: Pool, replica: int, now: float) -> None:
    """Make a replica empty and idle at ``now`` (ms)."""
    ints = pool.ints[replica]
    ints[:] = 0
    ints[PARTIAL_SLOT] = -1
    ints[HEAD0] = ints[TAIL0] = ints[HEAD1] = ints[TAIL1] = -1
    ints[BLOCKS_FREE] = pool.config[BLOCKS]
    slots = pool.config[MAX_SEQS]
    ints[FREE_SLOTS] = slots
    for i in range(slots):
        pool.slot_free[replica, i] = slots - 1 - i
    pool.phase[replica, :] = 0
    pool.itl[replica, :] = 0
    pool.reals[replica, :] = 0.0
    pool.reals[replica, CLOCK] = now


# --- one engine step ------------------------------------------------------------------------------------------
@_compiled
def _release(pool: Pool, replica: int, slot: int) -> None:
    ints = pool.ints[replica]
    pool.slot_free[replica, ints[FREE_SLOTS]] = slot
    ints[FREE_SLOTS] += 1
    ints[RUNNING] -= 1


@_compiled
def _blocks(tokens: float, block: int) -> int:
    return math.ceil(tokens / block)


@_compiled
def _leave_decoding(pool: Pool, requests: Requests, replica: int, slot: int) -> None:
    """Take a sequence out of the decoding batch and free its KV blocks."""
    ints = pool.ints[replica]
    reals = pool.reals[replica]
    request = pool.slot_request[replica, slot]
    done = ints[STEPS] - pool.slot_start[replica, slot]
    rate = _growth(requests, request)
    length = pool.slot_length[replica, slot] + done * rate
    block = pool.config[BLOCK]
    if pool.config[RESERVE] == 1:
        ints[BLOCKS_FREE] += pool.slot_blocks[replica, slot]
    else:
        ints[BLOCKS_FREE] += _blocks(length, block)
        phase = (int(pool.slot_length[replica, slot]) - pool.slot_start[replica, slot]) % block
        pool.phase[replica, phase] -= 1
    ints[DECODING] -= 1
    if ints[DECODING] == 0:
        reals[KV] = 0.0  # no rounding is carried over under speculation
        reals[GROWTH] = 0.0
    else:
        reals[KV] -= length
        reals[GROWTH] -= rate


@_inlined
def _growth(requests: Requests, request: int) -> float:
    """KV tokens a sequence gains per decode step: 1, or more under speculation."""
    steps = requests.steps[request]
    if steps == requests.output[request] - 1:
        return 1.0
    return float((requests.output[request] - 1) / steps)


@_compiled
def _preempt_one(pool: Pool, requests: Requests, replica: int) -> None:
    """Preempt one sequence as vLLM does; its KV is dropped and computed again later.

    First come, first served: the sequence admitted last. Priority: the lowest class, latest arrival.
    """
    ints = pool.ints[replica]
    victim = -1
    priority = pool.config[PRIORITY] == 1
    partial = ints[PARTIAL_SLOT]
    if partial >= 0 and not priority:
        victim = partial
    else:
        best_class = -1
        best = -1.0
        best_order = -1
        for i in range(ints[DECODING] + (1 if partial >= 0 else 0)):
            slot = partial if i == ints[DECODING] else pool.heap[replica, i] & 0xFFFF
            request = pool.slot_request[replica, slot]
            order = pool.slot_order[replica, slot]
            if priority:
                klass = requests.klass[request]
                key = requests.arrival[request]
            else:
                klass = 0
                key = 0.0
            if klass > best_class or (
                klass == best_class and (key > best or (key == best and order > best_order))
            ):
                best_class = klass
                best = key
                best_order = order
                victim = slot
    request = pool.slot_request[replica, victim]
    if victim == partial:
        ints[BLOCKS_FREE] += _blocks(pool.slot_length[replica, victim], pool.config[BLOCK])
        ints[PARTIAL_SLOT] = -1
        ints[WAITING_TOKENS] -= ints[PARTIAL_LEFT]
    else:
        done = ints[STEPS] - pool.slot_start[replica, victim]
        key = ((pool.slot_start[replica, victim] + pool.slot_steps[replica, victim]) << 16) | victim
        _remove(pool.heap[replica], ints[DECODING], key)
        _leave_decoding(pool, requests, replica, victim)
        requests.generated[request] += 1 + done
    requests.preempted[request] += 1
    ints[PREEMPTIONS] += 1
    _release(pool, replica, victim)
    _to_front(pool, requests, replica, request)


@_compiled
def _admit_one(pool: Pool, requests: Requests, replica: int, budget: int) -> tuple[int, float]:
    """Admit the head of the waiting queue if it fits; returns its (chunk, attention pairs), or (0, 0)."""
    ints = pool.ints[replica]
    config = pool.config
    queue = HEAD0 if ints[HEAD0] >= 0 else HEAD1
    request = ints[queue]
    block = config[BLOCK]
    length = requests.prompt[request] + requests.generated[request]
    if config[RESERVE] == 1:
        # The whole answer, and the draft tokens beside it.
        need = _blocks(requests.prompt[request] + requests.output[request] + config[SPECULATED], block)
    else:
        # The whole prompt must fit (vLLM: --scheduler-reserve-full-isl, on by default).
        need = _blocks(length, block)
    if need > ints[BLOCKS_FREE]:
        return 0, 0.0
    ints[BLOCKS_FREE] -= need
    ints[queue] = requests.following[request]
    if ints[queue] < 0:
        ints[queue + 1] = -1
    ints[WAITING] -= 1
    ints[FREE_SLOTS] -= 1
    slot = pool.slot_free[replica, ints[FREE_SLOTS]]
    ints[RUNNING] += 1
    pool.slot_request[replica, slot] = request
    pool.slot_order[replica, slot] = ints[ORDER]
    ints[ORDER] += 1
    pool.slot_length[replica, slot] = length
    pool.slot_blocks[replica, slot] = need
    past = requests.cached[request]
    new = length - past
    chunk = min(new, budget)
    if math.isnan(requests.scheduled[request]):
        requests.scheduled[request] = pool.reals[replica, CLOCK]
    ints[PROMPT_TOKENS] += chunk
    ints[WAITING_TOKENS] -= chunk
    if chunk == new:
        pool.prefilled[replica, ints[PREFILLED]] = slot
        ints[PREFILLED] += 1
    else:
        ints[PARTIAL_SLOT] = slot
        ints[PARTIAL_LEFT] = new - chunk
        ints[PARTIAL_PAST] = past + chunk
    return chunk, chunk * (past + 0.5 * chunk)


@_compiled
def _schedule(pool: Pool, requests: Requests, replica: int) -> None:
    """Compose the next step and start it; afterwards IN_FLIGHT is 1 and END is set."""
    ints = pool.ints[replica]
    reals = pool.reals[replica]
    config = pool.config
    table = pool.table
    block = config[BLOCK]
    preempted = False
    # 1. Every decoding sequence gets its token; new blocks for those that cross a block edge.
    if ints[DECODING] > 0 and config[RESERVE] == 0:
        while True:
            need = pool.phase[replica, (-ints[STEPS]) % block]
            if need <= ints[BLOCKS_FREE]:
                break
            _preempt_one(pool, requests, replica)
            preempted = True
        ints[BLOCKS_FREE] -= need
    decoding = ints[DECODING]
    reals[KV] += reals[GROWTH]
    ints[PREFILLED] = 0
    prompt = 0
    pairs = 0.0
    budget = config[BUDGET] - decoding * (1 + config[SPECULATED])
    # 2. The prompt that an earlier step began.
    if ints[PARTIAL_SLOT] >= 0 and budget > 0:
        chunk = min(ints[PARTIAL_LEFT], budget)
        prompt = chunk
        pairs = chunk * (ints[PARTIAL_PAST] + 0.5 * chunk)
        ints[PARTIAL_LEFT] -= chunk
        ints[PARTIAL_PAST] += chunk
        ints[PROMPT_TOKENS] += chunk
        ints[WAITING_TOKENS] -= chunk
        if ints[PARTIAL_LEFT] == 0:
            pool.prefilled[replica, 0] = ints[PARTIAL_SLOT]
            ints[PREFILLED] = 1
            ints[PARTIAL_SLOT] = -1
        budget -= chunk
    # 3. New ones, in the order of the queue. Static batching admits only into an empty batch, and all at once.
    static = config[STATIC] == 1
    # Composed while the step before it ran, a step knows only who had arrived by that one's start.
    late = 0
    if config[ASYNC] == 1 and ints[RUNNING] > 0:
        late = max(ints[WAITING] - ints[ELIGIBLE], 0)
    if not preempted and not (static and ints[RUNNING] > 0):
        if static:
            budget = 1 << 62
        while budget > 0 and ints[WAITING] > late and ints[RUNNING] < config[MAX_SEQS]:
            chunk, more = _admit_one(pool, requests, replica, budget)
            if chunk == 0:
                break
            prompt += chunk
            pairs += more
            budget -= chunk
    ints[ELIGIBLE] = ints[WAITING]
    time = step_time(table, float(prompt), pairs, decoding, reals[KV])
    reals[END] = reals[CLOCK] + time
    reals[BUSY_MS] += time
    reals[BATCH_MS] += time * decoding
    reals[BLOCKS_MS] += time * (config[BLOCKS] - ints[BLOCKS_FREE])
    if decoding > 0:
        pool.itl[replica, itl_bin(time)] += decoding - ints[PADDED]
    ints[IN_FLIGHT] = 1


@_compiled
def _finish(pool: Pool, requests: Requests, replica: int, request: int) -> None:
    ints = pool.ints[replica]
    requests.last[request] = pool.reals[replica, CLOCK]
    pool.finished[replica, ints[JUST_FINISHED]] = request
    ints[JUST_FINISHED] += 1
    ints[FINISHED] += 1
    ints[OUTPUT_TOKENS] += requests.output[request]


@_compiled
def _complete(pool: Pool, requests: Requests, replica: int) -> None:
    """End the step in flight: first tokens, completions."""
    ints = pool.ints[replica]
    reals = pool.reals[replica]
    ints[IN_FLIGHT] = 0
    reals[CLOCK] = reals[END]
    ints[STEPS] += 1
    ints[JUST_FINISHED] = 0
    heap = pool.heap[replica]
    static = pool.config[STATIC] == 1
    # Completions of decoding sequences.
    size = ints[DECODING] - ints[PADDED] if static else ints[DECODING]
    while size > 0 and (heap[0] >> 16) == ints[STEPS]:
        slot = heap[0] & 0xFFFF
        size -= 1
        if size > 0:
            _sift(heap, size, 0, heap[size])
        _finish(pool, requests, replica, pool.slot_request[replica, slot])
        if static:
            # The slot goes on computing padding until the whole batch is done.
            ints[PADDED] += 1
            pool.slot_free[replica, ints[FREE_SLOTS]] = slot
            ints[FREE_SLOTS] += 1
            ints[BLOCKS_FREE] += pool.slot_blocks[replica, slot]
            if size == 0:
                ints[RUNNING] -= ints[DECODING]
                ints[DECODING] = 0
                ints[PADDED] = 0
                reals[KV] = 0.0
                reals[GROWTH] = 0.0
        else:
            _leave_decoding(pool, requests, replica, slot)
            _release(pool, replica, slot)
    # Prompts that are complete give their first token (or, after a preemption, their next one).
    for i in range(ints[PREFILLED]):
        slot = pool.prefilled[replica, i]
        request = pool.slot_request[replica, slot]
        if math.isnan(requests.first[request]):
            requests.first[request] = reals[CLOCK]
        steps = requests.steps[request] - requests.generated[request]
        if steps <= 0:
            _finish(pool, requests, replica, request)
            if pool.config[RESERVE] == 1:
                ints[BLOCKS_FREE] += pool.slot_blocks[replica, slot]
            else:
                ints[BLOCKS_FREE] += _blocks(pool.slot_length[replica, slot], pool.config[BLOCK])
            _release(pool, replica, slot)
            continue
        pool.slot_start[replica, slot] = ints[STEPS]
        pool.slot_steps[replica, slot] = steps
        _push(heap, ints[DECODING] - ints[PADDED], ((ints[STEPS] + steps) << 16) | slot)
        ints[DECODING] += 1
        reals[KV] += pool.slot_length[replica, slot]
        reals[GROWTH] += _growth(requests, request)
        if pool.config[RESERVE] == 0:
            block = pool.config[BLOCK]
            pool.phase[replica, (int(pool.slot_length[replica, slot]) - ints[STEPS]) % block] += 1
    ints[PREFILLED] = 0


@_compiled
def _coast(pool: Pool, replica: int, until: float) -> None:
    """Run pure decode steps of a constant batch until something can change; leaves a step in flight.

    Called with a pure decode step in flight and nothing that could be admitted before the next completion.
    """
    ints = pool.ints[replica]
    reals = pool.reals[replica]
    table = pool.table
    decoding = ints[DECODING]
    answering = decoding - ints[PADDED]
    steps = ints[STEPS]
    last = (pool.heap[replica, 0] >> 16) - 1  # the step in flight may be completed here up to this number
    end = reals[END]
    if end >= until or steps >= last:
        return
    row = table.decode[decoding]
    slope = table.slope[decoding]
    knots = table.context
    top = knots.shape[0] - 2
    kv = reals[KV]
    growth = reals[GROWTH]
    free = ints[BLOCKS_FREE]
    used = pool.config[BLOCKS] - free
    reserve = pool.config[RESERVE] == 1
    block = pool.config[BLOCK]
    phase = pool.phase[replica]
    itl = pool.itl[replica]
    segment = _search(knots, kv / decoding)
    phase_now = (-(steps + 1)) % block
    busy = 0.0
    blocks_ms = 0.0
    while end < until and steps < last:
        if not reserve:
            need = phase[phase_now]
            if need > free:
                break
            free -= need
            used += need
            phase_now = block - 1 if phase_now == 0 else phase_now - 1
        steps += 1
        kv += growth
        mean = kv / decoding
        while segment < top and mean >= knots[segment + 1]:
            segment += 1
        time = row[segment] + (mean - knots[segment]) * slope[segment]
        reals[CLOCK] = end
        end += time
        busy += time
        blocks_ms += time * used
        itl[itl_bin(time)] += answering
    if steps > ints[STEPS]:
        ints[ELIGIBLE] = ints[WAITING]
    ints[STEPS] = steps
    ints[BLOCKS_FREE] = free
    reals[KV] = kv
    reals[END] = end
    reals[BUSY_MS] += busy
    reals[BATCH_MS] += busy * decoding
    reals[BLOCKS_MS] += blocks_ms


@_compiled
def advance(pool: Pool, requests: Requests, replica: int, until: float, stop_at_finish: bool) -> bool:
    """Let a replica run up to ``until`` (ms).

    Every step that ends by then is completed; a step that would begin at ``until`` itself is not begun, so that
    requests that arrive at that instant can still be injected and take part in it.

    Args:
        pool: The pool.
        requests: The requests of the run.
        replica: Row of the replica.
        until: Time to stop at, ms; infinity to run until it is empty.
        stop_at_finish: Return as soon as a step finishes a request; its ids are in ``Pool.finished``,
            ``JUST_FINISHED`` of them.

    Returns:
        Whether it stopped because a request finished.
    """
    ints = pool.ints[replica]
    reals = pool.reals[replica]
    config = pool.config
    while True:
        if ints[IN_FLIGHT] == 0:
            if (ints[RUNNING] == 0 and ints[WAITING] == 0) or reals[CLOCK] >= until:
                return False
            _schedule(pool, requests, replica)
        if (
            ints[PREFILLED] == 0
            and ints[PARTIAL_SLOT] < 0
            and ints[DECODING] > 0
            # A step that preempted admits nobody; the next one may.
            and (
                ints[WAITING] == 0
                or ints[RUNNING] == config[MAX_SEQS]
                or not _head_fits(pool, requests, replica)
            )
        ):
            _coast(pool, replica, until)
        if reals[END] > until:
            return False
        _complete(pool, requests, replica)
        if stop_at_finish and ints[JUST_FINISHED] > 0:
            return True


@_compiled
def _head_fits(pool: Pool, requests: Requests, replica: int) -> bool:
    """Whether the next waiting request would be admitted now. While only decoding goes on, 'no' stays 'no'."""
    ints = pool.ints[replica]
    config = pool.config
    if config[STATIC] == 1 or config[BUDGET] <= ints[DECODING] * (1 + config[SPECULATED]):
        return False
    request = ints[HEAD0] if ints[HEAD0] >= 0 else ints[HEAD1]
    if config[RESERVE] == 1:
        need = _blocks(
            requests.prompt[request] + requests.output[request] + config[SPECULATED], config[BLOCK]
        )
    else:
        need = _blocks(requests.prompt[request] + requests.generated[request], config[BLOCK])
    return bool(need <= ints[BLOCKS_FREE])


# --- drivers --------------------------------------------------------------------------------------------------
@_compiled
def run_open(pool: Pool, requests: Requests, delay: float, least_loaded: bool) -> None:
    """Open loop: requests arrive when they arrive (rows ascending in time) and are routed to the replicas.

    Args:
        pool: The pool.
        requests: The requests.
        delay: Time from a request's arrival at the front end to the scheduler, ms.
        least_loaded: Route to the replica with the fewest unanswered requests instead of round robin.
    """
    replicas = pool.ints.shape[0]
    for request in range(requests.arrival.shape[0]):
        now = requests.arrival[request] + delay
        chosen = request % replicas
        if least_loaded:
            lowest = 1 << 62
            for step in range(replicas):
                # Ties go round robin, as a router's would.
                replica = (request + step) % replicas
                advance(pool, requests, replica, now, stop_at_finish=False)
                load = pool.ints[replica, INJECTED] - pool.ints[replica, FINISHED]
                if load < lowest:
                    lowest = load
                    chosen = replica
        else:
            advance(pool, requests, chosen, now, stop_at_finish=False)
        inject(pool, requests, chosen, request, now)
    for replica in range(replicas):
        advance(pool, requests, replica, np.inf, stop_at_finish=False)


@_compiled
def run_closed(pool: Pool, requests: Requests, delay: float, concurrency: int) -> None:
    """Closed loop on replica 0: ``concurrency`` clients, each sends its next request when one is answered.

    Args:
        pool: The pool.
        requests: The requests, in the order they are sent; their arrival times are written.
        delay: Time from a request's arrival at the front end to the scheduler, ms.
        concurrency: Clients.
    """
    total = requests.arrival.shape[0]
    sent = min(concurrency, total)
    for request in range(sent):
        requests.arrival[request] = 0.0
    injected = 0
    while True:
        until = requests.arrival[injected] + delay if injected < sent else np.inf
        if advance(pool, requests, 0, until, stop_at_finish=True):
            now = pool.reals[0, CLOCK]
            for _ in range(pool.ints[0, JUST_FINISHED]):
                if sent < total:
                    requests.arrival[sent] = now
                    sent += 1
        elif injected < sent:
            inject(pool, requests, 0, injected, until)
            injected += 1
        else:
            break
