"""A real Prometheus and the scraper read the same engines: the load must be the same."""

import asyncio
import shutil
import socket
import time
from contextlib import asynccontextmanager
from dataclasses import fields

import aiohttp
import pytest
import yaml

from servingtiers.adapters.prometheus import PrometheusSource
from servingtiers.adapters.scrape import ScrapeSource
from servingtiers.core.config import PrometheusConfig
from servingtiers.core.signals import Coverage, Histogram, Load, Unknown, Value, Zero

PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(
    PROMETHEUS is None, reason="no prometheus on the PATH: install it (Debian: apt-get install prometheus)"
)

INTERVAL = 1.0
WINDOW = 8.0
DISCOVERY = 5.0
"""Seconds that Prometheus takes before its first scrape."""


def free_port():
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@asynccontextmanager
async def prometheus(directory, rig):
    """Run a Prometheus that scrapes the rig's pods once a second, with a Kubernetes scrape's labels."""
    targets = [
        {
            "targets": [f"127.0.0.1:{pod.page.port}"],
            "labels": {"namespace": rig.namespace, "pod": pod.name},
        }
        for pod in (*rig.engines, *rig.routers)
    ]
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "pods", "static_configs": targets}],
    }
    directory.mkdir()
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        PROMETHEUS,
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    )
    try:
        url = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession() as session:
            for _ in range(200):
                try:
                    async with session.get(f"{url}/-/ready") as response:
                        if response.status == 200:
                            break
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
            else:
                pytest.fail("Prometheus did not become ready within 20 s")
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def drive(rig, seconds):
    """Let engines and routers work steadily: ten requests a second at the first engine, five at the second."""
    a, b = rig.engines[:2]
    ticks = 0
    started = time.monotonic()
    while time.monotonic() < started + seconds:
        a.finish(1, ttft=0.02 if ticks % 10 else 0.7)
        if ticks % 2:
            b.finish(1, ttft=0.3, tpot=0.06)
        rig.routers[0].count("processed_requests_total", 'worker="http://10.0.0.1:8000"', 3)
        a.metrics.running.value = 6
        b.metrics.running.value = 3
        a.metrics.waiting.value = 1
        a.metrics.kv_usage.value = 0.75
        ticks += 1
        await asyncio.sleep(max(0.0, started + ticks * 0.1 - time.monotonic()))


async def scraped(source, rig, seconds):
    """Read once a second, as the control loop does, and return the last load."""
    load = None
    started = time.monotonic()
    turn = 0
    while time.monotonic() < started + seconds:
        load = (await source.read([rig.tier()], time.time()))["llm/chat"]
        turn += 1
        await asyncio.sleep(max(0.0, started + turn * INTERVAL - time.monotonic()))
    return load


async def query(url, expression):
    """Ask Prometheus itself."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{url}/api/v1/query", params={"query": expression}) as response,
    ):
        return float((await response.json())["data"]["result"][0]["value"][1])


def assert_alike(name, one, other, *, within):
    """Two signals say the same."""
    assert type(one) is type(other), (name, one, other)
    if isinstance(one, Value):
        assert one.value == pytest.approx(other.value, rel=within), name
        assert one.partial == other.partial, name
    if isinstance(one, Histogram):
        assert one.bounds == other.bounds, name
        assert one.counts == pytest.approx(other.counts, rel=within, abs=3.0), name
        assert one.mean == pytest.approx(other.mean, rel=within), name
        assert one.partial == other.partial, name


async def test_prometheus_and_scrape_give_the_same_load(prometheus_rig, tmp_path):
    """On steady engines, on a silent one, and after Prometheus has lost its history (M16)."""
    rig = prometheus_rig
    await rig.engine("a")
    await rig.engine("b")
    await rig.router()
    direct = ScrapeSource(interval=INTERVAL, window=WINDOW)
    try:
        async with prometheus(tmp_path / "one", rig) as url:
            through = PrometheusSource(PrometheusConfig(url=url, scrape_interval="1s"), WINDOW)
            driving = asyncio.create_task(drive(rig, WINDOW + DISCOVERY + 4))
            one = await scraped(direct, rig, WINDOW + DISCOVERY + 2)
            other = (await through.read([rig.tier()], time.time()))["llm/chat"]
            # Asked in the same second, Prometheus' own quantile of the same increase.
            p90 = await query(
                url,
                "histogram_quantile(0.9, sum by (le) (increase(vllm:time_to_first_token_seconds_bucket[8s])))",
            )
            rate = await query(url, "sum(rate(vllm:request_success_total[8s]))")

            here, there = one.pools["aggregated"], other.pools["aggregated"]
            assert here.coverage == there.coverage == Coverage(2, 2)
            for field in fields(Load):
                if field.name not in {"window", "coverage", "resets"}:
                    assert_alike(
                        field.name, getattr(here, field.name), getattr(there, field.name), within=0.15
                    )
            assert here.running == Value(9.0, age=here.running.age)
            assert isinstance(here.preemption_rate, Zero)
            assert there.request_rate.value == pytest.approx(15.0, rel=0.15)
            assert there.request_rate.value == pytest.approx(rate, rel=0.1)
            assert there.ttft.quantile(0.9).estimate == pytest.approx(p90, rel=0.1)
            assert_alike("arrivals", one.router.arrival_rate, other.router.arrival_rate, within=0.15)
            assert isinstance(one.router.unserved, Zero)
            assert isinstance(other.router.unserved, Zero)

            # One engine stops answering: both know the rest, and say that it is not all.
            await driving
            await rig.engines[1].page.stop()
            one, _ = await asyncio.gather(scraped(direct, rig, 5), drive(rig, 5))
            other = (await through.read([rig.tier()], time.time()))["llm/chat"]
            for load in (one.pools["aggregated"], other.pools["aggregated"]):
                assert load.coverage == Coverage(1, 2)
                assert load.running.value == 6.0
                assert load.running.partial
                assert load.ttft.partial
            await through.close()
        await rig.engines[1].page.start()
        async with prometheus(tmp_path / "two", rig) as url:
            through = PrometheusSource(PrometheusConfig(url=url, scrape_interval="1s"), WINDOW)
            await drive(rig, DISCOVERY + 3.5)
            load = (await through.read([rig.tier()], time.time()))["llm/chat"].pools["aggregated"]
            assert isinstance(load.request_rate, Unknown) or load.request_rate.partial
            assert isinstance(load.preemption_rate, Unknown)
            await through.close()
    finally:
        await direct.close()
