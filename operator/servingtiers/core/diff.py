"""What must be written so that the cluster holds what is desired: pure comparison of objects.

An apply that changes nothing is still a write, so an object is applied only where the desired one is not already
contained in the live one, or where something we once applied is desired no longer (the hash annotation differs).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from servingtiers.core.state import JsonObject, Ref, Verb, Write

__all__ = ["APPLIED_HASH", "Changes", "changes", "contains", "content_hash", "owned_by", "quantity"]

APPLIED_HASH: Final = "servingtiers.io/applied-hash"
"""Annotation: hash of what was last applied, so that a field we stop setting is noticed."""

_ASSOCIATIVE: Final = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "volumeMounts": ("mountPath",),
    "ports": ("port", "containerPort"),
    "imagePullSecrets": ("name",),
    "ownerReferences": ("uid",),
    "topologySpreadConstraints": ("topologyKey",),
}
"""Lists that server-side apply merges by key: what others add to them stays."""
_ATOMIC_UNDER: Final = frozenset({"ingress", "egress"})
"""Below these (NetworkPolicy) every list is atomic, also one called ports."""
_QUANTITIES: Final = frozenset({"requests", "limits", "sizeLimit"})

_SUFFIXES: Final = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12), "P": Decimal(10**15), "E": Decimal(10**18),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40), "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip


def quantity(text: str | int) -> Decimal:
    """Return the number of a Kubernetes quantity such as ``500m`` or ``2Gi``.

    Raises:
        ValueError: The text is no quantity.
    """
    raw = str(text)
    number = raw.rstrip("numkMGTPEi")
    suffix = raw[len(number) :]
    try:
        return Decimal(number) * _SUFFIXES[suffix]
    except (InvalidOperation, KeyError) as error:
        raise ValueError(f"{raw!r} is not a quantity: write it like 500m, 2 or 16Gi") from error


def contains(live: Any, desired: Any, path: tuple[str, ...] = ()) -> bool:
    """Return whether everything in ``desired`` is in ``live`` as the API server would keep it.

    The API server adds defaults, drops empty values and rewrites quantities; none of that is a difference.
    """
    match desired:
        case dict():
            if not isinstance(live, dict):
                return not desired and live is None
            return all(contains(live.get(key), value, (*path, key)) for key, value in desired.items())
        case list():
            return _contains_list([] if live is None else live, desired, path)
        case _ if live is None:
            return not desired  # false, 0 and "" are dropped by the API server
        case str() | int() if _QUANTITIES.intersection(path[-2:]) and isinstance(live, str | int):
            return quantity(live) == quantity(desired)
        case _:
            return bool(live == desired)


def _contains_list(live: Any, desired: list[Any], path: tuple[str, ...]) -> bool:
    if not isinstance(live, list):
        return False
    keys = () if _ATOMIC_UNDER.intersection(path) else _ASSOCIATIVE.get(path[-1] if path else "", ())
    key = next(
        (k for k in keys if desired and all(isinstance(item, dict) and k in item for item in desired)), None
    )
    if key is None:
        return len(live) == len(desired) and all(
            contains(a, b, path) for a, b in zip(live, desired, strict=True)
        )
    # One key value may occur twice (a port for TCP and UDP): any live item with it will do.
    return all(
        any(
            isinstance(item, dict) and item.get(key) == want[key] and contains(item, want, path)
            for item in live
        )
        for want in desired
    )


def content_hash(obj: Any) -> str:
    """Return a short stable hash of JSON content."""
    canonical = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Changes:
    """The outcome of a comparison."""

    writes: tuple[Write, ...]
    foreign: tuple[Ref, ...]
    """Names we need that somebody else's objects bear. What would name these objects in turn is not written."""
    waiting: tuple[Ref, ...]
    """Objects that are being deleted and must be gone before they are made anew."""


def changes(
    desired: Iterable[JsonObject], live: Iterable[JsonObject], *, owner_uid: str, field_manager: str
) -> Changes:
    """Compare the desired objects of one owner with the live ones.

    ``live`` holds the owner's objects and any others that bear a desired name.

    A pod runs with the rights of the account that it names, whoever made it and whatever was given to it since, so
    nothing is written that names an account or a Role of somebody else. For the same reason no Deployment is created
    while one of the NetworkPolicies of its pods is somebody else's; one that exists is kept as desired, as its pods are
    exposed already.
    """
    objects = list(desired)
    named, guarded = _named(objects), _guarded(objects)
    found = {Ref.of(obj): obj for obj in live}
    writes: list[Write] = []
    foreign: list[Ref] = []
    waiting: list[Ref] = []
    wanted: set[Ref] = set()
    for plain in objects:
        obj = _with_hash(plain)
        ref = Ref.of(obj)
        wanted.add(ref)
        current = found.get(ref)
        if current is None:
            needs = named[ref] | guarded[ref]
            writes.append(Write(Verb.CREATE, obj, "it does not exist", needs=needs))
        elif not owned_by(current, owner_uid):
            foreign.append(ref)
        elif current["metadata"].get("deletionTimestamp"):
            waiting.append(ref)
        elif current.get("roleRef", obj.get("roleRef")) != obj.get("roleRef"):
            writes.append(Write(Verb.DELETE, current, "its roleRef cannot be changed: it is made anew"))
            writes.append(Write(Verb.CREATE, obj, "its roleRef could not be changed", needs=named[ref]))
        elif why := _difference(current, obj):
            taken = _take_over(current, field_manager)
            if taken is not None:
                why_taken = "make fields set at creation removable by apply"
                writes.append(Write(Verb.FIELDS, taken, why_taken, needs=named[ref]))
            body = obj | {"metadata": obj["metadata"] | {"uid": current["metadata"]["uid"]}}
            writes.append(Write(Verb.APPLY, body, why, needs=named[ref]))
    writes += [
        Write(Verb.DELETE, obj, "the tier no longer needs it")
        for ref, obj in found.items()
        if ref not in wanted and owned_by(obj, owner_uid) and not obj["metadata"].get("deletionTimestamp")
    ]
    return Changes(
        tuple(write for write in writes if write.needs.isdisjoint(foreign)), tuple(foreign), tuple(waiting)
    )


