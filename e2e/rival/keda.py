"""KEDA in the cluster by its own manifests, and the ScaledObject of vLLM production-stack's recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from harness.kube import Kube, pod_ready, wait_for

__all__ = ["NAMESPACE", "RECIPE", "install", "let_go", "remove", "scaled_object", "settled"]

NAMESPACE = "keda"
RECIPE = {"pollingInterval": 15, "cooldownPeriod": 360, "threshold": "5"}
"""What vLLM production-stack recommends: ``docs/source/use_cases/autoscaling-keda.rst``, ``tutorials/20-keda-autoscaling.md``
and the defaults of ``helm/templates/scaledobject-vllm.yaml`` agree on it."""
_API_SERVICE = "v1beta1.external.metrics.k8s.io"


def _objects(kube: Kube, manifests: Path, image: str) -> list[dict[str, Any]]:
    """Return KEDA's own objects (``config/default``) without its admission webhooks."""
    rendered = yaml.safe_load_all(kube.run("kustomize", str(manifests / "default")))
    found = [
        each
        for each in rendered
        if each
        and each["kind"] != "ValidatingWebhookConfiguration"
        and "admission" not in each["metadata"]["name"]
    ]
    for each in found:
        if each["kind"] != "Deployment":
            continue
        (container,) = each["spec"]["template"]["spec"]["containers"]
        container |= {"image": image, "imagePullPolicy": "Never"}
        if each["metadata"]["name"] == "keda-operator":
            container["args"].append("--enable-webhook-patching=false")
    return found


def _by_namespace(objects: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for each in objects:
        found.setdefault(each["metadata"].get("namespace", ""), []).append(each)
    return found


def install(kube: Kube, manifests: Path, image: str) -> float:
    """Install KEDA; return after how many seconds the API server served external metrics through it."""
    objects = _objects(kube, manifests, image)
    # What has no namespace first: the namespace itself and the definitions are among it.
    for namespace, part in sorted(_by_namespace(objects).items()):
        # ScaledJob's definition is larger than the annotation of a client-side apply may be.
        kube.run(
            *("apply", "--server-side", "--force-conflicts", "-f", "-"),
            stdin=yaml.safe_dump_all(part),
            namespace=namespace or None,
        )

    def available() -> bool:
        conditions = kube.get("apiservice", _API_SERVICE).get("status", {}).get("conditions", [])
        return any(each["type"] == "Available" and each["status"] == "True" for each in conditions)

    took = wait_for("external metrics served by KEDA", 240, available)
    pods = kube.pods("", NAMESPACE)
    return took + wait_for(
        "KEDA's pods ready", 120, lambda: pods and all(map(pod_ready, kube.pods("", NAMESPACE)))
    )


def let_go(kube: Kube) -> None:
    """Let KEDA scale nothing any more."""
    kube.run("delete", "scaledobjects.keda.sh", "--all", "--ignore-not-found", "--timeout=60s", check=False)


def remove(kube: Kube, manifests: Path, image: str) -> None:
    """Remove all of it: an aggregated API without a server would hold up the removal of namespaces."""
    objects = _objects(kube, manifests, image)
    let_go(kube)
    objects.sort(key=lambda each: each["kind"] != "APIService")
    for namespace, part in sorted(_by_namespace(objects).items()):
        kube.run(
            *("delete", "--ignore-not-found", "--wait=false", "-f", "-"),
            stdin=yaml.safe_dump_all(part),
            namespace=namespace or None,
            check=False,
        )


def scaled_object(
    deployment: str, *, query: str, prometheus: str, replicas: tuple[int, int]
) -> dict[str, Any]:
    """Return the recipe's ScaledObject of a Deployment."""
    trigger = {
        "type": "prometheus",
        "metadata": {"serverAddress": prometheus, "query": query, "threshold": RECIPE["threshold"]},
    }
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": deployment},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment},
            "minReplicaCount": replicas[0],
            "maxReplicaCount": replicas[1],
            "pollingInterval": RECIPE["pollingInterval"],
            "cooldownPeriod": RECIPE["cooldownPeriod"],
            "triggers": [trigger],
        },
    }


def settled(kube: Kube, deployment: str) -> bool:
    """Return whether the HPA that KEDA made has read the metric and found nothing to do."""
    (hpa,) = kube.listed("horizontalpodautoscalers", f"scaledobject.keda.sh/name={deployment}") or ({},)
    status = hpa.get("status", {})
    active = any(
        each["type"] == "ScalingActive" and each["status"] == "True" for each in status.get("conditions", [])
    )
    return active and "external" in json.dumps(status.get("currentMetrics") or [])
