"""Where everything is kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from servingtiers.lab.binaries import cache_folder

__all__ = ["NODE_ADDRESS", "NODE_NAME", "Places"]

NODE_NAME = "node-1"
NODE_ADDRESS = "10.88.0.1"
"""Address of the node, of the API server and of DNS, inside the cluster's own network namespace."""


@dataclass(frozen=True, slots=True)
class Places:
    """Folders and names of one cluster; the default one is shared by everything a user runs."""

    cache: Path
    """What is slow to make and safe to keep: programs, images, the model."""
    state: Path
    """What belongs to the running cluster: removed when it is taken down."""
    run: Path
    """Sockets; their paths must stay below 108 characters."""
    namespace: str
    """Name of the network namespace."""

    @classmethod
    def default(cls) -> Places:
        """Return the places under the user's cache folder (``$XDG_CACHE_HOME/servingtiers/e2e``).

        The cluster's name is ``SERVINGTIERS_E2E_NAME``; where scenarios run side by side, each worker after the first
        has a cluster of its own beside it.
        """
        name = os.environ.get("SERVINGTIERS_E2E_NAME", "servingtiers-e2e")
        worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
        return cls.named(name if worker == "0" else f"{name}-{worker}")

    @classmethod
    def named(cls, name: str) -> Places:
        """Return the places of the cluster with this name."""
        cache = cache_folder() / "e2e"
        return cls(
            cache=cache,
            state=cache / "clusters" / name,
            run=Path("/run") / name,
            namespace=name,
        )

    def beside(self) -> list[Places]:
        """Return the places of the clusters that other workers made beside this one."""
        folders = sorted(self.state.parent.glob(f"{self.namespace}-*"))
        return [Places.named(each.name) for each in folders if each.name.rpartition("-")[2].isdigit()]

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.state / "admin.kubeconfig"

    @property
    def netns(self) -> Path:
        """The bind mount that keeps the network namespace."""
        return Path("/var/run/netns") / self.namespace

    @property
    def containerd_socket(self) -> Path:
        """Socket of containerd."""
        return self.run / "containerd.sock"

    @property
    def engine(self) -> Path:
        """The CPU engine: a virtual environment that the runtime mounts into engine pods."""
        return self.cache / "engine" / "venv"

    @property
    def model(self) -> Path:
        """Folder of model folders."""
        return self.cache / "models"

    @property
    def logs(self) -> Path:
        """Logs of the node's own programs."""
        return self.state / "logs"
