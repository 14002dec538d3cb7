# the names of the tests are the sentences
"""What scaling decides, one observation at a time."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.engine_curves import carries
from properties import examples
from servingtiers.api.spec import PoolScaling, ServingTierSpec, Tier
from servingtiers.api.status import PoolMemory
from servingtiers.core.decisions import (
    Binding,
    Decision,
    PoolFacts,
    PoolRole,
    Targets,
    TierDecision,
    TierObservation,
)
from servingtiers.core.signals import (
    Coverage,
    Distribution,
    Histogram,
    Load,
    RouterLoad,
    Signal,
    TierLoad,
    Unknown,
    Value,
    Zero,
    number,
)
from servingtiers.core.times import from_time, to_time
from servingtiers.policy.scaling import decide, hold_seconds

NOW = 1_800_000_000.0
GONE = Unknown("no answer")
TTFT = (0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, math.inf)
TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, math.inf)
GOALS = Targets({("ttft", "p99"): 0.5, ("tpot", "p99"): 0.05})


def latencies(bounds: tuple[float, ...], *values: float, each: int = 1) -> Histogram:
    return Histogram(
        bounds, tuple(float(each * sum(v <= b for v in values)) for b in bounds), each * sum(values)
    )


FAST_TTFT = latencies(TTFT, 0.2, each=500)
FAST_TPOT = latencies(TPOT, 0.02, each=500)


def signal(value: float | Signal) -> Signal:
    if not isinstance(value, (int, float)):
        return value
    return Value(float(value)) if value else Zero()


def load(
    ready: int,
    *,
    running: float | Signal = 0,
    waiting: float | Signal = 0,
    rate: float | Signal = GONE,
    ttft: Distribution = FAST_TTFT,
    tpot: Distribution = FAST_TPOT,
    answered: int | None = None,
    **more: object,
) -> Load:
    coverage = Coverage(ready if answered is None else answered, ready)
    return Load(
        60.0,
        coverage,
        running=signal(running),
        waiting=signal(waiting),
        request_rate=signal(rate),
        ttft=ttft,
        tpot=tpot,
        **more,
    )


def pool(replicas: int = 2, **changes: object) -> PoolFacts:
    facts = PoolFacts(
        name="pool",
        role=PoolRole.AGGREGATED,
        scaling=PoolScaling(min_replicas=1, max_replicas=10),
        replicas=replicas,
        ready=replicas,
        max_num_seqs=10,
        startup_seconds=120.0,
    )
    return replace(facts, **changes)


def observe(
    facts: PoolFacts | tuple[PoolFacts, ...],
    seen: Load | dict[str, Load] | None,
    *,
    arrivals: float | Signal = GONE,
    unserved: float | Signal = 0,
    memory: PoolMemory | dict[str, PoolMemory] | None = None,
    tier: Tier = Tier.BALANCED,
    targets: Targets = GOALS,
    mode: str = "Auto",
    suspend: bool = False,
    watching_since: float | None = None,
) -> TierObservation:
    pools = facts if isinstance(facts, tuple) else (facts,)
    loads = seen if isinstance(seen, dict) else ({} if seen is None else {pools[0].name: seen})
    router = RouterLoad(Coverage(2, 2), signal(arrivals), signal(unserved))
    if memory is None:
        memory = {}
    return TierObservation(
        key="llm/chat",
        spec=ServingTierSpec.model_validate(
            {"tier": tier, "model": {"name": "m"}, "scaling": {"mode": mode}, "suspend": suspend}
        ),
        targets=targets,
        pools=pools,
        load=TierLoad(loads, router),
        memory=memory if isinstance(memory, dict) else {pools[0].name: memory},
        watching_since=watching_since,
    )


def tier_decision(observation: TierObservation, now: float = NOW) -> TierDecision:
    return decide((observation,), now)[0]


def one(observation: TierObservation, now: float = NOW) -> Decision:
    (decision,) = tier_decision(observation, now).decisions
    assert decision.reason
    assert decision.would_change
    return decision


def low_for(seconds: float, peak: int = 1, **more: object) -> PoolMemory:
    return PoolMemory(low_since=to_time(NOW - seconds), low_peak=peak, **more)


LONG = 10_000.0


# --- up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "facts", "seen", "arrivals", "desired", "binding"),
    [
        ("nothing to do", pool(2), load(2, running=8), GONE, 2, Binding.STEADY),
        ("batches fuller than planned", pool(2), load(2, running=19), GONE, 3, Binding.QUEUE),
        ("a queue above the limit", pool(2), load(2, running=10, waiting=17), GONE, 4, Binding.QUEUE),
        ("a queue at the limit", pool(2), load(2, running=7, waiting=16), GONE, 2, Binding.STEADY),
        ("arrivals above the modelled capacity", pool(2, curve=carries(1.0)), load(2, running=10), 4.0, 5, Binding.FORECAST),
        ("p99 TTFT above its target", pool(2), load(2, running=10, ttft=latencies(TTFT, 0.2, 0.9, each=50)), GONE, 3, Binding.TTFT),
        ("p99 TPOT above its target", pool(4), load(4, running=10, tpot=latencies(TPOT, 0.02, 0.07, each=50)), GONE, 6, Binding.TPOT),
        ("fewer than the minimum", pool(0, ready=0), None, GONE, 1, Binding.MIN_REPLICAS),
    ],
)  # fmt: skip
def test_it_grows_for_what_calls(what, facts, seen, arrivals, desired, binding):
    decision = one(observe(facts, seen, arrivals=arrivals))
    assert (decision.desired, decision.binding) == (desired, binding), what


def test_one_late_request_starts_no_engine():
    """M24."""
    seen = load(2, running=10, ttft=latencies(TTFT, *[0.2] * 20, 9.0))
    decision = one(observe(pool(2), seen))
    assert decision.desired == 2


def test_partial_data_is_enough_to_grow():
    """M9: one of four replicas answers, and it alone is overrun."""
    seen = load(4, answered=1, running=Value(40.0, partial=True), waiting=Value(90.0, partial=True))
    assert one(observe(pool(4), seen)).desired > 4


def test_the_maximum_holds_and_says_so():
    decision = one(observe(pool(10), load(10, running=100, waiting=900)))
    assert (decision.desired, decision.binding) == (10, Binding.MAX_REPLICAS)
    assert "maxReplicas" in decision.limited
    assert "raise it" in decision.reason


def test_replicas_on_their_way_are_not_ordered_twice():
    seen = load(2, running=20, waiting=60)
    first = one(observe(pool(2), seen))
    assert first.desired > 2
    more = load(2, running=20, waiting=600)
    again = one(observe(pool(first.desired, ready=2, pending=first.desired - 2), more))
    assert again.desired == first.desired


@pytest.mark.parametrize("facts", [pool(5, ready=2, pending=3), pool(5, settled_seconds=20.0)])
def test_the_backlog_that_built_up_meanwhile_is_not_met_a_second_time(facts):
    """While replicas start, and until those that just started had a window to work it off."""
    seen = load(facts.ready, running=20, waiting=900)
    assert one(observe(facts, seen, arrivals=3.0)).desired == 5
    assert (
        one(observe(replace(facts, ready=5, pending=0, settled_seconds=90.0), seen, arrivals=3.0)).desired > 5
    )


def test_a_modelled_backlog_is_answered_once_by_what_works_it_off_in_a_start_up():
    """3 requests/s and 240 that wait, at 1/s each: gone within the 2 minutes of a start-up with 3 + 2 replicas."""
    seen = load(2, running=9, waiting=240)
    first = one(observe(pool(2, curve=carries(1.0)), seen, arrivals=3.0))
    assert (first.desired, first.binding) == (5, Binding.QUEUE)
    on_the_way = pool(5, ready=2, pending=3, curve=carries(1.0))
    assert one(observe(on_the_way, seen, arrivals=3.0)).desired == 5


def test_arrivals_that_keep_growing_are_answered_while_replicas_start():
    facts = pool(5, ready=2, pending=3, curve=carries(1.0))
    grown = one(observe(facts, load(2, running=9, waiting=60), arrivals=6.0))
    assert grown.desired > 6
    assert grown.binding is Binding.FORECAST


def test_latencies_of_the_smaller_pool_call_for_nothing_more():
    """The window still tells of the time before the newest replica was ready."""
    bad = load(3, running=15, ttft=latencies(TTFT, 5.0, each=100))
    assert one(observe(pool(3, settled_seconds=20.0), bad)).desired == 3
    assert one(observe(pool(3, settled_seconds=400.0), bad)).desired > 3


def test_pods_that_cannot_be_scheduled_are_no_supply_and_do_not_block():
    """K1: two of four replicas wait for a node; what the two others need is decided as ever."""
    facts = pool(4, ready=2, unschedulable=2, curve=carries(1.0))
    calm = one(observe(facts, load(2, running=9), arrivals=1.6))
    assert calm.desired == 4
    assert calm.binding is not Binding.HOLD_PENDING
    assert one(observe(facts, load(2, running=20, waiting=40), arrivals=5.0)).desired > 5


def test_a_replica_that_no_node_has_room_for_goes_when_the_load_has_gone():
    """K1: otherwise two such tiers keep each other's accelerators for ever."""
    facts = pool(4, ready=3, unschedulable=1)
    decided = tier_decision(observe(facts, load(3, running=3), memory=low_for(LONG)))
    assert decided.decisions[0].desired == 3


