"""Simulated nodes on the real ring: the real scheduler and controllers decide, the nodes play the kubelet."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from servingtiers.lab.kube import Kube
from servingtiers.lab.nodes import NodeOptions, NodeShape, SimulatedNodes, expand
from servingtiers.lab.routers import locate_router

HEALTH = {"path": "/health", "port": "http"}
MODEL = "meta-llama/Llama-3.1-8B-Instruct"


def test_variables_are_expanded_as_kubernetes_does():
    """Unknown names stay, a doubled dollar escapes."""
    assert expand("$(A)-$(B)-$$(A)-$A", {"A": "1"}) == "1-$(B)-$(A)-$A"


def engine_pod(*flags: str, prestop: int = 0) -> dict[str, Any]:
    """Return a pod spec like those the operator renders."""
    container = {
        "name": "engine",
        "image": "vllm/vllm-openai:v0.32.0",
        "command": ["vllm", "serve"],
        "args": [
            MODEL,
            "--served-model-name=chat",
            "--host=0.0.0.0",
            "--port=8000",
            "--shutdown-timeout=5",
            *flags,
        ],
        "env": [
            {"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
        ],
        "ports": [{"name": "http", "containerPort": 8000}],
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
        "startupProbe": {"httpGet": HEALTH, "periodSeconds": 1, "failureThreshold": 60},
        "readinessProbe": {"httpGet": HEALTH, "periodSeconds": 1},
        "livenessProbe": {"httpGet": HEALTH, "periodSeconds": 1, "failureThreshold": 3},
        "lifecycle": {"preStop": {"sleep": {"seconds": prestop}}} if prestop else {},
    }
    return {"terminationGracePeriodSeconds": 20, "containers": [container]}


def router_pod(namespace: str, *flags: str) -> dict[str, Any]:
    """Return a router pod like those the operator renders."""
    return {
        "serviceAccountName": "router",
        "containers": [
            {
                "name": "router",
                "image": "vllm/vllm-router:v0.1.17",
                "command": ["vllm-router"],
                "args": [
                    *("--service-discovery", "--host=0.0.0.0", "--port=8000", "--policy=round_robin"),
                    *(f"--service-discovery-namespace={namespace}", "--service-discovery-port=8000"),
                    *("--prometheus-host=$(POD_IP)", "--prometheus-port=29000"),
                    *flags,
                ],
                "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
                "ports": [{"name": "http", "containerPort": 8000}],
                "readinessProbe": {"httpGet": {"path": "/readiness", "port": "http"}, "periodSeconds": 1},
            }
        ],
    }


class Place:
    """A namespace whose pods go to simulated nodes of its own."""

    def __init__(self, kube: Kube, namespace: str) -> None:
        self.kube = kube
        self.namespace = namespace
        self.pods_path = f"/api/v1/namespaces/{namespace}/pods"

    async def deploy(self, name: str, spec: dict[str, Any], replicas: int = 1, **labels: str) -> None:
        """Create a Deployment whose pods stay on this place's nodes."""
        spec = {
            **spec,
            "nodeSelector": {"lab": self.namespace},
            "tolerations": [{"key": "lab", "value": self.namespace, "effect": "NoSchedule"}],
        }
        template = {"metadata": {"labels": {"app": name, **labels}}, "spec": spec}
        body = {
            "metadata": {"name": name},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": template},
        }
        await self.kube.request("POST", f"/apis/apps/v1/namespaces/{self.namespace}/deployments", body)

    async def scale(self, name: str, replicas: int) -> None:
        """Set a Deployment's replicas."""
        path = f"/apis/apps/v1/namespaces/{self.namespace}/deployments/{name}"
        await self.kube.patch(path, {"spec": {"replicas": replicas}})

    async def pods(self, app: str | None = None) -> list[dict[str, Any]]:
        """Return the pods."""
        items = (await self.kube.get(self.pods_path))["items"]
        return [pod for pod in items if app in {None, pod["metadata"]["labels"].get("app")}]

    async def until(
        self, holds: Callable[[list[dict[str, Any]]], bool], app: str | None = None, seconds: float = 30.0
    ) -> list[dict[str, Any]]:
        """Wait until something holds of the pods."""
        deadline = time.monotonic() + seconds
        while not holds(pods := await self.pods(app)):
            states = [(pod["metadata"]["name"], pod["status"]["phase"], ready(pod)) for pod in pods]
            assert time.monotonic() < deadline, states
            await asyncio.sleep(0.1)
        return pods


