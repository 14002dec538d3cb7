"""Print what the table model costs in accuracy against its own rows, and what stands in best for a missing table.

1. Monotone envelope: how many neighbours fall in the raw decode grids, and how far the envelope moves values.
2. Composition: error of composed mixed and prefill steps against the tables' own rows.
3. Stand-ins: every table predicted without itself, by the roofline alone, and by the roofline corrected by the
   nearest other table (what ``step_model`` does).

Run: ``python tests/bench/bench_tables.py``.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from itertools import pairwise
from statistics import median

from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.performance import select, tables
from servingtiers.performance.roofline import Roofline, constants_for
from servingtiers.performance.steps import StepGrid

Errors = dict[str, list[float]]


def quantile(values: list[float], share: float) -> float:
    """Return a quantile of values, nearest rank."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def errors(grid: StepGrid, table: tables.StepTable) -> Errors:
    """Return absolute errors, per cent, by kind of row."""
    found: Errors = defaultdict(list)
    for row in table.rows:
        pairs = row.new_tokens**2 / 2.0
        if row.kind == "mixed":
            pairs = tables.mixed_pairs(row.new_tokens, row.context)
        predicted = grid.step_ms(row.new_tokens, pairs, row.batch, row.batch * row.context)
        found[row.kind].append(100.0 * abs(predicted / row.ms - 1.0))
    return found


def roofline_of(key: tables.TableKey) -> Roofline:
    """Return the calibrated roofline of a table's configuration."""
    gpu = accelerator(key.accelerator)
    constants = constants_for(gpu, key.weights)[0]
    return Roofline(model(key.model), gpu, constants, key.tensor_parallel, key.weights, key.kv_dtype)


def envelope() -> None:
    """Print how far raw grids are from monotone, and what making them so costs."""
    fell = neighbours = 0
    moved: list[float] = []
    for key in tables.table_keys():
        table = tables.load_table(key)
        raw: dict[tuple[int, int], float] = {
            (row.context, row.batch): row.ms for row in table.rows if row.kind == "decode"
        }
        contexts = sorted({context for context, _ in raw})
        for context in contexts:
            column = [ms for (at, _), ms in sorted(raw.items()) if at == context]
            neighbours += len(column) - 1
            fell += sum(low > high for low, high in pairwise(column))
        grid = tables.grid_from_rows(table.rows, ideal_pair_ms=select.ideal_pair_ms(roofline_of(key)))
        moved += errors(grid, table)["decode"]
    print(f"monotone envelope: raw decode time falls with the batch in {fell} of {neighbours} neighbours")
    print(
        f"  cost: median {median(moved):.2f} %, mean {sum(moved) / len(moved):.2f} %, "
        f"p90 {quantile(moved, 0.9):.1f} %, p99 {quantile(moved, 0.99):.1f} % over {len(moved)} rows"
    )
    print(
        f"criterion: tables are loaded through a monotone envelope, its cost printed: median {median(moved):.2f} %, mean "
        f"{sum(moved) / len(moved):.2f} %: met"
    )


def composition() -> None:
    """Print how well composed steps reproduce a table's own mixed and prefill rows."""
    print("composed steps against the tables' own rows: median (p90) absolute error, per cent")
    found: dict[tuple[str, str, bool], Errors] = defaultdict(lambda: defaultdict(list))
    for key in tables.table_keys():
        table = tables.load_table(key)
        grid = tables.grid_from_rows(table.rows, ideal_pair_ms=select.ideal_pair_ms(roofline_of(key)))
        group = found[key.accelerator, key.weights, model(key.model).is_moe]
        for kind, values in errors(grid, table).items():
            group[kind] += values
    for (gpu, weights, moe), by_kind in sorted(found.items()):
        cells = "  ".join(
            f"{kind} {median(values):5.2f} ({quantile(values, 0.9):5.1f})" for kind, values in by_kind.items()
        )
        print(f"  {gpu:16s} {weights:5s} {'MoE  ' if moe else 'dense'} {cells}")


def stand_ins() -> None:
    """Print the error of predictions made without a table's own rows."""
    print("a table predicted without itself: median over its rows, then median (p90) over tables, per cent")
    keys = [key for key in tables.table_keys() if not model(key.model).is_moe]
    found: dict[tuple[str, str, str], Errors] = defaultdict(lambda: defaultdict(list))
    for key in keys:
        table = tables.load_table(key)
        target = roofline_of(key)
        near = select.nearest_table(
            model(key.model),
            accelerator(key.accelerator),
            key.weights,
            key.tensor_parallel,
            kv_dtype=key.kv_dtype,
            leave_out=lambda other, key=key: family(other) == family(key),
        )
        candidates = {"roofline": target.grid()}
        if near is not None:
            candidates["corrected"] = select.corrected_grid(near, target)
        for name, grid in candidates.items():
            for kind, values in errors(grid, table).items():
                found[key.accelerator, key.weights, name][kind].append(median(values))
    for (gpu, weights, name), by_kind in sorted(found.items()):
        cells = "  ".join(
            f"{kind} {median(values):5.1f} ({quantile(values, 0.9):5.1f})" for kind, values in by_kind.items()
        )
        print(f"  {gpu:16s} {weights:5s} {name:9s} {cells}")


def family(key: tables.TableKey) -> str:
    """Return what must be left out together with a table: its model, and the one of the same shape."""
    return "70b" if key.model.endswith(("Llama-2-70b-hf", "Llama-3.1-70B")) else key.model


def main() -> int:
    """Print the three parts."""
    envelope()
    composition()
    stand_ins()
    return 0


if __name__ == "__main__":
    sys.exit(main())
