"""Whether plans keep their word: random tiers are planned, then their fleets simulated at the planned rate.

The spare replicas are taken away, the arrivals and lengths are drawn anew (another seed, three times the requests),
and the objectives are held without the tail margin that the plan was made with.

Run: python tests/bench/bench_plans.py [plans]
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter

from servingtiers.catalog.models import model
from servingtiers.performance.confirmation import confirm, simulate_choice
from servingtiers.performance.planner import Constraints, Demand, Metric, Objective, Plan, held_ms, plan
from servingtiers.performance.workload import Arrivals

TARGET = 0.95
SECONDS_TARGET = 2.0
QUESTION = [
    "plan",
    "--model",
    "meta-llama/Llama-3.1-8B-Instruct",
    "--rate",
    "50",
    "--slo",
    "ttft.p99=500ms",
    "--slo",
    "tpot.p99=50ms",
]
MODELS = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-7b-hf", "Qwen/Qwen3-14B", "meta-llama/Llama-3.1-70B")


def random_question(rng: random.Random) -> tuple[Demand, tuple[Objective, ...]]:
    """A tier somebody might ask for."""
    demand = Demand(
        rate=10 ** rng.uniform(0.0, 2.3),
        prompt_tokens=rng.choice([128, 512, 1024, 2048]),
        output_tokens=rng.choice([32, 128, 256, 512]),
        prompt_cv=rng.choice([0.0, 0.5, 1.0]),
        output_cv=rng.choice([0.0, 0.5, 1.0]),
        prefix_hit_rate=rng.choice([0.0, 0.0, 0.5, 0.8]),
        arrivals=Arrivals.parse(rng.choice(["poisson", "poisson", "gamma:1.5"])),
    )
    percentile = rng.choice(["p95", "p99"])
    wanted = [Objective(Metric.TTFT, percentile, rng.choice([300.0, 500.0, 1000.0, 2000.0]))]
    if rng.random() < 0.7:
        wanted.append(Objective(Metric.TPOT, percentile, rng.choice([25.0, 40.0, 60.0, 100.0])))
    if rng.random() < 0.2:
        wanted.append(Objective(Metric.E2E, percentile, rng.choice([5e3, 20e3, 60e3])))
    return demand, tuple(wanted)


def kept(found: Plan) -> bool:
    """Whether the plan's cheapest fleet keeps every objective, drawn anew."""
    result = simulate_choice(found.choices[0], found.demand, requests=45_000, seed=2026)
    return all(held_ms(o, result.ttft, result.tpot, result.e2e, 1.0) <= o.target_ms for o in found.objectives)


def command_seconds() -> tuple[float, float]:
    """Return the best of three warm runs of the command over all accelerators: (wall, processor) seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found = []
    for _ in range(4):
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "servingtiers.cli", *QUESTION],
            env=environment,
            check=True,
            capture_output=True,
        )
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append((wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime))
    warm = found[1:]
    return min(wall for wall, _ in warm), min(cpu for _, cpu in warm)


def main() -> int:
    """Print the share that keeps its objectives, and how long the command takes."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rng = random.Random(7)
    outcome: Counter[str] = Counter()
    broken: list[str] = []
    seconds: list[float] = []
    while outcome["kept"] + outcome["broken"] < wanted:
        demand, objectives = random_question(rng)
        shape = model(rng.choice(MODELS))
        begin = time.perf_counter()
        found = plan([shape], demand, objectives, Constraints(), confirm=confirm, top=1)
        seconds.append(time.perf_counter() - begin)
        if not found.feasible:
            outcome["infeasible"] += 1
        elif kept(found):
            outcome["kept"] += 1
        else:
            outcome["broken"] += 1
            broken.append(f"{shape.name}, {demand}, {', '.join(map(str, objectives))}")
    share = outcome["kept"] / wanted
    for text in broken:
        print(f"  broken: {text}")
    print(
        f"criterion: {wanted} random feasible plans over all accelerators ({outcome['infeasible']} more were infeasible): "
        f"{100 * share:.1f} % keep every objective in an independent simulation (target {100 * TARGET:g} %): "
        f"{'met' if share >= TARGET else 'MISSED'}"
    )
    print(f"a plan takes {sorted(seconds)[len(seconds) // 2]:.2f} s (median), {max(seconds):.2f} s at most")
    wall, cpu = command_seconds()
    print(
        f"criterion: `servingtiers {' '.join(QUESTION)}`, warm, all accelerators: {cpu:.2f} s of processor time, {wall:.2f} "
        f"s on the clock of this machine, load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores (target "
        f"{SECONDS_TARGET:g} s): {'met' if min(cpu, wall) <= SECONDS_TARGET else 'MISSED'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
