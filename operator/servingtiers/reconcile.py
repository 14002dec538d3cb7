"""``plan(observed) -> plan``: everything the operator decides, in one pure function. Read this first.

For every tier of a reconcile key:

1. read it, and find what is wrong with it (nothing serving is touched while something is);
2. take the settings its engines were planned with, or choose them;
3. decide the replicas of all pools together;
4. write down the objects that should exist, compare them with those that do, and name the differences;
5. account for the objectives, and say all of it in the status.

No clock, no I/O, no randomness: the same observation always gives the same plan, and a plan whose writes have been
carried out is followed by an empty one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import ValidationError

from servingtiers import __version__
from servingtiers.api.spec import OnShortage, ScalingMode, ServingTier
from servingtiers.api.status import DecisionRecord, PoolMemory, ServingTierStatus
from servingtiers.core import pin
from servingtiers.core.config import OperatorConfig
from servingtiers.core.decisions import Decision, PoolFacts, Targets, TierDecision, TierObservation, acts
from servingtiers.core.diff import Changes, changes, content_hash, owned_by
from servingtiers.core.effective import PoolAsked, PoolSettings, TierSettings, pools_asked
from servingtiers.core.findings import Problem
from servingtiers.core.pin import Pin
from servingtiers.core.state import Event, JsonObject, Member, Observed, Plan, Ref, Verb, Write
from servingtiers.facts import PoolView, pool_facts, startup_times, view_pool, view_router
from servingtiers.policy import capacity, presets, problems, rollout, scaling
from servingtiers.render import ROUTER_POOL, engine, names, router, tier_objects
from servingtiers.report import (
    PoolReport,
    Remembered,
    TierReport,
    decision_history,
    refused,
    report,
    worth_writing,
)
from servingtiers.report import events as report_events

__all__ = ["FIELD_MANAGER", "plan"]

FIELD_MANAGER: Final = "servingtiers"
DECISION_ANNOTATION: Final = "servingtiers.io/decision"
"""On a pool's Deployment: the latest decision that was carried out, as JSON."""
_RECHECK_SECONDS: Final = 300.0
_RECHECK_SOON: Final = 30.0


@dataclass(frozen=True, slots=True)
class _Pool:
    """One pool: what is asked, what runs, what was chosen."""

    asked: PoolAsked
    settings: PoolSettings
    fresh: PoolSettings
    template: JsonObject
    outdated: str | None
    """What a fresh plan would do differently; None: nothing."""
    spec_hash: str
    view: PoolView
    facts: PoolFacts


@dataclass(frozen=True, slots=True)
class _Accepted:
    """A tier with nothing wrong, and everything chosen for it."""

    member: Member
    tier: ServingTier
    before: Remembered
    """The latest status, written or only remembered."""
    notes: tuple[Problem, ...]
    """Problems that do not block."""
    settings: TierSettings
    pools: tuple[_Pool, ...]
    router_template: JsonObject
    router_hash: str
    router_view: PoolView
    targets: Targets
    judged: capacity.Judgement
    observation: TierObservation


@dataclass(frozen=True, slots=True)
class _Refused:
    """A tier that cannot be planned; its children stay as they are."""

    member: Member
    generation: int
    before: Remembered
    problems: tuple[Problem, ...]
    tier: ServingTier | None


