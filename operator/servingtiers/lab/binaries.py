"""Finds, downloads or builds the control-plane programs of the local laboratory.

Places are tried in this order, and the first that holds every needed program wins:

1. ``$KUBEBUILDER_ASSETS``, where a developer already has them;
2. the cache folder, by version;
3. the official binaries (Kubernetes' and etcd's own release sites), verified by their published SHA-256;
4. a Go build of the pinned module in ``gotools/``, verified by its ``go.sum``.

``python -m servingtiers.lab.binaries`` runs the search and prints the paths.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import queue
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ETCD_VERSION",
    "KUBERNETES_VERSION",
    "Binaries",
    "BinariesError",
    "ChecksumError",
    "Progress",
    "SourceUnavailableError",
    "cache_folder",
    "file_lock",
    "locate",
    "run_with_progress",
    "say",
]

KUBERNETES_VERSION = "v1.36.3"
ETCD_VERSION = "v3.6.8"  # the version in that release's own go.mod

_REQUIRED = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
_OPTIONAL = ("kubectl",)
_GO_PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
}
_GO_MODULE = Path(__file__).parent / "gotools"
_CONNECT_SECONDS = 4.0  # an unreachable site must cost seconds, not a TCP time-out
_READ_SECONDS = 60.0
_SOURCES = ("download", "build")

Progress = Callable[[str], None]
Fetch = Callable[[str, float], Iterator[bytes]]


class BinariesError(RuntimeError):
    """The programs cannot be had; the message says what would help."""


class ChecksumError(BinariesError):
    """A downloaded file is not the published one."""


class SourceUnavailableError(RuntimeError):
    """One source cannot deliver; the next one is tried."""


@dataclass(frozen=True, slots=True)
class Binaries:
    """Paths of the control-plane programs."""

    etcd: Path
    kube_apiserver: Path
    kube_controller_manager: Path
    kube_scheduler: Path
    kubectl: Path | None
    """None where only a test's assets without kubectl are there."""
    source: str
    """Where they were found, for a person."""


