"""What a tick costs the operator with 300 tiers of four engines and two routers each."""

import asyncio
import subprocess
import sys
import time

import pytest

from servingtiers.adapters.scrape import ScrapeSource
from servingtiers.core.decisions import PoolRole
from servingtiers.core.telemetry import PodTarget, PoolTargets, TierTargets

TIERS = 300

# A process of its own, so that its CPU time is not counted as ours. It answers a full vLLM page whose counters grow,
# or, on the second port, a router's.
SERVER = """
import asyncio, time
from servingtiers.lab.vllm_metrics import EngineMetrics

metrics = EngineMetrics("chat", max_model_len=131072)
started = time.monotonic()

def engine():
    seconds = int(time.monotonic() - started) * 10
    grown = EngineMetrics("chat", max_model_len=131072)
    for histogram in (grown.ttft, grown.itl, grown.tpot, grown.e2e, grown.queue_time):
        for step in range(12):
            histogram.observe(0.01 * 2**step, 100 + seconds)
    grown.success["stop"].add(1000 + seconds)
    grown.generation_tokens.add(1000 + seconds)
    return grown.text().encode()

def router():
    lines = [f'vllm_router_processed_requests_total{{worker="http://10.0.0.{i}:8000"}} 4' for i in range(4)]
    return ("\\n".join(lines) + "\\n").encode()

pages = {}

def serve(make):
    async def answer(reader, writer):
        await reader.readuntil(b"\\r\\n\\r\\n")
        now = int(time.monotonic())
        if pages.get(make, (None,))[0] != now:
            pages[make] = now, make()
        body = pages[make][1]
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
        await writer.drain()
        writer.close()
    return answer

async def main():
    servers = [await asyncio.start_server(serve(make), "127.0.0.1", 0, backlog=1024) for make in (engine, router)]
    print(*(s.sockets[0].getsockname()[1] for s in servers), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def ports():
    """Ports of an engine and a router."""
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as process:
        yield tuple(map(int, process.stdout.readline().split()))
        process.terminate()


@pytest.mark.long(10)
async def test_a_tick_of_300_tiers_costs_well_under_two_cpu_seconds(ports, capsys):
    """1200 engines and 600 routers: CPU time of the operator's process, the fetching over HTTP included."""
    engine, router = ports
    tiers = [
        TierTargets(
            "llm",
            f"tier-{t}",
            (
                PoolTargets(
                    "serve",
                    PoolRole.AGGREGATED,
                    4,
                    tuple(PodTarget(f"tier-{t}-{p}", "127.0.0.1", engine) for p in range(4)),
                ),
            ),
            tuple(PodTarget(f"router-{t}-{r}", "127.0.0.1", router) for r in range(2)),
        )
        for t in range(TIERS)
    ]
    clock = [0.0]
    source = ScrapeSource(interval=15.0, window=60.0, timeout=30.0, monotonic=lambda: clock[0])
    cpu = []
    for _ in range(5):  # the last one has the whole window of four behind it
        clock[0] += 15.0
        started = time.process_time()
        wall = time.monotonic()
        loads = await source.read(tiers, time.time())
        cpu.append(time.process_time() - started)
        wall = time.monotonic() - wall
        await asyncio.sleep(0.5)
    await source.close()

    assert len(loads) == TIERS
    for load in loads.values():
        assert load.pools["serve"].coverage.complete
        assert load.pools["serve"].ttft.total > 0
        assert load.router.coverage.complete
    with capsys.disabled():
        print(
            f"\n{TIERS} tiers, 1800 pods: {cpu[-1]:.2f} CPU-s a tick (first {cpu[0]:.2f}), {wall:.2f} s wall"
        )
    assert cpu[-1] < 2.0
