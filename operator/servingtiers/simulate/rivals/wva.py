"""llm-d's Workload Variant Autoscaler: the V1 saturation rule, the V2 token analyzer and the Inferno queueing optimiser.

All publish a wanted number that an HPA (AverageValue 1) carries out with the chart's behaviour: stabilisation of
240 s up and down, 10 pods per 150 s; the controller ticks every 60 s (chart default).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from servingtiers.core.decisions import PoolFacts, PoolRole
from servingtiers.simulate.policies import PoolReadings
from servingtiers.simulate.rivals.base import Key, PoolContext, Rival, Window
from servingtiers.simulate.rivals.hpa import Behavior, Rate, Stabilizer
from servingtiers.simulate.scenario import Scenario

__all__ = ["CHART", "Inferno", "QueueModel", "WvaV1", "WvaV2", "v1_step", "v2_capacity", "v2_want"]

CHART = Behavior(
    up_window=240.0,
    down_window=240.0,
    up=(Rate(10, 150.0, percent=False),),
    down=(Rate(10, 150.0, percent=False),),
)
_BUCKETS = (100.0, 500.0)
_V1_KV, _V1_QUEUE = 0.80, 5.0
"""KV-cache use and waiting requests at which V1 calls an engine saturated."""


def v2_capacity(
    *, kv_tokens: float, budget: float, max_seqs: float, prompt: float, output: float, observed: float | None
) -> float:
    """Return the tokens one engine is said to hold (V2's ``min(k1, k2)``).

    ``k1`` is 80 % of the KV cache; ``k2`` what was in use when 5 requests waited, or, without such an observation,
    ``N·(I + O/2)`` with ``N = min(budget·O/(I+O), max_num_seqs)``.
    """
    k1 = 0.80 * kv_tokens
    if observed is not None:
        return min(k1, observed)
    if prompt + output <= 0:
        return k1
    batch = min(budget * output / (prompt + output), max_seqs)
    return min(k1, batch * (prompt + output / 2.0))


def v2_want(demand: float, ready: int, pending: int, capacity: float, *, up: float = 0.85) -> int:
    """Return the replicas V2 wants for a demand in tokens."""
    required = demand / up - (ready + pending) * capacity
    if required > 0:
        return ready + pending + math.ceil(required / capacity)
    spare = ready * capacity - demand / 0.70
    if spare > 0:
        return max(ready + pending - math.floor(spare / capacity), 1)
    return ready + pending


class _Published(Rival):
    """A controller whose number an HPA carries out."""

    interval = 15.0
    tick = 60.0

    def __init__(self, scenario: Scenario, behavior: Behavior = CHART) -> None:
        super().__init__(scenario)
        self.behavior = behavior
        self.published: dict[Key, tuple[float, int]] = {}
        self.stabilizers: dict[Key, Stabilizer] = {}

    def want(self, key: Key, facts: PoolFacts, now: float) -> int | None:
        """Return the number to publish; None: keep the last."""
        raise NotImplementedError

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Publish every minute; let the HPA act every 15 s."""
        at, number = self.published.get(key, (-math.inf, facts.replicas))
        if now - at >= self.tick - 1e-6:
            wanted = self.want(key, facts, now)
            number = number if wanted is None else wanted
            self.published[key] = now, number
        number = max(1, facts.scaling.min_replicas, min(number, facts.scaling.max_replicas))
        stabilizer = self.stabilizers.setdefault(key, Stabilizer(self.behavior))
        return stabilizer.step(now, facts.replicas, number), f"published {number}"


class WvaV2(_Published):
    """WVA's V2 "saturation" token analyzer: demand in tokens against a capacity in tokens, up at 85 %, down at 70 %.

    Demand is the KV cache in use plus waiting requests × mean input, each the maximum over a minute per engine.
    """

    name = "wva-v2"
    knob = "scale-up threshold"

    def __init__(self, scenario: Scenario, up: float = 0.85, behavior: Behavior = CHART) -> None:
        super().__init__(scenario, behavior)
        self.up = up
        self.kv: dict[tuple[Key, int], Window] = {}
        self.queue: dict[tuple[Key, int], Window] = {}
        self.history: dict[tuple[Key, int], deque[float]] = {}

    def read(self, key: Key, pool: PoolReadings, now: float) -> None:
        """Keep the maxima over a minute per engine, as its queries do."""
        if pool.pods is None:
            return
        for serial, kv, waiting in zip(
            pool.pods.serial.tolist(), pool.pods.kv_tokens, pool.pods.waiting, strict=True
        ):
            self.kv.setdefault((key, serial), Window.of(60.0)).add(now, float(kv))
            self.queue.setdefault((key, serial), Window.of(60.0)).add(now, float(waiting))

    def want(self, key: Key, facts: PoolFacts, now: float) -> int | None:
        """Return what the analyzer wants; nothing without metrics."""
        del now
        pool, context = self.latest.get(key), self.pools[key]
        if pool is None or pool.pods is None or not len(pool.pods.serial):
            return None
        prompt, output = _means(pool, context)
        bucket = sum(output >= edge for edge in _BUCKETS)
        seen = self.history.setdefault((key, bucket), deque(maxlen=10))
        demand, capacities = 0.0, []
        for serial in pool.pods.serial.tolist():
            kv = self.kv[key, serial].highest or 0.0
            waiting = self.queue[key, serial].highest or 0.0
            demand += kv + waiting * prompt
            if waiting >= 5:
                seen.append(kv)
        observed = math.fsum(seen) / len(seen) if seen else None
        for _ in pool.pods.serial:
            capacities.append(  # noqa: PERF401 - the median over engines, as published; here they are alike
                v2_capacity(
                    kv_tokens=pool.pods.kv_capacity,
                    budget=context.pool.engine.max_num_batched_tokens,
                    max_seqs=context.pool.engine.max_num_seqs,
                    prompt=prompt,
                    output=output,
                    observed=observed,
                )
            )
        capacity = max(sorted(capacities)[len(capacities) // 2], 1.0)
        return v2_want(demand, facts.ready, facts.replicas - facts.ready, capacity, up=self.up)


def v1_step(
    engines: Sequence[tuple[float, float]], *, kv_trigger: float = 0.10, queue_trigger: float = 3.0
) -> int:
    """Return +1, 0 or -1: V1's saturation rule.

    Args:
        engines: (KV-cache use, waiting requests) of every engine, maxima over a minute.
        kv_trigger: KV use that must be spare below 80 %, averaged over engines that are not saturated.
        queue_trigger: Waiting requests that must be spare below 5, likewise.
    """
    free = [(kv, queue) for kv, queue in engines if kv < _V1_KV and queue < _V1_QUEUE]
    if not free:
        return 1 if engines else 0

    def spare(load: float) -> tuple[float, float]:
        kv = math.fsum(_V1_KV - kv * load for kv, _ in free) / len(free)
        return kv, math.fsum(_V1_QUEUE - queue * load for _, queue in free) / len(free)

    kv, queue = spare(1.0)
    if kv < kv_trigger or queue < queue_trigger:
        return 1
    if len(free) < 2:
        return 0
    kv, queue = spare(len(free) / (len(free) - 1))
    return -1 if kv >= kv_trigger and queue >= queue_trigger else 0


class WvaV1(_Published):
    """WVA's V1 "saturation percentage" analyzer, its default: one up where spare KV < 10 % or spare queue < 3, one down.

    An engine is saturated at 80 % of its KV cache or 5 waiting requests; spare is the mean distance to these over the
    others. Down where the load on one engine fewer leaves both. Nothing while replicas differ from what was wanted.
    """

    name = "wva-v1"
    knob = "spare KV-cache trigger"

    def __init__(self, scenario: Scenario, trigger: float = 0.10, behavior: Behavior = CHART) -> None:
        super().__init__(scenario, behavior)
        self.trigger = trigger
        self.kv: dict[tuple[Key, int], Window] = {}
        self.queue: dict[tuple[Key, int], Window] = {}

    def read(self, key: Key, pool: PoolReadings, now: float) -> None:
        """Keep the maxima over a minute per engine, as its queries do."""
        if pool.pods is None:
            return
        use = pool.pods.kv_tokens / pool.pods.kv_capacity
        for serial, kv, waiting in zip(pool.pods.serial.tolist(), use, pool.pods.waiting, strict=True):
            self.kv.setdefault((key, serial), Window.of(60.0)).add(now, float(kv))
            self.queue.setdefault((key, serial), Window.of(60.0)).add(now, float(waiting))

    def want(self, key: Key, facts: PoolFacts, now: float) -> int | None:
        """Return one more, one fewer or the same; nothing in transition or without metrics."""
        del now
        pool = self.latest.get(key)
        if pool is None or pool.pods is None or not len(pool.pods.serial):
            return None
        _, before = self.published.get(key, (0.0, facts.replicas))
        if facts.ready != facts.replicas or before != facts.replicas:
            return None
        engines = [
            (self.kv[key, serial].highest or 0.0, self.queue[key, serial].highest or 0.0)
            for serial in pool.pods.serial.tolist()
        ]
        return facts.replicas + v1_step(engines, kv_trigger=self.trigger)


def _means(pool: PoolReadings, context: PoolContext) -> tuple[float, float]:
    """Return mean prompt and output length of finished requests, or what the pool was profiled for."""
    if pool.done < 1:
        return context.prompt, context.output
    return pool.prompt_tokens / pool.done, pool.output_tokens / pool.done


@dataclass(frozen=True, slots=True)
class QueueModel:
    """Inferno's state-dependent M/M/1/K queue of one replica; times in ms."""

    alpha: float
    beta: float
    gamma: float
    max_batch: int
    prompt: float
    output: float

    @classmethod
    def fitted(cls, context: PoolContext, prompt: float, output: float) -> QueueModel:
        """Fit α, β, γ to the pool's profile: the iteration time is α + n(β·tc + γ·tm)."""
        half, full = prompt / 2.0 + 1.0, prompt + output
        batch = min(8, context.pool.engine.max_num_seqs)
        gamma = (context.step_ms(0, 0, batch, batch * full) - context.step_ms(0, 0, batch, batch * half)) / (
            batch * (full - half)
        )
        long = min(context.pool.engine.max_num_batched_tokens, max(prompt, 16.0))
        beta = context.step_ms(long, 0, 0, 0) / long - gamma
        alpha = context.step_ms(0, 0, 1, full) - gamma * full
        return cls(
            max(alpha, 0.1),
            max(beta, 1e-4),
            max(gamma, 1e-9),
            context.pool.engine.max_num_seqs,
            prompt,
            output,
        )

    def iteration(self, n: float) -> float:
        """Mean iteration time with ``n`` requests, ms."""
        compute = (self.prompt + self.output) / (self.output + 1.0)
        memory = self.prompt + self.output / 2.0
        return self.alpha + n * (self.beta * compute + self.gamma * memory)

    def prefill(self, n: float) -> float:
        """Time of a prefill among ``n`` requests, ms."""
        return self.iteration(n) + (self.beta + self.gamma) * self.prompt

    def decode(self, n: float) -> float:
        """Time of one output token among ``n`` requests, ms."""
        return self.iteration(n) + self.beta + self.gamma * (self.prompt + self.output / 2.0)

    def _both(self, n: NDArray[np.int64]) -> NDArray[np.float64]:
        """Prefill and all decode steps among ``n`` requests, ms."""
        compute = (self.prompt + self.output) / (self.output + 1.0)
        memory = self.prompt + self.output / 2.0
        iteration = self.alpha + n * (self.beta * compute + self.gamma * memory)
        both: NDArray[np.float64] = (
            iteration
            + (self.beta + self.gamma) * self.prompt
            + self.output * (iteration + self.beta + self.gamma * memory)
        )
        return both

    def service(self, n: int) -> float:
        """Completions per second with ``n`` requests in service."""
        return 1e3 * n / (self.prefill(n) + self.output * self.decode(n))

    def latencies(self, rate: float) -> tuple[float, float]:
        """Return mean TTFT and ITL at ``rate`` requests per second, seconds."""
        most = self.max_batch
        room = most + 10 * most
        number = np.arange(room + 1)
        busy_at = np.minimum(np.maximum(number, 1), most)
        service = 1e3 * busy_at / (self._both(busy_at))
        logs = np.concatenate([[0.0], np.cumsum(np.log(rate / service[1:]))])
        weights = np.exp(logs - logs.max())
        total = float(weights.sum())
        in_system = float((number * weights).sum()) / total
        in_service = float((np.minimum(number, most) * weights).sum()) / total
        admitted = rate * (1.0 - float(weights[-1]) / total)
        response = in_system / admitted
        served = in_service / admitted
        wait = max(response - served, 0.0)
        busy = max(in_service, 1e-9)
        first = wait + (self.prefill(busy) + self.decode(busy)) / 1e3
        per_token = max(served - self.prefill(busy) / 1e3, 0.0) / max(self.output, 1.0)
        return first, per_token

    def best_rate(self, ttft: float | None, itl: float | None) -> float:
        """Return the highest rate at which the means keep both targets (seconds); binary search, as published."""
        high = self.service(self.max_batch) * (1.0 - 1e-3)
        low = high / 1e4

        def good(rate: float) -> bool:
            first, per_token = self.latencies(rate)
            return (ttft is None or first <= ttft) and (itl is None or per_token <= itl)

        if good(high):
            return high
        for _ in range(24):
            middle = (low + high) / 2.0
            low, high = (middle, high) if good(middle) else (low, middle)
        return low


class Inferno(_Published):
    """WVA's Inferno optimiser: a queueing model with α, β, γ from an offline profile, replicas = ceil(λ / λ*).

    λ comes from the success counter (completions), and the targets are taken as means, both as published.
    """

    name = "inferno"
    knob = "margin"

    def __init__(self, scenario: Scenario, margin: float = 1.0, behavior: Behavior = CHART) -> None:
        super().__init__(scenario, behavior)
        self.margin = margin
        self.before: dict[Key, tuple[float, int, float, float]] = {}
        self.cached: dict[tuple[Key, int, int], float] = {}

    def want(self, key: Key, facts: PoolFacts, now: float) -> int | None:
        """Return ``ceil(margin · λ / λ*)``."""
        del facts
        pool, context = self.latest.get(key), self.pools[key]
        if pool is None or pool.pods is None:
            return None
        state = now, pool.done, pool.prompt_tokens, pool.output_tokens
        before = self.before.get(key)
        self.before[key] = state
        if before is None or now <= before[0]:
            return None
        count = pool.done - before[1]
        if count <= 0:
            return 1
        rate = count / (now - before[0])
        prompt = (pool.prompt_tokens - before[2]) / count
        output = (pool.output_tokens - before[3]) / count
        if context.pool.role is PoolRole.PREFILL:
            output = 1.0
        # Lengths are rounded to 5 %, so that the search runs once per mix.
        mix = round(math.log(max(prompt, 1.0)) / 0.05), round(math.log(max(output, 1.0)) / 0.05)
        best = self.cached.get((key, *mix))
        if best is None:
            model = QueueModel.fitted(context, math.exp(mix[0] * 0.05), math.exp(mix[1] * 0.05))
            best = model.best_rate(context.limits.get("ttft"), context.limits.get("tpot"))
            self.cached[key, *mix] = best
        return max(1, math.ceil(self.margin * rate / best - 1e-9))
