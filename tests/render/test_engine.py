"""Engine pods: the command line of vLLM, its environment, its volumes, how it starts and ends."""

from __future__ import annotations

import dataclasses
import json
import re

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from properties import examples
from servingtiers.catalog.engine_flags import engine_flag_names
from servingtiers.catalog.names import CatalogError
from servingtiers.core.decisions import PoolRole
from servingtiers.render import engine, engine_args, pod_template

SLOW = settings(deadline=None, max_examples=examples(20), suppress_health_check=[HealthCheck.too_slow])


def _template(case, pool):
    return pod_template(case.tier, case.settings, pool, case.config)


def _container(case, pool):
    (container,) = _template(case, pool)["spec"]["containers"]
    return container


def _flags(args):
    """Return flag to value of a command line; a switch has None."""
    return {arg[2:].partition("=")[0]: arg.partition("=")[2] or None for arg in args if arg.startswith("--")}


def _env(container):
    return {entry["name"]: entry for entry in container["env"]}


def _with_pool(case, **changes):
    pool = dataclasses.replace(case.settings.pools[0], **changes)
    return pool, dataclasses.replace(case.settings, pools=(pool, *case.settings.pools[1:]))


@SLOW
@given(data=st.data())
def test_every_flag_is_one_of_the_engines_version(cases, data):
    """The names were recorded from ``vllm serve --help=all``."""
    case = data.draw(cases)
    for pool in case.settings.pools:
        flags = _flags(engine_args(case.tier, case.settings, pool))
        assert flags
        assert set(flags) <= engine_flag_names(pool.engine_version)


def test_every_flag_of_the_golden_engines_is_one_of_their_version(scenario):
    """Golden tiers use what drawn ones may miss."""
    for pool in scenario.settings.pools:
        args = engine_args(scenario.tier, scenario.settings, pool)
        assert set(_flags(args)) <= engine_flag_names(pool.engine_version)


@SLOW
@given(data=st.data())
def test_the_command_is_a_list_and_no_shell(cases, data):
    """No value of a custom resource is ever interpreted: the model comes first, every flag is one argument."""
    case = data.draw(cases)
    for pool in case.settings.pools:
        container = _container(case, pool)
        assert container["command"] == ["vllm", "serve"]
        assert not container["args"][0].startswith("-")
        assert all(isinstance(arg, str) for arg in container["args"])


@SLOW
@given(data=st.data())
def test_no_flag_is_given_twice(cases, data):
    """The last one would win, and which is last is an accident."""
    case = data.draw(cases)
    for pool in case.settings.pools:
        flags = [
            a[2:].partition("=")[0] for a in engine_args(case.tier, case.settings, pool) if a.startswith("--")
        ]
        assert len(flags) == len(set(flags))


@SLOW
@given(data=st.data())
def test_a_pod_outlives_its_pre_stop_sleep_and_its_drain(cases, data):
    """Or the kubelet kills requests that the drain was to save."""
    case = data.draw(cases)
    for pool in case.settings.pools:
        template = _template(case, pool)
        (container,) = template["spec"]["containers"]
        sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain = int(_flags(container["args"])["shutdown-timeout"])
        assert drain >= case.settings.drain_seconds
        assert template["spec"]["terminationGracePeriodSeconds"] > sleep + drain


@SLOW
@given(data=st.data())
def test_whoever_gives_kv_blocks_outlasts_their_lease(cases, data):
    """An engine does not wait for transfers at shutdown: decode would ask an engine that is gone."""
    case = data.draw(cases)
    elastic = case.tier.spec.disaggregation is not None and case.tier.spec.disaggregation.elastic_roles
    for pool in case.settings.pools:
        sleep = _container(case, pool)["lifecycle"]["preStop"]["sleep"]["seconds"]
        gives = pool.role is PoolRole.PREFILL or (elastic and pool.role is PoolRole.DECODE)
        assert (sleep > engine.KV_LEASE_SECONDS) == gives