def plan(observed: Observed) -> Plan:
    """Return what to do about an observation."""
    looks = [_look(member, observed) for member in observed.members]
    decided = scaling.decide(
        tuple(look.observation for look in looks if isinstance(look, _Accepted)), observed.now
    )
    by_key = {decision.key: decision for decision in decided}
    writes: list[Write] = []
    events: list[Event] = []
    remember: list[object | None] = []
    recheck = _RECHECK_SECONDS
    for look in looks:
        match look:
            case None:
                remember.append(None)
                continue
            case _Refused():
                after = refused(look.tier, look.generation, look.problems, look.before, observed.now)
            case _Accepted():
                decision = by_key[look.observation.key]
                history = _history(look, decision, observed.now)
                differences, replicas = _differences(look, decision, history, observed.config)
                if differences.foreign or differences.waiting:
                    recheck = min(recheck, _RECHECK_SOON)
                if not look.tier.spec.suspend:
                    writes += differences.writes
                after = report(
                    _seen(look, decision, history, differences, replicas),
                    look.before,
                    observed.config,
                    observed.now,
                )
        events += report_events(look.member.raw, look.before.status, after.status)
        after, status_write = _status_write(look.member.raw, after, observed.now)
        writes += status_write
        remember.append(after)
    return Plan(tuple(writes), tuple(events), recheck, tuple(remember), decided)


# -- looking ---------------------------------------------------------------------------------------------------


def _look(member: Member, observed: Observed) -> _Accepted | _Refused | None:
    """Read one tier and choose its settings; None for a tier that is being deleted."""
    meta = member.raw["metadata"]
    if "deletionTimestamp" in meta:
        return None
    before = member.remembered
    if not isinstance(before, Remembered):
        before = Remembered(ServingTierStatus.model_validate(member.raw.get("status") or {}))
    generation = int(meta.get("generation", 0))
    try:
        tier = ServingTier.model_validate(member.raw)
    except ValidationError as error:
        return _Refused(member, generation, before, _invalid(error), None)
    found = problems.find(tier, observed.config)
    if any(problem.blocking for problem in found):
        return _Refused(member, generation, before, found, tier)
    return _accept(member, tier, before, found, observed)


def _invalid(error: ValidationError) -> tuple[Problem, ...]:
    """Return what pydantic finds wrong; only an API server with an older CRD lets such a tier through."""
    return tuple(
        Problem(".".join(str(part) for part in item["loc"]), item["msg"], reason="Invalid")
        for item in error.errors()[:5]
    )


def _accept(
    member: Member,
    tier: ServingTier,
    before: Remembered,
    notes: tuple[Problem, ...],
    observed: Observed,
) -> _Accepted:
    config = observed.config
    # Somebody else's Deployment of the same name says nothing about our pools.
    own = [obj for obj in member.objects if owned_by(obj, tier.metadata.uid)]
    views = {asked.name: view_pool(tier, asked.name, own, member.pods) for asked in pools_asked(tier.spec)}
    fresh = presets.choose(tier, config, shortage=_shortage(tier, views))
    pins = {name: pin.read(view.deployment) if view.deployment else None for name, view in views.items()}
    in_force = {s.name: _in_force(tier, s, pins[s.name]) for s in fresh.pools}
    settings = replace(fresh, pools=tuple(in_force[s.name] for s in fresh.pools))
    known = {pool.name: pool.memory or PoolMemory() for pool in before.status.pools}
    memory = {name: _remembered(known.get(name, PoolMemory()), view) for name, view in views.items()}
    pools = tuple(
        _pool(
            asked,
            in_force[asked.name],
            chosen,
            tier,
            fresh,
            pins[asked.name],
            views[asked.name],
            memory[asked.name],
            observed,
        )
        for asked, chosen in zip(pools_asked(tier.spec), fresh.pools, strict=True)
    )
    targets = presets.targets(tier.spec)
    judged = capacity.judge(tier.spec, settings, targets, member.load)
    router_view = view_router(tier, own, member.pods)
    router_template, router_hash = _router(tier, settings, router_view, config)
    return _Accepted(
        member=member,
        tier=tier,
        before=before,
        notes=notes,
        settings=settings,
        pools=pools,
        router_template=router_template,
        router_hash=router_hash,
        router_view=router_view,
        targets=targets,
        judged=judged,
        observation=TierObservation(
            key=f"{tier.metadata.namespace}/{tier.metadata.name}",
            spec=tier.spec,
            targets=targets,
            pools=tuple(
                replace(pool.facts, rps_per_replica=judged.requests_per_second.get(pool.asked.name))
                for pool in pools
            ),
            load=member.load,
            memory=memory,
            watching_since=member.watching_since,
        ),
    )


