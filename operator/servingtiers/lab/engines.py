"""Simulated vLLM engines: they speak vLLM's HTTP and metrics, and compute nothing.

What is real: the HTTP paths, the request and streaming formats, the metric names, labels and buckets, the
meaning of the command-line flags that shape latency (``--max-num-seqs``, ``--max-num-batched-tokens``, chunked
prefill, prefix caching, queue limits, priority scheduling, ``--shutdown-timeout``), the drain on SIGTERM and the
prefill/decode hand-over that vllm-router asks for. What is simulated: the model. Answers are the word
"simulated" over and over, one word is one token, and time passes as :class:`StepTimes` says.

One event loop hosts dozens of engines. An engine has one timer, not one per request or token: between two
changes of its batch (an arrival, an end, a stream's flush) all decode steps are alike, so a whole stretch of
steps is booked at once, and an arrival cuts the stretch at the next step boundary.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, Self

from aiohttp import web

from servingtiers.catalog.accelerators import Accelerator, accelerator
from servingtiers.catalog.models import ModelShape, model
from servingtiers.catalog.names import CatalogError
from servingtiers.lab.vllm_metrics import CONTENT_TYPE, EngineMetrics

__all__ = [
    "EngineConfig",
    "EngineFaults",
    "EngineState",
    "LabStepModel",
    "SimulatedEngine",
    "StepTimes",
    "engine_flags",
    "slower",
]

SIMULATED_WORD = "simulated"
_OPEN_ENDED_TOKENS = (
    128  # a chat request without max_tokens ends by itself (finish_reason "stop") after these
)
_LEASE_SECONDS = 30.0  # NIXL's kv_lease_duration
_NIXL_BYTES_PER_SECOND = 10e9  # a 100 Gbit/s fabric, which is what KV transfer is usually given
_NIXL_SETUP_SECONDS = 0.003
_STREAM_INTERVAL = 8
"""Tokens per streamed chunk after the first (vLLM's ``--stream-interval``, default 1 there): a laboratory that
hosts dozens of engines in one process cannot write every token by itself."""


class StepTimes(Protocol):
    """How long an engine step takes; the product's step models fit it too."""

    @property
    def kv_capacity_tokens(self) -> int:
        """KV-cache capacity of one replica, tokens."""
        ...

    def step_ms(
        self, prompt_tokens: float, prompt_past_tokens: float, decoding: float, kv_tokens: float
    ) -> float:
        """Return the time of one engine step, milliseconds.

        Args:
            prompt_tokens: New prompt tokens computed in this step.
            prompt_past_tokens: Mean number of tokens already cached before them.
            decoding: Sequences that decode one token.
            kv_tokens: KV tokens that those sequences read, summed.
        """
        ...


@dataclass(frozen=True, slots=True)
class LabStepModel:
    """A deliberately simple step model: the slower of reading and multiplying, plus attention and overheads.

    ``step = max(weights / (BW·0.85), 2·P·tokens / (F·0.6)) + kv_read / (BW·0.75) + layers·60 µs + 6 µs·decoding``,
    everything divided over tensor-parallel GPUs but the overheads, and 15 µs a layer for the all-reduce when
    there are several. The constants are round numbers near what is measured on A100 and H100; it is *not* the
    product's performance model, so that a fleet in the laboratory may prove the product's figures wrong.
    """

    accelerator: Accelerator
    shape: ModelShape
    tensor_parallel: int = 1
    weights: str = "bf16"
    kv_dtype: str = "bf16"
    memory_utilization: float = 0.92
    slow_factor: float = 1.0
    """Multiplies every step; above 1 for an engine slower than its model says."""

    @property
    def kv_capacity_tokens(self) -> int:
        """KV-cache capacity of one replica, tokens."""
        memory = self.accelerator.memory_bytes * self.memory_utilization * self.tensor_parallel
        free = (
            memory - self.shape.weight_bytes(self.weights) - 2e9 * self.tensor_parallel
        )  # activations, graphs
        return max(2048, int(free / self.kv_token_bytes))

    @property
    def kv_token_bytes(self) -> float:
        """Bytes one token holds in the KV cache."""
        return self.shape.kv_bytes_per_token(self.kv_dtype)

    def step_ms(
        self, prompt_tokens: float, prompt_past_tokens: float, decoding: float, kv_tokens: float
    ) -> float:
        """Return the time of one engine step, milliseconds (see the protocol)."""
        tokens = prompt_tokens + decoding
        shape, gpu, tp = self.shape, self.accelerator, self.tensor_parallel
        reading = shape.streamed_bytes(self.weights, tokens) / (tp * gpu.bandwidth * 0.85)
        flops = 2.0 * shape.active_linear_parameters * tokens
        flops += (
            4.0
            * shape.layers
            * shape.heads
            * shape.head_dim
            * prompt_tokens
            * (prompt_past_tokens + prompt_tokens / 2.0)
        )
        computing = flops / (tp * gpu.flops(self.weights) * 0.6)
        attention = kv_tokens * self.kv_token_bytes / (tp * gpu.bandwidth * 0.75)
        overhead = shape.layers * (60e-6 + (15e-6 if tp > 1 else 0.0)) + 6e-6 * decoding
        return 1e3 * self.slow_factor * (max(reading, computing) + attention + overhead)


def engine_flags(command: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Split a ``vllm serve`` command line into the model and its flags.

    ``--flag value`` and ``--flag=value`` are understood; a flag without a value maps to ``""``.
    """
    words = list(command)
    while words and not words[0].startswith("-") and words[0].rsplit("/", 1)[-1] in {"vllm", "serve"}:
        words.pop(0)
    positional: str | None = None
    flags: dict[str, str] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--"):
            positional = positional or word
            continue
        name, equals, value = word[2:].partition("=")
        if not equals and position < len(words) and not words[position].startswith("--"):
            value = words[position]
            position += 1
        flags[name.replace("_", "-")] = value
    return positional or flags.get("model"), flags


def _integer(text: str) -> int:
    """Read vLLM's human-readable integers: ``8192``, ``8k`` (thousand), ``8K`` (1024), ``1m``, ``1M``."""
    scale = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}.get(text[-1:])
    return int(float(text[:-1]) * scale) if scale else int(text)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What of a rendered engine shapes the simulation."""

    model: str
    served_names: tuple[str, ...]
    steps: StepTimes
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 32768
    chunked_prefill: bool = True
    prefix_caching: bool = True
    block_size: int = 16
    priority_scheduling: bool = False
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    stream_interval: int = _STREAM_INTERVAL
    shutdown_timeout: float = 0.0
    kv_role: str | None = None
    """kv_producer, kv_consumer or kv_both; None without a KV connector."""
    side_channel_port: int = 5600
    kv_load_failure_policy: str = "fail"
    host: str = "0.0.0.0"  # noqa: S104 - what the flag says; the laboratory binds the pod's own address
    port: int = 8000
    kv_token_bytes: float = 131072.0

    @classmethod
    def from_command(
        cls,
        command: Sequence[str],
        *,
        accelerator_name: str,
        env: Mapping[str, str] | None = None,
        slow_factor: float = 1.0,
    ) -> Self:
        """Read a ``vllm serve`` command line as it is rendered into a pod.

        Args:
            command: The container's command and arguments, variables resolved.
            accelerator_name: A catalogue key or alias, for example the node's ``nvidia.com/gpu.product`` label.
            env: The container's environment.
            slow_factor: Makes this engine slower (or faster) than its model.

        Raises:
            CatalogError: The accelerator or the model is unknown.
            ValueError: A flag's value cannot be read.
        """
        name, flags = engine_flags(command)
        if name is None:
            raise ValueError("vllm serve without a model: give it as first argument")
        tp = int(flags.get("tensor-parallel-size", "1"))
        quantization = flags.get("quantization", "")
        weights = "fp8" if "fp8" in quantization else "int4" if quantization in {"awq", "gptq"} else "bf16"
        kv_dtype = "fp8" if flags.get("kv-cache-dtype", "auto").startswith("fp8") else "bf16"
        steps = LabStepModel(
            accelerator(accelerator_name),
            _shape(name, flags),
            tensor_parallel=tp,
            weights=weights,
            kv_dtype=kv_dtype,
            memory_utilization=float(flags.get("gpu-memory-utilization", "0.92")),
            slow_factor=slow_factor,
        )
        # vLLM doubles its defaults in throughput mode.
        double = 2 if flags.get("performance-mode") == "throughput" else 1
        transfer = json.loads(flags["kv-transfer-config"]) if "kv-transfer-config" in flags else {}

        def maximum(flag: str) -> int | None:
            return _integer(flags[flag]) if flag in flags else None

        model_len = flags.get("max-model-len", "")
        return cls(
            model=name,
            served_names=tuple(flags.get("served-model-name", name).split()),
            steps=steps,
            max_num_seqs=maximum("max-num-seqs") or 256 * double,
            max_num_batched_tokens=maximum("max-num-batched-tokens") or 8192 * double,
            max_model_len=_integer(model_len)
            if model_len not in {"", "auto", "-1"}
            else steps.shape.max_context,
            chunked_prefill="no-enable-chunked-prefill" not in flags,
            prefix_caching="no-enable-prefix-caching" not in flags,
            block_size=int(flags.get("block-size", "16")),
            priority_scheduling=flags.get("scheduling-policy") == "priority",
            max_queued_requests=maximum("max-num-queued-reqs"),
            max_queued_tokens=maximum("max-num-queued-tokens"),
            stream_interval=int(flags.get("stream-interval", _STREAM_INTERVAL)),
            shutdown_timeout=float(flags.get("shutdown-timeout", "0")),
            kv_role=transfer.get("kv_role"),
            side_channel_port=int((env or {}).get("VLLM_NIXL_SIDE_CHANNEL_PORT", "5600")),
            kv_load_failure_policy=transfer.get("kv_load_failure_policy", "fail"),
            host=flags.get("host", "0.0.0.0"),  # noqa: S104 - vLLM's own default
            port=int(flags.get("port", "8000")),
            kv_token_bytes=steps.kv_token_bytes,
        )


def _shape(name: str, flags: Mapping[str, str]) -> ModelShape:
    """Return the model's shape; a path is looked up by its served name."""
    try:
        return model(name)
    except CatalogError:
        served = flags.get("served-model-name", "").split()
        for candidate in served:
            with contextlib.suppress(CatalogError):
                return model(candidate)
        # A model loaded from a volume names no catalogue entry: an 8B stands in for it.
        if name.startswith("/"):
            return model("meta-llama/Llama-3.1-8B-Instruct")
        raise


class EngineState(StrEnum):
    """Where an engine is in its life."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(slots=True)
class EngineFaults:
    """Misbehaviour that a test can switch on while an engine runs."""

    health_status: int = 200
    metrics: str = "ok"
    """``ok``, ``error`` (500), ``hang``, ``nan`` (every gauge is NaN) or ``empty``."""
    answer_status: int = 200
    """Other than 200: completions are refused with this status."""


class _Finish(StrEnum):
    LENGTH = "length"
    STOP = "stop"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class _Sequence:
    """One request inside the engine."""

    prompt_tokens: int
    max_tokens: int
    finish: _Finish
    arrival: float
    priority: int
    order: int
    blocks: tuple[int, ...] = ()
    transferred: bool = False
    """Whether the prompt's KV comes from another engine."""
    computed: int = 0
    generated: int = 0
    target: int = 0
    """Tokens to compute before the next token can be sampled: the prompt, and after a preemption also what was
    generated already."""
    cached: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    preemptions: int = 0
    chunk: int = 0
    """Prompt tokens in the step under way."""
    outbox: asyncio.Queue[int | _Finish] = field(default_factory=asyncio.Queue)
    held: str | None = None
    """Name under which a finished prefill's KV is kept for the decode engine."""

    @property
    def decoding(self) -> bool:
        return self.computed >= self.target

    @property
    def kv_tokens(self) -> int:
        return self.computed + (self.generated - (self.target - self.prompt_tokens) if self.decoding else 0)


class SimulatedEngine:
    """One simulated vLLM API server with one engine core.

    Args:
        config: What to simulate.
        address: IP address to listen on.
        start_seconds: From :meth:`start` to serving; nothing listens before, as with the real one.
        peers: Engines by NIXL engine id, shared by all engines of a host, so that a decode engine can pull from a
            prefill engine.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        address: str = "127.0.0.1",
        start_seconds: float = 0.0,
        peers: dict[str, SimulatedEngine] | None = None,
    ) -> None:
        self.config = config
        self.address = address
        self.start_seconds = start_seconds
        self.state = EngineState.LOADING
        self.faults = EngineFaults()
        self.engine_id = str(uuid.uuid4())
        self.metrics = EngineMetrics(
            config.served_names[0],
            max_model_len=config.max_model_len,
            kv_connector=config.kv_role is not None,
            cache_config=self._cache_config(config),
        )
        self._peers = peers if peers is not None else {}
        self._capacity = config.steps.kv_capacity_tokens
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._deferred: set[_Sequence] = set()
        self._held: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._held_tokens = 0
        self._prefix: OrderedDict[int, None] = OrderedDict()
        self._order = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stretch: tuple[float, float, int] | None = None  # begin, seconds per step, steps
        self._idle = asyncio.Event()
        self._idle.set()
        self._runner: web.AppRunner | None = None
        self._life: asyncio.Task[None] | None = None
        self._streams: set[asyncio.Task[Any]] = set()
        self._http: dict[tuple[str, str, str], int] = {}

    @staticmethod
    def _cache_config(config: EngineConfig) -> list[tuple[str, str]]:
        tokens = config.steps.kv_capacity_tokens
        return [
            ("block_size", str(config.block_size)),
            ("cache_dtype", "auto"),
            ("enable_prefix_caching", str(config.prefix_caching)),
            ("gpu_memory_utilization", "0.92"),
            ("kv_cache_max_concurrency", str(tokens / config.max_model_len)),
            ("kv_cache_memory_bytes", str(int(tokens * config.kv_token_bytes))),
            ("kv_cache_size_tokens", str(tokens)),
            ("num_gpu_blocks", str(tokens // config.block_size)),
        ]

    # -- life ---------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{self.address}:{self.config.port}"

    @property
    def in_flight(self) -> int:
        """Requests waiting or running."""
        return len(self._running) + len(self._waiting) + len(self._deferred)

    async def start(self) -> None:
        """Load (``start_seconds``), then listen."""
        await asyncio.sleep(self.start_seconds)
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/health", self._get_health)
        app.router.add_get("/ping", self._get_health)
        app.router.add_get("/version", self._get_version)
        app.router.add_get("/v1/models", self._get_models)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_post("/v1/completions", self._post_completions)
        app.router.add_post("/v1/chat/completions", self._post_chat)
        # vLLM aborts a request whose client has left; aiohttp tells its handler only when asked to.
        runner = web.AppRunner(
            app, access_log=None, handle_signals=False, shutdown_timeout=0.1, handler_cancellation=True
        )
        await runner.setup()
        await web.TCPSite(runner, self.address, self.config.port, reuse_address=True).start()
        self._runner = runner
        self._peers[self.engine_id] = self
        self.state = EngineState.SERVING

    async def terminate(self) -> None:
        """Do what vLLM does on SIGTERM: refuse new work, finish what is in flight within the shutdown timeout.

        ``/health`` stays 200 meanwhile and new requests get 500, as seen on vLLM 0.32.
        """
        if self.state is EngineState.SERVING:
            self.state = EngineState.DRAINING
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self.config.shutdown_timeout or 0.001)
                if self._streams:  # the last chunks are computed; let them be written
                    await asyncio.wait(self._streams, timeout=1.0)
        await self.kill()

    async def kill(self) -> None:
        """End at once, as on SIGKILL: open connections break."""
        self.state = EngineState.STOPPED
        self._peers.pop(self.engine_id, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for sequence in (*self._running, *self._waiting, *self._deferred):
            sequence.outbox.put_nowait(_Finish.ABORT)
        self._running.clear()
        self._waiting.clear()
        self._deferred.clear()
        self._idle.set()
        runner, self._runner = self._runner, None
        if runner is not None:
            server = runner.server
            for connection in list(server.connections) if server is not None else []:
                if connection.transport is not None:
                    connection.transport.abort()
            await runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    # -- the engine core ----------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def submit(
        self,
        prompt_tokens: int,
        max_tokens: int,
        *,
        finish: _Finish = _Finish.LENGTH,
        priority: int = 0,
        blocks: tuple[int, ...] = (),
        transfer: Mapping[str, Any] | None = None,
    ) -> _Sequence:
        """Queue a request and return its sequence; tokens appear in its ``outbox``."""
        self._order += 1
        sequence = _Sequence(
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            finish=finish,
            arrival=self._now(),
            priority=priority if self.config.priority_scheduling else 0,
            order=self._order,
            blocks=blocks,
            target=prompt_tokens,
        )
        self._idle.clear()
        if transfer and transfer.get("do_remote_decode"):
            sequence.held = str(uuid.uuid4())
        if transfer and transfer.get("do_remote_prefill"):
            self._pull(sequence, transfer)
        else:
            self._enqueue(sequence)
        return sequence

    def abort(self, sequence: _Sequence) -> None:
        """Forget a request whose client is gone."""
        if sequence in self._running:
            self._cut_stretch()
            # The cut books finished steps; the sequence may have ended by that.
            if sequence in self._running:
                self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._deferred:
            self._deferred.discard(sequence)
        else:
            return
        self.metrics.success["abort"].add()
        self._schedule_soon()

    def _enqueue(self, sequence: _Sequence) -> None:
        self._waiting.append(sequence)
        if self.config.priority_scheduling:
            self._waiting = deque(sorted(self._waiting, key=lambda one: (one.priority, one.order)))
        self._cut_stretch()
        self._schedule_soon()

    def _pull(self, sequence: _Sequence, transfer: Mapping[str, Any]) -> None:
        """Fetch the prompt's KV from the prefill engine named in the request."""
        peer = self._peers.get(str(transfer.get("remote_engine_id")))
        held = str(transfer.get("remote_request_id"))
        nixl = self.metrics.nixl
        found = peer is not None and held in peer._held and nixl is not None  # noqa: SLF001 - our own class
        size = sequence.prompt_tokens * self.config.kv_token_bytes
        seconds = _NIXL_SETUP_SECONDS + size / _NIXL_BYTES_PER_SECOND
        self._deferred.add(sequence)

        def arrived() -> None:
            if sequence not in self._deferred:
                return
            self._deferred.discard(sequence)
            if found and peer is not None and nixl is not None:
                peer._release(held)  # noqa: SLF001
                nixl.xfer_time.observe(seconds)
                nixl.post_time.observe(_NIXL_SETUP_SECONDS / 10)
                nixl.bytes.observe(size)
                nixl.descriptors.observe(math.ceil(sequence.prompt_tokens / self.config.block_size))
                sequence.transferred = True
            else:
                if nixl is not None:
                    nixl.failed_transfers.add()
                if self.config.kv_load_failure_policy != "recompute":
                    self._end(sequence, _Finish.ERROR, self._now())
                    return
            self._enqueue(sequence)

        asyncio.get_running_loop().call_later(seconds, arrived)

    def _release(self, name: str) -> None:
        tokens, _ = self._held.pop(name, (0, 0.0))
        self._held_tokens -= tokens

    def _expire_leases(self, now: float) -> None:
        while self._held:
            name, (_, until) = next(iter(self._held.items()))
            if until > now:
                return
            self._release(name)
            if self.metrics.nixl is not None:
                self.metrics.nixl.expired.add()

    def _kv_used(self) -> int:
        return sum(sequence.kv_tokens for sequence in self._running) + self._held_tokens

    def _schedule_soon(self) -> None:
        """Form the next step, unless one is under way."""
        if self._stretch is None and self.state is not EngineState.STOPPED:
            self._form_step(self._now())

    def _cut_stretch(self) -> None:
        """Let a stretch of decode steps end at the next step boundary, because the batch is to change."""
        if self._stretch is None or self._timer is None:
            return
        begin, seconds, steps = self._stretch
        done = min(steps, max(1, math.ceil((self._now() - begin) / seconds)))
        if done < steps:
            self._timer.cancel()
            self._stretch = (begin, seconds, done)
            self._timer = asyncio.get_running_loop().call_at(begin + done * seconds, self._finish_stretch)

    def _form_step(self, begin: float) -> None:
        """Choose the next step's work as vLLM's scheduler does, and book it."""
        config = self.config
        self._expire_leases(begin)
        budget = config.max_num_batched_tokens
        used = self._kv_used()
        # Running sequences first: one token for each that decodes, a chunk for each still in its prompt.
        while self._running and used + len(self._running) > self._capacity and len(self._running) > 1:
            used -= self._preempt()
        prompt_tokens = past_tokens = 0
        decoding = [sequence for sequence in self._running if sequence.decoding]
        budget -= len(decoding)
        for sequence in self._running:
            sequence.chunk = 0
            if not sequence.decoding and budget > 0:
                sequence.chunk = min(sequence.target - sequence.computed, budget)
                budget -= sequence.chunk
                prompt_tokens += sequence.chunk
                past_tokens += sequence.chunk * sequence.computed
        # Then the queue, while there is room in the batch, the budget and the KV cache.
        while self._waiting and len(self._running) < config.max_num_seqs and budget > 0:
            sequence = self._waiting[0]
            if sequence.transferred and sequence.preemptions == 0:
                cached = sequence.target - 1  # everything but the last token, which yields the first logits
            else:
                cached = self._prefix_hits(sequence)
            need = sequence.target - cached
            if not config.chunked_prefill and need > budget and prompt_tokens:
                break
            if used + sequence.target + len(self._running) > self._capacity and self._running:
                break
            self._waiting.popleft()
            begin = max(begin, sequence.arrival)  # booked time may be a little behind the clock
            if sequence.scheduled_at is None:
                sequence.scheduled_at = begin
                sequence.cached = cached
                self._count_prompt(sequence)
            sequence.computed = cached
            sequence.chunk = min(need, budget) if config.chunked_prefill else need
            budget -= sequence.chunk
            prompt_tokens += sequence.chunk
            past_tokens += sequence.chunk * cached
            used += sequence.target
            self._running.append(sequence)
        self._show()
        if not self._running:
            self._stretch = None
            if not self._waiting and not self._deferred:
                self._idle.set()
            return
        steps = 1
        if not prompt_tokens:
            # Nothing changes until somebody ends, a stream is flushed or the KV cache is full.
            left = min(sequence.max_tokens - sequence.generated for sequence in decoding)
            room = max(1, (self._capacity - used) // max(1, len(decoding)))
            steps = max(1, min(left, room, config.stream_interval))
        kv_tokens = sum(sequence.kv_tokens for sequence in decoding) + len(decoding) * (steps - 1) / 2
        past = past_tokens / prompt_tokens if prompt_tokens else 0.0
        seconds = config.steps.step_ms(prompt_tokens, past, len(decoding), kv_tokens) / 1e3
        self._estimate(prompt_tokens, len(decoding), kv_tokens, steps)
        self._stretch = (begin, seconds, steps)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(begin + steps * seconds, self._finish_stretch)

    def _finish_stretch(self) -> None:
        """Account for the steps that have passed, and go on."""
        if self._stretch is None:
            return
        begin, seconds, steps = self._stretch
        self._stretch = None
        end = begin + steps * seconds
        metrics = self.metrics
        decoding = 0
        prompt_tokens = 0
        ended: list[tuple[_Sequence, _Finish]] = []
        for sequence in self._running:
            if sequence.chunk:
                prompt_tokens += sequence.chunk
                sequence.computed += sequence.chunk
                sequence.chunk = 0
                if not sequence.decoding:
                    continue
                self._remember(sequence)
                if sequence.first_token_at is None:
                    sequence.first_token_at = end
                    metrics.ttft.observe(end - sequence.arrival)
                elif sequence.last_token_at is not None:
                    metrics.itl.observe(end - sequence.last_token_at)
                made = 1
            elif sequence.decoding:
                made = steps
                decoding += 1
                if sequence.last_token_at is not None:
                    # The first of these tokens may have waited for more than its own step.
                    metrics.itl.observe(begin + seconds - sequence.last_token_at)
                    metrics.itl.observe(seconds, steps - 1)
            else:
                continue
            sequence.generated += made
            sequence.last_token_at = end
            metrics.generation_tokens.add(made)
            sequence.outbox.put_nowait(made)
            if sequence.generated >= sequence.max_tokens:
                ended.append((sequence, sequence.finish))
        if prompt_tokens or decoding:  # not when every client left during the step
            metrics.iteration_tokens.observe(prompt_tokens + decoding, steps)
        for sequence, finish in ended:
            self._running.remove(sequence)
            self._end(sequence, finish, end)
        # Steps follow each other without a gap; a late event loop does not make the engine slower, up to a bound.
        self._form_step(max(end, self._now() - 0.25))

    def _preempt(self) -> int:
        """Throw the youngest running sequence back to the queue; returns the KV tokens freed."""
        victim = max(self._running, key=lambda one: (one.priority, one.order))
        self._running.remove(victim)
        freed = victim.kv_tokens
        victim.target = victim.prompt_tokens + victim.generated
        victim.computed = 0
        victim.preemptions += 1
        self._waiting.appendleft(victim)
        self.metrics.preemptions.add()
        return freed

    def _end(self, sequence: _Sequence, finish: _Finish, now: float) -> None:
        metrics = self.metrics
        metrics.success[finish.value].add()
        sequence.outbox.put_nowait(finish)
        if sequence.held is not None and finish is not _Finish.ERROR:
            self._held[sequence.held] = (sequence.prompt_tokens, now + _LEASE_SECONDS)
            self._held_tokens += sequence.prompt_tokens
        scheduled = sequence.scheduled_at if sequence.scheduled_at is not None else now
        first = sequence.first_token_at if sequence.first_token_at is not None else now
        metrics.e2e.observe(now - sequence.arrival)
        metrics.queue_time.observe(scheduled - sequence.arrival)
        metrics.prefill_time.observe(first - scheduled)
        metrics.decode_time.observe(now - first)
        metrics.inference_time.observe(now - scheduled)
        # vLLM observes 0 for a request of one token.
        metrics.tpot.observe((now - first) / (sequence.generated - 1) if sequence.generated > 1 else 0.0)
        metrics.request_prompt_tokens.observe(sequence.prompt_tokens)
        metrics.request_generation_tokens.observe(sequence.generated)
        metrics.max_generation_tokens.observe(sequence.max_tokens)
        metrics.params_n.observe(1)
        metrics.params_max_tokens.observe(sequence.max_tokens)
        metrics.request_preemptions.observe(sequence.preemptions)
        # As recorded on a real decode engine: transferred tokens count here, local hits do not.
        local = 0 if sequence.transferred else sequence.cached
        metrics.prefill_computed.observe(sequence.prompt_tokens - local)

    def _count_prompt(self, sequence: _Sequence) -> None:
        """Count a prompt once, when it is first scheduled."""
        metrics = self.metrics
        tokens = sequence.prompt_tokens
        metrics.prompt_tokens.add(tokens)
        if self.config.prefix_caching:
            metrics.prefix_queries.add(tokens)
        if self.config.kv_role is not None:
            metrics.external_queries.add(tokens)
        if sequence.transferred:
            metrics.external_hits.add(tokens)
            metrics.external_kv_transfer.add(tokens)
            metrics.prompt_tokens_cached.add(tokens)
            metrics.cached_p2p.add(tokens)
            return
        metrics.prefix_hits.add(sequence.cached)
        metrics.local_cache_hit.add(sequence.cached)
        metrics.local_compute.add(tokens - sequence.cached)
        metrics.prompt_tokens_cached.add(sequence.cached)
        metrics.cached_device.add(sequence.cached)

    def _prefix_hits(self, sequence: _Sequence) -> int:
        """Return how many leading prompt tokens are cached: whole blocks, never the last token."""
        hits = 0
        for block in sequence.blocks:
            if block not in self._prefix:
                break
            self._prefix.move_to_end(block)
            hits += 1
        return min(hits * self.config.block_size, sequence.target - 1)

    def _remember(self, sequence: _Sequence) -> None:
        """Keep a computed prompt's blocks, least recently used out first.

        The cache is as large as the KV cache; that running sequences take from the same memory is left out.
        """
        for block in sequence.blocks:
            self._prefix[block] = None
            self._prefix.move_to_end(block)
        while len(self._prefix) > self._capacity // self.config.block_size:
            self._prefix.popitem(last=False)

    def _estimate(self, prompt_tokens: float, decoding: int, kv_tokens: float, steps: int) -> None:
        """Feed vLLM's estimated FLOPs and bytes, per GPU."""
        model_of = self.config.steps
        if not isinstance(model_of, LabStepModel):
            return
        shape, tp = model_of.shape, model_of.tensor_parallel
        tokens = prompt_tokens + decoding
        self.metrics.flops.add(2.0 * shape.active_parameters * tokens * steps / tp)
        reading = shape.streamed_bytes(model_of.weights, tokens) + kv_tokens * model_of.kv_token_bytes
        self.metrics.read_bytes.add(reading * steps / tp)
        self.metrics.write_bytes.add(tokens * model_of.kv_token_bytes * steps / tp)

    def _show(self) -> None:
        metrics = self.metrics
        metrics.running.value = float(len(self._running))
        metrics.waiting_capacity.value = float(len(self._waiting))
        metrics.waiting_deferred.value = float(len(self._deferred))
        metrics.waiting.value = float(len(self._waiting) + len(self._deferred))
        metrics.kv_usage.value = min(1.0, self._kv_used() / self._capacity)

    # -- HTTP ---------------------------------------------------------------------------------------------

    def _count_http(self, handler: str, method: str, status: int) -> None:
        key = (handler, method, f"{status // 100}xx")
        self._http[key] = self._http.get(key, 0) + 1

    async def _get_health(self, _: web.Request) -> web.Response:
        return web.Response(status=self.faults.health_status)

    async def _get_version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0+simulated"})

    async def _get_models(self, _: web.Request) -> web.Response:
        entries = [
            {
                "id": name,
                "object": "model",
                "created": int(time.time()),
                "owned_by": "simulated",
                "root": self.config.model,
                "parent": None,
                "max_model_len": self.config.max_model_len,
            }
            for name in self.config.served_names
        ]
        return web.json_response({"object": "list", "data": entries})

    async def _get_metrics(self, _: web.Request) -> web.Response:
        mode = self.faults.metrics
        if mode == "hang":
            await asyncio.sleep(3600)
        if mode == "error":
            return web.Response(status=500)
        if mode == "empty":
            return web.Response(body=b"", headers={"Content-Type": CONTENT_TYPE})
        self._show()
        text = self.metrics.text()
        if mode == "nan":
            lines = (
                line if line[:1] == "#" else line.rpartition(" ")[0] + " NaN" for line in text.splitlines()
            )
            text = "\n".join(lines) + "\n"
        text += (
            "# HELP http_requests_total Total number of requests by method, status and handler.\n"
            "# TYPE http_requests_total counter\n"
        )
        for (handler, method, status), count in self._http.items():
            text += (
                f'http_requests_total{{handler="{handler}",method="{method}",status="{status}"}} {count}.0\n'
            )
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    def _error(self, handler: str, status: int, message: str) -> web.Response:
        self._count_http(handler, "POST", status)
        kind = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
        body = {
            "message": message,
            "type": kind.get(status, "InternalServerError"),
            "param": None,
            "code": status,
        }
        return web.json_response({"error": body}, status=status)

    async def _post_completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body.get("prompt", "")
        words = [str(token) for token in prompt] if isinstance(prompt, list) else prompt.split()
        return await self._serve(request, body, words, chat=False)

    async def _post_chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        words: list[str] = []
        for message in body.get("messages", []):
            content = message.get("content") or ""
            if isinstance(content, list):
                content = " ".join(part.get("text", "") for part in content)
            words += [f"<{message.get('role')}>", *content.split()]
        return await self._serve(request, body, words, chat=True)

    async def _serve(
        self, request: web.Request, body: Mapping[str, Any], words: Sequence[str], *, chat: bool
    ) -> web.StreamResponse:
        handler = request.path
        config = self.config
        if self.state is not EngineState.SERVING:
            return self._error(handler, 500, "cannot schedule new futures after shutdown")
        if self.faults.answer_status != 200:
            return self._error(handler, self.faults.answer_status, "injected fault")
        name = body.get("model") or config.served_names[0]
        if name not in config.served_names:
            return self._error(handler, 404, f"The model `{name}` does not exist.")
        prompt_tokens = max(1, len(words))
        asked = body.get("max_tokens") or body.get("max_completion_tokens")
        finish = _Finish.LENGTH
        if asked is None and chat:
            asked, finish = min(_OPEN_ENDED_TOKENS, config.max_model_len - prompt_tokens), _Finish.STOP
        max_tokens = int(asked or 16)
        if prompt_tokens + max_tokens > config.max_model_len:
            return self._error(
                handler,
                400,
                f"This model's maximum context length is {config.max_model_len} tokens. However, you requested "
                f"{max_tokens} output tokens and your prompt contains {prompt_tokens} input tokens.",
            )
        if config.max_queued_requests is not None and self.in_flight >= config.max_queued_requests:
            self.metrics.rejected_requests.add()
            return self._error(handler, 503, "the number of queued requests is at its limit")
        if config.max_queued_tokens is not None:
            queued = sum(one.prompt_tokens for one in (*self._waiting, *self._running, *self._deferred))
            if queued + prompt_tokens > config.max_queued_tokens:
                self.metrics.rejected_tokens.add()
                return self._error(handler, 503, "the number of queued tokens is at its limit")
        sequence = self.submit(
            prompt_tokens,
            max_tokens,
            finish=finish,
            priority=int(body.get("priority") or 0),
            blocks=self._blocks(words) if config.prefix_caching else (),
            transfer=body.get("kv_transfer_params"),
        )
        task = asyncio.current_task()
        if task is not None:
            self._streams.add(task)
        try:
            if body.get("stream"):
                return await self._stream(request, body, sequence, name, chat=chat)
            return await self._whole(request, sequence, name, chat=chat)
        finally:
            if task is not None:
                self._streams.discard(task)
            self.abort(sequence)  # does nothing for a sequence that has ended

    def _blocks(self, words: Sequence[str]) -> tuple[int, ...]:
        size = self.config.block_size
        hashes: list[int] = []
        chain = 0
        for begin in range(0, len(words) - size + 1, size):
            chain = hash((chain, *words[begin : begin + size]))
            hashes.append(chain)
        return tuple(hashes)

    def _handover(self, sequence: _Sequence) -> dict[str, Any] | None:
        """Return what a prefill engine tells the decode engine, through the router."""
        if sequence.held is None:
            return None
        blocks = math.ceil(sequence.prompt_tokens / self.config.block_size)
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": list(range(blocks)),
            "remote_engine_id": self.engine_id,
            "remote_request_id": sequence.held,
            "remote_host": self.address,
            "remote_port": self.config.side_channel_port,
            "tp_size": 1,
        }

    async def _whole(
        self, request: web.Request, sequence: _Sequence, name: str, *, chat: bool
    ) -> web.StreamResponse:
        while not isinstance(finish := await sequence.outbox.get(), _Finish):
            pass
        if finish is _Finish.ERROR:
            return self._error(
                request.path, 500, "KV transfer failed: the prefill engine no longer has the request"
            )
        if finish is _Finish.ABORT:
            raise web.HTTPServiceUnavailable
        text = " ".join([SIMULATED_WORD] * sequence.generated)
        choice: dict[str, Any] = {
            "index": 0,
            "logprobs": None,
            "finish_reason": finish.value,
            "stop_reason": None,
        }
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        self._count_http(request.path, "POST", 200)
        return web.json_response(
            {
                "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
                "object": "chat.completion" if chat else "text_completion",
                "created": int(time.time()),
                "model": name,
                "choices": [choice],
                "usage": self._usage(sequence),
                "kv_transfer_params": self._handover(sequence),
            }
        )

    @staticmethod
    def _usage(sequence: _Sequence) -> dict[str, Any]:
        return {
            "prompt_tokens": sequence.prompt_tokens,
            "completion_tokens": sequence.generated,
            "total_tokens": sequence.prompt_tokens + sequence.generated,
        }

    async def _stream(
        self, request: web.Request, body: Mapping[str, Any], sequence: _Sequence, name: str, *, chat: bool
    ) -> web.StreamResponse:
        # vLLM answers 200 at once, but an engine that cannot take the KV must still be able to say 500.
        first = await sequence.outbox.get()
        if first is _Finish.ERROR:
            return self._error(
                request.path, 500, "KV transfer failed: the prefill engine no longer has the request"
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        frame = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        head = json.dumps(frame)[:-1].encode()
        what: int | _Finish = first
        while True:
            tokens = what if isinstance(what, int) else 0
            finish: _Finish | None = None if isinstance(what, int) else what
            while finish is None and not sequence.outbox.empty():
                more = sequence.outbox.get_nowait()
                if isinstance(more, int):
                    tokens += more
                else:
                    finish = more
            if finish is _Finish.ABORT:
                if request.transport is not None:
                    request.transport.abort()
                break
            text = f"{SIMULATED_WORD} " * tokens
            ending = f'"{finish.value}"' if finish is not None else "null"
            part = f'"delta": {{"content": "{text}"}}' if chat else f'"text": "{text}"'
            choice = f', "choices": [{{"index": 0, {part}, "logprobs": null, "finish_reason": {ending}}}]}}'
            await response.write(b"data: " + head + choice.encode() + b"\n\n")
            if finish is not None:
                if (body.get("stream_options") or {}).get("include_usage"):
                    last: dict[str, Any] = {**frame, "choices": [], "usage": self._usage(sequence)}
                    await response.write(b"data: " + json.dumps(last).encode() + b"\n\n")
                await response.write(b"data: [DONE]\n\n")
                break
            what = await sequence.outbox.get()
        self._count_http(request.path, "POST", 200)
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response


def slower(config: EngineConfig, factor: float) -> EngineConfig:
    """Return the configuration of an engine whose steps take ``factor`` times as long."""
    if not isinstance(config.steps, LabStepModel):
        raise TypeError("only the laboratory's own step model can be slowed: give a LabStepModel")
    return replace(config, steps=replace(config.steps, slow_factor=factor))
