"""``servingtiers demo``: three tiers on a local control plane, under replayed traffic."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Self

import click

from servingtiers.cli._options import InputError, OneLineCommand

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from servingtiers.lab.demo import Decision, Outcome, PoolSample, Sample, TierSample
    from servingtiers.lab.demo_ring import Ring

__all__ = ["command"]

_PLAIN_SECONDS = 10.0
"""How often the state is printed where there is no terminal to draw on."""
_SHOWN_DECISIONS = 6
_PLAIN_WIDTH = 140
_INTERRUPTED = 130
_OUTPUT = Path("build/demo")


@click.command("demo", cls=OneLineCommand)
@click.option("--keep", is_flag=True, help="Leave control plane, nodes and operator up at the end.")
@click.option("--stop", is_flag=True, help="Stop what an earlier --keep has left up, and do nothing else.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=5),
    default=150.0,
    show_default=True,
    help="Length of the replay; below 100 no scale-down is waited for.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=_OUTPUT,
    show_default=True,
    help="Folder for summary.json, report.html and operator.log.",
)
def command(*, keep: bool, stop: bool, seconds: float, output: Path) -> None:
    """Run three tiers on a local control plane with simulated engines.

    API server, scheduler, controllers, operator and routers are real; nodes and engines are simulated, and need no
    GPU. The recorded traffic of an hour is replayed in minutes. Ctrl-C stops everything.
    """
    note = output / "kept.json"
    if stop:
        _stop_kept(note)
        return
    if _kept(note) is not None:
        raise InputError(f"an earlier demo is still up ({note}): stop it with servingtiers demo --stop")
    try:
        import plotly  # noqa: F401 - to say it now, not after three minutes
        from rich.console import Console
    except ImportError as error:
        raise InputError(
            f"{error.name} is missing: pip install 'servingtiers[reports]', or run make demo"
        ) from error
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    console = Console(width=None if terminal else _PLAIN_WIDTH, highlight=False, soft_wrap=not terminal)
    # Ended by a signal is ended by Ctrl-C: everything is stopped in order.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _interrupt)
    try:
        problems = _run(console, terminal=terminal, keep=keep, seconds=seconds, output=output)
    except KeyboardInterrupt:
        console.print("Interrupted: everything is stopped.")
        sys.exit(_INTERRUPTED)
    if problems:
        raise click.ClickException("; ".join(problems))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _run(console: Console, *, terminal: bool, keep: bool, seconds: float, output: Path) -> list[str]:
    """Play the demo and return what it did not show."""
    from servingtiers.lab.binaries import BinariesError, locate
    from servingtiers.lab.demo import DemoError, DemoSettings, play, write_summary
    from servingtiers.lab.demo_report import write_report
    from servingtiers.lab.demo_ring import Ring, RingError
    from servingtiers.lab.routers import locate_router

    view = _Live(console) if terminal else _Plain(console)
    settings = DemoSettings(seconds=seconds)
    console.print(
        "ServingTiers demo. Real: API server, scheduler, controllers, operator, vllm-router, recorded traffic."
        " Simulated: nodes and engines (no GPU is used). Shortened: the trace's hour, engine start-up, holds."
    )
    try:
        locate(progress=view.say)
        if locate_router(progress=view.say) is None:
            view.say("vllm-router cannot be had here: a simulated one stands in")
        with Ring(settings.ring, progress=view.say) as ring:
            try:
                with view:
                    outcome = play(
                        settings, ring, progress=view.say, on_sample=view.sample, on_decision=view.decision
                    )
            finally:
                # Above all when it failed: the log goes with the stage.
                _save_log(ring, output / "operator.log")
            write_summary(outcome, output / "summary.json")
            write_report(outcome, output / "report.html")
            _print_outcome(console, outcome, output)
            if keep:
                _keep(console, ring, output / "kept.json")
            else:
                view.say("stopping everything")
                ring.stop()
    except (DemoError, RingError, BinariesError) as error:
        return [str(error)]
    view.say("done")
    return outcome.problems()


def _save_log(ring: Ring, to: Path) -> None:
    with contextlib.suppress(OSError):
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ring.details.operator_log, to)


# -- keeping ---------------------------------------------------------------------------------------------------


def _keep(console: Console, ring: Ring, note: Path) -> None:
    details = ring.details
    note.write_text(json.dumps({"pid": ring.pid, "kubeconfig": details.kubeconfig}) + "\n", encoding="utf-8")
    ring.keep()
    kubectl = details.kubectl or "kubectl"
    console.print("\nKept: control plane, nodes, operator. Look around:")
    console.print(f"  {kubectl} --kubeconfig {details.kubeconfig} get servingtiers,deployments,pods")
    console.print(f"  KUBECONFIG={details.kubeconfig} .venv/bin/servingtiers explain chat")
    console.print(f"  tail -f {details.operator_log}; curl http://127.0.0.1:{details.metrics_port}/metrics")
    where = "" if note.parent == _OUTPUT else f" --output {note.parent}"
    console.print(f"Stop all of it: .venv/bin/servingtiers demo --stop{where}   (or: kill {ring.pid})")


def _kept(note: Path) -> int | None:
    """Return the process id of a stage that was kept and still is; None: there is none."""
    try:
        pid = int(json.loads(note.read_text(encoding="utf-8"))["pid"])
        os.kill(pid, 0)
    except (OSError, ValueError, KeyError):
        return None
    command_line = Path(f"/proc/{pid}/cmdline")
    if command_line.exists() and b"demo_ring" not in command_line.read_bytes():
        return None  # the id is another process's by now
    return pid


def _stop_kept(note: Path) -> None:
    pid = _kept(note)
    if pid is None:
        note.unlink(missing_ok=True)
        click.echo("nothing is kept")
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while _kept(note) is not None:
        if time.monotonic() > deadline:
            raise click.ClickException(
                f"process {pid} does not end: kill -9 {pid}; its watchdogs stop the rest"
            )
        time.sleep(0.1)
    note.unlink(missing_ok=True)
    click.echo("stopped")


# -- views -----------------------------------------------------------------------------------------------------


def _p99(value: float | None, target: float | None) -> str:
    """Return a percentile against its objective."""
    seen = "–" if value is None else f"{value * 1000:.0f}"
    return seen if target is None else f"{seen}/{target * 1000:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


class _Plain:
    """Lines for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._told = -_PLAIN_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def say(self, text: str) -> None:
        """Print one line with its time."""
        self._console.print(f"[{time.monotonic() - self._began:6.1f} s] {text}", markup=False)

    def decision(self, tier: str, decision: Decision) -> None:
        """Print a decision."""
        self.say(_decision_line(tier, decision))

    def sample(self, sample: Sample) -> None:
        """Print the state, now and then."""
        if sample.at <= 0 or sample.at - self._told < _PLAIN_SECONDS:
            return
        self._told = sample.at
        for tier in sample.tiers:
            pools = "; ".join(
                f"{pool.name} {pool.ready}/{pool.desired} ready, {_number(pool.running)} running,"
                f" {_number(pool.waiting)} queued"
                for pool in tier.pools
            )
            cost = "" if tier.cost_per_hour is None else f"; {tier.cost_per_hour:.2f} {tier.currency}/h"
            self.say(
                f"{tier.name:<9} {tier.sent_per_second:4.1f} requests/s; {pools}; p99 ms"
                f" TTFT {_p99(tier.ttft_p99, tier.objectives.get('ttft.p99'))}"
                f" TPOT {_p99(tier.tpot_p99, tier.objectives.get('tpot.p99'))}{cost}"
            )


