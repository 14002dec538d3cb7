"""What a prefill engine carries: it depends on prompts without jumps, because prompts are only roughly known."""

import itertools

import pytest

from servingtiers.catalog.accelerators import accelerator
from servingtiers.core.decisions import PoolRole
from servingtiers.performance.planner import Metric, Objective
from servingtiers.policy import sizing

A100 = accelerator("a100-sxm-80gb")
TTFT = (Objective(Metric.TTFT, "p99", 1500.0),)


def carried(prompt: float, spread: float) -> float:
    shape = sizing.shape_of("meta-llama/Llama-3.1-8B-Instruct")
    assert shape is not None
    step = sizing.engine_of(shape, A100, 1, "bf16", "bf16", 0.9)
    engine = sizing.Engine(step, 64, 8192, PoolRole.PREFILL)
    asked = sizing.Lengths(prompt, 80.0, prompt, 80.0, 0.0, given=True, prompt_cv=spread, output_cv=0.6)
    curve = sizing.carried(engine, sizing.demand_of(asked), TTFT).curve
    assert curve is not None
    return curve.rps


@pytest.mark.parametrize("spread", [0.5, 0.6, 0.7, 0.8])
def test_longer_prompts_are_never_more_of_them(spread):
    """Around 4,000 tokens a long prompt alone takes all of its objective: there it was half as many as beyond."""
    rates = [carried(prompt, spread) for prompt in range(2500, 6000, 250)]
    assert all(longer <= 1.02 * shorter for shorter, longer in itertools.pairwise(rates)), rates


@pytest.mark.parametrize("prompt", [3500.0, 4000.0, 4500.0])
def test_a_spread_that_is_known_by_a_tenth_does_not_halve_what_is_carried(prompt):
    rates = [carried(prompt, spread) for spread in (0.5, 0.6, 0.7, 0.8)]
    assert max(rates) < 1.3 * min(rates), rates
