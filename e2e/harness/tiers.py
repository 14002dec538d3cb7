"""Tiers that a machine without accelerators can run.

Everything but the engine's data type, its memory and its transport is what the operator chooses: the CPU build of
vLLM, a tiny random model from a claim, and an extended resource that stands for accelerators.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.kube import Kube, wait_for

__all__ = ["ACCELERATOR", "MODEL", "VOCABULARY", "disaggregated", "engine", "remove_tiers", "tier"]

ACCELERATOR = "l4-24gb"
MODEL = "tiny"
VOCABULARY = 370
"""Token ids up to which clients draw: the models made here have 377."""

_OF_TIERS = "--selector=servingtiers.io/tier"
_PARTS = "services,serviceaccounts,roles,rolebindings,networkpolicies,poddisruptionbudgets,configmaps,leases"
_ARGUMENTS = {
    "enforce-eager": "",
    "kv-cache-memory-bytes": "32M",
    "block-size": "32",
    "distributed-executor-backend": "uni",
}
_ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def engine(
    *,
    batch: int | None = 8,
    arguments: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return engine settings of the CPU build; ``batch`` None leaves it to the tier."""
    settings: dict[str, Any] = {
        "dtype": "Float32",
        "maxModelLen": 1024,
        "extraArgs": {**_ARGUMENTS, **(arguments or {})},
        "env": {**_ENVIRONMENT, **(env or {})},
        **more,
    }
    if batch is not None:
        settings["maxNumSeqs"] = batch
    return settings


def _pool(
    replicas: tuple[int, int], settings: Mapping[str, Any], scaling: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "hardware": {"accelerators": [ACCELERATOR], "tensorParallel": 1},
        "engine": dict(settings),
        "scaling": {"minReplicas": replicas[0], "maxReplicas": replicas[1], **scaling},
    }


def tier(
    name: str,
    kind: str = "Latency",
    *,
    replicas: tuple[int, int] = (1, 1),
    batch: int | None = 8,
    scaling: Mapping[str, Any] | None = None,
    engine_settings: Mapping[str, Any] | None = None,
    cpu: str = "250m",
    cpu_limit: str | None = None,
    routers: int = 1,
    scaling_mode: str = "Auto",
    **spec: Any,
) -> dict[str, Any]:
    """Return an aggregated tier."""
    spec["scaling"] = {"mode": scaling_mode}
    return _tier(
        name,
        kind,
        {"pool": _pool(replicas, engine_settings or engine(batch=batch), scaling or {})},
        cpu,
        cpu_limit,
        routers,
        spec,
    )


def disaggregated(
    name: str,
    *,
    prefill: tuple[int, int] = (1, 1),
    decode: tuple[int, int] = (1, 1),
    routers: int = 1,
    **spec: Any,
) -> dict[str, Any]:
    """Return a tier with prefill and decode apart."""
    # Shared memory needs one memory namespace, which pods do not have: TCP alone.
    settings = engine(env={"UCX_TLS": "tcp,self"})
    pools = {"prefill": _pool(prefill, settings, {}), "decode": _pool(decode, settings, {})}
    return _tier(name, "Throughput", {"disaggregation": pools}, "250m", None, routers, spec)


def _tier(
    name: str,
    kind: str,
    pools: Mapping[str, Any],
    cpu: str,
    cpu_limit: str | None,
    routers: int,
    spec: Mapping[str, Any],
) -> dict[str, Any]:
    limits = {"memory": "3Gi", **({"cpu": cpu_limit} if cpu_limit else {})}
    return {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "metadata": {"name": name},
        "spec": {
            "tier": kind,
            "model": {
                "name": MODEL,
                "source": {"persistentVolumeClaim": {"claimName": "models", "path": MODEL}},
            },
            **pools,
            "pod": {"resources": {"requests": {"cpu": cpu, "memory": "1Gi"}, "limits": limits}},
            "router": {"replicas": routers},
            "drainTimeout": "20s",
            **spec,
        },
    }


def remove_tiers(kube: Kube) -> None:
    """Remove every tier and pool of tiers, and return when their pods are gone.

    Pods that drain do so to the end, whatever is asked of them then, and nobody needs these any more: so their owners go
    first, and then they go at once. That a tier's objects go with it is for scenario 8 to see.
    """
    kube.run("delete", "tierpools", "--all", check=False)
    for owners in ("servingtiers", "deployments", "replicasets"):
        which = "--all" if owners == "servingtiers" else _OF_TIERS
        kube.run("delete", owners, which, "--cascade=orphan", check=False)
    kube.run("delete", "pods", _OF_TIERS, "--grace-period=1", "--wait=false", check=False)
    kube.run("delete", _PARTS, _OF_TIERS, check=False)
    wait_for("tiers' pods gone", 90, lambda: not kube.listed("pods", "servingtiers.io/tier"))
