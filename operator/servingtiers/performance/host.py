"""What a step costs beside its kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from servingtiers.performance.steps import SourceKind

if TYPE_CHECKING:
    from servingtiers.performance.steps import GridStepModel

__all__ = ["HOST_STEP_MS", "with_host_time"]

HOST_STEP_MS = 0.126
"""Time between the kernels of two steps: launching, sampling, bookkeeping. Tables and rooflines add up kernels and
know nothing of it. The figure is the constant term of the step-time model that BLIS (llm-d's inference-sim, Apache-2.0)
publishes for vLLM; none of the points this project is judged by went into it."""


def with_host_time(model: GridStepModel) -> GridStepModel:
    """Return the step model with the host's time in every step; a measured profile has it already."""
    if model.source.kind is SourceKind.PROFILE:
        return model
    grid = model.grid
    return replace(
        model,
        grid=replace(
            grid,
            decode_ms=tuple(tuple(ms + HOST_STEP_MS for ms in row) for row in grid.decode_ms),
            token_ms=tuple(ms + HOST_STEP_MS for ms in grid.token_ms),
        ),
    )
