# the names of the tests are the sentences
"""Lending with everything real but GPUs: the operator's own process, vllm-router, controllers, scheduler, streamed answers.

Prints the seconds from the first request of a burst to the label, and to the first request that the lent engine took.
"""

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from servingtiers.lab.binaries import BinariesError, locate
from servingtiers.lab.demo_ring import Ring, RingSettings
from servingtiers.lab.kube import Kube
from servingtiers.lab.load import LoadGenerator, TraceRequest
from servingtiers.render import names

pytestmark = [pytest.mark.ring, pytest.mark.long(120), pytest.mark.xdist_group("routers")]

GROUP = "/apis/servingtiers.io/v1alpha1/namespaces/demo"
PODS = "/api/v1/namespaces/demo/pods"
SERVED_SECONDS = 10.0
"""For so long the burst goes on once the lent engine serves it and the status says why it came."""


@pytest.fixture(scope="module", autouse=True)
def _programs():
    try:
        locate()
    except BinariesError as error:
        if os.environ.get("SERVINGTIERS_REQUIRE_RING"):
            raise
        pytest.skip(str(error))


def member(name, kind, priority, replicas, batch, most):
    return {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "metadata": {"name": name},
        "spec": {
            "tier": kind,
            "model": {"name": "meta-llama/Llama-3.1-8B-Instruct", "revision": "main", "servedName": "llama"},
            "sharedPool": {"name": "llama", "priority": priority},
            "pool": {
                "hardware": {"accelerators": ["h100-sxm-80gb"], "tensorParallel": 1},
                "engine": {
                    "image": "vllm/vllm-openai:v0.32.0",
                    "maxModelLen": 8192,
                    "maxNumSeqs": batch,
                },
                "scaling": {"minReplicas": replicas, "maxReplicas": most},
            },
        },
    }


async def engines(kube):
    """Return name to (home, holder, address, ready) of every engine."""
    found = {}
    for pod in (await kube.get(PODS))["items"]:
        labels = pod["metadata"]["labels"]
        if labels.get(names.COMPONENT_LABEL) != names.ENGINE or "deletionTimestamp" in pod["metadata"]:
            continue
        ready = any(
            c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ())
        )
        found[pod["metadata"]["name"]] = (
            labels[names.TIER_LABEL],
            labels.get(names.ROUTE_TIER_LABEL),
            pod["status"].get("podIP"),
            ready,
        )
    return found


async def routers(kube, tier):
    """Return the addresses of a tier's ready routers."""
    return [
        pod["status"]["podIP"]
        for pod in (await kube.get(PODS))["items"]
        if pod["metadata"]["labels"].get(names.COMPONENT_LABEL) == names.ROUTER
        and pod["metadata"]["labels"].get(names.TIER_LABEL) == tier
        and any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))
    ]


def dispatched(address, engine):
    """Return the requests that a router has sent to an engine."""
    with urllib.request.urlopen(f"http://{address}:29000/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.findall(
        rf'^vllm_router_processed_requests_total{{[^}}]*worker="http://{re.escape(engine)}:8000"[^}}]*}} (\S+)',
        text,
        re.MULTILINE,
    )
    return sum(map(float, found))


async def until(check, seconds, what):
    deadline = time.monotonic() + seconds
    while True:
        found = await check()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.2)


def steady(rate, prompt, output, over):
    """Yield requests at a rate until it is over."""
    for i in itertools.count():
        if over.is_set():
            return
        yield TraceRequest(i / rate, prompt, output)


def restart_operator(details):
    """Start the operator again, as the stage did."""
    folder = Path(details.folder)
    return subprocess.Popen(
        [
            str(Path(sys.executable).with_name("servingtiers")),
            "operator",
            f"--config={folder / 'operator-config.yaml'}",
            f"--kubeconfig={folder / 'operator.kubeconfig'}",
            f"--namespace={details.namespace}",
            f"--health-port={details.health_port}",
            f"--metrics-port={details.metrics_port}",
        ],
        stdout=(folder / "operator-2.log").open("wb"),
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_a_burst_is_served_within_seconds_by_an_engine_of_another_tier_which_then_goes_home(killed):
    """Also where the operator is killed while the engine is lent."""
    successor = None
    with Ring(RingSettings(), progress=lambda _: None) as ring:
        try:
            async with Kube.from_kubeconfig(Path(ring.details.kubeconfig)) as kube:
                pool = {
                    "apiVersion": "servingtiers.io/v1alpha1",
                    "kind": "TierPool",
                    "metadata": {"name": "llama"},
                    "spec": {"servedModelName": "llama", "maxAccelerators": 4},
                }
                await kube.request("POST", f"{GROUP}/tierpools", pool)
                await kube.request("POST", f"{GROUP}/servingtiers", member("chat", "Latency", 200, 1, 8, 4))
                await kube.request(
                    "POST", f"{GROUP}/servingtiers", member("batch", "Throughput", 10, 3, 32, 3)
                )

                async def up():
                    found = await engines(kube)
                    every = len(found) == 4 and all(ready for *_, ready in found.values())
                    return every and await routers(kube, "chat") and await routers(kube, "batch")

                await until(up, 120, "four engines and the routers")
                chat, batch = await routers(kube, "chat"), await routers(kube, "batch")
                await asyncio.sleep(8)  # one window of telemetry
                async with (
                    LoadGenerator([f"http://{a}:8000" for a in chat], model="llama") as burst,
                    LoadGenerator([f"http://{a}:8000" for a in batch], model="llama") as jobs,
                ):
                    over = asyncio.Event()
                    work = asyncio.create_task(jobs.replay(steady(5, 256, 320, over)))
                    await asyncio.sleep(5)
                    began = time.monotonic()
                    load = asyncio.create_task(burst.replay(steady(10, 512, 192, over)))

                    async def lent():
                        return [
                            (name, ip)
                            for name, (home, holder, ip, _) in (await engines(kube)).items()
                            if (home, holder) == ("batch", "chat")
                        ]

                    (name, address), *_ = await until(lent, 40, "an engine changes its label")
                    labelled = time.monotonic() - began

                    async def served():
                        return sum([await asyncio.to_thread(dispatched, a, address) for a in chat])

                    await until(served, 15, "the lent engine serves")
                    serving = time.monotonic() - began
                    print(f"\n{labelled:.1f} s to the label, {serving:.1f} s to the first request it serves")

                    async def told():
                        decisions = (await kube.get(f"{GROUP}/servingtiers/chat"))["status"]["decisions"]
                        return [d["reason"] for d in decisions if d.get("engine") == name]

                    came = await until(told, 15, "the status says why it came")
                    if killed:
                        os.kill(ring.details.pids["operator"], signal.SIGKILL)
                    await asyncio.sleep(SERVED_SECONDS)
                    over.set()
                    await load
                    await work
                assert [r.error for r in (*burst.records, *jobs.records) if not r.ok] == []
                print(came[0])
                if killed:
                    successor = await asyncio.to_thread(restart_operator, ring.details)
                done = time.monotonic()

                async def home():
                    return all(home == holder for home, holder, *_ in (await engines(kube)).values())

                await until(home, 200, "every engine is at home")
                print(f"{time.monotonic() - done:.1f} s from the burst's end to the last engine at home")
                assert len(await engines(kube)) == 4, "nothing was started: maxAccelerators is 4"
                status = (await kube.get(f"{GROUP}/tierpools/llama"))["status"]
                assert yaml.safe_dump(status)
        finally:
            if successor is not None:
                successor.terminate()
                successor.wait(20)
