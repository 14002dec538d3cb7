"""The event simulation: the compiled kernel does what the readable reference says, and what vLLM would do."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from servingtiers.performance import engine_kernel as kernel
from servingtiers.performance.engine_reference import (
    ReferenceConfig,
    ReferenceRequest,
    simulate_closed,
    simulate_open,
)
from servingtiers.performance.engine_sim import (
    EngineConfig,
    PoolConfig,
    Routing,
    Transfer,
    draw_requests,
    make_pool,
    make_requests,
    simulate,
    simulate_disaggregated,
    sustainable_rate,
)
from servingtiers.performance.steps import GridStepModel, SourceKind, StepGrid, StepSource
from servingtiers.performance.workload import Arrivals, Workload, length_cv_from_p95

CONFIGURATIONS = 600


def a_model(
    kv_capacity: int = 400_000, *, query_tokens: float = 1.0, acceptance: float = 0.0, scale: float = 1.0
) -> GridStepModel:
    """An engine like an 8B model on one H100: 6 ms a step, more with batch, context and prompt tokens."""
    batches = (1.0, 4.0, 32.0, 128.0, 256.0)
    contexts = (0.0, 512.0, 2048.0, 8192.0)
    drafted = int(query_tokens) - 1
    gained = sum(acceptance**i for i in range(drafted + 1))
    grid = StepGrid(
        batch_axis=batches,
        context_axis=contexts,
        decode_ms=tuple(
            tuple(scale * (6.0 + 0.02 * b + 4e-5 * b * c + 1e-3 * math.sqrt(b * c)) for c in contexts)
            for b in batches
        ),
        token_axis=(1.0, 64.0, 256.0, 1024.0, 8192.0),
        token_ms=tuple(scale * t for t in (6.0, 6.5, 8.0, 22.0, 170.0)),
        pair_ms=scale * 1e-6,
        query_tokens=query_tokens,
        tokens_per_step=gained,
        acceptance=acceptance,
    )
    return GridStepModel(StepSource(SourceKind.TABLE, "synthetic", 5.0), kv_capacity, grid)


def _random_case(seed: int) -> tuple[PoolConfig, kernel.Requests, ReferenceConfig, int | None, float]:
    """One random engine and its requests; small, so that preemption, blocking and chunking all happen often."""
    rng = random.Random(seed)
    speculate = rng.random() < 0.1
    drafted = rng.choice([1, 3, 5])
    seqs = rng.choice([1, 2, 3, 8, 33])
    block = rng.choice([1, 4, 16, 32])
    longest_prompt, longest_output = rng.choice([(20, 10), (200, 60), (900, 30), (50, 300)])
    # From hardly more than one request to plenty: most cases feel the KV limit.
    capacity = int(
        (longest_prompt + longest_output + drafted + block) * rng.choice([1.1, 1.7, 3.0, 10.0, 100.0])
    )
    capacity = (capacity // block + 1) * block
    model = a_model(
        capacity,
        query_tokens=drafted + 1.0 if speculate else 1.0,
        acceptance=rng.choice([0.0, 0.6, 0.9]) if speculate else 0.0,
    )
    static = rng.random() < 0.1
    engine = EngineConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=max(seqs * (drafted + 1), rng.choice([16, 64, 256, 4096])),
        block_size=block,
        priority_scheduling=rng.random() < 0.3,
        reserve_kv=rng.random() < 0.15,
        static_batching=static,
        async_scheduling=rng.random() < 0.5,
    )
    count = rng.choice([1, 7, 40, 120])
    closed = rng.choice([None, None, 1, 3, 50])
    generator = np.random.default_rng(seed)
    prompt = generator.integers(1, longest_prompt + 1, count)
    output = generator.integers(1, longest_output + 1, count)
    if rng.random() < 0.2:
        output[:] = output[0]
    gaps = generator.exponential(rng.choice([1.0, 30.0, 400.0]), count)
    gaps[generator.random(count) < 0.2] = 0.0  # bursts arrive at one instant
    drawn = draw_requests(Workload(10, 10, rate=1.0), count, seed, model)
    spread = (output - 1) / model.grid.tokens_per_step
    steps = np.clip(np.rint(spread), np.ceil((output - 1) / model.grid.query_tokens), output - 1).astype(
        np.int64
    )
    requests = make_requests(
        np.cumsum(gaps) if closed is None else drawn.arrival * 0.0,
        prompt,
        output,
        cached=(prompt * rng.choice([0.0, 0.0, 0.5, 1.0])).astype(np.int64),
        steps=steps,
        klass=generator.integers(0, 2, count),
    )
    reference = ReferenceConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_blocks=capacity // block,
        block_size=block,
        priority=engine.priority_scheduling,
        reserve=engine.reserve_kv or static or speculate,
        static=static,
        speculated=drafted if speculate else 0,
        asynchronous=engine.async_scheduling,
    )
    return PoolConfig(model, engine), requests, reference, closed, rng.choice([0.0, 0.0, 7.3])


def _reference_requests(requests: kernel.Requests) -> list[ReferenceRequest]:
    return [
        ReferenceRequest(float(arrival), int(prompt), int(output), int(cached), int(steps), int(klass))
        for arrival, prompt, output, cached, steps, klass in zip(
            requests.arrival,
            requests.prompt,
            requests.output,
            requests.cached,
            requests.steps,
            requests.klass,
            strict=True,
        )
    ]


def test_the_kernel_gives_the_reference_s_times_on_random_configurations() -> None:
    """First and last token of every request, and preemptions, agree on 600 random engines and loads."""
    preempted = static = speculated = 0
    for seed in range(CONFIGURATIONS):
        pool, requests, reference, closed, delay = _random_case(seed)
        plain = _reference_requests(requests)
        state = make_pool(pool)
        if closed is None:
            simulate_open(reference, pool.model.grid.step_ms, plain, delay)
            kernel.run_open(state, requests, delay, least_loaded=False)
        else:
            simulate_closed(reference, pool.model.grid.step_ms, plain, closed, delay)
            kernel.run_closed(state, requests, delay, closed)

        np.testing.assert_allclose(requests.first, [r.first for r in plain], rtol=1e-9, err_msg=str(seed))
        np.testing.assert_allclose(requests.last, [r.last for r in plain], rtol=1e-9, err_msg=str(seed))
        np.testing.assert_array_equal(requests.preempted, [r.preempted for r in plain], err_msg=str(seed))
        # An empty engine has given everything back.
        assert state.ints[0, kernel.BLOCKS_FREE] == pool.model.kv_capacity_tokens // pool.engine.block_size
        assert state.ints[0, kernel.RUNNING] == state.ints[0, kernel.WAITING] == 0
        assert state.ints[0, kernel.WAITING_TOKENS] == 0
        preempted += int(requests.preempted.any())
        static += reference.static
        speculated += reference.speculated > 0

    # The cases are worth something only if the rare paths are taken often.
    assert preempted > 40
    assert static > 30
    assert speculated > 30


@pytest.mark.parametrize("seed", range(40))
def test_a_run_cut_into_pieces_is_the_same_run(seed: int) -> None:
    """A fleet simulator may stop at any instant and go on: the times do not change."""
    pool, requests, _, _, _ = _random_case(seed)
    requests = requests._replace(
        arrival=np.sort(np.random.default_rng(seed).exponential(300.0, len(requests.arrival)))
    )
    whole = make_pool(pool)
    kernel.run_open(whole, requests, 0.0, least_loaded=False)
    first, last = requests.first.copy(), requests.last.copy()
    requests.first[:] = np.nan
    requests.generated[:] = 0
    requests.scheduled[:] = np.nan

    cut = make_pool(pool)
    stops = np.random.default_rng(seed + 1).uniform(0.0, 2.0 * requests.arrival[-1] + 100.0, 200)
    events = sorted([(t, -1) for t in stops] + [(t, i) for i, t in enumerate(requests.arrival)])
    for time, request in events:
        kernel.advance(cut, requests, 0, time, stop_at_finish=False)
        if request >= 0:
            kernel.inject(cut, requests, 0, request, time)
    kernel.advance(cut, requests, 0, np.inf, stop_at_finish=False)

    np.testing.assert_array_equal(requests.first, first)
    np.testing.assert_array_equal(requests.last, last)


def test_the_kernel_s_step_time_is_the_grid_s() -> None:
    """The compiled look-up and the pure-Python one agree inside and outside the grid."""
    model = a_model()
    state = make_pool(PoolConfig(model, EngineConfig(max_num_seqs=512)))
    generator = np.random.default_rng(3)
    for _ in range(500):
        decoding = int(generator.integers(0, 512))
        kv = float(decoding * generator.integers(1, 20_000))
        prompt = float(generator.choice([0, 1, 30, 500, 9000]))
        pairs = prompt * 700.0

        assert kernel.step_time(state.table, prompt, pairs, decoding, kv) == pytest.approx(
            model.grid.step_ms(prompt, pairs, decoding, kv), rel=1e-12
        )


def test_one_request_on_an_idle_engine_is_its_steps_added_up() -> None:
    """No queueing: TTFT is the prefill step, and each further token one decode step."""
    model = a_model()
    result = simulate(
        PoolConfig(model), Workload(512, 100, rate=0.001, arrivals=Arrivals.parse("constant")), requests=50
    )
    grid = model.grid

    assert result.ttft.mean == pytest.approx(grid.step_ms(512, 512 * 256, 0, 0))
    decode = sum(grid.step_ms(0, 0, 1, 512 + i) for i in range(1, 100)) / 99
    assert result.tpot.mean == pytest.approx(decode)
    assert result.e2e.mean == pytest.approx(result.ttft.mean + 99 * decode)


def test_same_seed_same_floats() -> None:
    """Two runs of the same inputs are equal to the last bit; another seed is another run."""
    pool = PoolConfig(a_model(), EngineConfig(max_num_seqs=16))
    workload = Workload(300, 80, rate=8.0, prompt_cv=0.7, output_cv=0.5)

    assert simulate(pool, workload, requests=3000, seed=4) == simulate(pool, workload, requests=3000, seed=4)
    assert simulate(pool, workload, requests=3000, seed=4) != simulate(pool, workload, requests=3000, seed=5)


def test_continuous_batching_beats_static_batching() -> None:
    """With spread output lengths, sustained throughput is at least 1.5 times that of static batching."""
    workload = Workload(200, 200, rate=1.0, output_cv=1.0)
    continuous = sustainable_rate(PoolConfig(a_model(), EngineConfig(max_num_seqs=32)), workload)
    static = sustainable_rate(
        PoolConfig(a_model(), EngineConfig(max_num_seqs=32, static_batching=True)), workload
    )

    assert continuous > 1.5 * static


def test_priority_scheduling_shields_the_interactive_class() -> None:
    """With a queue of batch work in front, interactive requests wait less under priority scheduling."""
    results = {}
    for priority in (False, True):
        pool = PoolConfig(a_model(), EngineConfig(max_num_seqs=8, priority_scheduling=priority))
        workload = Workload(300, 100, rate=9.6, batch_share=0.7)
        requests = draw_requests(workload, 4000, 0, pool.model)
        kernel.run_open(make_pool(pool), requests, 0.0, least_loaded=False)
        results[priority] = float((requests.first - requests.arrival)[requests.klass == 0].mean())

    assert results[True] < 0.5 * results[False]


def test_speculative_decoding_shortens_tpot_by_the_tokens_gained() -> None:
    """On an idle engine TPOT is the step divided by the mean tokens a step yields."""
    model = a_model(query_tokens=4.0, acceptance=0.7)
    result = simulate(PoolConfig(model), Workload(100, 400, rate=0.01), requests=300)
    step = model.grid.step_ms(0, 0, 1, 300)

    assert result.tpot.mean == pytest.approx(step / model.grid.tokens_per_step, rel=0.02)


def test_disaggregation_keeps_prefill_out_of_the_decode_steps() -> None:
    """The decode pool's token gaps do not see prompts; TTFT gains the transfer and one decode step."""
    model = a_model()
    workload = Workload(2000, 100, rate=4.0)
    apart = simulate_disaggregated(
        PoolConfig(model), PoolConfig(model), Transfer(131072, 50.0, 1.0), workload, requests=4000
    )
    together = simulate(PoolConfig(model, replicas=2), workload, requests=4000)

    assert apart.itl.p99 < 0.5 * together.itl.p99
    idle = simulate_disaggregated(
        PoolConfig(model),
        PoolConfig(model),
        Transfer(131072, 50.0, 1.0),
        Workload(2000, 100, rate=0.01, arrivals=Arrivals.parse("constant")),
        requests=50,
    )
    grid = model.grid
    moved = 1.0 + 2000 * 131072 / 50e6
    assert idle.ttft.mean == pytest.approx(
        grid.step_ms(2000, 2000 * 1000, 0, 0) + moved + grid.step_ms(1, 1 * 1999.5, 0, 0)
    )


