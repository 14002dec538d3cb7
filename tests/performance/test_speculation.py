"""Speculative decoding: the published formula, and what it does to a step."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.catalog.accelerators import accelerator
from servingtiers.catalog.models import model
from servingtiers.performance.select import step_model
from servingtiers.performance.speculation import Speculation

LLAMA, H100 = model("meta-llama/Llama-3.1-8B"), accelerator("h100")


@given(tokens=st.integers(1, 12), acceptance=st.floats(0.0, 0.99))
def test_tokens_per_step_is_the_sum_of_the_chances_that_each_token_is_reached(tokens, acceptance):
    expected = sum(acceptance**index for index in range(tokens + 1))
    assert Speculation(tokens, acceptance).tokens_per_step == pytest.approx(expected)


def test_tokens_per_step_is_what_drafting_at_random_gives():
    generator = random.Random(7)
    gained = 0
    for _ in range(20_000):
        accepted = 0
        while accepted < 4 and generator.random() < 0.7:
            accepted += 1
        gained += accepted + 1
    assert gained / 20_000 == pytest.approx(Speculation(4, 0.7).tokens_per_step, rel=0.01)


def test_at_batch_one_verification_is_nearly_free_and_at_a_large_batch_it_is_not():
    plain = step_model(LLAMA, H100)
    fast = step_model(LLAMA, H100, speculation=Speculation(4, 0.8))
    small = fast.step_ms(0, 0, 1, 512) / plain.step_ms(0, 0, 1, 512)
    large = fast.step_ms(0, 0, 256, 256 * 512) / plain.step_ms(0, 0, 256, 256 * 512)
    assert 1.0 <= small < 1.15
    assert large > 1.5
    speedup = fast.grid.tokens_per_step / small
    assert 2.0 < speedup < 3.5  # Leviathan et al. report 2-3 times


def test_a_draft_costs_time():
    free = step_model(LLAMA, H100, speculation=Speculation(4, 0.8))
    dear = step_model(LLAMA, H100, speculation=Speculation(4, 0.8, draft_cost=0.1))
    ratio = dear.step_ms(0, 0, 1, 512) / free.step_ms(0, 0, 1, 512)
    assert ratio == pytest.approx(1.4, rel=0.05)


def test_the_source_says_so_and_its_band_is_wider():
    plain = step_model(LLAMA, H100)
    fast = step_model(LLAMA, H100, speculation=Speculation(2, 0.5))
    assert "speculation 2 tokens, acceptance 0.5" in fast.source.detail
    assert fast.source.band_percent > plain.source.band_percent


@pytest.mark.parametrize(
    ("tokens", "acceptance", "cost"), [(0, 0.5, 0.0), (3, 1.0, 0.0), (3, -0.1, 0.0), (3, 0.5, -1.0)]
)
def test_settings_that_make_no_sense_are_refused(tokens, acceptance, cost):
    with pytest.raises(ValueError, match="must"):
        Speculation(tokens, acceptance, cost)
