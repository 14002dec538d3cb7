"""Event simulation of vLLM engines: load and configuration in, latency distributions and throughput out.

The scheduling is :mod:`servingtiers.performance.engine_reference`'s (read that to know what is modelled), run by
the compiled :mod:`servingtiers.performance.engine_kernel`. Needs the ``simulator`` extra (numba, numpy); the
operator process never imports it.

Deterministic: the same inputs and seed give the same floats. Runs that differ in the rate alone share their
random numbers (unit-rate gaps are scaled, lengths are the same), so curves over the rate are smooth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from servingtiers.performance import engine_kernel as kernel
from servingtiers.performance.latency import Percentiles
from servingtiers.performance.workload import ArrivalKind, Arrivals, Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from servingtiers.performance.steps import StepModel

__all__ = [
    "EngineConfig",
    "PoolConfig",
    "Result",
    "Routing",
    "Transfer",
    "draw_requests",
    "make_pool",
    "make_requests",
    "simulate",
    "simulate_disaggregated",
    "sustainable_rate",
]


class Routing(StrEnum):
    """How a router picks a replica."""

    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"
    """The replica with the fewest unanswered requests; ties go round robin."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The scheduler of one engine; the names are vLLM's where vLLM has one."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    priority_scheduling: bool = False
    """Admit the interactive class first and preempt the batch class first."""
    reserve_kv: bool = False
    """Reserve KV for prompt and whole answer at admission, so that nothing is preempted."""
    static_batching: bool = False
    """Admit a batch only when the batch before it is done, as engines did before continuous batching."""
    async_scheduling: bool = True
    """Compose a step while the step before it runs (vLLM's default since 0.14): a request that arrives during a
    step is admitted one step later than without it."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= 16384:
            raise ValueError(f"max-num-seqs {self.max_num_seqs}: use 1 to 16384")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max-num-batched-tokens {self.max_num_batched_tokens} is below max-num-seqs {self.max_num_seqs}: "
                "raise it, every running sequence needs a token of each step's budget"
            )
        if self.block_size < 1:
            raise ValueError(f"block size {self.block_size}: use 1 or more")


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Replicas of one engine."""

    model: StepModel
    engine: EngineConfig = EngineConfig()
    replicas: int = 1
    routing: Routing = Routing.ROUND_ROBIN


