"""How many examples a property is tried on."""

from __future__ import annotations

import os

SEARCHING = bool(os.environ.get("HYPOTHESIS_EXPLORE"))
"""Whether new examples are searched for at random, as ``make test-properties`` does."""


def examples(usual: int) -> int:
    """Return how many: the usual ones of every run are always the same, a search tries ten times as many."""
    return 10 * usual if SEARCHING else usual