def ready(pod: dict[str, Any]) -> bool:
    """Whether the pod is Ready."""
    conditions = pod["status"].get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client."""
    async with aiohttp.ClientSession() as one:
        yield one


@pytest.fixture
async def place(control_plane, namespace) -> AsyncIterator[tuple[Place, SimulatedNodes]]:
    """Two nodes with three H100s, tainted for this test."""
    shapes = [
        NodeShape(
            f"{namespace}-{number}",
            gpus=gpus,
            labels={"lab": namespace},
            taints=({"key": "lab", "value": namespace, "effect": "NoSchedule"},),
        )
        for number, gpus in enumerate((2, 1))
    ]
    options = NodeOptions(time_factor=0.02, router=locate_router())
    async with SimulatedNodes(control_plane.connection(), shapes, options) as nodes:
        yield Place(nodes.kube, namespace), nodes


async def allow_routers(place: Place) -> None:
    """Give the service account `router` what vllm-router needs: to read pods."""
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{place.namespace}"
    name = {"metadata": {"name": "router"}}
    rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]
    subject = {"kind": "ServiceAccount", "name": "router", "namespace": place.namespace}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "router"}
    await place.kube.request("POST", f"/api/v1/namespaces/{place.namespace}/serviceaccounts", name)
    await place.kube.request("POST", f"{rbac}/roles", {**name, "rules": rules})
    await place.kube.request(
        "POST", f"{rbac}/rolebindings", {**name, "roleRef": reference, "subjects": [subject]}
    )


async def complete(session: aiohttp.ClientSession, address: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """Ask for a completion."""
    document = {"model": "chat", "prompt": "w " * 100, "max_tokens": 10, **body}
    async with session.post(f"http://{address}:8000/v1/completions", json=document) as answer:
        return answer.status, await answer.json()


@pytest.mark.ring
async def test_pods_become_engines_until_the_gpus_are_out_and_a_freed_gpu_is_taken(place, session):
    """The real scheduler leaves the fourth Pending; its reason is the real one."""
    lab, nodes = place
    await lab.deploy("chat", engine_pod(), 4)
    pods = await lab.until(lambda pods: sum(map(ready, pods)) == 3)
    pending = next(pod for pod in pods if not ready(pod))
    assert pending["status"]["phase"] == "Pending"
    assert "Insufficient nvidia.com/gpu" in pending["status"]["conditions"][0]["message"]
    addresses = {pod["status"]["podIP"] for pod in pods if ready(pod)}
    assert len(addresses) == 3
    for address in addresses:
        assert (await complete(session, address))[0] == 200
    victim = next(pod for pod in pods if ready(pod))["metadata"]["name"]
    await lab.kube.delete(f"{lab.pods_path}/{victim}")

    def taken(pods: list[dict[str, Any]]) -> bool:
        names = {pod["metadata"]["name"] for pod in pods if ready(pod)}
        return len(names) == 3 and victim not in names

    # Either the pod that waited or the victim's replacement gets it: that is the scheduler's business.
    await lab.until(taken)
    assert len(nodes.engines) == 3


@pytest.mark.ring
async def test_a_deleted_pod_serves_through_its_prestop_and_drains_before_it_goes(place, session):
    """Nobody loses an answer at a scale-down, and the pod is not Ready meanwhile."""
    lab, _ = place
    await lab.deploy("chat", engine_pod(prestop=1))
    (pod,) = await lab.until(lambda pods: sum(map(ready, pods)) == 1)
    address = pod["status"]["podIP"]
    long = asyncio.create_task(complete(session, address, max_tokens=300))
    await asyncio.sleep(0.2)
    await lab.scale("chat", 0)
    await lab.until(lambda pods: bool(pods) and not ready(pods[0]), seconds=5)
    assert (await complete(session, address))[0] == 200, "during preStop an engine still serves"
    status, answer = await long
    assert (status, answer["usage"]["completion_tokens"]) == (200, 300)
    await lab.until(lambda pods: not pods)
    with pytest.raises(aiohttp.ClientConnectorError):
        await complete(session, address)


@pytest.mark.ring
async def test_a_crashed_engine_and_one_that_stops_answering_are_restarted_in_place(place):
    """Restart counts, readiness and the liveness probe are as a kubelet's."""
    lab, nodes = place
    await lab.deploy("chat", engine_pod())
    (pod,) = await lab.until(lambda pods: sum(map(ready, pods)) == 1)
    key = (lab.namespace, pod["metadata"]["name"])

    def restarted(times: int) -> Callable[[list[dict[str, Any]]], bool]:
        return lambda pods: (
            ready(pods[0]) and pods[0]["status"]["containerStatuses"][0]["restartCount"] == times
        )

    await nodes.engines[key].kill()
    await lab.until(restarted(1))
    nodes.engines[key].faults.health_status = 503
    (again,) = await lab.until(restarted(2))
    assert again["metadata"]["uid"] == pod["metadata"]["uid"]


