"""Router pods: discovery, probes, thresholds."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from properties import examples
from servingtiers.api.spec import PoolScaling, SharedPoolRef
from servingtiers.catalog.engine_flags import router_flag_names
from servingtiers.core.config import OperatorConfig
from servingtiers.core.effective import pools_asked
from servingtiers.render import router, router_args, router_template

SLOW = settings(deadline=None, max_examples=examples(20), suppress_health_check=[HealthCheck.too_slow])


def _flags(args):
    return {arg[2:].partition("=")[0]: arg.partition("=")[2] for arg in args if arg.startswith("--")}


def _container(case):
    (container,) = router_template(case.tier, case.settings, case.config)["spec"]["containers"]
    return container


@SLOW
@given(data=st.data())
def test_every_flag_is_one_of_vllm_routers(cases, data):
    """The names were recorded from ``vllm-router --help``."""
    case = data.draw(cases)
    args = router_args(case.tier, case.settings)
    assert set(_flags(args)) <= router_flag_names()


@SLOW
@given(data=st.data())
def test_lists_of_labels_come_last(cases, data):
    """A flag that takes a list takes everything up to the next flag."""
    case = data.draw(cases)
    args = router_args(case.tier, case.settings)
    first = next(place for place, arg in enumerate(args) if arg.endswith("selector"))
    assert all(arg.endswith("selector") or arg.startswith("route.servingtiers.io/") for arg in args[first:])


@SLOW
@given(data=st.data())
def test_the_router_may_take_the_timeout_and_the_pod_outlives_its_drain(cases, data):
    """Whole seconds, at least one."""
    case = data.draw(cases)
    timeout = int(_flags(router_args(case.tier, case.settings))["request-timeout-secs"])
    assert timeout >= max(1, case.settings.request_timeout_seconds)
    spec = router_template(case.tier, case.settings, case.config)["spec"]
    sleep = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > sleep + case.settings.drain_seconds


@SLOW
@given(data=st.data())
def test_metrics_are_where_the_pod_says_they_are(cases, data):
    """The program's default is the loopback address, where nothing can scrape it."""
    case = data.draw(cases)
    container = _container(case)
    flags = _flags(container["args"])
    assert flags["prometheus-host"] == "$(POD_IP)"
    assert {
        "name": "POD_IP",
        "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}},
    } in (container["env"])
    assert {
        "name": "metrics",
        "containerPort": int(flags["prometheus-port"]),
        "protocol": "TCP",
    } in container["ports"]


@pytest.mark.parametrize(
    ("folder", "path"),
    [
        ("latency-minimal", "/readiness"),
        ("image-source", "/liveness"),
        ("external-mode", "/liveness"),
        ("throughput-disaggregated-nixl", "/readiness"),
    ],
)
def test_a_tier_that_may_rest_at_zero_takes_the_request_that_wakes_it(folder, path, load):
    """/readiness is 503 without an engine: such routers would get no request at all."""
    container = _container(load(folder))
    assert container["readinessProbe"]["httpGet"]["path"] == path
    assert container["livenessProbe"]["httpGet"]["path"] == "/liveness"


@pytest.mark.parametrize(("keep", "rests"), [(0, True), (1, False)])
def test_a_tier_that_may_lend_all_its_engines_may_rest_at_zero(keep, rests, load):
    tier = load("balanced-pvc").tier
    shared = SharedPoolRef(name="llama", min_keep=keep)
    member = tier.model_copy(update={"spec": tier.spec.model_copy(update={"shared_pool": shared})})
    assert router.may_rest_at_zero(member) is rests


@pytest.mark.parametrize(("batch", "threshold"), [(1, 1), (4, 2), (8, 4), (128, 64), (1024, 64)])
def test_cache_awareness_yields_before_an_engine_overfills(batch, threshold, load):
    """The program's threshold of 64 makes a hot spot of an engine whose whole batch is 8."""
    case = load("balanced-pvc")
    pool = dataclasses.replace(case.settings.pools[0], max_num_seqs=batch)
    chosen = dataclasses.replace(case.settings, pools=(pool,))
    assert _flags(router_args(case.tier, chosen))["balance-abs-threshold"] == str(threshold)


def test_other_policies_have_no_cache_threshold(load):
    """It means nothing to them."""
    case = load("latency-minimal")
    assert "balance-abs-threshold" not in _flags(router_args(case.tier, case.settings))


@pytest.mark.parametrize("most", [None, 64])
def test_shedding_is_no_failure_of_the_engine(most, load):
    """Ten 503s open the router's breaker for a minute: a flood would take the engine from those it still serves."""
    case = load("latency-minimal")
    pool = dataclasses.replace(case.settings.pools[0], max_queued_requests=most)
    chosen = dataclasses.replace(case.settings, pools=(pool,))
    assert ("disable-circuit-breaker" in _flags(router_args(case.tier, chosen))) is (most is not None)


def test_disaggregation_is_told_to_the_router(load):
    """In its other mode it would send whole requests to prefill engines."""
    flags = _flags(
        router_args(
            load("throughput-disaggregated-nixl").tier, load("throughput-disaggregated-nixl").settings
        )
    )
    assert "vllm-pd-disaggregation" in flags
    assert flags["kv-connector"] == "nixl"
    assert flags["policy"] == "round_robin"
    plain = load("latency-minimal")
    assert "vllm-pd-disaggregation" not in _flags(router_args(plain.tier, plain.settings))


def test_the_tiers_resources_come_before_the_operators_and_those_before_the_default(load):
    """The nearest to the user wins."""
    own, plain = load("balanced-pvc"), load("latency-minimal")
    configured = OperatorConfig.model_validate({"routerResources": {"requests": {"cpu": "3"}}})
    assert _container(own)["resources"]["requests"]["cpu"] == "1"
    template = router_template(plain.tier, plain.settings, configured)
    assert template["spec"]["containers"][0]["resources"] == {"requests": {"cpu": "3"}}
    assert "memory" in _container(plain)["resources"]["limits"]


def test_a_configured_account_is_used_by_name(load):
    """In namespaced mode the chart makes one for all routers of the namespace."""
    case = load("tp4-fp8-spec")
    spec = router_template(case.tier, case.settings, case.config)["spec"]
    assert spec["serviceAccountName"] == "servingtiers-router"
    assert spec["automountServiceAccountToken"] is True


def test_the_router_listens_where_its_service_leads(load):
    """One port for clients, one for metrics."""
    container = _container(load("latency-minimal"))
    assert f"--port={router.PORT}" in container["args"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {
        "http": router.PORT,
        "metrics": router.METRICS_PORT,
    }


@SLOW
@given(data=st.data())
def test_of_the_scaling_only_whether_the_tier_may_rest_at_zero_reaches_the_routers(cases, data):
    """Who pins the routers' template may leave the rest of the scaling out of its reckoning, and not this."""
    case = data.draw(cases)
    pools = pools_asked(case.tier.spec)
    raised = [
        pool.spec.model_copy(update={"scaling": PoolScaling(min_replicas=1, max_replicas=9)})
        for pool in pools
    ]
    spec = case.tier.spec
    if spec.disaggregation is not None:
        parts = spec.disaggregation.model_copy(update={"prefill": raised[0], "decode": raised[1]})
        spec = spec.model_copy(update={"disaggregation": parts})
    else:
        spec = spec.model_copy(update={"pool": raised[0]})
    other = case.tier.model_copy(update={"spec": spec})
    same = router_template(other, case.settings, case.config) == router_template(
        case.tier, case.settings, case.config
    )
    assert not router.may_rest_at_zero(other)
    assert same == (not router.may_rest_at_zero(case.tier))
