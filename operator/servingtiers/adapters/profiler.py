"""Measures the step times of a running vLLM engine over HTTP, for :mod:`servingtiers.performance.profile`.

What a client sees is not a step: a time to first token also holds the network, the HTTP front end and the client
itself. So decode times are taken from the gaps between tokens, where all of that cancels, and what it amounts to is
measured with a prompt of one token and subtracted from the prefill times.

Prompts are sent as token ids: their length is exact, and no two share a prefix unless they are meant to.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any, Self

import aiohttp

from servingtiers.performance.tables import StepRow

__all__ = ["VOCABULARY", "EngineProfiler", "Grid", "Measured", "ProfilingError", "Stream"]

_WARM_STEPS = 4
"""Steps at the beginning and the end of a window that are not counted: the batch is not complete there."""
_SEPARATE = 15
"""Requests with pauses between them that tell what a request costs as users send them."""
_LEAST_STEPS = 8
"""Steps a window must hold."""
_BLOCK = 64
"""Tokens of a primed prompt that a prefix cache may have to compute again: a block."""
VOCABULARY = 20_000
"""Token ids below this are in every published vocabulary; the lowest twentieth holds special tokens and is left out."""


class ProfilingError(RuntimeError):
    """The endpoint cannot be measured; the message states the mend."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    contexts: tuple[int, ...] = (256, 1024, 4096)
    """Tokens of each decoding sequence."""
    prompts: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Prompt lengths; each must fit one step of the engine."""
    mixed: bool = True
    """Also measure steps that compute a prompt, as long as a context, beside the middle batch."""
    window: int = 32
    """Decode steps that are measured at each point."""
    repeats: int = 3
    """Times each prompt length is sent; the fastest counts, since nothing makes a step faster than it is."""

    def __post_init__(self) -> None:
        for name, values, least in (
            ("batches", self.batches, 2),
            ("contexts", self.contexts, 2),
            ("prompt lengths", self.prompts, 2),
        ):
            if len(set(values)) < least:
                raise ValueError(f"{len(set(values))} {name}: give {least} or more different ones")
        for name, values in (("batch", self.batches), ("prompt length", self.prompts)):
            if any(value < 1 for value in values):
                raise ValueError(f"{name} {min(values)}: use 1 or more")
        if min(self.contexts) < 2 * _BLOCK:
            raise ValueError(f"context {min(self.contexts)}: use {2 * _BLOCK} tokens or more")
        if self.window < _LEAST_STEPS or self.repeats < 1:
            raise ValueError(f"measure {_LEAST_STEPS} steps or more, once or more")

    @property
    def requests(self) -> int:
        """How many requests measuring all of it takes, at most."""
        decode = len(self.contexts) * (max(self.batches) + 2 * sum(self.batches))
        mixed = len(self.contexts) * (2 * self.middle_batch + self.repeats) if self.mixed else 0
        return self.repeats * (len(self.prompts) + 1) + 1 + decode + mixed + _SEPARATE

    @property
    def middle_batch(self) -> int:
        """The batch beside which prompts are computed in mixed rows."""
        ordered = sorted(set(self.batches))
        return ordered[len(ordered) // 2]


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of it."""

    rows: tuple[StepRow, ...]
    left_out: tuple[str, ...]
    """Points that could not be measured, each with its reason."""
    kv_capacity_tokens: int | None
    engine: str
    """Such as ``vLLM 0.24.0``."""
    overhead_ms: float
    """Network, HTTP and client, of one request: subtracted from prefill times, cancelled in decode times."""
    request_ms: float
    """The same of a request that comes after a pause, as users' requests do: processes have to wake up for it. The
    median, where ``overhead_ms`` is the least: prefill times are least ones, too."""
    client_busy: float
    """Largest share of a processor that this client took at one point, 0 to 1: near 1 it measured itself."""
    requests: int


