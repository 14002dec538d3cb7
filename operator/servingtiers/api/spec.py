"""What a user asks for: the ``spec`` of a ServingTier.

Presets of a tier fill what is left open; they are shown with their reasons in ``status.effective`` and are never
written as API-server defaults. Only defaults that hold for every tier and for ever are part of the schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool
from pydantic.config import JsonDict

from servingtiers.api.base import (
    DURATION_PATTERN,
    DecimalString,
    Duration,
    Key,
    Model,
    Name,
    Quantity,
    cel,
    duration_rule,
    key_rule,
)
from servingtiers.api.status import ServingTierStatus

__all__ = [
    "Disaggregation",
    "EngineSpec",
    "HardwareSpec",
    "LatencyTargets",
    "ModelSpec",
    "PodOptions",
    "PoolScaling",
    "PoolSpec",
    "Quantization",
    "RouterSpec",
    "ScalingMode",
    "ServingTier",
    "ServingTierSpec",
    "SharedPoolRef",
    "SloSpec",
    "Tier",
    "WorkloadSpec",
]


class Tier(StrEnum):
    """Which end of the latency–throughput trade-off the tier serves."""

    LATENCY = "Latency"
    BALANCED = "Balanced"
    THROUGHPUT = "Throughput"


class ScalingMode(StrEnum):
    """Who sets the replicas."""

    AUTO = "Auto"
    RECOMMEND = "Recommend"
    EXTERNAL = "External"


class OnShortage(StrEnum):
    """What to do when the chosen accelerator cannot be scheduled."""

    WAIT = "Wait"
    NEXT_CHEAPEST = "NextCheapest"


class Quantization(StrEnum):
    """Weight quantization of the engine."""

    AUTO = "Auto"
    NONE = "None"
    FP8 = "FP8"
    INT8 = "INT8"
    INT4 = "INT4"


class Dtype(StrEnum):
    """Data type of weights and activations that are not quantized."""

    AUTO = "Auto"
    BFLOAT16 = "BFloat16"
    FLOAT16 = "Float16"
    FLOAT32 = "Float32"


class KvCacheDtype(StrEnum):
    """Data type of the KV cache."""

    AUTO = "Auto"
    FP8 = "FP8"


class AttentionBackend(StrEnum):
    """Attention kernels of the engine; open: the engine's own choice for the accelerator."""

    FLASH_ATTENTION = "FlashAttention"
    FLASH_INFER = "FlashInfer"
    TRITON = "Triton"


class SpeculativeMethod(StrEnum):
    """How draft tokens are proposed."""

    NGRAM = "Ngram"
    DRAFT_MODEL = "DraftModel"
    EAGLE = "Eagle"
    EAGLE3 = "Eagle3"


class RouterPolicy(StrEnum):
    """How the router spreads requests over engines; the values are vllm-router's own."""

    RANDOM = "random"
    ROUND_ROBIN = "round_robin"
    CACHE_AWARE = "cache_aware"
    POWER_OF_TWO = "power_of_two"
    CONSISTENT_HASH = "consistent_hash"


class SecretKeyRef(Model):
    """One key of a Secret in the tier's namespace."""

    name: Name
    """Name of the Secret."""
    key: Key = "token"
    """Key inside the Secret."""

    model_config = {"json_schema_extra": {"x-kubernetes-map-type": "atomic"}}


class HuggingFaceSource(Model):
    """Download from the Hugging Face hub at start-up."""

    token_secret_ref: SecretKeyRef | None = None
    """Secret with the hub token, for gated models. It is mounted by reference and never read by the operator."""


class PersistentVolumeClaimSource(Model):
    """Read the model from a PersistentVolumeClaim."""

    claim_name: Name
    """Name of a claim in the tier's namespace; ReadOnlyMany or ReadWriteMany when there is more than one replica."""
    path: Annotated[
        str,
        Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]*)(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$", max_length=512),
    ] = "model"
    """Folder of the model inside the volume, relative and without `..`."""


