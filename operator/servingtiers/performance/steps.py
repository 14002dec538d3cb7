"""The step model: how long one engine step takes, as data every other layer reads.

A vLLM engine runs *steps* (iterations; Orca, OSDI '22). Each step feeds some new prompt tokens (chunks of one
or more prompts; Sarathi-Serve, OSDI '24) and one token of every decoding sequence through the model.
Everything the product says about latency, throughput and cost is built on :meth:`StepModel.step_ms`.

Every step model is compiled to one :class:`StepGrid`, which says in plain tuples how to compute a step's
time, so that the compiled event simulation, the analytic path and a person with a pencil use the same
numbers. Step models are made by :func:`servingtiers.performance.select.step_model`.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Protocol

__all__ = [
    "GridStepModel",
    "Hull",
    "OutOfHullError",
    "SourceKind",
    "StepGrid",
    "StepModel",
    "StepSource",
    "compile_grid",
]


class SourceKind(StrEnum):
    """Where a step model's numbers come from, best first."""

    PROFILE = "profile"
    """Measured by the user on the very engine."""
    TABLE = "table"
    """A shipped table, interpolated inside its hull."""
    ROOFLINE_CALIBRATED = "calibrated roofline"
    """The roofline with constants fitted to tables of the same accelerator and data type."""
    ROOFLINE_DEFAULT = "default roofline, uncalibrated"
    """The roofline with generic constants: a guess with a wide band."""


@dataclass(frozen=True, slots=True)
class StepSource:
    """Where the numbers come from and how far they may be trusted."""

    kind: SourceKind
    detail: str
    """For a person: which table, engine version, fit."""
    band_percent: float
    """Half-width of the error band, per cent of the value."""


class OutOfHullError(ValueError):
    """A point lies so far from every measured one that no number is given; the message names the mend."""


