# the names of the tests are the sentences
"""How the error budget becomes headroom."""

from dataclasses import replace

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


def test_a_third_of_the_budget_is_there_to_be_used():
    assert after(300, 0.0029).headroom < LEAST + 0.001


def test_more_misses_than_allowed_buy_headroom_within_minutes():
    assert after(10, 0.02).headroom > 1.3
    assert after(60, 0.1).headroom > MOST - 0.1


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
