"""The same load on the same engines, scaled once by the operator and once by KEDA with the Kubernetes HPA.

``make e2e-rival``; ``REPEATS=2``, ``AFTER=330``; ``RESUME=1`` goes on with one that was broken off. Writes ``results.json`` beside this file, from which ``python -m rival.page`` writes the
page of the documentation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import time
import urllib.request
from dataclasses import asdict

import aiohttp
import pytest
import yaml

from harness import prometheus as monitoring
from harness.kube import open_proxy, pod_ready, wait_for
from harness.product import CHART
from harness.study import circumstances
from harness.tiers import MODEL, VOCABULARY, remove_tiers, tier
from harness.traffic import ask, prompt
from onenode import images as built
from onenode import programs
from onenode.cluster import Cluster
from onenode.images import Images
from rival import keda
from rival.measure import Load, Objectives, Phase, Sample, measured
from rival.page import RESULTS, write
from servingtiers.lab.binaries import KUBERNETES_VERSION

REPEATS = int(os.environ.get("REPEATS", "2"))
REPLICAS = (1, 3)
"""As the recipe's own example."""
BATCH, CPU_LIMIT = 16, "400m"
"""A limit, so that an engine carries the same whether one or three run: two cores hold the whole cluster."""
PROMPT, OUTPUT = 64, 256
AFTER = float(os.environ.get("AFTER", "330"))
"""Seconds that are watched after the load has gone; the HPA alone waits 300 before it scales down."""
PHASES = (
    Phase("quiet", 45, 0.25),
    Phase("shoulder", 75, 0.85),
    Phase("peak", 120, 1.7),
    Phase("quiet again", AFTER, 0.25),
)
OBJECTIVES = Objectives(ttft=0.5, tpot=0.006, e2e=1.6)
TIER, DEPLOYMENT = "chat", "chat-pool"
QUERY = f'sum(vllm:num_requests_waiting{{tier="{TIER}"}})'
"""The recipe's query, summed: as printed it gives a series per pod, which KEDA refuses as soon as there are two."""
SERVER = f"http://prometheus.{monitoring.NAMESPACE}.svc:9090"
OPERATOR, KEDA = "operator", "keda"
TELEMETRY = yaml.safe_load((CHART / "values.yaml").read_text())["config"]["telemetry"]
"""The chart's defaults: what the operator does on day one."""


def _tier(scaling_mode):
    return tier(
        TIER,
        "Latency",
        replicas=REPLICAS,
        batch=BATCH,
        cpu="100m",
        cpu_limit=CPU_LIMIT,
        scaling_mode=scaling_mode,
        slo={name: {"p99": f"{seconds * 1000:g}ms"} for name, seconds in asdict(OBJECTIVES).items()},
    )


class Watch:
    """Looks at the pool once a second, by a kubectl proxy: cheap beside the engines that are measured."""

    def __init__(self, kube):
        self._kube = kube
        self.samples: list[Sample] = []

    @contextlib.contextmanager
    def open(self):
        """Keep the way to the API server open."""
        process, self._base = open_proxy(self._kube.kubectl, self._kube.kubeconfig)
        try:
            yield self
        finally:
            process.terminate()
            process.wait(10)

    def _get(self, path):
        with urllib.request.urlopen(self._base + path, timeout=10) as answer:  # noqa: S310 - our own proxy
            return json.load(answer)

    def look(self, at):
        """Take one sample."""
        namespace = self._kube.namespace
        deployment = self._get(f"/apis/apps/v1/namespaces/{namespace}/deployments/{DEPLOYMENT}")
        selector = f"app.kubernetes.io/component%3Dengine,servingtiers.io/tier%3D{TIER}"
        pods = self._get(f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}")["items"]
        placed = [
            each
            for each in pods
            if each["spec"].get("nodeName") and each["status"]["phase"] not in ("Succeeded", "Failed")
        ]
        ready = [each for each in placed if pod_ready(each) and "deletionTimestamp" not in each["metadata"]]
        self.samples.append(Sample(at, deployment["spec"]["replicas"], len(placed), len(ready)))

    async def follow(self, begun):
        """Take a sample a second until cancelled."""
        while True:
            with contextlib.suppress(OSError):  # one look late is no loss
                await asyncio.to_thread(self.look, time.monotonic() - begun)
            await asyncio.sleep(1)


async def _capacity(url, seconds=25.0):
    """Return the requests per second that one engine sustains with its batch full."""
    rng = random.Random(6)
    done = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        begun = time.monotonic()

        async def client():
            while time.monotonic() - begun < seconds:
                answer = await ask(session, url, tokens=OUTPUT, text=prompt(PROMPT, rng))
                assert answer.ok, answer
                done.append((time.monotonic() - begun, answer))

        await asyncio.gather(*(client() for _ in range(BATCH + 2)))
    # The first third warms the engine up; the tail runs with fewer clients.
    counted = sum(seconds / 3 <= at <= seconds for at, _ in done)
    return counted / (seconds * 2 / 3)


