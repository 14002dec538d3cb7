"""Real vLLM under a real trace, beside the simulator with a profile of that vLLM.

``make e2e-fidelity``; ``SECONDS=45`` is the length of a run. Writes ``results.json`` beside this file, from which
``python -m fidelity.page`` writes the page of the documentation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import median

import aiohttp
import pytest

from fidelity.compare import Engine, pool_of, rows, simulated, verdicts
from fidelity.page import RESULTS, write
from harness.existing import ExistingCluster
from harness.kube import pod_ready, wait_for
from harness.study import circumstances
from harness.tiers import VOCABULARY, engine, tier
from harness.traffic import ask, prompt
from onenode import images as built
from servingtiers.performance.engine_sim import sustainable_rate
from servingtiers.performance.profile import load_profile
from servingtiers.performance.workload import Workload
from servingtiers.simulate.traces import load_trace

ALONE = Path(__file__).parent / "profile.csv"
BESIDE = Path(__file__).parent / "profile-beside.csv"
"""Of an engine whose neighbour is at work, which takes of the cores and the cache that they share here. Accelerators of their
own would not feel each other."""
SECONDS = float(os.environ.get("SECONDS", "45"))
REPEATS = int(os.environ.get("REPEATS", "2"))
SHARES = {
    1: (0.15, 0.25, 0.35, 0.45, 0.55, 0.62, 0.7, 0.78),
    2: (0.1, 0.15, 0.2, 0.25, 0.3, 0.36, 0.43, 0.5),
}
"""Load points by number of engines: shares of what the simulator says that many sustain.

Two engines keep to half of it: beyond that they, router and client want more than the two cores of the machine, and what
is measured then is the queue for a processor.
"""
TRACE, FROM, LENGTHS = "azure-conv", 600, 0.1
MODEL, LAYERS, HEADS = "deep", 192, 2
"""Deep and thin: a step takes tens of milliseconds, many times what HTTP does for its tokens, and little of it is waiting for
the memory that all cores share."""
KV_CACHE = "1G"
ENGINE = Engine(max_num_seqs=8, max_num_batched_tokens=1024, block_size=32)


def _tier(name, replicas):
    return tier(
        name,
        "Balanced",
        replicas=(replicas, replicas),
        model={"name": MODEL, "source": {"persistentVolumeClaim": {"claimName": "models", "path": MODEL}}},
        router={
            "replicas": 1,
            # What the simulator does exactly; the others depend on what the router sees at the moment.
            "policy": "round_robin",
            # As much as two engines have of processors that do not suffice: with the share of the scenarios, a hundredth
            # of one, every request waits its turn at the router.
            "resources": {"requests": {"cpu": "1", "memory": "64Mi"}},
        },
        engine_settings=engine(
            batch=ENGINE.max_num_seqs,
            arguments={"block-size": str(ENGINE.block_size), "kv-cache-memory-bytes": KV_CACHE},
            maxNumBatchedTokens=ENGINE.max_num_batched_tokens,
        ),
    )


async def _servingtiers(*arguments):
    """Run the command as a user does, in the cluster's network, but ahead of everything else.

    Engines take both cores, and what measures them would wait its turn behind them, 20 ms whenever a token comes: a client
    has a machine of its own where it matters.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "servingtiers.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    os.sched_setscheduler(process.pid, os.SCHED_RR, os.sched_param(1))
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-1500:]
    return out.decode(), err.decode()


async def _profile(url, to):
    """Profile an engine; return the profile, what a request costs beside its step (ms), and what was left out."""
    _, said = await _servingtiers(
        *("profile", "--url", url, "--model", MODEL, "--vocabulary", str(VOCABULARY), "-o", str(to)),
        *(part for batch in (1, 2, 4, 8) for part in ("--batch", str(batch))),
        *("--context", "128", "--context", "256", "--context", "512"),
        *(part for tokens in (32, 64, 128, 256, 512, 900) for part in ("--prompt-tokens", str(tokens))),
        *("--max-num-seqs", str(ENGINE.max_num_seqs)),
        *("--max-num-batched-tokens", str(ENGINE.max_num_batched_tokens)),
    )
    (request,) = [line for line in to.read_text().splitlines() if line.startswith("# request:")]
    left_out = [line for line in said.splitlines() if line.startswith("left out")]
    return load_profile(to), float(request.split()[2]), left_out


@contextlib.asynccontextmanager
async def _at_work(url, streams=2):
    """Keep an engine at work while the body runs."""
    rng = random.Random(2)

    async def stream(session):
        while True:
            answer = await ask(session, url, tokens=26, text=prompt(115, rng), model=MODEL)
            assert answer.ok, answer.error

    async with aiohttp.ClientSession() as session:
        tasks = [asyncio.create_task(stream(session)) for _ in range(streams)]
        try:
            yield
            assert not any(task.done() for task in tasks), "the neighbour of the profiled engine failed"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _replay(url, scale, tmp_path):
    record = tmp_path / "requests.jsonl"
    out, _ = await _servingtiers(
        *("bench", "--url", url, "--model", MODEL, "--trace", TRACE, "--scale", f"{scale:.4f}"),
        *("--from", str(FROM), "--to", str(FROM + SECONDS), "--length-scale", str(LENGTHS)),
        *("--vocabulary", str(VOCABULARY), "--record", str(record), "--quiet", "-o", "json"),
    )
    (run,) = json.loads(out)["runs"]
    return run, [json.loads(line) for line in record.read_text().splitlines()]


