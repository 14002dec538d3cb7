"""A cluster as the scenarios see it: objects as ``kubectl`` shows and takes them, Services by address."""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from kubernetes.client import ApiClient, ApiException
from kubernetes.config import new_client_from_config
from urllib3.exceptions import HTTPError

__all__ = ["Kube", "KubeError", "WaitError", "open_proxy", "wait_for"]


_GROUPS = {
    "deployment": "apis/apps/v1",
    "pod": "api/v1",
    "service": "api/v1",
    "servingtier": "apis/servingtiers.io/v1alpha1",
}
"""Kinds that are looked at all the time, which a ``kubectl`` for each look would make costly; and where they are."""


class KubeError(RuntimeError):
    """``kubectl`` or the API server failed; the message is its own."""


class WaitError(AssertionError):
    """Something did not come about in time; the message says what was there instead."""


def wait_for(what: str, seconds: float, look: Callable[[], object], *, every: float = 1.0) -> float:
    """Return after how many seconds ``look`` first returned something true.

    Args:
        what: What is waited for, for the message.
        seconds: The limit.
        look: Looks once; what it last returned or raised goes into the message.
        every: Pause between looks, seconds.

    Raises:
        WaitError: The limit passed.
    """
    begun = time.monotonic()
    last: object = None
    while True:
        try:
            last = look()
            if last:
                return time.monotonic() - begun
        except (KubeError, OSError) as error:
            last = error
        if time.monotonic() - begun > seconds:
            raise WaitError(f"{what}: not within {seconds:.0f} s (last: {last!r})")
        time.sleep(every)


