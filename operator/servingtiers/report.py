"""What is said of a tier: its status, whether that is worth a write, and the events. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from servingtiers.api.base import format_duration, parse_duration
from servingtiers.api.spec import ScalingMode, ServingTier
from servingtiers.api.status import (
    CostStatus,
    DecisionRecord,
    EffectivePool,
    EffectiveStatus,
    PlanStatus,
    PoolMemory,
    PoolStatus,
    ScaleTargetRef,
    ServingTierStatus,
    ThroughputStatus,
)
from servingtiers.core.config import OperatorConfig
from servingtiers.core.decisions import Decision, PoolRole, Targets, TierDecision, acts
from servingtiers.core.effective import PoolSettings
from servingtiers.core.findings import Feasibility, Problem
from servingtiers.core.signals import Distribution, Load, Signal, TierLoad, Unknown, number
from servingtiers.core.state import Event, JsonObject, Ref
from servingtiers.core.times import from_time, to_time
from servingtiers.facts import PoolView
from servingtiers.policy import attainment, conditions, cost, presets
from servingtiers.policy.conditions import ConditionInput, PoolProgress
from servingtiers.render import names

__all__ = [
    "PoolReport",
    "Remembered",
    "TierReport",
    "decision_history",
    "events",
    "refused",
    "report",
    "worth_writing",
]

_DECISIONS_KEPT: Final = 20
_SAME_DECISION_SECONDS: Final = 60.0
_ROUNDED_SECONDS: Final = 60.0
"""Rounded live values are written at most this often; decisions and conditions at once."""
_DEFAULT_WINDOW: Final = "24h"
_NOT_READ: Final = Unknown("not read yet")


@dataclass(frozen=True, slots=True)
class Remembered:
    """What the next pass wants to know of this one; losing it costs at most five minutes of counted requests."""

    status: ServingTierStatus
    tallies: tuple[attainment.Tally, ...] = ()
    incomplete_since: float | None = None
    """Unix time since which telemetry has been incomplete; None: it is complete."""
    written_at: float | None = None
    counters_written_at: float | None = None


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What is known of one pool after a pass."""

    name: str
    role: PoolRole
    settings: PoolSettings
    view: PoolView
    replicas: int
    """Replicas wanted now."""
    decision: Decision
    outdated: str | None
    lent: int = 0
    """Ready replicas that do not serve the tier."""
    borrowed: int = 0
    """Engines of other tiers that do."""


@dataclass(frozen=True, slots=True)
class TierReport:
    """What is known of one tier after a pass."""

    tier: ServingTier
    notes: tuple[Problem, ...]
    pools: tuple[PoolReport, ...]
    router: PoolView
    router_outdated: str | None
    targets: Targets
    decided: TierDecision
    feasibility: Feasibility | None
    plan: PlanStatus | None
    decisions: tuple[DecisionRecord, ...]
    """Newest first, with those of this pass."""
    load: TierLoad
    load_elapsed: float
    foreign: tuple[Ref, ...]
    replicas_owner: str | None
    failures: tuple[str, ...]
    startup_seconds: Mapping[str, Sequence[int]]
    """Pool name to the start-up times seen now."""


def refused(
    tier: ServingTier | None,
    generation: int,
    problems: tuple[Problem, ...],
    before: Remembered,
    now: float,
    *,
    ready: Mapping[str, int],
    routers: int,
) -> Remembered:
    """Return the status of a tier that cannot be planned; what serves is left as it is and stays reported.

    Args:
        tier: The tier, where it can be read.
        generation: Of its spec.
        problems: Why it is refused.
        before: What was reported last.
        now: Unix time, seconds.
        ready: Pool name to its pods that are ready now.
        routers: Router pods that are.
    """
    status = before.status
    pools = [pool.model_copy(update={"ready": ready.get(pool.name, 0)}) for pool in status.pools]
    progress = tuple(
        PoolProgress(name=pool.name, desired=pool.desired, ready=pool.ready, updated=pool.ready)
        for pool in pools
    )
    found = conditions.compute(
        ConditionInput(
            generation=generation,
            now=now,
            previous=tuple(status.conditions),
            problems=problems,
            pools=progress,
            routers_ready=routers,
            # How many are wanted is not known: one lets requests in.
            routers_desired=1 if progress else 0,
            suspended=tier is not None and tier.spec.suspend,
        )
    )
    new = status.model_copy(
        update={"observed_generation": generation, "conditions": list(found), "pools": pools}
    )
    return replace(before, status=new)


