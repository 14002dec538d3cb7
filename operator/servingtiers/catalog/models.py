"""Model shapes: what of a language model decides its speed and its memory.

Bundled shapes live in ``data/models.json`` under their Hugging Face ids; any other model is read from its
``config.json``. Parameter counts are computed from the shape, and tests hold them against the published
counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from servingtiers.catalog.names import CatalogError, UnknownNameError

__all__ = [
    "KV_BYTES",
    "WEIGHT_BYTES",
    "LatentAttention",
    "ModelShape",
    "bundled",
    "model",
    "model_as_asked",
    "model_from_config",
    "models",
    "models_with_aliases",
    "published_name",
]

WEIGHT_BYTES: Mapping[str, float] = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.52}
"""Bytes per weight of a quantized linear layer. int4 counts a 16-bit scale and a 4-bit zero point for each
group of 128 weights, the layout of AWQ (arXiv:2306.00978) and GPTQ (arXiv:2210.17323) checkpoints."""

KV_BYTES: Mapping[str, float] = {"bf16": 2.0, "fp8": 1.0}
"""Bytes per element of the KV cache."""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): the KV cache holds one latent a token."""

    q_lora_rank: int
    """Rank of the query projection; 0 when queries are projected directly."""
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The shape of a decoder-only transformer with gated feed-forward layers."""

    name: str
    """Hugging Face id, or the path it was read from."""
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the feed-forward layer; of one expert where there are experts."""
    vocabulary: int
    max_context: int
    """Longest context the checkpoint declares, tokens."""
    tied_embeddings: bool = False
    """Whether input and output embeddings are one matrix."""
    qkv_bias: bool = False
    experts: int = 0
    """Routed experts in a mixture-of-experts layer; 0 for a dense model."""
    experts_per_token: int = 0
    shared_experts: int = 0
    """Experts every token passes, each of width ``intermediate``."""
    dense_layers: int = 0
    """Leading layers of a mixture that are dense, of width ``dense_intermediate``."""
    dense_intermediate: int = 0
    mla: LatentAttention | None = None
    published_parameters: float | None = field(default=None, compare=False)
    published_active_parameters: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for label in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary"):
            if getattr(self, label) < 1:
                raise CatalogError(
                    f"{self.name}: {label} must be at least 1: correct the model's config.json"
                )
        if self.heads % self.kv_heads:
            raise CatalogError(
                f"{self.name}: {self.heads} heads cannot share {self.kv_heads} KV heads evenly: "
                "correct num_key_value_heads in the model's config.json"
            )

    @property
    def is_moe(self) -> bool:
        """Whether feed-forward layers are mixtures of experts."""
        return self.experts > 0

    @property
    def attention_parameters(self) -> int:
        """Weights of one layer's attention projections."""
        if self.mla is not None:
            mla = self.mla
            query_width = self.heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
            query = (
                self.hidden * mla.q_lora_rank + mla.q_lora_rank * query_width
                if mla.q_lora_rank
                else self.hidden * query_width
            )
            key_value = self.hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim)
            key_value += mla.kv_lora_rank * self.heads * (mla.qk_nope_head_dim + mla.v_head_dim)
            return query + key_value + self.heads * mla.v_head_dim * self.hidden
        query = self.hidden * self.heads * self.head_dim
        key_value = 2 * self.hidden * self.kv_heads * self.head_dim
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return 2 * query + key_value + bias

    def _feed_forward(self, *, active: bool) -> int:
        """Weights of all layers' feed-forward parts, of the experts one token passes when ``active``."""
        if not self.is_moe:
            return self.layers * 3 * self.hidden * self.intermediate
        routed = self.experts_per_token if active else self.experts
        mixture = 3 * self.hidden * self.intermediate * (routed + self.shared_experts)
        mixture += self.hidden * self.experts  # the router
        dense = 3 * self.hidden * self.dense_intermediate
        return (self.layers - self.dense_layers) * mixture + self.dense_layers * dense

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers, without embeddings: what quantization shrinks."""
        return self.layers * self.attention_parameters + self._feed_forward(active=False)

    @property
    def active_linear_parameters(self) -> int:
        """Weights of the linear layers that one token is multiplied with."""
        return self.layers * self.attention_parameters + self._feed_forward(active=True)

    @property
    def embedding_parameters(self) -> int:
        """Weights of one embedding matrix (the output head has as many)."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights."""
        embeddings = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        return self.linear_parameters + embeddings + (2 * self.layers + 1) * self.hidden

    @property
    def active_parameters(self) -> int:
        """Weights one token touches; equal to :attr:`parameters` for a dense model."""
        return self.parameters - self.linear_parameters + self.active_linear_parameters

    def weight_bytes(self, weights: str) -> float:
        """Return the bytes of memory the weights take; embeddings and norms stay in 16 bits.

        Args:
            weights: A key of :data:`WEIGHT_BYTES`.

        Raises:
            CatalogError: The data type is unknown.
        """
        kept = self.parameters - self.linear_parameters
        return self.linear_parameters * _bytes_of(weights, WEIGHT_BYTES, "weights") + kept * 2.0

    def streamed_bytes(self, weights: str, tokens: float = 1.0) -> float:
        """Return the bytes of weights one step reads: linear layers and the output head.

        A mixture reads only the experts its tokens are routed to; with uniform routing an expert is idle
        with probability ``(1 - k/E)^tokens``.

        Args:
            weights: A key of :data:`WEIGHT_BYTES`.
            tokens: Tokens in the step.
        """
        width = _bytes_of(weights, WEIGHT_BYTES, "weights")
        read = float(self.linear_parameters)
        if self.is_moe:
            idle = (1.0 - self.experts_per_token / self.experts) ** max(tokens, 1.0)
            routed = (self.layers - self.dense_layers) * 3 * self.hidden * self.intermediate * self.experts
            read -= routed * idle
        return read * width + self.embedding_parameters * 2.0

    def kv_bytes_per_token(self, kv_dtype: str = "bf16") -> float:
        """Return the bytes one token holds in the KV cache, all layers, before tensor parallelism.

        Multi-head and grouped-query attention keep a key and a value per KV head; latent attention keeps one
        latent and one rotary key. Sliding windows are not credited: the figure is then an upper bound.

        Raises:
            CatalogError: The data type is unknown.
        """
        width = _bytes_of(kv_dtype, KV_BYTES, "KV cache")
        if self.mla is not None:
            return self.layers * (self.mla.kv_lora_rank + self.mla.qk_rope_head_dim) * width
        return 2.0 * self.layers * self.kv_heads * self.head_dim * width

    def kv_shards(self, tensor_parallel: int) -> int:
        """Return over how many GPUs a token's KV cache is split; the rest hold copies."""
        return 1 if self.mla is not None else min(tensor_parallel, self.kv_heads)