@dataclass(slots=True)
class Stream:
    """One streamed answer: when how many tokens had come."""

    sent: float
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    bundled: bool = False
    """Whether tokens came several at a time and were not counted: how many came when is then a guess."""

    def progress(self) -> list[tuple[float, float]]:
        """Return (seconds, tokens so far) at each chunk that brought tokens.

        vLLM counts the tokens in every chunk when asked to (``continuous_usage_stats``). Where a server does not, the
        first chunk holds one token and the others share the rest evenly.
        """
        points: list[tuple[float, float | None]] = []
        rest = b""
        for at, data in self.reads:
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                text = event.strip()
                if not text.startswith(b"data:") or text.endswith(b"[DONE]"):
                    continue
                body = json.loads(text[5:])
                if body.get("error"):  # vLLM says so inside a stream that began with 200
                    told = body["error"]
                    told = told.get("message", told) if isinstance(told, dict) else told
                    raise ProfilingError(
                        f"the engine refused a request ({told}): shorten what is measured, or lower --vocabulary where it "
                        "says so"
                    )
                usage = body.get("usage") or {}
                self.prompt_tokens = int(usage.get("prompt_tokens") or self.prompt_tokens)
                self.output_tokens = int(usage.get("completion_tokens") or self.output_tokens)
                choices = body.get("choices") or []
                if choices and (choices[0].get("text") or usage.get("completion_tokens")):
                    points.append((at, usage.get("completion_tokens")))
        counted = [(at, float(tokens)) for at, tokens in points if tokens is not None]
        if len(counted) == len(points) and points:
            found = counted
        else:
            each = (self.output_tokens - 1) / max(len(points) - 1, 1)
            self.bundled = each > 1.0 + 1e-9
            found = [(at, 1.0 + each * number) for number, (at, _) in enumerate(points)]
        latest: dict[float, float] = {}
        for at, tokens in found:  # several chunks in one read came together
            latest[at] = max(tokens, latest.get(at, 0.0))
        return sorted(latest.items())


