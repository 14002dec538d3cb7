"""``plan(observed) -> plan``: everything the operator decides, in one pure function. Read this first.

For every tier of a reconcile key, which is one tier, or all tiers that name one TierPool:

1. read it, and find what is wrong with it (nothing serving is touched while something is);
2. take the settings its engines were planned with, or choose them;
3. decide the replicas of all pools together, and which engines tiers lend each other before any are started;
4. write down the objects that should exist, compare them with those that do, and name the differences;
5. account for the objectives, and say all of it in the status.

No clock, no I/O, no randomness: the same observation always gives the same plan, and a plan whose writes have been
carried out is followed by an empty one.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic import ValidationError

from servingtiers import __version__
from servingtiers.api.pool import TierPool
from servingtiers.api.spec import OnShortage, ScalingMode, ServingTier
from servingtiers.api.status import DecisionRecord, PoolMemory, ServingTierStatus
from servingtiers.core import pin
from servingtiers.core.config import OperatorConfig
from servingtiers.core.decisions import (
    Binding,
    Decision,
    PoolFacts,
    Targets,
    TierDecision,
    TierObservation,
    acts,
)
from servingtiers.core.diff import Changes, changes, content_hash, owned_by
from servingtiers.core.effective import PoolAsked, PoolSettings, TierSettings, pools_asked
from servingtiers.core.findings import Problem
from servingtiers.core.pin import Pin
from servingtiers.core.sharing import Group, Relabel, SharedEngine
from servingtiers.core.state import Event, JsonObject, Member, Observed, Plan, Ref, Verb, Write
from servingtiers.core.times import to_time
from servingtiers.facts import (
    PoolView,
    engines_hash,
    pool_facts,
    ready_at_home,
    serves,
    shared_engines,
    startup_times,
    view_pool,
    view_router,
)
from servingtiers.policy import capacity, lending, membership, presets, problems, rollout, scaling
from servingtiers.pool_report import MemberReport, pool_status
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
"""On a pool's Deployment: the latest decision that was carried out, as JSON. On an engine's pod: its latest move, as JSON
by the keys of the tiers that it left and came to."""
_RECHECK_SECONDS: Final = 300.0
_RECHECK_SOON: Final = 30.0
_RECHECK_MOVING: Final = 2.0
_SHORT_AFTER: Final = 600.0
"""An accelerator is short when no engine of a pool has found a node for it for so long, seconds: where nodes are added on
demand, one with accelerators takes some minutes to come."""
_SHORT_FOR: Final = 3600.0
"""So long it is not chosen again, seconds. A pool for which all are short tries each of them for so long, and one that came
back is not put to the test at every edit of its spec."""
_AWAY_COST: Final = "100"
_MOVES_KEPT: Final = 4
"""Tiers of which a pod tells its latest move."""


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
    short: Mapping[str, float]
    """Accelerators that it gave up because they were short, and when: Unix time, seconds."""
    given_up: str | None
    """The accelerator that it gives up in this pass."""
    at_once: bool
    """All its replicas may be replaced at the same time: it has given an accelerator up, and none has found a node."""


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
    router_outdated: str | None
    """What routers written today would have otherwise; None: nothing."""
    router_view: PoolView
    targets: Targets
    judged: capacity.Judgement
    observation: TierObservation
    guests: tuple[JsonObject, ...]
    """Engines of other tiers that serve it."""


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
    pool = _tier_pool(observed)
    looks = _together([_look(member, observed) for member in observed.members], pool)
    accepted = [look for look in looks if isinstance(look, _Accepted)]
    group = Group(
        tuple(_as_member(look) for look in accepted),
        tuple(_engines(looks, observed)),
        pool.spec.max_accelerators if pool is not None else None,
        frozenset(_key(look.member) for look in looks if isinstance(look, _Refused)),
    )
    outcome = lending.decide(group, scaling.decide(group.tiers, observed.now), observed.now)
    by_key = {decision.key: decision for decision in outcome.tiers}
    # Engines move before engines start.
    told = _moves(outcome.relabels, group, observed.now)
    writes = _relabels(outcome.relabels, told, looks, observed)
    events: list[Event] = []
    remember: list[object | None] = []
    recheck = _RECHECK_SECONDS
    for index, look in enumerate(looks):
        match look:
            case None:
                remember.append(None)
                continue
            case _Refused():
                ready, routers = ready_at_home(look.member.raw["metadata"]["name"], look.member.pods)
                after = refused(
                    *(look.tier, look.generation, look.problems, look.before, observed.now),
                    ready=ready,
                    routers=routers,
                )
            case _Accepted():
                decision = by_key[look.observation.key]
                key = look.observation.key
                history = _history(
                    look, decision, tuple(_moves_recorded(key, observed.members)), observed.now
                )
                differences, replicas = _differences(look, decision, history, observed.config)
                if differences.foreign or differences.waiting:
                    recheck = min(recheck, _RECHECK_SOON)
                if not look.tier.spec.suspend:
                    writes += [replace(write, member=index) for write in differences.writes]
                    events += _gone_over(look)
                after = report(
                    _seen(look, decision, history, differences, replicas),
                    look.before,
                    observed.config,
                    observed.now,
                )
        events += report_events(look.member.raw, look.before.status, after.status)
        after, status_write = _status_write(look.member.raw, after, observed.now)
        writes += [replace(write, member=index) for write in status_write]
        remember.append(after)
    writes += _pool_status_write(observed, pool, looks, group, by_key)
    moving = any(
        engine.holder is None and engine.ready and not engine.leaving for engine in group.engines
    ) or any(relabel.holder is None for relabel in outcome.relabels)
    if moving:
        recheck = min(recheck, _RECHECK_MOVING)
    return Plan(tuple(writes), tuple(events), recheck, tuple(remember), outcome.tiers, moving)


# -- together --------------------------------------------------------------------------------------------------


def _tier_pool(observed: Observed) -> TierPool | None:
    """Return the members' TierPool; None where there is none, or none that can be read."""
    if observed.pool is None or "deletionTimestamp" in observed.pool["metadata"]:
        return None
    try:
        return TierPool.model_validate(observed.pool)
    except ValidationError:
        return None


