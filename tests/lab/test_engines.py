"""Simulated engines, over HTTP as a client or a router sees them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from dataclasses import dataclass, replace

import aiohttp
import pytest

from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.lab.engines import EngineConfig, EngineState, LabStepModel, SimulatedEngine, engine_flags

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
ADDRESSES = (f"127.{60 + _WORKER}.{block}.{host}" for block in itertools.count(1) for host in range(1, 250))
"""Each process of a parallel run has its own."""


@dataclass(frozen=True)
class FixedSteps:
    """Steps of a known length: 10 ms, and 0.1 ms for each new prompt token."""

    kv_capacity_tokens: int = 100_000

    def step_ms(self, prompt_tokens, prompt_past_tokens, decoding, kv_tokens):
        return 10.0 + 0.1 * prompt_tokens


BASE = EngineConfig(model="m", served_names=("m",), steps=FixedSteps(), port=18080)


def engine(**changes) -> SimulatedEngine:
    peers = changes.pop("peers", None)
    return SimulatedEngine(replace(BASE, **changes), address=next(ADDRESSES), peers=peers)


async def post(session, to, *, prompt_tokens=10, max_tokens=10, **body):
    """Return (status, document, seconds)."""
    begun = time.perf_counter()
    prompt = body.pop("prompt", f"p{time.perf_counter_ns()} " + "w " * (prompt_tokens - 1))
    body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, **body}
    async with session.post(f"{to.url}/v1/completions", json=body) as answer:
        return answer.status, await answer.json(), time.perf_counter() - begun


async def values(session, to) -> dict[str, float]:
    """Return the page's samples."""
    async with session.get(f"{to.url}/metrics") as answer:
        text = await answer.text()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if not line.startswith("#")
    }


def sample(page: dict[str, float], name: str, *labels: str) -> float:
    return sum(
        value
        for key, value in page.items()
        if key.split("{")[0] == f"vllm:{name}" and all(one in key for one in labels)
    )


@pytest.fixture
async def session():
    async with aiohttp.ClientSession() as one:
        yield one


