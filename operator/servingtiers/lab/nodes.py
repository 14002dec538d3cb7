"""Simulated GPU nodes: what a kubelet does for the API server, with engines that compute nothing.

The real scheduler binds pods to these nodes by their ``nvidia.com/gpu`` capacity and labels (and leaves them
Pending when the GPUs are out); this module then plays the kubelet: pod addresses, container states, probes over
real HTTP, restarts, ``preStop``, grace periods, final deletion. What runs inside a pod depends on its command:

* ``vllm serve …`` becomes a :class:`~servingtiers.lab.engines.SimulatedEngine` at the pod's own loopback address;
* ``vllm-router …`` becomes the **real** vllm-router process where it can be had, with the pod's arguments and a
  token of the pod's own service account, else a :class:`~servingtiers.lab.simulated_router.SimulatedRouter`;
* anything else is a container that runs and does nothing.

Pod addresses are in 127.0.0.0/8, so several rings on one machine stay apart by their second octet.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Protocol, Self

import aiohttp

from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.names import CatalogError
from servingtiers.lab.controlplane import ApiError, Connection
from servingtiers.lab.engines import EngineConfig, EngineState, LabStepModel, SimulatedEngine
from servingtiers.lab.kube import STRATEGIC, Kube
from servingtiers.lab.processes import Child, Children
from servingtiers.lab.simulated_router import SimulatedRouter
from servingtiers.render.engine import FIRST_COMPLETION

__all__ = ["NodeOptions", "NodeShape", "SimulatedNodes", "default_start_seconds", "expand"]

logger = logging.getLogger(__name__)

_ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - recognised in a pod's arguments, never bound
_HEARTBEAT_SECONDS = 10.0
_RESTART_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Back-off between restarts of a container (a kubelet begins at 10 s and ends at 5 min)."""


@dataclass(frozen=True, slots=True)
class NodeShape:
    """One simulated node."""

    name: str
    product: str = "NVIDIA-H100-80GB-HBM3"
    """Value of the label ``nvidia.com/gpu.product`` and the accelerator that engines on it simulate."""
    gpus: int = 8
    cpus: int = 128
    memory_gib: int = 1024
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: Sequence[Mapping[str, str]] = ()
    """For example ``({"key": "lab", "value": "a", "effect": "NoSchedule"},)``, to keep tests apart."""
    resource: str = "nvidia.com/gpu"


def default_start_seconds(config: EngineConfig) -> float:
    """Return how long a real engine of this kind takes to start with its weights on a local disk, seconds.

    About 35 s of process start, compilation and CUDA graphs, and the weights at 2 GB/s: an 8B in 16 bits takes
    43 s, a 70B on four GPUs 105 s, inside the range public reports give (30 s to a few minutes).
    """
    steps = config.steps
    weights = steps.shape.weight_bytes(steps.weights) if isinstance(steps, LabStepModel) else 16e9
    return 35.0 + weights / 2e9


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How the nodes behave."""

    time_factor: float = 1.0
    """Multiplies start-up and image-pull times; 0.1 makes a 43 s start take 4.3 s."""
    start_seconds: Callable[[EngineConfig], float] = default_start_seconds
    """Start-up time of an engine before ``time_factor``."""
    pull_seconds: float = 1.0
    """Image pull of every pod, before ``time_factor``."""
    prestop_factor: float = 1.0
    """Multiplies ``preStop`` sleeps; 1 honours them."""
    slow_factor: Callable[[str, str], float] = lambda _namespace, _pod: 1.0
    """Step-time multiplier by namespace and pod name: an engine that is slower than its kind."""
    router: Path | None = None
    """The real vllm-router program; None: the simulated one."""


def expand(text: str, values: Mapping[str, str]) -> str:
    """Expand ``$(NAME)`` as Kubernetes does: unknown names stay as they are, ``$$(NAME)`` is an escape."""

    def replaced(match: re.Match[str]) -> str:
        if match.group(0) == "$$":
            return "$"
        return values.get(match.group(1), match.group(0))

    return re.sub(r"\$\$|\$\(([^)]+)\)", replaced, text)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class _MissingReferenceError(RuntimeError):
    """A ConfigMap or Secret that a container names is not there."""


class _Workload(Protocol):
    """What runs in a container."""

    async def start(self) -> None: ...

    async def terminate(self) -> None: ...

    async def kill(self) -> None: ...

    def running(self) -> bool: ...


class _Idle:
    """A container that runs and does nothing."""

    async def start(self) -> None: ...

    async def terminate(self) -> None: ...

    async def kill(self) -> None: ...

    def running(self) -> bool:
        return True


class _Engine:
    """A container with a simulated engine. Its start-up runs beside the probes, as in a real pod."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._starting = asyncio.create_task(self.engine.start())

    async def terminate(self) -> None:
        await self._stop_starting()
        await self.engine.terminate()

    async def kill(self) -> None:
        await self._stop_starting()
        await self.engine.kill()

    async def _stop_starting(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])

    def running(self) -> bool:
        if self._starting is not None and self._starting.done() and not self._starting.cancelled():
            failure = self._starting.exception()
            if failure is not None:
                logger.error("simulated engine did not start: %s", failure)
                return False
        return self.engine.state is not EngineState.STOPPED


