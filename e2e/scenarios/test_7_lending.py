"""Scenario 7: an engine changes hands by a label, and two equal engines share equal load."""

from __future__ import annotations

import asyncio
import random
import time

import aiohttp

from harness.kube import pod_ready, scrape, total, wait_for
from harness.tiers import tier
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