def _remembered(memory: PoolMemory, view: PoolView) -> PoolMemory:
    """Return a pool's memory with the scaling that its Deployment tells of and the status does not, after a crash."""
    record = _recorded(view.deployment) if view.deployment is not None else None
    if record is None:
        return memory
    name = "last_scale_up" if record.to_replicas > record.from_replicas else "last_scale_down"
    latest = max(record.time, getattr(memory, name) or record.time)
    return memory.model_copy(update={name: latest})


def _shortage(tier: ServingTier, views: Mapping[str, PoolView]) -> frozenset[str]:
    """Return the accelerators that pools wait for in vain, where the user allows another one."""
    short: set[str] = set()
    for asked in pools_asked(tier.spec):
        view = views[asked.name]
        record = pin.read(view.deployment) if view.deployment else None
        if (
            asked.spec.hardware.on_shortage is OnShortage.NEXT_CHEAPEST
            and record is not None
            and record.settings is not None
            and view.unschedulable_pods
            and not view.ready_pods
        ):
            short.add(record.settings.accelerator)
    return frozenset(short)


def _in_force(tier: ServingTier, fresh: PoolSettings, record: Pin | None) -> PoolSettings:
    if record is None or record.spec_hash != pin.spec_hash(tier, fresh.role):
        return fresh
    return record.settings or fresh


def _pool(
    asked: PoolAsked,
    settings: PoolSettings,
    chosen: PoolSettings,
    tier: ServingTier,
    fresh: TierSettings,
    record: Pin | None,
    view: PoolView,
    memory: PoolMemory,
    observed: Observed,
) -> _Pool:
    hashed = pin.spec_hash(tier, asked.role)
    template = engine.pod_template(tier, fresh, chosen, observed.config)
    outdated = None
    if record is not None and record.spec_hash == hashed and record.template != template:
        outdated = _what_differs(settings, chosen, record.operator_version)
        template = record.template
    return _Pool(
        asked=asked,
        settings=settings,
        fresh=chosen,
        template=template,
        outdated=outdated,
        spec_hash=hashed,
        view=view,
        facts=pool_facts(asked, settings, view, memory, now=observed.now),
    )


def _what_differs(pinned: PoolSettings, fresh: PoolSettings, version: str) -> str:
    """Return the fields a fresh plan would set otherwise, for people."""
    differing = [
        f"{name} {getattr(pinned, name)} → {getattr(fresh, name)}"
        for name in (
            "accelerator",
            "tensor_parallel",
            "image",
            "max_num_seqs",
            "max_num_batched_tokens",
            "weights",
        )
        if getattr(pinned, name) != getattr(fresh, name)
    ]
    return f"{pinned.name}: " + (", ".join(differing) or f"pods as written by operator {version}")


def _router(
    tier: ServingTier, settings: TierSettings, view: PoolView, config: OperatorConfig
) -> tuple[JsonObject, str]:
    """Return the router's pod template, as recorded while the spec it was made from is the same."""
    spec = tier.spec.model_dump(
        mode="json", exclude_defaults=True, exclude={"suspend", "scaling", "workload"}
    )
    for part in (spec.get("pool", {}), *spec.get("disaggregation", {}).values()):
        if isinstance(part, dict):
            part.pop("scaling", None)
    hashed = content_hash(
        [
            spec,
            router.may_rest_at_zero(tier),
            tier.metadata.annotations.get(pin.REPLAN_ANNOTATION),
            # Accounts that a new configuration does not plan are pruned: routers must not go on to name them.
            config.router_service_account,
            config.cluster_mode,
        ]
    )
    record = pin.read(view.deployment) if view.deployment else None
    if record is not None and record.spec_hash == hashed:
        return record.template, hashed
    return router.router_template(tier, settings, config), hashed


# -- objects ---------------------------------------------------------------------------------------------------


