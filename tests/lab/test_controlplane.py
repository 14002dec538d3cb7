"""The real control plane as processes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from servingtiers.lab.controlplane import ApiError, ControlPlane, shared_control_plane, whole_lines

pytestmark = pytest.mark.ring


@pytest.mark.parametrize(
    ("since", "lines"), [(0, [b"ab\n", b"cd\n"]), (1, [b"cd\n"]), (3, [b"cd\n"]), (4, []), (8, [])]
)
def test_a_log_is_read_from_a_position_inside_a_line_and_up_to_one(since, lines):
    """Whoever asks for the size of a log that is written may see half a record."""
    assert list(whole_lines(io.BytesIO(b"ab\ncd\ne"), since)) == lines


def config_map(name: str) -> dict[str, object]:
    """Return a small object to write."""
    return {"metadata": {"name": name}, "data": {"a": "b"}}


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_deployments_are_turned_into_pods_by_the_real_controllers(control_plane, namespace):
    """Ownership, ReplicaSets and garbage collection are the real ones."""
    connection = control_plane.connection()
    deployments = f"/apis/apps/v1/namespaces/{namespace}/deployments"
    labels = {"app": "a"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
    connection.request("POST", deployments, {"metadata": {"name": "a"}, "spec": spec})

    def pods() -> int:
        return len(connection.request("GET", f"/api/v1/namespaces/{namespace}/pods")["items"])

    deadline = time.monotonic() + 15
    while pods() != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    connection.request("DELETE", f"{deployments}/a", {"propagationPolicy": "Background"})
    while pods():
        assert time.monotonic() < deadline + 15
        time.sleep(0.1)


def test_the_audit_log_counts_exactly_the_writes_of_one_user(control_plane, namespace):
    """Reads leave no record, refused writes do, and the count is complete when the answer is there."""
    admin = control_plane.connection()
    operator = control_plane.connection("operator")
    position = control_plane.audit_position()
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    admin.request("POST", path, config_map("ours"))
    admin.request("GET", f"{path}/ours")
    with pytest.raises(ApiError, match="403 Forbidden"):
        operator.request("POST", path, config_map("theirs"))
    # Tests beside this one write too: only this namespace's records are ours.
    records = [r for r in control_plane.audit_records(since=position) if r.namespace == namespace]
    mine = [(one.verb, one.resource, one.name, one.status) for one in records if one.user == "admin"]
    assert mine == [("create", "configmaps", "ours", 201)]
    theirs = control_plane.audit_records(since=position, user="operator")
    assert [(r.verb, r.status) for r in theirs if r.namespace == namespace] == [("create", 403)]


def test_kubectl_and_the_kubeconfig_work(control_plane, namespace):
    """The line that the demo prints is one that a person can use."""
    if control_plane.binaries.kubectl is None:
        pytest.skip("no kubectl among the programs")
    assert "default" in control_plane.kubectl("get", "serviceaccounts", "-n", namespace, "-o", "name")


def test_an_api_server_that_is_killed_comes_back_on_its_port_with_its_data():
    """What a fault test relies on."""
    with ControlPlane(controllers=False) as plane:
        connection = plane.connection()
        path = "/api/v1/namespaces/default/configmaps"
        connection.request("POST", path, config_map("kept"))
        plane.restart_api_server(down_seconds=0.2)
        assert connection.request("GET", f"{path}/kept")["data"] == {"a": "b"}
        pids, folder = list(plane.pids().values()), plane.folder
        assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)
    assert not folder.exists()


def test_a_maker_killed_by_sigkill_leaves_no_process_and_no_data():
    """The watchdog stops what is left."""
    program = (
        "import os, signal\n"
        "from servingtiers.lab.controlplane import ControlPlane\n"
        "plane = ControlPlane(controllers=False)\n"
        "plane.start()\n"
        "print(plane.folder, *plane.pids().values(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    folder, *pids = done.stdout.split()
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 15
    while any(alive(int(pid)) for pid in pids) or os.path.exists(folder):  # noqa: PTH110 - a path from text
        assert time.monotonic() < deadline, "processes or data were left"
        time.sleep(0.1)


def test_processes_of_one_test_session_share_a_control_plane_until_the_last_leaves(tmp_path):
    """As pytest-xdist's workers do; threads stand in for them, each with a file handle of its own."""
    with ThreadPoolExecutor(2) as pool:
        rings = [shared_control_plane(tmp_path, progress=lambda _: None) for _ in range(2)]
        planes = list(pool.map(lambda ring: ring.__enter__(), rings))
        assert planes[0].url == planes[1].url
        rings[0].__exit__(None, None, None)
        assert planes[1].connection().request("GET", "/readyz") == "ok"
        rings[1].__exit__(None, None, None)
    deadline = time.monotonic() + 15
    while (tmp_path / "ring.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while True:
        try:
            planes[0].connection().request("GET", "/readyz", timeout=1)
        except OSError:
            break
        except ApiError as error:  # an open connection is served while the server shuts down
            assert error.status == 500  # noqa: PT017 - the end is awaited, not this
        assert time.monotonic() < deadline, "the shared control plane was left running"
        time.sleep(0.1)
