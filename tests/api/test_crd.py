"""The CRD made from the models: structural, bounded, and with the models' own defaults."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError

from kubernetes_schemas import assert_valid
from servingtiers.api import ServingTier, ServingTierSpec, ServingTierStatus
from servingtiers.api.base import Model, key_rule
from servingtiers.api.crd import crd_document, crd_documents, structural_schema

RULES = yaml.safe_load((Path(__file__).parent / "data" / "rules.yaml").read_text(encoding="utf-8"))
WIRE: Any = {"by_alias": True, "by_name": False}
"""The names of the wire only, as in `ServingTier.read`."""
MINIMAL = {"tier": "Latency", "model": {"name": "example/model"}}
ROOT = crd_document()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
SPEC = ROOT["properties"]["spec"]
STATUS = ROOT["properties"]["status"]


def nodes(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every node of a schema with its path."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in node:
            yield from nodes(node[key], f"{path}[*]")


NODES = [
    node
    for document in crd_documents()
    for part in ("spec", "status")
    for node in nodes(
        document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][part],
        part if document["spec"]["names"]["kind"] == "ServingTier" else f"{part} of TierPool",
    )
]


def with_defaults(value: Any, schema: Mapping[str, Any]) -> Any:
    """Fill in defaults as an API server does: only below parents that exist."""
    if isinstance(value, list):
        return [with_defaults(item, schema["items"]) for item in value]
    if not isinstance(value, dict) or "properties" not in schema:
        return value
    filled = dict(value)
    for name, child in schema["properties"].items():
        if name not in filled and "default" in child:
            filled[name] = child["default"]
        if name in filled:
            filled[name] = with_defaults(filled[name], child)
    return filled


def test_everything_is_bounded() -> None:
    """API servers estimate the cost of CEL rules from bounds, and an unbounded field may fill etcd."""
    unbounded = []
    for path, node in NODES:
        if node.get("type") == "string" and not {"maxLength", "enum"} & set(node):
            unbounded.append(f"{path}: maxLength")
        if node.get("type") == "array" and "maxItems" not in node:
            unbounded.append(f"{path}: maxItems")
        if "additionalProperties" in node and "maxProperties" not in node:
            unbounded.append(f"{path}: maxProperties")
        number = node.get("type") == "integer" or "x-kubernetes-int-or-string" in node
        if path.startswith("spec") and number and not {"minimum", "maximum"} <= set(node):
            unbounded.append(f"{path}: minimum and maximum")

    assert unbounded == []


def test_every_list_says_how_server_side_apply_merges_it() -> None:
    """Without it a list is atomic by accident."""
    lists = {path: node.get("x-kubernetes-list-type") for path, node in NODES if node.get("type") == "array"}

    assert lists
    assert [path for path, kind in lists.items() if kind is None] == []


def test_the_schema_is_structural() -> None:
    """These are the keywords that API servers refuse, and the one that would let anything in."""
    forbidden = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "const", "title", "patternProperties", "propertyNames",
                 "uniqueItems", "nullable", "x-kubernetes-preserve-unknown-fields"}  # fmt: skip
    for path, node in NODES:
        assert not forbidden & set(node), path
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert node.get("default", "") is not None, path


def test_every_field_says_what_it_is() -> None:
    """`kubectl explain` and the reference page show it."""
    silent = [
        path
        for path, node in NODES
        if not path.endswith("[*]") and not node.get("description", "").endswith(".")
    ]

    assert silent == []


def test_keys_of_keyed_lists_are_required_or_have_a_default() -> None:
    """API servers refuse the CRD otherwise."""
    keyed = [(path, node) for path, node in NODES if node.get("x-kubernetes-list-type") == "map"]
    assert keyed
    for path, node in keyed:
        item = node["items"]
        for key in node["x-kubernetes-list-map-keys"]:
            assert key in item["required"] or "default" in item["properties"][key], f"{path}: {key}"


def test_the_document_is_a_valid_custom_resource_definition() -> None:
    """Against the schema of Kubernetes itself."""
    for document in crd_documents():
        assert_valid(document)


def test_the_document_fits_into_the_annotation_of_a_client_side_apply() -> None:
    """`kubectl apply -f` must work without --server-side."""
    assert len(yaml.safe_dump(crd_document())) < 262_144


def test_every_rule_has_an_accepted_and_a_rejected_example() -> None:
    """The API-server ring runs the examples."""
    messages = {
        rule["message"]: rule["rule"]
        for _, node in NODES
        for rule in node.get("x-kubernetes-validations", ())
    }
    table = {entry["message"]: entry for entry in RULES}
    assert set(table) == set(messages)
    for entry in RULES:
        assert entry["accepted"], entry["message"]
        assert entry["rejected"], entry["message"]


def test_a_message_belongs_to_one_rule() -> None:
    """Or an example would prove a rule that it never met."""
    rules: dict[str, set[str]] = {}
    for _, node in NODES:
        for rule in node.get("x-kubernetes-validations", ()):
            rules.setdefault(rule["message"], set()).add(rule["rule"])
    assert {message: found for message, found in rules.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    "spec",
    [
        MINIMAL,
        *({**MINIMAL, **example, "model": {**MINIMAL["model"], **example.get("model", {})}}
          for entry in RULES for example in entry["accepted"]),
    ],
    ids=str,
)  # fmt: skip
def test_the_schema_and_the_models_have_the_same_defaults(spec: dict[str, Any]) -> None:
    """Whatever is left out means the same with and without an API server."""
    ours = ServingTierSpec.model_validate(spec, **WIRE)
    theirs = with_defaults(spec, SPEC)
    assert ServingTierSpec.model_validate(theirs, **WIRE) == ours
    normalized = ServingTierSpec.model_validate(spec, **WIRE).model_dump(mode="json", exclude_none=True)
    quantities_as_text = ServingTierSpec.model_validate(theirs, **WIRE).model_dump(
        mode="json", exclude_none=True, exclude_unset=True
    )
    assert normalized == quantities_as_text, "a default of the models is not one of the API server"


def test_only_what_holds_for_every_tier_is_a_default() -> None:
    """Presets show in status.effective with their reasons; as defaults they could never be changed again."""
    filled = with_defaults(MINIMAL, SPEC)
    for tier in ("Latency", "Balanced", "Throughput"):
        assert with_defaults({**MINIMAL, "tier": tier}, SPEC) == {**filled, "tier": tier}
    assert not {"slo", "pool", "workload", "disaggregation"} & set(filled)


def test_the_status_has_no_defaults() -> None:
    """What the operator did not write is not there: its own apply then contains all there is."""
    assert [path for path, node in nodes(STATUS, "status") if "default" in node] == []


def test_prefill_and_decode_have_the_shape_of_the_aggregated_pool() -> None:
    """Tests that walk the schema leave them out for that."""
    pools = SPEC["properties"]["disaggregation"]["properties"]
    without = [
        {key: value for key, value in node.items() if key != "description"}
        for node in (SPEC["properties"]["pool"], pools["prefill"], pools["decode"])
    ]
    assert without[0] == without[1] == without[2]


def test_fields_have_the_names_of_the_wire_and_no_others() -> None:
    """A file with `served_name` must fail before it reaches a cluster, as it would there."""
    tier = {"apiVersion": "servingtiers.io/v1alpha1", "kind": "ServingTier", "metadata": {"name": "chat"}}
    spec = {**MINIMAL, "slo": {"e2e": {"p99": "10s"}}}

    read = ServingTier.read({**tier, "spec": spec})

    assert read.spec.slo is not None
    assert read.spec.slo.e2e is not None
    assert read.spec.slo.e2e.p99 == "10s"
    with pytest.raises(ValidationError, match=r"spec\.drain_timeout\n  Extra inputs"):
        ServingTier.read({**tier, "spec": {**MINIMAL, "drain_timeout": "60s"}})


class Child(Model):
    """A child."""

    number: Annotated[int, Field(gt=0, lt=10)] = 1
    """A number."""
    nothing: str | None = None
    """Nothing."""
    only: Literal["One"] = "One"
    """One value."""


class Parent(Model):
    """A parent."""

    child: Child = Child()
    """Its own
    words."""
    bare: Child | None = None
    large: Annotated[int, Field(le=2**40)] = 5
    """Large."""


def test_json_schema_is_rewritten_into_what_a_structural_schema_can_say() -> None:
    """One model with everything that pydantic says differently."""
    child = {
        "type": "object",
        "properties": {
            "number": {
                "description": "A number.", "type": "integer", "format": "int32",
                "minimum": 0, "exclusiveMinimum": True, "maximum": 10, "exclusiveMaximum": True, "default": 1,
            },
            "nothing": {"description": "Nothing.", "type": "string"},
            "only": {"description": "One value.", "type": "string", "enum": ["One"], "default": "One"},
        },
    }  # fmt: skip
    assert structural_schema(Parent, defaults=True) == {
        "description": "A parent.",
        "type": "object",
        "properties": {
            "child": {"description": "Its own words.", **child, "default": {"number": 1, "only": "One"}},
            "bare": {"description": "A child.", **child},
            "large": {
                "description": "Large.", "type": "integer", "format": "int64", "maximum": 2**40, "default": 5,
            },
        },
    }  # fmt: skip


def test_what_a_structural_schema_cannot_say_is_an_error_and_not_left_out() -> None:
    """Silence would be a check that only the models make."""

    class Union(Model):
        either: int | str

    class Keys(Model):
        values: dict[Annotated[str, Field(pattern="^a$")], int]

    class Unique(Model):
        values: set[int]

    class Bounded(Model):
        values: Annotated[
            dict[Annotated[str, Field(pattern="^a$")], int],
            Field(json_schema_extra=key_rule("^a$", 1, "write a")),
        ]

    with pytest.raises(ValueError, match=r"Union\.either: a structural schema has no unions"):
        structural_schema(Union, defaults=True)
    with pytest.raises(ValueError, match=r"Keys\.values: bound the keys for the API server too"):
        structural_schema(Keys, defaults=True)
    with pytest.raises(ValueError, match=r"Unique\.values: a structural schema cannot say 'uniqueItems'"):
        structural_schema(Unique, defaults=True)
    assert "x-kubernetes-validations" in structural_schema(Bounded, defaults=True)["properties"]["values"]


def test_an_older_operator_reads_the_status_of_a_newer_one() -> None:
    """A rollback must not stop at a field it does not know, wherever it is."""
    status = ServingTierStatus.model_validate(
        {
            "newer": 1,
            "pools": [{"name": "decode", "role": "Decode", "newer": {"a": 1}}],
            "cost": {"newer": "x"},
        }
    )
    assert status.pools[0].name == "decode"
