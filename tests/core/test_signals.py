"""Signals and histograms: what buckets allow to say, and nothing beyond."""

import math
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.core.signals import Histogram, Interval, Unknown, Value, Zero, merge, number

BOUNDS = (0.1, 0.25, 0.5, 1.0, math.inf)


def made(bounds, observations):
    """Return the histogram of some observations."""
    counts = tuple(float(sum(o <= b for o in observations)) for b in bounds)
    return Histogram(bounds, counts, math.fsum(observations))


def bucket_quantile(q, bounds, counts):
    """`bucketQuantile` of promql/quantile.go (Prometheus 2 and 3), which this must agree with."""
    rank = q * counts[-1]
    b = bisect_left(counts[:-1], rank)
    if b == len(bounds) - 1:
        return bounds[-2]
    if b == 0 and bounds[0] <= 0:
        return bounds[0]
    start, count = 0.0, counts[b]
    if b > 0:
        start, count, rank = bounds[b - 1], count - counts[b - 1], rank - counts[b - 1]
    return start + (bounds[b] - start) * (rank / count)


observations = st.lists(st.floats(0.001, 3.0), min_size=1, max_size=50)
edges = st.lists(st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0, 2.0]), min_size=1, unique=True).map(
    lambda found: (*sorted(found), math.inf)
)


@given(observations, edges, st.floats(0.01, 1.0))
def test_the_estimate_is_prometheus_histogram_quantile(values, bounds, q):
    histogram = made(bounds, values)
    assert histogram.quantile(q).estimate == pytest.approx(bucket_quantile(q, bounds, histogram.counts))


@given(observations, edges, st.floats(0.0, 1.0))
def test_the_true_quantile_lies_within_the_interval(values, bounds, q):
    rank = max(1, math.ceil(q * len(values)))
    true = sorted(values)[rank - 1]
    found = made(bounds, values).quantile(q)

    assert found.low <= true <= found.high
    assert found.low <= found.estimate <= found.high


@given(observations, edges, st.floats(0.0, 3.0))
def test_a_tail_is_within_what_the_buckets_allow_and_falls(values, bounds, threshold):
    histogram = made(bounds, values)
    least, most = histogram.count_at_most(threshold)
    beyond = histogram.tail_beyond(threshold)
    assert histogram.total - most - 1e-9 <= beyond <= histogram.total - least + 1e-9
    assert histogram.tail_beyond(threshold + 0.1) <= beyond + 1e-9


@given(observations, edges, st.floats(0.0, 0.999))
def test_a_quantile_of_a_tail_is_within_its_bucket_and_leaves_no_more_beyond_it(values, bounds, q):
    histogram = made(bounds, values)
    found, interval = histogram.tail_quantile(q), histogram.quantile(q)
    assert interval.low <= found <= max(interval.high, interval.estimate)
    if math.isfinite(interval.high):
        assert histogram.tail_beyond(found) <= (1.0 - q) * histogram.total + 1e-6


def test_of_a_wait_most_of_a_bucket_lies_at_its_beginning():
    """40 of 1,000 wait for a second or more, 1 for 2.5 s or more: 40 × (1/40)^(2/3) for 2 s or more."""
    waits = Histogram((1.0, 2.5, math.inf), (960.0, 999.0, 1000.0), 300.0)
    assert waits.tail_beyond(2.0) == pytest.approx(40 * (1 / 40) ** (2 / 3))
    assert waits.total - waits.likely_at_most(2.0) == pytest.approx(14.0)
    assert waits.tail_quantile(0.99) == pytest.approx(1.0 + 1.5 * math.log(4) / math.log(40))
    assert waits.quantile(0.99).estimate == pytest.approx(2.153, abs=1e-3)
    assert waits.tail_beyond(2.5) == 1.0
    assert waits.tail_beyond(9.0) == 1.0
    assert waits.tail_quantile(0.9999) == 2.5


def test_nobody_seen_beyond_a_bucket_is_less_than_one():
    waits = Histogram((1.0, 2.5, math.inf), (990.0, 1000.0, 1000.0), 300.0)
    assert waits.tail_beyond(2.0) == pytest.approx(10 * (0.5 / 10) ** (2 / 3))
    assert waits.tail_beyond(2.5) == 0.0
    assert made(BOUNDS, []).tail_beyond(1.0) == 0.0
    assert made(BOUNDS, []).tail_quantile(0.99) is None