@dataclass(frozen=True, slots=True)
class Kube:
    """One cluster, by its kubeconfig."""

    kubeconfig: Path
    kubectl: Path
    namespace: str = "llm"
    proxy: str = ""
    """Base URL of a proxy to the API server; empty where pods and Services are reached by their addresses."""

    def run(
        self, *arguments: str, stdin: str | None = None, namespace: str | None = None, check: bool = True
    ) -> str:
        """Run kubectl in the namespace and return what it prints.

        Raises:
            KubeError: It failed and ``check`` is true.
        """
        done = subprocess.run(
            [
                *(
                    str(self.kubectl),
                    f"--kubeconfig={self.kubeconfig}",
                    f"--namespace={namespace or self.namespace}",
                ),
                *arguments,
            ],
            input=stdin,
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
        )
        if check and done.returncode:
            raise KubeError(f"kubectl {' '.join(arguments[:3])}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *objects: Mapping[str, Any], namespace: str | None = None) -> None:
        """Apply objects as a user does."""
        self.run("apply", "-f", "-", stdin=yaml.safe_dump_all(objects), namespace=namespace)

    def get(self, kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
        """Return one object."""
        return self._read(kind, name, "", namespace)

    def listed(self, kind: str, selector: str = "", namespace: str | None = None) -> list[dict[str, Any]]:
        """Return the objects of a kind."""
        found: list[dict[str, Any]] = self._read(kind, "", selector, namespace)["items"]
        return found

    def _read(self, kind: str, name: str, selector: str, namespace: str | None) -> dict[str, Any]:
        singular = kind.removesuffix("s")
        group = _GROUPS.get(singular)
        if group is None:
            command = ("get", kind, name or f"--selector={selector}", "-o=json")
            return _object(self.run(*command, namespace=namespace))
        api = _api(self.kubeconfig)
        try:
            request = api.param_serialize(
                "GET",
                f"/{group}/namespaces/{namespace or self.namespace}/{singular}s{f'/{name}' if name else ''}",
                query_params=[("labelSelector", selector)] if selector else [],
                auth_settings=["BearerToken"],
            )
            answer = api.call_api(*request, _request_timeout=30)
            document = answer.read()
        except (ApiException, HTTPError) as error:
            raise KubeError(f"get {kind} {name or selector}: {error}") from error
        if answer.status != 200:
            raise KubeError(f"get {kind} {name or selector}: {document.decode(errors='replace')[:300]}")
        return _object(document)

    def patch(self, kind: str, name: str, body: Mapping[str, Any], namespace: str | None = None) -> None:
        """Merge-patch one object."""
        self.run("patch", kind, name, "--type=merge", "-p", json.dumps(body), namespace=namespace)

    def delete(self, kind: str, name: str, *flags: str, namespace: str | None = None) -> None:
        """Delete one object; one that is gone is fine."""
        self.run("delete", kind, name, "--ignore-not-found", *flags, namespace=namespace)

    def service_url(self, name: str, port: int = 80, namespace: str | None = None) -> str:
        """Return the base URL of a Service."""
        if self.proxy:
            return (
                f"{self.proxy}/api/v1/namespaces/{namespace or self.namespace}/services/{name}:{port}/proxy"
            )
        spec = self.get("service", name, namespace)["spec"]
        return f"http://{spec['clusterIP']}:{port}"

    def pod_url(self, pod: Mapping[str, Any], port: int = 8000) -> str:
        """Return the base URL of a pod."""
        if self.proxy:
            meta = pod["metadata"]
            return f"{self.proxy}/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}:{port}/proxy"
        return f"http://{pod['status']['podIP']}:{port}"

    def pods(self, selector: str, namespace: str | None = None) -> list[dict[str, Any]]:
        """Return the pods that are not on their way out."""
        return [
            pod
            for pod in self.listed("pods", selector, namespace)
            if "deletionTimestamp" not in pod["metadata"]
        ]

    def engines(self, tier: str, pool: str | None = None) -> list[dict[str, Any]]:
        """Return the engine pods at home in a tier."""
        selector = f"app.kubernetes.io/component=engine,servingtiers.io/tier={tier}"
        return self.pods(selector + (f",servingtiers.io/pool={pool}" if pool else ""))

    def routers(self, tier: str) -> list[dict[str, Any]]:
        """Return the router pods of a tier."""
        return self.pods(f"app.kubernetes.io/component=router,servingtiers.io/tier={tier}")

    def usage(self, pod: Mapping[str, Any]) -> tuple[float, float, float]:
        """Return moment, processor seconds used so far and resident MiB of a pod's containers, by the kubelet."""
        node = pod["spec"]["nodeName"]
        document = json.loads(self.run("get", "--raw", f"/api/v1/nodes/{node}/proxy/stats/summary"))
        mine = next(each for each in document["pods"] if each["podRef"]["uid"] == pod["metadata"]["uid"])
        containers = mine["containers"]
        at = max(datetime.fromisoformat(each["cpu"]["time"]).timestamp() for each in containers)
        seconds = sum(each["cpu"]["usageCoreNanoSeconds"] for each in containers) / 1e9
        return at, seconds, sum(each["memory"]["rssBytes"] for each in containers) / 2**20

    def image_mib(self, image: str) -> float:
        """Return the size of an image that a node holds, MiB; NaN where none does."""
        for node in self.listed("nodes"):
            for each in node["status"].get("images", []):
                if image in (each.get("names") or ()):
                    return float(each["sizeBytes"]) / 2**20
        return math.nan

    def condition(self, tier: str, kind: str) -> dict[str, Any]:
        """Return one condition of a tier; empty where there is none yet."""
        conditions = self.get("servingtier", tier).get("status", {}).get("conditions", [])
        return next((each for each in conditions if each["type"] == kind), {})

    def wait_ready(self, *tiers: str, seconds: float = 240) -> float:
        """Return how long it took until every tier is Ready and its routers are."""

        def ready() -> bool:
            return all(
                self.condition(tier, "Ready").get("status") == "True"
                and any(pod_ready(pod) for pod in self.routers(tier))
                for tier in tiers
            )

        return wait_for(f"tiers {', '.join(tiers)} ready", seconds, ready)


def _object(document: str | bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(document)
    return found


@cache
def _api(kubeconfig: Path) -> ApiClient:
    return new_client_from_config(str(kubeconfig), persist_config=False)


def open_proxy(kubectl: Path, kubeconfig: Path) -> tuple[subprocess.Popen[str], str]:
    """Start ``kubectl proxy``; return it and its base URL, behind which no credentials are needed."""
    process = subprocess.Popen(
        [str(kubectl), f"--kubeconfig={kubeconfig}", "proxy", "--port=0"], stdout=subprocess.PIPE, text=True
    )
    line = process.stdout.readline() if process.stdout else ""
    return process, f"http://{line.split()[-1]}"


def pod_ready(pod: Mapping[str, Any]) -> bool:
    """Return whether a pod's Ready condition is true."""
    return any(
        each["type"] == "Ready" and each["status"] == "True"
        for each in pod.get("status", {}).get("conditions", [])
    )


def scrape(url: str) -> dict[str, float]:
    """Return the samples of a metrics page, ``name{labels}`` to value."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - an address of the cluster under test
        lines = answer.read().decode().splitlines()
    samples: dict[str, float] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples


def total(samples: Mapping[str, float], name: str, *labels: str) -> float:
    """Return the sum of the samples of a metric that carry all ``labels`` (``key="value"``)."""
    return sum(
        value
        for key, value in samples.items()
        if key.split("{", 1)[0] == name and all(label in key for label in labels)
    )
