"""The control loop: look, plan, write. All that is decided is decided by :func:`servingtiers.reconcile.plan`.

Keys of dirty tiers come from watches (``handlers``), from the tick that reads all loads at once, and from relists.
Workers take one key at a time, gather what was seen of it, plan, write, and remember what the plan wants remembered.
Nothing is kept here that a restart could not do without.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from servingtiers import __version__, facts, reconcile
from servingtiers.adapters.cluster import (
    AUTOSCALER,
    CHILDREN,
    EVENT,
    POD,
    TIER,
    TIER_POOL,
    ApiError,
    Cluster,
    Kind,
)
from servingtiers.adapters.leadership import NotLeaderError
from servingtiers.adapters.operator_metrics import OperatorMetrics, Probes, TierGauges
from servingtiers.adapters.store import Key, Store, group_of, key_of_tier
from servingtiers.adapters.workqueue import WorkQueue
from servingtiers.api.base import parse_duration
from servingtiers.api.spec import ServingTier
from servingtiers.core.config import OperatorConfig
from servingtiers.core.signals import TierLoad
from servingtiers.core.state import Event, JsonObject, Member, Observed, Plan, Ref, Verb, Write
from servingtiers.core.telemetry import LoadSource, TierTargets
from servingtiers.core.times import to_time
from servingtiers.gauges import gauges
from servingtiers.render import names
from servingtiers.report import Remembered

__all__ = ["WATCHED", "Controller"]

_log = logging.getLogger(__name__)

WATCHED = (*CHILDREN, POD)
"""Kinds watched by label."""
_MOVING_SECONDS = 2.0
"""Loads of tiers with engines between them are read this often: a drained one should not wait for the next tick."""
_BUSY_SECONDS = 0.2
_SELECTOR = f"{names.MANAGED_BY_LABEL}={names.MANAGED_BY}"


@dataclass(slots=True)
class _TierState:
    """What one process remembers of one tier; losing it costs at most a restarted hold."""

    uid: str
    """Of the tier: another one of the same name has another past."""
    watching_since: float
    load: TierLoad = field(default_factory=TierLoad)
    load_at: float | None = None
    accounted_at: float | None = None
    remembered: object | None = None
    failures: tuple[str, ...] = ()
    strangers: set[Ref] = field(default_factory=set)
    """Names we need that we do not watch: somebody else's objects, or ours without their label."""


