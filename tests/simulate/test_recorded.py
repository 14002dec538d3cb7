"""Traffic that Prometheus recorded is drawn again with its rates and lengths."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servingtiers.simulate.recorded import STEP, draw_recorded, queries, read_recording

START = 1_700_000_040.0
BOUNDS = ("100.0", "200.0", "500.0", "+Inf")


class Recorded:
    """A Prometheus that answers range queries from lists."""

    def __init__(self, arrivals, prompt, output, *, finished=None) -> None:
        self.data = {"processed": arrivals, "success": finished or [], "prompt": prompt, "generation": output}
        self.asked: list[str] = []

    def custom_query_range(self, query, start_time, end_time, step):
        self.asked.append(query)
        assert step == "60s"
        assert (end_time - start_time).total_seconds() > 0
        key = next(each for each in self.data if each in query)
        return self.data[key]


def points(values):
    return [[START + STEP * step, str(value)] for step, value in enumerate(values)]


def histogram(*rows):
    """Cumulative counts of each step by bound."""
    return [
        {"metric": {"le": bound}, "values": points([row[place] for row in rows])}
        for place, bound in enumerate(BOUNDS)
    ]


ASKED = queries("llm", ["chat-pool"], "chat-router")


def test_the_rates_and_lengths_of_every_minute_come_back():
    minutes = 60
    client = Recorded(
        [{"metric": {}, "values": points([5.0] * 30 + [20.0] * 30)}],
        histogram(*[[0, 900, 1000, 1000]] * minutes),
        histogram(*[[500, 500, 500, 1000]] * minutes),
    )
    found = read_recording(client, ASKED, start=START, end=START + 3600, paired=False)
    assert found.unknown == 0
    trace = draw_recorded(found, name="last week", seed=1)
    assert "re-drawn" in trace.origin
    assert trace.seconds == 3600
    assert (trace.arrival < 1800).sum() / 1800 == pytest.approx(5, rel=0.1)
    assert (trace.arrival >= 1800).sum() / 1800 == pytest.approx(20, rel=0.1)
    assert ((trace.prompt > 100) & (trace.prompt <= 200)).mean() == pytest.approx(0.9, abs=0.02)
    assert trace.prompt.max() <= 500
    # Half of the outputs lie beyond the last finite bound, which is all that is known of them.
    assert (trace.output == 500).mean() == pytest.approx(0.5, abs=0.02)
    assert trace.output.min() >= 1
    assert np.array_equal(draw_recorded(found, name="x", seed=1).arrival, trace.arrival)


def test_a_pair_of_pools_counts_each_request_twice_at_the_router():
    client = Recorded(
        [{"metric": {}, "values": points([8.0] * 5)}],
        histogram(*[[1, 1, 1, 1]] * 5),
        histogram(*[[1, 1, 1, 1]] * 5),
    )
    assert read_recording(client, ASKED, start=START, end=START + 300, paired=True).rates == (4.0,) * 5


def test_gaps_are_counted_and_lengths_carried_over_them():
    client = Recorded(
        [{"metric": {}, "values": points([8.0, "NaN", 8.0])}],
        histogram([0, 10, 10, 10], [0, 0, 0, 0], [0, 0, 0, 0]),
        histogram([10, 10, 10, 10], [0, 0, 0, 0], [0, 0, 0, 0]),
    )
    found = read_recording(client, ASKED, start=START, end=START + 240, paired=False)
    assert found.rates == (8.0, 0.0, 8.0, 0.0)
    assert found.unknown == 2
    trace = draw_recorded(found, name="x", seed=0)
    assert trace.prompt.min() > 100
    assert not ((trace.arrival >= 60) & (trace.arrival < 120)).any()


def test_without_routers_finished_requests_are_taken():
    client = Recorded(
        [],
        histogram([1, 1, 1, 1]),
        histogram([1, 1, 1, 1]),
        finished=[{"metric": {}, "values": points([3.0])}],
    )
    assert read_recording(client, ASKED, start=START, end=START + 60, paired=True).rates == (3.0,)


def test_no_traffic_and_no_lengths_are_told_apart():
    empty = Recorded([], [], [])
    with pytest.raises(ValueError, match="no requests of this tier"):
        read_recording(empty, ASKED, start=START, end=START + 60, paired=False)
    lengthless = Recorded([{"metric": {}, "values": points([3.0])}], [], [])
    found = read_recording(lengthless, ASKED, start=START, end=START + 60, paired=False)
    with pytest.raises(ValueError, match="no request lengths"):
        draw_recorded(found, name="x", seed=0)


def test_the_queries_name_the_tiers_own_pods():
    assert 'pod=~"(chat-pool)-.*"' in ASKED.prompt
    assert 'namespace="llm"' in ASKED.arrivals
    assert "vllm_router_processed_requests_total" in ASKED.arrivals
    assert "sum by (le)" in ASKED.output
    assert math.isclose(STEP, 60)
