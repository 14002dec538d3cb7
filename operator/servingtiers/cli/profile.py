"""``servingtiers profile``: measures the step times of a running engine, for ``predict`` and ``plan``."""

from __future__ import annotations

import asyncio
import csv
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from servingtiers.cli._options import InputError, OneLineCommand, input_errors

if TYPE_CHECKING:
    from servingtiers.adapters.profiler import Grid, Measured

__all__ = ["command", "profile_csv"]

_BUSY = 0.7
"""Share of a processor from which on the client may be what was measured."""


@click.command("profile", cls=OneLineCommand)
@click.option("--url", required=True, help="Base URL of the engine, such as http://localhost:8000.")
@click.option("--model", required=True, metavar="NAME", help="Served model name.")
@click.option(
    "--batch", "batches", type=int, multiple=True, help="Decoding sequences.  [default: 1 2 4 … 64]"
)
@click.option(
    "--context", "contexts", type=int, multiple=True, help="Tokens of each of them.  [default: 256 1024 4096]"
)
@click.option(
    "--prompt-tokens", "prompts", type=int, multiple=True, help="Prompt lengths.  [default: 128 256 … 2048]"
)
@click.option(
    "--mixed/--no-mixed",
    default=True,
    show_default=True,
    help="Also measure steps that compute a prompt beside a batch.",
)
@click.option(
    "--max-num-batched-tokens",
    "budget",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="The engine's step budget; longer prompts are left out, as they take several steps.",
)
@click.option(
    "--max-num-seqs", type=click.IntRange(min=1), help="The engine's limit; larger batches are left out."
)
@click.option("--kv-capacity-tokens", type=click.IntRange(min=1), help="Asked of the engine when left out.")
@click.option(
    "--vocabulary",
    type=click.IntRange(min=100),
    default=20_000,
    show_default=True,
    help="Token ids that prompts are drawn from; less only for toy models.",
)
@click.option("--max-requests", type=int, default=2000, show_default=True, help="Refuse to send more.")
@click.option(
    "--timeout", type=click.FloatRange(min=1.0), default=300.0, show_default=True, help="Of a request, s."
)
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Bearer token.  [env: OPENAI_API_KEY]")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    required=True,
    help="CSV file to write.",
)
def command(
    url: str,
    model: str,
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    prompts: tuple[int, ...],
    *,
    mixed: bool,
    budget: int,
    max_num_seqs: int | None,
    kv_capacity_tokens: int | None,
    vocabulary: int,
    max_requests: int,
    timeout: float,
    api_key: str | None,
    output: Path,
) -> None:
    """Measure the step times of a running vLLM engine.

    Nothing but HTTP is needed. The engine must be idle otherwise: other traffic is measured with it. Decode times come
    from the gaps between tokens; the time that network, HTTP and this client take is measured and subtracted from
    prefill times. Prefix caching (vLLM's default) makes it quicker; speculative decoding must be off.
    """
    from servingtiers.adapters.profiler import Grid
    from servingtiers.performance.profile import parse_profile

    with input_errors():
        usual = Grid()
        grid = Grid(
            batches=batches or usual.batches,
            contexts=contexts or usual.contexts,
            prompts=prompts or usual.prompts,
            mixed=mixed,
        )
        if grid.requests > max_requests:
            raise ValueError(
                f"this takes up to {grid.requests} requests: raise --max-requests, or measure fewer points"
            )
        if not output.parent.is_dir():
            raise ValueError(f"{output.parent} is no directory: create it, or choose another --output")
    click.echo(f"measuring {model} at {url}: up to {grid.requests} requests", err=True)
    measured = _measure(
        url,
        model,
        grid,
        budget,
        max_num_seqs,
        kv_capacity_tokens,
        timeout=timeout,
        api_key=api_key,
        vocabulary=vocabulary,
    )
    text = profile_csv(measured, model)
    for reason in measured.left_out:
        click.echo(f"left out: {reason}", err=True)
    with input_errors():
        parse_profile(output.name, text.splitlines())
    output.write_text(text, encoding="utf-8")
    click.echo(
        f"{output}: {len(measured.rows)} steps from {measured.requests} requests; network, HTTP and client take "
        f"{measured.overhead_ms:.1f} ms a request, subtracted from prefill times and absent from decode times; "
        f"{measured.request_ms:.1f} ms after a pause",
        err=True,
    )
    if measured.client_busy > _BUSY:
        click.echo(
            f"warning: this client took {100 * measured.client_busy:.0f} % of a processor: large batches may be faster "
            "than measured; run it on a faster machine, or measure smaller batches",
            err=True,
        )


def _measure(
    url: str,
    model: str,
    grid: Grid,
    budget: int,
    max_num_seqs: int | None,
    kv_capacity_tokens: int | None,
    *,
    timeout: float,
    api_key: str | None,
    vocabulary: int,
) -> Measured:
    from servingtiers.adapters.profiler import EngineProfiler, ProfilingError

    async def run() -> Measured:
        profiler = EngineProfiler(
            url,
            model,
            api_key=api_key,
            timeout=timeout,
            vocabulary=vocabulary,
            progress=lambda line: click.echo(line, err=True),
        )
        async with profiler:
            return await profiler.measure(
                grid, step_budget=budget, max_num_seqs=max_num_seqs, kv_capacity_tokens=kv_capacity_tokens
            )

    try:
        return asyncio.run(run())
    except ProfilingError as error:
        raise InputError(" ".join(str(error).split())) from error


def profile_csv(measured: Measured, model: str) -> str:
    """Return a measurement as the CSV that :mod:`servingtiers.performance.profile` reads."""
    text = io.StringIO()
    engine = f"{measured.engine}, {model}" if measured.engine else model
    text.write(f"# engine: {engine}\n")
    text.write(f"# measured: {datetime.now(UTC):%Y-%m-%d} over HTTP, {measured.requests} requests\n")
    text.write(
        f"# overhead: {measured.overhead_ms:.2f} ms of network, HTTP and client, subtracted from prefill times\n"
    )
    text.write(
        f"# request: {measured.request_ms:.2f} ms of the same for a request after a pause, the median\n"
    )
    columns = ["kind", "batch", "context_tokens", "new_tokens", "ms"]
    capacity = measured.kv_capacity_tokens
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "kv_capacity_tokens"] if capacity else columns)
    for row in measured.rows:
        cells = [row.kind, row.batch or "", row.context, row.new_tokens or "", f"{row.ms:.3f}"]
        writer.writerow([*cells, capacity] if capacity else cells)
    return text.getvalue()
