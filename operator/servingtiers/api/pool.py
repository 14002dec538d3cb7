"""The kind TierPool: tiers of one model that lend each other engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from servingtiers.api.base import Model
from servingtiers.api.spec import ObjectMeta
from servingtiers.api.status import Condition, ShortText, StatusPart, Time

__all__ = ["EngineHolder", "PoolMember", "TierPool", "TierPoolSpec", "TierPoolStatus"]


class TierPoolSpec(Model):
    """What the members have in common."""

    served_model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$", max_length=128)]
    """Name that clients of every member use in requests. A tier joins whose engines answer to it already
    (`model.servedName`, else `model.name`): joining restarts no engine."""
    max_accelerators: Annotated[int, Field(strict=True, ge=1, le=100_000)] | None = None
    """Most accelerators that all members hold together; the most important tier gets the last one."""


class PoolMember(StatusPart):
    """One tier that names the pool."""

    name: ShortText
    """Name of the ServingTier."""
    priority: int
    """Its priority: higher borrows from lower."""
    agrees: bool = True
    """Whether its engines can take the others' place; `message` says what differs."""
    ready: int = 0
    """Engines of its own that are ready."""
    holds: int = 0
    """Engines that serve it now, whoever owns them."""
    lent: int = 0
    """Engines of its own that do not serve it: lent, or on their way."""
    borrowed: int = 0
    """Engines of other tiers that serve it."""
    message: Annotated[str, Field(max_length=1024)] | None = None
    """Why it takes no part; not set when it does."""


class EngineHolder(StatusPart):
    """One engine that is not at home."""

    pod: ShortText
    """Name of its pod."""
    home: ShortText
    """Tier whose Deployment made it."""
    holder: ShortText | None = None
    """Tier that it serves; not set while it finishes what it has before it moves on."""
    bound_for: ShortText | None = None
    """Tier that it is on its way to."""
    since: Time | None = None
    """When its routing label was last changed."""


class TierPoolStatus(StatusPart):
    """What the operator reports."""

    observed_generation: int | None = None
    """Generation of the spec that this status is about."""
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = []
    """Accepted: the members can stand in for one another. Ready: there is somebody to lend to and from."""
    members: Annotated[
        list[PoolMember],
        Field(
            max_length=64,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = []
    """Tiers that name the pool, the most important first."""
    accelerators: int | None = None
    """Accelerators that the members' engines ask for."""
    engines: int | None = None
    """Engines of all members that are ready."""
    moved: int | None = None
    """Engines that are not at home."""
    away: Annotated[
        list[EngineHolder],
        Field(
            max_length=256,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["pod"]},
        ),
    ] = []
    """Engines that are not at home, with their holders."""


class TierPool(Model):
    """Tiers of one model that lend each other engines."""

    api_version: str
    kind: Literal["TierPool"]
    metadata: ObjectMeta
    spec: TierPoolSpec
    status: TierPoolStatus | None = None

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Self:
        """Return the pool of an object as an API server holds it.

        Raises:
            pydantic.ValidationError: The object is no valid pool.
        """
        return cls.model_validate(raw, by_alias=True, by_name=False)
