"""Every name and every label of the objects of a tier.

Names are made from the tier's *slug*: its own name where that is a short DNS label, otherwise a cut of it with
a hash. Each kind of object has its own closed set of suffixes without a hyphen, and no unhashed slug looks like
a hashed one, so two tiers of a namespace never share a name, short of a collision of the hash.

Three kinds of labels are kept apart:

* *selector labels* say which Deployment a pod belongs to. They never change, because a Deployment's selector
  cannot.
* *routing labels* (``route.servingtiers.io/…``) say whom a pod serves. Routers select by them and nothing else
  does, so an engine can be lent to another tier, or change its role, by a label alone and without a restart. The
  pod template carries the home value: a pod that is replaced while the operator is away goes home.
* *descriptive labels* are for people and tools, among them the public conventions of llm-d.
"""

from __future__ import annotations

import hashlib
import re

from servingtiers.api.spec import ServingTier
from servingtiers.core.decisions import PoolRole

__all__ = [
    "ACCELERATOR_LABEL",
    "BOUND_ANNOTATION",
    "COMPONENT_LABEL",
    "DELETION_COST_ANNOTATION",
    "ENGINE",
    "MANAGED_BY",
    "MANAGED_BY_LABEL",
    "MOVED_ANNOTATION",
    "NAME_LABEL",
    "OPERATOR",
    "POOL_LABEL",
    "ROLE_LABEL",
    "ROUTER",
    "ROUTER_CLUSTER_ROLE",
    "ROUTE_PREFIX",
    "ROUTE_ROLE_LABEL",
    "ROUTE_TIER_LABEL",
    "SHARED_POOL_LABEL",
    "TIER_LABEL",
    "disruption_budget",
    "engine_deployment",
    "engine_labels",
    "engine_network_policy",
    "engine_selector",
    "label_value",
    "object_labels",
    "role_binding",
    "route_role",
    "router_deployment",
    "router_labels",
    "router_network_policy",
    "router_role",
    "router_selector",
    "router_service_account",
    "routing_labels",
    "service",
    "slug",
]

MANAGED_BY = "servingtiers"
"""Value of ``app.kubernetes.io/managed-by`` on every object of a tier."""
ENGINE = "engine"
"""Component of a pod that runs vLLM."""
ROUTER = "router"
"""Component of a pod that runs vllm-router."""
OPERATOR = "operator"
"""Component of the operator's own pod; NetworkPolicies let it read metrics."""

COMPONENT_LABEL = "app.kubernetes.io/component"
NAME_LABEL = "app.kubernetes.io/name"
MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
TIER_LABEL = "servingtiers.io/tier"
POOL_LABEL = "servingtiers.io/pool"
SHARED_POOL_LABEL = "servingtiers.io/shared-pool"
"""On routers only: engines must not be rolled when their tier joins a TierPool."""
ROUTE_PREFIX = "route.servingtiers.io/"
ROUTE_TIER_LABEL = f"{ROUTE_PREFIX}tier"
"""Whom a pod serves. One key with one value: an engine has one holder at a time by construction."""
ROUTE_ROLE_LABEL = f"{ROUTE_PREFIX}role"
"""What a pod does for its holder."""
MOVED_ANNOTATION = "servingtiers.io/moved-at"
"""On an engine's pod: when its routing label was last changed, written with it."""
ACCELERATOR_LABEL = "llm-d.ai/accelerator-variant"
"""On an engine: the catalogue key of the accelerator that it asks for."""
BOUND_ANNOTATION = "servingtiers.io/bound-for"
"""On an engine's pod without a holder: whom it goes to, written like the routing label."""
DELETION_COST_ANNOTATION = "controller.kubernetes.io/pod-deletion-cost"
"""On an engine's pod away from home: a Deployment that shrinks stops those first that are at home."""
ROLE_LABEL = "llm-d.ai/role"

ROUTER_CLUSTER_ROLE = "servingtiers-router"
"""ClusterRole the chart installs in cluster mode; the operator may ``bind`` this name and no other."""

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_HASHED = re.compile(r".*-[0-9a-f]{10}")
_HASH_LENGTH = 10
_SLUG_LENGTH = 48
"""Leaves room in 63 characters for every suffix."""

_ROLES = {
    PoolRole.AGGREGATED: "prefill-decode",
    PoolRole.PREFILL: "prefill",
    PoolRole.DECODE: "decode",
}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_LENGTH]


def _cut(text: str, length: int, original: str) -> str:
    """Return ``text`` cut to leave room for a hash of ``original``, with that hash."""
    head = text[: length - _HASH_LENGTH - 1].rstrip("-._")
    return f"{head}-{_hash(original)}"


