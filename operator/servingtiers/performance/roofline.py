"""The roofline of an engine step: the slower of streaming the weights and multiplying with them, and the rest.

After Williams, Waterman and Patterson (CACM 52(4), 2009): a kernel cannot run faster than memory bandwidth or
arithmetic allow. A decode step streams every weight once for the whole batch, so it is bound by bandwidth
until the batch is large; a prefill step multiplies every weight with many tokens, so it is bound by
arithmetic. Published peaks are never reached; the shares that are (model bandwidth and model FLOP
utilisation, MBU and MFU) are fitted per accelerator and data type by :mod:`servingtiers.performance.fit` and
shipped in ``data/roofline_constants.json``.

Pure Python, imported by the operator.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from servingtiers.performance.steps import StepGrid

if TYPE_CHECKING:
    from servingtiers.catalog.accelerators import Accelerator
    from servingtiers.catalog.models import ModelShape

__all__ = [
    "DEFAULT_CONSTANTS",
    "Roofline",
    "RooflineConstants",
    "constants_for",
    "load_constants",
]


@dataclass(frozen=True, slots=True)
class RooflineConstants:
    """What share of its peaks an engine reaches on an accelerator, and its fixed costs."""

    mbu: float
    """Share of the memory bandwidth reached while streaming weights, 0–1."""
    mbu_kv: float
    """Share of the memory bandwidth reached while reading the KV cache, 0–1."""
    mfu: float
    """Share of the peak FLOP/s reached in large matrix products, 0–1."""
    mfu_attention: float
    """Share of the peak bf16 FLOP/s reached in prompt attention (FlashAttention), 0–1."""
    layer_us: float
    """Fixed cost of one layer: kernel launches and small kernels, µs."""
    prompt_layer_us: float
    """What a layer costs on top in a step that holds prompt tokens, which no full CUDA graph replays, µs."""
    step_us: float
    """Fixed cost of one step: scheduling, sampling, µs."""
    request_us: float
    """Cost of each decoding sequence in a step, µs."""
    kv_head_us: float
    """Cost of each decoding sequence for each layer and KV head of a GPU, µs: attention's work that does not
    depend on the context."""
    token_us: float
    """Cost of each token of a step in element-wise kernels, µs per layer and 10,000 hidden elements."""
    allreduce_us: float
    """Latency of one all-reduce of two GPUs, µs."""
    link_efficiency: float
    """Share of the link bandwidth an all-reduce of two GPUs reaches, 0–1."""
    allreduce_many_us: float
    """Latency of one all-reduce of more than two GPUs, µs."""
    link_efficiency_many: float
    """Share of the link bandwidth an all-reduce of more than two GPUs reaches, 0–1. It is its own constant
    because vLLM's one-shot all-reduce kernel serves at most two GPUs that are joined by PCIe only."""
    decode_error_percent: float = 30.0
    """Median absolute error of decode steps on models left out of the fit, per cent."""
    prefill_error_percent: float = 40.0
    """Median absolute error of prefill steps on models left out of the fit, per cent."""
    mixed_error_percent: float = 40.0
    """Median absolute error of mixed steps on models left out of the fit, per cent."""
    fitted_to: str = ""
    """Which measurements the constants were fitted to; empty for the uncalibrated default."""


DEFAULT_CONSTANTS = RooflineConstants(
    mbu=0.80,
    mbu_kv=0.80,
    mfu=0.55,
    mfu_attention=0.40,
    layer_us=10.0,
    prompt_layer_us=0.0,
    step_us=500.0,
    request_us=5.0,
    kv_head_us=0.0,
    token_us=0.0,
    allreduce_us=10.0,
    link_efficiency=0.5,
    allreduce_many_us=10.0,
    link_efficiency_many=0.5,
)
"""Generic constants for accelerators and data types nobody has measured."""


@cache
def load_constants() -> dict[tuple[str, str], RooflineConstants]:
    """Return the shipped constants by (accelerator key, weight data type)."""
    path = files(__package__) / "data" / "roofline_constants.json"
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        (entry["accelerator"], entry["weights"]): RooflineConstants(
            fitted_to=document["fitted_to"], **entry["constants"]
        )
        for entry in document["fits"]
    }


