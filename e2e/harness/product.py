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

__all__ = ["CHART", "Product", "values_of"]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "servingtiers"
RELEASE = "servingtiers"


@dataclass(frozen=True, slots=True)
class Product:
    """The release in one cluster."""

    kube: Kube
    helm: Path
    images: Mapping[str, str]
    """Names of the operator's, engine's and router's images in the cluster."""
    scratch: Path
    runtime_class: str | None = "vllm-cpu"
    """What mounts the engine's environment; None where the image holds it."""
    build: str = ""
    """Which build of the operator's image: a new one under the old name restarts the operator."""

    def prepare_namespace(self) -> None:
        """Make the namespace, restricted."""
        namespace = self.kube.namespace
        self.kube.apply(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {
                    "name": namespace,
                    "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
                },
            }
        )

    def mount_model(self, models: Path) -> None:
        """Make the claim that holds the model, from a folder of the node."""
        namespace = self.kube.namespace
        self.kube.apply(
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

    def make_model(self, claim: str | None) -> None:
        """Fill a claim with the tiny model, by a Job that runs the engine's own Python; or take one that is filled.

        Args:
            claim: A claim in the namespace that has the model in ``tiny``; None: make one of the default class.
        """
        if claim is not None:
            if claim != "models":
                raise KubeError(f"the scenarios mount a claim named models, not {claim}: name it so")
            return
        script = (ROOT / "e2e" / "tools" / "make_tiny_model.py").read_text()
        container = {
            "name": "make",
            "image": self.images["engine"],
            "command": ["python3", "/script/make.py", "/models/tiny"],
            "env": [
                {"name": "PYTHONPATH", "value": "/opt/vllm/lib/python3.11/site-packages"},
                {"name": "HF_HUB_OFFLINE", "value": "1"},
                {"name": "HOME", "value": "/tmp"},  # noqa: S108 - a volume of the pod alone
            ],
            "securityContext": {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "runAsNonRoot": True,
            },
            "volumeMounts": [
                {"name": "models", "mountPath": "/models"},
                {"name": "script", "mountPath": "/script"},
                {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod alone
            ],
        }
        security = {"runAsUser": 2000, "fsGroup": 2000, "seccompProfile": {"type": "RuntimeDefault"}}
        self.kube.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": "models"},
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "resources": {"requests": {"storage": "1Gi"}},
                },
            },
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "make-tiny-model"},
                "data": {"make.py": script},
            },
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": "make-tiny-model"},
                "spec": {
                    "backoffLimit": 2,
                    "template": {
                        "spec": {
                            "restartPolicy": "Never",
                            "securityContext": security,
                            "containers": [container],
                            "volumes": [
                                {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
                                {"name": "script", "configMap": {"name": "make-tiny-model"}},
                                {"name": "tmp", "emptyDir": {}},
                            ],
                        }
                    },
                },
            },
        )
        self.kube.run("wait", "--for=condition=complete", "job/make-tiny-model", "--timeout=10m")

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

    def install(self, telemetry: Mapping[str, Any] | None = None, chart: Path = CHART) -> None:
        """Install or upgrade the release and wait until the operator runs."""
        values = self.scratch / "values.yaml"
        values.write_text(yaml.safe_dump(values_of(self, telemetry)))
        self.run_helm(
            "upgrade", "--install", RELEASE, str(chart), "--values", str(values), "--wait", "--timeout=3m"
        )
        wait_for("operator ready", 90, lambda: any(pod_ready(pod) for pod in self.operators()))

    def operators(self) -> list[dict[str, Any]]:
        """Return the operator's pods."""
        return self.kube.pods("app.kubernetes.io/name=servingtiers,app.kubernetes.io/component=operator")

    def log(self, lines: int = 40) -> str:
        """Return the operator's last lines."""
        names = [pod["metadata"]["name"] for pod in self.operators()]
        return self.kube.run("logs", names[0], f"--tail={lines}", check=False) if names else "no operator pod"


def values_of(product: Product, telemetry: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the chart's values."""
    repository, _, tag = product.images["operator"].rpartition(":")
    bound = yaml.safe_load((CHART / "values.yaml").read_text())["config"]["accelerators"]
    ours = {"nodeSelector": None, "runtimeClassName": product.runtime_class, "pricePerHour": "0.10"}
    return {
        "image": {"repository": repository, "tag": tag},
        "operator": {
            "extraEnv": [{"name": "USER", "value": "servingtiers"}],
            "podAnnotations": {"build": product.build},
        },
        "config": {
            "accelerators": {**dict.fromkeys(bound), ACCELERATOR: ours},
            "images": {"engine": product.images["engine"], "router": product.images["router"]},
            "telemetry": dict(telemetry or {"source": "Scrape", "interval": "5s", "window": "30s"}),
            # Two cores carry the whole cluster.
            "routerResources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}},
        },
    }
