"""What policies are told is what the operator's own telemetry would tell them."""

from __future__ import annotations

from dataclasses import fields

import pytest

from servingtiers.core.signals import Histogram, Load, RouterLoad, Unknown, Value, Zero, number
from servingtiers.lab.vllm_metrics import EngineMetrics
from servingtiers.simulate.fleet import Fleet, run
from servingtiers.simulate.policies import OperatorPolicy
from servingtiers.simulate.rivals import make_policy
from servingtiers.simulate.telemetry import (
    HISTOGRAM_KEYS,
    FaultKind,
    MetricFault,
    PoolRecorder,
    bucket_bounds,
)


def same(one, other) -> bool:
    """Whether two signals say the same."""
    if type(one) is not type(other):
        return False
    match one:
        case Value():
            return (
                one.value == pytest.approx(other.value, rel=1e-9)
                and one.age == pytest.approx(other.age)
                and one.partial == other.partial
            )
        case Zero():
            return one.age == pytest.approx(other.age)
        case Histogram():
            return (
                one.bounds == other.bounds
                and one.partial == other.partial
                and one.counts == pytest.approx(other.counts, rel=1e-6, abs=1e-9)
                and one.sum == pytest.approx(other.sum, rel=1e-6, abs=1e-9)
            )
        case _:
            return one == other


@pytest.mark.parametrize("start_up", [3.0, 40.0])
def test_the_fast_path_says_what_the_operators_own_path_says(make_scenario, monkeypatch, start_up):
    """Every load of a run with pods that come and go is computed both ways."""
    compared = {"fast": 0, "plain": 0}
    original = PoolRecorder.load

    def both(self, pool, rows, *, now, routers, held=(), plain=False):
        quick = self._fast(pool, rows, now)
        slow = original(self, pool, rows, now=now, routers=routers, plain=True)
        if quick is None:
            compared["plain"] += 1
            return slow
        compared["fast"] += 1
        for field in fields(Load):
            if field.name not in {"flops_utilization", "bytes_rate"}:
                mine, theirs = getattr(quick, field.name), getattr(slow, field.name)
                assert same(mine, theirs), (now, field.name, mine, theirs)
        return quick

    monkeypatch.setattr(PoolRecorder, "load", both)
    from servingtiers.simulate.scenario import Delay, Noise

    scenario = make_scenario("sawtooth:1:25:900:300", start_up=Delay(start_up, 0.3), noise=Noise())
    result = run(scenario, OperatorPolicy(), 0)
    assert any(move.after > move.before for move in result.moves)
    assert compared["fast"] > 40


def test_buckets_are_those_of_the_recorded_engine():
    recorded = EngineMetrics("m", max_model_len=4096)
    mine = dict(zip(HISTOGRAM_KEYS, bucket_bounds(4096), strict=True))
    for key, attribute in (
        ("ttft", "ttft"),
        ("tpot", "tpot"),
        ("itl", "itl"),
        ("e2e", "e2e"),
        ("queue_time", "queue_time"),
        ("prompt_tokens", "request_prompt_tokens"),
        ("output_tokens", "request_generation_tokens"),
    ):
        assert tuple(mine[key]) == tuple(getattr(recorded, attribute).bounds)


def loads_under(make_scenario, kind: FaultKind, *, at: float) -> tuple[Load, RouterLoad]:
    """The load and router load that the policy sees ``at`` seconds, with a fault from 200 to 300 s."""
    scenario = make_scenario("step:8:8:600", metric_faults=(MetricFault(kind, 200.0, 300.0),), initial=3)
    seen: dict[float, tuple[Load, RouterLoad]] = {}

    class Look(OperatorPolicy):
        def decide(self, observations, now):  # type: ignore[override]
            seen[now - 1_700_000_000.0] = (
                observations[0].load.pools["pool"],
                observations[0].load.router,
            )
            return ()

    run(scenario, Look(), 0)
    return min(seen.items(), key=lambda each: abs(each[0] - at))[1]


@pytest.mark.parametrize(
    "kind", [FaultKind.DOWN, FaultKind.EMPTY, FaultKind.LATE, FaultKind.AHEAD, FaultKind.RENAMED]
)
def test_a_fault_that_hides_everything_is_unknown_and_passes(make_scenario, kind):
    load, router = loads_under(make_scenario, kind, at=290)
    for name in ("running", "waiting", "request_rate", "ttft", "e2e"):
        assert isinstance(getattr(load, name), Unknown), name
    if kind is not FaultKind.RENAMED:
        assert isinstance(router.arrival_rate, Unknown)
        assert load.coverage.answered == 0
    after, router = loads_under(make_scenario, kind, at=440)
    assert number(after.running) is not None
    assert number(router.arrival_rate) == pytest.approx(8, rel=0.4)


@pytest.mark.parametrize("kind", [FaultKind.NAN, FaultKind.INFINITE, FaultKind.NEGATIVE, FaultKind.ABSURD])
def test_a_number_that_cannot_be_is_unknown(make_scenario, kind):
    load, _ = loads_under(make_scenario, kind, at=290)
    assert isinstance(load.running, Unknown)
    assert isinstance(load.waiting, Unknown)


def test_half_the_pods_are_a_lower_bound(make_scenario):
    load, _ = loads_under(make_scenario, FaultKind.PARTIAL, at=290)
    assert not load.coverage.complete
    assert isinstance(load.running, Value)
    assert load.running.partial


def test_frozen_engines_are_not_taken_for_idle(make_scenario):
    load, _ = loads_under(make_scenario, FaultKind.FROZEN, at=290)
    assert not isinstance(load.request_rate, Zero)


def test_a_reset_of_counters_is_no_negative_rate(make_scenario):
    load, _ = loads_under(make_scenario, FaultKind.RESET, at=230)
    assert load.resets == 3
    assert number(load.request_rate) == pytest.approx(8, rel=0.5)


@pytest.mark.parametrize("kind", sorted(FaultKind))
def test_nothing_shrinks_under_any_fault_or_for_five_minutes_after(make_scenario, kind):
    """The load falls to a quarter just before the fault, so that a policy that believes what it sees would shrink."""
    scenario = make_scenario(
        "step:5:5:1500",
        scaling={"maxReplicas": 6},
        initial=4,
        metric_faults=(MetricFault(kind, 120.0, 600.0),),
    )
    result = run(scenario, make_policy("servingtiers", scenario), 0)
    # M18 leaves every second scrape: that is a complete view at half the pace, so only the fault itself is held to.
    held = (
        600.0 if kind in {FaultKind.RESET, FaultKind.TWICE, FaultKind.NEGATIVE, FaultKind.ABSURD} else 660.0
    )
    late = [move for move in result.moves if move.after < move.before and 120.0 <= move.time < held]
    if kind not in {FaultKind.RESET, FaultKind.NO_HISTORY, FaultKind.TWICE}:
        assert not late


def test_a_rival_is_shown_no_load_and_its_own_readings(make_scenario):
    scenario = make_scenario("step:5:5:60")
    fleet = Fleet(scenario, make_policy("keda-waiting", scenario), 0)
    observation = fleet.observation(fleet._tiers[0])
    assert observation.load.pools == {}
    assert observation.pools[0].ready == observation.pools[0].replicas > 0
