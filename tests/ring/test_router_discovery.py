"""A real vllm-router, run with rendered arguments against a real API server."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from servingtiers.api.spec import ServingTier
from servingtiers.core.config import OperatorConfig
from servingtiers.core.decisions import PoolRole
from servingtiers.core.effective import TierSettings
from servingtiers.lab.controlplane import Connection, ControlPlane
from servingtiers.lab.routers import locate_router
from servingtiers.render import engine, names, pod_template, router_args

# Beside the one long test with routers: no other process waits for what is queued behind it.
pytestmark = [pytest.mark.ring, pytest.mark.xdist_group("routers")]

GOLDEN = Path(__file__).parents[1] / "golden"


class _Engine(http.server.BaseHTTPRequestHandler):
    """Answers health checks, and completions with its own address: what of an engine the router has to do with."""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        body = json.dumps({"served_by": self.server.server_address[0]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = _answer  # noqa: N815 - http.server's names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's signature
        """Keep the test's output quiet."""


@pytest.fixture
def engine_at() -> Iterator[Callable[[str], None]]:
    """Start an engine's HTTP face on a loopback address at the engines' port."""
    servers = []

    def start(address: str) -> None:
        server = http.server.ThreadingHTTPServer((address, engine.PORT), _Engine)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def _scenario(folder: str, namespace: str) -> tuple[ServingTier, TierSettings]:
    document = yaml.safe_load((GOLDEN / folder / "tier.yaml").read_text())
    document["metadata"]["namespace"] = namespace
    given = yaml.safe_load((GOLDEN / folder / "settings.yaml").read_text())
    return ServingTier.model_validate(document), TypeAdapter(TierSettings).validate_python(given["settings"])


def _ready_pod(
    connection: Connection, tier: ServingTier, settings: TierSettings, pool: int, name: str, address: str
) -> None:
    """Make a pod from the pool's template and say of it what a kubelet would say of a ready one."""
    template = pod_template(tier, settings, settings.pools[pool], OperatorConfig())
    spec = {**template["spec"], "nodeName": "nowhere", "automountServiceAccountToken": False}
    spec.pop("runtimeClassName", None)
    path = f"/api/v1/namespaces/{tier.metadata.namespace}/pods"
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template["metadata"], "name": name},
        "spec": spec,
    }
    connection.request("POST", path, pod)
    status = {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [{"type": "Ready", "status": "True"}, {"type": "ContainersReady", "status": "True"}],
    }
    connection.request(
        "PATCH", f"{path}/{name}/status", {"status": status}, content_type="application/merge-patch+json"
    )


def _label(connection: Connection, namespace: str, name: str, **labels: str) -> None:
    body = {"metadata": {"labels": {f"{names.ROUTE_PREFIX}{key}": value for key, value in labels.items()}}}
    path = f"/api/v1/namespaces/{namespace}/pods/{name}"
    connection.request("PATCH", path, body, content_type="application/merge-patch+json")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Router:
    """vllm-router with rendered arguments; only its ports are moved, so that tests can run side by side."""

    def __init__(self, program: Path, args: tuple[str, ...], kubeconfig: Path, log: Path) -> None:
        self.port, metrics = _free_port(), _free_port()
        moved = {"--host": "127.0.0.1", "--port": str(self.port), "--prometheus-port": str(metrics)}
        command = [
            f"{name}={moved[name]}"
            if (name := arg.split("=")[0]) in moved
            else arg.replace("$(POD_IP)", "127.0.0.1")
            for arg in args
        ]
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [str(program), *command],
            env={**os.environ, "KUBECONFIG": str(kubeconfig), "NO_PROXY": "127.0.0.0/8"},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def status(self, path: str, body: object = None) -> tuple[int, Any]:
        """Ask the router; 0 while it does not listen."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - as above
                text = answer.read().decode()
                return answer.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, None

    def wait(self, path: str, wanted: int, seconds: float = 30) -> bool:
        """Return whether a path answers with a status in time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.status(path)[0] == wanted:
                return True
            assert self._process.poll() is None, "the router refused its arguments or ended"
            time.sleep(0.1)
        return False

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


@pytest.fixture
def start_router(
    control_plane: ControlPlane, tmp_path: Path
) -> Iterator[Callable[[tuple[str, ...]], _Router]]:
    """Start routers that are stopped after the test."""
    program = locate_router()
    if program is None:
        pytest.skip("vllm-router cannot be installed here")
    kubeconfig = control_plane.kubeconfig
    running: list[_Router] = []

    def start(args: tuple[str, ...]) -> _Router:
        running.append(_Router(program, args, kubeconfig, tmp_path / f"router-{len(running)}.log"))
        return running[-1]

    yield start
    for one in running:
        one.stop()


def test_a_router_finds_engines_by_their_home_labels_and_drops_one_that_is_lent(
    connection: Connection,
    namespace: str,
    engine_at: Callable[[str], None],
    start_router: Callable[[tuple[str, ...]], _Router],
) -> None:
    """It lives without an engine, is ready with one, and not when the routing label names another tier."""
    tier, settings = _scenario("latency-minimal", namespace)
    router = start_router(router_args(tier, settings))
    assert router.wait("/liveness", 200)
    assert router.status("/readiness")[0] == 503

    engine_at("127.0.1.91")
    _ready_pod(connection, tier, settings, 0, "engine", "127.0.1.91")
    assert router.wait("/readiness", 200)
    code, answer = router.status(
        "/v1/completions", {"model": settings.served_name, "prompt": "a", "max_tokens": 1}
    )
    assert (code, answer["served_by"]) == (200, "127.0.1.91")

    _label(connection, namespace, "engine", tier="borrower")
    assert router.wait("/readiness", 503)
    _label(connection, namespace, "engine", tier=names.slug(tier.metadata.name))
    assert router.wait("/readiness", 200)


def test_a_disaggregated_router_is_ready_once_both_roles_are_there(
    connection: Connection,
    namespace: str,
    engine_at: Callable[[str], None],
    start_router: Callable[[tuple[str, ...]], _Router],
) -> None:
    """Prefill alone serves nobody; the role label alone tells the pools apart."""
    tier, settings = _scenario("throughput-disaggregated-nixl", namespace)
    assert [pool.role for pool in settings.pools] == [PoolRole.PREFILL, PoolRole.DECODE]
    router = start_router(router_args(tier, settings))
    assert router.wait("/liveness", 200)
    engine_at("127.0.1.92")
    engine_at("127.0.1.93")
    _ready_pod(connection, tier, settings, 0, "prefill", "127.0.1.92")
    time.sleep(3)  # what must not happen has time to happen
    assert router.status("/readiness")[0] == 503
    _ready_pod(connection, tier, settings, 1, "decode", "127.0.1.93")
    assert router.wait("/readiness", 200)
