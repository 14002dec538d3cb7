"""A real Kubernetes control plane as processes: etcd, API server, controller manager, scheduler.

No container, no root and no network beyond loopback: what it decides (admission, CEL validation, ownership
and garbage collection, Deployments, scheduling of extended resources) is decided by the real programs.
What is missing are nodes: :mod:`servingtiers.lab.nodes` simulates those.

``python -m servingtiers.lab.controlplane`` starts one and keeps it until Ctrl-C.
"""

from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import fcntl
import functools
import http
import http.client
import json
import os
import secrets
import select
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from servingtiers.lab.binaries import Binaries, Progress, file_lock, locate, say
from servingtiers.lab.processes import Child, Children, free_port

__all__ = [
    "ADMIN",
    "OPERATOR",
    "ApiError",
    "AuditRecord",
    "Connection",
    "ControlPlane",
    "ControlPlaneError",
    "User",
    "shared_control_plane",
    "whole_lines",
]

_START_ATTEMPTS = 3  # a free port can be taken between our look and the program's bind
_READY_SECONDS = 90.0
# Simulated pods have loopback addresses, which Endpoints and EndpointSlices refuse: those controllers would
# retry for ever. The rest of the list is switched off because nothing here needs it and it costs CPU.
_CONTROLLERS_OFF = (
    "endpoints-controller",
    "endpointslice-controller",
    "endpointslice-mirroring-controller",
    "certificatesigningrequest-approving-controller",
    "certificatesigningrequest-cleaner-controller",
    "certificatesigningrequest-signing-controller",
    "node-ipam-controller",
    "node-route-controller",
    "service-lb-controller",
)
_AUDIT_POLICY = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  verbs: [get, list, watch]
- level: Metadata
"""


class ControlPlaneError(RuntimeError):
    """The control plane did not come up; the message names the program and its last words."""


class ApiError(RuntimeError):
    """The API server answered with an error status."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class User:
    """A user of the token file."""

    name: str
    groups: tuple[str, ...] = ()


ADMIN = User("admin", ("system:masters",))
OPERATOR = User("operator")
"""A user with no right at all until a test or the chart's RBAC gives it some."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One mutating request that the API server completed."""

    user: str
    verb: str
    resource: str
    """``group/resource[/subresource]`` (no group prefix for the core group)."""
    namespace: str
    name: str
    status: int
    dry_run: bool


def whole_lines(log: IO[bytes], since: int) -> Iterator[bytes]:
    """Yield the lines that begin after a position and are written to their end.

    The position may lie inside a line: the size of a file that somebody writes is seen at any moment.
    """
    if since:
        log.seek(since - 1)
        log.readline()
    for line in log:
        if not line.endswith(b"\n"):
            return
        yield line


@functools.lru_cache(maxsize=8)
def _trusting(ca_file: Path) -> ssl.SSLContext:
    """Return a TLS context; making one costs more than a request."""
    return ssl.create_default_context(cafile=str(ca_file))


class _Idle:
    """Open connections by server: a TLS handshake costs both sides ten times a request."""

    _MOST = 8
    """Of one server; more are closed after their request."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, Path], list[http.client.HTTPConnection]] = {}

    def take(self, url: str, ca_file: Path, timeout: float) -> http.client.HTTPConnection:
        """Return a connection that nobody else uses."""
        while True:
            with self._lock:
                kept = self._kept.get((url, ca_file))
                found = kept.pop() if kept else None
            if found is None:
                address = urllib.parse.urlsplit(url)
                if address.scheme == "http":
                    return http.client.HTTPConnection(address.netloc, timeout=timeout)
                return http.client.HTTPSConnection(
                    address.netloc, timeout=timeout, context=_trusting(ca_file)
                )
            # Nothing was asked, so what there is to read is the server's goodbye.
            if found.sock is not None and not select.select([found.sock], [], [], 0)[0]:
                found.sock.settimeout(timeout)
                return found
            found.close()

    def give(self, url: str, ca_file: Path, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose answer was read to its end."""
        with self._lock:
            kept = self._kept.setdefault((url, ca_file), [])
            if connection.sock is not None and len(kept) < self._MOST:
                kept.append(connection)
                return
        connection.close()

    def close(self, url: str) -> None:
        """Close the connections to a server that ends."""
        with self._lock:
            mine = [key for key in self._kept if key[0] == url]
            closing = [connection for key in mine for connection in self._kept.pop(key)]
        for connection in closing:
            connection.close()


