"""Open-loop load: a recorded trace, replayed against a router or an engine as streaming completions.

Requests are sent when the trace says, whatever has been answered so far, because real users do not wait for each
other; latencies are what a client sees.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import io
import json
import math
import random
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import aiohttp

__all__ = [
    "LoadGenerator",
    "RequestRecord",
    "TraceRequest",
    "azure_conversation",
    "percentile",
    "poisson",
    "read_trace",
    "shape_trace",
    "summarize",
]

_WORD = "w"


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace."""

    at: float
    """Seconds after the trace's beginning."""
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What a client saw of one request."""

    at: float
    """When it was due, seconds after the beginning."""
    late: float
    """How much later it was really sent, seconds: the load generator's own lag."""
    status: int
    """HTTP status; 0: no answer, or one that broke off."""
    attempts: int
    ttft: float | None
    """Time to first token, seconds from when it was due, so that no delay of ours hides one of the server's."""
    tpot: float | None
    """Mean time per output token after the first, seconds; None with fewer than two tokens."""
    e2e: float
    """From due to the last byte, seconds."""
    prompt_tokens: int
    output_tokens: int
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was answered in full."""
        return self.status == 200 and not self.error


def read_trace(path: Path) -> list[TraceRequest]:
    """Read a trace in the format of Azure's (``TIMESTAMP,ContextTokens,GeneratedTokens``), plain or gzip.

    Raises:
        ValueError: The file is not in this format.
    """
    return _parse(path.read_bytes(), str(path))


def azure_conversation() -> list[TraceRequest]:
    """Return the shipped Azure 2023 conversation trace: 19,366 requests of one hour."""
    name = "azure2023_conv.csv.gz"
    return _parse((files("servingtiers.simulate") / "data" / name).read_bytes(), name)


def _parse(content: bytes, name: str) -> list[TraceRequest]:
    text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    reader = csv.reader(io.StringIO(text))
    header = next(reader, [])
    if header[:3] != ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
        raise ValueError(
            f"{name}: not a trace: the first line must be TIMESTAMP,ContextTokens,GeneratedTokens"
        )
    rows = [(_seconds(row[0]), int(row[1]), int(row[2])) for row in reader if row]
    begin = rows[0][0] if rows else 0.0
    return [TraceRequest(at - begin, prompt, output) for at, prompt, output in rows]


def _seconds(stamp: str) -> float:
    # Seven digits of fraction are one more than Python reads.
    whole, _, fraction = stamp.partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")


def shape_trace(
    trace: Iterable[TraceRequest],
    *,
    begin: float = 0.0,
    duration: float = math.inf,
    compress: float = 1.0,
    keep: float = 1.0,
    seed: int = 0,
    max_prompt: int | None = None,
    max_output: int | None = None,
) -> list[TraceRequest]:
    """Cut, compress and thin a trace.

    Compressing multiplies the rate and keeps the shape of the hour; thinning divides the rate and keeps bursts
    (each request stays or goes by itself). Together they fit an hour of a large service into minutes of a small
    one.

    Args:
        trace: The requests, oldest first.
        begin: Where the cut begins, seconds of the trace.
        duration: Length of the cut, seconds of the trace.
        compress: How many seconds of the trace pass in one.
        keep: Share of the requests that stay, 0 to 1.
        seed: Of the thinning.
        max_prompt: Clip prompts, tokens.
        max_output: Clip outputs, tokens.
    """
    draw = random.Random(seed)  # noqa: S311 - a repeatable sample, no secret
    return [
        replace(
            request,
            at=(request.at - begin) / compress,
            prompt_tokens=min(request.prompt_tokens, max_prompt or request.prompt_tokens),
            output_tokens=max(1, min(request.output_tokens, max_output or request.output_tokens)),
        )
        for request in trace
        if begin <= request.at < begin + duration and draw.random() < keep
    ]


def poisson(
    rate: float, duration: float, prompt_tokens: int, output_tokens: int, *, seed: int = 0
) -> list[TraceRequest]:
    """Return a Poisson stream of equal requests.

    Args:
        rate: Requests per second.
        duration: Seconds.
        prompt_tokens: Of each.
        output_tokens: Of each.
        seed: Of the arrivals.
    """
    draw = random.Random(seed)  # noqa: S311 - a repeatable sample, no secret
    out: list[TraceRequest] = []
    at = draw.expovariate(rate)
    while at < duration:
        out.append(TraceRequest(at, prompt_tokens, output_tokens))
        at += draw.expovariate(rate)
    return out


def percentile(values: Iterable[float], percent: float) -> float | None:
    """Return the nearest-rank percentile, or None of no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


