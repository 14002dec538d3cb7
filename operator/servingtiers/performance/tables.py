"""Step tables: measured (or database-derived) step times, interpolated inside their hull.

A table holds three kinds of rows: *decode* (batch × context), *prefill* (new tokens of one prompt, nothing
cached) and *mixed* (new tokens beside decoding sequences). :func:`grid_from_rows` turns them into the
:class:`~servingtiers.performance.steps.StepGrid` everything else uses. Raw tables are not monotone (kernels
switch, measurements scatter), and a planner that finds a larger batch faster would pick nonsense, so decode
times are replaced by the middle of their upper and lower monotone envelopes.

The shipped file, ``data/step_tables.csv.gz``, is scanned for one key at a time and parsed lazily; nothing
here imports numpy.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import log
from statistics import median

from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import ModelShape, model
from servingtiers.performance.steps import Hull, StepGrid

__all__ = [
    "FITTED",
    "MIXED_CONTEXT",
    "MODEL_IDS",
    "StepRow",
    "StepTable",
    "TableKey",
    "find_table",
    "grid_from_rows",
    "hull_of",
    "load_table",
    "monotone_middle",
    "table_keys",
]

MIXED_CONTEXT = 1024
"""Context of the decoding sequences, and length of the prompts, in the shipped mixed rows."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One measured step."""

    kind: str
    """``decode``, ``prefill`` or ``mixed``."""
    batch: int
    """Decoding sequences (0 for prefill rows)."""
    context: int
    """Mean KV tokens of a decoding sequence; tokens already cached before the prompt in prefill rows."""
    new_tokens: int
    """New prompt tokens (0 for decode rows)."""
    ms: float


@dataclass(frozen=True, slots=True, order=True)
class TableKey:
    """What a shipped table was made for."""

    accelerator: str
    """Catalogue key."""
    model: str
    """Catalogue id of the model."""
    weights: str
    kv_dtype: str
    tensor_parallel: int


@dataclass(frozen=True, slots=True)
class StepTable:
    """One table and its origin."""

    key: TableKey
    engine: str
    """Engine and database version the rows come from."""
    kv_capacity_tokens: int
    rows: tuple[StepRow, ...]


MODEL_IDS = {
    # The roofline is fitted to these.
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "codellama-34b": "codellama/CodeLlama-34b-hf",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
    # And these it has never seen.
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
    "yi-34b": "01-ai/Yi-34B",
}
"""Short names of the models that have tables."""
FITTED = frozenset(list(MODEL_IDS.values())[:10])
"""Models whose tables the roofline is fitted to, with 16 bits in the KV cache."""


@cache
def _blocks() -> Mapping[TableKey, str]:
    """Return the unparsed lines of each table: 20 ms for the file, once; a table is parsed when asked for."""
    packed = (files(__package__) / "data" / "step_tables.csv.gz").read_bytes()
    lines: dict[str, list[str]] = {}
    text = gzip.decompress(packed).decode("ascii")
    for line in text.splitlines()[1:]:
        # gpu,model,weights,kv,tp | db_version,kv_capacity_tokens,kind,batch,ctx_or_newtokens,ms
        head, rest = line.split(f",{_ENGINE}", 1)
        lines.setdefault(head, []).append(rest)
    blocks: dict[TableKey, str] = {}
    for head, rows in lines.items():
        gpu, name, weights, kv_dtype, tensor_parallel = head.split(",")
        key = TableKey(accelerator(gpu).key, MODEL_IDS[name], weights, kv_dtype, int(tensor_parallel))
        blocks[key] = "\n".join(rows)
    return blocks


_ENGINE = "vllm "


def table_keys() -> tuple[TableKey, ...]:
    """Return the key of every shipped table."""
    return tuple(_blocks())


