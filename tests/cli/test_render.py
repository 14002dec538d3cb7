"""``servingtiers render``: from a file to objects, and from a mistake to one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from servingtiers.catalog.engine_flags import engine_flag_names, router_flag_names
from servingtiers.cli import main

TIER = """
apiVersion: servingtiers.io/v1alpha1
kind: ServingTier
metadata: {name: NAME, namespace: llm}
spec:
  tier: TIER
  model: {name: meta-llama/Llama-3.1-8B-Instruct}
"""
CONFIG = """
accelerators:
  l40s-48gb:
    nodeSelector: {nvidia.com/gpu.product: NVIDIA-L40S}
"""


def _text(name="chat", tier="Latency", more=""):
    return TIER.replace("NAME", name).replace("TIER", tier) + more


def _run(text, *options):
    return CliRunner().invoke(main, ["render", "-f", "-", *options], input=text)


@pytest.mark.parametrize("tier", ["Latency", "Balanced", "Throughput"])
def test_a_minimal_tier_becomes_objects_with_flags_the_programs_know(tier):
    """From the user's five lines through the presets to command lines."""
    result = _run(_text(tier=tier))
    assert result.exit_code == 0, result.output
    objects = list(yaml.safe_load_all(result.stdout))
    deployments = {obj["metadata"]["name"]: obj for obj in objects if obj["kind"] == "Deployment"}
    assert set(deployments) == {"chat-pool", "chat-router"}
    for name, known in (("chat-pool", engine_flag_names("0.32")), ("chat-router", router_flag_names())):
        (container,) = deployments[name]["spec"]["template"]["spec"]["containers"]
        flags = {arg[2:].split("=")[0] for arg in container["args"] if arg.startswith("--")}
        assert flags
        assert flags <= known
    assert deployments["chat-pool"]["spec"]["replicas"] == 1


def test_json_is_a_list_that_kubectl_and_jq_read():
    """Nothing but JSON goes to standard output."""
    result = _run(_text(), "-o", "json")
    document = json.loads(result.stdout)
    assert document["kind"] == "List"
    assert document["items"] == list(yaml.safe_load_all(_run(_text()).stdout))


def test_the_configuration_says_which_accelerators_the_cluster_has(tmp_path: Path):
    """With it, pods select those nodes; without it, that it is missing is said."""
    config = tmp_path / "operator.yaml"
    config.write_text(CONFIG)
    result = _run(_text(), "--config", str(config))
    assert result.exit_code == 0, result.output
    assert "NVIDIA-L40S" in result.stdout
    assert result.stderr == ""
    assert "no --config" in _run(_text()).stderr


def test_several_tiers_in_one_file_are_all_rendered():
    """As kubectl would apply them."""
    result = _run(_text("one") + "---" + _text("two", "Balanced"))
    names = {obj["metadata"]["name"] for obj in yaml.safe_load_all(result.stdout) if obj["kind"] == "Service"}
    assert names == {"one", "two"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no object"),
        ("{", "no YAML"),
        ("just text", "holds a text"),
        ("kind: Deployment", "holds a Deployment: render takes ServingTier objects only"),
        (_text().replace("v1alpha1", "v9"), "apiVersion must be servingtiers.io/v1alpha1"),
        (_text(tier="Fast"), "spec.tier: "),
        (_text(more="  pool: {engine: {maxNumSeqs: 0}}"), "spec.pool.engine.maxNumSeqs: "),
        (_text(more="  pool: {hardware: {accelerators: [h1000]}}"), "spec.pool.hardware.accelerators"),
        (_text(more="  pool: {engine: {extraArgs: {port: '1'}}}"), "extraArgs.port belongs to the operator"),
        (_text(more="  pool: {engine: {env: {HF_ENDPOINT: x}}}"), "env.HF_ENDPOINT is not on the allow-list"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_its_field(text, says):
    """Exit code 2, nothing on standard output, no traceback."""
    result = _run(text)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("no --config")]
    assert line.startswith("Error: ")
    assert says in line


def test_every_problem_has_its_own_line():
    """So that one pass mends them all."""
    result = _run(_text(more="  pool: {engine: {extraArgs: {port: '1', host: x}}}"))
    lines = result.stderr.splitlines()
    assert [("extraArgs.host" in line, "extraArgs.port" in line) for line in lines[-2:]] == [
        (True, False),
        (False, True),
    ]


def test_a_configuration_with_an_unknown_field_is_refused(tmp_path: Path):
    """A slip of the pen there would silently change what every tier may use."""
    config = tmp_path / "operator.yaml"
    config.write_text("acelerators: {}")
    result = _run(_text(), "--config", str(config))
    assert result.exit_code == 2
    assert "acelerators" in result.stderr


def test_a_pool_beside_its_tiers_is_passed_over():
    """One file for kubectl apply may hold both; alone it makes no objects."""
    pool = "apiVersion: servingtiers.io/v1alpha1\nkind: TierPool\nmetadata: {name: p}\nspec: {servedModelName: m}\n"

    assert _run(f"{pool}---\n{_text()}").stdout == _run(_text()).stdout
    alone = _run(pool)
    assert alone.exit_code == 2
    assert "has no objects of its own" in alone.stderr


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path):
    """An archive, or a file in another encoding."""
    path = tmp_path / "tier.yaml"
    path.write_bytes(b"\xff\xfek\x00i\x00n\x00d\x00")

    result = CliRunner().invoke(main, ["render", "-f", str(path)])

    assert result.exit_code == 2
    assert "no YAML" in result.stderr