class LoadGenerator:
    """Replays requests against one or several base URLs.

    Args:
        targets: Base URL, several of them (taken in turn), or a function that finds one for each request.
        model: Served model name.
        shared_prefix_tokens: Leading tokens that all prompts have in common (a system prompt); the rest of each
            prompt is unlike any other, so that a prefix cache finds only this.
        retry_after: Seconds until a refused request (503, 429 or no connection) is sent again; None: it failed.
        retries: How often.
        timeout: Of one attempt, seconds.
        on_record: Called with each finished request.
    """

    def __init__(
        self,
        targets: str | Sequence[str] | Callable[[], Awaitable[str]],
        *,
        model: str,
        shared_prefix_tokens: int = 0,
        retry_after: float | None = None,
        retries: int = 100,
        timeout: float = 600.0,
        on_record: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self._targets = targets
        self._model = model
        self._shared = shared_prefix_tokens
        self._retry_after = retry_after
        self._retries = retries if retry_after is not None else 0
        self._timeout = timeout
        self._on_record = on_record
        self._turn = 0
        self._session: aiohttp.ClientSession | None = None
        self.records: list[RequestRecord] = []
        self.sent = 0
        self.in_flight = 0

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=5),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def replay(self, trace: Iterable[TraceRequest]) -> list[RequestRecord]:
        """Send every request at its time and return what became of each, in the order of their ends."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(trace):
                pause = begin + request.at - loop.time()
                if pause > 0:
                    await asyncio.sleep(pause)
                group.create_task(self._send(number, request, begin + request.at))
        return self.records

    async def _target(self) -> str:
        if callable(self._targets):
            return await self._targets()
        if isinstance(self._targets, str):
            return self._targets
        self._turn += 1
        return self._targets[self._turn % len(self._targets)]

    def _prompt(self, number: int, tokens: int) -> str:
        shared = min(self._shared, tokens - 1)
        # The first own word is unlike any other's, and a prefix cache hashes blocks in a chain.
        return f"{_WORD} " * shared + f"r{number} " + f"{_WORD} " * (tokens - shared - 1)

    async def _send(self, number: int, request: TraceRequest, due: float) -> None:
        loop = asyncio.get_running_loop()
        body = {
            "model": self._model,
            "prompt": self._prompt(number, request.prompt_tokens),
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        late = loop.time() - due
        self.sent += 1
        self.in_flight += 1
        attempt = 0
        try:
            while True:
                attempt += 1
                record = await self._once(body, request, due, late, attempt)
                if record.ok or record.status not in {0, 429, 503} or attempt > self._retries:
                    break
                await asyncio.sleep(self._retry_after or 0.0)
        finally:
            self.in_flight -= 1
        self.records.append(record)
        if self._on_record is not None:
            self._on_record(record)

    async def _once(
        self, body: dict[str, Any], request: TraceRequest, due: float, late: float, attempt: int
    ) -> RequestRecord:
        if self._session is None:
            raise RuntimeError("not started: use `async with LoadGenerator(...)`")
        loop = asyncio.get_running_loop()
        status, error = 0, ""
        first = last = None
        tokens = 0
        finished = False
        try:
            url = await self._target()
            async with self._session.post(f"{url}/v1/completions", json=body) as answer:
                status = answer.status
                if status != 200:
                    error = (await answer.text())[:200]
                else:
                    async for line in answer.content:
                        if not line.startswith(b"data: "):
                            continue
                        if line.startswith(b"data: [DONE]"):
                            finished = True
                            break
                        chunk = json.loads(line[6:])
                        if chunk.get("usage"):
                            tokens = chunk["usage"]["completion_tokens"]
                        if any(choice.get("text") for choice in chunk["choices"]):
                            last = loop.time()
                            first = first if first is not None else last
                    if not finished:
                        error = "the stream broke off"
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
            status = 0
        return RequestRecord(
            at=request.at,
            late=late,
            status=status,
            attempts=attempt,
            ttft=first - due if first is not None else None,
            tpot=(last - first) / (tokens - 1)
            if first is not None and last is not None and tokens > 1
            else None,
            e2e=loop.time() - due,
            prompt_tokens=request.prompt_tokens,
            output_tokens=tokens,
            error=error,
        )


def summarize(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Return counts, percentiles (seconds) and throughput of a replay."""
    good = [record for record in records if record.ok]
    seconds = max((record.at + record.e2e for record in records), default=0.0)
    summary: dict[str, Any] = {
        "requests": len(records),
        "ok": len(good),
        "seconds": seconds,
        "requestsPerSecond": len(good) / seconds if seconds else 0.0,
        "outputTokensPerSecond": sum(record.output_tokens for record in good) / seconds if seconds else 0.0,
        "worstLateSeconds": max((record.late for record in records), default=0.0),
    }
    for name in ("ttft", "tpot", "e2e"):
        values = [value for record in good if (value := getattr(record, name)) is not None]
        summary[name] = {f"p{p}": percentile(values, p) for p in (50, 95, 99)}
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay a trace against a URL and print a summary as JSON."""
    parser = argparse.ArgumentParser(prog="python -m servingtiers.lab.load", description=main.__doc__)
    parser.add_argument(
        "--url", action="append", required=True, help="base URL of a router or engine; repeatable"
    )
    parser.add_argument("--model", required=True, help="served model name")
    parser.add_argument("--trace", type=Path, help="CSV trace (default: the Azure 2023 conversation trace)")
    parser.add_argument("--begin", type=float, default=0.0, help="where to begin, seconds of the trace")
    parser.add_argument("--duration", type=float, default=3600.0, help="how much of it, seconds of the trace")
    parser.add_argument("--compress", type=float, default=1.0, help="trace seconds per second")
    parser.add_argument("--keep", type=float, default=1.0, help="share of requests that are sent")
    parser.add_argument("--records", type=Path, help="write one JSON line per request to this file")
    options = parser.parse_args(arguments)
    trace = shape_trace(
        read_trace(options.trace) if options.trace else azure_conversation(),
        begin=options.begin,
        duration=options.duration,
        compress=options.compress,
        keep=options.keep,
    )

    async def run() -> list[RequestRecord]:
        async with LoadGenerator(options.url, model=options.model) as generator:
            return await generator.replay(trace)

    records = asyncio.run(run())
    if options.records:
        options.records.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    json.dump(summarize(records), sys.stdout, indent=1)
    print()
    return 0 if all(record.ok for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
