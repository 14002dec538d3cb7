"""What a tier means: fills every setting the user left open, each with its reason.

| | Latency | Balanced | Throughput |
|---|---|---|---|
| batch, no objective of the user's own | 4 | 16 | 128 |
| batch, with one | the largest whose full engine keeps its pace | … | … |
| step budget | small | middle | large |
| step budget, with an objective on ITL | none that holds a token up for longer | … | … |
| parallelism | may exceed what memory needs | what memory needs | what memory needs |

The choice is made when a spec changes and pinned on the children; it is not a control loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType

from servingtiers.api.base import format_duration, parse_duration
from servingtiers.api.spec import (
    AttentionBackend,
    Dtype,
    EngineSpec,
    KvCacheDtype,
    OnShortage,
    RouterPolicy,
    ServingTier,
    ServingTierSpec,
    SpeculativeMethod,
    Tier,
)
from servingtiers.catalog.accelerators import Accelerator, accelerator
from servingtiers.catalog.models import ModelShape
from servingtiers.catalog.names import CatalogError
from servingtiers.core.config import AcceleratorBinding, OperatorConfig
from servingtiers.core.decisions import PoolRole, Targets
from servingtiers.core.effective import (
    PoolAsked,
    PoolSettings,
    TierSettings,
    engine_image,
    engine_version,
    pools_asked,
)
from servingtiers.performance.planner import LINK_GB_S, Demand, Metric, Objective, budget_for_gap, transfer_ms
from servingtiers.performance.steps import GridStepModel
from servingtiers.policy import sizing

__all__ = ["NoChoiceError", "choose", "price_of", "targets"]


class NoChoiceError(ValueError):
    """No settings can be chosen; :func:`servingtiers.policy.problems.find` says why and states the mend."""


_DEFAULT_TARGETS: dict[Tier, dict[tuple[str, str], float]] = {
    Tier.LATENCY: {("ttft", "p99"): 0.5, ("tpot", "p99"): 0.05},
    Tier.BALANCED: {("ttft", "p99"): 2.0, ("tpot", "p99"): 0.1},
    Tier.THROUGHPUT: {},
}
_DEFAULT_BATCH = {Tier.LATENCY: 4, Tier.BALANCED: 16, Tier.THROUGHPUT: 128}
_LARGEST_BATCH = {Tier.LATENCY: 256, Tier.BALANCED: 256, Tier.THROUGHPUT: 512}
_PERFORMANCE_MODE = {Tier.LATENCY: "interactivity", Tier.BALANCED: "balanced", Tier.THROUGHPUT: "throughput"}
_BUDGET = {Tier.LATENCY: 2048, Tier.BALANCED: 4096, Tier.THROUGHPUT: 16_384}


def targets(spec: ServingTierSpec) -> Targets:
    """Return the objectives in force: those of ``spec.slo``, or the tier's own where it gives none."""
    given: dict[tuple[str, str], float] = {}
    if spec.slo is not None:
        for metric in ("ttft", "tpot", "itl", "e2e"):
            wanted = getattr(spec.slo, metric)
            if wanted is None:
                continue
            for percentile in ("p50", "p90", "p95", "p99", "p999"):
                text = getattr(wanted, percentile)
                if text is not None:
                    given[metric, percentile] = parse_duration(text)
    if given:
        return Targets(given, "given in spec.slo")
    if spec.tier is Tier.THROUGHPUT:
        return Targets(
            {}, "Throughput tiers have no latency objective: a backlog is worked off within 10 minutes"
        )
    return Targets(dict(_DEFAULT_TARGETS[spec.tier]), f"the {spec.tier} tier's own, as spec.slo gives none")


def price_of(key: str, binding: AcceleratorBinding) -> tuple[Decimal, str]:
    """Return the price of one accelerator for one hour and where it comes from."""
    if binding.price_per_hour is not None:
        return binding.price_per_hour, "operator configuration"
    entry = accelerator(key)
    return Decimal(str(entry.price_per_hour_usd)), f"catalogue: {entry.price_source}"


_NO_SHORTAGE: Mapping[str, frozenset[str]] = MappingProxyType({})
_ALL_OPEN: Mapping[str, int] = MappingProxyType({})