def _history(look: _Accepted, decision: TierDecision, now: float) -> tuple[DecisionRecord, ...]:
    recorded = [
        record
        for pool in look.pools
        if pool.view.deployment is not None and (record := _recorded(pool.view.deployment)) is not None
    ]
    return decision_history(
        decision,
        look.before.status.decisions,
        recorded,
        existing=frozenset(pool.asked.name for pool in look.pools if pool.view.deployment is not None),
        acting=acts(look.tier.spec.scaling.mode, suspended=look.tier.spec.suspend) and not _rivals(look),
        now=now,
    )


def _recorded(deployment: Mapping[str, Any]) -> DecisionRecord | None:
    """Return the decision that a Deployment's replicas come from, as written on it."""
    text = deployment["metadata"].get("annotations", {}).get(DECISION_ANNOTATION)
    try:
        return None if text is None else DecisionRecord.model_validate_json(text)
    except ValidationError:
        return None


def _rivals(look: _Accepted) -> tuple[str, ...]:
    """Return the HorizontalPodAutoscalers that target a pool which is ours to scale."""
    if look.tier.spec.scaling.mode is ScalingMode.EXTERNAL:
        return ()
    found = (
        _autoscaler_of(pool.view.deployment, look.member)
        for pool in look.pools
        if pool.view.deployment is not None
    )
    return tuple(sorted({name for name in found if name is not None}))


def _differences(
    look: _Accepted,
    decision: TierDecision,
    history: tuple[DecisionRecord, ...],
    config: OperatorConfig,
) -> tuple[Changes, dict[str, int | None]]:
    """Return the writes that bring the cluster in line, and the replicas that are sent."""
    decided = {d.pool: d for d in decision.decisions}
    replicas = {pool.asked.name: _replicas(look, pool, decided[pool.asked.name]) for pool in look.pools}
    templates = {pool.asked.name: pool.template for pool in look.pools} | {ROUTER_POOL: look.router_template}
    objects = tier_objects(
        look.tier,
        look.settings,
        replicas,
        config,
        templates=templates,
        surge={pool.asked.name: rollout.may_surge(pool.facts) for pool in look.pools},
    )
    pins = {
        names.engine_deployment(look.tier.metadata.name, pool.asked.name): Pin(
            pool.spec_hash, _written_by(pool.view, pool.template), pool.template, pool.settings
        )
        for pool in look.pools
    }
    pins[names.router_deployment(look.tier.metadata.name)] = Pin(
        look.router_hash, _written_by(look.router_view, look.router_template), look.router_template, None
    )
    said = {
        names.engine_deployment(look.tier.metadata.name, pool.asked.name): text
        for pool in look.pools
        if (text := _said(pool, history)) is not None
    }
    marked = [_marked(obj, pins, said) for obj in objects]
    found = changes(
        marked,
        [obj for obj in look.member.objects if obj["kind"] != "Pod"],
        owner_uid=look.tier.metadata.uid,
        field_manager=FIELD_MANAGER,
    )
    return found, replicas


def _written_by(view: PoolView, template: JsonObject) -> str:
    """Return the version of the operator that wrote a template first."""
    record = pin.read(view.deployment) if view.deployment else None
    return record.operator_version if record is not None and record.template == template else __version__


def _said(pool: _Pool, history: tuple[DecisionRecord, ...]) -> str | None:
    """Return the decision to write on a pool's Deployment, together with the replicas it set."""
    for record in history:
        if record.pool == pool.asked.name and record.acted:
            return record.model_dump_json(by_alias=True)
    old: str | None = (
        (pool.view.deployment or {}).get("metadata", {}).get("annotations", {}).get(DECISION_ANNOTATION)
    )
    return old


