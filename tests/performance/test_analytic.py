"""The fast path: near the event simulation, sane at the edges, ordered as queueing theory demands."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from math import isfinite
from statistics import median

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from properties import examples
from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.performance import analytic
from servingtiers.performance.analytic import (
    EngineLimits,
    Objective,
    Traffic,
    max_rate,
    predict,
    predict_disaggregated,
)
from servingtiers.performance.roofline import Roofline, RooflineConstants
from servingtiers.performance.select import step_model
from servingtiers.performance.speculation import Speculation
from servingtiers.performance.workload import Workload

LLAMA = model("meta-llama/Llama-3.1-8B")
ENGINES = {
    "8B on H100": step_model(LLAMA, accelerator("h100")),
    "8B on A100": step_model(LLAMA, accelerator("a100")),
    "8B on L40S": step_model(LLAMA, accelerator("l40s")),
    "70B on 4 H100": step_model(model("meta-llama/Llama-3.1-70B"), accelerator("h100"), tensor_parallel=4),
    "8B on A100, roofline": step_model(LLAMA, accelerator("a100"), use_tables=False),
}
H100 = ENGINES["8B on H100"]
CHAT = Traffic(rate=10.0, prompt_tokens=512, output_tokens=128)


def errors(steps, traffic, limits, *, requests=20_000, seed=3):
    """Relative errors of mean TPOT, mean TTFT and p99 TTFT against the event simulation."""
    simulation = pytest.importorskip("servingtiers.performance.engine_sim")
    engine = simulation.EngineConfig(
        limits.max_num_seqs, limits.max_num_batched_tokens, async_scheduling=limits.async_scheduling
    )
    workload = Workload(
        traffic.prompt_tokens,
        traffic.output_tokens,
        rate=traffic.rate,
        prompt_cv=traffic.prompt_cv,
        output_cv=traffic.output_cv,
        prefix_hit_rate=traffic.prefix_hit_rate,
    )
    seen = simulation.simulate(simulation.PoolConfig(steps, engine), workload, requests=requests, seed=seed)
    ours = predict(steps, traffic, limits)
    return (
        ours.tpot.mean / seen.tpot.mean - 1,
        ours.ttft.mean / seen.ttft.mean - 1,
        ours.ttft.p99 / seen.ttft.p99 - 1,
    )


@pytest.mark.parametrize("rate", [2.0, 10.0, 25.0, 40.0])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_chat_load_is_predicted_as_simulated(rate, asynchronous):
    tpot, mean, tail = errors(H100, replace(CHAT, rate=rate), EngineLimits(async_scheduling=asynchronous))
    assert abs(tpot) < 0.02
    assert abs(mean) < 0.03
    assert abs(tail) < 0.10


def test_random_points_are_within_the_claims_in_the_median():
    generator = random.Random(11)
    found = []
    for index in range(48):
        steps = generator.choice(list(ENGINES.values()))
        spread = generator.choice([0.3, 0.8]) if index % 3 == 0 else 0.0
        traffic = Traffic(
            rate=1.0,
            prompt_tokens=round(2 ** generator.uniform(6, 11)),
            output_tokens=round(2 ** generator.uniform(5, 9)),
            prompt_cv=spread,
            output_cv=spread,
            prefix_hit_rate=generator.choice([0.0, 0.5]) if index % 3 == 1 else 0.0,
        )
        limits = EngineLimits(16 if index % 4 == 3 else 256, async_scheduling=bool(index % 2))
        capacity = traffic.rate / predict(steps, traffic, limits).utilisation
        loaded = replace(traffic, rate=capacity * generator.uniform(0.2, 0.85))
        found.append(errors(steps, loaded, limits, requests=12_000))
    tpot, mean, tail = (median(abs(error[index]) for error in found) for index in range(3))
    assert tpot < 0.02
    assert mean < 0.03
    assert tail < 0.09  # shorter runs than the benchmark's: their own p99 scatters


def test_disaggregated_pools_are_predicted_as_simulated():
    simulation = pytest.importorskip("servingtiers.performance.engine_sim")
    prefill, decode = ENGINES["8B on A100"], H100
    link = simulation.Transfer(LLAMA.kv_bytes_per_token(), 50.0)
    for rate in (3.0, 9.0):
        workload = Workload(1000, 150, rate=rate)
        seen = simulation.simulate_disaggregated(
            simulation.PoolConfig(prefill), simulation.PoolConfig(decode), link, workload, requests=20_000
        )
        moved = 1000 * LLAMA.kv_bytes_per_token() / 50e6
        ours = predict_disaggregated(prefill, decode, Traffic(rate, 1000, 150), transfer_ms=moved)
        assert ours.tpot.mean == pytest.approx(seen.tpot.mean, rel=0.02)
        assert ours.ttft.mean == pytest.approx(seen.ttft.mean, rel=0.03)
        assert ours.ttft.p99 == pytest.approx(seen.ttft.p99, rel=0.10)


def test_an_idle_engine_takes_one_step_for_the_prompt_and_one_for_each_token():
    prediction = predict(H100, replace(CHAT, rate=1e-6))
    assert prediction.ttft.mean == pytest.approx(H100.step_ms(512, 0, 0, 0), rel=1e-3)
    assert prediction.tpot.mean == pytest.approx(H100.step_ms(0, 0, 1, 576), rel=0.01)
    assert prediction.e2e.mean == pytest.approx(prediction.ttft.mean + 127 * prediction.tpot.mean, rel=1e-6)


def test_speculation_shortens_the_time_per_token_of_an_idle_engine():
    fast = step_model(LLAMA, accelerator("h100"), speculation=Speculation(4, 0.8))
    ratio = (
        predict(H100, replace(CHAT, rate=0.01)).tpot.mean / predict(fast, replace(CHAT, rate=0.01)).tpot.mean
    )
    assert 2.0 < ratio < 3.4


def test_beyond_the_capacity_the_answer_is_saturated_and_finite():
    for traffic in (CHAT, replace(CHAT, output_tokens=1), replace(CHAT, prompt_tokens=6000)):
        prediction = predict(H100, replace(traffic, rate=1e5))
        assert prediction.saturated
        assert prediction.utilisation > 1.0
        assert isfinite(prediction.ttft.p999)


def test_a_full_cache_binds_before_a_large_batch_does():
    small = replace(H100, kv_capacity_tokens=20_000)
    limits = EngineLimits(max_num_seqs=256)
    assert predict(small, CHAT, limits).binding == "kv_cache"
    assert predict(small, CHAT, limits).utilisation > predict(H100, CHAT, limits).utilisation


def test_a_batch_limit_makes_requests_wait():
    free, limited = (predict(H100, replace(CHAT, rate=6.0), EngineLimits(seqs)) for seqs in (256, 8))
    assert free.wait_probability == 0.0
    assert limited.wait_probability > 0.1
    assert limited.ttft.p99 > 2.0 * free.ttft.p99
    assert limited.tpot.mean <= free.tpot.mean * 1.001


def test_a_lone_slot_decodes_undisturbed():
    # Whatever the load: the next request is admitted when this one has gone.
    steps, limits = H100, EngineLimits(max_num_seqs=1)
    traffic = Traffic(rate=1.0, prompt_tokens=2000, output_tokens=40)
    capacity = 1.0 / predict(steps, traffic, limits).utilisation
    alone = steps.step_ms(0, 0, 1, 2020)
    for load in (0.1, 0.5, 0.9):
        assert predict(steps, replace(traffic, rate=capacity * load), limits).tpot.mean == pytest.approx(
            alone, rel=0.005
        )


traffics = st.builds(
    Traffic,
    rate=st.just(1.0),
    prompt_tokens=st.integers(32, 4096),
    output_tokens=st.integers(16, 1024),
    prompt_cv=st.sampled_from([0.0, 0.5, 1.0]),
    output_cv=st.sampled_from([0.0, 0.5, 1.0]),
    prefix_hit_rate=st.sampled_from([0.0, 0.5, 0.9]),
)
limit_settings = st.builds(
    EngineLimits,
    max_num_seqs=st.sampled_from([1, 4, 16, 64, 256]),
    max_num_batched_tokens=st.sampled_from([2048, 8192, 16384]),
    async_scheduling=st.booleans(),
)
engines = st.sampled_from(list(ENGINES.values()))


@given(steps=engines, traffic=traffics, limits=limit_settings, load=st.floats(0.01, 1.2))
@settings(max_examples=examples(150), deadline=None)
def test_every_answer_is_finite_positive_and_its_percentiles_ascend(steps, traffic, limits, load):
    capacity = 1.0 / predict(steps, traffic, limits).utilisation
    prediction = predict(steps, replace(traffic, rate=capacity * load), limits)
    assert prediction.utilisation == pytest.approx(load)
    assert 0.0 <= prediction.kv_use <= 1.0
    assert 0.0 <= prediction.wait_probability <= 1.0
    assert prediction.mean_batch <= limits.max_num_seqs
    for latency in (prediction.ttft, prediction.tpot, prediction.e2e):
        values = [latency.p50, latency.p90, latency.p95, latency.p99, latency.p999]
        assert all(isfinite(value) and value > 0.0 for value in (latency.mean, *values))
        assert all(low <= high * (1 + 1e-9) for low, high in pairwise(values))
        assert latency.mean <= latency.p999 * 1.01


@given(
    steps=engines,
    traffic=traffics,
    limits=limit_settings,
    load=st.floats(0.05, 0.8),
    more=st.floats(1.1, 1.5),
)
@example(  # what a prompt costs on average was once added to what one costs beside every batch
    steps=ENGINES["8B on H100"],
    traffic=Traffic(1.0, 87, 19, 0.5, 1.0, 0.9),
    limits=EngineLimits(256, 16384),
    load=0.332,
    more=1.165,
)
@example(  # with one slot nobody interrupts a decode, at any load
    steps=ENGINES["8B on H100"],
    traffic=Traffic(1.0, 2351, 20, 0.0, 0.5),
    limits=EngineLimits(1, 2048),
    load=0.594,
    more=1.497,
)
@example(  # what a further prompt adds was read off a steep place of the token curve
    steps=ENGINES["8B on H100"],
    traffic=Traffic(1.0, 68, 23, 0.5, 0.5, 0.9),
    limits=EngineLimits(256, 8192, async_scheduling=False),
    load=0.3388,
    more=1.128,
)
@settings(max_examples=examples(200), deadline=None)
def test_more_rate_never_lowers_latency(steps, traffic, limits, load, more):
    # The batch is coupled to the steps by iteration, not solved jointly: ripples up to 2 % are let pass.
    capacity = 1.0 / predict(steps, traffic, limits).utilisation
    assume(load * more < 0.9)
    low = predict(steps, replace(traffic, rate=capacity * load), limits)
    high = predict(steps, replace(traffic, rate=capacity * load * more), limits)
    for metric in ("ttft", "tpot", "e2e"):
        assert getattr(high, metric).mean >= 0.98 * getattr(low, metric).mean


@given(traffic=traffics, limits=limit_settings)
@settings(max_examples=examples(100), deadline=None)
def test_throughput_never_exceeds_the_ideal_roofline(traffic, limits):
    steps = H100
    ideal = RooflineConstants(
        mbu=1.0,
        mbu_kv=1.0,
        mfu=1.0,
        mfu_attention=1.0,
        layer_us=0.0,
        prompt_layer_us=0.0,
        step_us=0.0,
        request_us=0.0,
        kv_head_us=0.0,
        token_us=0.0,
        allreduce_us=0.0,
        link_efficiency=1.0,
        allreduce_many_us=0.0,
        link_efficiency_many=1.0,
    )
    roofline = Roofline(LLAMA, accelerator("h100"), ideal)
    capacity = 1.0 / predict(steps, traffic, limits).utilisation
    batch = min(limits.max_num_seqs, steps.kv_capacity_tokens / traffic.prompt_tokens)
    fastest = roofline.step_ms(0, 0, batch, batch * traffic.prompt_tokens)
    assert capacity * (traffic.output_tokens - 1) <= 1e3 * batch / fastest
    # Every prompt token not cached must be multiplied with every weight.
    fresh = traffic.prompt_tokens * (1.0 - traffic.prefix_hit_rate)
    assert capacity * fresh * roofline.compute_ms(1.0) <= 1e3


@given(
    steps=engines,
    traffic=traffics,
    target=st.floats(20.0, 5000.0),
    tighter=st.floats(0.2, 1.0),
    metric=st.sampled_from(["ttft", "tpot", "e2e"]),
    percentile=st.sampled_from(["mean", "p50", "p99"]),
)
@settings(max_examples=examples(60), deadline=None)
def test_a_tighter_objective_never_gives_a_larger_rate(steps, traffic, target, tighter, metric, percentile):
    loose = max_rate(steps, traffic, [Objective(metric, percentile, target)])
    tight = max_rate(steps, traffic, [Objective(metric, percentile, target * tighter)])
    both = max_rate(
        steps, traffic, [Objective(metric, percentile, target), Objective("tpot", "mean", target / 10.0)]
    )
    assert tight.rate <= loose.rate
    assert both.rate <= loose.rate


def test_the_largest_rate_keeps_its_objectives_and_a_little_more_breaks_them():
    objectives = [Objective("ttft", "p99", 500.0), Objective("tpot", "p99", 50.0)]
    sized = max_rate(H100, CHAT, objectives)
    assert sized.rate > 10.0
    for objective in objectives:
        assert objective.expected_ms(sized.prediction, 1.4) <= objective.target_ms
    assert sized.binding in objectives
    beyond = predict(H100, replace(CHAT, rate=1.05 * sized.rate))
    assert any(objective.expected_ms(beyond, 1.4) > objective.target_ms for objective in objectives)


def test_an_objective_that_an_idle_engine_misses_gives_no_rate_and_says_which():
    sized = max_rate(H100, CHAT, [Objective("e2e", "p99", 200.0)])
    assert sized.rate == 0.0
    assert sized.binding == Objective("e2e", "p99", 200.0)
    # 27 output tokens fit into 200 ms on an idle H100; 128 do not.
    assert max_rate(H100, replace(CHAT, output_tokens=24), [Objective("e2e", "p99", 200.0)]).rate > 0.0


def test_without_objectives_the_capacity_counts():
    sized = max_rate(H100, CHAT, [], utilisation=0.8)
    assert sized.binding is None
    assert sized.prediction.utilisation == pytest.approx(0.8 * 0.985, rel=1e-6)


def test_the_tail_margin_lowers_the_rate():
    objectives = [Objective("ttft", "p99", 120.0)]
    assert max_rate(H100, CHAT, objectives, tail_margin=1.0).rate > max_rate(H100, CHAT, objectives).rate


@pytest.mark.parametrize(
    "arguments", [("itl", "p99", 10.0), ("ttft", "p42", 10.0), ("ttft", "p99", 0.0), ("ttft", "p99", -1.0)]
)
def test_objectives_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match=r"unknown|above 0"):
        Objective(*arguments)


bins = st.lists(st.floats(0.0, 1.0), min_size=analytic._BINS, max_size=analytic._BINS).filter(
    lambda values: sum(values) > 0.1
)
terms = st.lists(
    st.tuples(st.floats(0.0, 1.5 * analytic._BINS), st.floats(0.01, 1.0)), min_size=1, max_size=8
)


@given(one=bins, first=terms, second=terms)
def test_sums_by_long_integers_are_convolutions(one, first, second):
    def normal(points):
        return [(at, weight / sum(w for _, w in points)) for at, weight in points]

    one = [value / sum(one) for value in one]
    expected = one
    for points in (normal(first), normal(second)):
        total = [0.0] * analytic._BINS
        for at, weight in points:
            low, share = int(at), at - int(at)
            for index, value in enumerate(expected):
                for shift, part in ((low, 1.0 - share), (low + 1, share)):
                    if index + shift < analytic._BINS:
                        total[index + shift] += value * weight * part
        expected = total
    expected[-1] += 1.0 - sum(expected)
    assert analytic._plus(one, normal(first), normal(second)) == pytest.approx(expected, abs=1e-3)
    assert sum(analytic._plus(one, normal(first), normal(second))) == pytest.approx(1.0, abs=1e-9)


@given(cv=st.floats(0.02, 2.0))
def test_slices_of_lengths_keep_the_mean_and_the_whole(cv):
    slices = analytic._slices(round(cv, 2), analytic._FINE)
    assert sum(weight for _, weight in slices) == pytest.approx(1.0, abs=1e-9)
    assert sum(size * weight for size, weight in slices) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 0.0},
        {"rate": float("nan")},
        {"prompt_tokens": 0.5},
        {"output_tokens": float("inf")},
        {"prompt_cv": -0.1},
        {"output_cv": 11.0},
        {"prefix_hit_rate": 1.1},
    ],
)
def test_traffic_that_makes_no_sense_is_refused_in_one_line(change):
    with pytest.raises(ValueError, match="use") as caught:
        replace(CHAT, **change)
    assert "\n" not in str(caught.value)


def test_limits_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        EngineLimits(max_num_seqs=0)
