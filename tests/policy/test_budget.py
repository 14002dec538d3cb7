# the names of the tests are the sentences
"""How the error budget becomes headroom."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.policy.budget import FIRST, LEAST, MOST, Budget, spend


def after(minutes: int, missed_share: float, budget: Budget = Budget(), **changes: bool) -> Budget:  # noqa: B008
    """Return the budget after minutes of 600 requests each."""
    given = {"excused": False, "busy": True} | changes
    for _ in range(4 * minutes):
        budget = spend(budget, asked=150.0, missed=150.0 * missed_share, allowed=0.01, seconds=15.0, **given)
    return budget


def test_headroom_shrinks_while_nothing_is_missed():
    assert LEAST < after(10, 0.0).headroom < FIRST
    assert after(300, 0.0).headroom - LEAST < 0.001


def test_nearly_half_of_the_budget_is_there_to_be_used():
    assert after(300, 0.0044).headroom < LEAST + 0.001


def test_more_misses_than_allowed_buy_headroom_within_minutes():
    assert after(10, 0.02).headroom > 1.3
    assert after(60, 0.1).headroom > MOST - 0.1


def test_headroom_follows_small_steps_to_the_end():
    """What is kept in the status has digits enough for a step of a thousandth of the way."""
    rounded = Budget()
    for _ in range(4 * 300):
        rounded = spend(
            rounded, asked=150.0, missed=0.0, allowed=0.01, seconds=15.0, excused=False, busy=True
        )
        rounded = replace(rounded, headroom=round(1e6 * rounded.headroom) / 1e6)
    assert rounded.headroom - LEAST < 0.001


def test_a_limit_that_is_reached_weighs_more_than_one_that_is_far():
    """A hundredth of the requests may miss: whoever is there is not to stay there."""
    used = [after(400, share).headroom for share in (0.0055, 0.007, 0.0085, 0.01)]
    steps = [more - less for less, more in itertools.pairwise(used)]
    assert steps[0] == pytest.approx(steps[1], rel=0.1)
    assert steps[2] > 1.8 * steps[1]


def test_one_minute_in_which_all_miss_is_one_event():
    """Bursts all the time call for engines that stand by; one bad minute does not."""
    minute = after(59, 0.0, after(1, 1.0))
    always = after(60, 1.0 / 60.0)
    assert minute.headroom < FIRST
    assert always.headroom > FIRST + 1.0


def test_headroom_goes_when_the_hour_has_forgotten():
    spent = after(20, 0.03)
    assert after(240, 0.0, spent).headroom < LEAST + 0.02


def test_what_a_start_up_or_an_idle_engine_missed_buys_none():
    assert after(10, 0.5, excused=True).headroom < FIRST
    assert after(10, 0.5, busy=False).headroom < FIRST


def test_a_handful_of_requests_is_no_hour():
    few = spend(Budget(), asked=3.0, missed=1.0, allowed=0.01, seconds=15.0, excused=False, busy=True)
    assert few.headroom < FIRST + 0.05


@given(
    st.floats(LEAST, MOST),
    st.floats(0.0, 1e5),
    st.floats(0.0, 1.0),
    st.floats(0.0, 1e4),
    st.floats(0.0, 1.0),
    st.floats(1.0, 60.0),
)
def test_headroom_stays_within_its_bounds_and_more_misses_never_mean_less(
    headroom, asked, share, new, missed, seconds
):
    budget = Budget(headroom, asked, asked * share)

    def spent(part: float) -> Budget:
        return spend(
            budget, asked=new, missed=new * part, allowed=0.01, seconds=seconds, excused=False, busy=True
        )

    some, most = spent(missed), spent(1.0)
    assert LEAST <= some.headroom <= most.headroom <= MOST
    assert replace(budget) == budget


def test_what_was_missed_before_enough_stood_by_buys_no_more():
    """Once little is missed, headroom need not grow for what the hour still remembers."""
    early = after(6, 0.02)
    assert early.share(0.01) > 1.5
    later = after(5, 0.001, early)
    assert later.share(0.01) > 1.0
    assert later.headroom <= early.headroom
    assert after(5, 0.02, early).headroom > early.headroom + 0.2


def test_headroom_goes_when_the_misses_are_over_and_comes_back_sooner_than_it_went():
    """A rush that is over need not be paid for an hour; while the hour remembers it, the next one is answered faster."""
    rush = after(15, 0.03)
    calm = after(20, 0.002, rush)
    assert calm.share(0.01) > 1.0, "the hour remembers"
    assert calm.headroom - LEAST < 0.5 * (rush.headroom - LEAST)
    again, first = after(3, 0.03, calm), after(3, 0.03, replace(Budget(), headroom=calm.headroom))
    assert again.headroom - calm.headroom > 1.2 * (first.headroom - calm.headroom)
    assert after(20, 0.006, rush).headroom > rush.headroom, "as long as more than may be is missed it grows"
