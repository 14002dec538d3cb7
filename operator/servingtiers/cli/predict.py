"""``servingtiers predict``: the latencies of one configuration under a load, or of many from a CSV file."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from servingtiers.cli._options import InputError, OneLineCommand, input_errors, warn_of_quantized_name

if TYPE_CHECKING:
    from servingtiers.performance.prediction import Prediction, Replica
    from servingtiers.performance.workload import Workload

__all__ = ["command"]

_TEXT = {"model", "accelerator", "arrivals", "weights", "kv_dtype", "profile"}
_WHOLE = {"tensor_parallel", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "concurrency"}
_REAL = {"rate", "prompt_tokens", "output_tokens", "prefix_hit_rate", "length_cv"}
_WHOLE |= {"speculative_tokens", "requests", "seed"}
_REAL |= {"acceptance", "draft_cost"}
_SWITCH = {"steady", "piecewise_graphs"}
_MOST_REQUESTS = 10_000_000
_MOST_CLIENTS = 100_000
"""Far beyond what one replica serves; every client sends ten requests, which take memory."""
_ON, _OFF = {"1", "true", "yes"}, {"0", "false", "no"}


@click.command("predict", cls=OneLineCommand)
@click.option("--model", metavar="NAME", help="Model id, or the path of a Hugging Face config.json.")
@click.option("--accelerator", metavar="KEY", help="Accelerator, such as h100-sxm-80gb.")
@click.option("--tensor-parallel", type=int, default=1, show_default=True, help="GPUs of the replica.")
@click.option("--rate", type=float, help="Requests per second (open loop).")
@click.option("--concurrency", type=int, help="Clients that each wait for their answer (closed loop).")
@click.option("--prompt-tokens", type=float, default=512.0, show_default=True, help="Mean prompt length.")
@click.option("--output-tokens", type=float, default=128.0, show_default=True, help="Mean output length.")
@click.option(
    "--length-cv", type=float, default=0.0, show_default=True, help="Spread of both lengths (log-normal)."
)
@click.option(
    "--prefix-hit-rate", type=float, default=0.0, show_default=True, help="Cached share of a prompt, 0–1."
)
@click.option(
    "--arrivals", default="poisson", show_default=True, metavar="KIND", help="poisson, constant or gamma:CV."
)
@click.option(
    "--max-num-seqs", type=int, help="Largest batch; vLLM's default for the accelerator when left out."
)
@click.option(
    "--max-num-batched-tokens", type=int, help="Token budget of a step; vLLM's default when left out."
)
@click.option("--max-model-len", type=int, help="Longest request; the model's when left out.")
@click.option("--weights", default="bf16", show_default=True, metavar="TYPE", help="bf16, fp8, int8 or int4.")
@click.option("--kv-dtype", default="bf16", show_default=True, metavar="TYPE", help="bf16 or fp8.")
@click.option("--speculative-tokens", type=int, help="Draft tokens a step; speculative decoding.")
@click.option(
    "--acceptance", type=float, default=0.7, show_default=True, help="Chance that a draft token is kept."
)
@click.option(
    "--draft-cost", type=float, default=0.0, show_default=True, help="A draft token's cost in decode steps."
)
@click.option(
    "--piecewise-graphs",
    is_flag=True,
    help="Decode steps run as piecewise CUDA graphs: vLLM before 0.11, or cudagraph_mode PIECEWISE.",
)
@click.option(
    "--profile",
    type=click.Path(dir_okay=False),
    help="Measured profile (CSV) of this configuration; wins over tables.",
)
@click.option(
    "--batch",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV file with a row for each prediction; columns are named as the flags, with underscores. Cells left "
    "empty and columns left out take the flags' values; further columns are ignored.",
)
@click.option(
    "--steady",
    is_flag=True,
    help="With --concurrency, leave out the start, when all clients send at once. It counts otherwise, as in "
    "`vllm bench serve` with ten prompts for each client.",
)
@click.option("--requests", type=int, default=20_000, show_default=True, help="Requests to simulate.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random numbers.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(batch: Path | None, output: str, **flags: Any) -> None:
    """Predict TTFT, TPOT and end-to-end latency of one replica.

    The engine is simulated token by token: continuous batching with chunked prefill as vLLM schedules it, over the
    best step times there are (your profile, a shipped table, or a roofline); the source and its error band are part
    of the answer.
    """
    if batch is not None:
        _predict_all(batch, flags)
        return
    with input_errors():
        replica, workload = _question(flags)
        prediction = _answer(replica, workload, flags)
    _say_what_has_no_effect(flags)
    click.echo(json.dumps(prediction.to_json()) if output == "json" else _table(replica, prediction))


def _say_what_has_no_effect(flags: dict[str, Any]) -> None:
    """Name on standard error what was given and changes nothing here, and weights that the name contradicts."""
    context = click.get_current_context()

    def typed(*names: str) -> list[str]:
        given = (each for each in names if context.get_parameter_source(each) is ParameterSource.COMMANDLINE)
        return ["--" + each.replace("_", "-") for each in given]

    idle = []
    if flags["speculative_tokens"] is None:
        idle += [(option, "without --speculative-tokens") for option in typed("acceptance", "draft_cost")]
    if flags["concurrency"] is None:
        idle += [(option, "without --concurrency") for option in typed("steady")]
    else:
        idle += [(option, "with --concurrency") for option in typed("arrivals")]
    for option, when in idle:
        click.echo(f"note: {option} has no effect {when}", err=True)
    if not typed("weights") and flags["profile"] is None:
        warn_of_quantized_name(flags["model"], flags["weights"])


def _question(values: dict[str, Any]) -> tuple[Replica, Workload]:
    """Return the engine and the traffic that flag values tell of.

    Raises:
        ValueError: The input makes no sense; the message names the mend.
    """
    # numba and numpy come in here: --help and wrong flags need not wait for them.
    from servingtiers.catalog.accelerators import accelerator
    from servingtiers.catalog.models import model_as_asked
    from servingtiers.performance.host import PIECEWISE_LAYER_MS
    from servingtiers.performance.prediction import Replica
    from servingtiers.performance.profile import load_profile
    from servingtiers.performance.speculation import Speculation
    from servingtiers.performance.workload import Arrivals, Workload

    for name in ("model", "accelerator"):
        if not values.get(name):
            raise ValueError(f"--{name} is missing: name one")
    if not 100 <= values["requests"] <= _MOST_REQUESTS:
        raise ValueError(
            f"requests {values['requests']}: simulate 100 or more, percentiles need them, and {_MOST_REQUESTS} at most"
        )
    if (values.get("concurrency") or 0) > _MOST_CLIENTS:
        raise ValueError(f"concurrency {values['concurrency']}: use {_MOST_CLIENTS} clients at most")
    speculation = None
    if values.get("speculative_tokens") is not None:
        speculation = Speculation(values["speculative_tokens"], values["acceptance"], values["draft_cost"])
    shape = model_as_asked(values["model"])
    longest = values.get("max_model_len") or shape.max_context
    if longest > shape.max_context:
        raise ValueError(
            f"--max-model-len {longest} exceeds the {shape.max_context} of {shape.name}: lower it"
        )
    workload = Workload(
        prompt_tokens=values["prompt_tokens"],
        output_tokens=values["output_tokens"],
        rate=values.get("rate"),
        concurrency=values.get("concurrency"),
        arrivals=Arrivals.parse(values["arrivals"]),
        prompt_cv=values["length_cv"],
        output_cv=values["length_cv"],
        prefix_hit_rate=values["prefix_hit_rate"],
        max_model_len=longest,
    )
    replica = Replica(
        model=shape,
        accelerator=accelerator(values["accelerator"]),
        tensor_parallel=values["tensor_parallel"],
        weights=values["weights"],
        kv_dtype=values["kv_dtype"],
        max_num_seqs=values.get("max_num_seqs"),
        max_num_batched_tokens=values.get("max_num_batched_tokens"),
        profile=load_profile(values["profile"]) if values.get("profile") else None,
        speculation=speculation,
        piecewise_layer_ms=PIECEWISE_LAYER_MS if values["piecewise_graphs"] else 0.0,
    )
    return replica, workload


def _answer(replica: Replica, workload: Workload, values: dict[str, Any]) -> Prediction:
    from servingtiers.performance.prediction import predict

    return predict(
        replica, workload, requests=values["requests"], seed=values["seed"], steady=values["steady"]
    )


def _predict_all(path: Path, flags: dict[str, Any]) -> None:
    """Print a JSON line for each row of a CSV file; rows that cannot be predicted say why and fail the command."""
    with input_errors(str(path)):
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise ValueError("this is no UTF-8 text: save it as CSV in UTF-8") from error
        header = lines[0] if lines else ""
        delimiter = max(",;\t", key=header.count)  # spreadsheets of some countries write the others
        reader = csv.DictReader(lines, delimiter=delimiter)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} is no CSV ({error}): correct it") from error
        if not (_TEXT | _WHOLE | _REAL | _SWITCH) & {_column(name) for name in reader.fieldnames or ()}:
            raise ValueError(
                "no column is named as a flag: begin with a header such as model,accelerator,rate"
            )
        if not rows:
            raise ValueError("there is no row below the header: give one for each prediction")
    wrong = []
    for number, row in enumerate(rows, start=1):
        try:
            values = _row_values(row, flags)
            prediction = _answer(*_question(values), values)
        except (ValueError, LookupError) as error:
            text = " ".join(str(error).split())
            wrong.append(f"row {number}: {text}")
            click.echo(json.dumps({"row": number, "error": text}))
        else:
            click.echo(json.dumps(prediction.to_json()))
    if wrong:
        more = f" (and {len(wrong) - 1} more rows)" if len(wrong) > 1 else ""
        raise InputError(f"{path}: {wrong[0]}{more}")


def _column(name: str | None) -> str:
    """A column's name as a flag's, whatever its case and hyphens; a row too long has one without a name."""
    return (name or "").strip().lower().replace("-", "_").replace(" ", "_")


def _row_values(row: dict[str | None, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with a row's cells over them."""
    values = dict(flags)
    given = {_column(column) for column, cell in row.items() if isinstance(cell, str) and cell.strip()}
    for name, other in (("rate", "concurrency"), ("concurrency", "rate")):
        if name in given and other not in given:
            values[other] = (
                None  # a row's open loop replaces the command's closed one, and the other way round
            )
    for column, cell in row.items():
        name = _column(column)
        text = cell.strip() if isinstance(cell, str) else ""  # a row too long carries a list
        if not text:
            continue
        if name in _TEXT:
            values[name] = text
        elif name in _SWITCH:
            if text.lower() not in _ON | _OFF:
                raise ValueError(f"{name} {text!r}: write true or false")
            values[name] = text.lower() in _ON
        elif name in _WHOLE | _REAL:
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            whole = name in _WHOLE
            if not math.isfinite(number) or (whole and number != int(number)):
                raise ValueError(
                    f"{name} {text!r} is not a {'whole ' if whole else ''}number: correct the cell"
                )
            values[name] = int(number) if whole else number
    # A row may carry both columns with one of them 0, meaning "not this one".
    if values.get("rate") and values.get("concurrency") == 0:
        values["concurrency"] = None
    if values.get("concurrency") and values.get("rate") == 0:
        values["rate"] = None
    return values


