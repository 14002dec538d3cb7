"""How many replicas: work that arrives and may arrive, over what an engine does, with the headroom that misses bought.

Where the performance model knows a pool, its replicas are those for the peak of the work until an engine ordered now
could serve (:mod:`~servingtiers.policy.forecast`), at the capacity that traffic has taught
(:mod:`~servingtiers.policy.learning`), times the headroom of the error budget (:mod:`~servingtiers.policy.budget`); a
backlog and full batches call for more. Where it does not, batches, queues and percentiles steer. What it promises:

* Growing needs little evidence, shrinking needs all of it: a signal that is Unknown never shrinks anything, and a
  gap restarts the hold that precedes a scale-down.
* Replicas that are on their way count as supply. Pods that cannot be scheduled are neither supply nor a reason to stop
  deciding.
* Before a scale-down, fewer replicas must have carried the load, with room to spare, for a whole hold; what had to be
  taken back stays (:mod:`~servingtiers.policy.flapping`).
* Where one request alone already misses its objective, more replicas are futile and none are added.
* The pools of a disaggregated tier are decided together, and serve or sleep together.

Everything remembered is in :class:`~servingtiers.api.status.PoolMemory`, which lives in the tier's status: a
restart at worst restarts a hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

from servingtiers.api.base import parse_duration
from servingtiers.api.spec import Tier
from servingtiers.api.status import PoolMemory
from servingtiers.core.decisions import (
    Binding,
    Decision,
    PoolFacts,
    PoolRole,
    TierDecision,
    TierObservation,
    acts,
)
from servingtiers.core.signals import (
    Coverage,
    Distribution,
    Histogram,
    Load,
    Signal,
    Unknown,
    Value,
    Zero,
    number,
)
from servingtiers.core.times import ago, from_time, in_words, to_time
from servingtiers.policy import flapping
from servingtiers.policy.budget import FIRST
from servingtiers.policy.forecast import BUCKET_SECONDS, Forecast, ahead
from servingtiers.policy.learning import (
    Lesson,
    Missed,
    budget_of,
    history_of,
    learn,
    of_these,
    rps_of,
    slowness_of,
)

__all__ = ["QUANTILES", "TierManners", "decide", "hold_seconds", "manners"]

QUANTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99, "p999": 0.999}
"""Percentile names of the API to quantiles."""

_SHRINK = 0.9
"""One replica fewer must stay below this share of what would call for another: up and down never touch."""
_LATENCY_SHRINK = 0.8
"""Latency must be inside this share of its target before replicas go."""
_LEAST_LATE = 3
"""Fewer misses than this in a window are outliers: they are counted for the SLO, but start no engine."""
_ENOUGH_REQUESTS = 10
"""Requests in a window from which on their mean means something."""
_PACE_SECONDS = 60.0
"""At most one replica or a fifth of the pool leaves in this time."""
_KEPT_SLACK = 1.25
"""A pool within this factor of what it keeps is left as it is."""
_AHEAD = 1.2
"""Start-ups of the slower kind over the median: how far the forecast looks, besides the readings' own delay."""
_READING_SECONDS = 30.0
"""From a change of the load until a decision knows of it."""
_ALONE, _ALONE_PHASE = 0.35, 0.1
"""Capacity that a single engine wastes for want of neighbours to lean on; of ``n`` engines each wastes this / n. Prefill and
decode engines have hardly any use for them: of the one it is known what it carries alone, what ends the other's rate is its
own batch. But one that is alone may be the slowest of those that were learned from."""
_TOLERANCE = 0.05
"""A need that exceeds the pool by less starts no engine: load that wavers about a whole number must not flap."""
_HYSTERESIS = 1.03
"""With this much more load, fewer replicas must suffice, too."""
_FILLED, _REFILLED = 0.7, 0.83
"""Share of slots or KV cache from which on engines are as good as full where requests wait, and the share that those may
be filled to that answer it: what a full batch calls for is no more than the next step up."""
_LEAST_DRAIN = 30.0
"""Time in which a backlog that misses objectives is worked off, seconds; longer where engines start more slowly."""
_ECHO_SECONDS = 60.0
"""For so long after a window that tells of fewer engines, requests still end that had waited for them."""
_ROOMY = 0.4
"""Engines with no more than this share of what they carry miss for bursts, not for want of those that are starting."""
_OVERDUE, _OVERDUE_SECONDS = 3.0, 600.0
"""Start-ups, and seconds at least, after which an engine that was ordered is not waited for any more."""
_UNSEEN_SECONDS = 60.0
"""Arrivals that are not known for so long are worth a forecast: a scrape that is missed, or a restart, is not."""
_MOVE_SECONDS = 60.0
"""From a change of the load until an engine that was lent for it serves, at most."""
_RECURS = 2
"""A load that rushed so often within an hour does it again; one burst is over when it is over."""
_FRESH_SECONDS = 30.0
"""Engines that have served for less are not yet at their pace."""
_CROWDED_SECONDS = 0.2
"""With a longer mean time in the queue the pace of engines tells of their queue, not of their speed."""
_REGRET_SECONDS = 60.0
"""For so long at most after a scale-down what was given up is not taken back: readings still tell of the larger pool."""
_FULL_BATCH = 0.8
"""Share of a batch from which on requests that wait say that the engine takes no more."""
_FULL_CACHE = 0.9
"""The same of the KV cache."""
_STEADY_SHARE = 0.8
"""A window tells of full engines where its mean batch was at least this share of the batch of now."""
_QUEUED_SECONDS = 1.0
"""A longer mean time in the queue says that requests of the window were not alone."""
_WAITED_FOR = frozenset({"ttft", "e2e"})
"""Metrics that contain the wait for a place in the batch."""
_DEFAULT_IDLE_SECONDS = 900.0
_UNKNOWN_STARTUP_HOLD = 300.0
_NO_LIMIT = 1_000_000
_ASSUMED_STARTUP = 120.0
"""Start-up of an engine until one was seen, seconds."""


@dataclass(frozen=True, slots=True)
class TierManners:
    """How near to its limits a tier runs."""

    utilization: float
    """Share of a replica's batch and capacity that is planned to be used; the rest is headroom for the tail."""
    waiting_per_replica: int
    """Waiting requests per replica that call for another replica."""
    drain_seconds: float
    """In what time a backlog shall be worked off."""


_MANNERS = {
    Tier.LATENCY: TierManners(utilization=0.70, waiting_per_replica=2, drain_seconds=30.0),
    Tier.BALANCED: TierManners(utilization=0.80, waiting_per_replica=8, drain_seconds=120.0),
    Tier.THROUGHPUT: TierManners(utilization=0.95, waiting_per_replica=128, drain_seconds=600.0),
}


def manners(tier: Tier) -> TierManners:
    """Return how near to its limits a tier runs."""
    return _MANNERS[tier]


def hold_seconds(pool: PoolFacts, memory: PoolMemory) -> tuple[float, str]:
    """Return for how long fewer replicas must suffice before any go, seconds, and why so long.

    What is taken away must be worth bringing back: the hold is 1.25 × the median start-up time of an engine
    within 60–300 s, unless the user sets it.
    """
    if pool.scaling.scale_down_hold is not None:
        return parse_duration(pool.scaling.scale_down_hold), "scaleDownHold"
    start = _startup(pool, memory)
    if start is None:
        return _UNKNOWN_STARTUP_HOLD, "no start-up of an engine seen yet"
    return min(
        max(1.25 * start, 60.0), 300.0
    ), f"1.25 × the median start-up of {in_words(start)}, within 60–300 s"


