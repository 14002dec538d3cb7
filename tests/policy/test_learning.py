# the names of the tests are the sentences
"""What traffic teaches of a pool."""

import math
from dataclasses import replace

import pytest

from servingtiers.api.status import PoolMemory
from servingtiers.core.decisions import EngineCurve, PoolRole
from servingtiers.core.signals import Coverage, Histogram, Load
from servingtiers.core.times import to_time
from servingtiers.policy.learning import (
    Lesson,
    Missed,
    budget_of,
    history_of,
    learn,
    of_these,
    rps_of,
    slowness_of,
)

NOW = 1_800_000_000.0
CURVE = EngineCurve(
    rps=9.0,
    saturation=10.0,
    loads=(0.1, 0.5, 0.9),
    tpot=(0.010, 0.015, 0.030),
    ttft=(0.1, 0.2, 0.6),
    prefill_share=0.5,
)


def times(mean: float, count: float = 300.0) -> Histogram:
    return Histogram((mean, math.inf), (count, count), count * mean)


def lesson(slow: float = 1.0, rate: float = 5.0, **changes: object) -> Lesson:
    """One engine that is ``slow`` times slower than the model and ends ``rate`` requests per second."""
    at = slow * rate / CURVE.saturation
    made = Lesson(
        role=PoolRole.AGGREGATED,
        load=Load(
            60.0,
            Coverage(1, 1),
            ttft=times(slow * CURVE.at(at, CURVE.ttft)),
            itl=times(slow * CURVE.at(at, CURVE.tpot)),
            e2e=times(4.0, 60.0 * rate),
        ),
        curve=CURVE,
        arrivals=rate,
        serving=1,
        excused=False,
        steady=True,
        standing=False,
        missed=Missed(60.0 * rate, 0.0),
    )
    return replace(made, **changes)


def taught(made: Lesson, times_: int = 1, memory: PoolMemory = PoolMemory()) -> PoolMemory:  # noqa: B008
    for step in range(times_):
        memory = learn(memory, made, NOW + 15.0 * step)
    return memory


@pytest.mark.parametrize("slow", [0.6, 0.8, 1.0, 1.4, 1.67])
def test_one_reading_of_their_pace_tells_how_slow_engines_are(slow):
    memory = taught(lesson(slow))
    assert slowness_of(memory) == pytest.approx(slow, rel=0.01)
    assert rps_of(memory, CURVE) == pytest.approx(9.0 / slow, rel=0.01)


def test_later_readings_change_the_opinion_slowly():
    memory = taught(lesson(1.0))
    once = learn(memory, lesson(1.5), NOW + 60)
    assert 1.03 < slowness_of(once) < 1.1
    for step in range(2, 60):
        once = learn(once, lesson(1.5), NOW + 15 * step + 60)
    assert slowness_of(once) == pytest.approx(1.5, abs=0.02)


def test_engines_with_a_queue_that_stands_do_what_they_can():
    assert slowness_of(taught(lesson(rate=6.0, standing=True, steady=False))) == pytest.approx(
        10.0 / 6.0, abs=0.001
    )


@pytest.mark.parametrize(
    "why",
    [
        {"steady": False},
        {"serving": 0},
        {"load": replace(lesson().load, coverage=Coverage(0, 1))},
        {"load": replace(lesson().load, e2e=times(4.0, 10.0))},
        {"load": replace(lesson().load, e2e=times(4.0, 60.0))},
    ],
    ids=["crowded or fresh", "no engine", "incomplete", "few requests", "hardly busy"],
)
def test_what_does_not_tell_teaches_no_pace(why):
    assert taught(lesson(1.5, **why)).slowness_permille is None


def test_the_same_reading_teaches_once():
    memory = taught(lesson(1.4))
    assert learn(memory, lesson(0.6), NOW + 5.0) == memory


def test_the_load_is_kept_in_replicas_of_the_models_speed():
    assert history_of(taught(lesson(2.0, rate=4.5))).peaks == (50,)


def test_an_idle_pool_keeps_no_history_of_zeros():
    assert taught(lesson(rate=5.0, arrivals=0.0), 5).load_peaks == []


def test_the_cost_of_a_request_follows_lengths_with_inertia():
    memory = taught(lesson())
    longer = lesson(curve=replace(CURVE, rps=6.0, saturation=7.0))
    once = learn(memory, longer, NOW + 15)
    assert memory.work_micros is not None
    assert once.work_micros is not None
    assert 1.0 < once.work_micros / memory.work_micros < 1.5
    many = once
    for step in range(2, 40):
        many = learn(many, longer, NOW + 15 * step)
    assert many.work_micros == pytest.approx(1e6 / 6.0, rel=0.01)


def test_other_traffic_begins_with_a_budget_of_its_own():
    memory = taught(lesson(missed=Missed(300.0, 100.0)), 20)
    assert memory.headroom_micros is not None
    assert memory.headroom_micros > 1_500_000
    shifted = learn(memory, lesson(curve=replace(CURVE, rps=90.0, saturation=100.0)), NOW + 600)
    assert shifted.work_micros == pytest.approx(1e6 / 90.0, rel=0.01)
    assert shifted.headroom_micros is not None
    assert shifted.headroom_micros <= 1_000_000


def test_a_mix_that_wanders_keeps_what_its_misses_bought():
    """A few clients, long prompts and short: requests cost twice as much, and the bursts are the same."""
    memory = taught(lesson(missed=Missed(300.0, 100.0)), 20)
    longer = learn(memory, lesson(curve=replace(CURVE, rps=4.5, saturation=5.0)), NOW + 600)
    assert longer.work_micros == pytest.approx(1e6 / 4.5, rel=0.01)
    assert budget_of(longer).headroom > 1.5


