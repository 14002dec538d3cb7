"""Attainment is counted once per request, honestly, and survives a restart."""

# the names of the tests are the sentences

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.api.base import format_duration
from servingtiers.core.decisions import Targets
from servingtiers.core.signals import Histogram, Unknown, Zero
from servingtiers.core.times import to_time
from servingtiers.policy.attainment import (
    Bin,
    Tally,
    count,
    count_disaggregated,
    report,
    restore,
    should_write,
    update,
    verdicts,
)

NOW = 1_800_000_000.0
HOUR, DAY = 3600.0, 86_400.0
BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, math.inf)
GOALS = Targets({("ttft", "p99"): 0.5})


def histogram(*values: float, each: float = 1, bounds: tuple[float, ...] = BOUNDS) -> Histogram:
    return Histogram(bounds, tuple(each * sum(v <= b for v in values) for b in bounds), each * sum(values))


def tally(*bins: Bin, target: float = 0.5, percentile: str = "p99") -> Tally:
    return Tally("ttft", percentile, target, bins)


def hour(ago: float, total: float, good: float, possible: float | None = None) -> Bin:
    return Bin((NOW - ago) // HOUR * HOUR, HOUR, total, good, good if possible is None else possible)


def add(
    to: Tally, source, *, elapsed: float = 15.0, window: float = 60.0, slo: float = DAY, now: float = NOW
) -> Tally:
    measured = {to.objective: count(source, to.target)}
    (updated,) = update((to,), measured, elapsed=elapsed, load_window=window, slo_window=slo, now=now)
    return updated


def test_ticks_through_a_window_count_each_request_once():
    """100 requests in one window of 60 s, seen by four ticks of 15 s."""
    seen = tally()
    for tick in range(4):
        seen = add(seen, histogram(0.2, each=100), now=NOW + 15 * tick)
    assert sum(each.total for each in seen.bins) == pytest.approx(100)


def test_a_tick_that_comes_late_counts_its_window_and_no_more():
    assert add(tally(), histogram(0.2, each=100), elapsed=900.0).bins[0].total == 100


@pytest.mark.parametrize("source", [Unknown("gap"), Zero(), histogram()])
def test_nothing_is_counted_without_requests(source):
    assert add(tally(), source).bins == ()


def test_a_target_on_a_bucket_edge_is_counted_exactly():
    measured = count(histogram(0.2, 0.4, 0.9), 0.5).count
    assert (measured.total, measured.good, measured.possible) == (3, 2, 2)


def test_a_target_between_edges_is_an_interval():
    measured = count(histogram(0.2, 0.4, 0.9), 0.3).count
    assert (measured.good, measured.possible) == (1, 2)


latencies = st.lists(st.tuples(st.floats(0.01, 3.0), st.floats(0.01, 3.0)), min_size=1, max_size=60)


@given(latencies, st.sampled_from([0.3, 0.5, 1.0, 2.0]))
def test_the_bound_of_two_engines_holds_for_every_pairing(pairs, target):
    """What clients saw lies inside the interval, whoever met whom."""
    seen = count_disaggregated(
        histogram(*(prefill for prefill, _ in pairs)), histogram(*(decode for _, decode in pairs)), target
    ).count
    truth = sum(prefill + decode <= target for prefill, decode in pairs)
    assert seen.good <= truth + 1e-6
    assert seen.possible >= truth - 1e-6


def test_two_engines_with_room_between_them_are_proved_good():
    """All prefills below 250 ms and all decodes below 250 ms: nobody waited longer than 500 ms."""
    seen = count_disaggregated(histogram(0.2, each=50), histogram(0.2, each=50), 0.5).count
    assert (seen.total, seen.good) == (50, 50)


@pytest.mark.parametrize("missing", [(Unknown("gone"), histogram(0.1)), (histogram(0.1), Unknown("gone"))])
def test_half_of_two_engines_is_unknown(missing):
    assert count_disaggregated(*missing, 0.5).count is None


def test_hours_are_folded_into_days_and_leave_with_the_window():
    bins = [hour(ago * HOUR, 10, 9) for ago in range(30 * 24, -1, -1)]
    (folded,) = update((tally(*bins),), {}, elapsed=15, load_window=60, slo_window=10 * DAY, now=NOW)
    days = [each for each in folded.bins if each.length == DAY]
    hours = [each for each in folded.bins if each.length == HOUR]
    assert 6 <= len(days) <= 8
    assert all(each.total == 240 for each in days)
    assert len(hours) <= 4 * 24
    assert all(each.start % DAY == 0 for each in days)
    assert folded.bins[0].start + DAY > NOW - 10 * DAY


def test_the_longest_window_fits_the_status():
    """720 hours; the API holds 160 entries."""
    bins = [hour(ago * HOUR, 10, 9) for ago in range(31 * 24, -1, -1)]
    (folded,) = update((tally(*bins),), {}, elapsed=15, load_window=60, slo_window=30 * DAY, now=NOW)
    (status,) = report((folded,), {})
    assert len(status.hours) == len(folded.bins) <= 160
    assert len({each.hour for each in status.hours}) == len(status.hours)


def test_a_restart_loses_no_counted_request():
    bins = [hour(ago * HOUR, 100, 97) for ago in range(9 * 24, -1, -1)]
    (before,) = update((tally(*bins),), {}, elapsed=15, load_window=60, slo_window=30 * DAY, now=NOW)
    written = report((before,), {"ttft.p99": count(histogram(0.2), 0.5)})
    (after,) = restore(written, GOALS, NOW)
    assert after == before


def test_what_was_open_stays_open_after_a_restart():
    """And no wider: status holds both ends of what the buckets allow."""
    source = histogram(0.2, 0.4, 0.9, each=400)
    before = add(tally(target=0.3), source, elapsed=60)
    written = report((before,), {"ttft.p99": count(source, 0.3)})
    (after,) = restore(written, Targets({("ttft", "p99"): 0.3}), NOW)
    assert (after.bins[0].good, after.bins[0].possible) == (400, 800)
    assert after == before


@pytest.mark.parametrize(("target", "most"), [(0.3, 1200), (0.5, 800)])
def test_hours_that_do_not_say_how_many_can_have_met_the_target_are_read_with_care(target, most):
    """Written before status held it: on a bucket edge nothing is open, elsewhere everything."""
    source = histogram(0.2, 0.4, 0.9, each=400)
    before = add(tally(target=target), source, elapsed=60)
    (written,) = report((before,), {"ttft.p99": count(source, target)})
    old = written.model_copy(
        update={"hours": [each.model_copy(update={"good_most": None}) for each in written.hours]}
    )
    (after,) = restore((old,), Targets({("ttft", "p99"): target}), NOW)
    assert after.bins[0].possible == most


def test_counts_of_another_target_are_dropped():
    written = report((tally(hour(0, 100, 90)),), {})
    (after,) = restore(written, Targets({("ttft", "p99"): 0.25}), NOW)
    assert after.bins == ()


@pytest.mark.parametrize(
    ("why", "seen", "met"),
    [
        ("no traffic", tally(), None),
        ("99.5 % of enough requests", tally(hour(0, 1000, 995)), True),
        ("98 % of enough requests", tally(hour(0, 1000, 980)), False),
        ("too few requests, all good", tally(hour(0, 299, 299)), None),
        ("too few requests, hopelessly bad", tally(hour(0, 20, 10)), False),
        ("the buckets allow both", tally(hour(0, 1000, 950, 1000)), None),
        ("even the most is too little", tally(hour(0, 1000, 900, 980)), False),
        ("p99.9 of two thousand", tally(hour(0, 2000, 2000), percentile="p999"), None),
        ("p99.9 of four thousand", tally(hour(0, 4000, 4000), percentile="p999"), True),
    ],
)
def test_a_verdict_says_no_more_than_the_counts(why, seen, met):
    (verdict,) = verdicts((seen,))
    assert verdict.met is met, why


def test_status_shows_attainment_budget_and_resolution():
    source = histogram(0.2, 0.4, each=10)
    (status,) = report((tally(hour(0, 1000, 995)),), {"ttft.p99": count(source, 0.5)})
    assert status.attainment_percent == "99.50"
    assert status.error_budget_left_percent == "50"
    assert status.observed == "250ms–500ms"
    assert status.resolution == "the target is a bucket edge"


def test_status_says_which_target_the_buckets_judge_exactly():
    (status,) = report(
        (tally(hour(0, 1000, 900, 990), target=0.3),), {"ttft.p99": count(histogram(0.4), 0.3)}
    )
    assert status.attainment_percent == "90.00–99.00"
    assert "a target of 250ms or 500ms is judged exactly" in status.resolution


def test_a_bound_over_two_engines_says_so():
    measured = {"ttft.p99": count_disaggregated(histogram(0.2, each=9), histogram(0.2, each=9), 0.5)}
    (status,) = report((tally(),), measured)
    assert "at least so many, from prefill E2E + decode" in status.resolution
    assert status.observed == "100ms–500ms"


@given(latencies, st.sampled_from([0.5, 0.9, 0.99]))
def test_the_time_in_two_engines_is_told_as_an_interval_that_holds_for_every_pairing(pairs, q):
    name = {0.5: "p50", 0.9: "p90", 0.99: "p99"}[q]
    found = count_disaggregated(
        histogram(*(first for first, _ in pairs)), histogram(*(second for _, second in pairs)), 1.0
    )
    (status,) = report((tally(percentile=name, target=1.0),), {f"ttft.{name}": found})
    sums = sorted(first + second for first, second in pairs)
    truth = sums[max(math.ceil(q * len(sums)) - 1, 0)]
    above = status.observed.removeprefix("above ")
    low, _, high = above.partition("–")

    def seconds(text: str) -> float:
        return float(text[:-2]) / 1e3 if text.endswith("ms") else float(text.removesuffix("s"))

    assert seconds(low) <= truth + 0.05
    if high:
        assert truth <= seconds(high) + 0.05


def test_counters_are_written_on_traffic_and_not_too_often():
    old = report((tally(hour(0, 10, 9)),), {})
    new = report((tally(hour(0, 11, 9)),), {})
    assert not should_write(old, old, NOW, None), "no traffic"
    assert should_write(old, new, NOW, None)
    assert not should_write(old, new, NOW, NOW - 299)
    assert should_write(old, new, NOW, NOW - 300)
    assert should_write(old, new, NOW, NOW + 4000), "the clock was set back"
    other = report((replace(tally(), target=0.25),), {})
    assert should_write(old, other, NOW, NOW - 1), "another objective is news"


def test_what_status_holds_is_the_targets_own_text():
    (status,) = report((tally(hour(0, 10, 9)),), {})
    assert status.target == format_duration(0.5) == "500ms"
    assert status.hours[0].hour == to_time(NOW // HOUR * HOUR)
