"""A fleet on a virtual clock: routers, engines, pods that start, drain and die, scrapes, and a policy that decides.

Open loop: requests come when the trace says, whatever became of those before them. Nothing is held back by the
router. Times are seconds of the run; the trace begins at 0. A policy sees Unix times, as in the operator.

The order of one instant is fixed (engines first, then what happens to pods, then scrapes, then decisions), and all
randomness comes from the seed by way of counters, so that a run is reproducible and two policies meet the same
start-ups.

Tiers of a namespace that name the same ``sharedPool`` lend each other engines: an engine's *home* is the pool that made
it, its *holder* the one whose routing label it carries, and routers heed a label some seconds after it was set. What a
lent engine still has of its last holder's requests it finishes beside the new holder's; metrics do not tell them apart,
so what it counted before it was here for a whole window is nobody's, as in the operator.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from time import process_time

import numpy as np
from numpy.typing import NDArray

from servingtiers.api.status import PoolMemory
from servingtiers.core.decisions import PoolFacts, PoolRole, TierDecision, TierObservation, acts
from servingtiers.core.sharing import Group, Relabel, SharedEngine
from servingtiers.core.signals import Load, Signal, TierLoad, Unknown, Value, Zero
from servingtiers.core.telemetry import STALE_INTERVALS, PodTarget, PoolTargets, TierTargets
from servingtiers.performance import engine_kernel as kernel
from servingtiers.performance.engine_sim import PoolConfig, make_pool, make_requests
from servingtiers.simulate import plant
from servingtiers.simulate.policies import Lender, PodReadings, Policy, PoolReadings, TierReadings
from servingtiers.simulate.scenario import Crash, PoolPlan, Scenario, TierPlan
from servingtiers.simulate.telemetry import (
    HISTOGRAM_KEYS,
    SCALARS,
    FaultKind,
    PoolRecorder,
    PoolScrape,
    RouterRecorder,
    bucket_bounds,
)

__all__ = ["EPOCH", "Fleet", "Move", "Passage", "PoolHistory", "RunResult", "TierOutcome", "run"]

EPOCH = 1_700_000_000.0
"""Unix time at which a run begins."""

_STARTS_KEPT = 16
_ROUTES = {
    "round_robin": plant.ROUND_ROBIN,
    "power_of_two": plant.POWER_OF_TWO,
    "cache_aware": plant.LEAST_LOAD,
    "consistent_hash": plant.POWER_OF_TWO,
    "random": plant.ROUND_ROBIN,
}
_FIRST_SECONDS = 600.0
"""The first replicas are those that the busiest minute of the first ten needs: a fleet that was serving before."""


@dataclass(frozen=True, slots=True)
class Move:
    """A change of a pool's replicas."""

    time: float
    tier: str
    pool: str
    before: int
    after: int
    binding: str
    reason: str


@dataclass(frozen=True, slots=True)
class Passage:
    """A change of an engine's routing label."""

    time: float
    engine: str
    home: str
    """Key of the tier whose Deployment made it."""
    holder: str | None
    """Key of the tier whose routers select it from now on; None: nobody's."""
    bound_for: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class PoolHistory:
    """One pool over the run, sampled at every scrape."""

    name: str
    time: NDArray[np.float64]
    replicas: NDArray[np.int64]
    ready: NDArray[np.int64]
    """Engines that its router sends to, borrowed ones among them."""
    borrowed: NDArray[np.int64]
    """Of these, engines of other tiers."""
    waiting: NDArray[np.int64]
    in_flight: NDArray[np.int64]
    gpus: int
    gpu_seconds: float
    """Accelerator time from node to release, start-up and drain included, until the trace ended. A lent engine's is its
    holder's, from the label on; on its way, its last holder's."""
    peak: int
    """Most replicas that held accelerators at once."""