def _decision_line(tier: str, decision: Decision) -> str:
    arrow = "▲" if decision.up else "▼"
    moved = f"{decision.before} → {decision.after}"
    return f"{arrow} {tier} {decision.pool} {moved} ({decision.binding}): {decision.reason}"


class _Live:
    """A table that is drawn anew every second, with the latest decisions below."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._began = time.monotonic()
        self._live = Live(console=console, refresh_per_second=2, transient=True)
        self._decisions: deque[str] = deque(maxlen=_SHOWN_DECISIONS)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print one line above the table."""
        self._console.print(f"[{time.monotonic() - self._began:6.1f} s] {text}", markup=False)

    def decision(self, tier: str, decision: Decision) -> None:
        """Show a decision below the table."""
        self._decisions.append(f"{decision.at:4.0f} s {_decision_line(tier, decision)}")

    def sample(self, sample: Sample) -> None:
        """Draw the state."""
        from rich.console import Group
        from rich.text import Text

        table = _table(f"second {sample.at:.0f} of the replay" if sample.at else "starting")
        for tier in sample.tiers:
            for number, pool in enumerate(tier.pools):
                table.add_row(*_live_row(tier, pool, first=number == 0))
            table.add_section()
        lines = [Text(line, overflow="ellipsis", no_wrap=True) for line in self._decisions]
        self._live.update(Group(table, *lines))


