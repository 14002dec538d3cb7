"""Model shapes: parameter counts as published, KV bytes by attention kind, config.json, and clear refusals."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.catalog.models import ModelShape, bundled, model, model_from_config, models
from servingtiers.catalog.names import CatalogError, UnknownNameError

REQUIRED = (
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-chat-hf",
    "meta-llama/Llama-2-70b-chat-hf",
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.1-405B-Instruct",
    "meta-llama/Llama-3.3-70B-Instruct",
    "codellama/CodeLlama-34b-Instruct-hf",
    "01-ai/Yi-34B-Chat",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-72B-Instruct",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-32B",
    "Qwen/Qwen3-30B-A3B",
    "deepseek-ai/DeepSeek-V3",
)


@pytest.mark.parametrize("name", REQUIRED)
def test_published_sizes_and_their_instruct_variants_are_bundled(name):
    assert model(name).parameters > 0


@pytest.mark.parametrize("shape", models(), ids=lambda shape: shape.name)
def test_the_parameter_count_computed_from_the_shape_is_the_published_one(shape):
    assert shape.parameters == pytest.approx(shape.published_parameters, rel=0.01)


@pytest.mark.parametrize("shape", [shape for shape in models() if shape.is_moe], ids=lambda shape: shape.name)
def test_active_parameters_of_mixtures_are_the_published_ones(shape):
    # Cards count the input embedding in or out as they please: one of the two must match.
    without = shape.active_parameters - shape.embedding_parameters
    published = shape.published_active_parameters
    assert min(abs(shape.active_parameters / published - 1), abs(without / published - 1)) < 0.03


@pytest.mark.parametrize(
    ("name", "kibibytes"),
    [
        ("meta-llama/Llama-2-7b-hf", 512),  # multi-head: 2 x 32 layers x 4096 x 2 bytes
        ("meta-llama/Llama-3.1-8B", 128),  # grouped-query: 8 KV heads of 128
        ("meta-llama/Llama-3.1-70B", 320),
        ("Qwen/Qwen2.5-7B", 56),
        ("deepseek-ai/DeepSeek-V3", 68.625),  # latent: 61 layers x (512 + 64) x 2 bytes
    ],
)
def test_kv_bytes_per_token_follow_the_kind_of_attention(name, kibibytes):
    shape = model(name)
    assert shape.kv_bytes_per_token() == kibibytes * 1024
    assert shape.kv_bytes_per_token("fp8") == kibibytes * 512


def test_quantization_shrinks_linear_layers_and_leaves_embeddings():
    shape = model("meta-llama/Llama-3.1-8B")
    kept = (shape.parameters - shape.linear_parameters) * 2.0
    assert shape.weight_bytes("bf16") == shape.parameters * 2.0
    assert shape.weight_bytes("fp8") - kept == shape.linear_parameters
    assert shape.weight_bytes("int4") < shape.weight_bytes("int8") == shape.weight_bytes("fp8")


def test_a_mixture_streams_only_the_experts_its_tokens_are_routed_to():
    shape = model("mistralai/Mixtral-8x7B-v0.1")
    one, many = shape.streamed_bytes("bf16", 1), shape.streamed_bytes("bf16", 4096)
    head = shape.embedding_parameters * 2.0
    assert one == pytest.approx(shape.active_linear_parameters * 2.0 + head, rel=0.01)
    assert many == pytest.approx(shape.linear_parameters * 2.0 + head, rel=1e-6)


def test_latent_attention_is_copied_to_every_gpu_and_heads_are_split():
    assert model("deepseek-ai/DeepSeek-V3").kv_shards(8) == 1
    assert model("meta-llama/Llama-3.1-8B").kv_shards(4) == 4
    assert model("Qwen/Qwen2.5-7B").kv_shards(8) == 4  # 4 KV heads: two copies of each


def test_an_unknown_model_lists_near_names():
    with pytest.raises(UnknownNameError, match="near names") as caught:
        model("meta-llama/Lama-3.1-8B-Instuct")
    assert "meta-llama/Llama-3.1-8B-Instruct" in caught.value.near
    assert "\n" not in str(caught.value)


def test_the_part_after_the_slash_is_enough_in_any_case():
    assert model("llama-3.1-8b-instruct") is model("meta-llama/Llama-3.1-8B")


LLAMA = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "model_type": "llama",
}


def test_a_config_json_gives_the_shape_of_the_bundled_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for path in (tmp_path, tmp_path / "config.json"):
        shape = model(str(path))
        assert shape.parameters == model("meta-llama/Llama-3.1-8B").parameters
        assert shape.kv_bytes_per_token() == 128 * 1024


def test_a_bundled_model_is_looked_up_without_looking_at_files(tmp_path, monkeypatch):
    """A tier's model name is a user's word: a folder that has it is the operator's own business."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("no JSON")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CatalogError, match="not readable JSON"):
        model("mine")
    assert bundled("mine") is None
    assert bundled("meta-llama/Llama-3.1-8B") is model("meta-llama/Llama-3.1-8B")


