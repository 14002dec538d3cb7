"""P1: the operator dies after any of its writes, loses everything it knew, and nobody can tell afterwards.

Here it dies in process: an exception after write k, then a new controller with nothing but the API server. The same
with a real process and SIGKILL is ``make test-crash``.
"""

import pytest

from ring.harness import CONFIG, Namespace, Silence, install_crd, settle
from ring.workloads import BASIC, BASIC_AFTER_CREATION, WORKLOADS, differences, outcome, trajectory
from servingtiers.adapters.cluster import Cluster
from servingtiers.controller import Controller

pytestmark = [pytest.mark.ring, pytest.mark.long(12)]


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


NAME = "mortal"


async def run(plane, namespace, steps, dies_after=None):
    """Carry out a workload in a namespace of its own.

    Return the writes made until the end of each step, the outcome, and creations and deletions.
    """
    # Beside the tiers of the runs before it, each relist would read all of theirs as well.
    space = Namespace(plane.connection(), plane.create_namespace(namespace))
    position = plane.audit_position()
    config = CONFIG.model_copy(update={"namespaces": [space.name]})
    writes = []
    async with MortalCluster.connect(kubeconfig=str(plane.kubeconfig)) as cluster:
        cluster.dies_after = dies_after
        controller = Controller(cluster, config, Silence())
        for step in steps:
            step(space, NAME)
            try:
                await settle(controller, space.name, NAME)
            except CrashError:
                cluster.dies_after = None
                controller = Controller(cluster, config, Silence())
                await settle(controller, space.name, NAME)
            writes.append(cluster.writes)
    found = writes, outcome(space, NAME), trajectory(plane.audit_records(since=position), space, NAME)
    space.connection.request("DELETE", f"/api/v1/namespaces/{space.name}")
    return found


_EVERY = [pytest.param(w, "any", marks=[] if w in BASIC else [pytest.mark.slow]) for w in WORKLOADS]
_LATER = [pytest.param(w, "any later") for w in BASIC_AFTER_CREATION]


@pytest.mark.parametrize(("workload", "write"), _EVERY + _LATER)
async def test_dying_after_a_write_changes_neither_the_end_nor_the_way(
    control_plane, namespace, workload, write
):
    """Every write of every workload is enumerated; in the default suite those of the creation only once."""
    install_crd(control_plane)
    steps = WORKLOADS[workload]
    made, reference, way = await run(control_plane, f"{namespace}-calm", steps)

    created, writes = made[0], made[-1]
    assert created >= 10
    first = 1 if write == "any" else created + 1
    assert writes >= first
    for number in range(first, writes + 1):
        _, found, path = await run(control_plane, f"{namespace}-{number:02d}", steps, dies_after=number)
        if workload == "create and delete":
            # What the garbage collector has not reached yet is no difference; a leak would stay for ever.
            found, expected = found["status"], reference["status"]
        else:
            expected = reference
            assert path == way, f"after write {number}"
        assert differences(found, expected) == [], f"after write {number}"
