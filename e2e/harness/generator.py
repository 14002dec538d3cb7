"""vLLM's own load generator, ``vllm bench serve``, from the engine's environment."""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

from harness.tiers import MODEL
from harness.traffic import prompt
from onenode import programs
from onenode.places import Places

__all__ = ["bench_serve"]


async def bench_serve(
    places: Places, url: str, *, rate: float, requests: int, prompt_tokens: int = 48, output_tokens: int
) -> dict[str, Any]:
    """Send streams of prompts of random words at Poisson times; return what the generator wrote.

    Args:
        places: Where engine and model are.
        url: Of a tier's router.
        rate: Requests per second.
        requests: How many.
        prompt_tokens: Tokens of each prompt, about.
        output_tokens: Tokens of each answer; a stream that ends early makes ``total_output_tokens`` fall short.
    """
    python = programs.engine(places) / "bin" / "python"
    with tempfile.TemporaryDirectory(dir=places.state) as folder:
        log, result, prompts = (Path(folder) / name for name in ("log", "result.json", "prompts.json"))
        # Of the generator's own random prompts for a vocabulary as small as this model's, some begin alike.
        said = [{"value": prompt(prompt_tokens, random.Random(seed))} for seed in range(requests)]
        prompts.write_text(json.dumps([{"conversations": [each, each]} for each in said]))
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(str(python), "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
                *("--backend", "vllm", "--base-url", url),
                *("--model", MODEL, "--tokenizer", str(places.model / MODEL)),
                *("--dataset-name", "sharegpt", "--dataset-path", str(prompts)),
                *("--sharegpt-output-len", str(output_tokens), "--ready-check-timeout-sec", "0"),
                *("--num-prompts", str(requests), "--request-rate", str(rate), "--ignore-eos"),
                *("--percentile-metrics", "ttft,tpot,e2el"),
                *("--save-result", "--result-filename", str(result), "--disable-tqdm"),
                env={
                    **os.environ,
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_TARGET_DEVICE": "cpu",
                    "VLLM_NO_USAGE_STATS": "1",
                },
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                code = await process.wait()
            except asyncio.CancelledError:
                process.kill()
                await process.wait()
                raise
        assert code == 0, log.read_text()[-600:]
        found: dict[str, Any] = json.loads(result.read_text())
        return found
