"""What users do to tiers: each workload is a list of steps, and after each the operator settles.

The crash tests kill the operator after every single write of every workload and compare the end, and the way there,
with an undisturbed run (after Sieve, OSDI'22: most bugs show in the end state, the rest in creations and deletions).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from ring.harness import CHILDREN, Namespace, tier

Step = Callable[[Namespace, str], Any]


def create(space: Namespace, name: str) -> None:
    space.create(tier(name))


def create_disaggregated(space: Namespace, name: str) -> None:
    pools = {role: {"hardware": {"accelerators": ["h100-sxm-80gb"]}} for role in ("prefill", "decode")}
    body = tier(name, tier="Throughput", disaggregation=pools)
    del body["spec"]["pool"]
    space.create(body)


def scale(space: Namespace, name: str) -> None:
    space.patch({"spec": {"pool": {"scaling": {"minReplicas": 3}}}}, name)


def change_engine(space: Namespace, name: str) -> None:
    space.patch({"spec": {"pool": {"engine": {"maxNumSeqs": 7}}}}, name)


def change_model(space: Namespace, name: str) -> None:
    space.patch({"spec": {"model": {"name": "Qwen/Qwen2.5-7B-Instruct"}}}, name)


def split(space: Namespace, name: str) -> None:
    pools = {role: {"hardware": {"accelerators": ["h100-sxm-80gb"]}} for role in ("prefill", "decode")}
    space.patch({"spec": {"pool": None, "disaggregation": pools}}, name)


def suspend(space: Namespace, name: str) -> None:
    space.patch({"spec": {"suspend": True, "pool": {"scaling": {"minReplicas": 2}}}}, name)


def resume(space: Namespace, name: str) -> None:
    space.patch({"spec": {"suspend": False}}, name)


def lose_children(space: Namespace, name: str) -> None:
    for kind, child in (("Deployment", f"{name}-pool"), ("Service", name), ("Role", f"{name}-router")):
        space.delete(child, CHILDREN[kind])


def delete(space: Namespace, name: str) -> None:
    space.delete(name)


WORKLOADS: dict[str, tuple[Step, ...]] = {
    "create": (create,),
    "create disaggregated": (create_disaggregated,),
    "scale": (create, scale),
    "change engine and model": (create, change_engine, change_model),
    "aggregated to disaggregated": (create, split),
    "suspend and resume": (create, suspend, resume),
    "lose children": (create, lose_children),
    "create and delete": (create, delete),
}

BASIC = ("create disaggregated", "scale", "create and delete")
"""Those of the default suite whose every write is enumerated; the rest is by ``make test-crash``."""
BASIC_AFTER_CREATION = ("change engine and model",)
"""Those of the default suite that begin as ``scale`` does: there the operator dies after what follows."""

_NEVER_COMPARED = {
    "uid", "resourceVersion", "creationTimestamp", "generation", "managedFields", "clusterIP", "clusterIPs",
    "lastTransitionTime", "lastUpdateTime", "observedGeneration", "time", "deployment.kubernetes.io/revision",
    "servingtiers.io/applied-hash", "servingtiers.io/decision", "deletionTimestamp", "deletionGracePeriodSeconds",
}  # fmt: skip
_OTHERS_SAY = {"message", "replicas", "ready", "signals", "cost", "throughput", "observed", "resolution"}
_OWN_CONDITIONS = {"Accepted", "Feasible", "Conflict", "PlanOutdated", "ScalingActive", "SLOMet"}
"""The rest of a status follows the scheduler, the controllers and telemetry, at their own pace."""


def outcome(space: Namespace, name: str) -> dict[str, Any]:
    """Return the tier's status and all its objects, free of what differs from run to run."""
    found = {
        key: value
        for key, value in space.children().items()
        if value["metadata"]["labels"].get("servingtiers.io/tier") == name
        and not value["metadata"].get("deletionTimestamp")
    }
    for value in found.values():
        value.pop("status", None)
    present = [t for t in space.tiers() if t["metadata"]["name"] == name]
    document = {"objects": found, "status": [_own(t.get("status")) for t in present]}
    text = json.dumps(_plain(document)).replace(space.name, "NAMESPACE").replace(name, "TIER")
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)
    result: dict[str, Any] = json.loads(text)
    return result


def _own(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _own(inner) for key, inner in value.items() if key not in _OTHERS_SAY}
    if isinstance(value, list) and value and isinstance(value[0], dict) and "lastTransitionTime" in value[0]:
        value = [condition for condition in value if condition["type"] in _OWN_CONDITIONS]
    return [_own(inner) for inner in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if key not in _NEVER_COMPARED}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value


def trajectory(records: list[Any], space: Namespace, name: str) -> Counter[tuple[str, str, str]]:
    """Count accepted creations and deletions of each of a tier's objects."""
    return Counter(
        (record.verb, record.resource, record.name.replace(name, "TIER"))
        for record in records
        if record.verb in {"create", "delete"}
        and record.status < 300
        and record.namespace == space.name
        and record.name.startswith(name)
        and not record.resource.endswith("events")
        and record.user in {"admin", "operator"}
    )


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return where two documents differ, each as a path with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [line for key in keys for line in differences(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            line
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for line in differences(x, y, f"{path}/{i}")
        ]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"]
