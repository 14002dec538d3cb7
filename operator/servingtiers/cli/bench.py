"""``servingtiers bench``: a trace against a live endpoint, in open loop, with the simulator's figures."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from servingtiers.cli._options import InputError, OneLineCommand, input_errors
from servingtiers.cli.simulate import MOMENT, tier_documents

if TYPE_CHECKING:
    from servingtiers.adapters.bench_client import Endpoint, OpenLoopClient, Outcome, Planned
    from servingtiers.simulate.traces import Trace

__all__ = ["command"]

_LATE_SECONDS = 0.05
_BUSY = 0.8


@click.command("bench", cls=OneLineCommand)
@click.option("--url", required=True, help="Base URL of the endpoint, such as http://localhost:8000.")
@click.option(
    "--trace",
    required=True,
    metavar="FILE",
    help="Traffic: an Azure CSV, a Mooncake JSONL, azure-conv, azure-code or servegen (shipped), or a shape such as "
    "step:2:20:600.",
)
@click.option("--model", metavar="NAME", help="Served model name; may be left out where there is only one.")
@click.option(
    "--scale",
    type=float,
    default=1.0,
    show_default=True,
    help="Factor on the rate: below 1 thins at random, above 1 superposes copies jittered by ±30 s.",
)
@click.option("--from", "start", type=MOMENT, default=0.0, help="Where in the trace to begin (90, 15m, 2h).")
@click.option("--to", "end", type=MOMENT, default=math.inf, help="Where in the trace to end.")
@click.option(
    "--length-scale",
    type=click.FloatRange(min=0.0, min_open=True),
    default=1.0,
    show_default=True,
    help="Factor on all prompt and output lengths, for models with a short context.",
)
@click.option("--warm-up", type=MOMENT, default=0.0, help="Time at the start that is sent and not scored.")
@click.option(
    "--tier",
    metavar="FILE.yaml",
    help="A ServingTier, or the name of one in the cluster: attainment is held against its objectives.",
)
@click.option("-n", "--namespace", help="Namespace of a --tier that is given by name.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of thinning, jitter and prompts.")
@click.option("--chat", is_flag=True, help="Send chats instead of completions; prompts are then words.")
@click.option(
    "--words",
    is_flag=True,
    help="Send prompts as words instead of token ids, where an endpoint takes only text.",
)
@click.option(
    "--prefix-cache",
    is_flag=True,
    help="Let prompts begin with a common text as long as the trace says earlier requests shared (hash_ids).",
)
@click.option(
    "--prompt-tokens", type=float, default=1024.0, show_default=True, help="Mean prompt of a synthetic shape."
)
@click.option(
    "--output-tokens", type=float, default=256.0, show_default=True, help="Mean output of a synthetic shape."
)
@click.option(
    "--max-in-flight",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Requests under way at once; what would be sent beyond counts as failed.",
)
@click.option(
    "--max-requests", type=int, default=100_000, show_default=True, help="Refuse to send more in all."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=600.0, show_default=True, help="Of a request, s."
)
@click.option(
    "--vocabulary",
    type=click.IntRange(min=100),
    default=20_000,
    show_default=True,
    help="Token ids that prompts are drawn from; less only for toy models.",
)
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Bearer token.  [env: OPENAI_API_KEY]")
@click.option(
    "--record",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Also write a JSON line per request.",
)
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Form."
)
@click.option("--quiet", is_flag=True, help="No progress lines.")
def command(
    url: str, trace: str, tier: str | None, record: Path | None, output: str, *, quiet: bool, **flags: Any
) -> None:
    r"""Replay traffic against a live OpenAI-compatible endpoint, and say what its clients saw.

    Open loop: requests leave at the trace's times and do not wait for answers. Refused, broken, timed-out and unsent
    requests count: they miss every objective and are slower than any that was answered. How late requests left this
    client is reported, so that a slow client is not taken for a slow server. Ctrl-C keeps what is done.

    \b
    Example:
      servingtiers bench --url http://localhost:8000 --trace azure-conv --to 10m --scale 0.5 -o json
    """
    loaded, limits = _input(trace, tier, flags)
    if record is not None and not (record.parent.is_dir() and os.access(record.parent, os.W_OK)):
        raise InputError(
            f"{record.parent} is no directory that can be written: create it, or choose another --record"
        )
    endpoint, outcomes, client, skipped = _run(url, loaded, flags, quiet=quiet)
    if skipped:
        click.echo(
            f"left out: {skipped} requests longer than the model's {endpoint.max_model_len} tokens "
            "(--length-scale shortens them)",
            err=True,
        )
    figures = _figures(loaded, endpoint, outcomes, client, limits, flags)
    figures["leftOut"] = skipped
    if record is not None:
        _write(record, outcomes)
    if output == "json":
        click.echo(json.dumps({"runs": [figures]}, indent=1))
    else:
        click.echo(_table(figures))
    for warning in figures["client"]["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    if client.interrupted:
        click.echo("Interrupted: what was not answered by then counts as failed.", err=True)
        sys.exit(130)


def _input(trace: str, tier: str | None, flags: dict[str, Any]) -> tuple[Trace, dict[str, float]]:
    """Return the trace and the objectives it is held against, seconds."""
    from servingtiers.policy.presets import targets
    from servingtiers.simulate.scenario import slo_of
    from servingtiers.simulate.tiers import parse_tier
    from servingtiers.simulate.traces import load_trace

    with input_errors():
        loaded = load_trace(
            trace,
            scale=flags["scale"],
            start=flags["start"],
            end=flags["end"],
            seed=flags["seed"],
            prompt=flags["prompt_tokens"],
            output=flags["output_tokens"],
        )
        if flags["length_scale"] != 1:
            loaded = loaded.lengthened(flags["length_scale"])
    if not len(loaded):
        raise InputError(
            f"no request falls into this part of {loaded.name}: raise --scale, or widen --from and --to"
        )
    if len(loaded) > flags["max_requests"]:
        raise InputError(
            f"{loaded.name} has {len(loaded)} requests here: raise --max-requests, or lower --scale or --to"
        )
    if flags["warm_up"] >= loaded.seconds:
        raise InputError(
            f"--warm-up {flags['warm_up']:g} s leaves nothing of {loaded.seconds:g} s of traffic: shorten it"
        )
    limits: dict[str, float] = {}
    if tier is not None:
        found = [
            each
            for each in tier_documents(tier, flags["namespace"])
            if each[1].get("kind", "ServingTier") == "ServingTier"
        ]
        if len(found) > 1:
            raise InputError(
                f"--tier {tier} holds {len(found)} ServingTiers, and an endpoint is of one: give a file with that one"
            )
        where, document = found[0]
        with input_errors(where):
            limits = slo_of(targets(parse_tier(document).spec))
    return loaded, limits


def _run(
    url: str, trace: Trace, flags: dict[str, Any], *, quiet: bool
) -> tuple[Endpoint, list[Outcome], OpenLoopClient, int]:
    """Send it; return what is known of the endpoint, what came of each request, and how many were left out."""
    from servingtiers.adapters.bench_client import BenchError, OpenLoopClient

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    async def run() -> tuple[Endpoint, list[Outcome], OpenLoopClient, int]:
        client = OpenLoopClient(
            url,
            flags["model"],
            chat=flags["chat"],
            token_ids=not flags["words"],
            api_key=flags["api_key"],
            timeout=flags["timeout"],
            max_in_flight=flags["max_in_flight"],
            vocabulary=flags["vocabulary"],
            seed=flags["seed"],
            progress=say,
        )
        async with client:
            endpoint = await client.look()
            kept, skipped = (
                trace.capped(endpoint.max_model_len) if endpoint.max_model_len is not None else (trace, 0)
            )
            if not len(kept):
                raise InputError(
                    f"every request is longer than the model's {endpoint.max_model_len} tokens: use --length-scale"
                )
            say(
                f"{len(kept)} requests in {kept.seconds:.0f} s to {endpoint.model}"
                f"{f' ({endpoint.server})' if endpoint.server else ''} at {url}"
            )
            if not endpoint.fixed_lengths:
                say("the endpoint refuses ignore_eos: answers may be shorter than the trace has them")
            return (
                endpoint,
                await client.replay(_planned(kept, shared=flags["prefix_cache"])),
                client,
                skipped,
            )

    try:
        return asyncio.run(run())
    except BenchError as error:
        raise InputError(" ".join(str(error).split())) from error


def _planned(trace: Trace, *, shared: bool) -> list[Planned]:
    from servingtiers.adapters.bench_client import Planned

    common = trace.shared.tolist() if shared else [0] * len(trace)
    return [
        Planned(*each)
        for each in zip(
            trace.arrival.tolist(), trace.prompt.tolist(), trace.output.tolist(), common, strict=True
        )
    ]


def _figures(
    trace: Trace,
    endpoint: Endpoint,
    outcomes: Sequence[Outcome],
    client: OpenLoopClient,
    limits: dict[str, float],
    flags: dict[str, Any],
) -> dict[str, Any]:
    """Return the run as an object of ``servingtiers simulate -o json``, with latencies as ``predict`` has them."""
    import numpy as np

    from servingtiers.adapters.bench_client import Failure
    from servingtiers.simulate.measured import Measurement, summary

    warm_up = flags["warm_up"]
    scored = [each for each in outcomes if each.planned.at >= warm_up]
    failures = Counter(
        str(each.status) if each.failure is Failure.REFUSED else each.failure.value
        for each in scored
        if each.failure is not None
    )
    unfinished = failures[Failure.TIMED_OUT.value] + failures[Failure.NOT_SENT.value]
    seconds = trace.seconds - warm_up
    measured = Measurement(
        arrival=np.array([each.planned.at for each in scored]) - warm_up,
        sent=np.array([each.sent for each in scored]) - warm_up,
        first=np.array([each.first for each in scored]) - warm_up,
        last=np.array([each.last for each in scored]) - warm_up,
        output=np.array([each.output_tokens for each in scored], dtype=np.int64),
        answered=np.array(
            [each.failure is None and not math.isnan(each.first) for each in scored], dtype=np.bool_
        ),
        gaps=np.array([gap for each in scored for gap in each.gaps]),
    )
    found = summary(measured, limits, seconds=seconds)
    late = found.pop("lateMs")
    usage = client.usage
    warnings = []
    if late["p99"] is not None and late["p99"] > 1e3 * _LATE_SECONDS:
        warnings.append(
            f"1 % of requests left this client {late['p99']:.0f} ms late or more: run it on a faster or idler machine"
        )
    if usage.peak > _BUSY:
        warnings.append(
            f"this client took {100 * usage.peak:.0f} % of a processor for five seconds: its own time is in the latencies"
        )
    # The order of `servingtiers simulate -o json`; what only a fleet has (GPU-hours, moves) is not here.
    head = {"policy": "measured", "seed": flags["seed"], "trace": trace.name, "url": client.url}
    head |= {"model": endpoint.model, "server": endpoint.server}
    return {
        **head,
        **found,
        "tokensPerSecond": round(client.tokens_between(warm_up, trace.seconds) / seconds, 3),
        "rejected": len(scored) - int(measured.answered.sum()) - unfinished,
        "unfinished": unfinished,
        "failures": dict(sorted(failures.items())),
        "complete": not client.interrupted,
        "objectives": limits,
        "promptTokens": int(sum(each.prompt_tokens for each in scored)),
        "outputTokens": int(measured.output.sum()),
        "seconds": round(seconds, 3),
        "client": {
            "lateMs": late,
            "busyMean": round(usage.mean, 3),
            "busyPeak": round(usage.peak, 3),
            "warnings": warnings,
        },
    }


def _write(path: Path, outcomes: Sequence[Outcome]) -> None:
    def number(value: float) -> float | None:
        return None if math.isnan(value) else round(value, 6)

    with path.open("w", encoding="utf-8") as stream:
        for each in outcomes:
            row = {
                "arrival": number(each.planned.at),
                "sent": number(each.sent),
                "first": number(each.first),
                "last": number(each.last),
                "promptTokens": each.prompt_tokens or each.planned.prompt_tokens,
                "outputTokens": each.output_tokens,
                "failure": each.failure.value if each.failure is not None else None,
                "status": each.status,
                "detail": each.detail,
            }
            stream.write(json.dumps(row) + "\n")


def _cell(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


def _table(figures: dict[str, Any]) -> str:
    names = ("mean", "p50", "p90", "p95", "p99", "p999")
    rows: list[tuple[str, ...]] = [("ms", *names)]
    for label, key in (("TTFT", "ttftMs"), ("TPOT", "tpotMs"), ("ITL", "itlMs"), ("E2E", "e2eMs")):
        rows.append((label, *(_cell(figures[key][name]) for name in names)))
    rows.append(("left late", *(_cell(figures["client"]["lateMs"][name]) for name in names)))
    widths = [max(len(row[index]) for row in rows) for index in range(len(names) + 1)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    failures = ", ".join(f"{count} × {name}" for name, count in figures["failures"].items())
    failed = figures["requests"] - figures["answered"]
    answered = (
        f"{figures['requests']} requests, {figures['answered']} answered, {failed} failed"
        f"{f' ({failures})' if failures else ''}"
    )
    lines += [
        "",
        answered,
        f"{figures['requestsPerSecond']:.2f} requests/s, {figures['tokensPerSecond']:.1f} output tokens/s",
    ]
    if figures["objectives"]:
        kept = ", ".join(
            f"{name} ≤ {seconds:g} s: {100 * figures['attainment'][name]:.2f} %"
            for name, seconds in figures["objectives"].items()
            if name in figures["attainment"]
        )
        lines.append(f"{kept}, all: {100 * figures['attainment']['joint']:.2f} %")
    lines.append(f"client: {100 * figures['client']['busyMean']:.0f} % of a processor")
    return "\n".join(lines)
