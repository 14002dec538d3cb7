"""Finding catalogue entries by the names people type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["CatalogError", "UnknownNameError", "near_names"]


class CatalogError(ValueError):
    """Something asked of the catalogue cannot be given; the message is one line and names the mend."""


class UnknownNameError(CatalogError):
    """No catalogue entry has this name."""

    def __init__(self, kind: str, name: str, known: Iterable[str], mend: str) -> None:
        """Build the one-line message.

        Args:
            kind: What was looked for, for example ``"accelerator"``.
            name: What was asked for.
            known: Every name that would have been accepted.
            mend: What to do when no near name is meant.
        """
        self.near = near_names(name, known)
        near = f"; near names: {', '.join(self.near)}" if self.near else ""
        super().__init__(f"unknown {kind} {name!r}{near}; {mend}")


def near_names(name: str, known: Iterable[str], limit: int = 5) -> tuple[str, ...]:
    """Return up to ``limit`` known names that resemble ``name``, best first.

    Both the whole name and the part after the last ``/`` are compared, so that ``Llama-3.1-8B`` finds
    ``meta-llama/Llama-3.1-8B`` whatever organisation was left out or mistyped.
    """
    wanted = name.lower()
    wanted_tail = wanted.rsplit("/", 1)[-1]
    scored: list[tuple[float, str]] = []
    for candidate in dict.fromkeys(known):
        lowered = candidate.lower()
        tail = lowered.rsplit("/", 1)[-1]
        score = max(
            difflib.SequenceMatcher(None, wanted, lowered).ratio(),
            difflib.SequenceMatcher(None, wanted_tail, tail).ratio(),
        )
        if score >= 0.6:
            scored.append((score, candidate))
    scored.sort(key=lambda pair: (-pair[0], pair[1]))
    return tuple(candidate for _, candidate in scored[:limit])