async def _send(url, load, scratch, watch):
    """Replay the load with ``servingtiers bench`` while the pool is watched; return its figures and its records."""
    trace, record = scratch / "load.jsonl", scratch / "requests.jsonl"
    trace.write_text(load.trace())
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "servingtiers.cli", "bench", "--url", url, "--model", MODEL),
        *("--trace", str(trace), "--record", str(record), "--vocabulary", str(VOCABULARY)),
        *("--timeout", "300", "-o", "json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    following = None
    said = []
    out = asyncio.create_task(process.stdout.read())
    async for line in process.stderr:
        said.append(line.decode())
        if following is None and " requests in " in said[-1]:
            # It says so and sends the first.
            following = asyncio.create_task(watch.follow(time.monotonic()))
    await process.wait()
    if following is not None:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert process.returncode == 0, "".join(said)[-1500:]
    (run,) = json.loads(await out)["runs"]
    return run, [json.loads(line) for line in record.read_text().splitlines()]


def _begin(kube, who):
    """Bring the tier up with one engine and whoever scales it, or nobody; return its address."""
    kube.apply(_tier("Auto" if who == OPERATOR else "External"))
    kube.wait_ready(TIER, seconds=300)
    wait_for("one engine", 300, lambda: sum(map(pod_ready, kube.engines(TIER))) == 1)
    if who == KEDA:
        kube.apply(keda.scaled_object(DEPLOYMENT, query=QUERY, prometheus=SERVER, replicas=REPLICAS))
        wait_for("the HPA to read the metric", 120, lambda: keda.settled(kube, DEPLOYMENT))
    return kube.service_url(TIER)


def _end(kube):
    keda.let_go(kube)
    remove_tiers(kube)


@pytest.fixture
def rival(cluster, kube):
    """Install KEDA for the time of the test."""
    if not isinstance(cluster, Cluster):
        pytest.skip("KEDA's image is built for the one-node cluster")
    manifests = programs.keda(cluster.places) / "config"
    cluster.renew("kube-apiserver")
    cluster.wait_for_api_server()
    image = Images(cluster.places).keda()
    programs.say(f"image {image.name}: {image.size_mib:.0f} MiB")
    programs.say(f"KEDA serves external metrics after {keda.install(kube, manifests, built.KEDA):.0f} s")
    yield
    keda.remove(kube, manifests, built.KEDA)


def _save(load, runs, versions):
    """Write what there is: a comparison that is broken off has its first runs."""
    results = {
        **circumstances(),
        "versions": versions,
        "load": {**asdict(load), "requests": load.trace().count("\n")},
        "objectives": asdict(OBJECTIVES),
        "engine": {"batch": BATCH, "cpuLimit": CPU_LIMIT, "replicas": REPLICAS},
        "recipe": {**keda.RECIPE, "query": QUERY},
        "telemetry": TELEMETRY,
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if {each["who"] for each in runs} == {OPERATOR, KEDA}:
        write()


async def test_the_same_load_is_scaled_by_the_operator_and_by_keda(
    product, prometheus, rival, kube, figures, tmp_path
):
    versions = {
        "keda": programs.KEDA_VERSION,
        "kubernetes": KUBERNETES_VERSION,
        "engine": built.ENGINE.rpartition(":")[2],
        "router": built.ROUTER.rpartition(":")[2],
    }
    product.install(TELEMETRY)
    runs: list[dict] = []
    if os.environ.get("RESUME"):
        saved = json.loads(RESULTS.read_text())
        runs = saved["runs"]
        load = Load(PHASES, saved["load"]["capacity"], PROMPT, OUTPUT)
        assert asdict(load)["phases"] == tuple(saved["load"]["phases"]), "that was another load"
    else:
        # Once, so that all runs get the same requests, and while nobody scales.
        load = Load(PHASES, round(await _capacity(_begin(kube, None)), 2), PROMPT, OUTPUT)
        programs.say(f"one engine sustains {load.capacity} requests/s with its batch full")
        _end(kube)
    for round_ in range(REPEATS):
        order = (OPERATOR, KEDA) if round_ % 2 == 0 else (KEDA, OPERATOR)
        for who in order:
            if any((each["who"], each["round"]) == (who, round_ + 1) for each in runs):
                continue
            url = _begin(kube, who)
            await asyncio.sleep(20)  # let what the start of an engine stirred up pass
            watch = Watch(kube)
            with watch.open():
                watch.look(0.0)
                said, records = await _send(url, load, tmp_path, watch)
            samples = [each for each in watch.samples if each.at <= load.seconds]
            found = measured(load, OBJECTIVES, records, samples)
            runs.append(
                {
                    "who": who,
                    "round": round_ + 1,
                    **found,
                    "client": {
                        "lateP99": said["client"]["lateMs"]["p99"],
                        "busyPeak": said["client"]["busyPeak"],
                    },
                    "failures": said["failures"],
                    "loadAverage": [round(each, 1) for each in os.getloadavg()],
                }
            )
            figures(
                f"{who}, run {round_ + 1}: {found['requests']} requests, {found['failed']} failed; kept TTFT"
                f" {found['ttft']:.1%}, TPOT {found['tpot']:.1%}, E2E {found['e2e']:.1%}, all {found['joint']:.1%};"
                f" replica-seconds {found['replicaSeconds']}; "
                + "; ".join(
                    f"{each['name']}: all {each['joint']:.1%}, decided {each['decidedAfter']} s, added"
                    f" {each['addedAfter']} s"
                    for each in found["phases"]
                )
                + f"; back at one {found['backAsked']} s (gone {found['backHeld']} s)"
            )
            _save(load, runs, versions)
            _end(kube)
    # What makes it a comparison; who was better is the page's to say.
    assert {each["who"] for each in runs} == {OPERATOR, KEDA}
    for run in runs:
        assert run["requests"] == load.trace().count("\n")
        assert run["phases"][0]["askedAtStart"] == run["phases"][0]["readyAtStart"] == 1, run["phases"][0]
        assert run["peakAsked"] > 1, f"{run['who']} never scaled: the load shows nothing"