def test_least_loaded_routing_beats_round_robin_under_length_spread() -> None:
    """With answers of very different length, counting outstanding requests shortens the queue's tail."""
    workload = Workload(200, 200, rate=24.0, output_cv=1.5)
    tails = {}
    for routing in Routing:
        pool = PoolConfig(a_model(), EngineConfig(max_num_seqs=8), replicas=4, routing=routing)
        tails[routing] = simulate(pool, workload, requests=8000).ttft.p99

    assert tails[Routing.LEAST_LOADED] < tails[Routing.ROUND_ROBIN]


def test_closed_loop_keeps_its_concurrency() -> None:
    """With as many clients as slots the batch stays full and nobody queues."""
    result = simulate(PoolConfig(a_model()), Workload(100, 200, concurrency=24), requests=2000)

    assert result.mean_batch == pytest.approx(24.0, rel=0.05)
    # Little's law: clients = throughput × time in system.
    assert result.requests_per_second * result.e2e.mean / 1e3 == pytest.approx(24.0, rel=0.03)


def test_throughput_in_open_loop_is_the_rate() -> None:
    """Below saturation what comes in goes out."""
    result = simulate(PoolConfig(a_model()), Workload(200, 100, rate=10.0), requests=20_000)

    assert result.requests_per_second == pytest.approx(10.0, rel=0.03)
    assert result.tokens_per_second == pytest.approx(1000.0, rel=0.03)