def owned_by(obj: Mapping[str, Any], uid: str) -> bool:
    """Return whether an object names the owner with that uid."""
    return any(owner.get("uid") == uid for owner in obj["metadata"].get("ownerReferences", ()))


def _named(objects: Sequence[JsonObject]) -> dict[Ref, frozenset[Ref]]:
    """Return by object the desired accounts and Roles that give it, or that it gives, rights."""
    by_name = {
        (ref.kind, ref.namespace, ref.name): ref
        for ref in map(Ref.of, objects)
        if ref.kind in {"ServiceAccount", "Role"}
    }

    def names(obj: JsonObject) -> Iterator[tuple[str, str, str]]:
        namespace = obj["metadata"].get("namespace", "")
        if "roleRef" in obj:
            yield obj["roleRef"]["kind"], namespace, obj["roleRef"]["name"]
            for subject in obj.get("subjects", ()):
                yield subject["kind"], subject.get("namespace", namespace), subject["name"]
        if account := _pod(obj).get("spec", {}).get("serviceAccountName"):
            yield "ServiceAccount", namespace, account

    return {
        Ref.of(obj): frozenset(by_name[name] for name in names(obj) if name in by_name) for obj in objects
    }


def _guarded(objects: Sequence[JsonObject]) -> dict[Ref, frozenset[Ref]]:
    """Return by object the desired NetworkPolicies that select its pods."""
    policies = [
        (Ref.of(obj), obj["spec"]["podSelector"].get("matchLabels", {}).items())
        for obj in objects
        if obj["kind"] == "NetworkPolicy"
    ]
    found: dict[Ref, frozenset[Ref]] = {}
    for obj in objects:
        labels = _pod(obj).get("metadata", {}).get("labels", {}).items()
        found[Ref.of(obj)] = frozenset(ref for ref, selector in policies if labels and selector <= labels)
    return found


def _pod(obj: JsonObject) -> JsonObject:
    """Return the pod template of an object; empty where it has none."""
    template: JsonObject = obj.get("spec", {}).get("template", {})
    return template


def _with_hash(obj: JsonObject) -> JsonObject:
    meta = obj["metadata"]
    annotations = meta.get("annotations", {}) | {APPLIED_HASH: content_hash(obj)}
    return obj | {"metadata": meta | {"annotations": annotations}}


def _difference(live: JsonObject, desired: JsonObject) -> str | None:
    old = live["metadata"].get("annotations", {}).get(APPLIED_HASH)
    if old != desired["metadata"]["annotations"][APPLIED_HASH]:
        return "what is desired has changed"
    if not contains(live, desired):
        return "it was changed by somebody else"
    return None


def _take_over(live: JsonObject, manager: str) -> JsonObject | None:
    """Return the object with our creation's fields turned into applied ones; None when that is done already.

    A POST records its fields as an *update*; an apply that leaves one of them out would not remove it.
    """
    entries = live["metadata"].get("managedFields", [])
    ours = [e for e in entries if e.get("manager") == manager and not e.get("subresource")]
    if not any(e["operation"] == "Update" for e in ours):
        return None
    fields: JsonObject = {}
    for entry in ours:
        fields = _union(fields, entry.get("fieldsV1", {}))
    newest = max(ours, key=lambda entry: str(entry.get("time", "")))
    merged = newest | {"operation": "Apply", "fieldsV1": fields}
    meta = live["metadata"]
    return {
        "apiVersion": live["apiVersion"],
        "kind": live["kind"],
        "metadata": {
            "name": meta["name"],
            "namespace": meta.get("namespace", ""),
            "resourceVersion": meta["resourceVersion"],
            "managedFields": [e for e in entries if e not in ours] + [merged],
        },
    }


def _union(a: JsonObject, b: JsonObject) -> JsonObject:
    return a | {key: _union(a.get(key, {}), value) for key, value in b.items()}