def _together(
    looks: Sequence[_Accepted | _Refused | None], pool: TierPool | None
) -> list[_Accepted | _Refused | None]:
    """Return the looks with what only the group can tell: who takes part, and what a borrowed engine carries."""
    sharing = [
        look for look in looks if isinstance(look, _Accepted) and look.tier.spec.shared_pool is not None
    ]
    apart = membership.judge(pool, [look.tier for look in sharing])
    found: list[_Accepted | _Refused | None] = []
    for look in looks:
        if not isinstance(look, _Accepted) or look.tier.spec.shared_pool is None:
            found.append(look)
        elif (problem := apart.get(look.tier.metadata.name)) is not None:
            found.append(replace(look, notes=(*look.notes, problem)))
        else:
            lenders = [
                other
                for other in sharing
                if other.tier.metadata.name not in apart and other is not look and _below(other, look)
            ]
            found.append(_with_share(look, lenders))
    return found


def _below(lender: _Accepted, borrower: _Accepted) -> bool:
    ours, theirs = borrower.tier.spec.shared_pool, lender.tier.spec.shared_pool
    return ours is not None and theirs is not None and theirs.priority < ours.priority


def _with_share(look: _Accepted, lenders: Sequence[_Accepted]) -> _Accepted:
    """Return a member that knows what the engines of its lenders carry at its own objectives.

    Their batch and step budget are their home's; the least of them counts.
    """
    (pool,) = look.observation.pools
    if pool.curve is None:
        return look
    own = pool.curve.rps
    ours = look.settings.pools[0]
    share = 1.0
    for budget in {_budget(other.settings.pools[0]) for other in lenders} - {_budget(ours)}:
        seqs, tokens, memory = budget
        theirs = replace(
            ours, max_num_seqs=seqs, max_num_batched_tokens=tokens, gpu_memory_utilization=memory
        )
        judged = capacity.judge(
            look.tier.spec, replace(look.settings, pools=(theirs,)), look.targets, look.member.load
        )
        lent = judged.curves.get(pool.name)
        share = min(share, lent.rps / own if lent is not None else 0.0)
    observation = replace(look.observation, pools=(replace(pool, borrowed_share=share),))
    return replace(look, observation=observation)


