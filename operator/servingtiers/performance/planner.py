"""The capacity planner: the cheapest fleet that keeps the objectives, or why none can.

Every option (model × weights × accelerator × tensor parallelism × batch limit, aggregated or disaggregated) gets a
*curve*: latency percentiles over the rate of one replica, from the analytic path, made monotone. The largest rate at
which the curve meets every objective is what a replica is worth; replicas, cost and the binding objective follow.
The caller may have the best few confirmed by event simulation (:mod:`servingtiers.performance.confirmation`).

Pure and light (no numpy): the operator plans with it, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING

from servingtiers.catalog.accelerators import Accelerator, accelerators
from servingtiers.catalog.models import ModelShape
from servingtiers.catalog.names import CatalogError
from servingtiers.performance.analytic import EngineLimits, Prediction, Traffic, predict
from servingtiers.performance.host import with_host_time
from servingtiers.performance.latency import PERCENTILES, Percentiles
from servingtiers.performance.select import DoesNotFitError, step_model
from servingtiers.performance.steps import OutOfHullError
from servingtiers.performance.workload import Arrivals

if TYPE_CHECKING:
    from servingtiers.performance.profile import Profile
    from servingtiers.performance.steps import GridStepModel

__all__ = [
    "BATCH_LIMITS",
    "FRONT_END_MS",
    "LINK_GB_S",
    "TAIL_MARGIN",
    "Choice",
    "Constraints",
    "Curve",
    "Demand",
    "Metric",
    "Objective",
    "Option",
    "Plan",
    "PoolChoice",
    "Rejection",
    "Role",
    "budget_for_gap",
    "busiest",
    "curve",
    "default_limits",
    "engine_curve",
    "held_values",
    "largest_rate",
    "plan",
    "round_up",
    "share_of",
    "transfer_ms",
]

TAIL_MARGIN = 1.4
"""Predicted p99 and p99.9 of TTFT are multiplied by this until live tails exist: in trials against real engines
the measured p99 lay about 30 % above the simulated one, even with even arrivals."""
FRONT_END_MS = 1.0
"""From a request's arrival to the scheduler: HTTP, tokenizer, the queue between vLLM's two processes. Hugging Face
tokenizers do about a million tokens a second. In closed loop what matters more than the value is that it is not 0: a
client's next request misses the step composed when its last one was answered."""
BATCH_LIMITS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""``max-num-seqs`` that are tried."""
LINK_GB_S = 25.0
"""Rate at which a KV cache moves between engines of different nodes, 10⁹ bytes/s: a 200 Gbit/s link."""
_LOADS = (1e-4, 0.06, 0.15, 0.3, 0.45, 0.6, 0.72, 0.82, 0.9, 0.95)
"""Points of a curve, as shares of the rate an engine sustains; the first is an idle engine."""


class Metric(StrEnum):
    """What an objective bounds."""

    TTFT = "ttft"
    TPOT = "tpot"
    ITL = "itl"
    E2E = "e2e"


class Role(StrEnum):
    """What a pool does."""

    AGGREGATED = "aggregated"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Objective:
    """At most the named share of requests may take longer than the target."""

    metric: Metric
    percentile: str
    """``mean``, ``p50``, ``p90``, ``p95``, ``p99`` or ``p999``."""
    target_ms: float

    def __post_init__(self) -> None:
        if self.percentile not in {"mean", *PERCENTILES}:
            raise ValueError(f"unknown percentile {self.percentile!r}: use mean, {', '.join(PERCENTILES)}")
        if not 0.0 < self.target_ms < math.inf:
            raise ValueError(f"{self.metric} {self.percentile} of {self.target_ms:g} ms: use a time above 0")

    def __str__(self) -> str:
        return f"{self.metric.upper()} {self.percentile} ≤ {duration(self.target_ms)}"


@dataclass(frozen=True, slots=True)
class Demand:
    """The traffic to plan for."""

    rate: float
    """Requests per second, of the whole fleet."""
    prompt_tokens: float
    output_tokens: float
    prompt_cv: float = 0.0
    output_cv: float = 0.0
    prefix_hit_rate: float = 0.0
    arrivals: Arrivals = field(default_factory=Arrivals)
    """Used where a plan is confirmed; the analytic path knows Poisson arrivals."""

    def __post_init__(self) -> None:
        if not 0.0 < self.rate < math.inf:
            raise ValueError(f"rate {self.rate:g}: use a number of requests per second above 0")
        for name, value in (("prompt tokens", self.prompt_tokens), ("output tokens", self.output_tokens)):
            if not 1.0 <= value < math.inf:
                raise ValueError(f"{name} {value:g}: use 1 or more")
        for name, value in (("prompt", self.prompt_cv), ("output", self.output_cv)):
            if not 0.0 <= value <= 3.0:
                raise ValueError(f"{name} length CV {value:g}: use 0 (all alike) to 3")
        if not 0.0 <= self.prefix_hit_rate <= 1.0:
            raise ValueError(f"prefix hit rate {self.prefix_hit_rate:g}: use a share from 0 to 1")

    @property
    def context(self) -> float:
        """KV tokens of a sequence that decodes, on average."""
        return self.prompt_tokens + self.output_tokens / 2.0


@dataclass(frozen=True, slots=True)
class Constraints:
    """What may be chosen from."""

    accelerators: tuple[Accelerator, ...] = field(default_factory=accelerators)
    tensor_parallel: tuple[int, ...] = (1, 2, 4, 8)
    weights: tuple[str, ...] = ("bf16",)
    kv_dtype: str = "bf16"
    batch_limits: tuple[int, ...] = BATCH_LIMITS
    max_num_batched_tokens: int | None = None
    """Token budget of a step; None: vLLM's default for the accelerator, less where an objective on ITL needs it."""
    aggregated: bool = True
    """Consider fleets of one pool."""
    disaggregation: bool = True
    """Consider fleets of a prefill and a decode pool."""
    by_role: Mapping[Role, frozenset[str]] = field(default_factory=dict)
    """Accelerator keys allowed for a role; a role that is left out takes any of ``accelerators``."""
    prices: Mapping[str, float] = field(default_factory=dict)
    """Price per hour by accelerator key, over the catalogue's."""
    spare: int = 1
    """Replicas of each pool beyond what the load needs: N+1."""
    tail_margin: float = TAIL_MARGIN
    link_gb_s: float = LINK_GB_S
    """Rate at which a KV cache moves between engines of different nodes, 10⁹ bytes/s."""
    profile: Profile | None = None
    """The user's measurements; every option that is left must be what they were made on."""

    def allows(self, role: Role, accelerator: Accelerator) -> bool:
        """Whether a pool of a role may run on an accelerator."""
        keys = self.by_role.get(role)
        return keys is None or accelerator.key in keys

    def price(self, accelerator: Accelerator) -> float:
        """Price of one accelerator for one hour."""
        return self.prices.get(accelerator.key, accelerator.price_per_hour_usd)

    def price_source(self, accelerator: Accelerator) -> str:
        """Where that price comes from."""
        return "given" if accelerator.key in self.prices else accelerator.price_source


