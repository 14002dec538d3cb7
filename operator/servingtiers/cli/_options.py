"""What the planning commands share: usage errors and wrong input are one line that names the mend."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["InputError", "OneLineCommand", "input_errors", "warn_of_quantized_name"]

_EXTRAS = {"numba": "simulator", "numpy": "simulator", "plotly": "reports", "rich": "reports"}
"""Libraries that only some commands need, and the extra that has them."""


class InputError(click.ClickException):
    """Input that cannot be used; printed on one line that names the mend."""

    exit_code = 2


class OneLineCommand(click.Command):
    """A command whose usage errors are one line, too, without the usage text above them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, and turn usage errors into input errors."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise InputError(f"{error.format_message()} (see servingtiers {ctx.info_name} --help)") from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; a library of an extra that is not installed is an input error, too."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            raise InputError(f"{error.name} is not installed: pip install 'servingtiers[{extra}]'") from error


@contextmanager
def input_errors(where: str = "") -> Iterator[None]:
    """Turn the library's complaints about input into one-line errors.

    Args:
        where: What the input was read from, put before the message.
    """
    try:
        yield
    except (ValueError, LookupError) as error:
        text = " ".join(_words(error).split())
        raise InputError(f"{where}: {text}" if where else text) from error


def _words(error: ValueError | LookupError) -> str:
    """Return what an error says; of a document with several wrong fields the first, and how many there are."""
    if not callable(details := getattr(error, "errors", None)):  # only pydantic's has them
        return str(error.args[0] if error.args else error)
    first, *more = details()
    field = ".".join(str(part) for part in first["loc"])
    told = f"{field}: {first['msg']}" if field else str(first["msg"])
    return told + (f" (and {len(more)} more)" if more else "")


_QUANTIZED = {
    "fp8": re.compile(r"fp8", re.IGNORECASE),
    "int8": re.compile(r"w8a8|int8", re.IGNORECASE),
    "int4": re.compile(r"awq|gptq|w4a16|int4", re.IGNORECASE),
}


def warn_of_quantized_name(name: str, weights: str) -> None:
    """Say on standard error when a model's name tells of other weights than are reckoned with.

    Args:
        name: As the user gave it.
        weights: What is reckoned with.
    """
    told = next((dtype for dtype, pattern in _QUANTIZED.items() if pattern.search(Path(name).name)), None)
    if told is not None and told != weights:
        click.echo(
            f"note: {name} is reckoned with {weights} weights; --weights {told} is what its name says",
            err=True,
        )
