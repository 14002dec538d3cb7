"""Who may talk to whom.

vLLM's API key guards some paths only, and its KV transfer has no authentication at all, so engines are reachable
from the tier's routers and from what reads metrics, and the transfer ports only from engines of the same tier.
Probes come from the node, which a NetworkPolicy always admits. Policies select engines by their home, not by
whom they serve at the moment: a routing label never changes what may reach a pod.
"""

from __future__ import annotations

from servingtiers.api.spec import ServingTier
from servingtiers.core.config import OperatorConfig
from servingtiers.core.decisions import PoolRole
from servingtiers.core.effective import TierSettings
from servingtiers.core.state import JsonObject
from servingtiers.render import engine, names, router
from servingtiers.render.pods import metadata

__all__ = ["network_policies"]

_API_SERVER_PORTS = (443, 6443, 8443, 16443)
"""Where API servers listen, behind their Service: the common ones, of kubeadm and k3s, minikube, microk8s."""


def _tcp(*ports: int | tuple[int, int]) -> list[JsonObject]:
    return [
        {"protocol": "TCP", "port": port[0], "endPort": port[1]}
        if isinstance(port, tuple)
        else {"protocol": "TCP", "port": port}
        for port in ports
    ]


def _pods(labels: dict[str, str]) -> JsonObject:
    return {"podSelector": {"matchLabels": dict(labels)}}


def _namespace(name: str) -> JsonObject:
    """Return a selector of one namespace: by the label that the API server itself sets."""
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _metrics_readers(config: OperatorConfig) -> list[JsonObject]:
    """Return who reads metrics: the operator, and Prometheus where it is the source of telemetry or configured."""
    operator = _pods({names.NAME_LABEL: names.MANAGED_BY, names.COMPONENT_LABEL: names.OPERATOR})
    if config.operator_namespace is not None:
        # Its labels alone are no proof: anybody may set them on pods of a namespace of his own.
        operator = {**_namespace(config.operator_namespace), **operator}
    elif config.cluster_mode or config.namespaces:
        # Rendered without an operator, which may come to live in any namespace.
        operator = {"namespaceSelector": {}, **operator}
    readers = [operator]
    if config.metrics_namespace is not None:
        readers.append(_namespace(config.metrics_namespace))
    elif config.telemetry.source == "Prometheus":
        readers.append({"namespaceSelector": {}, **_pods({names.NAME_LABEL: "prometheus"})})
    return readers


def _dns() -> JsonObject:
    # 5353 is where OpenShift's DNS pods listen; the address is left open for node-local caches.
    return {
        "ports": [{"protocol": protocol, "port": port} for port in (53, 5353) for protocol in ("UDP", "TCP")]
    }


def _internet(ports: list[JsonObject]) -> JsonObject:
    """Return egress to anywhere but the cloud's metadata service, where credentials of the node are to be had."""
    return {
        "to": [
            {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.169.254/32"]}},
            {"ipBlock": {"cidr": "::/0", "except": ["fd00:ec2::254/128"]}},
        ],
        "ports": ports,
    }


def network_policies(
    tier: ServingTier, settings: TierSettings, config: OperatorConfig
) -> tuple[JsonObject, JsonObject]:
    """Return the policies of a tier's engines and of its routers."""
    disaggregated = any(pool.role is not PoolRole.AGGREGATED for pool in settings.pools)
    engines = names.engine_selector(tier)
    callers = [_pods(names.router_selector(tier))]
    targets = [_pods(engines)]
    if tier.spec.shared_pool is not None:
        # The routers of every member may come to hold an engine of this tier, and this tier's routers theirs.
        shared = names.router_labels(tier)[names.SHARED_POOL_LABEL]
        callers = [_pods({names.COMPONENT_LABEL: names.ROUTER, names.SHARED_POOL_LABEL: shared})]
        targets = [_pods({names.COMPONENT_LABEL: names.ENGINE})]

    def transfer() -> list[JsonObject]:
        return _tcp(engine.NIXL_PORT, engine.UCX_PORTS)

    engine_ingress: list[JsonObject] = [
        {"from": [*callers, *_metrics_readers(config)], "ports": _tcp(engine.PORT)}
    ]
    engine_egress: list[JsonObject] = [_dns()]
    if disaggregated:
        engine_ingress.append({"from": [_pods(engines)], "ports": transfer()})
        engine_egress.append({"to": [_pods(engines)], "ports": transfer()})
    if engine.needs_hub(tier, settings):
        engine_egress.append(_internet(_tcp(443)))

    return (
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata(
                tier,
                names.engine_network_policy(tier.metadata.name),
                names.object_labels(tier, names.ENGINE),
            ),
            "spec": {
                "podSelector": {"matchLabels": engines},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": engine_ingress,
                "egress": engine_egress,
            },
        },
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata(
                tier,
                names.router_network_policy(tier.metadata.name),
                names.object_labels(tier, names.ROUTER),
            ),
            "spec": {
                "podSelector": {"matchLabels": names.router_selector(tier)},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [
                    {"ports": _tcp(router.PORT)},
                    {"from": _metrics_readers(config), "ports": _tcp(router.METRICS_PORT)},
                ],
                "egress": [
                    _dns(),
                    _internet(_tcp(*_API_SERVER_PORTS)),
                    {"to": targets, "ports": _tcp(engine.PORT)},
                ],
            },
        },
    )
