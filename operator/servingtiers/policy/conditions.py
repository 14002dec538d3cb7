"""The conditions of a tier: all of them, every pass, from what the other policies found.

They follow Kubernetes' conventions and kstatus: ``Reconciling`` and ``Stalled`` are abnormal-true and False when all
is well; ``Ready`` says that the tier can serve and nothing of its SLO, so that a traffic spike is no failed release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from servingtiers.api.spec import ScalingMode
from servingtiers.api.status import Condition, ConditionType
from servingtiers.core.decisions import Binding, Decision
from servingtiers.core.findings import Feasibility, Problem, SloVerdict
from servingtiers.core.pin import REPLAN_ANNOTATION
from servingtiers.core.times import to_time

__all__ = ["ConditionInput", "PoolProgress", "compute"]

_Status = Literal["True", "False", "Unknown"]
_MESSAGE_LIMIT = 1024
_UNKNOWN_GRACE = 60.0
"""Telemetry may be missing for this long before it is a condition: one late scrape is no event."""


@dataclass(frozen=True, slots=True)
class PoolProgress:
    """How far one pool has come."""

    name: str
    desired: int
    ready: int
    updated: int
    """Replicas of the newest pod template."""
    applied: bool = True
    """False: the Deployment does not exist yet, or the API server refused it."""
    observed: bool = True
    """The Deployment controller has seen the newest template."""
    progress_deadline_exceeded: str | None = None
    """Message of the Deployment's Progressing condition once its deadline has passed."""
    unschedulable: int = 0
    scheduling_message: str | None = None
    """What the scheduler says of those pods."""
    failing: str | None = None
    """Why containers do not start, such as ``ImagePullBackOff: …``."""

    @property
    def rolling(self) -> bool:
        """A rollout or a scale-up is under way."""
        return not self.observed or self.updated < self.desired or self.ready < self.desired


@dataclass(frozen=True, slots=True)
class ConditionInput:
    """Everything conditions are made from."""

    generation: int
    now: float
    """Unix time, seconds."""
    previous: tuple[Condition, ...] = ()
    problems: tuple[Problem, ...] = ()
    feasibility: Feasibility | None = None
    """None: not judged; Feasible is Unknown."""
    pools: tuple[PoolProgress, ...] = ()
    routers_ready: int = 0
    routers_desired: int = 0
    slo: tuple[SloVerdict, ...] = ()
    slo_reason: str = ""
    """Where the objectives come from; shown where there are none."""
    decisions: tuple[Decision, ...] = ()
    mode: ScalingMode = ScalingMode.AUTO
    suspended: bool = False
    deleting: bool = False
    conflicts: tuple[str, ...] = ()
    """Foreign objects that bear names of ours, as sentences that state the mend."""
    replicas_owner: str | None = None
    """Another manager of ``spec.replicas`` while we should scale, such as ``HorizontalPodAutoscaler chat``."""
    telemetry_unknown_seconds: float | None = None
    """For how long telemetry has been incomplete; None: it is complete."""
    telemetry_reason: str = ""
    plan_outdated: str | None = None
    """What a new choice of settings would change or save; None: the pinned one is still the choice."""
    write_errors: tuple[str, ...] = ()
    """What the API server refused, as sentences."""


@dataclass(frozen=True, slots=True)
class _Draft:
    type: ConditionType
    status: _Status
    reason: str
    message: str


def compute(seen: ConditionInput) -> tuple[Condition, ...]:
    """Return every condition, in a fixed order.

    ``lastTransitionTime`` is kept where the status of a condition did not change; ``observedGeneration`` is always
    that of the spec this was computed from.
    """
    stalled = _stalled(seen)
    drafts = (
        _accepted(seen),
        _feasible(seen),
        _ready(seen),
        _slo_met(seen),
        _scaling_active(seen),
        _reconciling(seen, stalled=stalled.status == "True"),
        stalled,
        _scaling_limited(seen),
        _conflict(seen),
        _plan_outdated(seen),
    )
    before = {condition.type: condition for condition in seen.previous}
    now = to_time(seen.now)
    conditions = []
    for draft in drafts:
        old = before.get(draft.type)
        kept = old is not None and old.status == draft.status
        conditions.append(
            Condition(
                type=draft.type,
                status=draft.status,
                reason=draft.reason,
                message=_clip(draft.message),
                last_transition_time=old.last_transition_time if old is not None and kept else now,
                observed_generation=seen.generation,
            )
        )
    return tuple(conditions)


def _clip(message: str) -> str:
    return message if len(message) <= _MESSAGE_LIMIT else f"{message[: _MESSAGE_LIMIT - 1]}…"


def _join(parts: tuple[str, ...] | list[str]) -> str:
    return "; ".join(part.rstrip(".") for part in parts)


