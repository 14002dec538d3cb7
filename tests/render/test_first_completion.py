"""The program of the startup probe, run as the kubelet runs it, against engines that answer, refuse, hang and die."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from dataclasses import dataclass

import pytest
from aiohttp import web

from servingtiers.lab.engines import EngineConfig, SimulatedEngine
from servingtiers.render import pod_template
from servingtiers.render.engine import FIRST_COMPLETION

PORTS = itertools.count(20_000 + os.getpid() % 10_000)


def _command(case):
    pool = case.settings.pools[0]
    (container,) = pod_template(case.tier, case.settings, pool, case.config)["spec"]["containers"]
    return container["startupProbe"]["exec"]["command"]


async def probe(name: str, port: int, *, seconds: float = 5.0, env: dict[str, str] | None = None):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", FIRST_COMPLETION, name, str(port), str(seconds)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **(env or {})},
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


@pytest.fixture
async def serve():
    runners = []

    async def start(answer) -> int:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        port = next(PORTS)
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return port

    yield start
    for runner in runners:
        await runner.cleanup()


@dataclass(frozen=True)
class Steps:
    kv_capacity_tokens: int = 10_000

    def step_ms(self, prompt_tokens, prompt_past_tokens, decoding, kv_tokens):
        return 5.0


async def test_an_engine_that_answers_has_started():
    port = next(PORTS)
    async with SimulatedEngine(EngineConfig("m", ("m",), Steps(), port=port), address="127.0.0.1"):
        assert await probe("m", port) == (0, "")
        code, said = await probe("other", port)  # an engine that serves something else has not
    assert code == 1
    assert "404" in said


async def test_one_that_does_not_listen_yet_refuses_hangs_or_dies_at_the_request_has_not(serve):
    async def refuse(request):
        return web.json_response({"error": "cannot schedule"}, status=500)

    async def hang(request):
        await asyncio.sleep(30)

    async def die(request):
        request.transport.abort()
        return web.Response()

    async def nonsense(request):
        return web.Response(text="<html>")

    async def empty(request):
        return web.json_response({"choices": []})

    said = {"silent": await probe("m", next(PORTS))}
    for answer in (refuse, hang, die, nonsense, empty):
        said[answer.__name__] = await probe("m", await serve(answer), seconds=1.0)
    assert {name: code for name, (code, _) in said.items()} == dict.fromkeys(said, 1)
    assert "ConnectionRefused" in said["silent"][1]
    assert "500: " in said["refuse"][1]
    # One line each: it becomes an event.
    assert {text.count("\n") for _, text in said.values()} == {1}


async def test_it_asks_for_two_tokens_with_the_key_that_the_engine_has(serve):
    seen = []

    async def answer(request):
        seen.append((request.headers["Authorization"], await request.json()))
        return web.json_response({"choices": [{"text": "a"}]})

    port = await serve(answer)
    name = 'a "quoted" $(name) \' with `marks`'
    assert (await probe(name, port, env={"VLLM_API_KEY": "k"}))[0] == 0
    ((authorization, body),) = seen
    assert authorization == "Bearer k"
    # Two: one step for the prompt and one that decodes.
    assert (body["model"], body["max_tokens"]) == (name, 2)


def test_every_engine_has_it_and_a_custom_resource_only_gives_arguments(scenario):
    command = _command(scenario)
    assert command[:5] == ["python3", "-I", "-S", "-c", FIRST_COMPLETION]
    assert command[5:] == [scenario.settings.served_name.replace("$", "$$"), "8000", "30"]
    assert "$" not in FIRST_COMPLETION  # Kubernetes would expand it
