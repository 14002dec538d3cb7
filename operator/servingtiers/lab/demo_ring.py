"""The stage of the demo: control plane, simulated GPU nodes and the operator, held by one process.

The stage is a process of its own for three reasons: engines must not share a core with the load that measures them,
Ctrl-C must reach it in order (it has no terminal), and it must be able to outlive the demo when it is to be kept.
It lives as long as its standard input is open, so it ends when the demo ends, however that happens; the word
``keep`` releases it, and then SIGTERM ends it. What it has to tell are JSON lines on standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from servingtiers.lab.binaries import BinariesError, locate
from servingtiers.lab.controlplane import ApiError, Connection, ControlPlane, ControlPlaneError
from servingtiers.lab.nodes import NodeOptions, NodeShape, SimulatedNodes
from servingtiers.lab.processes import Children, free_port
from servingtiers.lab.routers import locate_router

__all__ = ["NODES", "Ring", "RingDetails", "RingError", "RingSettings", "source_root"]

NODES = (
    NodeShape("h100-a", "NVIDIA-H100-80GB-HBM3", 8),
    NodeShape("a100-a", "NVIDIA-A100-SXM4-80GB", 8),
    NodeShape("a100-b", "NVIDIA-A100-SXM4-80GB", 8),
    NodeShape("l40s-a", "NVIDIA-L40S", 8),
    NodeShape("l40s-b", "NVIDIA-L40S", 8),
)
"""The cluster of the demo: 40 GPUs of three kinds."""
_CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_PATHS = {
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings",
}
_ACCOUNT = "servingtiers-operator"
"""The operator's service account in ``manifests/base``."""
_TOKEN_SECONDS = 7 * 86400
_STOP_SECONDS = 30.0


class RingError(RuntimeError):
    """The stage could not be set up; the message says what failed and where to look."""


def source_root() -> Path:
    """Return the checkout this package runs from, where the manifests are.

    Raises:
        RingError: The package was installed without its repository.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "manifests" / "base" / "role.yaml").exists():
        raise RingError(
            "the demo needs the repository (crds/ and manifests/): run it from a clone, make demo"
        )
    return root


@dataclass(frozen=True, slots=True)
class RingSettings:
    """How the stage differs from a real cluster, and what the operator is configured with."""

    namespace: str = "demo"
    time_factor: float = 0.1
    """Multiplies engines' start-up times."""
    prestop_factor: float = 0.1
    """Multiplies ``preStop`` sleeps."""
    interval: str = "2s"
    """Telemetry interval of the operator."""
    window: str = "12s"
    """Telemetry window of the operator."""
    simulated_router: bool = False
    """Do not use the real vllm-router."""

    def arguments(self) -> list[str]:
        """Return the command line that gives these settings."""
        return [
            f"--namespace={self.namespace}",
            f"--time-factor={self.time_factor}",
            f"--prestop-factor={self.prestop_factor}",
            f"--interval={self.interval}",
            f"--window={self.window}",
            *(["--simulated-router"] if self.simulated_router else []),
        ]


@dataclass(frozen=True, slots=True)
class RingDetails:
    """Where everything is, once it is up."""

    folder: str
    kubeconfig: str
    namespace: str
    kubectl: str | None
    router: str | None
    """The real vllm-router's program; None: the simulated one is used."""
    metrics_port: int
    health_port: int
    pids: Mapping[str, int]
    control_plane_seconds: float

    @property
    def operator_log(self) -> Path:
        """What the operator said."""
        return Path(self.folder) / "operator.log"


