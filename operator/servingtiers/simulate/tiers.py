"""From a ServingTier as a user writes it to a tier of the simulator: plant, beliefs, bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from servingtiers.api.spec import PoolScaling, ServingTier
from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import ModelShape, model
from servingtiers.core.config import AcceleratorBinding, OperatorConfig
from servingtiers.core.decisions import PoolRole
from servingtiers.core.effective import PoolSettings, pools_asked
from servingtiers.performance.engine_sim import EngineConfig, Transfer
from servingtiers.performance.host import with_host_time
from servingtiers.performance.select import step_model
from servingtiers.performance.speculation import Speculation
from servingtiers.performance.steps import GridStepModel
from servingtiers.policy import presets, sizing
from servingtiers.simulate.capacity import Belief, OperatorCapacity, work_of
from servingtiers.simulate.scenario import PoolPlan, TierPlan, slo_of
from servingtiers.simulate.traces import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["LINK_GIGABYTES", "default_config", "parse_tier", "tier_plan", "with_error"]

LINK_GIGABYTES = 25.0
"""Link from prefill to decode unless given, 10⁹ bytes/s: one 200 Gbit/s NIC per engine. An assumption, not measured."""
_NGRAM_ACCEPTANCE = 0.3


def default_config() -> OperatorConfig:
    """Return an operator configuration in which every accelerator of the catalogue is bound at its listed price."""
    from servingtiers.catalog.accelerators import accelerators

    return OperatorConfig(accelerators={each.key: AcceleratorBinding() for each in accelerators()})


def parse_tier(document: Mapping[str, Any]) -> ServingTier:
    """Return the ServingTier of a YAML document; a missing name and namespace are filled in.

    Raises:
        ValueError: It is no valid ServingTier (pydantic's ValidationError is one).
    """
    metadata = {"name": "tier", "namespace": "default", **dict(document.get("metadata") or {})}
    return ServingTier.model_validate({**document, "metadata": metadata})


def tier_plan(
    tier: ServingTier,
    trace: Trace,
    *,
    config: OperatorConfig | None = None,
    model_error: float = 1.0,
    max_replicas: int | None = None,
    min_replicas: int | None = None,
    transfer_gigabytes: float = LINK_GIGABYTES,
    shared_prefix: bool = False,
) -> TierPlan:
    """Return a tier of the simulator.

    The plant serves from the best step model there is (a shipped table where one fits); the controller starts from
    the roofline, times ``model_error``.

    Args:
        tier: The tier.
        trace: Its traffic; requests longer than its engines take are left out.
        config: The operator's configuration; None: every accelerator of the catalogue is there.
        model_error: Capacity the controller believes in over what its model says: 1.4 is 40 % too much.
        max_replicas: Overrides every pool's bound.
        min_replicas: The same.
        transfer_gigabytes: Link between prefill and decode, 10⁹ bytes/s.
        shared_prefix: Use the trace's shared tokens as prefix-cache hits.

    Raises:
        ValueError: No settings can be chosen for the tier, or its engines cannot hold a request; the message states
            the mend.
    """
    if not model_error > 0:
        raise ValueError(f"model error {model_error:g}: use a factor above 0, such as 1.4")
    settings = presets.choose(tier, config or default_config())
    shape = model(tier.spec.model.name)
    targets = presets.targets(tier.spec)
    limits = tuple(sorted(slo_of(targets).items()))
    hit = tier.spec.workload.prefix_hit_percent / 100.0 if tier.spec.workload else 0.0
    asked = {pool.name: pool.spec.scaling for pool in pools_asked(tier.spec)}
    longest = min(pool.max_model_len or shape.max_context for pool in settings.pools)
    models = {}
    for pool in settings.pools:
        models[pool.name] = (_model(pool, shape, tables=True), _model(pool, shape, tables=False))
        longest = min(longest, models[pool.name][0].kv_capacity_tokens - 64)
    trace, _ = trace.capped(longest)
    if not len(trace):
        raise ValueError(
            f"{trace.name}: every request is longer than the {longest} tokens that {tier.metadata.name} takes"
        )
    prompt = _mean_cv(
        np.maximum(trace.prompt * (1.0 - hit), 1) if not shared_prefix else trace.prompt - trace.shared
    )
    output = _mean_cv(trace.output)
    link = Transfer(float(shape.kv_bytes_per_token()), transfer_gigabytes, 2.0)
    pools = []
    for pool in settings.pools:
        scaling = _bounds(asked[pool.name], max_replicas, min_replicas)
        engine = EngineConfig(
            max_num_seqs=pool.max_num_seqs,
            max_num_batched_tokens=max(pool.max_num_batched_tokens or 8192, pool.max_num_seqs),
            priority_scheduling=pool.priority_scheduling,
        )
        truth, prior = models[pool.name]
        pools.append(
            PoolPlan(
                name=pool.name,
                role=pool.role,
                scaling=scaling,
                model=truth,
                engine=engine,
                gpus=pool.tensor_parallel,
                belief=Belief(
                    work_of(prior, engine, pool.role, prompt, output, limits),
                    model_error,
                    prompt[0],
                    output[0],
                    prior.source.detail,
                ),
                operator=OperatorCapacity(
                    engine=sizing.Engine(
                        prior,
                        pool.max_num_seqs,
                        engine.max_num_batched_tokens,
                        pool.role,
                        _transfer_ms(link, prompt[0]) if pool.role is PoolRole.DECODE else 0.0,
                    ),
                    error=model_error,
                    goals=targets,
                    planned=sizing.lengths(tier.spec),
                ),
                max_queued=pool.max_queued_requests or 0,
            )
        )
    return TierPlan(
        key=f"{tier.metadata.namespace}/{tier.metadata.name}",
        spec=tier.spec,
        targets=targets,
        pools=tuple(pools),
        trace=trace,
        routing=settings.router_policy,
        drain_seconds=settings.drain_seconds,
        max_model_len=longest,
        transfer=link if len(pools) > 1 else None,
        prefix_hit=hit or None,
        shared_prefix=shared_prefix,
    )


def _model(pool: PoolSettings, shape: ModelShape, *, tables: bool) -> GridStepModel:
    speculation = None
    if pool.speculative is not None:
        speculation = Speculation(int(pool.speculative["num_speculative_tokens"]), _NGRAM_ACCEPTANCE)
    found = step_model(
        shape,
        accelerator(pool.accelerator),
        tensor_parallel=pool.tensor_parallel,
        weights=pool.weights,
        kv_dtype="fp8" if pool.kv_cache_dtype == "fp8" else "bf16",
        speculation=speculation,
        memory_utilization=pool.gpu_memory_utilization or 0.9,
        use_tables=tables,
    )
    # Tables and rooflines add up kernels; what lies between two steps is the host's.
    return with_host_time(found)


def _transfer_ms(link: Transfer, tokens: float) -> float:
    return float(link.ms(np.array([tokens]))[0])


def _bounds(scaling: PoolScaling, most: int | None, least: int | None) -> PoolScaling:
    update: dict[str, Any] = {}
    if most is not None:
        update["max_replicas"] = most
        update["min_replicas"] = min(scaling.min_replicas, most)
    if least is not None:
        update["min_replicas"] = least
        update["max_replicas"] = max(most or scaling.max_replicas, least)
        if least > 0:
            update["idle_after"] = None
    return scaling.model_copy(update=update)


def _mean_cv(values: NDArray[Any]) -> tuple[float, float]:
    """Return mean and coefficient of variation, rounded so that equal mixes share their capacity."""
    mean = max(float(values.mean()), 1.0)
    return round(mean, 1), min(round(float(values.std()) / mean, 2), 3.0)


def with_error(plan: TierPlan, model_error: float) -> TierPlan:
    """Return the tier with another error of the controller's belief."""
    pools = tuple(
        replace(
            pool,
            belief=replace(pool.belief, error=model_error),
            operator=replace(pool.operator, error=model_error),
        )
        for pool in plan.pools
    )
    return replace(plan, pools=pools)
