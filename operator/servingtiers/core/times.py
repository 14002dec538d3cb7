"""Times as Kubernetes writes them, without a clock: ``now`` is always handed in."""

from __future__ import annotations

from datetime import UTC, datetime

__all__ = ["from_time", "to_time"]


def to_time(unix: float) -> str:
    """Return a Unix time (seconds) as RFC 3339 in UTC to the second, as metav1.Time is written."""
    return datetime.fromtimestamp(int(unix), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def from_time(text: str) -> float:
    """Return the Unix time, seconds, of an RFC 3339 time.

    Raises:
        ValueError: The text is no such time.
    """
    parsed = datetime.fromisoformat(text)
    if parsed.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone: write it like 2026-01-31T12:00:00Z")
    return parsed.timestamp()
