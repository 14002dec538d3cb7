"""P1 for real: the operator's process gets SIGKILL after each of its writes. Run by ``make test-crash``."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import yaml

from ring.harness import CONFIG, Namespace, eventually, install_crd
from ring.workloads import WORKLOADS, differences, outcome, trajectory
from servingtiers.lab.faults import FaultProxy, Passed

pytestmark = [pytest.mark.ring, pytest.mark.slow]

_WRITES = {"POST", "PUT", "PATCH", "DELETE"}


class Victim:
    """The operator as a process behind a proxy that counts its writes, and kills it after one of them."""

    def __init__(self, proxy: FaultProxy, command: list[str], log) -> None:
        self.proxy = proxy
        self.command = command
        self.log = log
        self.writes = 0
        self.dies_after: int | None = None
        self.deaths = 0
        self.process: subprocess.Popen[bytes] | None = None
        proxy.on_request = self._saw

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log)

    def _saw(self, passed: Passed) -> None:
        if passed.method not in _WRITES or "/leases" in passed.path or "/events" in passed.path:
            return
        self.writes += 1
        if self.writes == self.dies_after and self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.deaths += 1
            self.start()  # as a kubelet would

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self.process.terminate()
            self.process.wait(30)


async def settled(victim: Victim, space: Namespace, name: str, *, gone: bool) -> None:
    """Wait until the status is of the latest generation and nothing was written for three seconds."""

    def reported() -> bool:
        tiers = [t for t in space.tiers() if t["metadata"]["name"] == name]
        if gone:
            return not tiers
        return (
            bool(tiers)
            and tiers[0].get("status", {}).get("observedGeneration") == tiers[0]["metadata"]["generation"]
        )

    await eventually(reported, seconds=60, what=f"{name} is reported")
    quiet, last = 0, victim.writes
    while quiet < 6:
        await asyncio.sleep(0.5)
        quiet = quiet + 1 if victim.writes == last else 0
        last = victim.writes
    await eventually(reported, seconds=60, what=f"{name} is reported")


async def run(plane, victim, space, name, steps, dies_after=None):
    """Carry out a workload; return writes made, the outcome, and creations and deletions."""
    position = plane.audit_position()
    victim.writes, victim.dies_after, victim.deaths = 0, dies_after, 0
    for step in steps:
        await asyncio.to_thread(step, space, name)
        await settled(victim, space, name, gone=step.__name__ == "delete")
    if dies_after is not None and not victim.deaths:
        # How many status writes a pass needs depends on when the scheduler's verdicts come in.
        assert victim.writes < dies_after
    return victim.writes, outcome(space, name), trajectory(plane.audit_records(since=position), space, name)


@pytest.mark.parametrize(
    "workload", ["create", "create disaggregated", "scale", "change engine and model", "create and delete"]
)
async def test_sigkill_after_any_write_changes_neither_the_end_nor_the_way(
    control_plane, namespace, tmp_path, workload
):
    """Every write of a create, a scale, a spec change and a delete."""
    install_crd(control_plane)
    space = Namespace(control_plane.connection(), namespace)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG.model_dump(mode="json", by_alias=True, exclude_none=True)))
    connection = control_plane.connection()
    async with FaultProxy(connection.url, control_plane.ca_file) as proxy:
        kubeconfig = tmp_path / "kubeconfig"
        control_plane.write_kubeconfig(kubeconfig, control_plane.token(), url=proxy.url)
        command = [
            sys.executable, "-m", "servingtiers.cli", "operator", "--kubeconfig", str(kubeconfig),
            "--namespace", namespace, "--config", str(config), "--health-port", "0", "--metrics-port", "0",
            "--lease-duration", "2", "--lease-renew-deadline", "1.5", "--lease-retry", "0.3",
        ]  # fmt: skip
        with (tmp_path / "operator.log").open("wb") as log:
            victim = Victim(proxy, command, log)
            with victim.running():
                writes, reference, way = await run(control_plane, victim, space, "calm", WORKLOADS[workload])

                assert writes >= 10
                for number in range(1, writes + 1):
                    name = f"crash{number:02d}"
                    _, found, path = await run(
                        control_plane, victim, space, name, WORKLOADS[workload], number
                    )
                    print(
                        f"{workload}: SIGKILL after write {number} of {writes}: same end",
                        file=sys.stderr,
                        flush=True,
                    )
                    if workload == "create and delete":
                        found, expected = found["status"], reference["status"]
                    else:
                        expected = reference
                        assert path == way, f"after write {number}"
                    assert differences(found, expected) == [], f"after write {number}"