@cache
def load_table(key: TableKey) -> StepTable:
    """Return one shipped table.

    Raises:
        KeyError: There is no such table.
    """
    engine, capacity = "", 0
    rows: list[StepRow] = []
    for version, capacity_text, kind, batch_text, size_text, ms in csv.reader(_blocks()[key].split("\n")):
        engine, capacity = _ENGINE + version, int(capacity_text)
        batch, size, value = int(batch_text), int(size_text), float(ms)
        if kind == "decode":
            rows.append(StepRow("decode", batch, size, 0, value))
        elif kind == "prefill":
            rows.append(StepRow("prefill", 0, 0, size, value))
        else:
            rows.append(StepRow("mixed", batch, MIXED_CONTEXT, size, value))
    return StepTable(key, engine, capacity, tuple(rows))


@cache
def find_table(
    shape: ModelShape, accelerator_key: str, weights: str, kv_dtype: str, tensor_parallel: int
) -> StepTable | None:
    """Return the shipped table of a model of this shape, or None.

    Models are compared by shape, not by name: a fine-tune, or the Llama 3 that differs from Llama 3.1 only in
    its position encoding, runs at the same speed. Vocabularies may differ by 1 %.
    """
    for key in _blocks():
        if (key.accelerator, key.weights, key.kv_dtype, key.tensor_parallel) == (
            accelerator_key,
            weights,
            kv_dtype,
            tensor_parallel,
        ) and same_speed(shape, model(key.model)):
            return load_table(key)
    return None


def same_speed(one: ModelShape, other: ModelShape) -> bool:
    """Whether two shapes run at the same speed: everything but names, context and a percent of vocabulary."""
    fields = (
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "intermediate",
        "experts",
        "experts_per_token",
        "shared_experts",
        "dense_layers",
        "mla",
    )
    if any(getattr(one, name) != getattr(other, name) for name in fields):
        return False
    return abs(one.vocabulary - other.vocabulary) <= 0.01 * other.vocabulary


