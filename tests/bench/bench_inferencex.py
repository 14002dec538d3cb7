"""The performance model against measurements by others: InferenceX sweeps and Dynamo's pre-swept profiles.

Nothing is fitted to these points. Every row that is left out is listed with its reason.

Run: python tests/bench/bench_inferencex.py [--rows]
"""

from __future__ import annotations

import csv
import gzip
import signal
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.catalog.names import CatalogError
from servingtiers.performance.prediction import Replica, predict
from servingtiers.performance.workload import Workload

DATA = Path(__file__).parent / "data"
TPOT_TARGET, TTFT_TARGET = 5.5, 9.0
CLAIMED = ("h100_sxm", "h200_sxm")
"""B200 is shown and not claimed: InferenceX serves it with fused kernels and without CUDA graphs for prefill
(``cudagraph_mode: FULL_DECODE_ONLY``), an engine that the shipped tables do not describe."""
FEW = 2_000
"""Requests a point is simulated with, at least."""
RANGE_CV, RANGE_MEAN = 0.0642, 0.9
"""Spread and mean of lengths drawn evenly from 80–100 % of the nominal ones."""


@dataclass(frozen=True)
class Point:
    """One measured point and what is predicted for it; errors in per cent of the measurement."""

    group: str
    label: str
    gpu: str
    tpot: float
    ttft: float
    tpot_error: float
    ttft_error: float
    prompt_share: float
    """Prompt tokens per second that the measurement implies, over what the step model computes with prompts alone."""


def weights_of(row: dict[str, str]) -> str:
    """The weights' data type, or an empty string where the row does not say."""
    if not row["precision"] and row["model_path"] == "Qwen/Qwen3-32B":
        return "bf16"  # not recorded: the checkpoint's own; shown apart and not claimed
    return {"fp8": "fp8", "bf16": "bf16", "fp8_block": "fp8"}.get(row["precision"], "")


def protocol_known(row: dict[str, str]) -> bool:
    """Whether the row is an InferenceX run, whose server and client settings are public."""
    return row["silicon_data_source"].startswith(("source_file=2026-04-06", "db-dump"))


def replica_of(row: dict[str, str]) -> Replica:
    """The engine of a row.

    Raises:
        ValueError: It is not in the catalogue.
    """
    return Replica(
        model=model(row["model_path"]),
        accelerator=accelerator(row["system"]),
        tensor_parallel=int(row["tp_size"]),
        weights=weights_of(row),
        max_num_batched_tokens=8192,
    )


def reason_to_leave_out(row: dict[str, str]) -> str:
    """Why a row is not compared; empty where it is."""
    if row["mode"] != "agg":
        return "disaggregated"
    if not weights_of(row):
        return f"precision {row['precision'] or 'not recorded'}, not bf16 or fp8"
    try:
        replica = replica_of(row)
        capacity = replica.step_model().kv_capacity_tokens
    except CatalogError as error:
        return str(error).split(";")[0].split(":")[0]
    if replica.model.is_moe and int(row["moe_ep_size"] or 1) > 1:
        return "expert parallel"
    clients = int(row["batch_size"])
    tokens = clients * (int(row["isl"]) + int(row["osl"]))
    if tokens > 0.9 * capacity:
        return f"saturated: {clients} clients x {int(row['isl']) + int(row['osl'])} tokens > 0.9 x {capacity}"
    if clients > replica.engine().max_num_seqs:
        return f"saturated: {clients} clients > max-num-seqs {replica.engine().max_num_seqs}"
    return ""


def evaluate(row: dict[str, str], *, drawn: bool) -> Point:
    """Predict one row.

    Args:
        row: The row.
        drawn: Lengths as InferenceX's client draws them, from 80–100 % of the nominal ones, instead of the nominal.
    """
    replica = replica_of(row)
    scale, cv = (RANGE_MEAN, RANGE_CV) if drawn else (1.0, 0.0)
    isl, osl, clients = int(row["isl"]), int(row["osl"]), int(row["batch_size"])
    workload = Workload(isl * scale, osl * scale, concurrency=clients, prompt_cv=cv, output_cv=cv)
    result = predict(replica, workload, requests=FEW).result
    tpot, ttft = float(row["silicon_tpot_ms"]), float(row["silicon_ttft_ms"])
    fastest = 8192 / replica.step_model().grid.step_ms(8192, 8192 * isl / 2, 0, 0)
    implied = clients * isl / (ttft + (osl - 1) * tpot)
    if replica.model.is_moe:
        group = "mixture of experts"
    elif protocol_known(row):
        group = "dense, InferenceX"
    elif not row["precision"]:
        group = "dense, neither protocol nor precision known"
    else:
        group = "dense, protocol not published"
    return Point(
        group,
        f"{row['model_path']} {row['precision']} {row['system']} TP{row['tp_size']} {isl}/{osl} x {clients}",
        row["system"],
        tpot,
        ttft,
        100.0 * (result.tpot.mean / tpot - 1.0),
        100.0 * (result.ttft.mean / ttft - 1.0),
        implied / fastest,
    )


def quantile(values: list[float], share: float) -> float:
    """A quantile of a few values."""
    ordered = sorted(values)
    return ordered[min(round(share * (len(ordered) - 1)), len(ordered) - 1)]


