"""The operator against a real API server: what a user sees of a tier's life."""

import asyncio
import time
from collections import Counter
from unittest.mock import patch

import pytest

from ring.harness import (
    CHILDREN,
    CONFIG,
    Namespace,
    controller,
    eventually,
    grant,
    install_crd,
    operator,
    settle,
    shape,
    tier,
    writes,
)
from servingtiers.adapters.leadership import LeaseTimes
from servingtiers.core.pin import PLAN_ANNOTATION
from servingtiers.lab.controlplane import ApiError, ControlPlane
from servingtiers.render.names import ACCELERATOR_LABEL

pytestmark = [pytest.mark.ring]

AGGREGATED = {
    "Deployment/chat-pool",
    "Deployment/chat-router",
    "NetworkPolicy/chat-engines",
    "NetworkPolicy/chat-router",
    "PodDisruptionBudget/chat-pool",
    "PodDisruptionBudget/chat-router",
    "Role/chat-router",
    "RoleBinding/chat-router",
    "Service/chat",
    "ServiceAccount/chat-router",
}


@pytest.fixture
def space(control_plane: ControlPlane, namespace: str) -> Namespace:
    """A namespace with the CRD installed."""
    install_crd(control_plane)
    return Namespace(control_plane.connection(), namespace)


async def test_a_tier_becomes_its_objects_and_a_second_pass_writes_nothing(control_plane, space):
    """Creation, idempotence, and the status that goes with it."""
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        await _silent(control_plane, made, space)

    assert set(space.children()) == AGGREGATED
    status = space.get()["status"]
    assert status["observedGeneration"] == 1
    assert {c["type"] for c in status["conditions"]} >= {
        "Accepted",
        "Ready",
        "SLOMet",
        "ScalingActive",
        "Stalled",
    }
    assert space.condition("Accepted")["status"] == "True"


async def _silent(control_plane, made, space):
    """Assert that passes write nothing once the scheduler's own verdicts have been reported."""
    for _ in range(20):
        position, before = control_plane.audit_position(), writes(made)
        await made.relist()
        await made.reconcile((space.name, "chat"))
        # The scheduler, which shares the administrator's name, tells of the pods it has no node for.
        seen = {
            record.resource
            for record in control_plane.audit_records(since=position, user="admin")
            if record.namespace == space.name and not record.resource.startswith(("pods", "events.k8s.io"))
        }
        if writes(made) == before:
            assert seen == set()
            return
        assert seen <= {"servingtiers.io/servingtiers/status"}
        await asyncio.sleep(0.5)
    raise AssertionError("never silent")


async def test_a_disaggregated_tier_gets_a_pool_for_each_phase(control_plane, space):
    """Prefill and decode are Deployments of their own."""
    pools = {role: {"hardware": {"accelerators": ["h100-sxm-80gb"]}} for role in ("prefill", "decode")}
    body = tier(tier="Throughput", disaggregation=pools)
    del body["spec"]["pool"]
    space.create(body)
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")

    assert {"Deployment/chat-prefill", "Deployment/chat-decode", "Deployment/chat-router"} <= set(
        space.children()
    )


async def test_edits_and_deletions_of_children_are_repaired(control_plane, space):
    """C1 and C2: every child deleted, and every one that can be edited edited."""
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        reference = shape(space.children())
        for name in AGGREGATED:
            kind, child = name.split("/")
            space.delete(child, CHILDREN[kind])
        await asyncio.sleep(0.5)
        await settle(made, space.name, "chat")

        assert shape(space.children()) == reference

        change = {"spec": {"template": {"spec": {"enableServiceLinks": True}}, "replicas": 3}}
        space.patch(change, "chat-pool", CHILDREN["Deployment"])
        space.patch({"metadata": {"labels": {"llm-d.ai/role": None}}}, "chat-pool", CHILDREN["Deployment"])
        space.patch({"rules": []}, "chat-router", CHILDREN["Role"])
        await settle(made, space.name, "chat")

        repaired = shape(space.children())
        # Replicas raised by hand are a scale-down like any other: not at once, and never on missing data.
        repaired["Deployment/chat-pool"]["spec"]["replicas"] = reference["Deployment/chat-pool"]["spec"][
            "replicas"
        ]
        for name, obj in repaired.items():
            assert _without_marks(obj) == _without_marks(reference[name]), name


