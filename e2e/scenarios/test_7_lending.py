"""Scenario 7: an engine changes hands by a label, and two equal engines share equal load."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time

import aiohttp

from harness.kube import pod_ready, scrape, total, wait_for
from harness.tiers import MODEL, engine, tier
from harness.traffic import Traffic, ask, prompt

ROUTE = "route.servingtiers.io/tier"


def _served(kube, pod):
    return total(scrape(f"{kube.pod_url(pod)}/metrics"), "vllm:request_success_total")


async def test_two_equal_engines_get_equal_shares(product, kube, figures):
    kube.apply(tier("chat", replicas=(2, 2)))
    kube.wait_ready("chat", seconds=300)
    wait_for("two engines", 300, lambda: sum(pod_ready(pod) for pod in kube.engines("chat")) == 2)
    await asyncio.sleep(3)
    traffic = Traffic(kube.service_url("chat"), rate=10, prompt_tokens=32, output_tokens=64, seed=71)
    async with traffic.running():
        await asyncio.sleep(30)
    served = [_served(kube, pod) for pod in kube.engines("chat")]
    shares = [each / sum(served) for each in served]
    figures(f"shares {shares[0]:.0%} and {shares[1]:.0%} of {sum(served):.0f}; {traffic.summary()}")
    assert traffic.failed == []
    assert min(shares) >= 0.35


async def test_a_routing_label_lends_an_engine_in_seconds_and_its_successor_is_at_home(
    product, kube, figures
):
    kube.apply(tier("chat"), tier("batch", "Throughput", batch=8))
    kube.wait_ready("chat", "batch", seconds=300)
    (lent,) = kube.engines("batch")
    name = lent["metadata"]["name"]
    url = kube.service_url("chat")
    rng = random.Random(72)

    async def until_served(more_than):
        begun = time.monotonic()
        async with aiohttp.ClientSession() as session:
            while _served(kube, lent) <= more_than:
                assert time.monotonic() - begun < 60, "the borrower's router never used it"
                answers = await asyncio.gather(
                    *(ask(session, url, tokens=16, text=prompt(16, rng)) for _ in range(8))
                )
                assert all(answer.ok for answer in answers)
        return time.monotonic() - begun

    before = _served(kube, lent)
    kube.run("label", "pod", name, f"{ROUTE}=chat", "--overwrite")
    taken = await until_served(before)

    # Its Deployment never noticed; and it leaves as fast as it came.
    assert [pod["metadata"]["name"] for pod in kube.engines("batch")] == [name]
    kube.run("label", "pod", name, f"{ROUTE}=batch", "--overwrite")
    await asyncio.sleep(10)
    away = _served(kube, lent)
    async with aiohttp.ClientSession() as session:
        answers = [await ask(session, url, tokens=4, text=prompt(16, rng)) for _ in range(20)]
        assert all(answer.ok for answer in answers)
        assert _served(kube, lent) == away
        home = await ask(session, kube.service_url("batch"), tokens=4, text=prompt(16, rng))
    assert home.ok

    # Lent again and then replaced while nobody operates: the successor is at home.
    kube.run("label", "pod", name, f"{ROUTE}=chat", "--overwrite")
    kube.run("scale", "deployment", "--selector=app.kubernetes.io/component=operator", "--replicas=0")
    try:
        kube.delete("pod", name, "--grace-period=1")
        wait_for(
            "a successor",
            60,
            lambda: [pod["metadata"]["name"] for pod in kube.engines("batch")] not in ([], [name]),
        )
        (successor,) = kube.engines("batch")
        assert successor["metadata"]["labels"][ROUTE] == "batch"
    finally:
        kube.run("scale", "deployment", "--selector=app.kubernetes.io/component=operator", "--replicas=1")
        wait_for("operator", 90, lambda: any(pod_ready(pod) for pod in product.operators()))
    figures(
        f"lent engine served the borrower {taken:.1f} s after its label; left within 10 s; successor at home"
    )
    assert taken <= 10


async def test_tiers_of_a_pool_lend_an_engine_for_a_burst_and_have_it_back(product, kube, cluster, figures):
    """No accelerator is free: without lending the burst would wait."""
    cluster.set_accelerators(2)
    kube.apply(
        {
            "apiVersion": "servingtiers.io/v1alpha1",
            "kind": "TierPool",
            "metadata": {"name": "tiny"},
            "spec": {"servedModelName": MODEL},
        }
    )

    def member(name, kind, batch, *, most, **shared):
        settings = engine(batch=batch, image=product.images["engine"])
        made = tier(name, kind, replicas=(1, most), engine_settings=settings, cpu_limit="450m")
        made["spec"]["sharedPool"] = {"name": "tiny", "minKeep": 0, **shared}
        made["spec"]["model"]["servedName"] = MODEL
        return made

    chat = member("chat", "Latency", 4, most=2, priority=200, maxBorrowed=1)
    chat["spec"]["slo"] = {"ttft": {"p99": "1s"}}
    kube.apply(chat, member("jobs", "Throughput", 8, most=1, priority=10, maxBorrowed=0))
    kube.wait_ready("chat", "jobs", seconds=300)
    (lent,) = kube.engines("jobs")
    name, before = lent["metadata"]["name"], _served(kube, lent)
    seen: dict[str, float] = {}
    begun = time.monotonic()

    async def watch():
        """Note when the engine leaves its home, enters the borrower, first serves it, and is back."""
        while "home" not in seen:
            now = time.monotonic() - begun
            pod = await asyncio.to_thread(kube.get, "pod", name)
            holder = pod["metadata"]["labels"].get(ROUTE)
            if holder != "jobs" and "entered" not in seen:
                seen.setdefault("left", now)
            if holder == "chat":
                seen.setdefault("entered", now)
                if "served" not in seen and await asyncio.to_thread(_served, kube, pod) > before:
                    seen["served"] = time.monotonic() - begun
            if holder == "jobs" and "entered" in seen:
                seen["home"] = now
            await asyncio.sleep(0.5)

    burst = Traffic(
        kube.service_url("chat"), rate=3, prompt_tokens=48, output_tokens=640, seed=73, timeout=300
    )
    watching = asyncio.create_task(watch())
    async with burst.running():
        for _ in range(120):
            await asyncio.sleep(1)
            if "served" in seen:
                break
        await asyncio.sleep(10)
        burst.rate = 0
    ended = time.monotonic() - begun
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(watching, 300)
    (still,) = kube.engines("jobs")
    figures(
        f"engine of jobs left home {seen.get('left', math.nan):.0f} s after the burst began, entered chat"
        f" {seen.get('entered', math.nan) - seen.get('left', math.nan):.1f} s later and served it"
        f" {seen.get('served', math.nan) - seen.get('left', math.nan):.1f} s after its release; home"
        f" {seen.get('home', math.nan) - ended:.0f} s after the burst; {burst.summary()}"
    )
    assert seen["served"] - seen["left"] <= 10
    assert "home" in seen
    assert burst.failed == []
    assert still["metadata"]["name"] == name  # its Deployment never noticed
    async with aiohttp.ClientSession() as session:
        assert (await ask(session, kube.service_url("jobs"), tokens=4, text=prompt(16, random.Random(7)))).ok
