"""Scenario 9: what is rendered is what the real programs understand."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import aiohttp
import pytest
import yaml

from harness.kube import scrape
from harness.tiers import tier
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
    kube.apply(tier("chat"))
    kube.wait_ready("chat", seconds=300)
    url = kube.service_url("chat")
    rng = random.Random(9)
    async with aiohttp.ClientSession() as session:
        for _ in range(3):
            assert (await ask(session, url, tokens=6, text=prompt(40, rng))).ok
    (engine,) = kube.engines("chat")
    names = {key.split("{")[0] for key in scrape(f"http://{engine['status']['podIP']}:8000/metrics")}
    missing = []
    for metric in ENGINE_METRICS:
        suffix = "_bucket" if metric.kind is Kind.HISTOGRAM else ""
        if metric.names[0] + suffix not in names:
            missing.append(metric.names[0])
    # This one appears with the first rejected request.
    assert [name for name in missing if "admission_rejections" not in name] == []

    (router,) = kube.routers("chat")
    pages = {key.split("{")[0] for key in scrape(f"http://{router['status']['podIP']}:29000/metrics")}
    assert ROUTER_METRICS.dispatched in pages
    figures(
        f"{len(ENGINE_METRICS) - len(missing)} of {len(ENGINE_METRICS)} engine metrics there ({missing} absent)"
    )