@dataclass(frozen=True, slots=True)
class Option:
    """One replica that could be run."""

    model: ModelShape
    accelerator: Accelerator
    tensor_parallel: int
    weights: str
    kv_dtype: str
    max_num_seqs: int
    max_num_batched_tokens: int
    profile: Profile | None = None

    def step_model(self) -> GridStepModel:
        """Its step model."""
        return _step_model(
            self.model, self.accelerator, self.tensor_parallel, self.weights, self.kv_dtype, self.profile
        )

    @property
    def hardware(self) -> str:
        """For a person: ``2 x h100-sxm-80gb``."""
        return f"{self.tensor_parallel} x {self.accelerator.key}"


@lru_cache(maxsize=1024)
def _step_model(
    model: ModelShape,
    accelerator: Accelerator,
    tensor_parallel: int,
    weights: str,
    kv_dtype: str,
    profile: Profile | None,
) -> GridStepModel:
    return with_host_time(
        step_model(
            model,
            accelerator,
            tensor_parallel=tensor_parallel,
            weights=weights,
            kv_dtype=kv_dtype,
            profile=profile,
        )
    )


@dataclass(frozen=True, slots=True)
class PoolChoice:
    """One pool of a fleet."""

    role: Role
    option: Option
    replica_rate: float
    """Requests per second that one replica carries within the objectives."""
    needed: int
    """Replicas that the load needs."""
    replicas: int
    """With the spare ones."""
    predicted: Prediction
    """One of the needed replicas at the planned load, the spare ones gone."""
    source: str
    band_percent: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A fleet that keeps the objectives."""

    model: ModelShape
    pools: tuple[PoolChoice, ...]
    ttft: Percentiles
    """Of the fleet at the planned load, ms, before the tail margin."""
    tpot: Percentiles
    e2e: Percentiles
    binding: str
    """The limit that sets the rate of a replica."""
    cost_per_hour: float
    cost_per_million_output: float
    cost_per_million_tokens: float
    """Prompt and output tokens together."""
    link_gb_s: float = LINK_GB_S
    """Rate at which KV caches move between its pools, 10⁹ bytes/s."""
    confirmed: bool = False
    """The event simulation keeps the objectives at this load, too."""

    @property
    def kind(self) -> str:
        """``aggregated`` or ``disaggregated``."""
        return "aggregated" if len(self.pools) == 1 else "disaggregated"

    @property
    def accelerators(self) -> int:
        """Accelerators of the fleet, the spare ones included."""
        return sum(pool.replicas * pool.option.tensor_parallel for pool in self.pools)

    @property
    def band_percent(self) -> float:
        """The wider of its pools' error bands."""
        return max(pool.band_percent for pool in self.pools)


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why an option is out."""

    what: str
    reason: str
    breaking: Objective | None = None
    """The objective that an idle engine misses."""
    best_ms: float = math.inf
    """What an idle engine reaches for it, with the margin."""
    memory_bytes: float = 0.0
    """Of the replica, where it could be built at all: of options that have no room the largest says most."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: fleets by cost, or why there is none."""

    demand: Demand
    objectives: tuple[Objective, ...]
    choices: tuple[Choice, ...]
    """Cheapest first."""
    rejections: tuple[Rejection, ...]
    verdict: str
    """One sentence."""
    nearest: tuple[Objective, ...] = ()
    """Where infeasible: the nearest objectives that can be kept."""
    nearest_choice: Choice | None = None
    """And the cheapest fleet that keeps those."""

    @property
    def feasible(self) -> bool:
        """Whether any fleet keeps the objectives."""
        return bool(self.choices)