class EngineProfiler:
    """Measures one engine.

    Args:
        url: Base URL of the server, without ``/v1``.
        model: Served model name.
        api_key: Sent as a bearer token.
        timeout: Of one request, seconds.
        progress: Called with a line for each point.
        vocabulary: Size of the vocabulary that prompts are drawn from.
        seed: Of the random token ids.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        progress: Callable[[str], None] = lambda _: None,
        vocabulary: int = VOCABULARY,
        seed: int = 0,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout
        self._say = progress
        self._vocabulary = vocabulary
        self._draw = random.Random(seed)  # noqa: S311 - token ids of a measurement, no secret
        self._session: aiohttp.ClientSession | None = None
        self._sent = 0
        self._busy = 0.0

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=10),
            headers=self._headers,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def measure(
        self,
        grid: Grid,
        *,
        step_budget: int = 2048,
        max_num_seqs: int | None = None,
        kv_capacity_tokens: int | None = None,
    ) -> Measured:
        """Measure every point of a grid.

        Args:
            grid: What to measure.
            step_budget: The engine's ``--max-num-batched-tokens``: longer prompts take several steps, so they are left
                out.
            max_num_seqs: The engine's limit; larger batches are left out.
            kv_capacity_tokens: Size of the KV cache; asked of the engine when None.

        Raises:
            ProfilingError: The endpoint does not answer as vLLM does.
        """
        engine = await self._version()
        capacity = kv_capacity_tokens or await self._kv_capacity()
        longest = await self._max_model_len()
        left_out: list[str] = []
        rows: list[StepRow] = []
        # The first request pays for what is set up lazily.
        await self._complete(self._prompt(16), 2)

        for context in sorted(set(grid.contexts)):
            batches: list[int] = []
            for batch in sorted(set(grid.batches)):
                reason = _beyond(batch, context, grid.window, capacity, longest, max_num_seqs)
                if reason:
                    left_out.append(f"decode, batch {batch}, context {context}: {reason}")
                else:
                    batches.append(batch)
            found, missed = await self._decode(batches, context, grid.window, longest)
            rows += found
            left_out += missed

        lone = min((row.ms for row in rows if row.batch == 1), default=0.0)
        overhead = await self._overhead(rows, grid.repeats)
        separate = await self._separate(lone)
        for tokens in sorted(set(grid.prompts)):
            if tokens > step_budget:
                left_out.append(f"prefill, {tokens} tokens: more than a step of {step_budget}")
            elif longest is not None and tokens >= longest:
                left_out.append(f"prefill, {tokens} tokens: more than the maximum length of {longest}")
            else:
                first = await self._fastest_first_token(tokens, grid.repeats)
                ms = max(1e3 * first - overhead, lone, 1e-3)  # no prompt takes less than one token
                rows.append(StepRow("prefill", 0, 0, tokens, ms))
                self._say(f"prefill of {tokens:>6} tokens: {ms:8.2f} ms")

        if grid.mixed:
            found, missed = await self._all_mixed(rows, grid, step_budget, longest)
            rows += found
            left_out += missed
        return Measured(
            *(tuple(rows), tuple(left_out), capacity, engine, overhead, max(separate, overhead)),
            *(self._busy, self._sent),
        )

    # -- points -------------------------------------------------------------------------------------------
    async def _decode(
        self, batches: Sequence[int], context: int, window: int, longest: int | None
    ) -> tuple[list[StepRow], list[str]]:
        """Measure decode steps at one context: prompts are computed once and then found in the prefix cache."""
        rows: list[StepRow] = []
        left_out: list[str] = []
        if not batches:
            return rows, left_out
        length = max(context - window, 1)
        prompts = [self._prompt(length) for _ in range(max(batches))]
        for prompt in prompts:
            await self._complete(prompt, 1)
        for batch in batches:
            tokens, ms = window + 4 * _WARM_STEPS + batch // 4, None
            for _ in range(2):
                streams = await self._together(prompts[:batch], tokens)
                ms = window_ms(streams)
                if ms is not None:
                    break
                # Without a prefix cache the first sequences are far ahead of the last.
                tokens = min(4 * tokens, longest - length if longest is not None else 4 * tokens)
            if ms is None:
                left_out.append(
                    f"decode, batch {batch}, context {context}: the engine did not run all at once "
                    "(max-num-seqs or the KV cache is smaller)"
                )
                break
            rows.append(StepRow("decode", batch, context, 0, ms))
            self._say(f"decode at batch {batch:>4}, context {context:>6}: {ms:8.2f} ms")
        return rows, left_out

    async def _overhead(self, rows: Sequence[StepRow], repeats: int) -> float:
        """Return what a request costs beside its step, ms: the first token of a one-token prompt, less a decode step."""
        first = 1e3 * await self._fastest_first_token(1, max(repeats, 3))
        lone = min((row.ms for row in rows if row.kind == "decode" and row.batch == 1), default=None)
        if lone is None:
            lone = min((row.ms for row in rows), default=first)
        return max(first - lone, 0.0)

    async def _separate(self, lone_ms: float) -> float:
        """Return what a request costs beside its step when it comes after a pause, ms: the median."""
        found = []
        for _ in range(_SEPARATE):
            await asyncio.sleep(self._draw.uniform(0.05, 0.2))
            stream = await self._complete(self._prompt(1), 1)
            found.append(1e3 * (stream.progress()[0][0] - stream.sent))
        return max(median(found) - lone_ms, 0.0)

    async def _fastest_first_token(self, tokens: int, repeats: int) -> float:
        """Return the least time to the first token of a new prompt on an idle engine, seconds."""
        found = []
        for _ in range(repeats):
            stream = await self._complete(self._prompt(tokens), 1)
            found.append(stream.progress()[0][0] - stream.sent)
        return min(found)

    async def _all_mixed(
        self, rows: Sequence[StepRow], grid: Grid, step_budget: int, longest: int | None
    ) -> tuple[list[StepRow], list[str]]:
        """Measure steps that compute a prompt beside sequences as long as it."""
        found: list[StepRow] = []
        left_out: list[str] = []
        # The middle of those that ran: beside the largest there may be no seat for one more request.
        measured = sorted({row.batch for row in rows if row.kind == "decode"})
        batch = measured[(len(measured) - 1) // 2] if measured else grid.middle_batch
        for context in sorted(set(grid.contexts)):
            key = ("decode", batch, context)
            alone = next((row.ms for row in rows if (row.kind, row.batch, row.context) == key), None)
            what = f"mixed, {context} tokens beside {batch}"
            if alone is None:
                left_out.append(f"{what}: its decode time is missing")
            elif context + batch > step_budget:
                left_out.append(f"{what}: more than a step of {step_budget}")
            else:
                ms = await self._mixed(batch, context, alone, grid, longest)
                if ms is None:
                    left_out.append(
                        f"{what}: the batch was not complete, or the server bundles tokens (--stream-interval) without "
                        "counting them"
                    )
                else:
                    found.append(StepRow("mixed", batch, context, context, ms))
                    self._say(f"{context} tokens beside {batch} sequences of {context}: {ms:8.2f} ms")
        return found, left_out

    async def _mixed(
        self, batch: int, context: int, alone_ms: float, grid: Grid, longest: int | None
    ) -> float | None:
        """Return the time of a step that computes a prompt beside a batch, ms."""
        length = max(context - grid.window, 1)
        prompts = [self._prompt(length) for _ in range(batch)]
        for prompt in prompts:
            await self._complete(prompt, 1)
        tokens = grid.window * (grid.repeats + 2) + batch // 4
        if longest is not None:
            tokens = min(tokens, longest - length)
        background = asyncio.gather(*(self._complete(prompt, tokens) for prompt in prompts))
        pauses: list[tuple[float, float]] = []
        try:
            # Until all of them decode.
            await asyncio.sleep((4 * _WARM_STEPS + batch // 4) * alone_ms / 1e3)
            for _ in range(grid.repeats):
                stream = await self._complete(self._prompt(context), 1)
                pauses.append((stream.sent, stream.progress()[0][0]))
                await asyncio.sleep(grid.window / 2 * alone_ms / 1e3)
        finally:
            streams = await background
        if any(stream.bundled for stream in streams):
            return None
        added = added_ms(streams, pauses)
        return None if added is None else alone_ms + added

    # -- requests -----------------------------------------------------------------------------------------
    def _prompt(self, tokens: int) -> list[int]:
        return [self._draw.randrange(self._vocabulary // 20, self._vocabulary) for _ in range(tokens)]

    async def _together(self, prompts: Sequence[list[int]], tokens: int) -> list[Stream]:
        cpu, wall = time.process_time(), time.perf_counter()
        streams = await asyncio.gather(*(self._complete(prompt, tokens) for prompt in prompts))
        self._busy = max(self._busy, (time.process_time() - cpu) / (time.perf_counter() - wall))
        return list(streams)

    async def _complete(self, prompt: list[int], tokens: int) -> Stream:
        """Send one request and read its stream to the end."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": tokens,
            "min_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        data = json.dumps(body).encode()
        self._sent += 1
        stream = Stream(time.perf_counter())
        async with self._request("POST", "/v1/completions", data) as response:
            async for chunk in response.content.iter_any():
                stream.reads.append((time.perf_counter(), chunk))
        try:
            progress = stream.progress()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProfilingError(
                f"{self._url} does not stream as OpenAI's API does: point --url at vLLM"
            ) from error
        if not progress or stream.output_tokens != tokens:
            raise ProfilingError(
                f"{self._url} answered {stream.output_tokens} tokens where {tokens} were asked for: the server must "
                "honour max_tokens, ignore_eos and stream_options.include_usage, as vLLM does"
            )
        if stream.prompt_tokens != len(prompt):
            raise ProfilingError(
                f"{self._url} counted {stream.prompt_tokens} tokens in a prompt of {len(prompt)}: it must take prompts "
                "as token ids, as vLLM does"
            )
        return stream

    def _request(self, method: str, path: str, data: bytes | None = None) -> _Answer:
        if self._session is None:
            raise RuntimeError("use the profiler as an async context manager")
        return _Answer(self._session, method, f"{self._url}{path}", data, self._model)

    async def _version(self) -> str:
        async with self._request("GET", "/v1/models") as response:
            listed = await _json(response)
        names = [str(entry.get("id")) for entry in listed.get("data", []) if isinstance(entry, dict)]
        if self._model not in names:
            raise ProfilingError(
                f"{self._url} serves {', '.join(names) or 'nothing'}, not {self._model}: name one of them"
            )
        try:
            async with self._request("GET", "/version") as response:
                version = str((await _json(response)).get("version", ""))
        except ProfilingError:
            return ""
        return f"vLLM {version}" if version else ""

    async def _max_model_len(self) -> int | None:
        async with self._request("GET", "/v1/models") as response:
            listed = await _json(response)
        for entry in listed.get("data", []):
            if entry.get("id") == self._model and entry.get("max_model_len"):
                return int(entry["max_model_len"])
        return None

    async def _kv_capacity(self) -> int | None:
        """Return blocks × block size from vLLM's metrics page; None where it does not say."""
        try:
            async with self._request("GET", "/metrics") as response:
                text = await response.text()
        except (ProfilingError, UnicodeDecodeError):
            return None
        for line in text.splitlines():
            if line.startswith("vllm:cache_config_info{"):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
                blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
                if blocks.isdigit() and size.isdigit():
                    return int(blocks) * int(size) or None
        return None


