# the names of the tests are the sentences
"""Two tiers of a TierPool against a real API server: engines change their label, and nothing is lost when the operator is.

Pods are made by the real controllers; this test says of them what a kubelet would say. Loads are scripted.
"""

import asyncio
import re
import time

import pytest

from ring.harness import CONFIG, Namespace, install_crd, tier, writes
from ring.test_crash import CrashError, MortalCluster
from ring.workloads import differences
from servingtiers.adapters.cluster import Cluster
from servingtiers.controller import Controller
from servingtiers.core.signals import Coverage, Load, RouterLoad, TierLoad, Value, Zero
from servingtiers.core.times import to_time
from servingtiers.render import names

pytestmark = [pytest.mark.ring]

POOLS = "/apis/servingtiers.io/v1alpha1/namespaces/{namespace}/tierpools"
_DURATION = re.compile(r"for [0-9hms]+")
PODS = "/api/v1/namespaces/{namespace}/pods"


class Script:
    """Loads as the test says: how many sequences run in each tier; engines without a holder are drained."""

    def __init__(self) -> None:
        self.running = {"chat": 5.0, "batch": 18.0}

    async def read(self, tiers, now, *, complete=True):
        found = {}
        for each in tiers:
            serving = len(each.pools[0].pods)
            running = self.running[each.name]
            engines = Load(
                60.0,
                Coverage(serving, serving),
                running=Value(running) if running else Zero(),
                waiting=Zero(),
                **dict.fromkeys(("ttft", "tpot", "itl", "e2e"), Zero()),
            )
            in_flight = {pod.name: Value(5.0) for pod in each.pools[0].pods}
            in_flight |= {pod.name: Zero() for pod in each.unheld}
            router = RouterLoad(Coverage(1, 1), Value(1.0), Zero())
            found[each.key] = TierLoad({"pool": engines}, router, in_flight)
        return found

    async def close(self):
        return