def test_the_last_answers_of_a_burst_are_no_proof_that_more_replicas_are_futile():
    """The engines are empty already, the window still tells of the queue."""
    waited = {"e2e": latencies(TTFT, 90.0, each=100), "queue_time": latencies(TTFT, 80.0, each=100)}
    seen = load(2, running=1, ttft=latencies(TTFT, 80.0, each=100), rate=1.6, **waited)
    assert one(observe(pool(2), seen)).binding is not Binding.INFEASIBLE


def test_a_tail_made_of_waiting_is_no_proof_that_more_replicas_are_futile():
    """Batches of one: at most looks an engine runs one request and none waits, and p99 is made of those that met."""
    late = latencies(TTFT, *[0.1] * 97, *[0.9] * 3)
    target = Targets({("ttft", "p99"): 0.5})
    waited = {
        "e2e": latencies(TTFT, 0.4, each=100),
        "queue_time": latencies((0.3, 0.5, 1.0, math.inf), *[0.1] * 97, *[0.8] * 3),
    }
    facts = pool(1, max_num_seqs=1)
    seen = load(1, running=1, ttft=late, rate=1.6, **waited)
    grown = one(observe(facts, seen, targets=target))
    assert (grown.desired, grown.binding) == (2, Binding.TTFT)
    # Without a wait the same tail is the request's own.
    own = replace(seen, queue_time=latencies((0.3, 0.5, 1.0, math.inf), 0.0, each=100))
    assert one(observe(facts, own, targets=target)).binding is Binding.INFEASIBLE


def test_engines_with_a_queue_that_stands_correct_a_model_that_promises_too_much():
    """2 engines finish 8 requests/s and no more: 4/s each, not 10."""
    first = observe(pool(2, max_num_seqs=100, curve=carries(10.0)), STANDING, arrivals=8.0)
    decided = tier_decision(first)
    assert decided.memory["pool"].slowness_permille == 2000, "no more than twice as slow is believed"
    assert (
        decided.decisions[0].signals["capacity"]
        == "5/s per replica, the performance model, engines 100 % slower"
    )


def times(service: float, queue: float, each: int = 100) -> dict[str, Histogram]:
    """Return E2E and queue times of requests that spend ``service`` seconds in a batch after ``queue`` seconds."""
    return {
        "e2e": latencies(TTFT, service + queue, each=each),
        "queue_time": latencies(TTFT, queue, each=each),
    }


STANDING = load(2, running=16, waiting=40, rate=8.0, **times(2.0, 5.0, each=480))
RAMP = times(20.0, 0.05, each=40)
"""A request of 20 s: a full batch of 75 does 3.75 requests/s, and 10 in the batch do 0.5."""


def test_requests_that_had_queued_before_the_newest_engine_came_say_nothing_of_all_engines():
    """Routers have handed them to the others: what ends in the window is what two of the four engines do."""
    seen = load(4, running=20, waiting=80, rate=8.0, **times(2.0, 90.0, each=480))
    facts = pool(4, max_num_seqs=100, curve=carries(10.0))
    early = tier_decision(observe(replace(facts, settled_seconds=100.0), seen, arrivals=8.0))
    assert early.memory["pool"].slowness_permille is None
    later = tier_decision(observe(replace(facts, settled_seconds=200.0), seen, arrivals=8.0))
    assert later.memory["pool"].slowness_permille == 2000


@pytest.mark.parametrize("model", [None, 2.5])
@pytest.mark.parametrize("waiting", [0, 1])
def test_one_waiting_request_makes_no_full_engine_of_an_idle_one(model, waiting):
    """10 of 75 run: capacity is the model's word or unknown, and not what arrives."""
    facts = pool(1, max_num_seqs=75, curve=carries(model))
    seen = load(1, running=10, waiting=waiting, rate=0.5, **RAMP)
    assert one(observe(facts, seen, arrivals=0.5)).desired == 1


@pytest.mark.parametrize("model", [None, 2.5])
def test_a_ramp_is_not_taken_for_what_an_engine_can_do(model):
    """17 of 75 run while load ramps up; a moment's queue changes nothing: 2.2 requests/s need 2 replicas at most."""
    facts = pool(1, max_num_seqs=75, curve=carries(model))
    seen = load(1, running=17, waiting=9, rate=0.4, **RAMP)
    assert one(observe(facts, seen, arrivals=2.2)).desired <= 2


def test_a_queue_of_a_moment_corrects_no_model_and_one_that_stands_does():
    facts = pool(2, max_num_seqs=100, curve=carries(10.0))
    moment = load(2, running=16, waiting=40, rate=8.0, **times(2.0, 0.1, each=480))
    assert (
        one(observe(facts, moment, arrivals=8.0)).signals["capacity"]
        == "10/s per replica, the performance model"
    )
    assert "slower" in one(observe(facts, STANDING, arrivals=8.0)).signals["capacity"]


def test_batches_that_fill_up_are_answered_before_their_requests_are_done():
    """48 of 55 run: answers longer than those that ended show nowhere else."""
    facts = pool(1, max_num_seqs=55, curve=carries(20.0))
    seen = load(1, running=48, waiting=1, rate=3.0, **times(8.0, 0.01))
    grown = one(observe(facts, seen, arrivals=3.0, tier=Tier.LATENCY))
    assert (grown.desired, grown.binding) == (2, Binding.QUEUE)
    assert "87% of the slots" in grown.reason


def test_a_full_cache_is_as_full_as_a_full_batch():
    facts = pool(2, max_num_seqs=100, curve=carries(10.0))
    seen = load(2, running=30, waiting=4, rate=3.75, **times(8.0, 1.0))
    assert one(observe(facts, seen, arrivals=3.0)).desired == 2
    full = one(observe(facts, replace(seen, kv_usage=Value(0.95)), arrivals=3.0))
    assert (full.desired, full.binding) == (3, Binding.KV_CACHE)


# --- infeasible -------------------------------------------------------------------------------------------------


def test_a_lone_request_that_misses_is_not_chased():
    seen = load(2, running=1, tpot=latencies(TPOT, 0.15, each=50))
    decision = one(observe(pool(2, scaling=PoolScaling(min_replicas=2, max_replicas=9)), seen))
    assert (decision.desired, decision.binding) == (2, Binding.INFEASIBLE)
    assert "would not help" in decision.reason


def test_an_impossible_objective_does_not_keep_replicas():
    seen = load(4, running=1, tpot=latencies(TPOT, 0.15, each=50))
    decision = one(observe(pool(4), seen, memory=low_for(LONG)))
    assert (decision.desired, decision.binding) == (3, Binding.INFEASIBLE)