def decide(observations: tuple[TierObservation, ...], now: float) -> tuple[TierDecision, ...]:
    """Decide the replicas of every pool of the given tiers.

    Args:
        observations: The tiers of one reconcile key. They are decided independently of each other.
        now: Unix time, seconds.

    Returns:
        One decision per tier, in order, with what to remember.
    """
    return tuple(_decide_tier(observation, now) for observation in observations)


def _as_served(pool: PoolFacts) -> PoolFacts:
    """Return a pool as it serves: with the engines that it holds, whoever owns them."""
    more = pool.borrowed - pool.lent
    if not more:
        return pool
    bounds = {
        "min_replicas": max(0, pool.scaling.min_replicas + more),
        "max_replicas": max(0, pool.scaling.max_replicas + more),
    }
    return replace(
        pool,
        scaling=pool.scaling.model_copy(update=bounds),
        replicas=max(0, pool.replicas + more),
        ready=max(0, pool.ready + more),
        lent=0,
        borrowed=0,
    )


@dataclass(frozen=True, slots=True)
class _Need:
    """Replicas that one signal calls for."""

    replicas: int
    binding: Binding
    reason: str
    would_change: str


@dataclass(frozen=True, slots=True)
class _Latency:
    """How one objective stands in the window."""

    metric: str
    percentile: str
    target: float
    """Seconds that this pool may take; below the objective where another engine takes its part."""
    observed: float | None
    """Estimate of the percentile, seconds; None: no requests, or unknown."""
    late: float
    """Requests of the window that may have missed."""
    total: float
    """Requests of the window."""
    likely: float
    """Requests of the window that have missed, if latencies lie evenly inside their buckets."""
    unknown: str | None
    """Why the percentile is unknown or incomplete; None: it is complete."""

    @property
    def name(self) -> str:
        return f"{self.percentile.replace('p999', 'p99.9')} {self.metric.upper()}"

    @property
    def missed(self) -> bool:
        return self.observed is not None and self.observed > self.target and self.late >= _LEAST_LATE

    @property
    def roomy(self) -> bool:
        return self.observed is None or self.observed <= _LATENCY_SHRINK * self.target


@dataclass(frozen=True, slots=True)
class _Capacity:
    """What one replica carries."""

    rps: float
    source: str


@dataclass(frozen=True, slots=True)
class _View:
    """One pool with its signals, as the rules need them."""

    pool: PoolFacts
    memory: PoolMemory
    load: Load
    manners: TierManners
    arrivals: Signal
    """Requests per second over the window."""
    arriving: Signal
    """The same at its end."""
    latencies: tuple[_Latency, ...]
    now: float
    """Unix time, seconds."""
    feasible: bool = True
    """False: even one request alone misses an objective."""

    @property
    def serving(self) -> int:
        """Engines that the pool's routers select."""
        return max(0, self.pool.ready - self.pool.lent + self.pool.borrowed)

    @property
    def supply(self) -> int:
        """Replicas that serve or are about to; what cannot be scheduled is none."""
        return max(self.pool.ready, self.pool.replicas - self.pool.unschedulable)

    @property
    def coming(self) -> int:
        """Replicas that can be scheduled, but do not serve yet."""
        return max(0, self.supply - self.pool.ready)

    @property
    def waiting_limit(self) -> int:
        given = self.pool.scaling.max_waiting_per_replica
        return given if given is not None else self.manners.waiting_per_replica

    def settled(self, seconds: float) -> bool:
        """Whether the present replicas have been the serving ones for so long."""
        return self.coming == 0 and self.fresh_for(seconds)

    def fresh_for(self, seconds: float) -> bool:
        """Whether the newest engine has served for so long, whatever else is on its way."""
        since = self.pool.settled_seconds
        return since is None or since >= seconds

    @property
    def alone(self) -> bool:
        """Every replica serves one request at most and nothing waits: load cannot be spread any thinner.

        The percentiles are of the window, so it must hold for the window too: the last answers of a burst come when
        the engines are empty already.
        """
        running, waiting = number(self.load.running), number(self.load.waiting)
        if running is None or waiting is None or self.pool.ready < 1 or not self.load.coverage.complete:
            return False
        if waiting > 0 or running > self.pool.ready or (self.running_mean or 0.0) > self.pool.ready:
            return False
        # Decode engines queue while the KV cache is on its way, whatever their number.
        return self.pool.role is PoolRole.DECODE or not self._queued

    @property
    def _queued(self) -> bool:
        """Requests of the window waited for a place: all of them a little, or those that missed an objective.

        With batches of one an engine that is half busy shows one running and none waiting at most looks, and a p99
        made of the few that came together.
        """
        queue = self.load.queue_time
        if not isinstance(queue, Histogram) or not queue.total:
            return False
        if (queue.mean or 0.0) > _QUEUED_SECONDS:
            return True
        for latency in self.latencies:
            waited = queue.quantile(QUANTILES[latency.percentile])
            if (
                latency.missed
                and latency.observed is not None
                and latency.metric in _WAITED_FOR
                and waited is not None
                # The lower edge: in the first bucket, which begins at zero, nothing is known of a wait.
                and latency.observed - waited.low <= latency.target
            ):
                return True
        return False

    @property
    def alone_waste(self) -> float:
        """Share of its capacity that a single engine wastes."""
        return _ALONE if self.pool.role is PoolRole.AGGREGATED else _ALONE_PHASE

    @property
    def drain_seconds(self) -> float:
        """In what time a backlog shall be gone; no sooner than another engine could help."""
        start = _startup(self.pool, self.memory) or _ASSUMED_STARTUP
        if self.pool.curve is not None and self.latencies:
            # Whatever arrives meanwhile misses.
            return max(_LEAST_DRAIN, start)
        return max(self.manners.drain_seconds, start)

    @property
    def service_seconds(self) -> float | None:
        """Mean time a request of the window spent in a batch, without its wait; None: not known."""
        e2e, queue = self.load.e2e, self.load.queue_time
        if not isinstance(e2e, Histogram) or not isinstance(queue, Histogram) or e2e.total < _ENOUGH_REQUESTS:
            return None
        spent = (e2e.mean or 0.0) - (queue.mean or 0.0)
        return spent if spent > 0 else None

    @property
    def running_mean(self) -> float | None:
        """Mean sequences in the batches over the window: rate × time in the batch (Little's law)."""
        rate, seconds = self.load.request_rate, self.service_seconds
        return rate.value * seconds if isinstance(rate, Value) and seconds is not None else None

    @property
    def offered(self) -> float | None:
        """Sequences that the window's load keeps in the batches; what arrives tells of a rise before what is done."""
        mean, seconds = self.running_mean, self.service_seconds
        if mean is None or seconds is None or not isinstance(self.arrivals, Value):
            return mean
        return max(mean, self.arrivals.value * seconds)

    @property
    def answered(self) -> int:
        """Serving replicas that the gauges tell of."""
        return min(self.load.coverage.answered, self.pool.ready)

    @property
    def batches_full(self) -> bool:
        """Whether engines let requests wait because no slot or no KV cache is left.

        One request that waits at the moment of the reading says nothing: every request waits for the next step.
        """
        running, waiting = number(self.load.running), number(self.load.waiting)
        if not running or not waiting or self.answered < 1 or waiting < self.answered:
            return False
        cache = number(self.load.kv_usage)
        slots = self.answered * self.pool.max_num_seqs
        return (cache is not None and cache >= _FULL_CACHE) or 0 < _FULL_BATCH * slots <= running

    @property
    def queue_stands(self) -> bool:
        """Whether more wait than are allowed, over the window too where it is known (Little's law).

        Such engines are full long before their batches are: prompts fill their steps. Decode engines are not, as
        requests wait there for the transfer of their KV cache, too.
        """
        waiting, rate, queue = number(self.load.waiting), self.load.request_rate, self.load.queue_time
        if waiting is None or self.answered < 1 or self.pool.role is PoolRole.DECODE:
            return False
        if isinstance(queue, Histogram) and isinstance(rate, Value) and queue.total >= _ENOUGH_REQUESTS:
            waiting = min(waiting, rate.value * (queue.mean or 0.0))
        return waiting > self.waiting_limit * self.answered

    @property
    def mean_queue(self) -> float:
        """Mean time in the queue of the window's requests, seconds."""
        queue = self.load.queue_time
        return (queue.mean or 0.0) if isinstance(queue, Histogram) else 0.0

    @property
    def crowded(self) -> bool:
        """Whether requests of the window waited, or wait: the engines' pace is not that of their load."""
        waiting = number(self.load.waiting) or 0.0
        return self.mean_queue > _CROWDED_SECONDS or waiting > 2 * max(self.serving, 1)

    @property
    def first_target(self) -> float | None:
        """Strictest objective of a first token, seconds; None where there is none."""
        return min((each.target for each in self.latencies if each.metric == "ttft"), default=None)

    @property
    def had_backlog(self) -> bool:
        """Whether a backlog is being worked off, or was within the window."""
        waiting = number(self.load.waiting) or 0.0
        longest = 1.0 if self.first_target is None else self.first_target / 4
        return waiting > self.waiting_limit * max(self.serving, 1) or self.mean_queue > longest

    @property
    def overrun(self) -> bool:
        """Whether what waits now waits longer than its first token may take, on engines that do all they can."""
        waiting, capacity, first = number(self.load.waiting), self.capacity(), self.first_target
        if waiting is None or capacity is None or first is None or self.awaits_transfer:
            return False
        return waiting > first * max(self.serving, 1) * capacity.rps

    @property
    def steady(self) -> bool:
        """Whether the whole window tells of batches like those of now: the load is not just ramping up."""
        running, mean = number(self.load.running), self.running_mean
        if running is None or mean is None or not self.settled(self.load.window):
            return False
        return mean >= _STEADY_SHARE * running

    @property
    def awaits_transfer(self) -> bool:
        """Whether decode engines have slots and cache for what waits: it waits for its KV cache to arrive."""
        running, cache = number(self.load.running), number(self.load.kv_usage)
        slots = self.answered * self.pool.max_num_seqs
        if self.pool.role is not PoolRole.DECODE or running is None or slots <= 0:
            return False
        return running < _FULL_BATCH * slots and (cache is None or cache < _FULL_CACHE)

    def capacity(self) -> _Capacity | None:
        """Return what one replica carries.

        The performance model's figure as traffic has corrected it (see :mod:`servingtiers.policy.learning`). Where
        there is no model, what full engines do: an engine with ``n`` requests in its batch that each take ``s`` seconds
        does ``n/s`` requests per second (Little's law). An ``s`` of short requests only is too short, and then asks for
        too few replicas, never for too many.
        """
        curve = self.pool.curve
        if curve is not None:
            slower = 100.0 * (slowness_of(self.memory) - 1.0)
            learned = f", engines {abs(slower):.0f} % {'slower' if slower > 0 else 'faster'}"
            return _Capacity(
                rps_of(self.memory, curve), curve.source + (learned if abs(slower) >= 1.0 else "")
            )
        measured = self._measured()
        return _Capacity(measured, "what the full engines do") if measured else None

    def _measured(self) -> float | None:
        """Return what one full engine does, requests per second; None: none is full, or not surely."""
        running, seconds = number(self.load.running), self.service_seconds
        if not running or seconds is None:
            return None
        sure = self.batches_full or (self.queue_stands and self.steady)
        return running / self.answered / seconds if sure else None


