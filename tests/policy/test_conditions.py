"""Every condition, every pass, kind to kstatus and to people."""

# the names of the tests are the sentences

from dataclasses import replace
from typing import get_args

import pytest

from servingtiers.api.spec import ScalingMode
from servingtiers.api.status import ConditionType
from servingtiers.core.decisions import Binding, Decision
from servingtiers.core.findings import Feasibility, Problem, SloVerdict
from servingtiers.core.times import to_time
from servingtiers.policy.conditions import ConditionInput, PoolProgress, compute

NOW = 1_800_000_000.0
POOL = PoolProgress("pool", desired=2, ready=2, updated=2)
MET = SloVerdict("ttft.p99", 0.5, met=True, message="ttft.p99 500ms: 99.9 %", requests=1000)
WELL = ConditionInput(
    generation=3,
    now=NOW,
    pools=(POOL,),
    routers_ready=2,
    routers_desired=2,
    slo=(MET,),
    feasibility=Feasibility(feasible=True, reason="Predicted", message="fits"),
)
DECISION = Decision("pool", 2, 2, "why", Binding.STEADY, "what else")
PROBLEM = Problem(
    "spec.pool.hardware.accelerators", "unknown accelerator 'h1000'", reason="AcceleratorUnknown"
)


def conditions(seen: ConditionInput) -> dict[str, tuple[str, str]]:
    return {each.type: (each.status, each.reason) for each in compute(seen)}


def message(seen: ConditionInput, kind: str) -> str:
    return next(each.message for each in compute(seen) if each.type == kind)


def test_a_tier_that_is_well_has_all_conditions_and_nothing_abnormal():
    assert conditions(WELL) == {
        "Accepted": ("True", "Accepted"),
        "Feasible": ("True", "Predicted"),
        "Ready": ("True", "Serving"),
        "SLOMet": ("True", "ObjectivesMet"),
        "ScalingActive": ("True", "Scaling"),
        "Reconciling": ("False", "Settled"),
        "Stalled": ("False", "Progressing"),
        "ScalingLimited": ("False", "NotLimited"),
        "Conflict": ("False", "NoConflict"),
        "PlanOutdated": ("False", "UpToDate"),
    }


