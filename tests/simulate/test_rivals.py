"""Every rival does what its published algorithm does, on examples worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from servingtiers.core.decisions import PoolRole
from servingtiers.simulate.fleet import Fleet, run
from servingtiers.simulate.policies import PodReadings, PoolReadings, TierReadings
from servingtiers.simulate.rivals import KNOBS, POLICIES, RIVALS, make_policy
from servingtiers.simulate.rivals.base import Rival, Window
from servingtiers.simulate.rivals.dynamo import (
    DynamoHybrid,
    DynamoLoad,
    DynamoThroughput,
    load_step,
    replica_rps,
)
from servingtiers.simulate.rivals.hpa import (
    Behavior,
    EppKeda,
    HpaConcurrency,
    HpaWaiting,
    KedaWaiting,
    Rate,
    Stabilizer,
    average_value,
    pods_metric,
    value_metric,
)
from servingtiers.simulate.rivals.ray import RayServe, ray_desired
from servingtiers.simulate.rivals.static import StaticByPeak, work_seconds
from servingtiers.simulate.rivals.windows import AibrixApa, KnativeKpa, apa_step, kpa_step
from servingtiers.simulate.rivals.wva import (
    CHART,
    Inferno,
    QueueModel,
    WvaV1,
    WvaV2,
    v1_step,
    v2_capacity,
    v2_want,
)

KEY = ("llm/chat", "pool")


def pods(running=(), waiting=(), kv=(), *, capacity=100_000.0, tokens=None) -> PodReadings:
    count = len(running)
    return PodReadings(
        serial=np.arange(count),
        running=np.array(running, dtype=float),
        waiting=np.array(waiting or [0] * count, dtype=float),
        kv_tokens=np.array(kv or [0] * count, dtype=float),
        kv_capacity=capacity,
        waiting_tokens=np.array(tokens or [0] * count, dtype=float),
    )


def reading(found: PodReadings | None, *, empty=False, replicas=None, starting=0, **totals) -> PoolReadings:
    ready = 0 if found is None else len(found.running)
    values = {
        "done": 0,
        "prompt_tokens": 0.0,
        "output_tokens": 0.0,
        "ttft_sum": 0.0,
        "ttft_count": 0,
        "itl_sum": 0.0,
        "itl_count": 0,
        **totals,
    }
    return PoolReadings(
        "pool", found, empty, ready if replicas is None else replicas, ready, starting, **values
    )


def ask(
    policy: Rival, scenario, now: float, found: PoolReadings | None = None, *, replicas: int, ready=None
) -> int:
    """Show a reading and ask for a decision at ``now``."""
    if found is not None:
        policy.sample((TierReadings("llm/chat", now, 0, 0, (found,)),))
    fleet = Fleet(scenario, policy, 0)
    observation = fleet.observation(fleet._tiers[0])
    facts = replace(
        observation.pools[0],
        replicas=replicas,
        ready=replicas if ready is None else ready,
        settled_seconds=None,
    )
    (decision,) = policy.decide((replace(observation, pools=(facts,)),), now)
    return decision.decisions[0].desired


@pytest.fixture
def scenario(make_scenario):
    return make_scenario(scaling={"maxReplicas": 32})


# --- the HPA --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "unready", "current", "target", "wanted"),
    [
        ([15.0, 5.0], 0, 2, 5.0, 4),  # mean 10, ratio 2: ceil(2 × 2)
        ([5.4, 5.4], 0, 2, 5.0, 2),  # ratio 1.08 is within the tolerance
        ([5.6, 5.6], 0, 2, 5.0, 3),  # ratio 1.12: ceil(2.24)
        ([1.0, 1.0, 1.0, 1.0], 0, 4, 5.0, 1),  # ratio 0.2: ceil(0.8)
        ([20.0], 3, 4, 5.0, 4),  # alone ratio 4, with three unready as 0: 20/4 = 5, on target: no change
        ([40.0], 1, 2, 5.0, 8),  # with one unready: mean 20, ratio 4: ceil(4 × 2)
        ([], 2, 2, 5.0, 2),
    ],
)
def test_a_pods_metric_follows_the_replica_calculator(values, unready, current, target, wanted):
    assert pods_metric(values, unready, current, target) == wanted


def test_external_metrics_divide_by_asked_or_ready_replicas():
    assert average_value(37.0, 3, 5.0) == 8  # 37 / 5 = 7.4
    assert average_value(16.0, 3, 5.0) == 3  # 16 / 15 is within the tolerance
    assert average_value(0.0, 3, 5.0) == 0
    assert value_metric(1.4, 2, 3, 0.7) == 4  # ratio 2 on two *ready* pods
    assert value_metric(0.72, 2, 3, 0.7) == 3


def test_the_hpa_grows_by_four_pods_or_double_and_shrinks_after_five_minutes():
    hpa = Stabilizer()
    assert hpa.step(0, 1, 20) == 5  # the larger of 100 % and 4 pods
    assert hpa.step(15, 5, 20) == 10  # 100 % of 5 now exceeds 4 pods
    assert hpa.step(30, 10, 20) == 20
    assert hpa.step(45, 20, 2) == 20  # the largest recommendation of 300 s is 20
    assert hpa.step(329, 20, 2) == 20
    assert hpa.step(331, 20, 2) == 2  # the last 20 was at 30 s


def test_the_hpa_counts_what_was_added_in_the_period():
    hpa = Stabilizer()
    assert hpa.step(0, 4, 30) == 8
    assert hpa.step(5, 8, 30) == 8  # the period started with 4: 8 is its limit still
    assert hpa.step(16, 8, 30) == 16


def test_an_up_window_waits_for_agreement():
    hpa = Stabilizer(CHART)
    assert hpa.step(0, 2, 8) == 2
    assert hpa.step(120, 2, 8) == 2
    assert hpa.step(241, 2, 8) == 8


def test_a_pods_rate_limits_both_ways():
    hpa = Stabilizer(Behavior(0, 0, (Rate(2, 60, percent=False),), (Rate(1, 60, percent=False),)))
    assert hpa.step(0, 4, 20) == 6
    assert hpa.step(30, 6, 20) == 6
    assert hpa.step(61, 6, 20) == 8
    assert hpa.step(62, 8, 1) == 7


def test_hpa_concurrency_counts_running_and_waiting_against_a_share_of_the_batch(scenario):
    # 70 % of 64 is 44.8; a mean of 100 is a ratio of 2.23 on two pods: 5.
    policy = HpaConcurrency(scenario)
    assert ask(policy, scenario, 100.0, reading(pods([60, 60], [40, 40])), replicas=2) == 5


def test_hpa_waiting_wants_five_waiting_per_engine(scenario):
    assert ask(HpaWaiting(scenario), scenario, 100.0, reading(pods([64, 64], [9, 9])), replicas=2) == 4


def test_keda_takes_an_empty_result_for_zero_and_an_error_for_nothing(scenario):
    policy = KedaWaiting(scenario)
    assert ask(policy, scenario, 0.0, reading(pods([1] * 4, [10] * 4)), replicas=4) == 8  # 40 / 5
    assert ask(policy, scenario, 400.0, reading(None, replicas=8), replicas=8) == 8
    assert ask(policy, scenario, 800.0, reading(None, empty=True, replicas=8), replicas=8) == 1


def test_epp_keda_takes_the_larger_trigger(scenario):
    # Saturation: max(3/5, 0.4/0.8) = 0.6 and max(5/5, …) = 1.0, mean 0.8: ratio 1.14 on two: 3. Running 10+3+10+5 = 28: 2.
    found = reading(pods([10, 10], [3, 40], [40_000, 40_000]))
    assert ask(EppKeda(scenario), scenario, 0.0, found, replicas=2) == 3
    # Running 64+5 and 64+5 of 16: ceil(8.6) = 9, limited to two more than double: 6.
    busy = reading(pods([64, 64], [5, 5], [1000, 1000]))
    assert ask(EppKeda(scenario), scenario, 0.0, busy, replicas=2) == 6


def test_a_lag_shows_the_hpa_old_readings(scenario):
    policy = EppKeda(scenario, lag=30.0)
    for at, running in ((0.0, 1), (15.0, 60), (30.0, 60), (45.0, 60)):
        policy.sample((TierReadings("llm/chat", at, 0, 0, (reading(pods([running])),)),))
        seen = policy.latest[KEY].pods
        assert seen is not None
        assert seen.running[0] == (1 if at < 45 else 60)


# --- windows --------------------------------------------------------------------------------------------------------


def test_the_kpa_panics_at_twice_the_ready_pods():
    assert kpa_step(70.0, 70.0, 1, 70.0) == (1, False)
    assert kpa_step(90.0, 200.0, 1, 70.0) == (3, True)  # panic wants 3 of 1 ready
    assert kpa_step(90.0, 200.0, 2, 70.0) == (2, False)  # 3 of 2 is not twice
    assert kpa_step(1.0, 1.0, 9, 70.0) == (4, False)  # at most halved: floor(9 / 2)


def test_the_kpa_never_goes_down_in_panic(scenario):
    policy = KnativeKpa(scenario)
    target = 0.7 * 64
    for second in range(0, 60, 2):
        policy.sample((TierReadings("llm/chat", float(second), 0, 0, (reading(pods([10])),)),))
    for second in range(60, 66, 2):
        policy.sample((TierReadings("llm/chat", float(second), 0, 0, (reading(pods([200])),)),))
    # The panic window's mean is 200: ceil(200 / 44.8) = 5 of 1 ready.
    assert ask(policy, scenario, 66.0, replicas=1) == math.ceil(200 / target) == 5
    for second in range(66, 120, 2):
        policy.sample((TierReadings("llm/chat", float(second), 0, 0, (reading(pods([1] * 5)),)),))
    assert ask(policy, scenario, 120.0, replicas=5) == 5  # still within a stable window of the last alarm
    assert ask(policy, scenario, 128.0, replicas=5) < 5


def test_the_apa_moves_in_proportion_and_at_most_doubles_or_halves():
    assert apa_step(4, 1.05) == 4
    assert apa_step(4, 1.3) == 6
    assert apa_step(4, 3.0) == 8
    assert apa_step(4, 0.7) == 3
    assert apa_step(5, 0.1) == 2


def test_the_apa_cools_down_for_five_minutes(scenario):
    policy = AibrixApa(scenario)
    assert ask(policy, scenario, 0.0, reading(pods([1] * 4, kv=[60_000] * 4)), replicas=4) == 5
    later = 0.0
    for later in (100.0, 200.0, 290.0):
        assert ask(policy, scenario, later, reading(pods([1] * 5, kv=[5_000] * 5)), replicas=5) == 5
    assert ask(policy, scenario, 310.0, reading(pods([1] * 5, kv=[5_000] * 5)), replicas=5) < 5


# --- llm-d ----------------------------------------------------------------------------------------------------------


def test_v2_capacity_is_the_smaller_of_memory_and_compute():
    # k1 = 80,000; N = min(2048 × 250 / 1250, 256) = 256, k2 = 256 × 1125 = 288,000.
    assert v2_capacity(
        kv_tokens=100_000, budget=2048, max_seqs=256, prompt=1000, output=250, observed=None
    ) == pytest.approx(80_000)
    # N = min(512 × 100 / 1100, 256) = 46.5, k2 = 46.5 × 1050.
    assert v2_capacity(
        kv_tokens=100_000, budget=512, max_seqs=256, prompt=1000, output=100, observed=None
    ) == pytest.approx(512 * 100 / 1100 * 1050)
    assert v2_capacity(
        kv_tokens=100_000, budget=512, max_seqs=256, prompt=1000, output=100, observed=30_000.0
    ) == pytest.approx(30_000)


def test_v2_grows_above_85_and_shrinks_below_70_percent():
    assert v2_want(180_000, 2, 0, 100_000) == 3  # 211,765 - 200,000 needs one
    assert v2_want(180_000, 2, 1, 100_000) == 3  # the pending one is enough
    assert v2_want(165_000, 2, 0, 100_000) == 2  # between both
    assert v2_want(60_000, 4, 0, 100_000) == 1  # 400,000 - 85,714 spares three


def test_v2_publishes_every_minute_and_its_hpa_waits_four(scenario):
    policy = WvaV2(scenario)
    full = reading(
        pods([60, 60], [20, 20], [90_000, 90_000]), done=100, prompt_tokens=80_000.0, output_tokens=12_000.0
    )
    wanted = [ask(policy, scenario, float(now), full, replicas=2) for now in range(0, 300, 15)]
    assert set(wanted[:16]) == {2}
    assert wanted[-1] > 2


def test_infernos_queue_agrees_with_the_closed_form_of_one_server():
    # With a batch of one the queue is M/M/1/11: compare mean response with the textbook's sum.
    model = QueueModel(10.0, 0.01, 1e-5, 1, 100.0, 20.0)
    service = model.service(1)
    rate = 0.6 * service
    weights = [0.6**n for n in range(12)]
    total = sum(weights)
    in_system = sum(n * w for n, w in enumerate(weights)) / total
    admitted = rate * (1 - weights[-1] / total)
    first, per_token = model.latencies(rate)
    wait = in_system / admitted - 1 / service
    busy = 1 - weights[0] / total
    assert first == pytest.approx(wait + (model.prefill(busy) + model.decode(busy)) / 1e3, rel=1e-9)
    assert per_token > 0


def test_infernos_best_rate_keeps_both_targets_and_rises_with_them():
    model = QueueModel(8.0, 0.02, 2e-5, 64, 800.0, 120.0)
    tight, loose = model.best_rate(0.2, 0.02), model.best_rate(2.0, 0.1)
    assert 0 < tight < loose
    first, per_token = model.latencies(tight)
    assert first <= 0.2 + 1e-6
    assert per_token <= 0.02 + 1e-6


def test_inferno_counts_completions_and_scales_in_proportion(scenario):
    policy = Inferno(scenario)
    facts_at = {"prompt_tokens": 80_000.0, "output_tokens": 12_000.0}
    ask(policy, scenario, 0.0, reading(pods([1]), done=100, **facts_at), replicas=1)
    later = reading(
        pods([1]),
        done=100 + 60 * 40,
        prompt_tokens=80_000 + 800.0 * 2400,
        output_tokens=12_000 + 120.0 * 2400,
    )
    policy.sample((TierReadings("llm/chat", 60.0, 0, 0, (later,)),))
    context = policy.pools[KEY]
    ask(policy, scenario, 60.0, replicas=1)
    mix = [math.exp(round(math.log(value) / 0.05) * 0.05) for value in (800.0, 120.0)]
    best = QueueModel.fitted(context, *mix).best_rate(2.0, 0.1)
    assert policy.published[KEY][1] == math.ceil(40.0 / best - 1e-9)


# --- Dynamo ---------------------------------------------------------------------------------------------------------


def test_dynamos_decode_capacity_is_the_largest_batch_within_the_itl(make_scenario):
    scenario = make_scenario(split=True)
    rival = DynamoHybrid(scenario)
    decode, prefill = rival.pools["llm/chat", "decode"], rival.pools["llm/chat", "prefill"]
    assert decode.pool.role is PoolRole.DECODE
    batch = 1
    while batch < 64 and decode.step_ms(0, 0, batch + 1, (batch + 1) * 860.0) <= 100.0:
        batch += 1
    step = decode.step_ms(0, 0, batch, batch * 860.0)
    assert replica_rps(decode, 800.0, 120.0) == pytest.approx(1e3 * batch / (120.0 * step))
    assert replica_rps(prefill, 800.0, 120.0) == pytest.approx(1e3 / prefill.step_ms(800.0, 0, 0, 0))


def test_dynamos_load_step_needs_every_engine_to_be_late(scenario):
    context = DynamoHybrid(scenario).pools[KEY]
    late = 200_000  # queued prompt tokens: far above two seconds of prefill
    assert load_step(context, pods([60, 60], tokens=[late, late]), 2, prompt=800.0) == 1
    assert load_step(context, pods([60, 60], kv=[9e4, 9e4], tokens=[late, 0]), 2, prompt=800.0) == 0
    assert load_step(context, pods([2, 2], kv=[2000, 2000]), 2, prompt=800.0) == -1
    assert load_step(context, pods([2], kv=[2000]), 1, prompt=800.0) == 0


def test_dynamo_waits_for_its_replicas_and_keeps_its_bound(scenario):
    policy = DynamoHybrid(scenario)
    calm = reading(pods([1, 1], kv=[1000, 1000]))
    assert ask(policy, scenario, 0.0, calm, replicas=3, ready=2) == 3
    policy.bounds[KEY] = 2
    assert ask(policy, scenario, 5.0, calm, replicas=2) == 2


def test_dynamos_throughput_mode_follows_what_was_finished_in_180_seconds(scenario):
    policy = DynamoThroughput(scenario)
    context = policy.pools[KEY]
    late = 200_000

    def at(done: int):
        totals = {"done": done, "prompt_tokens": 800.0 * done, "output_tokens": 120.0 * done}
        return reading(pods([60, 60], tokens=[late, late]), **totals)

    assert ask(policy, scenario, 0.0, at(0), replicas=3) == 3  # an interval has to pass
    assert ask(policy, scenario, 175.0, at(1000), replicas=3) == 3
    count = round(4.5 * 180 * replica_rps(context, 800.0, 120.0))
    assert (
        ask(policy, scenario, 180.0, at(count), replicas=3) == 5
    )  # 4.5 replicas' worth; queues count for nothing
    assert ask(policy, scenario, 185.0, reading(None), replicas=5) == 5


def test_dynamos_load_mode_moves_by_one_whatever_was_finished(scenario):
    policy = DynamoLoad(scenario)
    late = reading(
        pods([60, 60], tokens=[200_000, 200_000]), done=10**6, prompt_tokens=8e8, output_tokens=1.2e8
    )
    calm = reading(pods([1, 1], kv=[1000, 1000]))
    assert ask(policy, scenario, 0.0, late, replicas=2) == 3
    assert ask(policy, scenario, 5.0, late, replicas=3, ready=2) == 3
    assert ask(policy, scenario, 10.0, calm, replicas=2) == 1


# --- Ray Serve ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ongoing", "running", "target", "wanted"),
    [
        (12.0, 3, 2.0, 6),
        (7.0, 3, 2.0, 4),
        (6.0, 3, 2.0, 3),
        (3.9, 3, 2.0, 2),
        (0.0, 3, 2.0, 0),
        (64.0, 1, 32.0, 2),
    ],
)
def test_ray_serve_divides_ongoing_requests_by_its_target(ongoing, running, target, wanted):
    assert ray_desired(ongoing, running, target) == wanted


def test_ray_serve_goes_up_after_30_seconds_and_down_after_600(scenario):
    policy = RayServe(scenario)
    busy, idle = reading(pods([5, 5], [1, 1])), reading(pods([1, 1]))
    wants = [ask(policy, scenario, 5.0 * n, busy, replicas=2) for n in range(8)]
    assert wants[:6] == [2] * 6
    assert wants[6] == 6  # 12 ongoing at 2 each, held for more than six ticks of 5 s
    policy = RayServe(scenario)
    wants = [ask(policy, scenario, 5.0 * n, idle, replicas=4, ready=2) for n in range(122)]
    assert wants[:120] == [4] * 120
    assert wants[120] == 1  # 2 ongoing at 2 each, held for more than 120 ticks


def test_ray_serve_starts_counting_anew_when_the_want_turns(scenario):
    policy = RayServe(scenario)
    busy, idle = reading(pods([40, 40])), reading(pods([1, 1]))
    for n in range(6):
        assert ask(policy, scenario, 5.0 * n, busy, replicas=2) == 2
    assert ask(policy, scenario, 200.0, idle, replicas=2) == 2
    assert ask(policy, scenario, 400.0, busy, replicas=2) == 2


# --- WVA V1 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engines", "wanted"),
    [
        ([(0.75, 0.0), (0.75, 0.0)], 1),  # spare KV 0.05 < 0.10
        ([(0.2, 3.0), (0.2, 2.0)], 1),  # spare queue 2.5 < 3
        ([(0.9, 0.0), (0.2, 0.0)], 0),  # the saturated one is left out; alone the other is not taken away
        ([(0.85, 0.0), (0.1, 9.0)], 1),  # both are saturated
        ([(0.5, 0.0), (0.5, 0.0)], 0),  # on one engine 1.0: no spare
        ([(0.3, 0.5), (0.3, 0.5)], -1),  # on one engine 0.6 and 1: spare 0.2 and 4
        ([(0.3, 1.5), (0.3, 1.5)], 0),  # on one engine 3 wait: spare 2
        ([(0.3, 0.0)], 0),
        ([], 0),
    ],
)
def test_wva_v1_moves_by_one_on_spare_kv_and_queue(engines, wanted):
    assert v1_step(engines) == wanted


def test_wva_v1_waits_in_transition_and_for_its_hpa(scenario):
    policy = WvaV1(scenario)
    full = reading(pods([60, 60], kv=[79_000, 79_000]))
    assert ask(policy, scenario, 0.0, full, replicas=2) == 2  # published 3; the HPA waits 240 s
    assert policy.published[KEY] == (0.0, 3)
    assert ask(policy, scenario, 60.0, full, replicas=2) == 2
    assert policy.published[KEY][1] == 3  # in transition: blocked, not 4
    for at in range(75, 240, 15):
        assert ask(policy, scenario, float(at), full, replicas=2) == 2
    assert ask(policy, scenario, 240.0, full, replicas=2) == 3


# --- all ------------------------------------------------------------------------------------------------------------


def test_static_by_peak_covers_the_busiest_minute(make_scenario):
    scenario = make_scenario("step:2:16:600:300")
    tier = scenario.tiers[0]
    cost = work_seconds(tier, tier.pools[0])
    minutes = (tier.trace.arrival // 60).astype(int)
    busiest = max(cost[minutes == minute].sum() / 60 for minute in range(10))
    assert StaticByPeak(scenario).replicas[KEY] == math.ceil(busiest)
    assert StaticByPeak(scenario, 2.0).replicas[KEY] == math.ceil(2 * busiest)


def test_windows_forget_what_is_old():
    window = Window.of(60.0)
    assert window.mean is None
    for at, value in ((0, 10.0), (30, 20.0), (61, 30.0)):
        window.add(float(at), value)
    assert window.mean == 25.0
    assert window.highest == 30.0


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_every_rival_stays_within_its_bounds_and_is_reproducible(make_scenario, name):
    scenario = make_scenario("spike:2:30:300:60", scaling={"minReplicas": 2, "maxReplicas": 5})
    first, again = (run(scenario, make_policy(name, scenario), 3) for _ in range(2))
    assert first.moves == again.moves
    assert np.array_equal(first.tiers[0].last, again.tiers[0].last, equal_nan=True)
    replicas = first.tiers[0].pools[0].replicas
    assert replicas.min() >= 2
    assert replicas.max() <= 5


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_every_rival_has_a_knob_whose_default_is_in_its_sweep(make_scenario, name):
    scenario = make_scenario()
    assert make_policy(name, scenario).knob  # type: ignore[attr-defined]
    plain, knobs = make_policy(name, scenario), [make_policy(name, scenario, knob) for knob in KNOBS[name]]
    settings = [
        {k: v for k, v in vars(each).items() if isinstance(v, int | float)} for each in (plain, *knobs)
    ]
    if name != "static-peak":
        assert settings[0] in settings[1:]


def test_an_unknown_policy_is_refused_with_the_names(make_scenario):
    with pytest.raises(ValueError, match="use servingtiers"):
        make_policy("magic", make_scenario())
    assert set(RIVALS) < set(POLICIES)