def _bytes_of(dtype: str, table: Mapping[str, float], what: str) -> float:
    width = table.get(dtype)
    if width is None:
        raise CatalogError(f"unknown {what} data type {dtype!r}: use one of {', '.join(table)}")
    return width


def _shape(entry: Mapping[str, Any]) -> ModelShape:
    fields = {key: value for key, value in entry.items() if key not in {"id", "aliases", "mla"}}
    mla = LatentAttention(**entry["mla"]) if "mla" in entry else None
    return ModelShape(name=entry["id"], mla=mla, **fields)


@cache
def _document() -> tuple[tuple[ModelShape, tuple[str, ...]], ...]:
    document = json.loads((files(__package__) / "data" / "models.json").read_text(encoding="utf-8"))
    return tuple((_shape(entry), tuple(entry["aliases"])) for entry in document["models"])


@cache
def _by_name() -> Mapping[str, ModelShape]:
    index: dict[str, ModelShape] = {}
    for shape, aliases in _document():
        for name in (shape.name, *aliases):
            if index.setdefault(name.lower(), shape) is not shape:
                raise CatalogError(f"model name {name!r} is used twice: fix data/models.json")
    # The part after the slash is accepted wherever it is unambiguous.
    tails: dict[str, set[ModelShape]] = {}
    for name, shape in index.items():
        tails.setdefault(name.rsplit("/", 1)[-1], set()).add(shape)
    for tail, shapes in tails.items():
        if len(shapes) == 1:
            index.setdefault(tail, next(iter(shapes)))
    return index


def models() -> tuple[ModelShape, ...]:
    """Return every bundled shape, in the order of the data file."""
    return tuple(shape for shape, _ in _document())


def models_with_aliases() -> tuple[tuple[ModelShape, tuple[str, ...]], ...]:
    """Return every bundled shape with its other ids, in the order of the data file."""
    return _document()


def bundled(name: str) -> ModelShape | None:
    """Return a bundled shape by Hugging Face id or alias; None where there is none. No file is looked at."""
    return _by_name().get(name.strip().lower())