@dataclass(frozen=True, slots=True)
class TierOutcome:
    """What became of one tier's requests after the warm-up; times are seconds of the run, NaN where it never came to it."""

    plan: TierPlan
    arrival: NDArray[np.float64]
    first: NDArray[np.float64]
    last: NDArray[np.float64]
    output: NDArray[np.int64]
    refused: NDArray[np.bool_]
    """503, or lost with its engine."""
    pools: tuple[PoolHistory, ...]


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run."""

    policy: str
    seed: int
    seconds: float
    """Seconds of the trace until which it ran."""
    warm_up: float
    """Seconds at the start that do not count."""
    grace: float
    """Seconds after it in which requests could still finish."""
    tiers: tuple[TierOutcome, ...]
    moves: tuple[Move, ...]
    passages: tuple[Passage, ...]
    decisions: int
    decide_seconds: float
    """CPU seconds spent inside the policy, all decisions together."""
    complete: bool
    """False: the run was interrupted; figures are up to then."""


@dataclass(slots=True, eq=False)
class _Pod:
    serial: int
    row: int
    created: float
    home: _Pool
    holder: _Pool | None
    """Whose routing label it carries."""
    routed: _Pool | None
    """Whose router sends to it: the label, as far as routers know."""
    payer: _Pool
    """Whose accelerator time it is."""
    on_node: float | None = None
    """When it got its node; None: it has none yet."""
    ready_at: float | None = None
    """When it will be, or became, ready."""
    ready: bool = False
    leaving: float | None = None
    """When its deletion began."""
    restarts: int = 0
    released: float | None = None
    """When it gave its accelerators back."""
    charged: float | None = None
    """Until when its accelerator time is accounted for; None: nothing is."""
    bound_for: _Pool | None = None
    labelled: float | None = None
    """When its routing label was last changed."""
    in_flight: tuple[float, int] | None = None
    """(when, requests) of the latest scrape that told."""

    @property
    def name(self) -> str:
        return f"engine-{self.serial}"

    @property
    def since(self) -> float:
        """When it became ready, or came to its holder."""
        return max(self.ready_at or 0.0, self.labelled or 0.0)


@dataclass(slots=True, eq=False)
class _Pool:
    key: str
    """Of its tier."""
    plan: PoolPlan
    mates: list[_Pool]
    """Pools that lend each other engines, this one among them; their requests, journal and state are the same arrays."""
    kernels: plant.Pools
    """Their kernel pools, in this order."""
    index: int
    """Its place among them."""
    first_request: int
    """Number of its tier's first request."""
    blocks: NDArray[np.float64]
    """KV blocks of each row."""
    state: kernel.Pool
    requests: kernel.Requests
    rows: plant.Rows
    journal: plant.Journal
    recorder: PoolRecorder
    free: list[int]
    replicas: int
    pods: list[_Pod] = field(default_factory=list)
    memory: PoolMemory = field(default_factory=PoolMemory)
    gpu_seconds: float = 0.0
    peak: int = 0
    started: list[tuple[float, int]] = field(default_factory=list)
    """(ready at, start-up seconds) of pods that became ready."""
    drift: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Row to (logarithm of its own speed, wander)."""
    history: list[tuple[float, int, int, int, int, int]] = field(default_factory=list)
    sent: int = 0
    """Entries of the pool's queue that were sent."""
    gone_totals: NDArray[np.float64] = field(default_factory=lambda: np.zeros(7))
    """Totals of pods that are gone, for readings."""

    @property
    def active(self) -> NDArray[np.int64]:
        return np.array(
            [pod.row for pod in self.pods if pod.ready or pod.leaving is not None], dtype=np.int64
        )

    @property
    def own(self) -> list[_Pod]:
        """Its ready pods, whoever holds them."""
        return [pod for pod in self.pods if pod.ready and pod.leaving is None]

    @property
    def held(self) -> list[_Pod]:
        """Ready pods that carry its routing label."""
        return [pod for mate in self.mates for pod in mate.own if pod.holder is self]

    @property
    def serving(self) -> list[_Pod]:
        """Ready pods that its router sends to."""
        return [pod for mate in self.mates for pod in mate.own if pod.routed is self]

    def set_members(self) -> None:
        """Tell the routers, its own and those it lends to, who is ready."""
        for mate in self.mates:
            members = [pod.row for pod in mate.serving]
            mate.rows.members[: len(members)] = members
            mate.rows.state[0] = len(members)


@dataclass(slots=True)
class _Tier:
    plan: TierPlan
    pools: list[_Pool]
    route: int
    ids: NDArray[np.int64]
    times: NDArray[np.float64]
    router: RouterRecorder
    refused_early: NDArray[np.bool_]
    handover: list[tuple[float, int]] = field(default_factory=list)
    """(ms, request): prompts on their way from prefill to decode, a heap."""
    unserved: int = 0
    dispatched: int = 0


_GAUGELESS = {
    *(FaultKind.DOWN, FaultKind.EMPTY, FaultKind.RENAMED, FaultKind.NAN),
    *(FaultKind.INFINITE, FaultKind.NEGATIVE, FaultKind.ABSURD),
}
"""Faults under which nobody knows what an engine has in flight."""
_READY, _GONE, _CRASH, _NODES, _LABEL, _SCRAPE, _SAMPLE, _DECIDE = range(8)
"""Kinds of events; of the same instant the lower comes first."""


