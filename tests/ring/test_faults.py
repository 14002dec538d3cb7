"""What goes wrong between operator and API server changes nothing in the end (fault catalogue A)."""

import asyncio

import pytest

from ring.harness import CHILDREN, CONFIG, Namespace, eventually, install_crd, operator, tier
from ring.workloads import differences, outcome
from servingtiers.lab.faults import Action, Fault, FaultProxy

pytestmark = [pytest.mark.ring, pytest.mark.long(8)]

WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
CALM = "calm"
FAULTS = {
    "A1 every third write conflicts": [
        Fault(Action.STATUS, methods=WRITES, status=409, skip=n, times=1) for n in (2, 5, 8)
    ],
    "A3 too many requests": [
        Fault(Action.STATUS, methods=WRITES, status=429, retry_after=1, skip=3, times=3)
    ],
    "A4 the server fails": [Fault(Action.STATUS, methods=WRITES, status=500, skip=2, times=4)],
    "A4 reads fail": [Fault(Action.STATUS, methods=frozenset({"GET"}), watch=False, status=503, times=3)],
    "A5 writes are carried out and the answer is lost": [
        Fault(Action.COMMIT_THEN_DROP, methods=WRITES, skip=n, times=1) for n in (0, 3, 6, 9)
    ],
    "A6 writes are lost": [Fault(Action.DROP, methods=WRITES, skip=n, times=1) for n in (1, 4, 7)],
}


@pytest.fixture
async def ring(control_plane, namespace, tmp_path):
    """A namespace, a proxy before the API server, and a kubeconfig that goes through it."""
    install_crd(control_plane)
    space = Namespace(control_plane.connection(), namespace)
    async with FaultProxy(control_plane.connection().url, control_plane.ca_file) as proxy:
        kubeconfig = tmp_path / "kubeconfig"
        control_plane.write_kubeconfig(kubeconfig, control_plane.token(), url=proxy.url)
        yield control_plane, space, proxy, str(kubeconfig)


async def complete(space: Namespace, name: str) -> None:
    """Wait until a tier has all its objects and a status."""

    def done() -> bool:
        found = [
            o for o in space.children().values() if o["metadata"]["labels"]["servingtiers.io/tier"] == name
        ]
        return len(found) == 10 and space.condition("Accepted", name) is not None

    await eventually(done, seconds=60, what=f"{name} is complete")
    await asyncio.sleep(1)


@pytest.mark.parametrize("fault", FAULTS)
async def test_faults_of_the_api_server_change_nothing_in_the_end(ring, fault):
    """The same objects as an undisturbed run, with nobody's help."""
    plane, space, proxy, kubeconfig = ring
    async with operator(plane, space.name, kubeconfig=kubeconfig, config=CONFIG, resync_seconds=2.0):
        await asyncio.to_thread(space.create, tier(CALM))
        await complete(space, CALM)
        for rule in FAULTS[fault]:
            proxy.add(
                Fault(
                    **{
                        name: getattr(rule, name)
                        for name in (
                            "action",
                            "methods",
                            "path",
                            "watch",
                            "skip",
                            "times",
                            "seconds",
                            "status",
                            "retry_after",
                        )
                    }
                )
            )
        await asyncio.to_thread(space.create, tier("hurt"))
        await complete(space, "hurt")

    assert sum(rule.done for rule in proxy.faults) >= 1
    assert differences(outcome(space, "hurt")["objects"], outcome(space, CALM)["objects"]) == []


async def test_a12_a_partition_heals_and_what_happened_meanwhile_is_seen(ring):
    """Watches go silent, objects are changed behind the operator's back, the network comes back."""
    plane, space, proxy, kubeconfig = ring
    async with operator(plane, space.name, kubeconfig=kubeconfig, config=CONFIG, resync_seconds=3.0):
        await asyncio.to_thread(space.create, tier(CALM))
        await complete(space, CALM)
        proxy.frozen = True
        await asyncio.to_thread(space.delete, f"{CALM}-pool", CHILDREN["Deployment"])
        await asyncio.sleep(2)

        assert f"Deployment/{CALM}-pool" not in space.children()

        proxy.frozen = False
        proxy.cut_watches()
        await eventually(lambda: f"Deployment/{CALM}-pool" in space.children(), seconds=60, what="repair")


async def test_a17_a_deletion_that_the_watch_missed_is_found_by_the_relist(ring):
    """Kopf keeps objects that vanished during a 410 Gone; the relist does not."""
    plane, space, proxy, kubeconfig = ring
    async with operator(plane, space.name, kubeconfig=kubeconfig, config=CONFIG, resync_seconds=2.0):
        await asyncio.to_thread(space.create, tier(CALM))
        await complete(space, CALM)
        proxy.add(Fault(Action.STATUS, watch=True, status=410, times=None))
        proxy.cut_watches()
        await asyncio.to_thread(space.delete, CALM, CHILDREN["Service"])

        await eventually(
            lambda: f"Service/{CALM}" in space.children(), seconds=60, what="found without a watch"
        )


@pytest.mark.slow
async def test_an_api_server_that_restarts_is_outlived(control_plane, namespace, tmp_path):
    """The process goes on, or is restarted by its kubelet, and the tier is completed."""
    from servingtiers.lab.controlplane import ControlPlane

    with ControlPlane() as own:
        install_crd(own)
        space = Namespace(own.connection(), own.create_namespace("restart"))
        async with operator(own, space.name, config=CONFIG):
            await asyncio.to_thread(space.create, tier(CALM))
            await complete(space, CALM)
            await asyncio.to_thread(own.restart_api_server, down_seconds=2.0)
            await asyncio.to_thread(space.create, tier("later"))
            await complete(space, "later")
