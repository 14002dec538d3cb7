"""The demo on its real stage: the operator's own process, the real vllm-router, simulated engines."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from servingtiers.lab.binaries import BinariesError, locate
from servingtiers.lab.demo import DemoSettings, play
from servingtiers.lab.demo_ring import Ring, RingSettings, source_root
from servingtiers.lab.kube import Kube

pytestmark = [pytest.mark.ring, pytest.mark.long(45), pytest.mark.xdist_group("demo")]

HOLD = """
import signal, sys, time
from servingtiers.lab.demo_ring import Ring, RingSettings
with Ring(RingSettings(simulated_router=True), progress=lambda text: None) as ring:
    print(ring.details.folder, flush=True)
    time.sleep(600)
"""
"""A demo that holds its stage until it is ended."""


@pytest.fixture(scope="module", autouse=True)
def _programs():
    try:
        locate()
    except BinariesError as error:
        if os.environ.get("SERVINGTIERS_REQUIRE_RING"):
            raise
        pytest.skip(str(error))


def descendants(pid: int) -> set[int]:
    """Return the living processes below one, whatever their session."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(stat.parent.name)] = int(fields[1])
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


def living(pids: set[int]) -> dict[int, str]:
    """Return those of the processes that still are, with their command lines; an unreaped one is gone."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:120]
    return found


def wait_until_gone(pids: set[int], seconds: float = 30.0) -> dict[int, str]:
    """Wait for processes to end; return those that did not."""
    deadline = time.monotonic() + seconds
    while (left := living(pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def test_load_makes_the_operator_add_replicas_that_serve(tmp_path):
    """From the recorded trace through the real router to the metrics of engines, to a decision, to a ready pod."""
    example = yaml.safe_load((source_root() / "manifests/examples/latency.yaml").read_text())
    (tmp_path / "latency.yaml").write_text(yaml.safe_dump(example))
    lines: list[str] = []
    with Ring(RingSettings(), progress=lines.append) as ring:
        stage = {*ring.details.pids.values(), *descendants(ring.pid)}
        outcome = play(DemoSettings(seconds=22.0, examples=tmp_path), ring, progress=lines.append)
        chat = outcome.tiers["chat"]

        assert ring.details.pids["operator"] != ring.pid
        assert outcome.problems() == []
        ups = [each for each in chat.decisions if each.acted and each.up]
        assert ups, "\n".join([*lines, outcome.operator_log])
        assert ups[0].before == 1
        assert ups[0].binding in {"Queue", "Forecast", "TTFT", "TPOT"}
        assert "Scaled" in outcome.operator_log  # by the process, not by us
        most = max(pool.ready for sample in outcome.samples for tier in sample.tiers for pool in tier.pools)
        assert most > 1
        assert len(chat.finished) > 50
        assert [each.record.error for each in chat.finished if not each.record.ok] == []
        assert set(chat.operator_attainment) == set(chat.objectives)
        assert chat.gpu_seconds > outcome.replay_seconds  # one GPU at least, all the time
        stage |= descendants(ring.pid)
    assert wait_until_gone(stage, 5.0) == {}
    assert not Path(ring.details.folder).exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_ended_demo_leaves_no_process_and_no_folder(signum):
    """Ctrl-C ends it in order; after SIGKILL its stage notices by itself."""
    made = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    try:
        folder = Path(made.stdout.readline().strip())
        below = descendants(made.pid)
        commands = " ".join(living(below).values())
        for program in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "operator"):
            assert program in commands
        assert folder.exists()
        made.send_signal(signum)
        made.wait(40)
        assert wait_until_gone(below) == {}
        assert not folder.exists()
    finally:
        made.kill()
        made.wait()
        made.stdout.close()


@pytest.mark.slow
async def test_a_kept_stage_outlives_its_maker_until_it_is_told_to_end():
    """What --keep leaves up answers, and SIGTERM ends all of it."""
    script = HOLD.replace(
        "time.sleep(600)", "ring.keep(); print(ring.pid, ring.details.kubeconfig, flush=True)"
    )
    done = subprocess.run(  # noqa: ASYNC221 - nothing else runs in this loop
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    pid, kubeconfig = done.stdout.splitlines()[-1].split()
    below = {int(pid), *descendants(int(pid))}
    try:
        async with Kube.from_kubeconfig(Path(kubeconfig)) as kube:
            nodes = await kube.get("/api/v1/nodes")
        assert nodes["items"]
        assert "operator" in " ".join(living(below).values())
    finally:
        os.kill(int(pid), signal.SIGTERM)
        left = wait_until_gone(below)
    assert left == {}


@pytest.mark.slow
def test_the_command_plays_all_three_examples(tmp_path):
    """A short demo, as a user calls it: three tiers, a summary, a page."""
    script = Path(sys.executable).with_name("servingtiers")
    done = subprocess.run(
        [str(script), "demo", "--seconds", "40", "--output", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = yaml.safe_load((tmp_path / "summary.json").read_text())
    assert set(summary["tiers"]) == {"chat", "assistant", "batch"}
    assert all(tier["ready"] for tier in summary["tiers"].values())
    assert sum(tier["scaleUps"] for tier in summary["tiers"].values()) > 0
    assert (tmp_path / "report.html").stat().st_size > 1_000_000  # Plotly is inside
    assert "Simulated: nodes and engines" in done.stdout
