"""A mistake in the spec of one member of a TierPool: what serves stays as it is, and no engine is left to nobody."""

from __future__ import annotations

from typing import Any

import pytest

from in_memory import InMemoryCluster
from ring.harness import CONFIG, Silence, tier
from servingtiers.controller import Controller
from servingtiers.core.state import JsonObject
from servingtiers.core.times import to_time
from servingtiers.render import names

GROUP = ("llm", "pool/llama")
START = 1_800_000_000.0
FORBIDDEN = {"env": {"PYTHONPATH": "/x"}}


class Clock:
    now = START

    def __call__(self) -> float:
        return self.now


def member(name: str, kind: str, priority: int, **engine: Any) -> JsonObject:
    body = tier(
        name,
        tier=kind,
        model={"name": "meta-llama/Llama-3.1-8B-Instruct", "revision": "main", "servedName": "llama"},
        sharedPool={"name": "llama", "priority": priority},
        pool={
            "hardware": {"accelerators": ["h100-sxm-80gb"], "tensorParallel": 1},
            "engine": {"image": "vllm/vllm-openai:v0.32.0", "maxModelLen": 8192, "maxNumSeqs": 10} | engine,
            "scaling": {"minReplicas": 1, "maxReplicas": 4},
        },
    )
    body["metadata"]["namespace"] = "llm"
    return body


MEMBERS = {"chat": ("Latency", 200), "batch": ("Throughput", 10)}


class World:
    """Two members, three engines."""

    def __init__(self) -> None:
        self.cluster, self.clock = InMemoryCluster(), Clock()
        config = CONFIG.model_copy(update={"namespaces": ["llm"], "operator_namespace": "llm"})
        self.controller = Controller(self.cluster, config, Silence(), clock=self.clock)
        pool = {
            "apiVersion": "servingtiers.io/v1alpha1",
            "kind": "TierPool",
            "spec": {"servedModelName": "llama"},
        }
        self.cluster.put(pool | {"metadata": {"name": "llama", "namespace": "llm"}})
        for name in MEMBERS:
            self.write(name)

    def write(self, name: str, **engine: Any) -> None:
        self.cluster.put(member(name, *MEMBERS[name], **engine))

    def run(self, home: str, number: int, holder: str | None) -> None:
        """Put a ready engine of a tier; without a holder it is on its way to chat."""
        template = self.cluster.get_now(f"Deployment/{home}-pool")["spec"]["template"]
        labels = dict(template["metadata"]["labels"])
        marks = {} if holder == home else {names.MOVED_ANNOTATION: to_time(START - 900)}
        if holder is None:
            del labels[names.ROUTE_TIER_LABEL]
            marks[names.BOUND_ANNOTATION] = "chat"
        else:
            labels[names.ROUTE_TIER_LABEL] = holder
        born = to_time(START - 3600)
        meta = {"name": f"{home}-{number}", "namespace": "llm", "labels": labels, "annotations": marks}
        conditions = [
            {"type": kind, "status": "True", "lastTransitionTime": born} for kind in ("PodScheduled", "Ready")
        ]
        self.cluster.put(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": meta | {"creationTimestamp": born},
                "status": {"podIP": "10.0.0.1", "conditions": conditions},
            }
        )

    async def pass_(self, seconds: float = 0.0) -> None:
        self.clock.now += seconds
        await self.controller.relist()
        await self.controller.reconcile(GROUP)

    def condition(self, name: str, kind: str) -> JsonObject:
        found = self.cluster.get_now(f"ServingTier/{name}")["status"]["conditions"]
        return next(each for each in found if each["type"] == kind)

    def accepted(self, name: str) -> str:
        return self.condition(name, "Accepted")["status"]

    def pool(self, name: str) -> JsonObject:
        (found,) = self.cluster.get_now(f"ServingTier/{name}")["status"]["pools"]
        return found

    def holder(self, pod: str) -> str | None:
        return self.cluster.get_now(f"Pod/{pod}")["metadata"]["labels"].get(names.ROUTE_TIER_LABEL)


@pytest.fixture
async def world() -> World:
    made = World()
    await made.pass_()
    made.run("chat", 1, "chat")
    made.run("batch", 1, "batch")
    return made


async def test_a_borrower_whose_spec_is_refused_keeps_what_it_has_borrowed(world):
    """The condition promises it: what serves is left as it is."""
    world.run("batch", 2, "chat")
    await world.pass_()
    world.write("chat", **FORBIDDEN)
    for _ in range(5):
        await world.pass_(60.0)

    assert world.accepted("chat") == "False"
    assert world.holder("batch-2") == "chat"
    assert not [name for verb, name in world.cluster.writes if verb == "label"]


async def test_an_engine_on_its_way_comes_home_when_the_spec_of_its_home_is_refused(world):
    """Nobody's routers select it: it would cost and serve nobody until the spec is mended."""
    world.run("batch", 2, None)
    world.write("batch", **FORBIDDEN)
    for _ in range(5):
        await world.pass_(61.0)

    assert world.accepted("batch") == "False"
    assert world.holder("batch-2") == "batch"


async def test_a_refused_tier_tells_who_is_ready_now(world):
    """Its engines may go while nobody mends it, and then no alert may take it for serving."""
    await world.pass_()
    world.write("chat", **FORBIDDEN)
    await world.pass_(60.0)
    assert world.pool("chat")["ready"] == 1

    world.cluster.drop("Pod/chat-1")
    await world.pass_(60.0)
    assert world.pool("chat")["ready"] == 0
    assert world.condition("chat", "Ready")["reason"] == "NoReplicaReady"
