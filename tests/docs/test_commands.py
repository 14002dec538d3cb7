"""Every command in the documentation is run by a test: here, or by the one named beside its pattern."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from servingtiers.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_PROGRAMS = r"(servingtiers|\.venv/bin/servingtiers|make|kubectl|helm|python|git|KUBECONFIG=\S+)\b"

ELSEWHERE = {
    r"make \S+( \w+=\S+)?": "Makefile",  # targets are checked below; CI runs setup, lint, verify-generated and test
    r"python tests/bench/bench_\w+\.py( --.*)?": "Makefile",
    r"git clone .*": "README.md",
    r"(\.venv/bin/)?servingtiers demo( --.*)?": "tests/lab/test_demo_ring.py",
    r"(KUBECONFIG=\S+ )?(\.venv/bin/)?servingtiers explain .*": "tests/cli/test_explain.py",
    r"servingtiers profile .*": "tests/cli/test_profile.py",
    r"servingtiers bench .*": "tests/cli/test_bench.py",
    r"kubectl .*--kubeconfig .*": "tests/lab/test_demo_ring.py",
    r"helm (install|upgrade|uninstall|test|get|show|rollback) .*": "tests/ring/test_chart.py",
    r"kubectl (create|label|rollout|get|apply|delete|annotate|port-forward|patch|describe|kustomize|wait|logs|edit|set) .*": "tests/ring/test_chart.py",
}
"""Commands that need a cluster, an endpoint or minutes, and where they are run."""


def commands(page: Path) -> Iterator[str]:
    """Yield the commands of a page: lines of fenced blocks that start with a program we know, joined where they continue."""
    fence: str | None = None
    pending = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip()[3:] if fence is None else None
            continue
        if fence not in {"", "sh", "console", "bash"}:
            continue
        text = pending + line.strip().removeprefix("$ ")
        if text.endswith("\\"):
            pending = text[:-1]
            continue
        pending = ""
        if re.match(_PROGRAMS, text):
            yield re.sub(r"\s+#.*$", "", re.sub(r"\s+", " ", text)).strip()


ALL = sorted({(str(page.relative_to(ROOT)), command) for page in PAGES for command in commands(page)})
HERE = [
    pytest.param(command, id=f"{page}: {command[:60]}")
    for page, command in ALL
    if not any(re.fullmatch(pattern, command) for pattern in ELSEWHERE)
]


def test_the_pages_hold_commands():
    """A parser that finds nothing would make the other tests vacuous."""
    assert len(ALL) > 20


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_what_is_run_elsewhere_is_run_by_a_file_that_exists(pattern):
    """A pointer to a test that went is no test."""
    assert (ROOT / ELSEWHERE[pattern]).exists()


@pytest.mark.parametrize("target", sorted({c.split()[1] for _, c in ALL if c.startswith("make ")}))
def test_every_target_that_is_named_exists(target):
    """Typing it must work."""
    text = (ROOT / "Makefile").read_text() + (ROOT / "e2e/e2e.mk").read_text()
    assert re.search(rf"^{re.escape(target)}:", text, re.MULTILINE)


@pytest.mark.parametrize("command", HERE)
def test_it_runs(command, tmp_path, monkeypatch):
    """It ends as the page says: done, or for `plan` with the verdict that nothing can meet the objectives (3)."""
    example = (ROOT / "manifests/examples/latency.yaml").read_text()
    for name in ("tier.yaml", "mine.yaml", "chat.yaml", "my-tier.yaml"):
        (tmp_path / name).write_text(example)
    for name in ("mine.csv", "profile.csv"):
        shutil.copy(ROOT / "tests/docs/data/profile.csv", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    if "…" in command:
        command = command.replace(
            "…", "--model meta-llama/Llama-3.1-8B-Instruct --rate 50 --slo ttft.p99=500ms"
        )
    words, _, target = command.partition(" > ")
    arguments = shlex.split(words)
    assert arguments[0].endswith("servingtiers"), f"no test runs this: {command}"

    outcome = CliRunner().invoke(main, arguments[1:])

    assert outcome.exit_code in ({0, 3} if arguments[1] == "plan" else {0}), outcome.output
    if target:
        (tmp_path / target).write_text(outcome.output)