class ImageSource(Model):
    """Mount an OCI image that holds the model (Kubernetes image volumes)."""

    reference: Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._:/@-]*$", min_length=3, max_length=512)]
    """Image reference, best by digest."""


class ModelSource(Model):
    """Where the weights come from; exactly one."""

    hugging_face: HuggingFaceSource | None = None
    persistent_volume_claim: PersistentVolumeClaimSource | None = None
    image: ImageSource | None = None

    model_config = {
        "json_schema_extra": {
            "x-kubernetes-validations": [
                cel(
                    "[has(self.huggingFace), has(self.persistentVolumeClaim), has(self.image)]"
                    ".filter(x, x).size() == 1",
                    "name exactly one source: huggingFace, persistentVolumeClaim or image",
                )
            ]
        }
    }


class CacheClaim(Model):
    """A claim in the tier's namespace."""

    claim_name: Name
    """Name of the claim; ReadWriteMany when there is more than one replica."""


class CacheVolume(Model):
    """A claim that keeps downloaded weights between restarts."""

    persistent_volume_claim: CacheClaim
    """The claim that holds the cache."""


class ModelSpec(Model):
    """The model to serve."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$",
            min_length=1,
            max_length=256,
        ),
    ]
    """Hugging Face id such as `meta-llama/Llama-3.1-8B-Instruct`; also how the model's shape is found."""
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=128)] | None = None
    """Commit, tag or branch of the model repository; a 40-hex commit when `trustRemoteCode` is true."""
    served_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$", max_length=128)] | None = (
        None
    )
    """Name that clients use in requests; `name` when left out."""
    trust_remote_code: StrictBool = False
    """Run Python code that the model repository ships. Needs a 40-hex `revision` and the operator's permission."""
    source: ModelSource = ModelSource(hugging_face=HuggingFaceSource())
    """Where the weights come from."""
    cache: CacheVolume | None = None
    """Keep downloaded weights on a claim; otherwise each pod downloads to its own scratch volume."""

    model_config = {
        "json_schema_extra": {
            "x-kubernetes-validations": [
                cel(
                    "!self.trustRemoteCode || (has(self.revision) && self.revision.matches('^[0-9a-f]{40}$'))",
                    "trustRemoteCode needs revision to be a 40-hex commit: pin the code that will run",
                    field_path=".revision",
                ),
                cel(
                    "!has(self.cache) || has(self.source.huggingFace)",
                    "cache is for source.huggingFace: remove cache, a claim or image is already local",
                    field_path=".cache",
                ),
            ]
        }
    }


class LatencyTargets(Model):
    """Latency that at most the named share of requests may exceed."""

    p50: Duration | None = None
    """50 % of requests may take longer than this."""
    p90: Duration | None = None
    """10 % of requests may take longer than this."""
    p95: Duration | None = None
    """5 % of requests may take longer than this."""
    p99: Duration | None = None
    """1 % of requests may take longer than this."""
    p999: Duration | None = None
    """0.1 % of requests may take longer than this."""

    model_config = {
        "json_schema_extra": {
            "minProperties": 1,
            "x-kubernetes-validations": [
                cel(
                    # What is no duration is refused by its own rule: here it must not become an evaluation error.
                    "["
                    + ", ".join(
                        f"has(self.{p}) && self.{p}.matches('{DURATION_PATTERN}') ? [duration(self.{p})] : []"
                        for p in ("p50", "p90", "p95", "p99", "p999")
                    )
                    + "].filter(x, x.size() > 0).map(x, x[0]).isSorted()",
                    "a higher percentile must not have a shorter target: order p50 <= p90 <= p95 <= p99 <= p999",
                )
            ],
        }
    }


class SloSpec(Model):
    """Service-level objectives: `ttft.p99: T` means at most 1 % of requests exceed T over the window."""

    window: Annotated[Duration, Field(json_schema_extra=duration_rule("1h", "720h"))] = "24h"
    """Attainment and error budget are over this window, 1h to 720h."""
    ttft: LatencyTargets | None = None
    """Time to first token."""
    tpot: LatencyTargets | None = None
    """Time per output token after the first, mean of one request."""
    itl: LatencyTargets | None = None
    """Inter-token latency, of single tokens: stricter than TPOT."""
    e2e: Annotated[LatencyTargets | None, Field(alias="e2e")] = None  # the generator of aliases says e2E
    """Whole request."""