async def test_a_lone_request_takes_its_prefill_and_one_step_for_each_further_token(session):
    async with engine() as to:
        status, document, seconds = await post(session, to, prompt_tokens=100, max_tokens=20)
        page = await values(session, to)
    assert status == 200
    assert document["usage"] == {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    assert sample(page, "time_to_first_token_seconds_sum") == pytest.approx(0.020, abs=2e-3)
    assert sample(page, "e2e_request_latency_seconds_sum") == pytest.approx(0.210, abs=2e-3)
    assert sample(page, "request_time_per_output_token_seconds_sum") == pytest.approx(0.010, abs=2e-3)
    assert sample(page, "inter_token_latency_seconds_count") == 19
    assert sample(page, "inter_token_latency_seconds_sum") == pytest.approx(0.190, abs=2e-3)
    assert seconds == pytest.approx(0.210, abs=0.15)


async def test_more_requests_than_the_batch_holds_wait_and_latency_grows_by_whole_turns(session):
    async with engine(max_num_seqs=2) as to:
        tasks = [asyncio.create_task(post(session, to, max_tokens=30)) for _ in range(6)]
        await asyncio.sleep(0.15)
        during = await values(session, to)
        seconds = sorted(result[2] for result in await asyncio.gather(*tasks))
        after = await values(session, to)
    assert sample(during, "num_requests_running") == 2
    assert sample(during, "num_requests_waiting") == 4
    assert sample(during, "num_requests_waiting_by_reason", 'reason="capacity"') == 4
    assert sample(after, "num_requests_running") == sample(after, "num_requests_waiting") == 0
    assert seconds[5] > 2.7 * seconds[0]
    # Two turns waited for by two requests each: (2 + 4) x 0.3 s, and a little for their prefills.
    assert sample(after, "request_queue_time_seconds_sum") == pytest.approx(1.85, abs=0.1)
    assert sample(after, "request_success_total", 'finished_reason="length"') == 6


async def test_an_arrival_joins_the_running_batch_at_the_next_step(session):
    async with engine(stream_interval=1000) as to:
        long = asyncio.create_task(post(session, to, max_tokens=100))
        await asyncio.sleep(0.2)
        _, _, seconds = await post(session, to, max_tokens=2)
        await long
    assert seconds < 0.15, "it must not wait for the end of a stretch of decode steps"


async def test_a_long_prompt_is_computed_in_chunks_while_others_decode(session):
    async with engine(max_num_batched_tokens=256) as to:
        decode = asyncio.create_task(post(session, to, max_tokens=60))
        await asyncio.sleep(0.05)
        await post(session, to, prompt_tokens=2048, max_tokens=1)
        await decode
        page = await values(session, to)
    # Nine chunks of at most 255 tokens beside one decoding sequence: each step 35 ms, none 215 ms.
    slow = sample(page, "inter_token_latency_seconds_count") - sample(
        page, "inter_token_latency_seconds_bucket", 'le="0.05"'
    )
    assert slow == 0
    assert sample(page, "inter_token_latency_seconds_count") - sample(
        page, "inter_token_latency_seconds_bucket", 'le="0.025"'
    ) == pytest.approx(8, abs=2)


async def test_a_repeated_prompt_is_found_in_the_prefix_cache_but_for_its_last_token(session):
    async with engine() as to:
        prompt = "w " * 160
        await post(session, to, prompt=prompt)
        await post(session, to, prompt=prompt)
        page = await values(session, to)
    assert sample(page, "prefix_cache_queries_total") == 320
    assert sample(page, "prefix_cache_hits_total") == 159
    assert sample(page, "prompt_tokens_by_source_total", 'source="local_compute"') == 161
    assert sample(page, "prompt_tokens_by_source_total") == sample(page, "prompt_tokens_total") == 320


async def test_a_full_kv_cache_preempts_and_every_request_still_ends(session):
    async with engine(steps=FixedSteps(kv_capacity_tokens=300), prefix_caching=False) as to:
        results = await asyncio.gather(
            *(post(session, to, prompt_tokens=50, max_tokens=100) for _ in range(5))
        )
        page = await values(session, to)
    assert [document["usage"]["completion_tokens"] for _, document, _ in results] == [100] * 5
    assert sample(page, "num_preemptions_total") > 0
    assert sample(page, "generation_tokens_total") == 500
    assert sample(page, "request_num_preemptions_sum") == sample(page, "num_preemptions_total")


async def test_the_queue_limit_refuses_with_503_and_counts_without_an_engine_label(session):
    async with engine(max_num_seqs=1, max_queued_requests=2) as to:
        results = await asyncio.gather(*(post(session, to, max_tokens=5) for _ in range(5)))
        page = await values(session, to)
    assert sorted(status for status, _, _ in results) == [200, 200, 503, 503, 503]
    assert page['vllm:admission_rejections_total{model_name="m",reason="max_num_queued_reqs"}'] == 3


async def test_priority_scheduling_serves_the_lower_number_first_and_only_with_its_flag(session):
    for flag, first in ((True, "urgent"), (False, "normal")):
        async with engine(max_num_seqs=1, priority_scheduling=flag) as to:
            ended: list[str] = []

            async def one(name, priority, to=to, ended=ended):
                await post(session, to, priority=priority, max_tokens=5)
                ended.append(name)

            tasks = [asyncio.create_task(one("running", 0))]
            for name, priority in (("normal", 5), ("urgent", -5)):
                await asyncio.sleep(0.01)
                tasks.append(asyncio.create_task(one(name, priority)))
            await asyncio.gather(*tasks)
        assert ended[:2] == ["running", first]


async def test_a_stream_sends_the_first_token_at_once_and_then_chunks_and_usage(session):
    async with engine(stream_interval=8) as to:
        body = {"model": "m", "prompt": "w", "max_tokens": 50, "stream": True}
        async with session.post(
            f"{to.url}/v1/completions", json={**body, "stream_options": {"include_usage": True}}
        ) as answer:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            lines = [line.strip() async for line in answer.content if line.strip()]
    assert lines[-1] == b"data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert len(chunks[0]["choices"][0]["text"].split()) == 1
    texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
    assert sum(len(text.split()) for text in texts) == 50
    assert set("".join(texts).split()) == {"simulated"}
    assert chunks[-1]["usage"]["completion_tokens"] == 50
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


async def test_a_client_that_leaves_frees_its_place(session):
    async with engine(max_num_seqs=1) as to:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(post(session, to, max_tokens=3000), 0.1)
        status, _, seconds = await post(session, to, max_tokens=2)
        page = await values(session, to)
    assert (status, sample(page, "request_success_total", '"abort"')) == (200, 1)
    assert seconds < 1.0


@pytest.mark.parametrize(
    ("body", "status"),
    [({"model": "other"}, 404), ({"max_tokens": 40_000}, 400)],
)
async def test_wrong_requests_are_refused_as_vllm_does(session, body, status):
    async with engine() as to:
        assert (await post(session, to, **body))[0] == status


async def test_nothing_listens_until_the_engine_has_loaded(session):
    to = SimulatedEngine(BASE, address=next(ADDRESSES), start_seconds=0.4)
    start = asyncio.create_task(to.start())
    await asyncio.sleep(0.1)
    with pytest.raises(aiohttp.ClientConnectorError):
        await session.get(f"{to.url}/health")
    await start
    async with session.get(f"{to.url}/health") as answer:
        assert answer.status == 200
    await to.kill()


async def test_sigterm_finishes_what_is_in_flight_and_refuses_new_work_with_500(session):
    to = engine(shutdown_timeout=5.0)
    await to.start()
    running = asyncio.create_task(post(session, to, max_tokens=40))
    await asyncio.sleep(0.1)
    end = asyncio.create_task(to.terminate())
    await asyncio.sleep(0.05)
    assert to.state is EngineState.DRAINING
    async with session.get(f"{to.url}/health") as answer:
        assert answer.status == 200
    status, document, _ = await post(session, to)
    assert (status, document["error"]["message"]) == (500, "cannot schedule new futures after shutdown")
    status, document, _ = await running
    assert (status, document["usage"]["completion_tokens"]) == (200, 40)
    await asyncio.wait_for(end, 2.0)
    assert to.state is EngineState.STOPPED


async def test_without_a_shutdown_timeout_sigterm_breaks_what_is_in_flight(session):
    to = engine(shutdown_timeout=0.0)
    await to.start()
    running = asyncio.create_task(post(session, to, max_tokens=1000))
    await asyncio.sleep(0.1)
    await to.terminate()
    with pytest.raises(aiohttp.ClientError):
        await running


async def hand_over(session, prefill, decode, **body):
    """Do what vllm-router does in prefill/decode mode."""
    remote = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None}
    prompt = "w " * 200
    _, first, _ = await post(session, prefill, prompt=prompt, max_tokens=1, kv_transfer_params=remote)
    return await post(session, decode, prompt=prompt, kv_transfer_params=first["kv_transfer_params"], **body)


