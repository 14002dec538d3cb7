"""An open-loop client of a live endpoint that speaks OpenAI's API, for ``servingtiers bench``.

Open loop: a request is sent when its time has come, whether or not earlier ones have been answered, as users do. A
client that waits for answers slows down with the server and then measures a load that nobody sends.

The client measures itself, too: how late each request left it, and how much of a processor it took. A slow client
must not be taken for a slow server.

Prompts need no tokenizer. vLLM takes token ids, whose number is exact. Where an endpoint takes text only, prompts are
words, and two small requests find out how many tokens a word is.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import aiohttp

__all__ = ["BenchError", "Endpoint", "Failure", "OpenLoopClient", "Outcome", "Planned", "Usage"]

_WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "government", "number", "night", "point", "home",
    "water", "room", "mother", "area", "money", "story", "fact",
)  # fmt: skip
_PROBE_WORDS = (16, 144)
_WINDOW_SECONDS = 5.0


class BenchError(RuntimeError):
    """The endpoint cannot be measured; the message states the mend."""


class Failure(StrEnum):
    """Why a request is not counted as answered."""

    REFUSED = "refused"
    """An HTTP status other than 200."""
    BROKEN = "broken"
    """The answer began and ended early."""
    TIMED_OUT = "timedOut"
    UNREACHABLE = "unreachable"
    """No answer began: the connection was refused or lost."""
    NOT_SENT = "notSent"
    """More were in flight than the client may have, or the run was broken off."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to send."""

    at: float
    """Seconds after the start."""
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    """Tokens at the beginning of the prompt that are taken from one text that all requests share."""


@dataclass(slots=True)
class Outcome:
    """What came of one request. Times are seconds after the start of the run."""

    planned: Planned
    sent: float = math.nan
    first: float = math.nan
    """When the first token came."""
    last: float = math.nan
    """When the last token came."""
    gaps: list[float] = field(default_factory=list)
    """Pauses between reads that brought tokens, s: what a reader of the stream sees."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    """Both as the server counted them."""
    failure: Failure | None = None
    status: int = 0
    """HTTP status; 0 where no answer came."""
    detail: str = ""
    """What the server or the network said about a failure."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What the client found out before the run."""

    model: str
    server: str
    """Such as ``vLLM 0.32.0``; empty where it does not say."""
    max_model_len: int | None
    chat: bool
    token_ids: bool
    """Whether prompts are token ids, with exact lengths, or words."""
    fixed_lengths: bool
    """Whether the server honours ``ignore_eos`` and ``min_tokens``: answers are as long as planned."""
    tokens_per_word: float = 1.0
    tokens_around: float = 0.0
    """Tokens of an empty prompt: special tokens and, with chat, the template."""


@dataclass(frozen=True, slots=True)
class Usage:
    """How busy the client itself was, as shares of one processor."""

    mean: float
    peak: float
    """Of the busiest five seconds."""


