"""Scenario 3: prefill and decode apart, with the KV cache moved between pods."""

from __future__ import annotations

import asyncio
import random
import time

import aiohttp
import pytest

from harness.generator import bench_serve
from harness.kube import pod_ready, scrape, total, wait_for
from harness.tiers import disaggregated
from harness.traffic import Traffic, ask, prompt
from servingtiers.core.vllm_metrics import ROUTER_METRICS

REQUESTS, PROMPT, OUTPUT = 40, 96, 8
SOURCE = "vllm:prompt_tokens_by_source_total"


def _pages(kube, tier, pool):
    return [scrape(f"{kube.pod_url(pod)}/metrics") for pod in kube.engines(tier, pool)]


def _tokens(pages, source):
    return sum(total(page, SOURCE, f'source="{source}"') for page in pages)


async def test_decode_gets_its_prompts_from_prefill_and_the_pools_scale_apart(
    product, kube, cluster, figures
):
    kube.apply(disaggregated("split", prefill=(1, 2), decode=(1, 2)))
    ready = kube.wait_ready("split", seconds=300)
    url = kube.service_url("split")
    rng = random.Random(3)
    async with aiohttp.ClientSession() as session:
        # The first transfer between two engines pays for their handshake.
        for _ in range(3):
            await ask(session, url, tokens=2, text=prompt(40, rng))
    first = _pages(kube, "split", "decode")
    bench = await bench_serve(
        cluster.places,
        url,
        rate=3,
        requests=REQUESTS,
        prompt_tokens=PROMPT,
        output_tokens=OUTPUT,
    )
    assert bench["failed"] == 0
    assert bench["completed"] == REQUESTS
    assert bench["total_output_tokens"] == REQUESTS * OUTPUT

    decode, prefill = _pages(kube, "split", "decode"), _pages(kube, "split", "prefill")
    sources = {
        source: _tokens(decode, source) - _tokens(first, source)
        for source in ("external_kv_transfer", "local_compute", "local_cache_hit")
    }
    moved, prompts = sources["external_kv_transfer"], sum(sources.values())
    assert prompts >= 0.95 * REQUESTS * PROMPT
    assert moved >= 0.95 * prompts, sources
    assert _tokens(prefill, "local_compute") + _tokens(prefill, "local_cache_hit") >= moved

    # One pool grows; the other stays as it is and none of its engines restarts.
    before = {pod["metadata"]["uid"] for pod in kube.engines("split", "prefill")}
    kube.patch(
        "servingtier", "split", {"spec": {"disaggregation": {"decode": {"scaling": {"minReplicas": 2}}}}}
    )
    grown = wait_for(
        "two decode engines ready",
        240,
        lambda: sum(pod_ready(pod) for pod in kube.engines("split", "decode")) == 2,
    )
    after = {pod["metadata"]["uid"] for pod in kube.engines("split", "prefill")}
    assert after == before

    # The new engine takes its share: two decode engines, one prefill.
    async with aiohttp.ClientSession() as session:
        more = [await ask(session, url, tokens=4, text=prompt(96, rng)) for _ in range(20)]
    assert [each for each in more if not each.ok] == []
    shares = [total(page, "vllm:request_success_total") for page in _pages(kube, "split", "decode")]
    assert min(shares) >= 3

    (router,) = kube.routers("split")
    page = scrape(f"{kube.pod_url(router, 29000)}/metrics")
    assert total(page, ROUTER_METRICS.pd_completed) >= REQUESTS + len(more)

    figures(
        f"Ready {ready:.0f} s after apply; {moved:.0f} of {prompts:.0f} prompt tokens ({moved / prompts:.1%}) reached "
        f"decode by transfer; {REQUESTS + len(more)} of {REQUESTS + len(more)} answered; decode 1→2 in "
        f"{grown:.0f} s beside an untouched prefill"
    )


@pytest.mark.continues
async def test_a_prefill_engine_that_goes_gives_up_its_kv_first(product, kube, figures):
    kube.apply(disaggregated("split", prefill=(2, 2), decode=(1, 1)))
    kube.wait_ready("split", seconds=300)
    wait_for(
        "two prefill engines ready",
        240,
        lambda: sum(pod_ready(pod) for pod in kube.engines("split", "prefill")) == 2,
    )
    url = kube.service_url("split")
    rng = random.Random(4)
    async with aiohttp.ClientSession() as session:
        for _ in range(4):
            await ask(session, url, tokens=2, text=prompt(40, rng))
    traffic = Traffic(url, rate=1.5, prompt_tokens=96, output_tokens=16, seed=5)
    async with traffic.running():
        await asyncio.sleep(8)
        leaving = kube.engines("split", "prefill")[0]["metadata"]["name"]
        kube.delete("pod", leaving, "--wait=false")
        begun = time.monotonic()
        gone = await asyncio.to_thread(
            wait_for,
            "the prefill engine gone",
            120,
            lambda: (
                leaving
                not in [
                    pod["metadata"]["name"] for pod in kube.listed("pods", "servingtiers.io/pool=prefill")
                ]
            ),
        )
        await asyncio.sleep(max(0.0, 20 - (time.monotonic() - begun)))
    failed = traffic.failed
    figures(f"prefill engine deleted under load, gone after {gone:.0f} s; {traffic.summary()}")
    # It lives on for its pre-stop sleep, longer than decode may take to fetch what it holds (30 s).
    assert gone >= 30
    assert failed == []
