"""What engine and router pods have in common: a pod that the ``restricted`` Pod Security Standard admits.

https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

from typing import Any

from servingtiers.api.spec import ServingTier, Toleration
from servingtiers.core.state import JsonObject

__all__ = [
    "container_security",
    "environment",
    "from_pod_field",
    "metadata",
    "pod_security",
    "tolerations",
]

USER_ID = 2000
"""Images need not know this user: what it writes goes to volumes, and ``HOME`` and ``USER`` are set."""


def pod_security() -> JsonObject:
    """Return the security context of a pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        # A cache holds hundreds of gigabytes: changing every file's owner at each start would take minutes.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> JsonObject:
    """Return the security context of a container."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


def environment(values: dict[str, str]) -> list[JsonObject]:
    """Return literal environment variables in the order given."""
    return [{"name": name, "value": value} for name, value in values.items()]


def from_pod_field(name: str, path: str) -> JsonObject:
    """Return an environment variable that holds a field of the pod."""
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def tolerations(*groups: list[Toleration] | None) -> list[JsonObject]:
    """Return tolerations without repetition."""
    found: list[JsonObject] = []
    for group in groups:
        for toleration in group or []:
            entry: dict[str, Any] = toleration.model_dump(by_alias=True, exclude_none=True)
            if entry not in found:
                found.append(entry)
    return found


def metadata(tier: ServingTier, name: str, labels: dict[str, str]) -> JsonObject:
    """Return the metadata of an owned object.

    ``blockOwnerDeletion`` is false: true would need ``update`` on the tier's finalizers where the admission plugin
    OwnerReferencesPermissionEnforcement is on, and would hold up a foreground deletion of the tier until the last
    engine has drained. A tier without a uid (rendered without a cluster) gives objects without an owner.
    """
    meta: JsonObject = {"name": name, "namespace": tier.metadata.namespace, "labels": dict(labels)}
    if tier.metadata.uid:
        meta["ownerReferences"] = [
            {
                "apiVersion": tier.api_version,
                "kind": tier.kind,
                "name": tier.metadata.name,
                "uid": tier.metadata.uid,
                "controller": True,
                "blockOwnerDeletion": False,
            }
        ]
    return meta
