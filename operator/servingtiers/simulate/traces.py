"""Arrivals and lengths to replay: real logs, streams re-drawn from published statistics, and synthetic shapes.

A trace is three parallel arrays sorted by arrival. Times are seconds from the first moment of the trace (not of
its first request), so that a quiet beginning stays quiet.

Scaling keeps the burst structure: below 1 requests are thinned at random, above 1 whole copies are superposed,
each request shifted by an own uniform jitter of ±30 s, and the rest is a thinned copy.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from servingtiers.simulate.logs import first_line, read_log

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "JITTER_SECONDS",
    "Trace",
    "bundled",
    "bundled_names",
    "load_trace",
    "read_azure",
    "read_mooncake",
    "redraw_servegen",
    "synthetic",
]

JITTER_SECONDS = 30.0
_MOST_REQUESTS = 50_000_000
"""About 10 GB of state."""
_MOONCAKE_BLOCK = 512
"""Tokens behind one entry of ``hash_ids`` (Mooncake's trace format)."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests of a stretch of time."""

    name: str
    origin: str
    """Where it comes from, for people: a real log, re-drawn from statistics, or synthetic."""
    seconds: float
    """Length of the stretch; requests arrive within ``[0, seconds)``."""
    arrival: NDArray[np.float64]
    """Seconds from the start, ascending."""
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    shared: NDArray[np.int64]
    """Prompt tokens that a prefix cache that knows every earlier request would hold."""

    def __post_init__(self) -> None:
        lengths = {len(self.arrival), len(self.prompt), len(self.output), len(self.shared)}
        if len(lengths) != 1:
            raise ValueError("a trace has one arrival, prompt, output and shared length per request")
        if len(self.arrival) and (np.diff(self.arrival) < 0).any():
            raise ValueError("arrivals ascend: sort the trace by time")
        if len(self.prompt) and (self.prompt.min() < 1 or self.output.min() < 1):
            raise ValueError("prompts and outputs have 1 token or more")

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def rate(self) -> float:
        """Requests per second, on average."""
        return len(self) / self.seconds if self.seconds > 0 else 0.0

    @property
    def cv(self) -> float:
        """Coefficient of variation of the gaps between arrivals; 1 for a Poisson process."""
        if len(self) < 3:
            return 0.0
        gaps = np.diff(self.arrival)
        mean = float(gaps.mean())
        return float(gaps.std()) / mean if mean > 0 else 0.0

    def between(self, start: float, end: float) -> Trace:
        """Return the requests that arrive within ``[start, end)``, with ``start`` as the new zero.

        Raises:
            ValueError: The interval is empty or outside the trace.
        """
        end = min(end, self.seconds)
        if not 0 <= start < end:
            raise ValueError(
                f"{start:g} s to {end:g} s is no part of {self.name}, which lasts {self.seconds:g} s: "
                "give --from below --to, inside it"
            )
        keep = slice(*np.searchsorted(self.arrival, (start, end)))
        return replace(
            self,
            seconds=end - start,
            arrival=self.arrival[keep] - start,
            prompt=self.prompt[keep],
            output=self.output[keep],
            shared=self.shared[keep],
        )

    def scaled(self, factor: float, seed: int) -> Trace:
        """Return the trace at ``factor`` times its rate.

        Args:
            factor: Below 1 each request is kept with this probability. Above 1, ``floor(factor)`` copies and a thinned
                one are superposed; the first copy stays as it is, every request of the others is shifted by a uniform
                ±30 s (reflected at the ends).
            seed: Seed of the random numbers.

        Raises:
            ValueError: The factor is not positive.
        """
        if not (0 < factor < math.inf):
            raise ValueError(f"scale {factor:g}: use a number above 0, such as 0.5 or 8")
        _check_count(self.name, factor * len(self))
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x5CA1E])))
        parts: list[tuple[NDArray[np.float64], NDArray[np.int64]]] = []
        every = np.arange(len(self))
        whole, rest = int(factor), factor - int(factor)
        if whole:
            parts.append((self.arrival, every))
            parts.extend((self._jittered(self.arrival, generator), every) for _ in range(whole - 1))
        if rest > 0:
            chosen = np.flatnonzero(generator.random(len(self)) < rest)
            times = self.arrival[chosen]
            parts.append((self._jittered(times, generator) if whole else times, chosen))
        times = np.concatenate([part[0] for part in parts])
        index = np.concatenate([part[1] for part in parts])
        order = np.argsort(times, kind="stable")
        index = index[order]
        return replace(
            self,
            name=f"{self.name} × {factor:g}" if factor != 1 else self.name,
            arrival=times[order],
            prompt=self.prompt[index],
            output=self.output[index],
            shared=self.shared[index],
        )

    def _jittered(self, times: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
        moved = np.abs(times + generator.uniform(-JITTER_SECONDS, JITTER_SECONDS, len(times)))
        last = np.nextafter(self.seconds, 0.0)
        return np.clip(np.where(moved > last, 2 * last - moved, moved), 0.0, last)

    def lengthened(self, factor: float) -> Trace:
        """Return the trace with all lengths times ``factor``, at least one token each; arrivals stay."""
        prompt, output, shared = (
            np.rint(each * factor).astype(np.int64) for each in (self.prompt, self.output, self.shared)
        )
        prompt = np.maximum(prompt, 1)
        return replace(
            self,
            name=f"{self.name}, lengths × {factor:g}",
            prompt=prompt,
            output=np.maximum(output, 1),
            shared=np.minimum(shared, prompt - 1),
        )

    def capped(self, tokens: int) -> tuple[Trace, int]:
        """Return the trace without requests longer than ``tokens`` (an engine answers 400), and how many went."""
        keep = self.prompt + self.output <= tokens
        dropped = int(len(keep) - keep.sum())
        if not dropped:
            return self, 0
        return (
            replace(
                self,
                arrival=self.arrival[keep],
                prompt=self.prompt[keep],
                output=self.output[keep],
                shared=self.shared[keep],
            ),
            dropped,
        )


def _check_count(name: str, requests: float) -> None:
    if not requests <= _MOST_REQUESTS:
        raise ValueError(
            f"{name}: {requests:.3g} requests are more than the {_MOST_REQUESTS:,} that are simulated at once: "
            "lower the rate or take a part with --from and --to"
        )


def _trace(
    name: str,
    origin: str,
    seconds: float,
    arrival: NDArray[np.float64],
    prompt: NDArray[np.int64],
    output: NDArray[np.int64],
    shared: NDArray[np.int64] | None = None,
) -> Trace:
    return Trace(
        name,
        origin,
        seconds,
        arrival.astype(np.float64),
        np.maximum(prompt, 1).astype(np.int64),
        np.maximum(output, 1).astype(np.int64),
        np.zeros(len(arrival), dtype=np.int64) if shared is None else shared.astype(np.int64),
    )


# --- files ------------------------------------------------------------------------------------------------------


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def read_azure(path: Path, *, start: float = 0.0, end: float = math.inf) -> Trace:
    """Read a log of requests, such as the Azure Public Dataset's: CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

    Args:
        path: The file, plain or gzip. BurstGPT's names (Timestamp, Request tokens, Response tokens) do too.
        start: First second that is used, from the earliest request.
        end: Second at which it ends.

    Raises:
        ValueError: The file is not of this form; the message names file and line.
    """
    log = read_log(path, start=start, end=end)
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    order = np.argsort(log.times, kind="stable")
    arrival = log.times[order] - log.first
    # The log ends one mean gap after its last request.
    seconds = (log.last - log.first) * (1.0 + 1.0 / max(log.lines - 1, 1)) + 1e-6 if log.whole else end
    made = _trace(name, "real log", seconds, arrival, log.prompt[order], log.output[order])
    # What was read goes a little beyond what was asked for.
    return _cut(made, start, end) if log.whole else made.between(start, end)


def _sorted(
    path: Path,
    origin: str,
    times: list[float],
    prompt: list[int],
    output: list[int],
    shared: list[int] | None = None,
) -> Trace:
    arrival = np.array(times)
    order = np.argsort(arrival, kind="stable")
    arrival = arrival[order] - arrival.min()
    return _trace(
        path.name.removesuffix(".gz").rsplit(".", 1)[0],
        origin,
        # The stretch ends one mean gap after the last request.
        float(arrival[-1]) * (1.0 + 1.0 / max(len(arrival) - 1, 1)) + 1e-6,
        arrival,
        np.array(prompt)[order],
        np.array(output)[order],
        None if shared is None else np.array(shared)[order],
    )


def read_mooncake(path: Path) -> Trace:
    """Read Mooncake's JSONL: timestamp (ms), input_length, output_length, hash_ids (one per 512 prompt tokens).

    Prompt tokens whose leading hashes were all seen before count as shared: what a prefix cache without limits that
    all engines have in common would hold.

    Raises:
        ValueError: The file is not of this form; the message names file and line.
    """
    times: list[float] = []
    prompt: list[int] = []
    output: list[int] = []
    shared: list[int] = []
    seen: set[int] = set()
    with _open(path) as stream:
        for line, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
                times.append(float(row["timestamp"]) / 1e3)
                prompt.append(int(row["input_length"]))
                output.append(int(row["output_length"]))
                hashes = [int(each) for each in row.get("hash_ids", ())]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path.name}, line {line}: a Mooncake trace has timestamp, input_length and output_length ({error})"
                ) from error
            known = 0
            for each in hashes:
                if each not in seen:
                    break
                known += 1
            seen.update(hashes)
            shared.append(min(known * _MOONCAKE_BLOCK, max(prompt[-1] - 1, 0)))
    if not times:
        raise ValueError(f"{path.name} holds no request")
    return _sorted(path, "real log", times, prompt, output, shared)


