"""Bad input: every field of a spec with every kind of wrong value, made from the schema.

The same cases are given to the models (no API server needed) and to a real API server. Kinds: a wrong type, out of
bounds, empty, too long, other scripts, a NUL byte, an unknown field, a missing required field.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import ValidationError

from ring.harness import install_crd
from servingtiers.api import API_VERSION, KIND, PLURAL, ServingTier
from servingtiers.api.base import DURATION_PATTERN
from servingtiers.api.crd import crd_document
from servingtiers.lab.controlplane import ApiError, Connection, ControlPlane

SPEC = crd_document()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
TIERS = f"/apis/{API_VERSION}/namespaces/default/{PLURAL}?dryRun=All&fieldValidation=Strict"

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Case:
    """One wrong value at one place."""

    path: Path
    kind: str
    spec: dict[str, Any]

    @property
    def field(self) -> str:
        """The field as an API server names it, or its map or list where the place is inside one."""
        text = ""
        for step in self.path:
            text += f"[{step}]" if isinstance(step, int) else f".{step}"
        return f"spec{text}"


def smallest(node: Mapping[str, Any]) -> Any:
    """Return the smallest valid value of a schema."""
    if "enum" in node:
        return node["enum"][0]
    if "x-kubernetes-int-or-string" in node:
        return node["minimum"]
    match node.get("type", "string"):
        case "object":
            return {name: smallest(node["properties"][name]) for name in node.get("required", ())}
        case "array":
            return [smallest(node["items"])] * node.get("minItems", 0)
        case "integer":
            return node.get("minimum", 0)
        case "boolean":
            return False
        case _:
            return next(text for text in ("example", "1h", "1.0") if re.search(node["pattern"], text))


def put(node: Mapping[str, Any], path: Path, value: Any) -> Any:
    """Return the smallest valid value of a schema with one value put at a path."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(step, int):
        return [put(node["items"], rest, value)]
    whole = smallest(node)
    if "properties" in node:
        whole[step] = put(node["properties"][step], rest, value)
    else:
        whole[step] = put(node["additionalProperties"], rest, value)
    return whole


def places(node: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield every place of the schema; prefill and decode have the shape of `pool`."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        if name not in {"prefill", "decode"}:
            yield from places(child, (*path, name))
    if "items" in node:
        yield from places(node["items"], (*path, 0))
    if "additionalProperties" in node:
        yield from places(node["additionalProperties"], (*path, "KEY" if path[-1] == "env" else "key"))


_WRONG_TYPE = {"string": 7, "integer": "7", "boolean": "yes", "object": "text", "array": {}}


def wrong_values(path: Path, node: Mapping[str, Any]) -> Iterator[tuple[str, Path, Any]]:
    """Yield kinds of wrong values for one place, each with the path at which to put it."""
    int_or_string = "x-kubernetes-int-or-string" in node
    kind = "string" if int_or_string else node["type"]
    yield "wrong type", path, True if int_or_string else _WRONG_TYPE[kind]
    if kind == "string":
        free_text = path[-1] in {"key", "KEY"} and path[-2] in {
            "annotations",
            "env",
        }  # Unicode is welcome there
        if "enum" in node or int_or_string or not re.search(node["pattern"], ""):
            yield "empty", path, ""
        yield "NUL", path, "a\x00b"
        yield "too long", path, "a" * (node.get("maxLength", 63) + 1)
        if not free_text and path[-2:] != ("extraArgs", "key"):
            yield "other script", path, "\u6a21\u578b\u202e"
        if node.get("pattern") == DURATION_PATTERN:
            yield "far too long a duration", path, "99999h"
    if kind == "integer" or int_or_string:
        yield "below", path, node["minimum"] - 1
        yield "above", path, node["maximum"] + 1
        yield "fraction", path, 1.5
    if kind == "array":
        yield "too many", path, [smallest(node["items"])] * (node["maxItems"] + 1)
        if node.get("minItems"):
            yield "empty", path, []
    if kind == "object" and "additionalProperties" in node:
        value = smallest(node["additionalProperties"])
        sample = "KEY" if path[-1] == "env" else "key"
        yield "too many", path, {f"{sample}{index}": value for index in range(node["maxProperties"] + 1)}
        yield "bad key", path, {"a b\u00e9\x00": value}
        yield "long key", path, {sample * 200: value}
    elif kind == "object":
        yield "unknown field", path, {**smallest(node), "unknown": 1}
        for name in node.get("required", ()):
            whole = smallest(node)
            del whole[name]
            yield f"without {name}", path, whole


CASES = [
    Case(where, kind, put(SPEC, where, value))
    for path, node in places(SPEC)
    if path
    for kind, where, value in wrong_values(path, node)
]
BY_FIELD: dict[str, list[Case]] = {}
for one in CASES:
    BY_FIELD.setdefault(one.field, []).append(one)

ONLY_CEL = {"far too long a duration"}
"""Kinds that only the API server refuses: the models do not evaluate CEL."""


@pytest.fixture(scope="module")
def server(control_plane: ControlPlane) -> Connection:
    """Return a connection to an API server that has the CRD of the models, as they are now."""
    install_crd(control_plane)
    return control_plane.connection()


def document(spec: object) -> dict[str, Any]:
    """Return a tier with a spec."""
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "bad"}, "spec": spec}


def test_there_are_cases_for_every_field() -> None:
    """A generator that has gone blind would let everything below pass."""
    assert len(CASES) >= 500
    assert {kind for kind in (case.kind for case in CASES) if not kind.startswith("without")} >= {
        "wrong type", "below", "above", "empty", "too long", "too many", "other script", "NUL", "unknown field",
        "bad key", "long key", "fraction",
    }  # fmt: skip


def test_the_case_without_its_wrong_value_is_valid() -> None:
    """Otherwise a case might be refused for something else than its wrong value."""
    for path, node in places(SPEC):
        if path:
            ServingTier.read(document(put(SPEC, path, smallest(node))))


@pytest.mark.parametrize("cases", BY_FIELD.values(), ids=BY_FIELD.keys())
def test_the_models_refuse_bad_input_and_name_the_field(cases: list[Case]) -> None:
    """So that a file is refused before it reaches a cluster, for the same values as there."""
    for case in cases:
        if case.kind in ONLY_CEL:
            continue
        with pytest.raises(ValidationError) as caught:
            ServingTier.read(document(case.spec))
        named = {tuple(error["loc"])[: len(case.path) + 1] for error in caught.value.errors()}
        assert ("spec", *case.path) in named, case.kind


@pytest.mark.ring
@pytest.mark.parametrize("cases", BY_FIELD.values(), ids=BY_FIELD.keys())
def test_the_api_server_refuses_bad_input_and_names_the_field(server: Connection, cases: list[Case]) -> None:
    """The operator then never sees it, and the user reads where it is."""
    for case in cases:
        with pytest.raises(ApiError) as caught:
            server.request("POST", TIERS, document(case.spec))
        assert caught.value.status in {400, 422}, case.kind
        assert case.field in caught.value.message, (case.kind, caught.value.message)
