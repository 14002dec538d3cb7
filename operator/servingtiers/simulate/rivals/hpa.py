"""Kubernetes' HorizontalPodAutoscaler v2, and what is built on it: KEDA, and llm-d's KEDA recipes.

The algorithm is that of ``pkg/controller/podautoscaler`` (``replica_calculator.go`` and ``horizontal.go``): a tick of
15 s, a tolerance of 10 %, unready pods counted as 0 when growing, recommendations kept for the stabilisation windows
(none up, 300 s down), at most the larger of 100 % and 4 pods per 15 s up, 100 % per 15 s down.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from servingtiers.core.decisions import PoolFacts
from servingtiers.simulate.policies import PodReadings, PoolReadings
from servingtiers.simulate.rivals.base import Key, Rival
from servingtiers.simulate.scenario import Scenario

__all__ = [
    "Behavior",
    "EppKeda",
    "HpaConcurrency",
    "HpaWaiting",
    "KedaWaiting",
    "Rate",
    "Stabilizer",
    "average_value",
    "pods_metric",
    "value_metric",
]

TOLERANCE = 0.1


def pods_metric(values: Sequence[float], unready: int, current: int, target: float) -> int:
    """Return the replicas that a Pods metric calls for (``calcPlainMetricReplicas``).

    Args:
        values: The metric of each ready pod.
        unready: Pods that exist and are not ready; they count as 0 when growing and not at all when shrinking.
        current: ``spec.replicas``.
        target: Wanted average.
    """
    if not values:
        return current
    ratio = math.fsum(values) / len(values) / target
    if ratio > 1 and unready:
        counted = len(values) + unready
        again = math.fsum(values) / counted / target
        if abs(1 - again) <= TOLERANCE or again < 1:
            return current
        wanted = math.ceil(again * counted)
        return max(wanted, current)
    if abs(1 - ratio) <= TOLERANCE:
        return current
    return math.ceil(ratio * len(values))


def average_value(total: float, current: int, target: float) -> int:
    """Return the replicas that an External metric of type AverageValue calls for (``GetExternalPerPodMetricReplicas``)."""
    ratio = total / (target * max(current, 1))
    return current if abs(1 - ratio) <= TOLERANCE else math.ceil(total / target)


def value_metric(value: float, ready: int, current: int, target: float) -> int:
    """Return the replicas that an External metric of type Value calls for (``GetExternalMetricReplicas``)."""
    ratio = value / target
    return current if abs(1 - ratio) <= TOLERANCE else math.ceil(ratio * ready)


@dataclass(frozen=True, slots=True)
class Rate:
    """One scaling policy: at most so much per period."""

    value: int
    seconds: float
    percent: bool


@dataclass(frozen=True, slots=True)
class Behavior:
    """``spec.behavior`` of an HPA; the defaults are Kubernetes'."""

    up_window: float = 0.0
    down_window: float = 300.0
    up: tuple[Rate, ...] = (Rate(100, 15.0, percent=True), Rate(4, 15.0, percent=False))
    down: tuple[Rate, ...] = (Rate(100, 15.0, percent=True),)


@dataclass(slots=True)
class Stabilizer:
    """The memory of one HPA."""

    behavior: Behavior = field(default_factory=Behavior)
    recommendations: list[tuple[float, int]] = field(default_factory=list)
    events: list[tuple[float, int]] = field(default_factory=list)
    """(time, change of replicas)."""

    def step(self, now: float, current: int, wanted: int) -> int:
        """Return the replicas after stabilisation and rate limits (``stabilizeRecommendationWithBehaviors``)."""
        behavior = self.behavior
        if not self.recommendations:
            self.recommendations.append((now, current))
        up = min([wanted, *(n for t, n in self.recommendations if t > now - behavior.up_window)])
        down = max([wanted, *(n for t, n in self.recommendations if t > now - behavior.down_window)])
        self.recommendations.append((now, wanted))
        longest = max(behavior.up_window, behavior.down_window)
        self.recommendations = [each for each in self.recommendations if each[0] > now - longest] or [
            (now, wanted)
        ]
        stable = max(current, up)
        stable = min(stable, down)
        limited = self._limited(now, current, stable)
        if limited != current:
            self.events.append((now, limited - current))
            self.events = [each for each in self.events if each[0] > now - 3600]
        return limited

    def _limited(self, now: float, current: int, wanted: int) -> int:
        if wanted > current:
            best = current
            for rate in self.behavior.up:
                added = sum(max(change, 0) for at, change in self.events if at > now - rate.seconds)
                start = current - added
                most = math.ceil(start * (1 + rate.value / 100)) if rate.percent else start + rate.value
                best = max(best, most)
            return min(wanted, best)
        if wanted < current:
            best = current
            for rate in self.behavior.down:
                removed = sum(max(-change, 0) for at, change in self.events if at > now - rate.seconds)
                start = current + removed
                least = int(start * (1 - rate.value / 100)) if rate.percent else start - rate.value
                best = min(best, least)
            return max(wanted, best)
        return current


