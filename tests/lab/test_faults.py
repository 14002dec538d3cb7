"""The misbehaving proxy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from servingtiers.lab.controlplane import Connection
from servingtiers.lab.faults import Action, Fault, FaultProxy
from servingtiers.lab.kube import Kube


class Upstream:
    """A server that counts the writes it made."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        """Answer, and remember writes."""
        if request.method != "GET":
            self.made.append(f"{request.method} {request.path} {(await request.read()).decode()}")
        return web.Response(text="fine", headers={"X-Upstream": "yes"})


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """A counting server."""
    server = Upstream()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    yield server
    await runner.cleanup()


async def send(
    proxy: FaultProxy, method: str, path: str, body: str | None = None, seconds: float = 5.0
) -> tuple[int, str]:
    """Send one request over a connection of its own; returns status and body."""
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.request(method, f"{proxy.url}{path}", data=body) as answer,
    ):
        return answer.status, await answer.text()


async def test_the_nth_write_is_made_and_its_answer_lost(upstream):
    """The client cannot know that the change was made: the case that makes operators create things twice."""
    async with FaultProxy(upstream.url) as proxy:
        proxy.add(Fault.on_write(2))
        assert await send(proxy, "POST", "/a", "1") == (200, "fine")
        assert await send(proxy, "GET", "/a") == (200, "fine")
        with pytest.raises(aiohttp.ClientError):
            await send(proxy, "PATCH", "/b?x=1", "2")
        assert await send(proxy, "DELETE", "/c") == (200, "fine")
    assert upstream.made == ["POST /a 1", "PATCH /b 2", "DELETE /c "]
    assert [(one.path, one.fault, one.status) for one in proxy.writes()] == [
        ("/a", None, 200),
        ("/b?x=1", Action.COMMIT_THEN_DROP, 200),
        ("/c", None, 200),
    ]


@pytest.mark.parametrize(
    ("fault", "made"),
    [
        (Fault(Action.STATUS, status=429, retry_after=1), 0),
        (Fault(Action.STATUS, status=409), 0),
        (Fault(Action.COMMIT_THEN_STATUS, status=500), 1),
    ],
)
async def test_statuses_come_with_or_without_the_change(upstream, fault, made):
    """An error says nothing about whether the change was made."""
    async with FaultProxy(upstream.url) as proxy:
        proxy.add(fault)
        status, text = await send(proxy, "POST", "/a")
        assert (status, len(upstream.made)) == (fault.status, made)
        assert '"kind": "Status"' in text
        assert (await send(proxy, "POST", "/a"))[0] == 200, "a fault acts as often as it says"


async def test_a_partition_is_silence_until_it_ends(upstream):
    """Nothing answers, nothing is refused, and nothing reaches the other side."""
    async with FaultProxy(upstream.url) as proxy:
        proxy.frozen = True
        with pytest.raises(TimeoutError):
            await send(proxy, "POST", "/a", seconds=0.2)
        assert upstream.made == []
        proxy.clear()
        assert (await send(proxy, "POST", "/a"))[0] == 200


async def test_a_delay_and_a_dropped_connection(upstream):
    """Latency is added once, and a drop never reaches the upstream."""
    async with FaultProxy(upstream.url) as proxy:
        proxy.add(Fault(Action.DELAY, path="^/slow", seconds=0.3))
        begun = asyncio.get_running_loop().time()
        await send(proxy, "GET", "/slow")
        assert asyncio.get_running_loop().time() - begun > 0.29
        # Twice: aiohttp itself sends an idempotent request again when its connection breaks.
        proxy.add(Fault(Action.DROP, methods=frozenset({"PUT"}), times=2))
        with pytest.raises(aiohttp.ClientError):
            await send(proxy, "PUT", "/a")
        assert upstream.made == []


@pytest.mark.ring
async def test_a_watch_through_the_proxy_misses_nothing_when_it_is_cut_or_expires(control_plane, namespace):
    """Against the real API server: every object is seen, also one that came and went while nobody watched."""
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    admin = control_plane.connection()
    seen: dict[str, str] = {}

    async with FaultProxy(control_plane.url, control_plane.ca_file) as proxy:
        through = Kube(Connection(proxy.url, control_plane.ca_file, control_plane.token()))

        async def follow() -> None:
            async for kind, item in through.follow(path):
                seen[item["metadata"]["name"]] = kind

        async def until(name: str, *kinds: str) -> None:
            async with asyncio.timeout(10):
                while seen.get(name) not in kinds:  # noqa: ASYNC110 - a few looks
                    await asyncio.sleep(0.02)

        async def create(name: str) -> None:
            await asyncio.to_thread(admin.request, "POST", path, {"metadata": {"name": name}})

        async with through:
            task = asyncio.create_task(follow())
            await create("first")
            await until("first", "ADDED", "MODIFIED")
            assert proxy.cut_watches() == 1
            await create("after-cut")
            await until("after-cut", "ADDED")
            proxy.add(Fault(Action.STATUS, watch=True, status=503, times=2))
            proxy.add(Fault(Action.EXPIRE, watch=True))
            proxy.add(Fault(Action.DROP, watch=False))
            proxy.cut_watches()
            await asyncio.to_thread(admin.request, "DELETE", f"{path}/first")
            await create("after-expiry")
            await until("after-expiry", "ADDED")
            await until("first", "DELETED")
            async with asyncio.timeout(10):
                while not {Action.STATUS, Action.EXPIRE, Action.DROP} <= {one.fault for one in proxy.passed}:  # noqa: ASYNC110 - a few looks
                    await asyncio.sleep(0.02)
            await create("last")
            await until("last", "ADDED")
            task.cancel()
