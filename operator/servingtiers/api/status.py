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
    "ShortText",
    "StatusPart",
    "ThroughputStatus",
    "Time",
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


class StatusPart(Model):
    """A part of the status. An older operator ignores what a newer one wrote, also below the top."""

    model_config = {"extra": "ignore"}


class Condition(StatusPart):
    """One condition, as in Kubernetes' metav1.Condition."""

    type: Annotated[str, Field(max_length=64)]
    """Name of the condition."""
    status: Literal["True", "False", "Unknown"]
    """True, False or Unknown."""
    reason: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=128)]
    """One word for programs."""
    message: Text = ""
    """One sentence for people; says the mend where something is wrong."""
    last_transition_time: Time
    """When `status` last changed."""
    observed_generation: int = 0
    """Generation of the spec that the condition is about."""


class EffectivePool(StatusPart):
    """The settings a pool runs with, each with the reason it was chosen."""

    name: ShortText
    """Name of the pool."""
    accelerator: ShortText
    """Catalogue key of the accelerator."""
    tensor_parallel: int
    """Accelerators per replica."""
    weights: ShortText
    """Data type of the weights as served."""
    max_num_seqs: int
    """Largest batch (sequences in flight per replica)."""
    max_num_batched_tokens: int | None = None
    """Token budget of one engine step."""
    max_model_len: int | None = None
    """Longest prompt plus output, tokens."""
    performance_mode: ShortText | None = None
    """vLLM's `--performance-mode`."""
    gpu_memory_utilization_percent: int | None = None
    """Share of the accelerator's memory that vLLM may use."""
    speculative: ShortText | None = None
    """Speculative decoding in use."""
    image: Annotated[str, Field(max_length=512)]
    """Engine image."""
    engine_version: ShortText | None = None
    """vLLM version inside the image."""
    reasons: Annotated[dict[str, Text], Field(max_length=32)] = {}
    """Field name to the reason for its value."""