@pytest.mark.ring
async def test_the_router_finds_engines_by_label_and_a_label_moves_one_to_another_tier(place, session):
    """With the real vllm-router where it can be had: its service account may only read pods, and that is enough."""
    lab, _ = place
    await allow_routers(lab)
    await lab.deploy("chat", engine_pod(), 2, route="chat")
    await lab.deploy("router", router_pod(lab.namespace, "--selector", "route=chat"))
    await lab.deploy("other-router", router_pod(lab.namespace, "--selector", "route=other"))
    engines = await lab.until(lambda pods: sum(map(ready, pods)) == 2, "chat")
    (router,) = await lab.until(lambda pods: sum(map(ready, pods)) == 1, "router")
    (other,) = await lab.pods("other-router")
    for _ in range(4):
        assert (await complete(session, router["status"]["podIP"]))[0] == 200
    assert not ready(other), "a router without engines is not ready"
    lent = engines[0]["metadata"]["name"]
    await lab.kube.patch(f"{lab.pods_path}/{lent}", {"metadata": {"labels": {"route": "other"}}})
    (other,) = await lab.until(lambda pods: sum(map(ready, pods)) == 1, "other-router")
    assert (await complete(session, other["status"]["podIP"]))[0] == 200
    async with session.get(f"http://{other['status']['podIP']}:29000/metrics") as answer:
        page = await answer.text()
    assert f'{{worker="http://{engines[0]["status"]["podIP"]}:8000"}} 1' in page


@pytest.mark.ring
async def test_prefill_and_decode_pods_hand_the_prompt_over_through_the_router(place, session):
    """Every prompt token reaches decode as an external transfer, as in a real cluster."""
    lab, nodes = place
    await allow_routers(lab)
    for role, kv_role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        transfer = json.dumps({"kv_connector": "NixlConnector", "kv_role": kv_role})
        await lab.deploy(role, engine_pod(f"--kv-transfer-config={transfer}"), 1, role=role)
    flags = ("--vllm-pd-disaggregation", "--kv-connector=nixl")
    selectors = ("--prefill-selector", "role=prefill", "--decode-selector", "role=decode")
    await lab.deploy("router", router_pod(lab.namespace, *flags, *selectors))
    (router,) = await lab.until(lambda pods: sum(map(ready, pods)) == 1, "router")
    status, answer = await complete(session, router["status"]["podIP"])
    assert (status, answer["usage"]["completion_tokens"]) == (200, 10)
    (decode,) = await lab.pods("decode")
    metrics = nodes.engines[lab.namespace, decode["metadata"]["name"]].metrics
    assert (metrics.external_kv_transfer.value, metrics.local_compute.value) == (100.0, 0.0)
