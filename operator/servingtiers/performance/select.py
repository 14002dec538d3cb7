"""One door to step models: the best source there is for a model on an accelerator.

A profile measured by the user comes first, then a shipped table of the same shape, then the calibrated
roofline, then the default roofline. What a table or profile does not cover (another weight or KV data type)
is reached by scaling it with the ratio of two rooflines, with a wider band. Speculative decoding transforms
whatever was found.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import log
from typing import TYPE_CHECKING

from servingtiers.catalog.models import KV_BYTES, WEIGHT_BYTES, ModelShape
from servingtiers.catalog.models import model as catalog_model
from servingtiers.catalog.names import CatalogError
from servingtiers.performance.roofline import Roofline, constants_for
from servingtiers.performance.speculation import Speculation, with_speculation
from servingtiers.performance.steps import GridStepModel, SourceKind, StepGrid, StepSource
from servingtiers.performance.tables import (
    StepTable,
    TableKey,
    find_table,
    grid_from_rows,
    hull_of,
    load_table,
    table_keys,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from servingtiers.catalog.accelerators import Accelerator
    from servingtiers.performance.profile import Profile

__all__ = [
    "DoesNotFitError",
    "corrected_grid",
    "ideal_pair_ms",
    "kv_capacity_tokens",
    "nearest_table",
    "scaled_grid",
    "step_model",
]

DEFAULT_MEMORY_UTILIZATION = 0.9
"""Share of the device memory the shipped tables' engines were given (vLLM's --gpu-memory-utilization)."""


class DoesNotFitError(CatalogError):
    """The weights leave no room for a KV cache on this many accelerators."""


def kv_capacity_tokens(
    model: ModelShape,
    accelerator: Accelerator,
    *,
    tensor_parallel: int = 1,
    weights: str = "bf16",
    kv_dtype: str = "bf16",
    memory_utilization: float = DEFAULT_MEMORY_UTILIZATION,
) -> int:
    """Return how many tokens the KV cache of one replica holds.

    ``(memory·utilisation - weights/tp - reserve) / (KV bytes per token / shards)`` on each accelerator. The
    reserve (activations, graphs, communication buffers, the CUDA context) grows with the width of the
    activations; its constants are fitted to the capacities listed in the shipped tables, which they reproduce
    within 0.5 GB.

    Raises:
        DoesNotFitError: Nothing is left for the cache.
    """
    width = max(model.hidden, model.heads * model.head_dim)
    reserve = 4.44e9 - 0.67e9 / tensor_parallel + (0.36e5 + 1.42e5 / tensor_parallel) * width
    free = (
        accelerator.memory_bytes * memory_utilization
        - model.weight_bytes(weights) / tensor_parallel
        - reserve
    )
    per_token = model.kv_bytes_per_token(kv_dtype) / model.kv_shards(tensor_parallel)
    tokens = int(free / per_token)
    if tokens < 16:  # one block
        raise DoesNotFitError(
            f"{model.name} in {weights} does not fit {tensor_parallel} x {accelerator.key}: "
            f"weights {model.weight_bytes(weights) / tensor_parallel / 1e9:.1f} GB and "
            f"{reserve / 1e9:.1f} GB of reserve on each against {accelerator.memory_bytes * memory_utilization / 1e9:.1f} GB; "
            "raise the tensor parallelism, quantize, or choose a larger accelerator"
        )
    return tokens


def step_model(
    model: ModelShape,
    accelerator: Accelerator,
    *,
    tensor_parallel: int = 1,
    weights: str = "bf16",
    kv_dtype: str = "bf16",
    profile: Profile | None = None,
    speculation: Speculation | None = None,
    memory_utilization: float = DEFAULT_MEMORY_UTILIZATION,
    use_tables: bool = True,
) -> GridStepModel:
    """Return the step model of one replica, from the best source there is.

    Args:
        model: The model's shape (:func:`servingtiers.catalog.models.model`).
        accelerator: The GPU (:func:`servingtiers.catalog.accelerators.accelerator`).
        tensor_parallel: GPUs of one replica.
        weights: Data type of the weights: bf16, fp8, int8 or int4.
        kv_dtype: Data type of the KV cache: bf16 or fp8.
        profile: The user's own measurements of this very configuration; they win over everything.
        speculation: Speculative decoding, if any.
        memory_utilization: vLLM's ``--gpu-memory-utilization``.
        use_tables: False to leave the shipped tables out and get the roofline.

    Raises:
        CatalogError: A data type is unknown, or the parallelism is impossible.
        DoesNotFitError: The weights leave no room for a KV cache.
    """
    if weights not in WEIGHT_BYTES:
        raise CatalogError(f"unknown weights data type {weights!r}: use one of {', '.join(WEIGHT_BYTES)}")
    if kv_dtype not in KV_BYTES:
        raise CatalogError(f"unknown KV cache data type {kv_dtype!r}: use one of {', '.join(KV_BYTES)}")
    if tensor_parallel < 1 or model.heads % tensor_parallel:
        raise CatalogError(
            f"tensor parallelism {tensor_parallel} does not divide the {model.heads} heads of {model.name}: "
            "choose 1, 2, 4 or 8"
        )
    if tensor_parallel > accelerator.gpus_per_node:
        raise CatalogError(
            f"tensor parallelism {tensor_parallel} exceeds the {accelerator.gpus_per_node} GPUs of a node of "
            f"{accelerator.key}: lower it"
        )
    if not 0.0 < memory_utilization <= 1.0:
        raise CatalogError(f"memory utilization {memory_utilization:g} must be above 0 and at most 1")
    found = _base(model, accelerator, tensor_parallel, weights, kv_dtype, use_tables)
    if profile is not None:
        roofline, _ = _roofline(model, accelerator, tensor_parallel, weights, kv_dtype)
        found = GridStepModel(
            source=StepSource(SourceKind.PROFILE, profile.describe(), 5.0),
            kv_capacity_tokens=profile.kv_capacity_tokens or found.kv_capacity_tokens,
            grid=grid_from_rows(profile.rows, ideal_pair_ms=ideal_pair_ms(roofline)),
            hull=hull_of(profile.rows),
        )
    elif memory_utilization != DEFAULT_MEMORY_UTILIZATION:
        found = replace(
            found,
            kv_capacity_tokens=kv_capacity_tokens(
                model,
                accelerator,
                tensor_parallel=tensor_parallel,
                weights=weights,
                kv_dtype=kv_dtype,
                memory_utilization=memory_utilization,
            ),
        )
    return with_speculation(found, speculation) if speculation is not None else found


def ideal_pair_ms(roofline: Roofline) -> float:
    """Return prompt attention per token pair at 100 % of the accelerator's peak, milliseconds."""
    return roofline.pair_ms * roofline.constants.mfu_attention