def report(seen: TierReport, before: Remembered, config: OperatorConfig, now: float) -> Remembered:
    """Return the status of a tier and what the next pass wants to know."""
    spec = seen.tier.spec
    measured = {
        f"{metric}.{percentile}": _measured(seen, metric, target)
        for (metric, percentile), target in seen.targets.seconds.items()
    }
    tallies = attainment.update(
        _tallies(before, seen.targets, now),
        measured,
        elapsed=seen.load_elapsed,
        load_window=max((load.window for load in seen.load.pools.values()), default=0.0),
        slo_window=parse_duration(spec.slo.window if spec.slo else _DEFAULT_WINDOW),
        now=now,
    )
    reason = _incomplete(seen)
    since = None if reason is None else (before.incomplete_since or now)
    found = conditions.compute(
        ConditionInput(
            generation=seen.tier.metadata.generation,
            now=now,
            previous=tuple(before.status.conditions),
            problems=seen.notes,
            feasibility=seen.feasibility,
            pools=tuple(_progress(pool) for pool in seen.pools),
            routers_ready=len(seen.router.ready_pods),
            routers_desired=spec.router.replicas,
            slo=attainment.verdicts(tallies),
            slo_reason=seen.targets.reason,
            decisions=seen.decided.decisions,
            mode=spec.scaling.mode,
            suspended=spec.suspend,
            conflicts=tuple(_conflict(ref) for ref in seen.foreign),
            replicas_owner=seen.replicas_owner,
            telemetry_unknown_seconds=None if since is None else now - since,
            telemetry_reason=reason or "",
            plan_outdated="; ".join(
                text for text in (*(pool.outdated for pool in seen.pools), seen.router_outdated) if text
            )
            or None,
            write_errors=seen.failures,
        )
    )
    ready = sum(len(pool.view.ready_pods) for pool in seen.pools)
    wanted = sum(pool.replicas for pool in seen.pools)
    status = ServingTierStatus(
        observed_generation=seen.tier.metadata.generation,
        conditions=list(found),
        endpoint=f"http://{names.service(seen.tier.metadata.name)}.{seen.tier.metadata.namespace}"
        f".svc.{config.cluster_domain}",
        replicas=f"{ready}/{wanted}{_moved(seen)}",
        effective=_effective(seen),
        plan=seen.plan,
        pools=[_pool_status(pool, seen) for pool in seen.pools],
        slo=list(attainment.report(tallies, measured)),
        throughput=_throughput(seen),
        cost=_cost(seen, config),
        decisions=list(seen.decisions),
    )
    return replace(before, status=status, tallies=tallies, incomplete_since=since)


def _moved(seen: TierReport) -> str:
    """Return what is borrowed and lent beside a tier's own engines, such as `` +2``; empty for most tiers."""
    borrowed = sum(pool.borrowed for pool in seen.pools)
    lent = sum(pool.lent for pool in seen.pools)
    return (f" +{borrowed}" if borrowed else "") + (f" -{lent}" if lent else "")


# -- objectives ------------------------------------------------------------------------------------------------


def _tallies(before: Remembered, targets: Targets, now: float) -> tuple[attainment.Tally, ...]:
    """Return the counts of the objectives in force: those remembered, else those of the status."""
    kept = {tally.objective: tally for tally in before.tallies}
    return tuple(
        known if (known := kept.get(tally.objective)) is not None and known.target == tally.target else tally
        for tally in attainment.restore(before.status.slo, targets, now)
    )


def _load(seen: TierReport, role: PoolRole) -> Load | None:
    name = next((pool.name for pool in seen.pools if pool.role is role), None)
    return seen.load.pools.get(name) if name is not None else None


def _measured(seen: TierReport, metric: str, target: float) -> attainment.Measured:
    """Return the latest window of one metric as a client sees it."""
    prefill, decode = _load(seen, PoolRole.PREFILL), _load(seen, PoolRole.DECODE)
    whole = _load(seen, PoolRole.AGGREGATED)
    nothing = _NOT_READ
    if whole is None and metric in {"ttft", "e2e"}:
        first: Distribution = prefill.e2e if prefill is not None else nothing
        second: Distribution = getattr(decode, metric) if decode is not None else nothing
        return attainment.count_disaggregated(first, second, target)
    source = whole or decode
    return attainment.count(getattr(source, metric) if source is not None else nothing, target)


