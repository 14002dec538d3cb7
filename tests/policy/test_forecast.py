# the names of the tests are the sentences
"""What the last hour says of the load to come."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servingtiers.policy.forecast import BUCKET_SECONDS, KEPT_BUCKETS, History, ahead

NOW = 1_800_000_000.0


def hour(of) -> History:
    """Return the history of a load that is ``of(seconds)`` replicas over an hour."""
    history = History()
    for second in range(0, 3600, 15):
        history = history.with_load(NOW + second, of(second))
    return history


def test_the_peaks_of_half_minutes_are_kept_for_an_hour():
    history = hour(lambda second: second / 360.0)
    assert len(history.peaks) == KEPT_BUCKETS
    assert history.peaks[0] == 4, "the higher of 0 s and 15 s"
    assert hour(lambda _: 0.0).empty


def test_a_rush_begins_at_the_mean_and_ends_far_above_it():
    assert hour(lambda second: 9.0 if 1800 <= second < 2100 else 1.0).rushes == 1
    assert hour(lambda second: 9.0 if second % 600 < 60 else 1.0).rushes == 5, "the first has no before"
    assert hour(lambda second: 4.0 + second % 5 / 10).rushes == 0, "it wavers"
    assert hour(lambda second: 3.0 + 3.0 * second / 3600).rushes == 0, "it grows"
    assert History().rushes == 0


def test_what_was_not_seen_is_not_zero():
    history = History().with_load(NOW, 3.0).with_load(NOW + 5 * BUCKET_SECONDS, 2.0)
    assert history.peaks == (300, -1, -1, -1, -1, 200)
    assert History().with_load(NOW, 3.0).with_load(NOW + 7200, 2.0).peaks == (200,)


def test_little_known_means_a_wide_margin_and_says_so():
    forecast = ahead(History().with_load(NOW, 4.0), 4.0, 180.0)
    assert (forecast.level, forecast.margin, forecast.pairs) == (4.0, 0.4, 0)


def test_a_steady_load_needs_little_beyond_itself():
    forecast = ahead(hour(lambda _: 5.0), 5.0, 180.0)
    assert forecast.level == pytest.approx(5.0)
    assert forecast.margin == pytest.approx(0.6), "an hour without a rise proves nothing: 12 % stay"


def test_a_load_that_comes_and_goes_keeps_what_its_rushes_need():
    """Two minutes of 10 in every ten: in a lull of 1 the next rush is nearer than an engine's start."""
    forecast = ahead(hour(lambda second: 10.0 if second % 600 < 120 else 1.0), 1.0, 500.0)
    assert forecast.peak == pytest.approx(10.0, abs=0.1)


def test_a_load_that_climbs_slowly_is_followed_closely():
    """From 2 to 10 in an hour: three minutes bring 0.4."""
    forecast = ahead(hour(lambda second: 2.0 + 8.0 * second / 3600.0), 10.0, 180.0)
    assert 10.4 < forecast.peak < 11.7


def test_one_rise_is_not_expected_to_come_on_top_of_itself():
    forecast = ahead(hour(lambda second: 2.0 if second < 3000 else 8.0), 8.0, 180.0)
    assert forecast.peak < 9.0


loads = st.lists(st.floats(0.0, 50.0), min_size=1, max_size=150)


@settings(deadline=None)
@given(loads, st.floats(0.0, 60.0), st.floats(0.0, 60.0), st.sampled_from([5.0, 60.0, 200.0, 400.0]))
def test_more_load_never_foretells_less(past, one, other, seconds):
    history = History()
    for index, load in enumerate(past):
        history = history.with_load(NOW + index * BUCKET_SECONDS, load)
    now = NOW + len(past) * BUCKET_SECONDS
    low, high = sorted((one, other))
    less, more = (ahead(history.with_load(now, load), load, seconds) for load in (low, high))
    assert less.peak <= more.peak + 1e-9
    for forecast, load in ((less, low), (more, high)):
        assert forecast.level >= load
        assert forecast.margin >= 0
        assert math.isfinite(forecast.peak)


def test_a_clock_that_is_set_back_a_little_forgets_nothing():
    """Another replica of the operator takes over, and its clock is behind."""
    history = hour(lambda _: 5.0)
    back = history.with_load(NOW + 3585 - 40, 7.0)
    assert (len(back.peaks), back.peaks[-1], back.last) == (KEPT_BUCKETS, 700, history.last)
    assert history.with_load(NOW, 7.0).peaks == (700,), "an hour back is another time"


def test_the_first_minutes_of_a_load_that_comes_and_goes_are_not_its_hour():
    """The same bursts, seen for a quarter of an hour and for the whole of it: the first may not have been the highest."""

    def bursts(second: int) -> float:
        return (10.0, 4.0, 5.0)[second // 300 % 3] if second % 300 < 60 else 1.0

    quarter = History()
    for second in range(0, 900, 15):
        quarter = quarter.with_load(NOW + second, bursts(second))
    young, old = (ahead(history, 8.0, 150.0) for history in (quarter, hour(bursts)))
    assert old.peak == pytest.approx(10.0, abs=0.1)
    assert 10.2 < young.peak <= 11.0


def test_a_spike_is_not_expected_again_before_it_has_come_twice():
    """Two minutes of 10 in an hour of 2: engines for it would idle, and the next may never come."""
    once = ahead(hour(lambda second: 10.0 if 1200 <= second < 1320 else 2.0), 2.0, 180.0)
    assert once.level == pytest.approx(2.0)
    assert once.margin < 0.6
    twice = ahead(
        hour(lambda second: 10.0 if 1200 <= second < 1320 or 2400 <= second < 2520 else 2.0), 2.0, 180.0
    )
    assert twice.peak > 8.0


def test_the_highest_load_between_two_times():
    history = hour(lambda second: 2.0 if second < 3000 else 8.0)
    assert history.highest(NOW, NOW + 2900) == 2.0
    assert history.highest(NOW + 2900, NOW + 3600) == 8.0
    assert history.highest(NOW - 7200, NOW - 3600) is None
    assert History().highest(NOW, NOW + 60) is None
