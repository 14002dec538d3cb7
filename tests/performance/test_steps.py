"""The step grid: the formula in its docstring is what it computes, and malformed grids are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.performance.steps import (
    GridStepModel,
    Hull,
    OutOfHullError,
    SourceKind,
    StepGrid,
    StepSource,
    compile_grid,
)

GRID = StepGrid(
    batch_axis=(1.0, 8.0, 64.0),
    context_axis=(0.0, 1.0, 1000.0),
    decode_ms=((5.0, 5.1, 5.3), (5.5, 5.7, 7.0), (8.0, 8.8, 16.0)),
    token_axis=(1.0, 100.0, 1000.0),
    token_ms=(5.0, 6.0, 24.0),
    pair_ms=1e-5,
)


def test_a_pure_decode_step_is_the_bilinear_value():
    assert GRID.step_ms(0, 0, 8, 8 * 1000) == pytest.approx(7.0)
    assert GRID.step_ms(0, 0, 36, 36 * 1000) == pytest.approx((7.0 + 16.0) / 2)
    assert GRID.step_ms(0, 0, 8, 8 * 500.5) == pytest.approx((5.7 + 7.0) / 2)


def test_a_prompt_step_is_its_tokens_and_its_attention():
    assert GRID.step_ms(100, 5000, 0, 0) == pytest.approx(6.0 + 0.05)


def test_a_mixed_step_adds_decode_attention_to_the_token_curve():
    tokens = 92 + 8
    expected = 6.0 + 1e-5 * 4000 + (7.0 - 5.5)
    assert GRID.step_ms(92, 4000, 8, 8 * 1000) == pytest.approx(expected)
    assert tokens == 100


def test_a_mixed_step_is_never_shorter_than_the_decode_step():
    assert GRID.step_ms(1, 1, 64, 64 * 1000) >= GRID.step_ms(0, 0, 64, 64 * 1000)


def test_segments_continue_beyond_either_end():
    slope = (16.0 - 7.0) / 56.0
    assert GRID.step_ms(0, 0, 72, 72 * 1000) == pytest.approx(16.0 + 8 * slope)
    assert GRID.token_step_ms(2000) == pytest.approx(24.0 + 1000 * 18.0 / 900.0)
    assert GRID.token_step_ms(0.5) == 5.0


def test_an_empty_step_takes_no_time():
    assert GRID.step_ms(0, 0, 0, 0) == 0.0


def test_the_protocol_and_the_grid_agree():
    source = StepSource(SourceKind.TABLE, "synthetic", 5.0)
    model = GridStepModel(source, 1000, GRID)
    assert compile_grid(model) is GRID
    assert model.step_ms(92, 300, 8, 8000) == GRID.step_ms(92, 92 * (300 + 46), 8, 8000)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_axis": (1.0,)}, "batch_axis"),
        ({"batch_axis": (8.0, 1.0, 64.0)}, "batch_axis"),
        ({"context_axis": (1.0, 2.0, 3.0)}, "begin at 0"),
        ({"decode_ms": ((1.0, 2.0, 3.0),)}, "decode_ms"),
        ({"token_ms": (1.0,)}, "token_ms"),
        ({"token_axis": (1.0, 1.0, 2.0)}, "token_axis"),
    ],
)
def test_malformed_grids_are_refused(change, words):
    fields = {name: getattr(GRID, name) for name in StepGrid.__slots__}
    with pytest.raises(ValueError, match=words):
        StepGrid(**(fields | change))


HULL = Hull(max_batch=64, max_context=1000, max_kv_tokens=64_000, max_prompt_tokens=1000)
MODEL = GridStepModel(StepSource(SourceKind.TABLE, "table X", 10.0), 100_000, GRID, HULL)


def test_the_band_widens_outside_the_hull_and_far_points_are_refused():
    assert MODEL.band_percent(500, 32, 500) == 10.0
    assert MODEL.band_percent(0, 128, 100) == pytest.approx(20.0)
    assert MODEL.band_percent(3000, 1, 1) == pytest.approx(30.0)
    with pytest.raises(OutOfHullError, match=r"more than 4 times the measured 1000 \(table X\)") as caught:
        MODEL.band_percent(0, 1, 5000)
    assert "profile" in str(caught.value)


positive = st.floats(0.0, 4000.0)


@given(
    prompt=positive,
    past=positive,
    decoding=st.floats(1.0, 256.0),
    context=st.floats(1.0, 4000.0),
    more=positive,
)
def test_more_of_anything_never_makes_a_step_shorter(prompt, past, decoding, context, more):
    base = GRID.step_ms(prompt, prompt * (past + prompt / 2), decoding, decoding * context)
    slack = 1e-9 * base
    longer = prompt + more
    assert GRID.step_ms(longer, longer * (past + longer / 2), decoding, decoding * context) >= base - slack
    assert (
        GRID.step_ms(prompt, prompt * (past + more + prompt / 2), decoding, decoding * context)
        >= base - slack
    )
    assert (
        GRID.step_ms(prompt, prompt * (past + prompt / 2), decoding, decoding * (context + more))
        >= base - slack
    )
