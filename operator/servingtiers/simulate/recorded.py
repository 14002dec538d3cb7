"""Traffic as Prometheus recorded it, re-drawn: the rate of every minute and the lengths of every ten.

Prometheus keeps rates and buckets, not requests. Arrivals are drawn as a Poisson stream with the recorded rate, lengths
by the recorded buckets; bursts shorter than a minute are lost, and every report says that the stream is re-drawn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from servingtiers.simulate.traces import Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Queries", "Recording", "connect", "draw_recorded", "queries", "read_recording"]

STEP = 60.0
"""Seconds between the recorded rates."""
_LENGTH_WINDOW = "10m"

Series = Sequence[Mapping[str, Any]]


class RangeClient(Protocol):
    """The part of ``PrometheusConnect`` that is used."""

    def custom_query_range(self, query: str, start_time: datetime, end_time: datetime, step: str) -> Series:
        """Return the series of a range query."""
        ...


@dataclass(frozen=True, slots=True)
class Queries:
    """What is asked of Prometheus about one tier."""

    arrivals: str
    finished: str
    """Asked where the routers have no series: engines count finished requests."""
    prompt: str
    output: str


def queries(namespace: str, engines: Sequence[str], router: str) -> Queries:
    """Return the queries for a tier.

    Args:
        namespace: Of the tier.
        engines: Names of its engine Deployments; their pods' names begin with them.
        router: Name of its router Deployment.
    """

    def pods(names: Sequence[str]) -> str:
        # Go's regular expressions treat these characters as Python's do; a name has nothing that needs more.
        pattern = "|".join(re.escape(name).replace("\\-", "-") for name in names)
        return f'namespace="{namespace}",pod=~"({pattern})-.*"'

    def lengths(metric: str) -> str:
        return f"sum by (le) (increase({metric}_bucket{{{pods(engines)}}}[{_LENGTH_WINDOW}]))"

    return Queries(
        arrivals=f"sum(rate(vllm_router_processed_requests_total{{{pods([router])}}}[2m]))",
        finished=f"sum(rate(vllm:request_success_total{{{pods(engines)}}}[2m]))",
        prompt=lengths("vllm:request_prompt_tokens"),
        output=lengths("vllm:request_generation_tokens"),
    )


Buckets = tuple[tuple[float, ...], tuple[float, ...]]
"""Upper bounds and cumulative counts."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A stretch of traffic."""

    start: float
    """Unix time of its beginning."""
    rates: tuple[float, ...]
    """Requests per second of every step; 0 where nothing was recorded."""
    prompt: tuple[Buckets | None, ...]
    """Prompt lengths around every step; None where nothing was recorded."""
    output: tuple[Buckets | None, ...]
    unknown: int
    """Steps without a recorded rate."""


def connect(url: str) -> RangeClient:
    """Return a client for a Prometheus."""
    from prometheus_api_client import PrometheusConnect

    client: RangeClient = PrometheusConnect(url=url, disable_ssl=False)
    return client


def read_recording(
    client: RangeClient, asked: Queries, *, start: float, end: float, paired: bool
) -> Recording:
    """Return the traffic between two Unix times.

    Args:
        client: Prometheus.
        asked: What to ask.
        start: Unix time, seconds.
        end: Unix time, seconds.
        paired: Prefill and decode are apart: the router counts each request at both.

    Raises:
        ValueError: Prometheus has no traffic of the tier in this time.
    """
    times = np.arange(start, end, STEP)
    index = {round(float(t)): place for place, t in enumerate(times)}

    def values(query: str) -> Series:
        return client.custom_query_range(
            query,
            start_time=datetime.fromtimestamp(start, UTC),
            end_time=datetime.fromtimestamp(end - 1, UTC),
            step=f"{STEP:.0f}s",
        )

    rates: list[float | None] = [None] * len(times)
    share = 0.5 if paired else 1.0
    found = values(asked.arrivals)
    if not found:
        found, share = values(asked.finished), 1.0
    for series in found:
        for at, text in series.get("values", ()):
            place, value = index.get(round(float(at))), float(text)
            if place is not None and math.isfinite(value) and value >= 0:
                rates[place] = (rates[place] or 0.0) + share * value
    if not any(rates):
        raise ValueError(
            "Prometheus has no requests of this tier in this time: check --last, the namespace and the name"
        )
    return Recording(
        start=start,
        rates=tuple(rate or 0.0 for rate in rates),
        prompt=_buckets(values(asked.prompt), index),
        output=_buckets(values(asked.output), index),
        unknown=sum(rate is None for rate in rates),
    )


