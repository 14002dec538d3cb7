"""The how-tos' commands, typed as they stand on a cluster with a tier; only files and addresses are this cluster's."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest
import yaml

from harness import shell
from harness.kube import Kube, pod_ready, wait_for
from harness.product import values_of
from harness.tiers import disaggregated, tier

ROOT = Path(__file__).parents[2]
PAGES = ("gitops", "monitoring", "profile-your-engine", "split-prefill-and-decode", "upgrade")
NAMES = {"NS": "llm", "TIER": "chat"}
"""What the pages write for the alert's labels."""


@pytest.fixture
def typed(kube: Kube, product, tmp_path):
    """A folder that looks like a checkout to the commands, with this cluster's tiers as the examples."""
    (tmp_path / "charts").symlink_to(ROOT / "charts")
    (tmp_path / "crds").symlink_to(ROOT / "crds")
    manifests = tmp_path / "manifests"
    (manifests / "examples").mkdir(parents=True)
    (manifests / "gitops").symlink_to(ROOT / "manifests" / "gitops")
    (manifests / "examples" / "throughput-disaggregated.yaml").write_text(
        yaml.safe_dump(disaggregated("batch"))
    )
    shell.programs(tmp_path, kube, product.helm)
    # What Argo CD itself would have.
    argo = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "argocd"}}
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "argocd-cm", "namespace": "argocd"},
    }
    kube.apply(argo)
    kube.apply(settings, namespace="argocd")
    yield tmp_path
    kube.run("delete", "namespace", "argocd", "--wait=false")
    product.install()


async def _type(line: str, folder: Path, kube: Kube) -> str:
    process = await asyncio.create_subprocess_exec(
        *("sh", "-c", line),
        cwd=folder,
        env=shell.environment(folder, kube),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 300)
    said = out.decode()
    # `grep` that finds nothing is good news, and `plan` may say that nothing can keep the objectives.
    fine = {0, 1} if "| grep" in line else {0, 3} if "servingtiers plan" in line else {0}
    assert process.returncode in fine, f"{line}\n{said}"
    return said


def _here(line: str, engine: str) -> str:
    """Return a command for this cluster: its names, the engine's address, and few points to measure on two cores."""
    line = re.sub(r"\b(NS|TIER)\b(?!:)", lambda name: NAMES[name[0]], line)
    if line.startswith("servingtiers profile"):
        few = "--batch 1 --batch 8 --context 128 --context 512 --prompt-tokens 32 --prompt-tokens 256"
        line = re.sub(r"--model \S+", "--model tiny", line.replace("http://localhost:8000", engine))
        return f"{line} {few}"
    if line.startswith("servingtiers predict"):
        # Beyond what was measured it refuses, rightly: batches of eight are what there is.
        return f"{line} --max-num-seqs 8"
    # The page says this to those who have the definitions outside the release; here the release holds them.
    return f"{line} --force-conflicts" if line == "kubectl apply --server-side -f crds/" else line


async def test_every_command_of_the_how_tos_works(typed, product, kube, figures):
    begun = time.monotonic()
    kube.apply(tier("chat"))
    kube.wait_ready("chat", seconds=300)
    (engine,) = kube.engines("chat")
    before = engine["metadata"]["uid"]
    # There has to be a release to go back to.
    product.install({"source": "Scrape", "interval": "6s", "window": "36s"})
    said: dict[str, str] = {}
    for page in PAGES:
        for line in shell.commands(ROOT / "docs" / "how-to" / f"{page}.md"):
            here = _here(line, kube.pod_url(engine))
            said[here] = await _type(here, typed, kube)
    figures(f"{len(said)} commands of {len(PAGES)} pages in {time.monotonic() - begun:.0f} s")

    health = kube.get("configmap", "argocd-cm", "argocd")["data"]
    assert any("ServingTier" in key for key in health)
    assert "Latency tier of tiny" in said["servingtiers explain chat --namespace llm"]
    assert (typed / "profile.csv").read_text().count("\n") > 5
    # The upgrade, the rollback and the new plan of a tier that changes nothing: the engine is the one it was.
    assert [pod["metadata"]["uid"] for pod in kube.engines("chat")] == [before]
    # The how-to's tier with two pools comes up, too.
    wait_for(
        "prefill and decode",
        240,
        lambda: all(any(map(pod_ready, kube.engines("batch", pool))) for pool in ("prefill", "decode")),
    )
    assert values_of(product)["image"]["tag"] in product.run_helm("get", "values", "servingtiers")
