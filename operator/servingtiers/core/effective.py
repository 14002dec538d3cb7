"""The settings a pool really runs with, after presets and planner, each with its reason."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from servingtiers.api.spec import EngineSpec, PoolSpec, ServingTierSpec
from servingtiers.core.config import AcceleratorBinding, OperatorConfig
from servingtiers.core.decisions import PoolRole

__all__ = ["PoolAsked", "PoolSettings", "TierSettings", "engine_image", "engine_version", "pools_asked"]

_TAG_VERSION = re.compile(r":v?([0-9]+\.[0-9]+(?:\.[0-9]+)?)")


@dataclass(frozen=True, slots=True)
class PoolAsked:
    """One pool as the user wrote it, or left it out."""

    name: str
    """`pool`, `prefill` or `decode`."""
    role: PoolRole
    path: str
    """Where it stands in the resource, such as `spec.disaggregation.prefill`."""
    spec: PoolSpec


def pools_asked(spec: ServingTierSpec) -> tuple[PoolAsked, ...]:
    """Return the pools of a tier; one aggregated pool of defaults where none is written."""
    if spec.disaggregation is not None:
        parts = spec.disaggregation
        return (
            PoolAsked("prefill", PoolRole.PREFILL, "spec.disaggregation.prefill", parts.prefill),
            PoolAsked("decode", PoolRole.DECODE, "spec.disaggregation.decode", parts.decode),
        )
    return (PoolAsked("pool", PoolRole.AGGREGATED, "spec.pool", spec.pool or PoolSpec()),)


def engine_image(engine: EngineSpec, config: OperatorConfig) -> str:
    """Return the vLLM image of a pool."""
    return engine.image or config.images.engine


def engine_version(engine: EngineSpec, config: OperatorConfig) -> str | None:
    """Return the vLLM version of a pool such as `0.32.0`: as given, or from the image's tag; None: not to be told."""
    if engine.version is not None:
        return engine.version
    name = engine_image(engine, config).split("@", 1)[0].rsplit("/", 1)[-1]
    found = _TAG_VERSION.search(name)
    return found.group(1) if found else None


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """One pool, everything chosen; ``render`` turns it into engine flags and pods."""

    name: str
    """`pool`, `prefill` or `decode`."""
    role: PoolRole
    accelerator: str
    """Catalogue key."""
    binding: AcceleratorBinding
    tensor_parallel: int
    image: str
    engine_version: str
    """vLLM version such as `0.32.0`; decides which flags exist."""
    weights: str
    """`bf16`, `fp8`, `int8` or `int4`: what the performance model assumes."""
    quantization: str | None
    """Value of `--quantization`; None leaves the flag out (the checkpoint says it)."""
    dtype: str | None
    kv_cache_dtype: str | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    max_model_len: int | None
    performance_mode: str | None
    """Value of `--performance-mode`."""
    attention_backend: str | None
    speculative: dict[str, str | int] | None
    """Value of `--speculative-config`, a JSON object."""
    priority_scheduling: bool
    max_queued_requests: int | None
    gpu_memory_utilization: float | None
    extra_args: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """API field name (camelCase) to the reason for its value."""


@dataclass(frozen=True, slots=True)
class TierSettings:
    """All pools of a tier and its router."""

    served_name: str
    pools: tuple[PoolSettings, ...]
    router_image: str
    router_policy: str
    router_policy_reason: str
    request_timeout_seconds: float
    request_timeout_reason: str
    drain_seconds: float
