"""The programs of the node: found, or installed and built once into the cache.

Control-plane programs come from :mod:`servingtiers.lab.binaries`; here are the ones that only a real node needs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onenode.places import Places
from servingtiers.lab.binaries import (
    KUBERNETES_VERSION,
    Binaries,
    file_lock,
    locate,
    run_with_progress,
)
from servingtiers.lab.go_programs import HELM, ProgramUnavailableError, locate_program
from servingtiers.lab.routers import locate_router

__all__ = [
    "COREDNS_VERSION",
    "KEDA_VERSION",
    "Programs",
    "ProgramsError",
    "engine",
    "helm",
    "keda",
    "made",
    "prepare",
    "router",
    "say",
]

COREDNS_VERSION = "v1.15.0"
PROMETHEUS_VERSION = "v0.316.0"
"""Module version of Prometheus 3.16."""
KEDA_VERSION = "v2.21.0"
"""As ``rival/gotools/go.mod`` locks it."""
ENGINE_REQUIREMENTS = Path(__file__).parent / "requirements" / "engine.txt"

_FIT_ENGINE = Path(__file__).parent.parent / "images" / "fit_engine.py"
_MODULE = Path(__file__).parent.parent / "gotools"
_KEDA_MODULE = Path(__file__).parent.parent / "rival" / "gotools"
_PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "socat": "socat",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "gcc": "gcc",
    "nsenter": "util-linux",
    "ip": "iproute2",
}
"""Program to the Debian package that holds it."""
_CNI = Path("/usr/lib/cni/bridge")


class ProgramsError(RuntimeError):
    """A program cannot be had; the message says what would help."""


@dataclass(frozen=True, slots=True)
class Programs:
    """Paths of the programs."""

    control_plane: Binaries
    kubelet: Path
    kube_proxy: Path
    coredns: Path


def say(message: str) -> None:
    """Print one progress line to standard error."""
    print(f"[e2e] {message}", file=sys.stderr, flush=True)


@contextmanager
def _no_services() -> Iterator[None]:
    """Keep packages from starting their services: the host must not get a containerd or Prometheus of its own."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def _debian_packages() -> None:
    lacking = {package for program, package in _PACKAGES.items() if shutil.which(program) is None}
    if not _CNI.exists():
        lacking.add("containernetworking-plugins")
    if not lacking:
        return
    if shutil.which("apt-get") is None:
        raise ProgramsError(f"not on this machine: {', '.join(sorted(lacking))}; install them by hand")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with _no_services():
        run_with_progress(["apt-get", "update", "-q"], progress=say, doing="apt-get update", env=env)
        run_with_progress(
            ["apt-get", "install", "-y", "-q", "--no-install-recommends", *sorted(lacking)],
            progress=say,
            doing=f"installing {', '.join(sorted(lacking))}",
            env=env,
        )


def made(folder: Path, what: str, make: Callable[[Path], None]) -> Path:
    """Return ``folder``, made by ``make`` in a scratch folder beside it when it is not there yet."""
    if folder.exists():
        return folder
    with file_lock(folder.parent / f".{folder.name}.lock", say, what):
        if folder.exists():
            return folder
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
            target = Path(scratch) / "made"
            target.mkdir()
            make(target)
            # Published by one rename, so that nobody ever sees half of it.
            target.rename(folder)
        say(f"{what}: {time.monotonic() - begun:.0f} s")
    return folder


def _go() -> str:
    go = shutil.which("go")
    if go is None:
        raise ProgramsError("Go is not installed: install Go 1.26 or newer")
    return go


def _build_node_programs(to: Path) -> None:
    stamp = {
        "gitVersion": KUBERNETES_VERSION,
        "gitMajor": "1",
        "gitMinor": KUBERNETES_VERSION.split(".")[1],
        "gitTreeState": "clean",
    }
    ldflags = " ".join(["-s", "-w", *(f"-X k8s.io/component-base/version.{k}={v}" for k, v in stamp.items())])
    run_with_progress(
        [
            *(_go(), "build", "-v", "-trimpath", "-ldflags", ldflags, "-o", f"{to}/"),
            *("k8s.io/kubernetes/cmd/kubelet", "k8s.io/kubernetes/cmd/kube-proxy"),
        ],
        progress=say,
        doing="building kubelet and kube-proxy",
        cwd=_MODULE,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"},
    )


def _go_install(package: str, to: Path, *tags: str) -> None:
    run_with_progress(
        [_go(), "install", "-v", "-trimpath", f"-tags={','.join(tags)}", "-ldflags", "-s -w", package],
        progress=say,
        doing=f"building {package}",
        cwd=to,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false", "GOBIN": str(to)},
    )


