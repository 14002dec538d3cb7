"""The cache of what was seen: only forward, compared by uid."""

from servingtiers.adapters.store import Store, group_of

LABEL = "servingtiers.io/tier"


def obj(name="d", *, uid="u1", version=1, tier="chat", kind="Deployment"):
    """Return a labelled object."""
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {
            "name": name,
            "namespace": "n",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {LABEL: tier} if tier else {},
        },
    }


def names(store, key=("n", "chat")):
    """Return names and versions of a tier's objects."""
    return [
        (o["metadata"]["name"], int(o["metadata"]["resourceVersion"])) for o in store.belonging_to(key)[0]
    ]


def test_an_older_event_never_replaces_a_newer_object():
    """A15: the watch lags behind our own write."""
    store = Store(LABEL)
    store.see(obj(version=5))

    assert store.see(obj(version=4)) is None
    assert names(store) == [("d", 5)]


def test_a_late_deletion_of_the_predecessor_does_not_remove_the_successor():
    """C5: deleted and made again under the same name."""
    store = Store(LABEL)
    store.see(obj(uid="new", version=9))

    assert store.forget(obj(uid="old", version=8)) is None
    assert names(store) == [("d", 9)]


def test_a_successor_with_a_lower_version_is_taken_in():
    """A24: after a restore from backup versions start over; the uid tells."""
    store = Store(LABEL)
    store.see(obj(uid="old", version=900))
    store.see(obj(uid="new", version=3))

    assert names(store) == [("d", 3)]


def test_a_relist_finds_deletions_that_the_watch_missed():
    """A17: Kopf keeps ghosts after a 410 Gone."""
    store = Store(LABEL)
    store.see(obj("a"))
    store.see(obj("b", uid="u2"))

    assert store.relist("Deployment", "apps/v1", [obj("a")], 5) == {("n", "chat")}
    assert names(store) == [("a", 1)]


def test_an_object_that_changes_its_tier_label_moves():
    """No tier keeps an object that is no longer labelled as its own."""
    store = Store(LABEL)
    store.see(obj(version=1))

    assert store.see(obj(version=2, tier="other")) == ("n", "other")
    assert names(store) == []
    assert names(store, ("n", "other")) == [("d", 2)]


def test_pods_are_told_from_the_objects_the_operator_writes():
    """Only the latter are compared with the plan."""
    store = Store(LABEL)
    store.see(obj("p", kind="Pod") | {"apiVersion": "v1"})
    objects, pods = store.belonging_to(("n", "chat"))

    assert (len(objects), len(pods)) == (0, 1)


def test_a_relist_of_tiers_names_new_changed_and_gone_ones():
    """Each of them must be reconciled."""
    store = Store(LABEL)
    for name, version in (("same", 1), ("changed", 1), ("gone", 1)):
        store.see_tier(obj(name, version=version))

    fresh = [obj("same", version=1), obj("changed", version=2), obj("new", version=1)]

    assert store.relist_tiers(fresh, 5) == {("n", "changed"), ("n", "new"), ("n", "gone")}


def test_a_relist_that_was_asked_for_before_our_write_does_not_undo_it():
    """The list is older than what is held."""
    store = Store(LABEL)
    store.see(obj("a", version=9))

    assert store.relist("Deployment", "apps/v1", [], 8) == set()
    assert names(store) == [("a", 9)]


def test_a_relist_does_not_bring_back_what_was_deleted_since_it_was_asked_for():
    """The watch was faster than the list's answer."""
    store = Store(LABEL)
    store.see(obj("a"))
    store.see_tier(member("chat"))
    store.list_begins()
    store.forget(obj("a"))
    store.forget_tier(member("chat"))

    assert store.relist("Deployment", "apps/v1", [obj("a"), obj("b", uid="u2")], 8) == {("n", "chat")}
    assert names(store) == [("b", 1)]
    assert store.relist_tiers([member("chat")], 8) == set()
    assert not store.tiers


def test_what_is_seen_again_after_its_deletion_was_noted_is_in_a_list_as_well():
    """We deleted it, and it waits for a finalizer; or it lost its label and has it again."""
    store = Store(LABEL)
    store.see(obj("a"))
    store.list_begins()
    store.forget(obj("a"))
    store.see(obj("a", version=2))
    store.relist("Deployment", "apps/v1", [obj("a", version=3)], 8)

    assert names(store) == [("a", 3)]


def test_objects_are_found_by_how_the_label_spells_the_tier():
    """A tier's name may be longer than a label value."""
    store = Store(LABEL, label_value=lambda name: name[:4])
    store.see(obj(tier="long"))

    assert names(store, ("n", "longer-than-a-label")) == [("d", 1)]


def test_a_relist_forgets_autoscalers_that_are_gone():
    """A ghost would keep a tier in conflict for ever."""
    store = Store(LABEL)
    rival = obj("rival", kind="HorizontalPodAutoscaler")
    store.see(rival)

    assert store.autoscalers("n") == (rival,)

    store.relist("HorizontalPodAutoscaler", "autoscaling/v2", [], 9)

    assert store.autoscalers("n") == ()


def member(name, pool=None, *, version=1, namespace="n"):
    """Return a tier, in a TierPool or not."""
    spec = {} if pool is None else {"sharedPool": {"name": pool}}
    meta = {"name": name, "namespace": namespace, "uid": f"u-{name}", "resourceVersion": str(version)}
    return {"kind": "ServingTier", "metadata": meta, "spec": spec}


def test_tiers_that_name_one_pool_are_one_group_and_others_are_alone():
    """Whether the pool exists or not; and only within a namespace."""
    store = Store(LABEL)
    for tier in (
        member("b", "llama"),
        member("a", "llama"),
        member("c"),
        member("a", "llama", namespace="m"),
    ):
        store.see_tier(tier)

    group = group_of(member("a", "llama"))
    assert [key for key, _ in store.members(group)] == [("n", "a"), ("n", "b")]
    assert store.members(("n", "b")) == store.members(group), "by the key of any member"
    assert [key for key, _ in store.members(("n", "c"))] == [("n", "c")]
    assert store.members(("n", "gone")) == []


def test_a_tier_that_leaves_a_pool_leaves_its_group():
    """The key that is reconciled follows the spec."""
    store = Store(LABEL)
    store.see_tier(member("a", "llama"))
    store.see_tier(member("a", version=2))

    assert store.members(group_of(member("a", "llama"))) == []
    assert group_of(store.tiers["n", "a"]) == ("n", "a")


def test_pools_go_forward_and_are_compared_by_uid_too():
    """As everything else that is seen."""

    def pool(version, uid="u1"):
        return {"metadata": {"name": "llama", "namespace": "n", "uid": uid, "resourceVersion": str(version)}}

    store = Store(LABEL)
    key = group_of(member("a", "llama"))
    assert store.see_pool(pool(5)) == key
    assert store.see_pool(pool(4)) is None
    assert store.forget_pool(pool(9, uid="old")) is None
    assert store.relist_pools([pool(5)], 6) == set()
    assert store.relist_pools([], 4) == set(), "newer than the list"
    assert store.relist_pools([], 6) == {key}
    assert not store.pools
    store.see_pool(pool(7))
    store.list_begins()
    store.forget_pool(pool(8))
    assert store.relist_pools([pool(7)], 8) == set(), "deleted while the list's answer was under way"
    assert not store.pools
