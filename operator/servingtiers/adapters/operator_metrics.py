"""The operator's own ``/metrics``.

What is true of a tier is kept as data and turned into samples when somebody asks, so the series of a deleted tier
are gone with it and ages are right at the moment of asking, also when the control loop hangs. What happens is
counted as it happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

__all__ = ["ObjectiveGauges", "OperatorMetrics", "PoolGauges", "Probes", "TierGauges", "reference"]


@dataclass(frozen=True, slots=True)
class PoolGauges:
    """What is shown of one pool; None: not known, so no sample."""

    name: str
    desired: int
    """Replicas decided on."""
    ready: int
    utilization: float | None = None
    """Share of the load that the ready replicas carry within the SLO, 1 = full."""
    running: float | None = None
    waiting: float | None = None
    lent: int | None = None
    """Ready replicas that do not serve the tier; None: it is in no TierPool."""
    borrowed: int | None = None
    """Engines of other tiers that do."""


@dataclass(frozen=True, slots=True)
class ObjectiveGauges:
    """What is shown of one objective."""

    objective: str
    """As in the status: ``ttft.p99``."""
    target_seconds: float
    attainment: float | None = None
    """Share of the window's requests that were certainly within the target, 0 to 1: a lower bound."""
    error_budget_left: float | None = None
    """Share of the allowed misses that is left at least; negative when overspent."""


@dataclass(frozen=True, slots=True)
class TierGauges:
    """What is shown of one tier."""

    namespace: str
    name: str
    pools: Sequence[PoolGauges]
    objectives: Sequence[ObjectiveGauges] = ()
    currency: str = "USD"
    cost_per_hour: float | None = None
    idle_cost_per_hour: float | None = None
    cost_per_million_output_tokens: float | None = None
    arrivals_per_second: float | None = None
    load_age: float | None = None
    """Age of the oldest sample that the last decision used, seconds; None: there was none."""
    unknown_signals: int = 0
    """Signals without usable data in the last pass."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Where the state of the operator process is looked up when somebody asks."""

    queue_depth: Callable[[], int]
    oldest_key_age: Callable[[], float]
    """Seconds the longest-waiting key has waited; 0 when none waits."""
    leading: Callable[[], bool]
    watch_ages: Callable[[], Mapping[str, float]]
    """Kind to seconds since the API server was last heard on its watch."""


_TIER: Final = ("namespace", "tier")
_POOL: Final = (*_TIER, "pool")
_OBJECTIVE: Final = (*_TIER, "objective")

_GAUGES: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "servingtiers_build_info": ("Always 1; the operator's version is a label.", ("version",)),
    "servingtiers_tiers": ("Tiers that the operator looks after.", ()),
    "servingtiers_leader": ("1 in the process that holds the lease and writes, else 0.", ()),
    "servingtiers_watch_age_seconds": ("Time since the API server was last heard on a watch.", ("kind",)),
    "servingtiers_reconcile_queue_depth": ("Keys that wait to be reconciled.", ()),
    "servingtiers_reconcile_oldest_key_age_seconds": (
        "Time the longest-waiting key has waited; 0 when none waits.",
        (),
    ),
    "servingtiers_pool_replicas_desired": ("Replicas that the operator decided on.", _POOL),
    "servingtiers_pool_replicas_ready": ("Replicas that are ready.", _POOL),
    "servingtiers_pool_engines_lent": (
        "Ready replicas that serve another tier, or are on their way there or back.",
        _POOL,
    ),
    "servingtiers_pool_engines_borrowed": ("Engines of other tiers that serve this one.", _POOL),
    "servingtiers_pool_utilization_ratio": (
        "Load of the pool over what its ready replicas carry within the SLO; 1 is full.",
        _POOL,
    ),
    "servingtiers_pool_requests_running": ("Requests in the pool's batches, as last read.", _POOL),
    "servingtiers_pool_requests_waiting": (
        "Requests that wait inside the pool's engines, as last read.",
        _POOL,
    ),
    "servingtiers_tier_arrivals_per_second": ("Requests that arrive at the tier's routers.", _TIER),
    "servingtiers_tier_load_age_seconds": ("Age of the oldest sample that the last decision used.", _TIER),
    "servingtiers_tier_load_unknown_signals": (
        "Signals without usable data in the last pass; while there are any, nothing shrinks on them.",
        _TIER,
    ),
    "servingtiers_slo_target_seconds": ("The objective's target.", _OBJECTIVE),
    "servingtiers_slo_attainment_ratio": (
        "Share of the SLO window's requests within the target, at least: what buckets, or times of two engines, prove.",
        _OBJECTIVE,
    ),
    "servingtiers_slo_error_budget_left_ratio": (
        "Share of the allowed misses of the SLO window that is left at least; negative when overspent.",
        _OBJECTIVE,
    ),
    "servingtiers_cost_per_hour": ("Price of the tier's accelerators.", (*_TIER, "currency")),
    "servingtiers_cost_idle_per_hour": ("Part of the price that bought no load.", (*_TIER, "currency")),
    "servingtiers_cost_per_million_output_tokens": (
        "Price of a million generated tokens over the cost window.",
        (*_TIER, "currency"),
    ),
}

