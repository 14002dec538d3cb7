"""What the operator reports: the ``status`` of a ServingTier.

It is written on a decision, a condition change or a rounded change; live values go to ``/metrics``.
What a restarted operator needs to go on as if nothing had happened is here too (``pools[].memory``, ``slo[].hours``).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from servingtiers.api.base import Model

__all__ = [
    "Condition",
    "ConditionType",
    "CostStatus",
    "DecisionRecord",
    "EffectivePool",
    "HourCount",
    "ObjectiveStatus",
    "PlanStatus",
    "PoolMemory",
    "PoolStatus",
    "ScaleTargetRef",
    "ServingTierStatus",
    "ThroughputStatus",
]

Text = Annotated[str, Field(max_length=1024)]
ShortText = Annotated[str, Field(max_length=256)]
Number = Annotated[str, Field(max_length=32)]
Time = Annotated[str, Field(max_length=32, json_schema_extra={"format": "date-time"})]

ConditionType = Literal[
    "Accepted",
    "Feasible",
    "Ready",
    "SLOMet",
    "ScalingActive",
    "Reconciling",
    "Stalled",
    "ScalingLimited",
    "Conflict",
    "PlanOutdated",
]


class Condition(Model):
    """One condition, as in Kubernetes' metav1.Condition."""

    type: Annotated[str, Field(max_length=64)]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=128)]
    message: Text = ""
    last_transition_time: Time
    observed_generation: int = 0


class EffectivePool(Model):
    """The settings a pool runs with, each with the reason it was chosen."""

    name: ShortText
    accelerator: ShortText
    tensor_parallel: int
    weights: ShortText
    max_num_seqs: int
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    performance_mode: ShortText | None = None
    speculative: ShortText | None = None
    image: Annotated[str, Field(max_length=512)]
    engine_version: ShortText | None = None
    reasons: Annotated[dict[str, Text], Field(max_length=32)] = {}
    """Field name to the reason for its value."""


class EffectiveStatus(Model):
    """What presets and planner filled in."""

    slo: Annotated[dict[str, ShortText], Field(max_length=20)] = {}
    """Objectives in force, such as `ttft.p99: 500ms`."""
    slo_reason: Text = ""
    pools: Annotated[
        list[EffectivePool],
        Field(
            max_length=4,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = []


class PlanStatus(Model):
    """What the performance model says of one replica of the tier."""

    requests_per_second_per_replica: Number | None = None
    replicas_for_workload: int | None = None
    band_percent: int | None = None
    source: Text | None = None
    binding: Text | None = None


class ScaleTargetRef(Model):
    """What an HPA may target in External mode."""

    api_version: ShortText
    kind: ShortText
    name: ShortText


class PoolMemory(Model):
    """What scaling must remember; kept here so that a restart changes nothing."""

    low_since: Time | None = None
    """Since when fewer replicas than now would have sufficed, on complete data."""
    low_peak: int | None = None
    """Most replicas needed since then."""
    last_scale_up: Time | None = None
    last_scale_down: Time | None = None
    idle_since: Time | None = None
    """Since when no request has come, proved."""
    startup_seconds: Annotated[list[int], Field(max_length=16)] = []
    """Latest start-up times of engines, newest last."""


class PoolStatus(Model):
    """One pool."""

    name: ShortText
    role: Literal["Aggregated", "Prefill", "Decode"]
    replicas: int = 0
    ready: int = 0
    desired: int = 0
    recommended: int | None = None
    """What would be set if the mode were Auto."""
    scale_target_ref: ScaleTargetRef | None = None
    signals: Annotated[dict[str, ShortText], Field(max_length=16)] = {}
    """Rounded inputs of the latest decision, or why they are unknown."""
    memory: PoolMemory | None = None


class HourCount(Model):
    """Requests of one hour, for attainment over the window; hours older than three days are folded into days."""

    hour: Time
    total: int
    good: int


class ObjectiveStatus(Model):
    """How one objective fares."""

    objective: ShortText
    target: ShortText
    observed: ShortText | None = None
    """Latest value, or an interval where buckets allow no more."""
    attainment_percent: Number | None = None
    error_budget_left_percent: Number | None = None
    resolution: Text | None = None
    """What limits the precision."""
    hours: Annotated[
        list[HourCount],
        Field(
            max_length=160,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["hour"]},
        ),
    ] = []


class ThroughputStatus(Model):
    """Traffic, rounded."""

    requests_per_second: Number | None = None
    prompt_tokens_per_second: Number | None = None
    output_tokens_per_second: Number | None = None


class CostStatus(Model):
    """What the tier costs."""

    window: ShortText = "1h"
    per_hour: Number | None = None
    idle_per_hour: Number | None = None
    per_million_output_tokens: Number | None = None
    currency: Annotated[str, Field(max_length=8)] = "USD"
    price_source: ShortText = ""


class DecisionRecord(Model):
    """One decision of the autoscaler and its reason."""

    time: Time
    pool: ShortText
    from_replicas: Annotated[int, Field(alias="from")]
    to_replicas: Annotated[int, Field(alias="to")]
    reason: Text
    binding: ShortText
    would_change: Text = ""
    acted: bool = True
    """False in Recommend and External mode and while suspended."""


class ServingTierStatus(Model):
    """What the operator reports."""

    observed_generation: int | None = None
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = []
    endpoint: Annotated[str, Field(max_length=512)] | None = None
    """Address of the tier inside the cluster."""
    replicas: ShortText | None = None
    """Ready and desired replicas of all pools, for people."""
    effective: EffectiveStatus | None = None
    plan: PlanStatus | None = None
    pools: Annotated[
        list[PoolStatus],
        Field(
            max_length=4,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = []
    slo: Annotated[
        list[ObjectiveStatus],
        Field(
            max_length=20,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["objective"]},
        ),
    ] = []
    throughput: ThroughputStatus | None = None
    cost: CostStatus | None = None
    decisions: Annotated[
        list[DecisionRecord], Field(max_length=20, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = []
    """Newest first, at most 20."""

    model_config = {"extra": "ignore"}
