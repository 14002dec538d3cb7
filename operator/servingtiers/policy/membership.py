"""Which tiers of a TierPool can stand in for one another. Every message states the mend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from servingtiers.api.pool import TierPool
from servingtiers.api.spec import EngineSpec, ServingTier, ServingTierSpec
from servingtiers.core.effective import pools_asked
from servingtiers.core.findings import Problem

__all__ = ["judge"]

_FIELD = "spec.sharedPool"
Traits = tuple[tuple[str, str], ...]
"""What members must have in common: field to value."""


def judge(pool: TierPool | None, tiers: Sequence[ServingTier]) -> dict[str, Problem]:
    """Return why tiers take no part in lending, by the tier's name; a tier that is missing takes part.

    Where members differ the majority has it: one tier that is changed, or that joins with other settings, must not
    stop the others from lending. A problem never blocks: what serves goes on as it is.

    Args:
        pool: The TierPool; None where there is none of that name.
        tiers: All tiers that name it.
    """
    found: dict[str, Problem] = {}
    rest = []
    for tier in tiers:
        problem = _alone(pool, tier)
        if problem is None:
            rest.append(tier)
        else:
            found[tier.metadata.name] = problem
    if not rest:
        return found
    counted = Counter(_traits(tier.spec) for tier in rest)
    leader = min(rest, key=lambda t: (-counted[_traits(t.spec)], -_priority(t), t.metadata.name))
    common = dict(_traits(leader.spec))
    for tier in rest:
        differing = [
            f"{name} is {value or 'not given'} here and {common[name] or 'not given'} in {leader.metadata.name}"
            for name, value in _traits(tier.spec)
            if value != common[name]
        ]
        if differing:
            found[tier.metadata.name] = Problem(
                _FIELD,
                f"it neither lends nor borrows, because its engines cannot stand in for the others': {'; '.join(differing)}."
                " Make them equal, or remove sharedPool",
                blocking=False,
                reason="MembersDisagree",
            )
    return found


def _priority(tier: ServingTier) -> int:
    return tier.spec.shared_pool.priority if tier.spec.shared_pool is not None else 0


def _alone(pool: TierPool | None, tier: ServingTier) -> Problem | None:
    """Return why a tier takes no part, whatever the other members are."""
    terms, served = tier.spec.shared_pool, tier.spec.model.served_name or tier.spec.model.name
    if terms is None:
        return None
    if pool is None:
        return Problem(
            _FIELD,
            f"there is no TierPool {terms.name} in this namespace, so the tier scales on its own: create it with"
            f" servedModelName {served}, or remove sharedPool",
            blocking=False,
            reason="TierPoolMissing",
        )
    if served != pool.spec.served_model_name:
        return Problem(
            _FIELD,
            f"it neither lends nor borrows, because its engines answer to {served} and those of TierPool {terms.name} to"
            f" {pool.spec.served_model_name}: set model.servedName to that (engines are replaced once), or remove"
            " sharedPool",
            blocking=False,
            reason="ServedNameDiffers",
        )
    return None


def _traits(spec: ServingTierSpec) -> Traits:
    """Return everything by which one engine could not take another's requests; batch and step budget are no part."""
    asked = pools_asked(spec)[0].spec
    return tuple(
        _named(spec, asked.engine, asked.hardware.accelerators or (), asked.hardware.tensor_parallel)
    )


def _named(
    spec: ServingTierSpec, engine: EngineSpec, accelerators: Sequence[str], tensor_parallel: int | None
) -> Iterator[tuple[str, str]]:
    source = spec.model.source
    yield "model.name", spec.model.name
    yield "model.revision", spec.model.revision or ""
    yield "model.trustRemoteCode", str(spec.model.trust_remote_code).lower()
    claim, image = source.persistent_volume_claim, source.image
    yield (
        "model.source",
        f"claim {claim.claim_name}/{claim.path}"
        if claim
        else f"image {image.reference}"
        if image
        else "huggingFace",
    )
    yield "pool.hardware.accelerators", ", ".join(accelerators)
    yield "pool.hardware.tensorParallel", str(tensor_parallel or "")
    yield "pool.engine.image", engine.image or ""
    yield "pool.engine.version", engine.version or ""
    yield "pool.engine.maxModelLen", str(engine.max_model_len or "")
    quantization = engine.quantization.value if engine.quantization is not None else "None"
    yield "pool.engine.quantization", quantization
    yield "pool.engine.dtype", engine.dtype.value
    yield "pool.engine.kvCacheDtype", engine.kv_cache_dtype.value
