"""The page on the comparison with KEDA is what its results say, and its arithmetic is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rival(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "e2e"))
    import rival.measure
    import rival.page

    return rival


@pytest.fixture
def load(rival):
    phases = (
        rival.measure.Phase("quiet", 10, 0.2),
        rival.measure.Phase("peak", 20, 1.5),
        rival.measure.Phase("quiet again", 30, 0.2),
    )
    return rival.measure.Load(phases, capacity=10.0, prompt_tokens=8, output_tokens=5)


def request(at, *, ttft=0.1, seconds=0.5, failure=None):
    if failure is not None:
        return {"arrival": at, "sent": at, "first": None, "last": None, "outputTokens": 0, "failure": failure}
    sent = at + 0.01
    return {
        "arrival": at,
        "sent": sent,
        "first": sent + ttft,
        "last": sent + seconds,
        "outputTokens": 5,
        "failure": None,
    }


def test_the_load_is_the_same_each_time_and_has_its_rates(load):
    assert load.trace() == load.trace()
    moments = [json.loads(line)["timestamp"] / 1e3 for line in load.trace().splitlines()]
    assert moments == sorted(moments)
    assert moments[0] == 0.0  # from which readers count
    in_peak = sum(10 <= each < 30 for each in moments)
    assert 300 - 4 * 17 < in_peak < 300 + 4 * 17  # 15/s for 20 s, within four standard deviations
    assert moments[-1] < load.seconds


def test_a_worked_example(rival, load):
    """Two engines are asked for 12 s into the peak; one comes at 20 s, and goes 8 s after the load."""
    sample = rival.measure.Sample
    samples = [
        sample(0.0, 1, 1, 1),
        sample(22.0, 2, 2, 1),
        sample(30.0, 2, 2, 2),
        sample(35.0, 1, 2, 1),
        sample(38.0, 1, 1, 1),
    ]
    records = [
        request(1.0),
        request(12.0, ttft=2.0, seconds=2.4),  # TTFT alone is late
        request(13.0, seconds=9.1),  # TPOT and E2E are
        request(14.0, failure="status"),
        request(40.0),
    ]
    found = rival.measure.measured(load, rival.measure.Objectives(1.0, 0.2, 4.0), records, samples)
    assert (found["requests"], found["failed"]) == (5, 1)
    assert {name: found[name] for name in ("ttft", "tpot", "e2e", "joint")} == {
        "ttft": 0.6,
        "tpot": 0.6,
        "e2e": 0.6,
        "joint": 0.4,
    }
    assert found["replicaSeconds"] == {
        "asked": 22 + 2 * 13 + 25,
        "held": 22 + 2 * 16 + 22,
        "ready": 30 + 2 * 5 + 25,
    }
    _, peak, after = found["phases"]
    assert (peak["askedAtStart"], peak["decidedAfter"], peak["addedAfter"]) == (1, 12.0, None)
    assert (peak["requests"], peak["failed"], peak["joint"]) == (3, 1, 0.0)
    assert peak["e2eP99"] is None  # among the failed: never
    assert after["decidedAfter"] is None
    assert (found["backAsked"], found["backHeld"]) == (5.0, 8.0)
    assert (found["moves"], found["reversals"]) == (2, 1)


def test_a_pool_that_does_not_stay_back_is_not_back(rival, load):
    sample = rival.measure.Sample
    samples = [sample(0.0, 1, 1, 1), sample(15.0, 2, 2, 2), sample(35.0, 1, 1, 1), sample(50.0, 2, 2, 1)]
    found = rival.measure.measured(load, rival.measure.Objectives(1, 1, 1), [request(1.0)], samples)
    assert found["backAsked"] is None
    assert found["backHeld"] is None


def test_who_was_better_is_told_of_either(rival):
    better = rival.page._better
    assert better(2.0, 1.0, less=True) == "KEDA + HPA"
    assert better(2.0, 1.0, less=False) == "ServingTiers"
    assert better(1.0, 1.0, less=True) == "level"
    assert better(None, 500.0, less=True) == "KEDA + HPA"  # never is later than any time


def test_the_page_is_written_from_the_results(rival, tmp_path):
    page = ROOT / "docs" / "explanation" / "rival.md"
    rival.page.write(tmp_path / "rival.md")
    assert (tmp_path / "rival.md").read_text() == page.read_text(), "run `cd e2e && python -m rival.page`"