@cache
def _spellings() -> Mapping[str, str]:
    spelled: dict[str, str] = {}
    names = [name for shape, aliases in _document() for name in (shape.name, *aliases)]
    for name in names:
        spelled.setdefault(name.lower(), name)
    for name in names:
        spelled.setdefault(name.rsplit("/", 1)[-1].lower(), name)
    return spelled


def published_name(name: str) -> str | None:
    """Return the Hugging Face id that a name means, as its publisher spells it; None where no shape is bundled.

    A shape has one name and may have many ids: ``Llama-3.1-8B-Instruct`` runs as fast as ``Llama-3.1-8B`` and is
    another model.
    """
    return _spellings().get(name.strip().lower()) if bundled(name) is not None else None


def model(name: str) -> ModelShape:
    """Return a model's shape by Hugging Face id, or by the path of a ``config.json`` or its folder.

    Raises:
        UnknownNameError: No bundled shape has this name and there is no such file.
        CatalogError: The file is no usable ``config.json``.
    """
    found = bundled(name)
    if found is not None:
        return found
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CatalogError(
                f"{path} is not readable JSON ({error}): give a Hugging Face config.json"
            ) from error
        if not isinstance(document, dict):
            raise CatalogError(f"{path} holds no JSON object: give a Hugging Face config.json")
        return model_from_config(str(path), document)
    raise UnknownNameError(
        "model",
        name,
        (known for shape, aliases in _document() for known in (shape.name, *aliases)),
        "use a bundled id or the path of the model's config.json",
    )


def model_as_asked(name: str) -> ModelShape:
    """Return a model's shape under the id that was asked for, so that it is the one that is named and served.

    Raises:
        UnknownNameError: No bundled shape has this name and there is no such file.
        CatalogError: The file is no usable ``config.json``.
    """
    return replace(model(name), name=published_name(name) or name)


def model_from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """Return the shape that a Hugging Face ``config.json`` describes.

    Understood are decoder-only transformers with gated feed-forward layers: the Llama, Mistral, Mixtral,
    Qwen2/3, Gemma, Phi-3, DeepSeek-V2/V3 and gpt-oss families, and whatever names its fields alike. A
    multimodal config is read through its ``text_config``.

    Args:
        name: What the shape is called in messages.
        config: The parsed document.

    Raises:
        CatalogError: A field that decides speed or memory is missing or malformed.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping) and "num_hidden_layers" in text:
        config = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **text}

    def number(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value = config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise CatalogError(f"{name}: {key} is {value!r}, not an integer: correct the config.json")
            return value
        if default is None:
            raise CatalogError(
                f"{name}: config.json lacks {keys[0]}: give a decoder-only transformer's config"
            )
        return default

    layers = number("num_hidden_layers", "n_layer", "num_layers")
    hidden = number("hidden_size", "n_embd", "d_model")
    heads = number("num_attention_heads", "n_head")
    if heads < 1 or hidden < 1:
        raise CatalogError(
            f"{name}: hidden_size and num_attention_heads must be positive: correct the config.json"
        )
    kv_heads = number("num_key_value_heads", default=heads)
    head_dim = number("head_dim", default=hidden // heads)
    dense_intermediate = number("intermediate_size", "n_inner", default=4 * hidden)
    experts = number("num_local_experts", "num_experts", "n_routed_experts", default=0)
    intermediate = (
        number("moe_intermediate_size", default=dense_intermediate) if experts else dense_intermediate
    )
    mla = None
    if config.get("kv_lora_rank"):
        mla = LatentAttention(
            q_lora_rank=number("q_lora_rank", default=0),
            kv_lora_rank=number("kv_lora_rank"),
            qk_rope_head_dim=number("qk_rope_head_dim"),
            qk_nope_head_dim=number("qk_nope_head_dim"),
            v_head_dim=number("v_head_dim"),
        )
        head_dim = mla.v_head_dim
    dense_layers = number("first_k_dense_replace", default=0) if experts else 0
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=number("vocab_size"),
        max_context=number("max_position_embeddings", "n_positions", default=4096),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bool(config.get("attention_bias", config.get("model_type") == "qwen2")),
        experts=experts,
        experts_per_token=number("num_experts_per_tok", "experts_per_token", default=0) if experts else 0,
        shared_experts=number("n_shared_experts", default=0) if experts else 0,
        dense_layers=dense_layers,
        dense_intermediate=dense_intermediate if dense_layers else 0,
        mla=mla,
    )