def slug(tier: str) -> str:
    """Return the part of every name that stands for the tier: a DNS label (RFC 1035) of at most 48 characters.

    A tier's name may be a DNS subdomain of 253 characters that starts with a digit; a Service's may not. The name
    is kept as it is where it can be. A name that merely looks hashed is hashed too, so that none can be chosen to
    equal the slug of another tier.
    """
    if len(tier) <= _SLUG_LENGTH and _DNS_LABEL.fullmatch(tier) and not _HASHED.fullmatch(tier):
        return tier
    plain = re.sub(r"[^a-z0-9]+", "-", tier.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"t-{plain}".rstrip("-")
    return _cut(plain, _SLUG_LENGTH, tier)


def label_value(text: str) -> str:
    """Return ``text`` as a label value: at most 63 of ``[A-Za-z0-9._-]`` that start and end alphanumerically.

    What had to be changed gets a hash, so that different texts keep different values.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    if plain == text and 0 < len(plain) <= 63:
        return plain
    if not plain:
        return f"x-{_hash(text)}"
    return _cut(plain, 63, text)


def engine_deployment(tier: str, pool: str) -> str:
    """Return the name of a pool's Deployment."""
    return f"{slug(tier)}-{pool}"


def router_deployment(tier: str) -> str:
    """Return the name of the router's Deployment."""
    return f"{slug(tier)}-router"


def service(tier: str) -> str:
    """Return the name of the Service that clients use: the tier's own name wherever it can be."""
    return slug(tier)


def disruption_budget(tier: str, pool: str) -> str:
    """Return the name of the PodDisruptionBudget of a pool, or of the routers (``pool="router"``)."""
    return f"{slug(tier)}-{pool}"


def engine_network_policy(tier: str) -> str:
    """Return the name of the NetworkPolicy of all engines of a tier."""
    return f"{slug(tier)}-engines"


def router_network_policy(tier: str) -> str:
    """Return the name of the NetworkPolicy of a tier's routers."""
    return f"{slug(tier)}-router"


def router_service_account(tier: str) -> str:
    """Return the name of the routers' ServiceAccount."""
    return f"{slug(tier)}-router"


def router_role(tier: str) -> str:
    """Return the name of the routers' Role."""
    return f"{slug(tier)}-router"


def role_binding(tier: str) -> str:
    """Return the name of the routers' RoleBinding."""
    return f"{slug(tier)}-router"


def object_labels(tier: ServingTier, component: str, pool: str | None = None) -> dict[str, str]:
    """Return the labels of an object, and of the pods of a Deployment."""
    labels = {
        NAME_LABEL: "vllm" if component == ENGINE else "vllm-router",
        "app.kubernetes.io/instance": slug(tier.metadata.name),
        COMPONENT_LABEL: component,
        MANAGED_BY_LABEL: MANAGED_BY,
        "app.kubernetes.io/part-of": "servingtiers",
        TIER_LABEL: slug(tier.metadata.name),
    }
    if pool is not None:
        labels[POOL_LABEL] = pool
    return labels


def engine_selector(tier: ServingTier, pool: str | None = None) -> dict[str, str]:
    """Return the immutable labels of the pods of one pool, or of all engines that are at home in the tier."""
    selector = {COMPONENT_LABEL: ENGINE, TIER_LABEL: slug(tier.metadata.name)}
    if pool is not None:
        selector[POOL_LABEL] = pool
    return selector


def router_selector(tier: ServingTier) -> dict[str, str]:
    """Return the immutable labels of the tier's router pods."""
    return {COMPONENT_LABEL: ROUTER, TIER_LABEL: slug(tier.metadata.name)}


def route_role(role: PoolRole) -> str:
    """Return the value of the role labels, as llm-d spells it."""
    return _ROLES[role]


def routing_labels(tier: ServingTier, role: PoolRole) -> dict[str, str]:
    """Return the labels by which the tier's routers find engines of one role; never part of a selector."""
    return {ROUTE_TIER_LABEL: slug(tier.metadata.name), ROUTE_ROLE_LABEL: route_role(role)}


def engine_labels(
    tier: ServingTier, pool: str, role: PoolRole, *, served_name: str, accelerator: str
) -> dict[str, str]:
    """Return all labels of an engine pod at home; user labels never override them."""
    user = (tier.spec.pod.labels if tier.spec.pod else None) or {}
    return {
        **user,
        **object_labels(tier, ENGINE, pool),
        "llm-d.ai/inference-serving": "true",
        ROLE_LABEL: route_role(role),
        "llm-d.ai/model": label_value(served_name),
        "llm-d.ai/engine-type": "vllm",
        ACCELERATOR_LABEL: label_value(accelerator),
        **routing_labels(tier, role),
    }


def router_labels(tier: ServingTier) -> dict[str, str]:
    """Return all labels of a router pod."""
    labels = object_labels(tier, ROUTER)
    if tier.spec.shared_pool is not None:
        labels[SHARED_POOL_LABEL] = label_value(tier.spec.shared_pool.name)
    return labels
