"""All objects of one tier, in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from servingtiers.api.spec import ServingTier
from servingtiers.core.config import OperatorConfig
from servingtiers.core.effective import TierSettings
from servingtiers.core.state import JsonObject
from servingtiers.render import engine, names, router
from servingtiers.render.network import network_policies
from servingtiers.render.pods import metadata

__all__ = ["ROUTER_POOL", "tier_objects"]

ROUTER_POOL = "router"
"""Key of the routers in ``templates``."""

_NO_TEMPLATES: Mapping[str, JsonObject] = MappingProxyType({})
_NO_SURGE: Mapping[str, bool] = MappingProxyType({})


def _router_permissions(tier: ServingTier, config: OperatorConfig) -> list[JsonObject]:
    """Return ServiceAccount, Role and RoleBinding of the routers; none where the chart made an account."""
    if config.router_service_account is not None:
        return []
    name = tier.metadata.name
    labels = names.object_labels(tier, names.ROUTER)
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(tier, names.router_service_account(name), labels),
        "automountServiceAccountToken": False,
    }
    # An operator can only grant what it holds itself or what it may `bind`. In cluster mode it does not hold all
    # pods of all namespaces for the routers' sake: it binds one ClusterRole that the chart installs.
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": metadata(tier, names.router_role(name), labels),
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}],
    }
    reference = (
        {"kind": "ClusterRole", "name": names.ROUTER_CLUSTER_ROLE}
        if config.cluster_mode
        else {"kind": "Role", "name": names.router_role(name)}
    )
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": metadata(tier, names.role_binding(name), labels),
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", **reference},
        "subjects": [
            {
                "kind": "ServiceAccount",
                "name": names.router_service_account(name),
                "namespace": tier.metadata.namespace,
            }
        ],
    }
    return [account, binding] if config.cluster_mode else [account, role, binding]


def _service(tier: ServingTier) -> JsonObject:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(
            tier, names.service(tier.metadata.name), names.object_labels(tier, names.ROUTER)
        ),
        "spec": {
            "type": "ClusterIP",
            "selector": names.router_selector(tier),
            "ports": [
                {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP", "appProtocol": "http"},
                {
                    "name": "metrics",
                    "port": router.METRICS_PORT,
                    "targetPort": "metrics",
                    "protocol": "TCP",
                    "appProtocol": "http",
                },
            ],
        },
    }


def _disruption_budget(tier: ServingTier, component: str, pool: str, selector: dict[str, str]) -> JsonObject:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(
            tier,
            names.disruption_budget(tier.metadata.name, pool),
            names.object_labels(tier, component, pool if component == names.ENGINE else None),
        ),
        "spec": {
            # Not minAvailable: with one replica that would hold up every node drain for ever.
            "maxUnavailable": 1,
            "selector": {"matchLabels": dict(selector)},
            # A pod that is not ready serves nobody: it must not hold up a drain either.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def _deployment(
    tier: ServingTier,
    *,
    name: str,
    labels: dict[str, str],
    selector: dict[str, str],
    template: JsonObject,
    replicas: int | None,
    surge: bool,
    at_once: bool = False,
    progress_deadline_seconds: int,
) -> JsonObject:
    spec: JsonObject = {
        "selector": {"matchLabels": selector},
        "template": template,
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": (
                {"maxSurge": 1, "maxUnavailable": 0}
                if surge
                else {"maxSurge": 0, "maxUnavailable": "100%" if at_once else 1}
            ),
        },
        "minReadySeconds": 5,
        "progressDeadlineSeconds": progress_deadline_seconds,
        "revisionHistoryLimit": 3,
    }
    if replicas is not None:
        spec["replicas"] = replicas
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(tier, name, labels),
        "spec": spec,
    }


def tier_objects(
    tier: ServingTier,
    settings: TierSettings,
    replicas: Mapping[str, int | None],
    config: OperatorConfig,
    *,
    templates: Mapping[str, JsonObject] = _NO_TEMPLATES,
    surge: Mapping[str, bool] = _NO_SURGE,
    at_once: Collection[str] = (),
) -> tuple[JsonObject, ...]:
    """Return all objects of a tier in apply order: permissions and policies before the pods that need them.

    Args:
        tier: The tier.
        settings: What was chosen for it.
        replicas: Replicas by pool name. None leaves ``spec.replicas`` out: it belongs to somebody else.
        config: The operator's configuration.
        templates: Pinned pod templates by pool name (``router`` for the routers) that replace the rendered ones,
            so that another operator or catalogue restarts no engine.
        surge: Whether a pool has room for an engine more during a rollout; without it an old engine goes before
            its successor comes, because a surge that waits for an accelerator never ends.
        at_once: Pools of which all replicas may be replaced at the same time, because none of them serves or starts.

    Raises:
        KeyError: ``replicas`` lacks a pool.
        ValueError: A pool has arguments that its engine version does not take.
    """
    objects: list[JsonObject] = [
        *_router_permissions(tier, config),
        *network_policies(tier, settings, config),
        _service(tier),
    ]
    name = tier.metadata.name
    for pool in settings.pools:
        selector = names.engine_selector(tier, pool.name)
        objects.append(_disruption_budget(tier, names.ENGINE, pool.name, selector))
        template = templates.get(pool.name)
        objects.append(
            _deployment(
                tier,
                name=names.engine_deployment(name, pool.name),
                labels=names.object_labels(tier, names.ENGINE, pool.name),
                selector=selector,
                template=engine.pod_template(tier, settings, pool, config) if template is None else template,
                replicas=replicas[pool.name],
                surge=surge.get(pool.name, False),
                at_once=pool.name in at_once,
                # Beyond the startup probe's own limit, with time for the image: a slow download is progress.
                progress_deadline_seconds=engine.STARTUP_SECONDS + 900,
            )
        )
    objects.append(_disruption_budget(tier, names.ROUTER, ROUTER_POOL, names.router_selector(tier)))
    template = templates.get(ROUTER_POOL)
    objects.append(
        _deployment(
            tier,
            name=names.router_deployment(name),
            labels=names.object_labels(tier, names.ROUTER),
            selector=names.router_selector(tier),
            template=router.router_template(tier, settings, config) if template is None else template,
            replicas=tier.spec.router.replicas,
            surge=True,
            # Routers are ready when an engine is.
            progress_deadline_seconds=engine.STARTUP_SECONDS + 900,
        )
    )
    return tuple(objects)