def say(message: str) -> None:
    """Print one progress line to standard error."""
    print(f"[lab] {message}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """Return the laboratory's cache folder (``$XDG_CACHE_HOME/servingtiers`` or ``~/.cache/servingtiers``)."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "servingtiers"


@contextlib.contextmanager
def file_lock(path: Path, progress: Progress, waiting_for: str) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; while another process has it, say so every ten seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        begun = time.monotonic()
        told = -10.0
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                waited = time.monotonic() - begun
                if waited - told >= 10:
                    progress(f"waiting for another process: {waiting_for} ({waited:.0f} s)")
                    told = waited
                time.sleep(0.2)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


def run_with_progress(
    command: Sequence[str],
    *,
    progress: Progress,
    doing: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    total: int | None = None,
) -> None:
    """Run a long command; every ten seconds say what is waited for and how many lines it has printed.

    Args:
        command: Program and arguments.
        progress: Receives the lines.
        doing: What is being done, for the progress line.
        cwd: Working folder.
        env: Whole environment, or None for ours.
        total: How many lines of output there will be at most, where known (``go build -v`` prints one per
            compiled package).

    Raises:
        SourceUnavailableError: The command failed; the message ends with its last lines.
    """
    nice = shutil.which("nice")
    prefix = [nice, "-n", "5"] if nice else []
    begun = time.monotonic()
    with subprocess.Popen(
        [*prefix, *command],
        cwd=cwd,
        env=dict(env) if env is not None else None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def pump() -> None:
            assert process.stdout is not None  # noqa: S101 - PIPE was asked for three lines above
            for line in process.stdout:
                lines.put(line.rstrip())
            lines.put(None)

        threading.Thread(target=pump, daemon=True).start()
        tail: list[str] = []
        seen = 0
        told = 0.0
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    line = lines.get(timeout=1.0)
                    if line is None:
                        break
                    if line:
                        tail = [*tail[-9:], line]
                        seen += 1
                elapsed = time.monotonic() - begun
                if elapsed - told >= 10:
                    told = elapsed
                    count = f", step {seen} of at most {total}" if total else f", {seen} lines"
                    progress(f"{doing}: {elapsed:.0f} s{count if seen else ''}")
        except BaseException:
            process.terminate()
            raise
        code = process.wait()
    if code:
        raise SourceUnavailableError(f"{doing} failed with exit status {code}: {' | '.join(tail[-4:])}")


def _platform() -> tuple[str, str]:
    machine = platform.machine().lower()
    architecture = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}.get(machine)
    if architecture is None:
        raise BinariesError(
            f"no control-plane programs are published for {machine}: build them and set KUBEBUILDER_ASSETS"
        )
    return platform.system().lower(), architecture


def _missing(folder: Path, names: Sequence[str] = _REQUIRED) -> list[str]:
    return [name for name in names if not os.access(folder / name, os.X_OK)]


def _of(folder: Path, source: str) -> Binaries:
    kubectl = folder / "kubectl"
    on_path = shutil.which("kubectl")
    return Binaries(
        etcd=folder / "etcd",
        kube_apiserver=folder / "kube-apiserver",
        kube_controller_manager=folder / "kube-controller-manager",
        kube_scheduler=folder / "kube-scheduler",
        kubectl=kubectl if kubectl.exists() else Path(on_path) if on_path else None,
        source=source,
    )


def _fetch(url: str, timeout: float) -> Iterator[bytes]:
    """Yield the body of ``url`` in pieces; raises OSError where it cannot be had."""
    with urllib.request.urlopen(url, timeout=timeout) as response:  # noqa: S310 - only the https literals below
        while piece := response.read(1 << 20):
            yield piece


def _text(fetch: Fetch, url: str) -> str:
    try:
        return b"".join(fetch(url, _CONNECT_SECONDS)).decode()
    except (OSError, urllib.error.URLError) as error:
        raise SourceUnavailableError(f"{url} cannot be reached ({error})") from error


def _download(fetch: Fetch, url: str, sha256: str, to: Path, progress: Progress) -> None:
    digest = hashlib.sha256()
    begun = told = time.monotonic()
    size = 0
    progress(f"downloading {url}")
    try:
        with to.open("wb") as out:
            for piece in fetch(url, _READ_SECONDS):
                digest.update(piece)
                out.write(piece)
                size += len(piece)
                if time.monotonic() - told >= 10:
                    told = time.monotonic()
                    progress(f"downloading {to.name}: {size >> 20} MiB, {told - begun:.0f} s")
    except (OSError, urllib.error.URLError) as error:
        raise SourceUnavailableError(f"{url} broke off after {size >> 20} MiB ({error})") from error
    if digest.hexdigest() != sha256:
        to.unlink()
        raise ChecksumError(
            f"{url} has SHA-256 {digest.hexdigest()}, published is {sha256}: not used. Try again, or set "
            "SERVINGTIERS_CONTROLPLANE_SOURCE=build to build the programs with Go instead"
        )
    to.chmod(0o755)


def _from_download(folder: Path, progress: Progress, fetch: Fetch) -> None:
    """Fill ``folder`` with the official, checksum-verified binaries."""
    system, architecture = _platform()
    if system != "linux":
        raise SourceUnavailableError(f"no official control-plane binaries exist for {system}")
    site = f"https://dl.k8s.io/release/{KUBERNETES_VERSION}/bin/{system}/{architecture}"
    etcd_name = f"etcd-{ETCD_VERSION}-{system}-{architecture}"
    etcd_site = f"https://github.com/etcd-io/etcd/releases/download/{ETCD_VERSION}"
    # All checksums first: they are tiny, and an unreachable site is found out in seconds.
    sums = {name: _text(fetch, f"{site}/{name}.sha256").split()[0] for name in (*_REQUIRED[1:], *_OPTIONAL)}
    etcd_sums: dict[str, str] = {}
    for line in _text(fetch, f"{etcd_site}/SHA256SUMS").splitlines():
        digest, name = line.split()
        etcd_sums[name] = digest
    for name, sha256 in sums.items():
        _download(fetch, f"{site}/{name}", sha256, folder / name, progress)
    archive = folder / f"{etcd_name}.tar.gz"
    _download(fetch, f"{etcd_site}/{archive.name}", etcd_sums[archive.name], archive, progress)
    with tarfile.open(archive) as tar, (folder / "etcd").open("wb") as out:
        member = tar.extractfile(f"{etcd_name}/etcd")
        if member is None:
            raise SourceUnavailableError(f"{archive.name} holds no etcd")
        shutil.copyfileobj(member, out)
    (folder / "etcd").chmod(0o755)
    archive.unlink()


def _from_build(folder: Path, progress: Progress) -> None:
    """Fill ``folder`` by a Go build of the pinned module."""
    go = shutil.which("go")
    if go is None:
        raise SourceUnavailableError("Go is not installed")
    minor = KUBERNETES_VERSION.split(".")[1]
    stamp = {
        "gitVersion": KUBERNETES_VERSION,
        "gitMajor": "1",
        "gitMinor": minor,
        "gitTreeState": "clean",
    }
    ldflags = " ".join(["-s", "-w", *(f"-X k8s.io/component-base/version.{k}={v}" for k, v in stamp.items())])
    env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    with tempfile.TemporaryDirectory(prefix="servingtiers-go-") as work:
        module = Path(work)
        for name in ("go.mod", "go.sum"):
            shutil.copyfile(_GO_MODULE / name, module / name)
        progress(
            f"building Kubernetes {KUBERNETES_VERSION} and etcd {ETCD_VERSION} with Go: "
            "once, about 5 minutes on two cores"
        )
        run_with_progress(
            [go, "mod", "download"], progress=progress, doing="fetching modules", cwd=module, env=env
        )
        packages = subprocess.run(
            [go, "list", "-deps", *_GO_PACKAGES.values()],
            cwd=module,
            env=env,
            check=False,
            capture_output=True,
            text=True,
        ).stdout.count("\n")
        kubernetes = [package for name, package in _GO_PACKAGES.items() if name != "etcd"]
        # Kubernetes' programs in one go: they share most packages and are linked side by side.
        for doing, output, wanted in (
            ("building Kubernetes", f"{folder}/", kubernetes),
            ("building etcd", str(folder / "etcd"), [_GO_PACKAGES["etcd"]]),
        ):
            run_with_progress(
                [go, "build", "-v", "-trimpath", "-ldflags", ldflags, "-o", output, *wanted],
                progress=progress,
                doing=doing,
                cwd=module,
                env=env,
                total=packages,
            )


def locate(
    *,
    cache: Path | None = None,
    sources: Sequence[str] | None = None,
    progress: Progress = say,
    fetch: Fetch = _fetch,
    build: Callable[[Path, Progress], None] = _from_build,
) -> Binaries:
    """Return the control-plane programs, downloading or building them into the cache where need be.

    Args:
        cache: Cache folder; the user's by default.
        sources: Which of ``download`` and ``build`` may be tried, in this order;
            ``$SERVINGTIERS_CONTROLPLANE_SOURCE`` (one of them) or both by default.
        progress: Receives a line at least every ten seconds of waiting.
        fetch: Yields the bytes of a URL (a test's stand-in).
        build: Fills a folder by building (a test's stand-in).

    Raises:
        ChecksumError: A download is not what its publisher says; nothing is used of it.
        BinariesError: No source can deliver; the message says what would help.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets:
        lacking = _missing(Path(assets))
        if not lacking:
            return _of(Path(assets), f"KUBEBUILDER_ASSETS={assets}")
        progress(f"KUBEBUILDER_ASSETS={assets} lacks {', '.join(lacking)}: looking further")
    system, architecture = _platform()
    root = (cache or cache_folder()) / "controlplane"
    folder = root / f"{KUBERNETES_VERSION}-etcd-{ETCD_VERSION}-{system}-{architecture}"
    if not _missing(folder):
        return _of(folder, "cache")
    forced = os.environ.get("SERVINGTIERS_CONTROLPLANE_SOURCE")
    chosen = tuple(sources) if sources is not None else (forced,) if forced else _SOURCES
    if unknown := [name for name in chosen if name not in _SOURCES]:
        raise BinariesError(f"SERVINGTIERS_CONTROLPLANE_SOURCE is {unknown[0]!r}: use download or build")
    ways: dict[str, Callable[[Path], None]] = {
        "download": lambda to: _from_download(to, progress, fetch),
        "build": lambda to: build(to, progress),
    }
    with file_lock(root / ".lock", progress, "control-plane programs are being made ready"):
        if not _missing(folder):
            return _of(folder, "cache")
        failures = []
        for name in chosen:
            with tempfile.TemporaryDirectory(prefix=".making-", dir=root) as making:
                try:
                    ways[name](Path(making))
                except SourceUnavailableError as error:
                    progress(f"{name}: {error}")
                    failures.append(f"{name}: {error}")
                    continue
                if lacking := _missing(Path(making)):
                    failures.append(f"{name}: made no {', '.join(lacking)}")
                    continue
                # Published by one rename, so that nobody ever sees half a set.
                shutil.rmtree(folder, ignore_errors=True)
                ready = Path(making) / "set"
                ready.mkdir()
                for program in (*_REQUIRED, *_OPTIONAL):
                    if (Path(making) / program).exists():
                        (Path(making) / program).rename(ready / program)
                ready.rename(folder)
                return _of(folder, name)
    raise BinariesError(
        "no control-plane programs: install Go 1.26 or newer, or set KUBEBUILDER_ASSETS to a folder holding "
        f"{', '.join(_REQUIRED)} ({'; '.join(failures)})"
    )


def main() -> int:
    """Run the search and print the paths."""
    begun = time.monotonic()
    try:
        found = locate()
    except BinariesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in (*_REQUIRED, *_OPTIONAL):
        print(f"{name:24} {getattr(found, name.replace('-', '_'))}")
    print(f"{'source':24} {found.source} ({time.monotonic() - begun:.1f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
