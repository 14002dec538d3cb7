"""The CRD on a real API server: rules, defaults, status and printer columns."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from ring.harness import install_crd
from servingtiers.api import API_VERSION, KIND, PLURAL, ServingTierSpec, ServingTierStatus
from servingtiers.api.crd import crd_document
from servingtiers.cli import main
from servingtiers.lab.controlplane import ApiError, ControlPlane

pytestmark = pytest.mark.ring

RULES = yaml.safe_load(
    (Path(__file__).parents[1] / "api" / "data" / "rules.yaml").read_text(encoding="utf-8")
)
SCHEMA = crd_document()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
WIRE: Any = {"by_alias": True, "by_name": False}
"""The names of the wire only, as in `ServingTier.read`."""
NAMESPACE = "default"
TIERS = f"/apis/{API_VERSION}/namespaces/{NAMESPACE}/{PLURAL}"


def merged(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a merge of two documents, the patch's members winning."""
    out = dict(base)
    for key, value in patch.items():
        out[key] = (
            merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
        )
    return out


def tier(name: str, **patch: Any) -> dict[str, Any]:
    """Return a tier whose spec is the smallest one with a patch."""
    smallest = {"tier": "Latency", "model": {"name": "example/model"}}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": merged(smallest, patch),
    }


class Tiers:
    """Tiers of one namespace of a real API server."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self._connection = plane.connection()

    def dry_run(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the object as it would be stored: validated and defaulted, not kept."""
        path = f"{TIERS}?dryRun=All&fieldValidation=Strict"
        answer: dict[str, Any] = self._connection.request("POST", path, document)
        return answer

    def refusal(self, document: dict[str, Any]) -> str:
        """Return what the API server says against an object, or nothing if it takes it."""
        try:
            self.dry_run(document)
        except ApiError as error:
            if error.status not in {400, 422}:  # anything else is the test's own fault
                raise
            return error.message
        return ""

    def create(self, document: dict[str, Any]) -> dict[str, Any]:
        """Create a tier."""
        answer: dict[str, Any] = self._connection.request("POST", TIERS, document)
        return answer

    def apply_status(self, name: str, status: Mapping[str, Any]) -> dict[str, Any]:
        """Apply a status as the operator does, and return the object read back."""
        self._connection.request(
            "PATCH",
            f"{TIERS}/{name}/status?fieldManager=servingtiers&force=true&fieldValidation=Strict",
            {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "status": status},
            content_type="application/apply-patch+yaml",
        )
        answer: dict[str, Any] = self._connection.request("GET", f"{TIERS}/{name}")
        return answer

    def delete(self, name: str) -> None:
        """Delete a tier."""
        self._connection.request("DELETE", f"{TIERS}/{name}")


@pytest.fixture(scope="module")
def tiers(control_plane: ControlPlane) -> Tiers:
    """Return access to the tiers of an API server that has the CRD of the models, as they are now."""
    install_crd(control_plane)
    return Tiers(control_plane)


PLANNED = {
    "aggregated": ["--slo", "ttft.p99=500ms", "--slo", "tpot.p99=50ms"],
    "disaggregated": ["--slo", "ttft.p99=1s", "--disaggregation", "only"],
    "quantized": [
        "--weights",
        "fp8",
        "--kv-dtype",
        "fp8",
        "--length-cv",
        "0.8",
        "--prefix-hit-rate",
        "0.333",
    ],
    "other percentiles": ["--slo", "ttft.p999=1.5s", "--slo", "itl.p99=90ms", "--slo", "e2e.p95=12.5s"],
    "three readings": ["--p99", "300ms"],
    "by mean": ["--slo", "tpot.mean=33.3ms"],
}
"""What is asked of the planner, each a tier of its own."""


@pytest.mark.parametrize("asked", PLANNED.values(), ids=PLANNED)
def test_the_tier_that_the_planner_prints_can_be_applied_as_it_is(tiers: Tiers, asked: list[str]) -> None:
    """No edit between `servingtiers plan -o yaml` and `kubectl apply`."""
    arguments = ["plan", "--model", "meta-llama/Llama-3.1-8B-Instruct", "--rate", "12.345678", "-o", "yaml"]
    arguments += ["--accelerator", "h100", "--tensor-parallel", "1", "--no-simulation"]
    result = CliRunner().invoke(main, [*arguments, *asked])
    assert result.exit_code == 0, result.output

    stored = tiers.dry_run(yaml.safe_load(result.stdout))

    assert stored["spec"]["workload"]["requestsPerSecond"] == "12.345678"
    assert stored["spec"]["tier"] in {"Latency", "Balanced", "Throughput"}


EXAMPLES = [
    pytest.param(example, id=f"{entry['message'][:50]} {number}")
    for entry in RULES
    for number, example in enumerate(entry["accepted"])
]