def duration(ms: float) -> str:
    """A latency for a person: ``850 µs``, ``12.5 ms``, ``340 ms``, ``2.1 s``."""
    if ms < 1.0:
        return f"{ms * 1e3:.0f} µs"
    if ms < 100.0:
        return f"{ms:.3g} ms"
    return f"{ms:.0f} ms" if ms < 1000.0 else f"{ms / 1e3:.3g} s"


def default_limits(gpu: Accelerator) -> tuple[int, int]:
    """Return (``--max-num-seqs``, ``--max-num-batched-tokens``) as vLLM's API server sets them on an accelerator.

    From ``EngineArgs`` of vLLM 0.32: by device memory, with the A100 among the small ones.
    """
    if gpu.memory_gib >= 160:
        return 1024, 16384
    if gpu.memory_gib >= 70 and not gpu.key.startswith("a100"):
        return 1024, 8192
    return 256, 2048


# --- curves ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Curve:
    """Latencies of one replica over its rate, none of them falling."""

    rates: tuple[float, ...]
    """Requests per second, ascending."""
    points: tuple[Prediction, ...]
    transfer_ms: float = 0.0
    """Time to fetch a prompt's KV cache, part of the TTFT of a decode pool."""

    def values(self, metric: Metric, percentile: str) -> list[float]:
        """One latency at each rate, ms, as its running maximum."""
        values: list[float] = []
        for point in self.points:
            value = _latency(point, metric, percentile) + (
                self.transfer_ms if metric in (Metric.TTFT, Metric.E2E) else 0.0
            )
            values.append(max(value, values[-1]) if values else value)
        return values


def _latency(point: Prediction, metric: Metric, percentile: str) -> float:
    match metric:
        case Metric.TTFT:
            return point.ttft.at(percentile) + FRONT_END_MS
        case Metric.E2E:
            return point.e2e.at(percentile) + FRONT_END_MS
        case _:
            # A single gap is at least as spread as a request's mean gap; the event simulation knows the rest.
            return point.tpot.at(percentile)


def _traffic(demand: Demand, role: Role, rate: float) -> Traffic:
    traffic = Traffic(
        rate=rate,
        prompt_tokens=demand.prompt_tokens,
        output_tokens=demand.output_tokens,
        prompt_cv=demand.prompt_cv,
        output_cv=demand.output_cv,
        prefix_hit_rate=demand.prefix_hit_rate,
    )
    if role is Role.PREFILL:
        return replace(traffic, output_tokens=1.0, output_cv=0.0)
    if role is Role.DECODE:
        # All of the prompt but its last token comes with the KV cache.
        return replace(traffic, prefix_hit_rate=1.0, prompt_cv=0.0)
    return traffic


def curve(option: Option, role: Role, demand: Demand, link_gb_s: float) -> Curve:
    """Return an option's latencies over its rate; the demand's rate is disregarded.

    The curve ends where the engine saturates, and is empty where its KV cache does not hold one request.

    Args:
        option: The replica.
        role: What it does.
        demand: The mix of lengths.
        link_gb_s: Rate at which a KV cache comes to a decode engine, 10⁹ bytes/s.

    Raises:
        CatalogError: The model does not fit, or the parallelism is impossible.
        OutOfHullError: Nothing near was ever measured.
    """
    transfer = 0.0
    if role is Role.DECODE:
        transfer = transfer_ms(option.model, option.kv_dtype, demand.prompt_tokens, link_gb_s)
    limits, steps = EngineLimits(option.max_num_seqs, option.max_num_batched_tokens), option.step_model()
    longest = demand.prompt_tokens + (0.0 if role is Role.PREFILL else demand.output_tokens)
    if longest > steps.kv_capacity_tokens:
        return Curve((), (), transfer)  # the closed forms would have it decode all the same
    return engine_curve(steps, limits, role, demand, transfer)


def transfer_ms(model: ModelShape, kv_dtype: str, prompt_tokens: float, link_gb_s: float) -> float:
    """Return the time to move a prompt's KV cache over a link of so many 10⁹ bytes/s, ms."""
    return prompt_tokens * model.kv_bytes_per_token(kv_dtype) / (link_gb_s * 1e6)


@lru_cache(maxsize=4096)
def engine_curve(
    model: GridStepModel, limits: EngineLimits, role: Role, demand: Demand, transfer: float = 0.0
) -> Curve:
    """Return one engine's latencies over its rate, up to where it saturates.

    About eleven calls of the analytic path, remembered by arguments: the operator asks on every pass.

    Args:
        model: Its step model.
        limits: Its limits.
        role: What it does.
        demand: The mix of lengths; the rate is disregarded.
        transfer: Time to fetch a prompt's KV cache, ms; part of a decode engine's TTFT.
    """
    largest = _sustained(model, limits, role, demand)
    rates: list[float] = []
    points: list[Prediction] = []
    for load in _LOADS:
        point = predict(model, _traffic(demand, role, load * largest), limits)
        if point.saturated:
            break
        rates.append(load * largest)
        points.append(point)
    return Curve(tuple(rates), tuple(points), transfer)


