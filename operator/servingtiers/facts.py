"""From Kubernetes objects to what scaling, conditions and telemetry need to know of them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from servingtiers.api.spec import ServingTier
from servingtiers.api.status import PoolMemory
from servingtiers.core.decisions import PoolFacts, Targets
from servingtiers.core.diff import content_hash
from servingtiers.core.effective import PoolAsked, PoolSettings, pools_asked
from servingtiers.core.sharing import SharedEngine
from servingtiers.core.signals import Signal, Unknown, Value, Zero
from servingtiers.core.state import JsonObject, Ref
from servingtiers.core.telemetry import MAX_FUTURE, PodTarget, PoolTargets, TierTargets
from servingtiers.core.times import from_time
from servingtiers.render import engine, names, router

__all__ = [
    "PoolView",
    "bound_for",
    "engines_hash",
    "holder",
    "moved_at",
    "pool_facts",
    "ready_at_home",
    "serves",
    "shared_engines",
    "startup_times",
    "telemetry_targets",
    "view_pool",
    "view_router",
]

_STARTS_KEPT = 16


@dataclass(frozen=True, slots=True)
class PoolView:
    """What the cluster holds of one Deployment."""

    deployment: JsonObject | None
    pods: tuple[JsonObject, ...]

    @property
    def ready_pods(self) -> tuple[JsonObject, ...]:
        """Pods that are ready and stay."""
        return tuple(pod for pod in self.pods if _condition(pod, "Ready") == "True" and not _leaving(pod))

    @property
    def unschedulable_pods(self) -> tuple[JsonObject, ...]:
        """Pods that no node has room for."""
        return tuple(pod for pod in self.pods if _unschedulable(pod) and not _leaving(pod))

    @property
    def placed(self) -> bool:
        """Whether any pod that stays has found a node."""
        return any(_condition(pod, "PodScheduled") == "True" and not _leaving(pod) for pod in self.pods)

    def waited_for(self, accelerator: str, now: float) -> float | None:
        """Return for how long no engine that asks for an accelerator has found a node, seconds.

        None: one has found a node, or none asks. Pods that a scheduling gate holds back have not been tried.
        """
        label = names.label_value(accelerator)
        asking = [
            pod
            for pod in self.pods
            if pod["metadata"].get("labels", {}).get(names.ACCELERATOR_LABEL) == label
            and not _leaving(pod)
            and pod.get("status", {}).get("phase") not in {"Failed", "Succeeded"}
        ]
        if any(_condition(pod, "PodScheduled") == "True" or _gated(pod) for pod in asking):
            return None
        since = [_since(pod, "PodScheduled") for pod in asking if _unschedulable(pod)]
        return max((now - moment for moment in since if moment is not None), default=None)


def view_pool(
    tier: ServingTier, pool: str, objects: Iterable[JsonObject], pods: Iterable[JsonObject]
) -> PoolView:
    """Return the Deployment of a pool and the pods that are at home in it."""
    return _view(
        names.engine_deployment(tier.metadata.name, pool), names.engine_selector(tier, pool), objects, pods
    )


def view_router(tier: ServingTier, objects: Iterable[JsonObject], pods: Iterable[JsonObject]) -> PoolView:
    """Return the router's Deployment and its pods."""
    return _view(names.router_deployment(tier.metadata.name), names.router_selector(tier), objects, pods)


def _view(
    name: str, selector: dict[str, str], objects: Iterable[JsonObject], pods: Iterable[JsonObject]
) -> PoolView:
    deployment = next(
        (obj for obj in objects if obj["kind"] == "Deployment" and Ref.of(obj).name == name), None
    )
    mine = (pod for pod in pods if selector.items() <= pod["metadata"].get("labels", {}).items())
    return PoolView(deployment, tuple(mine))


def ready_at_home(name: str, pods: Iterable[JsonObject]) -> tuple[Counter[str], int]:
    """Return the ready pods of a tier by its name alone, whatever its spec: by pool, and its routers."""
    ready = _view("", {names.TIER_LABEL: names.slug(name)}, (), pods).ready_pods
    labels = [pod["metadata"]["labels"] for pod in ready]
    engines = Counter(each[names.POOL_LABEL] for each in labels if names.POOL_LABEL in each)
    return engines, sum(each.get(names.COMPONENT_LABEL) == names.ROUTER for each in labels)


def holder(pod: JsonObject) -> str | None:
    """Return the slug of the tier whose routers select an engine; None: it is between two tiers.

    A pod whose label somebody else took away, to look at it in peace, is none of ours to move: it counts as at home.
    """
    meta = pod["metadata"]
    label: str | None = meta.get("labels", {}).get(names.ROUTE_TIER_LABEL)
    if label is None and moved_at(pod) is None:
        return str(meta.get("labels", {}).get(names.TIER_LABEL))
    return label


