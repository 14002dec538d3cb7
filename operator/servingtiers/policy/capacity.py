"""What one replica carries, how many the workload needs, and whether the objectives can be met at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

from servingtiers.api.base import format_duration
from servingtiers.api.spec import ServingTierSpec
from servingtiers.api.status import PlanStatus
from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.names import CatalogError
from servingtiers.core.decisions import PoolRole, Targets
from servingtiers.core.effective import PoolSettings, TierSettings
from servingtiers.core.findings import Feasibility
from servingtiers.core.signals import TierLoad
from servingtiers.performance.select import step_model
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


def judge(
    spec: ServingTierSpec, settings: TierSettings, goals: Targets, load: TierLoad | None = None
) -> Judgement:
    """Return what the performance model says of the pools with the settings they have.

    A replica's capacity is the rate of an engine whose batch is always full, or of the largest batch that still
    meets the objectives. Bursts and queueing are the controller's business: it plans with a part of it only.

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
    rates: dict[str, float] = {}
    broken: list[str] = []
    bands: list[float] = []
    sources: list[str] = []
    known_lengths = True
    for pool in settings.pools:
        asked = sizing.lengths(spec)
        if load is not None and pool.name in load.pools and pool.role is not PoolRole.PREFILL:
            asked = sizing.lengths_seen(load.pools[pool.name], asked)
        known_lengths = known_lengths and asked.given
        try:
            step = step_model(
                shape,
                accelerator(pool.accelerator),
                tensor_parallel=pool.tensor_parallel,
                weights=pool.weights,
                kv_dtype="fp8" if pool.kv_cache_dtype == "fp8" else "bf16",
                memory_utilization=pool.gpu_memory_utilization or 0.9,
            )
        except CatalogError as error:
            return Judgement({}, None, Feasibility(None, "NotModelled", str(error)))
        bands.append(step.source.band_percent)
        sources.append(f"{pool.name}: {step.source.kind.value}, {step.source.detail}")
        held = max(1, int(step.kv_capacity_tokens / (asked.prompt + asked.output)))
        batch = min(pool.max_num_seqs, held)
        one = sizing.full_engine(step, 1, asked, pool.max_num_batched_tokens, pool.role)
        # Inside the model's band a verdict of "impossible" would be a guess.
        missed = sizing.meets(one, goals, asked, pool.role, 1.0 / (1.0 + step.source.band_percent / 100.0))
        if missed is not None:
            broken.append(_broken(pool, missed, one, goals))
        while batch > 1 and sizing.meets(
            sizing.full_engine(step, batch, asked, pool.max_num_batched_tokens, pool.role),
            goals,
            asked,
            pool.role,
            1.0,
        ):
            batch = batch * 7 // 8
        if asked.given:
            full = sizing.full_engine(step, batch, asked, pool.max_num_batched_tokens, pool.role)
            rates[pool.name] = full.requests_per_second
    narrowest = min(rates, key=lambda name: rates[name], default=None)
    wanted = (
        float(spec.workload.requests_per_second)
        if spec.workload and spec.workload.requests_per_second
        else 0.0
    )
    plan = PlanStatus(
        requests_per_second_per_replica=f"{rates[narrowest]:.3g}" if narrowest is not None else None,
        replicas_for_workload=(
            sum(math.ceil(wanted / rate) for rate in rates.values()) if wanted > 0 and rates else None
        ),
        band_percent=round(max(bands, default=0.0)),
        source="; ".join(sources)[:1024],
        binding=narrowest if len(rates) > 1 else None,
    )
    return Judgement(rates, plan, _feasibility(goals, broken, known_lengths=known_lengths))


def _broken(pool: PoolSettings, missed: str, one: sizing.FullEngine, goals: Targets) -> str:
    metric, percentile = missed.split(".")
    takes = one.ttft if metric == "ttft" else one.tpot
    target = format_duration(goals.seconds[metric, percentile])
    what = "it" if metric == "e2e" else format_duration(takes)
    said = "cannot be met" if metric == "e2e" else f"takes {what}"
    return f"one request alone on {pool.accelerator} × {pool.tensor_parallel}: {missed} of {target} {said}"


def _feasibility(goals: Targets, broken: list[str], *, known_lengths: bool) -> Feasibility:
    if not goals.seconds:
        return Feasibility(feasible=True, reason="NoObjective", message=goals.reason)
    if broken:
        mend = "lengthen the objective, allow a faster accelerator or raise tensorParallel"
        return Feasibility(feasible=False, reason="OneRequestMisses", message=f"{'; '.join(broken)}: {mend}")
    note = "" if known_lengths else " (lengths are assumed: give spec.workload to be sure)"
    return Feasibility(
        feasible=True,
        reason="Predicted",
        message=f"one replica meets the objectives with the batch it has, or a smaller one{note}",
    )