async def _hop(engine_url, router_url, pairs=40):
    """Return what the router costs a request that finds everything idle, ms: the median of pairs, sent in turn."""
    rng, found = random.Random(1), []
    async with aiohttp.ClientSession() as session:
        for _ in range(pairs):
            ttft = []
            for url in (engine_url, router_url):
                await asyncio.sleep(rng.uniform(0.05, 0.2))
                answer = await ask(session, url, tokens=1, text=prompt(16, rng), model=MODEL)
                assert answer.ok, answer.error
                ttft.append(answer.ttft)
            found.append(1e3 * (ttft[1] - ttft[0]))
    return round(max(median(found), 0.0), 2)


def _slower(profile, than):
    """Return by how much the decode steps of a profile are longer than those of another, the median."""
    other = {(row.batch, row.context): row.ms for row in than.rows if row.kind == "decode"}
    pairs = [(row.ms, other.get((row.batch, row.context))) for row in profile.rows if row.kind == "decode"]
    return median(ms / of for ms, of in pairs if of) - 1.0


async def test_the_simulator_says_what_a_real_engine_does(product, cluster, kube, figures, tmp_path):
    if isinstance(cluster, ExistingCluster):
        pytest.skip("the model of this study is made on the node")
    folder = built.model(cluster.places, MODEL, LAYERS, HEADS)
    # Of two bytes each.
    parameters = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2
    kube.apply(_tier("one", 1))
    kube.wait_ready("one", seconds=300)
    (pod,) = kube.engines("one")
    url = kube.pod_url(pod)
    begun = time.monotonic()
    alone, overhead, left_out = await _profile(url, ALONE)
    profiled = time.monotonic() - begun

    whole = load_trace(TRACE, start=FROM, end=FROM + SECONDS).lengthened(LENGTHS)
    capacity = sustainable_rate(
        pool_of(alone, ENGINE),
        Workload(
            rate=1.0,
            prompt_tokens=float(whole.prompt.mean()),
            output_tokens=float(whole.output.mean()),
            prompt_cv=float(whole.prompt.std() / whole.prompt.mean()),
            output_cv=float(whole.output.std() / whole.output.mean()),
        ),
    )

    points = {}
    beside = beside_overhead = hop = None

    async def measure(case, at, replicas, round_):
        for share in SHARES[replicas]:
            load = share * capacity * replicas
            run, sent = await _replay(at, load / whole.rate, tmp_path)
            answered = [row for row in sent if row["failure"] is None]
            found = simulated(answered, alone, ENGINE, replicas=replicas, overhead_ms=overhead + (hop or 0.0))
            simulations = {"simulated": found}
            if beside is not None:
                found = simulated(
                    answered, beside, ENGINE, replicas=replicas, overhead_ms=beside_overhead + hop
                )
                simulations = {"simulated": found, "simulatedAlone": simulations["simulated"]}
            point = points.setdefault((case, share), {"case": case, "load": round(share, 3), "runs": []})
            point["requestsPerSecond"] = round(len(sent) / SECONDS, 2)
            point["runs"].append({"measured": run, **simulations})
            figures(
                f"{case}, {share:.0%} of capacity, run {round_ + 1}: {run['requests']} requests,"
                f" {run['requests'] - run['answered']} failed; "
                + "; ".join(
                    f"{name[:-2]} p50 {run[name]['p50']}/{found[name]['p50']} p99 {run[name]['p99']}/{found[name]['p99']}"
                    for name in ("ttftMs", "tpotMs", "e2eMs")
                )
                + f" (measured/simulated); {run['tokensPerSecond']:.0f}/{found['tokensPerSecond']:.0f} tokens/s"
            )

    def save():
        """Write what there is: a study that is broken off has its first half."""
        results = {
            **circumstances(),
            "load": [round(each, 1) for each in os.getloadavg()],
            "trace": {"name": TRACE, "from": FROM, "seconds": SECONDS, "lengthScale": LENGTHS},
            "lengths": {
                "prompt": round(float(whole.prompt.mean()), 1),
                "output": round(float(whole.output.mean()), 1),
            },
            "engine": {
                **{name: getattr(ENGINE, name) for name in Engine.__slots__},
                "profile": alone.describe(),
                "parameters": parameters,
            },
            "profileSeconds": round(profiled),
            "profileLeftOut": left_out,
            "overheadMs": overhead,
            "besideOverheadMs": beside_overhead,
            "routerMs": hop,
            "capacity": round(capacity, 2),
            "points": list(points.values()),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write()
        return results

    for round_ in range(REPEATS):
        await measure("one engine", url, 1, round_)
        results = save()
    kube.delete("servingtier", "one")
    wait_for("the engine gone", 120, lambda: not kube.listed("pods", "servingtiers.io/tier=one"))
    kube.apply(_tier("two", 2))
    kube.wait_ready("two", seconds=300)
    wait_for("two engines", 300, lambda: sum(pod_ready(each) for each in kube.engines("two")) == 2)
    await asyncio.sleep(5)
    routed = kube.service_url("two")
    first, second = (kube.pod_url(each) for each in kube.engines("two"))
    hop = await _hop(first, routed)
    figures(f"the router costs an idle request {hop} ms")
    async with _at_work(second):
        beside, beside_overhead, _ = await _profile(first, BESIDE)
    figures(f"decode beside a neighbour at work takes {_slower(beside, alone):.0%} longer, the median")
    for round_ in range(REPEATS):
        await measure("two engines behind the router", routed, 2, round_)
        results = save()
    made = verdicts(rows(results["points"]))
    for verdict in made:
        figures(
            f"{verdict.case}: {verdict.metric[:-2]} {verdict.percentile}: median error {verdict.error:.1%} over"
            f" {verdict.points} load points (spread {verdict.spread:.1%}): {'kept' if verdict.kept else 'MISSED'}"
        )
    assert len(made) == 12
    assert min(verdict.points for verdict in made) >= 8
    missed = [
        f"{each.case} {each.metric} {each.percentile} {each.error:.1%}" for each in made if not each.kept
    ]
    assert not missed
