"""What one replica carries, how many the workload needs, and whether the objectives can be met at all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from servingtiers.api.spec import ServingTierSpec
from servingtiers.api.status import PlanStatus
from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import ModelShape
from servingtiers.catalog.names import CatalogError
from servingtiers.core.decisions import EngineCurve, PoolRole, Targets
from servingtiers.core.effective import PoolSettings, TierSettings
from servingtiers.core.findings import Feasibility
from servingtiers.core.signals import TierLoad
from servingtiers.performance.planner import LINK_GB_S, default_limits, duration, transfer_ms
from servingtiers.performance.steps import OutOfHullError
from servingtiers.policy import sizing

__all__ = ["Judgement", "judge"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the performance model says of a tier as it is configured."""

    requests_per_second: dict[str, float]
    """Pool to requests per second of one replica that meet the objectives; a pool that is not modelled, or whose
    lengths nobody knows, is left out."""
    plan: PlanStatus | None
    feasibility: Feasibility
    curves: dict[str, EngineCurve] = field(default_factory=dict)
    """The same pools to what one replica does at every load."""


def judge(
    spec: ServingTierSpec, settings: TierSettings, goals: Targets, load: TierLoad | None = None
) -> Judgement:
    """Return what the performance model says of the pools with the settings they have.

    A replica's capacity is the planner's: the largest rate at which it keeps the objectives under Poisson arrivals,
    tails with their margin. Where even an idle replica misses an objective, it is sized for the nearest that can be
    kept: no number of replicas would do more.

    Args:
        spec: The tier.
        settings: Its settings.
        goals: Its objectives.
        load: Live traffic; its lengths are taken where enough was seen, else those of ``spec.workload``.
    """
    shape = sizing.shape_of(spec.model.name)
    if shape is None:
        return Judgement(
            {},
            None,
            Feasibility(
                None,
                "ModelUnknown",
                f"{spec.model.name} is not in the catalogue: whether the objectives can be met is not known",
            ),
        )
    found: dict[str, sizing.Carried] = {}
    bands: list[float] = []
    sources: list[str] = []
    broken: list[str] = []
    doubtful: list[str] = []
    known_lengths = True
    for pool in settings.pools:
        asked = sizing.lengths(spec)
        seen = asked
        if load is not None and pool.name in load.pools:
            seen = sizing.lengths_seen(load.pools[pool.name], asked, pool.role)
        known_lengths = known_lengths and seen.given
        demand = sizing.demand_of(seen, rounded=seen is not asked)
        try:
            engine = _engine(shape, pool, demand.prompt_tokens)
            carried = sizing.carried(engine, demand, sizing.objectives_of(goals, pool.role))
            context = demand.context
            prompt = min(
                demand.prompt_tokens * (1.0 - demand.prefix_hit_rate), engine.limits.max_num_batched_tokens
            )
            band = engine.step.band_percent(
                0.0 if pool.role is PoolRole.DECODE else prompt,
                0.0 if pool.role is PoolRole.PREFILL else max(carried.load, 1.0),
                context,
            )
        except (CatalogError, OutOfHullError) as error:
            return Judgement({}, None, Feasibility(None, "NotModelled", str(error)))
        bands.append(band)
        sources.append(f"{pool.name}: {engine.step.source.kind.value}, {engine.step.source.detail}")
        for miss in carried.missed:
            # Inside the model's band a verdict of "impossible" would be a guess.
            sure = miss.idle_ms / (1.0 + band / 100.0) > miss.objective.target_ms
            (broken if sure else doubtful).append(_said(pool, miss))
        if seen.given and carried.requests_per_second > 0.0:
            found[pool.name] = carried
    rates = {name: carried.requests_per_second for name, carried in found.items()}
    narrowest = min(rates, key=lambda name: rates[name], default=None)
    wanted = (
        float(spec.workload.requests_per_second)
        if spec.workload and spec.workload.requests_per_second
        else 0.0
    )
    plan = PlanStatus(
        requests_per_second_per_replica=f"{rates[narrowest]:.3g}" if narrowest is not None else None,
        replicas_for_workload=(
            sum(math.ceil(wanted / rate - 1e-6) for rate in rates.values()) if wanted > 0 and rates else None
        ),
        band_percent=round(max(bands, default=0.0)),
        source="; ".join(sources)[:1024],
        binding=f"{narrowest}: {found[narrowest].binding}"[:1024] if narrowest is not None else None,
    )
    return Judgement(
        rates,
        plan,
        _feasibility(goals, broken, doubtful, known_lengths=known_lengths),
        {name: carried.curve for name, carried in found.items() if carried.curve is not None},
    )


def _engine(shape: ModelShape, pool: PoolSettings, prompt_tokens: float) -> sizing.Engine:
    """Return a pool's engine as the performance model sees it.

    Raises:
        CatalogError: It cannot be modelled.
    """
    gpu = accelerator(pool.accelerator)
    kv_dtype = "fp8" if pool.kv_cache_dtype == "fp8" else "bf16"
    step = sizing.engine_of(
        shape, gpu, pool.tensor_parallel, pool.weights, kv_dtype, pool.gpu_memory_utilization or 0.9
    )
    moved = transfer_ms(shape, kv_dtype, prompt_tokens, LINK_GB_S) if pool.role is PoolRole.DECODE else 0.0
    budget = pool.max_num_batched_tokens or default_limits(gpu)[1]
    return sizing.Engine(step, pool.max_num_seqs, budget, pool.role, moved)


def _said(pool: PoolSettings, miss: sizing.Missed) -> str:
    share = "" if pool.role is PoolRole.AGGREGATED else f" as the {pool.name} pool's share"
    return (
        f"idle, {pool.tensor_parallel} x {pool.accelerator} takes {duration(miss.idle_ms)} where "
        f"{miss.objective}{share} is asked for (nearest feasible: {duration(miss.nearest.target_ms)})"
    )


def _feasibility(
    goals: Targets, broken: list[str], doubtful: list[str], *, known_lengths: bool
) -> Feasibility:
    if not goals.seconds:
        return Feasibility(feasible=True, reason="NoObjective", message=goals.reason)
    note = "" if known_lengths else " (lengths are assumed: give spec.workload to be sure)"
    mend = "lengthen the objective, allow a faster accelerator or raise tensorParallel"
    if broken:
        said = f"{'; '.join(broken)}; replicas are sized for what can be kept: {mend}{note}"
        return Feasibility(feasible=False, reason="OneRequestMisses", message=said)
    if doubtful:
        said = f"{'; '.join(doubtful)}: too near to tell, within the model's error and its margin for tails: {mend}{note}"
        return Feasibility(feasible=None, reason="TooNearToTell", message=said)
    return Feasibility(
        feasible=True,
        reason="Predicted",
        message=f"one replica meets the objectives up to the load it is planned for{note}",
    )
