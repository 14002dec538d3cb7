"""Golden tiers on a real API server, in a namespace that enforces the restricted Pod Security Standard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from servingtiers.api.spec import ServingTier
from servingtiers.core.config import OperatorConfig
from servingtiers.core.diff import contains
from servingtiers.core.effective import TierSettings
from servingtiers.lab.controlplane import ApiError, Connection
from servingtiers.render import tier_objects

pytestmark = pytest.mark.ring

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(folder for folder in GOLDEN.iterdir() if (folder / "tier.yaml").exists())
PLURALS = {
    "ServiceAccount": "serviceaccounts",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "NetworkPolicy": "networkpolicies",
    "Service": "services",
    "PodDisruptionBudget": "poddisruptionbudgets",
    "Deployment": "deployments",
}
CLUSTER_OBJECTS = {
    "/apis/node.k8s.io/v1/runtimeclasses": {
        "apiVersion": "node.k8s.io/v1",
        "kind": "RuntimeClass",
        "metadata": {"name": "nvidia"},
        "handler": "nvidia",
    },
    "/apis/scheduling.k8s.io/v1/priorityclasses": {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {"name": "serving"},
        "value": 1000,
    },
}
"""What an administrator has made that golden tiers name."""


def objects_of(folder: Path, namespace: str) -> tuple[dict[str, Any], ...]:
    """Render a scenario into a namespace, without an owner: the garbage collector would look for it."""
    document = yaml.safe_load((folder / "tier.yaml").read_text())
    document["metadata"] |= {"namespace": namespace, "uid": ""}
    given = yaml.safe_load((folder / "settings.yaml").read_text())
    operator = folder / "operator.yaml"
    return tier_objects(
        ServingTier.model_validate(document),
        TypeAdapter(TierSettings).validate_python(given["settings"]),
        # None of them needs to run; what is tried is admission.
        dict.fromkeys(given["replicas"], 0),
        OperatorConfig.model_validate(yaml.safe_load(operator.read_text()) if operator.exists() else {}),
        surge=given.get("surge", {}),
    )


def collection(obj: dict[str, Any]) -> str:
    """Return the path of an object's collection."""
    version = obj["apiVersion"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return f"{root}/namespaces/{obj['metadata']['namespace']}/{PLURALS[obj['kind']]}"


@pytest.fixture
def restricted(connection: Connection, namespace: str) -> Iterator[str]:
    """A namespace that admits restricted pods only, and the cluster's objects that tiers name."""
    enforce = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    connection.request(
        "PATCH", f"/api/v1/namespaces/{namespace}", enforce, content_type="application/merge-patch+json"
    )
    for path, body in CLUSTER_OBJECTS.items():
        with contextlib.suppress(ApiError):  # another process of the run made it
            connection.request("POST", path, body)
    for account in (
        "default",
        "servingtiers-router",
    ):  # one the controller manager makes, one the chart makes
        body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account}}
        with contextlib.suppress(ApiError):
            connection.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", body)
    return namespace


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_the_api_server_takes_every_object_and_holds_what_was_meant(
    folder: Path, connection: Connection, restricted: str
) -> None:
    """Schemas do not know all rules: label keys, names of ports, grace periods, selectors against templates.

    And what it answers contains what was sent, after its defaults, pruning and normalised quantities: the operator
    finds nothing to write in its second pass.
    """
    for obj in objects_of(folder, restricted):
        path = f"{collection(obj)}/{obj['metadata']['name']}?fieldManager=test&fieldValidation=Strict"
        live = connection.request("PATCH", path, obj, content_type="application/apply-patch+yaml")
        assert contains(live, obj)


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_every_pod_is_admitted_where_the_restricted_standard_is_enforced(
    folder: Path, connection: Connection, restricted: str
) -> None:
    """Judged by Kubernetes' own admission."""
    objects = objects_of(folder, restricted)
    for obj in objects:
        if obj["kind"] == "ServiceAccount":
            connection.request("POST", collection(obj), obj)
    for obj in objects:
        if obj["kind"] == "Deployment":
            template = obj["spec"]["template"]
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {**template["metadata"], "name": "pod"},
                "spec": template["spec"],
            }
            path = f"/api/v1/namespaces/{restricted}/pods?dryRun=All&fieldValidation=Strict"
            admitted = connection.request("POST", path, pod)
            assert admitted["spec"]["containers"][0]["image"]


def test_the_namespace_really_refuses_what_is_not_restricted(connection: Connection, restricted: str) -> None:
    """Or the test above proves nothing."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "pod"},
        "spec": {"containers": [{"name": "c", "image": "i"}]},
    }
    with pytest.raises(ApiError, match="PodSecurity"):
        connection.request("POST", f"/api/v1/namespaces/{restricted}/pods?dryRun=All", pod)