_IDLE = _Idle()


@dataclass(frozen=True, slots=True)
class Connection:
    """How to reach an API server as one user: small, synchronous, for set-up and assertions.

    Products under test use their own client; this one shares no code with it.
    """

    url: str
    ca_file: Path
    token: str

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        content_type: str = "application/json",
        timeout: float = 30.0,
    ) -> Any:
        """Send one request and return the decoded answer.

        Raises:
            ApiError: The server answered with an error status.
        """
        connection = _IDLE.take(self.url, self.ca_file, timeout)
        try:
            connection.request(
                method,
                path,
                body=None if body is None else json.dumps(body).encode(),
                headers={"Authorization": f"Bearer {self.token}", "Content-Type": content_type},
            )
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        except BaseException:
            connection.close()
            raise
        if answer.status < http.HTTPStatus.INTERNAL_SERVER_ERROR:
            _IDLE.give(self.url, self.ca_file, connection)
        else:
            connection.close()  # one that shuts down answers on what is open and refuses what is new
        if answer.status >= http.HTTPStatus.BAD_REQUEST:
            try:
                status = json.loads(text)
            except ValueError:
                status = {"message": text}
            raise ApiError(answer.status, status.get("reason", ""), status.get("message", text))
        return json.loads(text) if text.startswith(("{", "[")) else text


def _service_account_key() -> str:
    """Return a fresh P-256 private key, PEM.

    RFC 5915 lets the public half be left out, and Go computes it: so 32 random bytes in a fixed DER frame are a
    whole key, and no cryptography library is needed.
    """
    # SEQUENCE { INTEGER 1, OCTET STRING (32), [0] OID prime256v1 }; the scalar stays below the group's order.
    scalar = (secrets.randbits(255) | 1).to_bytes(32, "big")
    der = bytes.fromhex("303102010104 20") + scalar + bytes.fromhex("a00a06082a8648ce3d030107")
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN EC PRIVATE KEY-----\n{body}-----END EC PRIVATE KEY-----\n"


