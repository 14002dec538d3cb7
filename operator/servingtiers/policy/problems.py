"""What is wrong with a tier that the API server cannot see. Every message states the mend."""

from __future__ import annotations

from collections.abc import Iterator

from servingtiers.api.spec import ServingTier, ServingTierSpec
from servingtiers.catalog.accelerators import Accelerator, accelerator, accelerators
from servingtiers.catalog.engine_flags import check_env, check_extra_args
from servingtiers.catalog.models import ModelShape, models
from servingtiers.catalog.names import CatalogError, UnknownNameError, near_names
from servingtiers.core.config import OperatorConfig
from servingtiers.core.decisions import PoolRole
from servingtiers.core.effective import PoolAsked, engine_image, engine_version, pools_asked
from servingtiers.core.findings import Problem
from servingtiers.policy import sizing

__all__ = ["LEAST_DISAGGREGATION_VERSION", "Problem", "find"]

LEAST_DISAGGREGATION_VERSION = (0, 30)
"""Older vLLM can be crashed from outside through ``kv_transfer_params`` in a request body."""


def find(tier: ServingTier, config: OperatorConfig) -> tuple[Problem, ...]:
    """Return everything wrong with a tier, in the order of its fields; empty when all is well.

    A problem that is not ``blocking`` leaves the tier accepted: something about it cannot be known.
    """
    spec = tier.spec
    problems: list[Problem] = []
    shape = sizing.shape_of(spec.model.name)
    problems.extend(_model(spec, config, shape))
    problems.extend(_not_yet(spec))
    for pool in pools_asked(spec):
        problems.extend(_hardware(spec, config, pool, shape))
        problems.extend(_engine(spec, config, pool, shape))
    problems.extend(_shards(spec, config, shape))
    return tuple(problems)


def _shards(spec: ServingTierSpec, config: OperatorConfig, shape: ModelShape | None) -> Iterator[Problem]:
    """Find a decode pool with fewer shards than any prefill pool can have; CEL sees it only where both are given."""
    if spec.disaggregation is None or shape is None:
        return
    prefill, decode = spec.disaggregation.prefill, spec.disaggregation.decode.hardware.tensor_parallel
    if decode is None or prefill.hardware.tensor_parallel is not None:
        return
    bound = sizing.bound(config)
    names = prefill.hardware.accelerators or tuple(bound)
    fits = [
        size
        for found in accelerators()
        if found.key in bound and (found.key in names or any(alias in names for alias in found.aliases))
        if (size := sizing.smallest_fit(spec, prefill.engine, shape, found)) is not None
    ]
    if fits and min(fits) > decode:
        yield Problem(
            "spec.disaggregation.decode.hardware.tensorParallel",
            f"{decode} is below the {min(fits)} that prefill needs, and NIXL cannot gather KV heads: raise it to"
            f" {min(fits)}, or allow prefill a larger accelerator",
            reason="TensorParallelImpossible",
        )


def _not_yet(spec: ServingTierSpec) -> Iterator[Problem]:
    """Yield what the API takes and this version does not act on: it is said, not silently ignored."""
    if spec.disaggregation is not None and spec.disaggregation.elastic_roles:
        yield Problem(
            "spec.disaggregation.elasticRoles",
            "this version does not change roles yet: engines are rendered for it and keep theirs",
            blocking=False,
            reason="ElasticRolesInactive",
        )


def _model(spec: ServingTierSpec, config: OperatorConfig, shape: ModelShape | None) -> Iterator[Problem]:
    if spec.model.trust_remote_code and not config.allow_remote_code:
        yield Problem(
            "spec.model.trustRemoteCode",
            "code of model repositories is not permitted here: remove trustRemoteCode, or ask the administrator to"
            " set allowRemoteCode in the operator's configuration",
            reason="RemoteCodeNotPermitted",
        )
    if shape is None:
        near = near_names(spec.model.name, (known.name for known in models()))
        hint = f" (near names: {', '.join(near)})" if near else ""
        open_fields = [
            name
            for name, given in (
                ("hardware.accelerators", all(p.spec.hardware.accelerators for p in pools_asked(spec))),
                ("hardware.tensorParallel", all(p.spec.hardware.tensor_parallel for p in pools_asked(spec))),
                ("engine.maxModelLen", all(p.spec.engine.max_model_len for p in pools_asked(spec))),
            )
            if not given
        ]
        mend = f"; set {', '.join(open_fields)} yourself" if open_fields else ""
        yield Problem(
            "spec.model.name",
            f"{spec.model.name} is not in the catalogue{hint}: whether it fits and meets its SLO is not known{mend}",
            blocking=False,
            reason="ModelUnknown",
        )


def _hardware(
    spec: ServingTierSpec, config: OperatorConfig, pool: PoolAsked, shape: ModelShape | None
) -> Iterator[Problem]:
    path = f"{pool.path}.hardware"
    bound = sizing.bound(config)
    if not bound:
        yield Problem(
            f"{path}.accelerators",
            "no accelerator is bound to this cluster: ask the administrator to bind one under accelerators in the"
            " operator's configuration",
            reason="NoAcceleratorBound",
        )
        return
    usable: list[Accelerator] = []
    rejected = False
    for name in pool.spec.hardware.accelerators or ():
        try:
            found = accelerator(name)
        except UnknownNameError as error:
            near = f"; near names: {', '.join(error.near)}" if error.near else ""
            yield Problem(
                f"{path}.accelerators",
                f"unknown accelerator {name!r}{near}; bound here: {', '.join(bound)}",
                reason="AcceleratorUnknown",
            )
            rejected = True
            continue
        if found.key not in bound:
            yield Problem(
                f"{path}.accelerators",
                f"accelerator {found.key} is not bound to this cluster: use one of {', '.join(bound)}, or ask the"
                " administrator to bind it in the operator's configuration",
                reason="AcceleratorNotBound",
            )
            rejected = True
            continue
        usable.append(found)
    if rejected:
        return
    if not pool.spec.hardware.accelerators:
        usable = [found for found in accelerators() if found.key in bound]
    if shape is not None and usable:
        yield from _fit(spec, pool, shape, usable)


