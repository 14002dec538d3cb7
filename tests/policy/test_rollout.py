"""Nothing surges into accelerators that nobody knows of."""

# the names of the tests are the sentences

import pytest

from servingtiers.api.spec import PoolScaling
from servingtiers.core.decisions import PoolFacts, PoolRole
from servingtiers.policy.rollout import may_surge


@pytest.mark.parametrize(
    ("why", "replicas", "unschedulable", "room", "surges"),
    [
        ("room is not known", 3, 0, None, False),
        ("no room", 3, 0, 0, False),
        ("room", 3, 0, 1, True),
        ("pods wait for nodes already", 3, 1, 1, False),
        ("nothing runs", 0, 0, 1, False),
    ],
)
def test_a_rollout_surges_only_into_known_room(why, replicas, unschedulable, room, surges):
    pool = PoolFacts(
        "pool", PoolRole.AGGREGATED, PoolScaling(), replicas, replicas, unschedulable=unschedulable
    )
    assert may_surge(pool, room) is surges, why
