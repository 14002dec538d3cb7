"""What a step costs beside its kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from servingtiers.performance.steps import SourceKind

if TYPE_CHECKING:
    from servingtiers.performance.steps import GridStepModel

__all__ = ["HOST_STEP_MS", "PIECEWISE_LAYER_MS", "with_host_time", "with_piecewise_graphs"]

HOST_STEP_MS = 0.126
"""Time between the kernels of two steps: launching, sampling, bookkeeping. Tables and rooflines add up kernels and
know nothing of it. The figure is the constant term of the step-time model that BLIS (llm-d's inference-sim, Apache-2.0)
publishes for vLLM; none of the points this project is judged by went into it."""
PIECEWISE_LAYER_MS = 0.010
"""What a decode step takes longer for each layer as a piecewise CUDA graph, which is left for every attention, than as
a full one. vLLM's authors measured 17 to 21 us for two layers, whatever the batch, with a model small enough to show
nothing else (vllm-project/vllm, pull request 9715). Serving small models shows as much or more: 12 to 26 us with one of 1.5
billion parameters, whose step is so short that the host cannot run ahead (pull request 20059)."""


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


def with_piecewise_graphs(model: GridStepModel, layers: int, layer_ms: float) -> GridStepModel:
    """Return the step model of an engine that replays piecewise graphs to decode; a measured profile has it already.

    Steps that hold prompt tokens run piecewise or without a graph in either case.
    """
    if model.source.kind is SourceKind.PROFILE:
        return model
    longer = layers * layer_ms
    return replace(
        model,
        grid=replace(
            model.grid, decode_ms=tuple(tuple(ms + longer for ms in row) for row in model.grid.decode_ms)
        ),
    )
