"""The load, and what came of it: pure arithmetic over what was recorded."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.traffic import percentile

__all__ = ["Load", "Objectives", "Phase", "Sample", "measured"]


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of the load."""

    name: str
    seconds: float
    share: float
    """Arrivals as a share of what one engine sustains."""


@dataclass(frozen=True, slots=True)
class Load:
    """Poisson arrivals at one rate per phase; the same seed gives the same requests."""

    phases: tuple[Phase, ...]
    capacity: float
    """Requests per second that one engine sustains."""
    prompt_tokens: int
    output_tokens: int
    seed: int = 1

    @property
    def seconds(self) -> float:
        """Length of the load."""
        return sum(each.seconds for each in self.phases)

    def starts(self) -> list[float]:
        """Return when each phase begins, seconds, and the end of the last."""
        return [0.0, *itertools.accumulate(each.seconds for each in self.phases)]

    def trace(self) -> str:
        """Return the requests as Mooncake's JSONL, which ``servingtiers bench`` replays."""
        rng = random.Random(self.seed)
        # The first request leaves at once: readers of traces count from it.
        moments = [0.0]
        for phase, (begin, end) in zip(self.phases, itertools.pairwise(self.starts()), strict=True):
            at = begin
            while (at := at + rng.expovariate(phase.share * self.capacity)) < end:
                moments.append(at)
        rows = (
            {
                "timestamp": round(each * 1e3, 1),
                "input_length": self.prompt_tokens,
                "output_length": self.output_tokens,
            }
            for each in moments
        )
        return "".join(f"{json.dumps(row)}\n" for row in rows)


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request has to keep, seconds."""

    ttft: float
    tpot: float
    e2e: float


@dataclass(frozen=True, slots=True)
class Sample:
    """The pool at one moment, seconds after the load began."""

    at: float
    asked: int
    """``spec.replicas`` of the Deployment."""
    held: int
    """Pods that hold an accelerator: placed and not gone, those on their way up or out included."""
    ready: int


def _integral(samples: Sequence[Sample], name: str, begin: float, end: float) -> float:
    """Return replica-seconds between two moments; a value holds until the next sample."""
    total = 0.0
    bounds = [*(each.at for each in samples[1:]), end]
    for sample, until in zip(samples, bounds, strict=True):
        total += getattr(sample, name) * max(min(until, end) - max(sample.at, begin), 0.0)
    return total


def _attainment(
    records: Sequence[Mapping[str, Any]], objectives: Objectives
) -> dict[str, float | int | None]:
    """Return shares of the requests that kept each objective and all of them; a failed request keeps none."""
    kept = dict.fromkeys(("ttft", "tpot", "e2e", "joint"), 0)
    taken: dict[str, list[float]] = {"ttft": [], "tpot": [], "e2e": []}
    failed = 0
    for row in records:
        if row["failure"] is not None:
            failed += 1
            continue
        first, last, sent = row["first"], row["last"], row["sent"]
        took = {
            "ttft": first - sent,
            "tpot": (last - first) / max(row["outputTokens"] - 1, 1),
            "e2e": last - sent,
        }
        good = {name: value <= getattr(objectives, name) for name, value in took.items()}
        good["joint"] = all(good.values())
        for name, value in took.items():
            taken[name].append(value)
        for name, value in good.items():
            kept[name] += value
    requests = len(records)
    figures: dict[str, float | int | None] = {"requests": requests, "failed": failed}
    figures |= {name: round(count / requests, 4) if requests else None for name, count in kept.items()}
    for name, values in taken.items():
        # Failed requests are slower than any that was answered.
        whole = [*values, *([float("inf")] * failed)]
        for share in (0.5, 0.99):
            value = percentile(whole, share)
            figures[f"{name}P{share * 100:.0f}"] = round(value, 4) if value < float("inf") else None
    return figures


def _first(samples: Sequence[Sample], since: float, what: str, least: int) -> float | None:
    """Return after how many seconds from ``since`` a value first was at least so large."""
    return next(
        (round(each.at - since, 1) for each in samples if each.at >= since and getattr(each, what) >= least),
        None,
    )


def _settled(samples: Sequence[Sample], since: float, what: str, value: int) -> float | None:
    """Return after how many seconds from ``since`` a value was reached that stayed until the end."""
    last = None
    for each in samples:
        if each.at < since:
            continue
        if getattr(each, what) != value:
            last = None
        elif last is None:
            last = round(each.at - since, 1)
    return last


def measured(
    load: Load, objectives: Objectives, records: Sequence[Mapping[str, Any]], samples: Sequence[Sample]
) -> dict[str, Any]:
    """Return everything that is reported of one run.

    Args:
        load: What was sent.
        objectives: What requests had to keep.
        records: Lines of ``servingtiers bench --record``; a request belongs to the phase it was due in.
        samples: The pool from the load's start to its end, in order.
    """
    starts = load.starts()
    before = samples[0]
    changes = [b.asked - a.asked for a, b in itertools.pairwise(samples) if b.asked != a.asked]
    phases = []
    for phase, (begin, end) in zip(load.phases, itertools.pairwise(starts), strict=True):
        mine = [row for row in records if begin <= row["arrival"] < end]
        at_start = [each for each in samples if each.at <= begin] or [before]
        asked, ready = at_start[-1].asked, at_start[-1].ready
        phases.append(
            {
                **asdict(phase),
                **_attainment(mine, objectives),
                "askedAtStart": asked,
                "readyAtStart": ready,
                "decidedAfter": _first([s for s in samples if s.at < end], begin, "asked", asked + 1),
                "addedAfter": _first([s for s in samples if s.at < end], begin, "ready", ready + 1),
                "readyMean": round(_integral(samples, "ready", begin, end) / phase.seconds, 2),
            }
        )
    return {
        **_attainment(records, objectives),
        "replicaSeconds": {
            name: round(_integral(samples, name, 0.0, load.seconds)) for name in ("asked", "held", "ready")
        },
        "peakAsked": max(each.asked for each in samples),
        "moves": len(changes),
        "reversals": sum(a * b < 0 for a, b in itertools.pairwise(changes)),
        "backAsked": _settled(samples, starts[-2], "asked", before.asked),
        "backHeld": _settled(samples, starts[-2], "held", before.held),
        "phases": phases,
        # Where the pool changed; what lies between is a straight line.
        "course": [
            [round(b.at, 1), b.asked, b.held, b.ready]
            for a, b in itertools.pairwise([Sample(-1.0, -1, -1, -1), *samples])
            if (a.asked, a.held, a.ready) != (b.asked, b.held, b.ready)
        ],
    }
