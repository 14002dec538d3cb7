"""What the operator may do: no more than it must."""

import pytest
import yaml

from chart.rendering import CASES, CLUSTER_SCOPED, ROOT, case_objects, case_values, of_kind, only, render
from servingtiers.render import names

RBAC_WRITES = {"create", "patch", "update"}


def _rules(objects, kind="Role"):
    return [rule for obj in of_kind(objects, kind) for rule in obj["rules"]]


def _verbs(rules, resource):
    return {verb for rule in rules if resource in rule["resources"] for verb in rule["verbs"]}


def _namespaced():
    return [case for case in CASES if case_values(case).get("mode", "namespaced") == "namespaced"]


@pytest.mark.parametrize("case", _namespaced())
def test_namespaced_mode_grants_nothing_cluster_wide(case):
    """Roles only; the CRD and, where switched on, the admission policy are no grants."""
    kinds = {obj["kind"] for obj in case_objects(case)} & CLUSTER_SCOPED

    assert not kinds & {"ClusterRole", "ClusterRoleBinding", "Namespace"}
    assert not any(
        obj["roleRef"]["kind"] == "ClusterRole" for obj in of_kind(case_objects(case), "RoleBinding")
    )


def test_without_the_crd_namespaced_mode_makes_no_cluster_scoped_object_at_all():
    """A team without any cluster-wide right can install it."""
    assert not {obj["kind"] for obj in render({"crds": {"enabled": False}})} & CLUSTER_SCOPED


@pytest.mark.parametrize("case", CASES)
def test_no_role_names_secrets_a_wildcard_or_a_verb_that_grants_more(case):
    """Whoever may do these may do everything."""
    objects = case_objects(case)
    for rule in _rules(objects) + _rules(objects, "ClusterRole"):
        words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        assert not words & {"*", "secrets", "escalate", "impersonate", "pods/exec", "nodes", "configmaps"}
        if "bind" in words:
            assert rule["resources"] == ["clusterroles"]
            assert rule["resourceNames"] == [names.ROUTER_CLUSTER_ROLE]


def test_by_default_the_operator_may_not_write_accounts_or_roles():
    """The routers' account comes with the chart."""
    rules = _rules([only(render(), "Role", "servingtiers-operator")])

    for resource in ("serviceaccounts", "roles", "rolebindings"):
        assert not _verbs(rules, resource) & RBAC_WRITES
    assert _verbs(rules, "pods") == {"get", "list", "watch", "patch"}, (
        "to lend engines; none is made or deleted"
    )


def test_the_operator_that_makes_the_routers_roles_holds_what_it_grants():
    """The API server refuses an escalation."""
    objects = render({"routers": {"sharedServiceAccount": False}})
    rules = _rules([only(objects, "Role", "servingtiers-operator")])

    assert _verbs(rules, "pods") >= {"get", "list", "watch"}
    assert _verbs(rules, "roles") >= RBAC_WRITES - {"update"}
    assert not of_kind(objects, "ServiceAccount", "servingtiers-router")


def test_the_cluster_role_that_may_be_bound_is_there_and_may_only_read_pods():
    """The operator and the chart agree on the name."""
    role = only(render({"mode": "cluster"}), "ClusterRole", names.ROUTER_CLUSTER_ROLE)

    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}]


def test_in_cluster_mode_the_lease_stays_in_the_operators_namespace():
    """No right to any other Lease."""
    objects = render({"mode": "cluster"})

    assert not any("leases" in rule["resources"] for rule in _rules(objects, "ClusterRole"))
    assert _verbs(_rules(objects), "leases") == {"create", "get", "update"}


def test_every_watched_namespace_gets_the_roles_and_the_release_only_the_lease():
    """One operator for some namespaces."""
    roles = {
        (obj["metadata"]["namespace"], obj["metadata"]["name"])
        for obj in of_kind(case_objects("watch-namespaces"), "Role")
    }

    assert roles == {
        ("llm", "servingtiers-operator-lease"),
        *((space, f"servingtiers-{name}") for space in ("llm-a", "llm-b") for name in ("operator", "router")),
    }


def test_the_kustomize_base_grants_exactly_what_the_chart_does():
    """Two ways of installing, one set of rights."""
    base = list(yaml.safe_load_all((ROOT / "manifests/base/role.yaml").read_text()))

    assert {o["metadata"]["name"]: o["rules"] for o in base} == {
        o["metadata"]["name"]: o["rules"] for o in of_kind(render(), "Role")
    }


def test_every_binding_is_for_an_account_of_this_release():
    """Nobody else is given anything."""
    for case in CASES:
        for kind in ("RoleBinding", "ClusterRoleBinding"):
            for binding in of_kind(case_objects(case), kind):
                subjects = {(s["kind"], s["name"]) for s in binding["subjects"]}
                assert subjects <= {
                    ("ServiceAccount", "servingtiers-operator"),
                    ("ServiceAccount", "servingtiers-router"),
                }
