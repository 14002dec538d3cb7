"""NetworkPolicies, judged as a network plugin judges them."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
import yaml

from servingtiers.core.config import OperatorConfig
from servingtiers.handlers import Options, _in_place
from servingtiers.render import engine, names, router, tier_objects

OPERATOR = {"app.kubernetes.io/name": "servingtiers", "app.kubernetes.io/component": "operator"}
STRANGER = {"app": "curl"}


def _matches(selector, labels):
    return selector.get("matchLabels", {}).items() <= labels.items()


def _peer(peer, labels, namespace, home):
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        if not _matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}):
            return False
    elif namespace != home:
        return False
    return _matches(peer.get("podSelector", {}), labels)


def _port(rule, port, protocol="TCP"):
    return "ports" not in rule or any(
        entry["protocol"] == protocol and entry["port"] <= port <= entry.get("endPort", entry["port"])
        for entry in rule["ports"]
    )


def _policies(case, labels):
    policies = [obj for obj in case.objects if obj["kind"] == "NetworkPolicy"]
    return [policy for policy in policies if _matches(policy["spec"]["podSelector"], labels)]


def _may_enter(case, labels, source, port, namespace=None):
    """Return whether a pod may open a connection to a pod of the tier."""
    home = case.tier.metadata.namespace
    selected = _policies(case, labels)
    assert selected, "a pod that no policy selects is open to everyone"
    return any(
        _port(rule, port)
        and ("from" not in rule or any(_peer(peer, source, namespace or home, home) for peer in rule["from"]))
        for policy in selected
        for rule in policy["spec"]["ingress"]
    )


def _may_leave(case, labels, port, *, address=None, target=None):
    """Return whether a pod of the tier may connect to an address, or to a pod of its namespace."""
    home = case.tier.metadata.namespace

    def reaches(peer):
        if address is not None and "ipBlock" in peer:
            block = peer["ipBlock"]
            inside = ipaddress.ip_address(address) in ipaddress.ip_network(block["cidr"])
            return inside and not any(
                ipaddress.ip_address(address) in ipaddress.ip_network(hole)
                for hole in block.get("except", [])
            )
        return target is not None and _peer(peer, target, home, home)

    return any(
        _port(rule, port) and ("to" not in rule or any(reaches(peer) for peer in rule["to"]))
        for policy in _policies(case, labels)
        for rule in policy["spec"]["egress"]
    )


def _engine_labels(case, index=0):
    pool = case.settings.pools[index]
    return names.engine_labels(
        case.tier, pool.name, pool.role, served_name=case.settings.served_name, accelerator=pool.accelerator
    )


def test_engines_take_requests_from_their_routers_and_from_no_stranger(scenario):
    """The API key of vLLM guards some paths only: who reaches the port may use the engine."""
    labels = _engine_labels(scenario)
    assert _may_enter(scenario, labels, names.router_labels(scenario.tier), engine.PORT)
    assert not _may_enter(scenario, labels, STRANGER, engine.PORT)
    assert not _may_enter(scenario, labels, STRANGER, engine.PORT, namespace="elsewhere")
    assert not _may_enter(
        scenario, labels, names.router_labels(scenario.tier), engine.PORT, namespace="elsewhere"
    )


def test_routers_reach_what_they_must(scenario):
    """Engines, the API server behind its usual ports, and DNS; not the cloud's metadata service."""
    labels = names.router_labels(scenario.tier)
    assert _may_leave(scenario, labels, engine.PORT, target=_engine_labels(scenario))
    assert _may_leave(scenario, labels, 6443, address="10.0.0.1")
    assert _may_leave(scenario, labels, 53, address="10.96.0.10")
    assert not _may_leave(scenario, labels, 443, address="169.254.169.254")


def test_clients_reach_the_router_and_only_readers_its_metrics(scenario):
    """The tier's endpoint is open; what it says of itself is not."""
    labels = names.router_labels(scenario.tier)
    assert _may_enter(scenario, labels, STRANGER, router.PORT, namespace="elsewhere")
    assert not _may_enter(scenario, labels, STRANGER, router.METRICS_PORT)
    assert _may_enter(scenario, labels, OPERATOR, router.METRICS_PORT)


@pytest.mark.parametrize("port", [engine.NIXL_PORT, *engine.UCX_PORTS])
def test_the_transfer_ports_open_inside_a_disaggregated_tier_only(port, scenario):
    """NIXL asks nobody for a password."""
    labels = _engine_labels(scenario)
    peer = _engine_labels(scenario, -1)
    disaggregated = scenario.tier.spec.disaggregation is not None
    assert _may_enter(scenario, labels, peer, port) == disaggregated
    assert _may_leave(scenario, peer, port, target=labels) == disaggregated
    assert not _may_enter(scenario, labels, {**peer, names.TIER_LABEL: "another"}, port)
    assert not _may_enter(scenario, labels, names.router_labels(scenario.tier), port)


def test_an_engine_keeps_its_policy_while_it_is_lent(scenario):
    """Policies go by the home, which no routing label changes."""
    lent = {**_engine_labels(scenario), names.ROUTE_TIER_LABEL: "borrower"}
    assert _policies(scenario, lent) == _policies(scenario, _engine_labels(scenario))