def _budget(settings: PoolSettings) -> tuple[int, int | None, float | None]:
    return settings.max_num_seqs, settings.max_num_batched_tokens, settings.gpu_memory_utilization


def _apart(look: _Accepted) -> bool:
    """Whether a tier that names a TierPool takes no part in it."""
    return any(problem.field == "spec.sharedPool" for problem in look.notes)


def _as_member(look: _Accepted) -> TierObservation:
    """Return a tier as lending sees it: one that takes no part shares nothing."""
    if not _apart(look):
        return look.observation
    spec = look.observation.spec.model_copy(update={"shared_pool": None})
    return replace(look.observation, spec=spec)


def _key(member: Member) -> str:
    meta = member.raw["metadata"]
    return f"{meta['namespace']}/{meta['name']}"


def _engines(looks: Sequence[_Accepted | _Refused | None], observed: Observed) -> Iterator[SharedEngine]:
    """Yield the engines of the tiers; of one whose spec is refused only those that nobody's routers select."""
    flights = {
        pod: (signal, member.load_age)
        for member in observed.members
        for pod, signal in member.load.in_flight.items()
    }
    tiers = [look.member.raw["metadata"]["name"] for look in looks if look is not None]
    for look in looks:
        if look is None:
            continue
        meta = look.member.raw["metadata"]
        found = shared_engines(
            meta["namespace"],
            meta["name"],
            look.member.pods,
            tiers,
            flights,
            sharing=isinstance(look, _Accepted) and look.tier.spec.shared_pool is not None,
            now=observed.now,
        )
        yield from (engine for engine in found if isinstance(look, _Accepted) or engine.holder is None)


def _relabels(
    relabels: Sequence[Relabel],
    told: Mapping[str, Mapping[str, DecisionRecord]],
    looks: Sequence[_Accepted | _Refused | None],
    observed: Observed,
) -> list[Write]:
    """Return the patches of the pods that change their holder."""
    pods = {
        pod["metadata"].get("uid", pod["metadata"]["name"]): (index, pod)
        for index, look in enumerate(looks)
        if look is not None
        for pod in look.member.pods
    }
    return [
        _relabel(*pods[relabel.uid], relabel, told.get(relabel.uid, {}), observed.now) for relabel in relabels
    ]


def _relabel(
    index: int, pod: JsonObject, relabel: Relabel, told: Mapping[str, DecisionRecord], now: float
) -> Write:
    meta = pod["metadata"]

    def slug(key: str | None) -> str | None:
        return None if key is None else names.slug(key.rpartition("/")[2])

    at_home = slug(relabel.holder) == meta["labels"][names.TIER_LABEL]
    # What was told to the tier that it left stays until it is told anew: its status may not have been written yet.
    records = {key: record for key, record in _records_of(pod).items() if key not in told} | {
        key: record.model_dump(mode="json", by_alias=True, exclude_none=True) for key, record in told.items()
    }
    records = dict([*records.items()][-_MOVES_KEPT:])
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": meta["name"],
            "namespace": meta["namespace"],
            "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"],
            "labels": {names.ROUTE_TIER_LABEL: slug(relabel.holder)},
            "annotations": {
                names.MOVED_ANNOTATION: to_time(now),
                names.BOUND_ANNOTATION: slug(relabel.bound_for),
                names.DELETION_COST_ANNOTATION: None if at_home else _AWAY_COST,
                **({DECISION_ANNOTATION: json.dumps(records, ensure_ascii=False)} if records else {}),
            },
        },
    }
    return Write(Verb.LABEL, body, relabel.reason, index)


def _moves(relabels: Sequence[Relabel], group: Group, now: float) -> dict[str, dict[str, DecisionRecord]]:
    """Return what is to be told of engines that move: the engine's uid to tier key to the record."""
    by_uid = {engine.uid: engine for engine in group.engines}
    serving = Counter(engine.holder for engine in group.engines if engine.ready and not engine.leaving)
    found: dict[str, dict[str, DecisionRecord]] = {}
    for relabel in relabels:
        engine = by_uid[relabel.uid]
        for key, change in ((engine.holder, -1), (relabel.holder, 1)):
            if key is None or key in group.refused:
                continue  # of a refused tier not all engines are known: there is nothing to count from
            found.setdefault(relabel.uid, {})[key] = DecisionRecord(
                time=to_time(now),
                pool="pool",
                from_replicas=serving[key],
                to_replicas=serving[key] + change,
                engine=engine.name[:256],
                reason=relabel.reason[:1024],
                binding=(Binding.LENT if engine.home == key else Binding.BORROWED).value,
            )
            serving[key] += change
    return found


