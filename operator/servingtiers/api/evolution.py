"""Whether a new CRD breaks what users have stored or written for the old one.

The rules are those that OLM's CRD upgrade check enforces: an object that the old schema took must be taken by the
new one, with the same meaning. New optional fields and wider bounds are fine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["breaking_changes"]

_LOWER_BOUNDS = ("minimum", "minLength", "minItems", "minProperties")
_UPPER_BOUNDS = ("maximum", "maxLength", "maxItems", "maxProperties")
_FIXED = ("type", "format", "pattern", "x-kubernetes-int-or-string", "x-kubernetes-list-type",
          "x-kubernetes-list-map-keys", "x-kubernetes-map-type")  # fmt: skip

_MISSING = object()


def breaking_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return what of `new` breaks users of `old`; empty when nothing does.

    Args:
        old: A CustomResourceDefinition, as released.
        new: The one that would replace it.

    Returns:
        One sentence per break, each with the path of the field.
    """
    return list(_of_document(old["spec"], new["spec"]))


def _of_document(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    if old["scope"] != new["scope"]:
        yield f"scope changed from {old['scope']} to {new['scope']}"
    for key in ("group", "names"):
        before, after = old[key], new[key]
        if key == "names":
            before, after = (before["kind"], before["plural"]), (after["kind"], after["plural"])
        if before != after:
            yield f"{key} changed from {before} to {after}"
    versions = {version["name"]: version for version in new["versions"]}
    for version in old["versions"]:
        name = version["name"]
        if name not in versions:
            yield f"version {name} was removed"
            continue
        if version["served"] and not versions[name]["served"]:
            yield f"version {name} is no longer served"
        if version.get("subresources") != versions[name].get("subresources"):
            yield f"version {name}: subresources changed"
        yield from _of_schema(
            version["schema"]["openAPIV3Schema"], versions[name]["schema"]["openAPIV3Schema"], name
        )


def _of_schema(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> Iterator[str]:
    for key in _FIXED:
        if old.get(key) != new.get(key):
            yield f"{path}: {key} changed from {old.get(key)!r} to {new.get(key)!r}"
    yield from _of_values(old, new, path)
    for name in sorted(set(new.get("required", ())) - set(old.get("required", ()))):
        yield f"{path}.{name}: became required"
    rules = {rule["rule"] for rule in old.get("x-kubernetes-validations", ())}
    for rule in new.get("x-kubernetes-validations", ()):
        if rule["rule"] not in rules:
            yield f"{path}: new rule: {rule['message']}"
    properties = new.get("properties", {})
    for name, child in old.get("properties", {}).items():
        if name in properties:
            yield from _of_schema(child, properties[name], f"{path}.{name}")
        else:
            yield f"{path}.{name}: was removed"
    for key in ("items", "additionalProperties"):
        if key in old and key in new:
            yield from _of_schema(old[key], new[key], f"{path}[*]")
        elif key in old or key in new:
            yield f"{path}: {key} was {'removed' if key in old else 'added'}"


def _of_values(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> Iterator[str]:
    """Compare default, enum and bounds of one node."""
    if old.get("default", _MISSING) != new.get("default", _MISSING):
        yield f"{path}: default changed from {old.get('default')!r} to {new.get('default')!r}"
    if "enum" in new:
        if "enum" not in old:
            yield f"{path}: values were limited to {new['enum']}"
        for value in old.get("enum", ()):
            if value not in new["enum"]:
                yield f"{path}: value {value!r} was removed"
    for key in _LOWER_BOUNDS:
        if key in new and (key not in old or new[key] > old[key]):
            yield f"{path}: {key} was raised from {old.get(key)} to {new[key]}"
    for key in _UPPER_BOUNDS:
        if key in new and (key not in old or new[key] < old[key]):
            yield f"{path}: {key} was lowered from {old.get(key)} to {new[key]}"
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if new.get(key) and not old.get(key):
            yield f"{path}: {key} was set"
