"""The roofline: its formulas by hand, its grid, and what physics forbids."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from properties import examples
from servingtiers.catalog.accelerators import accelerator, accelerators
from servingtiers.catalog.models import model, models
from servingtiers.performance.roofline import (
    DEFAULT_CONSTANTS,
    Roofline,
    RooflineConstants,
    constants_for,
    load_constants,
)

IDEAL = RooflineConstants(
    mbu=1.0,
    mbu_kv=1.0,
    mfu=1.0,
    mfu_attention=1.0,
    layer_us=0.0,
    prompt_layer_us=0.0,
    step_us=0.0,
    request_us=0.0,
    kv_head_us=0.0,
    token_us=0.0,
    allreduce_us=0.0,
    link_efficiency=1.0,
    allreduce_many_us=0.0,
    link_efficiency_many=1.0,
)
H100 = accelerator("h100")
LLAMA = model("meta-llama/Llama-3.1-8B")


def test_an_ideal_decode_step_streams_weights_and_cache_at_full_bandwidth():
    ideal = Roofline(LLAMA, H100, IDEAL)
    weights = LLAMA.parameters * 2.0 - LLAMA.embedding_parameters * 2.0 - (2 * 32 + 1) * 4096 * 2.0
    seconds = (weights + 1000 * 131_072) / 3.35e12
    assert ideal.step_ms(0, 0, 1, 1000) == pytest.approx(1e3 * seconds, rel=1e-9)


def test_an_ideal_long_prompt_is_bound_by_arithmetic():
    ideal = Roofline(LLAMA, H100, IDEAL)
    tokens = 8192.0
    pairs = tokens * tokens / 2
    linear = 2.0 * (LLAMA.linear_parameters + LLAMA.embedding_parameters) * tokens
    attention = 4.0 * 32 * 4096 * pairs
    assert ideal.step_ms(tokens, pairs, 0, 0) == pytest.approx(
        1e3 * (linear + attention) / 989.4e12, rel=1e-9
    )


def test_all_reduce_moves_what_a_ring_moves():
    two = Roofline(LLAMA, H100, IDEAL, tensor_parallel=2)
    moved = 2 * 32 * (2.0 * 1 / 2 * 100 * 4096 * 2.0) / 450e9
    assert two.overhead_ms(100, prompts=False) == pytest.approx(1e3 * moved)


def test_quantized_weights_are_multiplied_in_their_type_only_where_the_gpu_has_it():
    fp8 = Roofline(LLAMA, H100, IDEAL, weights="fp8").compute_ms(4096)
    bf16 = Roofline(LLAMA, H100, IDEAL).compute_ms(4096)
    int4 = Roofline(LLAMA, H100, IDEAL, weights="int4").compute_ms(4096)
    assert fp8 < bf16 == int4
    a100 = accelerator("a100")
    on_a100 = [Roofline(LLAMA, a100, IDEAL, weights=kind).compute_ms(4096) for kind in ("bf16", "fp8")]
    assert on_a100[0] == on_a100[1]


def test_the_grid_says_what_the_formulas_say():
    for weights, tp in (("bf16", 1), ("fp8", 2), ("bf16", 8)):
        constants, _ = constants_for(H100, weights)
        roofline = Roofline(model("meta-llama/Llama-3.1-70B"), H100, constants, tp, weights)
        grid = roofline.grid()
        for prompt, pairs, decoding, kv in (
            (0, 0, 1, 100),
            (0, 0, 7, 7 * 5000),
            (0, 0, 150, 150 * 900),
            (512, 512 * 256, 0, 0),
            (2048, 2048 * 4000, 64, 64 * 2000),
            (8000, 8000 * 4000, 200, 200 * 300),
            (37, 37 * 20, 3, 3000),
        ):
            exact = roofline.step_ms(prompt, pairs, decoding, kv)
            assert grid.step_ms(prompt, pairs, decoding, kv) == pytest.approx(exact, rel=0.01)


def test_the_grid_of_a_mixture_of_experts_is_close_too():
    constants, _ = constants_for(H100, "bf16")
    roofline = Roofline(model("mistralai/Mixtral-8x7B-v0.1"), H100, constants, 2)
    grid = roofline.grid()
    for decoding in (1, 2, 5, 10, 40, 100, 250):
        exact = roofline.step_ms(0, 0, decoding, decoding * 1000)
        assert grid.step_ms(0, 0, decoding, decoding * 1000) == pytest.approx(exact, rel=0.02)


configurations = st.tuples(
    st.sampled_from([shape for shape in models() if shape.mla is None]),
    st.sampled_from(accelerators()),
    st.sampled_from(["bf16", "fp8", "int8", "int4"]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 512),
    st.integers(1, 16_384),
)


@given(configuration=configurations, factor=st.floats(1.0, 10.0))
@settings(max_examples=examples(200), deadline=None)
def test_more_bandwidth_never_slows_decode(configuration, factor):
    shape, gpu, weights, tp, batch, context = configuration
    constants, _ = constants_for(gpu, weights)
    faster = replace(gpu, bandwidth_gb_s=gpu.bandwidth_gb_s * factor)
    base = Roofline(shape, gpu, constants, tp, weights).step_ms(0, 0, batch, batch * context)
    assert Roofline(shape, faster, constants, tp, weights).step_ms(0, 0, batch, batch * context) <= base


@given(configuration=configurations, factor=st.floats(1.0, 10.0))
@settings(max_examples=examples(200), deadline=None)
def test_more_arithmetic_never_slows_a_prompt(configuration, factor):
    shape, gpu, weights, tp, _, tokens = configuration
    constants, _ = constants_for(gpu, weights)
    faster = replace(gpu, tflops={dtype: value * factor for dtype, value in gpu.tflops.items()})
    pairs = tokens * tokens / 2
    base = Roofline(shape, gpu, constants, tp, weights).step_ms(tokens, pairs, 0, 0)
    assert Roofline(shape, faster, constants, tp, weights).step_ms(tokens, pairs, 0, 0) <= base


@given(configuration=configurations)
@settings(max_examples=examples(200), deadline=None)
def test_no_roofline_beats_the_ideal_one(configuration):
    shape, gpu, weights, tp, batch, context = configuration
    constants, _ = constants_for(gpu, weights)
    real = Roofline(shape, gpu, constants, tp, weights)
    ideal = Roofline(shape, gpu, IDEAL, tp, weights)
    for point in ((0, 0, batch, batch * context), (context, context**2 / 2, 0, 0)):
        assert real.step_ms(*point) >= ideal.step_ms(*point) * (1 - 1e-9)


def test_borrowed_constants_say_so_and_fitted_ones_do_not():
    assert constants_for(H100, "bf16")[1] == ""
    assert "h100-sxm-80gb bf16" in constants_for(H100, "int4")[1]
    assert "a100-sxm-80gb" in constants_for(accelerator("a100-pcie-80gb"), "bf16")[1]
    nobody = replace(H100, key="unheard-of", calibrated_as=None)
    assert constants_for(nobody, "bf16") == (DEFAULT_CONSTANTS, "generic efficiencies")


@pytest.mark.parametrize("key", ["a100-sxm-80gb", "h100-sxm-80gb", "h200-sxm-141gb"])
def test_the_shipped_constants_meet_the_claim_on_models_left_out(key):
    constants = load_constants()[key, "bf16"]
    assert constants.decode_error_percent <= 4.5
    assert constants.prefill_error_percent <= 8.0


@pytest.mark.parametrize("constants", load_constants().values())
def test_no_shipped_share_exceeds_its_peak(constants):
    for name in ("mbu", "mbu_kv", "mfu", "mfu_attention", "link_efficiency", "link_efficiency_many"):
        assert 0.0 < getattr(constants, name) <= 1.0