@pytest.mark.parametrize("entry", RULES, ids=lambda entry: entry["message"][:60])
def test_every_rule_lets_through_what_it_should_and_refuses_with_its_message(
    tiers: Tiers, entry: dict[str, Any]
) -> None:
    """The message that a user reads is the rule's own, without noise of an evaluation error."""
    for example in entry["accepted"]:
        assert tiers.refusal(tier("rule", **example)) == "", example
    for example in entry["rejected"]:
        message = tiers.refusal(tier("rule", **example))
        assert entry["message"] in message, example
        assert "evaluating rule" not in message, example


ROOT = Path(__file__).parents[2]
FILES = [
    pytest.param(one["spec"], id=str(path.relative_to(ROOT)))
    for pattern in (
        "manifests/examples/*.yaml",
        "manifests/examples/shared-pool/[cj]*.yaml",
        "tests/golden/*/tier.yaml",
    )
    for path in sorted(ROOT.glob(pattern))
    for one in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    if one and one.get("kind") == KIND
]


def test_there_are_example_files_to_agree_on() -> None:
    """The examples that the project ships, and the tiers of the golden manifests."""
    assert len(FILES) >= 3


@pytest.mark.parametrize("example", [pytest.param({}, id="smallest"), *EXAMPLES, *FILES])
def test_the_models_and_the_api_server_agree_on_defaults(tiers: Tiers, example: dict[str, Any]) -> None:
    """What the operator reads after defaulting is what the command line reads from the file."""
    document = tier("defaults", **example)

    stored = tiers.dry_run(document)["spec"]

    ours = ServingTierSpec.model_validate(document["spec"], **WIRE)
    assert ServingTierSpec.model_validate(stored, **WIRE) == ours
    explicit = ServingTierSpec.model_validate(stored, **WIRE).model_dump(
        mode="json", exclude_none=True, exclude_unset=True
    )
    assert explicit == ours.model_dump(mode="json", exclude_none=True)


_SAMPLES = ("example", "1h", "2026-11-23T15:00:00Z", "1.2", "4", "VLLM_X", "ab")


def everything(node: Mapping[str, Any], variant: int = 0, *, largest: bool = False) -> Any:
    """Return a value with every field of a schema set, lists and maps with two entries (or as many as may be)."""
    kind = "string" if node.get("x-kubernetes-int-or-string") else node["type"]
    if "enum" in node:
        return node["enum"][variant % len(node["enum"])]
    match kind:
        case "boolean":
            return True
        case "integer":
            return node.get("minimum", 0) + (variant if "maximum" not in node else 0)
        case "string" if node.get("format") == "date-time":
            return f"2026-{variant // 672 % 12 + 1:02}-{variant // 24 % 28 + 1:02}T{variant % 24:02}:00:00Z"
        case "string" if "pattern" not in node:
            text = f"{variant}-é模"
            return text + "x" * (node["maxLength"] - len(text) if largest else 0)
        case "string":
            samples = [f"{text}{variant}" for text in _SAMPLES if variant] + list(_SAMPLES)
            return next(text for text in samples if re.search(node["pattern"], text))
        case "array":
            count = node["maxItems"] if largest else 2
            return [everything(node["items"], index, largest=largest) for index in range(count)]
        case "object" if "additionalProperties" in node:
            rules = node.get("x-kubernetes-validations", ())
            patterns = [re.search(r"k\.matches\('(.*?)'\)", rule["rule"]) for rule in rules]
            sample = next(text for text in _SAMPLES if all(re.search(p[1], text) for p in patterns[:1] if p))
            count = node["maxProperties"] if largest else 2
            return {
                f"{sample}{'X' if sample.isupper() else 'x'}{index}": everything(
                    node["additionalProperties"], index, largest=largest
                )
                for index in range(count)
            }
        case _:
            return {
                name: everything(child, variant, largest=largest)
                for name, child in node["properties"].items()
            }


def leaves(value: Any) -> int:
    """Return how many scalars a document holds."""
    match value:
        case dict():
            return sum(leaves(member) for member in value.values())
        case list():
            return sum(leaves(member) for member in value)
        case _:
            return 1


def full_specs() -> list[dict[str, Any]]:
    """Return specs that between them set every field: alternatives exclude each other."""
    full = everything(SCHEMA["spec"])
    speculative = {"method": "Eagle3"}
    pool = merged(full["pool"], {"engine": {"speculative": speculative, "quantization": "FP8"}})
    pool["hardware"]["accelerators"] = pool["hardware"]["accelerators"][:1]
    revision = "0e9e39f249a16976918f6564b8830bc894c89659"
    sources = full["model"].pop("source")
    full["model"]["revision"] = revision
    full["scaling"] = {"mode": "Auto"}
    toleration = {"key": "example.com/gpu", "operator": "Equal", "value": "a", "effect": "NoExecute"}
    full["pod"]["tolerations"] = [{**toleration, "tolerationSeconds": 60}]
    two = full.pop("disaggregation")
    aggregated = {
        **full,
        "pool": pool,
        "model": {**full["model"], "source": {"huggingFace": sources["huggingFace"]}},
    }
    disaggregated = {
        **{key: value for key, value in full.items() if key not in {"pool", "sharedPool"}},
        "model": aggregated["model"],
        "disaggregation": {**two, "prefill": pool, "decode": pool},
        "scaling": {"mode": "Auto"},
    }
    without_cache = {key: value for key, value in full["model"].items() if key != "cache"}
    return [
        aggregated,
        disaggregated,
        *(
            {**aggregated, "model": {**without_cache, "source": {name: sources[name]}}}
            for name in ("persistentVolumeClaim", "image")
        ),
    ]