def _buckets(found: Series, index: Mapping[int, int]) -> tuple[Buckets | None, ...]:
    columns: list[dict[float, float]] = [{} for _ in index]
    for series in found:
        try:
            bound = float(series["metric"]["le"])
        except (KeyError, ValueError):
            continue
        for at, text in series.get("values", ()):
            place, value = index.get(round(float(at))), float(text)
            if place is not None and math.isfinite(value):
                columns[place][bound] = value
    made: list[Buckets | None] = []
    for column in columns:
        bounds = tuple(sorted(column))
        # Extrapolated increases of neighbouring buckets may cross by a hair.
        counts = tuple(np.maximum.accumulate([column[bound] for bound in bounds]).tolist()) if bounds else ()
        made.append((bounds, counts) if counts and counts[-1] > 0 else None)
    return tuple(made)


def _draw_lengths(generator: np.random.Generator, buckets: Buckets, count: int) -> NDArray[np.int64]:
    """Draw lengths: uniform inside a bucket; beyond the last finite bound, that bound."""
    bounds, counts = buckets
    finite = [bound for bound in bounds if math.isfinite(bound)]
    if not finite:
        return np.ones(count, dtype=np.int64)
    edges = np.array([0.0, *finite])
    reached = np.array([0.0, *counts[: len(finite)]])
    ranks = generator.random(count) * counts[-1]
    place = np.searchsorted(reached, ranks, side="right")
    inside = np.clip(place, 1, len(finite))
    low, high = edges[inside - 1], edges[inside]
    drawn = low + generator.random(count) * (high - low)
    drawn = np.where(place > len(finite), finite[-1], drawn)
    return np.maximum(np.ceil(drawn), 1).astype(np.int64)


def draw_recorded(recording: Recording, *, name: str, seed: int) -> Trace:
    """Return a stream with the recorded rates and lengths.

    Args:
        recording: What Prometheus kept.
        name: Name of the trace.
        seed: Seed of the random numbers.

    Raises:
        ValueError: No lengths were recorded at all, or the stretch drew no request.
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x9E4])))
    known = [
        (prompt, output)
        for prompt, output in zip(recording.prompt, recording.output, strict=True)
        if prompt is not None and output is not None
    ]
    if not known:
        raise ValueError(
            "Prometheus has no request lengths of this tier: its engines' histograms are missing"
        )
    arrival, prompts, outputs = [], [], []
    latest = known[0]
    for step, rate in enumerate(recording.rates):
        prompt, output = recording.prompt[step], recording.output[step]
        if prompt is not None and output is not None:
            latest = prompt, output
        count = int(generator.poisson(rate * STEP))
        arrival.append(np.sort(generator.random(count)) * STEP + step * STEP)
        prompts.append(_draw_lengths(generator, latest[0], count))
        outputs.append(_draw_lengths(generator, latest[1], count))
    times = np.concatenate(arrival)
    if not len(times):
        raise ValueError("the recorded rates drew no request: choose a longer time with --last")
    return Trace(
        name=name,
        origin="re-drawn from rates and buckets in Prometheus, not a log",
        seconds=len(recording.rates) * STEP,
        arrival=times,
        prompt=np.concatenate(prompts),
        output=np.concatenate(outputs),
        shared=np.zeros(len(times), dtype=np.int64),
    )
