"""Names and labels hold for whatever a tier may be called."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from properties import examples
from servingtiers.core.decisions import PoolRole
from servingtiers.render import names

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
NAMES_BY_KIND = {
    "Deployment": (
        lambda tier: names.engine_deployment(tier, "pool"),
        lambda tier: names.engine_deployment(tier, "prefill"),
        lambda tier: names.engine_deployment(tier, "decode"),
        names.router_deployment,
    ),
    "Service": (names.service,),
    "PodDisruptionBudget": (
        lambda tier: names.disruption_budget(tier, "pool"),
        lambda tier: names.disruption_budget(tier, "prefill"),
        lambda tier: names.disruption_budget(tier, "decode"),
        lambda tier: names.disruption_budget(tier, "router"),
    ),
    "NetworkPolicy": (names.engine_network_policy, names.router_network_policy),
    "ServiceAccount": (names.router_service_account,),
    "Role": (names.router_role,),
    "RoleBinding": (names.role_binding,),
}
NEAR_NAMES = [
    "a",
    "a-router",
    "a-pool",
    "a-router-pool",
    "a-decode",
    "a-engines",
    "a.router",
    "9",
    "t-9",
    "a" * 253,
    "a" * 252,
    "a" * 49,
]


def _tier(make, name="chat", **spec):
    return make(
        {
            "apiVersion": "servingtiers.io/v1alpha1",
            "kind": "ServingTier",
            "metadata": {"name": name, "namespace": "llm", "uid": "u"},
            "spec": {"tier": "Latency", "model": {"name": "a/b"}, "pool": {}, **spec},
        }
    )


@given(data=st.data())
def test_every_name_is_a_dns_label_that_every_kind_of_object_takes(tier_names, data):
    """Services take the narrowest names: RFC 1035, at most 63 characters."""
    tier = data.draw(tier_names)
    for kind, makers in NAMES_BY_KIND.items():
        for make in makers:
            name = make(tier)
            assert len(name) <= 63, kind
            assert DNS_LABEL.fullmatch(name), (kind, name)


@given(data=st.data())
def test_two_tiers_never_share_the_name_of_an_object(tier_names, data):
    """Or one tier would be refused its objects because of another."""
    tiers = data.draw(st.lists(tier_names | st.sampled_from(NEAR_NAMES), unique=True, min_size=2, max_size=8))
    for kind, makers in NAMES_BY_KIND.items():
        made = [make(tier) for tier in tiers for make in makers]
        assert len(made) == len(set(made)), kind


@pytest.mark.parametrize("kind", NAMES_BY_KIND)
def test_near_names_of_tiers_stay_apart(kind):
    """Names that look like another tier's name with a suffix."""
    made = [make(tier) for tier in NEAR_NAMES for make in NAMES_BY_KIND[kind]]
    assert len(made) == len(set(made))


@given(data=st.data())
def test_a_tier_cannot_be_named_after_the_slug_of_another(tier_names, data):
    """A slug is fixed only where it is the tier's own name."""
    long = data.draw(tier_names.filter(lambda name: names.slug(name) != name))
    assert names.slug(names.slug(long)) != names.slug(long)


@pytest.mark.parametrize("name", ["chat", "llama-3-1-8b", "a" * 48])
def test_a_short_plain_name_is_kept_so_that_people_find_their_service(name):
    """http://chat, not http://chat-7f2c."""
    assert names.service(name) == name


@given(text=st.text(max_size=300))
@example(text="")
@example(text="/")
@example(text="Org/name:" + "x" * 100)
def test_any_text_becomes_a_label_value(text):
    """Model names hold slashes, colons and capitals."""
    value = names.label_value(text)
    assert len(value) <= 63
    assert LABEL_VALUE.fullmatch(value)


@given(texts=st.lists(st.text(max_size=80), unique=True, max_size=6))
def test_different_texts_keep_different_label_values(texts):
    """What is cut or replaced gets a hash."""
    assert len({names.label_value(text) for text in texts}) == len(texts)


def test_a_valid_label_value_is_kept():
    """A hash is for what had to be changed only."""
    assert names.label_value("Llama-3.1_8B") == "Llama-3.1_8B"


@settings(max_examples=examples(20))
@given(data=st.data())
def test_every_label_is_valid_for_any_tier(cases, data):
    """The API server would refuse the pod."""
    case = data.draw(cases)
    for pool in case.settings.pools:
        labels = names.engine_labels(
            case.tier,
            pool.name,
            pool.role,
            served_name=case.settings.served_name,
            accelerator=pool.accelerator,
        )
        for key, value in labels.items():
            assert len(key.rsplit("/", 1)[-1]) <= 63
            assert len(value) <= 63
            assert LABEL_VALUE.fullmatch(value)


def test_a_user_label_cannot_take_the_place_of_the_operators(make_tier):
    """The CRD refuses these keys; rendering does not rest on it."""
    tier = _tier(make_tier, pod={"labels": {"app.kubernetes.io/component": "router", "team": "x"}})
    labels = names.engine_labels(tier, "pool", PoolRole.AGGREGATED, served_name="a", accelerator="b")
    assert labels["app.kubernetes.io/component"] == "engine"
    assert labels["team"] == "x"


def test_only_routers_bear_the_shared_pool_so_that_joining_one_restarts_no_engine(make_tier):
    """A label of the pod template is part of what a rollout compares."""
    tier = _tier(make_tier, sharedPool={"name": "llama"})
    engine = names.engine_labels(tier, "pool", PoolRole.AGGREGATED, served_name="a", accelerator="b")
    assert names.router_labels(tier)[names.SHARED_POOL_LABEL] == "llama"
    assert names.SHARED_POOL_LABEL not in engine


@pytest.mark.parametrize(
    ("role", "value"),
    [(PoolRole.AGGREGATED, "prefill-decode"), (PoolRole.PREFILL, "prefill"), (PoolRole.DECODE, "decode")],
)
def test_roles_are_spelled_as_llm_d_spells_them(role, value):
    """Their tools select by these values."""
    assert names.route_role(role) == value