class TokenLengths(Model):
    """Length of prompts or outputs, tokens."""

    mean: Annotated[int, Field(strict=True, ge=1, le=10_000_000)]
    """Mean length."""
    p95: Annotated[int, Field(strict=True, ge=1, le=10_000_000)] | None = None
    """95th percentile; taken as 2.5 × mean when left out."""

    model_config = {
        "json_schema_extra": {
            "x-kubernetes-validations": [
                cel(
                    "!has(self.p95) || self.p95 >= self.mean",
                    "p95 must not be below mean",
                    field_path=".p95",
                )
            ]
        }
    }


class WorkloadSpec(Model):
    """The traffic to plan for until live traffic is seen."""

    requests_per_second: DecimalString | None = None
    """Arrival rate, requests per second."""
    prompt_tokens: TokenLengths | None = None
    """Prompt lengths."""
    output_tokens: TokenLengths | None = None
    """Output lengths."""
    prefix_hit_percent: Annotated[int, Field(strict=True, ge=0, le=100)] = 0
    """Share of prompt tokens found in the prefix cache."""


class HardwareSpec(Model):
    """What the pool may run on."""

    accelerators: (
        Annotated[
            list[Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=63)]],
            Field(min_length=1, max_length=8, json_schema_extra={"x-kubernetes-list-type": "set"}),
        ]
        | None
    ) = None
    """Allowed accelerators by catalogue key, such as `h100-sxm-80gb`; the cheapest that can meet the SLO is chosen.
    Left out: every accelerator that the operator's configuration binds to this cluster."""
    tensor_parallel: Annotated[int, Field(strict=True, ge=1, le=64)] | None = None
    """Accelerators per replica. Left out: the smallest that fits (Latency: the cheapest that meets the SLO)."""
    on_shortage: OnShortage = OnShortage.WAIT
    """What to do when no engine of the pool has found a node for 10 minutes: wait on, or take the next cheapest of the
    allowed accelerators. While one engine serves or starts, the others wait; what serves is never moved back."""


class SpeculativeSpec(Model):
    """Speculative decoding."""

    method: SpeculativeMethod
    """How draft tokens are proposed."""
    num_speculative_tokens: Annotated[int, Field(strict=True, ge=1, le=16)] = 3
    """Draft tokens per step."""
    model: (
        Annotated[
            str,
            Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=256),
        ]
        | None
    ) = None
    """Draft model or head; needed by every method but Ngram."""

    model_config = {
        "json_schema_extra": {
            "x-kubernetes-validations": [
                cel(
                    "(self.method == 'Ngram') != has(self.model)",
                    "Ngram takes no model; DraftModel, Eagle and Eagle3 need one: set or remove model",
                    field_path=".model",
                )
            ]
        }
    }


_FLAG = r"^[a-z][a-z0-9-]*$"
_FLAG_VALUE = r"^([^\x00-\x1f\x7f-][^\x00-\x1f\x7f]*)?$"  # no leading dash: it would be read as a flag
_VARIABLE = r"^[A-Z][A-Z0-9_]*$"
_TEXT = r"^[^\x00-\x08\x0b-\x1f\x7f]*$"  # tabs and line ends are the only control characters