def constants_for(accelerator: Accelerator, weights: str) -> tuple[RooflineConstants, str]:
    """Return the best constants for an accelerator and weight data type, and how they were come by.

    Exact fits come first. Otherwise constants are borrowed: from the same accelerator's bf16 fit for a data
    type nobody fitted, then from the like accelerator named by the catalogue. Borrowed constants are a guess
    and the caller must not call them calibrated: the text returned is then not empty.

    Returns:
        The constants, and an empty string for an exact fit or else a sentence that says what was borrowed.
    """
    fits = load_constants()
    exact = fits.get((accelerator.key, weights))
    if exact is not None:
        return exact, ""
    # int8 tensor cores run at the rate of fp8; int4 weights are expanded and multiplied in bf16.
    for key in filter(None, (accelerator.key, accelerator.calibrated_as)):
        for like in (weights, "fp8" if weights == "int8" else "bf16", "bf16"):
            found = fits.get((key, like))
            if found is not None:
                return found, f"efficiencies of {key} {like}"
    return DEFAULT_CONSTANTS, "generic efficiencies"


_BATCHES = (
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    80,
    96,
    112,
    128,
    160,
    192,
    224,
    256,
    288,
    320,
    384,
    448,
    512,
)
_CONTEXTS = (0.0, 1.0, 131072.0)
_TOKENS = (1, 16, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512, 640, 768, 1024, 2048, 8192)


