"""What was found wrong, impossible or unmet: verdicts that several policies make and conditions report."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Feasibility", "Problem", "SloVerdict"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a tier that the API server could not see was wrong; the message states the mend."""

    field: str
    """Path of the field, such as ``spec.pool.hardware.accelerators``."""
    message: str
    blocking: bool = True
    """False: the tier is accepted all the same, and the problem is reported as feasibility Unknown."""
    reason: str = "Invalid"
    """CamelCase reason for the condition."""


@dataclass(frozen=True, slots=True)
class Feasibility:
    """Whether the objectives can be met at any replica count."""

    feasible: bool | None
    """None: not known."""
    reason: str
    """CamelCase."""
    message: str


@dataclass(frozen=True, slots=True)
class SloVerdict:
    """How one objective fares over its window."""

    objective: str
    """Such as ``ttft.p99``."""
    target_seconds: float
    met: bool | None
    """None: no traffic, too few requests, or buckets too coarse to tell."""
    message: str
    attainment_low: float | None = None
    """Least share of requests that met the target, 0 to 1; None without traffic."""
    attainment_high: float | None = None
    """Most share of requests that can have met the target."""
    requests: float = 0.0
    """Requests counted in the window."""
