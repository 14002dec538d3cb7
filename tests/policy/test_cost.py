"""Cost is replicas × accelerators × price, over what is generated."""

# the names of the tests are the sentences

from dataclasses import replace
from decimal import Decimal

import pytest

from servingtiers.core.signals import Unknown, Value, Zero
from servingtiers.policy.cost import PoolCost, compute

POOL = PoolCost(
    replicas=3,
    tensor_parallel=2,
    price_per_hour=Decimal("2.80"),
    price_source="operator configuration",
    max_num_seqs=10,
    running=Value(15.0),
)


def test_a_fleet_costs_its_accelerators():
    """3 replicas × 2 × 2.80 = 16.80 an hour; half of the slots idle; 1 M tokens take 1000 s at 1000/s."""
    cost = compute((POOL,), Value(1000.0), "EUR", 60.0)
    assert (cost.per_hour, cost.idle_per_hour, cost.per_million_output_tokens) == ("16.80", "8.40", "4.67")
    assert (cost.currency, cost.price_source, cost.window) == ("EUR", "operator configuration", "60s")


def test_pools_add_up_and_name_all_their_sources():
    decode = replace(POOL, price_per_hour=Decimal(1), price_source="catalogue", running=Zero())
    cost = compute((POOL, decode), Value(1000.0), "USD", 60.0)
    assert (cost.per_hour, cost.idle_per_hour) == ("22.80", "14.40")
    assert cost.price_source == "operator configuration; catalogue"


@pytest.mark.parametrize("rate", [Zero(), Unknown("gone"), Value(5.0, partial=True)])
def test_tokens_have_no_price_where_their_rate_is_not_known(rate):
    assert compute((POOL,), rate, "USD", 60.0).per_million_output_tokens is None


def test_idleness_is_left_out_where_use_is_unknown():
    cost = compute((POOL, replace(POOL, running=Unknown("gone"))), Zero(), "USD", 60.0)
    assert cost.per_hour == "33.60"
    assert cost.idle_per_hour is None


def test_a_tier_at_zero_costs_nothing():
    cost = compute((replace(POOL, replicas=0, running=Unknown("no pod")),), Zero(), "USD", 60.0)
    assert (cost.per_hour, cost.idle_per_hour) == ("0.00", "0.00")


def test_cheap_tokens_keep_two_digits_that_matter():
    assert compute((POOL,), Value(100_000.0), "USD", 60.0).per_million_output_tokens == "0.047"
