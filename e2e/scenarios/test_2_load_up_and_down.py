"""Scenario 2: load rises, replicas follow, accelerators run out; load falls, replicas drain away."""

from __future__ import annotations

import asyncio
import itertools
import math
import time

from harness.generator import bench_serve
from harness.kube import WaitError, pod_ready, wait_for
from harness.tiers import tier
from harness.traffic import Traffic

ACCELERATORS = 3
WAITING_LIMIT = 2
TTFT_TARGET = 1.0
RATE, REQUESTS, OUTPUT = 3.0, 360, 640
"""Requests per second, for 120 s, of long outputs: two to three times what one engine carries here."""


async def test_replicas_follow_the_load_and_wait_for_accelerators_and_nobody_notices(
    product, prometheus, kube, cluster, figures
):
    cluster.set_accelerators(ACCELERATORS)
    kube.apply(
        tier(
            "chat",
            replicas=(1, 4),
            batch=4,
            cpu_limit="450m",
            scaling={"maxWaitingPerReplica": WAITING_LIMIT, "scaleDownHold": "20s"},
            slo={"ttft": {"p99": f"{TTFT_TARGET:g}s"}},
        )
    )
    kube.wait_ready("chat", seconds=300)
    url = kube.service_url("chat")
    seen: dict[str, float] = {}
    peak = {"waiting": 0.0, "ttft": 0.0, "replicas": 1}
    begun = time.monotonic()

    def note(event):
        seen.setdefault(event, time.monotonic() - begun)

    async def watch():
        while True:
            waiting = await asyncio.to_thread(prometheus.value, 'sum(vllm:num_requests_waiting{tier="chat"})')
            slow = await asyncio.to_thread(
                prometheus.value,
                "histogram_quantile(0.99, sum by (le)"
                ' (rate(vllm:time_to_first_token_seconds_bucket{tier="chat"}[30s])))',
            )
            replicas = (await asyncio.to_thread(kube.get, "deployment", "chat-pool"))["spec"]["replicas"]
            if not math.isnan(waiting):
                peak["waiting"] = max(peak["waiting"], waiting)
            if not math.isnan(slow):
                peak["ttft"] = max(peak["ttft"], slow)
            peak["replicas"] = max(peak["replicas"], replicas)
            if waiting > WAITING_LIMIT or slow > TTFT_TARGET:
                note("breach")
            if replicas > 1:
                note("decided")
            engines = await asyncio.to_thread(kube.engines, "chat")
            if sum(pod_ready(pod) for pod in engines) > 1:
                note("added")
            if replicas > ACCELERATORS:
                limited = await asyncio.to_thread(kube.condition, "chat", "ScalingLimited")
                if limited.get("reason") == "Unschedulable":
                    note("pending")
                    seen.setdefault("message", limited["message"])
            await asyncio.sleep(1)

    light = Traffic(url, rate=0.5, prompt_tokens=48, output_tokens=16, seed=2, timeout=300)
    async with light.running():
        watching = asyncio.create_task(watch())
        bench = await bench_serve(cluster.places, url, rate=RATE, requests=REQUESTS, output_tokens=OUTPUT)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        sizes: list[int] = []

        def down():
            sizes.append(kube.get("deployment", "chat-pool")["spec"]["replicas"])
            return sizes[-1] == 1 and len(kube.listed("pods", "servingtiers.io/pool=pool")) == 1

        stuck = None
        try:
            shrunk = await asyncio.to_thread(wait_for, "one engine again", 420, down)
        except WaitError as error:
            shrunk, stuck = math.nan, error
        await asyncio.sleep(5)

    figures(
        f"{bench['completed']} + {len(light.answers)} requests, {bench.get('failed', 0)} + {len(light.failed)} failed;"
        f" breach seen at {seen.get('breach', math.nan):.0f} s, scale-up decided at {seen.get('decided', math.nan):.0f} s,"
        f" second engine ready at {seen.get('added', math.nan):.0f} s, out of accelerators at"
        f" {seen.get('pending', math.nan):.0f} s; peak {peak['waiting']:.0f} waiting, TTFT p99 {peak['ttft']:.1f} s,"
        f" {peak['replicas']} replicas; back at 1 engine {shrunk:.0f} s after the load"
    )
    assert stuck is None
    assert bench["completed"] == REQUESTS
    assert light.failed == []
    assert peak["waiting"] > WAITING_LIMIT
    assert peak["ttft"] > TTFT_TARGET
    assert seen["decided"] <= seen["breach"] + 30
    assert "added" in seen
    # The fourth engine waits for an accelerator, and the tier says so.
    assert peak["replicas"] == 4
    assert "cannot be scheduled" in str(seen["message"])
    # Slowly and in order: never more than one step down at a time.
    steps = [b - a for a, b in itertools.pairwise(sizes)]
    assert min(steps, default=0) >= -1 or sizes[0] == 1