# --- ServeGen: re-drawn streams ---------------------------------------------------------------------------------

_QUANTILES = (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
_SERVEGEN_WINDOW = 600.0
_SERVEGEN_LENGTHS = 21_600.0


def redraw_servegen(
    clients: Path, lengths: Path, *, start: float, seconds: float, scale: float, seed: int
) -> Trace:
    """Draw a stream from ServeGen's client statistics: a renewal process per client and 10-minute window.

    Each client arrives with its own rate, and with gaps of the published distribution (Gamma or Weibull with its
    shape; the scale follows from the rate). A window begins in the middle of a gap, drawn from the equilibrium
    distribution of the renewal process, so that no window begins with a burst of its own making. Lengths are inverse quantiles of the
    client's 6-hour window; clients without published lengths borrow another one's.

    Args:
        clients: ``client,t,rate_rps,cv,pattern,p1,p2``; ``t`` in seconds, one row per client and window.
        lengths: Quantiles of prompt and output length per client and 6-hour window.
        start: First moment, seconds on the files' clock, from their earliest window on.
        seconds: Length of the stretch.
        scale: Factor on each client's rate; a smaller one keeps the clients and their bursts.
        seed: Seed of the random numbers.

    Raises:
        ValueError: A file is not of this form, or the stretch is outside it.
    """
    with _open(clients) as stream:
        rows = list(csv.DictReader(stream))
    try:
        windows = [
            (
                int(r["client"]),
                float(r["t"]),
                float(r["rate_rps"]),
                float(r["cv"]),
                r["pattern"],
                float(r["p1"]),
            )
            for r in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{clients.name}: ServeGen client statistics have client, t, rate_rps, cv, pattern, p1 ({error})"
        ) from error
    first = min(window[1] for window in windows)
    last = max(window[1] for window in windows) + _SERVEGEN_WINDOW
    begin, end = first + start, first + start + seconds
    if not (start >= 0 and seconds > 0 and end <= last):
        raise ValueError(f"{clients.name} covers {last - first:g} s: choose a start and a length inside it")
    tables = _length_tables(lengths)
    known = sorted(tables)
    chosen = [w for w in windows if w[1] < end and w[1] + _SERVEGEN_WINDOW > begin]
    arrival: list[NDArray[np.float64]] = []
    prompt: list[NDArray[np.int64]] = []
    output: list[NDArray[np.int64]] = []
    for client, t, rate, cv, pattern, shape in chosen:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, client, int(t)])))
        times = t + _renewal(generator, rate * scale, cv, pattern, shape, _SERVEGEN_WINDOW)
        times = times[(times >= begin) & (times < end)]
        if not len(times):
            continue
        owner = client if client in tables else known[client % len(known)]
        at = min(tables[owner], key=lambda each: (abs(each - (t - t % _SERVEGEN_LENGTHS)), each))
        ins, outs = tables[owner][at]
        arrival.append(times - begin)
        prompt.append(np.rint(np.interp(generator.random(len(times)), _QUANTILES, ins)).astype(np.int64))
        output.append(np.rint(np.interp(generator.random(len(times)), _QUANTILES, outs)).astype(np.int64))
    if not arrival:
        raise ValueError(
            f"{clients.name}: no request falls into the stretch at scale {scale:g}: raise --scale"
        )
    times = np.concatenate(arrival)
    order = np.argsort(times, kind="stable")
    return _trace(
        f"servegen at {start / 3600:g} h",
        "re-drawn from client statistics, not a log",
        seconds,
        times[order],
        np.concatenate(prompt)[order],
        np.concatenate(output)[order],
    )


