"""Router pods: vllm-router with Kubernetes discovery.

Flag names are those of vllm-router 0.1.17; a test holds every one of them against its recorded ``--help``. The
router lists all pods of its namespace and matches labels itself, so it needs to read pods and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from servingtiers.api.spec import ResourceList, RouterPolicy, ScalingMode, ServingTier
from servingtiers.core.config import OperatorConfig
from servingtiers.core.decisions import PoolRole
from servingtiers.core.effective import TierSettings, pools_asked
from servingtiers.core.state import JsonObject
from servingtiers.render import engine, names
from servingtiers.render.pods import container_security, environment, from_pod_field, pod_security

__all__ = ["CONTAINER", "METRICS_PORT", "PORT", "may_rest_at_zero", "router_args", "router_template"]

CONTAINER = "router"
PORT = 8000
"""Port of the OpenAI API."""
METRICS_PORT = 29_000
"""Port of the router's metrics."""
_PRESTOP_SECONDS = 5
"""Until every node has taken a stopping router out of the Service."""
_HEALTH_INTERVAL_SECONDS = 5
_DEFAULT_RESOURCES = ResourceList(requests={"cpu": "250m", "memory": "256Mi"}, limits={"memory": "2Gi"})


def _selector(labels: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in labels.items()]


def _discovery(tier: ServingTier, settings: TierSettings) -> list[str]:
    arguments: list[str] = []
    for pool in settings.pools:
        match pool.role:
            case PoolRole.AGGREGATED:
                arguments.append("--selector")
            case PoolRole.PREFILL:
                arguments.append("--prefill-selector")
            case PoolRole.DECODE:
                arguments.append("--decode-selector")
        arguments.extend(_selector(names.routing_labels(tier, pool.role)))
    return arguments


def router_args(tier: ServingTier, settings: TierSettings) -> tuple[str, ...]:
    """Return the arguments after ``vllm-router``."""
    disaggregated = any(pool.role is not PoolRole.AGGREGATED for pool in settings.pools)
    flags: dict[str, str | int] = {
        "host": "0.0.0.0",  # noqa: S104 - a pod's own network; the NetworkPolicy says who reaches it
        "port": PORT,
        "policy": settings.router_policy,
        "service-discovery-namespace": tier.metadata.namespace,
        "service-discovery-port": engine.PORT,
        "request-timeout-secs": max(1, math.ceil(settings.request_timeout_seconds)),
        # The default of 60 s routes to a dead engine for minutes.
        "health-check-interval-secs": _HEALTH_INTERVAL_SECONDS,
        # Adding an engine holds the discovery loop until the engine answers: for 10 minutes by default.
        "worker-startup-timeout-secs": 30,
        "worker-startup-check-interval": 1,
        "prometheus-host": "$(POD_IP)",
        "prometheus-port": METRICS_PORT,
    }
    if settings.router_policy == RouterPolicy.CACHE_AWARE:
        # The router prefers the warm cache until one engine is this many requests ahead of another. Its default
        # of 64 overfills an engine whose whole batch is smaller: half a batch keeps the queue off the hot one.
        batch = min(pool.max_num_seqs for pool in settings.pools)
        flags["balance-abs-threshold"] = max(1, min(64, batch // 2))
    switches = ["--service-discovery"]
    if disaggregated:
        switches.append("--vllm-pd-disaggregation")
        flags["kv-connector"] = "nixl"
    if any(pool.max_queued_requests is not None for pool in settings.pools):
        # An engine that sheds answers 503. The breaker takes ten of them for a broken engine and sends it nothing for a
        # minute: a short flood would be an outage. Engines that are gone are found by the health checks.
        switches.append("--disable-circuit-breaker")
    return (
        *switches,
        *(f"--{name}={value}" for name, value in flags.items()),
        # These take the following arguments as their list, so they come last.
        *_discovery(tier, settings),
    )


def may_rest_at_zero(tier: ServingTier) -> bool:
    """Return whether the tier may rest at zero engines: by its own scaling, by somebody else's, or by lending them all.

    The one thing of a tier's scaling that the routers' pod template depends on: a pin of it must not outlive a
    change of this.
    """
    shared = tier.spec.shared_pool
    return (
        tier.spec.scaling.mode is ScalingMode.EXTERNAL
        or (shared is not None and shared.min_keep == 0)
        or any(pool.spec.scaling.min_replicas == 0 for pool in pools_asked(tier.spec))
    )


def router_template(tier: ServingTier, settings: TierSettings, config: OperatorConfig) -> JsonObject:
    """Return the pod template of the routers."""
    # /readiness is 503 while no engine is there. A tier that may rest at zero has to take the request that wakes
    # it, so its routers are ready as soon as they live.
    readiness = "/liveness" if may_rest_at_zero(tier) else "/readiness"
    resources = tier.spec.router.resources or config.router_resources or _DEFAULT_RESOURCES
    account = config.router_service_account or names.router_service_account(tier.metadata.name)
    options = tier.spec.pod
    spec: JsonObject = {
        "enableServiceLinks": False,
        "serviceAccountName": account,
        "automountServiceAccountToken": True,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": _PRESTOP_SECONDS + math.ceil(settings.drain_seconds) + 10,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": names.router_selector(tier)},
                "matchLabelKeys": ["pod-template-hash"],
            }
        ],
        "containers": [
            {
                "name": CONTAINER,
                "image": settings.router_image,
                "command": ["vllm-router"],
                "args": list(router_args(tier, settings)),
                "env": [from_pod_field("POD_IP", "status.podIP"), *environment({"HOME": "/tmp"})],  # noqa: S108 - a volume of the pod alone
                "ports": [
                    {"name": "http", "containerPort": PORT, "protocol": "TCP"},
                    {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
                ],
                "resources": resources.model_dump(by_alias=True, exclude_none=True),
                "startupProbe": {
                    "httpGet": {"path": "/liveness", "port": "http"},
                    "periodSeconds": 1,
                    "timeoutSeconds": 2,
                    "failureThreshold": 120,
                },
                "readinessProbe": {
                    "httpGet": {"path": readiness, "port": "http"},
                    "periodSeconds": 2,
                    "timeoutSeconds": 2,
                    "failureThreshold": 3,
                },
                "livenessProbe": {
                    "httpGet": {"path": "/liveness", "port": "http"},
                    "periodSeconds": 10,
                    "timeoutSeconds": 5,
                    "failureThreshold": 3,
                },
                "lifecycle": {"preStop": {"sleep": {"seconds": _PRESTOP_SECONDS}}},
                "securityContext": container_security(),
                "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 - a volume of the pod alone
            }
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }
    if options is not None and options.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret.name} for secret in options.image_pull_secrets]
    return {
        "metadata": {
            "labels": names.router_labels(tier),
            "annotations": {"kubectl.kubernetes.io/default-container": CONTAINER},
        },
        "spec": spec,
    }