class Ring:
    """A handle on the stage, from the process that started it. Use it as a context manager.

    Args:
        settings: How it behaves.
        progress: Receives progress lines.
    """

    def __init__(self, settings: RingSettings, *, progress: Callable[[str], None]) -> None:
        self.settings = settings
        self._progress = progress
        self._process: subprocess.Popen[str] | None = None
        self._details: RingDetails | None = None
        self._kept = False

    @property
    def pid(self) -> int:
        """Process id of the stage; SIGTERM stops all of it."""
        if self._process is None:
            raise RingError("the stage is not started: use `with Ring(...)`")
        return self._process.pid

    @property
    def details(self) -> RingDetails:
        """Where everything is."""
        if self._details is None:
            raise RingError("the stage is not up: use `with Ring(...)`")
        return self._details

    @property
    def running(self) -> bool:
        """Whether the stage is there."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *self.settings.arguments()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self._details = self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._kept:
            self.stop()

    def _wait(self) -> RingDetails:
        for message in self._messages():
            if "progress" in message:
                self._progress(message["progress"])
            elif "failed" in message:
                raise RingError(message["failed"])
            elif "ready" in message:
                return RingDetails(**message["ready"])
        raise RingError("the stage ended before it was up; its errors are above")

    def _messages(self) -> Iterator[dict[str, Any]]:
        assert self._process is not None  # noqa: S101 - only called after the start
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message

    def keep(self) -> None:
        """Let the stage live on after this process; SIGTERM to :attr:`pid` ends it."""
        if self._process is None or self._process.stdin is None:
            raise RingError("the stage is not started: use `with Ring(...)`")
        self._process.stdin.write("keep\n")
        self._process.stdin.flush()
        self._kept = True

    def stop(self) -> None:
        """Stop everything and return when it is gone; a signal meanwhile does not cut that short."""
        if self._process is not None:
            with _undisturbed():
                self._stop(self._process)

    @staticmethod
    def _stop(process: subprocess.Popen[str]) -> None:
        # Closing its input is enough.
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        if process.poll() is None:
            # Its watchdogs stop whatever it has started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off the signals that end us for the body, which takes seconds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(signum, signal.SIG_IGN) for signum in signals]
    try:
        yield
    finally:
        for signum, handler in zip(signals, before, strict=True):
            signal.signal(signum, handler)


# -- inside the stage's process --------------------------------------------------------------------------------


def _tell(**message: object) -> None:
    # Nobody may be listening any more: the stage was kept, or its maker was killed.
    with contextlib.suppress(OSError, ValueError):
        print(json.dumps(message), flush=True)


def _progress(text: str) -> None:
    _tell(progress=text)


async def _hold(settings: RingSettings, folder: Path, children: Children, over: asyncio.Event) -> None:
    """Set the stage up, say so, and hold it until ``over``."""
    root = source_root()
    binaries = await asyncio.to_thread(locate, progress=_progress)
    router = None
    if not settings.simulated_router:
        router = await asyncio.to_thread(locate_router, progress=_progress)
    if over.is_set():
        return
    plane = ControlPlane(binaries=binaries, folder=folder / "control-plane", progress=_progress)
    try:
        await asyncio.to_thread(plane.start)
        _progress(
            f"control plane ready in {plane.ready_seconds:.1f} s (etcd, API server, controllers, scheduler)"
        )
        await asyncio.to_thread(_install, plane, root, settings.namespace)
        gpus: dict[str, int] = {}
        for shape in NODES:
            gpus[shape.product] = gpus.get(shape.product, 0) + shape.gpus
        kinds = ", ".join(f"{count}× {product}" for product, count in gpus.items())
        options = NodeOptions(
            time_factor=settings.time_factor, prestop_factor=settings.prestop_factor, router=router
        )
        (folder / "nodes").mkdir()
        async with SimulatedNodes(plane.connection(), NODES, options, folder=folder / "nodes"):
            _progress(f"{len(NODES)} simulated nodes joined: {kinds}")
            health, metrics = free_port(), free_port()
            operator = children.start(
                "operator",
                [
                    *_servingtiers(),
                    "operator",
                    f"--config={_operator_config(root, folder, settings)}",
                    f"--kubeconfig={folder / 'operator.kubeconfig'}",
                    f"--namespace={settings.namespace}",
                    f"--health-port={health}",
                    f"--metrics-port={metrics}",
                ],
                log=folder / "operator.log",
            )
            await _until_leading(plane.connection(), settings.namespace, operator.process, operator.tail)
            _progress(
                f"operator leads: process {operator.process.pid}, under the shipped service account and Role"
            )
            details = {
                "folder": str(folder),
                "kubeconfig": str(folder / "kubeconfig"),
                "namespace": settings.namespace,
                "kubectl": str(binaries.kubectl) if binaries.kubectl else None,
                "router": str(router) if router else None,
                "metrics_port": metrics,
                "health_port": health,
                "pids": {**plane.pids(), "operator": operator.process.pid, "stage": os.getpid()},
                "control_plane_seconds": plane.ready_seconds,
            }
            _tell(ready=details)
            await over.wait()
            # The operator goes first: it should see none of what follows.
            await asyncio.to_thread(children.stop_one, operator)
    finally:
        await asyncio.to_thread(plane.stop)


def _servingtiers() -> list[str]:
    """Return the command line's program: the one of this environment, whatever the PATH says."""
    script = Path(sys.executable).with_name("servingtiers")
    return (
        [str(script)] if script.exists() else [sys.executable, "-c", "import servingtiers.cli as c; c.main()"]
    )