_COUNTS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "servingtiers_decisions": (
        "Scaling decisions by direction (up, down, hold) and by the limit that was binding.",
        (*_POOL, "direction", "binding"),
    ),
    "servingtiers_reconciles": ("Reconciles by result: ok, conflict, error.", ("result",)),
    "servingtiers_api_writes": ("Mutating requests to the API server.", ("verb", "kind")),
}

_RECONCILE_SECONDS: Final = "servingtiers_reconcile_duration_seconds"
_RECONCILE_HELP: Final = "Time of one reconcile, from taking its key to its last write."
_RECONCILE_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(slots=True, eq=False)
class OperatorMetrics(Collector):
    """The operator's metrics, in a registry of the caller's."""

    registry: CollectorRegistry
    probes: Probes
    version: str
    clock: Callable[[], float] = time.monotonic
    _tiers: tuple[TierGauges, ...] = field(default=(), init=False)
    _updated: float = field(default=0.0, init=False)
    _decisions: Counter = field(init=False)
    _decided: dict[tuple[str, str, str], set[tuple[str, str]]] = field(default_factory=dict, init=False)
    _reconciles: Counter = field(init=False)
    _writes: Counter = field(init=False)
    _duration: Histogram = field(init=False)

    def __post_init__(self) -> None:
        def counter(name: str) -> Counter:
            text, labels = _COUNTS[name]
            return Counter(name, text, labels, registry=self.registry)

        self._decisions = counter("servingtiers_decisions")
        self._reconciles = counter("servingtiers_reconciles")
        self._writes = counter("servingtiers_api_writes")
        self._duration = Histogram(
            _RECONCILE_SECONDS, _RECONCILE_HELP, registry=self.registry, buckets=_RECONCILE_BUCKETS
        )
        self.registry.register(self)

    def update(self, tiers: Iterable[TierGauges]) -> None:
        """Show these tiers and no others; counters of tiers and pools that are gone are dropped."""
        self._tiers = tuple(tiers)
        self._updated = self.clock()
        alive = {(tier.namespace, tier.name, pool.name) for tier in self._tiers for pool in tier.pools}
        for pool in self._decided.keys() - alive:
            for direction, binding in self._decided.pop(pool):
                self._decisions.remove(*pool, direction, binding)

    def decided(
        self, namespace: str, tier: str, pool: str, *, direction: Literal["up", "down", "hold"], binding: str
    ) -> None:
        """Count one scaling decision."""
        self._decided.setdefault((namespace, tier, pool), set()).add((direction, binding))
        self._decisions.labels(namespace, tier, pool, direction, binding).inc()

    def reconciled(self, result: Literal["ok", "conflict", "error"], seconds: float) -> None:
        """Count one reconcile and its time."""
        self._reconciles.labels(result).inc()
        self._duration.observe(seconds)

    def wrote(self, verb: str, kind: str) -> None:
        """Count one mutating request."""
        self._writes.labels(verb, kind).inc()

    def describe(self) -> Iterator[Metric]:
        """Name the gauges without samples: what a registry checks for collisions."""
        for name, (text, labels) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, labels=labels)

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges as they are now."""
        families = {
            name: GaugeMetricFamily(name, text, labels=labels) for name, (text, labels) in _GAUGES.items()
        }

        def show(name: str, value: float | None, *labels: str) -> None:
            if value is not None:
                families[name].add_metric(labels, value)

        show("servingtiers_build_info", 1, self.version)
        show("servingtiers_tiers", len(self._tiers))
        show("servingtiers_leader", self.probes.leading())
        show("servingtiers_reconcile_queue_depth", self.probes.queue_depth())
        show("servingtiers_reconcile_oldest_key_age_seconds", self.probes.oldest_key_age())
        for kind, age in self.probes.watch_ages().items():
            show("servingtiers_watch_age_seconds", age, kind)
        since = self.clock() - self._updated
        for tier in self._tiers:
            key = (tier.namespace, tier.name)
            for pool in tier.pools:
                show("servingtiers_pool_replicas_desired", pool.desired, *key, pool.name)
                show("servingtiers_pool_replicas_ready", pool.ready, *key, pool.name)
                show("servingtiers_pool_engines_lent", pool.lent, *key, pool.name)
                show("servingtiers_pool_engines_borrowed", pool.borrowed, *key, pool.name)
                show("servingtiers_pool_utilization_ratio", pool.utilization, *key, pool.name)
                show("servingtiers_pool_requests_running", pool.running, *key, pool.name)
                show("servingtiers_pool_requests_waiting", pool.waiting, *key, pool.name)
            for slo in tier.objectives:
                show("servingtiers_slo_target_seconds", slo.target_seconds, *key, slo.objective)
                show("servingtiers_slo_attainment_ratio", slo.attainment, *key, slo.objective)
                show("servingtiers_slo_error_budget_left_ratio", slo.error_budget_left, *key, slo.objective)
            show("servingtiers_tier_arrivals_per_second", tier.arrivals_per_second, *key)
            show("servingtiers_tier_load_unknown_signals", tier.unknown_signals, *key)
            load_age = None if tier.load_age is None else tier.load_age + since
            show("servingtiers_tier_load_age_seconds", load_age, *key)
            show("servingtiers_cost_per_hour", tier.cost_per_hour, *key, tier.currency)
            show("servingtiers_cost_idle_per_hour", tier.idle_cost_per_hour, *key, tier.currency)
            per_million = tier.cost_per_million_output_tokens
            show("servingtiers_cost_per_million_output_tokens", per_million, *key, tier.currency)
        yield from families.values()


def reference() -> str:
    """Return the table of all metrics for the documentation, in Markdown."""
    families: list[tuple[Metric, tuple[str, ...]]] = [
        *((GaugeMetricFamily(name, text), labels) for name, (text, labels) in _GAUGES.items()),
        *((CounterMetricFamily(name, text), labels) for name, (text, labels) in _COUNTS.items()),
        (HistogramMetricFamily(_RECONCILE_SECONDS, _RECONCILE_HELP), ()),
    ]
    rows = ["| Metric | Type | Labels | Meaning |", "|---|---|---|---|"]
    for family, labels in sorted(families, key=lambda pair: pair[0].name):
        shown = f"{family.name}_total" if family.type == "counter" else family.name
        marked = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{shown}` | {family.type} | {marked} | {family.documentation} |")
    return "\n".join(rows) + "\n"