def monotone_middle(grid: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Return the nearest grid that falls along neither axis, in the sense of the largest change.

    The upper envelope takes at each point the largest value at or below it on both axes, the lower envelope
    the smallest at or above it. Both are monotone, every monotone grid within distance ``d`` of the input
    lies within ``d`` of both, and their mean halves the worst distance: the L∞ isotonic regression.
    """
    upper = [list(row) for row in grid]
    for i, row in enumerate(upper):
        for j in range(len(row)):
            if i:
                row[j] = max(row[j], upper[i - 1][j])
            if j:
                row[j] = max(row[j], row[j - 1])
    lower = _lower_envelope(grid)
    return tuple(
        tuple((high + low) / 2.0 for high, low in zip(up, down, strict=True))
        for up, down in zip(upper, lower, strict=True)
    )


def _lower_envelope(grid: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return at each point the smallest value at or above it on both axes."""
    lower = [list(row) for row in grid]
    for i in reversed(range(len(lower))):
        row = lower[i]
        for j in reversed(range(len(row))):
            if i < len(lower) - 1:
                row[j] = min(row[j], lower[i + 1][j])
            if j < len(row) - 1:
                row[j] = min(row[j], row[j + 1])
    return lower


PADDING_SLACK = 1.05
"""How far above the time of a larger batch a measured decode time is believed."""


def without_spikes(grid: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Return the grid with values far above those of a larger batch or context brought down to them.

    vLLM pads a batch to the next captured CUDA graph, so a batch never needs to take longer than a larger
    one; a table that says so by more than :data:`PADDING_SLACK` has caught a kernel the engine need not use
    (the shipped B200 FP8 rows at batch 1–4 are the case in point: 1.5 times the time of batch 8).
    """
    return tuple(
        tuple(min(value, PADDING_SLACK * least) for value, least in zip(row, low, strict=True))
        for row, low in zip(grid, _lower_envelope(grid), strict=True)
    )


def _line(points: Sequence[tuple[float, float]], at: float) -> float:
    """Piecewise-linear interpolation of (x, y) points that continues the first and last segments."""
    if len(points) == 1:
        return points[0][1]
    index = 0
    while index < len(points) - 2 and at > points[index + 1][0]:
        index += 1
    (x0, y0), (x1, y1) = points[index], points[index + 1]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def _growing_corner(grid: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    """Return the grid with a last cell from which times can be told for more sequences and longer contexts at once.

    Each sequence reads its own KV cache, so a longer context costs a larger batch no less than a smaller one. Where a
    few noisy points say otherwise, times beyond both ends would fall, below zero in the end.
    """
    least = grid[-1][-2] + grid[-2][-1] - grid[-2][-2]
    return (*grid[:-1], (*grid[-1][:-1], max(grid[-1][-1], least)))


def _decode_grid(
    rows: Iterable[StepRow],
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Return batch axis, context axis (0 and 1 added) and the raw decode grid with its holes filled.

    Cells beyond the KV capacity are missing from tables. Decode attention is linear in the KV tokens read, so
    they, like context 1, continue the row's last segments; a single-point row is taken as flat.
    """
    by_batch: dict[int, dict[int, float]] = {}
    for row in rows:
        if row.kind == "decode":
            by_batch.setdefault(row.batch, {})[row.context] = row.ms
    batches = sorted(by_batch)
    contexts = sorted({context for row in by_batch.values() for context in row})
    grid: list[list[float]] = []
    for batch in batches:
        points = [(float(context), ms) for context, ms in sorted(by_batch[batch].items())]
        if len(points) == 1 and grid:  # borrow the slope of the row below, in proportion to the batch
            below = grid[-1]
            slope = (below[-1] - below[0]) / (contexts[-1] - 1.0) if len(contexts) > 1 else 0.0
            slope *= batch / batches[len(grid) - 1]
            (at, ms), points = points[0], []
            points = [(at, ms), (at + 1.0, ms + slope)]
        first = max(_line(points, 1.0), 0.5 * points[0][1])
        grid.append([first, *(_line(points, float(context)) for context in contexts)])
    axis = (
        (1.0, *(float(context) for context in contexts)) if contexts[0] > 1 else tuple(map(float, contexts))
    )
    if contexts[0] <= 1:
        grid = [row[1:] for row in grid]
    return tuple(float(batch) for batch in batches), axis, tuple(tuple(row) for row in grid)


def _pair_ms(prefill: Sequence[tuple[float, float]], ideal_pair_ms: float) -> float:
    """Return the cost of prompt attention per token pair, from the bend of the prefill curve.

    Linear layers are linear in the tokens once they are compute-bound, attention is quadratic; with three
    points at 2,048 tokens or more the second difference is attention's alone. Measured curves scatter, so the
    estimate is kept within what FlashAttention reaches: 30–80 % of the peak (FlashAttention-2,
    arXiv:2307.08691, table and figures; FlashAttention-3, arXiv:2407.08608).
    """
    long = [(tokens, ms) for tokens, ms in prefill if tokens >= 2048]
    estimate = ideal_pair_ms / 0.5
    if len(long) >= 3:
        (x0, y0), (x1, y1), (x2, y2) = long[-3:]
        bend = ((y2 - y1) / (x2 - x1) - (y1 - y0) / (x1 - x0)) / (x2 - x0)
        estimate = 2.0 * bend  # a prompt of n tokens has n²/2 pairs
    return min(max(estimate, ideal_pair_ms / 0.8), ideal_pair_ms / 0.3)


def grid_from_rows(rows: Sequence[StepRow], *, ideal_pair_ms: float, monotone: bool = True) -> StepGrid:
    """Return the look-up grid of measured rows.

    The time of a step that holds prompt tokens is taken apart: token curve + prompt attention + decode
    attention. Prefill rows give the curve; where there are mixed rows the curve is scaled so that the whole
    reproduces them (the median over batches at each number of new tokens), because nearly every prompt token
    of a loaded engine is computed in a mixed step.

    Args:
        rows: Decode rows on at least two batches and contexts, and at least two prefill rows; mixed rows are
            optional.
        ideal_pair_ms: Prompt attention per token pair at 100 % of the accelerator's peak, milliseconds.
        monotone: Replace decode times by :func:`monotone_middle`; False only to measure what that costs.

    Raises:
        ValueError: Too few rows of a kind; the message names which.
    """
    batches, contexts, raw = _decode_grid(rows) if any(row.kind == "decode" for row in rows) else ((), (), ())
    if len(batches) < 2 or len(contexts) < 3:
        raise ValueError("too few decode rows: give at least two batches at two contexts each")
    decode = _growing_corner(monotone_middle(without_spikes(raw))) if monotone else raw
    prefill = sorted((float(r.new_tokens), r.ms) for r in rows if r.kind == "prefill" and r.context == 0)
    if len(prefill) < 2:
        raise ValueError("too few prefill rows: give at least two prompt lengths with nothing cached")
    pair_ms = _pair_ms(prefill, ideal_pair_ms)

    # The token curve: prefill without its attention; below the shortest prompt, decode without its attention.
    curve = {tokens: ms - pair_ms * tokens * tokens / 2.0 for tokens, ms in prefill}
    shortest = min(curve)
    for batch, row in zip(batches, decode, strict=True):
        if batch < shortest:
            curve[batch] = min(row[0], curve[shortest])
    tokens = sorted(curve)
    values: list[float] = []
    for count in tokens:
        values.append(max(curve[count], values[-1]) if values else curve[count])

    # A step without its decode attention, per batch: context 0 of the grid. For multi-head attention the
    # decode row at context 1 still holds a cost per sequence; the token curve does not.
    def bare(batch: float, first: float) -> float:
        return min(first, _line(tuple(zip(tokens, values, strict=True)), batch))

    floor = [bare(batch, row[0]) for batch, row in zip(batches, decode, strict=True)]
    grid = StepGrid(
        batch_axis=batches,
        context_axis=(0.0, *contexts),
        decode_ms=tuple((low, *row) for low, row in zip(floor, decode, strict=True)),
        token_axis=tuple(tokens),
        token_ms=tuple(values),
        pair_ms=pair_ms,
    )
    mixed = [row for row in rows if row.kind == "mixed"]
    return _scaled_to_mixed(grid, mixed) if mixed else grid


def mixed_pairs(new_tokens: float, prompt: float) -> float:
    """Return the attention pairs of ``new_tokens`` tokens of prompts of ``prompt`` tokens, on average."""
    return new_tokens * prompt / 2.0


def _scaled_to_mixed(grid: StepGrid, mixed: Sequence[StepRow]) -> StepGrid:
    """Scale the token curve so that composed mixed steps reproduce measured ones."""
    factors: dict[int, list[float]] = {}
    for row in mixed:
        kv = float(row.batch * row.context)
        pairs = mixed_pairs(row.new_tokens, row.context)
        composed = grid.step_ms(row.new_tokens, pairs, row.batch, kv)
        curve = grid.token_step_ms(row.new_tokens + row.batch)
        factors.setdefault(row.new_tokens, []).append(max((curve + row.ms - composed) / curve, 0.5))
    points = [(log(tokens), median(values)) for tokens, values in sorted(factors.items())]
    scaled: list[float] = []
    for tokens, ms in zip(grid.token_axis, grid.token_ms, strict=True):
        at = min(max(log(tokens), points[0][0]), points[-1][0])
        scaled.append(ms * _line(points, at))
        if len(scaled) > 1:
            scaled[-1] = max(scaled[-1], scaled[-2])
    return StepGrid(
        batch_axis=grid.batch_axis,
        context_axis=grid.context_axis,
        decode_ms=grid.decode_ms,
        token_axis=grid.token_axis,
        token_ms=tuple(scaled),
        pair_ms=grid.pair_ms,
    )


def hull_of(rows: Sequence[StepRow]) -> Hull:
    """Return the region that rows cover."""
    decode = [row for row in rows if row.kind == "decode"]
    return Hull(
        max_batch=float(max(row.batch for row in decode)),
        max_context=float(max(row.context for row in decode)),
        max_kv_tokens=float(max(row.batch * row.context for row in decode)),
        max_prompt_tokens=float(max(row.new_tokens for row in rows if row.kind != "decode")),
    )
