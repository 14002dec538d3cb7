"""The traffic a prediction is made for: arrivals and lengths. Pure data; drawing it is ``engine_sim``'s."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["MOST_LENGTH_CV", "ArrivalKind", "Arrivals", "Workload", "length_cv_from_p95"]


class ArrivalKind(StrEnum):
    """How the gaps between arrivals are distributed."""

    POISSON = "poisson"
    CONSTANT = "constant"
    GAMMA = "gamma"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """An open-loop arrival process."""

    kind: ArrivalKind = ArrivalKind.POISSON
    cv: float = 1.0
    """Coefficient of variation of the gaps: 1 for Poisson, 0 for constant."""

    @classmethod
    def parse(cls, text: str) -> Arrivals:
        """Read ``poisson``, ``constant`` or ``gamma:CV``.

        Raises:
            ValueError: Anything else; the message names the three forms.
        """
        name, _, argument = text.strip().lower().partition(":")
        if name == "poisson" and not argument:
            return cls()
        if name == "constant" and not argument:
            return cls(ArrivalKind.CONSTANT, 0.0)
        if name == "gamma":
            try:
                cv = float(argument)
            except ValueError:
                cv = math.nan
            if 0.0 < cv <= 100.0:
                return cls(ArrivalKind.GAMMA, cv)
        raise ValueError(
            f"arrivals {text!r}: use poisson, constant or gamma:CV with 0 < CV ≤ 100, as gamma:2"
        )

    def __str__(self) -> str:
        return f"gamma:{self.cv:g}" if self.kind is ArrivalKind.GAMMA else self.kind.value


@dataclass(frozen=True, slots=True)
class Workload:
    """Traffic of one tier: exactly one of ``rate`` (open loop) and ``concurrency`` (closed loop).

    Lengths are drawn log-normally with the given mean and coefficient of variation, each at least 1 token and
    together at most ``max_model_len``.
    """

    prompt_tokens: float
    output_tokens: float
    rate: float | None = None
    """Requests per second."""
    concurrency: int | None = None
    arrivals: Arrivals = Arrivals()
    prompt_cv: float = 0.0
    output_cv: float = 0.0
    prefix_hit_rate: float = 0.0
    """Share of each prompt's tokens found in the prefix cache, 0–1."""
    max_model_len: int | None = None
    batch_share: float = 0.0
    """Share of requests of the batch class, which priority scheduling admits after the interactive ones."""

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.concurrency is None):
            raise ValueError("give exactly one of rate (requests per second) and concurrency (closed loop)")
        if self.rate is not None and not (0.0 < self.rate < math.inf):
            raise ValueError(f"rate {self.rate:g}: use a number of requests per second above 0")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"concurrency {self.concurrency}: use 1 or more clients")
        for name, value in (("prompt tokens", self.prompt_tokens), ("output tokens", self.output_tokens)):
            if not (1.0 <= value < math.inf):
                raise ValueError(f"{name} {value:g}: use 1 or more")
        for name, value in (("prompt", self.prompt_cv), ("output", self.output_cv)):
            if not (0.0 <= value <= 10.0):
                raise ValueError(f"{name} length CV {value:g}: use 0 (all alike) to 10")
        for name, value in (("prefix hit rate", self.prefix_hit_rate), ("batch share", self.batch_share)):
            if not (0.0 <= value <= 1.0):
                raise ValueError(f"{name} {value:g}: use a share from 0 to 1")
        if self.max_model_len is not None and self.prompt_tokens + self.output_tokens > self.max_model_len:
            raise ValueError(
                f"{self.prompt_tokens:g} prompt + {self.output_tokens:g} output tokens exceed the maximum length "
                f"of {self.max_model_len}: shorten them or raise the maximum length"
            )


MOST_LENGTH_CV = 2.0
"""Public traces of prompts and answers have coefficients of variation of 0.5 to about 2."""


def length_cv_from_p95(mean: float, p95: float) -> float:
    """Coefficient of variation of the log-normal with this mean and 95th percentile, at most 2.

    With ``z = 1.645`` and log-normal spread ``σ``: ``p95 / mean = exp(zσ - σ²/2)``; the smaller root for σ. Two
    numbers do not say how heavy the tail beyond the second is; near the largest ratio there is (3.87) the
    log-normal's would be absurd (p99 at three times p95), hence the bound.

    Args:
        mean: Mean length, tokens.
        p95: 95th percentile, tokens; at or below the mean it means no spread.
    """
    if p95 <= mean:
        return 0.0
    z = 1.6448536269514722
    spread = z - math.sqrt(max(z * z - 2.0 * math.log(p95 / mean), 0.0))
    return min(math.sqrt(math.expm1(spread * spread)), MOST_LENGTH_CV)