def _moves_recorded(key: str, members: Sequence[Member]) -> Iterator[DecisionRecord]:
    """Yield what pods tell of their latest move to or from a tier: it was written together with their label.

    This pass's own moves are told in the next one: the API server may refuse them.
    """
    for pod in (pod for member in members for pod in member.pods):
        records = _records_of(pod)
        with contextlib.suppress(ValidationError):
            if key in records:
                yield DecisionRecord.model_validate(records[key])


def _records_of(pod: JsonObject) -> dict[str, Any]:
    """Return the records on a pod by tier key; none where somebody else wrote there."""
    try:
        found = json.loads(pod["metadata"].get("annotations", {}).get(DECISION_ANNOTATION, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _pool_status_write(
    observed: Observed,
    pool: TierPool | None,
    looks: Sequence[_Accepted | _Refused | None],
    group: Group,
    decided: Mapping[str, TierDecision],
) -> list[Write]:
    """Return the write of the TierPool's status where it says something new."""
    raw = observed.pool
    if raw is None or pool is None:
        return []
    members = []
    for look in looks:
        if isinstance(look, _Accepted):
            size = look.settings.pools[0].tensor_parallel
            desired = sum(decision.desired for decision in decided[look.observation.key].decisions)
            notes = [problem.message for problem in look.notes if problem.field == "spec.sharedPool"]
            members.append(MemberReport(look.tier, size * desired, notes[0] if notes else None))
        elif isinstance(look, _Refused) and look.tier is not None:
            members.append(MemberReport(look.tier, 0, "its spec is not accepted: see its condition Accepted"))
    status = pool_status(pool, tuple(members), group.engines, now=observed.now)
    if pool.status == status:
        return []
    ref = Ref.of(raw)
    body = {
        "apiVersion": ref.api_version,
        "kind": ref.kind,
        "metadata": {"name": ref.name, "namespace": ref.namespace, "uid": raw["metadata"]["uid"]},
        "status": status.model_dump(mode="json", by_alias=True, exclude_none=True),
    }
    return [Write(Verb.STATUS, body, "what is reported of the pool has changed")]


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
    try:
        return _accept(member, tier, before, found, observed)
    except presets.NoChoiceError as error:
        # What was overlooked above is said all the same, and the other tiers of the group go on.
        field, _, message = str(error).partition(": ")
        missed = Problem(field, message, reason="NoChoice")
        return _Refused(member, generation, before, (*found, missed), tier)


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
    guests = tuple(
        pod
        for other in observed.members
        if other is not member
        for pod in other.pods
        if serves(tier.metadata.name, pod)
    )
    # Somebody else's Deployment of the same name says nothing about our pools.
    own = [obj for obj in member.objects if owned_by(obj, tier.metadata.uid)]
    views = {asked.name: view_pool(tier, asked.name, own, member.pods) for asked in pools_asked(tier.spec)}
    pins = {name: pin.read(view.deployment) if view.deployment else None for name, view in views.items()}
    short = {
        asked.name: _short(asked, pins[asked.name], views[asked.name], observed.now)
        for asked in pools_asked(tier.spec)
    }
    fresh = presets.choose(tier, config, shortage=short)
    in_force = {s.name: _in_force(tier, s, pins[s.name]) for s in fresh.pools}
    # What is only to be recommended, or watched, is only said: the condition PlanOutdated names the other accelerator.
    if tier.spec.scaling.mode is not ScalingMode.RECOMMEND and not tier.spec.suspend:
        in_force |= _next_cheapest(tier, config, in_force, short)
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
            guests,
        )
        for asked, chosen in zip(pools_asked(tier.spec), fresh.pools, strict=True)
    )
    targets = presets.targets(tier.spec)
    judged = capacity.judge(tier.spec, settings, targets, member.load)
    router_view = view_router(tier, own, member.pods)
    router_template, router_hash, router_outdated = _router(tier, settings, pools, router_view, config)
    return _Accepted(
        member=member,
        tier=tier,
        before=before,
        notes=notes,
        settings=settings,
        pools=pools,
        router_template=router_template,
        router_hash=router_hash,
        router_outdated=router_outdated,
        router_view=router_view,
        targets=targets,
        judged=judged,
        observation=TierObservation(
            key=_key(member),
            spec=tier.spec,
            targets=targets,
            pools=tuple(
                replace(
                    pool.facts,
                    curve=judged.curves.get(pool.asked.name),
                    engines=engines_hash(tier.spec.model.name, pool.settings, targets),
                )
                for pool in pools
            ),
            load=member.load,
            memory=memory,
            watching_since=member.watching_since,
            feasible=judged.feasibility.feasible,
            rivalled=any(
                view.deployment is not None and _autoscaler_of(view.deployment, member) is not None
                for view in views.values()
            ),
        ),
        guests=guests,
    )


