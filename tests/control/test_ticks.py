"""When loads are read and tiers looked at: the tick, the moves between ticks, and pauses."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from in_memory import InMemoryCluster
from ring.harness import CONFIG, tier
from servingtiers import controller as controller_module
from servingtiers.adapters.cluster import ApiError
from servingtiers.adapters.store import Key
from servingtiers.controller import Controller
from servingtiers.core.config import OperatorConfig
from servingtiers.core.signals import TierLoad
from servingtiers.core.state import JsonObject

KEY = ("llm", "chat")
IN_PLACE = CONFIG.model_copy(update={"namespaces": ["llm"], "operator_namespace": "llm"})


def in_namespace(body: JsonObject) -> JsonObject:
    return body | {"metadata": body["metadata"] | {"namespace": "llm"}}


class Recorded:
    """A load source that notes who was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[bool, tuple[str, ...]]] = []

    async def read(self, tiers, now, *, complete=True):
        self.asked.append((complete, tuple(each.name for each in tiers)))
        return {each.key: TierLoad() for each in tiers}

    async def close(self):
        return


def _telemetry(**changes: Any) -> OperatorConfig:
    telemetry = IN_PLACE.telemetry.model_dump(by_alias=True) | changes
    return OperatorConfig.model_validate(IN_PLACE.model_dump(by_alias=True) | {"telemetry": telemetry})


async def _ticked(made: Controller, loads: Recorded, reads: int, *, seconds: float = 10.0) -> list[Key]:
    """Run ticks until loads have been read so often, or for so long; return the keys that came to a worker."""
    worked: list[Key] = []

    async def work() -> None:
        while True:
            worked.append(await made.queue.get())
            made.queue.done(worked[-1])

    tasks = [asyncio.create_task(made._tick()), asyncio.create_task(work())]
    deadline = time.monotonic() + seconds
    while len(loads.asked) < reads and time.monotonic() < deadline:  # noqa: ASYNC110 - a list has no event to wait for
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return worked


async def test_while_engines_move_only_their_group_is_looked_at_between_ticks(monkeypatch):
    """Reading and reconciling all of 300 tiers every two seconds would cost what nobody has asked for."""
    monkeypatch.setattr(controller_module, "_MOVING_SECONDS", 0.04)
    cluster, loads = InMemoryCluster(), Recorded()
    for name in ("chat", "other"):
        cluster.put(in_namespace(tier(name)))
    made = Controller(cluster, IN_PLACE, loads)
    await made.relist()
    made._moving.add(KEY)
    worked = await _ticked(made, loads, 4)

    assert loads.asked[:4] == [(True, ("chat", "other")), *[(False, ("chat",))] * 3]
    assert worked.count(("llm", "other")) <= 2
    assert worked.count(KEY) >= 4

    made._moving.clear()
    loads.asked.clear()
    worked = await _ticked(made, loads, 2, seconds=0.3)

    assert loads.asked == [(True, ("chat", "other"))]
    assert set(worked) == {KEY, ("llm", "other")}


async def test_prometheus_is_not_asked_more_often_than_it_scrapes(monkeypatch):
    """It would answer the same."""
    monkeypatch.setattr(controller_module, "_MOVING_SECONDS", 0.04)
    url = {"url": "http://prometheus:9090", "scrapeInterval": "10s"}
    cluster, loads = InMemoryCluster(), Recorded()
    cluster.put(in_namespace(tier()))
    made = Controller(cluster, _telemetry(source="Prometheus", prometheus=url), loads)
    await made.relist()
    made._moving.add(KEY)
    await _ticked(made, loads, 2, seconds=0.3)

    assert len(loads.asked) == 1


async def test_a_tick_leaves_alone_what_waits_for_the_end_of_a_pause():
    """Retry-After is longer than a tick."""
    cluster, loads = InMemoryCluster(), Recorded()
    cluster.put(in_namespace(tier()))
    made = Controller(cluster, IN_PLACE, loads)
    await made.relist()
    await made.queue.get()
    made.queue.failed(KEY, at_least=30.0)

    assert await _ticked(made, loads, 1) == []
    made.queue.forget(KEY)


async def test_a_server_that_asks_for_a_pause_gets_no_further_write():
    """The rest of a plan would only add to what it has too much of."""
    cluster = InMemoryCluster()
    cluster.put(in_namespace(tier()))
    cluster.refuse = lambda _verb, _body: ApiError(429, "TooManyRequests", "later", retry_after=30.0)
    made = Controller(cluster, IN_PLACE, Recorded())
    await made.relist()
    with pytest.raises(ApiError) as raised:
        await made.reconcile(KEY)

    assert raised.value.retry_after == 30.0
    assert len(cluster.writes) == 1
