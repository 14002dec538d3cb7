"""Scenario 5: parts fail; serving goes on, and nothing shrinks for want of data."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from harness.kube import KubeError, pod_ready, wait_for
from harness.tiers import disaggregated, tier
from harness.traffic import Traffic


def _ready(kube, name, pool=None):
    return sum(pod_ready(pod) for pod in kube.engines(name, pool))


class Replicas:
    """Watches the wanted replicas of a Deployment and remembers the least."""

    def __init__(self, kube, name):
        self._kube, self._name = kube, name
        self.least = self._now()
        self._task = asyncio.create_task(self._watch())

    def _now(self):
        return self._kube.get("deployment", self._name)["spec"]["replicas"]

    async def _watch(self):
        while True:
            with contextlib.suppress(KubeError):  # the API server is away: that is one of the faults
                self.least = min(self.least, await asyncio.to_thread(self._now))
            await asyncio.sleep(1)

    async def close(self):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        return self.least


@pytest.fixture
def with_prometheus(product, prometheus):
    """Let the operator read its load from Prometheus; afterwards from the engines again."""
    product.install(
        {
            "source": "Prometheus",
            "interval": "5s",
            "window": "30s",
            "prometheus": {"url": "http://prometheus.monitoring:9090", "scrapeInterval": "5s"},
        }
    )
    yield prometheus
    product.install()


async def test_serving_goes_on_and_nothing_shrinks_while_parts_are_away(
    product, with_prometheus, kube, cluster, figures
):
    kube.apply(tier("chat", replicas=(1, 3), scaling={"scaleDownHold": "10s"}))
    kube.wait_ready("chat", seconds=300)
    # Two engines by hand of the user, then the bound goes back: from here on only load may take one away.
    kube.patch("servingtier", "chat", {"spec": {"pool": {"scaling": {"minReplicas": 2}}}})
    wait_for("two engines", 300, lambda: _ready(kube, "chat") == 2)
    lines = []
    traffic = Traffic(kube.service_url("chat"), rate=2.0, prompt_tokens=32, output_tokens=24, seed=5)
    async with traffic.running():
        await asyncio.sleep(10)
        replicas = Replicas(kube, "chat-pool")

        # Prometheus goes; the bound is lifted while nothing can be seen: only proof of idleness may shrink.
        await asyncio.to_thread(with_prometheus.stop)
        kube.patch("servingtier", "chat", {"spec": {"pool": {"scaling": {"minReplicas": 1}}}})
        await asyncio.sleep(30)
        assert _ready(kube, "chat") == 2
        kube.patch("servingtier", "chat", {"spec": {"pool": {"scaling": {"minReplicas": 2}}}})
        await asyncio.to_thread(with_prometheus.start)

        # The operator is killed, and another leads.
        (operator,) = product.operators()
        kube.delete("pod", operator["metadata"]["name"], "--force", "--grace-period=0")
        back = await asyncio.to_thread(
            wait_for,
            "another operator",
            120,
            lambda: [
                pod
                for pod in product.operators()
                if pod_ready(pod) and pod["metadata"]["uid"] != operator["metadata"]["uid"]
            ],
        )
        lines.append(f"operator back in {back:.0f} s")

        # The API server is killed for ten seconds.
        await asyncio.to_thread(cluster.stop, "kube-apiserver", kill=True)
        await asyncio.sleep(10)
        cluster.start("kube-apiserver")
        await asyncio.to_thread(cluster.wait_for_api_server)
        await asyncio.sleep(10)

        # An engine is killed without a word; the router goes round it until its successor is there.
        before = len(traffic.failed)
        victim = kube.engines("chat")[0]["metadata"]["name"]
        kube.delete("pod", victim, "--force", "--grace-period=0")
        begun = time.monotonic()
        await asyncio.to_thread(wait_for, "two engines again", 300, lambda: _ready(kube, "chat") == 2)
        lines.append(
            f"killed engine replaced in {time.monotonic() - begun:.0f} s, {len(traffic.failed) - before} failures"
        )

        # The node loses accelerators: nothing that runs is touched.
        cluster.set_accelerators(1)
        await asyncio.sleep(15)
        assert _ready(kube, "chat") == 2
        least = await replicas.close()
    figures(f"{'; '.join(lines)}; {traffic.summary()}; scale-downs 0 (never below {least} replicas)")
    assert least >= 2
    # Only streams that were on the killed engine may end early; the router tries the other for all else.
    assert len(traffic.failed) <= 4
    assert kube.condition("chat", "Ready")["status"] == "True"


async def test_one_of_two_prefill_engines_is_killed(product, kube, figures):
    kube.apply(disaggregated("split", prefill=(2, 2), decode=(1, 1)))
    kube.wait_ready("split", seconds=300)
    wait_for("two prefill engines", 300, lambda: _ready(kube, "split", "prefill") == 2)
    traffic = Traffic(
        kube.service_url("split"), rate=1.5, prompt_tokens=64, output_tokens=12, seed=6, timeout=60
    )
    async with traffic.running():
        await asyncio.sleep(15)
        begun = max((each.sent for each in traffic.answers), default=0.0)
        early = len(traffic.failed)
        victim = kube.engines("split", "prefill")[0]["metadata"]["name"]
        kube.delete("pod", victim, "--force", "--grace-period=0")
        await asyncio.sleep(45)
    failed = [each for each in traffic.failed if each.sent >= begun]
    after = [each for each in traffic.answers if each.sent >= begun]
    recovery = max((each.sent + each.seconds for each in failed), default=begun) - begun
    figures(
        f"{early} failures before; after the kill {len(failed)} of {len(after)} failed"
        f" ({len(failed) / max(1, len(after)):.0%}), the last one over {recovery:.0f} s after it; {traffic.summary()}"
    )
    # The router does not try again in this mode, but it drops a dead engine: the end is clean.
    last = [each for each in after if each.sent > begun + recovery]
    assert last
    assert all(each.ok for each in last)
    assert len(failed) < len(after)