# --- one tier ---------------------------------------------------------------------------------------------------


def _decide_tier(obs: TierObservation, now: float) -> TierDecision:
    owned = {pool.name: pool for pool in obs.pools}
    obs = replace(obs, pools=tuple(_as_served(pool) for pool in obs.pools))
    views = tuple(_learned(_view(obs, pool, now)) for pool in _with_startups(obs))
    acting = acts(obs.spec.scaling.mode, suspended=obs.spec.suspend) and not obs.rivalled
    may_sleep = all(view.pool.scaling.min_replicas == 0 for view in views)
    if may_sleep and all(view.pool.replicas == 0 for view in views):
        outcomes = [_asleep(view, obs) for view in views]
    else:
        idle = _Idle(None, "minReplicas is above 0", 0.0)
        if may_sleep:
            idle = _idle(views, obs, now)
        outcomes = [_serving(view, obs, idle, acting=acting) for view in views]

    memory: dict[str, PoolMemory] = {}
    for view, (decision, remembered) in zip(views, outcomes, strict=True):
        update: dict[str, object] = {}
        if acting and decision.desired > decision.current:
            update = flapping.after_growth(
                view.memory, decision, now, hold_seconds(view.pool, view.memory)[0]
            )
        elif acting and decision.desired < decision.current:
            update = flapping.after_shrinking(view.memory, decision, now)
        memory[view.pool.name] = remembered.model_copy(update=update)

    roles = {view.pool.name: view.pool.role for view in views}

    def order(decision: Decision) -> int:
        # Decode first up, prefill first down: no prompt is computed for a pool that cannot go on with it.
        if roles[decision.pool] is PoolRole.DECODE:
            return 2 if decision.desired < decision.current else 0
        return 1

    decisions = tuple(
        _of_deployment(decision, owned[decision.pool])
        for decision in sorted((decision for decision, _ in outcomes), key=order)
    )
    return TierDecision(obs.key, decisions, memory)


def _with_startups(obs: TierObservation) -> tuple[PoolFacts, ...]:
    """Return the pools of a tier; one that has started no engine yet expects the other's start-up.

    It is the same model and image on a node of the same cluster: a better guess than any constant.
    """
    known = {pool.name: _startup(pool, obs.memory.get(pool.name, PoolMemory())) for pool in obs.pools}
    seen = [seconds for seconds in known.values() if seconds is not None]
    if not seen:
        return obs.pools
    return tuple(
        replace(pool, startup_seconds=max(seen)) if known[pool.name] is None else pool for pool in obs.pools
    )


def _of_deployment(decision: Decision, pool: PoolFacts) -> Decision:
    """Return a decision about the engines that serve as one about the replicas of the pool's own Deployment."""
    change = decision.desired - decision.current
    return replace(decision, current=pool.replicas, desired=max(0, pool.replicas + change))


def _learned(view: _View) -> _View:
    """Return the view with what this reading teaches in its memory."""
    curve = view.pool.curve
    if curve is None:
        return view
    missed = None
    if view.latencies and view.feasible:
        # In requests of an objective that allows 1 %: a p90 may miss ten times as often.
        missed = Missed(
            max(each.total for each in view.latencies),
            sum(0.01 * each.likely / (1.0 - QUANTILES[each.percentile]) for each in view.latencies),
            complete=view.load.coverage.complete and all(each.unknown is None for each in view.latencies),
        )
    # Engines of a rollout are not all those that the model speaks of.
    settled = not view.pool.rolling
    lesson = Lesson(
        role=view.pool.role,
        load=view.load,
        curve=curve,
        arrivals=None
        if isinstance(view.arriving, Value) and view.arriving.partial
        else number(view.arriving),
        serving=view.serving,
        excused=_short(view) or view.had_backlog,
        steady=settled and view.fresh_for(_FRESH_SECONDS) and not view.crowded,
        standing=settled and view.queue_stands and view.settled(view.load.window + view.mean_queue),
        missed=missed,
    )
    return replace(view, memory=learn(view.memory, lesson, view.now))


def _short(view: _View) -> bool:
    """Return whether what the window missed, it missed for want of engines that were on their way."""
    awaited = view.coming > 0 and not _overdue(view)
    if not awaited and view.fresh_for(view.load.window + _ECHO_SECONDS):
        return False
    capacity, rate = view.capacity(), number(view.arriving)
    return capacity is None or rate is None or rate > _ROOMY * view.serving * capacity.rps


