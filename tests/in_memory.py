"""An API server in a dictionary, for tests of what the controller makes of its answers. The ring has the real one."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

from servingtiers.adapters.cluster import ApiError, Kind
from servingtiers.core.state import JsonObject, Ref

__all__ = ["InMemoryCluster"]


class InMemoryCluster:
    """Has the methods of `servingtiers.adapters.cluster.Cluster` that a controller calls."""

    def __init__(self) -> None:
        self.objects: dict[Ref, JsonObject] = {}
        self.writes: list[tuple[str, str]] = []
        """Verb and ``Kind/name`` of every write, whether it was accepted or not; without events."""
        self.refuse: Callable[[str, JsonObject], ApiError | None] = lambda _verb, _body: None
        self.on_write: Callable[[str, str], None] = lambda _verb, _kind: None
        self._versions = itertools.count(1000)

    def put(self, body: JsonObject) -> JsonObject:
        """Store an object as somebody else wrote it."""
        ref = Ref.of(body)
        held = self.objects.get(ref, {})
        kept = {"status": held.get("status", {})} | copy.deepcopy(body)
        version = next(self._versions)
        meta = held.get("metadata", {"uid": f"uid-{version}", "generation": 0})
        changed = held.get("spec") != kept.get("spec") or not held
        kept["metadata"] |= {
            "uid": meta["uid"],
            "generation": meta["generation"] + changed,
            "resourceVersion": str(version),
        }
        self.objects[ref] = kept
        return copy.deepcopy(kept)

    def drop(self, name: str) -> None:
        """Delete ``Kind/name``."""
        (ref,) = [ref for ref in self.objects if f"{ref.kind}/{ref.name}" == name]
        del self.objects[ref]

    def get_now(self, name: str) -> JsonObject:
        """Return ``Kind/name``."""
        (found,) = [obj for ref, obj in self.objects.items() if f"{ref.kind}/{ref.name}" == name]
        return copy.deepcopy(found)

    @property
    def names(self) -> set[str]:
        """All objects as ``Kind/name``."""
        return {f"{ref.kind}/{ref.name}" for ref in self.objects}

    async def create(self, body: JsonObject) -> JsonObject:
        self._written("create", body)
        if Ref.of(body) in self.objects:
            raise ApiError(409, "AlreadyExists", "already exists")
        return self.put(body)

    async def apply(self, body: JsonObject) -> JsonObject:
        self._written("apply", body)
        held = self._held(body)
        if held.get("roleRef") != body.get("roleRef"):
            raise ApiError(422, "Invalid", "cannot change roleRef")
        return self.put(held | body)

    async def take_over_fields(self, body: JsonObject, managed_fields: list[JsonObject]) -> JsonObject:
        self._written("fields", body)
        held = self._held(body)
        return self.put(held | {"metadata": held["metadata"] | {"managedFields": managed_fields}})

    async def apply_status(self, body: JsonObject) -> JsonObject:
        self._written("status", body)
        return self.put(self._held(body) | {"status": body["status"]})

    async def relabel(self, body: JsonObject) -> JsonObject:
        self._written("label", body)
        held = self._held(body)
        for part in ("labels", "annotations"):
            merged = held["metadata"].get(part, {}) | body["metadata"].get(part, {})
            held["metadata"][part] = {key: value for key, value in merged.items() if value is not None}
        return self.put(held)

    async def delete(self, body: JsonObject) -> None:
        self._written("delete", body)
        self._held(body)
        del self.objects[Ref.of(body)]

    async def get(self, ref: Ref) -> JsonObject | None:
        return copy.deepcopy(self.objects.get(ref))

    async def list_all(
        self, kind: Kind, namespace: str | None, *, labels: str = ""
    ) -> tuple[list[JsonObject], int]:
        wanted = dict(pair.split("=") for pair in labels.split(",") if pair)
        found = [
            copy.deepcopy(obj)
            for ref, obj in self.objects.items()
            if (ref.kind, ref.api_version) == (kind.kind, kind.api_version)
            and namespace in {None, ref.namespace}
            and wanted.items() <= obj["metadata"].get("labels", {}).items()
        ]
        return found, next(self._versions)

    def _written(self, verb: str, body: JsonObject) -> None:
        self.on_write(verb, body["kind"])
        if body["kind"] == "Event":
            return
        self.writes.append((verb, f"{body['kind']}/{body['metadata']['name']}"))
        refusal = self.refuse(verb, body)
        if refusal is not None:
            raise refusal

    def _held(self, body: JsonObject) -> JsonObject:
        held = self.objects.get(Ref.of(body))
        if held is None:
            raise ApiError(404, "NotFound", "not found")
        if held["metadata"]["uid"] != body["metadata"].get("uid"):
            raise ApiError(422, "Invalid", "another uid")
        return copy.deepcopy(held)