class StepModel(Protocol):
    """Time of one engine step."""

    @property
    def source(self) -> StepSource:
        """Where the numbers come from."""
        ...

    @property
    def kv_capacity_tokens(self) -> int:
        """KV-cache capacity of one replica, tokens."""
        ...

    @property
    def grid(self) -> StepGrid:
        """The look-up grids :meth:`step_ms` is computed from; the two agree exactly."""
        ...

    def step_ms(
        self,
        prompt_tokens: float,
        prompt_past_tokens: float,
        decoding: float,
        kv_tokens: float,
    ) -> float:
        """Return the time of one engine step, milliseconds.

        Args:
            prompt_tokens: New prompt tokens computed in this step (0 for a pure decode step).
            prompt_past_tokens: Mean number of tokens already in the KV cache before each of these prompt
                tokens' chunks (prefix hits and earlier chunks); attention reads them. Where several prompts
                share the step, the exact value is ``Σ nᵢ(pastᵢ + nᵢ/2) / Σ nᵢ - Σ nᵢ/2``, which may be
                negative; :meth:`StepGrid.step_ms` takes the sum itself.
            decoding: Sequences that decode in this step.
            kv_tokens: KV tokens read by the decoding sequences, summed over them.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepGrid:
    """A step's time as look-up grids.

    With ``n`` new prompt tokens, ``b`` decoding sequences that read ``kv`` tokens in all, and
    ``pairs = Σ nᵢ·(pastᵢ + nᵢ/2)`` summed over the prompt chunks of the step::

        decode(b, c)  = bilinear(decode_ms)[b, c]             c = kv / b
        step(0, b)    = decode(b, c)
        step(n, b)    = max(decode(b, c),
                            linear(token_ms)[n + query_tokens·b]    matrix products, all-reduce, launches
                            + pair_ms·pairs                         prompt attention
                            + decode(b, c) - decode(b, 0))          decode attention

    Both interpolations are linear between points and continue the last segment beyond either end (a batch
    below the first point uses the first point). ``0 < n + query_tokens·b`` below the first token point uses
    that point.

    Under speculative decoding a decoding sequence feeds ``query_tokens = k + 1`` tokens into a step and gains
    ``tokens_per_step`` tokens on average; otherwise both are 1.
    """

    batch_axis: tuple[float, ...]
    """Decoding sequences, strictly increasing."""
    context_axis: tuple[float, ...]
    """Mean KV tokens of a decoding sequence, strictly increasing, beginning at 0."""
    decode_ms: tuple[tuple[float, ...], ...]
    """Milliseconds of a pure decode step, ``[batch][context]``; rises along both axes. At context 0 stands the
    step without its decode attention and whatever else a decoding sequence costs; a real context is at least
    1."""
    token_axis: tuple[float, ...]
    """Tokens in a step that holds prompt tokens, strictly increasing."""
    token_ms: tuple[float, ...]
    """Milliseconds of such a step without its attention."""
    pair_ms: float
    """Milliseconds of prompt attention for one new token reading one token."""
    query_tokens: float = 1.0
    """Tokens each decoding sequence feeds into a step."""
    tokens_per_step: float = 1.0
    """Tokens each decoding sequence gains in a step, on average."""
    acceptance: float = 0.0
    """Probability that a drafted token is accepted, given that those before it were."""

    def __post_init__(self) -> None:
        for label, axis in (
            ("batch_axis", self.batch_axis),
            ("context_axis", self.context_axis),
            ("token_axis", self.token_axis),
        ):
            if len(axis) < 2 or any(low >= high for low, high in pairwise(axis)):
                raise ValueError(f"{label} needs at least two strictly increasing points")
        if self.context_axis[0] != 0.0:
            raise ValueError("context_axis must begin at 0")
        if len(self.decode_ms) != len(self.batch_axis) or any(
            len(row) != len(self.context_axis) for row in self.decode_ms
        ):
            raise ValueError("decode_ms must be [batch][context]")
        if len(self.token_ms) != len(self.token_axis):
            raise ValueError("token_ms must have one value for each point of token_axis")

    def decode_step_ms(self, decoding: float, context: float) -> float:
        """Return the time of a pure decode step, milliseconds, for a batch at a mean context."""
        batches = self.batch_axis
        if decoding <= batches[0]:
            low, weight = 0, 0.0
        else:
            low = min(bisect_right(batches, decoding) - 1, len(batches) - 2)
            weight = (decoding - batches[low]) / (batches[low + 1] - batches[low])
        contexts = self.context_axis
        at = min(bisect_right(contexts, context) - 1, len(contexts) - 2)
        share = (context - contexts[at]) / (contexts[at + 1] - contexts[at])
        row = self.decode_ms[low]
        first = row[at] + share * (row[at + 1] - row[at])
        if weight == 0.0:
            return first
        row = self.decode_ms[low + 1]
        return first + weight * (row[at] + share * (row[at + 1] - row[at]) - first)

    def token_step_ms(self, tokens: float) -> float:
        """Return the time of a step with prompt tokens, without attention, for all its tokens."""
        axis = self.token_axis
        if tokens <= axis[0]:
            return self.token_ms[0]
        low = min(bisect_right(axis, tokens) - 1, len(axis) - 2)
        share = (tokens - axis[low]) / (axis[low + 1] - axis[low])
        return self.token_ms[low] + share * (self.token_ms[low + 1] - self.token_ms[low])

    def step_ms(self, prompt_tokens: float, pairs: float, decoding: float, kv_tokens: float) -> float:
        """Return the time of one step, milliseconds.

        Args:
            prompt_tokens: New prompt tokens.
            pairs: ``Σ nᵢ·(pastᵢ + nᵢ/2)`` over the prompt chunks: (new token, token read) pairs.
            decoding: Sequences that decode.
            kv_tokens: KV tokens they read, summed.
        """
        if decoding <= 0.0:
            if prompt_tokens <= 0.0:
                return 0.0
            return self.token_step_ms(prompt_tokens) + self.pair_ms * pairs
        decode = self.decode_step_ms(decoding, kv_tokens / decoding)
        if prompt_tokens <= 0.0:
            return decode
        mixed = self.token_step_ms(prompt_tokens + self.query_tokens * decoding) + self.pair_ms * pairs
        mixed += decode - self.decode_step_ms(decoding, 0.0)
        return max(mixed, decode)


@dataclass(frozen=True, slots=True)
class Hull:
    """The measured region of a step model."""

    max_batch: float
    max_context: float
    """Tokens of one sequence."""
    max_kv_tokens: float
    """KV tokens of a whole decode batch."""
    max_prompt_tokens: float
    """New tokens of one step."""
    reach: float = 4.0
    """How many times beyond the hull a number is still given."""

    def largest_batch(self, context: float) -> float:
        """Return how many sequences of ``context`` KV tokens may decode together for a number to be given still."""
        return self.reach * min(self.max_batch, self.max_kv_tokens / context)


@dataclass(frozen=True, slots=True)
class GridStepModel:
    """A step model that is its grid."""

    source: StepSource
    kv_capacity_tokens: int
    grid: StepGrid
    hull: Hull | None = None
    """The measured region; None where nothing was measured (a roofline)."""

    def step_ms(
        self,
        prompt_tokens: float,
        prompt_past_tokens: float,
        decoding: float,
        kv_tokens: float,
    ) -> float:
        """Return the time of one engine step, milliseconds; see :meth:`StepModel.step_ms`."""
        pairs = prompt_tokens * (prompt_past_tokens + 0.5 * prompt_tokens)
        return self.grid.step_ms(prompt_tokens, pairs, decoding, kv_tokens)

    def band_percent(self, prompt_tokens: float, decoding: float, context: float) -> float:
        """Return the error band at a point, per cent: the source's inside the hull, wider outside it.

        The band grows in proportion to the distance from the hull: at twice the hull it is doubled.

        Args:
            prompt_tokens: New prompt tokens of a step (0 for none).
            decoding: Sequences that decode.
            context: Mean KV tokens of one of them.

        Raises:
            OutOfHullError: The point lies more than :attr:`Hull.reach` times outside the hull.
        """
        hull = self.hull
        if hull is None:
            return self.source.band_percent
        excess, what, limit = max(
            (decoding / hull.max_batch, "batch", hull.max_batch),
            (context / hull.max_context, "context", hull.max_context),
            (decoding * context / hull.max_kv_tokens, "KV tokens", hull.max_kv_tokens),
            (prompt_tokens / hull.max_prompt_tokens, "prompt tokens of a step", hull.max_prompt_tokens),
        )
        if excess > hull.reach:
            raise OutOfHullError(
                f"{what} {excess * limit:.0f} is more than {hull.reach:g} times the measured {limit:.0f} "
                f"({self.source.detail}): lower it, or measure a profile that covers it"
            )
        return self.source.band_percent * max(1.0, excess)


def compile_grid(model: StepModel) -> StepGrid:
    """Return a step model's grid: axes and values as tuples, for a compiled simulation to copy."""
    return model.grid