def _length_tables(path: Path) -> dict[int, dict[float, tuple[list[float], list[float]]]]:
    tables: dict[int, dict[float, tuple[list[float], list[float]]]] = {}
    with _open(path) as stream:
        for line, row in enumerate(csv.DictReader(stream), start=2):
            try:
                ins = [float(row[f"in_q{q:g}" if q != 1.0 else "in_q1.0"]) for q in _QUANTILES]
                outs = [float(row[f"out_q{q:g}" if q != 1.0 else "out_q1.0"]) for q in _QUANTILES]
                tables.setdefault(int(row["client"]), {})[float(row["t"])] = (ins, outs)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path.name}, line {line}: ServeGen lengths have client, t and quantiles ({error})"
                ) from error
    if not tables:
        raise ValueError(f"{path.name} holds no lengths")
    return tables


def _renewal(
    generator: np.random.Generator, rate: float, cv: float, pattern: str, shape: float, seconds: float
) -> NDArray[np.float64]:
    """Arrival times within ``[0, seconds)`` of a stationary renewal process."""
    if rate <= 0:
        return np.zeros(0)
    mean = 1.0 / rate
    if not (0.01 < shape < 100.0):
        shape = 1.0 / max(cv, 0.05) ** 2

    def gaps(count: int) -> NDArray[np.float64]:
        if pattern == "Weibull":
            return generator.weibull(shape, count) * (mean / math.gamma(1.0 + 1.0 / shape))
        return generator.standard_gamma(shape, count) * (mean / shape)

    # The gap that covers the start is drawn by its length, and the start lies anywhere inside it.
    sample = gaps(2048)
    total = float(sample.sum())
    covering = float(generator.choice(sample, p=sample / total)) if total > 0 else mean
    times = [np.array([covering * generator.random()])]
    reached = float(times[0][0])
    while reached < seconds:
        more = reached + np.cumsum(gaps(max(64, int((seconds - reached) * rate * 1.2))))
        times.append(more)
        reached = float(more[-1])
    drawn = np.concatenate(times)
    return drawn[drawn < seconds]