@SLOW
@given(data=st.data())
def test_an_engine_gets_as_many_accelerators_as_it_is_parallel(cases, data):
    """Whatever a user's resources say; extended resources need request and limit to be equal."""
    case = data.draw(cases)
    for pool in case.settings.pools:
        resources = _container(case, pool)["resources"]
        wanted = str(pool.tensor_parallel)
        assert resources["requests"][pool.binding.resource] == wanted
        assert resources["limits"][pool.binding.resource] == wanted
        assert _flags(engine_args(case.tier, case.settings, pool))["tensor-parallel-size"] == wanted


@SLOW
@given(data=st.data())
def test_scaling_and_joining_a_shared_pool_restart_no_engine(cases, data):
    """The pod template depends on neither."""
    case = data.draw(cases)
    if case.tier.spec.pool is None:
        return
    spec = case.tier.spec
    scaled = spec.pool.model_copy(
        update={"scaling": spec.pool.scaling.model_copy(update={"max_replicas": 999})}
    )
    other = case.tier.model_copy(
        update={"spec": spec.model_copy(update={"pool": scaled, "shared_pool": None})}
    )
    for pool in case.settings.pools:
        assert pod_template(other, case.settings, pool, case.config) == _template(case, pool)


@SLOW
@given(data=st.data())
def test_disaggregated_engines_and_no_others_are_wired_for_transfer(cases, data):
    """Side channel on the pod's own address, ports that the NetworkPolicy names."""
    case = data.draw(cases)
    for pool in case.settings.pools:
        container = _container(case, pool)
        environment = _env(container)
        transfer = _flags(container["args"]).get("kv-transfer-config")
        if pool.role is PoolRole.AGGREGATED:
            assert transfer is None
            assert not any(name.startswith("VLLM_NIXL") for name in environment)
            continue
        assert json.loads(transfer)["kv_connector"] == "NixlConnector"
        host = environment["VLLM_NIXL_SIDE_CHANNEL_HOST"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert host == "status.podIP"
        port = int(environment["VLLM_NIXL_SIDE_CHANNEL_PORT"]["value"])
        assert port in {entry["containerPort"] for entry in container["ports"]}
        assert environment["UCX_TCP_PORT_RANGE"]["value"] == "{}-{}".format(*engine.UCX_PORTS)


@pytest.mark.parametrize(
    ("folder", "roles"),
    [
        ("throughput-disaggregated-nixl", ["kv_producer", "kv_consumer"]),
        ("elastic-roles-cluster-mode", ["kv_both", "kv_both"]),
    ],
)
def test_roles_of_the_transfer_are_fixed_unless_roles_are_elastic(folder, roles, load):
    """An engine that may change its role must be able to give and to take."""
    case = load(folder)
    found = []
    for pool in case.settings.pools:
        flags = _flags(engine_args(case.tier, case.settings, pool))
        found.append(json.loads(flags["kv-transfer-config"])["kv_role"])
    assert found == roles


def test_on_a_cpu_engine_kv_blocks_are_buffered_in_host_memory(load):
    """The default is the memory of a GPU."""
    case = load("throughput-disaggregated-nixl")
    pool, chosen = _with_pool(case, env={"VLLM_TARGET_DEVICE": "cpu"})
    flags = _flags(engine_args(case.tier, chosen, pool))
    assert json.loads(flags["kv-transfer-config"])["kv_buffer_device"] == "cpu"


def test_a_user_may_choose_the_transport_but_not_the_ports_or_the_home(load):
    """NetworkPolicy and probes rest on what the operator sets."""
    decode = _env(_container(case := load("throughput-disaggregated-nixl"), case.settings.pools[1]))
    assert decode["UCX_TLS"]["value"] == "rc,cuda_copy,tcp"
    assert decode["UCX_TCP_PORT_RANGE"]["value"] == "20000-20999"
    private = _env(_container(case := load("private-hf-token-cache"), case.settings.pools[0]))
    assert private["HOME"]["value"] == "/home/vllm"
    assert private["VLLM_LOGGING_LEVEL"]["value"] == "WARNING"


@SLOW
@given(data=st.data())
def test_each_variable_is_set_once(cases, data):
    """Kubernetes would take the last, and server-side apply refuses the list."""
    case = data.draw(cases)
    for pool in case.settings.pools:
        found = [entry["name"] for entry in _container(case, pool)["env"]]
        assert len(found) == len(set(found))


def test_kubernetes_expands_no_variable_in_an_engines_arguments(load):
    """``$(HF_TOKEN)`` in a chat template's arguments would put the token into the process list and the log."""
    case = load("private-hf-token-cache")
    args = _container(case, case.settings.pools[0])["args"]
    (template,) = [arg for arg in args if arg.startswith("--default-chat-template-kwargs=")]
    assert template.endswith('{"note":"$$(HF_TOKEN)"}')
    assert not [arg for arg in args if re.search(r"(?<!\$)(\$\$)*\$\(", arg)]


def test_an_engine_is_offline_exactly_when_nothing_is_to_be_downloaded(load):
    """A draft model may come from the hub even where the model does not."""
    case = load("image-source")
    assert _env(_container(case, case.settings.pools[0]))["HF_HUB_OFFLINE"]["value"] == "1"
    pool, chosen = _with_pool(
        case, speculative={"method": "eagle3", "model": "acme/draft", "num_speculative_tokens": 2}
    )
    template = pod_template(case.tier, chosen, pool, case.config)
    assert "HF_HUB_OFFLINE" not in {entry["name"] for entry in template["spec"]["containers"][0]["env"]}
    hub = load("latency-minimal")
    assert "HF_HUB_OFFLINE" not in _env(_container(hub, hub.settings.pools[0]))


@pytest.mark.parametrize(
    ("folder", "argument", "read_only"),
    [
        ("balanced-pvc", "/models/qwen/2.5-14b", {"model"}),
        ("image-source", "/models", {"model"}),
        ("private-hf-token-cache", "acme/secret-sauce-7b", set()),
    ],
)
def test_the_model_is_read_from_where_its_source_mounts_it(folder, argument, read_only, load):
    """Weights that are not downloaded are mounted read-only; the hub's cache is written."""
    case = load(folder)
    container = _container(case, case.settings.pools[0])
    assert container["args"][0] == argument
    assert {mount["name"] for mount in container["volumeMounts"] if mount.get("readOnly")} == read_only


def test_remote_code_runs_only_when_asked_for_and_at_the_pinned_commit(load):
    """Weights, tokenizer and code come from one commit."""
    case = load("private-hf-token-cache")
    flags = _flags(engine_args(case.tier, case.settings, case.settings.pools[0]))
    assert "trust-remote-code" in flags
    assert {flags[name] for name in ("revision", "tokenizer-revision", "code-revision")} == {
        case.tier.spec.model.revision
    }
    plain = load("latency-minimal")
    assert "trust-remote-code" not in _flags(engine_args(plain.tier, plain.settings, plain.settings.pools[0]))


def test_chosen_settings_become_the_flags_vllm_knows_them_by(load):
    """One engine with everything set."""
    case = load("tp4-fp8-spec")
    flags = _flags(engine_args(case.tier, case.settings, case.settings.pools[0]))
    assert (
        flags.items()
        >= {
            "served-model-name": "llama-70b",
            "tensor-parallel-size": "4",
            "quantization": "fp8",
            "dtype": "bfloat16",
            "kv-cache-dtype": "fp8",
            "max-num-seqs": "8",
            "max-num-batched-tokens": "2048",
            "max-model-len": "32768",
            "performance-mode": "interactivity",
            "attention-backend": "FLASH_ATTN",
            "gpu-memory-utilization": "0.9",
        }.items()
    )
    assert json.loads(flags["speculative-config"]) == case.settings.pools[0].speculative


def test_an_argument_that_is_not_allowed_is_never_rendered(load):
    """The policy reports it first; this is the second lock."""
    case = load("latency-minimal")
    pool, chosen = _with_pool(case, extra_args={"trust-remote-code": ""})
    with pytest.raises(CatalogError, match=r"model\.trustRemoteCode"):
        engine_args(case.tier, chosen, pool)


def test_engines_hold_no_credentials_of_the_cluster(scenario):
    """No service-account token, and no variables of foreign Services (a Service ``vllm`` breaks vLLM's start)."""
    for pool in scenario.settings.pools:
        spec = _template(scenario, pool)["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert "serviceAccountName" not in spec