def test_a_spec_with_every_field_set_is_stored_as_it_was_given(tiers: Tiers) -> None:
    """Pruning is silent: a field that the models have and the schema lacks would just be gone."""
    for spec in full_specs():
        document = {**tier("full"), "spec": spec}

        stored = tiers.dry_run(document)["spec"]

        assert stored == spec
        assert (
            ServingTierSpec.model_validate(stored, **WIRE).model_dump(mode="json", exclude_none=True) == spec
        )


def test_a_status_with_every_field_set_is_read_back_as_it_was_written(tiers: Tiers) -> None:
    """Written by server-side apply on the subresource, read by the models."""
    written = everything(SCHEMA["status"])
    status = ServingTierStatus.model_validate(written, **WIRE)
    assert status.model_dump(mode="json", exclude_none=True) == written, "the schema has what the models lack"
    tiers.create(tier("status"))
    try:
        read = tiers.apply_status("status", status.model_dump(mode="json", exclude_none=True))["status"]
    finally:
        tiers.delete("status")

    assert leaves(read) == leaves(written)
    assert ServingTierStatus.model_validate(read, **WIRE) == status


def test_the_largest_status_that_the_schema_allows_can_be_stored(tiers: Tiers) -> None:
    """An object in etcd has 1.5 MiB; managedFields count too, and name every key of a keyed list."""
    largest = everything(SCHEMA["status"], largest=True)
    tiers.create(tier("largest"))
    try:
        read = tiers.apply_status("largest", largest)
    finally:
        tiers.delete("largest")

    assert read["status"] == largest
    assert len(yaml.safe_dump(read["metadata"]["managedFields"])) < 100_000


def test_spec_and_status_are_written_apart(tiers: Tiers) -> None:
    """The status subresource is on: an apply of the status cannot touch the spec, nor a create set the status."""
    created = tiers.create({**tier("apart"), "status": {"replicas": "9/9"}})
    try:
        assert "status" not in created
        read = tiers.apply_status("apart", {"replicas": "1/2"})
    finally:
        tiers.delete("apart")

    assert read["status"] == {"replicas": "1/2"}
    assert read["metadata"]["generation"] == created["metadata"]["generation"]


def test_kubectl_shows_what_matters_by_short_name_and_by_category(tiers: Tiers) -> None:
    """Tier, model, replicas, SLO and cost at a glance; the accelerator with -o wide."""
    tiers.create(tier("columns"))
    try:
        conditions = [
            {"type": kind, "status": state, "reason": "Test", "lastTransitionTime": "2026-11-23T15:00:00Z"}
            for kind, state in (("Ready", "True"), ("SLOMet", "False"), ("Feasible", "Unknown"))
        ]
        effective_pool = {
            "name": "pool", "accelerator": "h100-sxm-80gb", "tensorParallel": 1, "weights": "bf16",
            "maxNumSeqs": 4, "image": "example/vllm",
        }  # fmt: skip
        tiers.apply_status(
            "columns",
            {
                "conditions": conditions,
                "replicas": "2/3",
                "cost": {"perHour": "8.40"},
                "effective": {"pools": [effective_pool]},
                "endpoint": "http://columns:8000",
            },
        )
        narrow, wide = (
            [re.split(r"\s{2,}", line.strip()) for line in tiers.plane.kubectl(*arguments).splitlines()]
            for arguments in (
                ("get", "st", "columns", "-n", NAMESPACE),
                ("get", "llm", "-n", NAMESPACE, "-o", "wide", "--field-selector", "metadata.name=columns"),
            )
        )
    finally:
        tiers.delete("columns")

    assert narrow[0] == ["NAME", "TIER", "MODEL", "REPLICAS", "READY", "SLO MET", "COST/H", "AGE"]
    assert narrow[1][:-1] == ["columns", "Latency", "example/model", "2/3", "True", "False", "8.40"]
    shown = dict(itertools.zip_longest(wide[0], wide[1]))
    assert shown["ACCELERATOR"] == "h100-sxm-80gb"
    assert shown["MODE"] == "Auto"
    assert shown["FEASIBLE"] == "Unknown"
    assert shown["ENDPOINT"] == "http://columns:8000"


def test_kubectl_explains_every_field(tiers: Tiers, tmp_path: Path) -> None:
    """The attribute docstrings of the models reach the terminal."""
    # A cache of its own: another test's kubectl may have looked before the CRD was there.
    text = tiers.plane.kubectl("explain", "st.spec.pool.scaling.idleAfter", f"--cache-dir={tmp_path}")

    assert "Scale to zero after this long without a request" in text