def _fit(
    spec: ServingTierSpec, pool: PoolAsked, shape: ModelShape, usable: list[Accelerator]
) -> Iterator[Problem]:
    given = pool.spec.hardware.tensor_parallel
    path = f"{pool.path}.hardware.tensorParallel"
    if given is not None:
        if shape.heads % given or (shape.kv_heads % given and given % shape.kv_heads):
            sizes = sorted({size for found in usable for size in sizing.parallelisms(shape, found)})
            yield Problem(
                path,
                f"{given} does not split the {shape.heads} attention heads and {shape.kv_heads} KV heads of"
                f" {shape.name} evenly: use one of {', '.join(map(str, sizes))}",
                reason="TensorParallelImpossible",
            )
            return
        if all(given > found.gpus_per_node for found in usable):
            most = max(found.gpus_per_node for found in usable)
            yield Problem(
                path,
                f"{given} exceeds the {most} accelerators of one node: use {most} or fewer",
                reason="TensorParallelImpossible",
            )
            return
    engine = pool.spec.engine
    needed = sizing.tokens_needed(spec, engine, shape)
    for found in usable:
        weights = sizing.weights_of(spec, engine, found).weights
        smallest = sizing.smallest_fit(spec, engine, shape, found)
        if given is None and smallest is not None:
            return
        if given is not None and sizing.room(shape, found, given, weights, engine) >= needed:
            return
    fits = [
        f"{found.key} with tensorParallel {size}"
        for found in usable
        if (size := sizing.smallest_fit(spec, engine, shape, found)) is not None
    ]
    weights = sizing.weights_of(spec, engine, usable[0]).weights
    where = ", ".join(found.key for found in usable)
    size_text = f" × {given}" if given is not None else " at any tensorParallel"
    mend = (
        f"it fits {', or '.join(fits)}"
        if fits
        else "quantize it, lower engine.maxModelLen or allow a larger accelerator"
    )
    yield Problem(
        path if given is not None else f"{pool.path}.hardware.accelerators",
        f"{shape.name} ({shape.weight_bytes(weights) / 1e9:.0f} GB of {weights} weights and a KV cache of {needed} tokens)"
        f" does not fit {where}{size_text}: {mend}",
        reason="DoesNotFit",
    )


def _engine(
    spec: ServingTierSpec, config: OperatorConfig, pool: PoolAsked, shape: ModelShape | None
) -> Iterator[Problem]:
    engine, path = pool.spec.engine, f"{pool.path}.engine"
    version = engine_version(engine, config)
    if version is None:
        yield Problem(
            f"{path}.version",
            f"the vLLM version of image {engine_image(engine, config)} cannot be read from its tag: set engine.version",
            reason="VersionUnknown",
        )
    else:
        yield from _version(pool, version)
    for message in check_env(engine.env or {}):
        yield Problem(path, message, reason="NotAllowed")
    if shape is not None and engine.max_model_len is not None and engine.max_model_len > shape.max_context:
        yield Problem(
            f"{path}.maxModelLen",
            f"{engine.max_model_len} exceeds the {shape.max_context} tokens {shape.name} was made for: lower it",
            reason="TooLong",
        )
    asked = sizing.lengths(spec)
    longest = asked.prompt + asked.output
    limit = engine.max_model_len or (shape.max_context if shape else None)
    if limit is not None and asked.given and longest > limit:
        yield Problem(
            "spec.workload",
            f"a mean request of {longest:.0f} tokens exceeds the longest one accepted, {limit}: shorten"
            " workload.promptTokens or outputTokens, or raise engine.maxModelLen",
            reason="TooLong",
        )
    if (
        engine.max_num_batched_tokens is not None
        and engine.max_num_seqs is not None
        and engine.max_num_batched_tokens < engine.max_num_seqs
    ):
        yield Problem(
            f"{path}.maxNumBatchedTokens",
            f"{engine.max_num_batched_tokens} is below maxNumSeqs {engine.max_num_seqs}, and every running sequence"
            " takes one token of a step: raise it or lower maxNumSeqs",
            reason="BudgetTooSmall",
        )


def _version(pool: PoolAsked, version: str) -> Iterator[Problem]:
    """Check what depends on the engine's version: its flags and its known holes."""
    path = f"{pool.path}.engine"
    number = tuple(int(part) for part in version.split(".")[:2])
    if pool.role is not PoolRole.AGGREGATED and number < LEAST_DISAGGREGATION_VERSION:
        yield Problem(
            f"{path}.image",
            f"vLLM {version} can be crashed through kv_transfer_params of a request when prefill and decode are"
            " separate: upgrade the image to 0.30 or newer, or use spec.pool",
            reason="VersionVulnerable",
        )
    try:
        wrong = check_extra_args(version, pool.spec.engine.extra_args or {})
    except CatalogError as error:
        yield Problem(f"{path}.version", str(error), reason="VersionUnsupported")
        return
    for message in wrong:
        yield Problem(path, message, reason="NotAllowed")
