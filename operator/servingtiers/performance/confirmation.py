"""Checking the planner's best choices by event simulation.

The planner screens with closed forms; what they do not know (bursts, single token gaps, preemption, two pools in a
row) the simulation does. Needs the ``simulator`` extra; the operator process never imports it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from servingtiers.performance.engine_sim import (
    EngineConfig,
    PoolConfig,
    Result,
    Transfer,
    simulate,
    simulate_disaggregated,
)
from servingtiers.performance.planner import (
    FRONT_END_MS,
    Metric,
    held_ms,
    priced,
)
from servingtiers.performance.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servingtiers.performance.planner import Choice, Constraints, Demand, Objective, PoolChoice

__all__ = ["confirm", "simulate_choice"]

_MOST_REPLICAS = 4
"""Larger fleets are simulated as this many replicas under their share of the load."""
_REQUESTS = 15_000
_SEEDS = (1, 0)
"""A fleet is simulated twice, with other arrivals and lengths: one draw's p99 may be lucky."""
_SLACK = 0.95
"""A confirmed latency is at most this share of its target: what a tail of so many requests is worth."""
_MOST = 3.0
"""A fleet is given up when this many times what the closed forms said is not enough."""
_DRIFT = 0.02
"""A queue whose wait grows by more than this share of the time is a load that is too high."""


def simulate_choice(choice: Choice, demand: Demand, *, requests: int = _REQUESTS, seed: int = 0) -> Result:
    """Simulate a fleet at the planned load with its spare replicas gone.

    Args:
        choice: The fleet.
        demand: The traffic of the whole fleet.
        requests: Requests to simulate.
        seed: Seed of the random numbers.

    Raises:
        ValueError: A request cannot fit a KV cache.
    """
    largest = max(pool.needed for pool in choice.pools)
    counts = [pool.needed for pool in choice.pools]
    scale = 1.0
    if largest > _MOST_REPLICAS:
        # A large fleet in small; where two pools do not shrink evenly, the load follows the one that shrank less.
        counts = [max(round(count * _MOST_REPLICAS / largest), 1) for count in counts]
        scale = max(have / pool.needed for have, pool in zip(counts, choice.pools, strict=True))
    workload = Workload(
        prompt_tokens=demand.prompt_tokens,
        output_tokens=demand.output_tokens,
        rate=demand.rate * scale,
        arrivals=demand.arrivals,
        prompt_cv=demand.prompt_cv,
        output_cv=demand.output_cv,
        prefix_hit_rate=demand.prefix_hit_rate,
        max_model_len=choice.model.max_context,
    )
    engines = [_engines(pool, count) for pool, count in zip(choice.pools, counts, strict=True)]
    if len(engines) == 1:
        return simulate(engines[0], workload, requests=requests, seed=seed, overhead_ms=FRONT_END_MS)
    kv_bytes = choice.model.kv_bytes_per_token(choice.pools[1].option.kv_dtype)
    return simulate_disaggregated(
        engines[0],
        engines[1],
        Transfer(kv_bytes, choice.link_gb_s),
        workload,
        requests=requests,
        seed=seed,
        overhead_ms=FRONT_END_MS,
    )


def _engines(pool: PoolChoice, count: int) -> PoolConfig:
    option = pool.option
    limit = option.max_num_seqs
    return PoolConfig(
        option.step_model(),
        EngineConfig(max_num_seqs=limit, max_num_batched_tokens=max(option.max_num_batched_tokens, limit)),
        replicas=count,
    )


def confirm(
    choice: Choice, demand: Demand, objectives: Sequence[Objective], constraints: Constraints
) -> Choice | None:
    """Simulate a fleet; where an objective is missed, find the smallest enlargement that keeps all of them.

    Returns:
        The fleet, confirmed and with the simulation's latencies, or None where enlarging it does not help.
    """

    def kept(tried: Choice) -> Result | None:
        for seed in _SEEDS:
            try:
                result = simulate_choice(tried, demand, seed=seed)
            except ValueError:
                return None
            worst = max((_ratio(o, result, constraints.tail_margin) for o in objectives), default=0.0)
            if worst > _SLACK or result.queue_drift > _DRIFT:
                return None
        return result

    result = kept(choice)
    if result is not None:
        return replace(_priced(choice, demand, constraints, result), confirmed=True)
    missed, factor = 1.0, 1.0
    found: tuple[Choice, Result] | None = None
    while found is None:
        missed = factor
        if missed >= _MOST:
            return None
        factor = min(max(1.25 * factor, _next(choice, factor)), max(_MOST, _next(choice, factor)))
        tried = _enlarged(choice, factor, demand)
        result = kept(tried)
        found = (tried, result) if result is not None else None
    # Between the last miss and the first hit.
    for _ in range(3):
        middle = (missed + factor) / 2.0
        tried = _enlarged(choice, middle, demand)
        if tried.pools in (found[0].pools, _enlarged(choice, missed, demand).pools):
            break
        result = kept(tried)
        if result is not None:
            found, factor = (tried, result), middle
        else:
            missed = middle
    before = " + ".join(str(pool.needed) for pool in choice.pools)
    better = _priced(found[0], demand, constraints, found[1])
    return replace(better, confirmed=True, binding=f"{choice.binding} (closed forms: {before} replicas)")


def _ratio(objective: Objective, result: Result, margin: float) -> float:
    """What is held against an objective, over its target."""
    if objective.metric is Metric.ITL:
        return result.itl.at(objective.percentile) / objective.target_ms
    return held_ms(objective, result.ttft, result.tpot, result.e2e, margin) / objective.target_ms


def _next(choice: Choice, factor: float) -> float:
    """The smallest factor beyond this one that adds a replica to some pool."""
    return min((math.floor(pool.needed * factor + 1e-9) + 1) / pool.needed for pool in choice.pools)


def _enlarged(choice: Choice, factor: float, demand: Demand) -> Choice:
    """The fleet with every pool's needed replicas times a factor, whole."""

    def grown(pool: PoolChoice) -> PoolChoice:
        needed = math.floor(pool.needed * factor + 1e-9)
        rate = demand.rate / needed
        return replace(pool, needed=needed, replicas=needed + pool.replicas - pool.needed, replica_rate=rate)

    return replace(choice, pools=tuple(grown(pool) for pool in choice.pools))


def _priced(choice: Choice, demand: Demand, constraints: Constraints, result: Result) -> Choice:
    latencies = (result.ttft, result.tpot, result.e2e)
    return priced(choice.model, choice.pools, latencies, choice.binding, demand, constraints)