def _operator_config(root: Path, folder: Path, settings: RingSettings) -> Path:
    """Write the shipped configuration with a quicker telemetry, and return the file."""
    document = yaml.safe_load((root / "manifests" / "base" / "config.yaml").read_text(encoding="utf-8"))
    document["telemetry"] |= {"source": "Scrape", "interval": settings.interval, "window": settings.window}
    path = folder / "operator-config.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def _install(plane: ControlPlane, root: Path, namespace: str) -> None:
    """Install the CRD, a namespace, and what the shipped manifests give the operator there; write kubeconfigs."""
    admin = plane.connection()
    for path in sorted((root / "crds").glob("*.yaml")):
        crd = yaml.safe_load(path.read_text(encoding="utf-8"))
        admin.request("POST", _CRD, crd)
        _established(admin, crd["metadata"]["name"])
    plane.create_namespace(namespace)
    for document in _accounts_and_rights(root, namespace):
        admin.request("POST", _PATHS[document["kind"]].format(namespace=namespace), document)
    accounts = _PATHS["ServiceAccount"].format(namespace=namespace)
    made = admin.request(
        "POST", f"{accounts}/{_ACCOUNT}/token", {"spec": {"expirationSeconds": _TOKEN_SECONDS}}
    )
    folder = plane.folder.parent
    plane.write_kubeconfig(folder / "operator.kubeconfig", made["status"]["token"], namespace=namespace)
    plane.write_kubeconfig(folder / "kubeconfig", plane.token(), namespace=namespace)


def _accounts_and_rights(root: Path, namespace: str) -> list[dict[str, Any]]:
    """Return the shipped service accounts, Roles and RoleBindings, as kustomize would put them into a namespace."""
    found = []
    for path in sorted((root / "manifests" / "base").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if document and document.get("kind") in _PATHS:
                document["metadata"]["namespace"] = namespace
                for subject in document.get("subjects", ()):
                    subject["namespace"] = namespace
                found.append(document)
    return found


def _established(admin: Connection, name: str) -> None:
    for _ in range(300):
        status = admin.request("GET", f"{_CRD}/{name}").get("status", {})
        if any(c["type"] == "Established" and c["status"] == "True" for c in status.get("conditions") or ()):
            return
        threading.Event().wait(0.1)
    raise RingError(f"the API server did not establish {name} within 30 s")


async def _until_leading(
    admin: Connection, namespace: str, process: subprocess.Popen[bytes], tail: Callable[[], str]
) -> None:
    lease = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/servingtiers-operator"
    for _ in range(600):
        if process.poll() is not None:
            raise RingError(f"the operator ended with {process.returncode}: {tail()}")
        with contextlib.suppress(ApiError):
            if (await asyncio.to_thread(admin.request, "GET", lease))["spec"].get("holderIdentity"):
                return
        await asyncio.sleep(0.1)
    raise RingError(f"the operator did not take its Lease within 60 s: {tail()}")


def _watch_input(over: Callable[[], None]) -> None:
    """Call ``over`` when standard input ends, unless it says ``keep``."""

    def follow() -> None:
        for line in sys.stdin:
            if line.strip() == "keep":
                return
        over()

    threading.Thread(target=follow, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Hold a stage until standard input ends or SIGTERM comes."""
    defaults = RingSettings()
    parser = argparse.ArgumentParser(prog="python -m servingtiers.lab.demo_ring", description=main.__doc__)
    parser.add_argument("--namespace", default=defaults.namespace)
    parser.add_argument("--time-factor", type=float, default=defaults.time_factor)
    parser.add_argument("--prestop-factor", type=float, default=defaults.prestop_factor)
    parser.add_argument("--interval", default=defaults.interval)
    parser.add_argument("--window", default=defaults.window)
    parser.add_argument("--simulated-router", action="store_true")
    settings = RingSettings(**vars(parser.parse_args(arguments)))
    folder = Path(tempfile.mkdtemp(prefix="servingtiers-demo-"))
    logging.basicConfig(
        filename=folder / "stage.log", level=logging.WARNING, format="%(asctime)s %(name)s %(message)s"
    )

    async def run() -> int:
        over = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, over.set)

        def end() -> None:
            loop.call_soon_threadsafe(over.set)

        _watch_input(end)
        with Children() as children:
            children.remove_when_orphaned(folder)
            try:
                await _hold(settings, folder, children, over)
            except (RingError, BinariesError, ControlPlaneError, ApiError, OSError) as error:
                _tell(failed=" ".join(str(error).split()))
                return 1
        return 0

    try:
        return asyncio.run(run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