def _roofline(
    model: ModelShape, accelerator: Accelerator, tensor_parallel: int, weights: str, kv_dtype: str
) -> tuple[Roofline, StepSource]:
    """Return the roofline of a configuration, and what may be said of it."""
    constants, borrowed = constants_for(accelerator, weights)
    roofline = Roofline(model, accelerator, constants, tensor_parallel, weights, kv_dtype)
    worst = max(constants.decode_error_percent, constants.prefill_error_percent)
    if borrowed or model.is_moe:
        what = borrowed or "mixture of experts, not calibrated"
        return roofline, StepSource(
            SourceKind.ROOFLINE_DEFAULT, f"roofline with {what}", max(3.0 * worst, 30.0)
        )
    detail = f"roofline fitted to {constants.fitted_to} for {accelerator.key} {weights}"
    return roofline, StepSource(SourceKind.ROOFLINE_CALIBRATED, detail, 2.0 * worst)


@lru_cache(maxsize=512)
def _base(
    model: ModelShape,
    accelerator: Accelerator,
    tensor_parallel: int,
    weights: str,
    kv_dtype: str,
    use_tables: bool,
) -> GridStepModel:
    capacity = kv_capacity_tokens(
        model, accelerator, tensor_parallel=tensor_parallel, weights=weights, kv_dtype=kv_dtype
    )
    target, source = _roofline(model, accelerator, tensor_parallel, weights, kv_dtype)
    if use_tables:
        table = find_table(model, accelerator.key, weights, kv_dtype, tensor_parallel)
        if table is not None:
            return _from_table(table, target)
        like = nearest_table(model, accelerator, weights, tensor_parallel, kv_dtype=kv_dtype)
        if like is not None:
            return _corrected(like, target, capacity)
    return GridStepModel(source=source, kv_capacity_tokens=capacity, grid=target.grid(), hull=None)


