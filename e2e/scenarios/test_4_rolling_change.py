"""Scenario 4: a tier changes under streams, with no accelerator to spare."""

from __future__ import annotations

import asyncio
import time

import pytest

from harness.kube import pod_ready, wait_for
from harness.tiers import tier
from harness.traffic import Traffic

STREAMS = 50
BATCHES = 8, 6
"""Largest batch before the change and after it."""


async def test_a_rollout_without_a_free_accelerator_breaks_no_stream(product, kube, cluster, figures):
    cluster.set_accelerators(2)
    kube.apply(tier("chat", replicas=(2, 2), batch=BATCHES[0]))
    kube.wait_ready("chat", seconds=300)
    wait_for("two engines", 240, lambda: sum(pod_ready(pod) for pod in kube.engines("chat")) == 2)
    old = {pod["metadata"]["uid"] for pod in kube.engines("chat")}
    strategy = kube.get("deployment", "chat-pool")["spec"]["strategy"]["rollingUpdate"]
    assert strategy["maxSurge"] == 0  # a surge would wait for an accelerator for ever

    traffic = Traffic(kube.service_url("chat"), rate=2, prompt_tokens=32, output_tokens=900, seed=4)
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
        kube.patch("servingtier", "chat", {"spec": {"pool": {"engine": {"maxNumSeqs": BATCHES[1]}}}})
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


@pytest.mark.continues
async def test_engines_that_die_on_their_first_request_take_no_traffic(
    product, kube, cluster, dying_engine, figures
):
    """Their /health says 200 all the same: without a first completion each start would cost a user an answer."""
    cluster.set_accelerators(2)
    kube.apply(tier("chat", replicas=(2, 2), batch=BATCHES[1]))
    kube.wait_ready("chat", seconds=300)
    wait_for("two engines", 240, lambda: sum(pod_ready(pod) for pod in kube.engines("chat")) == 2)
    old = {pod["metadata"]["uid"] for pod in kube.engines("chat")}
    traffic = Traffic(kube.service_url("chat"), rate=2, prompt_tokens=32, output_tokens=24, seed=41)
    ever_ready = False

    def died_twice():
        nonlocal ever_ready
        new = [pod for pod in kube.engines("chat") if pod["metadata"]["uid"] not in old]
        ever_ready |= any(map(pod_ready, new))
        states = [each for pod in new for each in pod["status"].get("containerStatuses", [])]
        return any(each["restartCount"] >= 2 for each in states)

    async with traffic.running():
        await asyncio.sleep(5)
        kube.patch("servingtier", "chat", {"spec": {"pool": {"engine": {"image": dying_engine}}}})
        took = await asyncio.to_thread(wait_for, "a new engine that died twice", 300, died_twice)
        left = [pod for pod in kube.engines("chat") if pod["metadata"]["uid"] in old]
    events = kube.run("get", "events", "-o=jsonpath={range .items[*]}{.message}{'\\n'}{end}")
    figures(
        f"an engine that dies on its first request died twice in {took:.0f} s and was never Ready; {len(left)} of 2"
        f" engines serve on; {traffic.summary()}"
    )
    assert not ever_ready
    assert len(left) == 1
    assert all(map(pod_ready, left))
    assert traffic.failed == []
    assert "no first completion" in events
