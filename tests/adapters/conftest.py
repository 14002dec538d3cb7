"""Engines, routers and a Prometheus that do as they are told, for both ways of reading load."""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from servingtiers.adapters.prometheus import PrometheusSource
from servingtiers.adapters.scrape import ScrapeSource
from servingtiers.core.config import PrometheusConfig
from servingtiers.core.decisions import PoolRole
from servingtiers.core.telemetry import PodTarget, PoolTargets, TierTargets
from servingtiers.lab.vllm_metrics import EngineMetrics

INTERVAL = 15.0
WINDOW = 60.0


@dataclass
class Page:
    """One HTTP server on its own port; `answer` decides what it says."""

    text: Callable[[], str]
    answer: Callable[[web.Request], object] | None = None
    port: int = 0
    asked: int = 0
    last: web.Request | None = None
    runner: web.AppRunner | None = None

    async def start(self):
        """Listen on a free port of the loopback."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def stop(self):
        """Close the port: connections are refused from now on."""
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None

    async def handle(self, request):
        self.asked += 1
        self.last = request
        if self.answer is None:
            return web.Response(text=self.text())
        said = self.answer(request)
        return await said if asyncio.iscoroutine(said) else said


@dataclass
class Engine:
    """One engine pod: real vLLM metric names, driven by the test."""

    name: str
    metrics: EngineMetrics
    ready_since: float | None = None
    labels: dict[str, str] = field(default_factory=dict)
    rewrite: Callable[[str], str] = str

    def __post_init__(self):
        self.page = Page(self.text)

    def text(self):
        return self.rewrite(self.metrics.text())

    def finish(self, requests=1, *, ttft=0.2, tpot=0.03, prompt=100, output=50):
        """Count finished requests."""
        m = self.metrics
        m.success["stop"].add(requests)
        m.prompt_tokens.add(prompt * requests)
        m.generation_tokens.add(output * requests)
        m.prefix_queries.add(prompt * requests)
        m.prefix_hits.add(prompt / 4 * requests)
        m.flops.add(1e12 * requests)
        m.read_bytes.add(2e9 * requests)
        m.write_bytes.add(1e9 * requests)
        m.request_prompt_tokens.observe(prompt, requests)
        m.request_generation_tokens.observe(output, requests)
        m.ttft.observe(ttft, requests)
        m.tpot.observe(tpot, requests)
        m.itl.observe(tpot, requests * output)
        m.e2e.observe(ttft + tpot * output, requests)
        m.queue_time.observe(0.01, requests)


@dataclass
class Router:
    """One router pod: counters appear with their first increment, as vllm-router's do."""

    name: str
    ready_since: float | None = None
    counts: dict[tuple[str, str], float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.page = Page(self.text)

    def count(self, name, labels="", by=1.0):
        key = (f"vllm_router_{name}", labels)
        self.counts[key] = self.counts.get(key, 0.0) + by

    def text(self):
        return "".join(f"{name}{{{labels}}} {value:g}\n" for (name, labels), value in self.counts.items())


class FakePrometheus:
    """Holds scrapes and answers the three kinds of query that the adapter asks, over HTTP.

    Its ``increase`` is the plain difference times window over span: the real one is in test_prometheus_parity.
    """

    def __init__(self, clock):
        self.clock = clock
        self.samples = {}
        self.page = Page(lambda: "", self.answer)
        self.skew = 0.0
        self.override = {}
        self.extra = {}
        self.queries = []

    def store(self, name, labels, value, at):
        self.samples.setdefault((name, tuple(sorted(labels.items()))), []).append((at, value))

    def scrape(self, target_labels, text, *, up=True):
        at = self.clock() + self.skew
        self.store("up", target_labels, float(up), at)
        if up:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    self.store(sample.name, {**sample.labels, **target_labels}, sample.value, at)

    def select(self, expression):
        names = re.search(r'__name__=~"([^"]*)"', expression)[1]
        millis = int(re.search(r"\[(\d+)ms\]", expression)[1])
        since = self.clock() + self.skew - millis / 1000
        for (name, labels), samples in self.samples.items():
            if re.fullmatch(names, name):
                inside = [(at, value) for at, value in samples if at > since]
                if inside:
                    yield name, dict(labels), inside

    def evaluate(self, query):
        if query == "time()":
            return "scalar", [self.clock() + self.skew, str(self.clock() + self.skew)]
        if not query.startswith("sum by"):
            return "matrix", [
                {"metric": {"__name__": name, **labels}, "values": [[at, repr(v)] for at, v in values]}
                for name, labels, values in self.select(query)
            ]
        found = {}
        for part in query.split(" or on "):
            had = {key[:3] for key in found}
            for _, labels, values in self.select(part):
                key = (*(labels.get(name) for name in ("namespace", "pod", "instance")), labels.get("le"))
                if len(values) < 2 or key[:3] in had:
                    continue
                steps = [b[1] - a[1] if b[1] >= a[1] else b[1] for a, b in pairwise(values)]
                grown = sum(steps) * WINDOW / (values[-1][0] - values[0][0])
                found[key] = found.get(key, 0.0) + grown
        names = ("namespace", "pod", "instance", "le")
        return "vector", [
            {
                "metric": {n: v for n, v in zip(names, key, strict=True) if v is not None},
                "value": [self.clock(), repr(value)],
            }
            for key, value in found.items()
        ]

    def answer(self, request):
        query = request.query["query"]
        self.queries.append(query)
        for part, reply in self.override.items():
            if part in query:
                return reply(request)
        kind, result = self.evaluate(query)
        body = {"status": "success", "data": {"resultType": kind, "result": result}, **self.extra}
        return web.json_response(body)


class Rig:
    """One tier ``llm/chat`` with pods, read by one of the two sources, on a clock that the test moves."""

    namespace = "llm"

    def __init__(self, how):
        self.how = how
        self.now = time.time()
        self.mono = 1000.0
        self.engines = []
        self.routers = []
        self.roles = {}
        self.desired = None
        self.prometheus = FakePrometheus(lambda: self.now)
        self.source = None
        self.scraping = True
        self.source_options = {}
        self.real_time = False

    async def start(self):
        if self.how == "prometheus":
            await self.prometheus.page.start()

    async def stop(self):
        for pod in (*self.engines, *self.routers):
            await pod.page.stop()
        await self.prometheus.page.stop()
        if self.source is not None:
            await self.source.close()

    async def engine(self, name, role=PoolRole.AGGREGATED, **options):
        metrics = EngineMetrics("chat", max_model_len=2000)
        engine = Engine(name, metrics, **options)
        await engine.page.start()
        self.engines.append(engine)
        self.roles[name] = role
        return engine

    async def router(self, name="router-0", **options):
        router = Router(name, **options)
        await router.page.start()
        self.routers.append(router)
        return router

    def make_source(self):
        if self.how == "scrape":
            options = {"interval": INTERVAL, "window": WINDOW, "timeout": 1.0, **self.source_options}
            return ScrapeSource(monotonic=lambda: self.mono, **options)
        settings = {
            "url": f"http://127.0.0.1:{self.prometheus.page.port}",
            "timeout": "1s",
            **self.source_options,
        }
        clock = {} if self.real_time else {"monotonic": lambda: self.mono}
        return PrometheusSource(PrometheusConfig(**settings), WINDOW, **clock)

    def target(self, pod):
        return PodTarget(pod.name, "127.0.0.1", pod.page.port, pod.ready_since)

    def tier(self):
        roles = dict.fromkeys(self.roles.values()) or {PoolRole.AGGREGATED: None}
        pools = []
        for role in roles:
            pods = [e for e in self.engines if self.roles[e.name] is role]
            desired = len(pods) if self.desired is None else self.desired
            pools.append(PoolTargets(role.value.lower(), role, desired, tuple(map(self.target, pods))))
        return TierTargets(self.namespace, "chat", tuple(pools), tuple(map(self.target, self.routers)))

    def scrape(self):
        for pod in (*self.engines, *self.routers):
            labels = {
                "namespace": self.namespace,
                "pod": pod.name,
                "instance": f"127.0.0.1:{pod.page.port}",
                "job": "pods",
                **pod.labels,
            }
            labels = {k: v for k, v in labels.items() if v}
            if pod.page.answer is None:
                self.prometheus.scrape(labels, pod.text(), up=pod.page.runner is not None)

    async def read(self):
        if self.source is None:
            self.source = self.make_source()
        return (await self.source.read([self.tier()], self.now))["llm/chat"]

    async def tick(self, times=1, *, each=None):
        """Let time pass, scrape and read; `each` runs before every scrape."""
        load = None
        for _ in range(times):
            self.now += INTERVAL
            self.mono += INTERVAL
            if each is not None:
                each()
            if self.how == "prometheus" and self.scraping:
                self.scrape()
            load = await self.read()
        return load


@pytest.fixture(params=["scrape", "prometheus"])
async def rig(request):
    """A tier read by scraping, and the same read through Prometheus."""
    rig = Rig(request.param)
    await rig.start()
    yield rig
    await rig.stop()


@pytest.fixture
async def scrape_rig():
    """A tier read by scraping."""
    rig = Rig("scrape")
    yield rig
    await rig.stop()


@pytest.fixture
async def prometheus_rig():
    """A tier read through Prometheus."""
    rig = Rig("prometheus")
    await rig.start()
    yield rig
    await rig.stop()