def _table(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", expand=True)
    for name, justify in (
        ("tier", "left"),
        ("pool", "left"),
        ("ready", "right"),
        ("sent/s", "right"),
        ("running", "right"),
        ("queue", "right"),
        ("TTFT p99/SLO ms", "right"),
        ("TPOT p99/SLO ms", "right"),
        ("cost/h", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type] # a literal each
    table.add_column("latest reason", ratio=1, overflow="ellipsis", no_wrap=True)
    return table


def _live_row(tier: TierSample, pool: PoolSample, *, first: bool) -> list[str]:
    def coloured(value: float | None, target: float | None) -> str:
        text = _p99(value, target)
        if value is None or target is None:
            return text
        return f"[red]{text}[/]" if value > target else f"[green]{text}[/]"

    ready = f"{pool.ready}/{pool.desired}"
    return [
        f"[bold]{tier.name}[/]" if first else "",
        f"{pool.name} [dim]{pool.accelerator}[/]",
        ready if pool.ready == pool.desired else f"[yellow]{ready}[/]",
        f"{tier.sent_per_second:.1f}" if first else "",
        _number(pool.running),
        _number(pool.waiting),
        coloured(tier.ttft_p99, tier.objectives.get("ttft.p99")) if first else "",
        coloured(tier.tpot_p99, tier.objectives.get("tpot.p99")) if first else "",
        f"{tier.cost_per_hour:.2f}" if first and tier.cost_per_hour is not None else "",
        _escaped(tier.reason) if first else "",
    ]


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_outcome(console: Console, outcome: Outcome, output: Path) -> None:
    from rich.table import Table

    from servingtiers.lab.demo import attainment
    from servingtiers.lab.demo_report import PROVED, percent, truth

    table = Table(title="Outcome", title_justify="left")
    table.add_column("tier")
    table.add_column("ready")
    for name in ("up", "down", "requests", "failed"):
        table.add_column(name, justify="right")
    table.add_column("objective")
    for name in ("clients", "operator ≥", "GPU hours", "cost"):
        table.add_column(name, justify="right")
    for tier in outcome.tiers.values():
        records = [each.record for each in tier.finished]
        failed = sum(1 for record in records if not record.ok)
        head = [
            tier.name,
            "yes" if tier.ready else "no",
            str(tier.ups),
            str(tier.downs),
            str(len(records)),
            str(failed),
        ]
        tail = [f"{tier.gpu_seconds / 3600:.3f}", f"{tier.cost:.2f} {tier.currency}"]
        for number, (objective, target) in enumerate(tier.objectives.items()):
            shares = [
                f"{objective} ≤ {target * 1000:g} ms",
                percent(attainment(records, objective, target)),
                percent(tier.operator_attainment.get(objective)),
            ]
            table.add_row(*(head if number == 0 else [""] * 6), *shares, *(tail if number == 0 else ["", ""]))
        table.add_section()
    console.print()
    console.print(table)
    console.print(PROVED)
    console.print(truth(outcome))
    console.print(f"{output / 'summary.json'}, {output / 'report.html'}, {output / 'operator.log'}")