def _table(replica: Replica, prediction: Prediction) -> str:
    result, engine = prediction.result, replica.engine()
    columns = ("mean", "p50", "p90", "p95", "p99", "p999")
    asked = (
        f"{replica.model.name} in {replica.weights} on {replica.tensor_parallel} x {replica.accelerator.key}, "
        f"max-num-seqs {engine.max_num_seqs}, max-num-batched-tokens {engine.max_num_batched_tokens}"
    )
    lines = [asked]
    lines += ["ms     " + "".join(f"{name:>10}" for name in columns)]
    for label, values in (
        ("TTFT", result.ttft),
        ("TPOT", result.tpot),
        ("ITL", result.itl),
        ("E2E", result.e2e),
    ):
        lines.append(f"{label:<7}" + "".join(f"{values.at(name):>10.1f}" for name in columns))
    lines.append(
        f"{result.requests_per_second:.2f} requests/s, {result.tokens_per_second:.0f} output tokens/s, "
        f"mean batch {result.mean_batch:.1f}, KV cache {100 * result.kv_use:.1f} % used"
    )
    if result.saturated:
        lines.append("SATURATED: the queue grows; the latencies above only say how far it grew in this run")
    lines.append(f"± {prediction.band_percent:.0f} %, {prediction.source}")
    return "\n".join(lines)
