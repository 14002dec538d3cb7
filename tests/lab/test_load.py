"""Traces and their replay."""

from __future__ import annotations

import asyncio
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.lab.engines import EngineConfig, SimulatedEngine
from servingtiers.lab.load import (
    LoadGenerator,
    TraceRequest,
    azure_conversation,
    percentile,
    poisson,
    read_trace,
    shape_trace,
    summarize,
)
from servingtiers.lab.processes import free_port

SAMPLE = azure_conversation()[::20]


class QuickSteps:
    """Steps of 5 ms."""

    kv_capacity_tokens = 1_000_000

    def step_ms(self, prompt_tokens, prompt_past_tokens, decoding, kv_tokens):
        """Return 5 ms."""
        return 5.0


def engine(**changes) -> SimulatedEngine:
    """Return an engine on a free port."""
    config = EngineConfig(model="m", served_names=("m",), steps=QuickSteps(), port=free_port(), **changes)
    return SimulatedEngine(config)


def test_the_shipped_trace_is_the_published_hour():
    """19,366 requests, 5.5 a second, as the dataset's page says."""
    trace = azure_conversation()
    assert len(trace) == 19366
    assert trace[0].at == 0.0
    assert trace == sorted(trace, key=lambda one: one.at)
    assert len(trace) / trace[-1].at == pytest.approx(5.5, abs=0.1)
    assert statistics.fmean(one.prompt_tokens for one in trace) == pytest.approx(1154.7, abs=0.1)
    assert statistics.fmean(one.output_tokens for one in trace) == pytest.approx(211.1, abs=0.1)


def test_a_file_of_another_format_is_refused_with_the_mend(tmp_path):
    """The message names the header it wants."""
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="first line must be TIMESTAMP,ContextTokens,GeneratedTokens"):
        read_trace(tmp_path / "other.csv")


@given(
    begin=st.floats(0, 3000),
    duration=st.floats(1, 3600),
    compress=st.floats(1, 60),
    keep=st.floats(0, 1),
    cap=st.integers(1, 4000),
)
def test_shaping_keeps_order_bounds_and_the_share_it_was_told(begin, duration, compress, keep, cap):
    """Whatever the cut, no request is outside of it, and thinning is repeatable."""
    options = {
        "begin": begin,
        "duration": duration,
        "compress": compress,
        "max_prompt": cap,
        "max_output": cap,
    }
    whole = shape_trace(SAMPLE, **options)
    thinned = shape_trace(SAMPLE, keep=keep, **options)
    assert thinned == shape_trace(SAMPLE, keep=keep, **options)
    assert set(thinned) <= set(whole)
    assert abs(len(thinned) - keep * len(whole)) <= 4 * (len(whole) * keep * (1 - keep)) ** 0.5 + 4
    assert all(0 <= one.at < duration / compress + 1e-9 for one in whole)
    assert all(one.prompt_tokens <= cap and 1 <= one.output_tokens <= cap for one in whole)


def test_percentiles_are_nearest_rank():
    """A p99 of a hundred values is the 99th, of few values the largest."""
    assert percentile(range(1, 101), 99) == 99
    assert percentile([3.0, 1.0], 99) == 3.0
    assert percentile([], 50) is None


async def test_a_replay_measures_what_the_engine_says_of_itself():
    """Client and engine agree on count, tokens and latency."""
    async with engine(stream_interval=1) as to, LoadGenerator(to.url, model="m") as generator:
        records = await generator.replay(poisson(40.0, 1.5, prompt_tokens=50, output_tokens=20))
        ttft = to.metrics.ttft
        assert len(records) == sum(ttft.counts) == to.metrics.success["length"].value
        measured = statistics.fmean(record.ttft for record in records if record.ttft is not None)
        assert measured == pytest.approx(ttft.sum / len(records), abs=0.02)
        assert statistics.fmean(record.tpot for record in records) == pytest.approx(0.005, abs=0.002)
    summary = summarize(records)
    assert summary["ok"] == summary["requests"] == len(records)
    assert {record.output_tokens for record in records} == {20}
    assert to.metrics.prefix_hits.value == 0, "prompts must not be alike unless asked for"


async def test_a_shared_prefix_is_found_by_the_prefix_cache():
    """What all prompts have in common is cached after the first."""
    trace = [TraceRequest(0.2 * number, 200, 2) for number in range(4)]
    async with engine() as to, LoadGenerator(to.url, model="m", shared_prefix_tokens=160) as generator:
        await generator.replay(trace)
        assert to.metrics.prefix_hits.value == 3 * 160


async def test_load_is_open_loop_and_lateness_counts_against_the_server():
    """A server that is slow gets the next request all the same."""
    async with engine(max_num_seqs=1) as to, LoadGenerator(to.url, model="m") as generator:
        records = await generator.replay([TraceRequest(0.0, 10, 40) for _ in range(5)])
    ttfts = sorted(record.ttft for record in records)
    assert ttfts[0] < 0.1
    assert ttfts[4] > 4 * 0.19
    assert max(record.late for record in records) < 0.1


async def test_refusals_are_tried_again_when_asked_and_reported_when_not():
    """A tier at rest answers 503 until an engine is there."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = EngineConfig(model="m", served_names=("m",), steps=QuickSteps(), port=port)
    sleeping = SimulatedEngine(config, start_seconds=0.5)
    trace = [TraceRequest(0.0, 10, 5)]
    async with (
        LoadGenerator(url, model="m") as impatient,
        LoadGenerator(url, model="m", retry_after=0.1) as patient,
    ):
        (refused,) = await impatient.replay(trace)
        start = asyncio.create_task(sleeping.start())
        (served,) = await patient.replay(trace)
        await start
    await sleeping.kill()
    assert (refused.ok, refused.status, refused.attempts) == (False, 0, 1)
    assert served.ok
    assert served.attempts > 2
    assert served.ttft > 0.4, "the wait for the engine is the client's, so it counts"