def _blocking(seen: ConditionInput) -> tuple[Problem, ...]:
    return tuple(problem for problem in seen.problems if problem.blocking)


def _accepted(seen: ConditionInput) -> _Draft:
    blocking = _blocking(seen)
    if blocking:
        message = _join([f"{problem.field}: {problem.message}" for problem in blocking])
        if any(pool.applied for pool in seen.pools):
            message += ". What serves is left as it is"
        return _Draft("Accepted", "False", blocking[0].reason, message)
    notes = [f"{problem.field}: {problem.message}" for problem in seen.problems]
    return _Draft("Accepted", "True", "Accepted", _join(notes) or "the spec is valid")


def _feasible(seen: ConditionInput) -> _Draft:
    if _blocking(seen):
        return _Draft("Feasible", "Unknown", "NotAccepted", "mend the spec first, see Accepted")
    futile = [decision for decision in seen.decisions if decision.binding is Binding.INFEASIBLE]
    if futile:
        message = _join([f"{decision.pool}: {decision.reason}" for decision in futile])
        return _Draft("Feasible", "False", "OneRequestMisses", f"{message}. {futile[0].would_change}")
    found = seen.feasibility
    if found is not None and found.feasible is not None:
        return _Draft("Feasible", "True" if found.feasible else "False", found.reason, found.message)
    open_questions = [problem for problem in seen.problems if not problem.blocking]
    if open_questions:
        message = _join([problem.message for problem in open_questions])
        return _Draft("Feasible", "Unknown", open_questions[0].reason, message)
    if found is not None:
        return _Draft("Feasible", "Unknown", found.reason, found.message)
    return _Draft(
        "Feasible", "Unknown", "NotModelled", "whether the objectives can be met has not been judged"
    )


def _ready(seen: ConditionInput) -> _Draft:
    if seen.deleting:
        return _Draft("Ready", "False", "Deleting", "the tier is being deleted")
    if not seen.pools:
        reason = "NotAccepted" if _blocking(seen) else "NotApplied"
        return _Draft("Ready", "False", reason, "no pool exists yet")
    counts = ", ".join(f"{pool.name} {pool.ready} of {pool.desired}" for pool in seen.pools)
    if all(pool.desired == 0 for pool in seen.pools) and seen.routers_ready > 0:
        # Asleep, it still takes the request that wakes it; GitOps tools must not wait for replicas.
        return _Draft("Ready", "True", "ScaledToZero", "sleeps at zero; the first request wakes it")
    empty = [pool for pool in seen.pools if pool.ready == 0]
    if empty:
        why = [text for pool in empty if (text := _trouble(pool)) is not None]
        message = f"no replica is ready in {', '.join(pool.name for pool in empty)} ({counts})"
        return _Draft("Ready", "False", "NoReplicaReady", _join([message, *why]))
    if seen.routers_desired and not seen.routers_ready:
        return _Draft("Ready", "False", "NoRouterReady", f"no router is ready (0 of {seen.routers_desired})")
    return _Draft("Ready", "True", "Serving", f"ready replicas: {counts}")


def _trouble(pool: PoolProgress) -> str | None:
    if pool.failing is not None:
        return f"{pool.name}: {pool.failing}"
    if pool.unschedulable:
        said = pool.scheduling_message or "the scheduler gives no reason"
        return f"{pool.name}: {pool.unschedulable} replicas cannot be scheduled ({said})"
    if pool.progress_deadline_exceeded is not None:
        return f"{pool.name}: {pool.progress_deadline_exceeded}"
    return None


def _slo_met(seen: ConditionInput) -> _Draft:
    if not seen.slo:
        return _Draft("SLOMet", "Unknown", "NoObjective", seen.slo_reason or "no objective is in force")
    missed = [verdict for verdict in seen.slo if verdict.met is False]
    if missed:
        return _Draft("SLOMet", "False", "ObjectiveMissed", _join([verdict.message for verdict in missed]))
    unknown = [verdict for verdict in seen.slo if verdict.met is None]
    if unknown:
        silent = all(verdict.requests <= 0 for verdict in seen.slo)
        reason = "NoTraffic" if silent else "TooCoarseOrTooFew"
        return _Draft("SLOMet", "Unknown", reason, _join([verdict.message for verdict in unknown]))
    return _Draft("SLOMet", "True", "ObjectivesMet", _join([verdict.message for verdict in seen.slo]))


