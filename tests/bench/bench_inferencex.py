"""The performance model against measurements by others: InferenceX sweeps and Dynamo's pre-swept profiles.

The claim is judged on every dense row of vLLM whose precision is recorded as bf16 or fp8 and that is not saturated;
every row that is left out is listed with its reason. No number is fitted to these points. What was *chosen* after errors
on them had been seen is shown by variants without it: the lengths as the client draws them, the host's time between
steps, piecewise CUDA graphs on Hopper, and how fast an FP8 KV cache is read. Asynchronous scheduling belongs there, too; it is what the published settings
say and cannot be switched off. The published settings name an FP8 KV cache. On Blackwell it is taken as the tables have
it. On Hopper the engines of these rows (the published image is vLLM 0.10.2) read it no faster than 16 bits: the tile sizes
that changed that for heads of 128 came later (vllm-project/flash-attention, pull request 96), so it is timed as 16 bits.
That version replays piecewise graphs unless told otherwise, as InferenceX does on B200 only; what that costs is as vLLM's
authors measured it apart from everything else. Each choice has a published reason (the README beside the data; for the
host's time BLIS), but nobody would have looked for one had the errors been small.

What was tried and not taken stands beside it: how long a request is under way besides the engine's steps, as measured by
others than InferenceX or by this project with vLLM on CPU, and what piecewise graphs cost where the model is so small that
the host sets the pace. The sources differ by factors of two.

Run: python tests/bench/bench_inferencex.py [--rows]
"""

from __future__ import annotations

import csv
import gzip
import random
import signal
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.catalog.names import CatalogError
from servingtiers.performance import engine_kernel as kernel
from servingtiers.performance.engine_sim import PoolConfig, make_pool, make_requests
from servingtiers.performance.host import PIECEWISE_LAYER_MS
from servingtiers.performance.planner import FRONT_END_MS
from servingtiers.performance.prediction import ROUNDS, Replica, predict
from servingtiers.performance.workload import Workload

DATA = Path(__file__).parent / "data"
TPOT_TARGET, TTFT_TARGET = 5.5, 9.0
FEW = 2_000
"""Requests a point is simulated with, at least."""
RANGE_CV, RANGE_MEAN = 0.0642, 0.9
"""Spread and mean of lengths drawn evenly from 80–100 % of the nominal ones."""


@dataclass(frozen=True)
class Variant:
    """How rows are predicted."""

    name: str
    drawn: bool = True
    """Lengths as InferenceX's client draws them, for the rows it measured; the nominal ones otherwise."""
    host: bool = True
    fast_fp8_kv: frozenset[str] = frozenset({"b200_sxm"})
    """Systems on which the FP8 KV cache of the published settings is read faster than 16 bits."""
    front_end_ms: float = FRONT_END_MS
    """From a request's arrival to the scheduler, ms."""
    piecewise_layer_ms: float = PIECEWISE_LAYER_MS
    """What a decode step takes longer for each layer where the published settings leave piecewise graphs on, ms."""


VARIANTS = (
    Variant("as shipped"),
    Variant("with nominal lengths", drawn=False),
    Variant("without the host's time", host=False),
    Variant("with neither", drawn=False, host=False),
    Variant("with full graphs everywhere", piecewise_layer_ms=0.0),
    Variant("with the KV cache read as 16 bits everywhere", fast_fp8_kv=frozenset()),
    Variant(
        "with it read as FP8 by today's kernels everywhere",
        fast_fp8_kv=frozenset({"b200_sxm", "h100_sxm", "h200_sxm"}),
    ),
)
PIECEWISE_SYSTEMS = frozenset({"h100_sxm", "h200_sxm"})
"""Systems on which InferenceX left vLLM 0.10.2 its piecewise graphs; on B200 it asks for full ones."""
SMALL_MODEL_LAYER_MS = 0.015
"""What piecewise graphs cost for each layer of a model of 1.5 billion parameters, the least of what its authors published
for full ones (pull request 20059: a gap between tokens of 5.39 against 4.97 ms, 28 layers)."""
OWN_REQUEST_MS = 6.4
"""Time of a request beside its step with vLLM 0.32 on two cores, measured by this project (`e2e/fidelity/profile.csv`)."""
SHORT_PROMPT = 100.0
"""Prompt tokens of the shortest rows of Dynamo's profiles, where the engine's step is the smaller part of a first token."""
BLIS_REQUEST_MS = 15.563
"""Time of a request before the scheduler in the model that BLIS publishes, whose time per step is in ours."""

