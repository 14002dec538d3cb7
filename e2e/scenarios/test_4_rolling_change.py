"""Scenario 4: a tier changes under streams, with no accelerator to spare."""

from __future__ import annotations

import asyncio
import time

from harness.kube import pod_ready, wait_for
from harness.tiers import tier
from harness.traffic import Traffic

STREAMS = 50


async def test_a_rollout_without_a_free_accelerator_breaks_no_stream(product, kube, cluster, figures):
    cluster.set_accelerators(2)
    kube.apply(tier("chat", replicas=(2, 2)))
    kube.wait_ready("chat", seconds=300)
    wait_for("two engines", 240, lambda: sum(pod_ready(pod) for pod in kube.engines("chat")) == 2)
    old = {pod["metadata"]["uid"] for pod in kube.engines("chat")}
    strategy = kube.get("deployment", "chat-pool")["spec"]["strategy"]["rollingUpdate"]
    assert strategy["maxSurge"] == 0  # a surge would wait for an accelerator for ever

    traffic = Traffic(kube.service_url("chat"), rate=0.7, prompt_tokens=32, output_tokens=900, seed=4)
    most = 0

    def rolled():
        nonlocal most
        pods = kube.listed("pods", "servingtiers.io/pool=pool,servingtiers.io/tier=chat")
        most = max(most, len([pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]))
        new = [pod for pod in pods if pod["metadata"]["uid"] not in old]
        return len(pods) == 2 and len(new) == 2 and all(pod_ready(pod) for pod in new)

    async with traffic.running():
        await asyncio.sleep(5)
        begun = time.monotonic()
        kube.patch("servingtier", "chat", {"spec": {"pool": {"engine": {"maxNumSeqs": 6}}}})
        took = await asyncio.to_thread(wait_for, "all engines replaced", 420, rolled)
        during = time.monotonic() - begun
        # Enough streams to say something, over the change and a little after.
        await asyncio.sleep(max(5.0, STREAMS / traffic.rate + 10 - during))
    lengths = [each.seconds for each in traffic.answers if each.ok]
    figures(
        f"2 engines replaced in {took:.0f} s; {traffic.summary()};"
        f" streams of {sum(lengths) / max(1, len(lengths)):.1f} s on average; at most {most} engine pods at once"
    )
    assert len(traffic.answers) >= STREAMS
    assert traffic.broken == []
    assert traffic.failed == []
    assert most <= 2