class EngineSpec(Model):
    """Settings of vLLM; what is left open is chosen for the tier and shown in `status.effective`."""

    quantization: Quantization | None = None
    """Weight quantization. Auto allows FP8 where accelerator and model can; left out: none."""
    dtype: Dtype = Dtype.AUTO
    """Data type of what is not quantized."""
    kv_cache_dtype: KvCacheDtype = KvCacheDtype.AUTO
    """Data type of the KV cache."""
    max_num_seqs: Annotated[int, Field(strict=True, ge=1, le=4096)] | None = None
    """Largest batch (sequences in flight per replica)."""
    max_num_batched_tokens: Annotated[int, Field(strict=True, ge=32, le=262_144)] | None = None
    """Token budget of one engine step."""
    max_model_len: Annotated[int, Field(strict=True, ge=16, le=10_000_000)] | None = None
    """Longest prompt plus output, tokens."""
    attention_backend: AttentionBackend | None = None
    """Attention kernels."""
    speculative: SpeculativeSpec | None = None
    """Speculative decoding."""
    priority_scheduling: StrictBool = False
    """Serve requests by their `priority` field, lower first. Needs a trusted gateway in front: clients set the field."""
    max_queued_requests: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] | None = None
    """Requests in flight per replica (waiting and running) beyond which the engine answers 503."""
    gpu_memory_utilization_percent: Annotated[int, Field(strict=True, ge=10, le=99)] | None = None
    """Share of accelerator memory that vLLM takes; 90 when left out."""
    image: (
        Annotated[str, Field(pattern=r"^[a-zA-Z0-9][A-Za-z0-9._:/@-]*$", min_length=3, max_length=512)] | None
    ) = None
    """vLLM image; the operator's default when left out."""
    version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+(\.[0-9]+)?$", max_length=16)] | None = None
    """vLLM version inside `image`, when it cannot be read from its tag."""
    extra_args: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=_FLAG, max_length=64)],
                Annotated[str, Field(pattern=_FLAG_VALUE, max_length=1024)],
            ],
            Field(
                max_length=32,
                json_schema_extra=key_rule(
                    _FLAG, 64, "write flags in lower case without their dashes, such as block-size"
                ),
            ),
        ]
        | None
    ) = None
    """Further vLLM flags without their dashes, such as `block-size: "32"`; an empty value is a switch. Only flags on
    the operator's allow-list for the engine's version are taken."""
    env: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=_VARIABLE, max_length=128)],
                Annotated[str, Field(pattern=_TEXT, max_length=1024)],
            ],
            Field(
                max_length=32,
                json_schema_extra=key_rule(
                    _VARIABLE, 128, "write variables in upper case, such as VLLM_LOGGING_LEVEL"
                ),
            ),
        ]
        | None
    ) = None
    """Environment of the engine; only names on the operator's allow-list are taken."""


class PoolScaling(Model):
    """Bounds and pace of a pool."""

    min_replicas: Annotated[int, Field(strict=True, ge=0, le=1000)] = 1
    """Fewest replicas; 0 allows scale to zero after `idleAfter`."""
    max_replicas: Annotated[int, Field(strict=True, ge=1, le=1000)] = 8
    """Most replicas."""
    max_waiting_per_replica: Annotated[int, Field(strict=True, ge=1, le=100_000)] | None = None
    """Waiting requests per replica that call for another replica."""
    idle_after: Annotated[Duration, Field(json_schema_extra=duration_rule("1s", "720h"))] | None = None
    """Scale to zero after this long without a request; needs `minReplicas: 0`."""
    scale_down_hold: Annotated[Duration, Field(json_schema_extra=duration_rule("1s", "24h"))] | None = None
    """How long less must suffice before replicas go; 1.25 × the median start-up within 60–300 s when left out."""

    model_config = {
        "json_schema_extra": {
            "x-kubernetes-validations": [
                cel(
                    "self.minReplicas <= self.maxReplicas",
                    "minReplicas must not exceed maxReplicas (8 when left out): raise maxReplicas or lower minReplicas",
                    field_path=".minReplicas",
                ),
                cel(
                    "!has(self.idleAfter) || self.minReplicas == 0",
                    "idleAfter needs minReplicas: 0; set it or remove idleAfter",
                    field_path=".idleAfter",
                ),
            ]
        }
    }


class PoolSpec(Model):
    """One pool of identical engines."""

    hardware: HardwareSpec = HardwareSpec()
    """What the pool may run on."""
    engine: EngineSpec = EngineSpec()
    """Settings of vLLM."""
    scaling: PoolScaling = PoolScaling()
    """Bounds and pace."""


class TransferSpec(Model):
    """How the KV cache goes from prefill to decode."""

    connector: Literal["Nixl"] = "Nixl"
    """KV connector of vLLM."""


