"""What fits where, and what a full engine does: the ground that problems and presets stand on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from servingtiers.api.spec import EngineSpec, KvCacheDtype, Quantization, ServingTierSpec, Tier, TokenLengths
from servingtiers.catalog.accelerators import Accelerator, accelerator
from servingtiers.catalog.models import ModelShape
from servingtiers.catalog.models import model as bundled_model
from servingtiers.catalog.names import CatalogError, UnknownNameError
from servingtiers.core.config import AcceleratorBinding, OperatorConfig
from servingtiers.core.decisions import PoolRole, Targets
from servingtiers.core.signals import Histogram, Load, number
from servingtiers.performance.select import DoesNotFitError, kv_capacity_tokens
from servingtiers.performance.steps import StepModel

__all__ = [
    "FullEngine",
    "Lengths",
    "WeightChoice",
    "bound",
    "full_engine",
    "kv_dtype",
    "lengths",
    "lengths_seen",
    "meets",
    "memory_share",
    "parallelisms",
    "room",
    "shape_of",
    "smallest_fit",
    "tokens_needed",
    "weights_of",
]

_DEFAULT_MEMORY_SHARE = 0.90
_DEFAULT_PROMPT, _DEFAULT_OUTPUT = 512, 128
_ENOUGH_REQUESTS = 100
"""Requests from which on live lengths replace planned ones."""
_LEAST_CONTEXT = 4096
"""Tokens one replica must hold where nobody says how long requests are."""


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """How the weights are stored."""

    weights: str
    """`bf16`, `fp8`, `int8` or `int4`."""
    flag: str | None
    """Value of ``--quantization``; None: the checkpoint says it."""
    reason: str


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths a tier is planned for, tokens."""

    prompt: float
    output: float
    prompt_p95: float
    output_p95: float
    prefix_hit: float
    """Share of prompt tokens found in the prefix cache, 0 to 1."""
    given: bool
    """False: nobody said, these are the defaults."""


@dataclass(frozen=True, slots=True)
class FullEngine:
    """An engine whose batch is always full: the slowest and busiest it gets."""

    tpot: float
    """Seconds per output token."""
    ttft: float
    """Seconds from admission to the first token of a p95 prompt; waiting in the queue comes on top."""
    requests_per_second: float


def shape_of(name: str) -> ModelShape | None:
    """Return the shape of a model of the catalogue; None where it is unknown."""
    try:
        return bundled_model(name)
    except CatalogError:
        return None


def bound(config: OperatorConfig) -> dict[str, AcceleratorBinding]:
    """Return the bindings of this cluster by catalogue key; names the catalogue does not know are left out."""
    bindings = {}
    for name, binding in config.accelerators.items():
        try:
            bindings[accelerator(name).key] = binding
        except UnknownNameError:
            continue
    return bindings


def lengths(spec: ServingTierSpec) -> Lengths:
    """Return the lengths a tier is planned for; a p95 that is left out is 2.5 × the mean."""
    work = spec.workload
    prompt = work.prompt_tokens if work else None
    output = work.output_tokens if work else None

    def pair(given: TokenLengths | None, default: int) -> tuple[float, float]:
        mean = given.mean if given else default
        p95 = given.p95 if given and given.p95 else 2.5 * mean
        return float(mean), float(p95)

    prompt_mean, prompt_p95 = pair(prompt, _DEFAULT_PROMPT)
    output_mean, output_p95 = pair(output, _DEFAULT_OUTPUT)
    return Lengths(
        prompt=prompt_mean,
        output=output_mean,
        prompt_p95=prompt_p95,
        output_p95=output_p95,
        prefix_hit=(work.prefix_hit_percent if work else 0) / 100.0,
        given=prompt is not None and output is not None,
    )


_NAMED_WEIGHTS = (
    (re.compile(r"fp8|w8a8-fp", re.IGNORECASE), "fp8"),
    (re.compile(r"awq|gptq|int4|w4a16|4bit|mxfp4", re.IGNORECASE), "int4"),
    (re.compile(r"int8|w8a8|w8a16", re.IGNORECASE), "int8"),
)
_SHIPPED_WEIGHTS = (
    (re.compile(r"^openai/gpt-oss-"), "int4"),
    (re.compile(r"^deepseek-ai/DeepSeek-V3"), "fp8"),
)
"""Checkpoints whose names do not tell that they are quantized: MXFP4 and block FP8 as published."""


