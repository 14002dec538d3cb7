"""What no autoscaler can beat: the best fixed fleet, and one that knows the future.

Both are found by search with the whole trace known; they are limits, not policies one could run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from servingtiers.simulate.capacity import work_of
from servingtiers.simulate.fleet import RunResult, run
from servingtiers.simulate.rivals.base import Key
from servingtiers.simulate.rivals.static import Scheduled, StaticReplicas
from servingtiers.simulate.scenario import PoolPlan, Scenario, TierPlan, slo_of
from servingtiers.simulate.scoring import Score, score

__all__ = [
    "TARGET",
    "Clairvoyant",
    "StaticOptimal",
    "clairvoyant",
    "clairvoyant_run",
    "static_optimal",
    "static_run",
]

TARGET = 0.01
"""Share of requests that may miss an objective."""
_SLACK = 0.001
"""A fixed fleet that is within this of the best level counts as reaching it."""
_BIN = 5.0
_SMOOTH = (15.0, 60.0)
_DOWN = (1.0, 0.9, 0.8, 0.7, 0.58, 0.45, 0.3)
_UP = (1.1, 1.25, 1.45, 1.7, 2.0, 2.4, 3.0)
_NEARLY_NONE = 0.001
_USELESS = 0.2
"""Schedules with more violations are of no interest."""


@dataclass(frozen=True, slots=True)
class StaticOptimal:
    """The cheapest fixed fleet."""

    replicas: dict[Key, int]
    score: Score
    level: float
    """Share of violations it was asked for: 1 %, or what the largest fleet reaches where that is more."""
    feasible: bool
    """Whether 1 % can be reached at all."""

    @property
    def total(self) -> int:
        """Replicas of all pools."""
        return sum(self.replicas.values())


def static_optimal(
    scenario: Scenario, seed: int, *, target: float = TARGET, progress: Callable[[], None] | None = None
) -> StaticOptimal:
    """Return the fewest replicas, never changed, that keep violations at the target.

    Where even ``maxReplicas`` miss the target, the fewest that come within 0.1 point of what they reach. With two pools
    the fewest accelerators over all ratios are searched. Several tiers are searched one after the other, the others at
    their maximum: fixed fleets do not disturb each other unless accelerators are short.

    Args:
        scenario: What is simulated.
        seed: Seed of the runs.
        target: Share of violations.
        progress: Called after every run.
    """
    most = {
        (tier.key, pool.name): pool.scaling.max_replicas for tier in scenario.tiers for pool in tier.pools
    }
    known: dict[tuple[int, ...], Score] = {}

    def at(replicas: dict[Key, int]) -> Score:
        key = tuple(replicas.values())
        if key not in known:
            known[key] = score(static_run(scenario, replicas, seed))
            if progress is not None:
                progress()
        return known[key]

    best = at(most)
    level = target if best.violations <= target else best.violations + _SLACK
    chosen = dict(most)
    for tier in scenario.tiers:
        keys = [(tier.key, pool.name) for pool in tier.pools]
        if len(keys) == 1:
            chosen = _least(at, chosen, keys[0], level)
            continue
        gpus = {(tier.key, pool.name): pool.gpus for pool in tier.pools}
        first, second = keys
        options = []
        # The second pool's least number falls as the first grows: walk down the staircase.
        ceiling = most[second]
        lowest = _least(at, {**chosen, second: most[second]}, first, level)[first]
        for count in range(lowest, most[first] + 1):
            found = _least(at, {**chosen, first: count, second: ceiling}, second, level)
            options.append(found)
            if found[second] == ceiling and count > lowest + 2:
                break
            ceiling = found[second]

        def cost(each: dict[Key, int], gpus: dict[Key, int] = gpus) -> int:
            return sum(each[key] * count for key, count in gpus.items())

        chosen = min(options, key=cost)
        # No two engines are equally fast, and others serve where there are more of them: the staircase has holes.
        while kept := [
            fewer
            for key in keys
            if chosen[key] > 1 and at(fewer := {**chosen, key: chosen[key] - 1}).violations <= level
        ]:
            chosen = min(kept, key=cost)
    return StaticOptimal(chosen, at(chosen), level, best.violations <= target)


def static_run(scenario: Scenario, replicas: dict[Key, int], seed: int) -> RunResult:
    """Run a fixed fleet that is ready from the start."""
    tiers = tuple(
        replace(
            tier,
            initial={pool.name: replicas[tier.key, pool.name] for pool in tier.pools},
            pools=tuple(
                replace(pool, scaling=pool.scaling.model_copy(update={"min_replicas": 1}))
                for pool in tier.pools
            ),
        )
        for tier in scenario.tiers
    )
    fixed = replace(scenario, tiers=tiers)
    return _whole(run(fixed, StaticReplicas(fixed, replicas, "static-optimal"), seed))


def _whole(result: RunResult) -> RunResult:
    """Return a run that was not interrupted: half a run is no candidate for a limit.

    Raises:
        KeyboardInterrupt: It was.
    """
    if not result.complete:
        raise KeyboardInterrupt
    return result


def _least(
    at: Callable[[dict[Key, int]], Score], start: dict[Key, int], key: Key, level: float
) -> dict[Key, int]:
    """Return ``start`` with the least number of ``key`` that keeps the level; it is kept at ``start``."""
    low, high = 0, start[key]
    while high - low > 1:
        middle = (low + high) // 2
        if at({**start, key: middle}).violations <= level:
            high = middle
        else:
            low = middle
    return {**start, key: high}


@dataclass(frozen=True, slots=True)
class Clairvoyant:
    """Runs of schedules that know the trace and every start-up."""

    scores: tuple[Score, ...] = field(default=())
    settings: tuple[tuple[float, float], ...] = field(default=())
    """(window, margin) behind each score; window 0: a constant schedule of so many replicas."""

    def gpu_hours(self, violations: float) -> float | None:
        """Return the fewest GPU-hours at which a schedule has at most so many violations; None where none has."""
        within = [each.gpu_hours for each in self.scores if each.violations <= violations + 1e-12]
        return min(within, default=None)

    def best(self, violations: float) -> Score | None:
        """Return the cheapest run with at most so many violations."""
        within = [each for each in self.scores if each.violations <= violations + 1e-12]
        return min(within, key=lambda each: each.gpu_hours, default=None)


def clairvoyant(
    scenario: Scenario,
    seed: int,
    *,
    progress: Callable[[], None] | None = None,
    smooth: tuple[float, ...] = _SMOOTH,
) -> Clairvoyant:
    """Search schedules that know every arrival, every length and every start-up.

    The work that arrives, in replica-seconds by the plant's own capacity, is averaged over a window, multiplied by a margin
    and rounded up. Each replica beyond the others is then an interval in time; gaps between its intervals that are
    shorter than a start-up are filled (leaving would cost more than staying), and it is ordered its own start-up time ahead.
    Windows and margins are swept, and constant schedules are tried too; the lower envelope of (violations, GPU-hours) is
    the limit found: a better schedule may exist, a worse one is never reported.

    Args:
        scenario: What is simulated.
        seed: Seed of the runs: start-ups are those of this seed.
        progress: Called after every run.
        smooth: Windows over which work is averaged, seconds.
    """
    found = list(_sweep(scenario, seed, progress, smooth))
    found.extend(_constant(scenario, seed, progress, found))
    return Clairvoyant(tuple(each for each, _ in found), tuple(setting for _, setting in found))


def clairvoyant_run(scenario: Scenario, seed: int, limit: Clairvoyant, chosen: Score) -> RunResult:
    """Run one schedule of a sweep again, for its history."""
    window, margin = limit.settings[limit.scores.index(chosen)]
    return _scheduled(scenario, seed, window, margin)


def _sweep(
    scenario: Scenario, seed: int, progress: Callable[[], None] | None, smooth: tuple[float, ...]
) -> Iterator[tuple[Score, tuple[float, float]]]:
    """Yield schedules from a margin of 1 downwards until they are useless, and upwards until more buys nothing."""

    def at(window: float, margin: float) -> Score:
        found = score(_scheduled(scenario, seed, window, margin))
        if progress is not None:
            progress()
        return found

    for window in smooth:
        first = best = 1.0
        for margin in _DOWN:
            found = at(window, margin)
            yield found, (window, margin)
            if margin == _DOWN[0]:
                first = best = found.violations
            if found.violations > _USELESS:
                break
        stuck = 0
        for margin in _UP if first > _NEARLY_NONE else ():
            found = at(window, margin)
            yield found, (window, margin)
            stuck = stuck + 1 if found.violations > 0.95 * best else 0
            best = min(best, found.violations)
            if found.violations < _NEARLY_NONE or stuck >= 2:
                break


def _constant(
    scenario: Scenario,
    seed: int,
    progress: Callable[[], None] | None,
    found: list[tuple[Score, tuple[float, float]]],
) -> Iterator[tuple[Score, tuple[float, float]]]:
    """Yield fixed fleets of one pool that cost no more than the dearest schedule; on bursty short traces they can win."""
    if len(scenario.tiers) != 1 or len(scenario.tiers[0].pools) != 1:
        return
    hours = (scenario.seconds - scenario.warm_up) / 3600.0 * scenario.tiers[0].pools[0].gpus
    most = scenario.tiers[0].pools[0].scaling.max_replicas
    dearest = max(score.gpu_hours for score, _ in found)
    good = False
    for replicas in range(max(1, math.floor(min(s.gpu_hours for s, _ in found) / hours)), most + 1):
        if replicas * hours > 1.25 * dearest or good:
            return
        fixed = score(_scheduled(scenario, seed, 0.0, float(replicas)))
        if progress is not None:
            progress()
        good = fixed.violations < _NEARLY_NONE
        yield fixed, (0.0, float(replicas))


def _scheduled(scenario: Scenario, seed: int, window: float, margin: float) -> RunResult:
    plan: dict[Key, tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
    tiers = []
    for tier in scenario.tiers:
        initial = {}
        for pool in tier.pools:
            if window == 0.0:
                times, orders, first = np.zeros(1), np.array([round(margin)]), round(margin)
            else:
                need = _need(_demand(scenario, tier, pool), window, margin, pool.scaling.max_replicas)
                times, orders, first = _orders(scenario, seed, need)
            plan[tier.key, pool.name] = times, orders
            initial[pool.name] = first
        tiers.append(replace(tier, initial=initial))
    aware = replace(scenario, tiers=tuple(tiers), metric_age=0.0)
    return _whole(run(aware, Scheduled(aware, plan, "clairvoyant", _BIN), seed))


def _demand(scenario: Scenario, tier: TierPlan, pool: PoolPlan) -> NDArray[np.float64]:
    """Return the work that arrives per bin, in replicas of the plant."""
    trace = tier.trace
    limits = tuple(sorted(slo_of(tier.targets).items()))
    prompt = np.maximum(trace.prompt * (1.0 - (tier.prefix_hit or 0.0)), 1.0)
    if tier.shared_prefix:
        prompt = np.maximum(trace.prompt - trace.shared, 1).astype(np.float64)
    means = [
        (round(max(float(v.mean()), 1.0), 1), min(round(float(v.std() / max(v.mean(), 1e-9)), 2), 3.0))
        for v in (prompt, trace.output.astype(np.float64))
    ]
    work = work_of(pool.model, pool.engine, pool.role, means[0], means[1], limits)
    cost = np.maximum(work.prompt * prompt + work.output * trace.output, 1e-6)
    edges = np.arange(0.0, scenario.seconds + _BIN, _BIN)
    load: NDArray[np.float64] = np.histogram(trace.arrival, edges, weights=cost)[0] / _BIN
    return load


def _need(demand: NDArray[np.float64], window: float, margin: float, most: int) -> NDArray[np.int64]:
    """Return the replicas that must be ready in each bin."""
    width = max(1, round(window / _BIN))
    # Work is done after it arrives: the window looks back, but the replicas are there from its beginning.
    kernel = np.ones(width) / width
    spread = np.convolve(demand, kernel)[: len(demand)]
    ahead = np.convolve(demand[::-1], kernel)[: len(demand)][::-1]
    need = np.ceil(margin * np.maximum(spread, ahead) - 1e-9)
    found: NDArray[np.int64] = np.clip(need, 1, most).astype(np.int64)
    return found


def _orders(
    scenario: Scenario, seed: int, need: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Turn needed replicas per bin into orders: (times, replicas from then on, replicas at the start)."""
    shortest = scenario.start_up.median + scenario.scheduling + scenario.termination
    intervals: list[tuple[float, float]] = []
    for level in range(1, int(need.max()) + 1):
        on = np.flatnonzero(need >= level)
        breaks = np.flatnonzero(np.diff(on) * _BIN > shortest + _BIN)
        starts = np.concatenate([[on[0]], on[breaks + 1]])
        ends = np.concatenate([on[breaks], [on[-1]]]) + 1
        intervals.extend((float(a) * _BIN, float(b) * _BIN) for a, b in zip(starts, ends, strict=True))
    first = int(need[0])
    # A pod whose order would lie before the run is there from the start.
    changes: dict[float, int] = {}
    initial = 0
    order = 0
    for begin, end in sorted(intervals):
        # The start-ups of this pod and its neighbours, as another order of creation would swap them.
        draws = [scenario.start_up.draw(seed, max(first + order + step, 0)) for step in (-1, 0, 1)]
        ahead = begin - scenario.scheduling - max(draws)
        if begin == 0.0 or ahead <= 0.0:
            initial += 1
        else:
            order += 1
            at = math.floor(ahead / _BIN) * _BIN
            changes[at] = changes.get(at, 0) + 1
        if end < len(need) * _BIN:
            changes[end] = changes.get(end, 0) - 1
    times = np.array([0.0, *sorted(changes)])
    deltas = np.array([initial, *(changes[at] for at in sorted(changes))])
    replicas = np.maximum(np.cumsum(deltas), 1).astype(np.int64)
    return times, replicas, max(initial, 1)