class Disaggregation(Model):
    """Separate pools for prefill and decode (Splitwise, ISCA'24; DistServe, OSDI'24)."""

    prefill: PoolSpec
    """Engines that compute prompts; scaled on TTFT."""
    decode: PoolSpec
    """Engines that generate; scaled on TPOT."""
    transfer: TransferSpec = TransferSpec()
    """How the KV cache is moved."""
    elastic_roles: StrictBool = False
    """Experimental: let engines of equal hardware change their role by label."""

    model_config = {
        "json_schema_extra": {
            "x-kubernetes-validations": [
                cel(
                    "(self.prefill.scaling.minReplicas == 0) == (self.decode.scaling.minReplicas == 0)",
                    "prefill and decode go to zero together: set minReplicas: 0 in both or in neither",
                ),
                cel(
                    "!has(self.prefill.hardware.tensorParallel) || !has(self.decode.hardware.tensorParallel)"
                    " || self.decode.hardware.tensorParallel >= self.prefill.hardware.tensorParallel",
                    "decode.hardware.tensorParallel must not be below prefill's: NIXL cannot gather KV heads",
                ),
                cel(
                    "self.prefill.engine.kvCacheDtype == self.decode.engine.kvCacheDtype",
                    "prefill and decode must use the same engine.kvCacheDtype",
                ),
            ]
        }
    }


class ScalingSpec(Model):
    """Who sets the replicas of every pool."""

    mode: ScalingMode = ScalingMode.AUTO
    """Auto decides and acts; Recommend decides and shows; External leaves replicas to somebody else (an HPA, say)."""


class SharedPoolRef(Model):
    """Membership of a TierPool, whose members lend each other engines."""

    name: Name
    """Name of the TierPool in this namespace."""
    priority: Annotated[int, Field(strict=True, ge=0, le=1000)] = 100
    """Higher borrows from lower."""
    min_keep: Annotated[int, Field(strict=True, ge=0, le=1000)] = 1
    """Engines that are never lent."""
    max_borrowed: Annotated[int, Field(strict=True, ge=0, le=1000)] = 4
    """Most engines borrowed at a time."""


_RESOURCE = r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"
_RESOURCE_RULE = key_rule(_RESOURCE, 128, "write resources by their Kubernetes name, such as cpu or memory")
_ResourceName = Annotated[str, Field(pattern=_RESOURCE, max_length=128)]


class ResourceList(Model):
    """Requests and limits of a container; accelerators are added by the operator."""

    requests: (
        Annotated[dict[_ResourceName, Quantity], Field(max_length=16, json_schema_extra=_RESOURCE_RULE)]
        | None
    ) = None
    """What the scheduler reserves, such as `cpu: 4` and `memory: 32Gi`."""
    limits: (
        Annotated[dict[_ResourceName, Quantity], Field(max_length=16, json_schema_extra=_RESOURCE_RULE)]
        | None
    ) = None
    """What the container may not exceed."""

    model_config = {
        "json_schema_extra": {
            "x-kubernetes-validations": [
                cel(
                    "!has(self.requests) || !has(self.limits) || self.requests.all(k, !(k in self.limits)"
                    " || !isQuantity(string(self.requests[k])) || !isQuantity(string(self.limits[k]))"
                    " || !quantity(string(self.requests[k])).isGreaterThan(quantity(string(self.limits[k]))))",
                    "a request must not exceed its limit: raise the limit or lower the request",
                )
            ]
        }
    }


class RouterSpec(Model):
    """The tier's router; `{}` is the managed default (vllm-router)."""

    replicas: Annotated[int, Field(strict=True, ge=1, le=20)] = 2
    """Router replicas."""
    policy: RouterPolicy | None = None
    """How requests are spread; chosen for the tier when left out."""
    image: (
        Annotated[str, Field(pattern=r"^[a-zA-Z0-9][A-Za-z0-9._:/@-]*$", min_length=3, max_length=512)] | None
    ) = None
    """vllm-router image; the operator's default when left out."""
    request_timeout: Annotated[Duration, Field(json_schema_extra=duration_rule("1s", "24h"))] | None = None
    """Longest time one request may take; from the SLO when left out."""
    resources: ResourceList | None = None
    """Requests and limits of the router."""