def _incomplete(seen: TierReport) -> str | None:
    """Return what is missing of the telemetry of serving pools; None when nothing is."""
    for pool in seen.pools:
        if not pool.view.ready_pods:
            continue
        load = seen.load.pools.get(pool.name)
        if load is None:
            return f"{pool.name}: not read yet"
        if isinstance(load.running, Unknown):
            return f"{pool.name}: {load.running.reason}"
        if not load.coverage.complete:
            return f"{pool.name}: {load.coverage.answered} of {load.coverage.expected} replicas answered"
    return None


# -- pools -----------------------------------------------------------------------------------------------------


def _progress(pool: PoolReport) -> PoolProgress:
    deployment = pool.view.deployment
    status = (deployment or {}).get("status", {})
    generation = (deployment or {}).get("metadata", {}).get("generation", 0)
    late = next(
        (
            str(condition.get("message", ""))
            for condition in status.get("conditions", ())
            if condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded"
        ),
        None,
    )
    stuck = pool.view.unschedulable_pods
    return PoolProgress(
        name=pool.name,
        desired=pool.replicas,
        ready=len(pool.view.ready_pods),
        updated=status.get("updatedReplicas", 0),
        applied=deployment is not None,
        observed=status.get("observedGeneration", 0) >= generation,
        progress_deadline_exceeded=late,
        unschedulable=len(stuck),
        scheduling_message=_scheduling_message(stuck),
        failing=_failing(pool.view),
    )


def _scheduling_message(pods: Sequence[JsonObject]) -> str | None:
    for pod in pods:
        for condition in pod.get("status", {}).get("conditions", ()):
            if condition["type"] == "PodScheduled" and condition.get("message"):
                return str(condition["message"])
    return None


def _failing(view: PoolView) -> str | None:
    """Return why containers of the pool wait, where waiting will not help."""
    for pod in view.pods:
        for container in pod.get("status", {}).get("containerStatuses", ()):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") not in {None, "ContainerCreating", "PodInitializing"}:
                return f"{waiting['reason']}: {waiting.get('message', 'no message')}"[:300]
    return None


def _pool_status(pool: PoolReport, seen: TierReport) -> PoolStatus:
    spec = seen.tier.spec
    acting = acts(spec.scaling.mode, suspended=spec.suspend) and seen.replicas_owner is None
    memory = seen.decided.memory.get(pool.name, PoolMemory())
    starts = seen.startup_seconds.get(pool.name)
    return PoolStatus(
        name=pool.name,
        role=pool.role.value,
        replicas=(pool.view.deployment or {}).get("status", {}).get("replicas", 0),
        ready=len(pool.view.ready_pods),
        desired=pool.replicas,
        lent=pool.lent if spec.shared_pool is not None or pool.lent else None,
        borrowed=pool.borrowed if spec.shared_pool is not None or pool.borrowed else None,
        recommended=None if acting else pool.decision.desired,
        scale_target_ref=ScaleTargetRef(
            api_version="apps/v1",
            kind="Deployment",
            name=names.engine_deployment(seen.tier.metadata.name, pool.name),
        )
        if spec.scaling.mode is ScalingMode.EXTERNAL
        else None,
        signals=pool.decision.signals,
        memory=memory.model_copy(update={"startup_seconds": list(starts)}) if starts else memory,
    )


def _effective(seen: TierReport) -> EffectiveStatus:
    return EffectiveStatus(
        slo={
            f"{metric}.{percentile}": format_duration(seconds)
            for (metric, percentile), seconds in sorted(seen.targets.seconds.items())
        },
        slo_reason=seen.targets.reason,
        pools=[
            EffectivePool(
                name=pool.name,
                accelerator=pool.settings.accelerator,
                tensor_parallel=pool.settings.tensor_parallel,
                weights=pool.settings.weights,
                max_num_seqs=pool.settings.max_num_seqs,
                max_num_batched_tokens=pool.settings.max_num_batched_tokens,
                max_model_len=pool.settings.max_model_len,
                performance_mode=pool.settings.performance_mode,
                gpu_memory_utilization_percent=_percent(pool.settings.gpu_memory_utilization),
                speculative=str(pool.settings.speculative["method"]) if pool.settings.speculative else None,
                image=pool.settings.image,
                engine_version=pool.settings.engine_version,
                reasons=pool.settings.reasons,
            )
            for pool in seen.pools
        ],
    )


