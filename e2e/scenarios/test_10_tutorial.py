"""The tutorial's commands, typed as they stand; only its two files are those of a machine without accelerators."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import yaml

from harness import shell
from harness.kube import Kube
from harness.product import values_of
from harness.tiers import tier

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial" / "on-your-cluster.md"


@pytest.fixture
def typed(product, kube: Kube, tmp_path):
    """A folder with the tutorial's files, and nothing installed; afterwards the release is back."""
    product.run_helm("uninstall", "servingtiers", "--wait")
    (tmp_path / "charts").symlink_to(ROOT / "charts")
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values_of(product)))
    ours = tier("chat", replicas=(1, 3), slo={"ttft": {"p99": "1s"}, "tpot": {"p99": "50ms"}})
    (tmp_path / "tier.yaml").write_text(
        yaml.safe_dump(ours | {"metadata": {"name": "chat", "namespace": "llm"}})
    )
    shell.programs(tmp_path, kube, product.helm)
    yield tmp_path
    product.install()


async def test_every_command_of_the_tutorial_works(typed, kube, figures):
    env = shell.environment(typed, kube)
    run, background = 0, []
    begun = time.monotonic()
    said = {}
    try:
        for line in shell.commands(PAGE):
            behind = line.endswith("&")
            process = await asyncio.create_subprocess_exec(
                *("sh", "-c", f"exec {line.removesuffix('&')}"),
                cwd=typed,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL if behind else asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL if behind else asyncio.subprocess.STDOUT,
            )
            run += 1
            if behind:
                background.append(process)
                await asyncio.sleep(3)
                continue
            out, _ = await asyncio.wait_for(process.communicate(), 600)
            said[line] = out.decode()
            assert process.returncode == 0, f"{line}\n{said[line]}"
    finally:
        for process in background:
            process.terminate()
            await process.wait()
    (bench,) = (text for line, text in said.items() if line.startswith("servingtiers bench"))
    answered = next(line for line in bench.splitlines() if "answered" in line)
    figures(f"{run} commands in {time.monotonic() - begun:.0f} s; bench: {answered}")
    assert run >= 13
    assert ", 0 failed" in answered
    assert "Latency tier of tiny" in said["servingtiers explain chat --namespace llm"]