def bound_for(pod: JsonObject) -> str | None:
    """Return the slug of the tier that an engine without a holder is on its way to."""
    found: str | None = pod["metadata"].get("annotations", {}).get(names.BOUND_ANNOTATION)
    return found


def moved_at(pod: JsonObject) -> float | None:
    """Return when an engine's routing label was last changed, Unix time; None: never, or the time is no time."""
    text = pod["metadata"].get("annotations", {}).get(names.MOVED_ANNOTATION)
    try:
        return None if text is None else from_time(text)
    except ValueError:
        return None


def serves(tier: str, pod: JsonObject) -> bool:
    """Return whether a ready engine serves a tier."""
    return (
        pod["metadata"].get("labels", {}).get(names.COMPONENT_LABEL) == names.ENGINE
        and holder(pod) == names.slug(tier)
        and _condition(pod, "Ready") == "True"
        and not _leaving(pod)
    )


def shared_engines(
    namespace: str,
    home: str,
    pods: Iterable[JsonObject],
    tiers: Iterable[str],
    in_flight: Mapping[str, tuple[Signal, float]],
    *,
    sharing: bool,
    now: float,
) -> tuple[SharedEngine, ...]:
    """Return the engines of one tier as lending sees them.

    Args:
        namespace: Namespace of all members.
        home: Name of the tier.
        pods: Its pods.
        tiers: Names of all members.
        in_flight: Pod to what it has in flight and how long ago that was read.
        sharing: Whether the tier is in a TierPool. In one that is not, only engines that were moved by the operator are
            its to call home: what somebody else has labelled is his.
        now: Unix time, seconds.
    """
    key_of = {names.slug(tier): f"{namespace}/{tier}" for tier in tiers}

    def key(slug: str | None) -> str | None:
        return None if slug is None else key_of.get(slug, f"{namespace}/{slug}")

    found = []
    for pod in pods:
        meta = pod["metadata"]
        if meta.get("labels", {}).get(names.COMPONENT_LABEL) != names.ENGINE:
            continue
        moved = moved_at(pod)
        if moved is None and not sharing:
            continue
        signal, read = in_flight.get(meta["name"], (Unknown("not measured"), 0.0))
        if isinstance(signal, Value | Zero):
            signal = replace(signal, age=signal.age + read)
        found.append(
            SharedEngine(
                uid=meta.get("uid", meta["name"]),
                name=meta["name"],
                home=f"{namespace}/{home}",
                holder=key(holder(pod)),
                bound_for=key(bound_for(pod)) if holder(pod) is None else None,
                ready=_condition(pod, "Ready") == "True",
                leaving=_leaving(pod),
                in_flight=signal,
                # A moment that lies ahead is not known: the clock was set back, and it would be waited for as long as that.
                held_seconds=None if moved is None or moved > now + MAX_FUTURE else max(0.0, now - moved),
            )
        )
    return tuple(found)


def pool_facts(
    asked: PoolAsked,
    settings: PoolSettings,
    view: PoolView,
    memory: PoolMemory,
    *,
    now: float,
    tier: str = "",
    guests: Sequence[JsonObject] = (),
    borrowed_share: float = 1.0,
) -> PoolFacts:
    """Return what scaling needs to know of a pool.

    Args:
        asked: The pool as the user wrote it.
        settings: Its settings.
        view: Its Deployment and pods.
        memory: What was remembered of it.
        now: Unix time, seconds.
        tier: Name of its tier.
        guests: Engines of other tiers that serve it.
        borrowed_share: What such a one carries of what one of its own does.
    """
    deployment = view.deployment or {}
    # A pool that may sleep starts awake: the first thing a user does is to try it.
    live = deployment.get("spec", {}).get("replicas", max(1, asked.spec.scaling.min_replicas))
    ready = view.ready_pods
    unschedulable = len(view.unschedulable_pods)
    terminating = sum(1 for pod in view.pods if _leaving(pod))
    waiting = len(view.pods) - len(ready) - terminating - unschedulable
    lent = sum(1 for pod in ready if tier and holder(pod) != names.slug(tier))
    own = [pod for pod in ready if not tier or holder(pod) == names.slug(tier)]
    came = [*(_since(pod, "Ready") for pod in own), *(moved_at(pod) for pod in (*own, *guests))]
    since = [moment for moment in came if moment is not None and moment <= now + MAX_FUTURE]
    starts = startup_times(view) or memory.startup_seconds
    return PoolFacts(
        name=asked.name,
        role=asked.role,
        scaling=asked.spec.scaling,
        replicas=live,
        ready=len(ready),
        pending=max(waiting, live - len(ready) - unschedulable if deployment else 0, 0),
        unschedulable=unschedulable,
        terminating=terminating,
        rolling=_rolling(deployment),
        max_num_seqs=settings.max_num_seqs,
        startup_seconds=median(starts) if starts else None,
        settled_seconds=max(0.0, now - max(since)) if since else None,
        lent=lent,
        borrowed=len(guests),
        borrowed_share=borrowed_share,
    )