@dataclass(frozen=True, slots=True)
class Transfer:
    """Moving a prompt's KV cache from the prefill to the decode engine."""

    kv_bytes_per_token: float
    gigabytes_per_second: float
    """Rate of one transfer over the link, 10⁹ bytes/s."""
    base_ms: float = 0.0

    def ms(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Time to move the cache of ``tokens`` tokens, ms."""
        moved: NDArray[np.float64] = self.base_ms + tokens * (
            self.kv_bytes_per_token / (self.gigabytes_per_second * 1e6)
        )
        return moved


@dataclass(frozen=True, slots=True)
class Result:
    """What a simulated run gave; the warm-up is left out of every figure but ``steps``."""

    ttft: Percentiles
    """Arrival to first token, ms."""
    tpot: Percentiles
    """Per request: (last token - first token) / (tokens - 1), ms."""
    itl: Percentiles
    """Per token: gap to the token before it, ms; from bins 2.2 % wide."""
    e2e: Percentiles
    """Arrival to last token, ms."""
    queue: Percentiles
    """Arrival to first being scheduled, ms."""
    requests_per_second: float
    tokens_per_second: float
    """Output tokens."""
    mean_batch: float
    """Decoding sequences, averaged over busy time and replicas."""
    kv_use: float
    """Share of the KV cache in use, averaged over busy time and replicas, 0–1 (under disaggregation the decode
    pool's)."""
    utilisation: float
    """Share of the time in which engines run steps."""
    preemptions: int
    steps: int
    output_tokens: int
    queue_drift: float = 0.0
    """Open loop: how much longer requests waited late in the run than early, over the time between: about 0 where
    the engines keep up, about ``1 - capacity / load`` where they do not."""
    saturated: bool = False
    """The queue grows without bound (open loop), so the latencies are those of a run of this length only."""


def make_pool(pool: PoolConfig) -> kernel.Pool:
    """Lay out the state of a pool's replicas, all of them empty at time 0.

    Raises:
        ValueError: The model leaves no room for a KV cache.
    """
    engine = pool.engine
    blocks = pool.model.kv_capacity_tokens // engine.block_size
    if blocks < 1:
        raise ValueError(
            "no memory is left for a KV cache: use more tensor parallelism or a larger accelerator"
        )
    slots, replicas = engine.max_num_seqs, pool.replicas
    grid = pool.model.grid

    def integers(*shape: int) -> NDArray[np.int64]:
        return np.zeros(shape, dtype=np.int64)

    made = kernel.Pool(
        config=np.array(
            [
                slots,
                engine.max_num_batched_tokens,
                engine.block_size,
                blocks,
                engine.priority_scheduling,
                # Static batching always reserves; a speculated length is not whole, so it is reserved too.
                engine.reserve_kv or engine.static_batching or grid.query_tokens > 1.0,
                engine.static_batching,
                math.ceil(grid.query_tokens) - 1,
                engine.async_scheduling,
            ],
            dtype=np.int64,
        ),
        table=_table(pool.model, slots),
        ints=integers(replicas, kernel.INTS),
        reals=np.zeros((replicas, kernel.REALS)),
        heap=integers(replicas, slots),
        slot_request=integers(replicas, slots),
        slot_order=integers(replicas, slots),
        slot_length=np.zeros((replicas, slots)),
        slot_start=integers(replicas, slots),
        slot_steps=integers(replicas, slots),
        slot_blocks=integers(replicas, slots),
        slot_free=integers(replicas, slots),
        prefilled=integers(replicas, slots),
        phase=integers(replicas, engine.block_size),
        finished=integers(replicas, slots),
        itl=integers(replicas, kernel.ITL_BINS),
    )
    for replica in range(replicas):
        kernel.reset(made, replica, 0.0)
    return made


def _table(model: StepModel, slots: int) -> kernel.StepTable:
    """Expand a step model's grid to one decode row per batch size."""
    grid = model.grid
    batch_axis = np.array(grid.batch_axis)
    context = np.array(grid.context_axis)
    values = np.array(grid.decode_ms)
    batches = np.arange(slots + 1, dtype=np.float64)
    low = np.clip(np.searchsorted(batch_axis, batches, side="right") - 1, 0, len(batch_axis) - 2)
    weight = (batches - batch_axis[low]) / (batch_axis[low + 1] - batch_axis[low])
    weight[batches <= batch_axis[0]] = 0.0
    decode = values[low] + weight[:, None] * (values[low + 1] - values[low])
    return kernel.StepTable(
        context=context,
        decode=decode,
        slope=np.diff(decode, axis=1) / np.diff(context),
        tokens=np.array(grid.token_axis),
        linear=np.array(grid.token_ms),
        scalars=np.array([grid.pair_ms, grid.query_tokens]),
    )


def make_requests(
    arrival_ms: NDArray[np.float64],
    prompt: NDArray[np.int64],
    output: NDArray[np.int64],
    *,
    cached: NDArray[np.int64] | None = None,
    steps: NDArray[np.int64] | None = None,
    klass: NDArray[np.int64] | None = None,
) -> kernel.Requests:
    """Lay out requests for the kernel; all arrays have the same length, arrivals ascend."""
    count = len(arrival_ms)

    def integers(given: NDArray[np.int64] | None) -> NDArray[np.int64]:
        return np.zeros(count, dtype=np.int64) if given is None else given.astype(np.int64)

    return kernel.Requests(
        arrival=arrival_ms.astype(np.float64),
        prompt=prompt.astype(np.int64),
        cached=np.minimum(integers(cached), prompt - 1),
        output=output.astype(np.int64),
        steps=(output - 1).astype(np.int64) if steps is None else steps.astype(np.int64),
        klass=integers(klass),
        generated=integers(None),
        scheduled=np.full(count, np.nan),
        first=np.full(count, np.nan),
        last=np.full(count, np.nan),
        preempted=integers(None),
        following=np.full(count, -1, dtype=np.int64),
    )


def _lengths(generator: np.random.Generator, mean: float, cv: float, count: int) -> NDArray[np.int64]:
    if cv <= 0.0:
        # A mean that is no whole number is kept by dithering.
        return np.maximum(np.floor(mean + generator.random(count)), 1).astype(np.int64)
    spread = math.log1p(cv * cv)
    drawn = np.exp(generator.standard_normal(count) * math.sqrt(spread) + math.log(mean) - spread / 2.0)
    return np.maximum(np.rint(drawn), 1).astype(np.int64)


def _gaps(generator: np.random.Generator, arrivals: Arrivals, count: int) -> NDArray[np.float64]:
    """Gaps between arrivals at unit rate."""
    if arrivals.kind is ArrivalKind.CONSTANT:
        return np.ones(count)
    shape = 1.0 if arrivals.kind is ArrivalKind.POISSON else 1.0 / (arrivals.cv * arrivals.cv)
    return generator.standard_gamma(shape, count) / shape


def _decode_steps(
    generator: np.random.Generator, output: NDArray[np.int64], model: StepModel
) -> NDArray[np.int64] | None:
    """Decode steps of each request under speculative decoding, or None without it.

    A step accepts drafted tokens up to the first rejection and adds one of its own, so it yields between 1 and
    ``query_tokens`` tokens, ``tokens_per_step`` on average (Leviathan et al., ICML 2023). By the central limit
    theorem the steps of a request of ``n`` tokens are normal around ``n / tokens_per_step``.
    """
    grid = model.grid
    if grid.query_tokens <= 1.0:
        return None
    drafted = int(grid.query_tokens) - 1
    chance = np.array([grid.acceptance**i * (1.0 - grid.acceptance) for i in range(drafted)])
    chance = np.append(chance, grid.acceptance**drafted)
    gained = np.arange(1, drafted + 2)
    variance = float((chance * gained**2).sum() - (chance * gained).sum() ** 2)
    need = (output - 1).astype(np.float64)
    mean = need / grid.tokens_per_step
    deviation = np.sqrt(need * variance / grid.tokens_per_step**3)
    drawn = np.rint(mean + deviation * generator.standard_normal(len(output)))
    low = np.ceil(need / (drafted + 1))
    return np.clip(drawn, low, need).astype(np.int64)


def draw_requests(workload: Workload, count: int, seed: int, model: StepModel) -> kernel.Requests:
    """Draw ``count`` requests of a workload.

    Args:
        workload: The traffic. In closed loop the arrival times are written by the run.
        count: Requests to draw.
        seed: Seed of the random numbers.
        model: The step model they will run on (its speculation sets the decode steps).
    """
    # Independent streams, so that a change of one property leaves the others' draws alone.
    streams = [np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(seed).spawn(5)]
    prompt = _lengths(streams[0], workload.prompt_tokens, workload.prompt_cv, count)
    output = _lengths(streams[1], workload.output_tokens, workload.output_cv, count)
    if workload.concurrency is not None and workload.output_cv <= 0.0:
        # Clients with answers of one length would march in step for ever, prompts of all of them in one batch;
        # real ones drift apart. Benchmarks draw lengths from a range for the same reason.
        dither = (streams[1].random(count) - 0.5) * 0.2 * workload.output_tokens
        output = np.maximum(np.rint(output + dither), 1).astype(np.int64)
    if workload.max_model_len is not None:
        prompt = np.minimum(prompt, workload.max_model_len - 1)
        output = np.minimum(output, workload.max_model_len - prompt)
    if workload.rate is None:
        arrival = np.zeros(count)
    else:
        arrival = np.cumsum(_gaps(streams[2], workload.arrivals, count)) * (1e3 / workload.rate)
    return make_requests(
        arrival,
        prompt,
        output,
        cached=np.floor(prompt * workload.prefix_hit_rate).astype(np.int64),
        steps=_decode_steps(streams[3], output, model),
        klass=(streams[4].random(count) < workload.batch_share).astype(np.int64),
    )


def _check_fit(requests: kernel.Requests, pool: PoolConfig) -> None:
    grid = pool.model.grid
    longest = int((requests.prompt + requests.output).max()) + math.ceil(grid.query_tokens) - 1
    capacity = pool.model.kv_capacity_tokens // pool.engine.block_size * pool.engine.block_size
    if longest > capacity:
        raise ValueError(
            f"a request of {longest} tokens exceeds the KV cache of {capacity}: shorten requests "
            "(--prompt-tokens, --output-tokens) or use more tensor parallelism or a larger accelerator"
        )


def simulate(
    pool: PoolConfig,
    workload: Workload,
    *,
    requests: int = 20_000,
    seed: int = 0,
    overhead_ms: float = 0.0,
    warmup: float = 0.1,
    rounds: int | None = None,
) -> Result:
    """Simulate an aggregated pool.

    Args:
        pool: The engines. A closed loop is simulated on one replica with its share of the clients.
        workload: The traffic, of the whole pool.
        requests: Requests to simulate.
        seed: Seed of the random numbers.
        overhead_ms: Time from a request's arrival to the scheduler: HTTP, tokenizer, queues between processes.
        warmup: Share of the requests, from the start, left out of the figures; half as many at the end, when the
            engines run empty.
        rounds: Closed loop only: requests each client sends in one run that begins with all clients at once and
            of which everything counts, as ``vllm bench serve`` does it; runs are repeated until there are
            ``requests``. None: one long run in its steady state.

    Raises:
        ValueError: A request cannot fit the KV cache, or no memory is left for one.
    """
    if workload.concurrency is not None and pool.replicas > 1:
        workload = replace(workload, concurrency=math.ceil(workload.concurrency / pool.replicas))
        pool = replace(pool, replicas=1)
    clients = workload.concurrency
    size = requests
    if clients is not None:
        size = max(requests, 2 * clients) if rounds is None else rounds * clients
    runs = 1 if clients is None or rounds is None else max(math.ceil(requests / size), 1)
    drawn = draw_requests(workload, size * runs, seed, pool.model)
    _check_fit(drawn, pool)
    state = make_pool(pool)
    if clients is None:
        kernel.run_open(state, drawn, overhead_ms, pool.routing is Routing.LEAST_LOADED)
        return _summary(_Totals.of(state), drawn, _open_window(len(drawn.arrival), warmup))
    totals: list[_Totals] = []
    for run in range(runs):
        part = kernel.Requests._make(column[run * size : (run + 1) * size] for column in drawn)
        kernel.reset(state, 0, 0.0)
        kernel.run_closed(state, part, overhead_ms, clients)
        totals.append(_Totals.of(state))
    if rounds is None:
        # The last round is left out: by then some clients have nothing left to send.
        start = min(int(size * warmup), size - clients - 1)
        return _summary(totals[0], drawn, slice(start, size - clients), steady=True)
    return _summary(
        _Totals.sum(totals), drawn, slice(0, size * runs), seconds=sum(t.clock_ms for t in totals) / 1e3
    )


def _open_window(count: int, warmup: float) -> slice:
    """The requests that count: without the start, and without the end, when the engines run empty."""
    start = min(int(count * warmup), count - 1)
    return slice(start, max(count - int(count * warmup / 2.0), start + 1))


def simulate_disaggregated(
    prefill: PoolConfig,
    decode: PoolConfig,
    transfer: Transfer,
    workload: Workload,
    *,
    requests: int = 20_000,
    seed: int = 0,
    overhead_ms: float = 0.0,
    warmup: float = 0.1,
) -> Result:
    """Simulate prefill and decode in separate pools.

    As vLLM's NIXL connector does it: a prefill engine computes the prompt and stops after one token; the decode
    engine fetches the KV cache, computes the last prompt token again and goes on from there. The client's first
    token is the decode engine's.

    Args:
        prefill: The prefill engines.
        decode: The decode engines.
        transfer: The link between them.
        workload: Open-loop traffic.
        requests: Requests to simulate.
        seed: Seed of the random numbers.
        overhead_ms: Time from a request's arrival to the prefill engine's scheduler.
        warmup: Share of the requests, from the start, left out of the figures; half as many at the end.

    Raises:
        ValueError: A request cannot fit a KV cache, or the workload is a closed loop.
    """
    if workload.rate is None:
        raise ValueError(
            "disaggregated pools are simulated in open loop: give a rate instead of a concurrency"
        )
    drawn = draw_requests(workload, requests, seed, decode.model)
    _check_fit(drawn, decode)
    first = make_requests(
        drawn.arrival, drawn.prompt, np.ones_like(drawn.output), cached=drawn.cached, klass=drawn.klass
    )
    _check_fit(first, prefill)
    state = make_pool(prefill)
    kernel.run_open(state, first, overhead_ms, prefill.routing is Routing.LEAST_LOADED)
    ready = first.last + transfer.ms(drawn.prompt.astype(np.float64))
    order = np.argsort(ready, kind="stable")
    second = make_requests(
        ready[order],
        drawn.prompt[order],
        drawn.output[order],
        cached=drawn.prompt[order] - 1,
        steps=drawn.steps[order],
        klass=drawn.klass[order],
    )
    decoding = make_pool(decode)
    kernel.run_open(decoding, second, 0.0, decode.routing is Routing.LEAST_LOADED)
    # Back to arrival order; latency counts from the client's arrival, queueing is both engines'.
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    waited = (second.scheduled - second.arrival)[back]
    whole = drawn._replace(
        scheduled=first.scheduled + waited,
        first=second.first[back],
        last=second.last[back],
        preempted=first.preempted + second.preempted[back],
    )
    totals = _Totals.of(decoding)
    totals.steps += int(state.ints[:, kernel.STEPS].sum())
    return _summary(totals, whole, _open_window(len(whole.arrival), warmup))


@dataclass(slots=True)
class _Totals:
    """Sums over the replicas and the time of a run."""

    itl: NDArray[np.int64]
    busy_ms: float
    batch_ms: float
    blocks_ms: float
    """Used blocks times ms, as a share of all blocks."""
    clock_ms: float
    """Sum over replicas of when they stopped."""
    steps: int

    @classmethod
    def of(cls, pool: kernel.Pool) -> _Totals:
        return cls(
            itl=pool.itl.sum(axis=0),
            busy_ms=float(pool.reals[:, kernel.BUSY_MS].sum()),
            batch_ms=float(pool.reals[:, kernel.BATCH_MS].sum()),
            blocks_ms=float(pool.reals[:, kernel.BLOCKS_MS].sum() / pool.config[kernel.BLOCKS]),
            clock_ms=float(pool.reals[:, kernel.CLOCK].sum()),
            steps=int(pool.ints[:, kernel.STEPS].sum()),
        )

    @classmethod
    def sum(cls, parts: list[_Totals]) -> _Totals:
        return cls(
            itl=np.sum([part.itl for part in parts], axis=0),
            busy_ms=sum(part.busy_ms for part in parts),
            batch_ms=sum(part.batch_ms for part in parts),
            blocks_ms=sum(part.blocks_ms for part in parts),
            clock_ms=sum(part.clock_ms for part in parts),
            steps=sum(part.steps for part in parts),
        )


def _summary(
    totals: _Totals,
    requests: kernel.Requests,
    window: slice,
    *,
    steady: bool = False,
    seconds: float | None = None,
) -> Result:
    """Summarise the requests of a window of a run.

    Args:
        totals: Sums of the whole run.
        requests: All requests of the run.
        window: Those that count.
        steady: Take rates between the first and the last of the window to finish, not from its first arrival.
        seconds: Length of the run, where it is known.
    """
    arrival, first, last = requests.arrival[window], requests.first[window], requests.last[window]
    output = requests.output[window]
    ttft = first - arrival
    answered = output > 1
    tpot = (last - first)[answered] / (output - 1)[answered] if answered.any() else np.zeros(1)
    e2e = last - arrival
    queue = requests.scheduled[window] - arrival
    if seconds is None:
        since = float(last.min()) if steady else float(arrival[0])
        seconds = max(float(last.max()) - since, 1e-6) / 1e3
    busy = max(totals.busy_ms, 1e-12)
    return Result(
        ttft=_percentiles(ttft),
        tpot=_percentiles(tpot),
        itl=_itl(totals.itl),
        e2e=_percentiles(e2e),
        queue=_percentiles(queue),
        requests_per_second=len(output) / seconds,
        tokens_per_second=float(output.sum()) / seconds,
        mean_batch=totals.batch_ms / busy,
        kv_use=totals.blocks_ms / busy,
        utilisation=busy / max(totals.clock_ms, 1e-12),
        preemptions=int(requests.preempted.sum()),
        steps=totals.steps,
        output_tokens=int(requests.output.sum()),
        queue_drift=_drift(arrival, queue),
    )


def _drift(arrival: NDArray[np.float64], queue: NDArray[np.float64]) -> float:
    quarter = len(arrival) // 4
    if quarter == 0:
        return 0.0
    early, late = slice(quarter, 2 * quarter), slice(-quarter, None)
    apart = float(arrival[late].mean() - arrival[early].mean())
    return float(queue[late].mean() - queue[early].mean()) / max(apart, 1e-9)


_QUANTILES = np.array([0.5, 0.9, 0.95, 0.99, 0.999])


def _percentiles(values: NDArray[np.float64]) -> Percentiles:
    return Percentiles(float(values.mean()), *(float(v) for v in np.quantile(values, _QUANTILES)))


def _itl(counts: NDArray[np.int64]) -> Percentiles:
    """Inter-token latency percentiles from the kernel's bins, by the middle of the bin."""
    edges = kernel.itl_edges()
    middle = (edges[:-1] + edges[1:]) / 2.0
    total = int(counts.sum())
    if total == 0:
        return Percentiles(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    reached = np.cumsum(counts) / total

    def at(quantile: float) -> float:
        return float(middle[int(np.searchsorted(reached, quantile))])

    return Percentiles(
        float((counts * middle).sum() / total), at(0.5), at(0.9), at(0.95), at(0.99), at(0.999)
    )


def sustainable_rate(pool: PoolConfig, workload: Workload, *, requests: int = 4_000, seed: int = 1) -> float:
    """Requests per second the pool completes when there is always another one waiting.

    Args:
        pool: The engines.
        workload: The traffic; its rate or concurrency is disregarded.
        requests: Requests to simulate on one replica.
        seed: Seed of the random numbers.
    """
    one = replace(pool, replicas=1)
    clients = 2 * pool.engine.max_num_seqs
    total = max(requests, 8 * clients)
    full = replace(workload, rate=None, concurrency=clients)
    return simulate(one, full, requests=total, seed=seed, warmup=0.3).requests_per_second * pool.replicas