# --- synthetic ----------------------------------------------------------------------------------------------------


def synthetic(
    text: str, *, prompt: float, output: float, seed: int, prompt_cv: float = 0.6, output_cv: float = 0.6
) -> Trace:
    """Draw a Poisson stream whose rate has a shape, with log-normal lengths.

    Args:
        text: ``SHAPE:LOW:HIGH:SECONDS[:ARG]``, rates in requests per second: ``step`` (LOW until ARG, default a third,
            then HIGH), ``ramp`` (LOW to HIGH), ``sawtooth`` (LOW to HIGH and back at once, period ARG, default 600 s),
            ``spike`` (LOW with HIGH for ARG, default 60 s, in the middle), ``diurnal`` (a sine between both, one
            period). LOW may be 0, and above HIGH.
        prompt: Mean prompt length, tokens.
        output: Mean output length, tokens.
        seed: Seed of the random numbers.
        prompt_cv: Coefficient of variation of the prompt lengths.
        output_cv: The same of the output lengths.

    Raises:
        ValueError: The text is not of this form.
    """
    parts = text.split(":")
    usage = f"trace {text!r}: write SHAPE:LOW:HIGH:SECONDS[:ARG] with step, ramp, sawtooth, spike or diurnal"
    try:
        low, high, seconds = (float(part) for part in parts[1:4])
        argument = float(parts[4]) if len(parts) == 5 else None
    except ValueError as error:
        raise ValueError(usage) from error
    if (
        len(parts) not in {4, 5}
        or parts[0] not in _SHAPES
        or not (low >= 0 and high >= 0 and max(low, high) > 0 and seconds > 0)
        or not (argument is None or argument > 0)
    ):
        raise ValueError(usage)
    shape = _SHAPES[parts[0]](low, high, seconds, argument)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x57A9])))
    # Thinning (Lewis and Shedler 1979): a Poisson stream at the highest rate, kept with rate(t) / highest.
    most = max(low, high)
    _check_count(text, most * seconds)
    count = generator.poisson(most * seconds)
    times = np.sort(generator.random(count) * seconds)
    times = times[generator.random(count) * most < shape(times)]
    if not len(times):
        raise ValueError(f"trace {text!r}: no request falls into it: raise the rates or the time")
    return _trace(
        text,
        "synthetic",
        seconds,
        times,
        _lognormal(generator, prompt, prompt_cv, len(times)),
        _lognormal(generator, output, output_cv, len(times)),
    )


_Rate = Callable[["NDArray[np.float64]"], "NDArray[np.float64]"]


def _step(low: float, high: float, seconds: float, argument: float | None) -> _Rate:
    at = seconds / 3 if argument is None else argument
    return lambda t: np.where(t < at, low, high)


