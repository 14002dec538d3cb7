"""What the operator has seen of the cluster: a cache fed by watches, by its own writes and by relists.

It only ever moves forward: an event that is older than what is held (a watch that lags behind our own write) is
dropped. A watch may lose deletions (after a 410 Gone), so every kind is relisted every few minutes and compared
by uid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from servingtiers.core.state import JsonObject, Ref

__all__ = ["Key", "Store", "group_of", "key_of_tier"]

_AUTOSCALER = "HorizontalPodAutoscaler"
_POOL_PREFIX = "pool/"
Key = tuple[str, str]
"""Namespace and name of a tier; of a TierPool with ``pool/`` before its name, where a group of tiers is meant."""


def key_of_tier(tier: Mapping[str, Any]) -> Key:
    """Return the key of a ServingTier object."""
    return tier["metadata"]["namespace"], tier["metadata"]["name"]


def group_of(tier: Mapping[str, Any]) -> Key:
    """Return the key under which a tier is reconciled: that of its TierPool where it names one, else its own.

    No name of a Kubernetes object contains a slash, so no tier's key looks like a pool's.
    """
    namespace, name = key_of_tier(tier)
    pool = ((tier.get("spec") or {}).get("sharedPool") or {}).get("name")
    return (namespace, f"{_POOL_PREFIX}{pool}") if isinstance(pool, str) else (namespace, name)


def _version(obj: Mapping[str, Any]) -> int:
    """Return the resource version; the API server promises since 1.35 that these may be compared."""
    try:
        return int(obj["metadata"]["resourceVersion"])
    except (KeyError, ValueError):
        return 0


def _key_of_pool(pool: Mapping[str, Any]) -> Key:
    return pool["metadata"]["namespace"], f"{_POOL_PREFIX}{pool['metadata']['name']}"


class Store:
    """All watched objects, by reference and by the tier they belong to."""

    def __init__(self, tier_label: str, label_value: Callable[[str], str] = str) -> None:
        """Take the label that names the tier on its objects, and how a tier's name is written in it."""
        self._tier_label = tier_label
        self._label_value = label_value
        self.tiers: dict[Key, JsonObject] = {}
        self.pools: dict[Key, JsonObject] = {}
        """TierPools by their group's key."""
        self._objects: dict[Ref, JsonObject] = {}
        self._by_tier: dict[Key, set[Ref]] = defaultdict(set)
        self._autoscalers: dict[str, dict[Ref, JsonObject]] = defaultdict(dict)
        self._forgotten: set[str] = set()
        """Uids of what was deleted since a list was asked for: its answer may still tell of them."""

    # -- lists -------------------------------------------------------------------------------------------------

    def list_begins(self) -> None:
        """Say that a list is about to be asked for; one at a time."""
        self._forgotten.clear()

    def _still_there(self, items: Iterable[JsonObject]) -> list[JsonObject]:
        """Return what of a list was not deleted while its answer was under way."""
        return [obj for obj in items if obj["metadata"].get("uid") not in self._forgotten]

    def _gone(self, obj: Mapping[str, Any]) -> None:
        if (uid := obj["metadata"].get("uid")) is not None:
            self._forgotten.add(uid)

    def _back(self, obj: Mapping[str, Any]) -> None:
        """Take note that an object is there after all: a label came back, or its deletion waits for others."""
        self._forgotten.discard(obj["metadata"].get("uid", ""))

    # -- tiers -------------------------------------------------------------------------------------------------

    def see_tier(self, tier: JsonObject) -> bool:
        """Take in a tier; return whether it is news."""
        key = key_of_tier(tier)
        held = self.tiers.get(key)
        if held is not None and _version(held) >= _version(tier):
            return False
        self.tiers[key] = tier
        self._back(tier)
        return True

    def forget_tier(self, tier: JsonObject) -> None:
        """Drop a deleted tier, unless one of the same name has come since."""
        self._gone(tier)
        key = key_of_tier(tier)
        held = self.tiers.get(key)
        if held is not None and held["metadata"]["uid"] == tier["metadata"]["uid"]:
            del self.tiers[key]

    # -- groups of tiers ---------------------------------------------------------------------------------------

    def members(self, key: Key) -> list[tuple[Key, JsonObject]]:
        """Return the tiers that are reconciled under a key, or together with the tier of that key, by name."""
        tier = self.tiers.get(key)
        group = key if tier is None else group_of(tier)
        if group in self.tiers:
            return [(group, self.tiers[group])]
        return sorted(
            (item for item in self.tiers.items() if item[0][0] == group[0] and group_of(item[1]) == group),
            key=lambda item: item[0],
        )

    def see_pool(self, pool: JsonObject) -> Key | None:
        """Take in a TierPool; return the key of its group when it is news."""
        key = _key_of_pool(pool)
        held = self.pools.get(key)
        if held is not None and _version(held) >= _version(pool):
            return None
        self.pools[key] = pool
        self._back(pool)
        return key

    def forget_pool(self, pool: JsonObject) -> Key | None:
        """Drop a deleted TierPool, unless one of the same name has come since; return its group's key."""
        self._gone(pool)
        key = _key_of_pool(pool)
        held = self.pools.get(key)
        if held is None or held["metadata"]["uid"] != pool["metadata"]["uid"]:
            return None
        del self.pools[key]
        return key

    def relist_pools(self, items: Iterable[JsonObject], version: int) -> set[Key]:
        """Replace the TierPools by a list of that version; return the keys of groups with a new, changed or gone one."""
        fresh = {_key_of_pool(pool): pool for pool in self._still_there(items)}
        gone = {key for key, held in self.pools.items() if key not in fresh and _version(held) <= version}
        for key in gone:
            del self.pools[key]
        news = (self.see_pool(pool) for pool in fresh.values())
        return gone | {key for key in news if key is not None}

    # -- everything else ---------------------------------------------------------------------------------------

    def see(self, obj: JsonObject) -> Key | None:
        """Take in an object; return namespace and label value of the tier it belongs to when it is news."""
        self._back(obj)
        ref = Ref.of(obj)
        if ref.kind == _AUTOSCALER:
            self._autoscalers[ref.namespace][ref] = obj
            return None
        held = self._objects.get(ref)
        same = held is not None and held["metadata"].get("uid") == obj["metadata"].get("uid")
        if held is not None and same and _version(held) >= _version(obj):
            return None
        key = self._key_of(obj)
        if held is not None and (old := self._key_of(held)) is not None and old != key:
            self._by_tier[old].discard(ref)
        self._objects[ref] = obj
        if key is not None:
            self._by_tier[key].add(ref)
        return key

    def forget(self, obj: JsonObject) -> Key | None:
        """Drop a deleted object, unless one of the same name has come since; return as ``see`` does."""
        self._gone(obj)
        ref = Ref.of(obj)
        if ref.kind == _AUTOSCALER:
            self._autoscalers[ref.namespace].pop(ref, None)
            return None
        held = self._objects.get(ref)
        if held is None or held["metadata"].get("uid") != obj["metadata"].get("uid"):
            return None
        del self._objects[ref]
        key = self._key_of(held)
        if key is not None:
            self._by_tier[key].discard(ref)
            if not self._by_tier[key]:
                del self._by_tier[key]
        return key

    def relist(self, kind: str, api_version: str, items: Iterable[JsonObject], version: int) -> set[Key]:
        """Replace what is held of one kind by a list of that version; return as ``see`` does, for all that changed.

        What is newer than the list (our own writes since it was asked for) stays.
        """
        fresh = {Ref.of(obj): obj for obj in self._still_there(items)}
        if kind == _AUTOSCALER:
            self._autoscalers.clear()
        affected: set[Key] = set()
        stale = [
            obj
            for ref, obj in self._objects.items()
            if (ref.kind, ref.api_version) == (kind, api_version)
            and fresh.get(ref, {}).get("metadata", {}).get("uid") != obj["metadata"].get("uid")
            and _version(obj) <= version
        ]
        for obj in stale:
            if (key := self.forget(obj)) is not None:
                affected.add(key)
        for obj in fresh.values():
            if (key := self.see(obj)) is not None:
                affected.add(key)
        return affected

    def relist_tiers(self, items: Iterable[JsonObject], version: int) -> set[Key]:
        """Replace the tiers by a list of that version; return the keys of those that are new, changed or gone."""
        fresh = {key_of_tier(tier): tier for tier in self._still_there(items)}
        gone = {key for key, held in self.tiers.items() if key not in fresh and _version(held) <= version}
        for key in gone:
            del self.tiers[key]
        return gone | {key for key, tier in fresh.items() if self.see_tier(tier)}

    def belonging_to(self, key: Key) -> tuple[tuple[JsonObject, ...], tuple[JsonObject, ...]]:
        """Return the tier's objects and its pods, each in a stable order."""
        label = (key[0], self._label_value(key[1]))
        refs = sorted(self._by_tier.get(label, ()), key=str)
        objects = [self._objects[ref] for ref in refs]
        pods = tuple(obj for obj in objects if obj["kind"] == "Pod")
        return tuple(obj for obj in objects if obj["kind"] != "Pod"), pods

    def autoscalers(self, namespace: str) -> tuple[JsonObject, ...]:
        """Return the HorizontalPodAutoscalers of a namespace."""
        return tuple(self._autoscalers.get(namespace, {}).values())

    def _key_of(self, obj: Mapping[str, Any]) -> Key | None:
        meta = obj["metadata"]
        name = meta.get("labels", {}).get(self._tier_label)
        return (meta.get("namespace", ""), name) if name else None
