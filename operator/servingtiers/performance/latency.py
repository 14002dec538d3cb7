"""What a prediction says: latency percentiles and the totals beside them. Pure data, no numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PERCENTILES", "Percentiles", "percentile_of"]

PERCENTILES = ("p50", "p90", "p95", "p99", "p999")
"""The percentiles every prediction carries, beside the mean."""

_QUANTILE = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99, "p999": 0.999}


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A latency distribution in ms, by its mean and five percentiles."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    p999: float

    @classmethod
    def of_sorted(cls, values: Sequence[float]) -> Percentiles:
        """Summarise ascending values.

        Args:
            values: At least one latency, ms, ascending.
        """
        return cls(
            math.fsum(values) / len(values),
            *(percentile_of(values, _QUANTILE[name]) for name in PERCENTILES),
        )

    def at(self, name: str) -> float:
        """The value of ``mean``, ``p50``, ``p90``, ``p95``, ``p99`` or ``p999``, ms."""
        if name not in ("mean", *PERCENTILES):
            raise ValueError(f"unknown percentile {name!r}: use mean, {', '.join(PERCENTILES)}")
        return float(getattr(self, name))

    def to_json(self) -> dict[str, float]:
        """As a JSON object, in ms, rounded to a microsecond."""
        return {name: round(self.at(name), 3) for name in ("mean", *PERCENTILES)}


def percentile_of(ascending: Sequence[float], quantile: float) -> float:
    """The value below which a share of ascending values lies, interpolated linearly.

    Args:
        ascending: At least one value, ascending.
        quantile: Share, 0–1.
    """
    place = quantile * (len(ascending) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ascending) - 1)
    return float(ascending[low] + (place - low) * (ascending[high] - ascending[low]))
