"""A profile made over HTTP of an engine whose step times are known."""

from __future__ import annotations

import asyncio
import itertools
import os
from dataclasses import dataclass, replace

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.adapters.profiler import EngineProfiler, Grid, ProfilingError, Stream, added_ms, window_ms
from servingtiers.cli.profile import profile_csv
from servingtiers.lab.engines import EngineConfig, SimulatedEngine
from servingtiers.performance.profile import parse_profile

# Of this process alone: several test runs may share a machine.
ADDRESSES = (f"127.{61 + os.getpid() % 100}.{os.getpid() // 100 % 256}.{host}" for host in itertools.count(1))


@dataclass(frozen=True)
class KnownSteps:
    """12 ms, 0.5 ms a sequence, 2 µs a KV token and 0.05 ms for each new prompt token."""

    kv_capacity_tokens: int = 100_000

    def step_ms(self, prompt_tokens, prompt_past_tokens, decoding, kv_tokens):
        return 12.0 + 0.5 * decoding + 2e-3 * kv_tokens + 0.05 * prompt_tokens


STEPS = KnownSteps()
BASE = EngineConfig(model="m", served_names=("m",), steps=STEPS, port=18081, stream_interval=1)
GRID = Grid(batches=(1, 4, 8), contexts=(256, 512), prompts=(128, 1024), window=16, repeats=2)


def engine(**changes) -> SimulatedEngine:
    return SimulatedEngine(replace(BASE, **changes), address=next(ADDRESSES))


async def measure(to: SimulatedEngine, grid: Grid = GRID, **options):
    async with EngineProfiler(to.url, "m", timeout=60) as profiler:
        return await profiler.measure(grid, **options)


@pytest.mark.long(20)
@pytest.mark.parametrize("interval", [1, 8])
async def test_known_step_times_are_recovered(interval):
    """Also where the server bundles eight tokens in a chunk and does not count them."""
    async with engine(stream_interval=interval) as to:
        measured = await measure(to)
    kinds = {row.kind for row in measured.rows}
    assert kinds == ({"decode", "prefill", "mixed"} if interval == 1 else {"decode", "prefill"})
    assert interval == 1 or any("bundles tokens" in reason for reason in measured.left_out)
    assert measured.kv_capacity_tokens == 100_000
    for row in measured.rows:
        expected = STEPS.step_ms(row.new_tokens, 0, row.batch, row.batch * row.context)
        # Up: the machine's timers; down: what of the client's time was subtracted too much.
        assert row.ms == pytest.approx(expected, rel=0.15, abs=3.0), row
    decode = [row for row in measured.rows if row.kind == "decode"]
    assert [(row.batch, row.context) for row in decode] == [
        (b, c) for c in GRID.contexts for b in GRID.batches
    ]
    assert measured.requests <= GRID.requests


async def test_the_file_that_is_written_is_a_profile():
    async with engine() as to:
        measured = await measure(to, replace(GRID, batches=(1, 2), mixed=False))
    profile = parse_profile("p.csv", profile_csv(measured, "m").splitlines())
    assert profile.rows == tuple(replace(row, ms=round(row.ms, 3)) for row in measured.rows)
    assert profile.kv_capacity_tokens == 100_000
    assert profile.engine.startswith("vLLM 0.")


@pytest.mark.long(16)
async def test_what_the_engine_cannot_do_is_left_out_with_its_reason():
    small = KnownSteps(kv_capacity_tokens=8_000)
    async with engine(steps=small, max_num_seqs=4, max_model_len=2048) as to:
        measured = await measure(
            to,
            Grid((1, 2, 8), (256, 512, 4096), (128, 512, 1024), mixed=False, window=16, repeats=1),
            step_budget=600,
        )
    reasons = "\n".join(measured.left_out)
    assert "decode, batch 8, context 256: the engine did not run all at once" in reasons
    assert "context 4096: more than the maximum length of 2048" in reasons
    assert "prefill, 1024 tokens: more than a step of 600" in reasons
    assert {row.batch for row in measured.rows if row.kind == "decode"} == {1, 2}


async def test_a_batch_that_the_cache_cannot_hold_is_not_tried():
    async with engine(steps=KnownSteps(kv_capacity_tokens=3_000)) as to:
        measured = await measure(to, Grid((1, 8), (256, 512), (128, 256), mixed=False, window=8, repeats=1))
    assert any("nine tenths of the KV cache of" in reason for reason in measured.left_out)


@pytest.mark.parametrize("url", ["http://127.61.2.1:9", "nonsense", "http://[::1"])
async def test_an_endpoint_out_of_reach_is_told_in_one_line(url):
    with pytest.raises(ProfilingError, match="check --url"):
        async with EngineProfiler(url, "m") as profiler:
            await profiler.measure(GRID)


