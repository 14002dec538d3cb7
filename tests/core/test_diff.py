"""Comparison of desired and live objects."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.core.diff import APPLIED_HASH, changes, contains, quantity
from servingtiers.core.state import Verb

UID = "tier-uid"


def deployment(**spec: Any) -> dict[str, Any]:
    """Return a desired Deployment."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "d", "namespace": "n", "ownerReferences": [{"uid": UID, "kind": "ServingTier"}]},
        "spec": spec,
    }


def as_created(desired: dict[str, Any]) -> dict[str, Any]:
    """Return what the API server holds after the creation."""
    (write,) = changes([desired], [], owner_uid=UID, field_manager="us").writes
    entry = {
        "manager": "us",
        "operation": "Update",
        "time": "2026-01-01T00:00:00Z",
        "fieldsV1": {"f:spec": {}},
    }
    meta = write.body["metadata"] | {"uid": "child", "resourceVersion": "7", "managedFields": [entry]}
    return write.body | {"metadata": meta}


def verbs(desired: list[dict[str, Any]], live: list[dict[str, Any]]) -> list[Verb]:
    """Return the verbs of the writes."""
    return [w.verb for w in changes(desired, live, owner_uid=UID, field_manager="us").writes]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500m", "0.5"),
        ("2", "2"),
        ("1Gi", "1073741824"),
        ("1e3", "1000"),
        ("0.5", "0.5"),
        (3, "3"),
        ("1M", "1000000"),
    ],
)
def test_quantities_are_compared_as_numbers(text, number):
    """Kubernetes rewrites 1000m to 1; that is no difference."""
    assert quantity(text) == Decimal(number)


def test_a_malformed_quantity_says_how_to_write_one():
    """The error states the mend."""
    with pytest.raises(ValueError, match="500m"):
        quantity("lots")


