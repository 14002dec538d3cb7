"""What one replica carries within the objectives, found by running the event engine.

Used three ways: of the plant's own step model it sets the first replicas of a run and the limits; of the roofline,
times a deliberate error, it is what a controller believes; and its two coefficients turn any mix of lengths into
replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from servingtiers.core.decisions import PoolRole
from servingtiers.core.signals import Histogram, Load, Value
from servingtiers.performance import engine_kernel as kernel
from servingtiers.performance.engine_sim import EngineConfig, PoolConfig, draw_requests, make_pool
from servingtiers.performance.steps import GridStepModel
from servingtiers.performance.workload import Workload

__all__ = ["Belief", "Work", "capacity_rps", "work_of"]

_PROBE_REQUESTS = 1500
_ALLOWED = 0.01


@dataclass(frozen=True, slots=True)
class Work:
    """Replica-seconds a request costs at the objectives: ``fixed + prompt·in + output·out``."""

    fixed: float
    prompt: float
    output: float

    def seconds(self, prompt: float, output: float) -> float:
        """Return the replica-seconds of one request of these lengths."""
        return max(self.fixed + self.prompt * prompt + self.output * output, 1e-6)


@dataclass(frozen=True, slots=True)
class Belief:
    """What a controller believes one replica carries."""

    work: Work
    error: float
    """Believed capacity over true capacity of its step model: 1.4 believes in 40 % more."""
    prompt: float
    output: float
    """Lengths it assumes until it has seen some, tokens."""
    source: str

    def rps(self, load: Load | None = None) -> float:
        """Return requests per second per replica, for the lengths that the load shows where it shows some."""
        prompt, output = self.prompt, self.output
        if load is not None:
            if isinstance(load.prompt_tokens, Histogram) and load.prompt_tokens.mean:
                prompt = load.prompt_tokens.mean
            if isinstance(load.output_tokens, Histogram) and load.output_tokens.mean:
                output = load.output_tokens.mean
            if isinstance(load.prefix_hit_share, Value):
                prompt *= 1.0 - load.prefix_hit_share.value
        return self.error / self.work.seconds(prompt, output)


def _violations(
    model: GridStepModel,
    engine: EngineConfig,
    role: PoolRole,
    *,
    rate: float,
    prompt: tuple[float, float],
    output: tuple[float, float],
    limits: tuple[tuple[str, float], ...],
) -> float:
    """Share of requests that miss a limit on one replica under Poisson arrivals."""
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
                # Each engine of a pair is given half of the client's wait.
                missed |= first > (limit if role is PoolRole.AGGREGATED else limit / 2)
            case "e2e":
                missed |= whole > limit
            case _:
                missed |= per_token > limit
    # A queue that grows shows in the second half.
    return float(missed[len(missed) // 3 :].mean())


@lru_cache(maxsize=4096)
def capacity_rps(
    model: GridStepModel,
    engine: EngineConfig,
    role: PoolRole,
    prompt: tuple[float, float],
    output: tuple[float, float],
    limits: tuple[tuple[str, float], ...],
) -> float:
    """Return the highest Poisson rate at which one replica misses at most 1 % of its requests.

    Args:
        model: Step times.
        engine: Scheduler.
        role: A prefill engine answers with one token; a decode engine is handed the prompt's KV cache.
        prompt: Mean and coefficient of variation of the prompt length.
        output: The same of the output length.
        limits: Metric and limit in seconds; without any, the rate at which the queue begins to grow is found.

    Returns:
        Requests per second; 0 where a lone request already misses.
    """
    if not limits:
        limits = (("ttft", 60.0),)

    def bad(rate: float) -> bool:
        return (
            _violations(model, engine, role, rate=rate, prompt=prompt, output=output, limits=limits)
            > _ALLOWED
        )

    low, high = 0.0, 0.05
    while high < 2000 and not bad(high):
        low, high = high, high * 2
    if low == 0.0:
        while high > 1e-4 and bad(high):
            high /= 2
        if high <= 1e-4:
            return 0.0
        low, high = high, high * 2
    for _ in range(7):
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
    """Return the cost of a request as a plane through the capacities at three mixes around the given one."""
    here = 1.0 / max(capacity_rps(model, engine, role, prompt, output, limits), 1e-4)
    longer = 1.0 / max(capacity_rps(model, engine, role, (prompt[0] * 1.5, prompt[1]), output, limits), 1e-4)
    more = 1.0 / max(capacity_rps(model, engine, role, prompt, (output[0] * 1.5, output[1]), limits), 1e-4)
    per_prompt = max(longer - here, 0.0) / (0.5 * prompt[0])
    per_output = max(more - here, 0.0) / (0.5 * output[0])
    return Work(here - per_prompt * prompt[0] - per_output * output[0], per_prompt, per_output)