def choose(
    tier: ServingTier,
    config: OperatorConfig,
    *,
    shortage: Mapping[str, frozenset[str]] = _NO_SHORTAGE,
    staying: Mapping[str, int] = _ALL_OPEN,
) -> TierSettings:
    """Return the settings of every pool and of the router, each with its reason.

    Args:
        tier: The tier; :func:`servingtiers.policy.problems.find` has found nothing blocking in it.
        config: The operator's configuration.
        shortage: Pool name to accelerators that could not be scheduled. A pool with ``onShortage: NextCheapest`` avoids
            them as long as another one will do.
        staying: Pool name to the tensor parallelism of pools whose engines stay as they are, whatever is chosen here: the
            other pool must be able to exchange KV caches with them.

    Raises:
        NoChoiceError: The tier has a blocking problem after all.
    """
    spec = tier.spec
    goals = targets(spec)
    shape = sizing.shape_of(spec.model.name)
    asked = pools_asked(spec)
    pools: list[PoolSettings] = []
    for pool in asked:
        # NIXL cannot gather the KV heads of several prefill shards on fewer decode shards.
        least, most = 1, None
        if pool.role is PoolRole.DECODE:
            least = staying.get(asked[0].name, pools[0].tensor_parallel)
        elif pool.role is PoolRole.PREFILL:
            most = staying.get(asked[1].name, asked[1].spec.hardware.tensor_parallel)
        short = shortage.get(pool.name, frozenset())
        pools.append(_pool(spec, config, pool, shape, goals, short, (least, most)))
    policy, policy_reason = _router_policy(spec, pools)
    timeout, timeout_reason = _request_timeout(spec, goals)
    return TierSettings(
        served_name=spec.model.served_name or spec.model.name,
        pools=tuple(pools),
        router_image=spec.router.image or config.images.router,
        router_policy=policy,
        router_policy_reason=policy_reason,
        request_timeout_seconds=timeout,
        request_timeout_reason=timeout_reason,
        drain_seconds=parse_duration(spec.drain_timeout),
    )


# --- one pool ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One accelerator × parallelism with the batch it would run."""

    accelerator: Accelerator
    binding: AcceleratorBinding
    tensor_parallel: int
    price: Decimal
    """Of one replica for one hour."""
    batch: int
    batch_reason: str
    budget: int
    """Tokens of one step."""
    budget_reason: str
    meets: bool | None
    """Whether it meets the objectives at any load; None: not known."""
    carried: sizing.Carried | None
    """What one replica carries within them."""
    replicas: int | None
    """For the arrival rate of the workload hint; None where none is given."""
    by_work: bool
    """Compare prices per request where no arrival rate is given: a Throughput tier fills what it gets."""

    @property
    def cost(self) -> Decimal:
        if self.replicas is None and self.by_work and self.carried is not None:
            return self.price / Decimal(str(self.carried.requests_per_second))
        return self.price * (self.replicas or 1)