def prepare(places: Places) -> Programs:
    """Return every program of control plane and node; minutes the first time, nothing after.

    Raises:
        ProgramsError: One cannot be had here.
    """
    if os.geteuid() != 0:
        raise ProgramsError("a node needs root (namespaces, mounts, cgroups): use sudo")
    places.cache.mkdir(parents=True, exist_ok=True)
    _debian_packages()
    node = made(places.cache / f"node-{KUBERNETES_VERSION}", "kubelet and kube-proxy", _build_node_programs)
    dns = made(
        places.cache / f"coredns-{COREDNS_VERSION}",
        "CoreDNS",
        lambda to: _go_install(f"github.com/coredns/coredns@{COREDNS_VERSION}", to),
    )
    return Programs(
        control_plane=locate(progress=say),
        kubelet=node / "kubelet",
        kube_proxy=node / "kube-proxy",
        coredns=dns / "coredns",
    )


def helm() -> Path:
    """Return Helm: the one on the path, or one built into the cache.

    Raises:
        ProgramsError: It cannot be had.
    """
    try:
        return locate_program(HELM, progress=say)
    except ProgramUnavailableError as error:
        raise ProgramsError(str(error)) from error


def prometheus(places: Places) -> Path:
    """Return the folder of Prometheus, built with no discovery but Kubernetes'."""
    return made(
        places.cache / f"prometheus-{PROMETHEUS_VERSION}",
        "Prometheus",
        lambda to: _go_install(
            f"github.com/prometheus/prometheus/cmd/prometheus@{PROMETHEUS_VERSION}",
            to,
            *("remove_all_sd", "enable_kubernetes_sd", "netgo"),
        ),
    )


def _build_keda(to: Path) -> None:
    package = "github.com/kedacore/keda/v2"
    env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    ldflags = f"-s -w -X {package}/version.Version={KEDA_VERSION.removeprefix('v')}"
    for program, name in (("operator", "keda"), ("adapter", "keda-adapter")):
        run_with_progress(
            [
                *(_go(), "build", "-v", "-trimpath", "-ldflags", ldflags, "-o", str(to / name)),
                f"{package}/cmd/{program}",
            ],
            progress=say,
            doing=f"building KEDA's {program}",
            cwd=_KEDA_MODULE,
            env=env,
        )
    where = [_go(), "list", "-m", "-f", "{{.Version}} {{.Dir}}", package]
    listed = subprocess.run(where, check=True, capture_output=True, text=True, cwd=_KEDA_MODULE, env=env)
    version, folder = listed.stdout.split()
    if version != KEDA_VERSION:
        raise ProgramsError(f"{_KEDA_MODULE}/go.mod locks KEDA {version}, not {KEDA_VERSION}")
    # Its own manifests, of the same version as the programs.
    shutil.copytree(Path(folder) / "config", to / "config", copy_function=shutil.copyfile)
    for path in (to / "config").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def keda(places: Places) -> Path:
    """Return the folder of KEDA's operator, metrics adapter and manifests: some ten minutes the first time."""
    return made(places.cache / f"keda-{KEDA_VERSION}", "KEDA", _build_keda)


# --- Python programs --------------------------------------------------------------------------------------------


def _uv() -> list[str]:
    return [sys.executable, "-m", "uv"]


def _environment(folder: Path, requirements: Path, what: str) -> None:
    """Make a virtual environment from locked requirements.

    The lock is the whole set: ``--no-deps`` lets it hold a PyTorch that the engine's own metadata refuses.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    run_with_progress(
        [
            *(
                *_uv(),
                "pip",
                "install",
                "--no-deps",
                "--compile-bytecode",
                "--python",
                str(folder / "bin" / "python"),
            ),
            *("--require-hashes", "-r", str(requirements)),
        ],
        progress=say,
        doing=f"installing {what}",
    )


def engine(places: Places) -> Path:
    """Return the virtual environment of the CPU engine (about 6 GB, for the CUDA libraries PyPI's PyTorch needs)."""

    def make(to: Path) -> None:
        _environment(to, ENGINE_REQUIREMENTS, "vLLM for CPU")

    found = made(places.engine, "vLLM for CPU", make)
    site = next((found / "lib").glob("python3*")) / "site-packages"
    subprocess.run([sys.executable, str(_FIT_ENGINE), str(site)], check=True)
    return found


def router() -> Path:
    """Return the virtual environment of vllm-router.

    Raises:
        ProgramsError: It cannot be installed here.
    """
    program = locate_router(progress=say)
    if program is None:
        raise ProgramsError("vllm-router cannot be installed: is the package index reachable?")
    return program.parent.parent
