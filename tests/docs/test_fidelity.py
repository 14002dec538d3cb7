"""The page on fidelity is what its results say, and its criterion can be missed."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fidelity(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "e2e"))
    import fidelity.compare
    import fidelity.page

    return fidelity


def point(*, simulated: float, runs: tuple[float, float] = (10.0, 10.0)):
    """One load point: TTFT p50 as given, all else alike."""
    alike = {metric: {"p50": 50.0, "p99": 90.0} for metric in ("tpotMs", "e2eMs")}
    return {
        "case": "one engine",
        "load": 0.5,
        "runs": [
            {
                "measured": {**alike, "ttftMs": {"p50": run, "p99": 20.0}},
                "simulated": {**alike, "ttftMs": {"p50": simulated, "p99": 21.0}},
            }
            for run in runs
        ],
    }


@pytest.mark.parametrize(
    ("simulated", "runs", "kept"),
    [
        (11.4, (10.0, 10.0), True),  # 14 %
        (11.6, (10.0, 10.0), False),  # 16 %
        (8.4, (10.0, 10.0), False),  # too fast is as wrong as too slow
        (12.5, (9.0, 11.0), False),  # 25 % where the runs differ by ±10 %
        (11.9, (9.0, 11.0), True),  # 19 % of twice that
    ],
)
def test_the_criterion_is_fifteen_percent_or_twice_the_spread(fidelity, simulated, runs, kept):
    made = fidelity.compare.verdicts(fidelity.compare.rows([point(simulated=simulated, runs=runs)]))
    found = {(each.metric, each.percentile): each.kept for each in made}
    assert found["ttftMs", "p50"] is kept
    assert all(verdict for key, verdict in found.items() if key != ("ttftMs", "p50"))


def test_the_median_over_the_load_points_decides(fidelity):
    points = [point(simulated=each) for each in (10.0, 11.0, 30.0)]
    verdict = fidelity.compare.verdicts(fidelity.compare.rows(points))[0]
    assert (verdict.points, verdict.kept) == (3, True)
    assert verdict.error == pytest.approx(0.1)


def test_the_page_is_written_from_the_results(fidelity, tmp_path):
    page = ROOT / "docs" / "explanation" / "fidelity.md"
    fidelity.page.write(tmp_path / "fidelity.md")
    assert (tmp_path / "fidelity.md").read_text() == page.read_text(), (
        "run `cd e2e && python -m fidelity.page`"
    )