_LABEL = r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$"
_LABEL_MEND = "write keys as name or prefix/name, such as example.com/team"
_RESERVED = r"(^|[.])(servingtiers[.]io|kubernetes[.]io|k8s[.]io|llm-d[.]ai)/"
_LabelKey = Annotated[str, Field(pattern=_LABEL, max_length=317)]
_LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$", max_length=63)]


def _own_keys(what: str) -> JsonDict:
    """Return the rules of a map of labels or annotations that the user may add."""
    reserved = cel(
        f"self.all(k, !k.matches('{_RESERVED}'))",
        f"{what} of servingtiers.io, kubernetes.io, k8s.io and llm-d.ai belong to their owners: remove them",
    )
    return key_rule(_LABEL, 317, _LABEL_MEND, reserved)


class Toleration(Model):
    """A toleration of the pods."""

    key: _LabelKey | None = None
    """Taint key; left out with `operator: Exists`: every taint."""
    operator: Literal["Exists", "Equal"] | None = None
    """Exists matches any value; Equal, also when left out, matches `value`."""
    value: _LabelValue | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; every effect when left out."""
    toleration_seconds: Annotated[int, Field(strict=True, ge=0, le=31_536_000)] | None = None
    """How long a NoExecute taint is tolerated; for ever when left out."""

    model_config = {
        "json_schema_extra": {
            "x-kubernetes-validations": [
                cel(
                    "has(self.key) || (has(self.operator) && self.operator == 'Exists')",
                    "a toleration without key needs operator: Exists",
                    field_path=".operator",
                ),
                cel(
                    "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
                    "operator: Exists takes no value: remove value, or use Equal",
                    field_path=".value",
                ),
                cel(
                    "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
                    "tolerationSeconds needs effect: NoExecute",
                    field_path=".tolerationSeconds",
                ),
            ]
        }
    }


class TopologySpread(Model):
    """Spread the pool's pods over a topology; the selector is the pool's own."""

    max_skew: Annotated[int, Field(strict=True, ge=1, le=1000)] = 1
    """Largest difference in pods between two places."""
    topology_key: _LabelKey
    """Node label that names the place, such as `topology.kubernetes.io/zone`."""
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "ScheduleAnyway"
    """What to do with a pod that would break the spread."""


class LocalObjectReference(Model):
    """The name of an object in the tier's namespace."""

    name: Name
    """Name of the object."""


class PodOptions(Model):
    """What may be added to engine pods. There is no free pod template."""

    labels: (
        Annotated[dict[_LabelKey, _LabelValue], Field(max_length=32, json_schema_extra=_own_keys("labels"))]
        | None
    ) = None
    """Labels; those of the operator, of Kubernetes and of llm-d cannot be set."""
    annotations: (
        Annotated[
            dict[_LabelKey, Annotated[str, Field(pattern=_TEXT, max_length=4096)]],
            Field(max_length=32, json_schema_extra=_own_keys("annotations")),
        ]
        | None
    ) = None
    """Annotations; those of the operator, of Kubernetes and of llm-d cannot be set."""
    resources: ResourceList | None = None
    """CPU and memory of the engine container."""
    node_selector: (
        Annotated[
            dict[_LabelKey, _LabelValue],
            Field(max_length=16, json_schema_extra=key_rule(_LABEL, 317, _LABEL_MEND)),
        ]
        | None
    ) = None
    """Node labels besides the accelerator's."""
    tolerations: (
        Annotated[
            list[Toleration], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})
        ]
        | None
    ) = None
    """Tolerations besides the accelerator's."""
    priority_class_name: Name | None = None
    """PriorityClass of the engine pods."""
    image_pull_secrets: (
        Annotated[
            list[LocalObjectReference],
            Field(
                max_length=8,
                json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
            ),
        ]
        | None
    ) = None
    """Secrets to pull images with."""
    topology_spread_constraints: (
        Annotated[
            list[TopologySpread],
            Field(
                max_length=4,
                json_schema_extra={
                    "x-kubernetes-list-type": "map",
                    "x-kubernetes-list-map-keys": ["topologyKey", "whenUnsatisfiable"],
                },
            ),
        ]
        | None
    ) = None
    """Spreading over zones or nodes."""