# --- down -------------------------------------------------------------------------------------------------------


def test_fewer_must_suffice_for_the_whole_hold():
    observation = observe(pool(4), load(4, running=3))
    first = tier_decision(observation)
    assert first.decisions[0].desired == 4
    assert first.decisions[0].binding is Binding.HOLD_DOWN
    memory = first.memory
    hold = 1.25 * 120
    early = tier_decision(replace(observation, memory=memory), NOW + hold - 1)
    assert early.decisions[0].desired == 4
    ripe = tier_decision(replace(observation, memory=early.memory), NOW + hold)
    assert ripe.decisions[0].desired == 3
    assert ripe.memory["pool"].last_scale_down == to_time(NOW + hold)


@pytest.mark.parametrize(
    ("startup", "given", "seconds"),
    [
        (10.0, None, 60.0),
        (120.0, None, 150.0),
        (1000.0, None, 300.0),
        (None, None, 300.0),
        (120.0, "7m", 420.0),
    ],
)
def test_the_hold_follows_the_start_up_unless_the_user_sets_it(startup, given, seconds):
    facts = pool(startup_seconds=startup, scaling=PoolScaling(scale_down_hold=given))
    assert hold_seconds(facts, PoolMemory())[0] == seconds


def test_the_hold_knows_start_ups_from_memory():
    assert hold_seconds(pool(startup_seconds=None), PoolMemory(startup_seconds=[100, 80, 400]))[0] == 125.0


GAPS = {
    "no pod answers": load(4, answered=0, running=GONE, waiting=GONE, ttft=GONE, tpot=GONE),
    "one pod is missing": load(4, answered=3, running=Value(3.0, partial=True), waiting=Zero()),
    "running is unknown": load(4, running=GONE),
    "waiting is unknown": load(4, waiting=GONE),
    "TTFT is unknown": load(4, running=3, ttft=GONE),
    "TPOT is unknown": load(4, running=3, tpot=GONE),
    "no series at all": None,
}


@pytest.mark.parametrize("gap", GAPS.values(), ids=GAPS.keys())
def test_what_is_not_known_shrinks_nothing_and_restarts_the_hold(gap):
    """M1–M14, M16–M22, M25–M29: whatever the fault, telemetry reports it as Unknown or partial."""
    decided = tier_decision(observe(pool(4), gap, memory=low_for(LONG)))
    assert decided.decisions[0].desired == 4
    assert decided.decisions[0].binding is Binding.HOLD_UNKNOWN
    assert decided.memory["pool"].low_since is None


def test_no_traffic_is_no_gap():
    """M23: proved zeros shrink the pool, or idle tiers never would."""
    idle = load(4, running=0, waiting=0, rate=0, ttft=Zero(), tpot=Zero())
    assert one(observe(pool(4), idle, arrivals=0, memory=low_for(LONG))).desired == 3


def test_a_restart_of_the_operator_restarts_the_hold():
    """R-S7: what nobody watched was not low."""
    seen = load(4, running=3)
    decided = tier_decision(observe(pool(4), seen, memory=low_for(LONG), watching_since=NOW - 30))
    assert decided.decisions[0].desired == 4
    assert from_time(decided.memory["pool"].low_since) == NOW - 30


@pytest.mark.parametrize(
    ("why", "facts", "seen"),
    [
        ("S13: a rollout is under way", pool(4, rolling=True), load(4, running=3)),
        ("replicas are starting", pool(4, ready=3, pending=1), load(3, running=3)),
    ],
)
def test_what_is_under_way_comes_first(why, facts, seen):
    decided = tier_decision(observe(facts, seen, memory=low_for(LONG)))
    assert decided.decisions[0].desired == 4, why
    assert decided.decisions[0].binding is Binding.HOLD_PENDING
    assert decided.memory["pool"].low_since is None


def test_a_drain_delays_the_next_scale_down_and_keeps_the_hold():
    decided = tier_decision(observe(pool(4, terminating=1), load(4, running=3), memory=low_for(LONG)))
    assert decided.decisions[0].desired == 4
    assert decided.memory["pool"].low_since == to_time(NOW - LONG)


@pytest.mark.parametrize(
    ("why", "seen", "arrivals", "rps"),
    [
        ("in flight", load(4, running=22), GONE, None),
        ("waiting", load(4, running=3, waiting=13), GONE, None),
        ("arrivals", load(4, running=3), 2.8, 1.0),
        (
            "TTFT at 90 % of its target",
            load(4, running=9, ttft=latencies(TTFT, 0.2, 0.45, each=400)),
            GONE,
            None,
        ),
        ("TPOT at 90 % of its target", load(4, running=9, tpot=latencies(TPOT, 0.045, each=400)), GONE, None),
    ],
)
def test_one_replica_fewer_must_carry_the_load(why, seen, arrivals, rps):
    decided = tier_decision(
        observe(pool(4, curve=carries(rps)), seen, arrivals=arrivals, memory=low_for(LONG))
    )
    assert decided.decisions[0].desired == 4, why
    assert decided.memory["pool"].low_since is None


def test_at_most_one_or_a_fifth_leaves_a_minute():
    scaling = PoolScaling(min_replicas=1, max_replicas=100)
    seen = load(40, running=3)
    assert one(observe(pool(40, scaling=scaling), seen, memory=low_for(LONG))).desired == 32
    recent = low_for(LONG, last_scale_down=to_time(NOW - 59))
    assert one(observe(pool(40, scaling=scaling), seen, memory=recent)).desired == 40
    over = low_for(LONG, last_scale_down=to_time(NOW - 60))
    assert one(observe(pool(40, scaling=scaling), seen, memory=over)).desired == 32


def test_it_keeps_what_the_hold_needed_at_its_peak():
    decided = tier_decision(observe(pool(4), load(4, running=3), memory=low_for(LONG, peak=4)))
    assert decided.decisions[0].desired == 4
    assert decided.memory["pool"].low_peak == 1, "the next hold begins with the need of now"
    assert decided.memory["pool"].low_since == to_time(NOW)


def test_load_that_came_back_at_once_makes_it_patient():
    """S10, R-S8."""
    memory = low_for(LONG, last_scale_down=to_time(NOW - 1500), given_up_from=4, given_up_to=2)
    regretted = tier_decision(observe(pool(2), load(2, running=30, waiting=60), memory=memory), NOW - 1000)
    assert regretted.decisions[0].desired >= 4
    memory = regretted.memory["pool"].model_copy(update={"low_since": memory.low_since, "low_peak": 1})
    seen = load(4, running=3)
    decision = one(observe(pool(4), seen, memory=memory))
    assert decision.desired == 4
    assert "taken back" in decision.reason
    assert one(observe(pool(4), seen, memory=memory), NOW + 3600).desired == 3
    quick = pool(4, scaling=PoolScaling(min_replicas=1, max_replicas=9, scale_down_hold="30s"))
    assert one(observe(quick, seen, memory=memory)).desired == 3


def test_a_clock_that_was_set_back_does_not_stop_it():
    """P7: times of memory in the future."""
    memory = PoolMemory(low_since=to_time(NOW + 3600), last_scale_down=to_time(NOW + 3600))
    decided = tier_decision(observe(pool(4), load(4, running=3), memory=memory))
    assert decided.memory["pool"].low_since == to_time(NOW)
    later = decide((observe(pool(4), load(4, running=3), memory=decided.memory),), NOW + 200)[0]
    assert later.decisions[0].desired == 3


JUST_SHRUNK = PoolMemory(last_scale_down=to_time(NOW - 5))


