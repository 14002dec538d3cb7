"""What one replica carries within the objectives, found by running the event engine.

Used three ways: of the plant's own step model it sets the first replicas of a run and the limits; of the roofline,
times a deliberate error, it is what a controller believes; and its two coefficients turn any mix of lengths into
replicas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from servingtiers.core.decisions import EngineCurve, PoolRole, Targets
from servingtiers.core.signals import Load
from servingtiers.performance import engine_kernel as kernel
from servingtiers.performance.engine_sim import EngineConfig, PoolConfig, draw_requests, make_pool
from servingtiers.performance.steps import GridStepModel
from servingtiers.performance.workload import Workload
from servingtiers.policy import sizing

__all__ = ["Belief", "OperatorCapacity", "Work", "capacity_rps", "work_of"]

_PROBE_REQUESTS = 1500
_ALLOWED = 0.01
_TTFT_SHARE = {PoolRole.AGGREGATED: 1.0, PoolRole.PREFILL: 0.85, PoolRole.DECODE: 0.15}
"""Share of a client's TTFT that each engine may take; a decode engine only waits for a seat."""
_HOPELESS = 0.5
"""Share of requests that miss even alone, above which no capacity is worth a number."""


@dataclass(frozen=True, slots=True)
class Work:
    """Replica-seconds a request costs at the objectives, per token: ``prompt·in + output·out``."""

    prompt: float
    output: float

    def seconds(self, prompt: float, output: float) -> float:
        """Return the replica-seconds of one request of these lengths."""
        return max(self.prompt * prompt + self.output * output, 1e-6)


@dataclass(frozen=True, slots=True)
class OperatorCapacity:
    """What the operator tells its policy that one replica carries.

    The figure is the operator's own (:func:`servingtiers.policy.sizing.carried`, as
    :func:`servingtiers.policy.capacity.judge` asks it), on a step model that is not the plant's and times a deliberate
    error.
    """

    engine: sizing.Engine
    """Its step model is the prior: the roofline."""
    error: float
    goals: Targets
    planned: sizing.Lengths

    def curve(self, load: Load | None = None) -> EngineCurve | None:
        """Return what one replica carries; None where neither the spec nor traffic tells lengths."""
        seen = self.planned
        if load is not None:
            seen = sizing.lengths_seen(load, self.planned, self.engine.role)
        if not seen.given:
            return None
        demand = sizing.demand_of(seen, rounded=seen is not self.planned)
        found = sizing.carried(self.engine, demand, sizing.objectives_of(self.goals, self.engine.role))
        curve = found.curve
        if curve is None or found.requests_per_second <= 0:
            return None
        # Who believes in 40 % more believes in steps that are that much shorter.
        return replace(
            curve,
            rps=self.error * curve.rps,
            saturation=self.error * curve.saturation,
            tpot=tuple(each / self.error for each in curve.tpot),
            ttft=tuple(each / self.error for each in curve.ttft),
        )

    def rps(self, load: Load | None = None) -> float | None:
        """Return requests per second per replica; None where neither the spec nor traffic tells lengths."""
        curve = self.curve(load)
        return None if curve is None else curve.rps


@dataclass(frozen=True, slots=True)
class Belief:
    """What a planner who knows the traffic believes one replica carries; rivals and limits are set up with it."""

    work: Work
    error: float
    """Believed capacity over true capacity of its step model: 1.4 believes in 40 % more."""
    prompt: float
    output: float
    """Mean lengths of the traffic, tokens."""
    source: str

    def rps(self) -> float:
        """Return requests per second per replica at these lengths."""
        return self.error / self.work.seconds(self.prompt, self.output)


