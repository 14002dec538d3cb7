"""P1: the operator dies after any of its writes, loses everything it knew, and nobody can tell afterwards.

Here it dies in process: an exception after write k, then a new controller with nothing but the API server. The same
with a real process and SIGKILL is ``make test-crash``.
"""

import pytest

from ring.harness import CONFIG, Namespace, Silence, install_crd, settle
from ring.workloads import BASIC, WORKLOADS, differences, outcome, trajectory
from servingtiers.adapters.cluster import Cluster
from servingtiers.controller import Controller

pytestmark = [pytest.mark.ring, pytest.mark.long]


class CrashError(BaseException):
    """The process is gone: nothing may catch this."""


class MortalCluster(Cluster):
    """A cluster connection whose process dies after a given write."""

    dies_after: int | None = None
    writes = 0

    async def _write(self, *arguments, **options):
        result = await super()._write(*arguments, **options)
        if arguments[1].kind != "Event":  # an event that is lost is lost
            self.writes += 1
            if self.writes == self.dies_after:
                raise CrashError
        return result


async def run(plane, space, name, steps, dies_after=None):
    """Carry out a workload; return writes made, the outcome, and creations and deletions."""
    position = plane.audit_position()
    config = CONFIG.model_copy(update={"namespaces": [space.name]})
    writes = 0
    async with MortalCluster.connect(kubeconfig=str(plane.kubeconfig)) as cluster:
        cluster.dies_after = dies_after
        controller = Controller(cluster, config, Silence())
        for step in steps:
            step(space, name)
            try:
                await settle(controller, space.name, name)
            except CrashError:
                cluster.dies_after = None
                controller = Controller(cluster, config, Silence())
                await settle(controller, space.name, name)
        writes = cluster.writes
    return writes, outcome(space, name), trajectory(plane.audit_records(since=position), space, name)


@pytest.mark.parametrize(
    "workload", [w if w in BASIC else pytest.param(w, marks=pytest.mark.slow) for w in WORKLOADS]
)
async def test_dying_after_any_write_changes_neither_the_end_nor_the_way(control_plane, namespace, workload):
    """Every write of every workload is enumerated."""
    install_crd(control_plane)
    space = Namespace(control_plane.connection(), namespace)
    steps = WORKLOADS[workload]
    writes, reference, way = await run(control_plane, space, "calm", steps)

    assert writes >= 10
    for number in range(1, writes + 1):
        name = f"crash{number:02d}"
        _, found, path = await run(control_plane, space, name, steps, dies_after=number)
        if workload == "create and delete":
            # What the garbage collector has not reached yet is no difference; a leak would stay for ever.
            found, expected = found["status"], reference["status"]
        else:
            expected = reference
            assert path == way, f"after write {number}"
        assert differences(found, expected) == [], f"after write {number}"
