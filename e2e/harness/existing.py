"""A cluster that is there already, by its kubeconfig: nothing of its nodes or control plane is touched.

Pods and Services are reached through the API server (``kubectl proxy``), so the tests may run anywhere. What a scenario
would do to the control plane is skipped.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import pytest

from harness.kube import open_proxy
from onenode.places import Places

__all__ = ["ExistingCluster"]

_RESOURCE = "nvidia.com/gpu"


class ExistingCluster:
    """What :class:`onenode.cluster.Cluster` offers to scenarios, as far as it can be had of somebody's cluster."""

    def __init__(self, places: Places, kubeconfig: Path, kubectl: Path) -> None:
        self.places = places
        self.kubeconfig = kubeconfig
        self.kubectl_path = kubectl
        self.proxy = ""
        """Base URL of the API server for this process: no credentials needed behind it."""
        self._process: subprocess.Popen[str] | None = None
        self._advertised: str | None = None

    def up(self) -> None:
        """Look whether it answers, and open a way into it.

        Raises:
            pytest.UsageError: It does not answer.
        """
        self.places.state.mkdir(parents=True, exist_ok=True)
        seen = self._kubectl("get", "nodes", "-o=json", check=False)
        if seen.returncode:
            raise pytest.UsageError(f"{self.kubeconfig}: {seen.stderr.strip()}")
        nodes = json.loads(seen.stdout)["items"]
        # Nodes with real accelerators keep them; elsewhere one node is told to advertise some.
        if not any(int(node["status"]["allocatable"].get(_RESOURCE, "0")) for node in nodes):
            self._advertised = nodes[0]["metadata"]["name"]
        self._process, self.proxy = open_proxy(self.kubectl_path, self.kubeconfig)

    def down(self) -> None:
        """Close the way into it, and take back what was advertised."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
        if self._advertised is not None:
            self._patch([{"op": "remove", "path": f"/status/capacity/{_RESOURCE.replace('/', '~1')}"}])

    def enter(self) -> None:
        """Nothing to enter: everything is reached through the API server."""

    def set_accelerators(self, count: int) -> None:
        """Let one node advertise accelerators, where the cluster has none of its own."""
        if self._advertised is None:
            return
        path = _RESOURCE.replace("/", "~1")
        self._patch(
            [
                {"op": "add", "path": f"/status/{part}/{path}", "value": str(count)}
                for part in ("capacity", "allocatable")
            ]
        )

    def _patch(self, operations: list[dict[str, str]]) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self._kubectl(
                *("patch", "node", str(self._advertised), "--subresource=status", "--type=json"),
                *("-p", json.dumps(operations)),
            )

    def _kubectl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.kubectl_path), f"--kubeconfig={self.kubeconfig}", *arguments],
            check=check,
            capture_output=True,
            text=True,
        )

    def stop(self, name: str, *, kill: bool = False) -> None:
        """Skip the rest of the scenario: somebody else's control plane is left alone."""
        del kill
        pytest.skip(f"{name} of an existing cluster is left alone")

    def start(self, name: str) -> None:
        """See :meth:`stop`."""
        self.stop(name)

    def wait_for_api_server(self) -> None:
        """It was not stopped."""
