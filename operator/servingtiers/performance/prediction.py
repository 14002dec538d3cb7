"""One configuration's latencies by event simulation: what ``servingtiers predict`` says.

Needs the ``simulator`` extra; the operator process never imports it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from servingtiers.performance.engine_sim import EngineConfig, PoolConfig, Result, simulate, sustainable_rate
from servingtiers.performance.host import with_host_time, with_piecewise_graphs
from servingtiers.performance.planner import FRONT_END_MS, default_limits
from servingtiers.performance.select import step_model

if TYPE_CHECKING:
    from servingtiers.catalog.accelerators import Accelerator
    from servingtiers.catalog.models import ModelShape
    from servingtiers.performance.profile import Profile
    from servingtiers.performance.speculation import Speculation
    from servingtiers.performance.steps import GridStepModel
    from servingtiers.performance.workload import Workload

__all__ = ["ROUNDS", "Prediction", "Replica", "predict"]

ROUNDS = 10
"""Requests a client sends in a closed-loop run: what InferenceX's and most recipes for ``vllm bench serve`` use."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine on its accelerators."""

    model: ModelShape
    accelerator: Accelerator
    tensor_parallel: int = 1
    weights: str = "bf16"
    kv_dtype: str = "bf16"
    max_num_seqs: int | None = None
    """None: vLLM's default on this accelerator; likewise below."""
    max_num_batched_tokens: int | None = None
    profile: Profile | None = None
    speculation: Speculation | None = None
    host_time: bool = True
    """False leaves out the host's time between steps: only to show what it is worth."""
    piecewise_layer_ms: float = 0.0
    """What a decode step takes longer for each layer, ms: ``PIECEWISE_LAYER_MS`` with piecewise CUDA graphs (vLLM's
    default before 0.11), 0 with full ones."""

    def step_model(self) -> GridStepModel:
        """Its step model, from the best source there is."""
        found = step_model(
            self.model,
            self.accelerator,
            tensor_parallel=self.tensor_parallel,
            weights=self.weights,
            kv_dtype=self.kv_dtype,
            profile=self.profile,
            speculation=self.speculation,
        )
        if self.piecewise_layer_ms:
            found = with_piecewise_graphs(found, self.model.layers, self.piecewise_layer_ms)
        return with_host_time(found) if self.host_time else found

    def engine(self) -> EngineConfig:
        """Its scheduler."""
        seqs, budget = default_limits(self.accelerator)
        seqs = self.max_num_seqs if self.max_num_seqs is not None else seqs
        given = self.max_num_batched_tokens
        return EngineConfig(
            max_num_seqs=seqs, max_num_batched_tokens=max(budget, seqs) if given is None else given
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a configuration does under a load."""

    result: Result
    source: str
    """Where the step times come from."""
    band_percent: float
    """Half-width of the error band of the step times at this operating point, per cent."""

    def to_json(self) -> dict[str, Any]:
        """As the JSON object that ``servingtiers predict -o json`` prints."""
        result = self.result
        return {
            "ttftMs": result.ttft.to_json(),
            "tpotMs": result.tpot.to_json(),
            "e2eMs": result.e2e.to_json(),
            "tokensPerSecond": round(result.tokens_per_second, 3),
            "requestsPerSecond": round(result.requests_per_second, 4),
            "kvUse": round(result.kv_use, 5),
            "saturated": result.saturated,
            "source": self.source,
            "bandPercent": round(self.band_percent, 2),
        }


def predict(
    replica: Replica,
    workload: Workload,
    *,
    requests: int = 20_000,
    seed: int = 0,
    front_end_ms: float = FRONT_END_MS,
    steady: bool = False,
) -> Prediction:
    """Predict one replica's latencies.

    Args:
        replica: The engine.
        workload: The traffic; the model's longest context bounds its lengths where it names no bound.
        requests: Requests to simulate.
        seed: Seed of the random numbers.
        front_end_ms: From a request's arrival to the scheduler, ms.
        steady: In closed loop, leave out the start, when all clients send at once; it is counted otherwise, because
            public benchmarks count it.

    Raises:
        ValueError: The input makes no sense, the model does not fit, or a request does not; the message names the
            mend.
    """
    if workload.max_model_len is None:
        workload = replace(workload, max_model_len=replica.model.max_context)
    model = replica.step_model()
    pool = PoolConfig(model, replica.engine())
    rounds = None if steady else ROUNDS
    result = simulate(pool, workload, requests=requests, seed=seed, overhead_ms=front_end_ms, rounds=rounds)
    result = replace(result, saturated=_saturated(pool, workload, result))
    prompt = min(
        workload.prompt_tokens * (1.0 - workload.prefix_hit_rate), pool.engine.max_num_batched_tokens
    )
    context = workload.prompt_tokens + workload.output_tokens / 2.0
    return Prediction(
        result=result,
        source=f"{model.source.kind.value}: {model.source.detail}",
        band_percent=model.band_percent(prompt, max(result.mean_batch, 1.0), context),
    )


def _saturated(pool: PoolConfig, workload: Workload, result: Result) -> bool:
    if workload.concurrency is not None:
        # The clients wait for each other: more of them would not raise throughput.
        return workload.concurrency > pool.engine.max_num_seqs or result.preemptions > 0
    if result.queue.p90 < 4.0 * result.tpot.p50 and result.preemptions == 0:
        return False  # hardly anybody waits longer than a few steps
    rate = workload.rate
    return rate is not None and rate > 0.995 * sustainable_rate(pool, workload)
