"""The demo: the example tiers on the laboratory's stage, under a real trace, watched until they have scaled.

Real: etcd, API server, controllers, scheduler, the operator in a process and under a Role of its own, vllm-router,
the HTTP and metrics between all of them, and the recorded traffic. Simulated: the nodes and the engines' model
computation. Shortened: the hour of the trace, the start of an engine, and the holds before a scale-down.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from servingtiers.api.base import parse_duration
from servingtiers.lab.controlplane import ApiError
from servingtiers.lab.demo_ring import Ring, RingSettings, source_root
from servingtiers.lab.kube import Kube
from servingtiers.lab.load import LoadGenerator, RequestRecord, TraceRequest, azure_conversation, percentile
from servingtiers.render import names

__all__ = [
    "CURVES",
    "Decision",
    "DemoError",
    "DemoSettings",
    "Finished",
    "Outcome",
    "PoolSample",
    "Sample",
    "TierOutcome",
    "TierSample",
    "attainment",
    "play",
    "replayed",
    "summary",
    "write_summary",
]

Curve = Sequence[tuple[float, float]]
"""Requests per second over the run: (share of the run 0 to 1, rate), linear between."""

CURVES: Mapping[str, Curve] = {
    "Latency": ((0.0, 1.5), (0.05, 1.5), (0.32, 11.0), (0.46, 11.0), (0.58, 1.5)),
    "Balanced": ((0.0, 1.5), (0.14, 1.5), (0.42, 7.5), (0.56, 7.5), (0.68, 1.5)),
    "Throughput": ((0.0, 1.0), (0.03, 1.0), (0.15, 17.0), (0.36, 17.0), (0.44, 1.0)),
}
"""What of the trace each kind of tier is given: quiet, a rush, quiet again; the batch's is early and high. The trace has
a rush of its own after half its hour, 1.5 times its mean, which comes on top."""

_READY_SECONDS = 180.0
_POLL_SECONDS = 1.0
_RECENT_SECONDS = 15.0
"""Over how long the live percentiles are taken."""
_ENOUGH_SECONDS = 100.0
"""A shorter replay leaves no time for a scale-down: then only readiness is asked for."""
_TAIL_SECONDS = 60.0
"""How long the quiet after the replay may last, until the fleets have shrunk."""
_DRAIN_SECONDS = 20.0


class DemoError(RuntimeError):
    """The demo cannot go on; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """How the demo runs."""

    seconds: float = 150.0
    """Length of the replay."""
    hold: str = "15s"
    """``scaleDownHold`` given to every pool of the examples (60 s or more by themselves)."""
    ring: RingSettings = field(default_factory=RingSettings)
    examples: Path | None = None
    """Folder with the tiers; the repository's ``manifests/examples`` by default."""
    seed: int = 0

    @property
    def complete(self) -> bool:
        """Whether scaling is expected, and not only readiness."""
        return self.seconds >= _ENOUGH_SECONDS


# -- the load --------------------------------------------------------------------------------------------------


def _at(curve: Curve, position: float) -> float:
    """Return the rate of a curve; before its first and after its last point it is flat."""
    index = bisect.bisect_right([x for x, _ in curve], position)
    if index == 0:
        return curve[0][1]
    if index == len(curve):
        return curve[-1][1]
    (x0, y0), (x1, y1) = curve[index - 1], curve[index]
    return y0 + (y1 - y0) * (position - x0) / (x1 - x0)


