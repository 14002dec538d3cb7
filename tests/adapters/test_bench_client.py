"""The open-loop client against engines whose step times are known, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from dataclasses import dataclass, replace

import pytest
from aiohttp import web

from servingtiers.adapters.bench_client import BenchError, Endpoint, Failure, OpenLoopClient, Planned
from servingtiers.lab.engines import EngineConfig, SimulatedEngine

# Of this process alone: several test runs may share a machine.
ADDRESSES = (f"127.{63 + os.getpid() % 100}.{os.getpid() // 100 % 256}.{host}" for host in itertools.count(1))


@dataclass(frozen=True)
class KnownSteps:
    """20 ms a step and 0.1 ms for each new prompt token."""

    kv_capacity_tokens: int = 100_000

    def step_ms(self, prompt_tokens, prompt_past_tokens, decoding, kv_tokens):
        return 20.0 + 0.1 * prompt_tokens


BASE = EngineConfig(model="m", served_names=("m",), steps=KnownSteps(), port=18083, stream_interval=1)


def engine(**changes) -> SimulatedEngine:
    return SimulatedEngine(replace(BASE, **changes), address=next(ADDRESSES))


def every(seconds: float, count: int, *, prompt: int = 100, output: int = 11) -> list[Planned]:
    return [Planned(seconds * number, prompt, output) for number in range(count)]


async def replay(url: str, planned, **options):
    async with OpenLoopClient(url, **options) as client:
        endpoint = await client.look()
        return endpoint, await client.replay(planned), client


async def test_latencies_are_those_of_the_engine():
    async with engine() as to:
        endpoint, outcomes, client = await replay(to.url, every(0.3, 6))
    assert (endpoint.model, endpoint.token_ids, endpoint.fixed_lengths) == ("m", True, True)
    assert endpoint.server.startswith("vLLM ")
    assert [each.failure for each in outcomes] == [None] * 6
    assert [(each.prompt_tokens, each.output_tokens) for each in outcomes] == [(100, 11)] * 6
    # The fastest of six: a busy machine adds to any one, and nothing makes one faster than its steps.
    assert 0.030 <= min(each.first - each.sent for each in outcomes) <= 0.080
    first_to_last = [each.last - each.first for each in outcomes]
    # A read that came late takes from the answer's length: the engine did not wait.
    assert 0.018 <= sorted(first_to_last)[3] / 10 <= 0.032
    assert [len(each.gaps) for each in outcomes if len(each.gaps) > 10] == []
    assert client.tokens_between(0.0, 10.0) == 66
    assert 0 < client.usage.mean <= client.usage.peak


async def test_arrivals_do_not_wait_for_answers():
    """One at a time takes the engine 0.25 s; ten arrive in half a second, so the last waits for two."""
    async with engine(max_num_seqs=1) as to:
        _, outcomes, _ = await replay(to.url, every(0.05, 10))
    assert all(each.failure is None for each in outcomes)
    # The last one had left when the fourth was answered; a client that waits would send it after the ninth.
    assert outcomes[-1].sent < outcomes[3].last
    waits = [each.first - each.sent for each in outcomes]
    assert waits[-1] > 1.5
    assert waits == sorted(waits)


async def test_what_is_refused_in_the_middle_is_counted_by_its_status():
    async with engine() as to, OpenLoopClient(to.url) as client:
        await client.look()
        running = asyncio.create_task(client.replay(every(0.1, 10, output=2)))
        await asyncio.sleep(0.45)
        to.faults.answer_status = 503
        outcomes = await running
    refused = [each for each in outcomes if each.failure is Failure.REFUSED]
    assert 3 <= len(refused) <= 7
    assert {each.status for each in refused} == {503}
    assert all(each.failure is None for each in outcomes[:3])


async def test_an_answer_that_takes_too_long_and_one_that_finds_no_seat_are_failures():
    async with engine(max_num_seqs=1) as to:
        _, slow, _ = await replay(to.url, every(0.0, 3, output=20), timeout=0.7)
        _, seated, _ = await replay(to.url, every(0.01, 4, output=20), max_in_flight=2)
    assert [each.failure for each in slow] == [None, Failure.TIMED_OUT, Failure.TIMED_OUT]
    assert [each.failure for each in seated] == [None, None, Failure.NOT_SENT, Failure.NOT_SENT]


async def test_a_run_that_is_broken_off_keeps_what_it_has():
    async with engine() as to, OpenLoopClient(to.url) as client:
        await client.look()
        running = asyncio.create_task(client.replay(every(0.2, 50, output=2)))
        await asyncio.sleep(1.1)
        running.cancel()
        outcomes = await running
    assert client.interrupted
    assert sum(each.failure is None for each in outcomes) >= 3
    assert outcomes[-1].failure is Failure.NOT_SENT


async def test_tokens_without_a_count_and_without_text_are_counted(serve_completions):
    """vllm-router drops the wish for running usage, and a token may be half a character: a chunk with no text."""
    url = await serve_completions(["", "", ""], 5)
    async with OpenLoopClient(url, "m") as client:
        client._endpoint = Endpoint("m", "", None, chat=False, token_ids=True, fixed_lengths=True)
        (outcome,) = await client.replay(every(0, 1, output=5))
    assert outcome.failure is None
    assert outcome.output_tokens == 5
    assert outcome.sent < outcome.first < outcome.last
    assert client.tokens_between(0, 10) == 5  # those that shared a chunk, too


# --- servers that are not vLLM ----------------------------------------------------------------------------------


class Server:
    """A minimal chat server: two tokens a word and seven around them; refuses fields that OpenAI does not have."""

    def __init__(self, *, cut: bool = False, counts: bool = True):
        self.cut, self.counts, self.nonsense = cut, counts, ""
        self.bodies: list[dict] = []

    async def models(self, request):
        return web.json_response({"data": [{"id": "other"}, {"id": "plain"}]})

    async def answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        if "ignore_eos" in body:
            return web.json_response({"error": {"message": "unknown field ignore_eos"}}, status=400)
        words = len(body["messages"][0]["content"].split())
        response = web.StreamResponse()
        await response.prepare(request)
        if self.nonsense:
            await response.write(f"data: {self.nonsense}\n\n".encode())
        for number in range(body["max_tokens"]):
            chunk = {"choices": [{"delta": {"content": "a "}}]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            if self.cut and number == 3:
                return response
            await asyncio.sleep(0.005)
        usage = {"prompt_tokens": 2 * words + 7, "completion_tokens": body["max_tokens"]}
        last = {"choices": [], **({"usage": usage} if self.counts else {})}
        await response.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())
        return response


@pytest.fixture
async def serve_completions():
    runners = []

    async def start(texts: list[str], tokens: int) -> str:
        async def answer(request):
            response = web.StreamResponse()
            await response.prepare(request)
            for text in texts:
                await response.write(f"data: {json.dumps({'choices': [{'text': text}]})}\n\n".encode())
                await asyncio.sleep(0.02)
            usage = {"prompt_tokens": 100, "completion_tokens": tokens}
            last = json.dumps({"choices": [], "usage": usage})
            await response.write(f"data: {last}\n\ndata: [DONE]\n\n".encode())
            return response

        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        runners.append(runner)
        address = next(ADDRESSES)
        await web.TCPSite(runner, address, 18084).start()
        return f"http://{address}:18084"

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def serve():
    runners = []

    async def start(server: Server) -> str:
        app = web.Application()
        app.router.add_get("/v1/models", server.models)
        app.router.add_post("/v1/chat/completions", server.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        runners.append(runner)
        address = next(ADDRESSES)
        await web.TCPSite(runner, address, 18084).start()
        return f"http://{address}:18084/v1"

    yield start
    for runner in runners:
        await runner.cleanup()


async def test_words_come_to_the_tokens_that_were_planned_without_a_tokenizer(serve):
    server = Server()
    planned = every(0.02, 3, prompt=107, output=5)
    endpoint, outcomes, _ = await replay(await serve(server), planned, model="plain", chat=True)
    assert (endpoint.tokens_per_word, endpoint.tokens_around, endpoint.fixed_lengths) == (2.0, 7.0, False)
    assert [(each.prompt_tokens, each.output_tokens) for each in outcomes] == [(107, 5)] * 3
    assert len(server.bodies[-1]["messages"][0]["content"].split()) == 50
    # No two prompts are alike, or a prefix cache would answer.
    assert len({body["messages"][0]["content"] for body in server.bodies}) == len(server.bodies)


async def test_a_stream_that_ends_early_is_broken(serve):
    server = Server()
    url = await serve(server)
    async with OpenLoopClient(url, "plain", chat=True) as client:
        await client.look()
        server.cut = True
        (outcome,) = await client.replay(every(0, 1, output=20))
    assert outcome.failure is Failure.BROKEN
    assert outcome.output_tokens == 0  # the server never counted them


@pytest.mark.parametrize(
    "line", ["[1]", "{not json", '{"choices": 5}', '{"choices": [{"text": "a"}], "usage": 7}']
)
async def test_an_answer_that_is_not_of_the_api_is_a_failure_with_its_reason(serve, line):
    """Whatever comes, no request is lost from the count."""
    server = Server()
    url = await serve(server)
    async with OpenLoopClient(url, "plain", chat=True) as client:
        await client.look()
        server.nonsense = line
        (outcome,) = await client.replay(every(0, 1))
    assert outcome.failure is Failure.BROKEN
    assert outcome.detail


async def test_requests_of_a_common_text_share_their_beginning():
    seen = []

    async def answer(request):
        seen.append((await request.json())["prompt"])
        return web.json_response({}, status=503)

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    address = next(ADDRESSES)
    await web.TCPSite(runner, address, 18084).start()
    async with OpenLoopClient(f"http://{address}:18084", "m") as client:
        client._endpoint = Endpoint("m", "", None, chat=False, token_ids=True, fixed_lengths=True)
        await client.replay([Planned(0, 60, 1, shared) for shared in (0, 40, 40, 80)])
    await runner.cleanup()
    by_shared = sorted(seen, key=len)
    assert {len(prompt) for prompt in by_shared} == {60}
    common = [prompt for prompt in seen if sum(p[:40] == prompt[:40] for p in seen) == 3]
    assert len(common) == 3
    assert all(seen[i][40:] != seen[j][40:] for i, j in itertools.combinations(range(4), 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name one with --model"),
        ({"model": "third"}, "serves other, plain, not third"),
        ({"model": "plain"}, "try --chat"),
        ({"model": "plain", "chat": True, "counts": False}, "does not count prompt tokens"),
    ],
)
async def test_what_cannot_be_measured_is_said_with_its_mend(serve, options, message):
    server = Server(counts=options.pop("counts", True))
    async with OpenLoopClient(await serve(server), **options) as client:
        with pytest.raises(BenchError, match=message):
            await client.look()


async def test_an_address_without_a_server_is_said_so():
    async with OpenLoopClient(f"http://{next(ADDRESSES)}:18085") as client:
        with pytest.raises(BenchError, match="check --url"):
            await client.look()
