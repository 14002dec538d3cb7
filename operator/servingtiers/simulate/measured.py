"""What a live endpoint was worth under replayed traffic, in the figures of the simulator.

The same rules as :mod:`servingtiers.simulate.scoring`: every request counts, and one that was refused, lost or not
finished misses every objective and is slower than any that was answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servingtiers.performance.latency import PERCENTILES
from servingtiers.simulate.scoring import worst_five_minutes

__all__ = ["Measurement", "summary"]

_QUANTILE = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run, a value per request; times in seconds after the start, NaN for what did not come about."""

    arrival: NDArray[np.float64]
    """When the trace has the request."""
    sent: NDArray[np.float64]
    first: NDArray[np.float64]
    last: NDArray[np.float64]
    output: NDArray[np.int64]
    """Output tokens that came."""
    answered: NDArray[np.bool_]
    """Whether the client got the whole answer."""
    gaps: NDArray[np.float64]
    """Pauses inside the answers of all requests, seconds."""

    def latencies(self) -> dict[str, NDArray[np.float64]]:
        """Return TTFT, TPOT and E2E of every request, seconds; infinite where there was no whole answer.

        They begin when the request left the client. How late that was is a figure of its own: the client's.
        """
        first = np.where(self.answered, self.first, np.inf)
        last = np.where(self.answered, self.last, np.inf)
        sent = np.where(np.isfinite(self.sent), self.sent, self.arrival)
        with np.errstate(invalid="ignore"):
            each = (last - first) / np.maximum(self.output - 1, 1)
        tpot = np.where(self.answered, np.where(self.output > 1, each, 0.0), np.inf)
        return {"ttft": first - sent, "tpot": tpot, "e2e": last - sent}


def _figures(values: NDArray[np.float64]) -> dict[str, float | None]:
    """Return mean and percentiles in ms; null where a percentile lies among requests that were never answered."""
    finite = values[np.isfinite(values)]
    found: dict[str, float | None] = {"mean": round(1e3 * float(finite.mean()), 3) if len(finite) else None}
    for name in PERCENTILES:
        value = (
            float(np.quantile(values, _QUANTILE[name], method="inverted_cdf"))
            if len(values)
            else float("nan")
        )
        found[name] = round(1e3 * value, 3) if np.isfinite(value) else None
    return found


def summary(measured: Measurement, limits: Mapping[str, float], *, seconds: float) -> dict[str, Any]:
    """Return the figures of a run, with the names of ``servingtiers simulate`` and ``servingtiers predict``.

    Args:
        measured: The run; requests of a warm-up are left out by the caller.
        limits: Objectives a request must keep, metric to seconds; empty where there are none.
        seconds: Length of the stretch of traffic that counts.
    """
    found = measured.latencies()
    bad = ~measured.answered
    attainment: dict[str, float] = {}
    for name in ("ttft", "tpot", "e2e"):
        kept = found[name] <= limits.get(name, np.inf)
        kept &= measured.answered
        attainment[name] = float(kept.mean()) if len(kept) else 1.0
        bad |= ~kept
    attainment["joint"] = float(1.0 - bad.mean()) if len(bad) else 1.0
    late = (measured.sent - measured.arrival)[np.isfinite(measured.sent)]
    # A lone token has no time per output token.
    tpot = found["tpot"][(measured.output > 1) | ~measured.answered]
    return {
        "requests": len(bad),
        "answered": int(measured.answered.sum()),
        "attainment": {name: round(value, 6) for name, value in attainment.items()},
        "worst5min": round(worst_five_minutes(measured.arrival, bad, 0.0, seconds), 6),
        "p99Seconds": {
            name: None if ms is None else round(ms / 1e3, 4)
            for name, ms in ((name, _figures(values)["p99"]) for name, values in found.items())
        },
        "ttftMs": _figures(found["ttft"]),
        "tpotMs": _figures(tpot),
        "itlMs": _figures(measured.gaps),
        "e2eMs": _figures(found["e2e"]),
        "requestsPerSecond": round(float(measured.answered.sum()) / seconds, 4) if seconds > 0 else 0.0,
        "lateMs": _figures(late),
    }
