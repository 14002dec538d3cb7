"""What is seen and what is to be done: the two ends of ``reconcile.plan``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from servingtiers.core.config import OperatorConfig
from servingtiers.core.decisions import TierDecision
from servingtiers.core.signals import TierLoad

__all__ = ["Event", "JsonObject", "Member", "Observed", "Plan", "Ref", "Verb", "Write"]

JsonObject = dict[str, Any]
"""A Kubernetes object as JSON."""


@dataclass(frozen=True, slots=True)
class Ref:
    """Names one object."""

    api_version: str
    kind: str
    namespace: str
    name: str

    @classmethod
    def of(cls, obj: Mapping[str, Any]) -> Ref:
        """Return the reference of an object."""
        meta = obj["metadata"]
        return cls(obj["apiVersion"], obj["kind"], meta.get("namespace", ""), meta["name"])

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Member:
    """One tier and everything that belongs to it."""

    raw: JsonObject
    """The ServingTier as the API server sent it."""
    objects: tuple[JsonObject, ...]
    """Objects that carry the tier's labels or bear a name the tier would use, managedFields included."""
    pods: tuple[JsonObject, ...]
    """Pods with the tier's labels."""
    load: TierLoad = field(default_factory=TierLoad)
    load_elapsed: float = 0.0
    """Seconds of traffic in the load that were not accounted before; 0 where the load is not new."""
    watching_since: float | None = None
    """Unix time since which this process has read the tier's load without a break."""
    remembered: object | None = None
    """What the latest plan wanted remembered, as it gave it; None after a restart: then the written status holds."""
    failures: tuple[str, ...] = ()
    """Writes of the latest pass that the API server refused."""
    autoscalers: tuple[JsonObject, ...] = ()
    """HorizontalPodAutoscalers of the namespace."""
    load_age: float = 0.0
    """Seconds since the load was read: ages in it count from then."""


@dataclass(frozen=True, slots=True)
class Observed:
    """The members of one reconcile key (one tier; a group of tiers that lend to each other) at one moment."""

    now: float
    """Unix time, seconds."""
    config: OperatorConfig
    members: tuple[Member, ...]
    pool: JsonObject | None = None
    """The TierPool that the members name, as the API server sent it; None: they name none, or there is none."""


class Verb(StrEnum):
    """How a write reaches the API server."""

    CREATE = "create"
    """POST: a 409 means somebody else's object, which is never adopted."""
    APPLY = "apply"
    """Server-side apply with ``metadata.uid``: another object of the same name is a 422 and never touched."""
    FIELDS = "fields"
    """Rewrite managedFields at the very resourceVersion read: once, before an object's first apply."""
    DELETE = "delete"
    """DELETE with a uid precondition."""
    LABEL = "label"
    """Merge patch of labels and annotations of a pod of ours, at the very uid and resourceVersion read."""
    STATUS = "status"
    """Server-side apply of the status subresource."""


@dataclass(frozen=True, slots=True)
class Write:
    """One mutating request."""

    verb: Verb
    body: JsonObject
    why: str
    member: int = 0
    """Index of the member whose object it is."""
    needs: frozenset[Ref] = frozenset()
    """Objects of the same tier that the object names: without one of them, or with somebody else's, it is not written."""


@dataclass(frozen=True, slots=True)
class Event:
    """One Kubernetes event on a tier."""

    regarding: JsonObject
    type: str
    """Normal or Warning."""
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do about an observation: writes in order, then events."""

    writes: tuple[Write, ...]
    events: tuple[Event, ...]
    recheck_after: float
    """Seconds until the members should be looked at again even if nothing changes."""
    remember: tuple[object | None, ...]
    """Per member: to be handed back with the next observation, and nobody else's business."""
    decided: tuple[TierDecision, ...]
    """What scaling decided, for metrics and logs."""
    moving: bool = False
    """Engines are on their way from one tier to another: loads should be read again in seconds."""