def test_config_json_of_a_latent_mixture_gives_its_published_size():
    shape = model_from_config(
        "local",
        {
            "num_hidden_layers": 61,
            "hidden_size": 7168,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "vocab_size": 129280,
            "max_position_embeddings": 163840,
        },
    )
    assert shape.parameters == pytest.approx(671e9, rel=0.01)
    assert shape.kv_bytes_per_token() == 61 * 576 * 2


def test_a_multimodal_config_is_read_through_its_text_part():
    shape = model_from_config("local", {"text_config": LLAMA, "vision_config": {"hidden_size": 1}})
    assert shape.layers == 32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"hidden_size": "wide"}, "not an integer"),
        ({"num_key_value_heads": 5}, "cannot share"),
        ({"num_attention_heads": 0}, "must be positive"),
        ({"vocab_size": True}, "not an integer"),
        ({"num_hidden_layers": -1}, "layers must be at least 1"),
    ],
)
def test_a_malformed_config_is_refused_in_one_line(change, words):
    with pytest.raises(CatalogError, match=words) as caught:
        model_from_config("local", LLAMA | change)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(CatalogError, match="not readable JSON"):
        model(str(path))
    path.write_text("[]")
    with pytest.raises(CatalogError, match="no JSON object"):
        model(str(path))


def test_unknown_data_types_name_the_known_ones():
    shape = model("Qwen/Qwen3-8B")
    with pytest.raises(CatalogError, match="bf16, fp8, int8, int4"):
        shape.weight_bytes("fp16x")
    with pytest.raises(CatalogError, match="bf16, fp8"):
        shape.kv_bytes_per_token("int4")


@given(
    layers=st.integers(1, 200),
    head_dim=st.sampled_from([64, 128, 256]),
    kv_heads=st.integers(1, 16),
    groups=st.integers(1, 16),
    intermediate=st.integers(1, 60_000),
    vocabulary=st.integers(1, 300_000),
)
def test_parameters_and_kv_bytes_grow_with_every_dimension(
    layers, head_dim, kv_heads, groups, intermediate, vocabulary
):
    def shape(**change):
        heads = kv_heads * groups
        fields = {
            "layers": layers,
            "hidden": heads * head_dim,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate": intermediate,
            "vocabulary": vocabulary,
            "max_context": 4096,
        }
        return ModelShape(name="random", **(fields | change))

    base = shape()
    assert shape(layers=layers + 1).parameters > base.parameters
    assert shape(intermediate=intermediate + 1).parameters > base.parameters
    assert shape(vocabulary=vocabulary + 1).parameters > base.parameters
    assert shape(layers=layers + 1).kv_bytes_per_token() > base.kv_bytes_per_token()
    assert shape(kv_heads=kv_heads * groups).kv_bytes_per_token() >= base.kv_bytes_per_token()
    assert base.active_parameters == base.parameters
