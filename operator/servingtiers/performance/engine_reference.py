"""How the event simulation schedules, written to be read.

One vLLM V1 engine, one step at a time, with plain lists and no cleverness. The compiled kernel
(:mod:`servingtiers.performance.engine_kernel`) must give the same times for every request; this module says
what those times *should* be. What it models, in the order a step is composed:

1. Every decoding sequence gets one token. Where KV blocks run out, sequences are preempted (the one admitted
   last; under priority scheduling the lowest class and latest arrival), their cache is dropped, and they go to
   the front of the queue to be computed again.
2. A prompt that an earlier step began gets the next chunk of what is left of the token budget.
3. Waiting requests are admitted in order while budget, ``max_num_seqs`` and KV blocks last; none in a step that
   preempted. The last of them may get only a first chunk.

Under asynchronous scheduling (vLLM's default) a step is composed while the step before it runs, so it can admit
only requests that had arrived when that one began, unless the engine was idle.

A prompt's last chunk gives its first token; the last token of an answer is never written to the cache.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["ReferenceConfig", "ReferenceRequest", "simulate_closed", "simulate_open"]

StepTime = Callable[[float, float, int, float], float]
"""(new prompt tokens, attention pairs, decoding sequences, KV tokens read) -> ms."""


@dataclass(frozen=True, slots=True)
class ReferenceConfig:
    """One engine; the fields mean what they mean in :class:`~servingtiers.performance.engine_sim.EngineConfig`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_blocks: int
    block_size: int = 16
    priority: bool = False
    reserve: bool = False
    static: bool = False
    speculated: int = 0
    asynchronous: bool = False