def lengths_seen(load: Load, planned: Lengths) -> Lengths:
    """Return the lengths of live traffic, as far as enough of it was seen; the planned ones otherwise."""
    prompt, output = load.prompt_tokens, load.output_tokens
    if not isinstance(prompt, Histogram) or not isinstance(output, Histogram):
        return planned
    if min(prompt.total, output.total) < _ENOUGH_REQUESTS or not prompt.mean or not output.mean:
        return planned
    far_prompt, far_output = prompt.quantile(0.95), output.quantile(0.95)
    hit = number(load.prefix_hit_share)
    return Lengths(
        prompt=max(prompt.mean, 1.0),
        output=max(output.mean, 1.0),
        prompt_p95=max(far_prompt.estimate if far_prompt else 0.0, prompt.mean),
        output_p95=max(far_output.estimate if far_output else 0.0, output.mean),
        prefix_hit=planned.prefix_hit if hit is None else min(max(hit, 0.0), 1.0),
        given=True,
    )


def _checkpoint(name: str) -> str | None:
    """Return the weight type of a checkpoint that is quantized by itself; None for a plain one."""
    for pattern, kind in (*_SHIPPED_WEIGHTS, *_NAMED_WEIGHTS):
        if pattern.search(name):
            return kind
    return None


def weights_of(spec: ServingTierSpec, engine: EngineSpec, accelerator: Accelerator | None) -> WeightChoice:
    """Return how the weights are stored: never quantized silently."""
    shipped = _checkpoint(spec.model.name)
    match engine.quantization:
        case _ if shipped is not None:
            return WeightChoice(shipped, None, f"the checkpoint is {shipped}")
        case Quantization.FP8:
            return WeightChoice("fp8", "fp8", "given; quantized while loading")
        case Quantization.INT8:
            return WeightChoice("int8", None, "given; the checkpoint must be quantized to it")
        case Quantization.INT4:
            return WeightChoice("int4", None, "given; the checkpoint must be quantized to it")
        case Quantization.AUTO if spec.tier is Tier.BALANCED:
            return WeightChoice("bf16", None, "Auto: Balanced tiers keep 16 bits")
        case Quantization.AUTO if accelerator is not None and accelerator.supports("fp8"):
            return WeightChoice("fp8", "fp8", f"Auto: {accelerator.key} multiplies FP8 natively")
        case Quantization.AUTO:
            where = accelerator.key if accelerator else "the accelerator"
            return WeightChoice("bf16", None, f"Auto: {where} has no FP8 tensor cores")
        case _:
            return WeightChoice("bf16", None, "none asked for: the checkpoint's own 16 bits")


def kv_dtype(engine: EngineSpec) -> str:
    """Return the data type of the KV cache as the performance model names it."""
    return "fp8" if engine.kv_cache_dtype is KvCacheDtype.FP8 else "bf16"


def memory_share(engine: EngineSpec) -> float:
    """Return the share of accelerator memory that the engine takes, 0 to 1."""
    percent = engine.gpu_memory_utilization_percent
    return percent / 100.0 if percent is not None else _DEFAULT_MEMORY_SHARE


def parallelisms(shape: ModelShape, accelerator: Accelerator) -> tuple[int, ...]:
    """Return the tensor parallelisms that split the heads evenly inside one node, smallest first."""
    return tuple(
        size
        for size in (1, 2, 4, 8, 16)
        if size <= accelerator.gpus_per_node
        and shape.heads % size == 0
        and (shape.kv_heads % size == 0 or size % shape.kv_heads == 0)
    )