class EffectiveStatus(StatusPart):
    """What presets and planner filled in."""

    slo: Annotated[dict[str, ShortText], Field(max_length=20)] = {}
    """Objectives in force, such as `ttft.p99: 500ms`."""
    slo_reason: Text = ""
    """Where the objectives come from."""
    pools: Annotated[
        list[EffectivePool],
        Field(
            max_length=4,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = []
    """Settings of each pool."""


class PlanStatus(StatusPart):
    """What the performance model says of one replica of the tier."""

    requests_per_second_per_replica: Number | None = None
    """What one replica carries within the objectives, requests per second."""
    replicas_for_workload: int | None = None
    """Replicas that `spec.workload` needs."""
    band_percent: int | None = None
    """Error band of the prediction, ± percent."""
    source: Text | None = None
    """Where the step times come from."""
    binding: Text | None = None
    """The limit that set the numbers."""


class ScaleTargetRef(StatusPart):
    """What an HPA may target in External mode."""

    api_version: ShortText
    """API version of the target."""
    kind: ShortText
    """Kind of the target."""
    name: ShortText
    """Name of the target."""


class PoolMemory(StatusPart):
    """What scaling must remember; kept here so that a restart changes nothing."""

    low_since: Time | None = None
    """Since when fewer replicas than now would have sufficed, on complete data."""
    low_peak: int | None = None
    """Most replicas needed since then."""
    last_scale_up: Time | None = None
    """When replicas were last added."""
    last_scale_down: Time | None = None
    """When replicas were last removed."""
    given_up_from: int | None = None
    """Replicas before the latest scale-down began."""
    given_up_to: int | None = None
    """Replicas after it."""
    kept: int | None = None
    """Replicas that were taken back soon after they had been given up."""
    regrets: int | None = None
    """How often that happened lately, twice as often where the load swings widely."""
    regretted_at: Time | None = None
    """When the last of them was taken back."""
    idle_since: Time | None = None
    """Since when no request has come, proved."""
    spare_since: Time | None = None
    """Since when fewer borrowed engines would have sufficed, on complete data."""
    spare_peak: int | None = None
    """Most engines needed since then."""
    startup_seconds: Annotated[
        list[int], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = []
    """Latest start-up times of engines, newest last."""
    learned_of: ShortText | None = None
    """Of which engines and objectives, as a hash; what was learned of others is forgotten."""
    learned_at: Time | None = None
    """When traffic last taught something of what follows."""
    work_micros: int | None = None
    """Engine time a request costs at the objectives by the performance model, microseconds, at the lengths of late."""
    slowness_permille: int | None = None
    """Time that engines take over what the performance model says, in thousandths."""
    headroom_micros: int | None = None
    """What the error budget multiplies the need by, in millionths."""
    asked: int | None = None
    """Requests of the last hour or so; what is old counts less."""
    missed_milli: int | None = None
    """Those of them that missed an objective, in thousandths of a request."""
    load_peaks: Annotated[
        list[int], Field(max_length=120, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = []
    """Peaks of the load per half minute of the last hour, hundredths of a replica, newest last; -1: not known."""
    load_bucket: int | None = None
    """Which half minute the newest is, counted from 1970."""


class PoolStatus(StatusPart):
    """One pool."""

    name: ShortText
    """Name of the pool."""
    role: Literal["Aggregated", "Prefill", "Decode"]
    """What the pool does."""
    replicas: int = 0
    """Replicas asked of Kubernetes."""
    ready: int = 0
    """Replicas that can serve."""
    desired: int = 0
    """Replicas that the latest decision wants."""
    lent: int | None = None
    """Ready replicas that do not serve this tier: lent to others, or on their way. Set in a TierPool."""
    borrowed: int | None = None
    """Engines of other tiers that serve this one. Set in a TierPool."""
    recommended: int | None = None
    """What would be set if the mode were Auto."""
    scale_target_ref: ScaleTargetRef | None = None
    """What an HPA may target in External mode."""
    signals: Annotated[dict[str, ShortText], Field(max_length=16)] = {}
    """Rounded inputs of the latest decision, or why they are unknown."""
    memory: PoolMemory | None = None
    """What the operator must remember across a restart."""


class HourCount(StatusPart):
    """Requests of one hour, for attainment over the window; hours older than three days are folded into days."""

    hour: Time
    """Start of the hour."""
    total: int
    """Requests."""
    good: int
    """Requests that were certainly within the target."""
    good_most: int | None = None
    """Most requests that can have been within the target: more than `good` where the target is no bucket edge."""


class ObjectiveStatus(StatusPart):
    """How one objective fares."""

    objective: ShortText
    """Name of the objective, such as `ttft.p99`."""
    target: ShortText
    """Its target."""
    observed: ShortText | None = None
    """Latest value, or an interval where buckets allow no more."""
    attainment_percent: Number | None = None
    """Requests within the target over the window, percent."""
    error_budget_left_percent: Number | None = None
    """Share of the allowed misses that is left, percent."""
    resolution: Text | None = None
    """What limits the precision."""
    hours: Annotated[
        list[HourCount],
        Field(
            max_length=160,
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ] = []
    """Hourly counters of the window, newest last. Atomic: as a keyed list each hour would be named in managedFields."""


class ThroughputStatus(StatusPart):
    """Traffic, rounded."""

    requests_per_second: Number | None = None
    """Requests per second."""
    prompt_tokens_per_second: Number | None = None
    """Prompt tokens per second."""
    output_tokens_per_second: Number | None = None
    """Output tokens per second."""


class CostStatus(StatusPart):
    """What the tier costs."""

    window: ShortText = "1h"
    """What the numbers are averaged over."""
    per_hour: Number | None = None
    """Cost of the tier's accelerators per hour."""
    idle_per_hour: Number | None = None
    """The part of it that no request used."""
    per_million_output_tokens: Number | None = None
    """Cost of a million output tokens."""
    currency: Annotated[str, Field(max_length=8)] = "USD"
    """Currency code."""
    price_source: ShortText = ""
    """Where the prices come from."""


class DecisionRecord(StatusPart):
    """One decision of the autoscaler and its reason."""

    time: Time
    """When it was decided."""
    pool: ShortText
    """Pool it is about."""
    from_replicas: Annotated[int, Field(alias="from")]
    """Replicas before."""
    to_replicas: Annotated[int, Field(alias="to")]
    """Replicas decided."""
    engine: ShortText | None = None
    """Pod of the engine that moved between tiers; `from` and `to` are then the engines that serve this one. Not set: the
    pool's own replicas."""
    reason: Text
    """Why, in one sentence."""
    binding: ShortText
    """The limit that set the number."""
    would_change: Text = ""
    """What would change the decision."""
    acted: bool = True
    """False in Recommend and External mode and while suspended."""


class ServingTierStatus(StatusPart):
    """What the operator reports."""

    observed_generation: int | None = None
    """Generation of the spec that this status is about."""
    conditions: Annotated[
        list[Condition],
        Field(
            max_length=16,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
        ),
    ] = []
    """Conditions, all of them every pass."""
    endpoint: Annotated[str, Field(max_length=512)] | None = None
    """Address of the tier inside the cluster."""
    replicas: ShortText | None = None
    """Ready and desired replicas of all pools, for people."""
    effective: EffectiveStatus | None = None
    """What presets and planner filled in."""
    plan: PlanStatus | None = None
    """What the performance model says."""
    pools: Annotated[
        list[PoolStatus],
        Field(
            max_length=4,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = []
    """Pools."""
    slo: Annotated[
        list[ObjectiveStatus],
        Field(
            max_length=20,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["objective"]},
        ),
    ] = []
    """Objectives."""
    throughput: ThroughputStatus | None = None
    """Traffic, rounded."""
    cost: CostStatus | None = None
    """What the tier costs."""
    decisions: Annotated[
        list[DecisionRecord], Field(max_length=20, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = []
    """Newest first, at most 20."""
