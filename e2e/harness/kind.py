"""The same scenarios on kind, where Docker is.

The test process enters the network namespace of the node's container: from there pods and Services are reached by
their addresses, as on the one-node cluster.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from onenode import images as built
from onenode.places import Places
from onenode.programs import say

__all__ = ["KindCluster"]

_E2E = Path(__file__).parents[1]
_NODE = "servingtiers-e2e-control-plane"
_CLONE_NEWNET = 0x40000000


class KindCluster:
    """A kind cluster of one node with what :class:`onenode.cluster.Cluster` offers to scenarios."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._kind: Any = None

    def up(self) -> None:
        """Make the cluster, or find it, and give it the RuntimeClass that tiers name."""
        import pytest_kind  # type: ignore[import-not-found]

        self.places.state.mkdir(parents=True, exist_ok=True)
        self._kind = pytest_kind.KindCluster("servingtiers-e2e")
        config = {
            "kind": "Cluster",
            "apiVersion": "kind.x-k8s.io/v1alpha4",
            "nodes": [
                {
                    "role": "control-plane",
                    "extraMounts": [
                        {"hostPath": str(self.places.model), "containerPath": str(self.places.model)}
                    ],
                }
            ],
        }
        path = self.places.state / "kind.yaml"
        path.write_text(json.dumps(config))
        self._kind.create(path)
        runtime_class = {
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": {"name": "vllm-cpu"},
            "handler": "runc",
        }
        manifest = self.places.state / "runtime-class.json"
        manifest.write_text(json.dumps(runtime_class))
        self.kubectl("apply", "-f", str(manifest))

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig, for use inside the node's network."""
        path = self.places.state / "kind.kubeconfig"
        text = subprocess.run(
            [str(self._kind.kind_path), "get", "kubeconfig", "--internal", "--name", "servingtiers-e2e"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        path.touch(mode=0o600)
        path.write_text(text.replace(f"https://{_NODE}:", "https://127.0.0.1:"))
        return path

    @property
    def kubectl_path(self) -> Path:
        """The program."""
        return Path(self._kind.kubectl_path)

    def images(self) -> None:
        """Build the images with Docker and load them."""
        root = _E2E.parent
        for name, context, dockerfile in (
            (built.OPERATOR, root, root / "Dockerfile"),
            (built.ENGINE, _E2E, _E2E / "images" / "engine-full.Dockerfile"),
            (built.ROUTER, _E2E, _E2E / "images" / "router-full.Dockerfile"),
            (built.PROMETHEUS, _E2E, _E2E / "images" / "prometheus-full.Dockerfile"),
        ):
            say(f"building image {name}")
            subprocess.run(
                ["docker", "build", "-q", "-t", name, "-f", str(dockerfile), str(context)], check=True
            )
            self._kind.load_docker_image(name)

    def enter(self) -> None:
        """Move this thread, and all it starts, into the node's network.

        Raises:
            OSError: It is not permitted.
        """
        pid = subprocess.run(
            ["docker", "inspect", "-f", "{{.State.Pid}}", _NODE], check=True, capture_output=True, text=True
        ).stdout.strip()
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/proc/{pid}/ns/net").open() as handle:
            if libc.setns(handle.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        """Run kubectl as the administrator, from outside."""
        command = [str(self.kubectl_path), f"--kubeconfig={self._kind.kubeconfig_path}", *arguments]
        return subprocess.run(command, check=check, capture_output=True, text=True).stdout

    def set_accelerators(self, count: int, resource: str = "nvidia.com/gpu") -> None:
        """Let the node advertise ``count`` accelerators."""
        key = resource.replace("/", "~1")
        patch = [
            {"op": "add", "path": f"/status/{part}/{key}", "value": str(count)}
            for part in ("capacity", "allocatable")
        ]
        subprocess.run(
            [
                *(str(self.kubectl_path), f"--kubeconfig={self.kubeconfig}", "patch", "node", _NODE),
                *("--subresource=status", "--type=json", "-p", json.dumps(patch)),
            ],
            check=True,
            capture_output=True,
        )

    def stop(self, name: str, *, kill: bool = False) -> None:
        """Stop a static pod's program; its manifest is set aside, or the kubelet would start it again."""
        subprocess.run(
            [
                *("docker", "exec", _NODE, "sh", "-c"),
                f"mv /etc/kubernetes/manifests/{name}.yaml /tmp/ && pkill {'-9' if kill else '-15'} {name}",
            ],
            check=True,
        )

    def start(self, name: str) -> None:
        """Let the kubelet start it again."""
        subprocess.run(
            ["docker", "exec", _NODE, "sh", "-c", f"mv /tmp/{name}.yaml /etc/kubernetes/manifests/"],
            check=True,
        )

    def wait_for_api_server(self) -> None:
        """Return when the API server is ready.

        Raises:
            TimeoutError: Not within two minutes.
        """
        end = time.monotonic() + 120
        while time.monotonic() < end:
            done = subprocess.run(
                [str(self.kubectl_path), f"--kubeconfig={self.kubeconfig}", "get", "--raw", "/readyz"],
                check=False,
                capture_output=True,
                text=True,
            )
            if done.stdout == "ok":
                return
            time.sleep(0.5)
        raise TimeoutError("the API server is not ready after two minutes")
