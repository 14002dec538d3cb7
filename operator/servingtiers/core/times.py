"""Times as Kubernetes writes them, without a clock: ``now`` is always handed in."""

from __future__ import annotations

from datetime import UTC, datetime

from servingtiers.api.base import format_duration

__all__ = ["ago", "from_time", "in_words", "to_time"]


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


def in_words(seconds: float) -> str:
    """Return a length of time for people to read: ``2ms``, ``484ms``, ``9.9s``, ``1m17s``.

    What goes into a spec is written by :func:`~servingtiers.api.base.format_duration`, which knows no fractions.
    """
    seconds = max(seconds, 0.0)
    if seconds == 0:
        return "0s"
    if seconds < 0.0005:
        return "under 1ms"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f}ms"
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    return format_duration(round(seconds))


def ago(age: float) -> str:
    """Return how long ago something was, for people to read; a tenth of a second is "just now"."""
    return "just now" if age < 0.1 else f"{in_words(age)} ago"
