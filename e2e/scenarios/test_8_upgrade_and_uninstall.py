"""Scenario 8: the operator comes, changes and goes; engines serve on."""

from __future__ import annotations

import asyncio
import random

import aiohttp

from harness.kube import wait_for
from harness.tiers import tier
from harness.traffic import Traffic, ask, prompt

_OWNED = "deployments,services,serviceaccounts,roles,rolebindings,networkpolicies,poddisruptionbudgets"


async def test_an_upgrade_restarts_no_engine_and_tiers_outlive_the_operator(product, kube, figures):
    kube.apply(tier("chat", replicas=(1, 2)))
    kube.wait_ready("chat", seconds=300)
    before = {pod["metadata"]["uid"] for pod in [*kube.engines("chat"), *kube.routers("chat")]}
    (old,) = (pod["metadata"]["uid"] for pod in product.operators())
    traffic = Traffic(kube.service_url("chat"), rate=2, prompt_tokens=32, output_tokens=16, seed=8)
    async with traffic.running():
        await asyncio.to_thread(product.install, {"source": "Scrape", "interval": "6s", "window": "36s"})
        assert old not in {pod["metadata"]["uid"] for pod in product.operators()}
        await asyncio.sleep(15)
        after = {pod["metadata"]["uid"] for pod in [*kube.engines("chat"), *kube.routers("chat")]}
        assert after == before

        await asyncio.to_thread(product.run_helm, "uninstall", "servingtiers", "--wait")
        assert product.operators() == []
        await asyncio.sleep(10)
        async with aiohttp.ClientSession() as session:
            answer = await ask(session, traffic.url, tokens=4, text=prompt(16, random.Random(8)))
        assert answer.ok
        # Deleting a tier works with the operator gone: its objects are owned, and nothing is held up.
        traffic.rate = 0
    kube.delete("servingtier", "chat")
    gone = wait_for(
        "everything of the tier gone",
        60,
        lambda: not kube.listed(_OWNED, "servingtiers.io/tier=chat"),
    )
    left = kube.run("get", _OWNED, "--selector=app.kubernetes.io/instance=servingtiers", "-o=name")
    product.install()
    figures(
        f"upgrade and uninstall restarted 0 of {len(before)} pods; {traffic.summary()};"
        f" tier deleted without operator, its objects gone in {gone:.0f} s; left of the release: {left.split()}"
    )
    assert traffic.failed == []
    assert left == ""