async def test_a_decode_engine_takes_the_whole_prompt_from_the_prefill_engine(session):
    peers: dict[str, SimulatedEngine] = {}
    async with (
        engine(kv_role="kv_producer", peers=peers) as prefill,
        engine(kv_role="kv_consumer", peers=peers) as decode,
    ):
        status, document, _ = await hand_over(session, prefill, decode, max_tokens=20)
        page = await values(session, decode)
        assert prefill._held_tokens == 0, "the prefill engine must free what was fetched"
    assert (status, document["usage"]["completion_tokens"]) == (200, 20)
    assert sample(page, "prompt_tokens_by_source_total", 'source="external_kv_transfer"') == 200
    assert sample(page, "prompt_tokens_by_source_total", 'source="local_compute"') == 0
    assert sample(page, "external_prefix_cache_hits_total") == 200
    assert sample(page, "nixl_xfer_time_seconds_count") == 1


async def test_a_decode_request_whose_prefill_engine_died_fails_with_500_and_is_counted(session):
    peers: dict[str, SimulatedEngine] = {}
    prefill = engine(kv_role="kv_producer", peers=peers)
    await prefill.start()
    async with engine(kv_role="kv_consumer", peers=peers) as decode:
        remote = {"do_remote_decode": True, "do_remote_prefill": False}
        _, first, _ = await post(session, prefill, max_tokens=1, kv_transfer_params=remote)
        await prefill.kill()
        status, _, _ = await post(session, decode, kv_transfer_params=first["kv_transfer_params"])
        page = await values(session, decode)
    assert (status, sample(page, "nixl_num_failed_transfers_total")) == (500, 1)


