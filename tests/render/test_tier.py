"""What holds for the objects of every tier."""

from __future__ import annotations

import json
import re

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from properties import examples
from servingtiers.core.decisions import PoolRole
from servingtiers.render import ROUTER_POOL, names, tier_objects

SLOW = settings(deadline=None, max_examples=examples(20), suppress_health_check=[HealthCheck.too_slow])


def _kind(objects, kind):
    return [obj for obj in objects if obj["kind"] == kind]


def _component(obj):
    return obj["metadata"]["labels"]["app.kubernetes.io/component"]


def _selects(selector, labels):
    return selector.items() <= labels.items()


def _template_labels(deployment):
    return deployment["spec"]["template"]["metadata"]["labels"]


def _container(deployment):
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return container


def _router_selectors(args):
    """Return the label selectors of a router's command line, by flag."""
    found = {}
    flag = None
    for arg in args:
        if arg.startswith("--"):
            flag = arg
        else:
            key, value = arg.split("=", 1)
            found.setdefault(flag, {})[key] = value
    return found


def test_every_golden_object_fits_the_strict_schema_of_kubernetes(scenario, valid):
    """Strict: an unknown field is an error."""
    assert scenario.objects
    for obj in scenario.objects:
        valid(obj)


def test_every_golden_pod_fits_the_restricted_pod_security_standard(scenario, violations):
    """Namespaces that enforce it take every pod."""
    for deployment in scenario.of_kind("Deployment"):
        assert violations(deployment["spec"]["template"]["spec"]) == []


def test_the_pod_security_check_sees_what_it_must_see(scenario, violations):
    """A check that never fails proves nothing: each loosening of a golden pod must be found."""
    spec = scenario.of_kind("Deployment")[0]["spec"]["template"]["spec"]
    loosened = [
        {**spec, "hostNetwork": True},
        {**spec, "securityContext": {}},
        {**spec, "volumes": [{"name": "host", "hostPath": {"path": "/"}}]},
        {**spec, "containers": [{**spec["containers"][0], "securityContext": {}}]},
    ]
    assert all(violations(pod) for pod in loosened)


@SLOW
@given(data=st.data())
def test_any_tier_gives_objects_that_kubernetes_takes(cases, valid, violations, data):
    """Both checks, for tiers nobody thought of."""
    for obj in data.draw(cases).objects:
        valid(obj)
        if obj["kind"] == "Deployment":
            assert violations(obj["spec"]["template"]["spec"]) == []


@SLOW
@given(data=st.data())
def test_no_two_objects_of_a_tier_share_kind_and_name(cases, data):
    """The second would overwrite the first."""
    objects = data.draw(cases).objects
    assert len({(obj["kind"], obj["metadata"]["name"]) for obj in objects}) == len(objects)


@SLOW
@given(data=st.data())
def test_every_object_is_owned_by_its_tier_in_its_namespace(cases, data):
    """Deleting the tier deletes everything, with the operator gone, too."""
    case = data.draw(cases)
    for obj in case.objects:
        meta = obj["metadata"]
        assert meta["namespace"] == case.tier.metadata.namespace
        (owner,) = meta["ownerReferences"]
        assert owner["uid"] == case.tier.metadata.uid
        assert owner["controller"] is True
        assert owner["blockOwnerDeletion"] is False
        assert meta["labels"][names.TIER_LABEL] == names.slug(case.tier.metadata.name)


@SLOW
@given(data=st.data())
def test_no_selector_but_the_routers_own_holds_a_routing_label(cases, data):
    """Or a lent engine would fall out of its Deployment, its budget or its policy."""
    for obj in data.draw(cases).objects:
        spec = json.loads(json.dumps(obj.get("spec", {})))
        if obj["kind"] == "Deployment":
            template = spec.pop("template")
            if _component(obj) == "router":
                assert not any(key.startswith(names.ROUTE_PREFIX) for key in template["metadata"]["labels"])
            spec["spread"] = template["spec"].get("topologySpreadConstraints")
        assert names.ROUTE_PREFIX not in json.dumps(spec)


