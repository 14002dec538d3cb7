"""The work queue: at most once waiting, one worker per key, back-off."""

import asyncio
import time

from servingtiers.adapters.workqueue import WorkQueue


def queue(**options):
    """Return a queue on the real monotonic clock."""
    return WorkQueue(clock=time.monotonic, **options)


async def test_a_key_waits_at_most_once():
    """A storm of events on one tier is one reconciliation."""
    q = queue()
    for _ in range(100):
        q.add("a")

    assert q.depth == 1
    assert await q.get() == "a"
    assert q.depth == 0


async def test_a_key_that_changes_while_it_is_worked_on_comes_again_afterwards():
    """No event is lost and no two workers share a key."""
    q = queue()
    q.add("a")
    await q.get()
    q.add("a")

    assert q.depth == 0

    q.done("a")

    assert q.depth == 1


async def test_failures_back_off_and_success_resets():
    """The pause doubles up to the longest, with jitter from half to whole."""
    q = queue(backoff=(0.001, 0.004))
    pauses = []
    q.add("a")
    for _ in range(5):
        await q.get()
        pauses.append(q.failed("a"))

    assert 0.0005 <= pauses[0] <= 0.001
    assert 0.002 <= pauses[-1] <= 0.004

    await q.get()
    q.done("a")
    q.add("a")
    await q.get()

    assert q.failed("a") <= 0.001


async def test_an_event_overtakes_a_delayed_key():
    """A change is not kept waiting by an earlier re-check."""
    q = queue()
    q.add_after("a", 60)
    q.add("a")

    assert await asyncio.wait_for(q.get(), 1) == "a"


async def test_the_earliest_of_several_delays_wins():
    """A later re-check never postpones an earlier one."""
    q = queue()
    q.add_after("a", 0.01)
    q.add_after("a", 60)

    assert await asyncio.wait_for(q.get(), 1) == "a"


async def test_a_tick_does_not_end_a_pause_and_a_change_does():
    """Else every pause would last one tick, and a server that asks for one would not get it."""
    q = queue()
    q.add("a", urgent=False)
    await q.get()
    q.failed("a", at_least=30)
    q.add("a", urgent=False)

    assert q.depth == 0

    q.add("a")

    assert q.depth == 1

    await q.get()
    q.done("a")
    q.add("a", urgent=False)

    assert q.depth == 1


async def test_a_tick_during_work_that_fails_waits_for_the_end_of_the_pause():
    """What a tick adds while a key is worked on is no reason to try again at once; a change meanwhile is."""
    q = queue()
    for urgent in ((False,), (False, True), (True, False)):
        q.add("a")
        await q.get()
        for each in urgent:
            q.add("a", urgent=each)
        q.failed("a", at_least=30)

        assert q.depth == any(urgent)

    await q.get()
    q.add("a", urgent=False)
    q.done("a")

    assert q.depth == 1
    q.forget("a")


async def test_a_server_may_ask_for_a_longer_pause():
    """Retry-After is a minimum."""
    q = queue(backoff=(0.001, 0.002))
    q.add("a")
    await q.get()

    assert q.failed("a", at_least=7.0) == 7.0
    q.forget("a")
