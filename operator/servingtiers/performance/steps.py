"""The step model: how long one engine step takes, as data every other layer reads.

A vLLM engine runs *steps* (iterations). Each step feeds some new prompt tokens (chunks of one or more
prompts) and one token of every decoding sequence through the model. Everything the product says about
latency, throughput and cost is built on :meth:`StepModel.step_ms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

__all__ = ["SourceKind", "StepModel", "StepSource"]


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
                tokens' chunks (prefix hits and earlier chunks); attention reads them.
            decoding: Sequences that decode one token in this step.
            kv_tokens: KV tokens read by the decoding sequences, summed over them.
        """
        ...