def nearest_table(
    shape: ModelShape,
    accelerator: Accelerator,
    weights: str,
    tensor_parallel: int,
    *,
    kv_dtype: str = "bf16",
    leave_out: Callable[[TableKey], bool] = lambda _: False,
) -> StepTable | None:
    """Return the shipped table that resembles a configuration most, or None when none is near enough.

    Distance is the sum of the logarithms of the ratios of weights, KV bytes, layers, vocabulary and tensor
    parallelism, each with a weight, plus a constant for another data type of weights or KV cache. Only dense models
    on the same accelerator are compared, because a mixture of experts, or another memory system, errs in its own
    way. Groups of two GPUs and larger ones are not compared where PCIe joins them: vLLM reduces over them with
    different kernels.
    """
    if shape.is_moe or shape.mla is not None:
        return None
    best: tuple[float, TableKey] | None = None
    for key in table_keys():
        other = catalog_model(key.model)
        if key.accelerator != accelerator.key or other.is_moe or leave_out(key):
            continue
        if accelerator.interconnect.startswith("pcie") and (
            tensor_parallel != key.tensor_parallel and max(tensor_parallel, key.tensor_parallel) > 2
        ):
            continue
        distance = abs(log(other.linear_parameters / shape.linear_parameters))
        distance += 0.5 * abs(log(other.kv_bytes_per_token() / shape.kv_bytes_per_token()))
        distance += 0.5 * abs(log(other.layers / shape.layers))
        distance += 0.1 * abs(log(other.vocabulary / shape.vocabulary))
        distance += 0.7 * abs(log(key.tensor_parallel / tensor_parallel))
        distance += 0.7 * (key.weights != weights) + 0.7 * (key.kv_dtype != kv_dtype)
        if distance <= _NEAR and (best is None or (distance, key) < best):
            best = (distance, key)
    return load_table(best[1]) if best is not None else None


_NEAR = 2.5
"""Largest distance of a table that still corrects the roofline; beyond it the roofline stands alone."""


def corrected_grid(table: StepTable, target: Roofline) -> StepGrid:
    """Return a configuration's roofline, corrected by what the roofline gets wrong on a like table."""
    base = Roofline(
        catalog_model(table.key.model),
        target.accelerator,
        constants_for(target.accelerator, table.key.weights)[0],
        table.key.tensor_parallel,
        table.key.weights,
        table.key.kv_dtype,
    )
    return scaled_grid(_from_table(table, base).grid, base, target)


def _corrected(table: StepTable, target: Roofline, capacity: int) -> GridStepModel:
    constants, borrowed = constants_for(target.accelerator, target.weights)
    band = max(2.0 * constants.decode_error_percent, 2.0 * constants.prefill_error_percent, 10.0)
    if borrowed or target.kv_dtype != table.key.kv_dtype:
        band = max(band, 30.0)
    how = "borrowed" if borrowed else "fitted"
    return GridStepModel(
        source=StepSource(
            SourceKind.ROOFLINE_DEFAULT if borrowed else SourceKind.ROOFLINE_CALIBRATED,
            f"roofline {how} for {target.accelerator.key} {target.weights}, corrected by the {_describe(table)}",
            band,
        ),
        kv_capacity_tokens=capacity,
        grid=corrected_grid(table, target),
        hull=hull_of(table.rows),
    )


def _describe(table: StepTable) -> str:
    key = table.key
    return f"table of {key.model} {key.weights} on {key.tensor_parallel} x {key.accelerator}, {table.engine}"


def _from_table(table: StepTable, roofline: Roofline) -> GridStepModel:
    detail = _describe(table) + (", mixture of experts, unvalidated" if roofline.model.is_moe else "")
    return GridStepModel(
        source=StepSource(SourceKind.TABLE, detail, 30.0 if roofline.model.is_moe else 10.0),
        kv_capacity_tokens=table.kv_capacity_tokens,
        grid=grid_from_rows(table.rows, ideal_pair_ms=ideal_pair_ms(roofline)),
        hull=hull_of(table.rows),
    )


def scaled_grid(known: StepGrid, base: Roofline, target: Roofline) -> StepGrid:
    """Return a known grid times, point by point, the ratio of the target's roofline to its own.

    What the roofline gets wrong for both alike cancels. Decode attention and the rest of the step are scaled
    apart, so that each keeps its own ratio.
    """
    contexts = known.context_axis
    decode: list[tuple[float, ...]] = []
    for batch, row in zip(known.batch_axis, known.decode_ms, strict=True):
        rest = row[0] * target.rest_ms(batch, prompts=False) / base.rest_ms(batch, prompts=False)
        values = [rest]
        for context, value in zip(contexts[1:], row[1:], strict=True):
            kv = batch * context
            ratio = target.decode_attention_ms(batch, kv) / base.decode_attention_ms(batch, kv)
            values.append(max(rest + (value - row[0]) * ratio, values[-1]))
        decode.append(tuple(map(max, values, decode[-1])) if decode else tuple(values))
    tokens: list[float] = []
    for count, value in zip(known.token_axis, known.token_ms, strict=True):
        scaled = value * target.rest_ms(count, prompts=True) / base.rest_ms(count, prompts=True)
        tokens.append(max(scaled, tokens[-1]) if tokens else scaled)
    return replace(
        known,
        decode_ms=tuple(decode),
        token_ms=tuple(tokens),
        pair_ms=known.pair_ms * target.pair_ms / base.pair_ms,
    )