def replayed(
    trace: Sequence[TraceRequest], curve: Curve, seconds: float, *, tail: float = 0.0, seed: int = 0
) -> Iterator[TraceRequest]:
    """Yield a whole trace compressed into ``seconds`` and thinned so that its mean rate follows ``curve``.

    Prompt and output lengths, their order and the bursts are the trace's own: each request is kept or left out by
    itself, with the probability that the curve asks of that moment. After the end the trace begins again, at the
    curve's last rate.

    Args:
        trace: The requests, oldest first.
        curve: Rates in requests per second over the share of ``seconds``.
        seconds: Into how many seconds the trace is compressed.
        tail: Seconds after the end.
        seed: Of the thinning.
    """
    span = trace[-1].at
    compress = span / seconds
    mean = len(trace) / seconds
    draw = random.Random(seed)  # noqa: S311 - a repeatable sample, no secret
    begun = 0.0
    while True:
        for request in trace:
            # The division may end a rounding error beyond the next round.
            at = begun + min(request.at / compress, seconds)
            if at > seconds + tail:
                return
            if draw.random() * mean < _at(curve, at / seconds):
                yield replace(request, at=at)
        begun += seconds


# -- what is seen ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolSample:
    """One pool at a moment."""

    name: str
    role: str
    accelerator: str
    ready: int
    desired: int
    running: float | None
    """Sequences in the engines' batches, as the operator read them; None: not known."""
    waiting: float | None