class _Answer:
    """A request whose failure is a :class:`ProfilingError` of one line."""

    def __init__(
        self, session: aiohttp.ClientSession, method: str, url: str, data: bytes | None, model: str
    ) -> None:
        self._session, self._method, self._url, self._data, self._model = session, method, url, data, model
        self._response: aiohttp.ClientResponse | None = None

    async def __aenter__(self) -> aiohttp.ClientResponse:
        headers = {"Content-Type": "application/json"} if self._data is not None else {}
        try:
            response = await self._session.request(self._method, self._url, data=self._data, headers=headers)
            if response.status >= 400:
                said = " ".join((await response.text())[:300].split())
                mend = {401: "give --api-key", 403: "give --api-key", 404: "check --url and --model"}
                raise ProfilingError(
                    f"{self._url} answered {response.status} ({said}): "
                    f"{mend.get(response.status, 'see the log of the server')}"
                )
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ProfilingError(
                f"{self._url} cannot be reached ({str(error) or type(error).__name__}): check --url, and that the "
                "engine is up"
            ) from error
        self._response = response
        return response

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._response is not None:
            self._response.close() if error is not None else self._response.release()
        if isinstance(error, aiohttp.ClientError | TimeoutError):
            raise ProfilingError(
                f"{self._url} broke off its answer ({str(error) or type(error).__name__}): see the log of the server"
            ) from error


