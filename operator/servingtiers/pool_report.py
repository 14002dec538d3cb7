"""What is said of a TierPool: its members, and who holds which engine. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from servingtiers.api.pool import EngineHolder, PoolMember, TierPool, TierPoolStatus
from servingtiers.api.spec import ServingTier
from servingtiers.api.status import Condition
from servingtiers.core.sharing import SharedEngine
from servingtiers.core.times import to_time

__all__ = ["MemberReport", "pool_status"]

_MOST_AWAY = 256
_MOST_MEMBERS = 64


@dataclass(frozen=True, slots=True)
class MemberReport:
    """What is known of one member."""

    tier: ServingTier
    accelerators: int
    """What its own engines ask for."""
    apart: str | None
    """Why it takes no part; None: it does."""


def pool_status(
    pool: TierPool, members: tuple[MemberReport, ...], engines: Sequence[SharedEngine], *, now: float
) -> TierPoolStatus:
    """Return the status of a TierPool: of facts and outcomes only, so that it is written when one changes."""
    ready = [engine for engine in engines if engine.ready and not engine.leaving]
    reported = [_member(member, ready) for member in members]
    reported.sort(key=lambda member: (-member.priority, member.name))
    away = [engine for engine in ready if engine.holder != engine.home]
    return TierPoolStatus(
        observed_generation=pool.metadata.generation,
        conditions=_conditions(pool, members, now),
        members=reported[:_MOST_MEMBERS],
        accelerators=sum(member.accelerators for member in members),
        engines=len(ready),
        moved=len(away),
        away=[_holder(engine, now) for engine in sorted(away, key=lambda e: e.name)[:_MOST_AWAY]],
    )


def _member(member: MemberReport, ready: Sequence[SharedEngine]) -> PoolMember:
    meta = member.tier.metadata
    key = f"{meta.namespace}/{meta.name}"
    own = [engine for engine in ready if engine.home == key]
    terms = member.tier.spec.shared_pool
    return PoolMember(
        name=meta.name,
        priority=terms.priority if terms is not None else 0,
        agrees=member.apart is None,
        ready=len(own),
        holds=sum(engine.holder == key for engine in ready),
        lent=sum(engine.holder != key for engine in own),
        borrowed=sum(engine.holder == key and engine.home != key for engine in ready),
        message=member.apart[:1024] if member.apart is not None else None,
    )


def _holder(engine: SharedEngine, now: float) -> EngineHolder:
    def name(key: str | None) -> str | None:
        return None if key is None else key.rpartition("/")[2]

    since = None if engine.held_seconds is None else now - engine.held_seconds
    return EngineHolder(
        pod=engine.name,
        home=engine.home.rpartition("/")[2],
        holder=name(engine.holder),
        bound_for=name(engine.bound_for),
        since=None if since is None else to_time(round(since)),
    )


def _conditions(pool: TierPool, members: Sequence[MemberReport], now: float) -> list[Condition]:
    apart = [member for member in members if member.apart is not None]
    together = len(members) - len(apart)
    if apart:
        said = "; ".join(f"{member.tier.metadata.name}: {member.apart}" for member in apart)
        accepted = _draft("Accepted", "False", "MembersDisagree", said)
    elif not members:
        accepted = _draft("Accepted", "True", "NoMembers", "no tier names this pool in spec.sharedPool")
    else:
        accepted = _draft(
            "Accepted", "True", "MembersAgree", f"{together} tiers can stand in for one another"
        )
    if together >= 2:
        ready = _draft("Ready", "True", "Lending", f"{together} tiers lend each other engines")
    else:
        message = f"{together} tiers take part: lending needs two at least"
        ready = _draft("Ready", "False", "TooFewMembers", message)
    before = {c.type: c for c in pool.status.conditions} if pool.status is not None else {}
    return [
        draft.model_copy(
            update={
                "last_transition_time": old.last_transition_time
                if (old := before.get(draft.type)) is not None and old.status == draft.status
                else to_time(now),
                "observed_generation": pool.metadata.generation,
            }
        )
        for draft in (accepted, ready)
    ]


def _draft(
    kind: Literal["Accepted", "Ready"], status: Literal["True", "False"], reason: str, message: str
) -> Condition:
    return Condition(type=kind, status=status, reason=reason, message=message[:1024], last_transition_time="")
