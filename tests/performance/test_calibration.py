"""Online calibration: it finds what was changed, generalises to more load, and ignores what it must not learn from."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from properties import examples
from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.performance.analytic import EngineLimits, Traffic, predict
from servingtiers.performance.calibration import (
    HIGHEST,
    LOWEST,
    Calibration,
    Observation,
    calibrated,
    predict_calibrated,
    update,
)
from servingtiers.performance.select import step_model
from servingtiers.performance.workload import Workload

LLAMA = model("meta-llama/Llama-3.1-8B")
MODEL = step_model(LLAMA, accelerator("a100"), use_tables=False)
LIMITS = EngineLimits()
TRAFFIC = Traffic(rate=4.0, prompt_tokens=600, output_tokens=300)
FRESH = Calibration("vllm 0.24")


def real_engine(decode=1.2, prefill=0.85):
    """An engine whose decode work and prompt work differ from what the model says."""
    return calibrated(MODEL, Calibration("real", decode, prefill, 0.0, 1.0))


def observe(engine, at, offset=12.0, noise=0.0, generator=None, **change):
    """What the engine's histograms would say in an interval."""
    seen = predict(engine, at, LIMITS)
    generator = generator or random.Random(1)

    def blurred(value):
        return value * (1.0 + generator.uniform(-noise, noise))

    queue = seen.ttft.mean - seen.prefill_ms
    prefill = blurred(seen.prefill_ms)
    fields = {
        "requests": 500.0,
        "traffic": at,
        "itl_ms": blurred(seen.tpot.mean),
        "ttft_ms": queue + prefill + offset,
        "queue_ms": queue,
        "prefill_ms": prefill,
        "kv_use": 0.3,
    }
    return Observation(**(fields | change))


def learned(engine, *, steps=40, noise=0.0, offset=12.0):
    state = FRESH
    generator = random.Random(5)
    for _ in range(steps):
        state, _ = update(MODEL, state, observe(engine, TRAFFIC, offset, noise, generator), LIMITS)
    return state


@pytest.mark.parametrize(("decode", "prefill"), [(1.2, 0.85), (0.8, 1.25), (1.0, 1.0), (1.3, 1.3)])
def test_the_factors_and_the_offset_are_found(decode, prefill):
    state = learned(real_engine(decode, prefill))
    assert state.decode_factor == pytest.approx(decode, rel=0.03)
    assert state.prefill_factor == pytest.approx(prefill, rel=0.03)
    assert state.offset_ms == pytest.approx(12.0, rel=0.02)


def test_noise_is_averaged_out():
    state = learned(real_engine(), noise=0.1)
    assert state.decode_factor == pytest.approx(1.2, rel=0.06)
    assert state.prefill_factor == pytest.approx(0.85, rel=0.06)


def test_what_is_learned_at_low_load_holds_at_two_and_a_half_times_the_load():
    engine = real_engine()
    state = learned(engine)
    busy = replace(TRAFFIC, rate=2.5 * TRAFFIC.rate)
    truth = predict(engine, busy, LIMITS)
    before, after = predict(MODEL, busy, LIMITS), predict_calibrated(MODEL, state, busy, LIMITS)

    def error(prediction, offset):
        return (
            abs(prediction.tpot.mean / truth.tpot.mean - 1),
            abs(prediction.ttft.mean / (truth.ttft.mean + offset) - 1),
        )

    for with_state, without in zip(error(after, 12.0), error(before, 12.0), strict=True):
        assert with_state < 0.03
        assert with_state < without / 2.0