async def _json(response: aiohttp.ClientResponse) -> dict[str, Any]:
    try:
        found = json.loads(await response.text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ProfilingError(f"{response.url} is not OpenAI's API: point --url at the base URL of vLLM")
    return found


def _beyond(
    batch: int, context: int, window: int, capacity: int | None, longest: int | None, seqs: int | None
) -> str:
    """Why a point cannot be measured; empty where it can."""
    if seqs is not None and batch > seqs:
        return f"more than max-num-seqs of {seqs}"
    reach = context + window + 4 * _WARM_STEPS + batch
    if longest is not None and reach > longest:
        return f"more than the maximum length of {longest}"
    if capacity is not None and batch * reach > 0.9 * capacity:
        return f"more than nine tenths of the KV cache of {capacity} tokens"
    return ""


def window_ms(streams: Sequence[Stream]) -> float | None:
    """Return the mean time of a step while every stream was decoding, ms; None where that was too short.

    Each stream's time per token in the common window; the median over the streams.
    """
    progress = [stream.progress() for stream in streams]
    if any(len(points) < 3 for points in progress):
        return None
    # The second chunk: the first one's step also computed prompts.
    begin = max(points[1][0] for points in progress)
    end = min(points[-2][0] for points in progress)
    found = []
    for points in progress:
        inside = [(at, tokens) for at, tokens in points if begin <= at <= end]
        if len(inside) < 2 or inside[-1][1] - inside[0][1] < _LEAST_STEPS:
            return None
        found.append(1e3 * (inside[-1][0] - inside[0][0]) / (inside[-1][1] - inside[0][1]))
    return median(found)


def added_ms(streams: Sequence[Stream], pauses: Sequence[tuple[float, float]]) -> float | None:
    """Return what a prompt adds to the steps of the streams beside it, ms; None where none was beside them all.

    A pause spans several steps. It is held against the pace of these very streams: what that differs by from decode steps
    measured before would count as the prompt's, several times. Of differences the median counts.

    Args:
        streams: Sequences that decode.
        pauses: When each prompt was sent and when its first token came, seconds.
    """
    progress = [stream.progress() for stream in streams]
    began = max(points[0][0] for points in progress)
    ended = min(points[-1][0] for points in progress)
    gaps = [
        1e3 * (later - earlier) / (many - few)
        for points in progress
        for (earlier, few), (later, many) in itertools.pairwise(points)
        if many > few
        and earlier >= began
        and not any(begin <= later and earlier <= end for begin, end in pauses)
    ]
    beside = [(begin, end) for begin, end in pauses if began < begin and end < ended]
    if not gaps or not beside:
        return None
    pace = median(gaps)
    found = [median(_longer_ms(points, begin, end, pace) for points in progress) for begin, end in beside]
    return max(median(found), 0.0)


def _longer_ms(points: Sequence[tuple[float, float]], begin: float, end: float, pace_ms: float) -> float:
    """Return how much longer a stream's tokens took around a prompt than at their pace, ms."""
    t0, n0 = [point for point in points if point[0] <= begin][-1]
    t1, n1 = next(point for point in points if point[0] >= end)
    return 1e3 * (t1 - t0) - (n1 - n0) * pace_ms