class Clock:
    """Time that passes when the test says."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def member(name, kind, priority, replicas, **shared):
    body = tier(
        name,
        tier=kind,
        model={"name": "meta-llama/Llama-3.1-8B-Instruct", "revision": "main", "servedName": "llama"},
        sharedPool={"name": "llama", "priority": priority, **shared},
    )
    body["spec"]["pool"] = {
        "hardware": {"accelerators": ["h100-sxm-80gb"], "tensorParallel": 1},
        "engine": {"image": "vllm/vllm-openai:v0.32.0", "maxModelLen": 8192, "maxNumSeqs": 10},
        "scaling": {"minReplicas": replicas, "maxReplicas": 4},
    }
    return body


class Stage:
    """Two tiers, their TierPool, and an operator that can die."""

    def __init__(self, plane, space):
        self.plane, self.space = plane, space
        self.clock, self.script = Clock(), Script()
        self.dies_after, self.made, self.controller = None, 0, None
        self.cluster: MortalCluster | None = None

    def fresh(self):
        """Return a new operator: it knows nothing but what the API server tells."""
        config = CONFIG.model_copy(update={"namespaces": [self.space.name]})
        return Controller(self.cluster, config, self.script, clock=self.clock)

    async def settle(self, seconds=0.0):
        """Let the operator work for so long, and then until it writes nothing more; it may die on the way, once."""
        end = self.clock.now + seconds
        for _ in range(120):
            await self.kubelet()
            try:
                before = writes(self.controller)
                await self.controller.relist()
                await self.controller.read_loads()
                for key in [*self.controller.store.tiers]:
                    await self.controller.reconcile(key)
                    break  # the other member is in the same group
            except CrashError:
                self.cluster.dies_after = None
                self.controller = self.fresh()
                continue
            self.clock.now += 15.0
            if writes(self.controller) == before and self.clock.now >= end and not self.controller._moving:
                return
        raise AssertionError("still writing after 120 passes")

    async def kubelet(self):
        """Say of every pod that it is ready, for long already."""
        for deployment in await self.request(
            "GET", "/apis/apps/v1/namespaces/{namespace}/deployments", "items"
        ):
            await self.wait_for_pods(deployment)
        for pod in await self.pods():
            if pod["status"].get("conditions") and any(
                c["type"] == "Ready" and c["status"] == "True" for c in pod["status"]["conditions"]
            ):
                continue
            status = {
                "phase": "Running",
                "podIP": "10.0.0.1",
                "conditions": [
                    {"type": kind, "status": "True", "lastTransitionTime": to_time(self.clock.now - 3600)}
                    for kind in ("PodScheduled", "Ready", "ContainersReady")
                ],
            }
            await self.request("PATCH", PODS + f"/{pod['metadata']['name']}/status", None, {"status": status})

    async def wait_for_pods(self, deployment):
        """Wait until the controllers have made the pods that a Deployment wants."""
        wanted = deployment["spec"]["replicas"]
        selector = ",".join(f"{k}%3D{v}" for k, v in deployment["spec"]["selector"]["matchLabels"].items())
        for _ in range(200):
            pods = await self.request("GET", PODS + f"?labelSelector={selector}", "items")
            if len([pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]) == wanted:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{deployment['metadata']['name']}: {len(pods)} pods, {wanted} wanted")

    async def request(self, method, path, part=None, body=None):
        answer = await asyncio.to_thread(
            self.space.connection.request,
            method,
            path.format(namespace=self.space.name),
            body,
            content_type="application/merge-patch+json" if method == "PATCH" else "application/json",
        )
        return answer if part is None else answer[part]

    async def pods(self):
        found = await self.request("GET", PODS, "items")
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    async def holders(self):
        """Return (home, holder) of every engine, in order."""
        return sorted(
            (labels[names.TIER_LABEL], labels.get(names.ROUTE_TIER_LABEL) or "")
            for pod in await self.pods()
            if (labels := pod["metadata"]["labels"])[names.COMPONENT_LABEL] == names.ENGINE
        )

    async def outcome(self):
        """Return what the end is judged by."""
        tiers = {}
        for one in self.space.tiers():
            status = one["status"]
            (pool,) = status["pools"]
            moves = [d for d in status["decisions"] if "engine" in d]
            tiers[one["metadata"]["name"]] = {
                "replicas": status["replicas"],
                "cost": float(status["cost"]["perHour"]),
                "lent": pool["lent"],
                "borrowed": pool["borrowed"],
                "accepted": next(c["status"] for c in status["conditions"] if c["type"] == "Accepted"),
                "moves": [
                    (d["from"], d["to"], d["binding"], _DURATION.sub("for a while", d["reason"]))
                    for d in moves
                ],
            }
        deployments = await self.request("GET", "/apis/apps/v1/namespaces/{namespace}/deployments", "items")
        pool = await self.request("GET", POOLS + "/llama", "status")
        return {
            "holders": await self.holders(),
            "tiers": tiers,
            "replicas": {d["metadata"]["name"]: d["spec"]["replicas"] for d in deployments},
            "pool": {key: pool[key] for key in ("engines", "moved", "accelerators")},
            "conditions": {c["type"]: (c["status"], c["reason"]) for c in pool["conditions"]},
            "costs": sorted(
                pod["metadata"].get("annotations", {}).get(names.DELETION_COST_ANNOTATION, "")
                for pod in await self.pods()
            ),
        }


async def play(plane, space, cluster, dies_after=None):
    """A burst on chat: create, borrow, serve, give back. Return the outcomes of every act, and the writes."""
    stage = Stage(plane, space)
    stage.cluster = cluster
    cluster.dies_after, cluster.writes = None, 0
    stage.controller = stage.fresh()
    space.connection.request(
        "POST",
        POOLS.format(namespace=space.name),
        {
            "apiVersion": "servingtiers.io/v1alpha1",
            "kind": "TierPool",
            "metadata": {"name": "llama"},
            "spec": {"servedModelName": "llama", "maxAccelerators": 3},
        },
    )
    space.create(member("chat", "Latency", 200, 1))
    space.create(member("batch", "Throughput", 10, 2))
    await stage.settle()
    begun = cluster.writes
    cluster.dies_after = None if dies_after is None else begun + dies_after
    acts = [await stage.outcome()]
    for running, seconds in ((12.0, 45.0), (5.0, 120.0)):
        stage.script.running["chat"] = running
        await stage.settle(seconds)
        acts.append(await stage.outcome())
    return stage, acts, cluster.writes - begun


@pytest.fixture
async def stage(control_plane, namespace):
    install_crd(control_plane)
    async with MortalCluster.connect(kubeconfig=str(control_plane.kubeconfig)) as cluster:
        yield Namespace(control_plane.connection(), namespace), cluster


async def test_a_burst_is_served_by_an_engine_that_changes_its_label_and_goes_home(control_plane, stage):
    space, cluster = stage
    _, (before, burst, after), _ = await play(control_plane, space, cluster)
    home = [("batch", "batch"), ("batch", "batch"), ("chat", "chat")]
    assert before["holders"] == home
    assert before["conditions"] == {"Accepted": ("True", "MembersAgree"), "Ready": ("True", "Lending")}
    assert before["tiers"]["chat"]["replicas"] == "1/1"

    assert burst["holders"] == [("batch", "batch"), ("batch", "chat"), ("chat", "chat")]
    assert burst["replicas"] == before["replicas"], "nothing was started"
    assert (burst["tiers"]["chat"]["borrowed"], burst["tiers"]["batch"]["lent"]) == (1, 1)
    assert (burst["tiers"]["chat"]["replicas"], burst["tiers"]["batch"]["replicas"]) == ("1/1 +1", "2/2 -1")
    price = before["tiers"]["chat"]["cost"]
    assert price > 0
    costs = [(act["tiers"]["chat"]["cost"], act["tiers"]["batch"]["cost"]) for act in (before, burst, after)]
    assert costs == [(price, 2 * price), (2 * price, price), (price, 2 * price)], (
        "whoever has an engine pays for it"
    )
    assert burst["pool"] == {"engines": 3, "moved": 1, "accelerators": 3}
    assert "100" in burst["costs"], "a Deployment that shrinks stops what is at home"

    assert after["holders"] == home
    assert after["replicas"] == before["replicas"]
    assert set(after["costs"]) == {""}

    told = {one["metadata"]["name"]: one["status"]["decisions"] for one in space.tiers()}
    chat = [(d["from"], d["to"], d["binding"]) for d in told["chat"] if "engine" in d]
    assert chat == [(2, 1, "Borrowed"), (1, 2, "Borrowed")]
    batch = [(d["from"], d["to"], d["binding"]) for d in told["batch"] if "engine" in d]
    assert batch == [(1, 2, "Lent"), (2, 1, "Lent")]
    assert any("chat needs 2 engines and has 1" in d["reason"] for d in told["batch"])


@pytest.mark.long(12)
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
async def test_dying_after_any_write_of_a_burst_leads_to_the_same_end(control_plane, stage, every):
    """Levels, not edges: what an engine is about to do stands on its pod."""
    space, cluster = stage
    _, reference, made = await play(control_plane, space, cluster)
    assert made >= 8
    clean = [PODS, POOLS, "/apis/servingtiers.io/v1alpha1/namespaces/{namespace}/servingtiers"]
    for number in range(1, made + 1, every):
        name = f"{space.name}-{number}"
        control_plane.create_namespace(name)
        other = Namespace(space.connection, name)
        _, found, _ = await play(control_plane, other, cluster, dies_after=number)
        assert differences(found, reference) == [], f"after write {number}"
        for path in clean:
            space.connection.request("DELETE", path.format(namespace=name))


async def test_a_pod_that_is_replaced_while_the_operator_is_away_is_at_home(control_plane, stage):
    space, cluster = stage
    stage, _, _ = await play(control_plane, space, cluster)
    stage.script.running["chat"] = 12.0
    await stage.settle(seconds=60.0)
    assert ("batch", "chat") in await stage.holders()
    (lent,) = [
        pod["metadata"]["name"]
        for pod in await stage.pods()
        if pod["metadata"]["labels"].get(names.ROUTE_TIER_LABEL) == "chat"
        and pod["metadata"]["labels"][names.TIER_LABEL] == "batch"
    ]

    await stage.request("DELETE", PODS + f"/{lent}?gracePeriodSeconds=0")
    await stage.kubelet()

    assert await stage.holders() == [("batch", "batch"), ("batch", "batch"), ("chat", "chat")]


async def test_leaving_the_pool_calls_engines_home(control_plane, stage):
    space, cluster = stage
    stage, _, _ = await play(control_plane, space, cluster)
    stage.script.running["chat"] = 12.0
    await stage.settle(seconds=60.0)
    space.patch({"spec": {"sharedPool": None}}, "batch")
    stage.controller = stage.fresh()
    for _ in range(3):
        await stage.controller.relist()
        await stage.controller.read_loads()
        for key in [*stage.controller.store.tiers]:
            await stage.controller.reconcile(key)
        stage.clock.now += 5.0
    assert [pair for pair in await stage.holders() if pair[0] != pair[1]] == []


async def test_an_engine_that_somebody_labelled_by_hand_outside_of_a_pool_is_left_alone(control_plane, stage):
    """To look at an engine in peace, take its label off: no operator fights over it."""
    space, cluster = stage
    stage = Stage(control_plane, space)
    stage.cluster = cluster
    stage.controller = stage.fresh()
    space.create(tier("chat"))
    stage.script.running["chat"] = 1.0
    await stage.settle()
    (engine,) = [
        pod["metadata"]["name"]
        for pod in await stage.pods()
        if pod["metadata"]["labels"][names.COMPONENT_LABEL] == names.ENGINE
    ]
    for label in ("elsewhere", None):
        change = {"metadata": {"labels": {names.ROUTE_TIER_LABEL: label}}}
        await stage.request("PATCH", PODS + f"/{engine}", None, change)
        await stage.settle(seconds=60.0)
        pod = await stage.request("GET", PODS + f"/{engine}")
        assert pod["metadata"]["labels"].get(names.ROUTE_TIER_LABEL) == label


async def test_a_member_that_differs_is_told_and_nothing_of_it_is_touched(control_plane, stage):
    space, cluster = stage
    stage, _, _ = await play(control_plane, space, cluster)
    odd = member("odd", "Throughput", 10, 1)
    odd["spec"]["model"]["revision"] = "other"
    space.create(odd)
    stage.script.running["odd"] = 5.0
    stage.script.running["chat"] = 12.0
    await stage.settle(seconds=60.0)
    accepted = space.condition("Accepted", "odd")
    assert accepted["status"] == "True"
    assert "model.revision is other here and main in" in accepted["message"]
    holders = await stage.holders()
    assert ("odd", "odd") in holders
    assert ("batch", "chat") in holders, "the others go on lending"
    pool = await stage.request("GET", POOLS + "/llama", "status")
    assert next(c for c in pool["conditions"] if c["type"] == "Accepted")["reason"] == "MembersDisagree"


async def test_a_relabel_never_touches_another_pod_of_that_name(control_plane, stage):
    """The patch bears uid and resourceVersion."""
    space, cluster = stage
    stage, _, _ = await play(control_plane, space, cluster)
    pod = (await stage.pods())[0]
    meta = {key: pod["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion")}
    for wrong in ({"uid": "00000000-0000-0000-0000-000000000000"}, {"resourceVersion": "1"}):
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {**meta, **wrong, "labels": {"x": "y"}}}
        with pytest.raises(Exception, match=r"409|422"):
            await Cluster.relabel(cluster, body)


async def test_two_workers_never_work_on_the_same_tier(control_plane, stage):
    """A tier that joins a pool is, for a moment, under two keys."""
    space, cluster = stage
    stage = Stage(control_plane, space)
    stage.cluster = cluster
    stage.controller = stage.fresh()
    space.create(tier("chat"))
    await stage.controller.relist()
    key = (space.name, "chat")
    first, second = await asyncio.gather(stage.controller.reconcile(key), stage.controller.reconcile(key))
    assert second is not None
    assert second < 1 < first, "the second comes again in a moment, and has written nothing"
    assert "Service/chat" in space.children()