@given(observations, edges, st.floats(0.0, 3.0))
def test_the_true_count_within_a_threshold_lies_between_least_and_most(values, bounds, threshold):
    histogram = made(bounds, values)
    least, most = histogram.count_at_most(threshold)
    low, high = histogram.bucket_around(threshold)

    assert least <= sum(v <= threshold for v in values) <= most
    assert low <= threshold <= high
    if threshold in bounds:
        assert least == most
        assert low == high == threshold


@given(st.lists(observations, min_size=1, max_size=4), edges)
def test_merging_is_observing_everything_together(groups, bounds):
    merged = merge(made(bounds, group) for group in groups)
    together = made(bounds, [value for group in groups for value in group])

    assert merged.bounds == together.bounds
    assert merged.counts == together.counts
    assert merged.sum == pytest.approx(together.sum)


@given(observations, observations, edges, edges)
def test_merging_different_buckets_keeps_the_common_ones_and_every_observation(one, other, these, those):
    merged = merge([made(these, one), made(those, other)])

    assert set(merged.bounds) == set(these) & set(those)
    assert merged.counts == made(merged.bounds, [*one, *other]).counts


@given(observations, edges, st.floats(0.0, 100.0), st.floats(0.05, 1.0))
def test_scaling_leaves_quantiles_where_they_are(values, bounds, factor, q):
    histogram = made(bounds, values)
    scaled = histogram.scaled(factor)

    assert scaled.total == pytest.approx(histogram.total * factor)
    if factor > 1e-6:
        assert scaled.mean == pytest.approx(histogram.mean)
        assert scaled.quantile(q).estimate == pytest.approx(histogram.quantile(q).estimate, rel=1e-6)


def test_a_quantile_beyond_the_last_bound_is_open_ended():
    assert made(BOUNDS, [5.0, 5.0]).quantile(0.99) == Interval(1.0, math.inf, 1.0)


def test_the_least_observation_is_in_the_first_bucket_that_holds_one():
    found = made(BOUNDS, [0.3]).quantile(0.0)
    assert (found.low, found.high) == (0.25, 0.5)


def test_nothing_observed_has_neither_quantile_nor_mean():
    empty = made(BOUNDS, [])
    assert empty.quantile(0.99) is None
    assert empty.mean is None


def test_a_percentage_is_refused_as_a_quantile():
    with pytest.raises(ValueError, match="from 0 to 1"):
        made(BOUNDS, [0.3]).quantile(99)


def test_a_partial_part_makes_the_whole_partial():
    part = Histogram(BOUNDS, (1, 1, 1, 1, 1), 0.05, partial=True)
    assert merge([made(BOUNDS, [0.2]), part]).partial
    assert part.scaled(2).partial
    assert part.on_bounds((0.5, math.inf)).partial


@pytest.mark.parametrize(
    ("bounds", "counts", "total"),
    [
        ((), (), 0.0),
        ((1.0,), (1.0,), 0.5),
        ((1.0, math.inf), (1.0,), 0.5),
        ((1.0, 1.0, math.inf), (1.0, 1.0, 1.0), 0.5),
        ((2.0, 1.0, math.inf), (1.0, 1.0, 1.0), 0.5),
        ((1.0, math.inf), (2.0, 1.0), 0.5),
        ((1.0, math.inf), (-1.0, 1.0), 0.5),
        ((1.0, math.inf), (1.0, math.inf), 0.5),
        ((1.0, math.inf), (1.0, 1.0), math.nan),
        ((1.0, 2.0, math.inf), (1.0, math.nan, 2.0), 0.5),
        ((math.nan, math.inf), (1.0, 1.0), 0.5),
    ],
)
def test_what_is_no_histogram_is_refused(bounds, counts, total):
    with pytest.raises(ValueError, match=r"histogram|ascend|finite"):
        Histogram(bounds, counts, total)


def test_bounds_can_only_become_fewer():
    with pytest.raises(ValueError, match="own bounds"):
        made(BOUNDS, [0.3]).on_bounds((0.4, math.inf))


def test_nothing_cannot_be_merged():
    with pytest.raises(ValueError, match="no histogram"):
        merge([])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
def test_a_value_is_a_finite_number_of_zero_or_more(bad):
    with pytest.raises(ValueError, match="Unknown"):
        Value(bad)


def test_unknown_has_no_number_and_a_proved_zero_has():
    assert number(Value(2.5)) == 2.5
    assert number(Zero()) == 0.0
    assert number(Unknown("no answer")) is None