def test_an_engine_played_by_the_event_simulation_is_learned_too():
    simulation = pytest.importorskip("servingtiers.performance.engine_sim")
    engine = real_engine()

    def seen_at(rate, seed):
        pool = simulation.PoolConfig(engine, simulation.EngineConfig())
        return simulation.simulate(pool, Workload(600, 300, rate=rate), requests=6000, seed=seed)

    state = FRESH
    for seed in range(8):
        seen = seen_at(TRAFFIC.rate, seed)
        observation = Observation(
            requests=6000,
            traffic=TRAFFIC,
            itl_ms=seen.itl.mean,
            ttft_ms=seen.ttft.mean + 12.0,
            queue_ms=seen.queue.mean,
            prefill_ms=seen.ttft.mean - seen.queue.mean,
            kv_use=0.3,
        )
        state, _ = update(MODEL, state, observation, LIMITS)
    busy = replace(TRAFFIC, rate=2.5 * TRAFFIC.rate)
    truth = seen_at(busy.rate, 99)
    after, before = predict_calibrated(MODEL, state, busy, LIMITS), predict(MODEL, busy, LIMITS)
    assert abs(after.tpot.mean / truth.tpot.mean - 1) < min(0.04, abs(before.tpot.mean / truth.tpot.mean - 1))
    assert abs(after.ttft.mean / (truth.ttft.mean + 12) - 1) < min(
        0.06, abs(before.ttft.mean / (truth.ttft.mean + 12) - 1)
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"requests": 199.0}, "fewer than 200"),
        ({"kv_use": 0.05}, "KV use"),
        ({"kv_use": 0.95}, "KV use"),
        ({"waiting": 2.0}, "waiting"),
        ({"preemptions": 1.0}, "preempted"),
        ({"scaled_recently": True}, "came or went"),
        ({"itl_ms": float("nan")}, "missing"),
        ({"ttft_ms": float("inf")}, "missing"),
        ({"prefill_ms": 0.0}, "missing"),
        ({"queue_ms": float("nan")}, "queue time"),
        ({"traffic": replace(TRAFFIC, rate=1e6)}, "saturated"),
    ],
)
def test_observations_that_teach_nothing_are_left_out_with_the_reason(change, words):
    state, reason = update(MODEL, FRESH, observe(MODEL, TRAFFIC, **change), LIMITS)
    assert state == FRESH
    assert reason.startswith("left out")
    assert words in reason


def test_one_outlier_changes_nothing_and_three_in_a_row_start_anew():
    state = learned(real_engine())
    odd = observe(real_engine(2.0, 1.7), TRAFFIC)
    first, reason = update(MODEL, state, odd, LIMITS)
    assert "outlier" in reason
    assert (first.decode_factor, first.prefill_factor) == (state.decode_factor, state.prefill_factor)
    normal, _ = update(MODEL, first, observe(real_engine(), TRAFFIC), LIMITS)
    assert normal.outliers == 0
    changed = state
    for _ in range(3):
        changed, _ = update(MODEL, changed, odd, LIMITS)
    assert changed.requests == odd.requests
    assert changed.decode_factor > 1.6


@given(
    observations=st.lists(
        st.tuples(st.floats(0.01, 100.0), st.floats(0.01, 100.0), st.floats(0.0, 1e5), st.floats(200.0, 1e5)),
        max_size=12,
    )
)
@settings(max_examples=examples(60), deadline=None)
def test_the_state_stays_within_its_bounds_whatever_is_seen(observations):
    state = FRESH
    for itl, prefill, offset, requests in observations:
        seen = observe(MODEL, TRAFFIC)
        odd = replace(
            seen,
            itl_ms=seen.itl_ms * itl,
            prefill_ms=seen.prefill_ms * prefill,
            ttft_ms=seen.queue_ms + seen.prefill_ms * prefill + offset,
            requests=requests,
        )
        state, _ = update(MODEL, state, odd, LIMITS)
        assert LOWEST <= state.decode_factor <= HIGHEST
        assert LOWEST <= state.prefill_factor <= HIGHEST
        assert 0.0 <= state.offset_ms <= 2000.0
        predict_calibrated(MODEL, state, TRAFFIC, LIMITS)


def test_the_state_survives_json_and_another_engine_starts_anew():
    state = learned(real_engine(), steps=3)
    stored = json.loads(json.dumps(state.to_json()))
    back = Calibration.from_json(stored, "vllm 0.24")
    assert back.decode_factor == pytest.approx(state.decode_factor, abs=1e-4)
    assert back.requests == pytest.approx(state.requests)
    assert Calibration.from_json(stored, "vllm 0.25") == Calibration("vllm 0.25")
    assert len(json.dumps(stored)) < 300


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"engine": "vllm 0.24"},
        {"engine": "vllm 0.24", "decode_factor": "much"},
        learned(real_engine(), steps=1).to_json() | {"decode_factor": 7.0},
        learned(real_engine(), steps=1).to_json() | {"offset_ms": float("nan")},
        learned(real_engine(), steps=1).to_json() | {"requests": -1.0},
    ],
)
def test_a_broken_stored_state_is_a_fresh_one(document):
    assert Calibration.from_json(document, "vllm 0.24") == FRESH


def test_an_unlearned_calibration_changes_nothing():
    assert calibrated(MODEL, FRESH) is MODEL
    assert predict_calibrated(MODEL, FRESH, TRAFFIC) == predict(MODEL, TRAFFIC)


def test_learning_narrows_the_band_and_is_told():
    state = learned(real_engine())
    source = calibrated(MODEL, state).source
    assert source.band_percent < MODEL.source.band_percent
    assert "calibrated on 20000 live requests" in source.detail
