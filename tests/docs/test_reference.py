"""The reference pages name what programs are given, and the README's figures are those of the pages it points to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click import Context
from click.testing import CliRunner

from servingtiers.catalog.accelerators import accelerators
from servingtiers.catalog.models import models
from servingtiers.cli import main
from servingtiers.performance.catalogue_page import page

ROOT = Path(__file__).parents[2]
COMMANDS = (ROOT / "docs" / "reference" / "command-line.md").read_text(encoding="utf-8")
ONE = ("--model", "meta-llama/Llama-3.2-1B", "--accelerator", "h100-sxm-80gb", "--rate", "5")


def _section(title: str) -> str:
    return COMMANDS.partition(f"## `servingtiers {title}`")[2].partition("\n## ")[0]


def _answer(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(main, [*arguments, "-o", "json"])
    assert result.exit_code == 0, result.output
    found: dict[str, object] = json.loads(result.stdout)
    return found


def _keys(value: object) -> set[str]:
    """Return the keys of an object and of those inside it, latencies' percentiles and policies' names left out."""
    if isinstance(value, list):
        return set().union(*map(_keys, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    return set(value).union(*map(_keys, value.values())) - {"mean", "p50", "p90", "p95", "p99", "p999"}


def test_every_key_of_a_prediction_is_in_the_reference():
    missing = {
        key
        for key in _keys(_answer("predict", *ONE, "--requests", "100"))
        if f"`{key}`" not in _section("predict -o json")
    }
    assert not missing


@pytest.mark.parametrize("objective", ["ttft.p99=500ms", "e2e.p99=1ms"])
def test_every_key_of_a_plan_is_in_the_reference(objective):
    result = CliRunner().invoke(main, ["plan", *ONE, "--no-simulation", "--slo", objective, "-o", "json"])
    missing = {key for key in _keys(json.loads(result.stdout)) if f"`{key}`" not in _section("plan -o json")}
    assert not missing


def test_every_key_of_a_simulation_is_in_the_reference(tmp_path):
    run = _answer(
        *("simulate", "--trace", "step:1:2:300", "--quiet", "--no-clairvoyant"),
        *("--tier", str(ROOT / "manifests/examples/balanced.yaml")),
    )
    missing = {key for key in _keys(run) if f"`{key}`" not in _section("simulate -o json")} - {"runs"}
    assert not missing


def test_every_command_is_in_the_reference():
    assert all(f"| `{name}` |" in COMMANDS for name in main.list_commands(Context(main)))


def test_the_catalogue_page_is_in_step_and_names_everything():
    text = page()
    assert (ROOT / "docs/reference/catalogue.md").read_text(encoding="utf-8") == text, "run make generate"
    assert all(f"| `{each.key}` |" in text for each in accelerators())
    assert all(f"| `{each.name}` |" in text for each in models())


ROWS = re.findall(
    r"^\| (.+?) \| (.+?) \|(.*?)\| \[[^\]]+\]\(([^)#]+)\) \|$",
    (ROOT / "README.md").read_text(encoding="utf-8").partition("## Why not")[2].partition("\n## ")[0],
    re.MULTILINE,
)


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:40] for row in ROWS])
def test_figures_of_the_readme_are_those_of_the_page_it_points_to(row):
    """Whoever measures anew is told that the README has the old figures."""
    _, ours, theirs, target = row
    text = (ROOT / target).read_text(encoding="utf-8")
    figures = re.findall(r"(?<![\w.])\d+(?:\.\d+)?", f"{ours} {theirs}")
    assert figures
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d]|\.\d)", text), f"{figure} is not in {target}"


def test_the_readme_has_figures():
    """A pattern that matches no row would make the test above vacuous."""
    assert len(ROWS) >= 6