def _overdue(view: _View) -> bool:
    """Return whether engines should long have been ready: one that crashes as it starts excuses nothing for ever."""
    ordered = view.memory.last_scale_up
    if ordered is None:
        return False
    start = _startup(view.pool, view.memory) or _ASSUMED_STARTUP
    return view.now - from_time(ordered) > max(_OVERDUE * start, _OVERDUE_SECONDS)


@dataclass(frozen=True, slots=True)
class _Idle:
    """Whether the whole tier is proved idle."""

    since: float | None
    """Unix time since which no request has come, proved without a gap; None: not idle, or not proved."""
    evidence: str
    after: float
    """Seconds of idleness after which the tier goes to zero."""

    def over(self, now: float) -> bool:
        return self.since is not None and now - self.since >= self.after


def _idle(views: tuple[_View, ...], obs: TierObservation, now: float) -> _Idle:
    given = [view.pool.scaling.idle_after for view in views]
    after = max((parse_duration(text) if text else _DEFAULT_IDLE_SECONDS for text in given), default=0.0)
    busy = _busy(views, obs)
    if busy is not None:
        return _Idle(None, busy, after)
    since = [view.memory.idle_since for view in views]
    # A pool that does not remember (a new one, a status that was lost) begins to count now.
    began = max(from_time(text) if text else now for text in since)
    if obs.watching_since is not None:
        began = max(began, obs.watching_since)
    return _Idle(min(began, now), "routers and engines all answered, and there was no request", after)


def _busy(views: tuple[_View, ...], obs: TierObservation) -> str | None:
    """Return why the tier is not proved idle; None when it is."""
    router = obs.load.router
    if not isinstance(router.arrival_rate, Zero) or not router.coverage.complete:
        return f"arrivals at the routers: {_show(router.arrival_rate, '/s')}"
    if isinstance(router.unserved, Value) and router.unserved.value > 0:
        return f"{_figure(router.unserved.value)} requests found no engine"
    for view in views:
        if view.coming or view.pool.ready == 0:
            return f"pool {view.pool.name} is still starting"
        for label, signal in (("running", view.load.running), ("waiting", view.load.waiting)):
            if not isinstance(signal, Zero) or not view.load.coverage.complete:
                return f"{label} in pool {view.pool.name}: {_show(signal)}"
    return None


def _asleep(view: _View, obs: TierObservation) -> tuple[Decision, PoolMemory]:
    router = obs.load.router
    remembered = view.memory.model_copy(update={"low_since": None, "low_peak": None, "idle_since": None})
    unserved = router.unserved
    called = isinstance(unserved, Value) and unserved.value > 0
    arriving = isinstance(router.arrival_rate, Value) and router.arrival_rate.value > 0
    if called or arriving:
        seen = (
            f"{_figure(unserved.value)} requests found no engine"
            if isinstance(unserved, Value) and called
            else f"{_show(router.arrival_rate, '/s')} arrive at the routers"
        )
        if view.pool.scaling.max_replicas == 0 and obs.spec.shared_pool is None:
            # It does not sleep: all that it may have is lent by hand, so one more would exceed maxReplicas.
            return _decision(
                view,
                0,
                Binding.LENT,
                f"Every engine that maxReplicas allows is lent, although {seen}.",
                "An engine that comes home, or a higher maxReplicas.",
                needed=1,
            ), remembered
        return _decision(
            view,
            1,
            Binding.WAKE,
            f"Wakes from zero: {seen}.",
            "It sleeps again after idleAfter without a request.",
            needed=1,
        ), remembered
    if isinstance(unserved, Unknown):
        return _decision(
            view,
            0,
            Binding.HOLD_UNKNOWN,
            f"Stays at zero, but cannot see who calls: {unserved.reason}.",
            "A router that answers; or set minReplicas to 1 to serve without telemetry.",
        ), remembered
    return _decision(
        view,
        0,
        Binding.IDLE,
        "Sleeps at zero: no request has come to the routers.",
        "One request to the tier's endpoint wakes it.",
        needed=0,
    ), remembered


def _serving(view: _View, obs: TierObservation, idle: _Idle, *, acting: bool) -> tuple[Decision, PoolMemory]:
    pool, scaling = view.pool, view.pool.scaling
    current = pool.replicas
    floor = max(scaling.min_replicas, 1)
    ceiling = max(scaling.max_replicas, floor)
    needs = list(_needs(view))
    need = max(needs, key=lambda each: each.replicas, default=None)
    futile = _futile(view)

    def done(decision: Decision, **update: str | int | None) -> tuple[Decision, PoolMemory]:
        kept: dict[str, str | int | None] = {"low_since": None, "low_peak": None}
        kept["idle_since"] = None if idle.since is None else to_time(idle.since)
        calls = need is not None or _missing(view) is None
        if calls:
            rush = _most(_needs(view, within=_MOVE_SECONDS)) if _comes_and_goes(view) else None
            decision = replace(
                decision,
                needed=_most(_needs(view, within=0.0)),
                expected=_most(iter(needs)),
                highest=_highest(view),
                standby=rush,
            )
        return decision, view.memory.model_copy(update=kept | update)

    if idle.over(view.now) and idle.since is not None:
        return done(
            _decision(
                view,
                0,
                Binding.IDLE,
                f"Goes to zero: idle for {in_words(view.now - idle.since)} (idleAfter {in_words(idle.after)});"
                f" {idle.evidence}.",
                "One request to the tier's endpoint wakes it.",
            )
        )
    if current > ceiling:
        return done(_over_the_maximum(view, ceiling, acting=acting))

    wanted = need.replicas if need is not None else 0
    if acting and need is not None and current >= floor:
        regret = _regret(view, need)
        if regret is not None:
            return done(regret)
    if max(wanted, floor) > current:
        desired = min(max(wanted, floor), ceiling)
        limited = None
        if wanted > ceiling:
            limited = f"{wanted} replicas are needed, maxReplicas is {ceiling}"
        if need is None or floor >= wanted:
            binding = Binding.MIN_REPLICAS
            reason = f"minReplicas is {scaling.min_replicas}" + (
                "." if scaling.min_replicas else "; a tier that serves has 1 at least."
            )
            change = "A lower minReplicas."
        else:
            binding, reason, change = need.binding, need.reason, need.would_change
            if desired == current:
                binding = Binding.MAX_REPLICAS
                change = f"A maxReplicas of {wanted} or more."
            if limited:
                reason = f"{reason} Held at maxReplicas {ceiling}: raise it to serve this load."
        return done(_decision(view, desired, binding, reason, change, limited=limited))

    blocker = _shrink_blocker(view, current - 1, floor)
    if blocker is not None:
        binding, reason, change = blocker
        if futile is not None and binding is not Binding.HOLD_UNKNOWN:
            binding, reason, change = Binding.INFEASIBLE, futile, _EASE
        elif binding is Binding.STEADY and need is not None and need.replicas == current:
            binding, reason, change = need.binding, need.reason, need.would_change
        return done(_decision(view, current, binding, reason, change))

    return _shrink(view, obs, floor, futile, acting=acting, done=done)