def _remembered(memory: PoolMemory, view: PoolView) -> PoolMemory:
    """Return a pool's memory with the scaling that its Deployment tells of and the status does not, after a crash."""
    record = _recorded(view.deployment) if view.deployment is not None else None
    if record is None:
        return memory
    name = "last_scale_up" if record.to_replicas > record.from_replicas else "last_scale_down"
    latest = max(record.time, getattr(memory, name) or record.time)
    return memory.model_copy(update={name: latest})


def _short(asked: PoolAsked, record: Pin | None, view: PoolView, now: float) -> frozenset[str]:
    """Return the accelerators that a pool waits for, or has waited for lately, in vain."""
    if record is None:
        return frozenset()
    short = set(_lately(record.short, now))
    if record.settings is not None:
        # Of the one that it asks for now its pods tell better.
        short.discard(record.settings.accelerator)
    waits_for = _in_vain(asked, record, view, now)
    return frozenset(short if waits_for is None else short | {waits_for})


def _lately(short: Mapping[str, float], now: float) -> dict[str, float]:
    """Return what of the accelerators that were short still counts as short."""
    return {key: at for key, at in short.items() if abs(now - at) < _SHORT_FOR}


def _in_vain(asked: PoolAsked, record: Pin | None, view: PoolView, now: float) -> str | None:
    """Return the accelerator that a pool waits for in vain, where the user allows another one.

    While one engine for it serves or starts, it can be had: what cannot be scheduled beside that one waits, for all engines
    of a pool are alike, and those that serve would have to go for its sake.
    """
    if asked.spec.hardware.on_shortage is not OnShortage.NEXT_CHEAPEST or record is None:
        return None
    if record.settings is None:
        return None
    waited = view.waited_for(record.settings.accelerator, now)
    return record.settings.accelerator if waited is not None and waited >= _SHORT_AFTER else None


def _next_cheapest(
    tier: ServingTier,
    config: OperatorConfig,
    in_force: Mapping[str, PoolSettings],
    short: Mapping[str, frozenset[str]],
) -> dict[str, PoolSettings]:
    """Return the settings of pools that give their accelerator up; a pool for which all are short waits where it is."""
    going = {name for name, settings in in_force.items() if settings.accelerator in short[name]}
    while going:
        staying = {name: s.tensor_parallel for name, s in in_force.items() if name not in going}
        try:
            chosen = presets.choose(tier, config, shortage=short, staying=staying)
        except presets.NoChoiceError:
            return {}  # none that remains fits beside the other pool
        found = {s.name: s for s in chosen.pools if s.name in going}
        stuck = {name for name, settings in found.items() if settings.accelerator in short[name]}
        if not stuck:
            return found
        going -= stuck
    return {}