def room(
    shape: ModelShape, accelerator: Accelerator, tensor_parallel: int, weights: str, engine: EngineSpec
) -> int:
    """Return the tokens that the KV cache of one replica holds; 0 where the weights do not even fit."""
    try:
        return kv_capacity_tokens(
            shape,
            accelerator,
            tensor_parallel=tensor_parallel,
            weights=weights,
            kv_dtype=kv_dtype(engine),
            memory_utilization=memory_share(engine),
        )
    except DoesNotFitError:
        return 0


def tokens_needed(spec: ServingTierSpec, engine: EngineSpec, shape: ModelShape) -> int:
    """Return the tokens a replica must hold: one request of the greatest length it accepts or is planned for."""
    if engine.max_model_len is not None:
        return engine.max_model_len
    asked = lengths(spec)
    longest = asked.prompt_p95 + asked.output_p95 if asked.given else _LEAST_CONTEXT
    return int(min(longest, shape.max_context))


def smallest_fit(
    spec: ServingTierSpec, engine: EngineSpec, shape: ModelShape, accelerator: Accelerator
) -> int | None:
    """Return the smallest tensor parallelism at which the model fits an accelerator; None: none does."""
    weights = weights_of(spec, engine, accelerator).weights
    needed = tokens_needed(spec, engine, shape)
    return next(
        (
            size
            for size in parallelisms(shape, accelerator)
            if room(shape, accelerator, size, weights, engine) >= needed
        ),
        None,
    )


def full_engine(
    step: StepModel, batch: int, asked: Lengths, budget: int | None, role: PoolRole
) -> FullEngine:
    """Return how an engine does with ``batch`` sequences always in flight.

    In the steady state every finished sequence is followed by a new prompt, so a step that advances ``batch``
    sequences by one token also computes ``batch × prompt / output`` prompt tokens, as far as the token budget
    allows; where it does not, prompts are the bottleneck and set the rate. A prefill engine computes prompts only,
    one after the other; a decode engine gets them computed.

    Args:
        step: Time of one engine step.
        batch: Sequences in flight.
        asked: Lengths of the requests.
        budget: Token budget of one step; None: no limit.
        role: What the engine does.
    """
    fresh = asked.prompt * (1.0 - asked.prefix_hit)
    past = asked.prompt * asked.prefix_hit
    longest = max(asked.prompt_p95 * (1.0 - asked.prefix_hit), 1.0)
    if role is PoolRole.PREFILL:
        seconds = step.step_ms(max(fresh, 1.0), past, 0, 0) / 1e3
        return FullEngine(0.0, step.step_ms(longest, past, 0, 0) / 1e3, 1.0 / seconds)
    kv = batch * (asked.prompt + asked.output / 2.0)
    if role is PoolRole.DECODE:
        seconds = step.step_ms(0, 0, batch, kv) / 1e3
        return FullEngine(seconds, seconds, batch / (asked.output * seconds))
    limit = max((budget or 1_000_000) - batch, 1.0)
    wanted = batch * fresh / asked.output
    new = min(wanted, limit)
    seconds = step.step_ms(new, past, batch, kv) / 1e3
    rate = batch / (asked.output * seconds)
    if wanted > limit:
        rate = new / (max(fresh, 1.0) * seconds)
    chunks = max(longest / limit, 1.0)
    ttft = chunks * step.step_ms(min(longest, limit), past, batch, kv) / 1e3
    return FullEngine(seconds, ttft, rate)


def meets(result: FullEngine, goals: Targets, asked: Lengths, role: PoolRole, tail: float) -> str | None:
    """Return the first objective that an engine breaks, such as ``ttft.p99``; None where it meets all of them.

    Args:
        result: How the engine does.
        goals: The objectives.
        asked: Lengths of the requests.
        role: What the engine does: a decode engine cannot break TTFT, a prefill engine has no TPOT.
        tail: Factor by which the mean must stay below an objective on a percentile.
    """
    for (metric, percentile), seconds in sorted(goals.seconds.items()):
        match metric:
            case "ttft":
                takes = 0.0 if role is PoolRole.DECODE else result.ttft
            case "e2e":
                takes = result.ttft + asked.output * result.tpot
            case _:
                takes = result.tpot
        if takes * tail > seconds:
            return f"{metric}.{percentile}"
    return None
