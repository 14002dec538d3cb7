"""What is planned: an observation in, writes and a status out, without an API server."""

# the names of the tests are the sentences

import copy
import json
from decimal import Decimal
from itertools import pairwise

import pytest
from pydantic import ValidationError

from servingtiers import reconcile
from servingtiers.core import pin
from servingtiers.core.config import AcceleratorBinding, Images, OperatorConfig
from servingtiers.core.state import Member, Observed, Ref, Verb
from servingtiers.core.times import to_time
from servingtiers.policy import problems

L4, A100, H100 = "l4-24gb", "a100-sxm-80gb", "h100-sxm-80gb"
PRICES = {H100: "2.80", A100: "1.80", L4: "0.70"}
CONFIG = OperatorConfig(
    accelerators={key: AcceleratorBinding(price_per_hour=Decimal(price)) for key, price in PRICES.items()}
)
MINUTE, HOUR = 60.0, 3600.0
BEGAN = 1_790_000_000.0
LABEL = "llm-d.ai/accelerator-variant"


class Stage:
    """One tier in a cluster that does what it is told: writes are carried out, and pods are as the test says."""

    def __init__(self, config=CONFIG, tier="Balanced", model="meta-llama/Llama-3.1-8B-Instruct", **spec):
        self.config = config
        self.now = BEGAN
        self.objects = {}
        self.pods = []
        self.events = []
        self.remembered = None
        self.raw = {
            "apiVersion": "servingtiers.io/v1alpha1",
            "kind": "ServingTier",
            "metadata": {"name": "chat", "namespace": "llm", "uid": "tier-1", "generation": 1},
            "spec": {"tier": tier, "model": {"name": model}} | spec,
        }

    def look(self):
        """Plan, carry it out, and return the plan."""
        members = (
            Member(self.raw, tuple(self.objects.values()), tuple(self.pods), remembered=self.remembered),
        )
        plan = reconcile.plan(Observed(self.now, self.config, members))
        for write in plan.writes:
            body = copy.deepcopy(write.body)
            match write.verb:
                case Verb.STATUS:
                    self.raw["status"] = body["status"]
                case Verb.CREATE | Verb.APPLY:
                    live = self.objects.get(
                        Ref.of(body), {"metadata": {"uid": f"u-{len(self.objects)}", "generation": 0}}
                    )
                    body["metadata"] |= {
                        "uid": live["metadata"]["uid"],
                        "generation": live["metadata"]["generation"] + 1,
                    }
                    self.objects[Ref.of(body)] = body
                case Verb.DELETE:
                    del self.objects[Ref.of(body)]
        (self.remembered,) = plan.remember
        self.events += plan.events
        return plan

    def after(self, seconds):
        """Let time pass and look again."""
        self.now += seconds
        return self.look()

    def deployment(self, pool="pool"):
        return self.objects[Ref("apps/v1", "Deployment", "llm", f"chat-{pool}")]

    def on(self, pool="pool"):
        """Return the accelerator that a pool's Deployment asks for."""
        return self.deployment(pool)["spec"]["template"]["metadata"]["labels"][LABEL]

    def has(self, *, ready=0, starting=0, waiting=0, pool="pool", since=None, gated=False):
        """Replace the pods of a pool by new ones of its present template."""
        template = self.deployment(pool)["spec"]["template"]
        mine = template["metadata"]["labels"]
        selector = self.deployment(pool)["spec"]["selector"]["matchLabels"]
        self.pods = [p for p in self.pods if not selector.items() <= p["metadata"]["labels"].items()]
        at = to_time(self.now if since is None else since)
        for index in range(ready + starting + waiting):
            placed = index < ready + starting
            scheduled = {
                "type": "PodScheduled",
                "status": "True" if placed else "False",
                "lastTransitionTime": at,
            }
            if not placed:
                scheduled |= {
                    "reason": "SchedulingGated" if gated else "Unschedulable",
                    "message": "no nodes available",
                }
            up = {"type": "Ready", "status": "True" if index < ready else "False", "lastTransitionTime": at}
            meta = {
                "name": f"{pool}-{len(self.pods)}-{at}",
                "namespace": "llm",
                "uid": f"{pool}-{len(self.pods)}-{at}",
                "resourceVersion": "1",
                "creationTimestamp": at,
                "labels": dict(mine),
            }
            self.pods.append(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": meta,
                    "status": {"conditions": [scheduled, up]},
                }
            )

    def condition(self, kind):
        return next(c for c in self.raw["status"]["conditions"] if c["type"] == kind)

    def edit(self, **spec):
        self.raw["spec"] |= spec
        self.raw["metadata"]["generation"] += 1

    def told(self, reason):
        return [event.message for event in self.events if event.reason == reason]