def _percent(share: float | None) -> int | None:
    return None if share is None else round(100 * share)


# -- figures ---------------------------------------------------------------------------------------------------


def _rounded(signal: Signal) -> str | None:
    """Return a rate with two digits that matter; None where it is unknown."""
    value = number(signal)
    if value is None:
        return None
    return "0" if value == 0 else f"{float(f'{value:.2g}'):.12g}"


def _answering(seen: TierReport) -> Load | None:
    """Return the load of the pool that answers users."""
    return _load(seen, PoolRole.AGGREGATED) or _load(seen, PoolRole.DECODE)


def _throughput(seen: TierReport) -> ThroughputStatus | None:
    answering = _answering(seen)
    reading = _load(seen, PoolRole.AGGREGATED) or _load(seen, PoolRole.PREFILL)
    if answering is None or reading is None:
        return None
    status = ThroughputStatus(
        requests_per_second=_rounded(answering.request_rate),
        prompt_tokens_per_second=_rounded(reading.prompt_token_rate),
        output_tokens_per_second=_rounded(answering.output_token_rate),
    )
    # Not an empty object: where server-side apply takes its last fields from it, it leaves null, and that is refused.
    return status if status.model_dump(exclude_none=True) else None


def _cost(seen: TierReport, config: OperatorConfig) -> CostStatus:
    answering = _answering(seen)
    rate = answering.output_token_rate if answering is not None else _NOT_READ
    pools = []
    for pool in seen.pools:
        price, source = presets.price_of(pool.settings.accelerator, pool.settings.binding)
        load = seen.load.pools.get(pool.name)
        pools.append(
            cost.PoolCost(
                # Whoever has an engine pays for it; one that serves nobody is its home's.
                replicas=max(0, pool.replicas - pool.lent + pool.borrowed),
                tensor_parallel=pool.settings.tensor_parallel,
                price_per_hour=price,
                price_source=source,
                max_num_seqs=pool.settings.max_num_seqs,
                running=_NOT_READ if load is None else load.running,
            )
        )
    window = answering.window if answering is not None else 0.0
    return cost.compute(tuple(pools), rate, config.currency, window)


# -- decisions -------------------------------------------------------------------------------------------------


def decision_history(
    decided: TierDecision,
    before: Sequence[DecisionRecord],
    recorded: Sequence[DecisionRecord],
    *,
    existing: frozenset[str],
    acting: bool,
    now: float,
) -> tuple[DecisionRecord, ...]:
    """Return all decisions to be told, newest first.

    Args:
        decided: What was decided in this pass.
        before: What the status tells.
        recorded: What Deployments tell of their replicas and pods of their moves; it is written together with these, so
            it survives an operator that dies between that write and the status.
        existing: Pools that have a Deployment: the first replicas of a pool are no decision.
        acting: Whether decisions are carried out.
        now: Unix time, seconds.
    """
    known = {_identity(record) for record in before}
    lost = [record for record in recorded if _identity(record) not in known]
    told = sorted([*lost, *before], key=lambda record: record.time, reverse=True)
    new = [
        DecisionRecord(
            time=to_time(now),
            pool=decision.pool,
            from_replicas=decision.current,
            to_replicas=decision.desired,
            reason=decision.reason[:1024],
            binding=decision.binding.value,
            would_change=decision.would_change[:1024],
            acted=acting,
        )
        for decision in decided.decisions
        if decision.desired != decision.current and decision.pool in existing
    ]
    fresh = [record for record in new if not _said_before(record, told, now)]
    return tuple([*fresh, *told][:_DECISIONS_KEPT])


def _identity(record: DecisionRecord) -> tuple[str, str, int, bool, str | None]:
    return record.time, record.pool, record.to_replicas, record.acted, record.engine


def _said_before(record: DecisionRecord, before: Sequence[DecisionRecord], now: float) -> bool:
    """Return whether the pool's newest record says the same.

    One that is carried out may be decided again until the write has come back; one that is only recommended stands
    until it changes.
    """
    newest = next((old for old in before if (old.pool, old.engine) == (record.pool, record.engine)), None)
    if newest is None or newest.acted != record.acted:
        return False
    same = (newest.from_replicas, newest.to_replicas) == (record.from_replicas, record.to_replicas)
    return same and (not record.acted or now - from_time(newest.time) < _SAME_DECISION_SECONDS)


