"""The reference page of the catalogue: which accelerators and models are known, and how well each is.

``python -m servingtiers.performance.catalogue_page docs/reference/catalogue.md`` writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from servingtiers.catalog.accelerators import Accelerator, accelerators
from servingtiers.catalog.models import ModelShape, model, models_with_aliases
from servingtiers.performance.roofline import load_constants
from servingtiers.performance.tables import same_speed, table_keys

__all__ = ["main", "page"]


def page() -> str:
    """Return the page."""
    example = accelerators()[0]
    lines = [
        "<!-- Made by servingtiers.performance.catalogue_page; do not edit. -->",
        "",
        "# Catalogue",
        "",
        "What `plan`, `predict`, `simulate` and the operator know without being told. Names are read in any letter case.",
        "",
        "## Accelerators",
        "",
        "Keys are for `spec.pool.hardware.accelerators`, `--accelerator` and `config.accelerators`. The command line also",
        "reads the names that monitoring and cloud consoles have, such as `NVIDIA H100 80GB HBM3`. Peaks are dense ones from",
        f"the maker's data sheets. Prices: {example.price_source}.",
        "",
        "| key | memory, GiB | bandwidth, GB/s | bf16, TFLOP/s | FP8, TFLOP/s | one link, GB/s | USD/hour | step times from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_accelerator_row(each) for each in accelerators()]
    lines += [
        "",
        "*Tables*: a table for each model that has one, else a roofline fitted to the tables of this accelerator. *Borrowed*:",
        "a roofline with the efficiencies of the accelerator named, uncalibrated, with a band of 30 % or more. A",
        "[profile of your engine](../how-to/profile-your-engine.md) beats both.",
        "",
        "## Models",
        "",
        "By Hugging Face id; the part after the slash will do for the command line. Any other model is read from its",
        "`config.json`: `--model path/to/config.json`. A model outside this list can be served, too: give its tier",
        "`hardware.accelerators`, `hardware.tensorParallel` and `engine.maxModelLen`, and it is steered by what is measured.",
        "",
        "| model | parameters, 10⁹ | KV cache, KiB a token | longest context | also known as | table |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_model_row(shape, aliases) for shape, aliases in models_with_aliases()]
    return "\n".join(lines) + "\n"


def _accelerator_row(each: Accelerator) -> str:
    fitted = {key for key, _ in load_constants()}
    source = "tables" if each.key in fitted else f"borrowed: `{each.calibrated_as}`"
    fp8 = f"{each.tflops['fp8']:,.0f}" if each.supports("fp8") else "–"
    return (
        f"| `{each.key}` | {each.memory_gib:g} | {each.bandwidth_gb_s:,.0f} | {each.tflops['bf16']:,.0f} | {fp8} "
        f"| {each.link_gb_s:g} | {each.price_per_hour_usd:.2f} | {source} |"
    )


def _model_row(shape: ModelShape, aliases: tuple[str, ...]) -> str:
    size = f"{shape.parameters / 1e9:.3g}"
    if shape.is_moe:
        size += f", {shape.active_parameters / 1e9:.3g} active"
    table = "yes" if any(same_speed(shape, model(key.model)) for key in table_keys()) else "no"
    others = ", ".join(f"`{alias}`" for alias in aliases) or "–"
    return f"| `{shape.name}` | {size} | {shape.kv_bytes_per_token() / 1024:.3g} | {shape.max_context:,} | {others} | {table} |"


def main(arguments: list[str]) -> int:
    """Write the page to the file that is named, or print it."""
    if arguments:
        Path(arguments[0]).write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