@pytest.mark.parametrize(
    ("live", "desired", "expected"),
    [
        ({"a": 1, "defaulted": True}, {"a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ({}, {"a": False, "b": [], "c": {}, "d": ""}, True),
        ({}, {"a": True}, False),
        ({"args": ["--x", "--y"]}, {"args": ["--x"]}, False),
        ({"resources": {"limits": {"cpu": "1"}}}, {"resources": {"limits": {"cpu": "1000m"}}}, True),
        ({"resources": {"limits": {"cpu": "2"}}}, {"resources": {"limits": {"cpu": "1"}}}, False),
        ({"containers": [{"name": "sidecar"}, {"name": "e", "x": 1}]}, {"containers": [{"name": "e"}]}, True),
        ({"containers": [{"name": "other"}]}, {"containers": [{"name": "e"}]}, False),
        (
            {"ingress": [{"ports": [{"port": 1}, {"port": 2}]}]},
            {"ingress": [{"ports": [{"port": 1}]}]},
            False,
        ),
        ({"tolerations": [{"key": "a"}, {"key": "b"}]}, {"tolerations": [{"key": "a"}]}, False),
    ],
)
def test_containment_follows_server_side_apply(live, desired, expected):
    """Defaults and others' additions are no difference; atomic lists and values are."""
    assert contains(live, desired) is expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(1, 9) | st.text("ab", min_size=1, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)


@given(json_values)
def test_everything_contains_itself(value):
    """A second pass finds nothing to do."""
    assert contains(value, value)


@given(st.dictionaries(st.sampled_from("abc"), json_values, max_size=3), json_values)
def test_what_the_server_adds_is_no_difference(desired, extra):
    """Unknown keys in the live object are somebody else's."""
    assert contains({**desired, "added": extra}, desired)


def test_a_missing_object_is_created_and_a_second_pass_writes_nothing():
    """Idempotence."""
    desired = deployment(replicas=2)

    assert verbs([desired], []) == [Verb.CREATE]
    assert verbs([desired], [as_created(desired)]) == []


def test_an_edit_by_somebody_else_is_repaired():
    """C2: drift is applied over."""
    live = as_created(deployment(replicas=2))
    live["spec"] = {"replicas": 5}

    assert verbs([deployment(replicas=2)], [live]) == [Verb.FIELDS, Verb.APPLY]


def test_a_field_that_is_desired_no_longer_is_noticed_by_the_hash():
    """Containment alone would miss it."""
    live = as_created(deployment(replicas=2, paused=True))

    assert verbs([deployment(replicas=2)], [live]) == [Verb.FIELDS, Verb.APPLY]


def test_fields_set_at_creation_are_taken_over_once():
    """Afterwards our manager has one Apply entry that holds all our fields."""
    live = as_created(deployment(replicas=2, paused=True))
    fields = changes([deployment(replicas=2)], [live], owner_uid=UID, field_manager="us").writes[0]

    (entry,) = fields.body["metadata"]["managedFields"]
    assert (entry["operation"], entry["manager"]) == ("Apply", "us")

    live["metadata"]["managedFields"] = [entry]
    assert verbs([deployment(replicas=2)], [live]) == [Verb.APPLY]


def test_an_apply_names_the_uid_it_was_planned_for():
    """Another object of the same name is then a conflict, never a victim."""
    live = as_created(deployment(replicas=2))
    apply = changes([deployment(replicas=3)], [live], owner_uid=UID, field_manager="us").writes[-1]

    assert apply.body["metadata"]["uid"] == "child"


def test_somebody_elses_object_is_reported_and_left_alone():
    """C4: same name, other owner."""
    live = as_created(deployment(replicas=2))
    live["metadata"]["ownerReferences"] = []
    outcome = changes([deployment(replicas=3)], [live], owner_uid=UID, field_manager="us")

    assert outcome.writes == ()
    assert [ref.name for ref in outcome.foreign] == ["d"]


def test_an_object_that_is_being_deleted_is_waited_for():
    """C10: it is made anew when it is gone."""
    live = as_created(deployment(replicas=2))
    live["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    outcome = changes([deployment(replicas=2)], [live], owner_uid=UID, field_manager="us")

    assert outcome.writes == ()
    assert [ref.name for ref in outcome.waiting] == ["d"]


def _owned(kind: str, name: str, **fields: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "n", "ownerReferences": [{"uid": UID, "kind": "ServingTier"}]}
    return {"apiVersion": "v1", "kind": kind, "metadata": meta, **fields}


def _binding(kind: str) -> dict[str, Any]:
    subjects = [{"kind": "ServiceAccount", "name": "a", "namespace": "n"}]
    return _owned("RoleBinding", "b", roleRef={"kind": kind, "name": "r"}, subjects=subjects)


def test_a_binding_to_another_role_is_made_anew():
    """Its roleRef is immutable: an apply would be refused for ever."""
    old = as_created(_binding("Role"))

    assert verbs([_binding("Role")], [old]) == []
    assert verbs([_binding("ClusterRole")], [old]) == [Verb.DELETE, Verb.CREATE]


def test_a_role_goes_after_the_binding_to_it_has_been_made_anew():
    """In between the routers would have no rights."""
    old = [as_created(_owned("Role", "r")), as_created(_binding("Role"))]
    writes = changes([_binding("ClusterRole")], old, owner_uid=UID, field_manager="us").writes

    assert [(w.verb, w.body["kind"]) for w in writes] == [
        (Verb.DELETE, "RoleBinding"),
        (Verb.CREATE, "RoleBinding"),
        (Verb.DELETE, "Role"),
    ]


PODS = {"metadata": {"labels": {"app": "x"}}, "spec": {"serviceAccountName": "a"}}
TRUSTING = {
    "ServiceAccount": _owned("ServiceAccount", "a"),
    "Role": _owned("Role", "r"),
    "RoleBinding": _binding("Role"),
    "NetworkPolicy": _owned("NetworkPolicy", "p", spec={"podSelector": {"matchLabels": {"app": "x"}}}),
    "Other": _owned("NetworkPolicy", "q", spec={"podSelector": {"matchLabels": {"app": "y"}}}),
    "Deployment": deployment(template=PODS),
}


@pytest.mark.parametrize(
    ("stranger", "withheld"),
    [
        ("ServiceAccount", {"RoleBinding", "Deployment"}),
        ("Role", {"RoleBinding"}),
        ("RoleBinding", set()),
        ("NetworkPolicy", {"Deployment"}),
        ("Other", set()),
    ],
)
def test_nothing_is_made_that_would_rely_on_an_object_of_somebody_else(stranger, withheld):
    """A pod has the rights of the account that it names, whoever gave them."""
    theirs = TRUSTING[stranger] | {"metadata": TRUSTING[stranger]["metadata"] | {"ownerReferences": []}}
    found = changes(TRUSTING.values(), [theirs], owner_uid=UID, field_manager="us")
    written = [write.body["metadata"]["name"] for write in found.writes]
    missing = {kind for kind, obj in TRUSTING.items() if obj["metadata"]["name"] not in written}

    assert missing == {stranger} | withheld
    assert [ref.name for ref in found.foreign] == [theirs["metadata"]["name"]]


def test_a_deployment_goes_on_being_kept_beside_a_foreign_policy_but_not_under_a_foreign_account():
    """Scaling must not stop for a policy that leaves open what runs already; new code must not get another's rights."""
    live = as_created(deployment(template=PODS, replicas=1))
    wanted = TRUSTING | {"Deployment": deployment(template=PODS, replicas=2)}
    for stranger, goes_on in (("NetworkPolicy", True), ("ServiceAccount", False)):
        theirs = TRUSTING[stranger] | {"metadata": TRUSTING[stranger]["metadata"] | {"ownerReferences": []}}
        found = changes(wanted.values(), [theirs, live], owner_uid=UID, field_manager="us")

        assert any(w.body["kind"] == "Deployment" for w in found.writes) == goes_on


def test_only_our_own_surplus_is_deleted():
    """Prune by ownership."""
    ours, theirs = as_created(deployment()), as_created(deployment())
    theirs["metadata"] = theirs["metadata"] | {"name": "x", "ownerReferences": [{"uid": "somebody"}]}

    assert verbs([], [ours, theirs]) == [Verb.DELETE]


def test_the_hash_does_not_depend_on_key_order():
    """Else an upgrade of Python would apply everything anew."""
    (a,) = changes([{**deployment(x=1, y=2)}], [], owner_uid=UID, field_manager="us").writes
    (b,) = changes([{**deployment(y=2, x=1)}], [], owner_uid=UID, field_manager="us").writes

    assert a.body["metadata"]["annotations"][APPLIED_HASH] == b.body["metadata"]["annotations"][APPLIED_HASH]
