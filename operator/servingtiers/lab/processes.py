"""Child processes that never outlive their maker.

Every child gets a session of its own (so Ctrl-C in a terminal reaches only us, and we stop the children in
order) and is told to a *watchdog*: a tiny process that holds one end of a pipe. When the maker ends without
tidying up - SIGKILL included - the pipe closes and the watchdog stops what is left, last started first.
A parent-death signal would be simpler, but it fires when the starting *thread* ends, and only Linux has it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Child", "Children", "free_port"]

_WATCHDOG = """
import os, shutil, signal, sys, time
alive, folders = [], []
for line in sys.stdin:
    word, _, what = line.rstrip("\\n").partition(" ")
    if word == "folder":
        folders.append(what)
    elif word == "add":
        alive.append(int(what))
    elif word == "remove" and int(what) in alive:
        alive.remove(int(what))
    elif word == "done":
        sys.exit(0)
def living(pid):
    try:
        os.killpg(pid, 0)
    except OSError:
        return False
    try:  # an orphan that has ended may stay a zombie where process 1 reaps nothing
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True
for pid in reversed(alive):
    for sig, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        try:
            os.killpg(pid, sig)
        except OSError:
            break
        end = time.monotonic() + patience
        while living(pid) and time.monotonic() < end:
            time.sleep(0.05)
        if not living(pid):
            break
for folder in folders:
    shutil.rmtree(folder, ignore_errors=True)
"""


def free_port(address: str = "127.0.0.1") -> int:
    """Return a TCP port of ``address`` that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


class Child:
    """One started process, with its log file."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.process.poll() is None

    def tail(self, lines: int = 5) -> str:
        """Return the last lines of the log."""
        with contextlib.suppress(OSError):
            return " | ".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""


class Children:
    """A set of child processes, stopped together in reverse order of their start."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._watchdog: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def remove_when_orphaned(self, folder: Path) -> None:
        """Have the watchdog remove a temporary folder too, should we not live to do it."""
        self._tell("folder", str(folder))

    def _tell(self, word: str, what: object) -> None:
        if self._watchdog is None:
            self._watchdog = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _WATCHDOG],
                stdin=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        if self._watchdog.stdin is not None:
            self._watchdog.stdin.write(f"{word} {what}\n")
            self._watchdog.stdin.flush()

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Child:
        """Start ``command``, its output appended to ``log``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env) if env is not None else None,
                cwd=cwd,
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._children.append(child)
        self._tell("add", process.pid)
        return child

    def stop_one(self, child: Child, *, grace: float = 10.0, signum: int = signal.SIGTERM) -> None:
        """Stop one child: ``signum``, then SIGKILL after ``grace`` seconds."""
        if child.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signum)
            try:
                child.process.wait(grace)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
        if child in self._children:
            self._children.remove(child)
            self._tell("remove", child.process.pid)

    def stop(self, *, grace: float = 10.0) -> None:
        """Stop all children, last started first, and then the watchdog. Harmless when called twice."""
        for child in reversed(list(self._children)):
            self.stop_one(child, grace=grace)
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            try:
                watchdog.communicate("done\n", timeout=5.0)
            except (OSError, subprocess.TimeoutExpired):
                watchdog.kill()
                watchdog.wait()
