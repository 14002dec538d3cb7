"""The real vllm-router, in a virtual environment of its own.

Its dependencies are no business of the operator's environment, so it is installed into the laboratory's cache,
once. Where it cannot be had (no wheel for the platform, no network), :func:`locate_router` says so and the
laboratory falls back to :class:`~servingtiers.lab.simulated_router.SimulatedRouter`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from servingtiers.lab.binaries import (
    Progress,
    SourceUnavailableError,
    cache_folder,
    file_lock,
    run_with_progress,
    say,
)

__all__ = ["VLLM_ROUTER_VERSION", "locate_router"]

VLLM_ROUTER_VERSION = "0.1.17"


def locate_router(
    *, cache: Path | None = None, install: bool = True, progress: Progress = say
) -> Path | None:
    """Return the ``vllm-router`` program, or None where it cannot be had.

    Order: ``$SERVINGTIERS_VLLM_ROUTER`` (a path; empty: use none), the cache, an installation into the cache from
    the package index, the ``PATH``.

    Args:
        cache: Cache folder; the user's by default.
        install: Whether an installation (about 130 MB, seconds) may be made.
        progress: Receives progress lines.
    """
    given = os.environ.get("SERVINGTIERS_VLLM_ROUTER")
    if given is not None:
        return Path(given) if given and os.access(given, os.X_OK) else None
    root = (cache or cache_folder()) / "vllm-router"
    folder = root / f"{VLLM_ROUTER_VERSION}-py{sys.version_info.major}{sys.version_info.minor}"
    program = folder / "bin" / "vllm-router"
    if os.access(program, os.X_OK):
        return program
    if install:
        with file_lock(root / ".lock", progress, "vllm-router is being installed"):
            if os.access(program, os.X_OK):
                return program
            try:
                _install(root, folder, progress)
            except SourceUnavailableError as error:
                progress(f"vllm-router {VLLM_ROUTER_VERSION} cannot be installed: {error}")
            else:
                return program
    found = shutil.which("vllm-router")
    return Path(found) if found else None


def _install(root: Path, folder: Path, progress: Progress) -> None:
    progress(f"installing vllm-router {VLLM_ROUTER_VERSION} into {folder}: once, about 130 MB")
    # A virtual environment cannot be moved (its scripts name its path), so the finished one is marked by its last
    # file: pip writes vllm-router's script after everything else; a broken one is removed first.
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as making:
        python = folder / "bin" / "python"
        run_with_progress(
            [sys.executable, "-m", "venv", str(folder)], progress=progress, doing="making its venv"
        )
        try:
            run_with_progress(
                [
                    str(python),
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--disable-pip-version-check",
                    f"--cache-dir={making}",
                    f"vllm-router=={VLLM_ROUTER_VERSION}",
                ],
                progress=progress,
                doing="installing vllm-router",
            )
        except SourceUnavailableError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
