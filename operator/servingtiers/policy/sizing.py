"""What fits where, and what one replica carries: the ground that problems, presets and capacity stand on.

What a replica carries is the planner's answer (:mod:`servingtiers.performance.planner`): the largest rate at which
the analytic path keeps every objective. ``servingtiers plan`` and the operator therefore say the same.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache

from servingtiers.api.spec import EngineSpec, KvCacheDtype, Quantization, ServingTierSpec, Tier, TokenLengths
from servingtiers.catalog.accelerators import Accelerator, accelerator
from servingtiers.catalog.models import ModelShape, bundled
from servingtiers.catalog.names import UnknownNameError
from servingtiers.core.config import AcceleratorBinding, OperatorConfig
from servingtiers.core.decisions import EngineCurve, PoolRole, Targets
from servingtiers.core.signals import Histogram, Load, number
from servingtiers.performance.analytic import EngineLimits
from servingtiers.performance.host import with_host_time
from servingtiers.performance.planner import (
    TAIL_MARGIN,
    Curve,
    Demand,
    Metric,
    Objective,
    Role,
    busiest,
    engine_curve,
    held_values,
    largest_rate,
    round_up,
    share_of,
)
from servingtiers.performance.select import DoesNotFitError, kv_capacity_tokens, step_model
from servingtiers.performance.steps import GridStepModel
from servingtiers.performance.workload import MOST_LENGTH_CV, length_cv_from_p95

__all__ = [
    "Carried",
    "Engine",
    "Lengths",
    "Missed",
    "WeightChoice",
    "bound",
    "carried",
    "demand_of",
    "engine_of",
    "keeps_its_pace",
    "kv_dtype",
    "lengths",
    "lengths_seen",
    "memory_share",
    "objectives_of",
    "parallelisms",
    "reachable",
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
    prompt_cv: float | None = None
    """Coefficient of variation; None: as a log-normal with that mean and p95 has it."""
    output_cv: float | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine as the performance model sees it: everything that :func:`carried` depends on but the traffic."""

    step: GridStepModel
    max_num_seqs: int
    max_num_batched_tokens: int
    role: PoolRole
    transfer_ms: float = 0.0
    """Time to fetch a prompt's KV cache, of a decode engine."""

    @property
    def limits(self) -> EngineLimits:
        """Its limits, as the analytic path takes them."""
        return EngineLimits(self.max_num_seqs, max(self.max_num_batched_tokens, self.max_num_seqs))


@dataclass(frozen=True, slots=True)
class Missed:
    """An objective that even an idle engine misses."""

    objective: Objective
    """The pool's share of it."""
    idle_ms: float
    """What an idle engine takes, without a margin."""
    nearest: Objective
    """The nearest that it can keep."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What one replica carries."""

    requests_per_second: float
    """Within the objectives; where even an idle engine misses one, within the nearest that can be kept."""
    binding: str
    """The objective or limit that sets it."""
    missed: tuple[Missed, ...]
    idle_ms: float
    """A request of two tokens on the idle engine: how slow it is."""
    load: float
    """Sequences decoding at that rate, on average."""
    curve: EngineCurve | None = None
    """The same for every rate; None where nothing can be carried."""


def shape_of(name: str) -> ModelShape | None:
    """Return the shape of a model of the catalogue; None where it is unknown.

    A tier's model name is a user's word: it never names a file of the operator's.
    """
    return bundled(name)


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


def lengths_seen(load: Load, planned: Lengths, role: PoolRole = PoolRole.AGGREGATED) -> Lengths:
    """Return the lengths of live traffic, as far as enough of it was seen; the planned ones otherwise.

    A prefill engine answers with one token: of its load only prompts tell.

    Args:
        load: What a pool saw.
        planned: The lengths that the tier is planned for.
        role: What that pool does.
    """
    prompt, output = load.prompt_tokens, load.output_tokens
    if not isinstance(prompt, Histogram) or not isinstance(output, Histogram):
        return planned
    if min(prompt.total, output.total) < _ENOUGH_REQUESTS or not prompt.mean or not output.mean:
        return planned
    far_prompt, far_output = prompt.quantile(0.95), output.quantile(0.95)
    hit = number(load.prefix_hit_share)
    seen = Lengths(
        prompt=max(prompt.mean, 1.0),
        output=max(output.mean, 1.0),
        prompt_p95=max(far_prompt.estimate if far_prompt else 0.0, prompt.mean),
        output_p95=max(far_output.estimate if far_output else 0.0, output.mean),
        prefix_hit=planned.prefix_hit if hit is None else min(max(hit, 0.0), 1.0),
        given=True,
        prompt_cv=_spread(prompt),
        output_cv=_spread(output),
    )
    if role is not PoolRole.PREFILL:
        return seen
    return replace(
        seen,
        output=planned.output,
        output_p95=planned.output_p95,
        output_cv=planned.output_cv,
        given=planned.given,
    )