def test_what_was_just_given_up_is_not_taken_back_at_once():
    """Requests of the replica that left moved over: readings calm down within the hold, or it comes back after it."""
    seen = load(1, running=9)
    held = tier_decision(observe(pool(1), seen, memory=JUST_SHRUNK))
    assert (held.decisions[0].desired, held.decisions[0].binding) == (1, Binding.HOLD_PENDING)
    assert "the last scale-down was 5s ago" in held.decisions[0].reason
    assert one(observe(pool(1), seen, memory=held.memory["pool"]), NOW + 54).desired == 1
    assert one(observe(pool(1), seen, memory=held.memory["pool"]), NOW + 55).desired == 2
    quick = pool(1, scaling=PoolScaling(scale_down_hold="10s"))
    assert one(observe(quick, seen, memory=JUST_SHRUNK), NOW + 5).desired == 2


def test_a_queue_that_already_misses_is_met_at_once_even_after_a_scale_down():
    """5 engines do 25/s: 10 that wait are gone in 0.4 s, and 200 wait for longer than their first token may take."""
    facts = pool(5, scaling=PoolScaling(min_replicas=1, max_replicas=20), curve=carries(5.0))
    memory = PoolMemory(last_scale_down=to_time(NOW - 20), given_up_from=6, given_up_to=5)
    few, many_wait = (
        one(observe(facts, busy(5, waiting=waiting), arrivals=24.0, memory=memory)) for waiting in (10, 60)
    )
    assert (few.desired, few.binding) == (5, Binding.HOLD_PENDING)
    assert many_wait.desired > 5


def test_engines_with_a_queue_cannot_be_spared_whatever_the_model_says():
    facts, memory = pool(4, curve=carries(5.0)), low_for(LONG)
    assert (
        one(observe(facts, busy(4, waiting=3, kv_usage=Value(0.3)), arrivals=5.0, memory=memory)).desired == 3
    )
    waits = one(observe(facts, busy(4, waiting=4, kv_usage=Value(0.3)), arrivals=5.0, memory=memory))
    assert (waits.desired, waits.binding) == (4, Binding.QUEUE)
    assert "none can be spared" in waits.reason


def test_a_rush_right_after_a_scale_down_is_met_at_once():
    seen = load(1, running=10, waiting=40)
    assert one(observe(pool(1, curve=carries(1.0)), seen, arrivals=4.0, memory=JUST_SHRUNK)).desired > 2


def test_a_raised_minimum_does_not_wait_for_a_scale_down():
    facts = pool(1, scaling=PoolScaling(min_replicas=2, max_replicas=9))
    assert one(observe(facts, load(1, running=9), memory=JUST_SHRUNK)).desired == 2


# --- words ------------------------------------------------------------------------------------------------------


def test_reasons_tell_times_as_people_do():
    late = latencies((0.0031, 0.0035, 9.9, math.inf), 0.0033, 8.0, each=50)
    facts = pool(2, curve=carries(1.0))
    goals = Targets({("ttft", "p99"): 0.0031})
    seen = load(2, running=Value(10.0, age=0.04), ttft=late)
    reason = one(observe(pool(2), seen, targets=goals)).reason
    assert reason.startswith("p99 TTFT is 9.7s over 1m, the target is 3ms."), reason
    rate = one(observe(facts, seen, arrivals=Value(9.0, age=0.0099))).reason
    assert "(seen just now)" in rate
    older = one(observe(facts, seen, arrivals=Value(9.0, age=2.34))).reason
    assert "(seen 2.3s ago)" in older


# --- bounds -----------------------------------------------------------------------------------------------------


def test_a_raised_minimum_holds_at_once_even_without_data():
    """S8."""
    facts = pool(2, scaling=PoolScaling(min_replicas=6, max_replicas=9))
    assert one(observe(facts, None)).desired == 6


def test_a_lowered_maximum_is_reached_by_patience_even_without_data():
    """S8: the user's order needs no evidence."""
    facts = pool(6, scaling=PoolScaling(min_replicas=1, max_replicas=3))
    decided = tier_decision(observe(facts, None))
    assert decided.decisions[0].desired == 5
    assert decided.decisions[0].binding is Binding.MAX_REPLICAS
    again = decide((observe(replace(facts, replicas=5, ready=5), None, memory=decided.memory),), NOW + 30)[0]
    assert again.decisions[0].desired == 5


def test_replicas_set_by_hand_are_taken_back_by_the_slow_rules():
    """S3, R-S12."""
    facts = pool(9, scaling=PoolScaling(min_replicas=1, max_replicas=10))
    decided = tier_decision(observe(facts, load(9, running=3)))
    assert decided.decisions[0].desired == 9
    assert one(observe(facts, load(9, running=3), memory=low_for(LONG))).desired == 8


@pytest.mark.parametrize(("mode", "suspend"), [("Recommend", False), ("External", False), ("Auto", True)])
def test_what_is_not_carried_out_is_not_remembered_as_done_and_not_paced(mode, suspend):
    low = observe(pool(9), load(9, running=3), memory=low_for(LONG), mode=mode, suspend=suspend)
    down = tier_decision(low)
    assert down.decisions[0].desired == 1
    assert down.memory["pool"].last_scale_down is None
    assert tier_decision(replace(low, memory=down.memory), NOW + 15).decisions[0].desired == 1
    up = tier_decision(observe(pool(2), load(2, running=19), mode=mode, suspend=suspend))
    assert up.decisions[0].desired == 3
    assert up.memory["pool"].last_scale_up is None


# --- to zero and back -------------------------------------------------------------------------------------------

SLEEPY = PoolScaling(min_replicas=0, max_replicas=5, idle_after="10m")
SILENT = load(1, running=0, waiting=0, rate=0, ttft=Zero(), tpot=Zero())


def test_what_a_rival_autoscaler_keeps_from_being_done_is_not_remembered_as_done():
    """Else the status told of a scale-up, or of a scale-down, at every tick."""
    for seen, memory in ((load(2, running=20, waiting=60), PoolMemory()), (load(2), low_for(LONG))):
        observation = observe(pool(2), seen, arrivals=1.0, memory=memory)
        for rivalled in (False, True):
            decided = tier_decision(replace(observation, rivalled=rivalled))
            assert decided.decisions[0].desired != 2
            remembered = decided.memory["pool"]
            assert ((remembered.last_scale_up or remembered.last_scale_down) is None) == rivalled


def test_a_proved_idle_tier_goes_to_zero_after_its_time():
    observation = observe(pool(1, scaling=SLEEPY), SILENT, arrivals=0)
    first = tier_decision(observation)
    assert first.decisions[0].desired == 1
    assert first.memory["pool"].idle_since == to_time(NOW)
    observation = replace(observation, memory=first.memory)
    assert tier_decision(observation, NOW + 599).decisions[0].desired == 1
    asleep = tier_decision(observation, NOW + 600).decisions[0]
    assert (asleep.desired, asleep.binding) == (0, Binding.IDLE)


@pytest.mark.parametrize(
    ("why", "seen", "arrivals", "unserved"),
    [
        ("routers are silent", SILENT, GONE, GONE),
        ("a request arrived", SILENT, 0.1, 0),
        ("a request found no engine", SILENT, 0, 1),
        ("engines are silent", load(1, answered=0, running=GONE, waiting=GONE), 0, 0),
        ("a request runs", load(1, running=1), 0, 0),
    ],
)
def test_only_a_proof_lets_a_tier_sleep(why, seen, arrivals, unserved):
    memory = PoolMemory(idle_since=to_time(NOW - LONG))
    decided = tier_decision(
        observe(pool(1, scaling=SLEEPY), seen, arrivals=arrivals, unserved=unserved, memory=memory)
    )
    assert decided.decisions[0].desired == 1, why
    assert decided.memory["pool"].idle_since is None


def test_a_tier_with_a_minimum_never_sleeps():
    memory = PoolMemory(idle_since=to_time(NOW - LONG))
    assert one(observe(pool(1), SILENT, arrivals=0, memory=memory)).desired == 1


def test_a_restarted_operator_watches_idleness_anew():
    memory = PoolMemory(idle_since=to_time(NOW - LONG))
    facts = pool(1, scaling=SLEEPY)
    assert one(observe(facts, SILENT, arrivals=0, memory=memory, watching_since=NOW - 60)).desired == 1