def test_engines_reach_the_hub_only_when_something_is_to_be_downloaded(scenario):
    """An engine with its weights at hand has nothing to say to the world."""
    hub = engine.needs_hub(scenario.tier, scenario.settings)
    labels = _engine_labels(scenario)
    assert _may_leave(scenario, labels, 443, address="203.0.113.7") == hub
    assert not _may_leave(scenario, labels, 443, address="169.254.169.254")
    assert not _may_leave(scenario, labels, 80, address="203.0.113.7")


@pytest.mark.parametrize(
    ("config", "namespace", "labels", "reads"),
    [
        ({}, "llm", OPERATOR, True),
        ({}, "system", OPERATOR, False),
        ({"clusterMode": True}, "system", OPERATOR, True),
        ({"namespaces": ["llm", "other"]}, "system", OPERATOR, True),
        ({}, "monitoring", {"app.kubernetes.io/name": "prometheus"}, False),
        (
            {"telemetry": {"source": "Prometheus"}},
            "monitoring",
            {"app.kubernetes.io/name": "prometheus"},
            True,
        ),
        ({"telemetry": {"source": "Prometheus"}}, "monitoring", STRANGER, False),
        ({"metricsNamespace": "monitoring"}, "monitoring", STRANGER, True),
        ({"metricsNamespace": "monitoring"}, "elsewhere", {"app.kubernetes.io/name": "prometheus"}, False),
    ],
)
def test_metrics_are_read_by_the_operator_and_by_the_configured_prometheus(
    config, namespace, labels, reads, load
):
    """Metrics share the port of the API, so whoever reads them could also ask."""
    case = load("latency-minimal", config)
    assert _may_enter(case, _engine_labels(case), labels, engine.PORT, namespace=namespace) == reads
    assert (
        _may_enter(case, names.router_labels(case.tier), labels, router.METRICS_PORT, namespace=namespace)
        == reads
    )


@pytest.mark.parametrize("mode", [{}, {"clusterMode": True}, {"namespaces": ["llm", "other"]}])
def test_only_the_operators_own_namespace_holds_an_operator(mode, load):
    """In every mode, with the configuration that runs: its two labels can be set by anybody in a namespace of his own."""
    running = _in_place(Options(config=OperatorConfig.model_validate(mode), namespace="system"))
    case = load("latency-minimal", running.model_dump(mode="json", by_alias=True))
    for labels, port in (
        (_engine_labels(case), engine.PORT),
        (names.router_labels(case.tier), router.METRICS_PORT),
    ):
        assert _may_enter(case, labels, OPERATOR, port, namespace="system")
        assert not _may_enter(case, labels, OPERATOR, port, namespace="llm")
        assert not _may_enter(case, labels, OPERATOR, port, namespace="elsewhere")
        assert not _may_enter(case, labels, STRANGER, port, namespace="system")


def test_an_operator_in_the_tiers_own_namespace_reads_metrics(load):
    """The default installation."""
    running = _in_place(Options(config=OperatorConfig(), namespace="llm"))
    case = load("latency-minimal", running.model_dump(mode="json", by_alias=True))
    assert _may_enter(case, _engine_labels(case), OPERATOR, engine.PORT)
    assert not _may_enter(case, _engine_labels(case), OPERATOR, engine.PORT, namespace="elsewhere")


def test_the_prometheus_of_the_monitoring_example_reads_engines_and_routers(load):
    """What the PodMonitors of these values ask for is let in."""
    folder = Path(__file__).parents[2] / "charts/servingtiers/ci"
    values = yaml.safe_load((folder / "monitoring-values.yaml").read_text())
    assert values["metrics"]["podMonitor"]["enabled"]
    case = load("latency-minimal", values.get("config", {}))
    assert _may_enter(case, _engine_labels(case), STRANGER, engine.PORT, namespace="monitoring")
    labels = names.router_labels(case.tier)
    assert _may_enter(case, labels, STRANGER, router.METRICS_PORT, namespace="monitoring")


def test_members_of_a_shared_pool_reach_one_anothers_engines(load):
    """A borrower's routers serve from engines that are at home elsewhere."""
    lender = load("tp4-fp8-spec")
    borrower_tier = lender.tier.model_copy(
        update={"metadata": lender.tier.metadata.model_copy(update={"name": "borrower"})}
    )
    outsider_tier = borrower_tier.model_copy(
        update={"spec": borrower_tier.spec.model_copy(update={"shared_pool": None})}
    )
    engines = _engine_labels(lender)
    assert _may_enter(lender, engines, names.router_labels(borrower_tier), engine.PORT)
    assert not _may_enter(lender, engines, names.router_labels(outsider_tier), engine.PORT)
    objects = tier_objects(borrower_tier, lender.settings, lender.replicas, lender.config)
    (policy,) = [
        obj
        for obj in objects
        if obj["metadata"]["name"] == "borrower-router" and obj["kind"] == "NetworkPolicy"
    ]
    (rule,) = [rule for rule in policy["spec"]["egress"] if _port(rule, engine.PORT)]
    assert any(_peer(peer, engines, "llm", "llm") for peer in rule["to"])