class Controller:
    """Runs workers and the tick until cancelled."""

    def __init__(
        self,
        cluster: Cluster,
        config: OperatorConfig,
        loads: LoadSource,
        *,
        identity: str = "operator",
        workers: int = 8,
        resync_seconds: float = 300.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._config = config
        self._loads = loads
        self._identity = identity
        self._workers = workers
        self._resync_seconds = resync_seconds
        self._clock = clock
        self.store = Store(names.TIER_LABEL, label_value=names.slug)
        self.queue: WorkQueue[Key] = WorkQueue(clock=time.monotonic)
        self._states: dict[Key, _TierState] = {}
        self._by_label: dict[Key, Key] = {}
        self._busy: set[Key] = set()
        """Tiers that a worker is at: for a moment a tier may be in two groups, and two workers must not meet there."""
        self._moving: set[Key] = set()
        """Groups with engines between two tiers."""
        self.heartbeat = time.monotonic()
        """Moment at which the event loop last proved to turn."""
        self.running = False
        self.leading: Callable[[], bool] = lambda: True
        self._heard: dict[str, float] = {}
        self._unserved: set[str] = set()
        """Kinds whose CRD the cluster lacks."""
        self.metrics = OperatorMetrics(
            CollectorRegistry(),
            Probes(
                queue_depth=lambda: self.queue.depth,
                oldest_key_age=lambda: self.queue.oldest_age,
                leading=lambda: self.leading(),  # noqa: PLW0108 - replaced after this
                watch_ages=lambda: {kind: time.monotonic() - at for kind, at in self._heard.items()},
            ),
            __version__,
        )
        cluster.on_write = self.metrics.wrote

    # -- what was seen -----------------------------------------------------------------------------------------

    def tier_seen(self, tier: JsonObject, *, gone: bool) -> None:
        """Take in a watch event of a tier."""
        key = key_of_tier(tier)
        self._heard[TIER.kind] = time.monotonic()
        held = self.store.tiers.get(key)
        if gone:
            self.store.forget_tier(tier)
        elif self.store.see_tier(tier):
            self._by_label[key[0], names.slug(key[1])] = key
        else:
            return
        # The group that it leaves has to do without it, the one that it joins has to count on it.
        for group in {key if gone else group_of(tier), *([] if held is None else [group_of(held)])}:
            self.queue.add(group)

    def pool_seen(self, pool: JsonObject, *, gone: bool) -> None:
        """Take in a watch event of a TierPool."""
        self._heard[TIER_POOL.kind] = time.monotonic()
        group = self.store.forget_pool(pool) if gone else self.store.see_pool(pool)
        if group is not None:
            self.queue.add(group)

    def _enqueue_tier(self, key: Key) -> None:
        tier = self.store.tiers.get(key)
        self.queue.add(key if tier is None else group_of(tier))

    def object_seen(self, obj: JsonObject, *, gone: bool) -> None:
        """Take in a watch event of anything else."""
        self._heard[obj["kind"]] = time.monotonic()
        label = self.store.forget(obj) if gone else self.store.see(obj)
        self._enqueue_label(label)

    def _enqueue_label(self, label: Key | None) -> None:
        if label is not None and (key := self._by_label.get(label)) is not None:
            self._enqueue_tier(key)

    # -- loops -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled; the first failure that is not a tier's own ends everything."""
        await self.relist()
        self.running = True
        self.heartbeat = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work())
            group.create_task(self._tick())
            group.create_task(self._resync())
            group.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            self.heartbeat = time.monotonic()
            await asyncio.sleep(1.0)

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self._resync_seconds)
            try:
                await self.relist()
            except ApiError as error:
                _log.warning("relist failed, watches go on: %s", error)

    async def relist(self) -> None:
        """Compare everything held with fresh lists: watches can lose deletions."""
        namespaces: Sequence[str | None] = self._config.namespaces or [None]
        kinds = (TIER, TIER_POOL, *WATCHED, AUTOSCALER)
        for kind in kinds:
            self.store.list_begins()
            try:
                items, version = await self._list(kind, namespaces)
            except ApiError as error:
                if kind is not TIER_POOL or error.status != 404:
                    raise
                # Installed without its CRD: no tier can be in a pool, and none may stop for want of one.
                if kind.kind not in self._unserved:
                    _log.warning(
                        "the CRD %s.%s is not installed: tiers serve, but none shares engines. Apply the CRDs of"
                        " this release and restart the operator",
                        kind.plural,
                        kind.api_version.partition("/")[0],
                    )
                    self._unserved.add(kind.kind)
                continue
            self._unserved.discard(kind.kind)
            self._heard[kind.kind] = time.monotonic()
            if kind is TIER:
                held = {key: group_of(tier) for key, tier in self.store.tiers.items()}
                for key in self.store.relist_tiers(items, version):
                    self._by_label[key[0], names.slug(key[1])] = key
                    self._enqueue_tier(key)
                    # As when a watch tells it: the group that a tier was in has to do without it.
                    if key in held:
                        self.queue.add(held[key])
            elif kind is TIER_POOL:
                for group in self.store.relist_pools(items, version):
                    self.queue.add(group)
            else:
                for label in self.store.relist(kind.kind, kind.api_version, items, version):
                    self._enqueue_label(label)

    async def _list(self, kind: Kind, namespaces: Sequence[str | None]) -> tuple[list[JsonObject], int]:
        labels = "" if kind in {TIER, TIER_POOL, AUTOSCALER} else _SELECTOR
        pages = [await self._cluster.list_all(kind, namespace, labels=labels) for namespace in namespaces]
        return [item for items, _ in pages for item in items], min(version for _, version in pages)

    async def _tick(self) -> None:
        telemetry = self._config.telemetry
        interval = parse_duration(telemetry.interval)
        quick = _MOVING_SECONDS
        if telemetry.source == "Prometheus" and telemetry.prometheus is not None:
            # It knows nothing new before its next scrape.
            quick = max(quick, parse_duration(telemetry.prometheus.scrape_interval))
        while True:
            began = latest = time.monotonic()
            await self.read_loads()
            # Nothing has changed but the time: what failed goes on waiting for its turn.
            for tier in list(self.store.tiers.values()):
                self.queue.add(group_of(tier), urgent=False)
            self.metrics.update(self._gauges())
            while True:
                left = interval - (time.monotonic() - began)
                await asyncio.sleep(min(max(0.1, left), _MOVING_SECONDS / 2))
                if left <= _MOVING_SECONDS / 2:
                    break
                if self._moving and time.monotonic() - latest >= quick:
                    latest = time.monotonic()
                    moving = frozenset(self._moving)
                    await self.read_loads(moving)
                    for group in moving:
                        self.queue.add(group, urgent=False)

    async def read_loads(self, groups: Collection[Key] | None = None) -> None:
        """Read the load of all tiers at once, or of those of some groups."""
        now = self._clock()
        targets: dict[str, tuple[Key, str, TierTargets]] = {}
        for key, raw in list(self.store.tiers.items()):
            if groups is not None and group_of(raw) not in groups:
                continue
            try:
                tier = ServingTier.model_validate(raw)
            except ValidationError:
                continue  # its condition says what is wrong; there is nothing to read
            target = facts.telemetry_targets(tier, *self.store.belonging_to(key), self._guests(key))
            targets[target.key] = (key, tier.metadata.uid, target)
        asked = [target for _, _, target in targets.values()]
        loads = await self._loads.read(asked, now, complete=groups is None)
        for name, (key, uid, _) in targets.items():
            current = self.store.tiers.get(key)
            if current is None or current["metadata"]["uid"] != uid:
                continue  # it went while its engines were asked, and what they said is not its successor's
            state = self._state(key, uid)
            if (load := loads.get(name)) is not None:
                state.load, state.load_at = load, now

    async def _work(self) -> None:
        while True:
            key = await self.queue.get()
            began = time.monotonic()
            outcome: Literal["ok", "conflict", "error"] = "ok"
            try:
                again = await self.reconcile(key)
            except NotLeaderError:
                self.queue.failed(key)
                raise
            except ApiError as error:
                outcome = "conflict" if error.status == 409 else "error"
                pause = self.queue.failed(key, at_least=error.retry_after or 0.0)
                _log.warning("%s/%s: %s; again in %.0f s", *key, error, pause)
            except Exception:  # noqa: BLE001 - see below
                # One tier's surprise must not stop the others; it is logged whole and comes again, slower each time.
                outcome = "error"
                pause = self.queue.failed(key)
                _log.exception("%s/%s: reconciling failed; again in %.0f s", *key, pause)
            else:
                self.queue.done(key)
                if again is not None:
                    self.queue.add_after(key, again)
            self.metrics.reconciled(outcome, time.monotonic() - began)

    def _guests(self, key: Key) -> list[JsonObject]:
        """Return the engines of other tiers of a group that serve one of them."""
        return [
            pod
            for other, _ in self.store.members(key)
            if other != key
            for pod in self.store.belonging_to(other)[1]
            if facts.serves(key[1], pod)
        ]

    # -- one group ---------------------------------------------------------------------------------------------

    def _state(self, key: Key, uid: str) -> _TierState:
        state = self._states.get(key)
        if state is None or state.uid != uid:
            state = self._states[key] = _TierState(uid, watching_since=self._clock())
        return state

    async def reconcile(self, key: Key) -> float | None:
        """Look at one tier, or at all that share a TierPool with it, plan, write.

        Args:
            key: Of a tier or of a group.

        Returns:
            When to look again, seconds; None when there is nothing there.

        Raises:
            ApiError: A write failed in a way that is worth trying again later.
            NotLeaderError: This process may no longer write.
        """
        if key in self._states and key not in self.store.tiers:
            # Its children carry ownerReferences: the garbage collector removes them, also without us.
            self._states.pop(key)
            self._by_label.pop((key[0], names.slug(key[1])), None)
        members = self.store.members(key)
        if not members and key not in self.store.pools:
            self._moving.discard(key)
            self.queue.forget(key)
            return None
        keys = {tier for tier, _ in members}
        if keys & self._busy:
            return _BUSY_SECONDS
        self._busy |= keys
        try:
            return await self._reconcile(group_of(members[0][1]) if members else key, members)
        finally:
            self._busy -= keys

    async def _reconcile(self, group: Key, members: Sequence[tuple[Key, JsonObject]]) -> float:
        states = [self._state(key, raw["metadata"]["uid"]) for key, raw in members]
        seen = [
            await self._gather(key, raw, state) for (key, raw), state in zip(members, states, strict=True)
        ]
        observed = Observed(self._clock(), self._config, tuple(seen), self.store.pools.get(group))
        plan = reconcile.plan(observed)
        for state, remembered in zip(states, plan.remember, strict=True):
            state.remembered = remembered
            state.accounted_at = state.load_at
        (self._moving.add if plan.moving else self._moving.discard)(group)
        error = await self._execute(group, plan, states)
        self._count(plan)
        if error is not None:
            raise error
        return plan.recheck_after

    def _count(self, plan: Plan) -> None:
        for tier in plan.decided:
            namespace, _, name = tier.key.partition("/")
            for decision in tier.decisions:
                difference = decision.desired - decision.current
                self.metrics.decided(
                    namespace,
                    name,
                    decision.pool,
                    direction="up" if difference > 0 else "down" if difference < 0 else "hold",
                    binding=decision.binding.value,
                )

    def _gauges(self) -> Iterator[TierGauges]:
        for key, state in self._states.items():
            if key in self.store.tiers and isinstance(state.remembered, Remembered):
                age = None if state.load_at is None else self._clock() - state.load_at
                yield gauges(key, state.remembered, state.load, age)

    async def _gather(self, key: Key, raw: JsonObject, state: _TierState) -> Member:
        objects, pods = self.store.belonging_to(key)
        held = {Ref.of(obj) for obj in objects}
        strangers = [await self._cluster.get(ref) for ref in sorted(state.strangers - held, key=str)]
        state.strangers = {Ref.of(obj) for obj in strangers if obj is not None}
        elapsed = 0.0
        if state.load_at is not None and state.load_at != state.accounted_at:
            elapsed = state.load_at - (state.accounted_at or state.watching_since)
        return Member(
            raw=raw,
            objects=(*objects, *(obj for obj in strangers if obj is not None)),
            pods=pods,
            load=state.load,
            load_elapsed=max(0.0, elapsed),
            watching_since=state.watching_since,
            remembered=state.remembered,
            failures=state.failures,
            autoscalers=self.store.autoscalers(key[0]),
            load_age=0.0 if state.load_at is None else max(0.0, self._clock() - state.load_at),
        )

    async def _execute(self, key: Key, plan: Plan, states: Sequence[_TierState]) -> ApiError | None:
        """Carry out the writes in order; one that fails does not stop the others of the group."""
        failures: list[list[str]] = [[] for _ in states]
        worst: ApiError | None = None
        missing: set[Ref] = set()
        for write in plan.writes:
            if not write.needs.isdisjoint(missing):
                continue  # what it names is not there, or is somebody else's
            try:
                await self._carry_out(write)
            except ApiError as error:
                ref = Ref.of(write.body)
                if write.verb is Verb.CREATE:
                    missing.add(ref)
                if write.verb is Verb.CREATE and error.status == 409:
                    # The name is taken. The next pass reads whose object it is and says so.
                    states[write.member].strangers.add(ref)
                    self.queue.add_after(key, 0.0)
                    continue
                if error.status in {404, 409, 422}:
                    # Our picture may be old: the object went, or is another one now.
                    await self._look_again(ref, write.body)
                replaced = write.verb is Verb.LABEL and error.status == 422  # the uid is another pod's
                if error.status in {404, 409} or replaced:
                    self.queue.add_after(key, 0.2)
                    continue
                if 400 <= error.status < 500 and error.status != 429:
                    failures[write.member].append(f"{write.verb} {ref.kind} {ref.name}: {error.message}")
                worst = error
                if error.status == 429:
                    break  # the API server asks for a pause: the rest would only add to what it has too much of
        for state, failed in zip(states, failures, strict=True):
            state.failures = tuple(failed)
        for event in plan.events:
            await self._post(event)
        return worst

    async def _carry_out(self, write: Write) -> None:
        body = write.body
        if write.verb is not Verb.STATUS:
            _log.info("%s %s: %s", write.verb, Ref.of(body), write.why)
        match write.verb:
            case Verb.CREATE:
                self.store.see(await self._cluster.create(body))
            case Verb.APPLY:
                self.store.see(await self._cluster.apply(body))
            case Verb.FIELDS:
                self.store.see(await self._cluster.take_over_fields(body, body["metadata"]["managedFields"]))
            case Verb.DELETE:
                await self._cluster.delete(body)
                self.store.forget(body)
            case Verb.LABEL:
                self.store.see(await self._cluster.relabel(body))
            case Verb.STATUS if body["kind"] == TIER_POOL.kind:
                self.store.see_pool(await self._cluster.apply_status(body))
            case Verb.STATUS:
                self.store.see_tier(await self._cluster.apply_status(body))

    async def _look_again(self, ref: Ref, body: JsonObject) -> None:
        current = await self._cluster.get(ref)
        if ref.kind == TIER.kind:
            if current is None:
                self.store.forget_tier(body)
            else:
                self.store.see_tier(current)
        elif ref.kind == TIER_POOL.kind:
            if current is None:
                self.store.forget_pool(body)
            else:
                self.store.see_pool(current)
        elif current is not None:
            self.store.see(current)
        else:
            self.store.forget(body)

    async def _post(self, event: Event) -> None:
        """Post an event; one that cannot be posted is logged and lost, as everywhere in Kubernetes."""
        meta = event.regarding["metadata"]
        now = self._clock()
        body = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"name": f"{meta['name'][:200]}.{time.time_ns():x}", "namespace": meta["namespace"]},
            "eventTime": to_time(now).replace("Z", ".000000Z"),
            "reportingController": "servingtiers.io/operator",
            "reportingInstance": self._identity[:128],
            "action": event.reason,
            "reason": event.reason,
            "note": event.message[:1024],
            "type": event.type,
            "regarding": {
                "apiVersion": event.regarding["apiVersion"],
                "kind": event.regarding["kind"],
                "namespace": meta["namespace"],
                "name": meta["name"],
                "uid": meta["uid"],
            },
        }
        _log.info("%s %s/%s: %s", event.reason, meta["namespace"], meta["name"], event.message)
        try:
            await self._cluster.create(body)
        except ApiError as error:
            _log.warning("event %s was not posted: %s", event.reason, error)