def test_a_request_without_an_engine_wakes_the_tier():
    """M28: at zero there is no engine series at all; the routers see the call."""
    decision = one(observe(pool(0, scaling=SLEEPY), None, arrivals=0, unserved=5))
    assert (decision.desired, decision.binding) == (1, Binding.WAKE)


def test_a_tier_whose_only_engine_is_lent_by_hand_does_not_exceed_its_bounds():
    """Nothing serves it, as if it slept; but its own replica is there, and maxReplicas allows no other."""
    lent = pool(1, lent=1, scaling=PoolScaling(min_replicas=1, max_replicas=1))
    decision = one(observe(lent, None, arrivals=0.1, unserved=5))
    assert (decision.current, decision.desired, decision.binding) == (1, 1, Binding.LENT)
    room = replace(lent, scaling=PoolScaling(min_replicas=1, max_replicas=2))
    woken = one(observe(room, None, arrivals=0.1, unserved=5))
    assert (woken.desired, woken.binding) == (2, Binding.WAKE)


def test_silence_at_zero_keeps_it_at_zero_and_says_what_is_missing():
    asleep = one(observe(pool(0, scaling=SLEEPY), None, arrivals=0, unserved=0))
    assert (asleep.desired, asleep.binding) == (0, Binding.IDLE)
    blind = one(observe(pool(0, scaling=SLEEPY), None, arrivals=GONE, unserved=GONE))
    assert (blind.desired, blind.binding) == (0, Binding.HOLD_UNKNOWN)
    assert "minReplicas" in blind.would_change


def test_a_waking_tier_does_not_fall_asleep_before_it_has_served():
    memory = PoolMemory(idle_since=to_time(NOW - LONG))
    facts = pool(1, ready=0, pending=1, scaling=SLEEPY)
    decided = tier_decision(observe(facts, load(0), arrivals=0, memory=memory))
    assert decided.decisions[0].desired == 1
    assert decided.memory["pool"].idle_since is None


# --- prefill and decode -----------------------------------------------------------------------------------------


def phases(
    prefill: int, decode: int, scaling: PoolScaling | None = None, **changes: object
) -> tuple[PoolFacts, ...]:
    scaling = scaling or PoolScaling(min_replicas=1, max_replicas=10)
    return (
        pool(prefill, name="prefill", role=PoolRole.PREFILL, scaling=scaling, **changes),
        pool(decode, name="decode", role=PoolRole.DECODE, scaling=scaling, **changes),
    )


def both(prefill: Load, decode: Load) -> dict[str, Load]:
    return {"prefill": prefill, "decode": decode}


def by_pool(observation: TierObservation, now: float = NOW) -> dict[str, Decision]:
    return {decision.pool: decision for decision in tier_decision(observation, now).decisions}


SLOW_TTFT = latencies(TTFT, 0.9, each=100)
SLOW_TPOT = latencies(TPOT, 0.09, each=100)
QUICK_FIRST = latencies(TTFT, 0.05, each=500)


def test_ttft_grows_prefill_and_tpot_grows_decode():
    slow_prompts = observe(
        phases(2, 2), both(load(2, running=9, ttft=SLOW_TTFT), load(2, running=9, ttft=QUICK_FIRST))
    )
    decided = by_pool(slow_prompts)
    assert decided["prefill"].desired > 2
    assert decided["prefill"].binding is Binding.TTFT
    assert decided["decode"].desired == 2
    slow_tokens = observe(
        phases(2, 2), both(load(2, running=9), load(2, running=9, ttft=QUICK_FIRST, tpot=SLOW_TPOT))
    )
    decided = by_pool(slow_tokens)
    assert decided["prefill"].desired == 2
    assert decided["decode"].desired > 2
    assert decided["decode"].binding is Binding.TPOT


def test_the_other_engines_part_is_taken_off_the_objective():
    """Each part is well inside 500 ms; both together are not."""
    part = latencies(TTFT, 0.24, 0.45, each=100)
    alone = observe(phases(2, 2), both(load(2, running=9, ttft=part), load(2, running=9, ttft=QUICK_FIRST)))
    assert by_pool(alone)["prefill"].desired > 2


def test_unknown_in_one_phase_holds_what_depends_on_it():
    """V4, M9: prefill's share of TTFT cannot be told without decode's."""
    memory = {"prefill": low_for(LONG), "decode": low_for(LONG)}
    blind = load(4, answered=0, running=GONE, waiting=GONE, ttft=GONE, tpot=GONE)
    decided = by_pool(observe(phases(4, 4), both(load(4, running=3), blind), memory=memory))
    assert decided["prefill"].desired == 4
    assert decided["decode"].desired == 4


def test_requests_that_wait_for_their_kv_cache_call_for_no_decode_engine():
    """Decode counts a request as waiting while its KV cache is transferred: 26 of 512 run."""
    calm = load(2, running=9, ttft=QUICK_FIRST)
    facts = phases(2, 1, max_num_seqs=512)
    moving = load(1, running=26, waiting=40, kv_usage=Value(0.1), ttft=QUICK_FIRST, **RAMP)
    assert by_pool(observe(facts, both(calm, moving), tier=Tier.LATENCY))["decode"].desired == 1
    full = replace(moving, kv_usage=Value(0.95))
    assert by_pool(observe(facts, both(calm, full), tier=Tier.LATENCY))["decode"].desired > 1


def test_decode_engines_that_are_as_full_as_planned_call_for_no_other():
    """A prefill engine answers several prompts at a time, and all of them wait for their KV cache for a moment."""
    calm = load(2, running=9, ttft=QUICK_FIRST)
    facts = phases(2, 2, max_num_seqs=100, curve=carries(8.0))
    planned = load(2, running=150, waiting=4, kv_usage=Value(0.1), ttft=QUICK_FIRST)
    assert by_pool(observe(facts, both(calm, planned), arrivals=12.0))["decode"].desired == 2
    queue = replace(planned, running=Value(190), waiting=Value(60))
    assert by_pool(observe(facts, both(calm, queue), arrivals=12.0))["decode"].binding is Binding.QUEUE


def test_a_pool_that_has_started_no_engine_expects_the_start_up_of_the_other():
    """Without it, it would look ahead two minutes and hold for five, beside engines that start in half a minute."""
    calm = both(load(4, running=3), load(4, running=3, ttft=QUICK_FIRST))
    (prefill, decode) = phases(4, 4, startup_seconds=None)
    low = {"prefill": low_for(90.0), "decode": low_for(90.0)}
    unknown = by_pool(observe((prefill, decode), calm, memory=low))
    assert unknown["prefill"].desired == 4
    assert "no start-up of an engine seen yet" in unknown["prefill"].reason
    known = by_pool(observe((prefill, replace(decode, startup_seconds=30.0)), calm, memory=low))
    assert known["prefill"].desired == 3
    remembered = low | {"decode": low_for(90.0).model_copy(update={"startup_seconds": [30]})}
    assert by_pool(observe((prefill, decode), calm, memory=remembered))["prefill"].desired == 3


def test_a_tail_inside_a_wide_bucket_does_not_call_for_engines():
    """3 % of first tokens took 1 to 2.5 s: of an even spread 1 % would have taken more than 2 s, of waits 0.2 %."""
    goals = Targets({("ttft", "p99"): 2.0})
    wide = Histogram((1.0, 2.5, math.inf), (970.0, 1000.0, 1000.0), 400.0)
    calm = load(2, running=9, ttft=QUICK_FIRST)
    seen = observe(phases(2, 2), both(load(2, running=9, ttft=wide), calm), targets=goals)
    assert by_pool(seen)["prefill"].desired == 2
    alone = one(observe(pool(2), load(2, running=9, ttft=wide), targets=goals))
    assert "2s" in alone.signals["ttft.p99"]


