"""Reads load from the engine and router pods themselves: the default, which needs no Prometheus.

Every pod is asked once a tick. What rates and percentiles need of the past is kept here, in memory, for as long as
the window is; after a restart of the operator they are unknown until the window has filled, so nothing shrinks.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import aiohttp

from servingtiers.core.exposition import parse_engine, parse_router
from servingtiers.core.signals import TierLoad, Unknown
from servingtiers.core.telemetry import (
    PodTarget,
    PodWindow,
    RouterScan,
    RouterWindow,
    Scan,
    TierTargets,
    engine_window,
    router_window,
    tier_load,
)

__all__ = ["ScrapeSource"]

_MOST_SCANS = 1_000
"""Answers of one pod that are kept at most, however fast they come."""
_MAX_BODY = 4 * 1024 * 1024
"""Bytes of one answer; an engine with eight data-parallel ranks answers half a mebibyte."""

_W = TypeVar("_W", PodWindow, RouterWindow)
_Key = tuple[str, str, str, int]
"""Namespace, name, address and port: a pod that comes back elsewhere is another one."""


@dataclass(slots=True)
class _Engine:
    target: PodTarget
    scans: deque[Scan]
    fault: str | None = None
    failed: bool = False
    """It was asked last time and gave no usable answer."""


@dataclass(slots=True)
class _Router:
    target: PodTarget
    scans: deque[RouterScan]
    fault: str | None = None
    failed: bool = False


class _RefusedError(Exception):
    """A pod gave no usable answer; the message says why."""


@dataclass(slots=True)
class ScrapeSource:
    """A :class:`~servingtiers.core.telemetry.LoadSource` that asks the pods.

    Sample times are kept on the monotonic clock, so a step of the wall clock neither ages nor rejuvenates them.
    """

    interval: float
    """Seconds between calls of :meth:`read` at most; sooner is fine."""
    window: float
    """Seconds over which rates and percentiles are taken; at least two intervals."""
    timeout: float = 3.0
    """Seconds one pod may take; all pods together may take twice that."""
    concurrency: int = 256
    """Pods asked at the same time."""
    monotonic: Callable[[], float] = time.monotonic
    _engines: dict[_Key, _Engine] = field(default_factory=dict, init=False)
    _routers: dict[_Key, _Router] = field(default_factory=dict, init=False)
    _session: aiohttp.ClientSession | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.window < 2 * self.interval:
            raise ValueError(
                f"telemetry.window ({self.window:g} s) must be at least twice telemetry.interval"
                f" ({self.interval:g} s): a rate needs two samples, so raise window"
            )

    async def read(
        self, tiers: Sequence[TierTargets], now: float, *, complete: bool = True
    ) -> Mapping[str, TierLoad]:
        """Scrape every ready pod of ``tiers`` and return the load of each tier by its key.

        Args:
            tiers: The tiers that are asked for.
            now: Unix time, seconds.
            complete: These are all tiers there are: pods that are missing here are forgotten.
        """
        ahead = now - self.monotonic()
        pods = self._follow(tiers, complete=complete)
        # Hanging pods must not use up the others' time: whoever failed last time comes last.
        pods.sort(key=lambda pod: pod.failed)
        await self._scrape_all(pods, ahead)
        clock = self.monotonic()
        loads: dict[str, TierLoad] = {}
        for tier in tiers:
            engines = {
                pod.name: self._engine_window(self._engines[_key(tier, pod)], clock, ahead)
                for pod in tier.engines
            }
            routers = {
                pod.name: self._router_window(self._routers[_key(tier, pod)], clock, ahead)
                for pod in tier.routers
            }
            loads[tier.key] = tier_load(tier, engines, routers, window=self.window, now=clock, ahead=ahead)
            await asyncio.sleep(0)  # the reconciler shares this loop
        return loads

    async def close(self) -> None:
        """Close connections; the next :meth:`read` opens new ones."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _follow(self, tiers: Sequence[TierTargets], *, complete: bool) -> list[_Engine | _Router]:
        """Return the pods to ask, with what they answered before."""
        engines: dict[_Key, _Engine] = {}
        routers: dict[_Key, _Router] = {}
        for tier in tiers:
            for pod in tier.engines:
                key = _key(tier, pod)
                engines[key] = self._engines.get(key) or _Engine(pod, deque(maxlen=_MOST_SCANS))
                engines[key].target = pod
            for pod in tier.routers:
                key = _key(tier, pod)
                routers[key] = self._routers.get(key) or _Router(pod, deque(maxlen=_MOST_SCANS))
                routers[key].target = pod
        asked: list[_Engine | _Router] = [*engines.values(), *routers.values()]
        if not complete:
            engines, routers = self._engines | engines, self._routers | routers
        self._engines, self._routers = engines, routers
        return asked

    async def _scrape_all(self, pods: Sequence[_Engine | _Router], ahead: float) -> None:
        for pod in pods:
            pod.fault, pod.failed = (
                f"was not reached within {2 * self.timeout:g} s: too many pods hang",
                False,
            )
        left = iter(pods)
        workers = [
            asyncio.create_task(self._work(left, ahead)) for _ in range(min(self.concurrency, len(pods)))
        ]
        if not workers:
            return
        try:
            done, _ = await asyncio.wait(workers, timeout=2 * self.timeout)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        for worker in done:
            worker.result()  # an error of ours is not to pass for a pod's silence

    async def _work(self, left: Iterator[_Engine | _Router], ahead: float) -> None:
        for pod in left:
            pod.failed = True
            try:
                text = await self._get(pod.target)
                at = self.monotonic()
                if isinstance(pod, _Engine):
                    scan = parse_engine(text, at + ahead)
                    pod.scans.append(replace(scan, time=scan.time - ahead))
                else:
                    pod.scans.append(parse_router(text, at))
                # Reads may come sooner than every interval, while an engine moves: history goes by time, not by number.
                while len(pod.scans) > 1 and pod.scans[0].time < at - self.window - 2 * self.interval:
                    pod.scans.popleft()
                pod.fault, pod.failed = None, False
            except _RefusedError as refused:
                pod.fault = str(refused)
            except ValueError as error:
                pod.fault = f"its metrics cannot be read: {error}"

    async def _get(self, target: PodTarget) -> str:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # vLLM's server closes idle connections before the next tick: keeping them only costs sockets.
                connector=aiohttp.TCPConnector(limit=self.concurrency, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept": "text/plain;version=0.0.4", "Accept-Encoding": "identity"},
                auto_decompress=False,
                trust_env=False,
            )
        host = f"[{target.ip}]" if ":" in target.ip else target.ip
        try:
            async with (
                asyncio.timeout(self.timeout),
                # A pod must not send us elsewhere.
                self._session.get(f"http://{host}:{target.port}/metrics", allow_redirects=False) as response,
            ):
                if response.status != 200:
                    raise _RefusedError(f"answered HTTP {response.status} on /metrics")
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise _RefusedError("answered compressed though told not to")
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > _MAX_BODY:
                        raise _RefusedError(f"answered more than {_MAX_BODY >> 20} MiB on /metrics")
                return body.decode()
        except TimeoutError:
            raise _RefusedError(f"gave no answer on port {target.port} within {self.timeout:g} s") from None
        except aiohttp.ClientConnectorError as error:
            raise _RefusedError(
                f"cannot be reached on port {target.port}: {os.strerror(error.errno or errno.EIO)}"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _RefusedError(f"broke off on port {target.port}: {error}"[:200]) from None

    def _engine_window(self, pod: _Engine, clock: float, ahead: float) -> PodWindow | Unknown:
        found = engine_window(
            pod.scans,
            window=self.window,
            interval=self.interval,
            now=clock,
            ready_since=None if pod.target.ready_since is None else pod.target.ready_since - ahead,
        )
        return _because(found, pod.fault)

    def _router_window(self, pod: _Router, clock: float, ahead: float) -> RouterWindow | Unknown:
        found = router_window(
            pod.scans,
            window=self.window,
            interval=self.interval,
            now=clock,
            ready_since=None if pod.target.ready_since is None else pod.target.ready_since - ahead,
        )
        return _because(found, pod.fault)


def _because(found: _W | Unknown, fault: str | None) -> _W | Unknown:
    return Unknown(fault) if isinstance(found, Unknown) and fault is not None else found


def _key(tier: TierTargets, pod: PodTarget) -> _Key:
    return tier.namespace, pod.name, pod.ip, pod.port
