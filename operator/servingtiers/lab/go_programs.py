"""Finds or builds the Go programs that the chart is made and checked with: Helm and kubeconform.

Order: the program's variable (``$SERVINGTIERS_HELM``, a path), the ``PATH``, the cache, a Go build of the pinned version
into the cache, verified by Go's checksum database. ``python -m servingtiers.lab.go_programs`` runs the search for all.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from servingtiers.lab.binaries import (
    Progress,
    SourceUnavailableError,
    cache_folder,
    file_lock,
    run_with_progress,
    say,
)

__all__ = ["HELM", "KUBECONFORM", "GoProgram", "ProgramUnavailableError", "locate_program"]


class ProgramUnavailableError(RuntimeError):
    """A program cannot be had; the message says what would help."""


@dataclass(frozen=True, slots=True)
class GoProgram:
    """A program of a public Go module."""

    name: str
    """Of the file, and of the folder in the cache."""
    title: str
    package: str
    version: str
    wanted: str
    """Which version of somebody else's will do, for the message."""
    stamps: tuple[tuple[str, str], ...] = ()
    """Variables that the linker sets."""

    @property
    def variable(self) -> str:
        """Name of the environment variable that may hold its path."""
        return f"SERVINGTIERS_{self.name.upper()}"

    def build(self, folder: Path, progress: Progress) -> None:
        """Build the pinned version into ``folder``.

        Raises:
            SourceUnavailableError: There is no Go, or the module cannot be had.
        """
        go = shutil.which("go")
        if go is None:
            raise SourceUnavailableError("Go is not installed")
        ldflags = " ".join(["-s", "-w", *(f"-X {name}={value}" for name, value in self.stamps)])
        progress(f"building {self.title} {self.version} with Go: once, minutes on two cores")
        run_with_progress(
            [go, "install", "-trimpath", "-ldflags", ldflags, f"{self.package}@{self.version}"],
            progress=progress,
            doing=f"building {self.title}",
            env={**os.environ, "CGO_ENABLED": "0", "GOBIN": str(folder), "GOFLAGS": "-mod=readonly"},
        )


_HELM_VERSION = "v3.22.0"
HELM = GoProgram(
    "helm",
    "Helm",
    "helm.sh/helm/v3/cmd/helm",
    _HELM_VERSION,
    "Helm 3.14 or newer",
    (
        ("helm.sh/helm/v3/internal/version.version", _HELM_VERSION),
        # What `helm template` and `helm lint` take the cluster for; without these an ancient one.
        ("helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor", "1"),
        ("helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor", "36"),
        ("helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor", "1"),
        ("helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor", "36"),
    ),
)
KUBECONFORM = GoProgram(
    "kubeconform",
    "kubeconform",
    "github.com/yannh/kubeconform/cmd/kubeconform",
    "v0.8.0",
    "kubeconform 0.6 or newer",
)


def locate_program(
    program: GoProgram,
    *,
    cache: Path | None = None,
    build: Callable[[Path, Progress], None] | None = None,
    may_build: bool = True,
    progress: Progress = say,
) -> Path:
    """Return the path of a program, building it into the cache where need be.

    Args:
        program: Which.
        cache: Cache folder; the user's by default.
        build: Fills a folder with it, in place of the program's own build.
        may_build: False: nothing is built.
        progress: Receives a line at least every ten seconds of waiting.

    Raises:
        ProgramUnavailableError: It is nowhere and cannot be built; the message says what would help.
    """
    if given := os.environ.get(program.variable):
        if not os.access(given, os.X_OK):
            raise ProgramUnavailableError(
                f"{program.variable}={given} is no program: set it to {program.name}'s path"
            )
        return Path(given)
    if found := shutil.which(program.name):
        return Path(found)
    root = (cache or cache_folder()) / program.name
    folder = root / f"{program.version}-{platform.system().lower()}-{platform.machine().lower()}"
    path = folder / program.name
    if os.access(path, os.X_OK):
        return path
    if not may_build:
        raise ProgramUnavailableError(
            f"no {program.name} on the PATH or in the cache: run python -m servingtiers.lab.go_programs"
        )
    with file_lock(root / ".lock", progress, f"{program.title} is being built"):
        if os.access(path, os.X_OK):
            return path
        with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as making:
            try:
                (build or program.build)(Path(making), progress)
            except SourceUnavailableError as error:
                raise ProgramUnavailableError(
                    f"no {program.name}: install {program.wanted}, or Go 1.26 ({error})"
                ) from error
            folder.mkdir(exist_ok=True)
            # Published by one rename, so that nobody ever runs half a program.
            (Path(making) / program.name).rename(path)
    return path


def main() -> int:
    """Run the search and print the paths."""
    try:
        for program in (HELM, KUBECONFORM):
            print(locate_program(program))
    except ProgramUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
