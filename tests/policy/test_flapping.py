# the names of the tests are the sentences
"""What a scale-down that was taken back teaches."""

from dataclasses import replace

import pytest

from servingtiers.api.status import PoolMemory
from servingtiers.core.decisions import Binding, Decision
from servingtiers.core.times import to_time
from servingtiers.policy import flapping

NOW = 1_800_000_000.0
HOLD = 160.0
CALM = [500] * 40
SWINGS = [100] * 20 + [900] * 20


def move(before: int, after: int) -> Decision:
    return Decision("pool", before, after, "so", Binding.STEADY, "else")


def down(memory: PoolMemory, before: int, after: int, now: float) -> PoolMemory:
    return memory.model_copy(update=flapping.after_shrinking(memory, move(before, after), now))


def up(memory: PoolMemory, before: int, after: int, now: float, hold: float = HOLD) -> PoolMemory:
    return memory.model_copy(update=flapping.after_growth(memory, move(before, after), now, hold))


def test_one_small_regret_is_chance():
    memory = up(down(PoolMemory(load_peaks=CALM), 10, 9, NOW), 9, 10, NOW + 600)
    assert memory.regrets == 1
    assert flapping.kept(memory, NOW + 700, HOLD) == 0


def test_a_second_one_keeps_what_was_taken_back():
    memory = up(down(PoolMemory(load_peaks=CALM), 10, 9, NOW), 9, 10, NOW + 600)
    memory = up(down(memory, 10, 9, NOW + 900), 9, 10, NOW + 1500)
    assert flapping.kept(memory, NOW + 1600, HOLD) == 10
    assert flapping.quiet_left(memory, NOW + 1600, HOLD) == pytest.approx(3500)
    assert flapping.kept(memory, NOW + 5101, HOLD) == 0


def test_a_large_one_is_enough_and_several_steps_down_are_one():
    memory = down(down(PoolMemory(load_peaks=CALM), 10, 8, NOW), 8, 6, NOW + 60)
    memory = up(memory, 6, 9, NOW + 600)
    assert flapping.kept(memory, NOW + 700, HOLD) == 9
    assert flapping.kept(up(memory, 9, 12, NOW + 700), NOW + 800, HOLD) == 10, "no more than there was"


def test_under_a_load_that_swings_or_is_not_known_one_is_enough():
    for peaks in (SWINGS, []):
        memory = up(down(PoolMemory(load_peaks=peaks), 10, 9, NOW), 9, 10, NOW + 600)
        assert flapping.kept(memory, NOW + 700, HOLD) == 10


def test_growth_long_after_a_scale_down_regrets_nothing():
    memory = up(down(PoolMemory(load_peaks=SWINGS), 10, 9, NOW), 9, 10, NOW + 3601)
    assert memory.regretted_at is None


def test_where_engines_start_fast_regrets_are_forgotten_sooner():
    memory = up(down(PoolMemory(load_peaks=SWINGS), 10, 9, NOW + 300), 9, 10, NOW + 600, 60.0)
    assert flapping.kept(memory, NOW + 600 + 505, 60.0) == 10
    assert flapping.kept(memory, NOW + 600 + 507, 60.0) == 0


def test_a_clock_that_was_set_back_keeps_nothing():
    memory = PoolMemory(kept=10, regretted_at=to_time(NOW + 100))
    assert flapping.kept(memory, NOW, HOLD) == 0


def test_what_the_user_orders_is_no_regret():
    """A lowered maximum that is raised again, and a raised minimum."""
    ordered = replace(move(10, 4), binding=Binding.MAX_REPLICAS)
    memory = PoolMemory(load_peaks=SWINGS)
    memory = memory.model_copy(update=flapping.after_shrinking(memory, ordered, NOW))
    assert up(memory, 4, 10, NOW + 600).regretted_at is None
    memory = down(PoolMemory(load_peaks=SWINGS), 10, 4, NOW)
    ordered = replace(move(4, 8), binding=Binding.MIN_REPLICAS)
    memory = memory.model_copy(update=flapping.after_growth(memory, ordered, NOW + 600, HOLD))
    assert (memory.regretted_at, memory.last_scale_up) == (None, to_time(NOW + 600))


def test_what_stays_is_for_the_load_of_then_and_falls_with_it():
    memory = PoolMemory(load_peaks=[1000] * 20 + [500] * 20, load_bucket=int(NOW // 30), kept=12)
    memory = memory.model_copy(update={"regretted_at": to_time(NOW - 900)})
    assert flapping.kept(memory, NOW, HOLD) == 6
    assert flapping.kept(memory.model_copy(update={"load_peaks": [1000] * 40}), NOW, HOLD) == 12


def test_a_lull_of_a_load_that_comes_and_goes_is_no_fall_until_it_has_lasted():
    memory = PoolMemory(load_peaks=[1000] * 20 + [200] * 20, load_bucket=int(NOW // 30), kept=12)
    memory = memory.model_copy(update={"regretted_at": to_time(NOW - 900)})
    assert flapping.kept(memory, NOW, HOLD) == 12
    longer = memory.model_copy(
        update={"load_peaks": [1000] * 20 + [200] * 50, "regretted_at": to_time(NOW - 1800)}
    )
    assert flapping.kept(longer, NOW, HOLD) == 3
