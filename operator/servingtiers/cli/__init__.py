"""The command line ``servingtiers``.

Each command lives in a module of its own and is imported when it is called: the operator process must not pay for
the planner's and the simulator's libraries.
"""

from __future__ import annotations

import importlib

import click

from servingtiers import __version__

__all__ = ["main"]

_MODULES = {"operator": "operate"}
"""Modules that are not called like their command: `operator` is also a module of the standard library."""
_COMMANDS = {
    "operator": "Run the operator.",
    "crds": "Print or write the CustomResourceDefinitions.",
    "render": "Show the Kubernetes objects of a tier, without a cluster.",
    "explain": "Tell what was decided for a tier, and why.",
    "plan": "Find the cheapest fleet that keeps the objectives.",
    "predict": "Predict the latencies of one configuration.",
    "profile": "Measure the step times of a running engine.",
    "bench": "Replay traffic against a live endpoint and measure it.",
    "simulate": "Replay traffic against a tier before it is applied.",
    "demo": "Run three tiers on a local control plane with simulated engines.",
}


class _Lazy(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the help text."""
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None for an unknown name."""
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(
            f"servingtiers.cli.{_MODULES.get(cmd_name, cmd_name)}"
        ).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="servingtiers")
def main() -> None:
    """Serve LLMs with vLLM in latency, balanced and throughput tiers at the lowest GPU cost."""
