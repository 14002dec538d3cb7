"""The door to step models: the best source wins, says what it is, and impossible wishes are refused."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from properties import examples
from servingtiers.catalog.accelerators import accelerator, accelerators
from servingtiers.catalog.models import model, models
from servingtiers.catalog.names import CatalogError
from servingtiers.performance import tables
from servingtiers.performance.profile import parse_profile
from servingtiers.performance.select import DoesNotFitError, kv_capacity_tokens, nearest_table, step_model
from servingtiers.performance.speculation import Speculation
from servingtiers.performance.steps import SourceKind

LLAMA = model("meta-llama/Llama-3.1-8B")
H100 = accelerator("h100")
PROFILE = parse_profile(
    "mine.csv",
    [
        "# engine: vLLM 0.24.0 on my H100",
        "kind,batch,context_tokens,new_tokens,ms,kv_capacity_tokens",
        *(f"decode,{b},{c},,{7 + 0.03 * b + 1e-5 * b * c},400000" for b in (1, 16, 128) for c in (256, 4096)),
        *(f"prefill,,0,{n},{7 + 0.02 * n},400000" for n in (128, 1024, 8192)),
    ],
)


def test_a_profile_wins_over_the_table_and_brings_its_capacity():
    measured = step_model(LLAMA, H100, profile=PROFILE)
    assert measured.source.kind is SourceKind.PROFILE
    assert "mine.csv" in measured.source.detail
    assert "vLLM 0.24.0 on my H100" in measured.source.detail
    assert measured.kv_capacity_tokens == 400_000
    assert measured.step_ms(0, 0, 16, 16 * 4096) == pytest.approx(7 + 0.48 + 1e-5 * 16 * 4096)


def test_a_table_wins_over_the_roofline():
    assert step_model(LLAMA, H100).source.kind is SourceKind.TABLE
    assert step_model(LLAMA, H100, use_tables=False).source.kind is SourceKind.ROOFLINE_CALIBRATED


def test_a_model_without_a_table_gets_the_roofline_corrected_by_the_nearest_one():
    mistral = step_model(model("mistralai/Mistral-7B-v0.3"), H100)
    assert mistral.source.kind is SourceKind.ROOFLINE_CALIBRATED
    assert "corrected by the table of mistralai/Mistral-7B-v0.1 bf16 on 1 x h100" in mistral.source.detail
    # The two differ by 768 words of vocabulary.
    older = step_model(model("mistralai/Mistral-7B-v0.1"), H100)
    assert mistral.step_ms(0, 0, 8, 8 * 1000) == pytest.approx(older.step_ms(0, 0, 8, 8 * 1000), rel=0.01)
    assert mistral.step_ms(2000, 0, 8, 8 * 1000) == pytest.approx(
        older.step_ms(2000, 0, 8, 8 * 1000), rel=0.01
    )


def test_borrowed_efficiencies_are_never_called_calibrated():
    for gpu, kind in (("a100-pcie-80gb", "bf16"), ("l4", "bf16"), ("h100", "int4")):
        source = step_model(LLAMA, accelerator(gpu), weights=kind).source
        assert source.kind is SourceKind.ROOFLINE_DEFAULT
        assert source.band_percent >= 30.0


def test_mixtures_of_experts_have_a_wide_band_and_say_why():
    for shape in (model("mistralai/Mixtral-8x7B-v0.1"), model("Qwen/Qwen3-30B-A3B")):
        source = step_model(shape, H100, tensor_parallel=2).source
        assert source.band_percent >= 30.0
        assert "mixture of experts" in source.detail


def test_corrected_predictions_of_a_left_out_model_are_near_its_table():
    key = tables.TableKey("h100-sxm-80gb", "Qwen/Qwen3-14B", "bf16", "bf16", 1)
    near = nearest_table(model(key.model), H100, "bf16", 1, leave_out=lambda other: other.model == key.model)
    assert near is not None
    assert near.key.model != key.model


def test_quantization_follows_the_roofline():
    bf16, int4 = step_model(LLAMA, H100), step_model(LLAMA, H100, weights="int4")
    decode = int4.step_ms(0, 0, 1, 512) / bf16.step_ms(0, 0, 1, 512)
    assert 0.26 < decode < 0.7  # a quarter of the linear weights, but launches and the head remain
    prefill = int4.step_ms(4096, 0, 0, 0) / bf16.step_ms(4096, 0, 0, 0)
    assert prefill == pytest.approx(1.0, rel=0.1)  # multiplied in bf16 all the same
    assert int4.kv_capacity_tokens > bf16.kv_capacity_tokens


def test_an_fp8_cache_holds_twice_as_much_and_is_read_faster():
    bf16, fp8 = step_model(LLAMA, H100), step_model(LLAMA, H100, kv_dtype="fp8")
    assert fp8.kv_capacity_tokens == pytest.approx(2 * bf16.kv_capacity_tokens, rel=0.01)
    # Measured on Hopper: the kernels read it at 60 % of the time of 16 bits, and small batches gain nothing.
    assert fp8.step_ms(0, 0, 64, 64 * 8192) < 0.8 * bf16.step_ms(0, 0, 64, 64 * 8192)
    assert fp8.step_ms(0, 0, 1, 512) > 0.98 * bf16.step_ms(0, 0, 1, 512)
    assert fp8.source.kind is SourceKind.TABLE


def test_the_capacity_formula_reproduces_the_tables_lists():
    for key in tables.table_keys():
        listed = tables.load_table(key).kv_capacity_tokens
        ours = kv_capacity_tokens(
            model(key.model),
            accelerator(key.accelerator),
            tensor_parallel=key.tensor_parallel,
            weights=key.weights,
            kv_dtype=key.kv_dtype,
        )
        shape = model(key.model)
        per_token = shape.kv_bytes_per_token(key.kv_dtype) / shape.kv_shards(key.tensor_parallel)
        # Within half a gigabyte of the memory of each GPU; the database counts tied embeddings twice, vLLM keeps them once.
        twice = 2.0 * shape.embedding_parameters / key.tensor_parallel if shape.tied_embeddings else 0.0
        assert abs((ours - listed) * per_token - twice) < 0.5e9, key


def test_more_memory_utilization_gives_more_cache():
    low = step_model(LLAMA, H100, memory_utilization=0.8)
    assert low.kv_capacity_tokens < step_model(LLAMA, H100).kv_capacity_tokens
    assert low.grid == step_model(LLAMA, H100).grid


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weights": "fp4"}, CatalogError, "use one of bf16, fp8, int8, int4"),
        ({"kv_dtype": "int8"}, CatalogError, "use one of bf16, fp8"),
        ({"tensor_parallel": 3}, CatalogError, "does not divide"),
        ({"tensor_parallel": 0}, CatalogError, "does not divide"),
        ({"tensor_parallel": 16}, CatalogError, "exceeds the 8 GPUs"),
        ({"memory_utilization": 1.5}, CatalogError, "at most 1"),
        ({"memory_utilization": 0.2}, DoesNotFitError, "raise the tensor parallelism"),
    ],
)
def test_impossible_wishes_are_refused_in_one_line(arguments, error, words):
    with pytest.raises(error, match=words) as caught:
        step_model(LLAMA, H100, **arguments)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_says_what_would_help():
    with pytest.raises(DoesNotFitError, match="quantize, or choose a larger accelerator"):
        step_model(model("meta-llama/Llama-3.1-70B"), H100)


@given(
    shape=st.sampled_from(models()),
    gpu=st.sampled_from(accelerators()),
    tensor_parallel=st.sampled_from([1, 2, 4, 8]),
    weights=st.sampled_from(["bf16", "fp8", "int8", "int4"]),
    kv_dtype=st.sampled_from(["bf16", "fp8"]),
    speculation=st.sampled_from([None, Speculation(3, 0.7, 0.1)]),
)
@settings(max_examples=examples(150), deadline=None)
def test_whatever_fits_gets_a_monotone_step_model(
    shape, gpu, tensor_parallel, weights, kv_dtype, speculation
):
    try:
        steps = step_model(
            shape,
            gpu,
            tensor_parallel=tensor_parallel,
            weights=weights,
            kv_dtype=kv_dtype,
            speculation=speculation,
        )
    except CatalogError:
        return
    decode = [[steps.step_ms(0, 0, b, b * c) for c in (1, 500, 3000)] for b in (1, 2, 8, 40, 200)]
    assert decode[0][0] > 0.0
    for row in decode:
        assert all(low <= high * (1 + 1e-9) for low, high in pairwise(row))
    for one, two in pairwise(decode):
        assert all(low <= high * (1 + 1e-9) for low, high in zip(one, two, strict=True))
    prompts = [steps.step_ms(n, 0, 8, 8000) for n in (1, 100, 1000, 8000)]
    assert all(low <= high * (1 + 1e-9) for low, high in pairwise(prompts))
    assert steps.kv_capacity_tokens >= 16


def test_the_operators_part_of_the_performance_model_imports_no_numpy():
    script = (
        "import sys; import servingtiers.performance.select, servingtiers.performance.analytic, "
        "servingtiers.performance.calibration, servingtiers.performance.profile; "
        "print([name for name in ('numpy', 'numba', 'plotly', 'rich') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
