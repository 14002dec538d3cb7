"""Real vLLM under a real trace, beside the simulator with a profile of that vLLM.

``make e2e-fidelity``; ``SECONDS=60`` is the length of a run. Writes ``results.json`` beside this file, from which
``python -m fidelity.page`` writes the page of the documentation.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import median

import aiohttp
import pytest

from fidelity.compare import Engine, rows, simulated, step_model, verdicts
from fidelity.page import RESULTS, write
from harness.existing import ExistingCluster
from harness.kube import pod_ready, wait_for
from harness.study import circumstances
from harness.tiers import VOCABULARY, engine, tier
from harness.traffic import ask, prompt
from onenode import images as built
from servingtiers.performance.engine_sim import EngineConfig, PoolConfig, sustainable_rate
from servingtiers.performance.profile import load_profile
from servingtiers.performance.workload import Workload
from servingtiers.simulate.traces import load_trace

PROFILE = Path(__file__).parent / "profile.csv"
SECONDS = float(os.environ.get("SECONDS", "60"))
REPEATS = int(os.environ.get("REPEATS", "2"))
SHARES = {
    1: (0.15, 0.25, 0.35, 0.45, 0.55, 0.62, 0.7, 0.78),
    2: (0.08, 0.12, 0.16, 0.2, 0.24, 0.28, 0.32, 0.36),
}
"""Load points by number of engines: shares of what the simulator says that many sustain.

Two engines keep to loads that one could carry: engines, router and client together need more than the two cores of the
machine beyond that, and what is measured then is the queue for a processor.
"""
TRACE, FROM, LENGTHS = "azure-conv", 600, 0.1
MODEL, LAYERS, HEADS = "small", 6, 12
"""Large enough for steps to take longer than what HTTP does for each token: 7.7 million parameters."""
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
            "resources": {"requests": {"cpu": "500m", "memory": "64Mi"}},
        },
        engine_settings=engine(
            batch=ENGINE.max_num_seqs,
            arguments={"block-size": str(ENGINE.block_size)},
            maxNumBatchedTokens=ENGINE.max_num_batched_tokens,
        ),
    )


async def _servingtiers(*arguments):
    """Run the command as a user does, in the cluster's network."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "servingtiers.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-1500:]
    return out.decode(), err.decode()


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


async def test_the_simulator_says_what_a_real_engine_does(product, cluster, kube, figures, tmp_path):
    if isinstance(cluster, ExistingCluster):
        pytest.skip("the model of this study is made on the node")
    built.model(cluster.places, MODEL, LAYERS, HEADS)
    kube.apply(_tier("one", 1))
    kube.wait_ready("one", seconds=300)
    (pod,) = kube.engines("one")
    url = kube.pod_url(pod)
    begun = time.monotonic()
    _, said = await _servingtiers(
        *("profile", "--url", url, "--model", MODEL, "--vocabulary", str(VOCABULARY), "-o", str(PROFILE)),
        *(part for batch in (1, 2, 4, 8) for part in ("--batch", str(batch))),
        *("--context", "128", "--context", "256", "--context", "512"),
        *(part for tokens in (32, 64, 128, 256, 512, 900) for part in ("--prompt-tokens", str(tokens))),
        *("--max-num-seqs", str(ENGINE.max_num_seqs)),
        *("--max-num-batched-tokens", str(ENGINE.max_num_batched_tokens)),
    )
    profiled = time.monotonic() - begun
    profile = load_profile(PROFILE)
    comments = [line for line in PROFILE.read_text().splitlines() if line.startswith("# request:")]
    overhead = float(comments[0].split()[2])

    whole = load_trace(TRACE, start=FROM, end=FROM + SECONDS).lengthened(LENGTHS)
    pool = PoolConfig(
        step_model(profile),
        EngineConfig(
            max_num_seqs=ENGINE.max_num_seqs,
            max_num_batched_tokens=ENGINE.max_num_batched_tokens,
            block_size=ENGINE.block_size,
            async_scheduling=ENGINE.async_scheduling,
        ),
    )
    capacity = sustainable_rate(
        pool,
        Workload(
            rate=1.0,
            prompt_tokens=float(whole.prompt.mean()),
            output_tokens=float(whole.output.mean()),
            prompt_cv=float(whole.prompt.std() / whole.prompt.mean()),
            output_cv=float(whole.output.std() / whole.output.mean()),
        ),
    )

    points = {}
    hop = None

    async def measure(case, at, replicas, round_, more_ms=0.0):
        for share in SHARES[replicas]:
            load = share * capacity * replicas
            run, sent = await _replay(at, load / whole.rate, tmp_path)
            answered = [row for row in sent if row["failure"] is None]
            found = simulated(answered, profile, ENGINE, replicas=replicas, overhead_ms=overhead + more_ms)
            point = points.setdefault((case, share), {"case": case, "load": round(share, 3), "runs": []})
            point["requestsPerSecond"] = round(len(sent) / SECONDS, 2)
            point["runs"].append({"measured": run, "simulated": found})
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
                "profile": profile.describe(),
            },
            "profileSeconds": round(profiled),
            "profileLeftOut": [line for line in said.splitlines() if line.startswith("left out")],
            "overheadMs": overhead,
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
    hop = await _hop(kube.pod_url(kube.engines("two")[0]), routed)
    figures(f"the router costs an idle request {hop} ms")
    for round_ in range(REPEATS):
        await measure("two engines behind the router", routed, 2, round_, hop)
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
