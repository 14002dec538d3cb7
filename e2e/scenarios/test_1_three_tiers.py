"""Scenario 1: install, three tiers, first answers."""

from __future__ import annotations

import asyncio
import random
import time

import aiohttp

from harness.kube import scrape, total
from harness.tiers import tier
from harness.traffic import Answer, ask, prompt
from onenode.images import BASE

TIERS = {"chat": "Latency", "assistant": "Balanced", "batch": "Throughput"}


async def test_three_tiers_answer_completions_chat_and_streams_through_their_routers(product, kube, figures):
    begun = time.monotonic()
    # Batches are left to the tiers: what differs between them is the operator's own choice.
    kube.apply(*(tier(name, kind, batch=None) for name, kind in TIERS.items()))
    ready = kube.wait_ready(*TIERS, seconds=300)
    rng = random.Random(1)
    answers: list[Answer] = []
    async with aiohttp.ClientSession() as session:
        for name in TIERS:
            url = kube.service_url(name)
            answers += await asyncio.gather(
                *(
                    ask(session, url, tokens=8, text=prompt(24, rng), chat=number % 2 == 1)
                    for number in range(8)
                )
            )
            async with session.post(
                f"{url}/v1/completions", json={"model": "tiny", "prompt": "hello", "max_tokens": 5}
            ) as plain:
                assert plain.status == 200
                assert (await plain.json())["usage"]["completion_tokens"] == 5
    assert [each for each in answers if not each.ok] == []
    assert [each.tokens for each in answers] == [8] * len(answers)

    flags = {}
    for name in TIERS:
        (engine,) = kube.engines(name)
        arguments = engine["spec"]["containers"][0]["args"]
        flags[name] = {
            part.split("=")[0]: part.split("=")[1]
            for part in arguments
            if part.startswith(("--max-num-seqs", "--performance-mode"))
        }
        served = scrape(f"{kube.pod_url(engine)}/metrics")
        # The first completion, eight streams and one plain request, and none that belonged to another tier.
        assert total(served, "vllm:request_success_total") == 10
    assert [flags[name]["--performance-mode"] for name in TIERS] == [
        "interactivity",
        "balanced",
        "throughput",
    ]
    batches = [int(flags[name]["--max-num-seqs"]) for name in TIERS]
    assert batches == sorted(batches)
    assert len(set(batches)) == 3

    # The chart's own test: a pod that asks the operator for its metrics.
    assert "Succeeded" in product.run_helm("test", "servingtiers")

    # The operator itself, with three idle tiers. The kubelet measures every 10 s or so.
    (operator,) = product.operators()
    await asyncio.sleep(10)
    began, used, _ = kube.usage(operator)
    await asyncio.sleep(50)
    ended, more, resident = kube.usage(operator)
    busy = (more - used) / (ended - began)
    figures(
        f"operator idle with three tiers: {busy:.2%} of a core over {ended - began:.0f} s, {resident:.0f} MiB resident,"
        f" image {kube.image_mib(product.images['operator']):.0f} MiB of which its base is"
        f" {kube.image_mib(BASE):.0f} MiB"
    )
    assert ended - began > 30
    assert busy <= 0.02
    assert resident <= 150 * 1e6 / 2**20

    worst = max(each.ttft or 0 for each in answers)
    figures(
        f"three tiers Ready {ready:.0f} s after apply; {len(answers) + 3} of {len(answers) + 3} requests answered, "
        f"longest TTFT {worst:.2f} s; batches {'/'.join(map(str, batches))}; {time.monotonic() - begun:.0f} s"
    )