def test_prefill_engines_are_full_long_before_their_batch_is():
    """10 of 128 run: prompts fill the steps. Of the model's 8 requests/s they do 4."""
    facts = phases(2, 2, max_num_seqs=128, curve=carries(8.0))
    busy = load(2, running=20, waiting=60, rate=8.0, **times(2.5, 4.0, each=480))
    calm = load(2, running=9, ttft=QUICK_FIRST)
    decided = by_pool(observe(facts, both(busy, calm), arrivals=8.0))
    assert decided["prefill"].desired > 2
    assert (
        decided["prefill"].signals["capacity"]
        == "4/s per replica, the performance model, engines 100 % slower"
    )


def test_decode_comes_first_up_and_prefill_first_down():
    busy = both(load(2, running=20, waiting=60), load(2, running=20, waiting=60))
    up = tier_decision(observe(phases(2, 2), busy))
    assert [decision.pool for decision in up.decisions] == ["decode", "prefill"]
    quiet = both(load(4, running=3, ttft=QUICK_FIRST), load(4, running=3, ttft=QUICK_FIRST))
    memory = {"prefill": low_for(LONG), "decode": low_for(LONG)}
    down = tier_decision(observe(phases(4, 4), quiet, memory=memory))
    assert [(decision.pool, decision.desired) for decision in down.decisions] == [
        ("prefill", 3),
        ("decode", 3),
    ]


def test_both_phases_sleep_and_wake_together():
    """R-S13."""
    memory = {name: PoolMemory(idle_since=to_time(NOW - LONG)) for name in ("prefill", "decode")}
    silent = both(SILENT, SILENT)
    decided = by_pool(observe(phases(1, 1, SLEEPY), silent, arrivals=0, memory=memory))
    assert [decision.desired for decision in decided.values()] == [0, 0]
    one_runs = both(SILENT, load(1, running=1))
    decided = by_pool(observe(phases(1, 1, SLEEPY), one_runs, arrivals=0, memory=memory))
    assert [decision.desired for decision in decided.values()] == [1, 1]
    woken = by_pool(observe(phases(0, 0, SLEEPY), {}, arrivals=0, unserved=3))
    assert [decision.desired for decision in woken.values()] == [1, 1]


def test_a_phase_that_was_lost_comes_back():
    """V4: somebody scaled prefill to zero while decode serves."""
    prefill, decode = phases(1, 1, SLEEPY)
    decided = by_pool(
        observe((replace(prefill, replicas=0, ready=0), decode), {"decode": load(1, running=1)})
    )
    assert decided["prefill"].desired == 1


# --- invariants -------------------------------------------------------------------------------------------------

signals = st.one_of(
    st.just(GONE),
    st.just(Zero()),
    st.builds(Value, st.floats(0.01, 500), st.floats(0, 60), st.booleans()),
)


@st.composite
def histograms(draw, bounds: tuple[float, ...] = TTFT):
    if draw(st.booleans()):
        return draw(st.sampled_from([GONE, Zero()]))
    steps = draw(st.lists(st.integers(0, 200), min_size=len(bounds), max_size=len(bounds)))
    counts, total = [], 0
    for step in steps:
        total += step
        counts.append(float(total))
    return Histogram(bounds, tuple(counts), float(sum(steps)))


@st.composite
def scalings(draw):
    least = draw(st.integers(0, 6))
    return PoolScaling(
        min_replicas=least,
        max_replicas=draw(st.integers(max(least, 1), 20)),
        max_waiting_per_replica=draw(st.one_of(st.none(), st.integers(1, 50))),
        idle_after=draw(st.sampled_from([None, "1m"])) if least == 0 else None,
    )


@st.composite
def facts_and_loads(draw, role: PoolRole = PoolRole.AGGREGATED, scaling: PoolScaling | None = None):
    replicas = draw(st.integers(0, 20))
    ready = draw(st.integers(0, replicas))
    facts = PoolFacts(
        name=role.value,
        role=role,
        scaling=scaling or draw(scalings()),
        replicas=replicas,
        ready=ready,
        unschedulable=draw(st.integers(0, replicas - ready)),
        terminating=draw(st.integers(0, 2)),
        rolling=draw(st.booleans()),
        max_num_seqs=draw(st.sampled_from([1, 8, 64])),
        startup_seconds=draw(st.sampled_from([None, 30.0, 600.0])),
        settled_seconds=draw(st.sampled_from([None, 10.0, 1000.0])),
        curve=carries(draw(st.sampled_from([None, 0.5, 5.0]))),
    )
    seen = Load(
        60.0,
        Coverage(draw(st.integers(0, ready)), ready),
        running=draw(signals),
        waiting=draw(signals),
        request_rate=draw(signals),
        ttft=draw(histograms()),
        tpot=draw(histograms(TPOT)),
        e2e=draw(histograms()),
        queue_time=draw(histograms()),
    )
    return facts, seen


@st.composite
def memories(draw):
    def moment():
        return draw(st.one_of(st.none(), st.floats(0, 8000).map(lambda ago: to_time(NOW - ago))))

    return PoolMemory(
        low_since=moment(),
        low_peak=draw(st.one_of(st.none(), st.integers(0, 20))),
        last_scale_up=moment(),
        last_scale_down=moment(),
        idle_since=moment(),
    )


@st.composite
def observations(draw, disaggregated: bool | None = None):
    split = draw(st.booleans()) if disaggregated is None else disaggregated
    roles = (PoolRole.PREFILL, PoolRole.DECODE) if split else (PoolRole.AGGREGATED,)
    scaling = draw(scalings()) if split else None
    parts = [draw(facts_and_loads(role, scaling)) for role in roles]
    return TierObservation(
        key="llm/chat",
        spec=ServingTierSpec.model_validate(
            {"tier": draw(st.sampled_from(list(Tier))), "model": {"name": "m"}}
        ),
        targets=draw(
            st.sampled_from([GOALS, Targets({}), Targets({("e2e", "p90"): 5.0, ("itl", "p50"): 0.05})])
        ),
        pools=tuple(facts for facts, _ in parts),
        load=TierLoad(
            {facts.name: seen for facts, seen in parts},
            RouterLoad(Coverage(2, draw(st.integers(1, 2))), draw(signals), draw(signals)),
        ),
        memory={facts.name: draw(memories()) for facts, _ in parts},
        watching_since=draw(st.sampled_from([None, NOW - 5000, NOW - 10])),
    )


many = settings(max_examples=examples(100), deadline=None)


@many
@given(observations())
def test_bounds_hold(observation):
    """I2: within bounds, or on the way down to a maximum that was lowered."""
    facts = {each.name: each for each in observation.pools}
    for decision in tier_decision(observation).decisions:
        scaling = facts[decision.pool].scaling
        assert decision.desired >= scaling.min_replicas
        assert decision.desired <= max(scaling.max_replicas, decision.current)
        if decision.current > scaling.max_replicas:
            assert decision.desired <= decision.current


@many
@given(observations())
def test_the_same_inputs_give_the_same_decision(observation):
    assert tier_decision(observation) == tier_decision(observation)


@many
@given(observations())
def test_nothing_unknown_ever_shrinks(observation):
    """I1: whatever is missing, and whatever memory says."""
    for decision in tier_decision(observation).decisions:
        facts = next(each for each in observation.pools if each.name == decision.pool)
        if decision.desired >= decision.current or decision.current > facts.scaling.max_replicas:
            continue
        for pool_facts in observation.pools if decision.desired == 0 else (facts,):
            seen = observation.load.pools[pool_facts.name]
            assert seen.coverage.complete
            assert number(seen.running) is not None
            assert number(seen.waiting) is not None
        if decision.desired == 0:
            assert isinstance(observation.load.router.arrival_rate, Zero)
        else:
            assert not facts.rolling
            assert facts.ready == facts.replicas