def _sustained(model: GridStepModel, limits: EngineLimits, role: Role, demand: Demand) -> float:
    """Return where an engine saturates, requests per second: utilisation is the load as a share of it."""
    probe = predict(model, _traffic(demand, role, 1e-3), limits)
    return 1e-3 / max(probe.utilisation, 1e-12)


@lru_cache(maxsize=16384)
def busiest(model: GridStepModel, limits: EngineLimits, role: Role, demand: Demand) -> Prediction:
    """Return an engine at the end of its curve, where its batch is as good as full."""
    largest = _sustained(model, limits, role, demand)
    return predict(model, _traffic(demand, role, _LOADS[-1] * largest), limits)


def _margined(objective: Objective, margin: float) -> float:
    """What a predicted latency is multiplied by before it is held against an objective."""
    return margin if objective.metric is Metric.TTFT and objective.percentile in {"p99", "p999"} else 1.0


def largest_rate(found: Curve, objectives: Sequence[Objective], margin: float) -> tuple[float, str]:
    """The largest rate at which every objective is met, and the objective that binds; 0 where even idle misses.

    Args:
        found: The replica's curve.
        objectives: All of them hold.
        margin: Factor on predicted tails of TTFT; see :data:`TAIL_MARGIN`.
    """
    if not found.rates:
        return 0.0, "KV cache"
    best, binding = found.rates[-1], "throughput"
    for objective in objectives:
        rate = _crossing(found.rates, held_values(found, objective, margin), objective.target_ms)
        if rate < best:
            best, binding = rate, str(objective)
    return best, binding


def held_values(found: Curve, objective: Objective, margin: float) -> list[float]:
    """Return what is held against an objective's target at each rate of a curve, margin included, ms."""
    values = found.values(objective.metric, objective.percentile)
    factor = _margined(objective, margin)
    tail = 0.0
    if objective.metric is Metric.E2E and objective.percentile in {"p99", "p999"}:
        tail = margin - 1.0
    first = found.values(Metric.TTFT, objective.percentile) if tail else [0.0] * len(values)
    return [value * factor + tail * start for value, start in zip(values, first, strict=True)]


def _crossing(rates: Sequence[float], values: Sequence[float], target: float) -> float:
    """The rate at which a rising curve crosses a target; the last rate if it never does, 0 if it begins above."""
    if values[0] > target:
        return 0.0
    for i in range(1, len(rates)):
        if values[i] > target:
            share = (target - values[i - 1]) / (values[i] - values[i - 1])
            return rates[i - 1] + share * (rates[i] - rates[i - 1])
    return rates[-1]


# --- the search -----------------------------------------------------------------------------------------------
Confirm = Callable[[Choice, Demand, Sequence[Objective], Constraints], Choice | None]
"""Checks a choice by other means; returns it, mended where needed, or None where it cannot be had."""


def plan(
    models: Sequence[ModelShape],
    demand: Demand,
    objectives: Sequence[Objective],
    constraints: Constraints | None = None,
    *,
    confirm: Confirm | None = None,
    top: int = 5,
) -> Plan:
    """Rank the fleets that keep the objectives by cost.

    Args:
        models: Candidates; a smaller model is one way to low latency.
        demand: The traffic.
        objectives: All of them hold at once; none means the cheapest tokens.
        constraints: What may be chosen from.
        confirm: Checks the best choices; see :mod:`servingtiers.performance.confirmation`.
        top: Choices that are confirmed; the others are ranked as they are.

    Raises:
        ValueError: A request is longer than every model's longest context.
    """
    constraints = constraints or Constraints()
    _check_lengths(models, demand)
    choices: list[Choice] = []
    rejections: list[Rejection] = []
    for model in models:
        for weights in constraints.weights:
            found, out = _of_model(model, weights, demand, tuple(objectives), constraints)
            choices += found
            rejections += out
    choices.sort(key=_rank)
    if confirm is not None and choices:
        cheapest = choices[0]
        choices = _confirmed(choices, demand, objectives, constraints, confirm, top)
        if not choices:
            fleet = " + ".join(f"{pool.needed} x ({pool.option.hardware})" for pool in cheapest.pools)
            return Plan(
                demand,
                tuple(objectives),
                (),
                tuple(rejections),
                f"infeasible in simulation: closed forms would take {fleet}, but simulated with {demand.arrivals} "
                f"arrivals {_listed(objectives)} is missed at 3 times as many, too: loosen it, or smooth the arrivals",
            )
    if choices:
        best = choices[0]
        fleet = " + ".join(f"{pool.replicas} replicas of {pool.option.hardware}" for pool in best.pools)
        return Plan(
            demand,
            tuple(objectives),
            tuple(choices),
            tuple(rejections),
            f"feasible: {fleet} at {best.cost_per_hour:.2f} USD/hour, bound by {best.binding}",
        )
    return _infeasible(models, demand, tuple(objectives), constraints, rejections)


