"""A profile: step times the user measured on the very engine, as a CSV file.

Columns, in any order, with a header line (further columns are ignored), separated by commas, semicolons or tabs::

    kind,batch,context_tokens,new_tokens,ms
    decode,1,512,,8.1          a pure decode step: 1 sequence whose context is 512 tokens
    decode,32,512,,11.9
    prefill,,0,1024,61.3       a step that computes 1,024 tokens of a prompt of which 0 are cached
    mixed,32,1024,512,44.0     512 new tokens of a 1,024-token prompt beside 32 sequences of 1,024 tokens

Decode rows are needed at two batches or more with two contexts or more, prefill rows at two prompt lengths or
more; mixed rows are optional. An optional column ``kv_capacity_tokens`` (the same in every row) gives the size
of the engine's KV cache. Lines that begin with ``#`` are comments; ``# engine: vLLM 0.24 …`` is shown as the
source.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from servingtiers.performance.tables import StepRow

__all__ = ["Profile", "ProfileError", "load_profile", "parse_profile"]

_KINDS = ("decode", "prefill", "mixed")


class ProfileError(ValueError):
    """A profile cannot be used; the message names the line and the mend."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The user's measurements."""

    name: str
    rows: tuple[StepRow, ...]
    kv_capacity_tokens: int | None = None
    engine: str = ""

    def describe(self) -> str:
        """Return a text for the source of a figure."""
        engine = f", {self.engine}" if self.engine else ""
        return f"profile {self.name}{engine}, {len(self.rows)} steps"


def load_profile(path: str | Path) -> Profile:
    """Read a profile from a CSV file.

    Raises:
        ProfileError: The file cannot be read or is malformed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"profile {path} cannot be read ({error}): give a UTF-8 CSV file") from error
    return parse_profile(Path(path).name, text.splitlines())


def parse_profile(name: str, lines: Iterable[str]) -> Profile:
    """Return the profile in these lines of CSV.

    Raises:
        ProfileError: A column is missing, a cell is malformed, or there are too few rows.
    """
    engine = ""
    data: list[str] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("#"):
            label, _, value = line.lstrip("# ").partition(":")
            if label.strip().lower() == "engine":
                engine = value.strip()
        elif line.strip():
            data.append(line)
            numbers.append(number)
    delimiter = max(",;\t", key=(data[0] if data else "").count)  # as spreadsheets of some countries write it
    columns = [column.strip().strip('"').lower() for column in (data[0] if data else "").split(delimiter)]
    reader = csv.DictReader(data[1:], fieldnames=columns, delimiter=delimiter)
    for column in ("kind", "ms"):
        if column not in columns:
            raise ProfileError(
                f"profile {name} lacks the column {column!r}: "
                "begin with the header kind,batch,context_tokens,new_tokens,ms"
            )
    rows: list[StepRow] = []
    capacity: int | None = None
    try:
        lined = list(zip(numbers[1:], reader, strict=False))
    except csv.Error as error:
        raise ProfileError(f"profile {name} is no CSV ({error}): correct it") from error
    for number, cells in lined:
        rows.append(_row(name, number, cells))
        if cells.get("kv_capacity_tokens"):
            capacity = _whole(name, number, cells, "kv_capacity_tokens", least=1)
    batches = {row.batch for row in rows if row.kind == "decode"}
    contexts = {row.context for row in rows if row.kind == "decode"}
    if len(batches) < 2 or len(contexts) < 2:
        raise ProfileError(
            f"profile {name} needs decode rows at two batches and two contexts or more: add them"
        )
    if len({row.new_tokens for row in rows if row.kind == "prefill" and row.context == 0}) < 2:
        raise ProfileError(
            f"profile {name} needs uncached prefill rows at two prompt lengths or more: add them"
        )
    return Profile(name, tuple(rows), capacity, engine)


def _row(name: str, number: int, cells: dict[str, str]) -> StepRow:
    kind = (cells.get("kind") or "").strip()
    if kind not in _KINDS:
        raise ProfileError(f"profile {name} line {number}: kind {kind!r} is none of {', '.join(_KINDS)}")
    try:
        ms = float(cells.get("ms") or "")
    except ValueError:
        ms = float("nan")
    if not isfinite(ms) or ms <= 0.0:
        raise ProfileError(
            f"profile {name} line {number}: ms {cells.get('ms')!r} must be a positive number, such as 8.1"
        )
    batch = _whole(name, number, cells, "batch", least=1) if kind != "prefill" else 0
    context = _whole(name, number, cells, "context_tokens", least=0, default=0 if kind == "prefill" else None)
    new = _whole(name, number, cells, "new_tokens", least=1) if kind != "decode" else 0
    return StepRow(kind, batch, context, new, ms)


def _whole(
    name: str, number: int, cells: dict[str, str], column: str, *, least: int, default: int | None = None
) -> int:
    text = (cells.get(column) or "").strip()
    if not text and default is not None:
        return default
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ProfileError(
            f"profile {name} line {number}: {column} {text!r} must be a whole number of at least {least}"
        )
    return value
