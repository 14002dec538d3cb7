"""Fit the roofline's constants to the shipped step tables, and say how wrong they are.

Run as ``python -m servingtiers.performance.fit`` to print the errors, with ``--write`` to replace
``data/roofline_constants.json`` as well. An offline tool: the only module beside the event simulation that needs
numpy, and nothing imports it.

The errors are of models left out: every model in turn (70-billion Llama 2 and 3.1, which are the same shape but
for the vocabulary, together) is predicted with constants fitted to the others. The constants shipped are then
fitted to all of them. Mixtures of experts take no part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.performance.roofline import (
    DEFAULT_CONSTANTS,
    Roofline,
    RooflineConstants,
    load_constants,
)
from servingtiers.performance.tables import FITTED, TableKey, load_table, mixed_pairs, table_keys

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

__all__ = ["FitReport", "fit_all", "main", "render", "unseen"]

FITTED_TO = "vLLM 0.24 step tables (A100: 0.14)"

# Parameter, lower and upper bound of the search. Shares end at 1: nothing beats its peak.
_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("mbu", 0.3, 1.0),
    ("mbu_kv", 0.2, 1.0),
    ("mfu", 0.1, 1.0),
    ("mfu_attention", 0.15, 0.85),
    ("layer_us", 0.5, 300.0),
    ("prompt_layer_us", 0.5, 300.0),
    ("step_us", 0.5, 3000.0),
    ("request_us", 0.05, 60.0),
    ("kv_head_us", 0.0005, 1.0),
    ("token_us", 0.001, 1.0),
    ("allreduce_us", 0.05, 100.0),
    ("link_efficiency", 0.02, 1.0),
    ("allreduce_many_us", 0.05, 100.0),
    ("link_efficiency_many", 0.02, 1.0),
)


@dataclass(frozen=True, slots=True)
class FitReport:
    """Errors of one accelerator and data type, median absolute per cent."""

    accelerator: str
    weights: str
    constants: RooflineConstants
    held_out: dict[str, float]
    """On models left out of the fit, by kind of row."""
    held_out_p90: dict[str, float]
    default: dict[str, float]
    """Of the uncalibrated default on the same rows."""
    rows: int
    models: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one accelerator and data type as columns; every step time is a formula of these."""

    streamed: Array  # bytes of weights per GPU / bandwidth, s
    flop_seconds: Array  # s at full rate
    kv_seconds: Array
    attention_seconds: Array
    layers: Array
    prompt_layers: Array  # layers where the step holds prompt tokens, else 0
    batch: Array
    kv_heads: Array  # batch · layers · KV heads of a GPU
    tokens_hidden: Array  # layers · tokens · hidden / 1e4
    reduces: Array  # 2·layers where two GPUs share the model, else 0
    reduce_seconds: Array  # s at full link rate
    reduces_many: Array  # the same for more than two GPUs
    reduce_many_seconds: Array
    ms: Array
    kind: Array  # 0 decode, 1 prefill, 2 mixed
    group: Array  # index of the model family

    def pick(self, mask: NDArray[np.bool_]) -> _Rows:
        return _Rows(**{field.name: getattr(self, field.name)[mask] for field in fields(self)})


_KINDS = ("decode", "prefill", "mixed")


def _family(name: str) -> str:
    return "llama-70b" if name.endswith(("Llama-2-70b-hf", "Llama-3.1-70B")) else name