async def test_a_model_that_is_not_served_is_told_with_those_that_are():
    async with engine() as to:
        with pytest.raises(ProfilingError, match="serves m, not other"):
            async with EngineProfiler(to.url, "other") as profiler:
                await profiler.measure(GRID)


async def test_a_server_that_refuses_is_quoted():
    async with engine() as to:
        to.faults.answer_status = 500
        with pytest.raises(ProfilingError, match="answered 500"):
            await measure(to)


@pytest.mark.parametrize(
    "answer",
    [
        b"data: nonsense\n\n",
        b'data: {"choices": [{"text": "x"}]}\n\ndata: [DONE]\n\n',
        b"<html>hello</html>",
        b"",
    ],
)
async def test_a_server_that_is_not_vllm_is_refused(answer):
    async def complete(_: web.Request) -> web.Response:
        return web.Response(body=answer)

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/v1/models", models)
    runner = web.AppRunner(app)
    await runner.setup()
    address = next(ADDRESSES)
    await web.TCPSite(runner, address, 18081).start()
    try:
        with pytest.raises(ProfilingError):
            async with EngineProfiler(f"http://{address}:18081", "m") as profiler:
                await profiler.measure(GRID)
    finally:
        await runner.cleanup()


def _stream(times: list[float], *, counted: bool, each: int = 1) -> Stream:
    stream = Stream(0.0)
    for number, at in enumerate(times):
        tokens = 1 + number * each
        usage = f', "usage": {{"completion_tokens": {tokens}}}' if counted else ""
        stream.reads.append((at, f'data: {{"choices": [{{"text": "x"}}]{usage}}}\n\n'.encode()))
    last = 1 + (len(times) - 1) * each
    stream.reads.append(
        (times[-1], f'data: {{"choices": [], "usage": {{"completion_tokens": {last}}}}}\n\n'.encode())
    )
    return stream


@given(
    st.floats(1.0, 100.0),
    st.integers(16, 60),
    st.lists(st.floats(0.0, 0.2), min_size=1, max_size=6),
    st.booleans(),
)
def test_the_time_of_even_steps_is_found_whenever_the_streams_began(ms, steps, starts, counted):
    streams = [_stream([at + ms / 1e3 * (1 + k) for k in range(steps)], counted=counted) for at in starts]
    found = window_ms(streams)
    late = (max(starts) - min(starts)) * 1e3 / ms
    if found is None:
        assert late > steps - 16
    else:
        assert found == pytest.approx(ms, rel=1e-6)


@pytest.mark.parametrize("pace", [9.0, 13.5])
def test_what_a_prompt_adds_is_found_at_any_pace(pace):
    """Held against another pace than the streams' own it would be off once for each of the steps around the prompt."""
    lasts = [pace] * 80
    for mixed, disturbed in ((20, 0.0), (40, 25.0), (60, 0.0)):
        lasts[mixed] += 17.0 + disturbed
    times = [each / 1e3 for each in itertools.accumulate(lasts)]
    # Sent in the step before, answered while the next one runs.
    pauses = [(times[mixed - 1] - 0.002, times[mixed] + 0.002) for mixed in (20, 40, 60)]

    assert added_ms([_stream(times, counted=True)] * 2, pauses) == pytest.approx(17.0)
    assert added_ms([_stream(times[:10], counted=True)], pauses) is None


def test_an_error_inside_a_stream_is_told():
    body = b'data: {"error": {"message": "Token id 495 is out of vocabulary", "code": 400}}\n\n'
    with pytest.raises(ProfilingError, match=r"out of vocabulary.*lower --vocabulary"):
        Stream(0.0, [(0.1, body)]).progress()


def test_bytes_cut_anywhere_are_the_same_stream():
    whole = _stream([0.1, 0.2, 0.3], counted=True)
    data = b"".join(chunk for _, chunk in whole.reads)
    for cut in range(len(data)):
        split = Stream(0.0, [(0.1, data[:cut]), (0.2, data[cut:])])
        assert max(tokens for _, tokens in split.progress()) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"batches": (1,)},
        {"contexts": (512,)},
        {"prompts": ()},
        {"batches": (0, 1)},
        {"contexts": (8, 512)},
        {"window": 1},
    ],
)
def test_a_grid_that_makes_no_profile_is_refused(wrong):
    with pytest.raises(ValueError, match=r"give|use|measure"):
        Grid(**wrong)


def test_it_needs_its_context():
    with pytest.raises(RuntimeError, match="context manager"):
        asyncio.run(EngineProfiler("http://127.0.0.1:9", "m").measure(GRID))