class ServingTierSpec(Model):
    """What the user asks for."""

    tier: Tier
    """Latency, Balanced or Throughput: sets what is left open below."""
    suspend: StrictBool = False
    """Observe and report, change nothing."""
    model: ModelSpec
    """The model to serve."""
    slo: SloSpec | None = None
    """Service-level objectives; the tier's own when left out."""
    workload: WorkloadSpec | None = None
    """The traffic to plan for until live traffic is seen."""
    pool: PoolSpec | None = None
    """The aggregated pool; excludes `disaggregation`."""
    disaggregation: Disaggregation | None = None
    """Separate prefill and decode pools; excludes `pool`."""
    scaling: ScalingSpec = ScalingSpec()
    """Who sets the replicas."""
    shared_pool: SharedPoolRef | None = None
    """Lend engines to, and borrow from, the other tiers of a TierPool."""
    router: RouterSpec = RouterSpec()
    """The tier's router."""
    pod: PodOptions | None = None
    """What is added to engine pods."""
    drain_timeout: Annotated[Duration, Field(json_schema_extra=duration_rule("1s", "1h"))] = "60s"
    """How long an engine may finish running requests when it is stopped, 1s to 1h."""

    model_config = {
        "json_schema_extra": {
            "x-kubernetes-validations": [
                cel(
                    "!(has(self.pool) && has(self.disaggregation))",
                    "pool and disaggregation exclude each other: remove one",
                ),
                cel(
                    "!has(self.sharedPool) || self.scaling.mode != 'External'",
                    "sharedPool needs the operator to scale: set scaling.mode to Auto or Recommend, or remove sharedPool",
                    field_path=".sharedPool",
                ),
                cel(
                    "!has(self.disaggregation) || !self.disaggregation.elasticRoles || self.scaling.mode != 'External'",
                    "elasticRoles needs the operator to scale: set scaling.mode to Auto or Recommend",
                ),
                cel(
                    "!has(self.disaggregation) || !has(self.sharedPool)",
                    "sharedPool is for tiers with an aggregated pool: remove sharedPool or disaggregation",
                ),
                cel(
                    "!has(self.sharedPool) || (has(self.pool) && has(self.pool.hardware.accelerators)"
                    " && size(self.pool.hardware.accelerators) == 1 && has(self.pool.hardware.tensorParallel)"
                    " && has(self.pool.engine.image) && has(self.pool.engine.maxModelLen)"
                    " && (!has(self.pool.engine.quantization) || self.pool.engine.quantization != 'Auto')"
                    " && (!has(self.model.source.huggingFace) || has(self.model.revision)))",
                    "engines of a TierPool serve in one another's place, so nothing that makes them differ may be left"
                    " to presets: give model.revision (of a huggingFace source), one pool.hardware.accelerators,"
                    " pool.hardware.tensorParallel, pool.engine.image and pool.engine.maxModelLen, and no"
                    " quantization: Auto",
                    field_path=".sharedPool",
                ),
            ]
        }
    }


class ObjectMeta(Model):
    """The metadata that the operator reads; what else the API server sends is ignored."""

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 0
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    deletion_timestamp: str | None = None

    model_config = {"extra": "ignore"}


class ServingTier(Model):
    """One tier of one model."""

    api_version: str
    kind: Literal["ServingTier"]
    metadata: ObjectMeta
    spec: ServingTierSpec
    status: ServingTierStatus | None = None

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Self:
        """Return the tier of an object as an API server or a file holds it.

        Only the names of the wire are taken (`drainTimeout`, never `drain_timeout`), as an API server does.

        Raises:
            pydantic.ValidationError: The object is no valid tier; CEL rules are not part of this.
        """
        return cls.model_validate(raw, by_alias=True, by_name=False)
