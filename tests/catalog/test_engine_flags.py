"""What of vLLM's command line and environment a tier may set."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from servingtiers.catalog.engine_flags import (
    ALLOWED_ENV,
    ALLOWED_FLAGS,
    OWNED_FLAGS,
    check_env,
    check_extra_args,
    engine_flag_names,
    recorded_versions,
    render_extra_args,
    router_flag_names,
)
from servingtiers.catalog.names import CatalogError


@pytest.mark.parametrize("version", recorded_versions())
def test_every_allowed_and_every_owned_flag_exists_in_every_recorded_version(version):
    """A slip of the pen in either table would show only when an engine does not start."""
    assert set(ALLOWED_FLAGS) <= engine_flag_names(version)
    assert set(OWNED_FLAGS) <= engine_flag_names(version)


def test_no_flag_is_both_allowed_and_the_operators():
    """The last of two on a command line wins."""
    assert not set(ALLOWED_FLAGS) & set(OWNED_FLAGS)
    assert not {f"no-{name}" for name in OWNED_FLAGS} & set(ALLOWED_FLAGS)


@pytest.mark.parametrize(
    "flag",
    [
        "api-key",
        "middleware",
        "tool-server",
        "tool-parser-plugin",
        "reasoning-parser-plugin",
        "io-processor-plugin",
        "logits-processors",
        "worker-cls",
        "worker-extension-cls",
        "scheduler-cls",
        "hf-overrides",
        "model-class-overrides",
        "compilation-config",
        "additional-config",
        "model-loader-extra-config",
        "chat-template",
        "config",
        "hf-config-path",
        "allowed-local-media-path",
        "trust-request-chat-template",
        "trust-request-mm-kwargs",
        "enable-sleep-mode",
        "lora-modules",
        "ssl-keyfile",
        "uds",
        "root-path",
        "grpc",
        "headless",
        "master-addr",
        "data-parallel-size",
        "pipeline-parallel-size",
        "otlp-traces-endpoint",
        "profiler-config",
        "kv-events-config",
        "weight-transfer-config",
        "enable-prompt-embeds",
    ],
)
def test_flags_that_run_code_or_open_a_way_into_the_pod_are_refused(flag):
    """They exist in vLLM, so that this is the allow-list's doing."""
    assert flag in engine_flag_names("0.32.0")
    (problem,) = check_extra_args("0.32.0", {flag: "x"})
    assert problem.startswith(f"extraArgs.{flag} ")
    with pytest.raises(CatalogError):
        render_extra_args("0.32.0", {flag: "x"})


@pytest.mark.parametrize(
    "flag", ["trust-remote", "trust-rem", "por", "max-num-s", "tensor-parallel", "block-siz", "q", "asc"]
)
def test_abbreviations_are_refused(flag):
    """Argparse takes any unambiguous beginning; so ``trust-remote`` is ``trust-remote-code``."""
    assert check_extra_args("0.32.0", {flag: ""})


@pytest.mark.parametrize(
    ("flag", "mend"),
    [
        ("trust-remote-code", "set model.trustRemoteCode"),
        ("no-trust-remote-code", "set model.trustRemoteCode"),
        ("max-num-seqs", "set engine.maxNumSeqs"),
        ("device-memory-utilization", "set engine.gpuMemoryUtilizationPercent"),
        ("port", "remove it"),
        ("disable-log-stats", "scaling reads the engine's metrics"),
    ],
)
def test_for_a_flag_the_operator_sets_the_field_to_use_is_named(flag, mend):
    """The user learns what to write instead."""
    (problem,) = check_extra_args("0.32.0", {flag: "1"})
    assert mend in problem


@pytest.mark.parametrize(
    ("flag", "good", "bad"),
    [
        ("block-size", ["1", "32", "1024"], ["", "0", "1025", "-1", "x", "3.2", "1e3", "٣"]),
        ("enforce-eager", [""], ["true", " "]),
        ("no-async-scheduling", [""], ["false"]),
        ("watermark", ["0", "0.5"], ["1.0", "nan", "inf", "", ".5"]),
        ("generation-config", ["auto", "vllm"], ["/models", ""]),
        ("load-format", ["safetensors", "dummy"], ["pt", "npcache", "tensorizer", "my-plugin"]),
        ("tool-call-parser", ["hermes", "llama3_json"], ["a.b.C", "../x", "A", ""]),
        ("cudagraph-capture-sizes", ["1", "1 2 4"], ["", "1  2", "1,2", "1 --port 1", "0"]),
        ("allowed-media-domains", ["example.com cdn.example.com"], ["http://x", "x --api-key", ""]),
        ("limit-mm-per-prompt", ['{"image": 2}', "{}"], ["[]", "1", "", "{", "null"]),
        ("kv-cache-memory-bytes", ["1024", "32M", "8G"], ["8GiB", "-1", "", "8 G"]),
    ],
)
def test_values_have_the_flags_type(flag, good, bad):
    """What vLLM would refuse at start-up is refused before a pod is made."""
    for value in good:
        assert check_extra_args("0.32.0", {flag: value}) == ()
        assert render_extra_args("0.32.0", {flag: value})[0].partition("=")[0] == f"--{flag}"
    for value in bad:
        (problem,) = check_extra_args("0.32.0", {flag: value})
        assert problem.startswith(f"extraArgs.{flag} ")