@dataclass(frozen=True, slots=True)
class TierSample:
    """One tier at a moment."""

    name: str
    tier: str
    ready: bool
    pools: tuple[PoolSample, ...]
    sent_per_second: float
    """Requests the clients sent, over the latest seconds."""
    ttft_p99: float | None
    """Client's p99 over the latest seconds, seconds; None: nothing was finished."""
    tpot_p99: float | None
    cost_per_hour: float | None
    currency: str
    reason: str
    """The latest decision's reason, or why the tier is not ready."""
    objectives: Mapping[str, float]
    """Objective (``ttft.p99``) to its target, seconds."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Everything at a moment."""

    at: float
    """Seconds after the beginning of the replay; negative before it."""
    tiers: tuple[TierSample, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision of the operator, as its status records it."""

    at: float
    """Seconds after the beginning of the replay."""
    time: str
    pool: str
    before: int
    after: int
    binding: str
    reason: str
    would_change: str
    acted: bool

    @property
    def up(self) -> bool:
        """Whether it adds replicas."""
        return self.after > self.before


@dataclass(frozen=True, slots=True)
class Finished:
    """One request as its client saw it."""

    at: float
    """When it ended, seconds after the beginning of the replay."""
    record: RequestRecord


@dataclass(slots=True)
class TierOutcome:
    """What became of one tier."""

    name: str
    tier: str
    model: str
    objectives: dict[str, float]
    """Objective (``ttft.p99``) to its target, seconds."""
    ready: bool = False
    decisions: list[Decision] = field(default_factory=list)
    """Oldest first."""
    finished: list[Finished] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    """When requests were sent, seconds after the beginning of the replay."""
    operator_attainment: dict[str, float] = field(default_factory=dict)
    """Objective to the share within its target, as the operator counted it."""
    gpu_seconds: float = 0.0
    cost: float = 0.0
    """What the GPUs held would have cost, in ``currency``."""
    currency: str = "USD"

    @property
    def ups(self) -> int:
        """Scale-ups that were carried out."""
        return sum(1 for each in self.decisions if each.acted and each.up)

    @property
    def downs(self) -> int:
        """Scale-downs that were carried out."""
        return sum(1 for each in self.decisions if each.acted and each.after < each.before)

    @property
    def moved(self) -> bool:
        """Whether it has scaled both ways."""
        return self.ups > 0 and self.downs > 0


@dataclass(slots=True)
class Outcome:
    """What became of the demo."""

    settings: DemoSettings
    tiers: dict[str, TierOutcome]
    samples: list[Sample] = field(default_factory=list)
    compress: float = 1.0
    """Seconds of the trace in one second."""
    ready_seconds: float = 0.0
    """From applying the tiers until all were Ready."""
    replay_seconds: float = 0.0
    real_router: bool = True
    operator_log: str = ""

    def problems(self) -> list[str]:
        """Return what the demo did not show; empty when it showed all."""
        found = [f"{name} is not Ready" for name, tier in self.tiers.items() if not tier.ready]
        moved = [name for name, tier in self.tiers.items() if tier.moved]
        if self.settings.complete and len(moved) < min(2, len(self.tiers)):
            found.append(
                "fewer than two tiers scaled up and down ("
                + ", ".join(f"{tier.name} {tier.ups}↑ {tier.downs}↓" for tier in self.tiers.values())
                + "): the reasons are in the report"
            )
        return found


# -- figures ---------------------------------------------------------------------------------------------------


def attainment(records: Sequence[RequestRecord], objective: str, target: float) -> float | None:
    """Return the share of requests within an objective's target as clients saw it; None without any.

    A request that failed missed every objective; one with too few tokens to have a time per token counts for none.
    """
    metric = objective.partition(".")[0]
    good = total = 0
    for record in records:
        value = getattr(record, metric)
        if record.ok and value is None:
            continue
        total += 1
        good += record.ok and value <= target
    return good / total if total else None


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return ``summary.json``."""
    return {
        "tiers": {name: _tier_summary(tier) for name, tier in outcome.tiers.items()},
        "ok": not outcome.problems(),
        "problems": outcome.problems(),
        "real": ["kube-apiserver", "etcd", "kube-controller-manager", "kube-scheduler", "operator"]
        + (["vllm-router"] if outcome.real_router else []),
        "simulated": ["nodes", "engines"] + ([] if outcome.real_router else ["vllm-router"]),
        "trace": "Azure LLM inference trace 2023, conversation",
        "traceSecondsPerSecond": round(outcome.compress, 2),
        "engineStartupFactor": outcome.settings.ring.time_factor,
        "scaleDownHold": outcome.settings.hold,
        "readySeconds": round(outcome.ready_seconds, 1),
        "replaySeconds": round(outcome.replay_seconds, 1),
    }


def _tier_summary(tier: TierOutcome) -> dict[str, Any]:
    records = [each.record for each in tier.finished]
    good = [record for record in records if record.ok]
    shares: dict[str, Any] = {}
    for objective, target in tier.objectives.items():
        client = attainment(records, objective, target)
        operator = tier.operator_attainment.get(objective)
        shares[objective] = {
            "targetSeconds": target,
            "client": None if client is None else round(client, 4),
            "operator": None if operator is None else round(operator, 4),
        }
    latencies = {
        name: {
            f"p{percent}": _rounded(
                percentile((v for r in good if (v := getattr(r, name)) is not None), percent)
            )
            for percent in (50, 95, 99)
        }
        for name in ("ttft", "tpot", "e2e")
    }
    return {
        "tier": tier.tier,
        "model": tier.model,
        "ready": tier.ready,
        "scaleUps": tier.ups,
        "scaleDowns": tier.downs,
        "attainment": shares,
        "gpuHours": round(tier.gpu_seconds / 3600, 4),
        "cost": round(tier.cost, 4),
        "currency": tier.currency,
        "requests": len(records),
        "failedRequests": len(records) - len(good),
        "retriedRequests": sum(1 for record in records if record.attempts > 1),
        "clientSeconds": latencies,
        "decisions": [
            {
                "at": round(each.at, 1),
                "time": each.time,
                "pool": each.pool,
                "from": each.before,
                "to": each.after,
                "binding": each.binding,
                "reason": each.reason,
                "wouldChange": each.would_change,
                "acted": each.acted,
            }
            for each in tier.decisions
        ],
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# -- watching --------------------------------------------------------------------------------------------------


def _metrics(text: str) -> dict[str, list[tuple[Mapping[str, str], float]]]:
    """Return the samples of an exposition by name."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def _gpus(pod: Mapping[str, Any]) -> float:
    return sum(
        float((container.get("resources", {}).get("limits") or {}).get("nvidia.com/gpu", 0))
        for container in pod["spec"]["containers"]
    )


def _is_ready(pod: Mapping[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions") or ()
    return "deletionTimestamp" not in pod["metadata"] and any(
        c["type"] == "Ready" and c["status"] == "True" for c in conditions
    )


class _Watcher:
    """Asks the API server and the operator once a second, and adds up what it sees."""

    def __init__(
        self,
        outcome: Outcome,
        ring: Ring,
        on_sample: Callable[[Sample], None],
        on_decision: Callable[[str, Decision], None],
    ) -> None:
        self._outcome = outcome
        self._details = ring.details
        self._on_sample = on_sample
        self._on_decision = on_decision
        self._path = f"/apis/servingtiers.io/v1alpha1/namespaces/{self._details.namespace}/servingtiers"
        self._pods_path = f"/api/v1/namespaces/{self._details.namespace}/pods"
        self._routers: dict[str, list[str]] = {}
        self._turns: dict[str, int] = {}
        self._last: float | None = None
        self._seen: set[tuple[str, str, str, int, int]] = set()
        self._recent: dict[str, deque[tuple[float, RequestRecord]]] = {n: deque() for n in outcome.tiers}
        self.began: float | None = None
        """Monotonic time of the beginning of the replay."""
        self._began_wall = time.time()
        self.latest: Sample | None = None

    def begin(self) -> None:
        """Count from now."""
        self.began, self._began_wall = time.monotonic(), time.time()

    def now(self) -> float:
        """Return seconds after the beginning of the replay; 0 before it."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    # -- for the clients --

    async def router(self, tier: str) -> str:
        """Return the base URL of one of a tier's ready routers, in turn."""
        while not (found := self._routers.get(tier)):  # noqa: ASYNC110 - filled by the round, once a second
            await asyncio.sleep(0.2)
        self._turns[tier] = self._turns.get(tier, 0) + 1
        return found[self._turns[tier] % len(found)]

    def finished(self, tier: str, record: RequestRecord) -> None:
        """Take in a finished request."""
        self._outcome.tiers[tier].finished.append(Finished(self.now(), record))
        self._recent[tier].append((self.now(), record))

    # -- the round --

    async def run(self) -> None:
        """Watch until cancelled."""
        kube = Kube.from_kubeconfig(Path(self._details.kubeconfig))
        async with kube, aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                begun = time.monotonic()
                # One late answer of a busy machine is no reason to stop watching.
                with contextlib.suppress(ApiError, aiohttp.ClientError, TimeoutError, OSError):
                    await self._look(kube, session)
                await asyncio.sleep(max(0.1, _POLL_SECONDS - (time.monotonic() - begun)))

    async def _look(self, kube: Kube, session: aiohttp.ClientSession) -> None:
        url = f"http://127.0.0.1:{self._details.metrics_port}/metrics"
        tiers, pods = await asyncio.gather(kube.get(self._path), kube.get(self._pods_path))
        async with session.get(url) as answer:
            metrics = _metrics(await answer.text())
        self._account(tiers["items"], pods["items"], metrics)
        samples = []
        for document in tiers["items"]:
            name = document["metadata"]["name"]
            if name not in self._outcome.tiers:
                continue
            self._take_decisions(name, document.get("status") or {})
            samples.append(self._tier(document, metrics))
            self._outcome.tiers[name].ready = samples[-1].ready
        order = list(self._outcome.tiers)
        samples.sort(key=lambda sample: order.index(sample.name))
        sample = Sample(self.now(), tuple(samples))
        self.latest = sample
        if self.began is not None:
            self._outcome.samples.append(sample)
        self._on_sample(sample)

    def _account(
        self,
        tiers: Sequence[Mapping[str, Any]],
        pods: Sequence[Mapping[str, Any]],
        metrics: Mapping[str, Sequence[tuple[Mapping[str, str], float]]],
    ) -> None:
        """Add up the GPUs that pods hold, and note where routers are."""
        now = time.monotonic()
        passed = 0.0 if self._last is None else now - self._last
        self._last = now
        routers: dict[str, list[str]] = {name: [] for name in self._outcome.tiers}
        held = dict.fromkeys(self._outcome.tiers, 0.0)
        for pod in pods:
            labels = pod["metadata"].get("labels", {})
            tier = labels.get(names.TIER_LABEL, "")
            if tier not in held:
                continue
            if labels.get(names.COMPONENT_LABEL) == names.ROUTER:
                if _is_ready(pod):
                    port = pod["spec"]["containers"][0]["ports"][0]["containerPort"]
                    routers[tier].append(f"http://{pod['status']['podIP']}:{port}")
            elif pod["spec"].get("nodeName"):
                held[tier] += _gpus(pod)
        self._routers = {tier: sorted(found) for tier, found in routers.items()}
        prices = {labels["tier"]: value for labels, value in metrics.get("servingtiers_cost_per_hour", ())}
        for name, gpus in held.items():
            self._outcome.tiers[name].gpu_seconds += gpus * passed
            self._outcome.tiers[name].cost += prices.get(name, 0.0) * passed / 3600
        for labels, value in metrics.get("servingtiers_slo_attainment_ratio", ()):
            if labels["tier"] in self._outcome.tiers:
                self._outcome.tiers[labels["tier"]].operator_attainment[labels["objective"]] = value
        for tier_document in tiers:
            cost = (tier_document.get("status") or {}).get("cost") or {}
            if tier_document["metadata"]["name"] in self._outcome.tiers:
                self._outcome.tiers[tier_document["metadata"]["name"]].currency = cost.get("currency", "USD")

    def _take_decisions(self, name: str, status: Mapping[str, Any]) -> None:
        for raw in reversed(status.get("decisions") or ()):
            key = (name, raw["time"], raw["pool"], raw["from"], raw["to"])
            if key in self._seen:
                continue
            self._seen.add(key)
            when = datetime.fromisoformat(raw["time"]).astimezone(UTC).timestamp()
            decision = Decision(
                at=when - self._began_wall if self.began is not None else 0.0,
                time=raw["time"],
                pool=raw["pool"],
                before=raw["from"],
                after=raw["to"],
                binding=raw["binding"],
                reason=raw["reason"],
                would_change=raw.get("wouldChange", ""),
                acted=raw.get("acted", True),
            )
            self._outcome.tiers[name].decisions.append(decision)
            self._on_decision(name, decision)

    def _tier(
        self,
        document: Mapping[str, Any],
        metrics: Mapping[str, Sequence[tuple[Mapping[str, str], float]]],
    ) -> TierSample:
        name = document["metadata"]["name"]
        outcome = self._outcome.tiers[name]
        status = document.get("status") or {}

        def gauge(metric: str, pool: str | None = None) -> float | None:
            for labels, value in metrics.get(metric, ()):
                if labels.get("tier") == name and (pool is None or labels.get("pool") == pool):
                    return value
            return None

        accelerators = {
            pool["name"]: f"{pool['tensorParallel']}× {pool['accelerator']}"
            for pool in (status.get("effective") or {}).get("pools") or ()
        }
        pools = tuple(
            PoolSample(
                name=pool["name"],
                role=pool["role"],
                accelerator=accelerators.get(pool["name"], ""),
                ready=pool.get("ready", 0),
                desired=pool.get("desired", 0),
                running=gauge("servingtiers_pool_requests_running", pool["name"]),
                waiting=gauge("servingtiers_pool_requests_waiting", pool["name"]),
            )
            for pool in status.get("pools") or ()
        )
        ready = next((c for c in status.get("conditions") or () if c["type"] == "Ready"), None)
        is_ready = (
            ready is not None
            and ready["status"] == "True"
            and status.get("observedGeneration") == document["metadata"]["generation"]
        )
        now = self.now()
        recent = self._recent[name]
        while recent and recent[0][0] < now - _RECENT_SECONDS:
            recent.popleft()
        good = [record for _, record in recent if record.ok]
        window = min(5.0, now) or 1.0
        sent = len(outcome.sent) - bisect.bisect_left(outcome.sent, now - window)
        if outcome.decisions:
            reason = outcome.decisions[-1].reason
        elif ready is not None:
            reason = ready.get("message", "")
        else:
            reason = "the operator has not seen it yet"
        return TierSample(
            name=name,
            tier=document["spec"]["tier"],
            ready=is_ready,
            pools=pools,
            sent_per_second=sent / window,
            ttft_p99=percentile((r.ttft for r in good if r.ttft is not None), 99),
            tpot_p99=percentile((r.tpot for r in good if r.tpot is not None), 99),
            cost_per_hour=gauge("servingtiers_cost_per_hour"),
            currency=outcome.currency,
            reason=reason,
            objectives=outcome.objectives,
        )


# -- the play --------------------------------------------------------------------------------------------------


def _tiers(settings: DemoSettings) -> list[dict[str, Any]]:
    """Return the example tiers, with the shortened hold."""
    folder = settings.examples or source_root() / "manifests" / "examples"
    documents = [
        document
        for path in sorted(folder.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
        if document and document["kind"] == "ServingTier"
    ]
    if not documents:
        raise DemoError(f"no ServingTier in {folder}: the demo plays the examples there")
    order = list(CURVES)
    documents.sort(key=lambda document: order.index(document["spec"]["tier"]))
    for document in documents:
        spec = document["spec"]
        parts = spec.get("disaggregation", {})
        for pool in (spec.get("pool"), parts.get("prefill"), parts.get("decode")):
            if pool is not None:
                pool.setdefault("scaling", {})["scaleDownHold"] = settings.hold
    return documents


def _objectives(spec: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{metric}.{percent}": parse_duration(target)
        for metric, targets in (spec.get("slo") or {}).items()
        if isinstance(targets, dict) and metric in {"ttft", "tpot", "e2e"}
        for percent, target in targets.items()
    }


def play(
    settings: DemoSettings,
    ring: Ring,
    *,
    progress: Callable[[str], None],
    on_sample: Callable[[Sample], None] = lambda _: None,
    on_decision: Callable[[str, Decision], None] = lambda _tier, _decision: None,
) -> Outcome:
    """Play the demo on a stage that is up, and return what became of it.

    Args:
        settings: How it runs.
        ring: The stage.
        progress: Receives progress lines.
        on_sample: Called once a second with what is seen.
        on_decision: Called with the tier's name and each decision of the operator.

    Raises:
        DemoError: Tiers did not become Ready, or the stage ended.
    """
    return asyncio.run(_play(settings, ring, progress, on_sample, on_decision))


async def _play(
    settings: DemoSettings,
    ring: Ring,
    progress: Callable[[str], None],
    on_sample: Callable[[Sample], None],
    on_decision: Callable[[str, Decision], None],
) -> Outcome:
    documents = _tiers(settings)
    outcome = Outcome(
        settings,
        {
            document["metadata"]["name"]: TierOutcome(
                name=document["metadata"]["name"],
                tier=document["spec"]["tier"],
                model=document["spec"]["model"]["name"],
                objectives=_objectives(document["spec"]),
            )
            for document in documents
        },
        real_router=ring.details.router is not None,
    )
    watcher = _Watcher(outcome, ring, on_sample, on_decision)
    await _apply(documents, ring)
    applied = time.monotonic()
    progress(
        f"applied {', '.join(outcome.tiers)}; engines take {settings.ring.time_factor:g} of their real start-up"
    )
    async with _beside(watcher.run(), _guard(ring)):
        await _until_ready(outcome, watcher, progress, applied)
        outcome.ready_seconds = time.monotonic() - applied
        progress(f"all tiers Ready after {outcome.ready_seconds:.0f} s")
        await _replay(settings, outcome, watcher, progress)
        outcome.replay_seconds = watcher.now()
        await asyncio.sleep(2 * _POLL_SECONDS)  # one more look
    with contextlib.suppress(OSError):
        outcome.operator_log = ring.details.operator_log.read_text(encoding="utf-8", errors="replace")
    return outcome


async def _apply(documents: Sequence[Mapping[str, Any]], ring: Ring) -> None:
    path = f"/apis/servingtiers.io/v1alpha1/namespaces/{ring.details.namespace}/servingtiers"
    async with Kube.from_kubeconfig(Path(ring.details.kubeconfig)) as kube:
        for document in documents:
            try:
                await kube.request("POST", path, document)
            except ApiError as error:
                raise DemoError(
                    f"the API server refuses {document['metadata']['name']}: {error.message}"
                ) from error


@contextlib.asynccontextmanager
async def _beside(*loops: Any) -> AsyncIterator[None]:
    """Run loops beside the body; the failure of one ends it."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loop) for loop in loops]
            yield
            for task in tasks:
                task.cancel()
    except* DemoError as errors:
        raise errors.exceptions[0] from None


async def _guard(ring: Ring) -> None:
    while ring.running:  # noqa: ASYNC110 - a process rings no asyncio event
        await asyncio.sleep(0.5)
    raise DemoError("the stage ended unexpectedly")


async def _until_ready(
    outcome: Outcome, watcher: _Watcher, progress: Callable[[str], None], applied: float
) -> None:
    told = applied
    while not (watcher.latest and all(tier.ready for tier in outcome.tiers.values())):
        await asyncio.sleep(0.5)
        now = time.monotonic()
        pending = [
            f"{tier.name} ({sum(p.ready for p in tier.pools)} of {sum(p.desired for p in tier.pools)} engines)"
            for tier in (watcher.latest.tiers if watcher.latest else ())
            if not tier.ready
        ]
        if now - told >= 10:
            told = now
            progress(f"waiting for {', '.join(pending) or 'the operator'}: {now - applied:.0f} s")
        if now - applied > _READY_SECONDS:
            reasons = "; ".join(
                f"{tier.name}: {tier.reason}"
                for tier in (watcher.latest.tiers if watcher.latest else ())
                if not tier.ready
            )
            raise DemoError(f"not all tiers were Ready within {_READY_SECONDS:.0f} s: {reasons}")


async def _replay(
    settings: DemoSettings, outcome: Outcome, watcher: _Watcher, progress: Callable[[str], None]
) -> None:
    """Send the trace to every tier; then go on quietly until all have scaled both ways, or for a while."""
    trace = azure_conversation()
    outcome.compress = trace[-1].at / settings.seconds
    progress(
        f"replaying the Azure 2023 conversation trace: its hour in {settings.seconds:.0f} s"
        f" ({outcome.compress:.0f}× faster), thinned to each tier's share"
    )
    over = asyncio.Event()
    tail = _TAIL_SECONDS if settings.complete else 0.0
    watcher.begin()

    def until_over(name: str, requests: Iterator[TraceRequest]) -> Iterator[TraceRequest]:
        sent = outcome.tiers[name].sent
        for request in requests:
            if over.is_set():
                return
            yield request
            sent.append(watcher.now())

    async def one(number: int, name: str) -> None:
        curve = CURVES[outcome.tiers[name].tier]
        requests = replayed(trace, curve, settings.seconds, tail=tail, seed=settings.seed + number)

        async def target() -> str:
            return await watcher.router(name)

        async with LoadGenerator(
            target,
            model=name,
            retry_after=1.0,
            on_record=lambda record: watcher.finished(name, record),
        ) as generator:
            await generator.replay(until_over(name, requests))

    async def stop() -> None:
        await asyncio.sleep(settings.seconds)
        while watcher.now() < settings.seconds + tail:
            if all(tier.moved for tier in outcome.tiers.values()):
                break
            await asyncio.sleep(_POLL_SECONDS)
        over.set()

    loads = [asyncio.create_task(one(number, name)) for number, name in enumerate(outcome.tiers)]
    try:
        await stop()
        # What is in flight may end; what still hangs then is an answer that did not come.
        await asyncio.wait(loads, timeout=_DRAIN_SECONDS)
        for load in loads:
            if load.done() and not load.cancelled() and (failure := load.exception()):
                raise failure
    finally:
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)


def write_summary(outcome: Outcome, path: Path) -> None:
    """Write ``summary.json``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary(outcome), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
