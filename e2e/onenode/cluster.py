"""The cluster: one network namespace, nine processes, one node.

Nothing touches the machine's own network: every process is started inside the namespace, and so are the pods'
interfaces, the addresses of Services and the packet filter's rules. What kubelet changes of the kernel's settings is
put back when the cluster is taken down.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onenode.images import PAUSE, Images
from onenode.places import NODE_ADDRESS, NODE_NAME, Places
from onenode.processes import Daemon
from onenode.programs import Programs, prepare, say
from servingtiers.lab.controlplane import ApiError, Connection

__all__ = ["Cluster", "ClusterError"]

_API_PORT = 6443
_ETCD = "http://127.0.0.1:2379"
_PEER = "http://127.0.0.1:2380"
_POD_RANGE = "10.88.0.0/16"
_SERVICE_RANGE = "10.96.0.0/16"
_DOMAIN = "cluster.local"
_ORDER = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "containerd",
    "coredns",
    "kube-proxy",
    "kubelet",
)
_RUNTIME_CLASS = "vllm-cpu"
"""Runtime class that mounts the engine's environment into a pod, as a device vendor's mounts its driver."""
_USERS = {"admin": ("system:masters",), "node": ("system:nodes",), "proxy": ("system:node-proxier-group",)}
_KERNEL_SETTINGS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")
_CLONE_NEWNET = 0x40000000
_FRONT_PROXY = "front-proxy-client"
"""Name under which the API server asks aggregated APIs."""
_CGROUP = "k8s.io"
"""Where containerd puts the pods."""
_CPU_WEIGHT = 6144
"""Weight of all pods together: a pod's own is its request, and one process of the host weighs 1,024."""


class ClusterError(RuntimeError):
    """The cluster did not come up; the message says which part and its last words."""


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if check and done.returncode:
        raise ClusterError(f"{' '.join(command[:4])} … failed: {done.stderr.strip()}")
    return done


