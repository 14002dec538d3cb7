# the names of the tests are the sentences
"""Who lends which engine to whom, one decision at a time, and over many of them in a row."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servingtiers.api.spec import PoolScaling, ServingTierSpec
from servingtiers.api.status import PoolMemory
from servingtiers.core.decisions import (
    Binding,
    Decision,
    EngineCurve,
    PoolFacts,
    PoolRole,
    Targets,
    TierDecision,
    TierObservation,
)
from servingtiers.core.sharing import Group, GroupDecision, SharedEngine
from servingtiers.core.signals import Coverage, Load, RouterLoad, Signal, TierLoad, Unknown, Value, Zero
from servingtiers.core.times import to_time
from servingtiers.policy.lending import OVERLAP_SHARE, RETURN_HOLD_SECONDS, STAY_SECONDS, decide

NOW = 1_800_000_000.0
BATCH = 64


@dataclass(frozen=True)
class Tier:
    """One member in few words."""

    name: str
    tier: str = "Latency"
    priority: int = 100
    needed: int | None = 1
    desired: int | None = None
    """What scaling wants of the Deployment; by default what is needed beside what serves."""
    min_keep: int = 1
    max_borrowed: int = 4
    mode: str = "Auto"
    suspend: bool = False
    shares: bool = True
    complete: bool = True
    share: float = 1.0
    min_replicas: int = 1
    rolling: bool = False
    memory: PoolMemory = field(default_factory=PoolMemory)
    binding: Binding = Binding.STEADY
    tensor_parallel: int = 1
    expected: int | None = None
    highest: int | None = None
    max_replicas: int = 16
    standby: int | None = None
    arrivals: Signal = field(default_factory=lambda: Value(1.0))
    curve: EngineCurve | None = None


CURVE = EngineCurve(
    rps=10.0,
    saturation=10.0,
    loads=(0.0, 1.0),
    tpot=(0.02, 0.04),
    ttft=(0.1, 0.1),
    prefill_share=0.3,
)
"""A token takes 20 ms in an idle engine and 40 ms in one that does its 10 requests/s."""
CHAT = Tier("chat", priority=200)
BATCH_TIER = Tier("batch", tier="Throughput", priority=10)


def engine(
    uid: str,
    home: str,
    holder: str | None = "home",
    *,
    bound_for: str | None = None,
    flight: float | Signal = 20.0,
    held: float | None = None,
    ready: bool = True,
    leaving: bool = False,
) -> SharedEngine:
    if isinstance(flight, (int, float)):
        flight = Value(float(flight)) if flight else Zero()
    return SharedEngine(
        uid=uid,
        name=f"pod-{uid}",
        home=f"llm/{home}",
        holder=f"llm/{home}" if holder == "home" else None if holder is None else f"llm/{holder}",
        bound_for=None if bound_for is None else f"llm/{bound_for}",
        ready=ready,
        leaving=leaving,
        in_flight=flight,
        held_seconds=held,
    )


def group(
    tiers: list[Tier], engines: list[SharedEngine], *, limit: int | None = None
) -> tuple[Group, tuple[TierDecision, ...]]:
    observations, decided = [], []
    for tier in tiers:
        key = f"llm/{tier.name}"
        own = [e for e in engines if e.home == key and not e.leaving]
        ready = [e for e in own if e.ready]
        lent = sum(e.holder != key for e in ready)
        borrowed = sum(e.holder == key and e.home != key and e.ready and not e.leaving for e in engines)
        facts = PoolFacts(
            name="pool",
            role=PoolRole.AGGREGATED,
            scaling=PoolScaling(min_replicas=tier.min_replicas, max_replicas=tier.max_replicas),
            replicas=len(own),
            ready=len(ready),
            pending=len(own) - len(ready),
            max_num_seqs=BATCH,
            lent=lent,
            borrowed=borrowed,
            borrowed_share=tier.share,
            rolling=tier.rolling,
            curve=tier.curve,
        )
        shared = {
            "name": "p",
            "priority": tier.priority,
            "minKeep": tier.min_keep,
            "maxBorrowed": tier.max_borrowed,
        }
        spec = {
            "tier": tier.tier,
            "model": {"name": "m"},
            "scaling": {"mode": tier.mode},
            "suspend": tier.suspend,
            "pool": {"hardware": {"tensorParallel": tier.tensor_parallel}},
        }
        if tier.shares:
            spec["sharedPool"] = shared
        load = Load(
            60.0, Coverage(len(ready) - (not tier.complete), len(ready)), running=Value(5.0), waiting=Zero()
        )
        observations.append(
            TierObservation(
                key=key,
                spec=ServingTierSpec.model_validate(spec),
                targets=Targets(),
                pools=(facts,),
                load=TierLoad({"pool": load}, RouterLoad(Coverage(1, 1), tier.arrivals, Zero())),
                memory={"pool": tier.memory},
            )
        )
        desired = tier.desired
        if desired is None:
            serving = len(ready) - lent + borrowed + facts.pending
            desired = max(0, len(own) + (0 if tier.needed is None else max(0, tier.needed - serving)))
        decision = Decision(
            "pool",
            len(own),
            desired,
            "scaling says so.",
            tier.binding,
            "another load",
            needed=tier.needed,
            expected=tier.expected,
            highest=tier.highest,
            standby=tier.standby,
        )
        memory = tier.memory
        if desired > len(own):
            memory = memory.model_copy(update={"last_scale_up": to_time(NOW)})
        decided.append(TierDecision(key, (decision,), {"pool": memory}))
    return Group(tuple(observations), tuple(engines), limit), tuple(decided)


def run(tiers: list[Tier], engines: list[SharedEngine], *, limit: int | None = None) -> GroupDecision:
    found = decide(*group(tiers, engines, limit=limit), NOW)
    assert all(relabel.reason for relabel in found.relabels)
    return found


def moves(found: GroupDecision) -> list[tuple[str, str | None, str | None]]:
    def short(key: str | None) -> str | None:
        return None if key is None else key.removeprefix("llm/")

    return [(r.uid, short(r.holder), short(r.bound_for)) for r in found.relabels]


def replicas(found: GroupDecision) -> list[int]:
    return [decision.desired for tier in found.tiers for decision in tier.decisions]


# --- borrowing --------------------------------------------------------------------------------------------------


def test_the_engine_with_the_least_in_flight_leaves_for_the_tier_that_lacks_one():
    engines = [
        engine("c", "chat"),
        *(engine(u, "batch", flight=f) for u, f in (("1", 60), ("2", 40), ("3", 50))),
    ]
    found = run([replace(CHAT, needed=2), replace(BATCH_TIER, needed=3)], engines)
    assert moves(found) == [("2", None, "chat")]
    assert "can wait" in found.relabels[0].reason
    assert replicas(found) == [1, 3], "it moves instead of starting"
    assert found.tiers[0].decisions[0].binding is Binding.BORROWED
    assert found.tiers[0].memory["pool"].last_scale_up is None


def test_an_idle_engine_goes_over_in_one_step():
    found = run(
        [replace(CHAT, needed=2), replace(BATCH_TIER, needed=0)],
        [engine("c", "chat"), engine("1", "batch", flight=0), engine("2", "batch")],
    )
    assert moves(found) == [("1", "chat", None)]


@pytest.mark.parametrize(
    ("what", "chat", "batch", "engines"),
    [
        ("nothing is lacking", {"needed": 1}, {}, {}),
        ("what is needed is not known", {"needed": None, "desired": 2}, {}, {}),
        ("an equal priority is never drained", {"priority": 10}, {}, {}),
        ("a higher priority is never drained", {"priority": 5}, {}, {}),
        ("minKeep stays", {}, {"min_keep": 2}, {}),
        ("maxBorrowed is reached", {"max_borrowed": 0}, {}, {}),
        ("the borrower only recommends", {"mode": "Recommend"}, {}, {}),
        ("the lender only recommends", {}, {"mode": "Recommend"}, {}),
        ("the borrower is suspended", {"suspend": True}, {}, {}),
        ("the lender is suspended", {}, {"suspend": True}, {}),
        ("the borrower shares nothing", {"shares": False}, {}, {}),
        ("the lender's engines are being replaced", {}, {"rolling": True}, {}),
        ("what they have in flight is not known", {}, {}, {"flight": Unknown("no answer")}),
        ("what they have in flight is known in part", {}, {}, {"flight": Value(3.0, partial=True)}),
        ("they are not ready", {}, {}, {"ready": False}),
        ("they are being deleted", {}, {}, {"leaving": True}),
        ("they came only now", {}, {}, {"held": STAY_SECONDS - 1}),
    ],
)  # fmt: skip
def test_nothing_moves_where(what, chat, batch, engines):
    tiers = [replace(CHAT, **({"needed": 3} | chat)), replace(BATCH_TIER, **({"needed": 0} | batch))]
    found = run(tiers, [engine("c", "chat"), *(engine(u, "batch", **engines) for u in "12")])
    assert not found.relabels, what
    wanted = tiers[0].desired or tiers[0].needed
    soon = 1 if "only now" in what else 0
    assert found.tiers[0].decisions[0].desired == wanted - soon, "what no move gives, now or soon, is started"


def test_a_tier_that_serves_users_lends_only_what_it_does_not_need():
    second = Tier("docs", tier="Balanced", priority=50, needed=2)
    engines = [engine("c", "chat"), *(engine(u, "docs") for u in "123")]
    found = run([replace(CHAT, needed=4), second], engines)
    assert moves(found) == [("1", None, "chat")]
    assert replicas(found) == [3, 3], "one moves, two start"
    assert not run([replace(CHAT, needed=4), replace(second, complete=False)], engines).relabels


def test_what_is_not_needed_goes_before_what_is_at_work_and_the_least_important_first():
    engines = [engine("c", "chat"), *(engine(u, "batch", flight=9) for u in "12"), *(engine(u, "docs", flight=60) for u in "34"), *(engine(u, "mail", flight=60) for u in "56")]  # fmt: skip
    tiers = [
        replace(CHAT, needed=3),
        replace(BATCH_TIER, needed=2),
        Tier("docs", tier="Balanced", priority=50),
        Tier("mail", tier="Balanced", priority=40),
    ]
    assert [uid for uid, *_ in moves(run(tiers, engines))] == ["5", "3"]


def test_the_most_important_tier_is_served_first_and_may_take_what_another_has_borrowed():
    tiers = [replace(CHAT, needed=2), Tier("docs", priority=100, needed=3), replace(BATCH_TIER, needed=1)]
    engines = [
        engine("c", "chat"),
        engine("d", "docs"),
        engine("1", "batch", "docs", held=90),
        engine("2", "batch"),
    ]
    assert moves(run(tiers, engines)) == [("1", None, "chat")], "minKeep holds the other one"


RUSHES = replace(CHAT, needed=1, standby=3)
WORKS = replace(BATCH_TIER, needed=2, expected=3, arrivals=Value(20.0), curve=CURVE)
"""20 requests/s: 24 ms a token on ten engines, 24.4 ms on nine, 25 ms on eight, 26.7 ms on six, 30 ms on four."""


def _batch(count: int, *, away: int = 0, **changes: object) -> list[SharedEngine]:
    held = {"held": 200.0} | changes
    lent = [engine(f"l{n}", "batch", "chat", **held) for n in range(away)]
    return [engine("c", "chat"), *lent, *(engine(f"b{n}", "batch") for n in range(count - away))]


@pytest.mark.parametrize(
    ("what", "engines", "chat", "batch", "go"),
    [
        ("it expects no need of them", 10, {}, {}, 2),
        ("no load that comes and goes", 10, {"standby": None}, {}, 0),
        ("6 more would be 33 % slower, 2 more 4 %, 3 more 7 %", 10, {"standby": 7}, {}, 3),
        ("four engines: three are 11 % slower", 4, {}, {}, 0),
        ("it expects to need nine", 10, {}, {"expected": 9}, 1),
        ("it expects to need all", 10, {}, {"expected": 10}, 0),
        ("it cannot keep up as it is", 10, {}, {"arrivals": Value(100.0)}, 0),
        ("what arrives there is not known", 10, {}, {"arrivals": Unknown("no answer")}, 0),
        ("what its engines do is not known", 10, {}, {"curve": None}, 0),
        ("nothing arrives there", 10, {}, {"arrivals": Zero()}, 2),
        ("not all of it is seen", 10, {}, {"complete": False}, 0),
        ("not all of the borrower is seen", 10, {"complete": False}, {}, 0),
        ("maxBorrowed", 10, {"max_borrowed": 1}, {}, 1),
    ],
)
def test_engines_stand_by_for_a_load_that_comes_and_goes_where_that_costs_little(
    what, engines, chat, batch, go
):
    found = run([replace(RUSHES, **chat), replace(WORKS, **batch)], _batch(engines))
    assert [(holder, to) for _, holder, to in moves(found)] == [(None, "chat")] * go, what


@pytest.mark.parametrize(
    ("what", "chat", "batch", "home"),
    [
        ("eight of ten: 4 % slower", {}, {}, 0),
        ("it could have them back in seconds, but needs them now", {}, {"needed": 9}, 1),
        ("30 requests/s: 8 of 10 are 6 % slower", {}, {"arrivals": Value(30.0)}, 0),
        ("70 requests/s: 8 of 10 are 10 % slower", {}, {"arrivals": Value(70.0)}, 0),
        ("80 requests/s are all that eight do; nine are 5 % slower", {}, {"arrivals": Value(80.0)}, 1),
        ("they are needed now", {"needed": 3}, {"arrivals": Value(80.0)}, 0),
        ("how busy it is is not known", {}, {"arrivals": Unknown("no answer")}, 0),
        ("no load that comes and goes: the hold says when", {"standby": None}, {"arrivals": Value(80.0)}, 0),
        ("not all of the borrower is seen", {"complete": False}, {"arrivals": Value(80.0)}, 0),
        ("they came only now", {"memory": PoolMemory()}, {"arrivals": Value(80.0)}, 0),
    ],
)
def test_what_only_stands_by_goes_home_when_that_is_slower_for_it(what, chat, batch, home):
    changes = {"held": STAY_SECONDS - 1} if "only now" in what else {}
    found = run([replace(RUSHES, **chat), replace(WORKS, **batch)], _batch(10, away=2, **changes))
    assert [to or holder for _, holder, to in moves(found)] == ["batch"] * home, what


def test_what_stands_by_stays_until_the_load_no_longer_comes_and_goes():
    engines = _batch(10, away=2)
    done = spared(RETURN_HOLD_SECONDS, 1)
    assert not run([replace(RUSHES, memory=done), WORKS], engines).relabels
    found = run([replace(RUSHES, standby=None, memory=done), WORKS], engines)
    assert moves(found) == [("l0", None, "batch"), ("l1", None, "batch")]


def test_what_a_lender_expects_to_need_is_no_surplus_but_its_work_can_wait():
    """A tier that serves users keeps what it expects; of one whose work can wait an engine at work goes for a need of now."""
    engines = [engine("c", "chat"), *(engine(u, "docs") for u in "12"), *(engine(u, "batch") for u in "34")]
    docs = Tier("docs", tier="Balanced", priority=50, needed=1, expected=2)
    found = run([replace(CHAT, needed=2), docs, replace(BATCH_TIER, needed=1, expected=2)], engines)
    assert [uid for uid, *_ in moves(found)] == ["3"]


def test_nothing_is_kept_for_a_rush_instead_of_started():
    """It would be over before what is kept for it has come."""
    engines = [engine("c", "chat"), *(engine(u, "batch") for u in "12345")]
    calm = replace(CHAT, needed=1, desired=3)
    assert replicas(run([calm, replace(BATCH_TIER, needed=1)], engines)) == [1, 5]
    assert replicas(run([replace(calm, standby=1), replace(BATCH_TIER, needed=1)], engines)) == [3, 5]


def test_a_borrowed_engine_counts_as_what_it_carries():
    engines = [engine("c", "chat"), *(engine(u, "batch") for u in "1234")]
    assert len(moves(run([replace(CHAT, needed=2, share=0.5), BATCH_TIER], engines))) == 2


def test_engines_that_are_starting_do_not_serve_but_their_start_is_not_repeated():
    engines = [
        engine("c", "chat"),
        engine("d", "chat", ready=False),
        engine("1", "batch"),
        engine("2", "batch"),
    ]
    found = run([replace(CHAT, needed=2), BATCH_TIER], engines)
    assert moves(found) == [("1", None, "chat")]
    assert replicas(found)[0] == 2


# --- on the way -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flight", "held", "enters"),
    [
        (Zero(), 10.0, True),
        (Zero(age=9.0), 10.0, False),  # read before its routers had let it go
        (Value(OVERLAP_SHARE * BATCH), 10.0, True),
        (Value(OVERLAP_SHARE * BATCH + 1), 10.0, False),
        (Value(1.0, partial=True), 10.0, False),
        (Unknown("no answer"), 10.0, False),
        (Unknown("no answer"), 200.0, False),
    ],
)
def test_it_enters_when_it_is_drained(flight, held, enters):
    engines = [engine("c", "chat"), engine("1", "batch"), engine("2", "batch", None, bound_for="chat", flight=flight, held=held)]  # fmt: skip
    found = run([replace(CHAT, needed=2), BATCH_TIER], engines)
    assert moves(found) == ([("2", "chat", None)] if enters else [])
    assert replicas(found) == [1, 2], "while it comes nothing is started"


@pytest.mark.parametrize(
    ("what", "changes", "moved"),
    [
        ("not drained in minutes", {"held": 301.0}, ("2", None, "batch")),
        ("bound for nobody", {"bound_for": None, "flight": 0, "held": 9.0}, ("2", "batch", None)),
        ("bound for nobody we know", {"bound_for": "gone", "held": 9.0}, ("2", None, "batch")),
        ("on its way home for long", {"bound_for": "batch", "held": 61.0}, ("2", "batch", None)),
    ],
)
def test_an_engine_without_a_holder_does_not_stay_so(what, changes, moved):
    engines = [engine("c", "chat"), engine("1", "batch"), engine("2", "batch", None, **({"bound_for": "chat"} | changes))]  # fmt: skip
    assert moves(run([CHAT, BATCH_TIER], engines)) == [moved], what


# --- going home -------------------------------------------------------------------------------------------------


def spared(seconds: float, peak: int) -> PoolMemory:
    return PoolMemory(spare_since=to_time(NOW - seconds), spare_peak=peak)


@pytest.mark.parametrize(
    ("memory", "changes", "goes"),
    [
        (spared(RETURN_HOLD_SECONDS, 1), {}, True),
        (spared(RETURN_HOLD_SECONDS - 1, 1), {}, False),
        (PoolMemory(), {}, False),
        (spared(RETURN_HOLD_SECONDS, 2), {}, False),
        (spared(RETURN_HOLD_SECONDS, 1), {"complete": False}, False),
        (spared(RETURN_HOLD_SECONDS, 1), {"needed": None}, False),
        (spared(RETURN_HOLD_SECONDS, 1), {"needed": 2}, False),
        (spared(RETURN_HOLD_SECONDS, 1), {"suspend": True}, False),
        (PoolMemory(), {"mode": "Recommend"}, True),
        (PoolMemory(), {"mode": "External"}, True),
        (PoolMemory(), {"shares": False}, True),
        (PoolMemory(), {"max_borrowed": 0}, True),
    ],
)
def test_a_loan_ends_when_the_borrower_has_done_without_it(memory, changes, goes):
    engines = [engine("c", "chat"), engine("1", "batch"), engine("2", "batch", "chat", held=200)]
    found = run([replace(CHAT, needed=1, memory=memory) if not changes else replace(CHAT, memory=memory, **changes), BATCH_TIER], engines)  # fmt: skip
    assert moves(found) == ([("2", None, "batch")] if goes else [])


def test_the_wait_for_the_end_begins_with_the_first_moment_without_need_and_forgets_no_peak():
    engines = [engine("c", "chat"), engine("1", "batch"), engine("2", "batch", "chat", held=200)]
    found = run([replace(CHAT, needed=1), BATCH_TIER], engines)
    assert found.tiers[0].memory["pool"].spare_since == to_time(NOW)
    engines = [*engines, engine("3", "batch", "chat", held=200)]
    kept = run([replace(CHAT, needed=1, memory=spared(30, 2)), BATCH_TIER], engines).tiers[0].memory["pool"]
    assert (kept.spare_since, kept.spare_peak) == (to_time(NOW - 30), 2)
    gone = run([replace(CHAT, needed=3, memory=spared(30, 2)), BATCH_TIER], engines).tiers[0].memory["pool"]
    assert (gone.spare_since, gone.spare_peak) == (None, None)


def test_a_home_that_cannot_wait_gets_back_what_it_needs():
    docs = Tier("docs", tier="Balanced", priority=50, needed=2)
    engines = [engine("c", "chat"), engine("1", "docs"), engine("2", "docs", "chat", held=200)]
    assert moves(run([replace(CHAT, needed=2), docs], engines)) == [("2", None, "docs")]
    late = replace(docs, tier="Throughput")
    assert not run([replace(CHAT, needed=2), late], engines).relabels, "work that can wait waits"


def test_a_home_replaces_what_it_has_lent_only_when_all_it_owns_would_not_do():
    engines = [engine("c", "chat"), engine("1", "batch"), engine("2", "batch", "chat", held=200)]
    found = run([replace(CHAT, needed=2), replace(BATCH_TIER, needed=2)], engines)
    assert replicas(found) == [1, 2]
    assert found.tiers[1].decisions[0].binding is Binding.LENT
    assert replicas(run([replace(CHAT, needed=2), replace(BATCH_TIER, needed=5)], engines)) == [1, 5]


def test_what_is_borrowed_goes_back_before_own_engines_are_stopped():
    engines = [
        engine("c", "chat"),
        engine("d", "chat"),
        engine("0", "batch"),
        engine("1", "batch", "chat", held=200),
    ]
    found = run([replace(CHAT, needed=1, desired=1), BATCH_TIER], engines)
    assert replicas(found)[0] == 2
    assert found.tiers[0].decisions[0].binding is Binding.BORROWED


def test_a_home_stops_nothing_that_is_lent():
    engines = [
        engine("c", "chat"),
        *(engine(u, "batch", "chat", held=200) for u in "12"),
        engine("3", "batch"),
    ]
    found = run([replace(CHAT, needed=3), replace(BATCH_TIER, needed=0, desired=1)], engines)
    assert replicas(found) == [1, 2]


def test_what_a_tier_expects_to_need_is_kept_for_it_instead_of_started():
    docs = Tier("docs", tier="Balanced", priority=50, needed=1, desired=1)
    engines = [engine("c", "chat"), engine("1", "docs"), engine("2", "docs")]
    found = run([replace(CHAT, needed=1, desired=2), docs], engines)
    assert not found.relabels
    assert replicas(found) == [1, 2]
    assert "kept" in found.tiers[1].decisions[0].reason


@pytest.mark.parametrize(
    ("what", "docs", "kept"),
    [
        ("not for an hour", {"highest": 1}, True),
        ("it has needed both within the hour", {"highest": 2}, False),
        ("minKeep", {"min_keep": 2}, False),
    ],
)
def test_only_what_a_home_has_not_needed_for_an_hour_stands_in_for_a_start(what, docs, kept):
    second = Tier("docs", tier="Balanced", priority=50, needed=1, expected=1, desired=1)
    engines = [engine("c", "chat"), engine("1", "docs"), engine("2", "docs")]
    found = run([replace(CHAT, needed=1, desired=2), replace(second, **docs)], engines)
    assert not found.relabels
    assert replicas(found) == ([1, 2] if kept else [2, 1]), what


LEANS = replace(CHAT, needed=3, expected=3)
"""One engine of its own, and two that it has borrowed."""


@pytest.mark.parametrize(
    ("what", "chat", "batch", "desired"),
    [
        ("they can stay: nobody has needed them for an hour", {}, {"highest": 2}, 1),
        ("one can stay", {}, {"highest": 3}, 2),
        ("all are needed at home now and then", {}, {"highest": 4}, 3),
        ("more than there are were needed", {}, {"highest": 9}, 3),
        ("they are expected to be needed at home", {}, {"expected": 4}, 3),
        ("minKeep", {}, {"min_keep": 4}, 3),
        ("its need is over before an engine could start", {"expected": 1}, {"highest": 4}, 1),
        ("what it expects is not known", {"expected": None}, {"highest": 4}, 1),
        ("scaling waits", {"expected": 5}, {"highest": 4}, 3),
        ("scaling asks for more", {"expected": 5, "desired": 3}, {"highest": 4}, 5),
        ("maxReplicas", {"max_replicas": 2}, {"highest": 4}, 2),
        ("what is needed at home is not known", {}, {"needed": None}, 3),
        ("each is half of its own", {"share": 0.5, "needed": 2}, {"highest": 2}, 2),
    ],
)  # fmt: skip
def test_a_loan_that_its_home_may_need_again_only_bridges_a_start(what, chat, batch, desired):
    lent = [engine(u, "batch", "chat", held=20) for u in "12"]
    engines = [engine("c", "chat"), *lent, *(engine(u, "batch") for u in "34")]
    found = run([replace(LEANS, **chat), replace(BATCH_TIER, **{"needed": 2, "expected": 2} | batch)], engines)  # fmt: skip
    assert replicas(found)[0] == desired, what
    started = found.tiers[0].memory["pool"].last_scale_up
    assert started == (to_time(NOW) if desired > 1 else None)


def test_what_was_started_for_a_loan_is_not_started_twice():
    lent = [engine(u, "batch", "chat", held=20) for u in "12"]
    coming = [engine(u, "chat", ready=False) for u in "de"]
    engines = [engine("c", "chat"), *coming, *lent, *(engine(u, "batch") for u in "34")]
    found = run([replace(LEANS, desired=3), replace(BATCH_TIER, needed=2, highest=4)], engines)
    assert replicas(found)[0] == 3


def test_the_minimum_is_started_whatever_is_lent():
    engines = [engine("1", "batch"), engine("2", "batch")]
    found = run([replace(CHAT, needed=1, desired=2, min_replicas=2), BATCH_TIER], engines)
    assert replicas(found)[0] == 2


def test_the_pools_accelerators_go_to_the_most_important_tier():
    docs = Tier("docs", tier="Balanced", priority=50, needed=3, tensor_parallel=2)
    engines = [engine("c", "chat"), engine("1", "docs")]
    found = run([docs, replace(CHAT, needed=3, tensor_parallel=2)], [*engines], limit=9)
    assert replicas(found) == [1, 3]
    held_back = found.tiers[0].decisions[0]
    assert held_back.binding is Binding.MAX_ACCELERATORS
    assert "maxAccelerators 9" in held_back.limited
    assert found.tiers[0].memory["pool"].last_scale_up is None


def test_a_tier_alone_is_left_as_scaling_decided():
    observed, decided = group([Tier("chat", shares=False, needed=3)], [])
    assert decide(observed, decided, NOW) == GroupDecision(decided)


def test_an_engine_whose_pool_was_left_goes_home():
    engines = [engine("1", "batch"), engine("2", "batch", "chat", held=5)]
    assert moves(run([replace(BATCH_TIER, shares=False)], engines)) == [("2", None, "batch")]


def test_a_member_whose_spec_is_refused_keeps_what_it_holds():
    """Nothing is taken from it for a mistake, but a home that has left the pool calls its engines back."""
    engines = [engine("1", "batch"), engine("2", "batch", "chat", held=900)]
    for home, found in ((BATCH_TIER, []), (replace(BATCH_TIER, shares=False), [("2", None, "batch")])):
        observed, decided = group([home], engines)
        observed = replace(observed, refused=frozenset({"llm/chat"}))
        assert moves(decide(observed, decided, NOW)) == found


@pytest.mark.parametrize(
    ("bound_for", "flight", "held", "moved"),
    [
        ("chat", 0, 9.0, [("2", None, "batch")]),
        ("batch", 0, 9.0, [("2", "batch", None)]),
        ("batch", 5, 9.0, []),
        ("batch", 5, 61.0, [("2", "batch", None)]),
    ],
)
def test_an_engine_without_a_holder_goes_home_also_when_that_is_refused(bound_for, flight, held, moved):
    engines = [engine("c", "chat"), engine("2", "batch", None, bound_for=bound_for, flight=flight, held=held)]
    observed, decided = group([CHAT], engines)
    observed = replace(observed, refused=frozenset({"llm/batch"}))
    assert moves(decide(observed, decided, NOW)) == moved


# --- always -----------------------------------------------------------------------------------------------------

_SIGNALS = st.one_of(
    st.just(Unknown("no answer")),
    st.builds(Zero, age=st.floats(0, 20)),
    st.builds(Value, value=st.integers(1, 90).map(float), age=st.floats(0, 20), partial=st.booleans()),
)


@st.composite
def groups(draw: st.DrawFn) -> tuple[Group, tuple[TierDecision, ...]]:
    names = ["a", "b", "c", "d"][: draw(st.integers(1, 4))]
    counts = {name: draw(st.integers(0, 4)) for name in names}
    tiers = [
        Tier(
            name,
            tier=draw(st.sampled_from(["Latency", "Balanced", "Throughput"])),
            priority=draw(st.integers(0, 3)),
            needed=draw(st.one_of(st.none(), st.integers(0, 8))),
            desired=draw(st.one_of(st.none(), st.integers(0, 8))),
            min_keep=draw(st.integers(0, 3)),
            max_borrowed=draw(st.integers(0, 4)),
            mode=draw(st.sampled_from(["Auto", "Auto", "Auto", "Recommend", "External"])),
            suspend=draw(st.integers(0, 7)) == 0,
            shares=draw(st.integers(0, 7)) > 0,
            complete=draw(st.integers(0, 4)) > 0,
            share=draw(st.sampled_from([0.0, 0.5, 1.0])),
            min_replicas=0,
            expected=draw(st.one_of(st.none(), st.integers(0, 8))),
            highest=draw(st.one_of(st.none(), st.integers(0, 8))),
            standby=draw(st.one_of(st.none(), st.integers(0, 8))),
            arrivals=draw(st.sampled_from([Zero(), Value(1.0), Value(20.0), Unknown("no answer")])),
            curve=draw(st.sampled_from([None, CURVE])),
            memory=draw(
                st.one_of(st.just(PoolMemory()), st.builds(spared, st.floats(0, 200), st.integers(0, 6)))
            ),
        )
        for name in names
    ]
    engines = []
    for name in names:
        for index in range(counts[name]):
            where = draw(st.sampled_from(["home", "home", "home", None, *names, "gone"]))
            engines.append(
                engine(
                    f"{name}{index}",
                    name,
                    where,
                    bound_for=draw(st.sampled_from([None, *names, "gone"])) if where is None else None,
                    flight=draw(_SIGNALS),
                    held=draw(st.one_of(st.none(), st.floats(0, 400))),
                    ready=draw(st.integers(0, 4)) > 0,
                    leaving=draw(st.integers(0, 6)) == 0,
                )
            )
    return group(tiers, engines, limit=draw(st.one_of(st.none(), st.integers(1, 12))))


@settings(deadline=None)
@given(groups())
def test_promises_hold_in_every_group(case):
    observed, decided = case
    found = decide(observed, decided, NOW)
    assert decide(observed, decided, NOW) == found
    backwards = replace(observed, engines=observed.engines[::-1])
    assert decide(backwards, decided, NOW) == found, "the order in which pods are listed does not decide"

    engines = {each.uid: each for each in observed.engines}
    tiers = {each.key: each for each in observed.tiers}
    active = {
        key
        for key, each in tiers.items()
        if each.spec.shared_pool and each.spec.scaling.mode.value == "Auto" and not each.spec.suspend
    }
    assert len({relabel.uid for relabel in found.relabels}) == len(found.relabels), (
        "one move at most for each"
    )
    after = {uid: (each.holder, each.bound_for) for uid, each in engines.items()}
    for relabel in found.relabels:
        one = engines[relabel.uid]
        assert one.ready, "what does not serve is not moved"
        assert not one.leaving
        assert (relabel.holder is None) != (relabel.bound_for is None), "it has one holder, or one goal"
        goal = relabel.holder or relabel.bound_for
        after[relabel.uid] = (relabel.holder, relabel.bound_for)
        if goal == one.home:
            continue
        assert goal in active
        assert one.home in active
        terms = {key: tiers[key].spec.shared_pool for key in (goal, one.home)}
        if one.holder is not None:
            assert terms[goal].priority > terms[one.home].priority, "an equal or higher one is never drained"
            assert not isinstance(one.in_flight, Unknown), "no move begins blindly"
            assert one.held_seconds is None or one.held_seconds >= STAY_SECONDS
        if relabel.holder is not None:
            known = one.in_flight
            assert isinstance(known, Zero) or (
                isinstance(known, Value) and not known.partial and known.value <= OVERLAP_SHARE * BATCH
            )

    usable = [each for each in engines.values() if each.ready and not each.leaving]
    for key in active:
        terms = tiers[key].spec.shared_pool

        def kept(state: dict[str, tuple[str | None, str | None]], key: str = key) -> int:
            return sum(state[each.uid][0] == key for each in usable if each.home == key)

        def borrowed(state: dict[str, tuple[str | None, str | None]], key: str = key) -> int:
            return sum(
                (state[each.uid][0] or state[each.uid][1]) == key for each in usable if each.home != key
            )

        before = {uid: (each.holder, each.bound_for) for uid, each in engines.items()}
        assert kept(after) >= min(terms.min_keep, kept(before)), "minKeep holds"
        assert borrowed(after) <= max(terms.max_borrowed, borrowed(before)), "maxBorrowed holds"

    total = sum(decision.current for tier in decided for decision in tier.decisions)
    planned = sum(decision.desired for tier in found.tiers for decision in tier.decisions)
    for observation, old, new in zip(observed.tiers, decided, found.tiers, strict=True):
        (was,), (now) = old.decisions, new.decisions[0]
        assert now.reason
        low, high = sorted((was.current, was.desired))
        if any(e.home != observation.key and after[e.uid][0] == observation.key for e in usable):
            high = max(high, min(was.expected or 0, 16))
        assert low <= now.desired <= high, (
            "lending tempers what scaling decided, or starts what is expected and only borrowed"
        )
        if observation.key not in active:
            assert now == was
        lent = sum(e.home == observation.key and after[e.uid][0] != observation.key for e in usable)
        assert now.desired >= min(was.current, lent) or observation.key not in active, (
            "nothing lent is stopped"
        )
    if observed.max_accelerators is not None and len(active) == len(tiers) and planned > total:
        assert planned <= max(observed.max_accelerators, total)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=10, max_size=60), st.integers(0, 2))
def test_over_time_engines_move_for_bursts_and_come_home_without_thrash(course, keep):
    """Fifteen seconds a step; ``course`` is what the latency tier needs, and whether everything is seen."""
    engines = {
        each.uid: each
        for each in (engine("c", "chat"), *(engine(str(i), "batch", flight=40) for i in range(4)))
    }
    memory = PoolMemory()
    went: dict[str, list[tuple[float, str]]] = {uid: [] for uid in engines}
    now = NOW
    calm = [(1, True)] * 20
    for needed, complete in [*course, *calm]:
        chat = replace(CHAT, needed=needed, complete=complete, memory=memory, max_borrowed=3)
        observed, decided = group(
            [chat, replace(BATCH_TIER, needed=4, min_keep=keep)], list(engines.values())
        )
        found = decide(observed, decided, now)
        memory = found.tiers[0].memory["pool"]
        for uid, each in engines.items():
            held = None if each.held_seconds is None else each.held_seconds + 15.0
            flight: Signal = Zero() if each.holder is None else Value(40.0)
            engines[uid] = replace(each, held_seconds=held, in_flight=flight)
        for relabel in found.relabels:
            engines[relabel.uid] = replace(
                engines[relabel.uid], holder=relabel.holder, bound_for=relabel.bound_for, held_seconds=0.0
            )
            if relabel.holder is not None:
                went[relabel.uid].append((now, relabel.holder))
        now += 15.0
    assert all(each.holder == each.home for each in engines.values()), "after the burst everything is home"
    for history in went.values():
        for (one, where), (other, there) in pairwise(history):
            assert where != there
            assert other - one >= STAY_SECONDS, "no thrash"