AIPERF_PROMPTS, AIPERF_SEED = 100, 100
"""Different prompts that aiperf sends unless told otherwise (``--num-dataset-entries``), shuffled anew each time all were
sent; the seed that aiconfigurator's generated benchmark gives it."""


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
    peak_share: float
    """Arithmetic that the measurement implies over the accelerator's peak: above 1 the row would be impossible."""


def weights_of(row: dict[str, str]) -> str:
    """The weights' data type, or an empty string where the row does not say."""
    if not row["precision"] and row["model_path"] == "Qwen/Qwen3-32B":
        return "bf16"  # not recorded: the checkpoint's own; shown apart and not claimed
    return {"fp8": "fp8", "bf16": "bf16", "fp8_block": "fp8"}.get(row["precision"], "")


def protocol_known(row: dict[str, str]) -> bool:
    """Whether the row is an InferenceX run, whose server and client settings are public."""
    return row["silicon_data_source"].startswith(("source_file=2026-04-06", "db-dump"))


def piecewise(row: dict[str, str]) -> bool:
    """Whether the row's engine replays piecewise CUDA graphs to decode: the published image without the setting.

    The rows that were run with it are those whose version is not recorded.
    """
    return protocol_known(row) and not row["backend_version"] and row["system"] in PIECEWISE_SYSTEMS


def replica_of(row: dict[str, str], variant: Variant | None = None) -> Replica:
    """The engine of a row; without a variant as it is judged whether the row is saturated.

    Raises:
        ValueError: It is not in the catalogue.
    """
    return Replica(
        model=model(row["model_path"]),
        accelerator=accelerator(row["system"]),
        tensor_parallel=int(row["tp_size"]),
        weights=weights_of(row),
        kv_dtype=(
            "fp8"
            if variant is not None and protocol_known(row) and row["system"] in variant.fast_fp8_kv
            else "bf16"
        ),
        max_num_batched_tokens=8192,
        host_time=variant is None or variant.host,
        piecewise_layer_ms=variant.piecewise_layer_ms if variant is not None and piecewise(row) else 0.0,
    )


def reason_to_leave_out(row: dict[str, str]) -> str:
    """Why a row is not compared; empty where it is."""
    if row["mode"] != "agg":
        return "disaggregated"
    if row["precision"] not in {"", "bf16", "fp8", "fp8_block"}:
        return f"precision {row['precision']}, not bf16 or fp8"
    if not weights_of(row):
        return "precision not recorded"
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


def group_of(row: dict[str, str]) -> str:
    """The group a row is shown in."""
    if model(row["model_path"]).is_moe:
        return "mixture of experts (not claimed)"
    if not row["precision"]:
        return "dense, precision not recorded (not claimed)"
    return "dense"


def evaluate(row: dict[str, str], variant: Variant) -> Point:
    """Predict one row."""
    replica = replica_of(row, variant)
    drawn = variant.drawn and protocol_known(row)
    scale, cv = (RANGE_MEAN, RANGE_CV) if drawn else (1.0, 0.0)
    isl, osl, clients = int(row["isl"]), int(row["osl"]), int(row["batch_size"])
    workload = Workload(isl * scale, osl * scale, concurrency=clients, prompt_cv=cv, output_cv=cv)
    result = predict(replica, workload, requests=FEW, front_end_ms=variant.front_end_ms).result
    tpot, ttft = float(row["silicon_tpot_ms"]), float(row["silicon_ttft_ms"])
    tokens_per_second = 1e3 * clients * (isl + osl) * scale / (ttft + (osl * scale - 1.0) * tpot)
    flops = 2.0 * replica.model.active_linear_parameters * tokens_per_second
    return Point(
        group_of(row),
        f"{row['model_path']} {row['precision']} {row['system']} TP{row['tp_size']} {isl}/{osl} x {clients}",
        f"{row['system']}{'' if protocol_known(row) else ', settings not published'}",
        tpot,
        ttft,
        100.0 * (result.tpot.mean / tpot - 1.0),
        100.0 * (result.ttft.mean / ttft - 1.0),
        flops / (replica.tensor_parallel * replica.accelerator.flops(replica.weights)),
    )