def short(mode="NextCheapest", accelerators=(L4, A100), replicas=1, **spec):
    """Return a tier whose cheapest accelerator is the first, with as many replicas, none of which finds a node."""
    pool = {
        "hardware": {"accelerators": list(accelerators), "onShortage": mode},
        "scaling": {"minReplicas": replicas, "maxReplicas": replicas},
    }
    stage = Stage(pool=pool, **spec)
    stage.look()
    assert stage.on() == accelerators[0]
    stage.has(waiting=replicas)
    return stage


def templates(plan):
    """Return the writes of engines' Deployments."""
    return [
        w
        for w in plan.writes
        if w.body["kind"] == "Deployment" and "router" not in w.body["metadata"]["name"]
    ]


# -- an accelerator that is short ------------------------------------------------------------------------------


def test_the_next_cheapest_is_taken_when_no_engine_found_a_node_for_ten_minutes():
    stage = short()
    assert templates(stage.after(9 * MINUTE)) == []
    assert stage.condition("PlanOutdated")["status"] == "False", "it is not given up yet"
    assert stage.condition("ScalingLimited")["reason"] == "Unschedulable"

    moved = stage.after(MINUTE)

    assert [write.verb for write in templates(moved)] == [Verb.APPLY]
    assert stage.on() == A100
    (told,) = stage.told("AcceleratorShort")
    assert f"no engine found a node with {L4} for 10 min: {A100} instead" in told
    (effective,) = stage.raw["status"]["effective"]["pools"]
    assert effective["accelerator"] == A100
    assert effective["reasons"]["accelerator"].endswith(f"; {L4} could not be scheduled")
    assert stage.condition("PlanOutdated")["status"] == "False"

    stage.has(starting=1)
    stage.after(15)
    stage.has(ready=1)
    assert templates(stage.after(3 * MINUTE)) == []
    assert stage.told("AcceleratorShort") == [told]


def test_engines_that_serve_are_not_moved_back_and_the_better_plan_is_said():
    stage = short()
    stage.after(10 * MINUTE)
    stage.has(ready=1)
    stage.after(MINUTE)
    assert templates(stage.after(5 * HOUR)) == []
    assert stage.on() == A100
    assert f"accelerator {A100} → {L4}" in stage.condition("PlanOutdated")["message"]


