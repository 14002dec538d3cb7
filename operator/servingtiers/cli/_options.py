"""What the planning commands share: usage errors and wrong input are one line that names the mend."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["InputError", "OneLineCommand", "input_errors"]


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


@contextmanager
def input_errors(where: str = "") -> Iterator[None]:
    """Turn the library's complaints about input into one-line errors.

    Args:
        where: What the input was read from, put before the message.
    """
    try:
        yield
    except (ValueError, LookupError) as error:
        text = " ".join(str(error.args[0] if error.args else error).split())
        raise InputError(f"{where}: {text}" if where else text) from error
