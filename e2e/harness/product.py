"""The product in the cluster: installed as a platform team does it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.kube import Kube, KubeError, pod_ready, wait_for
from harness.tiers import ACCELERATOR

__all__ = ["Product"]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "servingtiers"
RELEASE = "servingtiers"


def _values(images: Mapping[str, str], telemetry: Mapping[str, Any]) -> dict[str, Any]:
    repository, _, tag = images["operator"].rpartition(":")
    bound = yaml.safe_load((CHART / "values.yaml").read_text())["config"]["accelerators"]
    return {
        "image": {"repository": repository, "tag": tag},
        "operator": {"extraEnv": [{"name": "USER", "value": "servingtiers"}]},
        "config": {
            "accelerators": {
                **dict.fromkeys(bound),
                ACCELERATOR: {"nodeSelector": None, "runtimeClassName": "vllm-cpu", "pricePerHour": "0.10"},
            },
            "images": {"engine": images["engine"], "router": images["router"]},
            "telemetry": dict(telemetry),
            # Two cores carry the whole cluster.
            "routerResources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}},
        },
    }


@dataclass(frozen=True, slots=True)
class Product:
    """The release in one cluster."""

    kube: Kube
    helm: Path
    images: Mapping[str, str]
    """Names of the operator's, engine's and router's images in the cluster."""
    scratch: Path

    def prepare_namespace(self, models: Path) -> None:
        """Make the namespace, restricted, and the claim that holds the model."""
        namespace = self.kube.namespace
        self.kube.apply(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {
                    "name": namespace,
                    "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{namespace}-models"},
                "spec": {
                    "capacity": {"storage": "1Gi"},
                    "accessModes": ["ReadOnlyMany"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "storageClassName": "",
                    "claimRef": {"namespace": namespace, "name": "models"},
                    "hostPath": {"path": str(models)},
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": "models", "namespace": namespace},
                "spec": {
                    "accessModes": ["ReadOnlyMany"],
                    "storageClassName": "",
                    "volumeName": f"{namespace}-models",
                    "resources": {"requests": {"storage": "1Gi"}},
                },
            },
        )

    def run_helm(self, *arguments: str) -> str:
        """Run Helm.

        Raises:
            KubeError: It failed.
        """
        done = subprocess.run(
            [str(self.helm), *arguments, "--namespace", self.kube.namespace],
            check=False,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "KUBECONFIG": str(self.kube.kubeconfig),
                "HELM_CACHE_HOME": str(self.scratch / "helm"),
                "HELM_CONFIG_HOME": str(self.scratch / "helm"),
                "HELM_DATA_HOME": str(self.scratch / "helm"),
            },
        )
        if done.returncode:
            raise KubeError(f"helm {arguments[0]}: {done.stderr.strip()}")
        return done.stdout

    def install(self, telemetry: Mapping[str, Any] | None = None) -> None:
        """Install or upgrade the release and wait until the operator runs."""
        values = self.scratch / "values.yaml"
        wanted = telemetry or {"source": "Scrape", "interval": "5s", "window": "30s"}
        values.write_text(yaml.safe_dump(_values(self.images, wanted)))
        self.run_helm(
            "upgrade", "--install", RELEASE, str(CHART), "--values", str(values), "--wait", "--timeout=3m"
        )
        wait_for("operator ready", 90, lambda: any(pod_ready(pod) for pod in self.operators()))

    def operators(self) -> list[dict[str, Any]]:
        """Return the operator's pods."""
        return self.kube.pods("app.kubernetes.io/name=servingtiers,app.kubernetes.io/component=operator")

    def log(self, lines: int = 40) -> str:
        """Return the operator's last lines."""
        names = [pod["metadata"]["name"] for pod in self.operators()]
        return self.kube.run("logs", names[0], f"--tail={lines}", check=False) if names else "no operator pod"
