"""Capacity, scores and limits: the yardsticks themselves are measured."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from servingtiers.core.decisions import PoolRole, Targets
from servingtiers.core.signals import Coverage, Histogram, Load
from servingtiers.performance.engine_sim import EngineConfig
from servingtiers.policy import capacity, presets
from servingtiers.simulate import limits
from servingtiers.simulate.capacity import capacity_rps, work_of
from servingtiers.simulate.fleet import Move, PoolHistory, RunResult, TierOutcome, run
from servingtiers.simulate.limits import (
    TARGET,
    Clairvoyant,
    _need,
    _orders,
    clairvoyant,
    clairvoyant_run,
    static_optimal,
    static_run,
)
from servingtiers.simulate.rivals import RIVALS, make_policy
from servingtiers.simulate.scenario import Delay
from servingtiers.simulate.scoring import missed, score
from servingtiers.simulate.tiers import default_config, parse_tier, tier_plan, with_error
from servingtiers.simulate.traces import load_trace

LIMITS = (("tpot", 0.1), ("ttft", 2.0))


@pytest.fixture(scope="module")
def plan(make_scenario):
    return make_scenario("step:4:12:600:200").tiers[0]


# --- capacity -------------------------------------------------------------------------------------------------------


def test_the_capacity_of_one_replica_keeps_the_objectives_and_a_fifth_more_does_not(make_scenario, plan):
    pool = plan.pools[0]
    rate = capacity_rps(pool.model, pool.engine, pool.role, (800.0, 0.0), (120.0, 0.0), LIMITS)
    kept = {}
    for factor in (0.9, 1.2):
        trace = load_trace(f"step:{rate * factor}:{rate * factor}:900", seed=3, prompt=800, output=120)
        fixed = trace.__class__(
            "fixed lengths",
            "synthetic",
            trace.seconds,
            trace.arrival,
            np.full(len(trace), 800),
            np.full(len(trace), 120),
            trace.shared,
        )
        scenario = make_scenario(fixed, initial=1)
        kept[factor] = score(static_run(scenario, {("llm/chat", "pool"): 1}, 0)).violations
    assert kept[0.9] <= 0.015
    assert kept[1.2] > 0.02


def test_capacity_falls_with_longer_requests_and_rises_with_looser_objectives(plan):
    pool = plan.pools[0]

    def rate(prompt, output, ttft=2.0, tpot=0.1):
        limits = (("tpot", tpot), ("ttft", ttft))
        return capacity_rps(pool.model, pool.engine, pool.role, (prompt, 0.5), (output, 0.5), limits)

    assert rate(2000.0, 120.0) < rate(800.0, 120.0)
    assert rate(800.0, 400.0) < rate(800.0, 120.0)
    assert rate(800.0, 120.0, ttft=1.0, tpot=0.03) < rate(800.0, 120.0)


def test_what_a_lone_request_cannot_keep_is_no_capacity(plan):
    pool = plan.pools[0]
    hopeless = (("tpot", 0.0001),)
    assert capacity_rps(pool.model, pool.engine, pool.role, (800.0, 0.0), (120.0, 0.0), hopeless) == 0.0


def test_the_work_of_the_mean_request_is_one_over_the_capacity(plan):
    pool = plan.pools[0]
    work = work_of(pool.model, pool.engine, pool.role, (800.0, 0.5), (120.0, 0.5), LIMITS)
    rate = capacity_rps(pool.model, pool.engine, pool.role, (800.0, 0.5), (120.0, 0.5), LIMITS)
    assert work.seconds(800.0, 120.0) == pytest.approx(1 / rate, rel=1e-9)
    assert work.prompt > 0
    assert work.output > 0


def test_a_prefill_pool_is_paid_by_the_prompt_alone(plan):
    pool = plan.pools[0]
    work = work_of(pool.model, EngineConfig(16, 16_384), PoolRole.PREFILL, (800.0, 0.5), (120.0, 0.5), LIMITS)
    assert work.output == 0.0


def test_what_the_operator_tells_its_policy_is_what_the_operator_judges():
    document = {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "spec": {
            "tier": "Balanced",
            "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"},
            "slo": {"ttft": {"p99": "2s"}, "tpot": {"p99": "50ms"}},
            "workload": {
                "promptTokens": {"mean": 800, "p95": 2000},
                "outputTokens": {"mean": 120, "p95": 300},
            },
            "pool": {"hardware": {"accelerators": ["a100-sxm-80gb"]}},
        },
    }
    tier = parse_tier(document)
    made = tier_plan(tier, load_trace("step:2:2:60", prompt=800, output=120), model_error=1.3)
    told = made.pools[0].operator
    settings = presets.choose(tier, default_config())
    judged = capacity.judge(tier.spec, settings, presets.targets(tier.spec))
    # The operator has the table that the plant runs on; here its policy is told the roofline's figure, times the error.
    truth = replace(told, engine=replace(told.engine, step=made.pools[0].model))
    assert truth.rps() == pytest.approx(1.3 * judged.curves["pool"].rps)
    assert told.rps() != pytest.approx(1.3 * judged.curves["pool"].rps, rel=1e-3)


def test_the_operators_capacity_follows_the_lengths_that_are_seen(plan):
    told = plan.pools[0].operator
    assert told.rps() is None  # the tier gives no workload

    def seen(prompt: float) -> Load:
        return Load(
            60.0,
            Coverage(1, 1),
            prompt_tokens=Histogram((1e4, math.inf), (500.0, 500.0), 500 * prompt),
            output_tokens=Histogram((1e4, math.inf), (500.0, 500.0), 60_000.0),
        )

    short, long = told.rps(seen(500.0)), told.rps(seen(2000.0))
    assert short is not None
    assert long is not None
    assert long < 0.6 * short


def test_a_model_error_changes_what_is_believed_and_nothing_of_the_plant(plan):
    wrong = with_error(plan, 1.4)
    assert wrong.pools[0].belief.rps() == pytest.approx(1.4 * plan.pools[0].belief.rps())
    assert wrong.pools[0].operator.error == 1.4
    assert wrong.pools[0].model is plan.pools[0].model


# --- scoring --------------------------------------------------------------------------------------------------------


def outcome(plan, arrival, first, last, output, refused) -> RunResult:
    history = PoolHistory("pool", *(np.array([0]) for _ in range(6)), gpus=1, gpu_seconds=7200.0, peak=3)
    tier = TierOutcome(
        plan,
        np.array(arrival, dtype=float),
        np.array(first, dtype=float),
        np.array(last, dtype=float),
        np.array(output),
        np.array(refused, dtype=bool),
        (history,),
    )
    moves = (Move(10.0, plan.key, "pool", 1, 3, "", ""), Move(50.0, plan.key, "pool", 3, 2, "", ""))
    return RunResult("by hand", 0, 600.0, 0.0, 300.0, (tier,), moves, (), 1, 0.0, complete=True)


def test_a_score_worked_by_hand(plan):
    nan = math.nan
    # kept; late first token; slow tokens (0.2 s each); refused; unfinished
    result = outcome(
        plan,
        [0, 0, 0, 0, 0],
        [1, 3, 1, nan, 1],
        [2, 4, 3, nan, nan],
        [11, 11, 11, 11, 11],
        [False, False, False, True, False],
    )
    assert missed(result.tiers[0]).tolist() == [False, True, True, True, True]
    found = score(result)
    assert found.attainment == pytest.approx({"ttft": 2 / 5, "tpot": 2 / 5, "e2e": 3 / 5, "joint": 1 / 5})
    assert (found.rejected, found.unfinished, found.gpu_hours) == (1, 1, 2.0)
    assert (found.scale_ups, found.scale_downs, found.reversals) == (1, 1, 1)
    assert found.p99["ttft"] == math.inf
    assert found.to_json()["p99Seconds"]["ttft"] is None


def test_the_worst_five_minutes_need_twenty_requests(plan):
    arrival = [1.0] * 30 + [400.0] * 10
    first = [1.5] * 24 + [9.0] * 6 + [409.0] * 10
    last = [value + 0.5 for value in first]
    found = score(outcome(plan, arrival, first, last, [10] * 40, [False] * 40))
    assert found.worst5min == pytest.approx(24 / 30)


def test_a_tier_without_objectives_asks_to_be_answered(plan):
    free = replace(plan, targets=Targets({}))
    found = score(outcome(free, [0, 0], [100, math.nan], [200, math.nan], [5, 5], [False, True]))
    assert found.attainment["joint"] == 0.5


# --- limits ---------------------------------------------------------------------------------------------------------


def test_static_optimal_is_the_least_that_keeps_the_target(make_scenario):
    scenario = make_scenario("step:10:40:400:100", scaling={"maxReplicas": 12})
    best = static_optimal(scenario, 0)
    key = ("llm/chat", "pool")
    assert best.feasible
    assert best.score.violations <= TARGET
    assert best.replicas[key] > 1
    assert score(static_run(scenario, {key: best.replicas[key] - 1}, 0)).violations > TARGET


def test_where_one_percent_is_out_of_reach_the_level_is_what_can_be_reached(make_scenario):
    scenario = make_scenario("step:60:60:200", scaling={"maxReplicas": 2})
    best = static_optimal(scenario, 0)
    assert not best.feasible
    assert best.level > TARGET
    assert best.replicas["llm/chat", "pool"] == 2


def test_static_optimal_finds_a_ratio(make_scenario):
    scenario = make_scenario("step:8:8:200", split=True, scaling={"maxReplicas": 6})
    best = static_optimal(scenario, 0)
    assert best.score.violations <= TARGET
    for name in ("prefill", "decode"):
        fewer = dict(best.replicas)
        fewer["llm/chat", name] -= 1
        if fewer["llm/chat", name]:
            assert score(static_run(scenario, fewer, 0)).violations > TARGET


def test_static_optimal_finds_fewer_where_more_decode_engines_would_not_do(make_scenario, monkeypatch):
    """No two engines are equally fast: two prefill engines that do beside six decode engines may not beside eight."""

    def violations(replicas: dict[tuple[str, str], int]) -> float:
        prefill, decode = replicas.values()
        return 0.0 if (prefill >= 3 and decode >= 6) or (prefill, decode) == (2, 6) else 0.5

    monkeypatch.setattr(limits, "static_run", lambda _scenario, replicas, _seed: replicas)
    monkeypatch.setattr(limits, "score", lambda replicas: SimpleNamespace(violations=violations(replicas)))
    scenario = make_scenario("step:8:8:200", split=True, scaling={"maxReplicas": 8})
    assert list(static_optimal(scenario, 0).replicas.values()) == [2, 6]


def test_no_policy_beats_the_clairvoyant_at_its_own_violations(make_scenario):
    scenario = make_scenario("sawtooth:5:50:1200:600", scaling={"maxReplicas": 12}, start_up=Delay(60.0, 0.2))
    limit = clairvoyant(scenario, 0)
    best = limit.best(TARGET)
    assert best is not None
    for name in ("servingtiers", *RIVALS):
        found = score(run(scenario, make_policy(name, scenario), 0))
        if found.violations <= TARGET:
            assert found.gpu_hours > 0.97 * best.gpu_hours, name
    again = score(clairvoyant_run(scenario, 0, limit, best))
    assert again.gpu_hours == pytest.approx(best.gpu_hours)
    fixed = static_optimal(scenario, 0)
    assert best.gpu_hours <= fixed.score.gpu_hours + 1e-9


def test_needs_cover_the_bin_before_and_after_its_work():
    demand = np.zeros(24)
    demand[12] = 3.0
    need = _need(demand, 15.0, 1.0, 8)
    assert need.tolist() == [1] * 24
    assert _need(demand, 5.0, 1.5, 8)[12] == 5
    assert _need(demand, 15.0, 3.0, 8).tolist()[10:15] == [3, 3, 3, 3, 3]


def test_orders_come_a_start_up_ahead_and_short_gaps_are_kept(make_scenario):
    scenario = make_scenario(start_up=Delay(30.0), scheduling=1.0, termination=5.0)
    need = np.array([1] * 20 + [2] * 4 + [1] * 4 + [2] * 4 + [1] * 40)
    times, replicas, initial = _orders(scenario, 0, need)
    assert initial == 1
    # Up at 100 s - 31 s, and the gap of 20 s is shorter than the 36 s a new start would cost.
    assert dict(zip(times.tolist(), replicas.tolist(), strict=True)) == {0.0: 1, 65.0: 2, 160.0: 1}


def test_an_envelope_without_a_run_that_good_is_none():
    assert Clairvoyant().gpu_hours(0.01) is None
    assert Clairvoyant().best(0.01) is None


def test_a_tier_whose_requests_all_exceed_its_engines_is_refused(make_scenario):
    document = {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "spec": {
            "tier": "Balanced",
            "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"},
            "pool": {
                "hardware": {"accelerators": ["a100-sxm-80gb"]},
                "engine": {"maxModelLen": 64},
            },
        },
    }
    with pytest.raises(ValueError, match="longer than the 64 tokens"):
        tier_plan(parse_tier(document), load_trace("step:1:1:30", prompt=900, output=90))