def test_rendered_flags_reach_the_simulation():
    config = EngineConfig.from_command(
        [
            *(
                "vllm",
                "serve",
                "meta-llama/Llama-3.1-8B-Instruct",
                "--served-model-name=chat",
                "--max-num-seqs=64",
            ),
            *("--max-num-batched-tokens", "8k", "--max-model-len=16K", "--quantization=fp8"),
            *("--tensor-parallel-size=2", "--performance-mode=throughput", "--scheduling-policy", "priority"),
            *("--max-num-queued-reqs=9", "--shutdown-timeout=60", "--enable-mfu-metrics", "--port=9000"),
            '--kv-transfer-config={"kv_connector":"NixlConnector","kv_role":"kv_producer"}',
        ],
        accelerator_name="NVIDIA-H100-80GB-HBM3",
    )
    assert (config.served_names, config.max_num_seqs, config.max_num_batched_tokens) == (("chat",), 64, 8000)
    assert (config.max_model_len, config.priority_scheduling, config.max_queued_requests) == (16384, True, 9)
    assert (config.shutdown_timeout, config.kv_role, config.port) == (60.0, "kv_producer", 9000)
    assert isinstance(config.steps, LabStepModel)
    assert (config.steps.tensor_parallel, config.steps.weights) == (2, "fp8")
    assert config.steps.accelerator.key == "h100-sxm-80gb"


def test_flags_may_be_written_either_way():
    assert engine_flags(["vllm", "serve", "m", "--a=1", "--b", "2", "--c"]) == (
        "m",
        {"a": "1", "b": "2", "c": ""},
    )


def test_the_laboratory_step_model_is_near_public_figures_for_llama_8b():
    """Public figures: vLLM decodes Llama-3.1-8B at batch 1 in 7 to 8 ms on an H100 and 11 to 13 ms on an A100 (both SXM, bf16)."""
    shape = model("meta-llama/Llama-3.1-8B-Instruct")
    h100 = LabStepModel(accelerator("h100-sxm-80gb"), shape)
    a100 = LabStepModel(accelerator("a100-sxm-80gb"), shape)
    assert 6.5 < h100.step_ms(0, 0, 1, 500) < 8.5
    assert 9.5 < a100.step_ms(0, 0, 1, 500) < 13.0
    assert h100.step_ms(0, 0, 32, 32 * 600) < 1.5 * h100.step_ms(0, 0, 1, 600)


async def test_fifty_busy_engines_cost_a_fraction_of_a_core(session):
    engines = [engine(stream_interval=8) for _ in range(50)]
    for one in engines:
        await one.start()
    begun, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(
        *(post(session, one, prompt_tokens=200, max_tokens=100) for one in engines for _ in range(4))
    )
    wall, used = time.perf_counter() - begun, time.process_time() - cpu
    for one in engines:
        await one.kill()
    tokens = sum(one.metrics.generation_tokens.value for one in engines)
    assert tokens == 50 * 4 * 100
    # 20,000 tokens in about a second, clients included: one timer for each token would take many times this.
    assert used < 1.5, f"{used:.2f} CPU-seconds in {wall:.2f} s"