def test_all_replicas_go_over_at_once_where_none_serves_and_one_by_one_afterwards():
    """With one at a time, replicas that wait for the one accelerator hold up those that could start on the other."""
    stage = short(replicas=3)
    assert stage.deployment()["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 1
    stage.after(10 * MINUTE)
    assert stage.deployment()["spec"]["strategy"]["rollingUpdate"] == {
        "maxSurge": 0,
        "maxUnavailable": "100%",
    }
    stage.has(waiting=3)
    assert templates(stage.after(5)) == []
    stage.has(starting=1, waiting=2)
    stage.after(5)
    assert stage.deployment()["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 1


@pytest.mark.parametrize("there", [{"ready": 2, "waiting": 1}, {"starting": 1, "waiting": 2}])
def test_a_pool_of_which_one_engine_serves_or_starts_stays(there):
    """Its engines are all alike: those that serve would have to go for the sake of the one that waits."""
    stage = short(replicas=3)
    stage.has(**there)
    assert templates(stage.after(2 * HOUR)) == []
    assert stage.on() == L4
    assert stage.condition("ScalingLimited")["status"] == "True"


def test_who_waits_by_his_own_will_waits():
    stage = short("Wait")
    assert templates(stage.after(5 * HOUR)) == []
    assert stage.condition("PlanOutdated")["status"] == "False"


def test_pods_that_a_gate_holds_back_say_nothing_of_the_accelerator():
    stage = short()
    stage.has(waiting=1, gated=True)
    assert templates(stage.after(5 * HOUR)) == []


def test_what_only_recommends_says_the_other_accelerator_and_a_suspended_tier_is_left_alone():
    stage = short(scaling={"mode": "Recommend"})
    assert templates(stage.after(HOUR)) == []
    assert f"accelerator {L4} → {A100}" in stage.condition("PlanOutdated")["message"]
    assert stage.told("AcceleratorShort") == []
    stage.edit(suspend=True, scaling={"mode": "Auto"})
    assert templates(stage.after(HOUR)) == []
    assert stage.told("AcceleratorShort") == []


def test_replicas_of_somebody_else_stay_his_on_another_accelerator():
    stage = short(replicas=2, scaling={"mode": "External"})
    stage.after(10 * MINUTE)
    assert stage.on() == A100
    assert stage.deployment()["spec"]["replicas"] == 2


def test_where_all_are_short_each_is_waited_for_an_hour_and_nothing_is_thrown_to_and_fro():
    stage = short()
    seen = []
    for minute in range(6 * 60):
        plan = stage.after(MINUTE)
        if any(w.verb is Verb.APPLY for w in templates(plan)) and (not seen or stage.on() != seen[-1][1]):
            seen.append((minute, stage.on()))
            stage.has(waiting=1)
    assert [name for _, name in seen[:3]] == [A100, L4, A100]
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(seen)]
    assert min(gaps) >= 60
    assert len(seen) <= 7


def test_the_accelerator_that_was_given_up_is_not_put_to_the_test_by_every_edit():
    """A rollout to it would take an engine that serves, for one that waits."""
    stage = short()
    stage.after(10 * MINUTE)
    stage.has(ready=1)
    stage.after(MINUTE)
    stage.edit(drainTimeout="90s")
    stage.after(MINUTE)
    assert stage.on() == A100
    stage.edit(drainTimeout="95s")
    stage.after(2 * HOUR)
    assert stage.on() == L4, "an hour later the spec decides again"


def test_a_rollout_to_an_accelerator_that_is_short_turns_back_to_what_serves():
    stage = short(accelerators=(L4, A100))
    stage.after(10 * MINUTE)
    stage.has(ready=1)
    (serving,) = stage.pods
    stage.edit(drainTimeout="90s")
    stage.after(2 * HOUR)
    assert stage.on() == L4
    stage.has(waiting=1)
    stage.pods.append(serving)
    assert templates(stage.after(9 * MINUTE)) == []
    stage.after(MINUTE)
    assert stage.on() == A100
    assert stage.deployment()["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 1, "one serves"


def test_where_nothing_else_fits_the_tier_waits_and_says_so():
    """70B on four: an L4 does not hold it."""
    pool = {
        "hardware": {"accelerators": [H100, L4], "tensorParallel": 4, "onShortage": "NextCheapest"},
        "scaling": {"minReplicas": 1, "maxReplicas": 1},
    }
    stage = Stage(model="meta-llama/Llama-3.1-70B-Instruct", pool=pool)
    stage.look()
    stage.has(waiting=1)
    assert templates(stage.after(HOUR)) == []
    assert stage.condition("Accepted")["status"] == "True"
    assert stage.condition("ScalingLimited")["status"] == "True"
    assert stage.condition("PlanOutdated")["status"] == "False"


def test_a_prefill_pool_never_goes_where_it_would_need_more_shards_than_decode_has():
    """Qwen2.5-14B takes two L4, and decode runs on one H100 each."""

    def hardware(*accelerators, mode="NextCheapest"):
        return {
            "hardware": {"accelerators": list(accelerators), "onShortage": mode},
            "scaling": {"maxReplicas": 1},
        }

    def waits(decode):
        # Prices at which the H100 is the first choice.
        dear = {
            L4: AcceleratorBinding(price_per_hour=Decimal(9)),
            H100: AcceleratorBinding(price_per_hour=Decimal(1)),
        }
        stage = Stage(
            OperatorConfig(accelerators=dear),
            model="Qwen/Qwen2.5-14B-Instruct",
            disaggregation={"prefill": hardware(H100, L4), "decode": decode},
        )
        stage.look()
        assert stage.on("prefill") == H100
        stage.has(waiting=1, pool="prefill")
        stage.has(ready=1, pool="decode")
        stage.after(HOUR)
        return stage

    assert waits(hardware(H100)).on("prefill") == H100
    two = hardware(H100)
    two["hardware"]["tensorParallel"] = 2
    moved = waits(two)
    assert (moved.on("prefill"), moved.on("decode")) == (L4, H100)


def test_a_plan_without_shortage_is_recorded_as_ever_and_one_with_it_comes_back():
    """An operator that knows of shortages writes no annotation anew."""
    stage = short()
    recorded = json.loads(stage.deployment()["metadata"]["annotations"][pin.PLAN_ANNOTATION])
    assert set(recorded) == {"specHash", "operator", "template", "settings"}
    stage.after(10 * MINUTE)
    record = pin.read(stage.deployment())
    assert record is not None
    assert dict(record.short) == {L4: stage.now}
    assert pin.read({"metadata": {"annotations": {pin.PLAN_ANNOTATION: pin.annotation(record)}}}) == record


def test_what_cannot_be_chosen_is_a_condition_and_not_an_exception(monkeypatch):
    monkeypatch.setattr(problems, "find", lambda tier, config: ())
    stage = Stage(OperatorConfig())
    stage.look()
    accepted = stage.condition("Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "NoChoice")
    assert accepted["message"].startswith("spec.pool.hardware: no allowed accelerator")


# -- routers ---------------------------------------------------------------------------------------------------


def test_routers_that_would_be_written_otherwise_today_are_said_and_taken_up_by_a_new_plan():
    stage = Stage()
    stage.look()
    before = copy.deepcopy(stage.deployment("router"))
    stage.config = CONFIG.model_copy(update={"images": Images(router="vllm/vllm-router:v9")})
    assert [w for w in stage.after(MINUTE).writes if w.verb is not Verb.STATUS] == []
    assert stage.deployment("router") == before
    outdated = stage.condition("PlanOutdated")
    assert outdated["status"] == "True"
    assert "router: image vllm/vllm-router:v0.1.17 → vllm/vllm-router:v9" in outdated["message"]

    stage.raw["metadata"]["annotations"] = {pin.REPLAN_ANNOTATION: "1"}
    stage.after(MINUTE)
    stage.after(MINUTE)
    (container,) = stage.deployment("router")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "vllm/vllm-router:v9"
    assert stage.condition("PlanOutdated")["status"] == "False"


# -- prices ----------------------------------------------------------------------------------------------------


def test_a_currency_that_no_status_can_carry_is_refused_with_the_configuration():
    """It would fail in every pass of every tier."""
    stage = Stage(CONFIG.model_copy(update={"currency": "USDCOINS"}))
    stage.look()
    assert stage.raw["status"]["cost"]["currency"] == "USDCOINS"
    with pytest.raises(ValidationError, match="currency"):
        OperatorConfig(currency="US-Dollars")


# -- replicas --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rival", [False, True])
def test_replicas_that_somebody_else_has_set_are_not_sent_back_to_him(rival):
    """What was seen a moment ago, applied with force, would undo what he has set since."""
    stage = Stage(scaling={"mode": "Auto" if rival else "Recommend"})
    stage.look()
    live = stage.deployment()
    live["spec"]["replicas"] = 3
    live["metadata"]["managedFields"] = [
        {"manager": "kubectl", "operation": "Update", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    ]
    scaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "hpa", "namespace": "llm"},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "chat-pool"}},
    }
    member = Member(
        stage.raw,
        tuple(stage.objects.values()),
        (),
        autoscalers=(scaler,) if rival else (),
        remembered=stage.remembered,
    )
    plan = reconcile.plan(Observed(stage.now + MINUTE, CONFIG, (member,)))
    assert all("replicas" not in write.body["spec"] for write in templates(plan))
