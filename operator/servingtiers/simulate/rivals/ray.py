"""Ray Serve's default autoscaling policy."""

from __future__ import annotations

import math

from servingtiers.core.decisions import PoolFacts
from servingtiers.simulate.policies import PoolReadings
from servingtiers.simulate.rivals.base import Key, Rival, Window
from servingtiers.simulate.scenario import Scenario

__all__ = ["RayServe", "ray_desired"]


def ray_desired(ongoing: float, running: int, target: float) -> int:
    """Return the replicas that ongoing requests call for: ``ceil(running × ongoing / (target × running))``, factors 1.

    Args:
        ongoing: Requests running and queued, all replicas together, averaged over the look-back.
        running: Ready replicas, 1 or more.
        target: Ongoing requests per replica.
    """
    return math.ceil(running * (ongoing / (target * running)) - 1e-9)


class RayServe(Rival):
    """Ray Serve's ``replica_queue_length_autoscaling_policy`` at its defaults (``serve/autoscaling_policy.py``).

    Two ongoing requests per replica, averaged over 30 s; a want above the target number must hold for 30 s, one below it
    for 600 s, and is then carried out as it is at that moment. Its control loop of 0.1 s is a tick of 5 s here. The
    default of two is meant for models without continuous batching; the sweep goes up to an engine's batch.
    """

    name = "ray-serve"
    interval = 5.0
    samples = 5.0
    knob = "ongoing requests per replica"
    up_delay, down_delay = 30.0, 600.0

    def __init__(self, scenario: Scenario, target: float = 2.0) -> None:
        super().__init__(scenario)
        self.target = target
        self.ongoing = {key: Window.of(30.0) for key in self.pools}
        self.counters: dict[Key, int] = {}

    def read(self, key: Key, pool: PoolReadings, now: float) -> None:
        """Its replicas and handles report their own queues."""
        if pool.pods is not None:
            self.ongoing[key].add(now, float((pool.pods.running + pool.pods.waiting).sum()))

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Return the target number, changed once a want has held for its delay."""
        del now
        mean = self.ongoing[key].mean
        if mean is None or self.latest[key].pods is None:
            return facts.replicas, "no metrics"
        if facts.ready == 0:
            return (max(1, facts.replicas) if mean > 0 else facts.replicas), "from zero"
        want = ray_desired(mean, facts.ready, self.target)
        want = max(1, facts.scaling.min_replicas, min(want, facts.scaling.max_replicas))
        counter = self.counters.get(key, 0)
        if want > facts.replicas:
            counter = max(counter, 0) + 1
            due = counter > int(self.up_delay / self.interval)
        elif want < facts.replicas:
            counter = min(counter, 0) - 1
            due = counter < -int(self.down_delay / self.interval)
        else:
            counter, due = 0, False
        self.counters[key] = 0 if due else counter
        return (want if due else facts.replicas), f"{mean:.1f} ongoing"