def test_lengths_are_drawn_with_the_mean_and_spread_asked_for() -> None:
    """Log-normal lengths have the given mean and coefficient of variation."""
    requests = draw_requests(
        Workload(500, 100, rate=1.0, prompt_cv=0.8, output_cv=0.3), 100_000, 0, a_model()
    )

    assert requests.prompt.mean() == pytest.approx(500, rel=0.02)
    assert requests.prompt.std() / requests.prompt.mean() == pytest.approx(0.8, rel=0.03)
    assert requests.output.std() / requests.output.mean() == pytest.approx(0.3, rel=0.03)
    p95 = float(np.quantile(requests.prompt, 0.95))
    assert length_cv_from_p95(500, p95) == pytest.approx(0.8, rel=0.05)


def test_gamma_arrivals_have_the_coefficient_of_variation_asked_for() -> None:
    """gamma:3 means gaps three times as spread as Poisson's."""
    requests = draw_requests(
        Workload(10, 10, rate=5.0, arrivals=Arrivals.parse("gamma:3")), 100_000, 0, a_model()
    )
    gaps = np.diff(requests.arrival)

    assert gaps.mean() == pytest.approx(200.0, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.03)


@pytest.mark.parametrize(
    ("make", "mend"),
    [
        (lambda: Workload(10, 10), "exactly one of rate"),
        (lambda: Workload(10, 10, rate=0.0), "above 0"),
        (lambda: Workload(0, 10, rate=1.0), "use 1 or more"),
        (lambda: Workload(10, 10, concurrency=0), "1 or more clients"),
        (lambda: Workload(5000, 10, rate=1.0, max_model_len=4096), "raise the maximum length"),
        (lambda: Workload(10, 10, rate=1.0, prefix_hit_rate=1.5), "share from 0 to 1"),
        (lambda: Arrivals.parse("gamma"), "gamma:CV"),
        (lambda: Arrivals.parse("burst"), "use poisson"),
        (lambda: EngineConfig(max_num_seqs=64, max_num_batched_tokens=32), "raise it"),
        (
            lambda: simulate(PoolConfig(a_model(1000)), Workload(2000, 10, rate=1.0)),
            "more tensor parallelism",
        ),
        (lambda: simulate(PoolConfig(a_model(0)), Workload(20, 10, rate=1.0)), "tensor parallelism"),
    ],
)
def test_bad_input_names_its_mend(make, mend) -> None:
    """Every refusal is one line that says what to do instead."""
    with pytest.raises(ValueError, match=mend) as caught:
        make()

    assert "\n" not in str(caught.value)