def _marked(obj: JsonObject, pins: Mapping[str, Pin], said: Mapping[str, str]) -> JsonObject:
    if obj["kind"] != "Deployment":
        return obj
    meta = obj["metadata"]
    annotations = meta.get("annotations", {}) | {pin.PLAN_ANNOTATION: pin.annotation(pins[meta["name"]])}
    if meta["name"] in said:
        annotations[DECISION_ANNOTATION] = said[meta["name"]]
    return obj | {"metadata": meta | {"annotations": annotations}}


def _replicas(look: _Accepted, pool: _Pool, decision: Decision) -> int | None:
    """Return the replicas to send; None leaves them to their owner."""
    spec = look.tier.spec
    deployment = pool.view.deployment
    if deployment is None:
        return pool.facts.replicas
    live = int(deployment["spec"].get("replicas", 1))
    mode = spec.scaling.mode
    if mode is ScalingMode.EXTERNAL:
        # Sent until somebody else owns the field: leaving it out at once would drop the Deployment to 1.
        return None if _owned_elsewhere(deployment) else live
    if not acts(mode, suspended=spec.suspend) or _autoscaler_of(deployment, look.member) is not None:
        return live
    return decision.desired


def _owned_elsewhere(deployment: Mapping[str, Any]) -> bool:
    """Return whether a manager other than ours owns ``spec.replicas``."""
    return any(
        entry.get("manager") != FIELD_MANAGER and "f:replicas" in entry.get("fieldsV1", {}).get("f:spec", {})
        for entry in deployment["metadata"].get("managedFields", ())
    )


def _autoscaler_of(deployment: Mapping[str, Any], member: Member) -> str | None:
    """Return the name of a HorizontalPodAutoscaler that targets a Deployment."""
    for autoscaler in member.autoscalers:
        target = autoscaler["spec"]["scaleTargetRef"]
        if target["kind"] == "Deployment" and target["name"] == deployment["metadata"]["name"]:
            return str(autoscaler["metadata"]["name"])
    return None


def _seen(
    look: _Accepted,
    decision: TierDecision,
    history: tuple[DecisionRecord, ...],
    differences: Changes,
    replicas: Mapping[str, int | None],
) -> TierReport:
    """Return what is known of a tier after a pass, for its status."""
    decided = {d.pool: d for d in decision.decisions}
    return TierReport(
        tier=look.tier,
        notes=look.notes,
        pools=tuple(
            PoolReport(
                name=pool.asked.name,
                role=pool.asked.role,
                settings=pool.settings,
                view=pool.view,
                replicas=pool.facts.replicas if (sent := replicas[pool.asked.name]) is None else sent,
                decision=decided[pool.asked.name],
                outdated=pool.outdated,
            )
            for pool in look.pools
        ),
        router=look.router_view,
        targets=look.targets,
        decided=decision,
        feasibility=look.judged.feasibility,
        plan=look.judged.plan,
        decisions=history,
        load=look.member.load,
        load_elapsed=look.member.load_elapsed,
        foreign=differences.foreign,
        replicas_owner=", ".join(f"HorizontalPodAutoscaler {name}" for name in _rivals(look)) or None,
        failures=look.member.failures,
        startup_seconds={pool.asked.name: startup_times(pool.view) for pool in look.pools},
    )


def _status_write(raw: JsonObject, after: Remembered, now: float) -> tuple[Remembered, list[Write]]:
    """Return the write of the status where it is worth one, and what to remember of that."""
    written = ServingTierStatus.model_validate(raw.get("status") or {})
    if not worth_writing(written, after, now):
        return after, []
    counters = [entry.hours for entry in written.slo] != [entry.hours for entry in after.status.slo]
    ref = Ref.of(raw)
    body = {
        "apiVersion": ref.api_version,
        "kind": ref.kind,
        "metadata": {"name": ref.name, "namespace": ref.namespace, "uid": raw["metadata"]["uid"]},
        "status": after.status.model_dump(mode="json", by_alias=True, exclude_none=True),
    }
    noted = replace(after, written_at=now, counters_written_at=now if counters else after.counters_written_at)
    return noted, [Write(Verb.STATUS, body, "what is reported has changed")]