def engines_hash(model: str, settings: PoolSettings, targets: Targets) -> str:
    """Return what a pool's engines are and what is asked of them, as a short hash.

    Only what changes what an engine carries is in it: a new image or another drain time teaches nothing anew.
    """
    return content_hash(
        [
            model,
            settings.accelerator,
            settings.tensor_parallel,
            settings.weights,
            settings.kv_cache_dtype,
            settings.max_num_seqs,
            settings.max_num_batched_tokens,
            settings.gpu_memory_utilization,
            settings.speculative,
            sorted(f"{metric}.{name}={seconds:g}" for (metric, name), seconds in targets.seconds.items()),
        ]
    )


def startup_times(view: PoolView) -> list[int]:
    """Return how long the ready pods took from creation to readiness, seconds, oldest first.

    A container that was restarted became ready for another reason and is left out.
    """
    starts: list[tuple[float, int]] = []
    for pod in view.ready_pods:
        ready = _since(pod, "Ready")
        restarts = sum(c.get("restartCount", 0) for c in pod.get("status", {}).get("containerStatuses", ()))
        if ready is not None and not restarts:
            created = from_time(pod["metadata"]["creationTimestamp"])
            starts.append((ready, max(0, round(ready - created))))
    return [seconds for _, seconds in sorted(starts)][-_STARTS_KEPT:]


def telemetry_targets(
    tier: ServingTier,
    objects: Sequence[JsonObject],
    pods: Sequence[JsonObject],
    guests: Sequence[JsonObject] = (),
) -> TierTargets:
    """Return whom to ask about a tier's load: the engines that serve it, whoever owns them.

    Args:
        tier: The tier.
        objects: Its objects.
        pods: Its pods.
        guests: Engines of other tiers that serve it.
    """
    slug = names.slug(tier.metadata.name)
    pools = []
    unheld: list[JsonObject] = []
    for asked in pools_asked(tier.spec):
        view = view_pool(tier, asked.name, objects, pods)
        desired = (view.deployment or {}).get("spec", {}).get("replicas", 0)
        away = [pod for pod in view.ready_pods if holder(pod) != slug]
        unheld += [pod for pod in away if holder(pod) is None]
        serving = [*(pod for pod in view.ready_pods if holder(pod) == slug), *guests]
        wanted = max(0, desired - len(away)) + len(guests)
        pools.append(PoolTargets(asked.name, asked.role, wanted, _targets(serving, engine.PORT)))
    routers = _targets(view_router(tier, objects, pods).ready_pods, router.METRICS_PORT)
    return TierTargets(
        tier.metadata.namespace,
        tier.metadata.name,
        tuple(pools),
        routers,
        _targets(unheld, engine.PORT),
    )


def _targets(pods: Iterable[JsonObject], port: int) -> tuple[PodTarget, ...]:
    return tuple(
        PodTarget(
            pod["metadata"]["name"], ip, port, ready_since=_since(pod, "Ready"), held_since=moved_at(pod)
        )
        for pod in pods
        if (ip := pod.get("status", {}).get("podIP"))
    )


def _rolling(deployment: JsonObject) -> bool:
    """Return whether old pods remain or the controller has not looked at the newest template yet."""
    if not deployment:
        return False
    status = deployment.get("status", {})
    replicas = status.get("replicas", 0)
    observed = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
    return bool(not observed or status.get("updatedReplicas", 0) < replicas)


def _leaving(pod: JsonObject) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def _conditions(pod: JsonObject) -> Iterable[dict[str, Any]]:
    return pod.get("status", {}).get("conditions", ())  # type: ignore[no-any-return]  # JSON


def _condition(pod: JsonObject, kind: str) -> str | None:
    return next((c["status"] for c in _conditions(pod) if c["type"] == kind), None)


def _since(pod: JsonObject, kind: str) -> float | None:
    for condition in _conditions(pod):
        if condition["type"] == kind and (moment := condition.get("lastTransitionTime")):
            return from_time(moment)
    return None


def _gated(pod: JsonObject) -> bool:
    return any(c["type"] == "PodScheduled" and c.get("reason") == "SchedulingGated" for c in _conditions(pod))


def _unschedulable(pod: JsonObject) -> bool:
    return any(c["type"] == "PodScheduled" and c["status"] == "False" for c in _conditions(pod))
