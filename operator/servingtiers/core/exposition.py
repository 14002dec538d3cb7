"""Reads the text that engines and routers answer on ``/metrics``.

``prometheus_client``'s parser reads any exposition; on vLLM's it takes some twenty times as long (the test beside
this prints both), which at a thousand engines a tick is seconds of one core. This one looks only at the lines that
become load and refuses what it does not understand.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

from servingtiers.core.signals import Histogram, merge
from servingtiers.core.telemetry import RouterScan, Scan
from servingtiers.core.vllm_metrics import ENGINE_METRICS, ROUTER_METRICS, START_TIME, Kind, Metric

__all__ = ["parse_engine", "parse_router"]

_LE = re.compile(r'(?:^|,)le="([^"]*)"')

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")

_VALUE_NAMES = {
    name for metric in ENGINE_METRICS if metric.kind is not Kind.HISTOGRAM for name in metric.names
}
_BUCKET_NAMES = {
    f"{name}_bucket": name
    for metric in ENGINE_METRICS
    if metric.kind is Kind.HISTOGRAM
    for name in metric.names
}
_SUM_NAMES = {f"{name}_sum": name for name in _BUCKET_NAMES.values()}
_WANTED = frozenset({*_VALUE_NAMES, *_BUCKET_NAMES, *_SUM_NAMES, START_TIME})


def _sample(line: str) -> tuple[str, str, float, float | None]:
    """Split one sample line into name, label text, value and time (seconds), which is seldom there.

    Raises:
        ValueError: It is no sample.
    """
    brace = line.find("{")
    if brace < 0:
        name, _, rest = line.partition(" ")
        labels = ""
    else:
        # Label values may hold "} "; numbers cannot.
        end = line.rfind("}")
        name, labels, rest = line[:brace], line[brace + 1 : end], line[end + 1 :]
    parts = rest.split()
    if len(parts) == 1:
        return name, labels, float(parts[0]), None
    if len(parts) == 2:
        return name, labels, float(parts[0]), float(parts[1]) / 1000
    raise ValueError(f"not a sample: {line[:80]!r}")


@lru_cache(maxsize=65536)
def _split_le(labels: str) -> tuple[float, str]:
    """Return the bucket's bound and the other labels. Engines repeat the same few texts for ever."""
    found = _LE.search(labels)
    if found is None:
        raise ValueError(f"a bucket without le: {labels[:80]!r}")
    return float(found[1]), labels[: found.start()] + labels[found.end() :]


@lru_cache(maxsize=4096)
def _shared(bounds: tuple[float, ...]) -> tuple[float, ...]:
    """Return one tuple for all equal bounds: thousands of histograms are kept at a time."""
    return bounds


def parse_engine(text: str, time: float) -> Scan:
    """Read an engine's ``/metrics``.

    Data-parallel ranks (label ``engine``) are put together: added, or averaged where the metric says so.

    Args:
        text: The body, in Prometheus' text format.
        time: Unix time of the answer, seconds; older time stamps in the body win.

    Raises:
        ValueError: The body is cut off, is no exposition, or holds no vLLM metric.
    """
    if not text.endswith("\n"):
        raise ValueError("the answer is cut off")
    values: dict[str, list[float]] = {}
    sums: dict[str, float] = {}
    buckets: dict[str, dict[str, dict[float, float]]] = {}
    seen: set[tuple[str, str]] = set()
    twice: set[str] = set()
    oldest = time
    start_time: float | None = None
    for line in text.split("\n"):
        if line.startswith("#"):
            continue
        brace = line.find("{")
        name = line[:brace] if brace > 0 else line.partition(" ")[0]
        if name not in _WANTED:
            continue
        name, labels, value, stamp = _sample(line)
        if stamp is not None and stamp < oldest:
            oldest = stamp
        if name in _BUCKET_NAMES:
            name = _BUCKET_NAMES[name]
            le, labels = _split_le(labels)
            by_le = buckets.setdefault(name, {}).setdefault(labels, {})
            if le in by_le:
                twice.add(name)
            by_le[le] = value
        elif name in _SUM_NAMES:
            base = _SUM_NAMES[name]
            if (name, labels) in seen:
                twice.add(base)
            seen.add((name, labels))
            sums[base] = sums.get(base, 0.0) + value
        elif name == START_TIME:
            start_time = value
        else:
            if (name, labels) in seen:
                twice.add(name)
            seen.add((name, labels))
            values.setdefault(name, []).append(value)
    if not values and not buckets:
        raise ValueError("the answer holds no vLLM metric")
    scalars: dict[str, float] = {}
    histograms: dict[str, Histogram] = {}
    faults: dict[str, str] = {}
    for metric in ENGINE_METRICS:
        source = buckets if metric.kind is Kind.HISTOGRAM else values
        exposed = next((name for name in metric.names if name in source), None)
        if exposed is None:
            continue
        if exposed in twice:
            faults[metric.key] = f"{exposed} is there twice with the same labels"
        elif metric.kind is not Kind.HISTOGRAM:
            scalars[metric.key] = together(metric, values[exposed])
        elif exposed not in sums:
            faults[metric.key] = f"{exposed} has no sum"
        else:
            try:
                histograms[metric.key] = _histogram(buckets[exposed], sums[exposed])
            except ValueError as error:
                faults[metric.key] = f"{exposed}: {error}"
    return Scan(oldest, scalars, histograms, faults, start_time)


def together(metric: Metric, ranks: list[float]) -> float:
    """Return one number for an engine's data-parallel ranks; a fault of one rank is not averaged away."""
    worst = next((rank for rank in ranks if not math.isfinite(rank) or rank < 0), None)
    if worst is not None:
        return worst
    total = math.fsum(ranks)
    return total / len(ranks) if metric.mean else total


def _histogram(ranks: dict[str, dict[float, float]], total: float) -> Histogram:
    parts: list[Histogram] = []
    for by_le in ranks.values():
        # A cut-off exposition shows here as a missing last bucket.
        ordered = sorted(by_le.items())
        bounds = _shared(tuple([le for le, _ in ordered]))
        same: dict[float, float] = {}
        # One object for equal counts: most buckets above the slowest request are equal.
        counts = tuple([same.setdefault(count, count) for _, count in ordered])
        parts.append(Histogram(bounds, counts, total if not parts else 0.0))
    return parts[0] if len(parts) == 1 else merge(parts)


def parse_router(text: str, time: float) -> RouterScan:
    """Read a router's ``/metrics``. It is empty until the first request.

    Args:
        text: The body, in Prometheus' text format.
        time: Unix time of the answer, seconds.

    Raises:
        ValueError: The body is cut off or is no exposition.
    """
    if text and not text.endswith("\n"):
        raise ValueError("the answer is cut off")
    series: dict[str, dict[str, float]] = {}
    for line in text.split("\n"):
        if not line or line[0] == "#":
            continue
        brace = line.find("{")
        name = line[:brace] if brace > 0 else line.partition(" ")[0]
        if not _NAME.fullmatch(name):
            raise ValueError(f"not a sample: {line[:80]!r}")
        if name not in ROUTER_METRICS.names:
            continue
        name, labels, value, _ = _sample(line)
        found = series.setdefault(name, {})
        if labels in found:
            raise ValueError(f"{name} is there twice with the same labels")
        found[labels] = value
    return RouterScan(time, series)
