"""Make the shipped step tables anew, or more of them, from NVIDIA's database of kernel measurements.

Run as ``python -m servingtiers.performance.make_tables OUTPUT.csv.gz`` where ``aiconfigurator-core==0.12.0`` is
installed (PyPI, Apache-2.0; Linux x86-64, 616 MB: an environment of its own). With ``--check`` nothing is written and
the shipped rows are compared with what the database gives. An offline tool: nothing imports it.

Every configuration has the same rows: a decode grid as far as the KV cache holds it, prompts of 64 to 8,192 tokens
with nothing cached, and steps that mix up to 8,192 new tokens of prompts of 1,024 with a decoding batch at that
context. A configuration whose weights leave no room for a useful cache, or that the database does not know, has none.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from servingtiers.catalog.models import ModelShape, model
from servingtiers.performance.tables import FITTED, MIXED_CONTEXT, MODEL_IDS

__all__ = ["main"]

HEADER = "gpu,model,weights,kv,tp,db_version,kv_capacity_tokens,kind,batch,ctx_or_newtokens,ms"
SYSTEMS = ("a100_sxm", "b200_sxm", "h100_sxm", "h200_sxm", "l40s")
TYPES = {"bf16": "bfloat16", "fp8": "fp8"}
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)
PROMPTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
MIXED_BATCHES = (1, 16, 64, 128, 256)
MIXED_TOKENS = (64, 256, 512, 1024, 2048, 8192)
LARGE = 40e9
"""Parameters from which a model is shared by more GPUs."""
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "mixtral": "MixtralForCausalLM"}


def config_of(shape: ModelShape) -> dict[str, Any]:
    """Return the ``config.json`` of a model, as far as the database reads it."""
    lowered = shape.name.lower()
    kind = next((family for family in ("qwen3", "mixtral") if family in lowered), "")
    kind = kind or ("qwen2" if "qwen2" in lowered else "llama")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES.get(kind, "LlamaForCausalLM")],
        "model_type": kind,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.max_context,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": "bfloat16",
    }
    if shape.is_moe:
        config |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.experts_per_token}
    return config


def parallelisms(shape: ModelShape) -> tuple[int, ...]:
    """Return the tensor parallelisms a model has tables for."""
    if shape.parameters > LARGE and not shape.is_moe:
        return (4, 8)
    return (1, 2, 4) if shape.parameters > LARGE / 2 else (1, 2)


def rows_of(core: Any, folder: Path, system: str, name: str, weights: str, kv: str, tp: int) -> list[str]:
    """Return a table's lines, none where there is no such table."""
    engine: dict[str, Any] = {
        "tp_size": tp,
        "gemm_quant_mode": TYPES[weights],
        "moe_quant_mode": TYPES[weights],
        "kvcache_quant_mode": TYPES[kv],
        "fmha_quant_mode": "bfloat16",
    }
    shape = model(MODEL_IDS[name])
    if shape.is_moe:
        engine |= {"moe_tp_size": tp, "moe_ep_size": 1}
    version = "0.14.0" if system == "a100_sxm" else "0.24.0"
    try:
        capacity = core.estimate_kv_cache(
            str(folder),
            system,
            "vllm",
            "current",
            memory_fraction_kind="of_total",
            memory_fraction_value=0.9,
            max_num_tokens=8192,
            max_batch_size=256,
            **engine,
        )["total_kv_size_tokens"]
        if capacity < LEAST_CAPACITY:
            return []
        handle = core.EngineHandle.compile(str(folder), system, "vllm", backend_version="current", **engine)
        found = [
            ("decode", batch, context, handle.decode_step_latency(batch, context, 2))
            for batch in BATCHES
            for context in CONTEXTS
            if batch * context <= capacity
        ]
        found += [("prefill", 1, tokens, handle.predict_prefill_latency(1, tokens)) for tokens in PROMPTS]
        found += [
            (
                f"mixed_ctx{MIXED_CONTEXT}",
                batch,
                tokens,
                handle.mixed_step_latency(tokens, batch, MIXED_CONTEXT, 2),
            )
            for batch in MIXED_BATCHES
            for tokens in MIXED_TOKENS
            if batch * MIXED_CONTEXT <= capacity
        ]
    except Exception as error:  # noqa: BLE001  the database says "unknown" with many types
        print(
            f"{system} {name} {weights} kv {kv} tp {tp}: {' '.join(str(error).split())[:120]}",
            file=sys.stderr,
        )
        return []
    head = f"{system},{name},{weights},{kv},{tp},vllm {version},{capacity}"
    return [f"{head},{kind},{batch},{size},{round(ms, 4)}" for kind, batch, size, ms in found]


LEAST_CAPACITY = 8192
"""Tokens; a smaller cache holds one long request and is no configuration to serve with."""


def tables(names: list[str], kv_types: list[str]) -> Iterator[str]:
    """Yield the lines of every table."""
    core = importlib.import_module("aiconfigurator_core.sdk")
    with tempfile.TemporaryDirectory() as top:
        for name in names:
            shape = model(MODEL_IDS[name])
            folder = Path(top) / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config_of(shape)), encoding="utf-8")
            # Ampere has no FP8; the cache of 8 bits is tabled for the models that the roofline is fitted to.
            for system in SYSTEMS:
                for weights in TYPES if system != "a100_sxm" else ("bf16",):
                    for kv in kv_types:
                        if kv == "fp8" and (system == "a100_sxm" or shape.name not in FITTED):
                            continue
                        for tp in parallelisms(shape):
                            yield from rows_of(core, folder, system, name, weights, kv, tp)


def main() -> int:
    """Write the tables, or compare the shipped ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--model", action="append", help="Short name; all when left out.")
    parser.add_argument("--kv", action="append", help="bf16 or fp8; both when left out.")
    parser.add_argument("--check", action="store_true", help="Compare with the shipped rows.")
    options = parser.parse_args()
    made = list(tables(options.model or list(MODEL_IDS), options.kv or list(TYPES)))
    if options.check:
        packed = (files(__package__) / "data" / "step_tables.csv.gz").read_bytes()
        shipped = set(gzip.decompress(packed).decode("ascii").splitlines()[1:])
        print(f"made {len(made)} rows, shipped {len(shipped)}, {len(shipped & set(made))} the same")
        for line in sorted(shipped ^ set(made))[:20]:
            print(("only shipped: " if line in shipped else "only made: ") + line)
        return int(set(made) != shipped)
    if options.output is None:
        parser.error("name a file to write, or --check")
    text = "\n".join([HEADER, *sorted(made)]) + "\n"
    options.output.write_bytes(gzip.compress(text.encode("ascii"), 9, mtime=0))
    print(f"{len(made)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
