"""Who may write: one holder of a ``coordination.k8s.io`` Lease at a time.

The official client's LeaseLock reads and writes the Lease; its loop trusts the wall clock and knows no fencing, so
the loop here is ours: terms are measured on the monotonic clock from *before* the renewal was sent, every write
checks them, and a holder that could not renew in time has stopped writing before anybody else may start.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

__all__ = ["Leadership", "LeaseTimes", "NotLeaderError"]

_log = logging.getLogger(__name__)
_RELEASE_TRIES = 3


class _Lock(LeaseLock):  # type: ignore[misc]  # the client publishes no types
    """The official lock; its own ``create`` passes an argument that its own client (37.0) refuses."""

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        body = kubernetes_client.V1Lease(
            metadata=kubernetes_client.V1ObjectMeta(name=name), spec=self.update_lease(election_record)
        )
        try:
            await self.api_instance.create_namespaced_lease(namespace, body)
        except kubernetes_client.ApiException as error:
            _log.warning("lease: cannot create it (%s)", error.reason)
            return False
        return True


class NotLeaderError(Exception):
    """This process does not hold the Lease (any more): it must not write."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """Durations in seconds; another takes over after ``duration`` without a renewal."""

    duration: float = 15.0
    renew_deadline: float = 10.0
    """The holder stops writing this long after its last renewal began; shorter than ``duration``."""
    retry: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.retry < self.renew_deadline < self.duration:
            raise ValueError("lease times must satisfy retry < renew deadline < duration")


class Leadership:
    """Acquires and renews the Lease; ``check`` guards every write."""

    def __init__(
        self,
        api: kubernetes_client.ApiClient,
        *,
        name: str,
        namespace: str,
        identity: str,
        times: LeaseTimes = LeaseTimes(),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock = _Lock(name, namespace, identity, api)
        self._times = times
        self._monotonic = monotonic
        self._renewed: float | None = None
        self._seen: tuple[str | None, str | None] | None = None
        self._seen_at = 0.0
        self._acquired_time: str | None = None

    @property
    def identity(self) -> str:
        """Name of this candidate."""
        return str(self._lock.identity)

    @property
    def leading(self) -> bool:
        """This process may write now."""
        return self._renewed is not None and self._monotonic() - self._renewed < self._times.renew_deadline

    def check(self) -> None:
        """Raise unless this process may write now.

        Raises:
            NotLeaderError: The term is over.
        """
        if not self.leading:
            raise NotLeaderError(f"{self.identity} does not hold the lease: nothing is written")

    async def acquire(self) -> None:
        """Wait until this process leads."""
        while not await self.attempt():  # noqa: ASYNC110 - a Lease is polled: it has no event to wait for
            await asyncio.sleep(self._times.retry)
        _log.info("leading as %s", self.identity)

    async def hold(self) -> None:
        """Renew until the term is lost, then return: the process must exit, its caches are no longer guarded."""
        while self.leading:
            await asyncio.sleep(self._times.retry)
            await self.attempt()
        _log.error("the lease was lost: stopping")

    async def release(self) -> None:
        """Give the Lease up so that a successor need not wait for it to expire."""
        if not self.leading:
            return
        self._renewed = None
        # A renewal that was cancelled half-way may still reach the API server between our read and our write.
        for _ in range(_RELEASE_TRIES):
            try:
                if await self._give_up():
                    return
            except (kubernetes_client.ApiException, aiohttp.ClientError, OSError) as error:
                _log.warning("lease: could not give it up (%s); it will expire", type(error).__name__)
                return

    async def _give_up(self) -> bool:
        """Clear the holder if it is still this process; return whether that is settled."""
        found, record = await self._lock.get(self._lock.name, self._lock.namespace)
        lease = self._lock.lease_reference
        if not found or lease is None or getattr(record, "holder_identity", None) != self.identity:
            return True
        lease.spec.holder_identity = None
        try:
            await self._lock.api_instance.replace_namespaced_lease(
                self._lock.name, self._lock.namespace, lease
            )
        except kubernetes_client.ApiException as error:
            if error.status != 409:
                raise
            return False
        return True

    async def attempt(self) -> bool:
        """Try once to acquire or renew; return whether this process leads."""
        began = self._monotonic()
        try:
            async with asyncio.timeout(self._times.renew_deadline):
                won = await self._try()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            _log.warning("lease: no answer from the API server (%s)", type(error).__name__)
            return self.leading
        if won:
            # From before the request: the API server cannot have counted from earlier than this.
            self._renewed = began
        elif self._renewed is not None and self._seen and self._seen[0] not in {self.identity, None}:
            self._renewed = None
        return self.leading

    async def _try(self) -> bool:
        found, record = await self._lock.get(self._lock.name, self._lock.namespace)
        if not found:
            if getattr(record, "status", None) != 404:
                _log.warning("lease: cannot read it (%s)", getattr(record, "reason", record))
                return False
            return await self._write(self._record(), create=True)
        holder = getattr(record, "holder_identity", None)
        seen = (holder, getattr(record, "renew_time", None))
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._monotonic()
        free = not holder or self._monotonic() - self._seen_at >= self._times.duration
        if holder == self.identity or free:
            return await self._write(self._record(), create=False)
        return False

    async def _write(self, record: LeaderElectionRecord, *, create: bool) -> bool:
        write = self._lock.create if create else self._lock.update
        return bool(await write(self._lock.name, self._lock.namespace, record))

    def _record(self) -> LeaderElectionRecord:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
        if not self.leading:
            self._acquired_time = now
        seconds = str(max(1, round(self._times.duration)))
        return LeaderElectionRecord(self.identity, seconds, self._acquired_time or now, now)