class _Hpa(Rival):
    """An HPA per pool, on metrics that are ``lag`` seconds old."""

    behavior = Behavior()

    def __init__(self, scenario: Scenario, lag: float = 0.0) -> None:
        super().__init__(scenario)
        self.lag = lag
        self.stabilizers: dict[Key, Stabilizer] = {}
        self.seen: dict[Key, deque[tuple[float, PoolReadings]]] = {}

    def read(self, key: Key, pool: PoolReadings, now: float) -> None:
        """Let readings through once they are old enough."""
        if self.lag <= 0:
            return
        line = self.seen.setdefault(key, deque())
        line.append((now, pool))
        while len(line) > 1 and line[1][0] <= now - self.lag:
            line.popleft()
        self.latest[key] = line[0][1]

    def raw(self, key: Key, pool: PoolReadings, pods: PodReadings, current: int) -> int:
        """Return what the metric calls for."""
        raise NotImplementedError

    def blind(self, pool: PoolReadings, current: int) -> int | None:
        """Return what is wanted without metrics; None: no change, as for every metric error."""
        del pool, current
        return None

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Return the replicas after the HPA's own limits."""
        pool = self.latest.get(key)
        if pool is None:
            return facts.replicas, "no metrics yet"
        if pool.pods is None:
            wanted = self.blind(pool, facts.replicas)
            if wanted is None:
                return facts.replicas, "metrics cannot be read"
        else:
            wanted = self.raw(key, pool, pool.pods, facts.replicas)
        wanted = max(1, facts.scaling.min_replicas, min(wanted, facts.scaling.max_replicas))
        stabilizer = self.stabilizers.setdefault(key, Stabilizer(self.behavior))
        return stabilizer.step(now, facts.replicas, wanted), f"metric calls for {wanted}"


class HpaConcurrency(_Hpa):
    """HPA on the mean number of requests per engine (running and waiting), a Pods metric.

    Kubernetes gives no target; 70 % of the engine's batch is Knative's default utilisation of a concurrency limit.
    """

    name = "hpa-concurrency"
    knob = "target share of the batch"

    def __init__(self, scenario: Scenario, share: float = 0.7) -> None:
        super().__init__(scenario)
        self.share = share

    def raw(self, key: Key, pool: PoolReadings, pods: PodReadings, current: int) -> int:
        """Return ``ceil(ready × mean / target)`` with the HPA's care for unready pods."""
        target = max(self.share * self.pools[key].pool.engine.max_num_seqs, 0.5)
        return pods_metric((pods.running + pods.waiting).tolist(), pool.starting, current, target)


class HpaWaiting(_Hpa):
    """HPA on ``vllm:num_requests_waiting`` per engine, target 5.

    The production-stack's prometheus-adapter recipe, and Google's best practices for scaling by queue size.
    """

    name = "hpa-waiting"
    knob = "waiting requests per engine"

    def __init__(self, scenario: Scenario, target: float = 5.0) -> None:
        super().__init__(scenario)
        self.target = target

    def raw(self, key: Key, pool: PoolReadings, pods: PodReadings, current: int) -> int:
        """Return ``ceil(ready × mean / target)``."""
        del key
        return pods_metric(pods.waiting.tolist(), pool.starting, current, self.target)


class KedaWaiting(_Hpa):
    """KEDA on the sum of ``vllm:num_requests_waiting``, threshold 5, polled every 15 s.

    The recipe is vLLM production-stack's ``tutorials/20-keda-autoscaling.md``. KEDA makes an HPA with an External metric of type AverageValue. An empty
    result counts as 0 (``ignoreNullValues`` defaults to true); an error changes nothing.
    """

    name = "keda-waiting"
    knob = "threshold"

    def __init__(self, scenario: Scenario, threshold: float = 5.0) -> None:
        super().__init__(scenario)
        self.threshold = threshold

    def raw(self, key: Key, pool: PoolReadings, pods: PodReadings, current: int) -> int:
        """Return ``ceil(sum / threshold)``."""
        del key, pool
        return average_value(float(pods.waiting.sum()), current, self.threshold)

    def blind(self, pool: PoolReadings, current: int) -> int | None:
        """An empty vector is 0, which calls for the minimum."""
        return average_value(0.0, current, self.threshold) if pool.empty else None


class EppKeda(_Hpa):
    """llm-d's ``keda-epp-saturation`` guide: pool saturation 0.7 and 16 running requests per replica, the larger want.

    KEDA polls the endpoint picker every 15 s.

    Saturation is the mean over engines of ``max(waiting / 5, KV use / 0.8)`` (the endpoint picker's detector with its
    default thresholds); as a ratio it can only be a metric of type Value. The picker's flow control holds requests back
    once an engine is saturated, so it never reports more than 5 waiting per engine; here, where the router holds nothing
    back, what waits beyond that is left out of both triggers as if it were held.
    """

    name = "epp-keda"
    knob = "saturation"

    def __init__(
        self, scenario: Scenario, saturation: float = 0.7, running: float = 16.0, lag: float = 0.0
    ) -> None:
        super().__init__(scenario, lag)
        self.saturation, self.running = saturation, running

    def raw(self, key: Key, pool: PoolReadings, pods: PodReadings, current: int) -> int:
        """Return the larger of the two triggers."""
        del key
        if not len(pods.running):
            return current
        passed = np.minimum(pods.waiting, 5.0)
        pressure = [
            max(waiting / 5.0, kv / pods.kv_capacity / 0.8)
            for waiting, kv in zip(passed, pods.kv_tokens, strict=True)
        ]
        saturation = math.fsum(pressure) / len(pressure)
        in_flight = float((pods.running + passed).sum())
        return max(
            value_metric(saturation, pool.ready, current, self.saturation),
            average_value(in_flight, current, self.running),
        )

    def blind(self, pool: PoolReadings, current: int) -> int | None:
        """An empty vector is 0, as for every KEDA trigger."""
        return average_value(0.0, current, self.running) if pool.empty else None
