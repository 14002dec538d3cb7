"""How a new pod template replaces the old one.

A surge asks for accelerators beside those in use. With none free, the new pod waits for the old one to go and the
old one for the new one to be ready: the rollout never ends. So nothing surges unless room is known, and a pool of
one replica is away while its successor starts.
"""

from __future__ import annotations

from servingtiers.core.decisions import PoolFacts

__all__ = ["may_surge"]


def may_surge(pool: PoolFacts, room: int | None = None) -> bool:
    """Return whether a rollout may start a replica before it stops one.

    Args:
        pool: The pool that is rolled out.
        room: Replicas of it for which accelerators are known to be free, from quota or a node view; None: not known.
            It is no claim on them: what others take meanwhile shows as pods that cannot be scheduled.
    """
    if pool.unschedulable:
        return False
    if pool.replicas == 0:
        # Nothing runs: there is nothing to wait for, and a scale-up from zero needs no second engine.
        return False
    return room is not None and room > 0