class Fleet:
    """One run in progress.

    Args:
        scenario: What is simulated.
        policy: Who decides.
        seed: Seed of everything random.
    """

    def __init__(self, scenario: Scenario, policy: Policy, seed: int) -> None:
        self.scenario = scenario
        self.policy = policy
        self.seed = seed
        self.now = 0.0
        self.moves: list[Move] = []
        self.passages: list[Passage] = []
        self.decisions = 0
        self.decide_seconds = 0.0
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._order = 0
        self._serial = 0
        self._noise = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x0153])))
        self._watching_since: float | None = None
        self._groups = [self._lay_out(plans) for plans in scenario.groups()]
        made = {tier.plan.key: tier for group in self._groups for tier in group}
        self._tiers = [made[plan.key] for plan in scenario.tiers]
        for tier in self._tiers:
            for pool in tier.pools:
                for _ in range(pool.replicas):
                    self._create(pool, at_start=True)
                pool.set_members()

    # --- setting up ------------------------------------------------------------------------------------------

    def _lay_out(self, plans: Sequence[TierPlan]) -> list[_Tier]:
        """Return tiers that lend each other engines; most often it is one."""
        if len(plans) > 1:
            _check_alike(plans)
        starts = np.cumsum([0, *(len(plan.trace) for plan in plans)]).tolist()
        times = [plan.trace.arrival * 1e3 for plan in plans]
        shared = [_cached(plan) for plan in plans]
        mates = [
            self._pools(plans, [plan.pools[index] for plan in plans], starts, times, shared)
            for index in range(len(plans[0].pools))
        ]
        return [
            _Tier(
                plan=plan,
                pools=[each[place] for each in mates],
                route=_ROUTES[plan.routing],
                ids=np.arange(starts[place], starts[place + 1], dtype=np.int64),
                times=times[place],
                router=RouterRecorder(self.scenario.window, self.scenario.scrape),
                refused_early=np.zeros(len(plan.trace), dtype=bool),
            )
            for place, plan in enumerate(plans)
        ]

    def _pools(
        self,
        tiers: Sequence[TierPlan],
        plans: Sequence[PoolPlan],
        starts: Sequence[int],
        times: Sequence[NDArray[np.float64]],
        cached: Sequence[NDArray[np.int64]],
    ) -> list[_Pool]:
        """Return one pool of every tier: one plant, with a configuration and a router for each."""
        role = plans[0].role
        prompt = np.concatenate([tier.trace.prompt for tier in tiers])
        output = np.concatenate([tier.trace.output for tier in tiers])
        known = np.concatenate(cached)
        if role is PoolRole.PREFILL:
            output = np.ones_like(output)
        elif role is PoolRole.DECODE:
            known = prompt - 1
        count = len(prompt)
        # Rows for the serving, and for as many that are draining or starting beside them.
        each = [2 * max(plan.scaling.max_replicas, 1) + 4 for plan in plans]
        edges = np.cumsum([0, *each]).tolist()
        rows = edges[-1]
        widest = max(plans, key=lambda plan: plan.engine.max_num_seqs)
        state = make_pool(PoolConfig(widest.model, widest.engine, replicas=rows))
        kernels = []
        for plan in plans:
            own = make_pool(PoolConfig(plan.model, plan.engine))
            kernels.append(state._replace(config=own.config, table=own.table))
        bounds = bucket_bounds(tiers[0].max_model_len)
        width = max(len(each) for each in bounds) + 1
        padded = np.full((len(HISTOGRAM_KEYS), width), np.inf)
        for index, found in enumerate(bounds):
            padded[index, : len(found)] = found
        nan = np.full(count, np.nan)
        requests = make_requests(np.concatenate(times), prompt, output, cached=known)
        journal = plant.Journal(
            row=np.full(count, plant.UNSENT, dtype=np.int64),
            seen=np.zeros(count, dtype=np.int64),
            scheduled=nan.copy(),
            first=nan.copy(),
            last=nan.copy(),
            sent=nan.copy(),
            open=np.zeros(count + 1, dtype=np.int64),
            open_count=np.zeros(2, dtype=np.int64),
            closed=np.zeros(count + 1, dtype=np.int64),
        )
        home = np.repeat(np.arange(len(plans)), each)
        blocks = np.array([float(own.config[kernel.BLOCKS]) for own in kernels])[home]
        tau0, real0, rate = np.zeros(rows), np.zeros(rows), np.ones(rows)
        counters = np.zeros((rows, plant.COUNTERS), dtype=np.int64)
        buckets = np.zeros((rows, plant.HISTOGRAMS, width), dtype=np.int64)
        sums = np.zeros((rows, plant.HISTOGRAMS))
        itl_seen = np.zeros((rows, kernel.ITL_BINS), dtype=np.int64)
        router_seed = int(np.random.SeedSequence([self.seed, 0x40C7]).generate_state(1)[0])
        mates: list[_Pool] = []
        for place, (tier, plan) in enumerate(zip(tiers, plans, strict=True)):
            mates.append(
                _Pool(
                    key=tier.key,
                    plan=plan,
                    mates=mates,
                    kernels=tuple(kernels),
                    index=place,
                    first_request=starts[place],
                    blocks=blocks,
                    state=kernels[place],
                    requests=requests,
                    rows=plant.Rows(
                        members=np.zeros(rows, dtype=np.int64),
                        home=home,
                        state=np.array(
                            [0, 0, router_seed, 0, plan.max_queued, int(tier.shared_prefix)], dtype=np.int64
                        ),
                        tau0=tau0,
                        real0=real0,
                        rate=rate,
                        counters=counters,
                        buckets=buckets,
                        sums=sums,
                        itl_seen=itl_seen,
                        bounds=padded,
                    ),
                    journal=journal,
                    recorder=PoolRecorder(bounds, self.scenario.window, self.scenario.scrape),
                    free=list(range(edges[place + 1] - 1, edges[place] - 1, -1)),
                    replicas=self._first_replicas(tier, plan),
                )
            )
        return mates

    def _first_replicas(self, tier: TierPlan, plan: PoolPlan) -> int:
        given = tier.initial.get(plan.name)
        if given is None:
            trace, work = tier.trace, plan.belief.work
            cost = work.prompt * trace.prompt * (1.0 - (tier.prefix_hit or 0.0)) + work.output * trace.output
            if tier.shared_prefix:
                cost -= work.prompt * trace.shared
            edges = np.arange(0.0, min(_FIRST_SECONDS, max(trace.seconds, 60.0)) + 1.0, 60.0)
            given = math.ceil(float(np.histogram(trace.arrival, edges, weights=cost)[0].max()) / 60.0)
        return min(max(given, plan.scaling.min_replicas), plan.scaling.max_replicas)

    # --- the clock -------------------------------------------------------------------------------------------

    def _at(self, time: float, kind: int, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (time, kind, self._order, action))

    def run(self, progress: Callable[[float], None] | None = None) -> RunResult:
        """Run to the end of the longest trace and let what is in flight finish.

        Args:
            progress: Called with the seconds simulated so far, at every scrape.

        A KeyboardInterrupt ends the run early; the result then says that it is not complete.
        """
        scenario, end = self.scenario, self.scenario.seconds
        complete = True
        self._at(0.0, _SCRAPE, self._every_scrape)
        self._at(scenario.metric_age % self.policy.interval, _DECIDE, self._every_decision)
        if self.policy.samples is not None:
            self._at(0.0, _SAMPLE, self._every_sample)
        for crash in scenario.crashes:
            self._at(crash.time, _CRASH, partial(self._crash, crash))
        for shortage in scenario.shortages:
            self._at(shortage.end, _NODES, self._bind)
        try:
            while self._events and self._events[0][0] <= end:
                time, kind, _, action = heapq.heappop(self._events)
                self._advance(time)
                action()
                if progress is not None and kind == _SCRAPE:
                    progress(time)
            self._advance(end)
        except KeyboardInterrupt:
            complete = False
            end = self.now
        self._settle(end)
        if complete:
            self._finish(end)
        return self._result(end, complete=complete)

    def _every_scrape(self) -> None:
        self._scrape()
        self._at(self.now + self.scenario.scrape, _SCRAPE, self._every_scrape)

    def _every_sample(self) -> None:
        self._sample()
        self._at(self.now + (self.policy.samples or math.inf), _SAMPLE, self._every_sample)

    def _every_decision(self) -> None:
        self._decide()
        self._at(self.now + self.policy.interval, _DECIDE, self._every_decision)

    def _advance(self, time: float) -> None:
        """Let routers dispatch and engines run until ``time``."""
        if time <= self.now:
            return
        for tier in self._tiers:
            self._dispatch(tier, time * 1e3)
        self.now = time

    def _dispatch(self, tier: _Tier, until: float) -> None:
        first = tier.pools[0]
        delay = self.scenario.front_end_ms
        before, lost = first.sent, int(first.rows.state[3])
        first.sent = plant.dispatch(
            first.kernels,
            first.requests,
            first.rows,
            first.journal,
            tier.ids,
            tier.times,
            before,
            until,
            delay,
            tier.route,
        )
        missing = int(first.rows.state[3]) - lost
        tier.unserved += missing
        tier.dispatched += first.sent - before - missing
        if len(tier.pools) == 1:
            return
        # Prefill never waits for decode, so it may run ahead to the end of the segment.
        second = tier.pools[1]
        self._run(first, until)
        transfer = tier.plan.transfer
        closed = first.journal.closed[: first.journal.open_count[1]]
        if len(closed):
            prompts = first.requests.prompt[closed].astype(np.float64)
            moved = first.journal.last[closed] + (transfer.ms(prompts) if transfer is not None else 0.0)
            for at, request in zip(moved.tolist(), closed.tolist(), strict=True):
                heapq.heappush(tier.handover, (at, request))
        due = []
        while tier.handover and tier.handover[0][0] < until:
            due.append(heapq.heappop(tier.handover))
        if due:
            ids = np.array([request for _, request in due], dtype=np.int64)
            times = np.array([at for at, _ in due])
            lost = int(second.rows.state[3])
            plant.dispatch(
                second.kernels,
                second.requests,
                second.rows,
                second.journal,
                ids,
                times,
                0,
                until,
                0.0,
                tier.route,
            )
            missing = int(second.rows.state[3]) - lost
            tier.unserved += missing
            tier.dispatched += len(due) - missing

    def _run(self, pool: _Pool, until: float) -> None:
        active = pool.active
        plant.advance_all(pool.state, pool.requests, pool.rows, active, until)
        plant.observe(pool.state, pool.requests, pool.rows, pool.journal, active)

    def _look(self) -> None:
        """Bring every engine up to now and count what it did."""
        until = self.now * 1e3
        for tier in self._tiers:
            # A prefill pool was brought here by the dispatch, and its hand-overs must not be forgotten.
            for pool in tier.pools[-1:] if len(tier.pools) > 1 else tier.pools:
                self._run(pool, until)

    # --- pods ------------------------------------------------------------------------------------------------

    def _create(self, pool: _Pool, *, at_start: bool = False) -> None:
        if not pool.free:
            raise RuntimeError(
                f"pool {pool.plan.name} has more pods at once than twice its maxReplicas: lower the drain timeout"
            )
        pod = _Pod(self._serial, pool.free.pop(), self.now, pool, pool, pool, pool)
        self._serial += 1
        pool.pods.append(pod)
        if at_start:
            pod.on_node = pod.ready_at = self.now
            pod.ready = True
            self._begin(pool, pod)
            pool.peak = max(pool.peak, len(pool.pods))
        else:
            self._bind_one(pool, pod)

    def _begin(self, pool: _Pool, pod: _Pod) -> None:
        """Give the pod's row a fresh engine."""
        row, rows, noise = pod.row, pool.rows, self.scenario.noise
        own = noise.replica * float(
            np.random.Generator(
                np.random.PCG64(np.random.SeedSequence([self.seed, 0x59EE, pod.serial]))
            ).standard_normal()
        )
        pool.drift[row] = (own, 0.0)
        rows.tau0[row] = rows.real0[row] = self.now * 1e3
        rows.rate[row] = math.exp(-own) / noise.bias
        rows.counters[row] = 0
        rows.buckets[row] = 0
        rows.sums[row] = 0.0
        rows.itl_seen[row] = 0
        kernel.reset(pool.state, row, self.now * 1e3)

    def _held(self) -> int:
        """Accelerators in use by all tiers."""
        return sum(
            pool.plan.gpus
            for tier in self._tiers
            for pool in tier.pools
            for pod in pool.pods
            if pod.on_node is not None
        )

    def _bind_one(self, pool: _Pool, pod: _Pod) -> None:
        scenario = self.scenario
        if any(shortage.start <= self.now < shortage.end for shortage in scenario.shortages):
            return
        if scenario.accelerators is not None and self._held() + pool.plan.gpus > scenario.accelerators:
            return
        pod.on_node = self.now + scenario.scheduling
        pool.peak = max(pool.peak, sum(each.on_node is not None for each in pool.pods))
        pod.ready_at = pod.on_node + scenario.start_up.draw(self.seed, pod.serial)
        self._at(pod.ready_at, _READY, partial(self._became_ready, pool, pod, pod.restarts))

    def _bind(self) -> None:
        """Give waiting pods the accelerators there are, oldest first."""
        waiting = [
            (pod.serial, pool, pod)
            for tier in self._tiers
            for pool in tier.pools
            for pod in pool.pods
            if pod.on_node is None and pod.leaving is None
        ]
        for _, pool, pod in sorted(waiting, key=lambda each: each[0]):
            self._bind_one(pool, pod)

    def _became_ready(self, pool: _Pool, pod: _Pod, restarts: int) -> None:
        if pod.leaving is not None or pod not in pool.pods or pod.restarts != restarts:
            return
        pod.ready = True
        if not pod.restarts:
            pool.started.append((self.now, max(0, round(self.now - pod.created))))
        self._begin(pool, pod)
        pool.set_members()

    def _delete(self, tier: _Tier, pool: _Pool, count: int) -> None:
        """Take ``count`` pods away in the order of the ReplicaSet controller: without node, not ready, newest."""
        staying = [pod for pod in pool.pods if pod.leaving is None]

        def order(pod: _Pod) -> tuple[bool, bool, float, int]:
            return (pod.on_node is not None, pod.ready, -(pod.ready_at or math.inf), -pod.serial)

        for pod in sorted(staying, key=order)[:count]:
            pod.leaving = self.now
            if not pod.ready:
                self._gone(pool, pod)
        pool.set_members()
        self._check_drained(tier, pool)

    def _check_drained(self, tier: _Tier, pool: _Pool) -> None:
        """Let go of draining engines that are empty, and of those whose grace is over."""
        for pod in [each for each in pool.pods if each.leaving is not None and each.ready]:
            ints = pool.state.ints[pod.row]
            left = pod.leaving if pod.leaving is not None else self.now
            if ints[kernel.INJECTED] == ints[kernel.FINISHED]:
                pod.ready = False
                # Its clock stands where its last step ended; it is looked at later than that.
                row, rows = pod.row, pool.rows
                idle = (
                    rows.real0[row] + (pool.state.reals[row, kernel.CLOCK] - rows.tau0[row]) / rows.rate[row]
                )
                pod.released = max(left, float(idle) / 1e3) + self.scenario.termination
                self._at(max(self.now, pod.released), _GONE, partial(self._gone, pool, pod))
            elif self.now >= left + tier.plan.drain_seconds:
                plant.fail_row(pool.state, pool.rows, pool.journal, pod.row, self.now * 1e3)
                pod.ready = False
                self._gone(pool, pod)

    def _gone(self, pool: _Pool, pod: _Pod) -> None:
        if pod not in pool.pods:
            return
        self._charge(pod, self.now if pod.released is None else pod.released)
        pool.gone_totals += self._totals(pool, pod.row)
        pool.pods.remove(pod)
        pool.free.append(pod.row)
        pool.rows.counters[pod.row] = 0
        pool.rows.buckets[pod.row] = 0
        pool.rows.sums[pod.row] = 0.0
        pool.set_members()
        self._bind()

    def _charge(self, pod: _Pod, end: float) -> None:
        if pod.on_node is not None:
            since = max(pod.on_node if pod.charged is None else pod.charged, self.scenario.warm_up)
            pod.payer.gpu_seconds += max(end - since, 0.0) * pod.home.plan.gpus
            pod.charged = end

    def _crash(self, crash: Crash) -> None:
        for tier in self._tiers:
            if crash.tier not in {"", tier.plan.key}:
                continue
            for pool in tier.pools:
                if crash.pool not in {"", pool.plan.name}:
                    continue
                serving = pool.own
                if not serving:
                    continue
                self._look()
                pod = serving[0]
                plant.fail_row(pool.state, pool.rows, pool.journal, pod.row, self.now * 1e3)
                pod.ready = False
                pod.restarts += 1
                pool.gone_totals += self._totals(pool, pod.row)
                pool.rows.counters[pod.row] = 0
                pool.rows.buckets[pod.row] = 0
                pool.rows.sums[pod.row] = 0.0
                pod.ready_at = self.now + self.scenario.start_up.draw(self.seed, pod.serial)
                self._at(pod.ready_at, _READY, partial(self._became_ready, pool, pod, pod.restarts))
                pool.set_members()
                return

    # --- metrics ---------------------------------------------------------------------------------------------

    def _scrape(self) -> None:
        self._look()
        faults = self.scenario.metric_faults
        for tier in self._tiers:
            paired = len(tier.pools) > 1
            for pool in tier.pools:
                self._check_drained(tier, pool)
                serving = pool.serving
                rows = [pod.row for pod in serving]
                ints, counters = pool.state.ints, pool.rows.counters
                waiting = int(ints[rows, kernel.WAITING].sum())
                running = int(ints[rows, kernel.RUNNING].sum())
                borrowed = sum(pod.home is not pool for pod in serving)
                pool.history.append(
                    (self.now, pool.replicas, len(serving), borrowed, waiting, waiting + running)
                )
                serial = np.full(len(ints), -1, dtype=np.int64)
                serial[[pod.row for pod in pool.held]] = [pod.serial for pod in pool.held]
                scalars = np.column_stack(
                    [
                        ints[:, kernel.RUNNING],
                        ints[:, kernel.WAITING],
                        1.0 - ints[:, kernel.BLOCKS_FREE] / pool.blocks,
                        counters[:, plant.DONE],
                        counters[:, plant.PROMPT],
                        counters[:, plant.ITL_COUNT] + counters[:, plant.FIRST],
                        counters[:, plant.PROMPT],
                        counters[:, plant.HIT],
                        ints[:, kernel.PREEMPTIONS],
                        counters[:, plant.REFUSED],
                    ]
                ).astype(np.float64)
                assert scalars.shape[1] == len(SCALARS)  # noqa: S101 - the two lists are one
                pool.recorder.add(
                    PoolScrape(
                        EPOCH + self.now, serial, scalars, pool.rows.buckets.copy(), pool.rows.sums.copy()
                    ),
                    faults,
                    self.now,
                )
            tier.router.add(self.now, tier.dispatched, tier.unserved, paired=paired, faults=faults)
        if len(self._groups) < len(self._tiers):
            self._count_in_flight()
        self._wander()

    def _count_in_flight(self) -> None:
        """Note what every engine of a group has in flight, where its gauges can be read."""
        held = {fault.kind for fault in self.scenario.metric_faults if fault.active(self.now)}
        if held & _GAUGELESS:
            return
        for members in self._groups:
            for pool in (pool for tier in members for pool in tier.pools if len(members) > 1):
                ints = pool.state.ints
                for pod in pool.own:
                    count = int(ints[pod.row, kernel.INJECTED] - ints[pod.row, kernel.FINISHED])
                    pod.in_flight = self.now, count

    def _wander(self) -> None:
        """Let every engine's speed wander a little."""
        noise = self.scenario.noise
        keep = math.exp(-self.scenario.scrape / 300.0)
        kick = noise.drift * math.sqrt(1.0 - keep * keep)
        for tier in self._tiers:
            for pool in tier.pools:
                for pod in pool.pods:
                    if not pod.ready:
                        continue
                    own, wander = pool.drift[pod.row]
                    wander = keep * wander + kick * float(self._noise.standard_normal())
                    pool.drift[pod.row] = (own, wander)
                    plant.rebase(pool.rows, pod.row, self.now * 1e3, math.exp(-own - wander) / noise.bias)

    def _totals(self, pool: _Pool, row: int) -> NDArray[np.float64]:
        counters, sums = pool.rows.counters[row], pool.rows.sums[row]
        return np.array(
            [
                counters[plant.DONE],
                sums[plant.PROMPT_LENGTH],
                sums[plant.OUTPUT_LENGTH],
                sums[plant.TTFT],
                counters[plant.FIRST],
                sums[plant.ITL],
                counters[plant.ITL_COUNT],
            ],
            dtype=np.float64,
        )

    def _sample(self) -> None:
        self._look()
        held = {fault.kind for fault in self.scenario.metric_faults if fault.active(self.now)}
        blind = bool(held - {FaultKind.RESET, FaultKind.NO_HISTORY, FaultKind.TWICE, FaultKind.PARTIAL})
        readings = []
        for tier in self._tiers:
            pools = []
            for pool in tier.pools:
                self._check_drained(tier, pool)
                serving = pool.serving
                rows = [pod.row for pod in serving]
                ints = pool.state.ints[rows]
                config = pool.state.config
                used = (config[kernel.BLOCKS] - ints[:, kernel.BLOCKS_FREE]) * config[kernel.BLOCK]
                totals = pool.gone_totals + sum(
                    (self._totals(pool, pod.row) for pod in pool.pods), np.zeros(7)
                )
                pools.append(
                    PoolReadings(
                        name=pool.plan.name,
                        pods=None
                        if blind
                        else PodReadings(
                            serial=np.array([pod.serial for pod in serving], dtype=np.int64),
                            running=ints[:, kernel.RUNNING].astype(np.float64),
                            waiting=ints[:, kernel.WAITING].astype(np.float64),
                            kv_tokens=used.astype(np.float64),
                            kv_capacity=float(config[kernel.BLOCKS] * config[kernel.BLOCK]),
                            waiting_tokens=ints[:, kernel.WAITING_TOKENS].astype(np.float64),
                        ),
                        empty=FaultKind.EMPTY in held,
                        replicas=pool.replicas,
                        ready=len(serving),
                        starting=sum(not pod.ready and pod.leaving is None for pod in pool.pods),
                        done=int(totals[0]),
                        prompt_tokens=float(totals[1]),
                        output_tokens=float(totals[2]),
                        ttft_sum=float(totals[3]),
                        ttft_count=int(totals[4]),
                        itl_sum=float(totals[5]),
                        itl_count=int(totals[6]),
                    )
                )
            arrivals = tier.pools[0].sent
            readings.append(
                TierReadings(tier.plan.key, EPOCH + self.now, arrivals, tier.unserved, tuple(pools))
            )
        self.policy.sample(tuple(readings))

    # --- deciding --------------------------------------------------------------------------------------------

    def observation(self, tier: _Tier) -> TierObservation:
        """Return what a policy is told of a tier now."""
        now = EPOCH + self.now
        load = self._load(tier, now) if self.policy.reads_load else TierLoad()
        facts = tuple(self._facts(pool, load.pools.get(pool.plan.name)) for pool in tier.pools)
        return TierObservation(
            key=tier.plan.key,
            spec=tier.plan.spec,
            targets=tier.plan.targets,
            pools=facts,
            load=load,
            memory={pool.plan.name: pool.memory for pool in tier.pools},
            watching_since=self._watching_since,
        )

    def _load(self, tier: _Tier, now: float) -> TierLoad:
        targets = []
        rows = []
        for pool in tier.pools:
            held = pool.held
            pods = tuple(
                PodTarget(
                    pod.name,
                    "10.0.0.1",
                    8000,
                    EPOCH + (pod.ready_at or 0.0),
                    None if pod.labelled is None else EPOCH + pod.labelled,
                )
                for pod in held
            )
            # Less what is lent, and what is borrowed.
            desired = max(0, pool.replicas + len(held) - len(pool.own))
            targets.append(PoolTargets(pool.plan.name, pool.plan.role, desired, pods))
            rows.append([pod.row for pod in held])
        namespace, _, name = tier.plan.key.rpartition("/")
        whole = TierTargets(
            namespace or "default", name, tuple(targets), (PodTarget("router-0", "10.0.0.2", 29000),)
        )
        faults = {fault.kind for fault in self.scenario.metric_faults if fault.active(self.now)}
        router = tier.router.load(whole, self.now, faults)
        loads = {
            pool.plan.name: pool.recorder.load(target, row, now=now, routers=router, held=faults)
            for pool, target, row in zip(tier.pools, targets, rows, strict=True)
        }
        return TierLoad(loads, router)

    def _facts(self, pool: _Pool, load: Load | None) -> PoolFacts:
        own, held = pool.own, pool.held
        unschedulable = sum(pod.on_node is None and pod.leaving is None for pod in pool.pods)
        staying = sum(pod.leaving is None for pod in pool.pods)
        starts = [seconds for _, seconds in pool.started[-_STARTS_KEPT:]] or pool.memory.startup_seconds
        since = [pod.since for pod in held if pod.ready_at is not None]
        borrowed = [pod for pod in held if pod.home is not pool]
        return PoolFacts(
            name=pool.plan.name,
            role=pool.plan.role,
            scaling=pool.plan.scaling,
            replicas=pool.replicas,
            ready=len(own),
            pending=max(staying - len(own) - unschedulable, 0),
            unschedulable=unschedulable,
            terminating=sum(pod.leaving is not None for pod in pool.pods),
            max_num_seqs=pool.plan.engine.max_num_seqs,
            startup_seconds=median(starts) if starts else None,
            settled_seconds=max(0.0, self.now - max(since)) if since else None,
            curve=pool.plan.operator.curve(load),
            lent=sum(pod.holder is not pool for pod in own),
            borrowed=len(borrowed),
            borrowed_share=_share_of(pool, borrowed, load),
        )

    def _decide(self) -> None:
        for outage in self.scenario.outages:
            if outage.start <= self.now < outage.end:
                self._watching_since = EPOCH + outage.end
                return
        self._look()
        observations = tuple(self.observation(tier) for tier in self._tiers)
        begin = process_time()
        decided = self.policy.decide(observations, EPOCH + self.now)
        relabels: list[Relabel] = []
        if isinstance(self.policy, Lender) and self.policy.lends:
            by_tier = {each.key: each for each in observations}
            for members in self._groups:
                keys = [tier.plan.key for tier in members]
                mine = tuple(each for each in decided if each.key in keys)
                if len(members) == 1 or len(mine) < len(members):
                    continue
                group = self._group([by_tier[key] for key in keys], members)
                found = self.policy.lend(group, mine, EPOCH + self.now)
                changed = {each.key: each for each in found.tiers}
                decided = tuple(changed.get(each.key, each) for each in decided)
                relabels.extend(found.relabels)
        self.decide_seconds += process_time() - begin
        self.decisions += 1
        for change in relabels:
            self._relabel(change)
        by_key = {decision.key: decision for decision in decided}
        for tier in self._tiers:
            decision = by_key.get(tier.plan.key)
            if decision is not None:
                self._carry_out(tier, decision)

    def _group(self, observations: Sequence[TierObservation], members: Sequence[_Tier]) -> Group:
        """Return what a policy is told of tiers that lend each other engines."""
        limits = [
            self.scenario.pool_accelerators[tier.plan.shared_pool]
            for tier in members
            if tier.plan.shared_pool in self.scenario.pool_accelerators
        ]
        engines = [
            SharedEngine(
                uid=f"uid-{pod.serial}",
                name=f"engine-{pod.serial}",
                home=pod.home.key,
                holder=None if pod.holder is None else pod.holder.key,
                bound_for=None if pod.bound_for is None else pod.bound_for.key,
                ready=pod.ready,
                leaving=pod.leaving is not None,
                in_flight=self._in_flight(pod),
                held_seconds=None if pod.labelled is None else self.now - pod.labelled,
            )
            for tier in members
            for pool in tier.pools
            for pod in pool.pods
        ]
        return Group(tuple(observations), tuple(engines), min(limits, default=None))

    def _in_flight(self, pod: _Pod) -> Signal:
        if pod.in_flight is None:
            return Unknown("no sample yet")
        age = self.now - pod.in_flight[0]
        if age > STALE_INTERVALS * self.scenario.scrape:
            return Unknown(f"its newest sample is {age:.0f} s old")
        return Value(float(pod.in_flight[1]), age) if pod.in_flight[1] else Zero(age)

    def _relabel(self, change: Relabel) -> None:
        pools = {pool.key: pool for tier in self._tiers for pool in tier.pools}
        pod = next(
            (each for pool in pools.values() for each in pool.pods if f"uid-{each.serial}" == change.uid),
            None,
        )
        if pod is None or pod.leaving is not None:
            return
        holder = None if change.holder is None else pools[change.holder]
        bound_for = None if change.bound_for is None else pools[change.bound_for]
        plans = {tier.plan.key: tier.plan.spec for tier in self._tiers}
        party = {pod.home.key, change.holder, change.bound_for} - {None}
        if not all(acts(plans[key].scaling.mode, suspended=plans[key].suspend) for key in party if key):
            return
        self.passages.append(
            Passage(
                self.now, f"engine-{pod.serial}", pod.home.key, change.holder, change.bound_for, change.reason
            )
        )
        pod.holder, pod.bound_for, pod.labelled = holder, bound_for, self.now
        if holder is not None:
            self._charge(pod, self.now)
            pod.payer = holder
        self._at(self.now + self.scenario.relabel, _LABEL, partial(self._heeded, pod, holder))

    def _heeded(self, pod: _Pod, holder: _Pool | None) -> None:
        """Routers have seen the label."""
        pod.routed = holder
        pod.home.set_members()

    def _carry_out(self, tier: _Tier, decided: TierDecision) -> None:
        pools = {pool.plan.name: pool for pool in tier.pools}
        for name, memory in decided.memory.items():
            # As text and back, as the tier's status keeps it.
            pools[name].memory = PoolMemory.model_validate_json(memory.model_dump_json())
        if not acts(tier.plan.spec.scaling.mode, suspended=tier.plan.spec.suspend):
            return
        for decision in decided.decisions:
            pool = pools[decision.pool]
            change = decision.desired - pool.replicas
            if change == 0:
                continue
            self.moves.append(
                Move(
                    self.now,
                    tier.plan.key,
                    decision.pool,
                    pool.replicas,
                    decision.desired,
                    str(decision.binding),
                    decision.reason,
                )
            )
            pool.replicas = decision.desired
            if change > 0:
                for _ in range(change):
                    self._create(pool)
            else:
                self._delete(tier, pool, -change)
        self._bind()

    # --- the end ---------------------------------------------------------------------------------------------

    def _settle(self, end: float) -> None:
        """Charge the pods that are still there."""
        for tier in self._tiers:
            for pool in tier.pools:
                for pod in pool.pods:
                    self._charge(pod, end if pod.released is None else min(pod.released, end))

    def _finish(self, end: float) -> None:
        """Let requests in flight finish on the engines there are."""
        self.now = end
        stop = end + self.scenario.grace
        time = end
        while time < stop and any(
            pool.journal.open_count[0] or tier.handover for tier in self._tiers for pool in tier.pools
        ):
            time = min(time + 15.0, stop)
            self._advance(time)
            self._look()

    def _result(self, end: float, *, complete: bool) -> RunResult:
        outcomes = []
        for tier in self._tiers:
            first, last = tier.pools[0], tier.pools[-1]
            arrived = tier.plan.trace.arrival >= self.scenario.warm_up
            if not complete:
                arrived &= tier.plan.trace.arrival < end
            mine = slice(first.first_request, first.first_request + len(tier.plan.trace))
            refused = first.journal.row[mine] < plant.UNSENT
            if last is not first:
                refused |= last.journal.row[mine] < plant.UNSENT
            histories = []
            for pool in tier.pools:
                columns = np.array(pool.history, dtype=np.float64).reshape(-1, 6).T
                replicas, ready, borrowed, waiting, in_flight = columns[1:].astype(np.int64)
                histories.append(
                    PoolHistory(
                        name=pool.plan.name,
                        time=columns[0],
                        replicas=replicas,
                        ready=ready,
                        borrowed=borrowed,
                        waiting=waiting,
                        in_flight=in_flight,
                        gpus=pool.plan.gpus,
                        gpu_seconds=pool.gpu_seconds,
                        peak=pool.peak,
                    )
                )
            outcomes.append(
                TierOutcome(
                    plan=tier.plan,
                    arrival=tier.plan.trace.arrival[arrived],
                    first=last.journal.first[mine][arrived] / 1e3,
                    last=last.journal.last[mine][arrived] / 1e3,
                    output=tier.plan.trace.output[arrived],
                    refused=refused[arrived],
                    pools=tuple(histories),
                )
            )
        return RunResult(
            policy=self.policy.name,
            seed=self.seed,
            seconds=end,
            warm_up=self.scenario.warm_up,
            grace=self.scenario.grace,
            tiers=tuple(outcomes),
            moves=tuple(self.moves),
            passages=tuple(self.passages),
            decisions=self.decisions,
            decide_seconds=self.decide_seconds,
            complete=complete,
        )


