"""How fast the event simulation is on one core: simulated output tokens and engine steps per second.

Run: python tests/bench/bench_engine.py
"""

from __future__ import annotations

import sys
import time

from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.performance import engine_kernel as kernel
from servingtiers.performance.engine_sim import EngineConfig, PoolConfig, draw_requests, make_pool
from servingtiers.performance.select import step_model
from servingtiers.performance.workload import Workload

TOKENS_TARGET = 100e6
STEPS_TARGET = 3e6
CASES = (  # prompt, output, requests/s, spread of the lengths
    (512, 128, 29.0, 0.0),
    (512, 128, 29.0, 0.8),
    (512, 512, 10.0, 0.0),
    (1024, 1024, 5.0, 0.0),
    (2048, 256, 8.0, 0.5),
)


def main() -> int:
    """Print a row for each case, and whether those at a mean batch of 32 or more meet the targets."""
    shape, gpu = model("meta-llama/Llama-3.1-8B"), accelerator("h100-sxm-80gb")
    pool = PoolConfig(step_model(shape, gpu), EngineConfig(max_num_seqs=256, max_num_batched_tokens=8192))
    print(
        f"event simulation of {shape.name} on {gpu.key}, table look-up included, one core's processor time, best of 5"
    )
    print(f"{'prompt':>7}{'output':>8}{'req/s':>7}{'CV':>5}{'batch':>8}{'M steps/s':>11}{'M tokens/s':>12}")
    failed = False
    slowest = [float("inf"), float("inf")]
    for prompt, output, rate, cv in CASES:
        workload = Workload(prompt, output, rate=rate, prompt_cv=cv, output_cv=cv)
        fastest = float("inf")
        steps = tokens = 0
        batch = 0.0
        for _ in range(6):  # the first also compiles, or loads the compiled code
            requests = draw_requests(workload, 50_000, 0, pool.model)
            state = make_pool(pool)
            begin = time.process_time()  # of this core, whatever else the machine does
            kernel.run_open(state, requests, 1.0, least_loaded=False)
            fastest = min(fastest, time.process_time() - begin)
            steps, tokens = int(state.ints[0, kernel.STEPS]), int(requests.output.sum())
            batch = float(state.reals[0, kernel.BATCH_MS] / state.reals[0, kernel.BUSY_MS])
        print(
            f"{prompt:>7}{output:>8}{rate:>7g}{cv:>5g}{batch:>8.1f}{steps / fastest / 1e6:>11.1f}{tokens / fastest / 1e6:>12.0f}"
        )
        if batch >= 32:
            slowest = [min(slowest[0], steps / fastest / 1e6), min(slowest[1], tokens / fastest / 1e6)]
            failed |= steps / fastest < STEPS_TARGET or tokens / fastest < TOKENS_TARGET
    print(
        f"criterion: at a mean batch of 32 or more, {STEPS_TARGET / 1e6:g} M steps/s and {TOKENS_TARGET / 1e6:g} M tokens/s: "
        f"{slowest[0]:.1f} and {slowest[1]:.0f} at least " + ("MISSED" if failed else "met")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