def evaluate_repeated(row: dict[str, str]) -> tuple[float, float]:
    """Predict one row as if its client had sent the same few prompts over and over, as aiperf does by default.

    A prompt that was sent before is in the engine's prefix cache, but for its last block.

    Returns:
        Errors of TPOT and mean TTFT, per cent of the measurement.
    """
    replica = replica_of(row, VARIANTS[0])
    isl, osl, clients = int(row["isl"]), int(row["osl"]), int(row["batch_size"])
    prompts, chance = list(range(AIPERF_PROMPTS)), random.Random(AIPERF_SEED)
    order: list[int] = []
    while len(order) < ROUNDS * clients:
        chance.shuffle(prompts)
        order += prompts
    pool = PoolConfig(replica.step_model(), replica.engine())
    block = pool.engine.block_size
    sent: set[int] = set()
    cached = np.zeros(ROUNDS * clients, dtype=np.int64)
    for index in range(len(cached)):
        cached[index] = (isl - 1) // block * block if order[index] in sent else 0
        sent.add(order[index])
    requests = make_requests(
        np.zeros(len(cached)), np.full(len(cached), isl), np.full(len(cached), osl), cached=cached
    )
    engine = make_pool(pool)
    kernel.reset(engine, 0, 0.0)
    kernel.run_closed(engine, requests, FRONT_END_MS, clients)
    tpot = float(((requests.last - requests.first) / (osl - 1)).mean())
    ttft = float((requests.first - requests.arrival).mean())
    return 100.0 * (tpot / float(row["silicon_tpot_ms"]) - 1.0), 100.0 * (
        ttft / float(row["silicon_ttft_ms"]) - 1.0
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
    return f"{label:<60}{len(points):>5}" + " |".join(cells)


def inferencex(*, list_rows: bool, short_prompt_ms: float) -> bool:
    """Compare with the silicon sample; returns whether the claim holds.

    Args:
        list_rows: List every row.
        short_prompt_ms: What Dynamo's shortest prompts take besides the engine's step.
    """
    with gzip.open(DATA / "inferencex_silicon_sample.csv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["backend"] == "vllm"]
    out = {id(row): reason_to_leave_out(row) for row in rows}
    kept = [row for row in rows if not out[id(row)]]
    print(f"vLLM rows: {len(rows)}; compared: {len(kept)}; left out: {len(rows) - len(kept)}\n")
    head = f"{'per cent of the measured value':<60}{'rows':>5}" + " |".join(
        f"{name:>8}{'p90':>8}{'bias':>8}" for name in ("TPOT", "TTFT")
    )
    by_variant = {variant: [evaluate(row, variant) for row in kept] for variant in VARIANTS}
    shipped = by_variant[VARIANTS[0]]
    print(VARIANTS[0].name)
    print(head)
    for group in sorted({p.group for p in shipped}):
        members = [p for p in shipped if p.group == group]
        print(line(group, members))
        for gpu in sorted({p.gpu for p in members}):
            print(line(f"    {gpu}", [p for p in members if p.gpu == gpu]))
    print("\nwhat was chosen after errors had been seen, taken away again; dense rows")
    print(head)
    for variant, points in by_variant.items():
        members = [p for p in points if p.group == "dense"]
        print(line(variant.name, members))
        print(line("    of these with published settings", [p for p in members if "not pub" not in p.gpu]))
    print(
        "\ntried and not taken: a longer way of a request to the scheduler, piecewise graphs that cost more"
    )
    print(head)
    for variant in (
        Variant(f"{OWN_REQUEST_MS:.1f} ms, from our profile of vLLM on CPU", front_end_ms=OWN_REQUEST_MS),
        Variant(
            f"{short_prompt_ms:.1f} ms, from Dynamo's prompts of {SHORT_PROMPT:g} tokens",
            front_end_ms=short_prompt_ms,
        ),
        Variant(f"{BLIS_REQUEST_MS:.1f} ms, as BLIS has it", front_end_ms=BLIS_REQUEST_MS),
        Variant(
            f"piecewise graphs at {1e3 * SMALL_MODEL_LAYER_MS:.0f} us a layer, from a small model",
            piecewise_layer_ms=SMALL_MODEL_LAYER_MS,
        ),
    ):
        points = [evaluate(row, variant) for row in kept]
        members = [p for p in points if p.group == "dense"]
        print(line(variant.name, members))
        print(line("    of these with published settings", [p for p in members if "not pub" not in p.gpu]))
        for gpu in sorted({p.gpu for p in members}):
            print(line(f"        {gpu}", [p for p in members if p.gpu == gpu]))
        print(line("    precision not recorded", [p for p in points if "not recorded" in p.group]))
    unpublished = [row for row in kept if group_of(row) == "dense" and not protocol_known(row)]
    repeated = [evaluate_repeated(row) for row in unpublished]
    tpot, ttft = ([abs(errors[i]) for errors in repeated] for i in (0, 1))
    print(
        f"\nthe {len(unpublished)} dense rows without published settings, had their client sent {AIPERF_PROMPTS} prompts over "
        f"and over (aiperf's default, not known of these rows):\n  TPOT median {statistics.median(tpot):.1f} %, "
        f"p90 {quantile(tpot, 0.9):.1f} %; TTFT median {statistics.median(ttft):.1f} %, p90 {quantile(ttft, 0.9):.1f} %"
    )
    claimed = [p for p in shipped if p.group == "dense"]
    busiest = max(claimed, key=lambda p: p.peak_share)
    print(
        f"\nno row is impossible: the busiest implies {100 * busiest.peak_share:.0f} % of the peak ({busiest.label})"
    )
    print("worst dense rows")
    worst = sorted(claimed, key=lambda p: -max(abs(p.tpot_error), abs(p.ttft_error)))
    for p in worst if list_rows else worst[:12]:
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
    met = True
    print()
    for name, target, errors in (
        ("TPOT", TPOT_TARGET, [abs(p.tpot_error) for p in claimed]),
        ("mean TTFT", TTFT_TARGET, [abs(p.ttft_error) for p in claimed]),
    ):
        middle = statistics.median(errors)
        met &= middle <= target
        print(f"criterion: InferenceX {name}, {len(errors)} dense rows, median error {middle:.1f} % (target {target} %): "
              f"{'met' if middle <= target else 'MISSED'}")  # fmt: skip
    return met


def dynamo() -> float:
    """Compare step times with Dynamo's pre-swept profiles.

    Returns:
        What its shortest prompts take besides the engine's step, ms: the median over its deployments.
    """
    names = {"nvidia/Llama-3.1-8B-Instruct-FP8": "meta-llama/Llama-3.1-8B"}
    errors: dict[tuple[str, str, str, str], list[float]] = {}
    short: list[float] = []
    long: list[tuple[float, float]] = []
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
                if x <= SHORT_PROMPT:
                    short.append(measured - predicted)
                else:
                    long.append((predicted, measured))
            key = (row["gpu"], row["model"], row["tp"], row["kind"])
            errors.setdefault(key, []).append(100.0 * (predicted / measured - 1.0))
    print("\nDynamo's pre-swept profiles (vLLM 0.10.1), per cent of the measured value; shown, not claimed")
    for (gpu, name, tp, kind), values in sorted(errors.items()):
        absolute = [abs(v) for v in values]
        print(
            f"  {name} TP{tp} {gpu} {kind:<8}{len(values):>5} points: median {statistics.median(absolute):5.1f} %, "
            f"p90 {quantile(absolute, 0.9):5.1f} %, bias {statistics.median(values):+5.1f} %"
        )
    constant = statistics.median(short)
    print(
        f"a first token of {SHORT_PROMPT:g}-token prompts takes {min(short):.1f} to {max(short):.1f} ms more than the step"
    )
    for ms in (FRONT_END_MS, constant, BLIS_REQUEST_MS):
        middle = statistics.median(
            abs(100.0 * ((predicted + ms) / measured - 1.0)) for predicted, measured in long
        )
        print(f"  with {ms:4.1f} ms more, {len(long)} longer prompts: median {middle:5.1f} %")
    return constant


def main() -> int:
    """Print everything."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe
    short_prompt_ms = dynamo()
    inferencex(list_rows="--rows" in sys.argv[1:], short_prompt_ms=short_prompt_ms)
    return 0


if __name__ == "__main__":
    sys.exit(main())