def _scaling_active(seen: ConditionInput) -> _Draft:
    name: ConditionType = "ScalingActive"
    if seen.suspended:
        return _Draft(
            name, "False", "Suspended", "spec.suspend is true: the operator reports and changes nothing"
        )
    if seen.mode is ScalingMode.EXTERNAL:
        return _Draft(name, "False", "External", "replicas belong to status.pools[].scaleTargetRef's scaler")
    if seen.mode is ScalingMode.RECOMMEND:
        return _Draft(name, "False", "Recommend", "decisions are shown in status and not carried out")
    if _blocking(seen):
        return _Draft(name, "False", "NotAccepted", "mend the spec first, see Accepted")
    if seen.replicas_owner is not None:
        return _Draft(name, "False", "ReplicasOwnedElsewhere", _owner_message(seen.replicas_owner))
    missing = seen.telemetry_unknown_seconds
    if missing is not None and missing >= _UNKNOWN_GRACE:
        return _Draft(
            name,
            "False",
            "TelemetryMissing",
            f"telemetry is incomplete: {seen.telemetry_reason or 'no reason given'}. Nothing shrinks until it returns",
        )
    return _Draft(name, "True", "Scaling", "the operator sets the replicas")


def _owner_message(owner: str) -> str:
    return (
        f"spec.replicas is also set by {owner}: remove that scaler, or set spec.scaling.mode to External and leave"
        " replicas to it"
    )


def _reconciling(seen: ConditionInput, *, stalled: bool) -> _Draft:
    name: ConditionType = "Reconciling"
    if seen.suspended:
        return _Draft(name, "False", "Suspended", "spec.suspend is true")
    if _blocking(seen):
        return _Draft(name, "False", "NotAccepted", "the spec is not carried out, see Accepted")
    if stalled:
        # kstatus: Stalled says that waiting is no use, Reconciling that it is; never both.
        return _Draft(name, "False", "Stalled", "no progress, see Stalled")
    if not seen.pools or any(not pool.applied for pool in seen.pools):
        return _Draft(name, "True", "Applying", "objects are being written")
    if seen.write_errors:
        return _Draft(name, "True", "Retrying", _join(seen.write_errors))
    moving = [pool for pool in seen.pools if pool.rolling]
    if moving:
        text = [
            f"{pool.name}: {pool.ready} of {pool.desired} ready, {pool.updated} up to date" for pool in moving
        ]
        text += [trouble for pool in moving if (trouble := _trouble(pool)) is not None]
        return _Draft(name, "True", "Progressing", _join(text))
    return _Draft(name, "False", "Settled", "everything is as wanted")


def _stalled(seen: ConditionInput) -> _Draft:
    name: ConditionType = "Stalled"
    if seen.suspended:
        return _Draft(name, "False", "Suspended", "spec.suspend is true")
    blocking = _blocking(seen)
    if blocking:
        message = "the spec cannot be carried out as it is, see Accepted"
        return _Draft(name, "True", "NotAccepted", message)
    if seen.conflicts:
        return _Draft(name, "True", "Conflict", "objects of others are in the way, see Conflict")
    late = [pool for pool in seen.pools if pool.progress_deadline_exceeded is not None and pool.rolling]
    if late:
        text = [_trouble(pool) or f"{pool.name}: {pool.progress_deadline_exceeded}" for pool in late]
        return _Draft(name, "True", "ProgressDeadlineExceeded", _join(text))
    return _Draft(name, "False", "Progressing", "nothing stands still")


def _scaling_limited(seen: ConditionInput) -> _Draft:
    name: ConditionType = "ScalingLimited"
    short = [pool for pool in seen.pools if pool.unschedulable]
    limited = [decision for decision in seen.decisions if decision.limited is not None]
    text = [f"{decision.pool}: {decision.limited}" for decision in limited]
    text += [trouble for pool in short if (trouble := _trouble(pool)) is not None]
    if limited:
        return _Draft(name, "True", "Bounded", _join(text))
    if short:
        return _Draft(name, "True", "Unschedulable", _join(text))
    return _Draft(name, "False", "NotLimited", "no bound stands in the way")


def _conflict(seen: ConditionInput) -> _Draft:
    name: ConditionType = "Conflict"
    if seen.conflicts:
        return _Draft(name, "True", "ForeignObject", _join(seen.conflicts))
    if seen.replicas_owner is not None and seen.mode is not ScalingMode.EXTERNAL:
        return _Draft(name, "True", "ReplicasOwnedElsewhere", _owner_message(seen.replicas_owner))
    return _Draft(name, "False", "NoConflict", "nobody else writes what is ours")


def _plan_outdated(seen: ConditionInput) -> _Draft:
    name: ConditionType = "PlanOutdated"
    if seen.plan_outdated is not None:
        message = (
            f"{seen.plan_outdated}; it is taken up when the spec changes, or by a new value of the annotation"
            f" {REPLAN_ANNOTATION}"
        )
        return _Draft(name, "True", "BetterPlanKnown", message)
    return _Draft(name, "False", "UpToDate", "the settings are those that would be chosen today")