@dataclass(frozen=True, slots=True)
class Roofline:
    """The roofline of one model on a group of accelerators.

    Formulas, per step with ``t`` tokens, of which ``b`` are decoding sequences that read ``kv`` cached
    tokens::

        products  = max(streamed weights / (tp·MBU·BW), 2·active parameters·t / (tp·MFU·F))
        attention = kv·KV bytes / (shards·MBU_kv·BW) + 4·layers·heads·head_dim·pairs / (tp·MFU_attn·F_bf16)
        fixed     = layers·layer_us + step_us + b·(request_us + layers·KV heads/tp·kv_head_us)
                    + layers·prompt_layer_us where the step holds prompt tokens
        all-reduce (tp > 1) = 2·layers·(allreduce_us + 2·(tp-1)/tp · t·hidden·2 bytes / (link·efficiency))

    ``pairs`` counts (new prompt token, token it attends to) pairs. The factors: 2 FLOP for a multiply-add, 4
    for the two products of attention; a ring all-reduce moves ``2·(tp-1)/tp`` of its data over each link.
    """

    model: ModelShape
    accelerator: Accelerator
    constants: RooflineConstants
    tensor_parallel: int = 1
    weights: str = "bf16"
    kv_dtype: str = "bf16"

    @property
    def _compute_dtype(self) -> str:
        """Data type of the matrix products: quantized activations only where tensor cores have the type."""
        if self.weights in {"fp8", "int8"} and self.accelerator.supports(self.weights):
            return self.weights
        return "bf16"

    def products_ms(self, tokens: float) -> float:
        """Return the time of the linear layers for ``tokens`` tokens, milliseconds."""
        constants, tp = self.constants, self.tensor_parallel
        memory = (
            1e3
            * self.model.streamed_bytes(self.weights, tokens)
            / (tp * constants.mbu * self.accelerator.bandwidth)
        )
        return max(memory, self.compute_ms(tokens))

    def compute_ms(self, tokens: float) -> float:
        """Return the arithmetic part of the linear layers for ``tokens`` tokens, milliseconds."""
        linear = 2.0 * self.model.active_linear_parameters / self.accelerator.flops(self._compute_dtype)
        head = 2.0 * self.model.embedding_parameters / self.accelerator.flops("bf16")
        return 1e3 * tokens * (linear + head) / (self.tensor_parallel * self.constants.mfu)

    def kv_read_ms(self, kv_tokens: float) -> float:
        """Return the time to read ``kv_tokens`` tokens of the KV cache once, milliseconds."""
        size = kv_tokens * self.model.kv_bytes_per_token(self.kv_dtype)
        shards = self.model.kv_shards(self.tensor_parallel)
        return 1e3 * size / (shards * self.constants.mbu_kv * self.accelerator.bandwidth)

    @property
    def pair_ms(self) -> float:
        """Milliseconds of prompt attention for one new token reading one token."""
        model = self.model
        rate = self.tensor_parallel * self.constants.mfu_attention * self.accelerator.flops("bf16")
        width = float(model.head_dim)
        if model.mla is not None:  # scores over nope + rope dimensions, values over v_head_dim
            width = (model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim + model.mla.v_head_dim) / 2
        return 1e3 * 4.0 * model.layers * model.heads * width / rate

    def overhead_ms(self, tokens: float, *, prompts: bool) -> float:
        """Return launches, element-wise kernels and all-reduces for ``tokens`` tokens, milliseconds.

        Args:
            tokens: Tokens of the step.
            prompts: Whether prompt tokens are among them.
        """
        constants, model, tp = self.constants, self.model, self.tensor_parallel
        total = model.layers * constants.layer_us + constants.step_us
        if prompts:
            total += model.layers * constants.prompt_layer_us
        total += model.layers * constants.token_us * tokens * model.hidden / 1e4
        if tp > 1:
            many = tp > 2
            moved = 2.0 * (tp - 1) / tp * tokens * model.hidden * 2.0
            link = self.accelerator.link_gb_s * 1e9
            link *= constants.link_efficiency_many if many else constants.link_efficiency
            latency = constants.allreduce_many_us if many else constants.allreduce_us
            total += 2.0 * model.layers * (latency + 1e6 * moved / link)
        return total / 1e3

    def decode_attention_ms(self, decoding: float, kv_tokens: float) -> float:
        """Return the time of decode attention and whatever else a decoding sequence costs, milliseconds."""
        heads = self.model.kv_heads / self.model.kv_shards(self.tensor_parallel)
        each = self.constants.request_us + self.model.layers * heads * self.constants.kv_head_us
        return decoding * each / 1e3 + self.kv_read_ms(kv_tokens)

    def rest_ms(self, tokens: float, *, prompts: bool) -> float:
        """Return the time of a step without its attention, milliseconds."""
        return self.products_ms(tokens) + self.overhead_ms(tokens, prompts=prompts)

    def step_ms(self, prompt_tokens: float, pairs: float, decoding: float, kv_tokens: float) -> float:
        """Return the time of one step, milliseconds.

        Args:
            prompt_tokens: New prompt tokens.
            pairs: (New prompt token, token it attends to) pairs.
            decoding: Sequences that decode one token.
            kv_tokens: KV tokens they read, summed.
        """
        tokens = prompt_tokens + decoding
        if tokens <= 0.0:
            return 0.0
        return (
            self.rest_ms(tokens, prompts=prompt_tokens > 0.0)
            + self.decode_attention_ms(decoding, kv_tokens)
            + self.pair_ms * pairs
        )

    def _knee(self) -> float:
        """Tokens at which the linear layers turn from bandwidth-bound to compute-bound (dense models)."""
        per_token = self.products_ms(1e9) / 1e9
        return self.products_ms(1.0) / per_token

    def grid(self) -> StepGrid:
        """Compile the formulas to grids; points are added at the knee, so a dense model loses nothing."""
        knee = self._knee()
        batches = tuple(sorted({*map(float, _BATCHES), knee} if knee > 1.0 else set(map(float, _BATCHES))))
        tokens = tuple(sorted({*map(float, _TOKENS), knee} if knee > 1.0 else set(map(float, _TOKENS))))
        decode = []
        for batch in batches:
            rest = self.rest_ms(batch, prompts=False)
            attention = (self.decode_attention_ms(batch, batch * context) for context in _CONTEXTS[1:])
            decode.append((rest, *(rest + time for time in attention)))
        return StepGrid(
            batch_axis=batches,
            context_axis=_CONTEXTS,
            decode_ms=tuple(decode),
            token_axis=tokens,
            token_ms=tuple(self.rest_ms(count, prompts=True) for count in tokens),
            pair_ms=self.pair_ms,
        )
