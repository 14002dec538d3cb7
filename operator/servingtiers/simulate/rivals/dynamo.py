"""NVIDIA Dynamo's SLA planner: throughput scaling, load scaling, and both (the first a lower bound of the second)."""

from __future__ import annotations

import math

import numpy as np

from servingtiers.core.decisions import PoolFacts, PoolRole
from servingtiers.simulate.policies import PodReadings, PoolReadings
from servingtiers.simulate.rivals.base import Key, PoolContext, Rival
from servingtiers.simulate.scenario import Scenario

__all__ = ["DynamoHybrid", "DynamoLoad", "DynamoThroughput", "load_step", "replica_rps"]

_THROUGHPUT_TICK = 180.0
_LOAD_TICK = 5.0


def replica_rps(context: PoolContext, prompt: float, output: float) -> float:
    """Return the requests per second of one replica at the objectives (means), from the profile.

    A prefill engine does ``1 / T(prompt)``. A decode engine runs the largest batch with ``T ≤ ITL`` that its KV cache
    holds. An aggregated one the largest batch with ITL and TTFT kept and ``prompt / (budget - batch) ≤ output``.
    """
    engine = context.pool.engine
    if context.pool.role is PoolRole.PREFILL:
        return 1e3 / context.step_ms(prompt, 0, 0, 0)
    itl, ttft = context.limits.get("tpot", math.inf), context.limits.get("ttft", math.inf)
    most = min(engine.max_num_seqs, int(context.pool.model.kv_capacity_tokens / (prompt + output)))
    middle = prompt + output / 2.0
    aggregated = context.pool.role is PoolRole.AGGREGATED
    best = 1
    for batch in range(1, max(most, 1) + 1):
        new = batch * prompt / max(output, 1.0) if aggregated else 0.0
        time = context.step_ms(new, 0, batch, batch * middle)
        if time > itl * 1e3:
            break
        if aggregated:
            room = engine.max_num_batched_tokens - batch
            if room <= 0 or prompt / room > output:
                break
            steps = max(1, math.ceil(prompt / room))
            if steps * context.step_ms(min(prompt, room), 0, batch, batch * middle) > ttft * 1e3:
                break
        best = batch
    new = best * prompt / max(output, 1.0) if aggregated else 0.0
    return 1e3 * best / (max(output, 1.0) * context.step_ms(new, 0, best, best * middle))


def load_step(
    context: PoolContext, pods: PodReadings, replicas: int, *, prompt: float, sensitivity: float = 0.8
) -> int:
    """Return +1, 0 or -1: load scaling in its SLA mode.

    Up where every engine's predicted TTFT (queued prompt tokens in chunks of the budget) is above the objective, or
    every engine's predicted ITL is; down where after moving the load to one engine fewer the TTFT that queueing adds is
    below 80 % of what the own prefill leaves, and ITL below 80 % of the objective.
    """
    count = len(pods.running)
    if count == 0:
        return 0
    engine = context.pool.engine
    decodes = context.pool.role is not PoolRole.PREFILL
    computes = context.pool.role is not PoolRole.DECODE
    ttft = context.limits.get("ttft", math.inf) * 1e3
    itl = context.limits.get("tpot", math.inf) * 1e3

    def queue_ms(tokens: float, running: float, kv: float) -> float:
        chunk = float(engine.max_num_batched_tokens)
        if not decodes:
            running = kv = 0.0
        full, rest = divmod(tokens, chunk)
        time = full * context.step_ms(chunk, 0, running, kv)
        return time + (context.step_ms(rest, 0, running, kv) if rest > 0 else 0.0)

    firsts, gaps = [], []
    for running, kv, tokens in zip(pods.running, pods.kv_tokens, pods.waiting_tokens, strict=True):
        firsts.append(queue_ms(float(tokens) + prompt, float(running), float(kv)))
        gaps.append(context.step_ms(0, 0, float(running), float(kv)) if running > 0 else 0.0)
    if (computes and min(firsts) > ttft) or (decodes and min(gaps) > itl):
        return 1
    if replicas <= 1 or count < 2:
        return 0
    more = count / (count - 1)
    own = queue_ms(prompt, 0.0, 0.0)
    calm = True
    for running, kv, tokens in zip(pods.running, pods.kv_tokens, pods.waiting_tokens, strict=True):
        busy, held = float(running) * more, float(kv) * more
        if computes and queue_ms(float(tokens) * more, busy, held) >= sensitivity * (ttft - own):
            calm = False
        if decodes and (
            busy > engine.max_num_seqs
            or held > pods.kv_capacity
            or context.step_ms(0, 0, busy, held) >= sensitivity * itl
        ):
            calm = False
    return -1 if calm else 0


