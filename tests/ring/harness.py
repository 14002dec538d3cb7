"""The operator as a test runs it: in this process or as one of its own, against the ring's API server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import yaml

from servingtiers.adapters.cluster import Cluster
from servingtiers.api.crd import crd_documents
from servingtiers.controller import Controller
from servingtiers.core.config import OperatorConfig
from servingtiers.core.signals import TierLoad
from servingtiers.handlers import Options, run
from servingtiers.lab.controlplane import ApiError, Connection, ControlPlane

ROOT = Path(__file__).parents[2]
CONFIG = OperatorConfig.model_validate(
    yaml.safe_load((ROOT / "manifests/base/config.yaml").read_text()) | {"routerServiceAccount": None}
)
"""The shipped configuration, but the operator makes the routers' accounts: all kinds of objects are in play."""
TIERS = "/apis/servingtiers.io/v1alpha1/namespaces/{namespace}/servingtiers"
CHILDREN = {
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings",
    "Service": "/api/v1/namespaces/{namespace}/services",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies",
    "PodDisruptionBudget": "/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets",
    "Deployment": "/apis/apps/v1/namespaces/{namespace}/deployments",
}


class Silence:
    """A load source that knows nothing: every signal stays Unknown."""

    async def read(self, tiers, now, *, complete=True):
        return {tier.key: TierLoad() for tier in tiers}

    async def close(self):
        return


def tier(name: str = "chat", **spec: Any) -> dict[str, Any]:
    """Return a small valid tier."""
    body = {
        "tier": "Latency",
        "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"},
        "pool": {
            "hardware": {"accelerators": ["h100-sxm-80gb"]},
            "scaling": {"minReplicas": 1, "maxReplicas": 4},
        },
    }
    return {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "metadata": {"name": name},
        "spec": body | spec,
    }


def install_crd(plane: ControlPlane) -> None:
    """Apply the CRDs and return when they are served."""
    connection = plane.connection()
    for crd in crd_documents():
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"
        connection.request(
            "PATCH",
            f"{path}?fieldManager=servingtiers-tests&force=true",
            crd,
            content_type="application/apply-patch+yaml",
        )
        _until_served(connection, path, crd["spec"]["names"]["plural"])


def _until_served(connection: Connection, path: str, plural: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        conditions = connection.request("GET", path)["status"].get("conditions") or []  # null at first
        if any(one["type"] == "Established" and one["status"] == "True" for one in conditions):
            try:
                connection.request("GET", f"/apis/servingtiers.io/v1alpha1/{plural}?limit=1")
            except ApiError:
                pass  # established a moment ago, not served yet
            else:
                return
        time.sleep(0.1)
    raise TimeoutError(f"the API server does not serve the CRD: {conditions}")


def grant(plane: ControlPlane, namespace: str, user: str = "operator") -> None:
    """Give a user what the operator's ServiceAccount gets in namespaced mode, and nothing else.

    With the overlay in which the operator makes the routers' accounts, as `CONFIG` has it.
    """
    rendered = plane.kubectl("kustomize", str(ROOT / "manifests/overlays/per-tier-accounts"))
    for role in yaml.safe_load_all(rendered):
        if role["kind"] == "Role":
            name = role["metadata"]["name"]
            role["metadata"] = {"name": name}
            plane.kubectl("apply", "-n", namespace, "-f", "-", document=json.dumps(role))
            plane.kubectl("create", "rolebinding", "-n", namespace, name, f"--role={name}", f"--user={user}")


class Namespace:
    """One namespace of the ring, as administrator."""

    def __init__(self, connection: Connection, name: str) -> None:
        self.connection = connection
        self.name = name

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        return self.connection.request("POST", TIERS.format(namespace=self.name), body)

    def get(self, name: str = "chat") -> dict[str, Any]:
        return self.connection.request("GET", TIERS.format(namespace=self.name) + f"/{name}")

    def tiers(self) -> list[dict[str, Any]]:
        return self.connection.request("GET", TIERS.format(namespace=self.name))["items"]

    def patch(self, change: dict[str, Any], name: str = "chat", path: str = TIERS) -> dict[str, Any]:
        return self.connection.request(
            "PATCH",
            path.format(namespace=self.name) + f"/{name}",
            change,
            content_type="application/merge-patch+json",
        )

    def replace_spec(self, spec: dict[str, Any], name: str = "chat") -> dict[str, Any]:
        return self.connection.request(
            "PATCH",
            TIERS.format(namespace=self.name) + f"/{name}",
            [{"op": "replace", "path": "/spec", "value": spec}],
            content_type="application/json-patch+json",
        )

    def delete(self, name: str = "chat", path: str = TIERS) -> None:
        self.connection.request("DELETE", path.format(namespace=self.name) + f"/{name}")

    def children(self) -> dict[str, dict[str, Any]]:
        """Return the objects that belong to tiers, by kind and name."""
        found = {}
        for kind, path in CHILDREN.items():
            query = "?labelSelector=app.kubernetes.io%2Fmanaged-by%3Dservingtiers"
            for item in self.connection.request("GET", path.format(namespace=self.name) + query)["items"]:
                found[f"{kind}/{item['metadata']['name']}"] = item
        return found

    def condition(self, kind: str, name: str = "chat") -> dict[str, Any] | None:
        conditions = self.get(name).get("status", {}).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), None)