class _Process:
    """A container that is a real process."""

    def __init__(
        self, children: Children, name: str, command: Sequence[str], env: Mapping[str, str], log: Path
    ) -> None:
        self._children, self._name, self._command, self._env, self._log = children, name, command, env, log
        self.child: Child | None = None

    async def start(self) -> None:
        self.child = self._children.start(self._name, self._command, log=self._log, env=self._env)

    async def _stop(self, signum: int) -> None:
        if self.child is not None:
            await asyncio.to_thread(self._children.stop_one, self.child, signum=signum)

    async def terminate(self) -> None:
        if self.child is not None and self.child.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.process.pid, signal.SIGTERM)
            while self.child.running:  # noqa: ASYNC110 - a child of Popen rings no asyncio event
                await asyncio.sleep(0.05)
            await self._stop(signal.SIGTERM)

    async def kill(self) -> None:
        await self._stop(signal.SIGKILL)

    def running(self) -> bool:
        return self.child is not None and self.child.running


class _Container:
    """One container of a pod: its workload, probes and state."""

    def __init__(self, pod: _Pod, spec: Mapping[str, Any]) -> None:
        self.pod = pod
        self.spec = spec
        self.name: str = spec["name"]
        self.workload: _Workload | None = None
        self.waiting: str | None = "ContainerCreating"
        self.started_at: str | None = None
        self.started = False
        self.ready = False
        self.restarts = 0

    def status(self) -> dict[str, Any]:
        """Return the container's status."""
        if self.waiting is not None:
            state: dict[str, Any] = {"waiting": {"reason": self.waiting}}
        else:
            state = {"running": {"startedAt": self.started_at}}
        return {
            "name": self.name,
            "image": self.spec["image"],
            "imageID": f"simulated://{self.spec['image']}",
            "containerID": f"simulated://{self.pod.uid}/{self.name}/{self.restarts}",
            "state": state,
            "started": self.started,
            "ready": self.ready,
            "restartCount": self.restarts,
        }

    async def run(self) -> None:
        """Start the workload, probe it, and restart it when it ends; for ever."""
        while True:
            try:
                self.workload = await self.pod.nodes.make_workload(self.pod, self.spec)
            except _MissingReferenceError as error:
                logger.warning("%s: %s", self.pod, error)
                self.waiting = "CreateContainerConfigError"
                await self.pod.report()
                await asyncio.sleep(1.0)
                continue
            except (CatalogError, ValueError) as error:
                logger.warning("%s: %s", self.pod, error)
                self.waiting = "CrashLoopBackOff"
                self.restarts += 1
                await self.pod.report()
                await asyncio.sleep(5.0)
                continue
            await self.workload.start()
            self.waiting, self.started_at = None, _now()
            self.started = "startupProbe" not in self.spec
            self.ready = self.started and "readinessProbe" not in self.spec
            await self.pod.report()
            probes = asyncio.create_task(self._probe())
            try:
                while self.workload.running() and not probes.done():  # noqa: ASYNC110 - may be a process
                    await asyncio.sleep(0.2)
            finally:
                probes.cancel()
                await asyncio.wait([probes])
            await self.workload.kill()
            self.started = self.ready = False
            self.waiting = "CrashLoopBackOff"
            pause = _RESTART_SECONDS[min(self.restarts, len(_RESTART_SECONDS) - 1)]
            self.restarts += 1
            await self.pod.report()
            await asyncio.sleep(pause)

    async def _probe(self) -> None:
        """Probe until a start-up or liveness probe has failed for good."""
        if not self.started:
            if not await self._started_up(self.spec["startupProbe"]):
                logger.warning("%s: the start-up probe of %s failed", self.pod, self.name)
                return
            self.started = True
            if "readinessProbe" not in self.spec:
                self.ready = True
            await self.pod.report()
        loops = []
        if "readinessProbe" in self.spec:
            loops.append(asyncio.create_task(self._readiness(self.spec["readinessProbe"])))
        if "livenessProbe" in self.spec:
            loops.append(asyncio.create_task(self._liveness(self.spec["livenessProbe"])))
        if not loops:
            await asyncio.Event().wait()
        try:
            await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.wait(loops)

    async def _started_up(self, probe: Mapping[str, Any]) -> bool:
        """Probe until a success (True) or until the failure threshold is reached (False)."""
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        failures = 0
        while True:
            if await self._once(probe):
                return True
            failures += 1
            if failures >= probe.get("failureThreshold", 3):
                return False
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _readiness(self, probe: Mapping[str, Any]) -> None:
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        successes = failures = 0
        while True:
            if await self._once(probe):
                successes, failures = successes + 1, 0
                ready = self.ready or successes >= probe.get("successThreshold", 1)
            else:
                successes, failures = 0, failures + 1
                ready = self.ready and failures < probe.get("failureThreshold", 3)
            if ready != self.ready:
                self.ready = ready
                await self.pod.report()
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _liveness(self, probe: Mapping[str, Any]) -> None:
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        failures = 0
        while failures < probe.get("failureThreshold", 3):
            failures = 0 if await self._once(probe) else failures + 1
            await asyncio.sleep(probe.get("periodSeconds", 10))
        logger.warning("%s: the liveness probe of %s failed", self.pod, self.name)

    async def _once(self, probe: Mapping[str, Any]) -> bool:
        if FIRST_COMPLETION in probe.get("exec", {}).get("command", ()):
            return await self._completed(probe)
        get = probe.get("httpGet")
        if get is None:
            return True  # other probes are taken as passed: nothing rendered here uses them
        port = get["port"]
        if isinstance(port, str):
            port = next(
                (p["containerPort"] for p in self.spec.get("ports", []) if p.get("name") == port), None
            )
        url = f"http://{get.get('host') or self.pod.address}:{port}{get.get('path', '/')}"
        timeout = aiohttp.ClientTimeout(total=probe.get("timeoutSeconds", 1))
        try:
            async with self.pod.nodes.probes.get(url, timeout=timeout, allow_redirects=False) as answer:
                return 200 <= answer.status < 400
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _completed(self, probe: Mapping[str, Any]) -> bool:
        """Ask what the probe's program asks: no program runs in a simulated container."""
        name, port, seconds = probe["exec"]["command"][-3:]
        body = {"model": expand(name, {}), "prompt": "Hello", "max_tokens": 2, "ignore_eos": True}
        url = f"http://{self.pod.address}:{port}/v1/completions"
        timeout = aiohttp.ClientTimeout(total=float(seconds))
        try:
            async with self.pod.nodes.probes.post(url, json=body, timeout=timeout) as answer:
                return answer.status == 200 and bool((await answer.json())["choices"])
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return False

    async def stop(self, deadline: float) -> None:
        """Run ``preStop``, then end the workload; it is killed at ``deadline`` (loop time)."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await asyncio.sleep(self._prestop_seconds() * self.pod.nodes.options.prestop_factor)
                if self.workload is not None:
                    await self.workload.terminate()
        if self.workload is not None:
            if self.workload.running() and loop.time() >= deadline:
                logger.info("%s: killed after its grace period", self.pod)
            await self.workload.kill()

    def _prestop_seconds(self) -> float:
        hook = (self.spec.get("lifecycle") or {}).get("preStop") or {}
        if "sleep" in hook:
            return float(hook["sleep"]["seconds"])
        command = " ".join((hook.get("exec") or {}).get("command", []))
        found = re.search(r"\bsleep (\d+)", command)
        return float(found.group(1)) if found else 0.0


class _Pod:
    """One pod bound to a simulated node."""

    def __init__(
        self, nodes: SimulatedNodes, document: Mapping[str, Any], node: NodeShape, address: str
    ) -> None:
        self.nodes = nodes
        self.document = document
        self.node = node
        self.address = address
        self.namespace: str = document["metadata"]["namespace"]
        self.name: str = document["metadata"]["name"]
        self.uid: str = document["metadata"]["uid"]
        self.containers = [_Container(self, spec) for spec in document["spec"]["containers"]]
        self.initialized = not document["spec"].get("initContainers")
        self.phase = "Pending"
        self.terminating = asyncio.Event()
        self.gone = asyncio.Event()
        self._changed = asyncio.Event()
        self._transitions: dict[str, tuple[str, str]] = {}
        self._begun = _now()

    def __str__(self) -> str:
        return f"pod {self.namespace}/{self.name}"

    @property
    def path(self) -> str:
        return f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"

    async def report(self) -> None:
        """Have the status written soon; several changes at once become one write."""
        self._changed.set()

    def _condition(self, kind: str, *, holds: bool, reason: str | None = None) -> dict[str, Any]:
        status = "True" if holds else "False"
        last, since = self._transitions.get(kind, ("", ""))
        if last != status:
            since = _now()
            self._transitions[kind] = (status, since)
        condition: dict[str, Any] = {"type": kind, "status": status, "lastTransitionTime": since}
        condition["reason"] = reason if reason and not holds else None
        return condition

    def _status(self) -> dict[str, Any]:
        ready = all(container.ready for container in self.containers) and not self.terminating.is_set()
        unready = "PodTerminating" if self.terminating.is_set() else "ContainersNotReady"
        return {
            "phase": self.phase,
            "hostIP": self.nodes.host_address,
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "startTime": self._begun,
            "conditions": [
                self._condition("PodReadyToStartContainers", holds=True),
                self._condition("Initialized", holds=self.initialized),
                self._condition("ContainersReady", holds=ready, reason=unready),
                self._condition("Ready", holds=ready, reason=unready),
            ],
            "containerStatuses": [container.status() for container in self.containers],
        }

    async def _write_status(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            body = {"metadata": {"uid": self.uid}, "status": self._status()}
            try:
                await self.nodes.kube.patch(f"{self.path}/status", body, STRATEGIC)
            except ApiError as error:
                if error.status in {404, 409, 422}:
                    return  # gone, or another pod of the same name
                await asyncio.sleep(0.5)
                self._changed.set()
            except (aiohttp.ClientError, TimeoutError, OSError):
                await asyncio.sleep(0.5)
                self._changed.set()

    async def run(self) -> None:
        """Play the pod's whole life."""
        writer = asyncio.create_task(self._write_status())
        life = asyncio.create_task(self._live())
        ends = [asyncio.create_task(event.wait()) for event in (self.terminating, self.gone)]
        try:
            await asyncio.wait([life, *ends], return_when=asyncio.FIRST_COMPLETED)
            if life.done() and not life.cancelled() and (failure := life.exception()):
                logger.error("%s: %s", self, failure, exc_info=failure)
            if self.terminating.is_set() and not self.gone.is_set():
                await self._terminate(ends[1])
        finally:
            for task in (life, writer, *ends):
                task.cancel()
            await asyncio.gather(life, writer, *ends, return_exceptions=True)
            for container in self.containers:
                if container.workload is not None:
                    await container.workload.kill()
            self.nodes.forget(self)

    async def _live(self) -> None:
        await self.report()
        options = self.nodes.options
        await asyncio.sleep(options.pull_seconds * options.time_factor)
        if not self.initialized:
            await asyncio.sleep(options.pull_seconds * options.time_factor)
            self.initialized = True
            await self.report()
        self.phase = "Running"
        async with asyncio.TaskGroup() as group:
            for container in self.containers:
                group.create_task(container.run())

    async def _terminate(self, gone: asyncio.Task[bool]) -> None:
        """Stop gracefully and remove the object, unless somebody removes it first."""
        grace = self.document["metadata"].get("deletionGracePeriodSeconds", 30)
        await self.report()
        deadline = asyncio.get_running_loop().time() + max(float(grace), 0.01)
        stops = (container.stop(deadline) for container in self.containers)
        stop: asyncio.Future[Any] = asyncio.gather(*stops)
        ends: list[asyncio.Future[Any]] = [stop, gone]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            stop.cancel()
            return
        while not self.gone.is_set():
            try:
                await self.nodes.kube.delete(self.path, grace=0, uid=self.uid)
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                logger.debug("%s: %s", self, error)
                await asyncio.sleep(0.5)
            else:
                return