@SLOW
@given(data=st.data())
def test_a_deployments_selector_is_component_tier_and_pool_alone(cases, data):
    """A selector cannot be changed, so it holds nothing that may."""
    for deployment in _kind(data.draw(cases).objects, "Deployment"):
        expected = {"app.kubernetes.io/component", "servingtiers.io/tier"}
        if _component(deployment) == "engine":
            expected.add("servingtiers.io/pool")
        selector = deployment["spec"]["selector"]["matchLabels"]
        assert set(selector) == expected
        assert _selects(selector, _template_labels(deployment))


@SLOW
@given(data=st.data())
def test_the_router_finds_every_engine_at_home_in_its_role_and_no_other(cases, data):
    """The two command lines and the pod labels are written in different modules."""
    case = data.draw(cases)
    deployments = _kind(case.objects, "Deployment")
    (router,) = [deployment for deployment in deployments if _component(deployment) == "router"]
    selectors = _router_selectors(_container(router)["args"])
    flags = {
        PoolRole.AGGREGATED: "--selector",
        PoolRole.PREFILL: "--prefill-selector",
        PoolRole.DECODE: "--decode-selector",
    }
    assert set(selectors) == {flags[pool.role] for pool in case.settings.pools}
    for pool in case.settings.pools:
        for flag, selector in selectors.items():
            name = names.engine_deployment(case.tier.metadata.name, pool.name)
            (engine,) = [deployment for deployment in deployments if deployment["metadata"]["name"] == name]
            assert _selects(selector, _template_labels(engine)) == (flag == flags[pool.role])


@SLOW
@given(data=st.data())
def test_the_router_discovers_in_its_namespace_at_the_port_the_engines_listen_on(cases, data):
    """Discovery takes one port for all pods."""
    case = data.draw(cases)
    deployments = _kind(case.objects, "Deployment")
    (router,) = [deployment for deployment in deployments if _component(deployment) == "router"]
    args = _container(router)["args"]
    assert f"--service-discovery-namespace={case.tier.metadata.namespace}" in args
    for engine in deployments:
        if _component(engine) == "engine":
            (port,) = [port for port in _container(engine)["ports"] if port["name"] == "http"]
            assert f"--service-discovery-port={port['containerPort']}" in args
            assert f"--port={port['containerPort']}" in _container(engine)["args"]


@SLOW
@given(data=st.data())
def test_each_disruption_budget_covers_the_pods_of_one_deployment(cases, data):
    """A pod under two budgets cannot be evicted at all."""
    objects = data.draw(cases).objects
    deployments = _kind(objects, "Deployment")
    budgets = _kind(objects, "PodDisruptionBudget")
    assert len(budgets) == len(deployments)
    for budget in budgets:
        covered = [
            deployment
            for deployment in deployments
            if _selects(budget["spec"]["selector"]["matchLabels"], _template_labels(deployment))
        ]
        assert [deployment["metadata"]["name"] for deployment in covered] == [budget["metadata"]["name"]]


