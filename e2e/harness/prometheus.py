"""A real Prometheus in the cluster, configured as most are: pods by discovery, ``namespace`` and ``pod`` as labels."""

from __future__ import annotations

import json
import math
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

import yaml

from harness.kube import Kube, pod_ready, wait_for

__all__ = ["NAMESPACE", "Prometheus", "install"]

NAMESPACE = "monitoring"
_LABELS = {"app.kubernetes.io/name": "prometheus"}


def _job(name: str, component: str, port: str) -> dict[str, Any]:
    return {
        "job_name": name,
        "kubernetes_sd_configs": [{"role": "pod"}],
        "relabel_configs": [
            {
                "source_labels": ["__meta_kubernetes_pod_label_app_kubernetes_io_component"],
                "regex": component,
                "action": "keep",
            },
            {"source_labels": ["__meta_kubernetes_pod_container_port_name"], "regex": port, "action": "keep"},
            {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
            {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
            {"source_labels": ["__meta_kubernetes_pod_label_servingtiers_io_tier"], "target_label": "tier"},
        ],
    }


def _config() -> str:
    jobs = [
        _job("engines", "engine", "http"),
        _job("routers", "router", "metrics"),
        _job("operator", "operator", "metrics"),
    ]
    return yaml.safe_dump(
        {"global": {"scrape_interval": "5s", "scrape_timeout": "4s"}, "scrape_configs": jobs}, sort_keys=False
    )


def _objects(image: str) -> list[dict[str, Any]]:
    read = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    account = {"kind": "ServiceAccount", "name": "prometheus", "namespace": NAMESPACE}
    rbac = "rbac.authorization.k8s.io"
    container = {
        "name": "prometheus",
        "image": image,
        "args": [
            "--config.file=/etc/prometheus/prometheus.yml",
            "--storage.tsdb.path=/data",
            "--web.listen-address=:9090",
            "--query.lookback-delta=30s",
        ],
        "ports": [{"name": "web", "containerPort": 9090}],
        "readinessProbe": {"httpGet": {"path": "/-/ready", "port": "web"}, "periodSeconds": 2},
        "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "1Gi"}},
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/prometheus"},
            {"name": "data", "mountPath": "/data"},
        ],
    }
    pod = {
        "serviceAccountName": "prometheus",
        "terminationGracePeriodSeconds": 2,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": "prometheus"}},
            {"name": "data", "emptyDir": {}},
        ],
    }
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "prometheus"}},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "prometheus"},
            "rules": [read],
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "prometheus"},
            "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": "prometheus"},
            "subjects": [account],
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "prometheus"},
            "data": {"prometheus.yml": _config()},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "prometheus"},
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": _LABELS},
                "template": {"metadata": {"labels": _LABELS}, "spec": pod},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "prometheus"},
            "spec": {"selector": _LABELS, "ports": [{"name": "web", "port": 9090, "targetPort": "web"}]},
        },
    ]


@dataclass(frozen=True, slots=True)
class Prometheus:
    """Prometheus in the cluster."""

    kube: Kube
    url: str

    def value(self, query: str) -> float:
        """Return the value of a query that gives one number; NaN where it gives none."""
        address = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(address, timeout=10) as answer:  # noqa: S310 - a Service of the cluster under test
            result = json.load(answer)["data"]["result"]
        return float(result[0]["value"][1]) if result else math.nan

    def stop(self) -> None:
        """Take Prometheus away."""
        self.kube.run("scale", "deployment/prometheus", "--replicas=0", namespace=NAMESPACE)
        wait_for("Prometheus gone", 60, lambda: not self.kube.listed("pods", "", NAMESPACE))

    def start(self) -> None:
        """Bring it back, empty."""
        self.kube.run("scale", "deployment/prometheus", "--replicas=1", namespace=NAMESPACE)
        self.wait()

    def wait(self) -> None:
        """Return when it answers."""
        wait_for("Prometheus", 90, lambda: any(pod_ready(pod) for pod in self.kube.pods("", NAMESPACE)))
        time.sleep(1)


def install(kube: Kube, image: str) -> Prometheus:
    """Install Prometheus and wait for it."""
    namespace, *others = _objects(image)
    kube.apply(namespace)
    kube.apply(*others, namespace=NAMESPACE)
    prometheus = Prometheus(kube, kube.service_url("prometheus", 9090, NAMESPACE))
    prometheus.wait()
    return prometheus