def _without_marks(obj):
    annotations = {k: v for k, v in obj["metadata"].get("annotations", {}).items() if "servingtiers" not in k}
    return obj | {"metadata": obj["metadata"] | {"annotations": annotations}}


async def test_a_field_that_is_wanted_no_longer_is_removed(control_plane, space):
    """Fields set at creation can be removed later."""
    space.create(tier(pod={"annotations": {"team": "a"}}))
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        space.patch({"spec": {"pod": None}})
        await settle(made, space.name, "chat")

    template = space.children()["Deployment/chat-pool"]["spec"]["template"]
    assert "team" not in template["metadata"].get("annotations", {})


async def test_somebody_elses_object_is_refused_with_a_condition_and_taken_up_when_it_goes(
    control_plane, space
):
    """C4: never adopted, never overwritten, and no write in vain on every pass."""
    foreign = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "chat"},
        "spec": {"ports": [{"port": 9}], "selector": {"app": "mine"}},
    }
    space.connection.request("POST", CHILDREN["Service"].format(namespace=space.name), foreign)
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        await _silent(control_plane, made, space)

        assert space.condition("Conflict")["status"] == "True"
        assert "Service chat" in space.condition("Conflict")["message"]
        service = space.connection.request("GET", CHILDREN["Service"].format(namespace=space.name) + "/chat")
        assert service["spec"]["selector"] == {"app": "mine"}

        space.delete("chat", CHILDREN["Service"])
        await settle(made, space.name, "chat")

    assert set(space.children()) == AGGREGATED
    assert space.condition("Conflict")["status"] == "False"


async def test_a_foreign_deployment_of_a_pools_name_is_neither_touched_nor_believed(control_plane, space):
    """C4 for the object that matters most: its replicas are not our pool's."""
    container = {"name": "mine", "image": "registry.example/mine:1"}
    foreign = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "chat-pool"},
        "spec": {
            "replicas": 7,
            "selector": {"matchLabels": {"app": "mine"}},
            "template": {"metadata": {"labels": {"app": "mine"}}, "spec": {"containers": [container]}},
        },
    }
    space.connection.request("POST", CHILDREN["Deployment"].format(namespace=space.name), foreign)
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")

    path = CHILDREN["Deployment"].format(namespace=space.name) + "/chat-pool"
    assert space.connection.request("GET", path)["spec"]["replicas"] == 7
    status = space.get()["status"]
    assert status["pools"][0]["desired"] == 1
    assert space.condition("Stalled")["reason"] == "Conflict"