class SimulatedNodes:
    """A set of simulated nodes of one control plane; an async context manager.

    Args:
        connection: The API server, as administrator.
        shapes: The nodes.
        options: How they behave.
        folder: Where logs and kubeconfigs of real processes go; a temporary folder by default.
    """

    def __init__(
        self,
        connection: Connection,
        shapes: Sequence[NodeShape],
        options: NodeOptions | None = None,
        *,
        folder: Path | None = None,
    ) -> None:
        self.shapes = {shape.name: shape for shape in shapes}
        self.options = options or NodeOptions()
        self.kube = Kube(connection)
        self._connection = connection
        self._given_folder = folder
        self.folder = Path()
        self._children = Children()
        self._pods: dict[str, _Pod] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._background: list[asyncio.Task[None]] = []
        self._peers: dict[str, SimulatedEngine] = {}
        self._octet_lock: IO[str] | None = None
        self._octet = 0
        self._next_address = 256  # .0.x is left to the nodes themselves
        self._probes: aiohttp.ClientSession | None = None
        self._tokens: dict[tuple[str, str], Path] = {}

    # -- life ---------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Register the nodes and begin to run what is bound to them."""
        self.folder = self._given_folder or Path(tempfile.mkdtemp(prefix="servingtiers-nodes-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_octet()
        await self.kube.__aenter__()
        self._probes = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
        for shape in self.shapes.values():
            await self._register(shape)
        self._background = [
            asyncio.create_task(self._follow_pods()),
            asyncio.create_task(self._heartbeats()),
        ]

    async def stop(self) -> None:
        """Kill everything that runs, and remove the nodes."""
        for task in (*self._background, *self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._background, *self._tasks.values(), return_exceptions=True)
        for shape in self.shapes.values():
            with contextlib.suppress(ApiError, aiohttp.ClientError, TimeoutError, OSError):
                await self.kube.delete(f"/api/v1/nodes/{shape.name}")
        if self._probes is not None:
            await self._probes.close()
        await self.kube.__aexit__()
        await asyncio.to_thread(self._children.stop, grace=2.0)
        if self._octet_lock is not None:
            self._octet_lock.close()
        if self._given_folder is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _take_octet(self) -> None:
        """Take a second octet of 127.0.0.0/8 that no other ring on this machine uses."""
        locks = Path(tempfile.gettempdir()) / "servingtiers-addresses"
        locks.mkdir(exist_ok=True)
        for octet in range(64, 224):
            handle = (locks / str(octet)).open("a")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.close()
                continue
            self._octet_lock, self._octet = handle, octet
            return
        raise RuntimeError("all simulated address ranges are in use: stop other laboratories on this machine")

    @property
    def host_address(self) -> str:
        """Address of the nodes themselves."""
        return f"127.{self._octet}.0.1"

    @property
    def probes(self) -> aiohttp.ClientSession:
        """HTTP session of the probes."""
        if self._probes is None:
            raise RuntimeError("the simulated nodes are not started: use `async with SimulatedNodes(...)`")
        return self._probes

    # -- looking in ---------------------------------------------------------------------------------------

    @property
    def engines(self) -> dict[tuple[str, str], SimulatedEngine]:
        """Return the running simulated engines by namespace and pod name, for faults and assertions."""
        found = {}
        for pod in self._pods.values():
            for container in pod.containers:
                if isinstance(container.workload, _Engine):
                    found[pod.namespace, pod.name] = container.workload.engine
        return found

    def pod_count(self) -> int:
        """Return how many pods are on the nodes."""
        return len(self._pods)

    # -- nodes --------------------------------------------------------------------------------------------

    def _node_status(self, shape: NodeShape) -> dict[str, Any]:
        resources = {
            "cpu": str(shape.cpus),
            "memory": f"{shape.memory_gib}Gi",
            "ephemeral-storage": "2Ti",
            "pods": "250",
            shape.resource: str(shape.gpus),
        }
        now = _now()
        healthy = {"lastHeartbeatTime": now, "lastTransitionTime": now}
        return {
            "capacity": resources,
            "allocatable": resources,
            "addresses": [
                {"type": "InternalIP", "address": self.host_address},
                {"type": "Hostname", "address": shape.name},
            ],
            "conditions": [
                {"type": "Ready", "status": "True", "reason": "Simulated", **healthy},
                {"type": "MemoryPressure", "status": "False", "reason": "Simulated", **healthy},
                {"type": "DiskPressure", "status": "False", "reason": "Simulated", **healthy},
                {"type": "PIDPressure", "status": "False", "reason": "Simulated", **healthy},
            ],
            "nodeInfo": {
                "kubeletVersion": "v0.0.0-simulated",
                "kubeProxyVersion": "",
                "containerRuntimeVersion": "simulated://0",
                "osImage": "simulated node of the ServingTiers laboratory",
                "operatingSystem": "linux",
                "architecture": "amd64",
                "kernelVersion": "",
                "machineID": "",
                "systemUUID": "",
                "bootID": "",
            },
        }

    async def _register(self, shape: NodeShape) -> None:
        labels = {
            "kubernetes.io/hostname": shape.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            "nvidia.com/gpu.product": shape.product,
            "nvidia.com/gpu.count": str(shape.gpus),
            "nvidia.com/gpu.memory": str(int(accelerator(shape.product).memory_gib * 1024)),
            "nvidia.com/gpu.present": "true",
            "servingtiers.io/simulated": "true",
            **shape.labels,
        }
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": shape.name, "labels": labels},
            "spec": {"taints": [dict(taint) for taint in shape.taints]},
        }
        try:
            await self.kube.request("POST", "/api/v1/nodes", node)
        except ApiError as error:
            if error.status != 409:
                raise
        await self.kube.patch(
            f"/api/v1/nodes/{shape.name}/status", {"status": self._node_status(shape)}, STRATEGIC
        )
        # The node controller would lift this taint by itself, but only at its next round.
        await self._beat(shape)

    async def _beat(self, shape: NodeShape) -> None:
        lease = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{shape.name}"
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": shape.name, "leaseDurationSeconds": 40, "renewTime": now}
        try:
            await self.kube.patch(lease, {"spec": spec})
        except ApiError as error:
            if error.status != 404:
                raise
            body = {"metadata": {"name": shape.name, "namespace": "kube-node-lease"}, "spec": spec}
            await self.kube.request("POST", lease.rpartition("/")[0], body)

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            for shape in self.shapes.values():
                try:
                    await self._beat(shape)
                except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
                    logger.debug("heartbeat of %s: %s", shape.name, error)

    # -- pods ---------------------------------------------------------------------------------------------

    def _address(self) -> str:
        number = self._next_address
        self._next_address += 1
        if number & 0xFF in {0, 255}:
            return self._address()
        return f"127.{self._octet}.{number >> 8 & 0xFF}.{number & 0xFF}"

    async def _follow_pods(self) -> None:
        async for kind, document in self.kube.follow("/api/v1/pods"):
            shape = self.shapes.get(document["spec"].get("nodeName", ""))
            if shape is None:
                continue
            uid = document["metadata"]["uid"]
            pod = self._pods.get(uid)
            if kind == "DELETED":
                if pod is not None:
                    pod.gone.set()
                continue
            if pod is None:
                if uid in self._tasks or document.get("status", {}).get("phase") in {"Succeeded", "Failed"}:
                    continue
                pod = _Pod(self, document, shape, self._address())
                self._pods[uid] = pod
                self._tasks[uid] = asyncio.create_task(pod.run())
            pod.document = document
            if document["metadata"].get("deletionTimestamp"):
                pod.terminating.set()

    def forget(self, pod: _Pod) -> None:
        """Drop a pod whose life is over."""
        self._pods.pop(pod.uid, None)
        task = self._tasks.pop(pod.uid, None)
        if task is not None:
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception())

    async def make_workload(self, pod: _Pod, spec: Mapping[str, Any]) -> _Workload:
        """Return what a container runs.

        Raises:
            _MissingReferenceError: A ConfigMap or Secret it names is missing.
            CatalogError: An engine names a model that the catalogue does not know.
            ValueError: An engine's flag cannot be read.
        """
        env = await self._environment(pod, spec)
        command = [expand(word, env) for word in (*spec.get("command", ()), *spec.get("args", ()))]
        program = command[0].rsplit("/", 1)[-1] if command else ""
        image = spec["image"].rsplit("/", 1)[-1]
        if "vllm-router" in program or ("router" in image and "vllm" in image):
            return await self._router(pod, command, env)
        if command[:2] == ["vllm", "serve"] or "vllm-openai" in image:
            return self._engine(pod, command, env)
        return _Idle()

    def _engine(self, pod: _Pod, command: Sequence[str], env: Mapping[str, str]) -> _Engine:
        config = EngineConfig.from_command(
            command,
            accelerator_name=pod.node.product,
            env=env,
            slow_factor=self.options.slow_factor(pod.namespace, pod.name),
        )
        seconds = self.options.start_seconds(config) * self.options.time_factor
        return _Engine(SimulatedEngine(config, address=pod.address, start_seconds=seconds, peers=self._peers))

    async def _router(self, pod: _Pod, command: Sequence[str], env: Mapping[str, str]) -> _Workload:
        flags = list(command)
        while flags and not flags[0].startswith("-"):
            flags.pop(0)
        # On one machine "all addresses" would be the same address for every pod: the pod's own stands for it.
        own = [re.sub(rf"(^|=){re.escape(_ANY_ADDRESS)}$", rf"\g<1>{pod.address}", flag) for flag in flags]
        if self.options.router is None:
            return SimulatedRouter(own, address=pod.address, kube=self.kube, namespace=pod.namespace)
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "KUBECONFIG": str(await self._pod_kubeconfig(pod)),
            **env,
            "HOME": str(self.folder),
        }
        log = self.folder / f"{pod.namespace}.{pod.name}.log"
        return _Process(self._children, pod.name, [str(self.options.router), *own], environment, log)

    async def _pod_kubeconfig(self, pod: _Pod) -> Path:
        """Return a kubeconfig with a token of the pod's service account, bound to nothing else."""
        account = pod.document["spec"].get("serviceAccountName", "default")
        key = (pod.namespace, account)
        if key not in self._tokens:
            answer = await self.kube.request(
                "POST",
                f"/api/v1/namespaces/{pod.namespace}/serviceaccounts/{account}/token",
                {"spec": {"expirationSeconds": 86400}},
            )
            path = self.folder / f"{pod.namespace}.{account}.kubeconfig"
            path.touch(mode=0o600)
            cluster = {
                "server": self._connection.url,
                "certificate-authority": str(self._connection.ca_file),
            }
            context = {"cluster": "lab", "user": account, "namespace": pod.namespace}
            document = {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "lab", "cluster": cluster}],
                "users": [{"name": account, "user": {"token": answer["status"]["token"]}}],
                "contexts": [{"name": "lab", "context": context}],
                "current-context": "lab",
            }
            path.write_text(json.dumps(document))
            self._tokens[key] = path
        return self._tokens[key]

    async def _environment(self, pod: _Pod, spec: Mapping[str, Any]) -> dict[str, str]:
        env: dict[str, str] = {}
        for entry in spec.get("env", ()):
            name = entry["name"]
            source = entry.get("valueFrom")
            if source is None:
                env[name] = expand(entry.get("value", ""), env)
            elif "fieldRef" in source:
                env[name] = self._field(pod, source["fieldRef"]["fieldPath"])
            elif "resourceFieldRef" in source:
                reference = source["resourceFieldRef"]["resource"]
                group, _, resource = reference.partition(".")
                env[name] = str(spec.get("resources", {}).get(group, {}).get(resource, ""))
            else:
                kind = "secrets" if "secretKeyRef" in source else "configmaps"
                reference = source.get("secretKeyRef") or source["configMapKeyRef"]
                value = await self._referenced(pod.namespace, kind, reference)
                if value is not None:
                    env[name] = value
        return env

    async def _referenced(self, namespace: str, kind: str, reference: Mapping[str, Any]) -> str | None:
        """Return whether a key is there: its value is never read into the laboratory when it is a secret's."""
        try:
            found = await self.kube.get(f"/api/v1/namespaces/{namespace}/{kind}/{reference['name']}")
        except ApiError as error:
            if error.status != 404:
                raise
            found = {}
        value: str | None = (found.get("data") or {}).get(reference["key"])
        if value is None and not reference.get("optional"):
            raise _MissingReferenceError(f"{kind[:-1]} {reference['name']!r} has no key {reference['key']!r}")
        return "" if value is not None and kind == "secrets" else value

    @staticmethod
    def _field(pod: _Pod, path: str) -> str:
        metadata = pod.document["metadata"]
        keyed = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
        if keyed:
            return str((metadata.get(keyed.group(1)) or {}).get(keyed.group(2), ""))
        values: dict[str, str] = {
            "metadata.name": pod.name,
            "metadata.namespace": pod.namespace,
            "metadata.uid": pod.uid,
            "spec.nodeName": pod.node.name,
            "spec.serviceAccountName": pod.document["spec"].get("serviceAccountName", "default"),
            "status.podIP": pod.address,
            "status.podIPs": pod.address,
            "status.hostIP": pod.nodes.host_address,
        }
        return values.get(path, "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run simulated nodes until Ctrl-C or SIGTERM."""
    from servingtiers.lab.routers import locate_router

    parser = argparse.ArgumentParser(prog="python -m servingtiers.lab.nodes", description=main.__doc__)
    parser.add_argument("--kubeconfig", type=Path, required=True, help="a kubeconfig the laboratory wrote")
    parser.add_argument(
        "--node", action="append", required=True, metavar="NAME=PRODUCT:GPUS", help="repeat for each node"
    )
    parser.add_argument("--time-factor", type=float, default=1.0, help="multiplies start-up times")
    parser.add_argument("--prestop-factor", type=float, default=1.0, help="multiplies preStop sleeps")
    parser.add_argument("--simulated-router", action="store_true", help="do not use the real vllm-router")
    parser.add_argument("--folder", type=Path, help="where logs go (default: a temporary folder)")
    options = parser.parse_args(arguments)
    shapes = []
    for text in options.node:
        name, _, rest = text.partition("=")
        product, _, gpus = rest.rpartition(":")
        shapes.append(NodeShape(name, product, int(gpus)))
    behaviour = NodeOptions(
        time_factor=options.time_factor,
        prestop_factor=options.prestop_factor,
        router=None if options.simulated_router else locate_router(),
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")

    async def run() -> None:
        stopped = asyncio.Event()
        for signum in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(signum, stopped.set)
        connection = Kube.from_kubeconfig(options.kubeconfig).connection
        async with SimulatedNodes(connection, shapes, behaviour, folder=options.folder):
            print("ready", flush=True)
            await stopped.wait()

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
