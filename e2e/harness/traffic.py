"""Clients of a tier: they stream, and they notice when a stream ends early."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import aiohttp

from harness.tiers import MODEL

__all__ = ["Answer", "Traffic", "ask", "percentile", "prompt"]

_WORDS = [
    "the",
    "a",
    "serving",
    "tier",
    "latency",
    "throughput",
    "balanced",
    "prefill",
    "decode",
    "token",
    "cache",
    "pod",
    "node",
    "scale",
    "queue",
]


def prompt(words: int, rng: random.Random) -> str:
    """Return a prompt of about as many tokens as words; no two are alike, so nothing is answered from a cache."""
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def percentile(values: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile; NaN where there is nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


@dataclass(slots=True)
class Answer:
    """What one request came to."""

    sent: float
    """Seconds after the start of the traffic."""
    status: int = 0
    """HTTP status; 0 where no answer came."""
    ttft: float | None = None
    """Seconds to the first piece of content."""
    seconds: float = 0.0
    """Seconds to the end."""
    tokens: int = 0
    """Output tokens by the engine's own count; several may come in one piece, and half a character in none."""
    finished: bool = False
    """Whether the stream ended as it should, with ``[DONE]``."""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the client got all it asked for."""
        return self.status == 200 and self.finished

    @property
    def broken(self) -> bool:
        """Whether a stream began and did not end as it should."""
        return self.status == 200 and not self.finished


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    *,
    tokens: int,
    text: str,
    model: str = MODEL,
    sent: float = 0.0,
    chat: bool = False,
    timeout: float = 120.0,  # noqa: ASYNC109 - the client's own patience, which is part of what is measured
    **more: object,
) -> Answer:
    """Send one streaming request and read it to its end."""
    answer = Answer(sent)
    begun = time.monotonic()
    body: dict[str, object] = {"model": model, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    body |= {"stream_options": {"include_usage": True}, **more}
    if chat:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    path = "/v1/chat/completions" if chat else "/v1/completions"
    try:
        async with session.post(
            url + path, json=body, timeout=aiohttp.ClientTimeout(total=timeout)
        ) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error = (await response.text())[:200]
            else:
                async for line in response.content:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        answer.finished = True
                        break
                    document = json.loads(data)
                    if "error" in document:
                        answer.error = str(document["error"])[:200]
                        break
                    if document.get("usage"):
                        answer.tokens = document["usage"]["completion_tokens"]
                    if answer.ttft is None:
                        answer.ttft = time.monotonic() - begun
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:200]
    answer.seconds = time.monotonic() - begun
    return answer


@dataclass(slots=True)
class Traffic:
    """Open-loop Poisson traffic against one URL, for as long as the body of ``async with`` runs."""

    url: str
    rate: float
    """Requests per second; may be changed while it runs."""
    prompt_tokens: int = 48
    output_tokens: int = 24
    seed: int = 0
    timeout: float = 120.0
    limit: int = 4000
    """Most requests that are sent: a test that hangs must not send for ever."""
    answers: list[Answer] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Traffic]:
        """Send while the body runs, then wait until everything sent has been answered."""
        rng = random.Random(self.seed)
        begun = time.monotonic()
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=15)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one(text: str) -> None:
                self.answers.append(
                    await ask(
                        session,
                        self.url,
                        tokens=self.output_tokens,
                        text=text,
                        sent=time.monotonic() - begun,
                        timeout=self.timeout,
                    )
                )

            async def send() -> None:
                for _ in range(self.limit):
                    await asyncio.sleep(rng.expovariate(self.rate) if self.rate > 0 else 0.5)
                    if self.rate > 0:
                        task = asyncio.create_task(one(prompt(self.prompt_tokens, rng)))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)

            sender = asyncio.create_task(send())
            try:
                yield self
            finally:
                sender.cancel()
                await asyncio.gather(sender, *self._tasks, return_exceptions=True)

    # -- what came of it ----------------------------------------------------------------------------------

    @property
    def failed(self) -> list[Answer]:
        """Requests whose client did not get all it asked for."""
        return [each for each in self.answers if not each.ok]

    @property
    def broken(self) -> list[Answer]:
        """Streams that began and ended early."""
        return [each for each in self.answers if each.broken]

    def ttft(self, share: float) -> float:
        """Return a percentile of the time to first token, seconds."""
        return percentile([each.ttft for each in self.answers if each.ttft is not None], share)

    def summary(self) -> str:
        """Return one line for a person."""
        statuses = Counter(each.status for each in self.failed)
        failures = ", ".join(
            f"{count} × {status or 'no answer'}" for status, count in sorted(statuses.items())
        )
        return (
            f"{len(self.answers)} requests, {len(self.failed)} failed{f' ({failures})' if failures else ''},"
            f" {len(self.broken)} broken streams, TTFT p50 {self.ttft(0.5):.2f} s p99 {self.ttft(0.99):.2f} s"
        )