@contextlib.asynccontextmanager
async def operator(ring: ControlPlane, *namespaces: str, **options: Any) -> AsyncIterator[asyncio.Task[None]]:
    """Run the whole operator, Kopf included, in this process for the body."""
    config = options.pop("config", CONFIG).model_copy(update={"namespaces": list(namespaces)})
    settings = {
        "kubeconfig": str(ring.kubeconfig),
        "namespace": namespaces[0],
        "lease": None,
        "health_port": None,
        "metrics_port": None,
    }
    stop = asyncio.Event()
    task = asyncio.create_task(run(Options(config=config, **(settings | options)), stop=stop))
    try:
        yield task
    finally:
        stop.set()
        await asyncio.wait_for(task, 15)


@contextlib.asynccontextmanager
async def controller(ring: ControlPlane, namespace: str, **options: Any) -> AsyncIterator[Controller]:
    """A controller without loops: the body relists and reconciles by hand."""
    config = options.pop("config", CONFIG).model_copy(update={"namespaces": [namespace]})
    async with Cluster.connect(kubeconfig=str(ring.kubeconfig)) as cluster:
        yield Controller(cluster, config, options.pop("loads", Silence()), **options)


async def settle(made: Controller, namespace: str, *names: str, passes: int = 6) -> None:
    """Relist once, then reconcile until a pass writes nothing."""
    await made.relist()
    for _ in range(passes):
        before = writes(made)
        for name in names:
            await made.reconcile((namespace, name))
        if writes(made) == before:
            return
    raise AssertionError(f"still writing after {passes} passes")


def writes(made: Controller) -> float:
    """Return how many mutating requests a controller has made, events included."""
    return sum(
        sample.value
        for family in made.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "servingtiers_api_writes_total"
    )


async def eventually(check: Callable[[], Any], *, seconds: float = 15.0, what: str = "") -> Any:
    """Wait until ``check`` returns something true, off the event loop."""
    deadline = time.monotonic() + seconds
    while True:
        last = await asyncio.to_thread(check)
        if last:
            return last
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or check}")
        await asyncio.sleep(0.2)


_VOLATILE = {
    "uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "clusterIP", "clusterIPs",
    "lastTransitionTime", "lastUpdateTime", "observedGeneration", "ownerReferences", "selfLink",
}  # fmt: skip


def shape(obj: Any) -> Any:
    """Return an object without what differs from run to run: the oracle compares the rest."""
    if isinstance(obj, dict):
        return {
            key: shape(value)
            for key, value in obj.items()
            if key not in _VOLATILE and key != "status" and "deployment.kubernetes.io" not in key
        }
    if isinstance(obj, list):
        return [shape(value) for value in obj]
    return json.loads(json.dumps(obj))
