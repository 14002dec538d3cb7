"""The fleet: every request is accounted for, every second of an accelerator is paid, and the same seed is the same run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from properties import examples
from servingtiers.core.decisions import Binding, Decision, TierDecision
from servingtiers.performance import engine_kernel as kernel
from servingtiers.performance.engine_sim import PoolConfig, make_pool, make_requests
from servingtiers.simulate.fleet import Fleet, run
from servingtiers.simulate.policies import OperatorPolicy
from servingtiers.simulate.rivals import make_policy
from servingtiers.simulate.rivals.static import StaticReplicas
from servingtiers.simulate.scenario import Crash, Delay, NodeShortage, Noise, Outage, slo_of
from servingtiers.simulate.scoring import missed, reversals, score
from servingtiers.simulate.traces import Trace, load_trace


def trace_of(*requests: tuple[float, int, int], seconds: float = 300.0) -> Trace:
    """A trace of (arrival, prompt, output)."""
    columns = np.array(requests, dtype=np.float64).reshape(-1, 3)
    tokens = columns[:, 1:].astype(np.int64)
    none = np.zeros(len(columns), dtype=np.int64)
    return Trace("by hand", "synthetic", seconds, columns[:, 0], tokens[:, 0], tokens[:, 1], none)


@dataclass
class Script:
    """A policy that follows a list of (time, replicas)."""

    steps: list[tuple[float, int]]
    name: str = "script"
    interval: float = 15.0
    samples: float | None = None
    reads_load: bool = True
    seen: list[Any] = field(default_factory=list)

    def sample(self, readings):
        raise AssertionError("it asked for none")

    def decide(self, observations, now):
        self.seen.append((now, observations))
        (obs,) = observations
        made = []
        for facts in obs.pools:
            wanted = facts.replicas
            for at, replicas in self.steps:
                if now - 1_700_000_000.0 >= at:
                    wanted = replicas
            made.append(Decision(facts.name, facts.replicas, wanted, "script", Binding.STEADY, ""))
        return (TierDecision(obs.key, tuple(made), obs.memory),)


def test_one_engine_in_the_fleet_is_one_engine_of_the_event_simulation(make_scenario):
    trace = load_trace("step:6:6:120", seed=5, prompt=700, output=90)
    scenario = make_scenario(trace, initial=1, front_end_ms=2.0)
    result = run(scenario, Script([]), 0)
    plan = scenario.tiers[0].pools[0]
    alone = make_requests(trace.arrival * 1e3, trace.prompt, trace.output)
    kernel.run_open(make_pool(PoolConfig(plan.model, plan.engine)), alone, 2.0, least_loaded=False)
    outcome = result.tiers[0]
    assert outcome.first == pytest.approx(alone.first / 1e3, abs=1e-9)
    assert outcome.last == pytest.approx(alone.last / 1e3, abs=1e-9)


def test_a_slower_engine_takes_longer_by_its_factor(make_scenario):
    trace = trace_of((1.0, 1000, 200))
    plain = run(make_scenario(trace, initial=1), Script([]), 0).tiers[0]
    slow = run(make_scenario(trace, initial=1, noise=Noise(0.0, 0.0, 1.25)), Script([]), 0).tiers[0]
    start = 1.001  # the front end takes a millisecond
    assert slow.last[0] - start == pytest.approx(1.25 * (plain.last[0] - start), rel=1e-9)


@settings(
    deadline=None, max_examples=examples(20), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(st.tuples(st.floats(0, 500), st.integers(1, 8)), max_size=8),
    seed=st.integers(0, 1000),
    start_up=st.floats(0, 200),
    crash=st.floats(10, 500),
)
def test_every_request_ends_somewhere_and_every_second_is_paid(make_scenario, steps, seed, start_up, crash):
    scenario = make_scenario(
        "sawtooth:1:20:600:200",
        start_up=Delay(start_up, 0.3),
        noise=Noise(),
        crashes=(Crash(crash),),
    )
    fleet = Fleet(scenario, Script(sorted(steps)), seed)
    result = fleet.run()
    outcome = result.tiers[0]
    done = ~np.isnan(outcome.last)
    assert not (done & outcome.refused).any()
    figures = score(result)
    assert (
        done.sum() + figures.rejected + figures.unfinished == figures.requests == len(scenario.tiers[0].trace)
    )
    assert (outcome.first[done] > outcome.arrival[done]).all()
    assert (outcome.last[done] >= outcome.first[done]).all()
    # Accelerator time is between the ready ones' and that of every pod ever asked for.
    pool = outcome.pools[0]
    ready = float(pool.ready.sum()) * scenario.scrape
    assert pool.gpu_seconds >= ready - scenario.scrape * (pool.ready.max() + 1) * (len(result.moves) + 2)
    assert pool.gpu_seconds <= 600 * pool.peak + 1e-6
    assert (
        figures.attainment["joint"]
        <= min(figures.attainment[name] for name in ("ttft", "tpot", "e2e")) + 1e-12
    )


def test_the_same_seed_is_the_same_run_and_another_is_another(make_scenario):
    scenario = make_scenario("sawtooth:1:20:600:200", noise=Noise(), start_up=Delay(40, 0.3))
    first, again, other = (run(scenario, OperatorPolicy(), seed) for seed in (1, 1, 2))
    assert np.array_equal(first.tiers[0].last, again.tiers[0].last, equal_nan=True)
    assert first.moves == again.moves
    assert not np.array_equal(first.tiers[0].last, other.tiers[0].last, equal_nan=True)


def test_two_policies_meet_the_same_start_ups():
    delay = Delay(100, 0.4)
    assert [delay.draw(7, n) for n in range(5)] == [delay.draw(7, n) for n in range(5)]
    assert len({delay.draw(7, n) for n in range(5)}) == 5
    assert np.median([delay.draw(seed, 0) for seed in range(400)]) == pytest.approx(100, rel=0.1)


def test_a_new_replica_serves_after_scheduling_and_start_up(make_scenario):
    scenario = make_scenario("step:2:2:300", initial=1, start_up=Delay(60.0), scheduling=4.0)
    script = Script([(50, 3)])
    result = run(scenario, script, 0)
    (move,) = result.moves
    ready = {now - 1_700_000_000.0: obs[0].pools[0].ready for now, obs in script.seen}
    moments = [at for at, count in ready.items() if count == 3]
    assert min(moments) - (move.time + 64.0) < 15.0
    assert all(count == 1 for at, count in ready.items() if at < move.time + 64.0)
    facts = script.seen[-1][1][0].pools[0]
    assert facts.startup_seconds == 64
    # Two more from the moment they got a node: paid while they start.
    assert result.tiers[0].pools[0].gpu_seconds == pytest.approx(300 + 2 * (300 - move.time - 4.0), abs=0.01)


def test_the_newest_leaves_first_and_finishes_what_it_has(make_scenario):
    trace = trace_of(*[(float(second), 500, 300) for second in range(100)], seconds=200.0)
    result = run(make_scenario(trace, initial=2), Script([(60, 1)]), 0)
    figures = score(result)
    assert figures.rejected == figures.unfinished == 0
    (move,) = result.moves
    paid = result.tiers[0].pools[0].gpu_seconds
    # One stays for the whole run, the other leaves once it is empty, some seconds after it was told to.
    assert 200 + move.time + 5.0 < paid < 200 + move.time + 5.0 + 20.0


def test_a_drain_that_takes_too_long_is_cut_off(make_scenario):
    trace = trace_of((1.0, 500, 4000), (2.0, 500, 4000), seconds=200.0)
    scenario = make_scenario(trace, initial=2)
    tier = replace(scenario.tiers[0], drain_seconds=10.0)
    result = run(replace(scenario, tiers=(tier,)), Script([(15, 1)]), 0)
    assert score(result).rejected == 1
    assert missed(result.tiers[0]).tolist().count(True) >= 1


def test_without_an_engine_the_client_gets_503_and_the_router_says_so(make_scenario):
    trace = trace_of((20.0, 100, 10), (100.0, 100, 10), (250.0, 100, 10))
    scenario = make_scenario(trace, scaling={"minReplicas": 0}, initial=0, start_up=Delay(30.0))
    script = Script([(0, 0), (110, 1)])
    result = run(scenario, script, 0)
    figures = score(result)
    assert figures.rejected == 2
    assert np.isfinite(result.tiers[0].last[2])
    unserved = [obs[0].load.router.unserved for _, obs in script.seen]
    assert any(getattr(each, "value", 0) == 1 for each in unserved)


def test_the_operators_policy_wakes_a_tier_at_zero_and_puts_it_to_sleep(make_scenario):
    trace = trace_of((100.0, 100, 10), (260.0, 100, 10), seconds=900.0)
    scenario = make_scenario(
        trace, scaling={"minReplicas": 0, "idleAfter": "120s"}, initial=0, start_up=Delay(30.0)
    )
    result = run(scenario, make_policy("servingtiers", scenario), 0)
    assert [(move.before, move.after) for move in result.moves] == [(0, 1), (1, 0)]
    assert score(result).rejected == 1


def test_pods_without_an_accelerator_wait_for_one(make_scenario):
    scenario = make_scenario("step:2:2:400", initial=2, accelerators=3, start_up=Delay(10.0))
    script = Script([(30, 5), (200, 2)])
    result = run(scenario, script, 0)
    facts = {now - 1_700_000_000.0: obs[0].pools[0] for now, obs in script.seen}
    crowded = [each for at, each in facts.items() if 60 < at < 190]
    assert all((each.replicas, each.ready, each.unschedulable) == (5, 3, 2) for each in crowded)
    assert result.tiers[0].pools[0].peak == 3


def test_a_shortage_of_nodes_ends(make_scenario):
    scenario = make_scenario(
        "step:2:2:400", initial=1, shortages=(NodeShortage(20.0, 200.0),), start_up=Delay(10.0)
    )
    script = Script([(30, 2)])
    run(scenario, script, 0)
    ready = {now - 1_700_000_000.0: obs[0].pools[0].ready for now, obs in script.seen}
    assert all(count == 1 for at, count in ready.items() if at < 205)
    assert all(count == 2 for at, count in ready.items() if at > 230)


def test_a_crash_loses_what_was_in_flight_and_the_engine_comes_back(make_scenario):
    trace = trace_of(*[(float(second), 500, 600) for second in range(60)], seconds=300.0)
    scenario = make_scenario(trace, initial=1, crashes=(Crash(30.0),), start_up=Delay(20.0))
    script = Script([])
    result = run(scenario, script, 0)
    outcome = result.tiers[0]
    gone = outcome.refused
    assert gone[(outcome.arrival > 31) & (outcome.arrival < 49)].all()
    assert gone[(outcome.arrival > 15) & (outcome.arrival < 30)].any()
    assert not gone[outcome.arrival > 52].any()
    assert result.tiers[0].pools[0].gpu_seconds == pytest.approx(300.0)


def test_an_outage_of_the_autoscaler_is_told_afterwards(make_scenario):
    scenario = make_scenario("step:2:2:300", initial=1, outages=(Outage(60.0, 160.0),))
    script = Script([])
    run(scenario, script, 0)
    times = [now - 1_700_000_000.0 for now, _ in script.seen]
    assert not any(60 <= at < 160 for at in times)
    assert script.seen[0][1][0].watching_since is None
    assert script.seen[-1][1][0].watching_since == 1_700_000_160.0


def test_prompts_go_to_prefill_and_answers_come_from_decode(make_scenario):
    scenario = make_scenario(trace_of((1.0, 4000, 100)), split=True, initial=1)
    result = run(scenario, Script([]), 0)
    outcome = result.tiers[0]
    tier = scenario.tiers[0]
    prefill, decode = tier.pools
    assert tier.transfer is not None
    ready = 1.001 + prefill.model.step_ms(4000, 0, 0, 0) / 1e3 + tier.transfer.ms(np.array([4000.0]))[0] / 1e3
    again = decode.model.step_ms(1, 3999, 0, 0) / 1e3
    assert outcome.first[0] == pytest.approx(ready + again, abs=1e-6)


def test_a_pair_counts_each_arrival_once(make_scenario):
    script = Script([])
    scenario = make_scenario("step:8:8:200", split=True, initial=2)
    run(scenario, script, 0)
    router = script.seen[-1][1][0].load.router
    assert router.arrival_rate.value == pytest.approx(8, rel=0.25)


def test_several_tiers_share_the_accelerators(make_scenario):
    one = make_scenario("step:2:2:300", initial=1).tiers[0]
    two = replace(one, key="llm/other")
    scenario = replace(make_scenario("step:2:2:300"), tiers=(one, two), accelerators=3, start_up=Delay(10.0))
    policy = StaticReplicas(scenario, {("llm/chat", "pool"): 2, ("llm/other", "pool"): 2})
    result = run(scenario, policy, 0)
    assert [outcome.pools[0].ready[-1] for outcome in result.tiers] == [2, 1]
    figures = score(result)
    assert figures.requests == 2 * len(one.trace)


def test_least_load_keeps_queues_even_and_round_robin_counts(make_scenario):
    trace = load_trace("step:10:10:120", seed=2, prompt=900, output=150)
    spread = {}
    for routing in ("cache_aware", "round_robin", "power_of_two"):
        scenario = make_scenario(trace, initial=4)
        scenario = replace(scenario, tiers=(replace(scenario.tiers[0], routing=routing),))
        fleet = Fleet(scenario, Script([]), 0)
        fleet.run()
        pool = fleet._tiers[0].pools[0]
        counts = np.bincount(pool.journal.row, minlength=4)[:4]
        spread[routing] = counts
        assert counts.sum() == len(trace)
    assert spread["round_robin"].max() - spread["round_robin"].min() <= 1
    assert spread["power_of_two"].min() > 0.15 * len(trace)


def test_an_engines_queue_limit_answers_503(make_scenario):
    trace = trace_of(*[(10.0 + 0.001 * n, 200, 50) for n in range(40)])
    scenario = make_scenario(trace, initial=1)
    pool = replace(scenario.tiers[0].pools[0], max_queued=30)
    scenario = replace(scenario, tiers=(replace(scenario.tiers[0], pools=(pool,)),))
    script = Script([])
    assert score(run(scenario, script, 0)).rejected == 10
    seen = [obs[0].load.pools["pool"].rejection_rate for _, obs in script.seen]
    assert any(getattr(each, "value", 0) > 0 for each in seen)


def test_a_run_can_be_interrupted_and_keeps_what_it_has(make_scenario):
    class Impatient(Script):
        def decide(self, observations, now):
            if now - 1_700_000_000.0 > 100:
                raise KeyboardInterrupt
            return super().decide(observations, now)

    result = run(make_scenario("step:4:4:600"), Impatient([]), 0)
    assert not result.complete
    assert result.seconds < 130
    assert score(result).requests < 600


def test_memory_goes_through_text_as_the_status_keeps_it(make_scenario):
    scenario = make_scenario("step:10:1:600:60", initial=3)
    fleet = Fleet(scenario, make_policy("servingtiers", scenario), 0)
    fleet.run()
    assert fleet._tiers[0].pools[0].memory.model_dump(exclude_defaults=True)


def test_the_warm_up_counts_neither_requests_nor_accelerators_nor_moves(make_scenario):
    trace = load_trace("step:4:4:600", seed=1, prompt=500, output=50)
    steps = [(50, 4), (100, 2), (400, 3)]
    whole = run(make_scenario(trace, initial=2, start_up=Delay(10.0)), Script(steps), 0)
    later = run(make_scenario(trace, initial=2, start_up=Delay(10.0), warm_up=300.0), Script(steps), 0)
    found = score(later)
    assert found.requests == int((trace.arrival >= 300).sum()) < score(whole).requests
    assert (found.scale_ups, found.scale_downs, found.reversals) == (1, 0, 0)
    assert later.moves == whole.moves
    (move,) = [each for each in later.moves if each.time >= 300]
    paid = later.tiers[0].pools[0].gpu_seconds
    assert paid == pytest.approx(2 * 300 + (600 - move.time - 1.0), abs=0.01)


def test_reversals_are_changes_of_direction():
    result = run_moves([1, 3, 5, 4, 4, 6, 2])
    assert reversals(result) == 3


def run_moves(values):
    from servingtiers.simulate.fleet import Move

    return [
        Move(float(at), "t", "p", before, after, "", "")
        for at, (before, after) in enumerate(pairwise(values))
        if before != after
    ]


def test_a_request_is_held_to_the_highest_percentile(make_scenario):
    from servingtiers.core.decisions import Targets

    targets = Targets({("ttft", "p50"): 0.2, ("ttft", "p99"): 2.0, ("e2e", "p999"): 30.0})
    assert slo_of(targets) == {"ttft": 2.0, "e2e": 30.0}


@pytest.mark.parametrize("text", ["fast", "constant", "lognormal:130", "-3", "constant:1:2", "nan"])
def test_a_start_up_that_is_none_is_refused_with_the_forms(text):
    with pytest.raises(ValueError, match=r"lognormal:130:0\.25|median of 0 s"):
        Delay.parse(text)


def test_start_ups_are_read_in_three_forms():
    assert Delay.parse("130") == Delay.parse("constant:130") == Delay(130.0)
    assert str(Delay.parse("lognormal:130:0.25")) == "lognormal:130:0.25"