class OpenLoopClient:
    """Sends planned requests at their times and reads every answer to its end.

    Args:
        url: Base URL of the server, with or without ``/v1``.
        model: Served model name; None where the server has only one.
        chat: Send chats instead of completions.
        token_ids: Send prompts as token ids; False for words.
        api_key: Sent as a bearer token.
        timeout: Of one request, seconds.
        max_in_flight: Requests that may be under way; what would be sent beyond is counted as not sent.
        vocabulary: Token ids are below this; the lowest twentieth holds special tokens and is left out.
        seed: Of the random prompts.
        progress: Called every few seconds with a line for a person.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        chat: bool = False,
        token_ids: bool = True,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_in_flight: int = 10_000,
        vocabulary: int = 20_000,
        seed: int = 0,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._chat = chat
        self._token_ids = token_ids and not chat
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout
        self._max_in_flight = max_in_flight
        self._ids = range(vocabulary // 20, vocabulary)
        self._draw = random.Random(seed)  # noqa: S311 - prompts of a measurement, no secret
        self._shared: list[Any] = []
        self._say = progress
        self._session: aiohttp.ClientSession | None = None
        self._endpoint: Endpoint | None = None
        self._start = 0.0
        self._tokens: Counter[int] = Counter()
        self._busy: list[float] = []
        self._usage = Usage(0.0, 0.0)
        self.interrupted = False
        """Whether the run was broken off."""

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=min(30.0, self._timeout)),
            headers=self._headers,
            # A line of a stream may be long: a chunk with many tokens' usage.
            read_bufsize=2**18,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def url(self) -> str:
        """Base URL, without ``/v1``."""
        return self._url

    # -- before -------------------------------------------------------------------------------------------

    async def look(self) -> Endpoint:
        """Find out what the endpoint serves and understands, with at most six small requests.

        Raises:
            BenchError: It is not there, does not serve the model, or does not stream as OpenAI's API does.
        """
        listed = await self._get("/v1/models")
        entries = [entry for entry in listed.get("data", []) if isinstance(entry, dict)]
        names = [str(entry.get("id")) for entry in entries]
        if self._model is None:
            if len(names) != 1:
                raise BenchError(f"{self._url} serves {', '.join(names) or 'nothing'}: name one with --model")
            self._model = names[0]
        if self._model not in names:
            raise BenchError(
                f"{self._url} serves {', '.join(names) or 'nothing'}, not {self._model}: name one of them"
            )
        longest = next((e.get("max_model_len") for e in entries if e.get("id") == self._model), None)
        try:
            version = str((await self._get("/version")).get("version", ""))
        except BenchError:  # only vLLM has that path
            version = ""
        self._endpoint = Endpoint(
            model=self._model,
            server=f"vLLM {version}" if version else "",
            max_model_len=int(longest) if longest else None,
            chat=self._chat,
            token_ids=self._token_ids,
            fixed_lengths=True,
        )
        self._endpoint = await self._understood(self._endpoint)
        return self._endpoint

    async def _understood(self, asked: Endpoint) -> Endpoint:
        """Return the endpoint with what it accepts: vLLM's own fields, and the tokens of words."""
        counts: list[int] = []
        found = asked
        for words in _PROBE_WORDS:
            answer = await self._probe(found, words)
            if answer.failure is Failure.REFUSED and answer.status in {400, 422} and found.fixed_lengths:
                # Another server than vLLM may know neither ignore_eos nor continuous usage.
                found = Endpoint(
                    found.model,
                    found.server,
                    found.max_model_len,
                    found.chat,
                    found.token_ids,
                    fixed_lengths=False,
                )
                answer = await self._probe(found, words)
            if answer.failure is not None:
                mend = {
                    401: "give --api-key",
                    403: "give --api-key",
                    404: "try --chat, and check --url and --model",
                }
                if answer.status in {400, 422}:
                    hint = "try --words or --chat, or lower --vocabulary where it says so"
                else:
                    hint = mend.get(answer.status, "see the log of the server")
                raise BenchError(
                    f"{self._url} did not answer a request of {words} tokens "
                    f"({answer.status or answer.failure}: {answer.detail}): {hint}"
                )
            counts.append(answer.prompt_tokens)
        if found.token_ids and counts != list(_PROBE_WORDS):
            raise BenchError(
                f"{self._url} counted {counts[-1]} tokens in a prompt of {_PROBE_WORDS[-1]} token ids: use --words"
            )
        if found.token_ids:
            return found
        if counts[0] < 1 or counts[1] <= counts[0]:
            raise BenchError(
                f"{self._url} does not count prompt tokens (stream_options.include_usage): it cannot be measured"
            )
        each = (counts[1] - counts[0]) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
        return Endpoint(
            *(
                found.model,
                found.server,
                found.max_model_len,
                found.chat,
                found.token_ids,
                found.fixed_lengths,
            ),
            tokens_per_word=each,
            tokens_around=counts[0] - each * _PROBE_WORDS[0],
        )

    async def _probe(self, endpoint: Endpoint, words: int) -> Outcome:
        self._start = time.perf_counter()
        outcome = Outcome(Planned(0.0, words, 2))
        await self._send(endpoint, outcome, self._body(endpoint, outcome.planned))
        return outcome

    async def _get(self, path: str) -> dict[str, Any]:
        if self._session is None:
            raise RuntimeError("use the client as an async context manager")
        url = self._url + path
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=30)) as response:
                text = await response.text()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            raise BenchError(
                f"{url} cannot be reached ({str(error) or type(error).__name__}): check --url, and that the server is up"
            ) from error
        if status != 200:
            mend = "give --api-key" if status in {401, 403} else "check --url"
            raise BenchError(f"{url} answered {status} ({' '.join(text[:200].split())}): {mend}")
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise BenchError(f"{url} is not OpenAI's API: point --url at the base URL of the server")
        return found

    # -- the run ------------------------------------------------------------------------------------------

    async def replay(self, planned: Sequence[Planned]) -> list[Outcome]:
        """Send all requests at their times and return what came of each, in the order given.

        When the task is cancelled, what is in flight is broken off and what was not sent yet is marked so.
        """
        endpoint = self._endpoint or await self.look()
        outcomes = [Outcome(each) for each in planned]
        self._start = time.perf_counter()
        self._tokens.clear()
        tasks: set[asyncio.Task[None]] = set()
        watch = asyncio.create_task(self._watch(outcomes, tasks))
        cpu = time.process_time()
        try:
            await self._dispatch(endpoint, outcomes, tasks)
            while tasks:
                await asyncio.wait(set(tasks))
        except asyncio.CancelledError:
            self.interrupted = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for outcome in outcomes:
                if math.isnan(outcome.sent):
                    outcome.failure, outcome.detail = Failure.NOT_SENT, "the run was broken off"
        finally:
            watch.cancel()
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        mean = (time.process_time() - cpu) / elapsed
        self._usage = Usage(mean, max([*self._busy, mean]))
        return outcomes

    @property
    def usage(self) -> Usage:
        """How busy the client was in the last run."""
        return self._usage

    def tokens_between(self, start: float, end: float) -> float:
        """Return the output tokens that came in a stretch of the run, seconds after its start; by whole tenths."""
        first, last = round(10 * start), round(10 * end)
        return float(sum(count for tenth, count in self._tokens.items() if first <= tenth < last))

    async def _dispatch(
        self, endpoint: Endpoint, outcomes: Iterable[Outcome], tasks: set[asyncio.Task[None]]
    ) -> None:
        for outcome in outcomes:
            # The body is made before its time, so that making it makes nothing late.
            body = self._body(endpoint, outcome.planned)
            await asyncio.sleep(outcome.planned.at - (time.perf_counter() - self._start))
            if len(tasks) >= self._max_in_flight:
                outcome.failure = Failure.NOT_SENT
                outcome.detail = f"{len(tasks)} were in flight (--max-in-flight)"
                continue
            task = asyncio.create_task(self._send(endpoint, outcome, body))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _watch(self, outcomes: Sequence[Outcome], tasks: set[asyncio.Task[None]]) -> None:
        """Measure the client and tell how far it is."""
        said = time.perf_counter()
        while True:
            cpu, wall = time.process_time(), time.perf_counter()
            await asyncio.sleep(_WINDOW_SECONDS)
            now = time.perf_counter()
            self._busy.append((time.process_time() - cpu) / (now - wall))
            if now - said >= 2 * _WINDOW_SECONDS:
                said = now
                sent = sum(not math.isnan(each.sent) for each in outcomes)
                failed = sum(each.failure is not None for each in outcomes)
                self._say(
                    f"{now - self._start:6.0f} s: {sent} of {len(outcomes)} sent, {len(tasks)} in flight, {failed} failed"
                )

    # -- a request ----------------------------------------------------------------------------------------

    def _some(self, of: Sequence[Any], count: int) -> list[Any]:
        return self._draw.choices(of, k=count)

    def _body(self, endpoint: Endpoint, planned: Planned) -> bytes:
        body: dict[str, Any] = {
            "model": endpoint.model,
            "max_tokens": planned.output_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if endpoint.fixed_lengths:
            body |= {"ignore_eos": True, "min_tokens": planned.output_tokens}
            body["stream_options"]["continuous_usage_stats"] = True
        if endpoint.token_ids:
            prompt: Any = self._mixed(self._ids, planned.prompt_tokens, planned.shared_tokens)
        else:
            per, around = endpoint.tokens_per_word, endpoint.tokens_around
            count = max(round((planned.prompt_tokens - around) / per), 1)
            prompt = " ".join(self._mixed(_WORDS, count, round(planned.shared_tokens / per)))
        if endpoint.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        return json.dumps(body, separators=(",", ":")).encode()

    def _mixed(self, of: Sequence[Any], count: int, shared: int) -> list[Any]:
        """Return ``count`` random items of which the first ``shared`` are those of every request."""
        shared = min(shared, count)
        while len(self._shared) < shared:
            self._shared += self._some(of, 4096)
        return [*self._shared[:shared], *self._some(of, count - shared)]

    async def _send(self, endpoint: Endpoint, outcome: Outcome, body: bytes) -> None:
        if self._session is None:
            raise RuntimeError("use the client as an async context manager")
        path = "/v1/chat/completions" if endpoint.chat else "/v1/completions"
        outcome.sent = time.perf_counter() - self._start
        try:
            async with self._session.post(
                self._url + path, data=body, headers={"Content-Type": "application/json"}
            ) as response:
                outcome.status = response.status
                if response.status != 200:
                    outcome.failure = Failure.REFUSED
                    outcome.detail = " ".join((await response.text())[:300].split())
                    return
                ended = await self._read(response, outcome)
            if not ended and outcome.failure is None:
                outcome.failure = Failure.BROKEN
                outcome.detail = "the stream ended without its last line"
        except TimeoutError:
            outcome.failure, outcome.detail = Failure.TIMED_OUT, f"no whole answer in {self._timeout:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            began = outcome.status == 200
            outcome.failure = Failure.BROKEN if began else Failure.UNREACHABLE
            outcome.detail = f"{type(error).__name__}: {error}"[:300]
        except asyncio.CancelledError:
            outcome.failure, outcome.detail = Failure.TIMED_OUT, "the run was broken off"
            raise
        except Exception as error:  # noqa: BLE001 - an answer that nobody foresaw is a failure, too, and has to be named
            outcome.failure, outcome.detail = Failure.BROKEN, f"{type(error).__name__}: {error}"[:300]

    async def _read(self, response: aiohttp.ClientResponse, outcome: Outcome) -> bool:
        """Read a stream to its end; return whether it ended as it should."""
        rest = b""
        counted = 0
        async for data in response.content.iter_any():
            now = time.perf_counter() - self._start
            *events, rest = (rest + data).split(b"\n\n")
            came = 0
            for event in events:
                text = event.strip()
                if not text.startswith(b"data:"):
                    continue
                if text.endswith(b"[DONE]"):
                    self._count(outcome, now, came)
                    return True
                document = json.loads(text[5:])
                if document.get("error"):
                    told = document["error"]
                    outcome.failure = Failure.BROKEN
                    outcome.detail = str(told.get("message", told) if isinstance(told, dict) else told)[:300]
                    return False
                usage = document.get("usage")
                choices = document.get("choices")
                if usage:
                    outcome.prompt_tokens = int(usage.get("prompt_tokens") or 0)
                    total = int(usage.get("completion_tokens") or 0)
                    outcome.output_tokens = total
                    # The last chunk has usage and no choice. Where chunks had no count of their own, it tells of
                    # tokens that shared a chunk.
                    came += max(total - counted, 0)
                    counted = total
                elif choices and _brings_a_token(choices[0]):
                    # Routers may drop the wish for running usage: a chunk then counts as one token.
                    came += 1
                    counted += 1
            self._count(outcome, now, came)
        return False

    def _count(self, outcome: Outcome, now: float, came: int) -> None:
        """Book tokens that came in one read."""
        if came <= 0:
            return
        self._tokens[int(10 * now)] += came
        if math.isnan(outcome.first):
            outcome.first = now
        else:
            outcome.gaps.append(now - outcome.last)
        outcome.last = now


def _brings_a_token(choice: dict[str, Any]) -> bool:
    """Return whether a chunk brings a token; its text may be empty: half a character, or one that is not printed."""
    if "delta" not in choice:
        return "text" in choice
    delta = choice["delta"] or {}
    # A chat begins with a chunk that says who speaks, and nothing else.
    return "role" not in delta or bool(delta.get("content"))
