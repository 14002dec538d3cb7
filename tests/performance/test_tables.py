"""Step tables: monotone once loaded, true to their rows, found by shape, and quick to load."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.catalog.models import model
from servingtiers.performance import tables
from servingtiers.performance.tables import StepRow, TableKey, grid_from_rows, monotone_middle

PAIR_MS = 3e-7
KEY = TableKey("h100-sxm-80gb", "meta-llama/Llama-3.1-8B", "bf16", "bf16", 1)

grids = st.integers(1, 7).flatmap(
    lambda columns: st.lists(
        st.lists(st.floats(0.1, 1000.0), min_size=columns, max_size=columns), min_size=1, max_size=7
    )
)


@given(grids)
def test_the_monotone_middle_rises_along_both_axes(grid):
    middle = monotone_middle(grid)
    assert all(low <= high for row in middle for low, high in pairwise(row))
    assert all(low <= high for one, two in pairwise(middle) for low, high in zip(one, two, strict=True))


@given(grids)
def test_the_monotone_middle_moves_no_value_further_than_half_the_worst_fall(grid):
    middle = monotone_middle(grid)
    size = range(len(grid[0]))
    worst = max(
        grid[i][j] - grid[k][m]
        for i in range(len(grid))
        for j in size
        for k in range(i, len(grid))
        for m in size[j:]
    )
    moved = max(
        abs(a - b) for one, two in zip(grid, middle, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert moved <= worst / 2.0 + 1e-9


@given(grids)
def test_a_monotone_grid_is_left_alone(grid):
    once = monotone_middle(grid)
    for one, two in zip(once, monotone_middle(once), strict=True):
        assert one == pytest.approx(two)


@given(grids)
def test_spikes_come_down_to_what_a_larger_batch_takes_and_nothing_rises(grid):
    flat = tables.without_spikes(grid)
    for i, row in enumerate(flat):
        for j, value in enumerate(row):
            assert value <= grid[i][j]
            least = min(grid[k][m] for k in range(i, len(grid)) for m in range(j, len(row)))
            assert value <= tables.PADDING_SLACK * least + 1e-9


@pytest.mark.parametrize(
    "key",
    tables.table_keys(),
    ids=lambda key: "-".join(
        map(str, (key.accelerator, key.model.rsplit("/")[-1], key.weights, key.kv_dtype, key.tensor_parallel))
    ),
)
def test_every_shipped_table_loads_into_a_monotone_grid(key):
    table = tables.load_table(key)
    grid = grid_from_rows(table.rows, ideal_pair_ms=PAIR_MS)
    assert table.kv_capacity_tokens > 0
    for row in grid.decode_ms:
        assert all(0.0 < low <= high for low, high in pairwise(row))
    for one, two in pairwise(grid.decode_ms):
        assert all(low <= high for low, high in zip(one[1:], two[1:], strict=True))
    assert all(low <= high for low, high in pairwise(grid.token_ms))
    assert grid.pair_ms > 0.0


def test_there_are_536_tables_of_the_published_configurations():
    keys = tables.table_keys()
    assert len(keys) == 536
    assert {key.model for key in keys} == set(tables.MODEL_IDS.values())
    assert {key.model for key in keys if key.kv_dtype == "fp8"} == tables.FITTED
    assert {key.accelerator for key in keys} == {
        "a100-sxm-80gb",
        "h100-sxm-80gb",
        "h200-sxm-141gb",
        "b200-sxm-180gb",
        "l40s-48gb",
    }


def test_interpolation_returns_the_rows_of_a_table_that_is_already_monotone():
    table = tables.load_table(KEY)
    grid = grid_from_rows(table.rows, ideal_pair_ms=PAIR_MS)
    errors = [
        abs(grid.step_ms(0, 0, row.batch, row.batch * row.context) / row.ms - 1.0)
        for row in table.rows
        if row.kind == "decode"
    ]
    assert median(errors) < 1e-9
    assert max(errors) < 0.03


def test_composed_mixed_steps_reproduce_measured_ones_within_a_few_percent():
    errors = []
    for key in tables.table_keys():
        if key.weights != "bf16" or model(key.model).is_moe:
            continue
        table = tables.load_table(key)
        grid = grid_from_rows(table.rows, ideal_pair_ms=PAIR_MS)
        errors += [
            abs(
                grid.step_ms(
                    row.new_tokens,
                    tables.mixed_pairs(row.new_tokens, row.context),
                    row.batch,
                    row.batch * row.context,
                )
                / row.ms
                - 1.0
            )
            for row in table.rows
            if row.kind == "mixed"
        ]
    assert len(errors) > 2000
    assert median(errors) < 0.02
    assert sorted(errors)[int(0.9 * len(errors))] < 0.10


def synthetic_rows(*, mixed=False):
    """Rows of an engine whose cost is known exactly: 5 + 0.02 n + 1e-6 n²/2 + 1e-5 kv."""
    rows = [
        StepRow("decode", batch, context, 0, 5.0 + 0.02 * batch + 1e-5 * batch * context)
        for batch in (1, 8, 64)
        for context in (128, 1024, 8192)
    ]
    rows += [
        StepRow("prefill", 0, 0, tokens, 5.0 + 0.02 * tokens + 1e-6 * tokens * tokens / 2)
        for tokens in (64, 512, 2048, 4096, 8192)
    ]
    if mixed:
        rows += [
            StepRow(
                "mixed",
                batch,
                1024,
                tokens,
                5.0 + 0.02 * (tokens + batch) + 1e-6 * tokens * 512 + 1e-5 * batch * 1024,
            )
            for batch in (1, 32)
            for tokens in (64, 512, 2048)
        ]
    return rows


@pytest.mark.parametrize("mixed", [False, True])
def test_a_linear_engine_is_recovered_exactly_attention_included(mixed):
    grid = grid_from_rows(synthetic_rows(mixed=mixed), ideal_pair_ms=0.5e-6)
    assert grid.pair_ms == pytest.approx(1e-6)
    for prompt, past, batch, context in (
        (300, 0, 5, 700),
        (1000, 3000, 30, 4000),
        (6000, 100, 1, 10),
        (0, 0, 20, 5000),
    ):
        expected = (
            5.0 + 0.02 * (prompt + batch) + 1e-6 * prompt * (past + prompt / 2) + 1e-5 * batch * context
        )
        pairs = prompt * (past + prompt / 2)
        assert grid.step_ms(prompt, pairs, batch, batch * context) == pytest.approx(expected, rel=2e-3)


def test_cells_beyond_the_kv_capacity_continue_their_row():
    rows = [
        row
        for row in synthetic_rows()
        if not (row.kind == "decode" and row.batch == 64 and row.context == 8192)
    ]
    grid = grid_from_rows(rows, ideal_pair_ms=0.5e-6)
    assert grid.step_ms(0, 0, 64, 64 * 8192) == pytest.approx(5.0 + 0.02 * 64 + 1e-5 * 64 * 8192, rel=1e-6)


def test_measured_mixed_steps_move_the_token_curve():
    rows = [
        replace(row, ms=row.ms * 1.3) if row.kind == "mixed" else row for row in synthetic_rows(mixed=True)
    ]
    grid = grid_from_rows(rows, ideal_pair_ms=0.5e-6)
    for row in rows:
        if row.kind == "mixed" and row.new_tokens >= 512:
            pairs = tables.mixed_pairs(row.new_tokens, row.context)
            composed = grid.step_ms(row.new_tokens, pairs, row.batch, row.batch * row.context)
            assert composed == pytest.approx(row.ms, rel=0.03)


def test_too_few_rows_are_refused_with_what_is_missing():
    rows = synthetic_rows()
    with pytest.raises(ValueError, match="two batches"):
        grid_from_rows([row for row in rows if row.kind != "decode"], ideal_pair_ms=1e-6)
    with pytest.raises(ValueError, match="two batches"):
        grid_from_rows([row for row in rows if row.kind != "decode" or row.batch == 1], ideal_pair_ms=1e-6)
    with pytest.raises(ValueError, match="two prompt lengths"):
        grid_from_rows([row for row in rows if row.kind != "prefill"], ideal_pair_ms=1e-6)


def test_tables_are_found_by_shape_not_by_name():
    found = tables.find_table(
        model("meta-llama/Meta-Llama-3-8B-Instruct"), "h100-sxm-80gb", "bf16", "bf16", 1
    )
    assert found is not None
    assert found.key == KEY
    assert (
        tables.find_table(model("codellama/CodeLlama-7b-hf"), "a100-sxm-80gb", "bf16", "bf16", 1) is not None
    )
    # Mistral 7B differs from Llama 3.1 8B only in its vocabulary: 11 % of all weights, so it is another model.
    assert tables.find_table(model("mistralai/Mistral-7B-v0.3"), "h100-sxm-80gb", "bf16", "bf16", 1) is None


def test_loading_the_first_table_costs_less_than_a_tenth_of_a_second_and_no_numpy():
    script = (
        "import sys, time; from servingtiers.performance import tables; begin = time.process_time();"
        f"tables.load_table(tables.{KEY!r}); print(time.process_time() - begin, 'numpy' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    seconds, numpy = output.split()
    assert float(seconds) < 0.1
    assert numpy == "False"
