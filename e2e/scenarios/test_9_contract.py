"""Scenario 9: what is rendered is what the real programs understand."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from pathlib import Path

import aiohttp
import pytest
import yaml

from harness.kube import pod_ready, scrape, total, wait_for
from harness.tiers import disaggregated, tier
from harness.traffic import ask, prompt
from onenode import programs
from servingtiers.core.vllm_metrics import ENGINE_METRICS, ROUTER_METRICS, Kind

ROOT = Path(__file__).parents[2]
PARSE = ROOT / "e2e" / "tools" / "parse_flags.py"


def _rendered(container):
    """Return the arguments of one kind of container in every recorded rendering."""
    return [
        [argument.replace("$$", "$") for argument in one["args"]]
        for path in sorted((ROOT / "tests" / "golden").glob("*/objects.yaml"))
        for each in yaml.safe_load_all(path.read_text())
        if each["kind"] == "Deployment"
        for one in each["spec"]["template"]["spec"]["containers"]
        if one["name"] == container
    ]


def _parse(python, kind, lists):
    done = subprocess.run(
        [str(python), str(PARSE), kind], input=json.dumps(lists), check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["engine", "router"])
def test_every_rendered_command_line_parses_in_the_real_program(kind, cluster, figures):
    lists = _rendered(kind)
    assert len(lists) >= 9
    folder = programs.engine(cluster.places) if kind == "engine" else programs.router()
    *results, unknown = _parse(folder / "bin" / "python", kind, [*lists, [*lists[0], "--no-such-flag=1"]])
    assert [result for result in results if result is not None] == []
    assert "no-such-flag" in unknown  # the parser does refuse what it does not know
    count = len({argument.split("=")[0] for each in lists for argument in each if argument.startswith("--")})
    figures(f"{len(lists)} command lines with {count} different flags parse")


async def test_every_metric_that_is_read_exists_in_a_real_scrape(product, kube, figures):
    kube.apply(tier("chat", replicas=(2, 2)))
    kube.wait_ready("chat", seconds=300)
    wait_for("two engines", 300, lambda: sum(pod_ready(pod) for pod in kube.engines("chat")) == 2)
    await asyncio.sleep(3)
    url = kube.service_url("chat")
    rng = random.Random(9)
    async with aiohttp.ClientSession() as session:
        for _ in range(12):
            assert (await ask(session, url, tokens=6, text=prompt(40, rng))).ok
    served = [scrape(f"{kube.pod_url(engine)}/metrics") for engine in kube.engines("chat")]
    names = {key.split("{")[0] for page in served for key in page}
    missing = []
    for metric in ENGINE_METRICS:
        suffix = "_bucket" if metric.kind is Kind.HISTOGRAM else ""
        if metric.names[0] + suffix not in names:
            missing.append(metric.names[0])
    # This one appears with the first rejected request.
    assert [name for name in missing if "admission_rejections" not in name] == []
    seen = _router_pages(kube, "chat")
    assert {ROUTER_METRICS.dispatched, ROUTER_METRICS.completed, ROUTER_METRICS.running} <= names_of(seen)
    figures(
        f"{len(ENGINE_METRICS) - len(missing)} of {len(ENGINE_METRICS)} engine metrics there ({missing} absent)"
    )


async def test_routers_without_an_engine_count_what_wakes_a_tier(product, kube, figures):
    """Errors are counters that exist from their first increment on: here they have to come about."""
    empty = {"scaling_mode": "External"}
    kube.apply(tier("rare", replicas=(0, 1), **empty), disaggregated("split", scaling={"mode": "External"}))
    deployments = ("rare-pool", "split-prefill", "split-decode")
    wait_for("Deployments", 60, lambda: all(kube.get("deployment", each) for each in deployments))
    for each in deployments:
        kube.run("scale", f"deployment/{each}", "--replicas=0")
    wait_for(
        "routers", 120, lambda: all(any(map(pod_ready, kube.routers(each))) for each in ("rare", "split"))
    )
    wait_for("no engine", 120, lambda: not [*kube.engines("rare"), *kube.engines("split")])
    await asyncio.sleep(5)
    rng = random.Random(10)
    statuses = {}
    async with aiohttp.ClientSession() as session:
        for name in ("rare", "split"):
            answers = [
                await ask(session, kube.service_url(name), tokens=6, text=prompt(40, rng)) for _ in range(2)
            ]
            statuses[name] = sorted({answer.status for answer in answers})
            assert not any(answer.ok for answer in answers)
    plain, split = _router_pages(kube, "rare"), _router_pages(kube, "split")
    assert total(plain, ROUTER_METRICS.exhausted) == 2
    assert (
        sum(total(plain, ROUTER_METRICS.errors, f'error_type="{why}"') for why in ROUTER_METRICS.no_engine)
        >= 2
    )
    assert (
        sum(total(split, ROUTER_METRICS.pd_errors, f'error_type="{why}"') for why in ROUTER_METRICS.no_engine)
        >= 2
    )
    seen = names_of(plain) | names_of(split)
    figures(
        f"without an engine clients see {statuses}; counted by {sorted(seen & set(ROUTER_METRICS.names))}"
    )


def names_of(page):
    return {key.split("{")[0] for key in page}


def _router_pages(kube, name):
    (router,) = kube.routers(name)
    return scrape(f"{kube.pod_url(router, 29000)}/metrics")