def _gone_over(look: _Accepted) -> list[Event]:
    """Return the events that tell of pools which give their accelerator up."""
    return [
        Event(
            look.member.raw,
            "Normal",
            "AcceleratorShort",
            f"{pool.asked.name}: no engine found a node with {pool.given_up} for {_SHORT_AFTER / 60:.0f} min:"
            f" {pool.settings.accelerator} instead, {pool.settings.reasons['accelerator']}",
        )
        for pool in look.pools
        if pool.given_up is not None
    ]


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
    guests: Sequence[JsonObject],
) -> _Pool:
    hashed = pin.spec_hash(tier, asked.role)
    short: Mapping[str, float] = record.short if record is not None else {}
    given_up = _in_vain(asked, record, view, observed.now)
    if given_up == settings.accelerator:
        given_up = None
    if given_up is not None:
        chosen = settings
        short = _lately(short, observed.now) | {given_up: float(round(observed.now))}
    template = engine.pod_template(tier, fresh, chosen, observed.config)
    outdated = None
    if given_up is None and record is not None and record.spec_hash == hashed and record.template != template:
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
        facts=pool_facts(
            asked, settings, view, memory, now=observed.now, tier=tier.metadata.name, guests=guests
        ),
        short=short,
        given_up=given_up,
        at_once=not view.placed and bool(_lately(short, observed.now)),
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
    tier: ServingTier,
    settings: TierSettings,
    pools: Sequence[_Pool],
    view: PoolView,
    config: OperatorConfig,
) -> tuple[JsonObject, str, str | None]:
    """Return the routers' pod template, as recorded while the spec it was made from is the same; its hash; what is outdated."""
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
            # Engines on another accelerator may have another batch, and the routers' balance goes by it.
            *([pool.asked.name, sorted(pool.short)] for pool in pools if pool.short),
        ]
    )
    template = router.router_template(tier, settings, config)
    record = pin.read(view.deployment) if view.deployment else None
    if record is None or record.spec_hash != hashed:
        return template, hashed, None
    if record.template == template:
        return template, hashed, None
    differing = _what_differs_of_routers(record.template, template)
    said = ", ".join(differing) or f"pods as written by operator {record.operator_version}"
    return record.template, hashed, f"router: {said}"


def _what_differs_of_routers(pinned: JsonObject, fresh: JsonObject) -> list[str]:
    """Return the image and the arguments that routers written today would have otherwise, for people."""
    old, new = _of_routers(pinned), _of_routers(fresh)
    names_of_both = list(dict.fromkeys([*old, *new]))
    return [
        f"{name} {old.get(name, 'unset')} → {new.get(name, 'unset')}"
        for name in names_of_both
        if old.get(name) != new.get(name)
    ]


def _of_routers(template: JsonObject) -> dict[str, str]:
    found: dict[str, str] = {}
    for container in template.get("spec", {}).get("containers", ()):
        found["image"] = str(container.get("image"))
        for argument in container.get("args", ()):
            if argument.startswith("--"):
                name, _, value = argument.removeprefix("--").partition("=")
                found[name] = value or "set"
        for kind, quantities in container.get("resources", {}).items():
            found |= {f"{kind}.{resource}": str(quantity) for resource, quantity in quantities.items()}
    return found


# -- objects ---------------------------------------------------------------------------------------------------


def _history(
    look: _Accepted,
    decision: TierDecision,
    moved: Sequence[DecisionRecord],
    now: float,
) -> tuple[DecisionRecord, ...]:
    recorded = [
        record
        for pool in look.pools
        if pool.view.deployment is not None and (record := _recorded(pool.view.deployment)) is not None
    ]
    return decision_history(
        decision,
        look.before.status.decisions,
        [*recorded, *moved],
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
        # Where no engine has found a node there is none to keep: one that waits must not hold up those of the other kind.
        at_once={pool.asked.name for pool in look.pools if pool.at_once},
    )
    pins = {
        names.engine_deployment(look.tier.metadata.name, pool.asked.name): Pin(
            pool.spec_hash, _written_by(pool.view, pool.template), pool.template, pool.settings, pool.short
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
        if record.pool == pool.asked.name and record.acted and record.engine is None:
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
    # Sent until somebody else owns the field: leaving it out at once would drop the Deployment to 1, and what was seen a
    # moment ago would undo what that one has set since.
    left = None if _owned_elsewhere(deployment) else live
    mode = spec.scaling.mode
    if not acts(mode, suspended=spec.suspend) or _autoscaler_of(deployment, look.member) is not None:
        return left
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
                lent=pool.facts.lent,
                borrowed=pool.facts.borrowed,
            )
            for pool in look.pools
        ),
        router=look.router_view,
        router_outdated=look.router_outdated,
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