@many
@given(observations(), st.floats(0.0, 3600.0))
def test_what_was_taken_away_is_not_called_back_by_the_same_reading(observation, later):
    """A pool never shrinks and grows on one reading, however long after: its two rules never contradict."""
    decided = tier_decision(observation)
    shrunk = {each.pool: each for each in decided.decisions if 0 < each.desired < each.current}
    pools = tuple(
        replace(facts, replicas=shrunk[facts.name].desired, ready=shrunk[facts.name].desired)
        if facts.name in shrunk and shrunk[facts.name].binding is not Binding.MAX_REPLICAS
        else facts
        for facts in observation.pools
    )
    again = tier_decision(replace(observation, pools=pools, memory={}), NOW + later)
    for decision in again.decisions:
        if decision.pool in shrunk:
            assert decision.desired <= decision.current, (shrunk[decision.pool], decision)


@many
@given(observations(disaggregated=True))
def test_prefill_and_decode_serve_or_sleep_together(observation):
    """I8."""
    desired = [decision.desired for decision in tier_decision(observation).decisions]
    assert all(each >= 1 for each in desired) or all(each == 0 for each in desired)


def heavier(observation: TierObservation, factor: float) -> TierObservation:
    """Return the same moment with ``factor`` times the load, in everything that load shows in."""

    def more(each: Signal) -> Signal:
        return Value(each.value * factor, each.age, each.partial) if isinstance(each, Value) else each

    def slower(each: Distribution) -> Distribution:
        if not isinstance(each, Histogram):
            return each
        # A share of the requests moves up by a bucket.
        moved = (0.0, *each.counts[:-1])
        share = 1.0 - 1.0 / factor
        counts = [
            own * (1.0 - share) + low * share for own, low in zip(each.counts[:-1], moved, strict=False)
        ]
        return Histogram(each.bounds, (*(c * factor for c in counts), each.total * factor), each.sum * factor)

    pools = {
        name: replace(
            seen,
            running=more(seen.running),
            waiting=more(seen.waiting),
            request_rate=more(seen.request_rate),
            ttft=slower(seen.ttft),
            tpot=slower(seen.tpot),
            itl=slower(seen.itl),
        )
        for name, seen in observation.load.pools.items()
    }
    router = observation.load.router
    return replace(
        observation,
        load=TierLoad(
            pools, replace(router, arrival_rate=more(router.arrival_rate), unserved=more(router.unserved))
        ),
    )


@many
@given(observations(), st.floats(1.0, 8.0))
def test_more_load_never_means_fewer_replicas(observation, factor):
    less = {each.pool: each.desired for each in tier_decision(observation).decisions}
    more = {each.pool: each.desired for each in tier_decision(heavier(observation, factor)).decisions}
    assert all(more[name] >= less[name] for name in less), (less, more)


@many
@given(
    st.integers(1, 10),
    st.floats(0.1, 200),
    st.floats(0.2, 20),
    st.sampled_from([Tier.LATENCY, Tier.BALANCED, Tier.THROUGHPUT]),
)
def test_a_steady_load_is_answered_once(replicas, running, rps, tier):
    """Deciding is a fixpoint: what was decided for a load is enough for it, and not too much."""
    arrivals = running / 4.0
    facts = pool(replicas, curve=carries(rps), scaling=PoolScaling(min_replicas=1, max_replicas=1000))
    first = one(observe(facts, load(replicas, running=running), arrivals=arrivals, tier=tier))
    reached = replace(facts, replicas=first.desired, ready=first.desired)
    again = one(
        observe(reached, load(first.desired, running=running), arrivals=arrivals, tier=tier), NOW + 60
    )
    assert again.desired == first.desired


# --- where the model knows the pool -------------------------------------------------------------------------------


E2E = latencies((1.0, 5.0, math.inf), 4.0, each=300)
QUEUE = latencies((0.05, 0.1, math.inf), 0.05, each=300)
PACE = latencies(TPOT, 0.02, each=9000)


def busy(ready: int = 2, **more: object) -> Load:
    """Engines at half of what they can, which tell their pace."""
    told: dict[str, object] = {"running": 8, "rate": 5.0, "e2e": E2E, "queue_time": QUEUE, "itl": PACE}
    return load(ready, **(told | more))


def test_arrivals_at_some_routers_are_no_history_of_the_load():
    facts = pool(2, curve=carries(5.0))
    for arrivals, peaks in ((Value(5.0), 1), (Value(5.0, partial=True), 0), (GONE, 0)):
        memory = tier_decision(observe(facts, busy(), arrivals=arrivals)).memory["pool"]
        assert len(memory.load_peaks) == peaks


def test_an_engine_that_never_comes_excuses_nothing_for_ever():
    """A pod that crashes as it starts: after three start-ups, and ten minutes, misses buy headroom again."""
    late = busy(4, ttft=latencies(TTFT, *[0.2] * 90, *[0.9] * 10, each=40))
    facts = pool(5, ready=4, pending=1, curve=carries(5.0))
    for ordered, counted in ((300.0, False), (900.0, True)):
        memory = PoolMemory(last_scale_up=to_time(NOW - ordered))
        after = tier_decision(observe(facts, late, arrivals=16.0, memory=memory)).memory["pool"]
        assert bool(after.missed_milli) is counted


def an_hour_of(load: float, until: float) -> PoolMemory:
    newest = math.floor(until / 30.0)
    return PoolMemory(
        work_micros=200_000,
        headroom_micros=930_000,
        learned_at=to_time(until),
        load_peaks=[round(100 * load)] * 120,
        load_bucket=newest,
    )


def test_arrivals_that_nobody_sees_are_expected_to_have_grown():
    """8 replicas of work when they were last seen; the headroom that watching has earned is for those who watch."""
    facts = pool(8, ready=8, scaling=PoolScaling(min_replicas=1, max_replicas=20), curve=carries(5.0))
    blind = load(8, answered=0, running=GONE, waiting=GONE)
    just, long_ago = (
        one(observe(facts, blind, memory=an_hour_of(7.3, NOW - ago)), NOW) for ago in (45.0, 300.0)
    )
    assert (just.desired, just.binding) == (8, Binding.HOLD_UNKNOWN), "a reading that was missed is nothing"
    assert long_ago.desired == 9
    assert "Arrivals are unknown" in long_ago.reason
    forgotten = one(observe(facts, blind, memory=an_hour_of(7.3, NOW - 7200.0)), NOW)
    assert forgotten.desired == 8


def test_a_load_that_rests_for_a_moment_is_expected_back():
    """Four replicas of work for a minute, then nothing for four, all hour."""
    rushes = an_hour_of(0.0, NOW - 30.0).model_copy(update={"load_peaks": ([400] * 2 + [0] * 8) * 12})
    facts = pool(6, scaling=PoolScaling(min_replicas=1, max_replicas=20), curve=carries(5.0))
    nothing = load(6, running=0, waiting=0, rate=0, ttft=Zero(), tpot=Zero())
    rests, trickles = (
        one(observe(facts, nothing, arrivals=rate, memory=rushes.model_copy())) for rate in (0, 0.001)
    )
    assert (rests.expected, rests.standby, rests.highest) == (5, 5, 5)
    assert (trickles.expected, trickles.standby, trickles.highest) == (5, 5, 5)
    assert rests.needed == 0, "lending moves engines for the load of now"
    silent = an_hour_of(0.0, NOW - 30.0)
    over = one(observe(facts, nothing, arrivals=0, memory=silent))
    assert (over.expected, over.standby, over.highest) == (0, None, 0)


def test_the_highest_load_of_the_hour_is_told_even_if_it_came_once():
    once = an_hour_of(1.0, NOW - 30.0)
    once.load_peaks[60] = 600
    facts = pool(2, scaling=PoolScaling(min_replicas=1, max_replicas=20), curve=carries(5.0))
    found = one(observe(facts, busy(2), arrivals=5.0, memory=once))
    assert (found.expected, found.highest) == (2, 6)
    assert one(observe(pool(2), busy(2), arrivals=5.0)).highest is None, "nothing is known without a model"