ROLLING = replace(POOL, updated=1, ready=1)
LATE = replace(ROLLING, progress_deadline_exceeded="ReplicaSet has timed out progressing")
STUCK = replace(POOL, ready=0, unschedulable=2, scheduling_message="0/3 nodes: Insufficient nvidia.com/gpu")
CASES = [
    ("a bad spec", {"problems": (PROBLEM,)}, "Accepted", "False", "AcceleratorUnknown"),
    ("a bad spec stalls", {"problems": (PROBLEM,)}, "Stalled", "True", "NotAccepted"),
    ("a bad spec leaves what serves", {"problems": (PROBLEM,)}, "Ready", "True", "Serving"),
    ("an unknown model is accepted", {"problems": (replace(PROBLEM, blocking=False),)}, "Accepted", "True", "Accepted"),
    (
        "an unknown model may be feasible",
        {"problems": (replace(PROBLEM, blocking=False, reason="ModelUnknown"),), "feasibility": None},
        "Feasible", "Unknown", "ModelUnknown",
    ),
    ("nobody judged", {"feasibility": None}, "Feasible", "Unknown", "NotModelled"),
    (
        "the model says no",
        {"feasibility": Feasibility(feasible=False, reason="TooSlow", message="no")},
        "Feasible", "False", "TooSlow",
    ),
    (
        "traffic says no",
        {"decisions": (replace(DECISION, binding=Binding.INFEASIBLE),)},
        "Feasible", "False", "OneRequestMisses",
    ),
    ("a miss is no failed release", {"slo": (replace(MET, met=False),)}, "Ready", "True", "Serving"),
    ("a miss", {"slo": (replace(MET, met=False), MET)}, "SLOMet", "False", "ObjectiveMissed"),
    ("no traffic", {"slo": (replace(MET, met=None, requests=0.0),)}, "SLOMet", "Unknown", "NoTraffic"),
    ("too little to tell", {"slo": (replace(MET, met=None), MET)}, "SLOMet", "Unknown", "TooCoarseOrTooFew"),
    ("no objective", {"slo": ()}, "SLOMet", "Unknown", "NoObjective"),
    ("nothing applied", {"pools": ()}, "Ready", "False", "NotApplied"),
    ("nothing applied yet", {"pools": ()}, "Reconciling", "True", "Applying"),
    ("one pool without a replica", {"pools": (POOL, replace(POOL, name="decode", ready=0))}, "Ready", "False", "NoReplicaReady"),
    ("no router", {"routers_ready": 0}, "Ready", "False", "NoRouterReady"),
    ("asleep", {"pools": (replace(POOL, desired=0, ready=0, updated=0),)}, "Ready", "True", "ScaledToZero"),
    ("deleted", {"deleting": True}, "Ready", "False", "Deleting"),
    ("a rollout", {"pools": (ROLLING,)}, "Reconciling", "True", "Progressing"),
    ("a refused write", {"write_errors": ("quota exceeded",)}, "Reconciling", "True", "Retrying"),
    ("past its deadline", {"pools": (LATE,)}, "Stalled", "True", "ProgressDeadlineExceeded"),
    ("never both", {"pools": (LATE,)}, "Reconciling", "False", "Stalled"),
    ("an old deadline of a pool that is well", {"pools": (replace(LATE, ready=2, updated=2),)}, "Stalled", "False", "Progressing"),
    ("no node", {"pools": (STUCK,)}, "ScalingLimited", "True", "Unschedulable"),
    ("a bound", {"decisions": (replace(DECISION, limited="maxReplicas is 2"),)}, "ScalingLimited", "True", "Bounded"),
    ("a foreign object", {"conflicts": ("Service chat is not ours",)}, "Conflict", "True", "ForeignObject"),
    ("a foreign object stalls", {"conflicts": ("Service chat is not ours",)}, "Stalled", "True", "Conflict"),
    ("S1, S2: another scaler", {"replicas_owner": "HorizontalPodAutoscaler chat"}, "Conflict", "True", "ReplicasOwnedElsewhere"),
    ("another scaler stops ours", {"replicas_owner": "HorizontalPodAutoscaler chat"}, "ScalingActive", "False", "ReplicasOwnedElsewhere"),
    (
        "another scaler as agreed",
        {"replicas_owner": "HorizontalPodAutoscaler chat", "mode": ScalingMode.EXTERNAL},
        "Conflict", "False", "NoConflict",
    ),
    ("external", {"mode": ScalingMode.EXTERNAL}, "ScalingActive", "False", "External"),
    ("recommend", {"mode": ScalingMode.RECOMMEND}, "ScalingActive", "False", "Recommend"),
    ("suspended", {"suspended": True, "pools": (ROLLING,)}, "ScalingActive", "False", "Suspended"),
    ("suspended is settled", {"suspended": True, "pools": (ROLLING,)}, "Reconciling", "False", "Suspended"),
    ("one late scrape", {"telemetry_unknown_seconds": 30.0}, "ScalingActive", "True", "Scaling"),
    ("R-S4: no metrics", {"telemetry_unknown_seconds": 90.0}, "ScalingActive", "False", "TelemetryMissing"),
    ("a better plan", {"plan_outdated": "saves 1.20 an hour"}, "PlanOutdated", "True", "BetterPlanKnown"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("why", "changes", "kind", "status", "reason"), CASES, ids=[case[0] for case in CASES]
)
def test_a_condition_says_what_is(why, changes, kind, status, reason):
    assert conditions(replace(WELL, **changes))[kind] == (status, reason), why


@pytest.mark.parametrize(
    ("why", "changes", "kind", "status", "reason"), CASES, ids=[case[0] for case in CASES]
)
def test_whatever_happens_all_conditions_are_there_once(why, changes, kind, status, reason):
    found = compute(replace(WELL, **changes))
    assert [each.type for each in found] == list(get_args(ConditionType))
    assert all(each.observed_generation == 3 and each.message for each in found)
    both = {each.type: each.status for each in found}
    assert (both["Reconciling"], both["Stalled"]) != ("True", "True")


def test_messages_carry_field_mend_and_the_schedulers_words():
    assert message(replace(WELL, problems=(PROBLEM,)), "Accepted").startswith(
        "spec.pool.hardware.accelerators: unknown"
    )
    assert "left as it is" in message(replace(WELL, problems=(PROBLEM,)), "Accepted")
    assert "Insufficient nvidia.com/gpu" in message(replace(WELL, pools=(STUCK,)), "Ready")
    assert "remove that scaler, or set spec.scaling.mode to External" in message(
        replace(WELL, replicas_owner="HorizontalPodAutoscaler chat"), "Conflict"
    )


def test_the_time_of_a_condition_is_that_of_its_last_change():
    first = compute(WELL)
    later = replace(WELL, now=NOW + 60, previous=first, generation=4)
    assert {each.last_transition_time for each in compute(later)} == {to_time(NOW)}
    assert {each.observed_generation for each in compute(later)} == {4}
    missed = compute(replace(later, slo=(replace(MET, met=False),)))
    assert {each.type for each in missed if each.last_transition_time == to_time(NOW + 60)} == {"SLOMet"}


def test_a_message_fits_the_api():
    long = tuple(replace(PROBLEM, message="x" * 400) for _ in range(5))
    assert max(len(each.message) for each in compute(replace(WELL, problems=long))) == 1024