def _pool(
    spec: ServingTierSpec,
    config: OperatorConfig,
    asked: PoolAsked,
    shape: ModelShape | None,
    goals: Targets,
    shortage: frozenset[str],
    between: tuple[int, int | None],
) -> PoolSettings:
    engine = asked.spec.engine
    version = engine_version(engine, config)
    if version is None:
        raise NoChoiceError(
            f"{asked.path}.engine.version: the image's tag does not tell it: set engine.version"
        )
    reasons: dict[str, str] = {}
    allowed = _allowed(config, asked)
    avoided = (
        [found.key for found, _ in allowed if found.key in shortage]
        if asked.spec.hardware.on_shortage is OnShortage.NEXT_CHEAPEST
        else []
    )

    def candidates_of(pairs: list[tuple[Accelerator, AcceleratorBinding]]) -> list[_Candidate]:
        return [
            _candidate(spec, asked, shape, found, binding, size, goals)
            for found, binding in pairs
            for size in _sizes(spec, asked, shape, found, *between)
        ]

    candidates = candidates_of([pair for pair in allowed if pair[0].key not in avoided])
    if avoided and not candidates:
        # Nothing else will do: better to wait for what is short than to have no plan at all.
        avoided, candidates = [], candidates_of(allowed)
    if not candidates:
        raise NoChoiceError(
            f"{asked.path}.hardware: no allowed accelerator is bound here and holds {spec.model.name}"
        )
    chosen = _cheapest(candidates)
    reasons["accelerator"] = _accelerator_reason(spec, goals, chosen, candidates, avoided)
    reasons["tensorParallel"] = _parallel_reason(spec, asked, chosen, candidates, shape)
    reasons["maxNumSeqs"] = chosen.batch_reason

    weights = sizing.weights_of(spec, engine, chosen.accelerator)
    reasons["weights"] = weights.reason
    budget, reasons["maxNumBatchedTokens"] = chosen.budget, chosen.budget_reason
    length, reasons["maxModelLen"] = _max_model_len(spec, engine, shape, chosen, weights.weights)
    mode = _PERFORMANCE_MODE[spec.tier]
    reasons["performanceMode"] = f"the {spec.tier} tier's"
    reasons["gpuMemoryUtilizationPercent"] = (
        "given"
        if engine.gpu_memory_utilization_percent is not None
        else "leaves a tenth for what vLLM does not count"
    )
    reasons["speculative"] = (
        "given"
        if engine.speculative is not None
        else "off: drafts pay only where outputs repeat their prompts; set engine.speculative to use them"
    )
    return PoolSettings(
        name=asked.name,
        role=asked.role,
        accelerator=chosen.accelerator.key,
        binding=chosen.binding,
        tensor_parallel=chosen.tensor_parallel,
        image=engine_image(engine, config),
        engine_version=version,
        weights=weights.weights,
        quantization=weights.flag,
        dtype=_DTYPE[engine.dtype],
        kv_cache_dtype=None if engine.kv_cache_dtype is KvCacheDtype.AUTO else "fp8",
        max_num_seqs=chosen.batch,
        max_num_batched_tokens=budget,
        max_model_len=length,
        performance_mode=mode,
        attention_backend=None if engine.attention_backend is None else _ATTENTION[engine.attention_backend],
        speculative=_speculative(engine),
        priority_scheduling=engine.priority_scheduling,
        max_queued_requests=engine.max_queued_requests,
        gpu_memory_utilization=sizing.memory_share(engine),
        extra_args=dict(engine.extra_args or {}),
        env=dict(engine.env or {}),
        reasons=reasons,
    )


_DTYPE = {
    Dtype.AUTO: None,
    Dtype.BFLOAT16: "bfloat16",
    Dtype.FLOAT16: "float16",
    Dtype.FLOAT32: "float32",
}
_ATTENTION = {
    AttentionBackend.FLASH_ATTENTION: "FLASH_ATTN",
    AttentionBackend.FLASH_INFER: "FLASHINFER",
    AttentionBackend.TRITON: "TRITON_ATTN",
}
_METHOD = {
    SpeculativeMethod.NGRAM: "ngram",
    SpeculativeMethod.DRAFT_MODEL: "draft_model",
    SpeculativeMethod.EAGLE: "eagle",
    SpeculativeMethod.EAGLE3: "eagle3",
}


def _speculative(engine: EngineSpec) -> dict[str, str | int] | None:
    given = engine.speculative
    if given is None:
        return None
    config: dict[str, str | int] = {
        "method": _METHOD[given.method],
        "num_speculative_tokens": given.num_speculative_tokens,
    }
    if given.model is not None:
        config["model"] = given.model
    if given.method is SpeculativeMethod.NGRAM:
        config |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    return config


def _allowed(config: OperatorConfig, asked: PoolAsked) -> list[tuple[Accelerator, AcceleratorBinding]]:
    bindings = sizing.bound(config)
    names = asked.spec.hardware.accelerators or list(bindings)
    keys: list[str] = []
    for name in names:
        try:
            keys.append(accelerator(name).key)
        except CatalogError:
            continue
    return [(accelerator(key), bindings[key]) for key in dict.fromkeys(keys) if key in bindings]