class ControlPlane:
    """etcd, kube-apiserver, kube-controller-manager and kube-scheduler on random ports of 127.0.0.1.

    Usable as a context manager. Leaves no process behind, however the maker ends.

    Args:
        binaries: The programs; found, downloaded or built by default.
        folder: Data, keys, logs; a temporary folder, removed at the stop, by default.
        audit: Record every mutating request (see :meth:`audit_records`).
        users: Users of the token file; ``admin`` is always there.
        controllers: Start the controller manager and the scheduler too.
        flags: Extra flags by program name, for example ``{"kube-apiserver": ["--max-requests-inflight=50"]}``.
        progress: Receives progress lines.
    """

    def __init__(
        self,
        *,
        binaries: Binaries | None = None,
        folder: Path | None = None,
        audit: bool = False,
        users: Sequence[User] = (OPERATOR,),
        controllers: bool = True,
        flags: Mapping[str, Sequence[str]] | None = None,
        progress: Progress = say,
    ) -> None:
        self._progress = progress
        self._binaries = binaries
        self._own_folder = folder is None
        self._given_folder = folder
        self._audit = audit
        self._users = (ADMIN, *(user for user in users if user.name != ADMIN.name))
        self._controllers = controllers
        self._flags = dict(flags or {})
        self._children = Children()
        self._running: dict[str, Child] = {}
        self._commands: dict[str, list[str]] = {}
        self._tokens = {user.name: secrets.token_hex(24) for user in self._users}
        self._lock = threading.RLock()
        self.folder = Path()
        self.url = ""
        self.ready_seconds = 0.0
        """How long the last start took, seconds."""

    # -- life ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def binaries(self) -> Binaries:
        """The programs in use."""
        if self._binaries is None:
            self._binaries = locate(progress=self._progress)
        return self._binaries

    def start(self) -> None:
        """Start all programs and return when the API server is ready and the default namespace usable.

        Raises:
            ControlPlaneError: A program ended or was not ready in time.
        """
        _ = self.binaries  # the search may take minutes: it is no part of the start's time
        begun = time.monotonic()
        self.folder = self._given_folder or Path(tempfile.mkdtemp(prefix="servingtiers-ring-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._own_folder:
            self._children.remove_when_orphaned(self.folder)
        atexit.register(self.stop)
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                self._start_all()
                break
            except ControlPlaneError as error:
                self._children.stop(grace=2.0)
                self._running.clear()
                if attempt == _START_ATTEMPTS or "address already in use" not in str(error):
                    self.stop()
                    raise
        self.ready_seconds = time.monotonic() - begun

    def _start_all(self) -> None:
        self._write_files()
        etcd_port, peer_port, api_port = free_port(), free_port(), free_port()
        self.url = f"https://127.0.0.1:{api_port}"
        self._write_kubeconfigs()
        self._commands = self._command_lines(etcd_port, peer_port, api_port)
        for name in ("etcd", "kube-apiserver"):
            self.start_component(name)
        self._wait_for_api_server()
        if self._controllers:
            for name in ("kube-controller-manager", "kube-scheduler"):
                self.start_component(name)
            self._wait_for_service_account("default")

    def stop(self) -> None:
        """Stop scheduler, controller manager, API server and etcd, in this order, and remove the data."""
        with self._lock:
            # The order matters: an API server that outlives its etcd, or that still serves watches, hangs in its
            # graceful shutdown. A restarted one is the youngest child, so the order of starting will not do.
            for name in ("kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"):
                if child := self._running.pop(name, None):
                    self._children.stop_one(child, grace=5.0)
            self._children.stop()
            _IDLE.close(self.url)
            atexit.unregister(self.stop)
            if self._own_folder and self.folder != Path():
                shutil.rmtree(self.folder, ignore_errors=True)

    def start_component(self, name: str) -> None:
        """Start one program (``etcd``, ``kube-apiserver``, …) that is not running."""
        with self._lock:
            if name in self._running and self._running[name].running:
                return
            self._running[name] = self._children.start(
                name,
                self._commands[name],
                log=self.folder / f"{name}.log",
                # Collecting garbage later takes a quarter off their processor time, for a hundred megabytes.
                env={"GOGC": "400"} | os.environ,
            )

    def stop_component(self, name: str, *, kill: bool = False) -> None:
        """Stop one program, gracefully or by SIGKILL."""
        with self._lock:
            child = self._running.pop(name)
            self._children.stop_one(child, signum=signal.SIGKILL if kill else signal.SIGTERM)

    def restart_api_server(self, *, down_seconds: float = 0.0, kill: bool = True) -> None:
        """Take the API server away for ``down_seconds`` and bring it back on the same port, ready."""
        self.stop_component("kube-apiserver", kill=kill)
        time.sleep(down_seconds)
        self.start_component("kube-apiserver")
        self._wait_for_api_server()

    def running(self, name: str) -> bool:
        """Whether the program runs."""
        child = self._running.get(name)
        return child is not None and child.running

    def pids(self) -> dict[str, int]:
        """Return the process ids by program name."""
        return {name: child.process.pid for name, child in self._running.items() if child.running}

    # -- files --------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        key = self.folder / "service-account.key"
        if not key.exists():
            key.write_text(_service_account_key())
            key.chmod(0o600)
        lines = []
        for number, user in enumerate(self._users):
            groups = ",".join(user.groups)
            lines.append(f'{self._tokens[user.name]},{user.name},{number},"{groups}"')
        tokens = self.folder / "tokens.csv"
        tokens.touch(mode=0o600)
        tokens.write_text("\n".join(lines) + "\n")
        (self.folder / "audit-policy.yaml").write_text(_AUDIT_POLICY)

    @property
    def ca_file(self) -> Path:
        """The certificate to trust, written by the API server itself."""
        return self.folder / "certs" / "apiserver.crt"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.kubeconfig_for(ADMIN.name)

    def kubeconfig_for(self, user: str) -> Path:
        """Return the kubeconfig of a user of the token file."""
        return self.folder / f"{user}.kubeconfig"

    def token(self, user: str = "admin") -> str:
        """Return the bearer token of a user."""
        return self._tokens[user]

    def write_kubeconfig(
        self, to: Path, token: str, *, url: str | None = None, namespace: str = "default"
    ) -> Path:
        """Write a kubeconfig for any token, for example a service account's, or for a proxy's address."""
        # JSON is YAML, and needs no library here.
        cluster = {"server": url or self.url}
        if cluster["server"].startswith("https:"):
            cluster["certificate-authority"] = str(self.ca_file)
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "lab", "user": {"token": token}}],
            "contexts": [
                {"name": "lab", "context": {"cluster": "lab", "user": "lab", "namespace": namespace}}
            ],
            "current-context": "lab",
        }
        to.touch(mode=0o600)
        to.write_text(json.dumps(document, indent=1) + "\n")
        return to

    def _write_kubeconfigs(self) -> None:
        for user in self._users:
            self.write_kubeconfig(self.kubeconfig_for(user.name), self._tokens[user.name])

    def _command_lines(self, etcd_port: int, peer_port: int, api_port: int) -> dict[str, list[str]]:
        key = str(self.folder / "service-account.key")
        etcd_url = f"http://127.0.0.1:{etcd_port}"
        peer_url = f"http://127.0.0.1:{peer_port}"
        audit = [
            f"--audit-policy-file={self.folder / 'audit-policy.yaml'}",
            f"--audit-log-path={self.folder / 'audit.log'}",
            "--audit-log-mode=blocking",  # a request is answered only after its record is written: exact counts
            "--audit-log-maxsize=1000",
        ]
        commands = {
            "etcd": [
                str(self.binaries.etcd),
                f"--data-dir={self.folder / 'etcd'}",
                f"--listen-client-urls={etcd_url}",
                f"--advertise-client-urls={etcd_url}",
                f"--listen-peer-urls={peer_url}",
                f"--initial-advertise-peer-urls={peer_url}",
                f"--initial-cluster=default={peer_url}",
                "--unsafe-no-fsync",  # the data is thrown away: durability would only cost time
                "--log-level=error",
            ],
            "kube-apiserver": [
                str(self.binaries.kube_apiserver),
                f"--etcd-servers={etcd_url}",
                f"--cert-dir={self.folder / 'certs'}",
                "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1",
                "--endpoint-reconciler-type=none",  # a loopback endpoint would be refused, for ever
                f"--secure-port={api_port}",
                f"--service-account-key-file={key}",
                f"--service-account-signing-key-file={key}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--token-auth-file={self.folder / 'tokens.csv'}",
                "--authorization-mode=Node,RBAC",
                "--service-cluster-ip-range=10.96.0.0/16",
                "--allow-privileged=true",
                "--profiling=false",
                *(audit if self._audit else []),
            ],
            "kube-controller-manager": [
                str(self.binaries.kube_controller_manager),
                f"--kubeconfig={self.kubeconfig}",
                "--use-service-account-credentials",
                f"--service-account-private-key-file={key}",
                f"--root-ca-file={self.ca_file}",
                "--leader-elect=false",
                "--secure-port=0",
                f"--controllers=*,{','.join(f'-{name}' for name in _CONTROLLERS_OFF)}",
                # A busy test machine must not lose its nodes: a heartbeat may be late here.
                "--node-monitor-grace-period=120s",
                "--kube-api-qps=200",
                "--kube-api-burst=400",
                "--profiling=false",
            ],
            "kube-scheduler": [
                str(self.binaries.kube_scheduler),
                f"--kubeconfig={self.kubeconfig}",
                "--leader-elect=false",
                "--secure-port=0",
                "--kube-api-qps=200",
                "--kube-api-burst=400",
                "--profiling=false",
            ],
        }
        return {name: [*command, *self._flags.get(name, ())] for name, command in commands.items()}

    # -- waiting ------------------------------------------------------------------------------------------

    def _wait_for_api_server(self) -> None:
        begun = told = time.monotonic()
        last = "no answer"
        while True:
            for child in self._running.values():
                if not child.running:
                    raise ControlPlaneError(f"{child.name} ended: {child.tail()}")
            with contextlib.suppress(OSError, ssl.SSLError, ApiError):
                if self.connection().request("GET", "/readyz", timeout=2.0) == "ok":
                    return
            now = time.monotonic()
            if now - told >= 10:
                told = now
                self._progress(f"waiting for the API server: {now - begun:.0f} s")
            if now - begun > _READY_SECONDS:
                child = self._running["kube-apiserver"]
                raise ControlPlaneError(
                    f"kube-apiserver was not ready in {_READY_SECONDS:.0f} s ({last}): {child.tail()}"
                )
            time.sleep(0.05)

    def _wait_for_service_account(self, namespace: str) -> None:
        """Wait until the controller manager has given the namespace its default service account."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default"
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                self.connection().request("GET", path)
            except ApiError as error:
                if error.status != 404 or time.monotonic() > deadline:
                    raise
            else:
                return
            child = self._running.get("kube-controller-manager")  # another process's, where we are attached
            if child is not None and not child.running:
                raise ControlPlaneError(f"{child.name} ended: {child.tail()}")
            time.sleep(0.05)

    # -- use ----------------------------------------------------------------------------------------------

    def connection(self, user: str = "admin") -> Connection:
        """Return a synchronous connection as one of the users."""
        return Connection(self.url, self.ca_file, self._tokens[user])

    def create_namespace(self, name: str, labels: Mapping[str, str] | None = None) -> str:
        """Create a namespace, wait for its default service account, and return its name."""
        self.connection().request(
            "POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": dict(labels or {})}}
        )
        if self._controllers:
            self._wait_for_service_account(name)
        return name

    def kubectl(self, *arguments: str, document: str | None = None) -> str:
        """Run kubectl as administrator and return what it prints.

        Raises:
            ControlPlaneError: There is no kubectl, or it failed; the message is its error output.
        """
        if self.binaries.kubectl is None:
            raise ControlPlaneError("kubectl is not there: install it, or unset KUBEBUILDER_ASSETS")
        done = subprocess.run(
            [str(self.binaries.kubectl), f"--kubeconfig={self.kubeconfig}", *arguments],
            input=document,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            raise ControlPlaneError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def audit_position(self) -> int:
        """Return a position in the audit log, to be given to :meth:`audit_records` later."""
        path = self.folder / "audit.log"
        return path.stat().st_size if path.exists() else 0

    def audit_records(
        self, *, since: int = 0, user: str | None = None, leases: bool = False
    ) -> list[AuditRecord]:
        """Return the mutating requests recorded after a position, oldest first.

        Args:
            since: A value of :meth:`audit_position`.
            user: Only this user's requests.
            leases: Include coordination Leases (an elected leader renews its own for ever).

        Raises:
            ControlPlaneError: The control plane was started without ``audit=True``.
        """
        if not self._audit:
            raise ControlPlaneError("no audit log: start the control plane with audit=True")
        path = self.folder / "audit.log"
        if not path.exists():
            return []
        records = []
        with path.open("rb") as log:
            for line in whole_lines(log, since):
                event = json.loads(line)
                reference = event.get("objectRef", {})
                if event["stage"] != "ResponseComplete" or (user and event["user"]["username"] != user):
                    continue
                if reference.get("resource") == "leases" and not leases:
                    continue
                parts = (reference.get("apiGroup"), reference.get("resource"), reference.get("subresource"))
                records.append(
                    AuditRecord(
                        user=event["user"]["username"],
                        verb=event["verb"],
                        resource="/".join(part for part in parts if part),
                        namespace=reference.get("namespace", ""),
                        name=reference.get("name", ""),
                        status=event.get("responseStatus", {}).get("code", 0),
                        dry_run="dryRun=All" in event.get("requestURI", ""),
                    )
                )
        return records

    def describe(self) -> dict[str, Any]:
        """Return what another process needs to attach (see :meth:`attached`)."""
        return {"folder": str(self.folder), "url": self.url, "tokens": self._tokens, "audit": self._audit}

    @classmethod
    def attached(cls, description: Mapping[str, Any], progress: Progress = say) -> Self:
        """Return a handle on a control plane that another process runs; its stop does nothing."""
        plane = cls(folder=Path(description["folder"]), audit=description["audit"], progress=progress)
        plane.folder = Path(description["folder"])
        plane.url = description["url"]
        plane._tokens = dict(description["tokens"])
        return plane


def _keep_while_locked(folder: Path, *, audit: bool) -> int:
    """Run a control plane for as long as any process holds a shared lock on ``folder/users.lock``."""
    with ControlPlane(folder=folder / "ring", audit=audit) as plane:
        description = folder / "ring.json.new"
        description.touch(mode=0o600)
        description.write_text(json.dumps(plane.describe()))
        description.rename(folder / "ring.json")
        with (folder / "users.lock").open("a") as users:
            while True:
                time.sleep(0.5)
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                (folder / "ring.json").unlink()
                return 0


@contextlib.contextmanager
def shared_control_plane(
    folder: Path, *, audit: bool = True, progress: Progress = say
) -> Iterator[ControlPlane]:
    """Attach to the one control plane of ``folder``, starting it if nobody has.

    For test sessions of several processes (pytest-xdist): the first to come starts a keeper process, everyone
    holds a shared file lock, and the keeper stops when the last lock is gone, however its holder ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / "start.lock", progress, "the shared control plane is starting"):
        users: IO[str] = (folder / "users.lock").open("a")
        # The keeper takes the exclusive lock only when nobody else is left, and then removes its description.
        fcntl.flock(users, fcntl.LOCK_SH)
        description = folder / "ring.json"
        if not description.exists():
            locate(progress=progress)
            with (folder / "keeper.log").open("ab") as log:
                keeper = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        __name__,
                        "--while-locked",
                        str(folder),
                        *(["--audit"] if audit else []),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            while not description.exists():
                if keeper.poll() is not None:
                    users.close()
                    raise ControlPlaneError(
                        f"the shared control plane did not start: see {folder}/keeper.log"
                    )
                time.sleep(0.05)
    try:
        yield ControlPlane.attached(json.loads(description.read_text()), progress)
    finally:
        users.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Start a control plane and keep it until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m servingtiers.lab.controlplane", description=main.__doc__)
    parser.add_argument(
        "--folder", type=Path, help="where data, keys and logs go (default: a temporary folder)"
    )
    parser.add_argument("--audit", action="store_true", help="record mutating requests in FOLDER/audit.log")
    parser.add_argument("--while-locked", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.while_locked:
        return _keep_while_locked(options.while_locked, audit=options.audit)
    stopped = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stopped.set())
    with ControlPlane(folder=options.folder, audit=options.audit) as plane:
        print(
            f"ready in {plane.ready_seconds:.1f} s; kubectl --kubeconfig {plane.kubeconfig} get nodes",
            flush=True,
        )
        stopped.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
