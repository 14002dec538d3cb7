"""How fast many tiers are reconciled, and whether the operator is silent afterwards: ``make bench-reconcile``.

The operator runs as its own process (Kopf, watches, Lease) against the real control plane. N tiers are created at once;
the clock stops when every tier has all its children applied and a status of its generation. Then a second pass and
five idle minutes are watched through the API server's audit log. There are no nodes: pods stay pending.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from ring.harness import CHILDREN, Namespace, grant, install_crd, tier  # noqa: E402 - the path comes first
from servingtiers.lab.controlplane import ControlPlane  # noqa: E402

CHILDREN_OF_A_TIER = 7
LIMITS = {100: 15.0, 300: 45.0}


def count(space: Namespace) -> tuple[int, int]:
    """Return children applied and tiers with a status."""
    listed = 0
    for path in CHILDREN.values():
        query = "?labelSelector=app.kubernetes.io%2Fmanaged-by%3Dservingtiers"
        listed += len(space.connection.request("GET", path.format(namespace=space.name) + query)["items"])
    reported = sum(1 for t in space.tiers() if t.get("status", {}).get("observedGeneration"))
    return listed, reported


def run(plane: ControlPlane, tiers: int, idle_seconds: float) -> dict[str, object]:
    """Reconcile so many tiers and return the figures."""
    space = Namespace(plane.connection(), plane.create_namespace(f"bench-{tiers}"))
    names = [f"tier-{number:04d}" for number in range(tiers)]
    log = (plane.folder / f"operator-{tiers}.log").open("wb")
    operator = subprocess.Popen(
        [
            sys.executable, "-m", "servingtiers.cli", "operator", "--kubeconfig", str(plane.kubeconfig_for("operator")),
            "--namespace", space.name, "--config", str(ROOT / "manifests/base/config.yaml"),
            "--health-port", "0", "--metrics-port", "0", "--log-level", "WARNING",
        ],
        stdout=log, stderr=log,
    )  # fmt: skip
    try:
        grant(plane, space.name)
        while not _leads(space):
            time.sleep(0.1)
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(space.create, [tier(name) for name in names]))
        created = time.monotonic() - began
        while (seen := count(space)) != (tiers * CHILDREN_OF_A_TIER, tiers):
            if operator.poll() is not None or time.monotonic() - began > 300:
                raise RuntimeError(f"not reconciled, {seen}: {Path(log.name).read_text()[-2000:]}")
            time.sleep(0.1)
        took = time.monotonic() - began
        _settle(plane)
        memory = _memory(operator.pid)
        cpu = _cpu(operator.pid)
        position = plane.audit_position()
        watched = time.monotonic()
        while time.monotonic() - watched < idle_seconds:
            print(f"    idle for {time.monotonic() - watched:.0f} of {idle_seconds:.0f} s", flush=True)
            time.sleep(min(30.0, max(0.1, idle_seconds - (time.monotonic() - watched))))
        writes = plane.audit_records(since=position, user="operator")
        share = (_cpu(operator.pid) - cpu) / max(idle_seconds, 1e-9)
    finally:
        operator.terminate()
        operator.wait(30)
        log.close()
    return {
        "tiers": tiers,
        "createdSeconds": round(created, 1),
        "reconciledSeconds": round(took, 1),
        "limitSeconds": LIMITS.get(tiers),
        "idleSeconds": idle_seconds,
        "idleWrites": len(writes),
        "idleWriteExamples": [f"{w.verb} {w.resource} {w.name}" for w in writes[:5]],
        "idleCpuPercent": round(100 * share, 1),
        "rssMiB": round(memory / 2**20),
    }


def _leads(space: Namespace) -> bool:
    path = f"/apis/coordination.k8s.io/v1/namespaces/{space.name}/leases"
    items = space.connection.request("GET", path)["items"]
    return any(item["spec"].get("holderIdentity") for item in items)


def _settle(plane: ControlPlane) -> None:
    """Wait until what follows a creation is over: seventy seconds without a write.

    The scheduler's verdicts come back as conditions, whose wording is a rounded value and written within a minute.
    """
    last, since = plane.audit_position(), time.monotonic()
    while time.monotonic() - since < 70:
        time.sleep(1)
        if plane.audit_records(since=last, user="operator"):
            last, since = plane.audit_position(), time.monotonic()


def _memory(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """Print the table; exit 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiers", type=int, nargs="+", default=[100, 300])
    parser.add_argument("--idle-seconds", type=float, default=300.0)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    arguments = parser.parse_args()
    rows = []
    for tiers in arguments.tiers:
        with ControlPlane(audit=True) as plane:
            install_crd(plane)
            rows.append(run(plane, tiers, arguments.idle_seconds))
    if arguments.output == "json":
        print(json.dumps(rows, indent=2))
    else:
        print("tiers  created  reconciled  limit   idle  writes while idle  CPU idle  RSS")
        for row in rows:
            print(
                f"{row['tiers']:5}  {row['createdSeconds']:5} s  {row['reconciledSeconds']:8} s  {row['limitSeconds'] or '-':>4}"
                f"  {row['idleSeconds']:4.0f} s  {row['idleWrites']:17}  {row['idleCpuPercent']:6} %  {row['rssMiB']} MiB"
            )
            for example in row["idleWriteExamples"]:  # type: ignore[attr-defined]
                print(f"       {example}")
    missed = [
        r
        for r in rows
        if r["idleWrites"] or (r["limitSeconds"] and r["reconciledSeconds"] > r["limitSeconds"])
    ]  # type: ignore[operator]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
