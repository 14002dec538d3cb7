"""Knative's KPA and AIBrix's APA: averages over windows, and panic."""

from __future__ import annotations

import math

from servingtiers.core.decisions import PoolFacts
from servingtiers.simulate.policies import PoolReadings
from servingtiers.simulate.rivals.base import Key, Rival, Window
from servingtiers.simulate.scenario import Scenario

__all__ = ["AibrixApa", "KnativeKpa", "apa_step", "kpa_step"]


def kpa_step(stable: float, panic: float, ready: int, target: float) -> tuple[int, bool]:
    """Return Knative's wanted replicas of this tick and whether it calls for panic (``autoscaler.go``).

    Args:
        stable: Mean concurrency over the stable window, all pods together.
        panic: The same over the panic window.
        ready: Ready pods.
        target: Concurrency per pod.

    Returns:
        The larger of both wants where the panic want is twice the ready pods, else the stable want.
    """
    base = max(1, ready)
    low, high = math.floor(base / 2.0), math.ceil(1000.0 * base)
    want_stable = min(max(math.ceil(stable / target), low), high)
    want_panic = min(max(math.ceil(panic / target), low), high)
    if want_panic / base >= 2.0:
        return max(want_stable, want_panic), True
    return want_stable, False


class KnativeKpa(Rival):
    """Knative Serving's KPA at its defaults (``pkg/autoscaler/scaling/autoscaler.go``).

    A tick of 2 s, stable window 60 s, panic window 6 s, panic threshold 200 %, target 70 % of the concurrency limit, at
    most halved per tick, no scale-down delay. The limit is the engine's batch.
    """

    name = "knative-kpa"
    interval = 2.0
    samples = 2.0
    knob = "target share of the batch"

    def __init__(self, scenario: Scenario, share: float = 0.7) -> None:
        super().__init__(scenario)
        self.share = share
        self.stable = {key: Window.of(60.0) for key in self.pools}
        self.panic = {key: Window.of(6.0) for key in self.pools}
        self.panicking: dict[Key, tuple[float, int]] = {}

    def read(self, key: Key, pool: PoolReadings, now: float) -> None:
        """Its own sidecars report concurrency; a Prometheus gap does not touch them."""
        if pool.pods is not None:
            total = float((pool.pods.running + pool.pods.waiting).sum())
            self.stable[key].add(now, total)
            self.panic[key].add(now, total)

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Return the stable want, or the highest want since panic began."""
        stable, panic = self.stable[key].mean, self.panic[key].mean
        if stable is None or panic is None or (self.latest[key].pods is None):
            return facts.replicas, "no data: no action"
        target = max(self.share * self.pools[key].pool.engine.max_num_seqs, 0.5)
        wanted, alarm = kpa_step(stable, panic, facts.ready, target)
        since, highest = self.panicking.get(key, (-math.inf, 0))
        if alarm:
            since = now
            highest = max(highest, wanted, facts.ready)
            self.panicking[key] = since, highest
        elif now > since + 60.0:
            self.panicking.pop(key, None)
            return wanted, "stable"
        if now <= since + 60.0:
            highest = max(highest, wanted)
            self.panicking[key] = since, highest
            return highest, "panic"
        return wanted, "stable"


def apa_step(current: int, ratio: float) -> int:
    """Return AIBrix's APA step: nothing within ±10 %, else in proportion, at most doubled or halved."""
    if ratio > 1.1:
        return min(math.ceil(current * ratio), math.ceil(current * 2.0))
    if ratio < 0.9:
        return max(math.ceil(current * ratio), math.floor(current / 2.0))
    return current


class AibrixApa(Rival):
    """AIBrix's APA on KV-cache use, target 50 %.

    Averaged over 180 s, tolerance 10 %, at most ×2 or ÷2, scale-down only to the highest want of the last 300 s.
    """

    name = "aibrix-apa"
    knob = "KV-cache target"

    def __init__(self, scenario: Scenario, target: float = 0.5) -> None:
        super().__init__(scenario)
        self.target = target
        self.use = {key: Window.of(180.0) for key in self.pools}
        self.wants = {key: Window.of(300.0) for key in self.pools}

    def read(self, key: Key, pool: PoolReadings, now: float) -> None:
        """Keep the mean KV-cache use of the ready engines."""
        if pool.pods is not None and len(pool.pods.kv_tokens):
            self.use[key].add(now, float(pool.pods.kv_tokens.mean()) / pool.pods.kv_capacity)

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Return the step, delayed downwards."""
        use = self.use[key].mean
        if use is None or self.latest[key].pods is None:
            return facts.replicas, "no metrics"
        wanted = apa_step(facts.replicas, use / self.target)
        self.wants[key].add(now, float(wanted))
        highest = self.wants[key].highest or wanted
        # Cooldown: a lower want counts once every want of the window is lower.
        return (wanted if wanted >= facts.replicas else min(int(highest), facts.replicas)), f"KV {use:.2f}"
