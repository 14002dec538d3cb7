"""The chart on a real API server: its rights are enough and none is idle; install, upgrade, uninstall; the policy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml

from chart.rendering import helm
from ring.harness import CHILDREN, CONFIG, ROOT, TIERS, Namespace, eventually, install_crd, operator, tier
from servingtiers.adapters.leadership import LeaseTimes
from servingtiers.core.config import OperatorConfig
from servingtiers.handlers import Options, run
from servingtiers.lab.binaries import BinariesError
from servingtiers.lab.controlplane import ApiError, Connection, ControlPlane, User

pytestmark = [pytest.mark.ring, pytest.mark.long(10), pytest.mark.xdist_group("chart")]

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
INSTALLED = "servingtiers"
"""Namespace of the kustomize base."""
ACCOUNT = f"system:serviceaccount:{INSTALLED}:servingtiers-operator"
CHART = str(ROOT / "charts/servingtiers")
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "rules": [
        {"level": "Metadata", "users": [ACCOUNT], "omitStages": ["RequestReceived"]},
        {"level": "None"},
    ],
}


@pytest.fixture(scope="module")
def plane(tmp_path_factory) -> Iterator[ControlPlane]:
    """A control plane of this module's own: it installs CRD and policies, and records reads too."""
    policy = tmp_path_factory.mktemp("audit") / "policy.yaml"
    policy.write_text(json.dumps(_AUDIT_POLICY))
    flags = {"kube-apiserver": [f"--audit-policy-file={policy}"]}
    try:
        with ControlPlane(audit=True, flags=flags, users=(User("mallory"),)) as running:
            yield running
    except BinariesError as error:
        if os.environ.get("SERVINGTIERS_REQUIRE_RING"):
            raise
        pytest.skip(str(error))


def account_connection(
    plane: ControlPlane, namespace: str, name: str = "servingtiers-operator"
) -> Connection:
    """Return the API server as a service account sees it."""
    token = plane.kubectl("create", "token", name, "-n", namespace).strip()
    return Connection(plane.url, plane.ca_file, token)


def _granted(plane: ControlPlane) -> dict[tuple[str, str], str]:
    """Return what the operator's Roles grant: resource and verb to the Role's name."""
    grants = {}
    roles = json.loads(plane.kubectl("get", "roles,clusterroles", "-n", INSTALLED, "-o", "json"))["items"]
    for role in roles:
        if not role["metadata"]["name"].startswith("servingtiers-operator"):
            continue
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    for verb in rule["verbs"]:
                        grants[f"{group}/{resource}".removeprefix("/"), verb] = role["metadata"]["name"]
    return grants


def _requests(plane: ControlPlane) -> list[tuple[str, str, int]]:
    """Return the operator's requests as resource, verb and HTTP status."""
    found = []
    for line in (plane.folder / "audit.log").read_text().splitlines():
        event = json.loads(line)
        reference = event.get("objectRef")
        if event["user"]["username"] == ACCOUNT and reference:
            parts = (reference.get("apiGroup"), reference.get("resource"), reference.get("subresource"))
            resource = "/".join(part for part in parts if part)
            found.append((resource, event["verb"], event.get("responseStatus", {}).get("code", 0)))
    return found