def _regret(view: _View, need: _Need) -> Decision | None:
    """Return the decision to wait where a need would only take back what has just been given up; None otherwise.

    The readings of now still tell of the larger pool, and of its requests that moved over. A need for more than the
    larger pool had is news, and is met at once.
    """
    current, last = view.pool.replicas, view.memory.last_scale_down
    if last is None or need.replicas <= current:
        return None
    passed = view.now - from_time(last)
    patience = min(hold_seconds(view.pool, view.memory)[0], _REGRET_SECONDS)
    # Steps down are 1 or a fifth of the larger pool.
    before = current + max(1, math.ceil(current / 4))
    if not 0 <= passed < patience or need.replicas > before or view.overrun:
        return None
    return _decision(
        view,
        current,
        Binding.HOLD_PENDING,
        f"Holds at {current}: the last scale-down was {ago(passed)}, and readings still tell of the larger pool;"
        f" {need.reason}",
        f"The same need in {in_words(patience - passed)}, or one for more than {before} replicas now.",
    )


_EASE = "A longer objective, a faster accelerator or a larger tensorParallel."


def _shrink(
    view: _View,
    obs: TierObservation,
    floor: int,
    futile: str | None,
    *,
    acting: bool,
    done: Callable[..., tuple[Decision, PoolMemory]],
) -> tuple[Decision, PoolMemory]:
    """Take replicas away once fewer have sufficed for the whole hold."""
    memory, current, now = view.memory, view.pool.replicas, view.now
    own_hold = view.pool.scaling.scale_down_hold is not None
    least = _least(view, floor)
    since, peak = now, least
    if memory.low_since is not None:
        since = min(from_time(memory.low_since), now)
        if obs.watching_since is not None and since < obs.watching_since:
            since = min(obs.watching_since, now)
        else:
            peak = max(peak, min(memory.low_peak or 0, current))
    kept = {"low_since": to_time(since), "low_peak": peak}
    hold, why = hold_seconds(view.pool, memory)
    fewer = f"{current - 1} of {current} replicas would carry the load"
    ripe = now - since >= hold

    def stay(binding: Binding, reason: str, change: str) -> tuple[Decision, PoolMemory]:
        return done(_decision(view, current, binding, reason, change), **kept)

    if not ripe:
        left = in_words(hold - (now - since))
        return stay(
            Binding.HOLD_DOWN if futile is None else Binding.INFEASIBLE,
            f"{fewer}, for {in_words(now - since)} so far; they go after {in_words(hold)} ({why})."
            + (f" {futile}" if futile else ""),
            f"{left} more of this load, seen without a gap.",
        )
    if peak >= current:
        # The hold began under more load. It is over: the next one counts from here.
        kept = {"low_since": to_time(now), "low_peak": least}
        return stay(
            Binding.HOLD_DOWN,
            f"{fewer} now, but {peak} were needed within the last {in_words(now - since)}.",
            f"A hold of {in_words(hold)} without such a peak.",
        )
    if view.pool.terminating:
        return stay(
            Binding.HOLD_DOWN,
            f"{fewer}; {view.pool.terminating} replicas are still draining.",
            "The end of their drain.",
        )
    if acting:
        stays = 0 if own_hold else flapping.kept(memory, now, hold)
        if current <= stays * _KEPT_SLACK:
            return stay(
                Binding.HOLD_DOWN,
                f"{fewer}, but {stays} were taken back soon after they had gone: they stay for another"
                f" {in_words(flapping.quiet_left(memory, now, hold))}.",
                "That time without a scale-up, or a scaleDownHold of your own.",
            )
        pause = _pause(memory, now)
        if pause is not None:
            return stay(Binding.HOLD_DOWN, f"{fewer}; {pause}", "The next minute.")

    step = max(1, current // 5) if acting else current
    desired = max(peak, current - step)
    if acting and not own_hold:
        desired = min(max(desired, flapping.kept(memory, now, hold)), current)
    return done(
        _decision(
            view,
            desired,
            Binding.STEADY if futile is None else Binding.INFEASIBLE,
            f"{desired} of {current} replicas have sufficed for {in_words(now - since)}"
            f" (hold {in_words(hold)}, {why}): {_describe(view)}.",
            _growth(view),
        ),
        **kept,
    )


def _least(view: _View, floor: int) -> int:
    """Return the fewest replicas that would carry today's load; more of them never carry less."""
    if view.pool.curve is not None:
        return min(max(_most(_needs(view, _HYSTERESIS)), floor), view.pool.replicas - 1)
    fewest, most = floor, view.pool.replicas - 1
    while fewest < most:
        middle = (fewest + most) // 2
        if _shrink_blocker(view, middle, floor) is None:
            most = middle
        else:
            fewest = middle + 1
    return fewest


def _over_the_maximum(view: _View, ceiling: int, *, acting: bool) -> Decision:
    """Go down to a maximum that was lowered: the user's order needs no evidence, only patience."""
    current = view.pool.replicas
    change = f"A maxReplicas of {current} or more."
    limited = f"maxReplicas is {ceiling}"
    if acting:
        pause = _pause(view.memory, view.now)
        if view.pool.terminating:
            pause = f"{view.pool.terminating} replicas are still draining."
        if pause is not None:
            reason = f"{current} replicas exceed maxReplicas {ceiling}; {pause}"
            return _decision(view, current, Binding.MAX_REPLICAS, reason, change, limited=limited)
    step = max(1, current // 5) if acting else current
    desired = max(ceiling, current - step)
    reason = f"{current} replicas exceed maxReplicas {ceiling}: at most one or a fifth leaves a minute."
    return _decision(view, desired, Binding.MAX_REPLICAS, reason, change, limited=limited)


# --- rules ------------------------------------------------------------------------------------------------------


def _comes_and_goes(view: _View) -> bool:
    return history_of(view.memory).rushes >= _RECURS


def _highest(view: _View) -> int | None:
    """Return what the highest load of the last hour calls for; None: not known."""
    if view.pool.curve is None:
        return None
    highest = Forecast(slowness_of(view.memory) * history_of(view.memory).peak, 0.0, 0)
    return _ceil(_engines(view, highest, budget_of(view.memory).headroom))


def _needs(view: _View, factor: float = 1.0, *, within: float | None = None) -> Iterator[_Need]:
    """Yield what every signal calls for; the largest counts.

    Args:
        view: The pool.
        factor: Times the load of now, where the model knows the pool.
        within: So many seconds are looked ahead there; None: until an engine ordered now could serve. Lending asks for
            0, the load of now, because it moves engines in seconds.
    """
    if view.pool.curve is not None:
        yield from _needs_by_model(view, factor, within)
        return
    yield from _need_by_rate(view)
    yield from _need_by_occupancy(view)
    yield from _need_by_backlog(view)
    yield from _need_by_latency(view)


def _most(needs: Iterator[_Need]) -> int:
    return max((need.replicas for need in needs), default=0)


def _expected(view: _View, within: float | None = None) -> tuple[Forecast, float] | None:
    """Return the peak of the load until an engine ordered now could serve, in replicas, and how far ahead that is.

    ``within`` 0 is the load of now. While arrivals are not known, the newest known ones are looked ahead from, as much
    farther as they are old. None where none or no capacity is known.
    """
    capacity, rate = view.capacity(), number(view.arriving)
    if capacity is None:
        return None
    if within == 0.0:
        return None if rate is None else (Forecast(rate / capacity.rps, 0.0, 0), 0.0)
    history, slow = history_of(view.memory), slowness_of(view.memory)
    latest = history.latest(view.now) if rate is None else (rate / capacity.rps / slow, 0.0)
    if latest is None or (rate is None and latest[1] < _UNSEEN_SECONDS):
        return None
    load, age = latest
    horizon = _AHEAD * (_startup(view.pool, view.memory) or _ASSUMED_STARTUP) + _READING_SECONDS
    horizon = (horizon if within is None else within) + age
    found = ahead(history, load, horizon)
    return Forecast(slow * found.level, slow * found.margin, found.pairs), horizon


def _needs_by_model(view: _View, factor: float, within: float | None) -> Iterator[_Need]:
    """Yield what the load to come, the backlog and the batches call for."""
    expected, capacity, rate = _expected(view, within), view.capacity(), number(view.arriving)
    filled = _need_by_filling(view)
    if filled is not None:
        yield filled
    budget = budget_of(view.memory)
    if rate is None and expected is not None and within is None:
        # What is not watched gets neither the small headroom that watching has earned nor the benefit of a doubt.
        forecast, horizon = expected
        yield _Need(
            _ceil(_engines(view, forecast, factor * max(budget.headroom, FIRST))),
            Binding.FORECAST,
            f"Arrivals are unknown. From the newest that are known, {forecast.level:.1f} and up to {forecast.margin:.1f}"
            f" more replicas of work were to be expected within {in_words(horizon)} ({_learned_from(forecast)}).",
            "Arrivals that are known.",
        )
    if expected is None or capacity is None or rate is None:
        yield from _need_by_backlog(view)
        return
    forecast, horizon = expected
    load = rate / capacity.rps
    peak = _engines(view, forecast, factor * budget.headroom)
    if peak <= 0.0:
        yield from _need_by_backlog(view)
        return
    if factor == 1.0:
        peak = max(min(peak, view.pool.replicas), peak / (1.0 + _TOLERANCE))
    seen = f"{_figure(rate)} requests/s arrive{_seen(view.arriving)}"
    carries = f"one replica carries {_figure(capacity.rps)} ({capacity.source})"
    yield _Need(
        _ceil(peak),
        Binding.FORECAST,
        f"{seen}, {carries}: {load:.1f} replicas of work; within {in_words(horizon)} {forecast.level:.1f} and up to"
        f" {forecast.margin:.1f} more are expected ({_learned_from(forecast)}), × {budget.headroom:.2f} for"
        f" {budget.share(0.01):.0%} of the hour's error budget used.",
        f"Fewer than {_figure(rate * (_ceil(peak) - 1) / peak)} requests/s, or shorter ones."
        if _ceil(peak) > 1
        else _growth(view),
    )
    waiting = view.load.waiting
    if not isinstance(waiting, Value) or view.awaits_transfer:
        return
    limit = view.waiting_limit
    if waiting.value > limit * max(view.serving, 1):
        drain = view.drain_seconds
        yield _Need(
            _ceil(factor * budget.headroom * load + waiting.value / capacity.rps / drain),
            Binding.QUEUE,
            f"{_figure(waiting.value)} requests wait (seen {ago(waiting.age)}), {limit} per replica are allowed; {seen},"
            f" {carries}: gone within {in_words(drain)}.",
            "A queue below the limit.",
        )


def _engines(view: _View, forecast: Forecast, factor: float) -> float:
    """Return the engines, not rounded yet, that ``factor`` times the load to come takes."""
    return factor * forecast.peak / (1.0 - view.alone_waste / max(forecast.peak, 1.0))


def _learned_from(forecast: Forecast) -> str:
    if forecast.pairs == 0:
        return "a first guess: little is known of this load"
    return f"as in the last {in_words(forecast.pairs * BUCKET_SECONDS)}"


def _seen(signal: Signal) -> str:
    return f" (seen {ago(signal.age)})" if isinstance(signal, Value) else ""


def _need_by_filling(view: _View) -> _Need | None:
    """Return what full batches call for: answers longer than those that have ended show nowhere else."""
    running, cache = number(view.load.running), number(view.load.kv_usage)
    if running is None or view.serving < 1 or view.pool.max_num_seqs < 1:
        return None
    slots = running / (view.serving * view.pool.max_num_seqs)
    used = max(slots, cache or 0.0)
    # A batch that is full for a moment has no queue. Full ones are what a backlog leaves behind, too, and the replicas
    # that work it off are here or coming.
    waiting = number(view.load.waiting) or 0.0
    queued = waiting >= view.serving
    if view.pool.role is PoolRole.DECODE:
        # Requests wait for their KV cache, too, several of each batch of prompts, and nearly every slot is planned to be taken.
        queued = waiting > 2 * view.serving and not view.awaits_transfer
    if used < _FILLED or not queued or not view.settled(_ECHO_SECONDS):
        return None
    return _Need(
        max(view.serving + 1, _ceil(view.serving * used / _REFILLED)),
        Binding.QUEUE if slots >= used else Binding.KV_CACHE,
        f"{_figure(running)} sequences run, {slots:.0%} of the slots"
        + ("" if cache is None else f" and {cache:.0%} of the KV cache")
        + f" are taken; from {_FILLED:.0%} on engines are as good as full.",
        "Fewer sequences in flight, or a larger maxNumSeqs where the KV cache has room.",
    )


def _need_by_rate(view: _View) -> Iterator[_Need]:
    capacity = view.capacity()
    rate = view.arrivals
    if capacity is None or not isinstance(rate, Value) or rate.value <= 0:
        return
    share = view.manners.utilization
    yield _Need(
        _ceil(rate.value / (capacity.rps * share)),
        Binding.FORECAST,
        f"{_figure(rate.value)} requests/s arrive (seen {ago(rate.age)}); one replica carries"
        f" {_figure(capacity.rps)} ({capacity.source}), {share:.0%} of it planned.",
        "Fewer arrivals.",
    )


def _need_by_occupancy(view: _View) -> Iterator[_Need]:
    running = view.load.running
    batch, share = view.pool.max_num_seqs, view.manners.utilization
    if not isinstance(running, Value) or batch <= 0:
        return
    # The gauge is a moment: where the window's mean is known too, both must call.
    mean = view.offered
    busy = running.value if mean is None else min(running.value, mean)
    replicas = _ceil(busy / (share * batch))
    if not view.settled(view.load.window + view.manners.drain_seconds):
        # Full batches are what a backlog leaves behind, and the replicas that will drain it are here or coming.
        replicas = min(replicas, view.supply)
    yield _Need(
        replicas,
        Binding.QUEUE,
        f"{_figure(busy)} sequences run (seen {ago(running.age)}); a replica takes {batch},"
        f" {share:.0%} of it planned.",
        "Fewer sequences in flight, or a larger maxNumSeqs.",
    )


def _need_by_backlog(view: _View) -> Iterator[_Need]:
    waiting = view.load.waiting
    ready, limit = view.pool.ready, view.waiting_limit
    if not isinstance(waiting, Value) or ready < 1 or waiting.value <= limit * ready:
        return
    if view.awaits_transfer:
        return
    seen = (
        f"{_figure(waiting.value)} requests wait (seen {ago(waiting.age)}), {limit} per replica are allowed"
    )
    change = "A queue below the limit."
    # What was ordered answers the queue as it is: it may call for more only once that has had its time.
    most = _NO_LIMIT if view.settled(view.load.window) else view.supply
    yield _Need(min(ready + 1, most), Binding.QUEUE, f"{seen}.", change)
    capacity = view.capacity()
    rate = view.arrivals
    if capacity is not None and isinstance(rate, Value):
        drain = view.drain_seconds
        full = _ceil((rate.value + waiting.value / drain) / capacity.rps)
        yield _Need(
            min(full, most),
            Binding.QUEUE,
            f"{seen}; {_figure(rate.value)}/s more arrive, one replica does {_figure(capacity.rps)}/s"
            f" ({capacity.source}): gone within {in_words(drain)}.",
            change,
        )
    elif view.pool.max_num_seqs > 0:
        # Without arrivals or capacity the size of the need cannot be told: at most double, then look again.
        flight = waiting.value + (number(view.load.running) or 0.0)
        full = min(_ceil(flight / (view.manners.utilization * view.pool.max_num_seqs)), 2 * ready)
        yield _Need(
            min(full, most),
            Binding.QUEUE,
            f"{seen}; what a replica carries is not known: at most doubled.",
            change,
        )


def _need_by_latency(view: _View) -> Iterator[_Need]:
    # A window that tells of fewer replicas, or of the backlog they left, is no reason to add more.
    if view.pool.ready < 1 or not view.settled(view.load.window + view.manners.drain_seconds):
        return
    if view.alone:
        return
    for latency in view.latencies:
        if not latency.missed or latency.observed is None:
            continue
        excess = min(latency.observed / latency.target - 1.0, 0.5)
        yield _Need(
            view.pool.ready + max(1, _ceil(view.pool.ready * excess)),
            Binding[latency.metric.upper()],
            f"{latency.name} is {in_words(latency.observed)} over {in_words(view.load.window)}, the target is"
            f" {in_words(latency.target)}.",
            f"{latency.name} below {in_words(latency.target)}.",
        )


def _futile(view: _View) -> str | None:
    """Return why more replicas would not help; None where they would, or nothing is missed."""
    if not view.alone:
        return None
    for latency in view.latencies:
        if latency.missed and latency.observed is not None:
            return (
                f"{latency.name} is {in_words(latency.observed)}, above {in_words(latency.target)}, with one request"
                " per replica at most and nothing waiting: more replicas would not help."
            )
    return None


def _shrink_blocker(view: _View, fewer: int, floor: int) -> tuple[Binding, str, str] | None:
    """Return what stands against ``fewer`` replicas, or None when they would carry today's load.

    The order matters for people: bounds, then what is missing, then what is under way, then load.
    """
    pool, load, share = view.pool, view.load, view.manners.utilization
    if fewer < floor:
        steady = _describe(view)
        if pool.scaling.min_replicas >= floor:
            return Binding.MIN_REPLICAS, f"At minReplicas {floor}: {steady}.", _growth(view)
        return Binding.STEADY, f"One replica serves: {steady}.", _growth(view)
    missing = _missing(view)
    if missing is not None:
        return (
            Binding.HOLD_UNKNOWN,
            f"Holds at {pool.replicas}: {missing}.",
            "Complete and fresh telemetry; nothing shrinks without it.",
        )
    if pool.rolling:
        return (
            Binding.HOLD_PENDING,
            f"Holds at {pool.replicas}: a rollout is under way.",
            "The end of the rollout.",
        )
    # Replicas that cannot be scheduled serve nobody: they are the first to go and no reason to keep the others.
    if view.coming:
        return (
            Binding.HOLD_PENDING,
            f"Holds at {pool.replicas}: {view.coming} replicas are starting; {_describe(view)}.",
            "Replicas that are ready.",
        )

    if pool.curve is not None:
        return _blocker_by_model(view, fewer)
    running, waiting = number(load.running) or 0.0, number(load.waiting) or 0.0
    running = max(running, view.running_mean or 0.0)
    room = _SHRINK * share * pool.max_num_seqs * fewer
    if pool.max_num_seqs and running + waiting > room:
        return (
            Binding.STEADY,
            f"{fewer} replicas would be too full: {_figure(running + waiting)} in flight, room for {_figure(room)}.",
            f"At most {_figure(room)} in flight for a hold.",
        )
    if waiting > view.waiting_limit * fewer / 2:
        return Binding.STEADY, f"{_figure(waiting)} requests wait.", "A shorter queue for a hold."
    capacity, rate = view.capacity(), view.arrivals
    if capacity is not None and isinstance(rate, Value):
        carried = _SHRINK * share * capacity.rps * fewer
        if rate.value > carried:
            return (
                Binding.STEADY,
                (
                    f"{fewer} replicas would carry {_figure(carried)} requests/s ({capacity.source});"
                    f" {_figure(rate.value)} arrive."
                ),
                f"Fewer than {_figure(carried)} requests/s for a hold.",
            )
    smaller = replace(view, pool=replace(pool, replicas=fewer, ready=fewer))
    back = max(_needs(smaller), key=lambda each: each.replicas, default=None)
    if back is not None and back.replicas > fewer:
        return Binding.STEADY, f"{fewer} replicas would call for more: {back.reason}", back.would_change
    # Where even a lone request is late, latency is no reason to keep replicas, as long as requests stay alone.
    if view.alone and running <= fewer:
        return None
    for latency in view.latencies:
        if not latency.roomy and latency.observed is not None:
            near = _LATENCY_SHRINK * latency.target
            return (
                Binding.STEADY,
                (
                    f"{latency.name} is {in_words(latency.observed)}, too near its target of {in_words(latency.target)}"
                    " to go on with fewer."
                ),
                f"{latency.name} below {in_words(near)} for a hold.",
            )
    return None


def _blocker_by_model(view: _View, fewer: int) -> tuple[Binding, str, str] | None:
    """Return what stands against ``fewer`` replicas where the model knows the pool."""
    need = max(_needs(view, _HYSTERESIS), key=lambda each: each.replicas, default=None)
    if need is not None and need.replicas > fewer:
        return need.binding, need.reason, need.would_change
    waiting = number(view.load.waiting) or 0.0
    if waiting >= max(view.serving, 1) and not view.awaits_transfer:
        return (
            Binding.QUEUE,
            f"{_figure(waiting)} requests wait, one or more for each engine: none can be spared.",
            "A shorter queue for a hold.",
        )
    if view.alone:
        return None
    for latency in view.latencies:
        if latency.missed and latency.observed is not None:
            return (
                Binding.STEADY,
                f"{latency.name} is {in_words(latency.observed)}, above its target of {in_words(latency.target)}.",
                f"{latency.name} below {in_words(latency.target)} for a hold.",
            )
    return None


def _missing(view: _View) -> str | None:
    """Return what telemetry lacks for a scale-down; None when it is complete."""
    load = view.load
    if not load.coverage.complete or load.coverage.answered < view.pool.ready:
        return f"{load.coverage.answered} of {max(view.pool.ready, load.coverage.expected)} ready replicas answered"
    for label, signal in (("running", load.running), ("waiting", load.waiting)):
        if isinstance(signal, Unknown):
            return f"{label} is unknown ({signal.reason})"
        if isinstance(signal, Value) and signal.partial:
            return f"{label} is known of some replicas only"
    queued = (number(load.waiting) or 0.0) >= max(view.serving, 1)
    if isinstance(load.kv_usage, Unknown) and queued and view.pool.curve is not None:
        return f"requests wait, and whether for KV cache is unknown ({load.kv_usage.reason})"
    if isinstance(view.arrivals, Unknown) and view.pool.curve is not None:
        return f"arrivals are unknown ({view.arrivals.reason})"
    if isinstance(view.arrivals, Value) and view.arrivals.partial:
        return "arrivals are known of some routers only"
    for latency in view.latencies:
        if latency.unknown is not None:
            return f"{latency.name} is unknown ({latency.unknown})"
    return None


# --- what is seen -----------------------------------------------------------------------------------------------

_PHASE = {
    PoolRole.AGGREGATED: ("ttft", "tpot", "itl", "e2e"),
    PoolRole.PREFILL: ("ttft", "e2e"),
    PoolRole.DECODE: ("ttft", "tpot", "itl", "e2e"),
}


def _view(obs: TierObservation, pool: PoolFacts, now: float) -> _View:
    load = obs.load.pools.get(pool.name) or Load(60.0, Coverage(0, max(pool.ready, 1)))
    others = [other for other in obs.pools if other.name != pool.name]
    rest = obs.load.pools.get(others[0].name) if others else None
    latencies = []
    for (metric, percentile), target in sorted(obs.targets.seconds.items()):
        if percentile not in QUANTILES or metric not in _PHASE[pool.role]:
            continue
        shared = pool.role is not PoolRole.AGGREGATED and metric in {"ttft", "e2e"}
        latencies.append(_latency(metric, percentile, target, pool.role, load, rest, shared=shared))
    return _View(
        pool=pool,
        memory=of_these(obs.memory.get(pool.name, PoolMemory()), pool.engines, pool.curve, now),
        load=load,
        manners=_MANNERS[obs.spec.tier],
        arrivals=obs.load.router.arrival_rate,
        arriving=_arriving(obs),
        latencies=tuple(latencies),
        now=now,
        feasible=obs.feasible is not False,
    )


def _arriving(obs: TierObservation) -> Signal:
    """Return the arrivals of right now, or of the window where those are not known."""
    router = obs.load.router
    if isinstance(router.recent_rate, Unknown) or isinstance(router.arrival_rate, Zero):
        return router.arrival_rate
    return router.recent_rate


def _latency(
    metric: str,
    percentile: str,
    target: float,
    role: PoolRole,
    load: Load,
    rest: Load | None,
    *,
    shared: bool,
) -> _Latency:
    """Return one objective as this pool sees it.

    A client's TTFT and E2E span both engines of a disaggregated tier. Percentiles do not add up exactly; their sum
    is used as the bound. The other engine's part, at most half of the objective, is taken off the target, so that
    each pool is asked for what it can mend.
    """
    own = _source(metric, role, load)
    observed, unknown = _quantile(own, percentile, waits=shared)
    if unknown is None and not load.coverage.complete:
        unknown = f"{load.coverage.answered} of {load.coverage.expected} replicas answered"
    if unknown is None and isinstance(own, Histogram) and own.partial:
        unknown = "some replicas did not answer for the whole window"
    if shared:
        other_role = PoolRole.DECODE if role is PoolRole.PREFILL else PoolRole.PREFILL
        part, lacking = (
            _quantile(_source(metric, other_role, rest), percentile, waits=True)
            if rest
            else (None, "not measured")
        )
        unknown = unknown or lacking
        target -= min(part or 0.0, target / 2)
    late = total = likely = 0.0
    if isinstance(own, Histogram):
        total = own.total
        late = total - own.count_at_most(target)[0]
        likely = total - own.likely_at_most(target)
        if shared:
            likely = own.tail_beyond(target)
    return _Latency(metric, percentile, target, observed, late, total, likely, unknown)


def _source(metric: str, role: PoolRole, load: Load) -> Distribution:
    """Return the histogram of a metric; a prefill engine answers with one token, so its first is its last."""
    if role is PoolRole.PREFILL:
        # TTFT has buckets below 300 ms, where E2E has none.
        return load.e2e if isinstance(load.ttft, Unknown) else load.ttft
    found = {"ttft": load.ttft, "tpot": load.tpot, "itl": load.itl, "e2e": load.e2e}
    return found[metric]


def _quantile(source: Distribution, percentile: str, *, waits: bool) -> tuple[float | None, str | None]:
    """Return a percentile and why it is unknown; ``waits``: what is measured is a wait for the most part."""
    match source:
        case Unknown(reason=reason):
            return None, reason
        case Zero():
            return None, None
        case Histogram():
            if waits:
                return source.tail_quantile(QUANTILES[percentile]), None
            interval = source.quantile(QUANTILES[percentile])
            return (interval.estimate if interval else None), None


def _startup(pool: PoolFacts, memory: PoolMemory) -> float | None:
    if pool.startup_seconds is not None:
        return pool.startup_seconds
    return float(median(memory.startup_seconds)) if memory.startup_seconds else None


def _pause(memory: PoolMemory, now: float) -> str | None:
    if memory.last_scale_down is None:
        return None
    passed = now - from_time(memory.last_scale_down)
    # A last scale-down in the future is a clock that was set back: it must not stop us for hours.
    if 0 <= passed < _PACE_SECONDS:
        return f"the last scale-down was {ago(passed)}, the next may follow after a minute."
    return None


# --- words ------------------------------------------------------------------------------------------------------


def _decision(
    view: _View,
    desired: int,
    binding: Binding,
    reason: str,
    would_change: str,
    *,
    limited: str | None = None,
    needed: int | None = None,
) -> Decision:
    return Decision(
        pool=view.pool.name,
        current=view.pool.replicas,
        desired=desired,
        reason=reason,
        binding=binding,
        would_change=would_change,
        limited=limited,
        signals=_signals(view),
        needed=needed,
    )


def _signals(view: _View) -> dict[str, str]:
    load = view.load
    signals = {
        "answered": f"{load.coverage.answered} of {load.coverage.expected} replicas",
        "running": _show(load.running),
        "waiting": _show(load.waiting),
        "arrivals": _show(view.arrivals, "/s"),
        "kvUsage": _percent(load.kv_usage),
    }
    expected, capacity = _expected(view), view.capacity()
    if expected is not None:
        forecast, horizon = expected
        signals["forecast"] = (
            f"{forecast.level:.1f} + {forecast.margin:.1f} replicas of work within {in_words(horizon)}"
        )
    if view.pool.curve is not None:
        budget = budget_of(view.memory)
        signals["headroom"] = (
            f"× {budget.headroom:.2f}, {budget.share(0.01):.0%} of the hour's error budget used"
        )
    if capacity is not None:
        signals["capacity"] = f"{_figure(capacity.rps)}/s per replica, {capacity.source}"
    for latency in view.latencies[:7]:
        key = f"{latency.metric}.{latency.percentile}"
        if latency.unknown is not None and latency.observed is None:
            signals[key] = f"unknown: {latency.unknown}"[:256]
        elif latency.observed is None:
            signals[key] = "no requests"
        else:
            signals[key] = f"{in_words(latency.observed)} of {in_words(latency.target)}"
    return signals


def _describe(view: _View) -> str:
    """Return the load in half a sentence."""
    parts = [f"running {_show(view.load.running)}", f"waiting {_show(view.load.waiting)}"]
    worst = max(
        (latency for latency in view.latencies if latency.observed is not None),
        key=lambda latency: (latency.observed or 0.0) / latency.target,
        default=None,
    )
    if worst is not None and worst.observed is not None:
        parts.append(f"{worst.name} {in_words(worst.observed)} of {in_words(worst.target)}")
    return ", ".join(parts)


def _growth(view: _View) -> str:
    """Return what would call for another replica."""
    capacity = view.capacity()
    if view.pool.curve is not None and capacity is not None:
        ready = max(view.serving, 1)
        carried = ready * (1.0 - view.alone_waste / ready) * capacity.rps / budget_of(view.memory).headroom
        return (
            f"Another replica for more than about {_figure(carried)} requests/s now or soon, more than"
            f" {view.waiting_limit * ready} waiting, or batches or KV caches that are {_FILLED:.0%} full with a queue."
        )
    batch = view.pool.max_num_seqs
    room = _figure(view.manners.utilization * batch * max(view.pool.ready, 1))
    more = [f"more than {room} running"] if batch else []
    more.append(f"more than {view.waiting_limit * max(view.pool.ready, 1)} waiting")
    more.extend(f"{latency.name} above {in_words(latency.target)}" for latency in view.latencies[:2])
    return f"Another replica for {', '.join(more)}."


def _show(signal: Signal, unit: str = "") -> str:
    match signal:
        case Value(value=value, partial=partial):
            return f"{_figure(value)}{unit}" + (" or more (some did not answer)" if partial else "")
        case Zero():
            return f"0{unit}"
        case Unknown(reason=reason):
            return f"unknown: {reason}"[:256]


def _percent(signal: Signal) -> str:
    return f"{signal.value:.0%}" if isinstance(signal, Value) else _show(signal)


def _figure(value: float) -> str:
    """Return a number with two digits that matter."""
    if value >= 10 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.2g}"


def _ceil(value: float) -> int:
    # 3.0000000001 replicas are 3: sums of floats are no reason for an engine.
    return max(0, math.ceil(min(value, 1e6) - 1e-9))
