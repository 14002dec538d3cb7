"""Pages' commands, typed in a folder that looks like the reader's: kubectl, Helm and servingtiers are there, the cluster is this one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.kube import Kube
from harness.tiers import VOCABULARY

__all__ = ["commands", "environment", "programs"]


def commands(page: Path) -> Iterator[str]:
    """Yield the commands of a page's blocks, joined where they continue."""
    fence: str | None = None
    pending = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fence = line[3:] if fence is None else None
        elif fence in {"", "console"}:
            pending += line.strip().removesuffix("\\")
            if not line.endswith("\\"):
                yield pending
                pending = ""


def programs(folder: Path, kube: Kube, helm: Path) -> None:
    """Put the programs that pages call into ``bin`` of the folder."""
    to = folder / "bin"
    to.mkdir()
    (to / "kubectl").symlink_to(kube.kubectl)
    (to / "helm").symlink_to(helm)
    ours = to / "servingtiers"
    # No page speaks of how few tokens the toy model knows.
    ours.write_text(
        f'#!/bin/sh\ncase "$1" in bench|profile) set -- "$@" --vocabulary {VOCABULARY};; esac\n'
        f'exec {sys.executable} -m servingtiers.cli "$@"\n'
    )
    ours.chmod(0o755)


def environment(folder: Path, kube: Kube) -> dict[str, str]:
    """Return the environment in which they are found."""
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "KUBECONFIG": str(kube.kubeconfig),
        "HOME": str(folder),
    }
