"""Times as Kubernetes writes them and as people read them."""

# the names of the tests are the sentences

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.core.times import ago, from_time, in_words, to_time


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "0s"),
        (-3.0, "0s"),
        (0.0001, "under 1ms"),
        (0.003081, "3ms"),
        (0.0099, "10ms"),
        (0.4841, "484ms"),
        (0.9999, "1s"),
        (2.0, "2s"),
        (9.9, "9.9s"),
        (9.96, "10s"),
        (16.6, "17s"),
        (77.0, "1m17s"),
        (7200.0, "2h"),
    ],
)
def test_lengths_of_time_are_told_as_people_do(seconds, said):
    assert in_words(seconds) == said


@pytest.mark.parametrize(("age", "said"), [(0.04, "just now"), (0.2, "200ms ago"), (2.34, "2.3s ago")])
def test_a_moment_ago_is_just_now(age, said):
    assert ago(age) == said


@given(st.integers(0, 4_000_000_000))
def test_times_are_read_as_they_are_written(unix):
    assert from_time(to_time(unix)) == unix


def test_a_time_without_a_zone_is_refused():
    with pytest.raises(ValueError, match="has no time zone"):
        from_time("2026-01-31T12:00:00")