def _missed(
    model: GridStepModel,
    engine: EngineConfig,
    role: PoolRole,
    *,
    rate: float,
    prompt: tuple[float, float],
    output: tuple[float, float],
    limits: tuple[tuple[str, float], ...],
) -> NDArray[np.bool_]:
    """Requests that miss a limit on one replica under Poisson arrivals; the same requests at every rate."""
    workload = Workload(
        prompt_tokens=max(prompt[0], 1.0),
        output_tokens=max(output[0], 1.0),
        rate=rate,
        prompt_cv=prompt[1],
        output_cv=output[1],
        max_model_len=model.kv_capacity_tokens // 2,
    )
    drawn = draw_requests(workload, _PROBE_REQUESTS, 1, model)
    if role is PoolRole.PREFILL:
        drawn = drawn._replace(output=np.ones_like(drawn.output), steps=np.zeros_like(drawn.steps))
    elif role is PoolRole.DECODE:
        drawn = drawn._replace(cached=drawn.prompt - 1)
    state = make_pool(PoolConfig(model, engine))
    kernel.run_open(state, drawn, 1.0, least_loaded=False)
    first = (drawn.first - drawn.arrival) / 1e3
    whole = (drawn.last - drawn.arrival) / 1e3
    per_token = (whole - first) / np.maximum(drawn.output - 1, 1)
    missed = np.zeros(len(first), dtype=bool)
    for metric, limit in limits:
        match metric:
            case "ttft":
                missed |= first > limit * _TTFT_SHARE[role]
            case "e2e":
                missed |= whole > limit
            case _:
                missed |= per_token > limit
    # A queue that grows shows in the later part.
    return missed[len(missed) // 3 :]


@lru_cache(maxsize=4096)
def capacity_rps(
    model: GridStepModel,
    engine: EngineConfig,
    role: PoolRole,
    prompt: tuple[float, float],
    output: tuple[float, float],
    limits: tuple[tuple[str, float], ...],
) -> float:
    """Return the highest Poisson rate at which one replica misses at most 1 % of its requests because of load.

    Requests that miss even alone (a prompt whose computation takes longer than the TTFT objective) are left out: no
    number of replicas helps them.

    Args:
        model: Step times.
        engine: Scheduler.
        role: A prefill engine answers with one token; a decode engine is handed the prompt's KV cache.
        prompt: Mean and coefficient of variation of the prompt length.
        output: The same of the output length.
        limits: Metric and limit in seconds; without any, the rate at which the queue begins to grow is found.

    Returns:
        Requests per second; 0 where most requests miss even alone.
    """
    if not limits:
        limits = (("ttft", 60.0),)

    def missed(rate: float) -> NDArray[np.bool_]:
        return _missed(model, engine, role, rate=rate, prompt=prompt, output=output, limits=limits)

    alone = missed(1e-4)
    if alone.mean() > _HOPELESS:
        return 0.0

    def bad(rate: float) -> bool:
        return float(missed(rate)[~alone].mean()) > _ALLOWED

    low, high = 1e-4, 0.05
    while high < 2000 and not bad(high):
        low, high = high, high * 2
    while high > 1.01 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if bad(middle) else (middle, high)
    return low


@lru_cache(maxsize=256)
def work_of(
    model: GridStepModel,
    engine: EngineConfig,
    role: PoolRole,
    prompt: tuple[float, float],
    output: tuple[float, float],
    limits: tuple[tuple[str, float], ...],
) -> Work:
    """Return the cost of a request, per prompt and per output token.

    At the given mix it is one over the capacity. How it divides between the two kinds of tokens follows from how much
    capacity falls when either grows by half; near an objective capacity falls faster than in proportion, so only the
    ratio of the two is used, and a cost is never negative.
    """
    here = max(capacity_rps(model, engine, role, prompt, output, limits), 1e-4)
    longer = max(capacity_rps(model, engine, role, (prompt[0] * 1.5, prompt[1]), output, limits), 1e-4)
    more = max(capacity_rps(model, engine, role, prompt, (output[0] * 1.5, output[1]), limits), 1e-4)
    by_prompt, by_output = max(math.log(here / longer), 0.0), max(math.log(here / more), 0.0)
    if role is PoolRole.PREFILL:
        by_prompt, by_output = 1.0, 0.0
    total = by_prompt + by_output
    share = by_prompt / total if total > 0 else 0.5
    return Work(share / (here * prompt[0]), (1.0 - share) / (here * output[0]))