class DynamoHybrid(Rival):
    """Dynamo's planner: throughput scaling every 180 s sets a lower bound, load scaling moves by one every 5 s.

    Load scaling acts only while all wanted replicas are ready.
    The profile is the plant's own table (times the model error), as Dynamo profiles each deployment. The rate of the next
    interval is predicted as the last one's (the planner's ``constant``; its default auto-ARIMA falls back to that for
    fewer than five intervals and rarely departs from it for the twenty of an hour). Demand is counted at completion.
    """

    name = "dynamo"
    interval = _LOAD_TICK
    samples = _LOAD_TICK
    knob = "margin"

    def __init__(self, scenario: Scenario, margin: float = 1.0) -> None:
        super().__init__(scenario)
        self.margin = margin
        self.sensitivity = 0.8
        self.bounds: dict[Key, int] = {}
        self.at: dict[Key, tuple[float, PoolReadings]] = {}

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Return the load step, not below the throughput bound."""
        pool = self.latest.get(key)
        if pool is None or pool.pods is None:
            return facts.replicas, "no metrics: skipped"
        self.tick(key, pool, now)
        return self.step(key, facts, pool, pool.pods, self.bounds.get(key, 1))

    def tick(self, key: Key, pool: PoolReadings, now: float) -> None:
        """Set the throughput bound once its interval is over."""
        context = self.pools[key]
        if key not in self.at:
            self.at[key] = now, pool
        since, before = self.at[key]
        if now - since >= _THROUGHPUT_TICK - 1e-6:
            self.at[key] = now, pool
            count = pool.done - before.done
            if count > 0:
                inputs = (pool.prompt_tokens - before.prompt_tokens) / count
                outputs = (pool.output_tokens - before.output_tokens) / count
                rate = count / (now - since)
                best = replica_rps(context, inputs, max(outputs, 1.0))
                self.bounds[key] = max(1, math.ceil(self.margin * rate / best - 1e-9))

    def step(
        self, key: Key, facts: PoolFacts, pool: PoolReadings, pods: PodReadings, lowest: int
    ) -> tuple[int, str]:
        """Return the load step, not below ``lowest``."""
        context = self.pools[key]
        prompt = pool.prompt_tokens / pool.done if pool.done else context.prompt
        if facts.ready != facts.replicas:
            return max(facts.replicas, lowest), "waits until all wanted replicas are ready"
        step = load_step(
            context, pods, facts.replicas, prompt=float(np.float64(prompt)), sensitivity=self.sensitivity
        )
        return max(facts.replicas + step, lowest), f"load {step:+d}, at least {lowest}"


class DynamoThroughput(DynamoHybrid):
    """Dynamo's planner with throughput scaling alone: replicas for the last interval's rate, every 180 s.

    Its profile, prediction and demand are those of the hybrid mode.
    """

    name = "dynamo-throughput"

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Return what throughput calls for; before the first interval is over, what there is."""
        pool = self.latest.get(key)
        if pool is None or pool.pods is None:
            return facts.replicas, "no metrics: skipped"
        self.tick(key, pool, now)
        return self.bounds.get(key, facts.replicas), "throughput"


class DynamoLoad(DynamoHybrid):
    """Dynamo's planner with load scaling alone, in its SLA mode: one up or one down every 5 s while all are ready."""

    name = "dynamo-load"
    knob = "scale-down sensitivity"

    def __init__(self, scenario: Scenario, sensitivity: float = 0.8) -> None:
        super().__init__(scenario)
        self.sensitivity = sensitivity

    def desired(self, key: Key, facts: PoolFacts, now: float) -> tuple[int, str]:
        """Return the load step."""
        del now
        pool = self.latest.get(key)
        if pool is None or pool.pods is None:
            return facts.replicas, "no metrics: skipped"
        return self.step(key, facts, pool, pool.pods, 1)
