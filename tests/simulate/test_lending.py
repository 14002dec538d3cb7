"""Engines that change hands: where requests go, what is paid by whom, and what each tier is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from servingtiers.core.decisions import Binding, Decision, TierDecision
from servingtiers.core.sharing import Group, GroupDecision, Relabel
from servingtiers.core.signals import Unknown, Value, Zero, number
from servingtiers.performance import engine_kernel as kernel
from servingtiers.performance.engine_sim import PoolConfig, make_pool, make_requests
from servingtiers.simulate import plant
from servingtiers.simulate.fleet import EPOCH, Fleet, run
from servingtiers.simulate.rivals import UNSHARED, make_policy
from servingtiers.simulate.scenario import Crash, Delay, Noise, Scenario
from servingtiers.simulate.scoring import score, score_tier
from servingtiers.simulate.telemetry import FaultKind, MetricFault
from servingtiers.simulate.tiers import parse_tier, tier_plan
from servingtiers.simulate.traces import Trace, load_trace

CHAT, BATCH = "llm/chat", "llm/batch"


def member(
    name: str, *, batch: int = 64, tier: str = "Balanced", pool: str = "shared", **engine: Any
) -> dict[str, Any]:
    return {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "metadata": {"name": name, "namespace": "llm"},
        "spec": {
            "tier": tier,
            "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"},
            "slo": {"ttft": {"p99": "2s"}, "tpot": {"p99": "100ms"}},
            "sharedPool": {"name": pool},
            "pool": {
                "hardware": {"accelerators": ["a100-sxm-80gb"], "tensorParallel": 1},
                "engine": {"maxNumSeqs": batch, "maxModelLen": 16384, **engine},
                "scaling": {"minReplicas": 1, "maxReplicas": 4},
            },
        },
    }


def of_hand(*requests: tuple[float, int, int], seconds: float = 300.0) -> Trace:
    columns = np.array(requests, dtype=np.float64).reshape(-1, 3)
    tokens = columns[:, 1:].astype(np.int64)
    return Trace(
        "by hand",
        "synthetic",
        seconds,
        columns[:, 0],
        tokens[:, 0],
        tokens[:, 1],
        np.zeros_like(tokens[:, 0]),
    )


Step = tuple[float, str, str | None, str | None]
"""(time, engine, holder, bound for)"""


@dataclass
class Hand:
    """A policy that changes labels at given times and never a number of replicas."""

    steps: list[Step]
    name: str = "hand"
    interval: float = 15.0
    samples: float | None = None
    reads_load: bool = True
    lends: bool = True
    replicas: dict[float, tuple[str, int]] = field(default_factory=dict)
    groups: list[tuple[float, Group]] = field(default_factory=list)

    def sample(self, readings):
        raise AssertionError("it asked for none")

    def decide(self, observations, now):
        made = []
        for obs in observations:
            (facts,) = obs.pools
            wanted = facts.replicas
            for at, (key, count) in self.replicas.items():
                if key == obs.key and now - EPOCH >= at:
                    wanted = count
            made.append(
                TierDecision(
                    obs.key,
                    (Decision(facts.name, facts.replicas, wanted, "", Binding.STEADY, ""),),
                    obs.memory,
                )
            )
        return tuple(made)

    def lend(self, group, decided, now):
        self.groups.append((now - EPOCH, group))
        due = [step for step in self.steps if step[0] <= now - EPOCH]
        self.steps = self.steps[len(due) :]
        uids = {engine.name: engine.uid for engine in group.engines}
        return GroupDecision(
            decided, tuple(Relabel(uids[name], name, to, bound, "by hand") for _, name, to, bound in due)
        )

    def seen(self, at: float) -> Group:
        return next(group for time, group in self.groups if time >= at)


def two(
    chat: Trace,
    batch: Trace,
    *,
    chat_batch: int = 64,
    batch_batch: int = 64,
    initial: tuple[int, int] = (1, 2),
    **changes: Any,
) -> Scenario:
    documents = member("chat", batch=chat_batch), member("batch", batch=batch_batch, tier="Throughput")
    plans = [
        replace(tier_plan(parse_tier(document), trace), initial={"pool": count})
        for document, trace, count in zip(documents, (chat, batch), initial, strict=True)
    ]
    given = {"start_up": Delay(40.0), "noise": Noise(0.0, 0.0), **changes}
    return Scenario(tuple(plans), **given)


def rows_of(fleet: Fleet, key: str) -> np.ndarray:
    """The row that each request of a tier went to."""
    (tier,) = [each for each in fleet._tiers if each.plan.key == key]
    return np.asarray(tier.pools[0].journal.row[tier.ids])


def test_members_that_lend_nothing_run_as_if_they_had_no_pool():
    """The same two tiers with and without a TierPool: the very same run, although their engines are one plant."""
    chat, batch = load_trace("sawtooth:1:20:600:200", seed=1), load_trace("step:2:9:600", seed=2)
    scenario = two(chat, batch, chat_batch=32, batch_batch=96, noise=Noise(), crashes=(Crash(200.0),))
    apart = replace(
        scenario,
        tiers=tuple(
            replace(tier, spec=tier.spec.model_copy(update={"shared_pool": None})) for tier in scenario.tiers
        ),
    )
    moves = {100.0: (CHAT, 3), 300.0: (BATCH, 1), 400.0: (CHAT, 1)}
    one, other = (run(each, Hand([], replicas=moves), 3) for each in (scenario, apart))
    assert len(scenario.groups()) == 1
    assert len(apart.groups()) == 2
    for mine, theirs in zip(one.tiers, other.tiers, strict=True):
        assert np.array_equal(mine.first, theirs.first, equal_nan=True)
        assert np.array_equal(mine.last, theirs.last, equal_nan=True)
        assert np.array_equal(mine.refused, theirs.refused)
        assert mine.pools[0].gpu_seconds == theirs.pools[0].gpu_seconds
        assert np.array_equal(mine.pools[0].in_flight, theirs.pools[0].in_flight)


def test_a_lent_engine_serves_the_borrower_from_the_moment_its_router_heeds_the_label():
    chat = of_hand(*[(float(s), 500, 20) for s in range(290)])
    scenario = two(chat, of_hand((1.0, 500, 20)), relabel=7.0)
    policy = Hand(
        [(60, "engine-2", None, CHAT), (90, "engine-2", CHAT, None), (180, "engine-2", BATCH, None)]
    )
    fleet = Fleet(scenario, policy, 0)
    result = fleet.run()
    decided = [passage.time for passage in result.passages]
    rows = rows_of(fleet, CHAT)
    (own,) = set(rows[: int(decided[1])].tolist())
    lent = chat.arrival[rows != own]
    assert decided[1] + 7.0 <= lent.min() < decided[1] + 10.0
    assert decided[2] + 4.0 < lent.max() < decided[2] + 7.0
    assert 0.4 < (rows != own)[(chat.arrival > lent.min()) & (chat.arrival < lent.max())].mean() < 0.6
    # On its way it was nobody's; afterwards it is at home again.
    on_its_way, lent_out, back = (policy.seen(at) for at in (80, 150, 250))
    assert [engine.holder for engine in on_its_way.engines] == [CHAT, BATCH, None]
    assert on_its_way.engines[2].bound_for == CHAT
    assert [engine.holder for engine in lent_out.engines] == [CHAT, BATCH, CHAT]
    assert [engine.home for engine in lent_out.engines] == [CHAT, BATCH, BATCH]
    assert [engine.holder for engine in back.engines] == [CHAT, BATCH, BATCH]
    facts = {at: [tier.pools[0] for tier in policy.seen(at).tiers] for at in (30, 80, 150, 250)}
    assert [(each.ready, each.lent, each.borrowed) for each in facts[30]] == [(1, 0, 0), (2, 0, 0)]
    assert [(each.ready, each.lent, each.borrowed) for each in facts[80]] == [(1, 0, 0), (2, 1, 0)]
    assert [(each.ready, each.lent, each.borrowed) for each in facts[150]] == [(1, 0, 1), (2, 1, 0)]
    assert [(each.ready, each.lent, each.borrowed) for each in facts[250]] == [(1, 0, 0), (2, 0, 0)]


def test_an_engine_finishes_what_it_has_beside_the_borrowers_requests():
    """Requests of both tiers in one batch take what the event engine says they take together."""
    batch = of_hand((70.0, 2000, 3000), (70.001, 2000, 3000), (70.002, 2000, 3000))
    chat = of_hand(*[(90.0 + s, 800, 100) for s in range(40)])
    # Chat's own engine is busy elsewhere: it goes to the other tier first, so that one engine has both.
    policy = Hand([(0, "engine-0", BATCH, None), (75, "engine-1", CHAT, None)])
    scenario = two(chat, batch, initial=(1, 1), batch_batch=128, relabel=5.0)
    fleet = Fleet(scenario, policy, 0)
    result = fleet.run()
    home = fleet._tiers[1].pools[0]
    row = next(pod.row for pod in home.pods)
    mine = [rows_of(fleet, key) == row for key in (CHAT, BATCH)]
    assert mine[0].all()
    assert 0 < mine[1].sum() < 3
    # The same requests on one engine with the home's flags.
    together = np.argsort(np.concatenate([chat.arrival, batch.arrival[mine[1]]]), kind="stable")

    def joined(of: Callable[[Trace], Any]) -> Any:
        return np.concatenate([of(chat), of(batch)[mine[1]]])[together]

    alone = make_requests(
        joined(lambda t: t.arrival) * 1e3, joined(lambda t: t.prompt), joined(lambda t: t.output)
    )
    plan = scenario.tiers[1].pools[0]
    kernel.run_open(make_pool(PoolConfig(plan.model, plan.engine)), alone, 1.0, least_loaded=False)
    last = np.concatenate([result.tiers[0].last, result.tiers[1].last[mine[1]]])[together]
    assert last == pytest.approx(alone.last / 1e3, abs=1e-9)


def test_a_lent_engine_keeps_its_own_batch():
    chat = of_hand(*[(100.0 + 0.01 * n, 200, 400) for n in range(60)])
    scenario = two(chat, of_hand((1.0, 10, 1)), chat_batch=8, batch_batch=48, initial=(1, 1))
    policy = Hand([(30, "engine-1", CHAT, None)])
    fleet = Fleet(scenario, policy, 0)
    most = {0: 0, 1: 0}
    original = fleet._scrape

    def look() -> None:
        original()
        for index, tier in enumerate(fleet._tiers):
            (pod,) = tier.pools[0].pods
            most[index] = max(most[index], int(tier.pools[0].state.ints[pod.row, kernel.RUNNING]))

    fleet._scrape = look  # type: ignore[method-assign]
    fleet.run()
    assert most[0] == 8
    assert 25 <= most[1] <= 48


def test_accelerator_time_is_the_holders():
    scenario = two(of_hand((1.0, 10, 1)), of_hand((1.0, 10, 1)), relabel=5.0)
    policy = Hand(
        [(60, "engine-2", None, CHAT), (90, "engine-2", CHAT, None), (180, "engine-2", BATCH, None)]
    )
    result = run(scenario, policy, 0)
    _, entered, left = (passage.time for passage in result.passages)
    chat, batch = (outcome.pools[0].gpu_seconds for outcome in result.tiers)
    assert chat == pytest.approx(300 + left - entered)
    assert chat + batch == pytest.approx(900.0)
    assert score(result).gpu_hours == pytest.approx(0.25)
    assert score_tier(result, result.tiers[0]).borrowed == 1


def test_what_is_mixed_is_told_to_neither():
    """What an engine counted before it was here for a whole window is of both tiers: gauges count, rates do not."""
    batch = of_hand(*[(50.0 + 0.1 * n, 500, 2000) for n in range(40)], seconds=400.0)
    chat = of_hand(*[(float(s), 500, 20) for s in range(390)], seconds=400.0)
    policy = Hand([(60, "engine-2", CHAT, None)])
    result = run(two(chat, batch, relabel=5.0), policy, 0)
    (passage,) = result.passages
    rates = {at: group.tiers[0].load.pools["pool"] for at, group in policy.groups}
    for at, load in rates.items():
        assert load.coverage.complete or at < 15
        if passage.time + 5 < at < passage.time + 60:
            # The other tier's requests that it still has are in the gauges.
            assert (number(load.running) or 0.0) > 10 or at > passage.time + 20
            assert isinstance(load.request_rate, Value)
            assert load.request_rate.partial
        if at > passage.time + 90:
            assert isinstance(load.request_rate, Value)
            assert not load.request_rate.partial
            assert load.request_rate.value == pytest.approx(1.0, rel=0.15)
    assert policy.seen(360).tiers[1].load.pools["pool"].coverage.expected == 1


def test_requests_in_flight_are_told_with_their_age_and_not_through_a_gap():
    batch = of_hand(*[(50.0 + 0.1 * n, 500, 3000) for n in range(40)])
    scenario = two(of_hand((1.0, 10, 1)), batch, metric_faults=(MetricFault(FaultKind.DOWN, 150.0, 250.0),))
    policy = Hand([])
    run(scenario, policy, 0)
    busy = policy.seen(80).engines
    assert isinstance(busy[0].in_flight, Zero)
    assert sum(number(each.in_flight) or 0.0 for each in busy) == 40
    assert all(isinstance(each.in_flight, Unknown) for each in policy.seen(230).engines)
    assert 0 < busy[1].in_flight.age <= 15  # type: ignore[union-attr]


def test_a_lent_engine_that_is_deleted_drains_for_its_borrower_and_one_that_crashes_comes_back_to_it():
    chat = of_hand(*[(float(s), 500, 200) for s in range(290)])
    scenario = two(chat, of_hand((1.0, 10, 1)), initial=(1, 1), crashes=(Crash(100.0, BATCH),))
    result = run(scenario, Hand([(30, "engine-1", CHAT, None)]), 0)
    assert 1 <= score_tier(result, result.tiers[0]).rejected < 10
    pool = result.tiers[0].pools[0]
    assert pool.borrowed[(pool.time > 45) & (pool.time < 100)].min() == 1
    assert pool.borrowed[(pool.time > 100) & (pool.time < 140)].max() == 0
    assert pool.borrowed[pool.time > 150].min() == 1
    gone = run(
        replace(scenario, crashes=()), Hand([(30, "engine-1", CHAT, None)], replicas={100.0: (BATCH, 0)}), 0
    )
    figures = score_tier(gone, gone.tiers[0])
    assert (figures.rejected, figures.unfinished) == (0, 0)
    assert gone.tiers[0].pools[0].borrowed[-1] == 0


def test_a_borrowed_engine_counts_for_what_its_flags_carry():
    chat, batch = load_trace("step:3:3:300", seed=1, prompt=400, output=200), of_hand((1.0, 10, 1))
    hint = {"promptTokens": {"mean": 400, "p95": 800}, "outputTokens": {"mean": 200, "p95": 400}}
    shares = []
    for size in (8, 64, 128):
        documents = member("chat", batch=64), member("batch", batch=size, tier="Throughput")
        for each in documents:
            each["spec"]["workload"] = hint
        plans = tuple(
            replace(tier_plan(parse_tier(each), trace), initial={"pool": 1})
            for each, trace in zip(documents, (chat, batch), strict=True)
        )
        policy = Hand([(30, "engine-1", CHAT, None)])
        run(Scenario(plans, noise=Noise(0.0, 0.0)), policy, 0)
        assert policy.seen(15).tiers[0].pools[0].borrowed_share == 1.0
        shares.append(policy.seen(60).tiers[0].pools[0].borrowed_share)
    assert shares[0] < 0.5
    assert shares[1] == pytest.approx(1.0)
    assert shares[2] > 0.9


def test_tiers_that_only_share_a_name_in_other_namespaces_or_none_at_all_are_apart():
    scenario = two(of_hand((1.0, 10, 1)), of_hand((1.0, 10, 1)))
    chat, batch = scenario.tiers
    elsewhere = replace(scenario, tiers=(chat, replace(batch, key="other/batch")))
    assert [len(group) for group in elsewhere.groups()] == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"name": "Qwen/Qwen3-8B"}}, "differ in model"),
        ({"pool": {**member("x")["spec"]["pool"], "engine": {"maxModelLen": 4096}}}, "differ in maxModelLen"),
    ],
)
def test_members_that_cannot_serve_for_each_other_are_refused(change, message):
    other = member("batch")
    other["spec"] |= change
    trace = of_hand((1.0, 10, 1))
    plans = tuple(tier_plan(parse_tier(each), trace) for each in (member("chat"), other))
    with pytest.raises(ValueError, match=message):
        Fleet(Scenario(plans), Hand([]), 0)


def test_a_tier_that_only_recommends_keeps_its_engines():
    document = member("batch")
    document["spec"]["scaling"] = {"mode": "Recommend"}
    trace = of_hand((1.0, 10, 1))
    plans = tuple(tier_plan(parse_tier(each), trace) for each in (member("chat"), document))
    result = run(Scenario(plans), Hand([(30, "engine-1", CHAT, None)]), 0)
    assert result.passages == ()


def test_a_limit_of_the_pool_reaches_the_policy():
    scenario = two(of_hand((1.0, 10, 1)), of_hand((1.0, 10, 1)), pool_accelerators={"llm/shared": 7})
    policy = Hand([])
    run(scenario, policy, 0)
    assert policy.seen(30).max_accelerators == 7


def test_rows_of_two_homes_are_advanced_by_their_own_flags():
    """The compiled router sees members of both homes."""
    scenario = two(load_trace("step:6:6:120", seed=3), of_hand((1.0, 10, 1), seconds=120.0), initial=(1, 1))
    fleet = Fleet(scenario, Hand([(0, "engine-1", CHAT, None)]), 0)
    fleet.run()
    counts = np.bincount(rows_of(fleet, CHAT))
    busy = counts[counts > 0]
    assert len(busy) == 2
    assert busy.min() > 0.35 * busy.sum()
    assert (rows_of(fleet, CHAT) != plant.UNSENT).all()


def test_the_operators_policy_lends_in_a_burst_and_calls_engines_home():
    """Fixed fleets: the same accelerators, divided for good or lent."""
    chat = load_trace("spike:2:24:1500:240", seed=1, prompt=900, output=200)
    batch = load_trace("step:4:4:1500", seed=2, prompt=900, output=200)
    plans = []
    for name, trace, count, tier in (("chat", chat, 2, "Latency"), ("batch", batch, 4, "Throughput")):
        document = member(name, tier=tier)
        document["spec"]["sharedPool"]["priority"] = 200 if name == "chat" else 50
        document["spec"]["workload"] = {
            "promptTokens": {"mean": 900, "p95": 2700},
            "outputTokens": {"mean": 200, "p95": 600},
        }
        document["spec"]["pool"]["scaling"] = {"minReplicas": count, "maxReplicas": count}
        plans.append(tier_plan(parse_tier(document), trace))
    scenario = Scenario(tuple(plans), warm_up=300.0)
    lending, apart = (run(scenario, make_policy(name, scenario), 0) for name in ("servingtiers", UNSHARED))
    mine, theirs = score(lending), score(apart)
    assert apart.passages == ()
    assert mine.tiers[CHAT].borrowed > 0
    assert mine.tiers[CHAT].violations < 0.5 * theirs.tiers[CHAT].violations
    assert mine.gpu_hours == pytest.approx(theirs.gpu_hours)
    # Minutes after the burst every engine is at home.
    assert lending.tiers[0].pools[0].borrowed[-1] == 0
    assert lending.tiers[1].pools[0].ready[-1] == 4