_WITHHELD = {
    "ServiceAccount": "; until then routers, which would have its rights, are neither made nor changed",
    "Role": "; until then the routers' account gets no rights",
    "NetworkPolicy": "; until then no pods are made that it would leave open",
}


def _conflict(ref: Ref) -> str:
    return (
        f"{ref.kind} {ref.name} exists and is not this tier's: rename or remove it, or give the tier another name"
        f"{_WITHHELD.get(ref.kind, '')}"
    )


# -- writing ---------------------------------------------------------------------------------------------------

_AT_ONCE = ("observed_generation", "endpoint", "effective", "decisions", "replicas")


def worth_writing(written: ServingTierStatus, new: Remembered, now: float) -> bool:
    """Return whether the status differs from the written one in a way that is worth a write now.

    Decisions, the outcome of a condition and replica counts are written at once; rounded live values at most once
    a minute; counters of the objectives every five minutes and only on traffic.
    """
    status = new.status
    if any(getattr(written, name) != getattr(status, name) for name in _AT_ONCE):
        return True
    if _outcomes(written) != _outcomes(status) or _counts(written) != _counts(status):
        return True
    rested = new.written_at is None or not 0 <= now - new.written_at < _ROUNDED_SECONDS
    if rested and _rounded_part(written) != _rounded_part(status):
        return True
    return attainment.should_write(tuple(written.slo), tuple(status.slo), now, new.counters_written_at)


def _outcomes(status: ServingTierStatus) -> list[tuple[str, str, str, int]]:
    return [(c.type, c.status, c.reason, c.observed_generation) for c in status.conditions]


def _counts(status: ServingTierStatus) -> list[tuple[Any, ...]]:
    return [
        (
            p.name,
            p.role,
            p.replicas,
            p.ready,
            p.desired,
            p.lent,
            p.borrowed,
            p.recommended,
            p.scale_target_ref,
        )
        for p in status.pools
    ]


def _rounded_part(status: ServingTierStatus) -> list[Any]:
    return [
        [c.message for c in status.conditions],
        [(p.signals, p.memory) for p in status.pools],
        [(o.observed, o.attainment_percent, o.error_budget_left_percent, o.resolution) for o in status.slo],
        status.plan,
        status.throughput,
        status.cost,
    ]


_ABNORMAL = frozenset({"Stalled", "Conflict", "ScalingLimited", "PlanOutdated"})
"""Conditions that are True when something is to be noted."""
_NOTES = frozenset({"PlanOutdated"})
"""Abnormal ones that are no warning."""
_TOLD = _ABNORMAL | {"Accepted", "Feasible", "Ready"}


def _told(tier: JsonObject, record: DecisionRecord) -> Event:
    """Return the event of a decision."""
    change = f"{record.from_replicas} → {record.to_replicas}"
    if record.engine is None:
        reason = "Scaled" if record.acted else "ScalingRecommended"
        return Event(tier, "Normal", reason, f"{record.pool}: {change} replicas: {record.reason}")
    reason = "EngineArrived" if record.to_replicas > record.from_replicas else "EngineLeft"
    return Event(tier, "Normal", reason, f"{record.engine}: {change} engines serve: {record.reason}")


def events(tier: JsonObject, before: ServingTierStatus, after: ServingTierStatus) -> list[Event]:
    """Return what is worth an event: decisions and changes of a condition's status, never a tick."""
    told = {_identity(record) for record in before.decisions}
    found = [_told(tier, record) for record in reversed(after.decisions) if _identity(record) not in told]
    old = {c.type: c.status for c in before.conditions}
    for condition in after.conditions:
        if condition.type not in _TOLD or old.get(condition.type) == condition.status:
            continue
        abnormal = (condition.status == "True") == (condition.type in _ABNORMAL)
        if condition.status == "Unknown" or (condition.type not in old and not abnormal):
            continue  # what was never otherwise and is well is no news
        warning = abnormal and condition.type not in _NOTES
        found.append(
            Event(
                tier,
                "Warning" if warning else "Normal",
                condition.reason,
                f"{condition.type}: {condition.message}",
            )
        )
    return found