def _cached(plan: TierPlan) -> NDArray[np.int64]:
    """Return the prompt tokens of each request that a prefix cache holds."""
    if plan.shared_prefix:
        return plan.trace.shared
    if plan.prefix_hit:
        found: NDArray[np.int64] = np.floor(plan.trace.prompt * plan.prefix_hit).astype(np.int64)
        return found
    return np.zeros(len(plan.trace), dtype=np.int64)


def _check_alike(plans: Sequence[TierPlan]) -> None:
    """Engines that are lent must be able to serve either tier's requests.

    Raises:
        ValueError: Two tiers differ in more than batch and step budget.
    """
    first = plans[0]
    for plan in plans[1:]:
        if len(plan.pools) != 1 or len(first.pools) != 1:
            raise ValueError("tiers of a sharedPool have one aggregated pool each: remove disaggregation")
        for what, mine, theirs in (
            ("model", plan.spec.model.name, first.spec.model.name),
            ("maxModelLen", plan.max_model_len, first.max_model_len),
            ("tensorParallel", plan.pools[0].gpus, first.pools[0].gpus),
        ):
            if mine != theirs:
                raise ValueError(
                    f"{plan.key} and {first.key} share a pool and differ in {what} ({mine}, {theirs}): "
                    "only batch and step budget may differ"
                )


def _share_of(pool: _Pool, borrowed: Sequence[_Pod], load: Load | None) -> float:
    """Return what borrowed engines carry of what the pool's own do, at this pool's objectives."""
    own = pool.plan.operator.rps(load) if borrowed else None
    if not own:
        return 1.0
    found = []
    for pod in borrowed:
        theirs = pod.home.plan.operator.engine
        engine = replace(
            pool.plan.operator.engine,
            max_num_seqs=theirs.max_num_seqs,
            max_num_batched_tokens=theirs.max_num_batched_tokens,
        )
        carried = replace(pool.plan.operator, engine=engine).rps(load)
        found.append((carried or 0.0) / own)
    return sum(found) / len(found)


def run(
    scenario: Scenario, policy: Policy, seed: int, progress: Callable[[float], None] | None = None
) -> RunResult:
    """Simulate a scenario under a policy.

    Args:
        scenario: What is simulated.
        policy: Who decides; it is used for this run only where it keeps state.
        seed: Seed of everything random.
        progress: Called with the seconds simulated so far.
    """
    return Fleet(scenario, policy, seed).run(progress)
