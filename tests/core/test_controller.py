"""What the control loop remembers, and which groups it looks at: without an API server."""

# the names of the tests are the sentences

from servingtiers import controller
from servingtiers.adapters.store import group_of
from servingtiers.controller import Controller
from servingtiers.core.config import OperatorConfig
from servingtiers.core.signals import TierLoad
from servingtiers.core.state import Plan
from servingtiers.render import names

CONFIG = OperatorConfig(namespaces=["llm"])
CHAT = ("llm", "chat")


class Lists:
    """A cluster that can only be listed; ``meanwhile`` happens while the answer for a kind is under way."""

    def __init__(self):
        self.items = {}
        self.meanwhile = {}
        self.on_write = None

    async def list_all(self, kind, namespace, *, labels=""):
        answer = list(self.items.get(kind.kind, ()))
        self.meanwhile.pop(kind.kind, lambda: None)()
        return answer, 100


class Loads:
    """A source of loads; ``meanwhile`` happens while engines are asked."""

    def __init__(self, meanwhile=lambda: None):
        self.meanwhile = meanwhile

    async def read(self, tiers, now, *, complete=True):
        self.meanwhile()
        return {tier.key: TierLoad({"pool": "what was read"}) for tier in tiers}

    async def close(self):
        return


def tier(uid="one", *, pool=None, version=1):
    spec = {"tier": "Latency", "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"}}
    if pool is not None:
        spec["sharedPool"] = {"name": pool}
    meta = {"name": "chat", "namespace": "llm", "uid": uid, "resourceVersion": str(version), "generation": 1}
    return {"apiVersion": "servingtiers.io/v1alpha1", "kind": "ServingTier", "metadata": meta, "spec": spec}


def pod(uid="p1"):
    labels = {names.TIER_LABEL: "chat"}
    meta = {"name": uid, "namespace": "llm", "uid": uid, "resourceVersion": "1", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta}


async def queued(made):
    """Take everything off the queue."""
    found = set()
    while made.queue.depth:
        key = await made.queue.get()
        made.queue.done(key)
        found.add(key)
    return found


async def test_a_tier_made_anew_under_its_name_inherits_nothing(monkeypatch):
    """Its predecessor's status, counters and load are another tier's."""
    observed = []

    def plan(seen):
        observed.append(seen.members[0])
        return Plan((), (), 300.0, ("remembered",), ())

    monkeypatch.setattr(controller.reconcile, "plan", plan)
    clock = iter(range(1000, 2000))
    made = Controller(Lists(), CONFIG, Loads(), clock=lambda: float(next(clock)))
    made.tier_seen(tier("one"), gone=False)
    await made.read_loads()
    await made.reconcile(CHAT)
    await made.reconcile(CHAT)
    assert observed[-1].remembered == "remembered"
    assert observed[-1].load.pools

    made.tier_seen(tier("one"), gone=True)
    made.tier_seen(tier("two", version=2), gone=False)
    await made.reconcile(CHAT)
    assert observed[-1].remembered is None
    assert observed[-1].load == TierLoad()
    assert observed[-1].watching_since > observed[0].watching_since


async def test_what_engines_said_of_a_tier_that_went_meanwhile_is_nobodys():
    source = Loads()
    made = Controller(Lists(), CONFIG, source)
    made.tier_seen(tier("one"), gone=False)
    source.meanwhile = lambda: made.tier_seen(tier("one"), gone=True)
    await made.read_loads()
    assert made._states == {}

    def replaced():
        made.tier_seen(tier("one", version=3), gone=True)
        made.tier_seen(tier("two", version=4), gone=False)

    made.tier_seen(tier("one", version=2), gone=False)
    source.meanwhile = replaced
    await made.read_loads()
    assert made._states == {}


async def test_a_relist_tells_the_group_that_a_tier_left_it():
    """As the watch does, which has lost it."""
    cluster = Lists()
    made = Controller(cluster, CONFIG, Loads())
    group = group_of(tier(pool="llama"))
    made.tier_seen(tier(pool="llama"), gone=False)
    await queued(made)

    cluster.items["ServingTier"] = [tier(version=2)]
    await made.relist()
    assert await queued(made) == {CHAT, group}

    made.tier_seen(tier(pool="llama", version=3), gone=False)
    await queued(made)
    cluster.items["ServingTier"] = []
    await made.relist()
    assert await queued(made) == {CHAT, group}


async def test_a_list_that_was_under_way_does_not_bring_back_what_was_deleted_meanwhile():
    """Nothing would ever take the ghost away but the next list."""
    cluster = Lists()
    made = Controller(cluster, CONFIG, Loads())
    made.tier_seen(tier(), gone=False)
    made.object_seen(pod(), gone=False)
    cluster.items = {"ServingTier": [tier()], "Pod": [pod(), pod("p2")]}
    cluster.meanwhile = {
        "ServingTier": lambda: made.tier_seen(tier(version=2), gone=True),
        "Pod": lambda: made.object_seen(pod(), gone=True),
    }
    await made.relist()
    assert made.store.tiers == {}
    assert [p["metadata"]["name"] for p in made.store.belonging_to(CHAT)[1]] == ["p2"]

    await made.relist()
    assert CHAT in made.store.tiers, "a list that was asked for later knows better"
    assert len(made.store.belonging_to(CHAT)[1]) == 2
