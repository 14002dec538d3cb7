"""A reverse proxy that misbehaves on purpose, between the operator and what it talks to.

It stands before an API server (or Prometheus, or anything HTTP) and applies :class:`Fault` rules: latency, error
statuses, an answer lost after the change was made, silence, cut and expired watches. Every request is recorded
with what became of it, so a test can count writes or aim a fault at exactly the n-th one.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Self

import aiohttp
from aiohttp import web

__all__ = ["Action", "Fault", "FaultProxy", "Passed"]

_WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "content-encoding",
        "content-length",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_REASONS = {
    409: "Conflict",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
}


class Action(StrEnum):
    """What a fault does to a request."""

    DELAY = "delay"
    """Forward it ``seconds`` later."""
    STATUS = "status"
    """Do not forward it; answer ``status`` (and ``Retry-After`` where given)."""
    DROP = "drop"
    """Do not forward it; break the connection."""
    COMMIT_THEN_DROP = "commit then drop"
    """Forward it, wait for the answer, then break the connection: the change was made, the client does not know."""
    COMMIT_THEN_STATUS = "commit then status"
    """Forward it, then answer ``status`` instead of the real answer."""
    BLACK_HOLE = "black hole"
    """Do not forward it and never answer."""
    EXPIRE = "expire"
    """410 Gone: as an ERROR event to a watch, as a status to anything else."""


@dataclass(slots=True)
class Fault:
    """One rule: which requests it meets and what it does to them."""

    action: Action
    methods: frozenset[str] | None = None
    """HTTP methods; None: any."""
    path: str = ""
    """Regular expression searched for in the path with its query."""
    watch: bool | None = None
    """True: watches only; False: anything else; None: both."""
    skip: int = 0
    """Let this many matching requests pass first."""
    times: int | None = 1
    """How often it acts; None: until it is removed."""
    seconds: float = 0.0
    status: int = 500
    retry_after: int | None = None
    met: int = field(default=0, init=False)
    """How many requests matched so far."""
    done: int = field(default=0, init=False)
    """How many it acted on."""

    @classmethod
    def on_write(cls, number: int, action: Action = Action.COMMIT_THEN_DROP, path: str = "") -> Self:
        """Return a fault that meets exactly the ``number``-th write, counted from 1."""
        return cls(action, methods=_WRITES, path=path, skip=number - 1)

    def acts_on(self, method: str, path: str, *, watch: bool) -> bool:
        """Whether it acts on this request; counts it."""
        if self.methods is not None and method not in self.methods:
            return False
        if (self.watch is not None and self.watch is not watch) or not re.search(self.path, path):
            return False
        self.met += 1
        if self.met <= self.skip or (self.times is not None and self.done >= self.times):
            return False
        self.done += 1
        return True


@dataclass(frozen=True, slots=True)
class Passed:
    """One request that came to the proxy."""

    method: str
    path: str
    """With the query."""
    watch: bool
    fault: Action | None
    status: int | None
    """What the upstream answered; None when it was not asked."""

    @property
    def is_write(self) -> bool:
        """Whether it would change something."""
        return self.method in _WRITES


class FaultProxy:
    """The proxy; an async context manager that listens on plain HTTP on 127.0.0.1.

    Args:
        upstream: Base URL of what it stands before.
        ca_file: Certificate to trust, where the upstream speaks HTTPS.
    """

    def __init__(self, upstream: str, ca_file: Path | None = None) -> None:
        self.upstream = upstream.rstrip("/")
        self._ca_file = ca_file
        self.faults: list[Fault] = []
        self.passed: list[Passed] = []
        self.frozen = False
        """While True every request meets silence: a network partition."""
        self.on_request: Callable[[Passed], None] | None = None
        """Called after each request but watches, for tests that act at a certain moment."""
        self.url = ""
        self._watches: set[asyncio.Task[None]] = set()
        self._held: set[asyncio.Task[None]] = set()
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        context = ssl.create_default_context(cafile=str(self._ca_file)) if self._ca_file else None
        connector = aiohttp.TCPConnector(limit=0, ssl=context if context is not None else True)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=True
        )
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (*self._watches, *self._held):
            task.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()

    def add(self, fault: Fault) -> Fault:
        """Add a rule; the first rule that acts on a request wins."""
        self.faults.append(fault)
        return fault

    def clear(self) -> None:
        """Remove all rules and end the partition."""
        self.faults.clear()
        self.frozen = False

    def cut_watches(self) -> int:
        """Break every open watch; returns how many there were."""
        for task in self._watches:
            task.cancel()
        return len(self._watches)

    def writes(self) -> list[Passed]:
        """Return the requests that would change something, oldest first."""
        return [passed for passed in self.passed if passed.is_write]

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path = request.path_qs
        watch = request.method == "GET" and request.query.get("watch") in {"1", "true", "True"}
        acting = (fault for fault in self.faults if fault.acts_on(request.method, path, watch=watch))
        fault = next(acting, None)
        action = fault.action if fault is not None else None
        if self.frozen or action is Action.BLACK_HOLE:
            self._note(request, path, watch=watch, action=Action.BLACK_HOLE, status=None)
            await self._silence()
        body = await request.read()
        if fault is not None and action is not None:
            if action is Action.DELAY:
                await asyncio.sleep(fault.seconds)
            elif action is Action.STATUS:
                self._note(request, path, watch=watch, action=action, status=None)
                return self._status(fault.status, fault.retry_after)
            elif action is Action.DROP:
                self._note(request, path, watch=watch, action=action, status=None)
                return self._break(request)
            elif action is Action.EXPIRE:
                self._note(request, path, watch=watch, action=action, status=None)
                return self._expired(watch=watch)
        headers = {
            k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP | {"accept-encoding"}
        }
        if self._session is None:
            raise RuntimeError("the proxy is not started: use `async with FaultProxy(...)`")
        try:
            async with self._session.request(
                request.method,
                f"{self.upstream}{path}",
                data=body or None,
                headers=headers,
                allow_redirects=False,
            ) as answer:
                return await self._answer(request, path, answer, fault, watch=watch)
        except (aiohttp.ClientError, OSError):
            self._note(request, path, watch=watch, action=action, status=None)
            return self._break(request)

    async def _answer(
        self,
        request: web.Request,
        path: str,
        answer: aiohttp.ClientResponse,
        fault: Fault | None,
        *,
        watch: bool,
    ) -> web.StreamResponse:
        action = fault.action if fault is not None else None
        headers = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
        if not watch:
            content = await answer.read()
            self._note(request, path, watch=watch, action=action, status=answer.status)
            if action is Action.COMMIT_THEN_DROP:
                return self._break(request)
            if fault is not None and action is Action.COMMIT_THEN_STATUS:
                return self._status(fault.status, fault.retry_after)
            if self.frozen:  # the partition began while the request was under way
                await self._silence()
            return web.Response(status=answer.status, body=content, headers=headers)
        self._note(request, path, watch=watch, action=action, status=answer.status)
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)

        async def pump() -> None:
            async for piece in answer.content.iter_any():
                while self.frozen:  # noqa: ASYNC110 - a partition is a plain flag for the tests
                    await asyncio.sleep(0.05)
                await response.write(piece)

        task = asyncio.create_task(pump())
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)
        try:
            await asyncio.wait([task])
            if task.cancelled() or task.exception() is not None:
                return self._break(request, response)
        finally:
            task.cancel()
        await response.write_eof()
        return response

    def _note(
        self, request: web.Request, path: str, *, watch: bool, action: Action | None, status: int | None
    ) -> None:
        passed = Passed(request.method, path, watch, action, status)
        self.passed.append(passed)
        if self.on_request is not None and not watch:
            self.on_request(passed)

    async def _silence(self) -> None:
        """Wait until the client gives up."""
        task = asyncio.current_task()
        if task is not None:
            self._held.add(task)
        try:
            await asyncio.Event().wait()
        finally:
            if task is not None:
                self._held.discard(task)

    @staticmethod
    def _break(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return response if response is not None else web.Response()

    @staticmethod
    def _status(status: int, retry_after: int | None = None) -> web.Response:
        document = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": "injected fault",
            "reason": _REASONS.get(status, "InternalError"),
            "code": status,
        }
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return web.json_response(document, status=status, headers=headers)

    def _expired(self, *, watch: bool) -> web.Response:
        if not watch:
            return self._status(410)
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": "too old resource version: 1 (2)",
            "reason": "Expired",
            "code": 410,
        }
        return web.json_response(text=json.dumps({"type": "ERROR", "object": status}) + "\n")
