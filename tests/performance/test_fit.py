"""The re-fit command: its columns are the roofline's formulas, it recovers constants, and it prints what it claims."""

from __future__ import annotations

import pytest

from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.performance.roofline import Roofline, RooflineConstants, load_constants
from servingtiers.performance.tables import FITTED, load_table, mixed_pairs, table_keys

np = pytest.importorskip("numpy")
fit = pytest.importorskip("servingtiers.performance.fit")

KEYS = [
    key
    for key in table_keys()
    if (key.accelerator, key.weights, key.kv_dtype) == ("h100-sxm-80gb", "bf16", "bf16")
    and key.model in FITTED
    and not model(key.model).is_moe
]
CONSTANTS = RooflineConstants(
    mbu=0.85,
    mbu_kv=0.7,
    mfu=0.6,
    mfu_attention=0.5,
    layer_us=40.0,
    prompt_layer_us=15.0,
    step_us=200.0,
    request_us=4.0,
    kv_head_us=0.02,
    token_us=0.1,
    allreduce_us=5.0,
    link_efficiency=0.6,
    allreduce_many_us=8.0,
    link_efficiency_many=0.5,
)


def test_the_columns_say_what_the_roofline_says():
    rows, _ = fit._columns(KEYS)
    predicted = fit._predict(rows, CONSTANTS)
    index = 0
    for key in KEYS:
        roofline = Roofline(
            model(key.model), accelerator(key.accelerator), CONSTANTS, key.tensor_parallel, key.weights
        )
        for row in load_table(key).rows:
            pairs = row.new_tokens**2 / 2
            if row.kind == "mixed":
                pairs = mixed_pairs(row.new_tokens, row.context)
            exact = roofline.step_ms(row.new_tokens, pairs, row.batch, row.batch * row.context)
            assert predicted[index] == pytest.approx(exact, rel=1e-9)
            index += 1
    assert index == len(predicted)


def test_constants_are_recovered_from_rows_made_with_them():
    rows, _ = fit._columns(KEYS)
    columns = {name: getattr(rows, name) for name in type(rows).__slots__}
    made = type(rows)(**(columns | {"ms": fit._predict(rows, CONSTANTS)}))
    found = fit._fit(made)
    error = np.abs(fit._predict(made, found) / made.ms - 1.0)
    assert float(np.median(error)) < 0.002
    assert found.mbu == pytest.approx(CONSTANTS.mbu, rel=0.05)
    assert found.mfu == pytest.approx(CONSTANTS.mfu, rel=0.05)
    assert found.mbu_kv == pytest.approx(CONSTANTS.mbu_kv, rel=0.05)


def test_a_refit_gives_the_shipped_constants_and_keeps_the_claim():
    report = fit.fit_all(only=lambda gpu, weights: (gpu, weights) == ("h100-sxm-80gb", "bf16"))[0]
    assert report.constants == load_constants()["h100-sxm-80gb", "bf16"]
    assert report.held_out["decode"] <= 4.5
    assert report.held_out["prefill"] <= 8.0
    assert report.models == 8
    text = fit.render([report])
    assert "h100-sxm-80gb" in text
    assert "models left out in turn" in text


def test_the_two_seventy_billion_llamas_are_left_out_together():
    _, families = fit._columns(KEYS)
    assert families.count("llama-70b") == 1
    assert not any("70b" in name.lower() and name != "llama-70b" for name in families)