def line(label: str, points: list[Point]) -> str:
    """One line of the table: counts, median and 90th percentile of the absolute errors, median signed error."""
    cells = []
    for errors in ([p.tpot_error for p in points], [p.ttft_error for p in points]):
        absolute = [abs(e) for e in errors]
        cells.append(
            f"{statistics.median(absolute):>8.1f}{quantile(absolute, 0.9):>8.1f}{statistics.median(errors):>+8.1f}"
        )
    return f"{label:<44}{len(points):>5}" + " |".join(cells)


def inferencex(*, list_rows: bool) -> bool:
    """Compare with the silicon sample; returns whether the claim holds."""
    with gzip.open(DATA / "inferencex_silicon_sample.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["backend"] == "vllm"]
    out = {id(row): reason_to_leave_out(row) for row in rows}
    kept = [row for row in rows if not out[id(row)]]
    print(f"vLLM rows: {len(rows)}; compared: {len(kept)}; left out: {len(rows) - len(kept)}\n")
    head = f"{'per cent of the measured value':<44}{'rows':>5}" + " |".join(
        f"{name:>8}{'p90':>8}{'bias':>8}" for name in ("TPOT", "TTFT")
    )
    met = True
    worst: list[Point] = []
    for drawn in (True, False):
        points = [evaluate(row, drawn=drawn) for row in kept]
        print("lengths as InferenceX's client draws them (80–100 %)" if drawn else "nominal lengths")
        print(head)
        for group in sorted({p.group for p in points}):
            members = [p for p in points if p.group == group]
            print(line(group, members))
            if group == "dense, InferenceX":
                print(line(f"    {' and '.join(CLAIMED)}", [p for p in members if p.gpu in CLAIMED]))
            for gpu in sorted({p.gpu for p in members}):
                print(line(f"    {gpu}", [p for p in members if p.gpu == gpu]))
            beyond = sum(p.prompt_share > 0.85 for p in members)
            if drawn and beyond:
                print(f"    {beyond} of {len(members)} rows imply over 85 % of the prompt tokens/s of an engine that "
                      "only computes prompts: cached in part")  # fmt: skip
        print()
        if drawn:
            claimed = [p for p in points if p.group == "dense, InferenceX" and p.gpu in CLAIMED]
            tpot = statistics.median(abs(p.tpot_error) for p in claimed)
            ttft = statistics.median(abs(p.ttft_error) for p in claimed)
            met = tpot <= TPOT_TARGET and ttft <= TTFT_TARGET
            print(f"claimed: dense, InferenceX, {' and '.join(CLAIMED)}, {len(claimed)} rows: TPOT {tpot:.1f} % (target "
                  f"{TPOT_TARGET}), TTFT {ttft:.1f} % (target {TTFT_TARGET}): {'met' if met else 'MISSED'}\n")  # fmt: skip
            worst = sorted(
                (p for p in points if p.group == "dense, InferenceX"),
                key=lambda p: -max(abs(p.tpot_error), abs(p.ttft_error)),
            )[:12]
            if list_rows:
                for p in points:
                    print(
                        f"  {p.label:<75} TPOT {p.tpot:7.2f} {p.tpot_error:+6.1f}  TTFT {p.ttft:8.1f} {p.ttft_error:+6.1f}"
                    )
    print("worst dense InferenceX rows")
    for p in worst:
        print(
            f"  {p.label:<62} TPOT {p.tpot:6.2f} ms {p.tpot_error:+6.1f} %, TTFT {p.ttft:7.1f} ms {p.ttft_error:+6.1f} %"
        )
    print("\nleft out")
    if list_rows:
        for row in rows:
            if out[id(row)]:
                print(f"  {row['id']}: {out[id(row)]}")
    else:
        reasons = Counter((out[id(row)], row["model_path"], row["system"]) for row in rows if out[id(row)])
        for (reason, name, system), count in sorted(reasons.items()):
            print(f"  {count:>4} x {name} {system}: {reason}")
    return met


def dynamo() -> None:
    """Compare step times with Dynamo's pre-swept profiles."""
    names = {"nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Llama-3.1-8B"}
    errors: dict[tuple[str, str, str, str], list[float]] = {}
    with (DATA / "dynamo_pre_swept_vllm.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            shape = model(
                names.get(row["model"], "meta-llama/Llama-3.1-70B" if "70B" in row["model"] else row["model"])
            )
            replica = Replica(shape, accelerator(row["gpu"]), int(row["tp"]), "fp8")
            step = replica.step_model()
            measured, x = float(row["ms"]), float(row["x"])
            if row["kind"] == "decode":
                context = float(row["context_length"])
                kv = x * float(row["max_kv_tokens"])
                batch = max(kv / context, 1.0)
                predicted = step.step_ms(0, 0, batch, batch * context)
            else:
                predicted = step.step_ms(x, 0, 0, 0)
            key = (row["gpu"], row["model"], row["tp"], row["kind"])
            errors.setdefault(key, []).append(100.0 * (predicted / measured - 1.0))
    print("\nDynamo's pre-swept profiles (vLLM 0.10.1), per cent of the measured value; shown, not claimed")
    for (gpu, name, tp, kind), values in sorted(errors.items()):
        absolute = [abs(v) for v in values]
        print(
            f"  {name} TP{tp} {gpu} {kind:<8}{len(values):>5} points: median {statistics.median(absolute):5.1f} %, "
            f"p90 {quantile(absolute, 0.9):5.1f} %, bias {statistics.median(values):+5.1f} %"
        )


def main() -> int:
    """Print everything; fail where the claim does not hold."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe
    met = inferencex(list_rows="--rows" in sys.argv[1:])
    dynamo()
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