class Cluster:
    """One cluster at its places; every method may be called again and does what is left to do."""

    def __init__(self, places: Places | None = None) -> None:
        self.places = places or Places.default()
        self.daemons = {
            name: Daemon(name, self.places.state / "processes", self.places.logs / f"{name}.log")
            for name in _ORDER
        }
        self._commands: dict[str, list[str]] = {}
        self._programs: Programs | None = None

    # -- up -----------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Bring the cluster up: minutes cold, seconds warm.

        Raises:
            ClusterError: A part did not come up.
        """
        self._programs = prepare(self.places)
        begun = time.monotonic()
        places = self.places
        for folder in (places.state, places.run, places.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self._network()
        self._write_files()
        self._write_front_proxy()
        self._commands = self._command_lines()
        for name in ("etcd", "kube-apiserver", "containerd"):
            self.start(name)
        self._wait("the API server", self._api_ready, "kube-apiserver", 90)
        self._write_kubeconfigs()
        images = Images(places)
        self._wait("containerd", self._containerd_ready, "containerd", 30)
        images.pause()
        for name in _ORDER:
            self.start(name)
        self._weigh_pods()
        self._wait("the node", self._node_ready, "kubelet", 120)
        self._install_basics()
        say(f"cluster ready in {time.monotonic() - begun:.0f} s: export KUBECONFIG={places.kubeconfig}")

    def start(self, name: str) -> None:
        """Start one program unless it runs."""
        if not self._commands:
            self._programs = self._programs or prepare(self.places)
            self._commands = self._command_lines()
        self.daemons[name].start(self._commands[name], netns=self.places.netns)

    def stop(self, name: str, *, kill: bool = False) -> None:
        """Stop one program, gracefully or by SIGKILL."""
        self.daemons[name].stop(signum=9 if kill else 15)

    def renew(self, name: str) -> None:
        """Restart one program where it runs with another command line than it would be started with now."""
        daemon = self.daemons[name]
        if daemon.pid is not None and daemon.command != self._commands[name]:
            say(f"{name} runs with an earlier command line: restarting it")
            daemon.stop()
        self.start(name)

    def wait_for_api_server(self) -> None:
        """Return when the API server answers that it is ready."""
        self._wait("the API server", self._api_ready, "kube-apiserver", 90)

    def enter(self) -> None:
        """Move this thread, and all threads and processes it starts, into the cluster's network.

        Pods, Services and the API server are reached by their addresses from there, and nothing else is.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        with self.places.netns.open() as handle:
            if libc.setns(handle.fileno(), _CLONE_NEWNET):
                raise ClusterError(f"cannot enter {self.places.netns}: {os.strerror(ctypes.get_errno())}")

    # -- down ---------------------------------------------------------------------------------------------

    def down(self) -> None:
        """Stop everything and remove every trace but the cache. Harmless when nothing runs."""
        for name in ("kubelet", "kube-proxy", "coredns"):
            self.daemons[name].stop()
        self._remove_pods()
        # An API server that outlives its etcd hangs in its graceful shutdown.
        for name in ("containerd", "kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd"):
            self.daemons[name].stop()
        self._remove_shims()
        self._unmount()
        if self.places.netns.exists():
            _run("ip", "netns", "delete", self.places.namespace)
        self._restore_kernel_settings()
        self._remove_cgroups()
        for folder in (self.places.state, self.places.run):
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_pods(self) -> None:
        """Remove all sandboxes by the runtime itself, so that CNI and mounts are tidied by those who made them."""
        if self.daemons["containerd"].pid is None:
            return
        ctr = ["ctr", "-a", str(self.places.containerd_socket), "-n", "k8s.io"]
        for task in _run(*ctr, "tasks", "ls", "-q", check=False).stdout.split():
            _run(*ctr, "tasks", "rm", "--force", task, check=False)
        for container in _run(*ctr, "containers", "ls", "-q", check=False).stdout.split():
            _run(*ctr, "containers", "rm", container, check=False)

    def _remove_shims(self) -> None:
        """End what held a sandbox and outlived its runtime: a shim of this cluster, told by the socket it was given."""
        socket = str(self.places.containerd_socket).encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"/containerd-shim-runc-v2") and socket in words:
                    os.kill(int(process.name), 9)

    def _unmount(self) -> None:
        inside = (f"{self.places.state}/", f"{self.places.run}/")
        mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for path in sorted((each for each in mounts if f"{each}/".startswith(inside)), key=len, reverse=True):
            _run("umount", "--lazy", path, check=False)

    def _weigh_pods(self) -> None:
        """Let the pods share the cores with the host's own processes.

        The kubelet does not manage the tree of cgroups here, so a pod with a request of a tenth of a core would
        otherwise weigh a tenth of any one process of the host, and starve beside a compiler.
        """
        folder = Path("/sys/fs/cgroup/cpu")
        if folder.is_dir():  # cgroup v1, where the weight is called shares
            (folder / _CGROUP).mkdir(exist_ok=True)
            (folder / _CGROUP / "cpu.shares").write_text(str(_CPU_WEIGHT))

    def _remove_cgroups(self) -> None:
        if self._others():  # pods of another cluster are in there
            return
        for root in Path("/sys/fs/cgroup").glob(f"*/{_CGROUP}"):
            for folder in sorted((p for p in root.rglob("*") if p.is_dir()), key=lambda p: -len(p.parts)):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            with contextlib.suppress(OSError):
                root.rmdir()

    # -- network ------------------------------------------------------------------------------------------

    def _network(self) -> None:
        name = self.places.namespace
        if not self.places.netns.exists():
            _run("ip", "netns", "add", name)
        inside = ["nsenter", f"--net={self.places.netns}"]
        _run(*inside, "ip", "link", "set", "lo", "up")
        if _run(*inside, "ip", "link", "show", "cni0", check=False).returncode:
            _run(*inside, "ip", "link", "add", "cni0", "type", "bridge")
        _run(*inside, "ip", "address", "replace", f"{NODE_ADDRESS}/16", "dev", "cni0")
        _run(*inside, "ip", "link", "set", "cni0", "up")
        # Without any route, programs that look for the node's address by its default route give up.
        _run(*inside, "ip", "route", "replace", "default", "dev", "cni0")
        _run(*inside, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1")

    # -- files --------------------------------------------------------------------------------------------

    def _write_once(self, name: str, make: Callable[[], str], mode: int = 0o600) -> Path:
        path = self.places.state / name
        if not path.exists():
            path.touch(mode=mode)
            path.write_text(make())
        return path

    def _write_files(self) -> None:
        state = self.places.state
        self._write_once(
            "service-account.key",
            lambda: _run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout").stdout,
        )
        self._write_once("tokens.json", lambda: json.dumps({user: secrets.token_hex(24) for user in _USERS}))
        tokens = self._tokens()
        names = {"admin": "admin", "node": f"system:node:{NODE_NAME}", "proxy": "system:kube-proxy"}
        lines = [
            f'{tokens[user]},{names[user]},{user},"{",".join(groups)}"' for user, groups in _USERS.items()
        ]
        self._write_once("tokens.csv", lambda: "\n".join(lines) + "\n")
        self._write_once("kernel-settings.json", self._kernel_settings)
        cni = state / "cni"
        cni.mkdir(exist_ok=True)
        cni.joinpath("10-bridge.conflist").write_text(json.dumps(self._cni(), indent=1))
        state.joinpath("containerd.toml").write_text(self._containerd_config())
        state.joinpath("kubelet.yaml").write_text(json.dumps(self._kubelet_config(), indent=1))
        state.joinpath("Corefile").write_text(self._corefile())
        state.joinpath(f"{_RUNTIME_CLASS}.json").write_text(json.dumps(self._engine_runtime_spec()))

    def _write_front_proxy(self) -> None:
        """Make the certificate by which aggregated APIs, such as external metrics, know that the API server asks."""
        state = self.places.state
        key = ("-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
        authority, client = state / "front-proxy-ca", state / "front-proxy-client"
        if client.with_suffix(".crt").exists():
            return
        _run(
            *("openssl", "req", "-x509", *key, "-subj", "/CN=front-proxy-ca", "-days", "3650"),
            *("-keyout", f"{authority}.key", "-out", f"{authority}.crt"),
        )
        _run(
            *("openssl", "req", *key, "-subj", f"/CN={_FRONT_PROXY}"),
            *("-keyout", f"{client}.key", "-out", f"{client}.csr"),
        )
        usage = state / "front-proxy-client.cnf"
        usage.write_text(
            "basicConstraints=CA:FALSE\nkeyUsage=digitalSignature\nextendedKeyUsage=clientAuth\n"
        )
        _run(
            *("openssl", "x509", "-req", "-in", f"{client}.csr", "-days", "3650", "-extfile", str(usage)),
            *("-CA", f"{authority}.crt", "-CAkey", f"{authority}.key", "-out", f"{client}.crt"),
        )

    def _tokens(self) -> dict[str, str]:
        tokens: dict[str, str] = json.loads((self.places.state / "tokens.json").read_text())
        return tokens

    def _kernel_settings(self) -> str:
        """Return what the settings are, or were before another cluster that is still there changed them."""
        if others := self._others():
            return others[0].read_text()
        return json.dumps({name: Path("/proc/sys", name).read_text().strip() for name in _KERNEL_SETTINGS})

    def _others(self) -> list[Path]:
        """Return the records of the kernel's settings that other clusters of this machine keep while they are there."""
        return [
            path
            for path in self.places.state.parent.glob("*/kernel-settings.json")
            if path.parent != self.places.state and path.stat().st_size
        ]

    def _restore_kernel_settings(self) -> None:
        record = self.places.state / "kernel-settings.json"
        # The last cluster to go puts them back.
        if record.exists() and not self._others():
            for name, value in json.loads(record.read_text()).items():
                Path("/proc/sys", name).write_text(value)

    def _write_kubeconfigs(self) -> None:
        tokens = self._tokens()
        for user in _USERS:
            path = self.places.state / f"{user}.kubeconfig"
            path.touch(mode=0o600)
            cluster = {"server": self.url, "certificate-authority": str(self.ca_file)}
            document = {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "e2e", "cluster": cluster}],
                "users": [{"name": user, "user": {"token": tokens[user]}}],
                "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": user}}],
                "current-context": "e2e",
            }
            path.write_text(json.dumps(document, indent=1))

    def _cni(self) -> dict[str, Any]:
        return {
            "cniVersion": "0.4.0",
            "name": "e2e",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isDefaultGateway": True,
                    "forceAddress": False,
                    "ipMasq": False,
                    "hairpinMode": True,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [
                            [{"subnet": _POD_RANGE, "rangeStart": "10.88.1.1", "gateway": NODE_ADDRESS}]
                        ],
                        "dataDir": str(self.places.state / "addresses"),
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }

    def _containerd_config(self) -> str:
        state, run = self.places.state, self.places.run
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        return f"""\
version = 2
root = "{state}/containerd"
state = "{run}/containerd"
# Only the runtime interface is needed.
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp"]

[grpc]
  address = "{self.places.containerd_socket}"

[{cri}]
  sandbox_image = "{PAUSE}"
  # Machines that forbid a lower oom_score_adj would let runc die without a word.
  restrict_oom_score_adj = true
  # Pods' network namespaces lie with the rest of this cluster, so that taking it down finds its own and no other's.
  netns_mounts_under_state_dir = true
  [{cri}.cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{state}/cni"
  [{cri}.containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [{cri}.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
    [{cri}.containerd.runtimes.{_RUNTIME_CLASS}]
      runtime_type = "io.containerd.runc.v2"
      base_runtime_spec = "{state}/{_RUNTIME_CLASS}.json"
"""

    def _engine_runtime_spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(_run("ctr", "oci", "spec").stdout)
        spec["mounts"].append(
            {
                "destination": "/opt/vllm",
                "type": "bind",
                "source": str(self.places.engine),
                "options": ["rbind", "ro", "nosuid", "nodev"],
            }
        )
        return spec

    def _kubelet_config(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": NODE_ADDRESS,
            # Reachable inside the namespace alone; the API server asks for logs without a client certificate.
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "containerRuntimeEndpoint": f"unix://{self.places.containerd_socket}",
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            # Inside a container or a small machine the kubelet may not own the whole tree of cgroups.
            "cgroupsPerQOS": False,
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "resolvConf": "",
            "clusterDomain": _DOMAIN,
            "clusterDNS": [NODE_ADDRESS],
            "podLogsDir": str(self.places.state / "pod-logs"),
            "staticPodPath": "",
            "maxPods": 60,
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"memory.available": "100Mi"},
            "nodeStatusUpdateFrequency": "5s",
            "syncFrequency": "10s",
            "logging": {"format": "text"},
        }

    def _corefile(self) -> str:
        return f"""\
.:53 {{
  bind {NODE_ADDRESS}
  errors
  kubernetes {_DOMAIN} in-addr.arpa {{
    kubeconfig {self.places.kubeconfig}
    ttl 5
  }}
  cache 5
}}
"""

    # -- programs -----------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Address of the API server, inside the namespace."""
        return f"https://{NODE_ADDRESS}:{_API_PORT}"

    @property
    def ca_file(self) -> Path:
        """The certificate to trust."""
        return self.places.state / "certs" / "apiserver.crt"

    def connection(self, user: str = "admin") -> Connection:
        """Return a connection as one user; usable inside the namespace only."""
        return Connection(self.url, self.ca_file, self._tokens()[user])

    def _command_lines(self) -> dict[str, list[str]]:
        if self._programs is None:
            raise ClusterError("programs are not there yet: call up()")
        plane, state = self._programs.control_plane, self.places.state
        key = str(state / "service-account.key")
        admin = f"--kubeconfig={self.places.kubeconfig}"
        return {
            "etcd": [
                *(str(plane.etcd), f"--data-dir={state / 'etcd'}", "--log-level=error"),
                *(f"--listen-client-urls={_ETCD}", f"--advertise-client-urls={_ETCD}"),
                *(f"--listen-peer-urls={_PEER}", f"--initial-advertise-peer-urls={_PEER}"),
                *(f"--initial-cluster=default={_PEER}", "--unsafe-no-fsync"),
            ],
            "kube-apiserver": [
                *(str(plane.kube_apiserver), f"--etcd-servers={_ETCD}", f"--cert-dir={state / 'certs'}"),
                *(f"--bind-address={NODE_ADDRESS}", f"--advertise-address={NODE_ADDRESS}"),
                *(f"--secure-port={_API_PORT}", f"--token-auth-file={state / 'tokens.csv'}"),
                *(f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}"),
                "--service-account-issuer=https://kubernetes.default.svc",
                *("--authorization-mode=Node,RBAC", f"--service-cluster-ip-range={_SERVICE_RANGE}"),
                *("--allow-privileged=true", "--kubelet-preferred-address-types=InternalIP"),
                "--profiling=false",
                # The aggregation layer: how aggregated APIs know the API server, and whom it asks for.
                f"--requestheader-client-ca-file={state / 'front-proxy-ca.crt'}",
                f"--requestheader-allowed-names={_FRONT_PROXY}",
                *(
                    "--requestheader-username-headers=X-Remote-User",
                    "--requestheader-group-headers=X-Remote-Group",
                ),
                "--requestheader-extra-headers-prefix=X-Remote-Extra-",
                f"--proxy-client-cert-file={state / 'front-proxy-client.crt'}",
                f"--proxy-client-key-file={state / 'front-proxy-client.key'}",
            ],
            "kube-controller-manager": [
                *(str(plane.kube_controller_manager), admin, "--use-service-account-credentials"),
                *(f"--service-account-private-key-file={key}", f"--root-ca-file={self.ca_file}"),
                *("--leader-elect=false", "--secure-port=0", "--profiling=false"),
                # A busy machine must not lose its only node: a heartbeat may be late here.
                "--node-monitor-grace-period=120s",
            ],
            "kube-scheduler": [
                *(
                    str(plane.kube_scheduler),
                    admin,
                    "--leader-elect=false",
                    "--secure-port=0",
                    "--profiling=false",
                ),
            ],
            "containerd": ["containerd", f"--config={state / 'containerd.toml'}"],
            "coredns": [str(self._programs.coredns), "-conf", str(state / "Corefile"), "-dns.port", "53"],
            "kube-proxy": [
                *(str(self._programs.kube_proxy), f"--kubeconfig={state / 'proxy.kubeconfig'}"),
                *(
                    "--proxy-mode=iptables",
                    f"--hostname-override={NODE_NAME}",
                    f"--cluster-cidr={_POD_RANGE}",
                ),
                *("--conntrack-max-per-core=0", "--healthz-bind-address=", "--metrics-bind-address="),
                # Pods share one bridge: an answer that took the short way back would not be translated.
                "--masquerade-all",
            ],
            "kubelet": [
                *(str(self._programs.kubelet), f"--config={state / 'kubelet.yaml'}"),
                *(f"--kubeconfig={state / 'node.kubeconfig'}", f"--root-dir={state / 'kubelet'}"),
                *(f"--hostname-override={NODE_NAME}", f"--node-ip={NODE_ADDRESS}"),
                f"--cert-dir={state / 'kubelet-certs'}",
            ],
        }

    # -- readiness ----------------------------------------------------------------------------------------

    def _wait(self, what: str, ready: Callable[[], bool], name: str, seconds: float) -> None:
        begun = told = time.monotonic()
        while not ready():
            now = time.monotonic()
            if self.daemons[name].pid is None:
                raise ClusterError(f"{name} ended: {self.daemons[name].tail()}")
            if now - begun > seconds:
                raise ClusterError(f"{what} was not ready in {seconds:.0f} s: {self.daemons[name].tail()}")
            if now - told > 10:
                told = now
                say(f"waiting for {what}: {now - begun:.0f} s")
            time.sleep(0.3)

    def _inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        return _run("nsenter", f"--net={self.places.netns}", *command, check=False)

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        """Run kubectl as the administrator and return what it prints.

        Raises:
            ClusterError: It failed and ``check`` is true.
        """
        programs = self._programs or prepare(self.places)
        kubectl = str(programs.control_plane.kubectl or "kubectl")
        done = self._inside(kubectl, f"--kubeconfig={self.places.kubeconfig}", *arguments)
        if check and done.returncode:
            raise ClusterError(f"kubectl {' '.join(arguments[:3])}: {done.stderr.strip()}")
        return done.stdout

    def _api_ready(self) -> bool:
        self._write_kubeconfigs()
        return self.ca_file.exists() and self.kubectl("get", "--raw", "/readyz", check=False) == "ok"

    def _containerd_ready(self) -> bool:
        return _run("ctr", "-a", str(self.places.containerd_socket), "version", check=False).returncode == 0

    def _node_ready(self) -> bool:
        path = "{.status.conditions[?(@.type=='Ready')].status}"
        return self.kubectl("get", "node", NODE_NAME, f"-o=jsonpath={path}", check=False) == "True"

    def _apply(self, *objects: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        path = self.places.state / "basics.json"
        path.write_text(json.dumps(listed))
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(path))

    def _install_basics(self) -> None:
        self._apply(
            {
                "apiVersion": "node.k8s.io/v1",
                "kind": "RuntimeClass",
                "metadata": {"name": _RUNTIME_CLASS},
                "handler": _RUNTIME_CLASS,
            }
        )

    def set_accelerators(self, count: int, resource: str = "nvidia.com/gpu") -> None:
        """Let the node advertise ``count`` accelerators, as a device plugin does; the real scheduler places by it."""
        key = resource.replace("/", "~1")
        patch = [
            {"op": "add", "path": f"/status/{part}/{key}", "value": str(count)}
            for part in ("capacity", "allocatable")
        ]
        # kubelet sets what it does not know to what it knows; it leaves resources it never heard of alone.
        with contextlib.suppress(ApiError):
            self.kubectl(
                "patch", "node", NODE_NAME, "--subresource=status", "--type=json", "-p", json.dumps(patch)
            )

    def running(self) -> Sequence[str]:
        """Return the names of the programs that run."""
        return [name for name, daemon in self.daemons.items() if daemon.pid is not None]