@given(name=st.text(max_size=40), value=st.text(max_size=40))
def test_whatever_is_written_is_rendered_as_one_flag_or_refused_in_one_line(name, value):
    """No text gets a second flag onto the command line."""
    problems = check_extra_args("0.32.0", {name: value})
    if problems:
        assert all("\n" not in problem.replace(name, "") for problem in problems)
        with pytest.raises(CatalogError):
            render_extra_args("0.32.0", {name: value})
    else:
        first, *rest = render_extra_args("0.32.0", {name: value})
        assert first.startswith("--")
        assert not any(item.startswith("-") for item in rest)


@given(
    flag=st.sampled_from(sorted(ALLOWED_FLAGS)),
    value=st.text(alphabet="-= \n0123456789abc{}\"':.,/", max_size=20),
)
def test_no_value_of_an_allowed_flag_adds_another(flag, value):
    """The dangerous alphabet on every flag."""
    if not check_extra_args("0.33.0", {flag: value}):
        first, *rest = render_extra_args("0.33.0", {flag: value})
        assert first.split("=", 1)[0] == f"--{flag}"
        assert not any(item.startswith("-") for item in rest)


def test_a_near_name_is_offered():
    """A slip of the pen is mended from the message alone."""
    (problem,) = check_extra_args("0.32.0", {"blok-size": "16"})
    assert "block-size" in problem


def test_arguments_are_rendered_in_one_order():
    """Or a rollout would follow the order of a map."""
    assert render_extra_args("0.32.0", {"seed": "1", "block-size": "32", "enforce-eager": ""}) == (
        "--block-size=32",
        "--enforce-eager",
        "--seed=1",
    )
    assert render_extra_args("0.32.0", {}) == ()


@pytest.mark.parametrize(
    ("version", "has"),
    [("0.32.0", False), ("0.32", False), ("v0.32.1", False), ("0.33.0", True), ("0.40.2", True)],
)
def test_a_version_has_the_flags_of_the_newest_recorded_one_not_above_it(version, has):
    """The flag --watchdog-config came with vLLM 0.33."""
    assert ("watchdog-config" in engine_flag_names(version)) == has
    assert "shutdown-timeout" in engine_flag_names(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.9.2", "latest", "", "1"])
def test_a_version_that_is_older_or_none_is_refused_with_the_mend(version):
    """Its flags are not known, and before 0.30 a request could kill a decode engine (CVE-2026-94622)."""
    with pytest.raises(CatalogError, match=r"use 0\.32 or newer, or state engine\.version"):
        engine_flag_names(version)


def test_the_recorded_lists_are_whole():
    """Counts of the recorded help texts; a cut list would let every check pass that looks for absence."""
    assert len(engine_flag_names("0.32")) == 406
    assert len(engine_flag_names("0.33")) == 409
    assert len(router_flag_names()) == 72
    assert {"service-discovery", "vllm-pd-disaggregation", "kv-connector"} <= router_flag_names()


@pytest.mark.parametrize(
    "name", ["HF_ENDPOINT", "HTTPS_PROXY", "LD_PRELOAD", "PYTHONPATH", "VLLM_SERVER_DEV_MODE", "VLLM_PLUGINS", "HF_TOKEN",
             "VLLM_NIXL_SIDE_CHANNEL_PORT", "UCX_TCP_PORT_RANGE", "UCX_MODULE_DIR", "CUDA_VISIBLE_DEVICES", "HOME"]
)  # fmt: skip
def test_environment_that_runs_code_or_leaks_the_token_is_refused(name):
    """``HF_ENDPOINT`` would send the hub token of a Secret to whoever wrote the tier."""
    (problem,) = check_env({name: "1"})
    assert "not on the allow-list: remove it" in problem


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("UCX_TLS", "rc,cuda_copy,tcp", "tcp $(HF_TOKEN)"),
        ("VLLM_LOGGING_LEVEL", "DEBUG", "debug"),
        ("OMP_NUM_THREADS", "8", "eight"),
        ("VLLM_CPU_OMP_THREADS_BIND", "0-3|4-7", "0 1"),
        ("NCCL_P2P_DISABLE", "1", "yes"),
    ],
)
def test_environment_values_match_their_pattern(name, good, bad):
    """A pattern holds for the whole value."""
    assert check_env({name: good}) == ()
    assert check_env({name: bad})
    assert check_env({name: f"{good}\n"})


def test_no_allowed_environment_takes_a_reference_to_another_variable():
    """Kubernetes expands ``$(NAME)`` in values too."""
    assert all(check_env({name: "$(HF_TOKEN)"}) for name in ALLOWED_ENV)