def _columns(keys: Sequence[TableKey]) -> tuple[_Rows, tuple[str, ...]]:
    import numpy as np

    ideal = RooflineConstants(
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
    families = tuple(dict.fromkeys(_family(key.model) for key in keys))
    columns: list[tuple[float, ...]] = []
    for key in keys:
        shape, gpu = model(key.model), accelerator(key.accelerator)
        roofline = Roofline(shape, gpu, ideal, key.tensor_parallel, key.weights, key.kv_dtype)
        tp = key.tensor_parallel
        for row in load_table(key).rows:
            tokens = float(row.new_tokens + row.batch)
            pairs = row.new_tokens * (row.context + row.new_tokens / 2.0)
            if row.kind == "mixed":
                pairs = mixed_pairs(row.new_tokens, row.context)
            moved = 2.0 * (tp - 1) / tp * tokens * shape.hidden * 2.0
            columns.append(
                (
                    shape.streamed_bytes(key.weights, tokens) / (tp * gpu.bandwidth),
                    roofline.compute_ms(tokens) / 1e3,
                    roofline.kv_read_ms(float(row.batch * row.context)) / 1e3,
                    roofline.pair_ms * pairs / 1e3,
                    float(shape.layers),
                    float(shape.layers * (row.new_tokens > 0)),
                    float(row.batch),
                    row.batch * shape.layers * shape.kv_heads / shape.kv_shards(tp),
                    shape.layers * tokens * shape.hidden / 1e4,
                    2.0 * shape.layers * (tp == 2),
                    2.0 * shape.layers * moved / (gpu.link_gb_s * 1e9) * (tp == 2),
                    2.0 * shape.layers * (tp > 2),
                    2.0 * shape.layers * moved / (gpu.link_gb_s * 1e9) * (tp > 2),
                    row.ms,
                    float(_KINDS.index(row.kind)),
                    float(families.index(_family(key.model))),
                )
            )
    return _Rows(*np.array(columns, dtype=float).T), families


def _predict(rows: _Rows, constants: RooflineConstants) -> Array:
    """Return milliseconds; the same formulas as :class:`Roofline`, over columns (a test holds them together)."""
    import numpy as np

    c = constants
    seconds = np.maximum(rows.streamed / c.mbu, rows.flop_seconds / c.mfu)
    seconds = seconds + rows.kv_seconds / c.mbu_kv + rows.attention_seconds / c.mfu_attention
    seconds = seconds + rows.reduce_seconds / c.link_efficiency
    seconds = seconds + rows.reduce_many_seconds / c.link_efficiency_many
    micro = rows.layers * c.layer_us + c.step_us + rows.batch * c.request_us
    micro = micro + rows.prompt_layers * c.prompt_layer_us + rows.kv_heads * c.kv_head_us
    micro = micro + rows.tokens_hidden * c.token_us + rows.reduces * c.allreduce_us
    micro = micro + rows.reduces_many * c.allreduce_many_us
    result: Array = 1e3 * seconds + micro / 1e3
    return result


def _fit(rows: _Rows) -> RooflineConstants:
    """Levenberg-Marquardt on log errors, reweighted towards the median (IRLS), within the bounds.

    Each kind of row has the same weight, whatever its number of rows.
    """
    import numpy as np

    low = np.log([bound[1] for bound in _BOUNDS])
    high = np.log([bound[2] for bound in _BOUNDS])
    share = np.array([1.0 / max(int((rows.kind == kind).sum()), 1) for kind in range(3)])
    base = np.sqrt(share[rows.kind.astype(int)])

    def constants(theta: Array) -> RooflineConstants:
        values = np.exp(low + (high - low) / (1.0 + np.exp(-theta)))
        named: dict[str, Any] = {name: float(v) for (name, _, _), v in zip(_BOUNDS, values, strict=True)}
        return replace(DEFAULT_CONSTANTS, **named)

    def residual(theta: Array) -> Array:
        result: Array = np.log(_predict(rows, constants(theta)) / rows.ms)
        return result

    best: tuple[float, Array] | None = None
    for start in (0.0, 1.0):
        theta = np.full(len(_BOUNDS), start)
        damping = 1e-2
        for _ in range(120):
            r = residual(theta)
            weight = base / np.sqrt(np.maximum(np.abs(r), 0.01))  # L1 beyond one per cent
            jacobian = np.empty((r.size, theta.size))
            for index in range(theta.size):
                step = theta.copy()
                step[index] += 1e-4
                jacobian[:, index] = (residual(step) - r) / 1e-4
            weighted = jacobian * weight[:, None]
            gradient = weighted.T @ (weight * r)
            hessian = weighted.T @ weighted
            cost = float(((weight * r) ** 2).sum())
            while damping < 1e8:
                move = np.linalg.solve(
                    hessian + damping * (np.diag(np.diag(hessian)) + 1e-9 * np.eye(theta.size)), gradient
                )
                candidate = np.clip(theta - np.clip(move, -2.0, 2.0), -12.0, 12.0)
                if float(((weight * residual(candidate)) ** 2).sum()) < cost:
                    damping = max(damping / 5.0, 1e-9)
                    break
                damping *= 4.0
            else:
                break
            if float(np.abs(candidate - theta).max()) < 1e-4:
                theta = candidate
                break
            theta = candidate
        loss = float((base**2 * np.abs(residual(theta))).sum())
        if best is None or loss < best[0]:
            best = (loss, theta)
    assert best is not None  # noqa: S101  two starts were tried
    return constants(best[1])


def _errors(rows: _Rows, predicted: Array, quantile: float) -> dict[str, float]:
    import numpy as np

    error = np.abs(predicted / rows.ms - 1.0) * 100.0
    return {
        name: round(float(np.quantile(error[rows.kind == kind], quantile)), 2)
        for kind, name in enumerate(_KINDS)
    }


def fit_all(only: Callable[[str, str], bool] = lambda _gpu, _weights: True) -> list[FitReport]:
    """Fit every accelerator and data type of the shipped tables.

    Args:
        only: Which (accelerator key, weight data type) to fit.

    Returns:
        A report for each, in the order of the tables.
    """
    import numpy as np

    groups: dict[tuple[str, str], list[TableKey]] = {}
    for key in table_keys():
        if key.kv_dtype != "bf16" or model(key.model).is_moe or not only(key.accelerator, key.weights):
            continue
        if key.model in FITTED:
            groups.setdefault((key.accelerator, key.weights), []).append(key)
    reports: list[FitReport] = []
    for (gpu, weights), keys in groups.items():
        rows, families = _columns(keys)
        predicted = np.empty_like(rows.ms)
        for index in range(len(families)):
            out = rows.group == index
            predicted[out] = _predict(rows.pick(out), _fit(rows.pick(~out)))
        held_out = _errors(rows, predicted, 0.5)
        constants = _fit(rows)
        rounded = {name: float(f"{getattr(constants, name):.4g}") for name, _, _ in _BOUNDS}
        reports.append(
            FitReport(
                accelerator=gpu,
                weights=weights,
                constants=RooflineConstants(
                    **rounded,
                    decode_error_percent=held_out["decode"],
                    prefill_error_percent=held_out["prefill"],
                    mixed_error_percent=held_out["mixed"],
                    fitted_to=FITTED_TO,
                ),
                held_out=held_out,
                held_out_p90=_errors(rows, predicted, 0.9),
                default=_errors(rows, _predict(rows, DEFAULT_CONSTANTS), 0.5),
                rows=rows.ms.size,
                models=len(families),
            )
        )
    return reports


def unseen() -> list[str]:
    """Return lines that say how far the shipped constants are from the tables of models no fit has seen."""
    import numpy as np

    groups: dict[tuple[str, str], list[TableKey]] = {}
    for key in table_keys():
        if key.kv_dtype == "bf16" and key.model not in FITTED:
            groups.setdefault((key.accelerator, key.weights), []).append(key)
    lines = ["The shipped constants against the tables of models that no fit has seen, likewise"]
    for (gpu, weights), keys in groups.items():
        rows, families = _columns(keys)
        predicted = np.asarray(_predict(rows, load_constants()[gpu, weights]))
        middle, high = _errors(rows, predicted, 0.5), _errors(rows, predicted, 0.9)
        cells = " ".join(f"{middle[k]:5.1f} ({high[k]:5.1f})" for k in _KINDS)
        lines.append(f"{gpu:16s} {weights:7s} {rows.ms.size:5d} {cells}   {len(families)} models")
    return lines


def render(reports: Iterable[FitReport]) -> str:
    """Return the reports as a table for a person."""
    title = (
        "Calibrated roofline against the shipped tables, models left out in turn: "
        "median (90th percentile) absolute error, per cent"
    )
    lines = [
        title,
        f"{'accelerator':16s} {'weights':7s} {'rows':>5s} {'decode':>13s} {'prefill':>13s} {'mixed':>13s}   default d/p/m",
    ]
    for report in reports:
        cells = " ".join(f"{report.held_out[k]:5.1f} ({report.held_out_p90[k]:5.1f})" for k in _KINDS)
        default = "/".join(f"{report.default[kind]:.0f}" for kind in _KINDS)
        lines.append(f"{report.accelerator:16s} {report.weights:7s} {report.rows:5d} {cells}   {default}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print, and write the constants when asked to."""
    parser = argparse.ArgumentParser(prog="python -m servingtiers.performance.fit", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the shipped constants")
    options = parser.parse_args(arguments)
    reports = fit_all()
    print(render(reports))
    if options.write:
        target = Path(__file__).parent / "data" / "roofline_constants.json"
        skipped = {"fitted_to"}
        document = {
            "fitted_to": FITTED_TO,
            "fits": [
                {
                    "accelerator": report.accelerator,
                    "weights": report.weights,
                    "constants": {k: v for k, v in asdict(report.constants).items() if k not in skipped},
                }
                for report in reports
            ],
        }
        target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
