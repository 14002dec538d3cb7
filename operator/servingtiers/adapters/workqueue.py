"""A queue of keys in which each key waits at most once and is worked on by one worker at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["WorkQueue"]

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """De-duplicating, with delayed keys and exponential back-off per key.

    Args:
        clock: Monotonic seconds.
        backoff: First and longest pause after failures, seconds.
    """

    def __init__(self, *, clock: Callable[[], float], backoff: tuple[float, float] = (1.0, 300.0)) -> None:
        self._clock = clock
        self._backoff = backoff
        self._ready: asyncio.Queue[K] = asyncio.Queue()
        self._waiting: dict[K, float] = {}
        self._working: set[K] = set()
        self._again: dict[K, bool] = {}
        """Keys that came while they were worked on, and whether one of their reasons was urgent."""
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}

    def add(self, key: K, *, urgent: bool = True) -> None:
        """Let the key be worked on as soon as a worker is free.

        Args:
            key: The key.
            urgent: Something has changed, which may well be the mend of a failure. Without it a key that has failed goes
                on waiting for its time.
        """
        if key in self._working:
            self._again[key] = urgent or self._again.get(key, False)
            return
        if not urgent and key in self._failures and key in self._timers:
            return
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()
        if key not in self._waiting:
            self._waiting[key] = self._clock()
            self._ready.put_nowait(key)

    def add_after(self, key: K, seconds: float) -> None:
        """Let the key be worked on after a pause; an earlier pending time stays."""
        loop = asyncio.get_running_loop()
        when = loop.time() + seconds
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= when:
                return
            timer.cancel()
        self._timers[key] = loop.call_at(when, self._fire, key)

    def _fire(self, key: K) -> None:
        self._timers.pop(key, None)
        self.add(key)

    async def get(self) -> K:
        """Take the next key; ``done`` must follow."""
        key = await self._ready.get()
        self._waiting.pop(key, None)
        self._working.add(key)
        return key

    def done(self, key: K) -> None:
        """Say that the work on a key went well."""
        self._failures.pop(key, None)
        self._working.discard(key)
        if self._again.pop(key, None) is not None:
            self.add(key)

    def failed(self, key: K, *, at_least: float = 0.0) -> float:
        """Say that the work on a key failed; it comes again after the returned pause, seconds."""
        self._working.discard(key)
        if self._again.pop(key, False):
            self.add(key)
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        first, longest = self._backoff
        pause = min(longest, first * 2.0 ** min(failures - 1, 16))
        pause = max(at_least, pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries, no secret
        self.add_after(key, pause)
        return pause

    def forget(self, key: K) -> None:
        """Drop the timer and the failures of a key that is gone."""
        self._failures.pop(key, None)
        if (timer := self._timers.pop(key, None)) is not None:
            timer.cancel()

    @property
    def depth(self) -> int:
        """Keys that wait for a worker."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Nothing waits and nobody works (delayed keys may remain)."""
        return not self._waiting and not self._working

    @property
    def oldest_age(self) -> float:
        """Seconds the longest waiting key has waited; 0 when none waits."""
        return self._clock() - min(self._waiting.values()) if self._waiting else 0.0