def test_engines_that_stand_by_for_bursts_still_learn_from_them():
    """A quarter of what they could carry, and requests that miss: more of them would have helped."""
    bursts = lesson(rate=2.0, serving=1, missed=Missed(120.0, 6.0))
    assert budget_of(taught(bursts, 40)).headroom > 1.5
    idle = lesson(rate=0.5, serving=1, missed=Missed(30.0, 3.0))
    assert budget_of(taught(idle, 40)).headroom < 1.0


def test_what_is_remembered_survives_the_status_as_text():
    memory = taught(lesson(1.2), 8)
    assert PoolMemory.model_validate_json(memory.model_dump_json()) == memory
    assert len(memory.model_dump_json(exclude_none=True, by_alias=True)) < 1000


def test_an_idle_pool_is_remembered_once_and_then_written_no_more():
    memory = taught(lesson(rate=5.0), 8)
    quiet = lesson(rate=5.0, arrivals=0.0, missed=Missed(0.0, 0.0))
    quiet = replace(quiet, load=Load(60.0, Coverage(1, 1)))
    for step in range(1, 4 * 62):
        memory = learn(memory, quiet, NOW + 200 + 15 * step)
    assert learn(memory, quiet, NOW + 200 + 15 * 4 * 62) == memory
    assert memory.load_peaks == []


def test_an_hour_without_a_request_leaves_nothing_of_its_budget():
    """A night after a bad evening."""
    memory = taught(lesson(missed=Missed(300.0, 90.0)), 40)
    assert budget_of(memory).headroom > 2.0
    quiet = replace(lesson(arrivals=0.0, missed=Missed(0.0, 0.0)), load=Load(60.0, Coverage(1, 1)))
    for step in range(1, 4 * 62):
        memory = learn(memory, quiet, NOW + 600 + 15 * step)
    assert budget_of(memory).headroom == 1.0
    assert (memory.asked, memory.missed_milli) == (None, None)


def test_what_nobody_can_see_gives_no_headroom_back_but_may_buy_some():
    memory = PoolMemory(headroom_micros=1_500_000, learned_at=to_time(NOW - 60))
    calm = learn(memory, lesson(missed=Missed(300.0, 0.0, complete=False)), NOW)
    assert budget_of(calm).headroom == 1.5
    assert budget_of(learn(memory, lesson(missed=Missed(300.0, 0.0)), NOW)).headroom < 1.5
    missed = memory
    for step in range(20):
        missed = learn(missed, lesson(missed=Missed(300.0, 90.0, complete=False)), NOW + 15 * step)
    assert budget_of(missed).headroom > 1.5


def test_what_was_learned_of_other_engines_is_forgotten_and_their_load_is_told_anew():
    memory = taught(lesson(1.6, missed=Missed(300.0, 90.0)), 8)
    memory = of_these(memory, "h100", CURVE, NOW + 200)
    assert slowness_of(memory) > 1.5, (
        "an operator that did not know the engines' name believes what was learned"
    )
    memory = memory.model_copy(update={"kept": 7, "regrets": 3, "low_since": to_time(NOW)})
    assert of_these(memory, "h100", CURVE, NOW + 200) == memory
    assert of_these(memory, "", CURVE, NOW + 200) == memory
    twice = replace(CURVE, rps=18.0, saturation=20.0)
    other = of_these(memory, "b200", twice, NOW + 215)
    assert slowness_of(other) == 1.0
    assert budget_of(other).headroom == 1.0
    assert (other.kept, other.regrets, other.low_since, other.asked) == (None, None, None, None)
    assert [round(peak / 2) for peak in memory.load_peaks] == other.load_peaks
    assert learn(other, lesson(1.6), NOW + 220) == other, "the engines of this moment are still the old ones"
    assert of_these(memory, "unknown", None, NOW + 215).load_peaks == []


@pytest.mark.parametrize(
    "told",
    [
        {"work_micros": 0},
        {"work_micros": -5},
        {"slowness_permille": 0},
        {"slowness_permille": -1, "headroom_micros": 0},
        {"asked": -7, "missed_milli": -7},
        {"load_bucket": 60_000_000},
    ],
)
def test_a_status_that_somebody_has_edited_stops_nothing(told):
    memory = PoolMemory.model_validate(told)
    assert rps_of(learn(memory, lesson(), NOW), CURVE) > 0
    assert 0.9 < budget_of(learn(memory, lesson(), NOW)).headroom < 2.6


def test_another_traffic_finds_the_hour_before_it_told_in_its_own_requests():
    """Requests that cost a tenth: as many of them as came before are a tenth of the engines, not what those took."""
    memory = taught(lesson(), 20)
    shifted = learn(memory, lesson(curve=replace(CURVE, rps=90.0, saturation=100.0)), NOW + 600)
    before = [peak for peak in memory.load_peaks if peak > 0]
    after = [peak for peak in shifted.load_peaks if peak > 0]
    assert after[: len(before)] == [pytest.approx(peak / 10, abs=1) for peak in before]
    assert max(after) < 0.2 * max(before)


def test_a_mix_that_wanders_keeps_its_hour():
    memory = taught(lesson(), 20)
    longer = learn(memory, lesson(curve=replace(CURVE, rps=4.5, saturation=5.0)), NOW + 600)
    assert longer.load_peaks[: len(memory.load_peaks)] == memory.load_peaks
