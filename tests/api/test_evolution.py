"""What breaks users when a CRD changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from servingtiers.api.crd import crd_document
from servingtiers.api.evolution import breaking_changes

Change = Callable[[dict[str, Any], dict[str, Any]], object]


def spec_of(document: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of `spec`."""
    properties = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    found: dict[str, Any] = properties["spec"]
    return found


def changed(change: Change) -> list[str]:
    """Return what breaks when the document is changed."""
    new = crd_document()
    change(new, spec_of(new))
    return breaking_changes(crd_document(), new)


def test_the_same_document_breaks_nothing() -> None:
    """The baseline of the cases below."""
    assert breaking_changes(crd_document(), crd_document()) == []


BREAKS: list[tuple[str, Change, str]] = [
    ("a field is removed", lambda _, s: s["properties"].pop("suspend"), "spec.suspend: was removed"),
    ("a field becomes required", lambda _, s: s["required"].append("slo"), "spec.slo: became required"),
    ("a default changes", lambda _, s: s["properties"]["drainTimeout"].update(default="30s"),
     "spec.drainTimeout: default changed from '60s' to '30s'"),
    ("a default is added", lambda _, s: s["properties"]["pool"].update(default={}), "spec.pool: default changed"),
    ("a default is removed", lambda _, s: s["properties"]["suspend"].pop("default"), "spec.suspend: default changed"),
    ("a value is removed", lambda _, s: s["properties"]["tier"]["enum"].remove("Balanced"),
     "spec.tier: value 'Balanced' was removed"),
    ("values are limited", lambda _, s: s["properties"]["drainTimeout"].update(enum=["60s"]),
     "spec.drainTimeout: values were limited"),
    ("a type changes", lambda _, s: s["properties"]["suspend"].update(type="string"),
     "spec.suspend: type changed from 'boolean' to 'string'"),
    ("a lower bound is raised",
     lambda _, s: s["properties"]["router"]["properties"]["replicas"].update(minimum=2),
     "spec.router.replicas: minimum was raised from 1 to 2"),
    ("an upper bound is lowered",
     lambda _, s: s["properties"]["router"]["properties"]["replicas"].update(maximum=2),
     "spec.router.replicas: maximum was lowered from 20 to 2"),
    ("a bound is added", lambda _, s: s["properties"]["slo"].update(maxProperties=1),
     "spec.slo: maxProperties was lowered from None to 1"),
    ("a bound becomes exclusive",
     lambda _, s: s["properties"]["router"]["properties"]["replicas"].update(exclusiveMinimum=True),
     "spec.router.replicas: exclusiveMinimum was set"),
    ("a rule is added",
     lambda _, s: s["x-kubernetes-validations"].append({"rule": "has(self.slo)", "message": "set slo"}),
     "spec: new rule: set slo"),
    ("a pattern changes", lambda _, s: s["properties"]["drainTimeout"].update(pattern="^1s$"),
     "spec.drainTimeout: pattern changed"),
    ("an item is narrowed",
     lambda _, s: s["properties"]["pool"]["properties"]["hardware"]["properties"]["accelerators"]["items"].update(
         maxLength=9),
     "spec.pool.hardware.accelerators[*]: maxLength was lowered from 63 to 9"),
    ("a map becomes an object",
     lambda _, s: s["properties"]["pod"]["properties"]["labels"].pop("additionalProperties"),
     "spec.pod.labels: additionalProperties was removed"),
    ("a list merges differently",
     lambda _, s: s["properties"]["pod"]["properties"]["imagePullSecrets"].update({"x-kubernetes-list-type": "atomic"}),
     "spec.pod.imagePullSecrets: x-kubernetes-list-type changed"),
    ("the scope changes", lambda d, _: d["spec"].update(scope="Cluster"), "scope changed from Namespaced to Cluster"),
    ("the plural changes", lambda d, _: d["spec"]["names"].update(plural="tiers"), "names changed"),
    ("the group changes", lambda d, _: d["spec"].update(group="example.com"), "group changed"),
    ("a version goes", lambda d, _: d["spec"]["versions"][0].update(name="v1"), "version v1alpha1 was removed"),
    ("a version is no longer served", lambda d, _: d["spec"]["versions"][0].update(served=False),
     "version v1alpha1 is no longer served"),
    ("the status subresource goes", lambda d, _: d["spec"]["versions"][0].pop("subresources"),
     "version v1alpha1: subresources changed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"), [case[1:] for case in BREAKS], ids=[case[0] for case in BREAKS]
)
def test_what_breaks_users_is_named_with_its_path(change: Change, sentence: str) -> None:
    """One change, one sentence."""
    found = changed(change)
    assert len(found) == 1
    assert sentence in found[0]


FINE: list[tuple[str, Change]] = [
    ("an optional field", lambda _, s: s["properties"].update(new={"type": "string", "maxLength": 5})),
    ("an optional field with a default", lambda _, s: s["properties"].update(new={"type": "integer", "default": 1})),
    ("a new value", lambda _, s: s["properties"]["tier"]["enum"].append("Batch")),
    ("a wider bound", lambda _, s: s["properties"]["router"]["properties"]["replicas"].update(maximum=30)),
    ("a removed rule", lambda _, s: s["x-kubernetes-validations"].pop()),
    ("a reworded message", lambda _, s: s["x-kubernetes-validations"][0].update(message="remove one of them")),
    ("another description", lambda _, s: s.update(description="Other words.")),
    ("a field that is no longer required", lambda _, s: s["required"].remove("tier")),
    ("a short name", lambda d, _: d["spec"]["names"]["shortNames"].append("tier")),
    ("a further version", lambda d, _: d["spec"]["versions"].append(
        {**copy.deepcopy(d["spec"]["versions"][0]), "name": "v1beta1", "storage": False})),
]  # fmt: skip


@pytest.mark.parametrize("change", [case[1] for case in FINE], ids=[case[0] for case in FINE])
def test_what_every_stored_object_survives_is_no_break(change: Change) -> None:
    """Widening is how an API grows."""
    assert changed(change) == []