@dataclass(slots=True)
class ReferenceRequest:
    """One request and what became of it; times in ms."""

    arrival: float
    prompt: int
    output: int
    cached: int = 0
    steps: int = -1
    """Decode steps after the first token; ``output - 1`` where speculation does not shorten them."""
    klass: int = 0
    generated: int = 0
    first: float = math.nan
    last: float = math.nan
    preempted: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0:
            self.steps = self.output - 1

    @property
    def tokens_per_step(self) -> float:
        """KV tokens gained per decode step."""
        return 1.0 if self.steps == self.output - 1 else (self.output - 1) / self.steps


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request that holds a slot."""

    request: ReferenceRequest
    order: int
    length: int
    """Tokens to be in the cache when its prompt is complete."""
    computed: int
    """Of these, those that are."""
    blocks: int = 0
    decoded: int = 0
    """Decode steps since its prompt was completed."""
    done: bool = False

    @property
    def decoding(self) -> bool:
        return self.computed == self.length

    @property
    def kv(self) -> float:
        return self.length + self.decoded * self.request.tokens_per_step


@dataclass(slots=True)
class _Engine:
    config: ReferenceConfig
    step_time: StepTime
    clock: float = 0.0
    free: int = 0
    queues: tuple[deque[ReferenceRequest], deque[ReferenceRequest]] = field(
        default_factory=lambda: (deque(), deque())
    )
    running: list[_Sequence] = field(default_factory=list)
    admissions: int = 0
    known: int = 0
    """Waiting requests that the composer of the next step has seen."""

    def __post_init__(self) -> None:
        self.free = self.config.kv_blocks

    def queue_of(self, request: ReferenceRequest) -> deque[ReferenceRequest]:
        return self.queues[request.klass if self.config.priority else 0]

    @property
    def waiting(self) -> int:
        return len(self.queues[0]) + len(self.queues[1])

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def blocks(self, tokens: float) -> int:
        return math.ceil(tokens / self.config.block_size)

    # --- composing a step ---
    def preempt(self) -> None:
        if self.config.priority:
            victim = max(self.running, key=lambda s: (s.request.klass, s.request.arrival, s.order))
        else:
            victim = max(self.running, key=lambda s: s.order)
        self.running.remove(victim)
        self.free += victim.blocks
        request = victim.request
        request.preempted += 1
        if victim.decoding:
            request.generated += 1 + victim.decoded
        self.queue_of(request).appendleft(request)

    def admit(self, budget: int) -> tuple[_Sequence, int] | None:
        """Admit the head of the queue; returns it and its chunk, or None if it does not fit."""
        queue = self.queues[0] or self.queues[1]
        request = queue[0]
        length = request.prompt + request.generated
        if self.config.reserve:
            need = self.blocks(request.prompt + request.output + self.config.speculated)
        else:
            need = self.blocks(length)
        if need > self.free:
            return None
        queue.popleft()
        self.free -= need
        sequence = _Sequence(request, self.admissions, length, request.cached, blocks=need)
        self.admissions += 1
        self.running.append(sequence)
        return sequence, min(length - request.cached, budget)

    def step(self) -> list[ReferenceRequest]:
        """Run one step; returns the requests it finished."""
        config = self.config
        preempted = False
        # 1. Decoding sequences.
        while True:
            decoding = [s for s in self.running if s.decoding]
            grow = [] if config.reserve else [s for s in decoding if s.kv % config.block_size == 0]
            if len(grow) <= self.free:
                break
            self.preempt()
            preempted = True
        for sequence in grow:
            sequence.blocks += 1
        self.free -= len(grow)
        for sequence in decoding:
            sequence.decoded += 1
        budget = config.max_num_batched_tokens - len(decoding) * (1 + config.speculated)
        # 2. The prompt under way.
        chunks: list[tuple[_Sequence, int]] = []
        for sequence in self.running:
            if not sequence.decoding and budget > 0:
                chunk = min(sequence.length - sequence.computed, budget)
                chunks.append((sequence, chunk))
                budget -= chunk
        # 3. New ones.
        unseen = max(self.waiting - self.known, 0) if config.asynchronous and self.running else 0
        if not preempted and not (config.static and self.running):
            if config.static:
                budget = 1 << 62
            while budget > 0 and self.waiting > unseen and len(self.running) < config.max_num_seqs:
                admitted = self.admit(budget)
                if admitted is None:
                    break
                chunks.append(admitted)
                budget -= admitted[1]
        self.known = self.waiting
        prompt = sum(chunk for _, chunk in chunks)
        pairs = sum(chunk * (sequence.computed + 0.5 * chunk) for sequence, chunk in chunks)
        kv = sum(s.kv for s in decoding)
        self.clock += self.step_time(float(prompt), pairs, len(decoding), kv)
        # The step's results.
        finished = []
        for sequence in decoding:
            if not sequence.done and sequence.decoded == sequence.request.steps - sequence.request.generated:
                finished.append(sequence.request)
                if config.static:
                    # It pads the batch until the whole batch is done.
                    sequence.done = True
                    self.free += sequence.blocks
                    sequence.blocks = 0
                else:
                    self.leave(sequence)
        for sequence, chunk in chunks:
            sequence.computed += chunk
            request = sequence.request
            if sequence.decoding:
                if math.isnan(request.first):
                    request.first = self.clock
                if request.steps - request.generated <= 0:
                    finished.append(request)
                    self.leave(sequence)
        if config.static and all(s.done for s in self.running):
            self.running.clear()
        for request in finished:
            request.last = self.clock
        return finished

    def leave(self, sequence: _Sequence) -> None:
        self.running.remove(sequence)
        self.free += sequence.blocks


def simulate_open(
    config: ReferenceConfig, step_time: StepTime, requests: Sequence[ReferenceRequest], delay: float = 0.0
) -> list[ReferenceRequest]:
    """Simulate one engine under requests that arrive at their own times.

    Args:
        config: The engine.
        step_time: The step model.
        requests: Ascending in arrival time; their results are written into them.
        delay: Time from a request's arrival at the front end to the scheduler, ms.

    Returns:
        The same requests.
    """
    engine = _Engine(config, step_time)
    pending = deque(requests)
    while pending or not engine.idle:
        if engine.idle:
            engine.clock = max(engine.clock, pending[0].arrival + delay)
        _receive(engine, pending, delay)
        engine.step()
    return list(requests)


def simulate_closed(
    config: ReferenceConfig,
    step_time: StepTime,
    requests: Sequence[ReferenceRequest],
    concurrency: int,
    delay: float = 0.0,
) -> list[ReferenceRequest]:
    """Simulate one engine with ``concurrency`` clients, each of which sends its next request when answered.

    Args:
        config: The engine.
        step_time: The step model.
        requests: In the order they are sent; arrival times and results are written into them.
        concurrency: Clients.
        delay: Time from a request's arrival at the front end to the scheduler, ms.

    Returns:
        The same requests.
    """
    engine = _Engine(config, step_time)
    unsent = deque(requests)
    pending: deque[ReferenceRequest] = deque()

    def send(count: int) -> None:
        for _ in range(min(count, len(unsent))):
            unsent[0].arrival = engine.clock
            pending.append(unsent.popleft())

    send(concurrency)
    while pending or not engine.idle:
        if engine.idle:
            engine.clock = max(engine.clock, pending[0].arrival + delay)
        _receive(engine, pending, delay)
        send(len(engine.step()))
    return list(requests)


def _receive(engine: _Engine, pending: deque[ReferenceRequest], delay: float) -> None:
    """Queue what has reached the scheduler by now."""
    while pending and pending[0].arrival + delay <= engine.clock:
        request = pending.popleft()
        engine.queue_of(request).append(request)
