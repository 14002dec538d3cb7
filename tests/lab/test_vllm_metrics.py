"""The simulated engines' metrics against a recorded page of vLLM 0.32.0."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from servingtiers.lab.vllm_metrics import EngineMetrics, Histogram, one_two_five

DATA = Path(__file__).parent / "data"


def series(text: str) -> list[str]:
    """Sample lines without their values; HELP and TYPE lines as they are."""
    return [line if line.startswith("#") else line.rpartition(" ")[0] for line in text.splitlines()]


def without_cache_config(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("vllm:cache_config_info{")]


def test_names_types_help_labels_and_buckets_are_those_of_vllm_in_the_same_order():
    recorded = (DATA / "vllm_0.32.0_series.txt").read_text().splitlines()
    ours = series(EngineMetrics("tiny", max_model_len=2048).text())
    assert without_cache_config(ours) == without_cache_config(recorded)


def test_a_kv_connector_adds_exactly_the_recorded_families():
    recorded = (DATA / "vllm_0.32.0_nixl_series.txt").read_text().splitlines()
    plain = set(series(EngineMetrics("tiny", max_model_len=2048).text()))
    added = set(series(EngineMetrics("tiny", max_model_len=2048, kv_connector=True).text())) - plain
    assert added == set(recorded)


def test_the_cache_config_uses_only_labels_that_vllm_has():
    recorded = (DATA / "vllm_0.32.0_series.txt").read_text()
    line = next(one for one in recorded.splitlines() if one.startswith("vllm:cache_config_info{"))
    from servingtiers.lab.engines import EngineConfig, SimulatedEngine

    engine = SimulatedEngine(
        EngineConfig.from_command(["vllm", "serve", "Llama-3.1-8B"], accelerator_name="h100-sxm-80gb")
    )
    ours = next(o for o in engine.metrics.text().splitlines() if o.startswith("vllm:cache_config_info{"))
    assert set(re.findall(r'(\w+)="', ours)) <= set(re.findall(r'(\w+)="', line))


@pytest.mark.parametrize(("maximum", "last"), [(1, 1), (2, 2), (4096, 2000), (5000, 5000), (131072, 100000)])
def test_token_buckets_end_at_the_model_length(maximum, last):
    assert one_two_five(maximum)[-1] == last


def test_an_observation_with_a_count_is_that_many_observations():
    once, many = Histogram([1, 2]), Histogram([1, 2])
    once.observe(2.0, 3)
    for _ in range(3):
        many.observe(2.0)
    assert (once.counts, once.sum) == (many.counts, many.sum) == ([0, 3, 0], 6.0)
