"""Scenario 6: who scales, zero and back, who goes first, and who is turned away."""

from __future__ import annotations

import asyncio
import random
import time

import aiohttp

from harness.kube import pod_ready, scrape, total, wait_for
from harness.tiers import MODEL, engine, tier
from harness.traffic import Traffic, ask, prompt


def _replicas(kube, tier_name):
    return kube.get("deployment", f"{tier_name}-pool")["spec"]["replicas"]


async def test_recommend_shows_and_does_not_act_and_external_leaves_replicas_to_others(
    product, kube, cluster, figures
):
    cluster.set_accelerators(2)
    kube.apply(
        tier(
            "watched", replicas=(1, 3), batch=1, scaling={"maxWaitingPerReplica": 1}, scaling_mode="Recommend"
        ),
        tier("foreign", replicas=(1, 3), scaling_mode="External"),
    )
    kube.wait_ready("watched", "foreign", seconds=300)
    traffic = Traffic(kube.service_url("watched"), rate=6, prompt_tokens=48, output_tokens=400, seed=61)

    def wanted():
        pools = kube.get("servingtier", "watched").get("status", {}).get("pools", [])
        return pools and pools[0].get("recommended", 1) > 1

    async with traffic.running():
        shown = await asyncio.to_thread(wait_for, "a recommendation to grow", 120, wanted)
        assert _replicas(kube, "watched") == 1
        traffic.rate = 0
    assert _replicas(kube, "watched") == 1

    # Somebody else scales the other tier, as an HPA does, and the operator does not fight (the second engine finds no
    # accelerator, which is nothing to this).
    kube.run("scale", "deployment/foreign-pool", "--replicas=2")
    await asyncio.sleep(30)
    assert _replicas(kube, "foreign") == 2
    reference = kube.get("servingtier", "foreign")["status"]["pools"][0]["scaleTargetRef"]
    assert reference["name"] == "foreign-pool"
    figures(
        f"recommendation to grow shown {shown:.0f} s after the load, not acted on; External kept at 2 by others"
    )


async def test_a_tier_at_zero_wakes_with_the_first_request(product, kube, figures):
    kube.apply(tier("rare", replicas=(0, 1), scaling={"idleAfter": "20s"}))
    kube.wait_ready("rare", seconds=300)
    url = kube.service_url("rare")
    rng = random.Random(62)
    async with aiohttp.ClientSession() as session:
        assert (await ask(session, url, tokens=4, text=prompt(20, rng))).ok
        asleep = await asyncio.to_thread(
            wait_for,
            "no engine left",
            240,
            lambda: _replicas(kube, "rare") == 0 and not kube.listed("pods", "servingtiers.io/pool=pool"),
        )
        assert all(pod_ready(pod) for pod in kube.routers("rare"))
        # What the client sees: an answer at once that says so, and it asks again.
        begun = time.monotonic()
        first = await ask(session, url, tokens=4, text=prompt(20, rng))
        first_seconds = time.monotonic() - begun
        assert first.status == 503
        decided = await asyncio.to_thread(
            wait_for, "an engine asked for", 60, lambda: _replicas(kube, "rare") == 1
        )
        attempts = 1
        while True:
            attempts += 1
            answer = await ask(session, url, tokens=4, text=prompt(20, rng))
            if answer.ok or time.monotonic() - begun > 300:
                break
            await asyncio.sleep(3)
    figures(
        f"asleep {asleep:.0f} s after the last request; the waking one got 503 in {first_seconds:.1f} s, engine asked "
        f"for {decided:.0f} s later, answered at attempt {attempts}, {time.monotonic() - begun:.0f} s after the first"
    )
    assert answer.ok
    assert decided <= 30


async def test_urgent_requests_go_first_and_what_is_too_much_is_turned_away(product, kube, figures):
    settings = engine(batch=1, priorityScheduling=True, maxQueuedRequests=6)
    kube.apply(tier("ranked", engine_settings=settings))
    kube.wait_ready("ranked", seconds=300)
    url = kube.service_url("ranked")
    rng = random.Random(63)
    (pod,) = kube.engines("ranked")

    async def waiting_and_running():
        page = await asyncio.to_thread(scrape, f"{kube.pod_url(pod)}/metrics")
        return total(page, "vllm:num_requests_waiting"), total(page, "vllm:num_requests_running")

    async def served(session):
        """Return ranks and statuses in order of completion, and whether all the others waited behind the first."""
        order, all_waited = [], False

        async def one(rank, tokens):
            answer = await ask(session, url, tokens=tokens, text=prompt(16, rng), priority=rank)
            order.append((rank, answer.status))

        # The first takes the one place in the batch; the others queue and are served by rank, not by arrival.
        tasks = [asyncio.create_task(one(0, 900))]
        while not tasks[0].done() and await waiting_and_running() != (0, 1):
            pass
        for rank in (9, 5, -3):
            # Long enough to end one after another for a client that has to wait for a processor, too.
            tasks.append(asyncio.create_task(one(rank, 400)))
            await asyncio.sleep(0.05)
        while not tasks[0].done():
            all_waited |= await waiting_and_running() == (3, 1)
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
        return order, all_waited

    async with aiohttp.ClientSession() as session:
        for _ in range(5):
            order, all_waited = await served(session)
            if all_waited:  # on a busy machine the first may be done before the last has come
                break
        assert all_waited
        assert [rank for rank, _ in order] == [0, -3, 5, 9]
        assert {status for _, status in order} == {200}

        flood = await asyncio.gather(
            *(
                session.post(
                    f"{url}/v1/completions", json={"model": MODEL, "prompt": "hello", "max_tokens": 64}
                )
                for _ in range(40)
            )
        )
        statuses = [response.status for response in flood]
        for response in flood:
            response.release()
        # The flood is over, and so is the shedding.
        after = await ask(session, url, tokens=8, text=prompt(16, rng))
    page = scrape(f"{kube.pod_url(pod)}/metrics")
    rejected = total(page, "vllm:admission_rejections_total")
    figures(
        f"served by rank {[rank for rank, _ in order]}; of 40 at once {statuses.count(200)} answered,"
        f" {statuses.count(503)} shed with 503, engine counted {rejected:.0f} rejections"
    )
    assert after.ok, after
    assert statuses.count(503) > 0
    assert statuses.count(200) >= 6
    assert statuses.count(200) + statuses.count(503) == 40
    assert rejected >= statuses.count(503)