def _spread(lengths: Histogram) -> float:
    """Return the coefficient of variation that buckets tell, with lengths spread evenly inside each.

    Two numbers, mean and p95, do not tell a prompt that is cut at the context limit from one in a hundred that is
    twenty times the mean; buckets do. It is a ratio, so it does not matter that the mean of the buckets' middles is not
    quite the mean of the lengths.
    """
    low = below = weight = first = second = 0.0
    for high, upto in zip(lengths.bounds, lengths.counts, strict=True):
        count, below = upto - below, upto
        if count > 0:
            top = high if math.isfinite(high) else 2.0 * low
            middle = (low + top) / 2.0
            weight += count
            first += count * middle
            second += count * (middle * middle + (top - low) ** 2 / 12.0)
        low = high
    mean = first / weight
    return math.sqrt(max(second / weight / (mean * mean) - 1.0, 0.0))


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


def parallelisms(shape: ModelShape, accelerator: Accelerator, also: int = 1) -> tuple[int, ...]:
    """Return the tensor parallelisms that split the heads evenly inside one node, smallest first.

    Args:
        shape: The model.
        accelerator: On which it is to run.
        also: One that is looked at beside the powers of two: a user may have given 5 to the other pool.
    """
    return tuple(
        size
        for size in sorted({1, 2, 4, 8, 16, also})
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


_ROLES = {
    PoolRole.AGGREGATED: Role.AGGREGATED,
    PoolRole.PREFILL: Role.PREFILL,
    PoolRole.DECODE: Role.DECODE,
}
_REACHABLE = 1.5
"""Where even an idle engine misses an objective, replicas are sized for this many times what it takes. The nearest
objective that can be kept is an idle engine's; a fleet sized for that would chase the impossible with idle engines."""


def objectives_of(goals: Targets, role: PoolRole) -> tuple[Objective, ...]:
    """Return the objectives as the planner takes them, as far as a pool has to keep them."""
    asked = tuple(
        Objective(Metric(metric), percentile, 1e3 * seconds)
        for (metric, percentile), seconds in sorted(goals.seconds.items())
    )
    return share_of(_ROLES[role], asked)


def demand_of(asked: Lengths, *, rounded: bool = False) -> Demand:
    """Return a mix of lengths as the planner takes it, at one request per second.

    Args:
        asked: The lengths.
        rounded: Round to 3 %: lengths seen live differ on every pass, and what was computed is found again.
    """

    def near(tokens: float) -> float:
        tokens = max(tokens, 1.0)
        return max(round(math.exp(round(math.log(tokens) / 0.03) * 0.03), 1), 1.0) if rounded else tokens

    def spread(known: float | None, mean: float, p95: float) -> float:
        cv = length_cv_from_p95(mean, p95) if known is None else min(known, MOST_LENGTH_CV)
        return round(cv, 1 if rounded else 6)

    return Demand(
        rate=1.0,
        prompt_tokens=near(asked.prompt),
        output_tokens=near(asked.output),
        prompt_cv=spread(asked.prompt_cv, asked.prompt, asked.prompt_p95),
        output_cv=spread(asked.output_cv, asked.output, asked.output_p95),
        prefix_hit_rate=round(asked.prefix_hit, 2),
    )


@lru_cache(maxsize=2048)
def engine_of(
    shape: ModelShape,
    found: Accelerator,
    tensor_parallel: int,
    weights: str,
    kv_type: str,
    memory_utilization: float,
) -> GridStepModel:
    """Return the step model of one replica, with the host's time in it as the planner has it.

    Raises:
        CatalogError: A data type is unknown, or the parallelism is impossible.
        DoesNotFitError: The weights leave no room for a KV cache.
    """
    return with_host_time(
        step_model(
            shape,
            found,
            tensor_parallel=tensor_parallel,
            weights=weights,
            kv_dtype=kv_type,
            memory_utilization=memory_utilization,
        )
    )


@lru_cache(maxsize=8192)
def carried(engine: Engine, demand: Demand, objectives: tuple[Objective, ...]) -> Carried:
    """Return what one replica carries: the planner's answer for an engine that is given.

    Args:
        engine: The engine.
        demand: The mix of lengths.
        objectives: What it must keep; see :func:`objectives_of`.
    """
    found = engine_curve(engine.step, engine.limits, _ROLES[engine.role], demand, engine.transfer_ms)
    if not found.rates:
        return Carried(0.0, "the KV cache does not hold one request", (), math.inf, 0.0)
    idle = found.points[0]
    rate, binding = largest_rate(found, objectives, TAIL_MARGIN)
    missed: list[Missed] = []
    reach = objectives
    if rate <= 0.0:
        reach = reachable(engine, demand, objectives)
        for each, instead in zip(objectives, reach, strict=True):
            if instead is not each:
                takes, with_margin = (held_values(found, each, margin)[0] for margin in (1.0, TAIL_MARGIN))
                nearest = replace(each, target_ms=round_up(1.02 * with_margin))
                missed.append(Missed(each, takes, nearest))
        rate, binding = largest_rate(found, reach, TAIL_MARGIN)
        binding = f"{' and '.join(str(each.objective) for each in missed)} is out of reach; {binding}"
        if rate <= 0.0:  # at least a queue that does not grow
            rate = found.rates[-1]
    return Carried(
        rate,
        binding,
        tuple(missed),
        idle.ttft.mean + idle.tpot.mean,
        _decoding(found, rate),
        _curve(engine, found, demand, reach),
    )


def _curve(engine: Engine, found: Curve, demand: Demand, objectives: tuple[Objective, ...]) -> EngineCurve:
    last = found.points[-1]
    saturation = found.rates[-1] / last.utilisation
    # Waiting for a first token is what neighbours help with, but those of prefill engines: requests do not wait for
    # whichever of them is free first, and one prompt before them is most of the wait.
    prefill = engine.role is PoolRole.PREFILL
    alone = tuple(each for each in objectives if prefill or each.metric is not Metric.TTFT)
    if prefill:
        # A long prompt alone may take most of its objective, and how many are that long is a guess from a few buckets.
        # What an objective leaves for waiting would be nothing in one reading and, loosened, much in the next: so it is
        # loosened as it comes near. What that misses buys headroom.
        alone = tuple(
            replace(
                each, target_ms=max(each.target_ms, _REACHABLE * held_values(found, each, TAIL_MARGIN)[0])
            )
            for each in alone
        )
    rate, _ = largest_rate(found, alone, 1.0 if prefill else TAIL_MARGIN)
    match engine.role:
        case PoolRole.PREFILL:
            share = 1.0
        case PoolRole.DECODE:
            share = 0.0
        case _:
            context = demand.context
            decoding = engine.step.grid.decode_step_ms(max(last.mean_batch, 1.0), context)
            share = min(max(1.0 - decoding / last.tpot.mean, 0.0), 1.0)
    return EngineCurve(
        rps=min(rate, saturation) if rate > 0 else saturation,
        saturation=saturation,
        loads=tuple(each / saturation for each in found.rates),
        tpot=tuple(point.tpot.mean / 1e3 for point in found.points),
        ttft=tuple(point.ttft.mean / 1e3 for point in found.points),
        prefill_share=share,
    )


def reachable(engine: Engine, demand: Demand, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
    """Return the objectives that replicas are sized for: those that even an idle engine misses are loosened.

    Args:
        engine: The engine.
        demand: The mix of lengths.
        objectives: What is asked of it.
    """
    found = engine_curve(engine.step, engine.limits, _ROLES[engine.role], demand, engine.transfer_ms)
    if not found.rates:
        return objectives
    idle = {each: held_values(found, each, TAIL_MARGIN)[0] for each in objectives}
    return tuple(
        replace(each, target_ms=_REACHABLE * takes) if takes > each.target_ms else each
        for each, takes in idle.items()
    )


def _decoding(found: Curve, rate: float) -> float:
    """Sequences decoding at the first point of a curve that is not below a rate."""
    at = next((point for known, point in zip(found.rates, found.points, strict=True) if known >= rate), None)
    return (at or found.points[-1]).mean_batch


def keeps_its_pace(engine: Engine, demand: Demand, objectives: tuple[Objective, ...]) -> bool:
    """Whether an engine whose batch is full still keeps what is asked of its decoding: TPOT, ITL, and E2E but its queue.

    Args:
        engine: The engine.
        demand: The mix of lengths.
        objectives: What it must keep.
    """
    if engine.role is PoolRole.PREFILL:
        return True
    full = busiest(engine.step, engine.limits, _ROLES[engine.role], demand)
    for each in objectives:
        if each.metric is Metric.TTFT:
            continue
        takes = full.tpot.at(each.percentile)
        if each.metric is Metric.E2E:
            takes = full.prefill_ms + (demand.output_tokens - 1.0) * takes
        if takes > each.target_ms:
            return False
    return True
