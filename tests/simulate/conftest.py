"""A small tier, cheap enough for hundreds of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from servingtiers.simulate.scenario import Delay, Noise, Scenario, TierPlan
from servingtiers.simulate.tiers import parse_tier, tier_plan
from servingtiers.simulate.traces import Trace, load_trace


def document(*, split: bool = False, **scaling: Any) -> dict[str, Any]:
    """A ServingTier of Llama-3.1-8B on A100s, as YAML would give it."""
    pool = {
        "hardware": {"accelerators": ["a100-sxm-80gb"]},
        "engine": {"maxNumSeqs": 64},
        "scaling": {"minReplicas": 1, "maxReplicas": 8, **scaling},
    }
    parts = {"disaggregation": {"prefill": pool, "decode": pool}} if split else {"pool": pool}
    return {
        "apiVersion": "servingtiers.io/v1alpha1",
        "kind": "ServingTier",
        "metadata": {"name": "chat", "namespace": "llm"},
        "spec": {
            "tier": "Balanced",
            "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"},
            "slo": {"ttft": {"p99": "2s"}, "tpot": {"p99": "100ms"}},
            **parts,
        },
    }


Maker = Callable[..., Scenario]


@pytest.fixture(scope="session")
def make_scenario() -> Maker:
    """Return a function from a trace and changes of the scenario to a scenario of one tier."""

    def make(
        trace: Trace | str = "step:4:12:600:200",
        *,
        split: bool = False,
        scaling: dict[str, Any] | None = None,
        tier: dict[str, Any] | None = None,
        initial: int | None = None,
        **changes: Any,
    ) -> Scenario:
        found = load_trace(trace, seed=1, prompt=800, output=120) if isinstance(trace, str) else trace
        plan: TierPlan = tier_plan(
            parse_tier(document(split=split, **(scaling or {}))), found, **(tier or {})
        )
        if initial is not None:
            plan = replace(plan, initial={pool.name: initial for pool in plan.pools})
        given = {"start_up": Delay(40.0), "noise": Noise(0.0, 0.0), **changes}
        return Scenario((plan,), **given)

    return make