def _stray(owner: dict, kind: str) -> dict:
    """Return an object that looks like the tier's and that no plan holds: the operator clears it away."""
    meta = owner["metadata"]
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": meta["name"],
        "uid": meta["uid"],
    }
    body = {
        "metadata": {
            "name": "stray",
            "labels": {
                "app.kubernetes.io/managed-by": "servingtiers",
                "servingtiers.io/tier": meta["name"],
            },
            "ownerReferences": [reference | {"controller": True}],
        }
    }
    labels = {"matchLabels": {"app": "stray"}}
    pod = {"metadata": {"labels": {"app": "stray"}}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    specs = {
        "Service": {"spec": {"ports": [{"port": 80}]}},
        "NetworkPolicy": {"spec": {"podSelector": {}}},
        "PodDisruptionBudget": {"spec": {"maxUnavailable": 1, "selector": labels}},
        "Deployment": {"spec": {"replicas": 0, "selector": labels, "template": pod}},
        "RoleBinding": {"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "none"}},
    }
    return body | specs.get(kind, {})


_ALWAYS_IDLE = {
    # Read only when a write met an object that had changed in the same instant.
    ("servingtiers.io/servingtiers", "get"),
    ("servingtiers.io/tierpools", "get"),
    ("pods", "get"),
}
IDLE = {
    # In the way of a name are only kinds that are created; the others are read alone after such an instant.
    "base": _ALWAYS_IDLE
    | {
        ("serviceaccounts", "get"),
        ("rbac.authorization.k8s.io/roles", "get"),
        ("rbac.authorization.k8s.io/rolebindings", "get"),
    },
    # Held to be granted: nobody may give the routers what he does not have.
    "overlays/per-tier-accounts": _ALWAYS_IDLE,
    # Binding is no request of its own: without it the API server refuses to create the routers' RoleBinding.
    "overlays/cluster": _ALWAYS_IDLE
    | {
        ("rbac.authorization.k8s.io/clusterroles", "bind"),
        ("rbac.authorization.k8s.io/roles", "get"),
    },
}
"""Rights that nothing here exercises, each with its reason. The test fails too where one of them is used after all."""


@pytest.mark.parametrize("kustomization", IDLE)
async def test_the_installed_roles_are_enough_and_none_of_their_verbs_is_idle(plane, kustomization, tmp_path):
    """The operator runs as the installed account through creation, repair, conflict, clearing away and hand-over."""
    install_crd(plane)
    plane.create_namespace(INSTALLED, RESTRICTED)
    try:
        plane.kubectl("apply", "-k", str(ROOT / "manifests" / kustomization))
        token = plane.kubectl("create", "token", "servingtiers-operator", "-n", INSTALLED).strip()
        kubeconfig = plane.write_kubeconfig(tmp_path / "operator.kubeconfig", token)
        (plane.folder / "audit.log").write_text("")
        await _exercise(plane, kubeconfig, kustomization)

        granted = _granted(plane)
        requests = _requests(plane)
        refused = {(resource, verb) for resource, verb, status in requests if status == 403}
        used = {(resource, verb) for resource, verb, status in requests if status != 403}
        assert not refused
        assert used <= granted.keys()
        assert granted.keys() - used == IDLE[kustomization]
    finally:
        plane.kubectl("delete", "namespace", INSTALLED, "--wait=true", "--timeout=60s")


_NOT_MADE = {
    "base": {"ServiceAccount", "Role", "RoleBinding"},
    "overlays/per-tier-accounts": set(),
    "overlays/cluster": {"Role"},
}
"""Kinds that the operator does not make: they come with the chart."""


@contextlib.asynccontextmanager
async def _installed_operator(kubeconfig: Path, kustomization: str) -> AsyncIterator[None]:
    """Run the operator with the installed configuration."""
    text = (ROOT / "manifests" / kustomization / "config.yaml").read_text()
    options = Options(
        config=OperatorConfig.model_validate(yaml.safe_load(text)),
        kubeconfig=str(kubeconfig),
        namespace=INSTALLED,
        lease=LeaseTimes(3, 2, 0.3),
        health_port=None,
        metrics_port=None,
    )
    stop = asyncio.Event()
    task = asyncio.create_task(run(options, stop=stop))
    try:
        yield
    finally:
        stop.set()
        await asyncio.wait_for(task, 15)


async def _lend(space: Namespace) -> None:
    """Let a TierPool say that it has no members, and an engine that serves nobody we know be called home."""
    pools = f"/apis/servingtiers.io/v1alpha1/namespaces/{INSTALLED}/tierpools"
    pool = {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "TierPool",
        "metadata": {"name": "llama"},
        "spec": {"servedModelName": "llama"},
    }
    await asyncio.to_thread(space.connection.request, "POST", pools, pool)
    await eventually(
        lambda: space.connection.request("GET", f"{pools}/llama").get("status", {}).get("conditions"),
        what="status of the TierPool",
    )
    pods = f"/api/v1/namespaces/{INSTALLED}/pods"
    query = f"{pods}?labelSelector=app.kubernetes.io%2Fcomponent%3Dengine"
    found = await eventually(lambda: space.connection.request("GET", query)["items"], what="an engine's pod")
    name = found[0]["metadata"]["name"]
    merge = {"content_type": "application/merge-patch+json"}
    ready = [{"type": kind, "status": "True"} for kind in ("PodScheduled", "Ready", "ContainersReady")]
    status = {"status": {"phase": "Running", "podIP": "127.0.0.1", "conditions": ready}}
    moved = {"servingtiers.io/moved-at": "2026-01-01T00:00:00Z"}
    label = {"metadata": {"labels": {"route.servingtiers.io/tier": "elsewhere"}, "annotations": moved}}
    await asyncio.to_thread(space.connection.request, "PATCH", f"{pods}/{name}", label, **merge)
    await asyncio.to_thread(space.connection.request, "PATCH", f"{pods}/{name}/status", status, **merge)

    def called() -> bool:
        labels = space.connection.request("GET", f"{pods}/{name}")["metadata"]["labels"]
        return labels.get("route.servingtiers.io/tier") != "elsewhere"

    await eventually(called, what="the engine is called home")


async def _exercise(plane: ControlPlane, kubeconfig: Path, kustomization: str) -> None:
    """Lead the operator through everything that a cluster can do to it."""
    space = Namespace(plane.connection(), INSTALLED)
    made = CHILDREN.keys() - _NOT_MADE[kustomization]

    def path(kind: str) -> str:
        return CHILDREN[kind].format(namespace=INSTALLED)

    def by_kind() -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for key in space.children():
            kind, name = key.split("/")
            names.setdefault(kind, []).append(name)
        return names

    # Somebody else's objects bear the names of tiers that come later. What rests on others is another tier's: it would
    # not be tried.
    nobody = {"apiVersion": "v1", "kind": "None", "metadata": {"name": "none", "uid": "none"}}
    taken = {
        "Service": "blocked",
        "NetworkPolicy": "unguarded-engines",
        "ServiceAccount": "unguarded-router",
        "Role": "unguarded-router",
    }
    for kind in made:
        name = taken.get(kind, "blocked-router")
        body = _stray(nobody, kind) | {"metadata": {"name": name}}
        await asyncio.to_thread(space.connection.request, "POST", path(kind), body)
    async with _installed_operator(kubeconfig, kustomization):
        created = await asyncio.to_thread(space.create, tier())
        await eventually(lambda: by_kind().keys() == made, what="every kind of child")
        await eventually(lambda: space.condition("Accepted"), what="status")
        # A router that the plan makes may run: its account is there and the namespace takes its pods.
        pods = f"/api/v1/namespaces/{INSTALLED}/pods?labelSelector=app.kubernetes.io%2Fcomponent%3Drouter"
        await eventually(
            lambda: space.connection.request("GET", pods)["items"], what="router pods", seconds=30
        )
        await _lend(space)
        for kind in CHILDREN:
            await asyncio.to_thread(space.connection.request, "POST", path(kind), _stray(created, kind))
        await eventually(
            lambda: not [n for names in by_kind().values() for n in names if n == "stray"], what="strays"
        )
        for kind, names in (await asyncio.to_thread(by_kind)).items():
            change = {"metadata": {"labels": {"app.kubernetes.io/part-of": "something-else"}}}
            await asyncio.to_thread(space.patch, change, names[0], CHILDREN[kind])
        await eventually(
            lambda: all(
                obj["metadata"]["labels"]["app.kubernetes.io/part-of"] == "servingtiers"
                for obj in space.children().values()
            ),
            what="labels are repaired",
        )
        for name in ("blocked", "unguarded"):
            await asyncio.to_thread(space.create, tier(name))
        for name in ("blocked", "unguarded"):
            await eventually(
                lambda name=name: (space.condition("Conflict", name) or {}).get("status") == "True",
                what=f"conflict of {name}",
            )


def _helm(plane: ControlPlane, *arguments: str, values: dict | None = None) -> str:
    done = subprocess.run(
        [
            helm(),
            *arguments,
            "--kubeconfig",
            str(plane.kubeconfig),
            *(["--values", "-"] if values is not None else []),
        ],
        input=None if values is None else json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr

    return done.stdout


async def test_install_upgrade_uninstall_and_install_again(plane):
    """Notes tell the next step, pods fit a restricted namespace, an upgrade touches no tier, an uninstall neither."""
    helm()
    crds = ("servingtiers.servingtiers.io", "tierpools.servingtiers.io")
    plane.kubectl("delete", "crd", *crds, "--ignore-not-found")
    name = plane.create_namespace("helm-llm", RESTRICTED)
    space = Namespace(plane.connection(), name)
    options = ("servingtiers", CHART, "--namespace", name)
    notes = await asyncio.to_thread(_helm, plane, "install", *options, values={})
    assert "Next steps" in notes
    assert f"kubectl rollout status -n {name} deployment/servingtiers-operator" in notes
    await asyncio.to_thread(
        plane.kubectl,
        "wait",
        "--for=condition=Established",
        "crd/servingtiers.servingtiers.io",
        "--timeout=30s",
    )
    selector = "app.kubernetes.io%2Fcomponent%3Doperator"
    pods = f"/api/v1/namespaces/{name}/pods?labelSelector={selector}"
    await eventually(
        lambda: space.connection.request("GET", pods)["items"], what="the operator's pod", seconds=30
    )

    # The tier of the notes is one that the API server takes.
    document = notes.split("<<EOF\n")[1].split("EOF")[0]
    await asyncio.to_thread(plane.kubectl, "apply", "-n", name, "-f", "-", document=document)
    config = yaml.safe_load(
        plane.kubectl(
            "get",
            "configmap",
            "servingtiers-operator-config",
            "-n",
            name,
            "-o",
            r"jsonpath={.data.config\.yaml}",
        )
    )
    async with operator(plane, name, config=CONFIG.model_validate(config)):
        await eventually(lambda: "Deployment/chat-pool" in space.children(), what="the tier's pool")
        await eventually(lambda: space.condition("Accepted"), what="status")
    before = await asyncio.to_thread(_identities, space)

    changed = {"config": {"images": {"engine": "vllm/vllm-openai:v0.33.0"}}, "operator": {"replicas": 2}}
    await asyncio.to_thread(_helm, plane, "upgrade", *options, values=changed)
    async with operator(plane, name, config=CONFIG.model_validate(config | changed["config"])):
        await eventually(
            lambda: (space.condition("PlanOutdated") or {}).get("status") == "True", what="new default seen"
        )
    after = await asyncio.to_thread(_identities, space)
    assert after == before

    await asyncio.to_thread(_helm, plane, "uninstall", "servingtiers", "--namespace", name)
    assert await asyncio.to_thread(_identities, space) == before
    left = plane.kubectl("get", "deploy,svc,cm,sa,role,rolebinding,networkpolicy", "-n", name, "-o", "name",
                         "-l", "app.kubernetes.io/managed-by=Helm").split()  # fmt: skip
    assert sorted(left) == [
        "role.rbac.authorization.k8s.io/servingtiers-router",
        "rolebinding.rbac.authorization.k8s.io/servingtiers-router",
        "serviceaccount/servingtiers-router",
    ]
    await asyncio.to_thread(_helm, plane, "install", *options, values={})
    assert await asyncio.to_thread(_identities, space) == before
    await asyncio.to_thread(plane.kubectl, "delete", "namespace", name, "--wait=true", "--timeout=60s")


def _identities(space: Namespace) -> dict[str, tuple[str, int]]:
    """Return uid and generation of a tier and its objects: neither made anew nor changed."""
    found = {**space.children(), "ServingTier/chat": space.get()}
    return {
        name: (obj["metadata"]["uid"], obj["metadata"].get("generation", 0)) for name, obj in found.items()
    }


async def test_applying_the_git_state_again_never_fights_the_autoscaler(plane):
    """Server-side apply by a GitOps tool, with force, changes no replica and no generation."""
    install_crd(plane)
    name = plane.create_namespace("gitops")
    space = Namespace(plane.connection(), name)
    body = tier() | {"metadata": {"name": "chat", "namespace": name}}
    apply = TIERS.format(namespace=name) + "/chat?fieldManager=argocd-controller&force=true"

    def sync() -> dict:
        return space.connection.request("PATCH", apply, body, content_type="application/apply-patch+yaml")

    await asyncio.to_thread(sync)
    async with operator(plane, name):
        await eventually(lambda: "Deployment/chat-pool" in space.children(), what="pool")
        # What the autoscaler does: more replicas than Git says anything of.
        await asyncio.to_thread(space.patch, {"spec": {"replicas": 3}}, "chat-pool", CHILDREN["Deployment"])
        await eventually(lambda: space.condition("Accepted"), what="status")
        before = await asyncio.to_thread(space.get)
        for _ in range(3):
            after = await asyncio.to_thread(sync)
            await asyncio.sleep(0.5)

        assert after["metadata"]["generation"] == before["metadata"]["generation"]
        assert after["spec"] == before["spec"]
        pool = (await asyncio.to_thread(space.children))["Deployment/chat-pool"]
        assert pool["spec"]["replicas"] == 3  # nothing shrinks without telemetry, and Git has no say
    await asyncio.to_thread(plane.kubectl, "delete", "namespace", name, "--wait=false")


def test_only_the_operator_may_say_whom_an_engine_serves(plane):
    """The admission policy, against a user who may edit everything in the namespace."""
    helm()
    name = plane.create_namespace("guarded")
    other = plane.create_namespace("unguarded")
    rendered = subprocess.run(
        [helm(), "template", "servingtiers", CHART, "-n", name, "--set", "crds.enabled=false",
         "--set", "admission.routingLabels.enabled=true"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    plane.kubectl("apply", "-f", "-", document=rendered)
    for space in (name, other):
        plane.kubectl(
            "create", "rolebinding", "mallory", "-n", space, "--clusterrole=admin", "--user=mallory"
        )
    mallory, admin = plane.connection("mallory"), plane.connection()
    theirs = account_connection(plane, name)
    plane.kubectl("create", "rolebinding", "pods", "-n", name, "--clusterrole=admin",
                  f"--serviceaccount={name}:servingtiers-operator")  # fmt: skip
    route = {"route.servingtiers.io/tier": "chat"}

    def pod(pod_name: str, labels: dict) -> dict:
        container = {"name": "a", "image": "a"}
        return {"metadata": {"name": pod_name, "labels": labels}, "spec": {"containers": [container]}}

    def workload(workload_name: str, labels: dict) -> dict:
        template = {"metadata": {"labels": {"app": workload_name, **labels}}, "spec": pod("", {})["spec"]}
        selector = {"matchLabels": {"app": workload_name}}
        return {
            "metadata": {"name": workload_name},
            "spec": {"replicas": 1, "selector": selector, "template": template},
        }

    pods, deployments = f"/api/v1/namespaces/{name}/pods", f"/apis/apps/v1/namespaces/{name}/deployments"

    def denied(method: str, path: str, body: dict, **options) -> bool:
        try:
            mallory.request(method, path, body, **options)
        except ApiError as error:
            if error.status == 403 and "set by the ServingTiers operator" in str(error):
                return True
            raise
        return False

    # Policies take effect within moments of their creation.
    for _ in range(100):
        if denied("POST", pods, pod("early", route)):
            break
        admin.request("DELETE", f"{pods}/early?gracePeriodSeconds=0")
        time.sleep(0.1)
    merge = {"content_type": "application/merge-patch+json"}
    assert denied("POST", pods, pod("forged", route))
    assert denied("POST", deployments, workload("forged", route))
    assert not denied("POST", pods, pod("plain", {"app": "plain"}))
    assert denied("PATCH", f"{pods}/plain", {"metadata": {"labels": route}}, **merge)
    assert not denied("PATCH", f"{pods}/plain", {"metadata": {"labels": {"app": "other"}}}, **merge)
    assert not denied("POST", deployments, workload("plain", {}))

    # The operator's Deployment, and the pods that the ReplicaSet controller makes of it.
    theirs.request("POST", deployments, workload("engine", route))
    query = f"{pods}?labelSelector=app%3Dengine"
    for _ in range(100):
        if made := admin.request("GET", query)["items"]:
            break
        time.sleep(0.1)
    engine = made[0]["metadata"]["name"]
    assert made[0]["metadata"]["labels"]["route.servingtiers.io/tier"] == "chat"
    assert denied(
        "PATCH", f"{pods}/{engine}", {"metadata": {"labels": {"route.servingtiers.io/tier": "mine"}}}, **merge
    )
    assert denied(
        "PATCH", f"{pods}/{engine}", {"metadata": {"labels": {"route.servingtiers.io/tier": None}}}, **merge
    )
    assert not denied("PATCH", f"{pods}/{engine}", {"metadata": {"labels": {"note": "seen"}}}, **merge)
    lent = theirs.request(
        "PATCH",
        f"{pods}/{engine}",
        {"metadata": {"labels": {"route.servingtiers.io/tier": "batch"}}},
        **merge,
    )
    assert lent["metadata"]["labels"]["route.servingtiers.io/tier"] == "batch"
    container = lent["spec"]["containers"][0]["name"]
    image = {"spec": {"containers": [{"name": container, "image": "other"}]}}
    with pytest.raises(ApiError, match="changes labels and annotations of pods only"):
        theirs.request(
            "PATCH", f"{pods}/{engine}", image, content_type="application/strategic-merge-patch+json"
        )

    # A namespace that this release does not watch is none of its business.
    assert not denied("POST", f"/api/v1/namespaces/{other}/pods", pod("free", route))
    for space in (name, other):
        plane.kubectl("delete", "namespace", space, "--wait=false")
