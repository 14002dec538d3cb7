"""Scenario 8: the operator comes, changes and goes; engines serve on."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import pytest

from harness.kube import wait_for
from harness.tiers import tier
from harness.traffic import Traffic, ask, prompt

_OWNED = "deployments,services,serviceaccounts,roles,rolebindings,networkpolicies,poddisruptionbudgets"
_EVERYTHING = f"{_OWNED},configmaps,leases,pods,replicasets,secrets,jobs"
_RELEASE = "app.kubernetes.io/instance=servingtiers"


async def test_an_upgrade_from_the_version_before_restarts_nothing(product, previous, kube, figures):
    before, chart = previous
    before.install(chart=chart)
    kube.apply(tier("chat", replicas=(1, 2)))
    kube.wait_ready("chat", seconds=300)
    pods = {pod["metadata"]["uid"] for pod in [*kube.engines("chat"), *kube.routers("chat")]}
    (old,) = product.operators()
    traffic = Traffic(kube.service_url("chat"), rate=2, prompt_tokens=32, output_tokens=16, seed=81)
    async with traffic.running():
        await asyncio.to_thread(product.install)
        (new,) = product.operators()
        await asyncio.sleep(20)
    assert new["spec"]["containers"][0]["image"] != old["spec"]["containers"][0]["image"]
    after = {pod["metadata"]["uid"] for pod in [*kube.engines("chat"), *kube.routers("chat")]}
    figures(
        f"upgrade from the version before replaced {len(pods - after)} of {len(pods)} pods; {traffic.summary()}"
    )
    assert after == pods
    assert traffic.failed == []
    assert kube.condition("chat", "Ready")["status"] == "True"


@pytest.mark.continues
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
    drained = wait_for("its pods drained", 120, lambda: not kube.listed("pods", "servingtiers.io/tier=chat"))
    # The routers' account outlives the operator, or tiers would not; the page on installing says how it goes, too.
    left = kube.run("get", _EVERYTHING, f"--selector={_RELEASE}", "-o=name").split()
    kube.run("delete", "serviceaccount,role,rolebinding", "servingtiers-router")
    orphans = kube.run("get", _EVERYTHING, f"--selector={_RELEASE}", "-o=name").split()
    orphans += kube.run("get", _EVERYTHING, "--selector=servingtiers.io/tier", "-o=name").split()
    product.install()
    figures(
        f"upgrade and uninstall restarted 0 of {len(before)} pods; {traffic.summary()};"
        f" tier deleted without operator, its objects gone in {gone:.0f} s and its pods {drained:.0f} s later; kept for tiers: {len(left)} objects of the"
        f" routers' account; orphans {orphans}"
    )
    assert traffic.failed == []
    assert {each.partition("/")[2] for each in left} == {"servingtiers-router"}
    assert orphans == []