def _sizes(
    spec: ServingTierSpec,
    asked: PoolAsked,
    shape: ModelShape | None,
    found: Accelerator,
    least: int,
    most: int | None,
) -> tuple[int, ...]:
    """Return the tensor parallelisms worth a look, smallest first."""
    given = asked.spec.hardware.tensor_parallel
    if shape is None:
        return (given or least,)
    engine = asked.spec.engine
    if given is not None:
        weights = sizing.weights_of(spec, engine, found).weights
        needed = sizing.tokens_needed(spec, engine, shape)
        return (given,) if sizing.room(shape, found, given, weights, engine) >= needed else ()
    smallest = sizing.smallest_fit(spec, engine, shape, found)
    if smallest is None:
        return ()
    sizes = tuple(
        size
        for size in sizing.parallelisms(shape, found, least)
        if size >= max(smallest, least) and size <= (most or size)
    )
    # Only a Latency tier pays for more accelerators than memory needs: it may meet an objective that one cannot.
    return sizes if spec.tier is Tier.LATENCY else sizes[:1]


def _candidate(
    spec: ServingTierSpec,
    asked: PoolAsked,
    shape: ModelShape | None,
    found: Accelerator,
    binding: AcceleratorBinding,
    size: int,
    goals: Targets,
) -> _Candidate:
    price = price_of(found.key, binding)[0] * size
    by_work = spec.tier is Tier.THROUGHPUT
    engine = asked.spec.engine
    batch = engine.max_num_seqs or _DEFAULT_BATCH[spec.tier]
    reason = "given" if engine.max_num_seqs else f"the {spec.tier} tier's"
    step: GridStepModel | None = None
    if shape is None:
        reason += "; the model is not in the catalogue"
    else:
        weights = sizing.weights_of(spec, engine, found).weights
        kv_dtype = sizing.kv_dtype(engine)
        try:
            step = sizing.engine_of(shape, found, size, weights, kv_dtype, sizing.memory_share(engine))
        except CatalogError as error:
            reason += f"; not modelled: {error}"
    if step is None or shape is None:
        budget, why = _budget(spec.tier, asked, found, batch)
        return _Candidate(found, binding, size, price, batch, reason, budget, why, None, None, None, by_work)

    lengths = sizing.lengths(spec)
    demand = sizing.demand_of(lengths)
    objectives = sizing.objectives_of(goals, asked.role)
    held = max(1, int(step.kv_capacity_tokens / (lengths.prompt + lengths.output)))
    moved = 0.0
    if asked.role is PoolRole.DECODE:
        moved = transfer_ms(shape, kv_dtype, demand.prompt_tokens, LINK_GB_S)

    def engine_with(seqs: int) -> tuple[sizing.Engine, str]:
        budget, why = _budget(spec.tier, asked, found, seqs, step, demand, objectives)
        return sizing.Engine(step, seqs, budget, asked.role, moved), why

    if engine.max_num_seqs is None:
        if spec.slo is not None and goals.seconds and asked.role is not PoolRole.PREFILL:
            most = min(_LARGEST_BATCH[spec.tier], held)
            batch, reason = _largest_batch(
                lambda seqs, wanted: sizing.keeps_its_pace(engine_with(seqs)[0], demand, wanted),
                most,
                (objectives, sizing.reachable(engine_with(most)[0], demand, objectives)),
                goals,
                step.source.detail,
            )
        elif batch > held:
            reason = f"as many requests of this length as the KV cache holds ({reason} is {batch})"
            batch = held
    running, why = engine_with(batch)
    result = sizing.carried(running, demand, objectives)
    replicas = None
    rate = (
        float(spec.workload.requests_per_second)
        if spec.workload and spec.workload.requests_per_second
        else 0.0
    )
    if result.requests_per_second <= 0.0:
        return _Candidate(
            found, binding, size, price, batch, f"{reason}; {result.binding}",
            running.max_num_batched_tokens, why, None, None, None, by_work,
        )  # fmt: skip
    if rate > 0:
        replicas = max(1, -int(-rate / result.requests_per_second // 1))
    return _Candidate(
        found,
        binding,
        size,
        price,
        batch,
        reason,
        running.max_num_batched_tokens,
        why,
        not result.missed,
        result,
        replicas,
        by_work,
    )


def _largest_batch(
    fits: Callable[[int, tuple[Objective, ...]], bool],
    most: int,
    wanted: tuple[tuple[Objective, ...], tuple[Objective, ...]],
    goals: Targets,
    source: str,
) -> tuple[int, str]:
    """Return the largest batch at which a full engine keeps its pace.

    Args:
        fits: Whether a batch does, for some objectives.
        most: The largest batch there may be.
        wanted: The objectives, and what of them can be reached: where not even a batch of 1 keeps the first, the
            batch is for the second, lest a replica serve one request at a time and miss them all the same.
        goals: The objectives as the user knows them.
        source: Where the step times come from.
    """
    said = ", ".join(
        f"{metric.upper()} {percentile} ≤ {format_duration(seconds)}"
        for (metric, percentile), seconds in sorted(goals.seconds.items())
    )
    asked, can_be_kept = wanted
    hopeless = not fits(1, asked)
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle, can_be_kept if hopeless else asked):
            low = middle
        else:
            high = middle - 1
    if hopeless:
        return (
            low,
            f"not even a batch of 1 meets {said}; the largest near what an idle engine takes ({source})",
        )
    if low == most:
        return low, f"the KV cache or the tier's range allows no more; meets {said} ({source})"
    return low, f"the largest batch that meets {said} with a full engine ({source})"


def _cheapest(candidates: list[_Candidate]) -> _Candidate:
    """Return the cheapest candidate that meets the objectives, else the one that comes nearest.

    Equal costs are decided by capacity, then by name, so that the same tier always gets the same hardware.
    """

    def key(each: _Candidate) -> tuple[int, Decimal, float, str, int]:
        rank = {True: 0, None: 0, False: 1}[each.meets]
        if rank:
            # Nothing meets the objectives: speed comes before price.
            slowness = each.carried.idle_ms if each.carried else 0.0
            return (1, Decimal(0), slowness, each.accelerator.key, each.tensor_parallel)
        capacity = -each.carried.requests_per_second if each.carried else 0.0
        return (0, each.cost, capacity, each.accelerator.key, each.tensor_parallel)

    return min(candidates, key=key)


def _accelerator_reason(
    spec: ServingTierSpec,
    goals: Targets,
    chosen: _Candidate,
    candidates: list[_Candidate],
    avoided: list[str],
) -> str:
    keys = dict.fromkeys(each.accelerator.key for each in candidates)
    price = f"{chosen.price.normalize():f} an hour for a replica"
    if len(keys) == 1:
        only = "the only one left" if avoided else "the only one allowed and bound"
        text = f"{only} that holds {spec.model.name} ({price})"
    elif chosen.meets:
        cheapest = "cheapest per request" if chosen.by_work and chosen.replicas is None else "cheapest"
        meets = " that meets the SLO" if goals.seconds else ""
        text = f"the {cheapest} of {', '.join(keys)}{meets} ({price}"
        text += f", {chosen.replicas} for the workload)" if (chosen.replicas or 1) > 1 else ")"
    elif chosen.meets is None:
        text = f"the cheapest of {', '.join(keys)} ({price})"
    else:
        text = f"none of {', '.join(keys)} meets the SLO; this one comes nearest ({price})"
    if avoided:
        text += f"; {', '.join(avoided)} could not be scheduled"
    return text


def _parallel_reason(
    spec: ServingTierSpec,
    asked: PoolAsked,
    chosen: _Candidate,
    candidates: list[_Candidate],
    shape: ModelShape | None,
) -> str:
    if asked.spec.hardware.tensor_parallel is not None:
        return "given"
    if shape is None:
        return "the model is not in the catalogue: one accelerator, set tensorParallel if it needs more"
    same = [each.tensor_parallel for each in candidates if each.accelerator.key == chosen.accelerator.key]
    if chosen.tensor_parallel > min(same):
        return f"more than the {min(same)} that memory needs: the cheapest that meets the SLO"
    return f"the smallest at which {spec.model.name} and its KV cache fit {chosen.accelerator.key}"


def _budget(
    tier: Tier,
    asked: PoolAsked,
    found: Accelerator,
    batch: int,
    step: GridStepModel | None = None,
    demand: Demand | None = None,
    objectives: tuple[Objective, ...] = (),
) -> tuple[int, str]:
    """Return the token budget of one step: the less, the less a prompt delays those who decode."""
    given = asked.spec.engine.max_num_batched_tokens
    if given is not None:
        return given, "given"
    budget, reason = _BUDGET[tier], f"the {tier} tier's"
    if asked.role is PoolRole.PREFILL:
        budget, reason = 16_384, "large: nobody decodes beside the prompts"
    elif asked.role is PoolRole.DECODE:
        budget, reason = 2048, "small: prompts come as KV cache, only recomputed ones are fed"
    # vLLM's own default for accelerators below 70 GiB is 2,048: activations of large steps do not fit.
    if found.memory_gib < 70 and budget > 8192:
        budget, reason = 8192, f"{reason}, as far as {found.memory_gib:.0f} GiB allow"
    gap = min(
        (each for each in objectives if each.metric is Metric.ITL), key=lambda o: o.target_ms, default=None
    )
    if gap is not None and step is not None and demand is not None:
        small = budget_for_gap(step, demand, gap.target_ms, budget, batch)
        if small < budget:
            budget, reason = small, f"the largest step within {gap}"
    if budget < batch:
        budget, reason = batch, "one token for every sequence of the batch"
    return budget, reason


def _max_model_len(
    spec: ServingTierSpec, engine: EngineSpec, shape: ModelShape | None, chosen: _Candidate, weights: str
) -> tuple[int | None, str]:
    if engine.max_model_len is not None:
        return engine.max_model_len, "given"
    if shape is None:
        return None, "the checkpoint's; the model is not in the catalogue"
    room = sizing.room(shape, chosen.accelerator, chosen.tensor_parallel, weights, engine)
    if room >= shape.max_context:
        return shape.max_context, f"all that {spec.model.name} was made for"
    # vLLM refuses to start when one request of this length does not fit; its own count differs by some blocks.
    fits = max(int(room * 0.95) // 256 * 256, 256)
    return fits, f"what the KV cache of one replica holds, of the model's {shape.max_context}"


# --- the router -------------------------------------------------------------------------------------------------

_CACHE_AWARE_BATCH = 64
"""Below this difference in load, cache_aware keeps sending to the engine that knows the prefix."""


def _router_policy(spec: ServingTierSpec, pools: list[PoolSettings]) -> tuple[str, str]:
    if spec.router.policy is not None:
        return spec.router.policy.value, "given"
    if spec.disaggregation is not None:
        return (
            RouterPolicy.ROUND_ROBIN.value,
            "prefill and decode: the router sees no load of vLLM engines there, power_of_two would compare zeros",
        )
    batch = pools[0].max_num_seqs
    if batch < _CACHE_AWARE_BATCH:
        return (
            RouterPolicy.POWER_OF_TWO.value,
            (
                f"cache_aware balances from a difference of {_CACHE_AWARE_BATCH} requests on, a batch of {batch} would"
                " be overrun before"
            ),
        )
    return RouterPolicy.CACHE_AWARE.value, f"a batch of {batch} has room for requests that share a prefix"


def _request_timeout(spec: ServingTierSpec, goals: Targets) -> tuple[float, str]:
    """Return how long the router lets one request take: what only a lost request exceeds."""
    if spec.router.request_timeout is not None:
        return parse_duration(spec.router.request_timeout), "given"

    def longest(metric: str) -> float | None:
        return max((seconds for (name, _), seconds in goals.seconds.items() if name == metric), default=None)

    end_to_end, first, each = longest("e2e"), longest("ttft"), longest("tpot") or longest("itl")
    if end_to_end is not None:
        expected, how = end_to_end, f"the E2E objective of {format_duration(end_to_end)}"
    elif each is not None:
        output = sizing.lengths(spec).output_p95
        expected = (first or 0.0) + output * each
        how = f"a p95 output of {output:.0f} tokens at the objectives"
    else:
        return 1800.0, "no objective bounds a request: the router's own 1800s"
    seconds = float(min(max(round(10 * expected), 60), 1800))
    return seconds, f"10 × {how}, within 60–1800 s"
