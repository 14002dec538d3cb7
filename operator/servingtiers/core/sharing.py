"""Tiers that lend each other engines: what is seen of a group, and what is to be done.

An engine has a *home*, the tier whose Deployment made it, and a *holder*, the tier whose routers select it: the value of
its routing label. Lending changes the label, never the Deployment, so it takes seconds where a new engine takes minutes.
An engine leaves (no holder), finishes what it has, and enters its new holder, in this order unless both fit together.
"""

from __future__ import annotations

from dataclasses import dataclass

from servingtiers.core.decisions import TierDecision, TierObservation
from servingtiers.core.signals import Signal, Unknown

__all__ = ["Group", "GroupDecision", "Relabel", "SharedEngine"]

_NOT_MEASURED = Unknown("not measured")


@dataclass(frozen=True, slots=True)
class SharedEngine:
    """One engine of a group."""

    uid: str
    """Identifies it: the uid of its pod."""
    name: str
    home: str
    """Key of the tier whose Deployment made it."""
    holder: str | None
    """Key of the tier whose routers select it; None: it is leaving its last holder, or waits for the next."""
    bound_for: str | None
    """Key of the tier that it is on its way to while it has no holder; None otherwise. Without either it goes home."""
    ready: bool
    leaving: bool = False
    """It is being deleted: it can no longer be lent."""
    in_flight: Signal = _NOT_MEASURED
    """Requests running and waiting in it, of whatever tier."""
    held_seconds: float | None = None
    """Seconds since its routing label was last changed; None: never changed, or not known. An engine without a holder
    counts as drained only by requests in flight that were read after the change: ``in_flight`` carries their age."""


@dataclass(frozen=True, slots=True)
class Group:
    """The members of one TierPool at one moment; a tier that shares nothing is a group of one without engines."""

    tiers: tuple[TierObservation, ...]
    engines: tuple[SharedEngine, ...] = ()
    """Engines whose home is a member. One whose holder is no member is called home."""
    max_accelerators: int | None = None
    """Most accelerators that all members may hold together; None: no limit."""
    refused: frozenset[str] = frozenset()
    """Keys of the tiers beside the members whose spec is refused: what serves them is left as it is. Of their engines
    only those without a holder are among ``engines``, and go home."""


@dataclass(frozen=True, slots=True)
class Relabel:
    """A change of one engine's routing label."""

    uid: str
    name: str
    holder: str | None
    """Whose routers select it from now on; None: nobody's."""
    bound_for: str | None
    """Where it goes once it is drained, while it has no holder."""
    reason: str


@dataclass(frozen=True, slots=True)
class GroupDecision:
    """What a group does: engines move first, and what no move can give is started."""

    tiers: tuple[TierDecision, ...]
    """In the order of the group's tiers; replicas after what lending gives and takes."""
    relabels: tuple[Relabel, ...] = ()