async def test_an_operator_of_another_version_and_catalogue_restarts_no_engine(control_plane, space):
    """Plans are pinned: only PlanOutdated says that today's choice would be another."""
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
    before = space.children()
    newer = CONFIG.model_copy(
        update={"images": CONFIG.images.model_copy(update={"engine": "vllm/vllm-openai:v0.33.0"})}
    )
    with patch("servingtiers.reconcile.__version__", "9.9.9"):
        async with controller(control_plane, space.name, config=newer) as made:
            await settle(made, space.name, "chat")
            after = space.children()
            outdated = space.condition("PlanOutdated")

            for name in ("Deployment/chat-pool", "Deployment/chat-router"):
                assert after[name]["spec"]["template"] == before[name]["spec"]["template"]
                assert after[name]["metadata"]["generation"] == before[name]["metadata"]["generation"]
            assert outdated["status"] == "True"
            assert "v0.33.0" in outdated["message"]

            space.patch({"metadata": {"annotations": {"servingtiers.io/replan": "1"}}})
            await settle(made, space.name, "chat")

    container = space.children()["Deployment/chat-pool"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "vllm/vllm-openai:v0.33.0"
    assert space.condition("PlanOutdated")["status"] == "False"


async def test_replicas_that_wait_for_a_short_accelerator_all_go_over_to_the_next(control_plane, space):
    """The Deployment controller replaces them together: one that waits does not hold up the others."""

    def waiting():
        pods = space.connection.request("GET", f"/api/v1/namespaces/{space.name}/pods")["items"]
        engines = [pod for pod in pods if ACCELERATOR_LABEL in pod["metadata"]["labels"]]
        tried = [
            pod
            for pod in engines
            if any(c["type"] == "PodScheduled" for c in pod.get("status", {}).get("conditions", ()))
        ]
        found = Counter(pod["metadata"]["labels"][ACCELERATOR_LABEL] for pod in tried)
        return dict(found) if len(tried) == len(engines) else None

    pool = {
        "hardware": {"accelerators": ["l4-24gb", "a100-sxm-80gb"], "onShortage": "NextCheapest"},
        "scaling": {"minReplicas": 3, "maxReplicas": 3},
    }
    space.create(tier(tier="Balanced", pool=pool))
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        await eventually(lambda: waiting() == {"l4-24gb": 3}, what="three pods that no node has room for")
        await settle(made, space.name, "chat")
        assert waiting() == {"l4-24gb": 3}

    async with controller(control_plane, space.name, clock=lambda: time.time() + 605) as made:
        await settle(made, space.name, "chat")
        await eventually(lambda: waiting() == {"a100-sxm-80gb": 3}, what="all three ask for the other one")
        await settle(made, space.name, "chat")

    assert waiting() == {"a100-sxm-80gb": 3}
    (effective,) = space.get()["status"]["effective"]["pools"]
    assert "l4-24gb could not be scheduled" in effective["reasons"]["accelerator"]


async def test_in_another_mode_the_routers_get_their_rights_anew(control_plane, space):
    """A RoleBinding's roleRef is immutable: it is made anew, and the Role that is needed no longer goes after it."""
    space.create(tier())
    for mode in (False, True, False):
        config = CONFIG.model_copy(update={"cluster_mode": mode})
        async with controller(control_plane, space.name, config=config) as made:
            await settle(made, space.name, "chat")
            await _silent(control_plane, made, space)
        children = space.children()

        assert children["RoleBinding/chat-router"]["roleRef"]["kind"] == ("ClusterRole" if mode else "Role")
        assert ("Role/chat-router" in children) != mode
        assert "ServiceAccount/chat-router" in children


async def test_no_router_runs_under_somebody_elses_account(control_plane, space):
    """From the first pass on: a pod has the rights of the account that it names, whoever gave them."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "chat-router"}}
    accounts = CHILDREN["ServiceAccount"].format(namespace=space.name)
    space.connection.request("POST", accounts, account)
    space.create(tier(router={"image": "registry.example/curious:1"}))
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")

        assert space.condition("Conflict")["status"] == "True"
        assert set(space.children()) == AGGREGATED - {
            "Deployment/chat-router",
            "RoleBinding/chat-router",
            "ServiceAccount/chat-router",
        }

        space.delete("chat-router", CHILDREN["ServiceAccount"])
        await settle(made, space.name, "chat")

    assert set(space.children()) == AGGREGATED


async def test_scaling_bounds_change_without_touching_the_pods(control_plane, space):
    """Only what engines depend on restarts engines."""
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        before = space.children()["Deployment/chat-pool"]["spec"]["template"]
        space.patch({"spec": {"pool": {"scaling": {"minReplicas": 2, "maxReplicas": 5}}}})
        await settle(made, space.name, "chat")

    deployment = space.children()["Deployment/chat-pool"]
    assert deployment["spec"]["template"] == before
    assert deployment["spec"]["replicas"] == 2  # minReplicas holds at once, also without telemetry


async def test_another_objective_begins_to_learn_anew_and_other_bounds_do_not(control_plane, space):
    def learned_of():
        return space.get()["status"]["pools"][0]["memory"]["learnedOf"]

    space.create(tier(slo={"ttft": {"p99": "500ms"}}))
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        first = learned_of()
        space.patch({"spec": {"pool": {"scaling": {"maxReplicas": 9}}, "drainTimeout": "20m"}})
        await settle(made, space.name, "chat")
        assert learned_of() == first
        space.patch({"spec": {"slo": {"ttft": {"p99": "900ms"}}}})
        await settle(made, space.name, "chat")
        assert learned_of() != first


async def test_suspend_changes_nothing_and_still_reports(control_plane, space):
    """Observe and report."""
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        space.patch({"spec": {"suspend": True, "pool": {"scaling": {"minReplicas": 3}}}})
        await settle(made, space.name, "chat")

        assert space.children()["Deployment/chat-pool"]["spec"]["replicas"] == 1
        assert space.condition("ScalingActive")["reason"] == "Suspended"
        assert space.get()["status"]["pools"][0]["recommended"] == 3

        space.patch({"spec": {"suspend": False}})
        await settle(made, space.name, "chat")

    assert space.children()["Deployment/chat-pool"]["spec"]["replicas"] == 3


async def test_recommend_mode_shows_and_does_not_act(control_plane, space):
    """The number is in status, the Deployment keeps its own."""
    space.create(tier(scaling={"mode": "Recommend"}))
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        space.patch({"spec": {"pool": {"scaling": {"minReplicas": 2}}}})
        await settle(made, space.name, "chat")

        assert space.children()["Deployment/chat-pool"]["spec"]["replicas"] == 1
        status = space.get()["status"]
        assert status["pools"][0]["recommended"] == 2
        assert [d["acted"] for d in status["decisions"]] == [False]

        space.patch({"spec": {"replicas": 3}}, "chat-pool", CHILDREN["Deployment"])
        await settle(made, space.name, "chat")

    assert space.children()["Deployment/chat-pool"]["spec"]["replicas"] == 3  # somebody acts on the advice


async def test_external_mode_hands_replicas_over_without_a_drop(control_plane, space):
    """S14: the value is sent until another manager owns it, then it is left out."""
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        space.patch({"spec": {"pool": {"scaling": {"minReplicas": 2}}}})
        await settle(made, space.name, "chat")
        space.patch({"spec": {"scaling": {"mode": "External"}}})
        await settle(made, space.name, "chat")

        assert space.children()["Deployment/chat-pool"]["spec"]["replicas"] == 2
        assert space.get()["status"]["pools"][0]["scaleTargetRef"]["name"] == "chat-pool"

        scale = CHILDREN["Deployment"].format(namespace=space.name) + "/chat-pool/scale"
        space.connection.request(
            "PATCH", scale, {"spec": {"replicas": 4}}, content_type="application/merge-patch+json"
        )
        await settle(made, space.name, "chat")
        deployment = space.children()["Deployment/chat-pool"]

    assert deployment["spec"]["replicas"] == 4
    ours = [
        e
        for e in deployment["metadata"]["managedFields"]
        if e["manager"] == "servingtiers" and not e.get("subresource")
    ]
    assert all("f:replicas" not in entry["fieldsV1"].get("f:spec", {}) for entry in ours)


async def test_an_autoscaler_on_our_deployment_is_a_conflict_and_we_stop_setting_replicas(
    control_plane, space
):
    """S1: two masters never fight."""
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        hpa = {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "rival"},
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "chat-pool"},
                "minReplicas": 1,
                "maxReplicas": 9,
            },
        }
        path = f"/apis/autoscaling/v2/namespaces/{space.name}/horizontalpodautoscalers"
        space.connection.request("POST", path, hpa)
        space.patch({"spec": {"pool": {"scaling": {"minReplicas": 2}}}})
        await settle(made, space.name, "chat")

    assert space.children()["Deployment/chat-pool"]["spec"]["replicas"] == 1
    assert space.condition("Conflict")["reason"] == "ReplicasOwnedElsewhere"
    assert "rival" in space.condition("Conflict")["message"]


BAD = {
    "an accelerator nobody makes": (
        {"pool": {"hardware": {"accelerators": ["h1000"]}}},
        "accelerators",
        "h100",
    ),
    "an accelerator this cluster lacks": (
        {"pool": {"hardware": {"accelerators": ["b200-sxm-180gb"]}}},
        "accelerators",
        "operator",
    ),
    "a flag that vLLM lacks": (
        {"pool": {"engine": {"extraArgs": {"warp-speed": "9"}}}},
        "extraArgs",
        "warp-speed",
    ),
    "a flag that is the operator's": (
        {"pool": {"engine": {"extraArgs": {"port": "1"}}}},
        "extraArgs",
        "port",
    ),
    "an environment that changes what runs": (
        {"pool": {"engine": {"env": {"PYTHONPATH": "/x"}}}},
        "env",
        "PYTHONPATH",
    ),
    "remote code without permission": (
        {"model": {"name": "a/b", "trustRemoteCode": True, "revision": "0" * 40}},
        "trustRemoteCode",
        "administrator",
    ),
    "a model that does not fit": (
        {
            "model": {"name": "meta-llama/Llama-3.1-70B-Instruct"},
            "pool": {"hardware": {"accelerators": ["h100-sxm-80gb"], "tensorParallel": 1}},
        },
        "hardware",
        "tensorParallel",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_what_admission_cannot_see_is_a_condition_and_touches_nothing_that_serves(
    control_plane, space, case
):
    """The condition names field and mend; the objects stay as they are."""
    change, field, mend = BAD[case]
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
        before = shape(space.children())
        space.patch({"spec": change})
        await settle(made, space.name, "chat")

        accepted = space.condition("Accepted")
        assert accepted["status"] == "False"
        assert field in accepted["message"]
        assert mend in accepted["message"]
        assert shape(space.children()) == before

        space.replace_spec(tier()["spec"])
        await settle(made, space.name, "chat")

    assert space.condition("Accepted")["status"] == "True"


async def test_the_whole_operator_works_with_the_namespaced_roles_and_nothing_else(control_plane, space):
    """Kopf, watches, writes and the Lease run under the Roles of manifests/, as a user who has nothing else."""
    grant(control_plane, space.name)
    kubeconfig = str(control_plane.kubeconfig_for("operator"))
    async with operator(control_plane, space.name, kubeconfig=kubeconfig, lease=LeaseTimes(3, 2, 0.3)):
        await asyncio.to_thread(space.create, tier())
        await eventually(lambda: set(space.children()) == AGGREGATED, what="children")
        await eventually(lambda: space.condition("Accepted"), what="status")
        await asyncio.to_thread(space.delete, "chat-pool", CHILDREN["Deployment"])
        await eventually(lambda: "Deployment/chat-pool" in space.children(), what="repair by watch")
        lease = f"/apis/coordination.k8s.io/v1/namespaces/{space.name}/leases/servingtiers-operator"
        held = await asyncio.to_thread(space.connection.request, "GET", lease)
        assert held["spec"]["holderIdentity"]
        events = f"/apis/events.k8s.io/v1/namespaces/{space.name}/events"
        found = await asyncio.to_thread(space.connection.request, "GET", events)
        assert any(e.get("reportingController") == "servingtiers.io/operator" for e in found["items"])

    released = space.connection.request("GET", lease)
    assert not released["spec"].get("holderIdentity")


async def test_only_the_holder_of_the_lease_writes_and_the_next_takes_over(control_plane, space):
    """P6: two operators, one leader."""
    times = LeaseTimes(3, 2, 0.3)
    async with operator(control_plane, space.name, lease=times, identity="first"):
        await eventually(lambda: _holder(space) == "first", what="first leads")
        async with operator(control_plane, space.name, lease=times, identity="second"):
            await asyncio.to_thread(space.create, tier())
            await eventually(lambda: set(space.children()) == AGGREGATED)

            assert _holder(space) == "first"

    async with operator(control_plane, space.name, lease=times, identity="third"):
        await eventually(lambda: _holder(space) == "third", seconds=6, what="graceful hand-over")


def _holder(space: Namespace) -> str | None:
    path = f"/apis/coordination.k8s.io/v1/namespaces/{space.name}/leases/servingtiers-operator"
    try:
        return space.connection.request("GET", path)["spec"].get("holderIdentity")
    except ApiError:
        return None


async def test_the_recorded_plan_survives_the_api_server(control_plane, space):
    """The annotation holds the template and stays far below the limit of 262,144 bytes."""
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
    annotation = space.children()["Deployment/chat-pool"]["metadata"]["annotations"][PLAN_ANNOTATION]

    assert 1_000 < len(annotation) < 32_768


async def test_deleting_a_tier_leaves_nothing_behind_without_the_operator(control_plane, space):
    """No finalizer: the garbage collector does it all."""
    space.create(tier())
    async with controller(control_plane, space.name) as made:
        await settle(made, space.name, "chat")
    assert "finalizers" not in space.get()["metadata"]
    space.delete()

    await eventually(lambda: not space.children(), seconds=60, what="children are collected")
