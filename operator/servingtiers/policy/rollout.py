"""How a new pod template replaces the old one.

A surge asks for accelerators beside those in use. With none free, the new pod waits for the old one to go and the
old one for the new one to be ready: the rollout never ends. So nothing surges unless room is known.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Surge", "surge"]


@dataclass(frozen=True, slots=True)
class Surge:
    """The RollingUpdate strategy of a Deployment."""

    max_surge: int
    max_unavailable: int
    reason: str


def surge(replicas: int, room: int | None) -> Surge:
    """Return how many replicas a rollout may add and miss at a time.

    Args:
        replicas: Replicas of the pool.
        room: Replicas for which accelerators are known to be free; None: not known.
    """
    if room:
        # A quarter at a time, as Deployments do by default: new engines must prove themselves.
        extra = min(room, max(1, replicas // 4))
        return Surge(extra, 0, f"room for {room} more replicas is known: new ones start before old ones go")
    why = "accelerators beside those in use are not known" if room is None else "no accelerator is free"
    if replicas <= 1:
        return Surge(
            0, 1, f"{why}: the only replica stops before its successor starts, the tier is away meanwhile"
        )
    return Surge(0, 1, f"{why}: one replica at a time stops before its successor starts")
