"""What every published measurement says of where it was taken."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

__all__ = ["circumstances"]


def circumstances() -> dict[str, str | int | None]:
    """Return day, processor, cores, Python and commit."""
    with Path("/proc/cpuinfo").open() as lines:
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        processor = next(names, "")
    commit = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "measured": time.strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": subprocess.run(commit, check=False, capture_output=True, text=True).stdout.strip(),
    }
