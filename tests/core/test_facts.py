"""What Kubernetes objects tell of a pool."""

# the names of the tests are the sentences

import pytest

from servingtiers.api.spec import ServingTier
from servingtiers.api.status import PoolMemory
from servingtiers.core.config import AcceleratorBinding, OperatorConfig
from servingtiers.core.effective import pools_asked
from servingtiers.core.times import to_time
from servingtiers.facts import PoolView, pool_facts, shared_engines
from servingtiers.policy.presets import choose
from servingtiers.render import names

NOW = 1_790_000_000.0
TIER = ServingTier.model_validate(
    {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "metadata": {"name": "chat", "namespace": "llm"},
        "spec": {"tier": "Latency", "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"}},
    }
)
SETTINGS = choose(TIER, OperatorConfig(accelerators={"h100-sxm-80gb": AcceleratorBinding()})).pools[0]


def engine(moved, ready=NOW - 300):
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": to_time(ready)}
        for kind in ("PodScheduled", "Ready")
    ]
    return {
        "metadata": {
            "name": "e1",
            "uid": "e1",
            "creationTimestamp": to_time(ready - 60),
            "labels": {
                names.COMPONENT_LABEL: names.ENGINE,
                names.TIER_LABEL: "chat",
                names.ROUTE_TIER_LABEL: "chat",
            },
            "annotations": {names.MOVED_ANNOTATION: to_time(moved)},
        },
        "status": {"conditions": conditions},
    }


@pytest.mark.parametrize(("ago", "held"), [(90.0, 90.0), (-20.0, 0.0), (-3600.0, None)])
def test_an_engine_that_will_have_moved_in_an_hour_moved_at_some_unknown_time(ago, held):
    """The clock was set back: to wait for that moment would keep every engine where it is until then."""
    (found,) = shared_engines("llm", "chat", [engine(NOW - ago)], ["chat"], {}, sharing=True, now=NOW)
    assert found.held_seconds == held


@pytest.mark.parametrize(("ago", "settled"), [(90.0, 90.0), (-3600.0, 300.0)])
def test_and_its_pool_is_settled_since_the_latest_moment_that_is_known(ago, settled):
    (pool,) = pools_asked(TIER.spec)
    view = PoolView(None, (engine(NOW - ago),))
    facts = pool_facts(pool, SETTINGS, view, PoolMemory(), now=NOW, tier="chat")
    assert facts.settled_seconds == settled
