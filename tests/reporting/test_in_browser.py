"""The reports in a real browser: the figures are drawn, nothing goes wrong, nothing is fetched."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from servingtiers.cli import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser: install chromium (apt-get install chromium) to run this"
)


def opened(page: str, folder: Path) -> tuple[str, str]:
    """Return the document as a browser has it once its scripts have run, and what it logged."""
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    assert BROWSER is not None
    result = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'browser'}",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--virtual-time-budget=10000",
            "--dump-dom",
            path.as_uri(),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.stdout, "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)


def test_the_plan_s_curves_and_costs_are_drawn(tmp_path: Path) -> None:
    """Three figures with a line for each fleet, the Pareto front among them, and no error in the console."""
    arguments = (
        "plan --model meta-llama/Llama-3.1-8B --rate 1000 --p99 200ms --accelerator h100 --accelerator a100"
    )
    made = CliRunner().invoke(main, [*arguments.split(), "--tensor-parallel", "1", "-o", "html"])
    assert made.exit_code == 0, made.output

    document, console = opened(made.stdout, tmp_path)

    assert console == ""
    body = re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    figures = body.split('class="js-plotly-plot"')
    drawn = [len(re.findall(r'class="trace (?:scatter|bars)', figure)) for figure in figures[1:]]
    assert len(drawn) == 3
    assert all(count >= 2 for count in drawn)
    for text in ("Pareto front", "output tokens per second and GPU", "USD per hour", "1 x h100-sxm-80gb"):
        assert text in body
    assert re.search(r'<path class="js-line"[^>]* d="M[\d.]+,[\d.]+L', body) or "js-line" in body
    assert "fits" in body
    assert "nearest feasible" in body
