"""Scenario 4: a tier changes under streams, with no accelerator to spare."""

from __future__ import annotations

import asyncio

import pytest

from harness.generator import bench_serve
from harness.kube import pod_ready, scrape, total, wait_for
from harness.tiers import tier
from harness.traffic import Traffic

STREAMS, RATE, OUTPUT = 200, 2.0, 900
"""Streams, how many a second, and their tokens, as many as the model allows."""
LEAST = 50
"""Streams that must begin while engines are replaced."""
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

    most = 0

    def rolled():
        nonlocal most
        pods = kube.listed("pods", "servingtiers.io/pool=pool,servingtiers.io/tier=chat")
        most = max(most, len([pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]))
        new = [pod for pod in pods if pod["metadata"]["uid"] not in old]
        return len(pods) == 2 and len(new) == 2 and all(pod_ready(pod) for pod in new)

    def streams():
        pages = [scrape(f"{kube.pod_url(pod)}/metrics") for pod in kube.engines("chat")]
        return sum(total(page, "vllm:num_requests_running") for page in pages)

    async with asyncio.TaskGroup() as tasks:
        load = tasks.create_task(
            bench_serve(
                cluster.places,
                kube.service_url("chat"),
                rate=RATE,
                requests=STREAMS,
                prompt_tokens=32,
                output_tokens=OUTPUT,
            )
        )
        await asyncio.to_thread(wait_for, "streams", 120, lambda: streams() >= 4)
        kube.patch("servingtier", "chat", {"spec": {"pool": {"engine": {"maxNumSeqs": BATCHES[1]}}}})
        took = await asyncio.to_thread(wait_for, "all engines replaced", 420, rolled)
    bench = load.result()
    short = STREAMS * OUTPUT - bench["total_output_tokens"]
    figures(
        f"2 engines replaced in {took:.0f} s; {bench['completed']} of {STREAMS} streams complete, {bench['failed']} failed,"
        f" {short} tokens missing; TTFT p50 {bench['median_ttft_ms'] / 1e3:.2f} s p99 {bench['p99_ttft_ms'] / 1e3:.2f} s,"
        f" streams of {bench['mean_e2el_ms'] / 1e3:.1f} s on average; at most {most} engine pods at once"
    )
    assert min(took, STREAMS / RATE) * RATE >= LEAST
    assert bench["completed"] == STREAMS
    assert bench["failed"] == 0
    assert short == 0  # a stream that breaks off ends with fewer tokens than were asked for
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
