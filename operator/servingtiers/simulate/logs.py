"""Request logs in CSV, read fast and in part: a log of a week has tens of millions of lines.

A file is read in blocks of whole lines. A block is taken apart with array operations; one that is out of the ordinary (a
quoted field, an offset from UTC, a broken line) is read line by line, which also finds the line that is wrong. Where only
a part is asked for, blocks before it are skipped by the times of their first and last line, and reading stops behind it.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Log", "first_line", "read_log"]

_BLOCK = 1 << 22
"""Bytes read at a time."""
_DISORDER = 60.0
"""Seconds by which lines may be out of order where only a part of a log is read; a log with more is read whole."""
_COLUMNS = (
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("Timestamp", "Request tokens", "Response tokens"),
)
"""Names of arrival, prompt and output: the Azure Public Dataset's, BurstGPT's."""
_STAMP = 19
"""Characters of ``2024-05-10 00:00:00``."""
_WIDEST = 40
_DIGITS = 9

_Bytes = "NDArray[np.uint8]"


@dataclass(frozen=True, slots=True)
class Log:
    """Requests of a log, or of a part of it, in the order of the file."""

    times: NDArray[np.float64]
    """Seconds; only differences mean anything."""
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    first: float
    """Earliest time in the file."""
    last: float
    """Latest time that was read."""
    lines: int
    """Requests in the file, as far as it was read."""
    whole: bool
    """Whether it was read to its end."""


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """Open a file, plain or gzip by its first bytes.

    Raises:
        ValueError: It cannot be read or is no whole gzip file.
    """
    try:
        with path.open("rb") as plain:
            if plain.read(2) != b"\x1f\x8b":
                plain.seek(0)
                yield plain
                return
        with gzip.open(path) as packed:
            yield packed
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def first_line(path: Path) -> str:
    """Return the first line that is not blank, without a byte-order mark.

    Raises:
        ValueError: The file cannot be read.
    """
    with _opened(path) as stream:
        for line in stream:
            text = line.decode("utf-8-sig", errors="replace").strip()
            if text:
                return text
    return ""


def _blocks(stream: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    """Yield the rest of a file in blocks of whole lines."""
    rest = b""
    while more := stream.read(_BLOCK):
        more = rest + more
        cut = more.rfind(b"\n") + 1
        rest = more[cut:]
        if cut:
            yield more[:cut]
    if rest.strip():
        yield rest + b"\n"


def read_log(path: Path, *, start: float = 0.0, end: float = math.inf) -> Log:
    """Return the requests of a log between two times, counted from its earliest.

    Args:
        path: A CSV file, plain or gzip, whose header has the names of :data:`_COLUMNS`; further columns are ignored.
        start: Seconds.
        end: Seconds.

    Raises:
        ValueError: The file is not of this form; the message names file and line.
    """
    found = _read(path, start, end)
    if found is None:
        found = _read(path, 0.0, math.inf)
    if found is None or not found.lines:
        raise ValueError(f"{path.name} holds no request")
    return found


def _read(path: Path, start: float, end: float) -> Log | None:
    """Read a part; None where the file is not in order and has to be read whole."""
    partly = start > 0 or end < math.inf
    times: list[NDArray[np.float64]] = []
    prompt: list[NDArray[np.int64]] = []
    output: list[NDArray[np.int64]] = []
    first, last, lines, number, whole = math.inf, -math.inf, 0, 2, True
    with _opened(path) as stream:
        table = _Table.of(path, stream.readline())
        for block in _blocks(stream):
            if partly:
                head, tail = table.edges(block, number)
                if head < last - _DISORDER:
                    return None
                first = min(first, head)
                if head - first > end + _DISORDER:
                    whole = False
                    break
                # The earliest line may be one of the first minute.
                if head - first > _DISORDER and tail - first < start - _DISORDER:
                    last = max(last, tail)
                    lines += block.count(b"\n")
                    number += block.count(b"\n")
                    continue
            found = table.rows(block, number)
            number += block.count(b"\n")
            if not len(found[0]):
                continue
            lines += len(found[0])
            first, last = min(first, float(found[0].min())), max(last, float(found[0].max()))
            if partly:
                inside = (found[0] - first >= start - _DISORDER) & (found[0] - first < end + _DISORDER)
                found = found[0][inside], found[1][inside], found[2][inside]
            times.append(found[0])
            prompt.append(found[1])
            output.append(found[2])
    none = np.zeros(0)
    return Log(
        np.concatenate([*times, none]),
        np.concatenate([*prompt, none.astype(np.int64)]),
        np.concatenate([*output, none.astype(np.int64)]),
        first,
        last,
        lines,
        whole,
    )


_Rows = tuple["NDArray[np.float64]", "NDArray[np.int64]", "NDArray[np.int64]"]


@dataclass(frozen=True, slots=True)
class _Table:
    """Where the three columns are."""

    name: str
    width: int
    """Columns of a line."""
    places: tuple[int, int, int]
    names: tuple[str, str, str]

    @classmethod
    def of(cls, path: Path, header: bytes) -> _Table:
        titles = [each.strip().strip('"') for each in header.decode("utf-8-sig", errors="replace").split(",")]
        for names in _COLUMNS:
            if all(name in titles for name in names):
                a, b, c = (titles.index(name) for name in names)
                return cls(path.name, len(titles), (a, b, c), names)
        wanted = " or ".join(", ".join(names) for names in _COLUMNS)
        raise ValueError(
            f"{path.name}, line 1: a log of requests begins with its columns' names: {wanted}; "
            f"this one with {', '.join(titles)[:80]!r}"
        )

    def edges(self, block: bytes, number: int) -> tuple[float, float]:
        """Return the times of the first and the last line of a block."""
        lines = block.strip().splitlines() or [b""]
        pair = [lines[0], lines[-1]]
        found = self._slowly(b"\n".join(pair), number)[0]
        return float(found[0]), float(found[-1])

    def rows(self, block: bytes, number: int) -> _Rows:
        """Return times, prompts and outputs of a block of lines, of which the first has this number."""
        found = self._fast(block)
        return self._slowly(block, number) if found is None else found

    # --- line by line --------------------------------------------------------------------------------------------

    def _slowly(self, block: bytes, number: int) -> _Rows:
        times: list[float] = []
        prompt: list[int] = []
        output: list[int] = []
        text = block.decode("utf-8", errors="replace").splitlines()
        for line, row in enumerate(csv.reader(text), start=number):
            if not any(cell.strip() for cell in row):
                continue
            try:
                at, before, after = (row[place].strip() for place in self.places)
                times.append(_moment(at))
                prompt.append(_whole(before))
                output.append(_whole(after))
            except (IndexError, ValueError) as error:
                raise ValueError(
                    f"{self.name}, line {line}: {', '.join(self.names)} are a time and two whole numbers ({error})"
                ) from error
        return np.array(times), np.array(prompt, dtype=np.int64), np.array(output, dtype=np.int64)

    # --- with array operations -----------------------------------------------------------------------------------

    def _fast(self, block: bytes) -> _Rows | None:
        if b'"' in block:
            return None
        data = np.frombuffer(block.replace(b"\r\n", b"\n"), dtype=np.uint8)
        ends = np.flatnonzero(data == 10)
        commas = np.flatnonzero(data == 44)
        if len(commas) != len(ends) * (self.width - 1):
            return None
        edges = np.empty((len(ends), self.width + 1), dtype=np.int64)
        edges[:, 1:-1] = commas.reshape(len(ends), -1)
        edges[:, -1] = ends
        edges[1:, 0] = ends[:-1]
        edges[0, 0] = -1
        if (np.diff(edges, axis=1) < 2).any():
            return None  # an empty field, or lines with more commas and fewer
        columns = [_cells(data, edges[:, place] + 1, edges[:, place + 1]) for place in self.places]
        if any(column is None for column in columns):
            return None
        stamps, prompt, output = columns
        times = _moments(stamps)
        before, after = _wholes(prompt), _wholes(output)
        if times is None or before is None or after is None:
            return None
        return times, before, after


def _cells(
    data: NDArray[np.uint8], begin: NDArray[np.int64], end: NDArray[np.int64]
) -> NDArray[np.uint8] | None:
    """Return one row of characters per cell, padded with zeros on the right."""
    width = int((end - begin).max())
    if width > _WIDEST:
        return None
    at = begin[:, None] + np.arange(width)
    found: NDArray[np.uint8] = np.where(at < end[:, None], data[np.minimum(at, len(data) - 1)], 0).astype(
        np.uint8
    )
    return found


def _wholes(cells: NDArray[np.uint8] | None) -> NDArray[np.int64] | None:
    if cells is None or cells.shape[1] > _DIGITS:
        return None
    made = np.zeros(len(cells), dtype=np.int64)
    open_ = np.ones(len(cells), dtype=bool)
    for column in cells.T:
        digit = (column >= 48) & (column <= 57)
        if (open_ & ~digit & (column != 0)).any():
            return None
        open_ &= digit
        made = np.where(open_, made * 10 + (column.astype(np.int64) - 48), made)
    return made


def _number(columns: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    made = np.zeros_like(columns[0])
    for column in columns:
        made = made * 10 + column
    return made


def _moments(cells: NDArray[np.uint8] | None) -> NDArray[np.float64] | None:
    """Return seconds of ``2024-05-10 00:00:00.123456`` with or without a fraction, Z or +00:00, or of plain numbers."""
    if cells is None:
        return None
    if cells.shape[1] < _STAMP or cells[0, 4] != 45:
        return _plain(cells)
    digits = cells[:, :_STAMP].astype(np.int64) - 48
    marks = {4: (45,), 7: (45,), 10: (32, 84), 13: (58,), 16: (58,)}
    for place in range(_STAMP):
        column = cells[:, place]
        if place in marks:
            if not np.isin(column, marks[place]).all():
                return None
        elif ((column < 48) | (column > 57)).any():
            return None

    def part(begin: int, end: int) -> NDArray[np.int64]:
        return _number([digits[:, place] for place in range(begin, end)])

    month, day = part(5, 7), part(8, 10)
    hour, minute, second = part(11, 13), part(14, 16), part(17, 19)
    if not ((month >= 1) & (month <= 12) & (day >= 1) & (hour < 24) & (minute < 60) & (second < 60)).all():
        return None
    months = (part(0, 4) - 1970) * 12 + month - 1
    begins = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    ends = (months + 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    if (begins + day > ends).any():
        return None
    whole = (begins + day - 1) * 86_400 + hour * 3600 + minute * 60 + second
    # The fraction, as many digits as there are, and what follows it.
    rest = np.zeros((len(cells), cells.shape[1] - _STAMP + 2 * _DIGITS), dtype=np.uint8)
    rest[:, : cells.shape[1] - _STAMP] = cells[:, _STAMP:]
    dotted = rest[:, 0] == 46
    fraction = np.zeros(len(cells), dtype=np.int64)
    scale = np.ones(len(cells), dtype=np.int64)
    after = np.where(dotted, 1, 0)
    open_ = dotted.copy()
    for place in range(1, 1 + _DIGITS):
        column = rest[:, place]
        open_ &= (column >= 48) & (column <= 57)
        fraction = np.where(open_, fraction * 10 + (column.astype(np.int64) - 48), fraction)
        scale = np.where(open_, scale * 10, scale)
        after = np.where(open_, place + 1, after)
    tails = rest[np.arange(len(rest))[:, None], np.minimum(after[:, None] + np.arange(7), rest.shape[1] - 1)]
    for tail in np.unique(tails.view("S7")):
        if bytes(tail) not in {b"", b"Z", b"+00:00"}:
            return None
    return np.asarray(whole.astype(np.float64) + fraction / scale)


def _plain(cells: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    if not (((cells >= 48) & (cells <= 57)) | (cells == 46) | (cells == 0)).all():
        return None
    try:
        return np.ascontiguousarray(cells).view(f"S{cells.shape[1]}")[:, 0].astype(np.float64)
    except ValueError:
        return None


def _moment(text: str) -> float:
    """Return the seconds of one time.

    Raises:
        ValueError: It is neither ISO 8601 nor a finite number.
    """
    if "-" not in text[1:]:
        seconds = float(text)
        if not math.isfinite(seconds):
            raise ValueError(f"{text!r} is no time")
        return seconds
    # Seven digits of a second, as Azure's logs have them, are more than datetime reads.
    whole, _, rest = text.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    moment = datetime.fromisoformat(whole + rest[len(digits) :])
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() + float(f"0.{digits or 0}")


def _whole(text: str) -> int:
    """Return a number of tokens; data frames write 374.0 where a column has gaps.

    Raises:
        ValueError: It is no whole number of 0 or more.
    """
    value = float(text)
    if not (value >= 0 and value == math.floor(value) and value < 10**_DIGITS):
        raise ValueError(f"{text!r} is no number of tokens")
    return int(value)