def _listed(objectives: Sequence[Objective]) -> str:
    return " and ".join(str(o) for o in objectives) or "throughput"


def _rank(choice: Choice) -> tuple[float, int, float, str]:
    """Order of choices: cost, then fewer parts, then speed; names make it stable."""
    names = ",".join(f"{pool.option.hardware}/{pool.option.max_num_seqs}" for pool in choice.pools)
    return (
        round(choice.cost_per_hour, 6),
        len(choice.pools),
        choice.ttft.p99,
        f"{choice.model.name} {names}",
    )


def _check_lengths(models: Sequence[ModelShape], demand: Demand) -> None:
    longest = max(model.max_context for model in models)
    if demand.prompt_tokens + demand.output_tokens > longest:
        raise ValueError(
            f"{demand.prompt_tokens:g} prompt + {demand.output_tokens:g} output tokens exceed the maximum length of "
            f"{longest}: shorten them or choose a model with a longer context"
        )


def _options(
    model: ModelShape, weights: str, demand: Demand, objectives: Sequence[Objective], constraints: Constraints
) -> list[Option]:
    batch = constraints.batch_limits[-1]
    gap = min((o.target_ms for o in objectives if o.metric is Metric.ITL), default=math.inf)
    found = []
    for accelerator in constraints.accelerators:
        for size in constraints.tensor_parallel:
            budget = constraints.max_num_batched_tokens or default_limits(accelerator)[1]
            option = Option(
                model,
                accelerator,
                size,
                weights,
                constraints.kv_dtype,
                batch,
                max(budget, batch),
                constraints.profile,
            )
            if gap < math.inf and constraints.max_num_batched_tokens is None:
                option = _with_small_steps(option, demand, gap)
            found.append(option)
    return found


def _with_small_steps(option: Option, demand: Demand, gap_ms: float) -> Option:
    """The option with the largest token budget whose full step is no longer than a gap between tokens may be."""
    try:
        steps = option.step_model()
    except CatalogError:
        return option  # it is refused with its reason where it is sized
    budget = budget_for_gap(steps, demand, gap_ms, option.max_num_batched_tokens, option.max_num_seqs)
    return replace(option, max_num_batched_tokens=budget)


@lru_cache(maxsize=1024)
def budget_for_gap(steps: GridStepModel, demand: Demand, gap_ms: float, most: int, max_num_seqs: int) -> int:
    """Return the largest token budget whose full step is no longer than a gap between two tokens may be.

    Args:
        steps: Step model of the engine.
        demand: The mix of lengths.
        gap_ms: The tightest objective on ITL, ms.
        most: The largest budget that may be chosen.
        max_num_seqs: The batch limit, which a budget is never below.
    """
    context = demand.context
    beside = min(32, max_num_seqs)
    for budget in (16384, 8192, 4096, 2048, 1024):
        if budget > most:
            continue
        prompt = min(budget - beside, demand.prompt_tokens * (1.0 - demand.prefix_hit_rate) * 8)
        pairs = prompt * demand.prompt_tokens / 2.0
        if steps.grid.step_ms(prompt, pairs, beside, beside * context) <= gap_ms:
            return max(budget, max_num_seqs)
    return max(min(512, most), max_num_seqs)


@dataclass(frozen=True, slots=True)
class _Worth:
    """What one replica of an option is worth."""

    option: Option
    role: Role
    rate: float
    binding: str

    def cost_per_rate(self, constraints: Constraints) -> float:
        return self.option.tensor_parallel * constraints.price(self.option.accelerator) / self.rate


def _of_model(
    model: ModelShape,
    weights: str,
    demand: Demand,
    objectives: tuple[Objective, ...],
    constraints: Constraints,
) -> tuple[list[Choice], list[Rejection]]:
    choices: list[Choice] = []
    rejections: list[Rejection] = []
    decoders: list[_Worth] = []
    prefills: list[_Worth] = []
    slow: dict[Role, list[Rejection]] = {Role.PREFILL: [], Role.DECODE: []}
    shape = replace(demand, rate=1.0)  # curves do not depend on it: one cache entry
    disaggregated = constraints.disaggregation and demand.output_tokens > 1.0
    for option in _options(model, weights, demand, objectives, constraints):
        if demand.prompt_tokens + demand.output_tokens > model.max_context:
            rejections.append(Rejection(model.name, "a request is longer than its context"))
            break
        what = f"{model.name} {weights} on {option.hardware}"
        try:
            if constraints.aggregated and constraints.allows(Role.AGGREGATED, option.accelerator):
                worth = _best_batch(option, Role.AGGREGATED, shape, objectives, constraints)
                if worth is None:
                    rejections.append(_too_slow(what, option, shape, objectives, constraints))
                else:
                    choices.append(_aggregated(worth, demand, constraints))
            for role, worths in ((Role.DECODE, decoders), (Role.PREFILL, prefills)):
                if not (disaggregated and constraints.allows(role, option.accelerator)):
                    continue
                share = share_of(role, objectives)
                worth = _best_batch(option, role, shape, share, constraints)
                if worth is not None:
                    worths.append(worth)
                elif not constraints.aggregated:
                    slow[role].append(_too_slow(what, option, shape, share, constraints, role))
        except (DoesNotFitError, OutOfHullError) as error:
            memory = option.tensor_parallel * option.accelerator.memory_bytes
            rejections.append(Rejection(what, str(error), memory_bytes=memory))
        except CatalogError as error:
            rejections.append(Rejection(what, str(error)))
    decoders.sort(key=lambda w: w.cost_per_rate(constraints))
    prefills.sort(key=lambda w: w.cost_per_rate(constraints))
    for decoder in decoders[:4]:
        for prefill in prefills[:4]:
            # NIXL cannot gather KV heads: the decode side must be at least as parallel.
            if prefill.option.tensor_parallel <= decoder.option.tensor_parallel:
                choice = _disaggregated(prefill, decoder, demand, objectives, constraints)
                choices += [choice] if choice else []
    if not constraints.aggregated and not choices:
        # Of the pool that cannot be had, or of both.
        rejections += [] if prefills else slow[Role.PREFILL]
        rejections += [] if decoders else slow[Role.DECODE]
        rejections += _no_pair(f"{model.name} {weights}", prefills, decoders, demand)
    return choices, rejections


