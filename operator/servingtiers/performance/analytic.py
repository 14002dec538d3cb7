"""The fast path: latencies of an engine under Poisson load from closed forms, for the control loop.

The event simulation (:mod:`servingtiers.performance.engine_sim`) plays requests through the scheduler; this
module computes the same distributions in about a tenth of a millisecond, in pure Python, for the operator to
call on every pass. A benchmark holds the two together. Three models are stacked:

**Batch.** A decoding sequence gains a token each step, and a step takes ``τ(b)`` with ``b`` of them, so the
engine shares itself among them. Processor sharing is insensitive to the distribution of output lengths
(Baskett, Chandy, Muntz and Palacios, JACM 22(2), 1975): the number decoding has the product form ``P(b) ∝
Π_{i≤b} λ·D·τ(i)/i``, with arrival rate ``λ`` and ``D`` decode steps a request. Where ``τ`` is linear this is
a negative binomial with mean ``a + g/(1-g)``, where ``a = λ·D·τ(a)`` is the fixed point and ``g = λ·D·τ'(a)``
its slope. By Little's law TPOT is that mean over ``λ·D``.

**Steps.** Requests that arrive during a step are computed together in a later one. The number of prompts in a
step is a Markov chain: Poisson with mean ``λ`` times the length of the step they arrived in. Its stationary
distribution gives the mean time ``Δ`` a prompt adds to decode steps ``d(b)``, and hence ``τ(b) = d(b) / (1 -
λ·Δ)``. A request decodes right after the step of its own prompt, in which others arrived, so it meets more
prompts than the average step does; that surplus is added.

**First token.** An arrival sees the rest of the step under way (longer steps are met more often), under
asynchronous scheduling the step composed before it came, then the step that computes its own prompt together
with the others that came when it did. The distribution of the sum is computed on a grid. Where the batch is
limited, some requests wait for a slot instead: the product form has a geometric tail beyond the limit
(Erlang's delay system), and the conditional wait is exponential, scaled for service times that vary less than
exponential ones (Cosmetatos, Operational Research Quarterly 27(3), 1976; Page, JORS 33(5), 1982).

What it does not know: bursts beyond Poisson, preemption, priorities. The KV cache is a limit on the batch, at
its mean context.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from math import ceil, erf, exp, log, sqrt
from operator import mul
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from servingtiers.performance.latency import Percentiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servingtiers.performance.steps import StepGrid, StepModel

__all__ = [
    "EngineLimits",
    "Objective",
    "Prediction",
    "SizedRate",
    "Traffic",
    "max_rate",
    "predict",
    "predict_disaggregated",
]


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What bounds a step of one engine; the names are vLLM's."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    async_scheduling: bool = True
    """Whether a step is composed while the one before it runs (vLLM's default since 0.14)."""

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < 1:
            raise ValueError("max-num-seqs and max-num-batched-tokens must be at least 1")


@dataclass(frozen=True, slots=True)
class Traffic:
    """Poisson traffic of one engine."""

    rate: float
    """Requests per second."""
    prompt_tokens: float
    """Mean."""
    output_tokens: float
    """Mean, at least 1."""
    prompt_cv: float = 0.0
    """Coefficient of variation of the prompt lengths, taken as log-normal."""
    output_cv: float = 0.0
    prefix_hit_rate: float = 0.0
    """Share of each prompt's tokens found in the prefix cache, 0-1."""

    def __post_init__(self) -> None:
        if not 0.0 < self.rate < float("inf"):
            raise ValueError(f"rate {self.rate:g}: use a number of requests per second above 0")
        if not (1.0 <= self.prompt_tokens < float("inf") and 1.0 <= self.output_tokens < float("inf")):
            raise ValueError(
                f"{self.prompt_tokens:g} prompt and {self.output_tokens:g} output tokens: use 1 or more"
            )
        if not (0.0 <= self.prompt_cv <= 10.0 and 0.0 <= self.output_cv <= 10.0):
            raise ValueError(f"length CV {self.prompt_cv:g} and {self.output_cv:g}: use 0 (all alike) to 10")
        if not 0.0 <= self.prefix_hit_rate <= 1.0:
            raise ValueError(f"prefix hit rate {self.prefix_hit_rate:g}: use a share from 0 to 1")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Latencies and load of one engine."""

    ttft: Percentiles
    """Time to first token, ms."""
    tpot: Percentiles
    """Time per output token of a request, ms."""
    e2e: Percentiles
    """End to end, ms."""
    prefill_ms: float
    """Mean time from being scheduled to the first token (vLLM's request_prefill_time)."""
    mean_batch: float
    """Sequences decoding, averaged over time."""
    kv_use: float
    """Share of the KV cache in use, 0-1."""
    utilisation: float
    """Load as a share of what the engine sustains, 0-1; above 1 the queue grows without bound."""
    wait_probability: float
    """Probability that a request waits for a slot of the batch."""
    saturated: bool
    """The queue grows without bound, or the KV cache is full: the latencies are lower bounds only."""
    binding: str
    """What limits the engine first: ``compute``, ``max_num_seqs`` or ``kv_cache``."""


_BINS = 40
"""Bins of the grid on which latency distributions are added up."""


class _Engine:
    """One engine under one mix of lengths: everything that does not depend on the rate.

    Times in ms, rates in requests/ms.
    """

    __slots__ = (
        "bare",
        "batches",
        "budget",
        "context",
        "cv",
        "decode",
        "pair_ms",
        "pairs",
        "prompt",
        "query",
        "service_cv",
        "steps",
        "token_axis",
        "token_ms",
    )

    def __init__(self, grid: StepGrid, limits: EngineLimits, traffic: Traffic) -> None:
        cached = min(traffic.prompt_tokens * traffic.prefix_hit_rate, traffic.prompt_tokens - 1.0)
        self.prompt = traffic.prompt_tokens - cached
        self.cv = traffic.prompt_cv
        spread = 1.0 + traffic.prompt_cv * traffic.prompt_cv
        self.pairs = self.prompt * (cached + self.prompt / 2.0)
        decoded = max(traffic.output_tokens - 1.0, 0.0)
        self.steps = decoded / grid.tokens_per_step
        # A sequence met at a random instant is met in proportion to its length (inspection paradox).
        longer = decoded + (traffic.output_cv * traffic.output_tokens) ** 2 / decoded if decoded else 0.0
        self.context = traffic.prompt_tokens + (longer + 1.0) / 2.0
        self.query = grid.query_tokens
        self.service_cv = traffic.output_cv
        self.budget = float(limits.max_num_batched_tokens)
        self.batches = grid.batch_axis
        axis = grid.context_axis
        at = min(bisect_right(axis, self.context) - 1, len(axis) - 2)
        share = (self.context - axis[at]) / (axis[at + 1] - axis[at])
        self.decode = [row[at] + share * (row[at + 1] - row[at]) for row in grid.decode_ms]
        self.bare = [row[0] for row in grid.decode_ms]
        self.token_axis, self.token_ms = grid.token_axis, grid.token_ms
        self.pair_ms = grid.pair_ms
        self.pairs *= spread

    def decode_ms(self, batch: float) -> tuple[float, float]:
        """Return the time of a pure decode step, whole and without attention."""
        batches = self.batches
        if batch <= batches[0]:
            return (self.decode[0], self.bare[0]) if batch > 0.0 else (0.0, 0.0)
        low = bisect_right(batches, batch) - 1
        if low > len(batches) - 2:  # noqa: PLR1730  a call of min() costs more than the rest of the line
            low = len(batches) - 2
        weight = (batch - batches[low]) / (batches[low + 1] - batches[low])
        decode, bare = self.decode, self.bare
        return (
            decode[low] + weight * (decode[low + 1] - decode[low]),
            bare[low] + weight * (bare[low + 1] - bare[low]),
        )

    def burst(
        self, tokens: float, pairs: float, batch: float, decode: float, bare: float
    ) -> tuple[float, int]:
        """Return the time to compute prompt tokens beside a batch, and over how many steps.

        Args:
            tokens: Prompt tokens.
            pairs: (New token, token read) pairs of their attention.
            batch: Sequences decoding.
            decode: Time of a pure decode step of that batch, ms.
            bare: The same without its attention, ms.
        """
        axis, values = self.token_axis, self.token_ms
        fed = self.query * batch
        chunks, extra = 1, self.pair_ms * pairs - bare
        if tokens + fed > self.budget:
            room = max(self.budget - fed, 1.0)
            chunks = ceil(tokens / room)
            tokens -= (chunks - 1) * room
            full = room + fed
            low = min(bisect_right(axis, full) - 1, len(axis) - 2)
            share = (full - axis[low]) / (axis[low + 1] - axis[low])
            extra += (chunks - 1) * (values[low] + share * (values[low + 1] - values[low]) - bare)
        tokens += fed
        if tokens > axis[0]:
            low = bisect_right(axis, tokens) - 1
            if low > len(axis) - 2:  # noqa: PLR1730  a call of min() costs more than the rest of the line
                low = len(axis) - 2
            share = (tokens - axis[low]) / (axis[low + 1] - axis[low])
            extra += values[low] + share * (values[low + 1] - values[low])
        else:
            extra += values[0]
        return (chunks * decode + extra if extra > 0.0 else chunks * decode), chunks


class _Steps(NamedTuple):
    """Stationary distribution of the steps of an engine with a constant batch."""

    nodes: list[tuple[float, float, int, int]]
    """(probability, length in ms, prompts, steps it is made of)."""
    mean: float
    """Mean length of a step, ms."""
    prompt_ms: float
    """What a prompt adds to decode steps, ms: Δ."""
    lone_ms: float
    """What a prompt of mean size adds when it is alone, ms."""
    next_ms: float
    """What each further prompt adds to a step that has one, ms."""
    surplus_ms: float
    """Time beyond the stationary that a request's decode steps take together, because they follow the step of
    its own prompt, in which others arrived."""


def _steps(engine: _Engine, rate: float, batch: float, decode_steps: float) -> _Steps:
    """Return the distribution of step lengths at a constant batch.

    The state is the number of prompts computed together; lengths within a state have a few values where
    prompt lengths are spread. Prompts beyond the token budget of one step take several, counted as one long
    step.
    """
    decode, bare = engine.decode_ms(batch)
    prompt, pairs = engine.prompt, engine.pairs
    first, chunks = engine.burst(prompt, pairs, batch, decode, bare)
    # What a further prompt adds: over as many as arrive in a step, because the token curve has steep places.
    others = max(rate * decode, 1.0)
    crowd, _ = engine.burst((1.0 + others) * prompt, (1.0 + others) * pairs, batch, decode, bare)
    lone, added = first - chunks * decode, (crowd - first) / others
    busy = min(rate * added, 0.95)
    load = rate * (decode + rate * decode * lone / (1.0 - busy)) if decode else rate * first / (1.0 - busy)
    most = min(int(load / (1.0 - busy) + 3.0 * sqrt(load) / (1.0 - busy) + 1.5), 12)
    nodes: list[list[tuple[float, float, int]]] = [[(1.0, decode, 1)]]
    for count in range(1, most + 1):
        row: list[tuple[float, float, int]] = []
        for size, weight in (
            _sizes(engine.cv, count, _MIDDLE if count == 1 else _ROUGH) if count < 4 else _ALIKE
        ):
            tokens = count * prompt * size
            length, steps = engine.burst(tokens, count * pairs * size * size, batch, decode, bare)
            row.append((weight, length, steps))
        nodes.append(row)
    # Transition: the prompts of the next step arrive during this one.
    matrix: list[list[float]] = []
    for row in nodes:
        chances = [0.0] * (most + 1)
        for weight, length, _ in row:
            mean = rate * length
            chance = weight * exp(-mean)
            for count in range(most):
                chances[count] += chance
                chance *= mean / (count + 1)
        if not decode:  # an engine without a batch idles until the next arrival
            chances[1] += chances[0]
            chances[0] = 0.0
        chances[most] += max(1.0 - sum(chances), 0.0)
        matrix.append(chances)
    state = matrix[min(round(load), most)]
    columns = list(zip(*matrix, strict=True))
    for _ in range(3):
        state = [sum(map(mul, state, column)) for column in columns]
    flat: list[tuple[float, float, int, int]] = []
    time = steps_total = prompts = left = waiting = 0.0
    for count, (chance, row) in enumerate(zip(state, nodes, strict=True)):
        if chance < 1e-6:
            continue
        for weight, length, steps in row:
            p = chance * weight
            flat.append((p, length, count, steps))
            time += p * length
            steps_total += p * steps
            prompts += p * count
            # Prompts waiting when one of these steps ends: those of the burst not yet computed, and arrivals.
            queue = (count * (steps - 1) + rate * length * (steps + 1)) / (2.0 * steps)
            left += p * count * queue
            waiting += p * steps * queue
    mean = time / steps_total
    prompt_ms = (time - steps_total * decode) / prompts if prompts > 0.0 else lone
    surplus = 0.0
    if prompts > 0.0 and decode_steps:
        share = min(rate * prompt_ms, 0.97)
        surplus = prompt_ms / (1.0 - share) * max(left / prompts - waiting / steps_total, 0.0)
        longest = decode_steps * max(first / chunks - mean, 1e-9)
        surplus = longest * (1.0 - exp(-surplus / longest))
    return _Steps(flat, mean, prompt_ms, lone, added, surplus)


@lru_cache(maxsize=512)
def _slices(spread: float, edges: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Return a log-normal of mean 1 as slices: (mean of the slice, its probability)."""
    if spread < 0.02:
        return ((1.0, 1.0),)
    sigma = sqrt(log(1.0 + spread * spread))

    def normal(x: float) -> float:
        return 0.5 * (1.0 + erf(x / sqrt(2.0)))

    slices = []
    for low, high in pairwise(edges):
        probability = normal(high) - normal(low)
        slices.append(((normal(high - sigma) - normal(low - sigma)) / probability, probability))
    return tuple(slices)


# Slices of the normal distribution behind the log-normal: all fine enough in the upper tail for their use.
_FINE = (-9.0, -1.2, -0.4, 0.3, 1.0, 1.6, 2.2, 2.8, 9.0)
_MIDDLE = (-9.0, -0.2, 1.0, 2.0, 9.0)
_ROUGH = (-9.0, 0.7, 1.8, 9.0)


def _sizes(cv: float, count: int, edges: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Return the spread of the mean size of ``count`` prompts, relative to the mean."""
    return _slices(round(cv / sqrt(count), 2), edges) if cv >= 0.02 else _ALIKE


_ALIKE = ((1.0, 1.0),)


class _Batch(NamedTuple):
    """Distribution of the number of sequences decoding."""

    mean: float
    variance: float
    """Of the number of requests in the engine."""
    idle: float
    """Probability that nothing runs."""
    wait_probability: float
    wait_ms: float
    """Mean wait for a slot of those that wait, ms."""


def _guess(engine: _Engine, rate: float, slots: float) -> float:
    """Return the batch at which as many sequences come as go, to a tenth or so, by substitution."""
    work, prompt, pairs = rate * engine.steps, engine.prompt, engine.pairs
    batch = before = value = 0.0
    for turn in range(4):
        decode, bare = engine.decode_ms(max(batch, 1.0))
        length, count = engine.burst(prompt, pairs, batch, decode, bare)
        share = rate * (length - count * decode)
        now = min(work * decode / (1.0 - share if share < 0.95 else 0.05), slots)
        if now - batch < 0.03 * now or now >= slots:
            return now
        slope = (now - value) / (batch - before) if turn else 0.0
        before, value = batch, now
        # Aitken's step, held below the fixed point's far side.
        batch = min(batch + (now - batch) / (1.0 - min(slope, 0.8)), slots)
    return batch


def _lattice() -> tuple[float, ...]:
    """Return batch sizes: every one up to 5, then about a standard deviation of a Poisson batch apart."""
    points = [float(size) for size in range(6)]
    while points[-1] < 20_000.0:
        apart = 0.25 if points[-1] < 30.0 else 0.15
        points.append(float(ceil(points[-1] * (1.0 + apart))))
    return tuple(points)


_LATTICE = _lattice()


def _batch(
    engine: _Engine, rate: float, slots: float, load: float, lone: float, shared: float, surplus: float
) -> _Batch:
    """Sum the product form; see the module's text.

    ``P(b) = P(b-1)·λ·hold(b)/b`` up to the limit, where a request holds its slot for its decode steps and the
    step of its prompt; beyond it a geometric tail with the load as its ratio. Sums over a lattice of sizes
    stand for sums over all of them (Euler and Maclaurin's formula to first order, exact where the lattice has
    every size).

    Args:
        engine: The engine.
        rate: Requests per ms.
        slots: Largest batch.
        load: Share of the largest rate.
        lone: What a lone prompt adds, ms.
        shared: What a prompt adds on average less what a lone one adds (several share a step), ms.
        surplus: Time to add to each decode step, ms.
    """
    steps, prompt, pairs = engine.steps, engine.prompt, engine.pairs
    # Sharing a step saves a share of what prompts cost. It adds where a lone one hides in the slack between a mixed
    # and a decode step; how much slack there is depends on the batch, so what a prompt costs on average is then a
    # floor of what it costs beside each batch, not a term on top of it.
    ratio_shared, floor = 1.0, 0.0
    if shared < 0.0:
        ratio_shared = 1.0 + shared / lone if lone > -shared else 0.0
    else:
        floor = lone + shared
    least = rate * (steps * engine.decode[0])
    start = bisect_right(_LATTICE, min(least, slots) - 4.5 * sqrt(least + 1.0)) - 1
    start = min(max(start, 0), bisect_left(_LATTICE, slots) - 1)
    before = _LATTICE[start]
    # A slot does not wait for its own prompt: beside a full batch, where a prompt enters only as another leaves, those
    # of the others interrupt it.
    own = 1.0 / (slots * slots)
    width_left, level, top, slope = 1.0, 0.0, 0.0, 0.0
    if before > 0.0:
        decode, bare = engine.decode_ms(before)
        length, count = engine.burst(prompt, pairs, before, decode, bare)
        each = (length - count * decode) * ratio_shared
        others = 1.0 - own * before
        share = rate * others * (each if each > floor else floor)  # noqa: FURB136  as above
        busy = steps * (decode / (1.0 - share if share < 0.98 else 0.02) + surplus * others)
        slope = log(rate * (busy + length) / before)
    total = first = second = 0.0
    mass = 1.0
    zero = 1.0 if before == 0.0 else 0.0
    index = start
    decode_share = 1.0
    while True:
        index += 1
        size = _LATTICE[index]
        last = size >= slots
        if last:
            size = slots
        width = size - before
        weight = mass * (width_left + width) / 2.0
        total += weight
        first += weight * before
        second += weight * before * before
        decode, bare = engine.decode_ms(size)
        length, count = engine.burst(prompt, pairs, size, decode, bare)
        each = (length - count * decode) * ratio_shared
        others = 1.0 - own * size
        share = rate * others * (each if each > floor else floor)  # noqa: FURB136  as above
        busy = steps * (decode / (1.0 - share if share < 0.98 else 0.02) + surplus * others)
        hold = busy + length
        decode_share = busy / hold
        next_slope = log(rate * hold / size)
        if before > 0.0:
            level += width * (slope + next_slope) / 2.0 + (next_slope - slope) / 2.0
        else:
            level += next_slope
        slope = next_slope
        if level > top + 60.0:  # rescale, or a steep form would overflow
            factor = exp(top - level)
            total, first, second, zero = total * factor, first * factor, second * factor, zero * factor
            top = level
        mass = exp(level - top)
        before, width_left = size, width
        if last or (next_slope < 0.0 and mass * size < 1e-5 * total):
            break
    ratio = load
    beyond = 0.0
    if not last:
        total += mass * width_left
        first += mass * width_left * before
        second += mass * width_left * before * before
    if last:
        # The limit itself counts for half a lattice step, and all states beyond it hold a full batch.
        below = mass * (width_left - 1.0) / 2.0
        beyond = mass / (1.0 - ratio)
        total += below + beyond
        first += (below + beyond) * slots
        second += (below + beyond) * slots * slots
    mean, waiting = first / total, beyond / total
    variance = max(second / total - mean * mean, 0.0)
    wait = 0.0
    if waiting > 1e-9:
        # Conditional wait: exact for exponential service; Cosmetatos for constant one, Page between the two.
        constant = (1.0 - ratio) * (slots - 1.0) * (sqrt(4.0 + 5.0 * slots) - 2.0) / (16.0 * ratio * slots)
        constant = 0.5 * (1.0 + constant)
        # Of the time in a slot the decode steps vary with the output's length, the prompt's own step with the prompt's.
        spread = (engine.service_cv * decode_share) ** 2 + (engine.cv * (1.0 - decode_share)) ** 2
        spread = min(spread, 4.0)
        scale = spread + (1.0 - spread) * constant if spread < 1.0 else (1.0 + spread) / 2.0
        wait = scale / rate * ratio / (1.0 - ratio)
    return _Batch(mean * decode_share, variance, zero / total, waiting, wait)


def _add(pmf: list[float], at: float, weight: float) -> None:
    """Add a point mass to the grid, shared by the bins on either side so that the mean is kept."""
    if at >= _BINS - 1:
        pmf[_BINS - 1] += weight
        return
    low = int(at)
    share = at - low
    pmf[low] += weight * (1.0 - share)
    pmf[low + 1] += weight * share


_DIGITS = Struct(f"<{_BINS}Q")
_SCALE = float(1 << 24)
_WEIGHT = float(1 << 18)


def _plus(one: Sequence[float], *terms: Sequence[tuple[float, float]]) -> list[float]:
    """Return the distribution of a sum of independent times, the first on the grid, the others few points.

    The grid's probabilities become 64-bit digits of one long integer; a shift of it moves the distribution,
    and a weighted sum of shifted ones is a convolution, at the price of a few long additions (Kronecker
    substitution). Exact to about 2**-17. What falls beyond the grid is put into its last bin.

    Args:
        one: Probabilities of the bins, at most 1 in all.
        terms: Up to two lists of (value in bins, probability), each 1 in all.
    """
    number = int.from_bytes(_DIGITS.pack(*[int(p * _SCALE) for p in one]), "little")
    unit = 1.0 / _SCALE
    for points in terms:
        total = 0
        for at, weight in points:
            low = int(at)
            if low < _BINS:
                share = at - low
                total += number * int(weight * (1.0 - share) * _WEIGHT) << 64 * low
                total += number * int(weight * share * _WEIGHT) << 64 * (low + 1)
        number = total & _MASK
        unit /= _WEIGHT
    result = [digit * unit for digit in _DIGITS.unpack(number.to_bytes(8 * _BINS, "little"))]
    result[-1] += max(sum(one) - sum(result), 0.0)
    return result


_MASK = (1 << 64 * _BINS) - 1


def _merged(points: list[tuple[float, float]], tail: float = 0.3) -> list[tuple[float, float]]:
    """Return (value, weight) points as fewer, ascending, with the same mean, and finer the rarer.

    Neighbours are joined until they hold ``tail`` of the weight that is left above them.
    """
    points.sort()
    if len(points) <= 5:
        return points
    remaining = sum(weight for _, weight in points)
    merged: list[tuple[float, float]] = []
    value = weight = 0.0
    for x, w in points:
        value += x * w
        weight += w
        if weight >= tail * remaining:
            merged.append((value / weight, weight))
            remaining -= weight
            value = weight = 0.0
    if weight > 0.0:
        merged.append((value / weight, weight))
    return merged


def _rest_of_step(
    met: list[tuple[float, float]], rate: float, next_ms: float, cv: float, width: float
) -> list[float]:
    """Return on the grid the rest of the step an arrival meets plus what others that arrive in it add.

    The rest of a step of length ``x`` is uniform on (0, x); the others are Poisson with mean ``λ·x``, each
    adding ``next_ms`` on average. A sum of uniforms is the running sum of its density's steps up and down.

    Args:
        met: (length, probability that an arrival meets it).
        rate: Requests per ms.
        next_ms: What each other prompt adds.
        cv: Spread of the prompts.
        width: Width of a bin, ms.
    """
    edges = [0.0] * (_BINS + 1)
    last = _BINS - 1.0
    alike = cv < 0.02
    sizes = _ALIKE if alike else _sizes(cv, 1, _ROUGH)
    for x, p in met:
        expected = rate * x
        if expected < 1.0:
            none = exp(-expected)
            one = none * expected
            shifts = [(0.0, p * none)]
            if alike:
                shifts.append((next_ms, p * one))
            else:
                for size, weight in sizes:
                    shifts.append((size * next_ms, p * one * weight))
            more = 1.0 - none - one
            if more > 1e-3:
                mean = (expected - one) / more
                shifts.append((mean * next_ms, p * more))
        else:  # Gauss-Hermite nodes of the compound Poisson sum, kept from falling below nothing
            deviation = min(sqrt(3.0 * (1.0 + cv * cv) / expected), 1.0)
            total = expected * next_ms
            shifts = [
                (total * (1.0 - deviation), p / 6.0),
                (total, p * 2.0 / 3.0),
                (total * (1.0 + deviation), p / 6.0),
            ]
        span = x / width
        for shift, weight in shifts:
            begin = shift / width
            height = weight / span
            if begin < last:
                low = int(begin)
                share = (begin - low) * height
                edges[low] += height - share
                edges[low + 1] += share
            begin += span
            if begin < last:
                low = int(begin)
                share = (begin - low) * height
                edges[low] -= height - share
                edges[low + 1] -= share
    return [p if p > 0.0 else 0.0 for p in accumulate(edges[:_BINS])]  # noqa: FURB136  as above


def _first_token(
    engine: _Engine,
    steps: _Steps,
    batch: _Batch,
    rate: float,
    busy_batch: float,
    *,
    asynchronous: bool,
) -> tuple[float, float, list[float], list[float]]:
    """Return the time to first token: its mean, the mean of its part after being scheduled, its distribution.

    The distribution function is given as ascending times, ms, and probabilities.
    """
    decode, bare = engine.decode_ms(busy_batch)
    prompt, pairs = engine.prompt, engine.pairs
    sizes = _sizes(engine.cv, 1, _FINE)
    own = [(engine.burst(prompt * z, pairs * z * z, busy_batch, decode, bare)[0], w) for z, w in sizes]
    mean_own = sum(x * w for x, w in own)
    # The step met by an arrival: in proportion to its length.
    total = second = each = first_of = 0.0
    for p, x, _, c in steps.nodes:
        total += p * x
        second += p * x * x
        first_of += p * x / c
        each += p
    composed = first_of / total if asynchronous else 0.0
    idle, waits = batch.idle, batch.wait_probability
    mean_rest = second / total * (0.5 + rate * steps.next_ms) + composed * total / each
    mean = waits * (batch.wait_ms + mean_own) + (1.0 - idle - waits) * (mean_rest + mean_own)
    met = _merged([(x, p * x / total) for p, x, _, _ in steps.nodes if x > 0.0], 0.4)
    # The grid: from the shortest own step on, as far as one chance in a thousand of the sum.
    begin = own[0][0]
    average = total / each
    longest = max(x for x, p in met if p > 5e-4)
    crowd = rate * longest
    far = longest + (crowd + 3.0 * sqrt(crowd)) * steps.next_ms - mean_rest + composed * average
    spread = far * far + (own[-1][0] - mean_own) ** 2
    if asynchronous:
        composed_longest = max(x for p, x, _, _ in steps.nodes if p > 5e-4)
        spread += (composed_longest - average) ** 2
    reach = mean_rest + mean_own - begin + 1.1 * sqrt(spread)
    alone: list[tuple[float, float]] = []
    if idle > 1e-4:
        alone = [(engine.burst(prompt * z, pairs * z * z, 0.0, 0.0, 0.0)[0], w) for z, w in sizes]
        mean += idle * sum(x * w for x, w in alone)
        begin = min(begin, alone[0][0])
        reach = max(reach, alone[-1][0] - begin)
    width = reach / (_BINS - 2)
    rest = _rest_of_step(met, rate, steps.next_ms, engine.cv, width)
    norm = (1.0 - idle - waits) / max(sum(rest), 1e-12)
    rest = [p * norm for p in rest]
    # The step composed before the request came, and the step of its own prompt.
    terms = []
    if asynchronous:
        before = [
            (x / width, p * composed / each) for x, p in _merged([(x, p) for p, x, _, _ in steps.nodes], 0.5)
        ]
        before.append((0.0, 1.0 - composed))
        terms.append(before)
    if len(own) > 1 or own[0][0] > begin:
        terms.append([((x - begin) / width, w) for x, w in own])
    if terms:
        rest = _plus(rest, *terms)
    for x, w in alone:
        _add(rest, (x - begin) / width, w * idle)
    # The distribution function at the upper edges of the bins: a bin's mass stands for one about its middle.
    times = [begin + width * (index + 0.5) for index in range(_BINS)]
    below = list(accumulate(rest))
    if waits > 1e-4:
        # A request that waits meets no step under way: it is admitted when another leaves.
        for factor in _BEYOND:
            later = times[-1] + factor * batch.wait_ms
            times.append(later)
            below.append(below[-1])
        wait_ms = batch.wait_ms
        below = [
            p + waits * (1.0 - exp((mean_own - t) / wait_ms)) if t > mean_own else p
            for p, t in zip(below, times, strict=True)
        ]
    scheduled = mean_own + (1.0 - idle - waits) * rate * steps.next_ms * second / total
    return mean, scheduled, times, below


_BEYOND = (0.0, 0.1, 0.25, 0.5, 0.8, 1.2, 1.7, 2.3, 3.0, 4.0, 5.0, 6.5, 8.0)


def _percentiles(mean: float, times: Sequence[float], below: Sequence[float]) -> Percentiles:
    """Read percentiles off a distribution function given at ascending times; linear between them."""
    total = below[-1]

    def at(q: float) -> float:
        index = min(bisect_left(below, q * total), len(below) - 1)
        if not index:
            return times[0]
        before = below[index - 1]
        gained = below[index] - before
        share = (q * total - before) / gained if gained > 0.0 else 1.0
        return times[index - 1] + share * (times[index] - times[index - 1])

    return Percentiles(mean, at(0.5), at(0.9), at(0.95), at(0.99), at(0.999))


def _largest_rate(engine: _Engine, slots: float) -> float:
    """Return the rate at which the batch is always full, requests/ms: what the engine sustains.

    With the batch full, a slot is held for ``D`` decode steps, the step of its own prompt and what the
    prompts of the other slots add meanwhile, one each; ``slots`` requests are served in that time.
    """
    if not engine.steps:
        room = max(engine.budget, 1.0)
        together = max(min(room / engine.prompt, slots), 1.0)
        length, _ = engine.burst(together * engine.prompt, together * engine.pairs, 0.0, 0.0, 0.0)
        return together / length
    decode, bare = engine.decode_ms(slots)
    alone, _ = engine.burst(engine.prompt, engine.pairs, slots, decode, bare)
    together = 1.0
    rate = 0.0
    for _ in range(3):
        length, count = engine.burst(together * engine.prompt, together * engine.pairs, slots, decode, bare)
        added = (length - count * decode) / together
        cycle = engine.steps * decode + alone + (slots - 1.0) * added
        rate = slots / cycle
        # Prompts that share a step when a step takes as long as it does then.
        together = max(rate * decode / max(1.0 - min(rate * added, 0.95), 0.05), 1.0)
    return rate


def _normal_power(mean: float, deviation: float) -> Percentiles:
    """Return the percentiles of a log-normal with this mean and standard deviation."""
    if mean <= 0.0 or deviation <= 1e-9 * mean:
        return Percentiles(mean, mean, mean, mean, mean, mean)
    variance = log(1.0 + (deviation / mean) ** 2)
    sigma, middle = sqrt(variance), mean * exp(-variance / 2.0)
    return Percentiles(mean, middle, *(middle * exp(sigma * z) for z in _NORMAL))


_NORMAL = (1.2815515655446004, 1.6448536269514722, 2.3263478740408408, 3.0902323061678132)
"""Standard normal quantiles at 0.9, 0.95, 0.99 and 0.999."""


def _sum(one: Percentiles, two: Percentiles) -> Percentiles:
    """Return the percentiles of the sum of two independent times.

    Deviations from the mean add as squares, which is exact for normal terms and where one term is constant.
    """
    mean = one.mean + two.mean
    result, floor = [], 0.0
    for a, b in (
        (one.p50, two.p50),
        (one.p90, two.p90),
        (one.p95, two.p95),
        (one.p99, two.p99),
        (one.p999, two.p999),
    ):
        x, y = a - one.mean, b - two.mean
        size = sqrt(x * x + y * y)
        floor = max(floor, mean + size if x + y >= 0.0 else mean - size)
        result.append(floor)
    return Percentiles(mean, *result)


def _per_token(
    engine: _Engine, steps: _Steps, batch: _Batch, rate: float, output_tokens: float
) -> tuple[Percentiles, Percentiles]:
    """Return time per output token of a request, and the time from its first to its last token, ms.

    A request's mean varies with the prompts computed while it decodes (a compound Poisson sum, each prompt
    lengthening the window in which the next may come) and with the batch, averaged over its stay: the
    autocovariance of the number in an M/D/∞ system falls linearly over a stay, which leaves two thirds of its
    variance.
    """
    step = batch.mean / (rate * engine.steps)
    share = min(rate * steps.prompt_ms, 0.9)
    window = step * engine.steps
    spread = 1.0 + engine.cv * engine.cv
    prompts = rate * window * steps.prompt_ms**2 * spread / (1.0 - share) ** 2
    decode = engine.decode_ms(batch.mean)[0]
    slope = (engine.decode_ms(batch.mean + 1.0)[0] - decode) / (1.0 - share) if batch.mean >= 1.0 else 0.0
    fluctuation = 2.0 / 3.0 * batch.variance * slope * slope
    deviation = sqrt(prompts / engine.steps**2 + fluctuation) * engine.steps / max(output_tokens - 1.0, 1.0)
    mean = window / max(output_tokens - 1.0, 1.0)
    per_token = _normal_power(mean, deviation)
    cv = engine.service_cv * output_tokens / max(output_tokens - 1.0, 1.0)
    relative = deviation / mean
    whole = _normal_power(window, window * sqrt(relative * relative * (1.0 + cv * cv) + cv * cv))
    return per_token, whole


_NOTHING = Percentiles(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def predict(model: StepModel, traffic: Traffic, limits: EngineLimits | None = None) -> Prediction:
    """Return the latencies of one engine under Poisson traffic.

    Args:
        model: The step model of the engine.
        traffic: What arrives at this one engine. With 1 output token it is a prefill engine.
        limits: The engine's limits; vLLM's defaults where left out.
    """
    limits = limits or _DEFAULT_LIMITS
    engine = _Engine(model.grid, limits, traffic)
    rate = traffic.rate / 1e3
    decode_steps = engine.steps
    room = model.kv_capacity_tokens / engine.context
    slots = float(limits.max_num_seqs)
    binding = "max_num_seqs"
    if room < slots:
        slots, binding = max(room, 1.0), "kv_cache"
    largest = _largest_rate(engine, slots)
    load = rate / largest
    rate = min(rate, _NEARLY_FULL * largest)
    if decode_steps:
        busy = max(_guess(engine, rate, slots), 1.0)
        for _ in range(3):
            steps = _steps(engine, rate, busy, decode_steps)
            lone = steps.lone_ms
            batch = _batch(
                engine,
                rate,
                slots,
                min(load, _NEARLY_FULL),
                lone,
                steps.prompt_ms - lone,
                steps.surplus_ms / decode_steps,
            )
            before = busy
            busy = min(max(batch.mean / max(1.0 - batch.idle, 1e-3), 1.0), slots)
            if abs(busy - before) <= 0.15 * busy + 1.0:
                break
        if rate * steps.prompt_ms > 0.5:
            binding = "compute"
        mean, scheduled, times, below = _first_token(
            engine, steps, batch, rate, busy, asynchronous=limits.async_scheduling
        )
        ttft = _percentiles(mean, times, below)
        tpot, decoding = _per_token(engine, steps, batch, rate, traffic.output_tokens)
    else:
        binding = "compute"
        steps = _steps(engine, rate, 0.0, 0.0)
        # A cycle is a step with prompts and, where none arrived in it, the wait for the next one.
        empty = sum(p * exp(-rate * x) for p, x, _, _ in steps.nodes)
        working = sum(p * x for p, x, _, _ in steps.nodes)
        idle = empty / (empty + rate * working)
        batch = _Batch(0.0, 0.0, idle, 0.0, 0.0)
        # Nothing stays in the engine from one step to the next, so none is composed ahead.
        mean, scheduled, times, below = _first_token(engine, steps, batch, rate, 0.0, asynchronous=False)
        ttft = _percentiles(mean, times, below)
        tpot = decoding = _NOTHING
    return Prediction(
        ttft=ttft,
        tpot=tpot,
        e2e=_sum(ttft, decoding),
        prefill_ms=scheduled,
        mean_batch=batch.mean,
        kv_use=min(batch.mean / room, 1.0),
        utilisation=load,
        wait_probability=batch.wait_probability,
        saturated=load >= 1.0,
        binding=binding,
    )


_DEFAULT_LIMITS = EngineLimits()
_NEARLY_FULL = 0.995
"""Share of the largest rate beyond which latencies are not resolved: they only say 'at least'."""


def predict_disaggregated(
    prefill: StepModel,
    decode: StepModel,
    traffic: Traffic,
    *,
    transfer_ms: float,
    prefill_replicas: int = 1,
    decode_replicas: int = 1,
    prefill_limits: EngineLimits | None = None,
    decode_limits: EngineLimits | None = None,
) -> Prediction:
    """Return the latencies of separate prefill and decode engines.

    As vLLM's connectors do it: a prefill engine computes the prompt and stops after one token, the KV cache
    moves to a decode engine, which computes the last prompt token again and goes on; the client's first token
    is the decode engine's. Splitting phases is DistServe's (OSDI '24) and Splitwise's (ISCA '24).

    Args:
        prefill: Step model of a prefill engine.
        decode: Step model of a decode engine.
        traffic: What arrives at the whole pool.
        transfer_ms: Mean time to move a prompt's KV cache: bytes over the link, and whatever precedes it.
        prefill_replicas: Prefill engines.
        decode_replicas: Decode engines.
        prefill_limits: Their limits.
        decode_limits: Their limits.

    Returns:
        Time to first token from arrival to the decode engine's first; the batch and KV use are the decode
        engines', the utilisation that of the pool nearer its limit.
    """
    first = predict(
        prefill,
        replace(traffic, rate=traffic.rate / prefill_replicas, output_tokens=1.0, output_cv=0.0),
        prefill_limits,
    )
    second = predict(
        decode,
        replace(
            traffic,
            rate=traffic.rate / decode_replicas,
            prompt_cv=0.0,
            prefix_hit_rate=1.0,
        ),
        decode_limits,
    )
    moved = first.ttft
    shifted = Percentiles(
        moved.mean + transfer_ms,
        moved.p50 + transfer_ms,
        moved.p90 + transfer_ms,
        moved.p95 + transfer_ms,
        moved.p99 + transfer_ms,
        moved.p999 + transfer_ms,
    )
    prefill_binds = first.utilisation >= second.utilisation
    return replace(
        second,
        ttft=_sum(shifted, second.ttft),
        e2e=_sum(shifted, second.e2e),
        utilisation=max(first.utilisation, second.utilisation),
        saturated=first.saturated or second.saturated,
        binding=f"prefill {first.binding}" if prefill_binds else f"decode {second.binding}",
    )


@dataclass(frozen=True, slots=True)
class Objective:
    """A latency that must hold."""

    metric: str
    """``ttft``, ``tpot`` or ``e2e``."""
    percentile: str
    """``mean``, ``p50``, ``p90``, ``p95``, ``p99`` or ``p999``."""
    target_ms: float

    def __post_init__(self) -> None:
        if self.metric not in {"ttft", "tpot", "e2e"}:
            raise ValueError(f"unknown metric {self.metric!r}: use ttft, tpot or e2e")
        _NOTHING.at(self.percentile)
        if not self.target_ms > 0.0:
            raise ValueError(f"target {self.target_ms:g} ms must be above 0")

    def expected_ms(self, prediction: Prediction, tail_margin: float) -> float:
        """Return what is predicted of the metric, ms, with the margin on the tail of the first token."""
        ttft = prediction.ttft.at(self.percentile)
        extra = (tail_margin - 1.0) * ttft if self.percentile in {"p99", "p999"} else 0.0
        if self.metric == "ttft":
            return ttft + extra
        if self.metric == "tpot":
            return prediction.tpot.at(self.percentile)
        return prediction.e2e.at(self.percentile) + extra


@dataclass(frozen=True, slots=True)
class SizedRate:
    """The largest rate at which one engine keeps its objectives."""

    rate: float
    """Requests per second; 0 when even an idle engine misses an objective."""
    binding: Objective | None
    """The objective that breaks first; None when the engine's capacity does."""
    prediction: Prediction
    """At that rate; of the nearly idle engine when the rate is 0."""


_TAIL_MARGIN = 1.4
"""Measured p99 times to first token lay about 30 % above simulated ones even for evenly spaced arrivals, which
no model of the engine explains; until live tails are known, p99 is held to the target divided by this."""

_COARSE_RATES = tuple(0.985 * 0.8**power for power in range(23, -1, -1))
_STEPS_BETWEEN = 8


def max_rate(
    model: StepModel,
    traffic: Traffic,
    objectives: Sequence[Objective],
    limits: EngineLimits | None = None,
    *,
    tail_margin: float = _TAIL_MARGIN,
    utilisation: float = 1.0,
) -> SizedRate:
    """Return the largest rate one engine takes while it keeps every objective.

    Rates are tried upward on a fixed grid (24 coarse ones, 25 % apart, then 8 between), and the answer is the
    last one before the first miss. So a tighter objective never gives a larger rate, whatever ripples the
    percentiles have. The grid's 2.8 % lie on the safe side.

    Args:
        model: The step model of the engine.
        traffic: The mix of lengths; its rate is ignored.
        objectives: What must hold; none means the capacity alone counts.
        limits: The engine's limits.
        tail_margin: Factor on the predicted p99 and p99.9 of the first token.
        utilisation: Largest share of the engine's capacity to use, 0-1.
    """
    limits = limits or _DEFAULT_LIMITS
    engine = _Engine(model.grid, limits, traffic)
    slots = min(float(limits.max_num_seqs), max(model.kv_capacity_tokens / engine.context, 1.0))
    largest = 1e3 * _largest_rate(engine, slots) * utilisation

    def missed(rate: float) -> tuple[Prediction, Objective | None]:
        prediction = predict(model, replace(traffic, rate=rate), limits)
        worst: tuple[float, Objective] | None = None
        for objective in objectives:
            excess = objective.expected_ms(prediction, tail_margin) / objective.target_ms
            if excess > 1.0 and (worst is None or excess > worst[0]):
                worst = (excess, objective)
        return prediction, worst[1] if worst else None

    kept: tuple[float, Prediction] | None = None
    lower = upper = 0.0
    binding: Objective | None = None
    for share in _COARSE_RATES:
        upper = share * largest
        prediction, binding = missed(upper)
        if binding is not None:
            break
        kept = (upper, prediction)
        lower = upper
    if binding is None:
        assert kept is not None  # noqa: S101  the grid is not empty
        return SizedRate(kept[0], None, kept[1])
    if kept is None:
        lower = upper / 8.0
        prediction, idle_binding = missed(lower)
        if idle_binding is not None:
            return SizedRate(0.0, idle_binding, prediction)
        kept = (lower, prediction)
    for index in range(1, _STEPS_BETWEEN):
        rate = lower + (upper - lower) * index / _STEPS_BETWEEN
        prediction, breaks = missed(rate)
        if breaks is not None:
            binding = breaks
            break
        kept = (rate, prediction)
    return SizedRate(kept[0], binding, kept[1])
