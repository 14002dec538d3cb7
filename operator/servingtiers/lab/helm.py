"""Finds or builds Helm, which renders the chart and installs it.

Order: ``$SERVINGTIERS_HELM`` (a path), the ``PATH``, the cache, a Go build of the pinned version into the cache,
verified by Go's checksum database. ``python -m servingtiers.lab.helm`` runs the search and prints the path.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from servingtiers.lab.binaries import (
    Progress,
    SourceUnavailableError,
    cache_folder,
    file_lock,
    run_with_progress,
    say,
)

__all__ = ["HELM_VERSION", "HelmUnavailableError", "locate_helm"]

HELM_VERSION = "v3.22.0"
_PACKAGE = "helm.sh/helm/v3/cmd/helm"
_STAMPS = {
    "internal/version.version": HELM_VERSION,
    # What `helm template` and `helm lint` take the cluster for; without these two an ancient one.
    "pkg/chartutil.k8sVersionMajor": "1",
    "pkg/chartutil.k8sVersionMinor": "36",
    "pkg/lint/rules.k8sVersionMajor": "1",
    "pkg/lint/rules.k8sVersionMinor": "36",
}


class HelmUnavailableError(RuntimeError):
    """Helm cannot be had; the message says what would help."""


def _build(folder: Path, progress: Progress) -> None:
    """Build the pinned Helm into ``folder``."""
    go = shutil.which("go")
    if go is None:
        raise SourceUnavailableError("Go is not installed")
    ldflags = " ".join(
        ["-s", "-w", *(f"-X helm.sh/helm/v3/{name}={value}" for name, value in _STAMPS.items())]
    )
    progress(f"building Helm {HELM_VERSION} with Go: once, about 2 minutes on two cores")
    run_with_progress(
        [
            go,
            "install",
            "-trimpath",
            "-ldflags",
            ldflags,
            f"{_PACKAGE}@{HELM_VERSION}",
        ],
        progress=progress,
        doing="building Helm",
        env={**os.environ, "CGO_ENABLED": "0", "GOBIN": str(folder), "GOFLAGS": "-mod=readonly"},
    )


def locate_helm(
    *,
    cache: Path | None = None,
    build: Callable[[Path, Progress], None] | None = _build,
    progress: Progress = say,
) -> Path:
    """Return the ``helm`` program, building it into the cache where need be.

    Args:
        cache: Cache folder; the user's by default.
        build: Fills a folder with ``helm``; None: nothing is built.
        progress: Receives a line at least every ten seconds of waiting.

    Raises:
        HelmUnavailableError: Helm is nowhere and cannot be built; the message says what would help.
    """
    if given := os.environ.get("SERVINGTIERS_HELM"):
        if not os.access(given, os.X_OK):
            raise HelmUnavailableError(f"SERVINGTIERS_HELM={given} is no program: set it to helm's path")
        return Path(given)
    if found := shutil.which("helm"):
        return Path(found)
    root = (cache or cache_folder()) / "helm"
    folder = root / f"{HELM_VERSION}-{platform.system().lower()}-{platform.machine().lower()}"
    program = folder / "helm"
    if os.access(program, os.X_OK):
        return program
    if build is None:
        raise HelmUnavailableError("no helm on the PATH or in the cache: run python -m servingtiers.lab.helm")
    with file_lock(root / ".lock", progress, "Helm is being built"):
        if os.access(program, os.X_OK):
            return program
        with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as making:
            try:
                build(Path(making), progress)
            except SourceUnavailableError as error:
                raise HelmUnavailableError(
                    f"no helm: install Helm 3.14 or newer, or Go 1.26 ({error})"
                ) from error
            folder.mkdir(exist_ok=True)
            # Published by one rename, so that nobody ever runs half a program.
            (Path(making) / "helm").rename(program)
    return program


def main() -> int:
    """Run the search and print the path."""
    try:
        print(locate_helm())
    except HelmUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