def _no_pair(
    what: str, prefills: Sequence[_Worth], decoders: Sequence[_Worth], demand: Demand
) -> Iterator[Rejection]:
    """Say why no fleet of two pools came of options that do on their own; what they lack alone is told elsewhere."""
    why = ""
    if demand.output_tokens <= 1.0:
        why = "answers of one token leave nothing to decode: plan for one pool"
    elif prefills and decoders:
        needs = min(worth.option.tensor_parallel for worth in prefills)
        has = max(worth.option.tensor_parallel for worth in decoders)
        why = (
            f"prefill needs tensor parallelism {needs}, decode may have {has}, and NIXL cannot gather KV heads: "
            "allow decode as much"
            if needs > has
            else "each pool keeps its share of the objectives, but not both together with the transfer between them: "
            "loosen TTFT or E2E, or name a faster link"
        )
    if why:
        yield Rejection(what, why, memory_bytes=math.inf)


def share_of(role: Role, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
    """Return what of the objectives a pool must keep.

    A prefill pool keeps three quarters of TTFT and half of an end-to-end objective, a decode pool a quarter of TTFT
    and all of the rest; an aggregated pool everything.
    """
    if role is Role.AGGREGATED:
        return objectives
    if role is Role.DECODE:
        return tuple(
            replace(o, target_ms=o.target_ms / 4.0) if o.metric is Metric.TTFT else o for o in objectives
        )
    share = {Metric.TTFT: 0.75, Metric.E2E: 0.5}
    return tuple(
        Objective(Metric.TTFT, o.percentile, o.target_ms * share[o.metric])
        for o in objectives
        if o.metric in share
    )


def _best_batch(
    option: Option, role: Role, shape: Demand, objectives: tuple[Objective, ...], constraints: Constraints
) -> _Worth | None:
    """The batch limit at which a replica is worth most; None where no limit meets the objectives."""
    largest = constraints.batch_limits[-1]

    def worth(batch: int) -> tuple[_Worth, float]:
        tried = replace(option, max_num_seqs=batch)
        found = curve(tried, role, shape, constraints.link_gb_s)
        rate, binding = largest_rate(found, objectives, constraints.tail_margin)
        return _Worth(tried, role, rate, binding), _batch_at(found, rate)

    best, mean_batch = worth(largest)
    if best.rate <= 0.0:
        return None  # even an idle engine misses: a smaller batch is no faster than a batch of one
    if role is Role.PREFILL or not any(o.metric in (Metric.TPOT, Metric.ITL) for o in objectives):
        return best  # a smaller limit only adds waiting
    # A smaller limit keeps TPOT when more load comes than was planned. Take the smallest that costs nothing, and one
    # that is worth more where TPOT binds.
    for batch in constraints.batch_limits:
        if max(mean_batch, 0.5) <= batch < largest:
            tried, _ = worth(batch)
            if tried.rate >= 0.995 * best.rate:
                return tried
    return best


def _batch_at(found: Curve, rate: float) -> float:
    """Sequences decoding at a rate, on average; linear between the curve's points."""
    for i in range(1, len(found.rates)):
        if rate <= found.rates[i]:
            share = (rate - found.rates[i - 1]) / (found.rates[i] - found.rates[i - 1])
            low, high = found.points[i - 1].mean_batch, found.points[i].mean_batch
            return low + share * (high - low)
    return found.points[-1].mean_batch if found.points else 0.0


def _pool(worth: _Worth, demand: Demand, constraints: Constraints, rate: float | None = None) -> PoolChoice:
    rate = worth.rate if rate is None else rate
    # A hair of tolerance, so that 3.0000001 replicas are 3.
    needed = max(math.ceil(demand.rate / rate - 1e-6), 1)
    option = worth.option
    model = option.step_model()
    point = predict(
        model,
        _traffic(demand, worth.role, demand.rate / needed),
        EngineLimits(option.max_num_seqs, option.max_num_batched_tokens),
    )
    prompt = 0.0 if worth.role is Role.DECODE else demand.prompt_tokens * (1.0 - demand.prefix_hit_rate)
    band = model.band_percent(
        min(prompt, option.max_num_batched_tokens),
        0.0 if worth.role is Role.PREFILL else max(point.mean_batch, 1.0),
        demand.context,
    )
    return PoolChoice(
        role=worth.role,
        option=option,
        replica_rate=rate,
        needed=needed,
        replicas=needed + constraints.spare,
        predicted=point,
        source=f"{model.source.kind.value}: {model.source.detail}",
        band_percent=band,
    )


def _shift(values: Percentiles, by: Percentiles | float) -> Percentiles:
    """Percentiles moved by a constant, or added percentile by percentile (an upper bound for a sum's tail)."""
    names = ("mean", *PERCENTILES)
    if isinstance(by, Percentiles):
        return Percentiles(*(values.at(name) + by.at(name) for name in names))
    return Percentiles(*(values.at(name) + by for name in names))


def priced(
    model: ModelShape,
    pools: tuple[PoolChoice, ...],
    latencies: tuple[Percentiles, Percentiles, Percentiles],
    binding: str,
    demand: Demand,
    constraints: Constraints,
) -> Choice:
    """Put a fleet together and price it.

    Args:
        model: The model.
        pools: Its pools.
        latencies: TTFT, TPOT and E2E at the planned load, ms.
        binding: The limit that sets the rate of a replica.
        demand: The traffic.
        constraints: Prices.
    """
    cost = sum(p.replicas * p.option.tensor_parallel * constraints.price(p.option.accelerator) for p in pools)
    output = demand.rate * demand.output_tokens * 3600.0
    return Choice(
        model=model,
        pools=pools,
        ttft=latencies[0],
        tpot=latencies[1],
        e2e=latencies[2],
        binding=binding,
        cost_per_hour=cost,
        cost_per_million_output=1e6 * cost / output,
        cost_per_million_tokens=1e6 * cost / (output + demand.rate * demand.prompt_tokens * 3600.0),
        link_gb_s=constraints.link_gb_s,
    )


def _aggregated(worth: _Worth, demand: Demand, constraints: Constraints) -> Choice:
    pool = _pool(worth, demand, constraints)
    point = pool.predicted
    latencies = (_shift(point.ttft, FRONT_END_MS), point.tpot, _shift(point.e2e, FRONT_END_MS))
    return priced(worth.option.model, (pool,), latencies, worth.binding, demand, constraints)


def _disaggregated(
    prefill: _Worth,
    decoder: _Worth,
    demand: Demand,
    objectives: tuple[Objective, ...],
    constraints: Constraints,
) -> Choice | None:
    pools = (_pool(prefill, demand, constraints), _pool(decoder, demand, constraints))
    transfer = curve(
        decoder.option, Role.DECODE, replace(demand, rate=1.0), constraints.link_gb_s
    ).transfer_ms
    first = _shift(_shift(pools[0].predicted.ttft, pools[1].predicted.ttft), transfer + FRONT_END_MS)
    whole = _shift(_shift(pools[1].predicted.e2e, pools[0].predicted.ttft), transfer + FRONT_END_MS)
    tpot = pools[1].predicted.tpot
    if not all(_met(o, first, tpot, whole, constraints.tail_margin) for o in objectives):
        return None
    binding = f"prefill {prefill.binding}; decode {decoder.binding}"
    return priced(prefill.option.model, pools, (first, tpot, whole), binding, demand, constraints)


def _met(objective: Objective, ttft: Percentiles, tpot: Percentiles, e2e: Percentiles, margin: float) -> bool:
    return held_ms(objective, ttft, tpot, e2e, margin) <= objective.target_ms * (1.0 + 1e-9)


def held_ms(
    objective: Objective, ttft: Percentiles, tpot: Percentiles, e2e: Percentiles, margin: float
) -> float:
    """The latency that is held against an objective's target, margin included, ms."""
    name = objective.percentile
    tail = margin - 1.0 if name in {"p99", "p999"} else 0.0
    match objective.metric:
        case Metric.TTFT:
            return ttft.at(name) * (1.0 + tail)
        case Metric.E2E:
            return e2e.at(name) + tail * ttft.at(name)
        case _:
            return tpot.at(name)


def _confirmed(
    choices: list[Choice],
    demand: Demand,
    objectives: Sequence[Objective],
    constraints: Constraints,
    confirm: Confirm,
    top: int,
) -> list[Choice]:
    """Check choices from the cheapest on, until ``top`` are confirmed; mended ones are ranked anew."""
    checked: list[Choice] = []
    rest = list(choices)
    budget = 3 * top
    while rest and len(checked) < top and budget:
        budget -= 1
        found = confirm(rest.pop(0), demand, objectives, constraints)
        checked += [found] if found is not None else []
    checked.sort(key=_rank)
    return checked + rest


# --- when there is no fleet -----------------------------------------------------------------------------------
_NOTHING_ALLOWED = Rejection(
    "", "no accelerator is allowed: name one with --accelerator or in hardware.accelerators"
)


def _too_slow(
    what: str,
    option: Option,
    shape: Demand,
    objectives: tuple[Objective, ...],
    constraints: Constraints,
    role: Role = Role.AGGREGATED,
) -> Rejection:
    """Say which objective an idle engine misses, and by how much."""
    what += "" if role is Role.AGGREGATED else f" for {role.value}"
    best = curve(option, role, shape, constraints.link_gb_s)
    if not best.rates:
        return Rejection(
            what,
            f"the KV cache of {option.hardware} does not hold one request: shorten requests or raise tensor parallelism",
            memory_bytes=option.tensor_parallel * option.accelerator.memory_bytes,
        )
    worst: tuple[float, Objective, float] | None = None
    for objective in objectives:
        value = _idle_value(option, objective, shape, constraints, role)
        ratio = value / objective.target_ms
        if ratio > 1.0 and (worst is None or ratio > worst[0]):
            worst = (ratio, objective, value)
    if worst is None:
        return Rejection(what, "the objectives hold for an idle engine only")
    _, objective, value = worst
    idle = best.points[0]
    with_margin = ", margin included" if _margined(objective, constraints.tail_margin) > 1.0 else ""
    reason = f"idle, {objective.metric.upper()} {objective.percentile} is {duration(value)}{with_margin}, not {duration(objective.target_ms)}"
    if objective.metric is Metric.E2E and shape.output_tokens > 1.0:
        ttft, tpot = idle.ttft.mean + FRONT_END_MS, idle.tpot.mean
        fits = (
            max(math.floor((objective.target_ms - ttft) / tpot) + 1, 0) if objective.target_ms >= ttft else 0
        )
        reason = (
            f"an idle {option.hardware} fits {fits} output tokens into {duration(objective.target_ms)}, "
            f"not {shape.output_tokens:g} (TTFT {duration(ttft)}, then {duration(tpot)} a token)"
        )
    return Rejection(what, reason, objective, value)


def _idle_value(
    option: Option,
    objective: Objective,
    shape: Demand,
    constraints: Constraints,
    role: Role = Role.AGGREGATED,
) -> float:
    """What an idle engine reaches for an objective, ms, margin included."""
    found = curve(option, role, shape, constraints.link_gb_s)
    if not found.points:
        return math.inf
    point, before = found.points[0], FRONT_END_MS + found.transfer_ms
    ttft, e2e = _shift(point.ttft, before), _shift(point.e2e, before)
    return held_ms(objective, ttft, point.tpot, e2e, constraints.tail_margin)


def _infeasible(
    models: Sequence[ModelShape],
    demand: Demand,
    objectives: tuple[Objective, ...],
    constraints: Constraints,
    rejections: list[Rejection],
) -> Plan:
    """Give the reason, and the nearest objectives that can be kept.

    Nearest: every objective that even the fastest engine misses is loosened, all by the same factor, until a fleet
    keeps them; then rounded up to two digits.
    """
    slow = [r for r in rejections if r.breaking is not None]
    if not slow:
        telling = max(rejections, key=lambda r: r.memory_bytes, default=_NOTHING_ALLOWED)
        return Plan(demand, objectives, (), tuple(rejections), f"infeasible: {telling.reason}")
    closest = min(slow, key=lambda r: r.best_ms / r.breaking.target_ms if r.breaking else math.inf)
    slow.sort(key=lambda r: r.best_ms)
    nearest, choice = _nearest(models, demand, objectives, constraints, slow)
    text = f"infeasible at any number of replicas: {closest.what}: {closest.reason}"
    if nearest:
        changed = [str(o) for o, old in zip(nearest, objectives, strict=True) if o != old]
        text += f"; nearest feasible: {' and '.join(changed)}"
    ordered = slow + [r for r in rejections if r.breaking is None]
    return Plan(demand, objectives, (), tuple(ordered), text, nearest, choice)


def _nearest(
    models: Sequence[ModelShape],
    demand: Demand,
    objectives: tuple[Objective, ...],
    constraints: Constraints,
    slow: Sequence[Rejection],
) -> tuple[tuple[Objective, ...], Choice | None]:
    shape = replace(demand, rate=1.0)
    reach: dict[Objective, float] = {}
    for objective in objectives:
        values = []
        for model in models:
            for weights in constraints.weights:
                for option in _options(model, weights, demand, objectives, constraints):
                    try:
                        values.append(_idle_value(option, objective, shape, constraints))
                    except (CatalogError, OutOfHullError):
                        continue
        reach[objective] = min(values, default=math.inf)
    del slow
    for factor in (1.02, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0, 10.0):
        loosened = tuple(
            o
            if reach[o] <= o.target_ms and factor < 1.5
            else replace(o, target_ms=max(round_up(reach[o] * factor), o.target_ms))
            for o in objectives
        )
        if any(math.isinf(o.target_ms) for o in loosened):
            return (), None
        for weights in constraints.weights:
            found = [
                c
                for model in models
                for c in _of_model(
                    model,
                    weights,
                    demand,
                    loosened,
                    replace(constraints, disaggregation=not constraints.aggregated),
                )[0]
            ]
            if found:
                return loosened, min(found, key=_rank)
    return (), None


def round_up(ms: float) -> float:
    """Up to two significant digits."""
    if not math.isfinite(ms):
        return ms
    unit = 10.0 ** (math.floor(math.log10(ms)) - 1)
    return math.ceil(ms / unit - 1e-9) * unit