@SLOW
@given(data=st.data())
def test_the_service_leads_to_named_ports_of_the_routers(cases, data):
    """To routers, never to engines."""
    objects = data.draw(cases).objects
    (service,) = _kind(objects, "Service")
    backing = [
        d for d in _kind(objects, "Deployment") if _selects(service["spec"]["selector"], _template_labels(d))
    ]
    (router,) = backing
    ports = {port["name"] for port in _container(router)["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert _component(router) == "router"


@SLOW
@given(data=st.data())
def test_every_volume_is_mounted_and_every_mount_has_a_volume(cases, data):
    """A mount without a volume is refused; a volume without a mount is forgotten."""
    for deployment in _kind(data.draw(cases).objects, "Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        assert {volume["name"] for volume in spec["volumes"]} == {
            mount["name"] for mount in spec["containers"][0]["volumeMounts"]
        }


@SLOW
@given(data=st.data())
def test_replicas_that_belong_to_somebody_else_are_left_out(cases, data):
    """Server-side apply would take the field from its owner."""
    case = data.draw(cases)
    for pool in case.settings.pools:
        name = names.engine_deployment(case.tier.metadata.name, pool.name)
        (deployment,) = [obj for obj in _kind(case.objects, "Deployment") if obj["metadata"]["name"] == name]
        if case.replicas[pool.name] is None:
            assert "replicas" not in deployment["spec"]
        else:
            assert deployment["spec"]["replicas"] == case.replicas[pool.name]


@SLOW
@given(data=st.data())
def test_a_rollout_surges_only_where_there_is_room_and_always_moves(cases, data):
    """Kubernetes refuses 0 and 0; a surge without a free accelerator never ends."""
    case = data.draw(cases)
    for pool in case.settings.pools:
        name = names.engine_deployment(case.tier.metadata.name, pool.name)
        (deployment,) = [obj for obj in _kind(case.objects, "Deployment") if obj["metadata"]["name"] == name]
        room = case.surge[pool.name]
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {
            "maxSurge": 1 if room else 0,
            "maxUnavailable": 0 if room else 1,
        }


@SLOW
@given(data=st.data())
def test_rendering_twice_gives_the_same_objects_that_share_no_part(cases, data):
    """Whoever annotates one object must not change another."""
    case = data.draw(cases)
    assert case.objects == case.objects
    seen = {}
    for obj in case.objects:
        stack = [obj]
        while stack:
            part = stack.pop()
            if isinstance(part, dict | list) and part:
                assert id(part) not in seen, f"{obj['kind']} shares {part}"
                seen[id(part)] = part
                stack.extend(part.values() if isinstance(part, dict) else part)


@pytest.mark.parametrize("pool", ["pool", "prefill", "decode", ROUTER_POOL])
def test_a_pinned_template_is_taken_as_it_is(scenario, pool):
    """Another operator or catalogue restarts no engine."""
    pinned = {"metadata": {"labels": {"pinned": "yes"}}, "spec": {"containers": []}}
    known = {ROUTER_POOL, *(entry.name for entry in scenario.settings.pools)}
    if pool not in known:
        return
    objects = tier_objects(
        scenario.tier, scenario.settings, scenario.replicas, scenario.config, templates={pool: pinned}
    )
    taken = [
        obj["metadata"]["name"] for obj in _kind(objects, "Deployment") if obj["spec"]["template"] == pinned
    ]
    assert [name.rsplit("-", 1)[1] for name in taken] == [pool]


def test_a_tier_without_a_uid_gives_objects_without_an_owner(scenario):
    """An owner without a uid is refused."""
    nowhere = scenario.tier.model_copy(
        update={"metadata": scenario.tier.metadata.model_copy(update={"uid": ""})}
    )
    for obj in tier_objects(nowhere, scenario.settings, scenario.replicas, scenario.config):
        assert "ownerReferences" not in obj["metadata"]


def test_permissions_come_first_and_pods_last(scenario):
    """A router that starts before its role logs errors."""
    kinds = [obj["kind"] for obj in scenario.objects]
    rank = ["ServiceAccount", "Role", "RoleBinding", "NetworkPolicy", "Service"]
    assert [kind for kind in kinds if kind in rank] == sorted((k for k in kinds if k in rank), key=rank.index)
    assert all(kinds.index("Deployment") > kinds.index(kind) for kind in rank if kind in kinds)


def test_the_hub_token_appears_by_reference_only(scenario):
    """No secret value is ever in an object."""
    text = json.dumps(scenario.objects)
    for deployment in scenario.of_kind("Deployment"):
        for variable in _container(deployment)["env"]:
            if re.search(r"TOKEN|SECRET|PASSWORD|KEY", variable["name"]):
                assert "value" not in variable
                assert "secretKeyRef" in variable["valueFrom"]
    assert not _kind(scenario.objects, "Secret")
    assert '"kind": "Secret"' not in text


def test_in_cluster_mode_the_operator_grants_nothing_but_the_bound_cluster_role(scenario):
    """It may bind one name and hold no pods of foreign namespaces."""
    roles = scenario.of_kind("Role")
    bindings = scenario.of_kind("RoleBinding")
    if scenario.config.router_service_account is not None:
        assert not roles
        assert not bindings
    elif scenario.config.cluster_mode:
        assert not roles
        assert bindings[0]["roleRef"]["name"] == names.ROUTER_CLUSTER_ROLE
        assert bindings[0]["roleRef"]["kind"] == "ClusterRole"
    else:
        assert roles[0]["rules"] == [
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
        ]
