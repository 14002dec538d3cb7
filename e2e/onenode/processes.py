"""Processes that live on after the program that started them, and can be found again safely.

A recorded process id alone is no proof: the kernel gives it out again. So the start time of the process is recorded
with it, and nothing is signalled unless both agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Daemon", "DaemonError"]


class DaemonError(RuntimeError):
    """A program did not start; the message ends with its last words."""


def _start_time(pid: int) -> str | None:
    """Return the start time of a living process in clock ticks after boot; None for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


class Daemon:
    """One program of the node, recorded in ``folder``."""

    def __init__(self, name: str, folder: Path, log: Path) -> None:
        self.name = name
        self.record = folder / f"{name}.json"
        self.log = log

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        try:
            recorded = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return None
        pid = int(recorded["pid"])
        return pid if _start_time(pid) == recorded["started"] else None

    @property
    def command(self) -> list[str]:
        """The command line it was last started with; empty where it never was."""
        try:
            recorded = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return []
        return [str(word) for word in recorded["command"]]

    def start(self, command: Sequence[str], *, netns: Path, env: Mapping[str, str] | None = None) -> bool:
        """Start the program inside a network namespace; return False where it already runs."""
        if self.pid is not None:
            return False
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            # nsenter and not `ip netns exec`: that one remounts /sys, which hides the cgroups.
            process = subprocess.Popen(
                ["nsenter", f"--net={netns}", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        started = _start_time(process.pid)
        self.record.write_text(json.dumps({"pid": process.pid, "started": started, "command": list(command)}))
        time.sleep(0.05)
        if process.poll() is not None:
            raise DaemonError(f"{self.name} ended at once: {self.tail()}")
        return True

    def stop(self, *, signum: int = signal.SIGTERM, patience: float = 10.0) -> None:
        """Stop it: ``signum``, then SIGKILL after ``patience`` seconds. Harmless when it does not run."""
        pid = self.pid
        for number, seconds in ((signum, patience), (signal.SIGKILL, 5.0)):
            if pid is None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            end = time.monotonic() + seconds
            while self.pid is not None and time.monotonic() < end:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                time.sleep(0.05)
            pid = self.pid
        self.record.unlink(missing_ok=True)

    def tail(self, lines: int = 4) -> str:
        """Return the last lines of its log."""
        with contextlib.suppress(OSError):
            return " | ".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""
