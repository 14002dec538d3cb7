"""What is written in which order, and what is not written, whatever the API server answers."""

from __future__ import annotations

import pytest

from in_memory import InMemoryCluster
from ring.harness import CONFIG, Silence, settle, tier
from servingtiers.adapters.cluster import ApiError
from servingtiers.controller import Controller
from servingtiers.core.config import OperatorConfig
from servingtiers.core.state import JsonObject

KEY = ("llm", "chat")
IN_PLACE = CONFIG.model_copy(update={"namespaces": ["llm"], "operator_namespace": "llm"})


def controller(cluster: InMemoryCluster, config: OperatorConfig = IN_PLACE) -> Controller:
    """Return a controller without loops."""
    return Controller(cluster, config, Silence())


def in_namespace(body: JsonObject) -> JsonObject:
    return body | {"metadata": body["metadata"] | {"namespace": "llm"}}


def object_of(kind: str, name: str) -> JsonObject:
    version = {
        "ServiceAccount": "v1",
        "Role": "rbac.authorization.k8s.io/v1",
        "NetworkPolicy": "networking.k8s.io/v1",
    }[kind]
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": "llm"}}


def condition(cluster: InMemoryCluster, kind: str) -> JsonObject:
    found = cluster.get_now("ServingTier/chat")["status"]["conditions"]
    return next(each for each in found if each["type"] == kind)


STRANGERS = {
    "ServiceAccount/chat-router": {"Deployment/chat-router", "RoleBinding/chat-router"},
    "Role/chat-router": {"RoleBinding/chat-router"},
    "NetworkPolicy/chat-engines": {"Deployment/chat-pool"},
    "NetworkPolicy/chat-router": {"Deployment/chat-router"},
}


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_nothing_relies_on_somebody_elses_object_from_the_first_pass_on(stranger):
    """Whoever may only write tiers must not get at the rights of an account by giving a tier the right name."""
    cluster = InMemoryCluster()
    cluster.put(object_of(*stranger.split("/")))
    cluster.put(in_namespace(tier(router={"image": "registry.example/curious:1"})))
    made = controller(cluster)
    for _ in range(3):
        await made.relist()
        await made.reconcile(KEY)

    attempted = {name for verb, name in cluster.writes if verb == "create"}
    assert not attempted & STRANGERS[stranger]
    assert {"Deployment/chat-pool", "Deployment/chat-router"} - STRANGERS[stranger] <= cluster.names
    assert condition(cluster, "Conflict")["status"] == "True"
    assert "until then" in condition(cluster, "Conflict")["message"]

    cluster.drop(stranger)
    await settle(made, *KEY)

    assert cluster.names >= STRANGERS[stranger] | {stranger}
    assert condition(cluster, "Conflict")["status"] == "False"


async def test_routers_are_not_changed_under_an_account_that_was_replaced():
    """The name is checked again before every write, not only at first."""
    cluster = InMemoryCluster()
    cluster.put(in_namespace(tier()))
    made = controller(cluster)
    await settle(made, *KEY)
    cluster.drop("ServiceAccount/chat-router")
    cluster.put(object_of("ServiceAccount", "chat-router"))
    cluster.put(in_namespace(tier(router={"image": "registry.example/curious:1"})))
    before = cluster.get_now("Deployment/chat-router")["spec"]
    for _ in range(3):
        await made.relist()
        await made.reconcile(KEY)

    assert cluster.get_now("Deployment/chat-router")["spec"] == before
    assert condition(cluster, "Conflict")["status"] == "True"


async def test_nothing_relies_on_an_object_that_could_not_be_made():
    """After an error nobody knows whose account bears the name."""
    cluster = InMemoryCluster()
    cluster.put(in_namespace(tier()))
    cluster.refuse = lambda verb, body: (
        ApiError(500, "InternalError", "try again") if body["kind"] == "ServiceAccount" else None
    )
    made = controller(cluster)
    await made.relist()
    with pytest.raises(ApiError):
        await made.reconcile(KEY)

    assert "Deployment/chat-router" not in cluster.names
    assert "Deployment/chat-pool" in cluster.names

    cluster.refuse = lambda _verb, _body: None
    await settle(made, *KEY)

    assert "Deployment/chat-router" in cluster.names


@pytest.mark.parametrize("cluster_mode", [False, True])
async def test_another_mode_gives_the_routers_their_rights_anew(cluster_mode):
    """A RoleBinding's roleRef cannot be changed: it is made anew, in both directions, and then there is silence."""
    cluster = InMemoryCluster()
    cluster.put(in_namespace(tier()))
    for mode in (cluster_mode, not cluster_mode):
        made = controller(cluster, IN_PLACE.model_copy(update={"cluster_mode": mode}))
        await settle(made, *KEY)
        binding = cluster.get_now("RoleBinding/chat-router")

        assert binding["roleRef"]["kind"] == ("ClusterRole" if mode else "Role")
        assert ("Role/chat-router" in cluster.names) == (not mode)

    count = len(cluster.writes)
    await made.relist()
    await made.reconcile(KEY)

    assert len(cluster.writes) == count