def _ramp(low: float, high: float, seconds: float, argument: float | None) -> _Rate:
    del argument
    return lambda t: low + (high - low) * t / seconds


def _sawtooth(low: float, high: float, seconds: float, argument: float | None) -> _Rate:
    del seconds
    period = argument or 600.0
    return lambda t: low + (high - low) * (t % period) / period


def _spike(low: float, high: float, seconds: float, argument: float | None) -> _Rate:
    width = argument or 60.0
    return lambda t: np.where(np.abs(t - seconds / 2) < width / 2, high, low)


def _diurnal(low: float, high: float, seconds: float, argument: float | None) -> _Rate:
    period = argument or seconds
    return lambda t: low + (high - low) * 0.5 * (1.0 - np.cos(2.0 * np.pi * t / period))


_SHAPES: dict[str, Callable[[float, float, float, float | None], _Rate]] = {
    "step": _step,
    "ramp": _ramp,
    "sawtooth": _sawtooth,
    "spike": _spike,
    "diurnal": _diurnal,
}


def _lognormal(generator: np.random.Generator, mean: float, cv: float, count: int) -> NDArray[np.int64]:
    if cv <= 0:
        return np.full(count, round(mean), dtype=np.int64)
    spread = math.log1p(cv * cv)
    drawn = np.exp(generator.standard_normal(count) * math.sqrt(spread) + math.log(mean) - spread / 2)
    return np.maximum(np.rint(drawn), 1).astype(np.int64)


# --- what ships with the package --------------------------------------------------------------------------------

_BUNDLED = {"azure-conv": "azure2023_conv.csv.gz", "azure-code": "azure2023_code.csv.gz"}


def bundled_names() -> tuple[str, ...]:
    """Names of the traces that ship with the package."""
    return (*_BUNDLED, "servegen")


def bundled(name: str) -> Path:
    """Return the file of a trace that ships with the package.

    Raises:
        ValueError: There is no such trace.
    """
    file = {
        **_BUNDLED,
        "servegen": "servegen_m-mid_clients_days1-7.csv.gz",
        "servegen-lengths": "servegen_m-mid_lengths.csv.gz",
    }.get(name)
    if file is None:
        raise ValueError(f"no trace {name!r} ships with the package: use {', '.join(bundled_names())}")
    return Path(str(files("servingtiers.simulate") / "data" / file))


def load_trace(
    text: str,
    *,
    scale: float = 1.0,
    start: float = 0.0,
    end: float = math.inf,
    seed: int = 0,
    prompt: float = 1024,
    output: float = 256,
) -> Trace:
    """Return the trace that ``--trace`` names, cut and scaled.

    Args:
        text: A file (Azure CSV, Mooncake JSONL, plain or gzipped), the name of a bundled trace, or a synthetic shape.
        scale: Factor on the rate.
        start: First second that is used.
        end: Second at which it ends.
        seed: Seed of thinning, jitter and drawing.
        prompt: Mean prompt length of synthetic shapes, tokens.
        output: Mean output length of synthetic shapes, tokens.

    Raises:
        ValueError: The text names no trace, or the file is of no known form; the message states the mend.
    """
    if text == "servegen":
        # Per-client thinning keeps every client's bursts; superposing copies would smooth them.
        length = min(end, start + 86_400.0) - start if math.isinf(end) else end - start
        return redraw_servegen(
            bundled("servegen"),
            bundled("servegen-lengths"),
            start=start,
            seconds=length,
            scale=scale,
            seed=seed,
        )
    path = bundled(text) if text in _BUNDLED else Path(text)
    if not path.is_file():
        if text.partition(":")[0] in _SHAPES:
            made = synthetic(text, prompt=prompt, output=output, seed=seed)
            return _cut(made, start, end).scaled(scale, seed) if scale != 1 else _cut(made, start, end)
        raise ValueError(
            f"trace {text!r} is no file: give a CSV or JSONL file, one of {', '.join(bundled_names())}, "
            "or a shape such as step:2:20:1800"
        )
    if first_line(path).startswith("{"):
        trace = _cut(read_mooncake(path), start, end)
    else:
        trace = read_azure(path, start=start, end=end)
    if text in _BUNDLED:
        trace = replace(trace, name=text)
    if not len(trace):
        raise ValueError(
            f"{trace.name}: no request comes from {start:g} s to {end:g} s: choose a longer stretch"
        )
    return trace if scale == 1 else trace.scaled(scale, seed)


def _cut(trace: Trace, start: float, end: float) -> Trace:
    return trace if start == 0 and end >= trace.seconds else trace.between(start, end)
