"""The operator's own metrics: what is known, no more, and gone with its tier."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from servingtiers.adapters.operator_metrics import (
    ObjectiveGauges,
    OperatorMetrics,
    PoolGauges,
    Probes,
    TierGauges,
    reference,
)

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


class Clock:
    """Seconds that the test moves."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    """A clock that stands still."""
    return Clock()


@pytest.fixture
def registry():
    """A registry of the test's own."""
    return CollectorRegistry()


@pytest.fixture
def metrics(registry, clock):
    """Metrics of a process that leads."""
    probes = Probes(lambda: 3, lambda: 1.5, lambda: True, lambda: {"Pod": 0.5, "ServingTier": 2.0})
    return OperatorMetrics(registry, probes, "0.1.0", clock)


TIER = TierGauges(
    "llm",
    "chat",
    [PoolGauges("decode", 4, 3, 0.8, 12.0, 2.0), PoolGauges("prefill", 1, 1)],
    [ObjectiveGauges("ttft.p99", 0.5, 0.997, 0.7), ObjectiveGauges("tpot.p99", 0.05)],
    cost_per_hour=8.4,
    idle_cost_per_hour=1.1,
    cost_per_million_output_tokens=0.19,
    arrivals_per_second=6.5,
    load_age=4.0,
    unknown_signals=2,
)
CHAT = {"namespace": "llm", "tier": "chat"}


def samples(registry):
    """Return what a scrape reads: (name, labels) to value."""
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for s in family.samples
    }


def value(registry, name, **labels):
    """Return one sample; None where there is none."""
    return registry.get_sample_value(name, labels)


def test_everything_known_of_a_tier_is_shown(metrics, registry):
    metrics.update([TIER])

    assert value(registry, "servingtiers_pool_replicas_desired", **CHAT, pool="decode") == 4
    assert value(registry, "servingtiers_pool_replicas_ready", **CHAT, pool="decode") == 3
    assert value(registry, "servingtiers_pool_utilization_ratio", **CHAT, pool="decode") == 0.8
    assert value(registry, "servingtiers_pool_requests_waiting", **CHAT, pool="decode") == 2
    assert value(registry, "servingtiers_slo_target_seconds", **CHAT, objective="tpot.p99") == 0.05
    assert value(registry, "servingtiers_slo_attainment_ratio", **CHAT, objective="ttft.p99") == 0.997
    assert value(registry, "servingtiers_slo_error_budget_left_ratio", **CHAT, objective="ttft.p99") == 0.7
    assert value(registry, "servingtiers_cost_per_hour", **CHAT, currency="USD") == 8.4
    assert value(registry, "servingtiers_cost_per_million_output_tokens", **CHAT, currency="USD") == 0.19
    assert value(registry, "servingtiers_tier_arrivals_per_second", **CHAT) == 6.5
    assert value(registry, "servingtiers_tier_load_unknown_signals", **CHAT) == 2
    assert value(registry, "servingtiers_tiers") == 1
    assert value(registry, "servingtiers_leader") == 1
    assert value(registry, "servingtiers_reconcile_queue_depth") == 3
    assert value(registry, "servingtiers_reconcile_oldest_key_age_seconds") == 1.5
    assert value(registry, "servingtiers_watch_age_seconds", kind="ServingTier") == 2.0
    assert value(registry, "servingtiers_build_info", version="0.1.0") == 1


def test_what_is_not_known_is_absent_and_never_zero(metrics, registry):
    metrics.update([TIER, TierGauges("llm", "new", [PoolGauges("serve", 1, 0)])])

    assert value(registry, "servingtiers_slo_attainment_ratio", **CHAT, objective="tpot.p99") is None
    assert value(registry, "servingtiers_pool_utilization_ratio", **CHAT, pool="prefill") is None
    assert value(registry, "servingtiers_tier_load_age_seconds", namespace="llm", tier="new") is None
    assert value(registry, "servingtiers_cost_per_hour", namespace="llm", tier="new", currency="USD") is None


def test_the_age_of_the_load_grows_while_the_loop_hangs(metrics, registry, clock):
    metrics.update([TIER])
    clock.now += 60

    assert value(registry, "servingtiers_tier_load_age_seconds", **CHAT) == 64


def test_the_series_of_a_tier_go_with_it(metrics, registry):
    metrics.update([TIER, TierGauges("llm", "batch", [PoolGauges("serve", 1, 1)])])
    metrics.decided("llm", "chat", "decode", direction="up", binding="TTFT")
    metrics.decided("llm", "batch", "serve", direction="hold", binding="Steady")
    metrics.update([TierGauges("llm", "batch", [PoolGauges("serve", 1, 1)])])

    assert not [labels for _, labels in samples(registry) if ("tier", "chat") in labels]
    assert (
        value(
            registry,
            "servingtiers_decisions_total",
            namespace="llm",
            tier="batch",
            pool="serve",
            direction="hold",
            binding="Steady",
        )
        == 1
    )
    metrics.update([TIER])
    metrics.decided("llm", "chat", "decode", direction="up", binding="TTFT")
    labels = {**CHAT, "pool": "decode", "direction": "up", "binding": "TTFT"}
    assert value(registry, "servingtiers_decisions_total", **labels) == 1


def test_what_happens_is_counted(metrics, registry):
    metrics.reconciled("ok", 0.02)
    metrics.reconciled("error", 0.2)
    metrics.wrote("apply", "Deployment")
    metrics.wrote("apply", "Deployment")

    assert value(registry, "servingtiers_reconciles_total", result="error") == 1
    assert value(registry, "servingtiers_reconcile_duration_seconds_bucket", le="0.025") == 1
    assert value(registry, "servingtiers_reconcile_duration_seconds_count") == 2
    assert value(registry, "servingtiers_api_writes_total", verb="apply", kind="Deployment") == 2


def test_two_operators_in_one_process_do_not_share_anything(registry):
    probes = Probes(lambda: 0, lambda: 0.0, lambda: False, dict)
    one = OperatorMetrics(CollectorRegistry(), probes, "a")
    two = OperatorMetrics(CollectorRegistry(), probes, "b")
    one.wrote("create", "Service")
    two.update([TIER])

    assert value(two.registry, "servingtiers_api_writes_total", verb="create", kind="Service") is None
    assert value(one.registry, "servingtiers_tiers") == 0
    assert value(two.registry, "servingtiers_leader") == 0


def test_the_documentation_names_every_metric_and_no_other():
    assert reference() in DOCS.read_text(encoding="utf-8"), (
        "docs/reference/metrics.md is out of step: paste the output of"
        ' python -c "from servingtiers.adapters.operator_metrics import reference; print(reference())"'
    )


def test_the_reference_holds_what_a_scrape_shows(metrics, registry):
    metrics.update([TIER])
    metrics.decided("llm", "chat", "decode", direction="up", binding="TTFT")
    metrics.reconciled("ok", 0.02)
    metrics.wrote("apply", "Deployment")
    shown = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        if not family.name.endswith("_created")
    }
    rows = [row.split("|") for row in reference().splitlines()[2:]]
    documented = {row[1].strip(" `") for row in rows}

    assert shown == documented
    labels = {
        row[1].strip(" `"): {part.strip(" `") for part in row[3].split(",") if part.strip()} for row in rows
    }
    for name, found in samples(registry):
        if name in labels:
            assert {key for key, _ in found} == labels[name], name