def test_misses_with_room_to_spare_are_not_the_start_ups():
    """An engine is always on its way where headroom grows: what bursts miss meanwhile counts all the same."""
    late = busy(8, ttft=latencies(TTFT, *[0.2] * 90, *[0.9] * 10, each=40))
    facts = pool(
        9, ready=8, pending=1, scaling=PoolScaling(min_replicas=1, max_replicas=20), curve=carries(5.0)
    )
    for arrivals, counted in ((8.0, True), (36.0, False)):
        memory = tier_decision(observe(facts, late, arrivals=arrivals)).memory["pool"]
        assert bool(memory.missed_milli) is counted


def test_engines_of_a_rollout_teach_no_pace():
    facts = pool(2, curve=carries(5.0))
    assert tier_decision(observe(facts, busy(), arrivals=5.0)).memory["pool"].slowness_permille
    rolling = replace(facts, rolling=True)
    assert tier_decision(observe(rolling, busy(), arrivals=5.0)).memory["pool"].slowness_permille is None


def test_other_engines_are_not_believed_to_be_like_the_old():
    """A tier that gets another accelerator, or another objective."""
    learned = PoolMemory(
        learned_of="a",
        learned_at=to_time(NOW - 15),
        work_micros=200_000,
        slowness_permille=2000,
        headroom_micros=2_500_000,
    )
    facts = pool(2, curve=carries(5.0), engines="a")
    assert one(observe(facts, busy(), arrivals=5.0, memory=learned)).desired > 4
    changed = tier_decision(observe(replace(facts, engines="b"), busy(), arrivals=5.0, memory=learned))
    assert changed.decisions[0].desired == 2
    assert changed.memory["pool"].learned_of == "b"
    assert changed.memory["pool"].slowness_permille is None


def test_a_histogram_with_gaps_shrinks_nothing():
    facts, memory = pool(4, curve=carries(5.0)), low_for(LONG)
    assert one(observe(facts, busy(4), arrivals=1.0, memory=memory)).desired < 4
    gaps = one(observe(facts, busy(4, ttft=replace(FAST_TTFT, partial=True)), arrivals=1.0, memory=memory))
    assert (gaps.desired, gaps.binding) == (4, Binding.HOLD_UNKNOWN)


def test_a_queue_before_a_cache_that_nobody_can_see_shrinks_nothing():
    facts, memory = pool(4, curve=carries(5.0)), low_for(LONG)
    waits = busy(4, waiting=4)
    seen = one(observe(facts, replace(waits, kv_usage=Value(0.3)), arrivals=1.0, memory=memory))
    assert (seen.desired, seen.binding) == (4, Binding.QUEUE)
    unseen = one(observe(facts, waits, arrivals=1.0, memory=memory))
    assert (unseen.desired, unseen.binding) == (4, Binding.HOLD_UNKNOWN)


def test_words_for_a_modelled_pool_say_what_would_change_it():
    alone = one(
        observe(pool(1, scaling=PoolScaling(min_replicas=0), curve=carries(5.0)), busy(1), arrivals=0.5)
    )
    assert "Fewer than 0 " not in alone.would_change
    assert "requests/s" in alone.would_change
    full = one(observe(pool(2, curve=carries(5.0)), busy(running=20, waiting=9), arrivals=1.0))
    assert full.desired == 3
    assert "unknown" not in full.reason
    assert "100% of the slots are taken" in full.reason


@st.composite
def taught(draw):
    """What an hour of traffic may have left."""
    hour = draw(st.lists(st.integers(-1, 900), max_size=120))
    newest = math.floor(NOW / 30.0) - draw(st.integers(0, 3))
    return PoolMemory(
        low_since=draw(st.sampled_from([None, to_time(NOW - 5000), to_time(NOW - 20)])),
        low_peak=draw(st.one_of(st.none(), st.integers(0, 20))),
        learned_at=draw(st.sampled_from([None, to_time(NOW - 15), to_time(NOW - 5000), to_time(NOW + 900)])),
        work_micros=draw(st.one_of(st.none(), st.integers(20_000, 2_000_000))),
        slowness_permille=draw(st.one_of(st.none(), st.integers(500, 2000))),
        headroom_micros=draw(st.one_of(st.none(), st.integers(920_000, 4_000_000))),
        asked=draw(st.one_of(st.none(), st.integers(0, 100_000))),
        missed_milli=draw(st.one_of(st.none(), st.integers(0, 5_000_000))),
        load_peaks=hour,
        load_bucket=newest if hour else None,
    )


@st.composite
def modelled(draw):
    """One pool that the model knows, with a past, whatever its signals say."""
    observation = draw(observations(disaggregated=False))
    (facts,) = observation.pools
    curve = carries(draw(st.sampled_from([0.5, 5.0])))
    memory = draw(taught())
    recent = draw(signals)
    router = replace(observation.load.router, recent_rate=recent)
    (name, seen), *_ = observation.load.pools.items()
    seen = replace(seen, kv_usage=draw(st.sampled_from([GONE, Zero(), Value(0.5), Value(0.97)])))
    return replace(
        observation,
        pools=(replace(facts, curve=curve),),
        memory={facts.name: memory},
        load=TierLoad({name: seen}, router),
        feasible=draw(st.sampled_from([None, True, False])),
    )


@many
@given(modelled(), st.floats(1.0, 8.0))
def test_more_arrivals_never_mean_fewer_replicas_whatever_was_learned(observation, factor):
    def more(each: Signal) -> Signal:
        return Value(each.value * factor, each.age, each.partial) if isinstance(each, Value) else each

    router = observation.load.router
    heavier_router = replace(
        router, arrival_rate=more(router.arrival_rate), recent_rate=more(router.recent_rate)
    )
    loaded = replace(observation, load=replace(observation.load, router=heavier_router))
    assert one(loaded).desired >= one(observation).desired


@many
@given(modelled(), st.floats(1.0, 8.0))
def test_more_in_flight_never_means_fewer_replicas_whatever_was_learned(observation, factor):
    def more(each: Signal) -> Signal:
        return Value(each.value * factor, each.age, each.partial) if isinstance(each, Value) else each

    loads = {
        name: replace(seen, running=more(seen.running), waiting=more(seen.waiting))
        for name, seen in observation.load.pools.items()
    }
    loaded = replace(observation, load=replace(observation.load, pools=loads))
    assert one(loaded).desired >= one(observation).desired


@many
@given(modelled())
def test_nothing_unknown_ever_shrinks_a_modelled_pool(observation):
    (facts,) = observation.pools
    decision = one(observation)
    if decision.desired >= decision.current or decision.current > facts.scaling.max_replicas:
        return
    seen, router = observation.load.pools[facts.name], observation.load.router
    assert seen.coverage.complete
    for each in (seen.running, seen.waiting, router.arrival_rate):
        assert not isinstance(each, Unknown)
        assert not (isinstance(each, Value) and each.partial)


@many
@given(modelled())
def test_deciding_again_at_once_decides_the_same(observation):
    first = tier_decision(observation)
    again = tier_decision(replace(observation, memory=first.memory))
    (before,), (after,) = first.decisions, again.decisions
    # What leaves leaves at its pace: the next step down is not now.
    assert after.desired in (
        {before.desired} if before.desired >= before.current else {before.desired, before.current}
    )
    learned = "work_micros", "slowness_permille", "headroom_micros", "asked", "missed_milli", "load_peaks"
    for name in learned:
        assert getattr(again.memory[after.pool], name) == getattr(first.memory[after.pool], name)


def test_one_engine_of_a_phase_leans_on_nobody():
    """Of a prefill engine it is known what it carries alone, queue included, and a decode engine's own batch ends its rate."""
    quiet = {"prefill": low_for(LONG), "decode": low_for(LONG)}
    facts = phases(1, 1, max_num_seqs=128, curve=carries(10.0))
    calm = load(1, running=3, ttft=QUICK_FIRST)
    decided = by_pool(observe(facts, both(calm, calm), arrivals=8.0, memory=quiet))
    assert decided["prefill"].desired == 1
    assert decided["decode"].desired == 1
    whole = pool(1, max_num_seqs=128, curve=carries(10.0))
    assert one(observe(whole, calm, arrivals=8.0, memory=low_for(LONG))).desired == 2
