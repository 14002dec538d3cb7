"""Engine pods: the command line of vLLM and the pod around it.

The command is a list and never a shell line, so no value of a custom resource is ever interpreted. Flags are
written as ``--name=value``: a value can then not be read as another flag. Names are those of vLLM 0.32 and 0.33;
a test holds every one of them against the recorded ``vllm serve --help=all``.
"""

from __future__ import annotations

import json
import math

from servingtiers.api.spec import HuggingFaceSource, ServingTier
from servingtiers.catalog.engine_flags import render_extra_args
from servingtiers.core.config import OperatorConfig
from servingtiers.core.decisions import PoolRole
from servingtiers.core.effective import PoolSettings, TierSettings
from servingtiers.core.state import JsonObject
from servingtiers.render import names
from servingtiers.render.pods import (
    container_security,
    environment,
    from_pod_field,
    pod_security,
    tolerations,
)

__all__ = [
    "CONTAINER",
    "FIRST_COMPLETION",
    "KV_LEASE_SECONDS",
    "NIXL_PORT",
    "PORT",
    "UCX_PORTS",
    "engine_args",
    "grace_seconds",
    "needs_hub",
    "pod_template",
    "prestop_seconds",
]

CONTAINER = "engine"
PORT = 8000
"""Port of the OpenAI API, of ``/health`` and of ``/metrics``: vLLM serves all three on one."""
NIXL_PORT = 5600
"""NIXL side channel, where decode asks prefill for the addresses of KV blocks."""
UCX_PORTS = (20_000, 20_999)
"""TCP ports of the KV transfer itself, fixed so that a NetworkPolicy can name them; below Linux' ephemeral ports."""
KV_LEASE_SECONDS = 30
"""How long a prefill engine keeps KV blocks for decode to fetch (vLLM's default ``kv_lease_duration``)."""

STARTUP_SECONDS = 3600
"""A first start may download hundreds of gigabytes; the startup probe gives up after this long."""
_DEREGISTER_SECONDS = 10
"""Routers drop a pod when its deletion is announced. Two health intervals more, should a watch be broken."""
_EXIT_SECONDS = 15
"""From the last answer to the end of the process: freeing device memory took vLLM 5 to 7 s."""

_COMPLETION_SECONDS = 30
"""How long a first completion may take at one try: kernels may be compiled for it, and are there for the next."""
FIRST_COMPLETION = """\
import http.client, json, os, sys
name, port, seconds = sys.argv[1:]
body = json.dumps({"model": name, "prompt": "Hello", "max_tokens": 2, "ignore_eos": True, "temperature": 0})
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ.get("VLLM_API_KEY", "")}
try:
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=float(seconds))
    connection.request("POST", "/v1/completions", body, headers)
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    if answer.status != 200 or not json.loads(text)["choices"]:
        sys.exit("the first completion got %d: %s" % (answer.status, text[:300]))
except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
    sys.exit("no first completion: %r" % error)
"""
"""What the startup probe runs with the engine's own Python: one completion, asked of the pod itself.

``/health`` says 200 as soon as vLLM listens, also where the first request then kills it (a kernel that the device
does not have). Started, and so ready, is an engine that has answered once. The text is the same for every tier; what
a custom resource says comes as an argument.
"""

_HOME = "/home/vllm"
_HUB_CACHE = "/cache/huggingface"
_MODEL = "/models"


def needs_hub(tier: ServingTier, settings: TierSettings) -> bool:
    """Return whether any engine downloads from the Hugging Face hub: the model or a draft model."""
    return tier.spec.model.source.hugging_face is not None or any(
        "model" in (pool.speculative or {}) for pool in settings.pools
    )


def prestop_seconds(tier: ServingTier, role: PoolRole) -> int:
    """Return how long a stopping engine serves on before it is told to end.

    vLLM does not wait for KV transfers at shutdown, so a prefill engine first outlasts the lease of what it
    computed before the routers dropped it.
    """
    gives_kv = role is PoolRole.PREFILL or (role is PoolRole.DECODE and _elastic(tier))
    return _DEREGISTER_SECONDS + (KV_LEASE_SECONDS if gives_kv else 0)


def grace_seconds(tier: ServingTier, settings: TierSettings, role: PoolRole) -> int:
    """Return ``terminationGracePeriodSeconds``: above the sum of pre-stop sleep and drain, and time to exit."""
    return prestop_seconds(tier, role) + math.ceil(settings.drain_seconds) + _EXIT_SECONDS


def _elastic(tier: ServingTier) -> bool:
    return tier.spec.disaggregation is not None and tier.spec.disaggregation.elastic_roles


def _model_argument(tier: ServingTier) -> str:
    source = tier.spec.model.source
    if source.persistent_volume_claim is not None:
        return f"{_MODEL}/{source.persistent_volume_claim.path}"
    if source.image is not None:
        return _MODEL
    return tier.spec.model.name


def _kv_transfer(tier: ServingTier, pool: PoolSettings) -> str | None:
    if pool.role is PoolRole.AGGREGATED:
        return None
    kv_role = "kv_producer" if pool.role is PoolRole.PREFILL else "kv_consumer"
    if _elastic(tier):
        kv_role = "kv_both"
    transfer = {"kv_connector": "NixlConnector", "kv_role": kv_role}
    if pool.env.get("VLLM_TARGET_DEVICE") == "cpu":
        # The default is the memory of a GPU.
        transfer["kv_buffer_device"] = "cpu"
    return json.dumps(transfer, separators=(",", ":"))


def engine_args(tier: ServingTier, settings: TierSettings, pool: PoolSettings) -> tuple[str, ...]:
    """Return the arguments after ``vllm serve`` of one pool, the model first.

    Raises:
        ValueError: ``extra_args`` hold what the allow-list of the engine's version refuses. The policy reports
            that as a condition before it comes to rendering.
    """
    model = tier.spec.model
    flags: dict[str, str | int | float | None] = {
        "served-model-name": settings.served_name,
        "host": "0.0.0.0",  # noqa: S104 - a pod's own network; the NetworkPolicy says who reaches it
        "port": PORT,
        "tensor-parallel-size": pool.tensor_parallel,
        "max-num-seqs": pool.max_num_seqs,
        "max-num-batched-tokens": pool.max_num_batched_tokens,
        "max-model-len": pool.max_model_len,
        "performance-mode": pool.performance_mode,
        "quantization": pool.quantization,
        "dtype": pool.dtype,
        "kv-cache-dtype": pool.kv_cache_dtype,
        "attention-backend": pool.attention_backend,
        "speculative-config": (
            json.dumps(pool.speculative, separators=(",", ":"), sort_keys=True) if pool.speculative else None
        ),
        "scheduling-policy": "priority" if pool.priority_scheduling else None,
        "max-num-queued-reqs": pool.max_queued_requests,
        "gpu-memory-utilization": pool.gpu_memory_utilization,
        "kv-transfer-config": _kv_transfer(tier, pool),
        # Without it vLLM aborts running requests at SIGTERM, and often hangs on their open connections.
        "shutdown-timeout": math.ceil(settings.drain_seconds),
        # Probes and scrapes would be most of the log.
        "disable-access-log-for-endpoints": "/health,/metrics",
    }
    if model.source.hugging_face is not None and model.revision is not None:
        flags["revision"] = model.revision
        # vLLM's default is the newest tokenizer, whatever the weights' revision.
        flags["tokenizer-revision"] = model.revision
        if model.trust_remote_code:
            # Code that a checkpoint takes from another repository fails to load instead of running unpinned.
            flags["code-revision"] = model.revision
    switches = ["enable-mfu-metrics", "disable-fastapi-docs"]
    if model.trust_remote_code:
        switches.append("trust-remote-code")
    arguments = (
        _model_argument(tier),
        *(f"--{name}={value}" for name, value in flags.items() if value is not None),
        *(f"--{name}" for name in switches),
        *render_extra_args(pool.engine_version, pool.extra_args),
    )
    # Kubernetes expands $(NAME) in arguments: doubled, it stays text, and $(HF_TOKEN) never reaches vLLM's log.
    return tuple(argument.replace("$", "$$") for argument in arguments)


def _environment(tier: ServingTier, settings: TierSettings, pool: PoolSettings) -> list[JsonObject]:
    ours = {
        # The user has no entry in the image's /etc/passwd: without USER, Python's getpass fails.
        "HOME": _HOME,
        "USER": "vllm",
        "HF_HOME": _HUB_CACHE,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Longer than the router keeps idle connections; at uvicorn's 5 s it meets connections just closed.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
        # Compiled code stays with the pod: a cache shared between pods would be code shared between them.
        "TORCHINDUCTOR_CACHE_DIR": f"{_HOME}/.cache/torchinductor",
    }
    if not needs_hub(tier, settings):
        ours["HF_HUB_OFFLINE"] = "1"
    transfer: dict[str, str] = {}
    if pool.role is not PoolRole.AGGREGATED:
        transfer = {
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(NIXL_PORT),
            "UCX_TLS": "cuda_copy,cuda_ipc,tcp",
            "UCX_TCP_PORT_RANGE": f"{UCX_PORTS[0]}-{UCX_PORTS[1]}",
        }
    # A user may choose another transport (UCX_TLS), but nothing that the policies and probes rest on.
    fixed = ours | {name: value for name, value in transfer.items() if name != "UCX_TLS"}
    entries = environment(dict(sorted({**transfer, **pool.env, **fixed}.items())))
    entries.append(from_pod_field("VLLM_HOST_IP", "status.podIP"))
    if transfer:
        entries.append(from_pod_field("VLLM_NIXL_SIDE_CHANNEL_HOST", "status.podIP"))
    source = tier.spec.model.source.hugging_face or HuggingFaceSource()
    if source.token_secret_ref is not None:
        reference = {"name": source.token_secret_ref.name, "key": source.token_secret_ref.key}
        entries.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": reference}})
    return entries


def _volumes(tier: ServingTier, pool: PoolSettings) -> tuple[list[JsonObject], list[JsonObject]]:
    """Return (volumes, mounts)."""
    # NCCL and vLLM's message queues between the processes of one engine; it counts against a memory limit.
    shm = {"medium": "Memory", "sizeLimit": f"{2 * pool.tensor_parallel}Gi"}
    volumes: list[JsonObject] = [
        {"name": "shm", "emptyDir": shm},
        {"name": "tmp", "emptyDir": {}},
        {"name": "home", "emptyDir": {}},
    ]
    mounts: list[JsonObject] = [
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the device, not a temporary file
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod alone
        {"name": "home", "mountPath": _HOME},
    ]
    model = tier.spec.model
    if model.cache is not None:
        claim: JsonObject = {"claimName": model.cache.persistent_volume_claim.claim_name}
        volumes.append({"name": "hub-cache", "persistentVolumeClaim": claim})
    else:
        volumes.append({"name": "hub-cache", "emptyDir": {}})
    mounts.append({"name": "hub-cache", "mountPath": _HUB_CACHE})
    if model.source.persistent_volume_claim is not None:
        claim = {"claimName": model.source.persistent_volume_claim.claim_name, "readOnly": True}
        volumes.append({"name": "model", "persistentVolumeClaim": claim})
        mounts.append({"name": "model", "mountPath": _MODEL, "readOnly": True})
    elif model.source.image is not None:
        image = {"reference": model.source.image.reference, "pullPolicy": "IfNotPresent"}
        volumes.append({"name": "model", "image": image})
        mounts.append({"name": "model", "mountPath": _MODEL, "readOnly": True})
    return volumes, mounts


def _resources(tier: ServingTier, pool: PoolSettings) -> JsonObject:
    user = tier.spec.pod.resources if tier.spec.pod else None
    accelerators = {pool.binding.resource: str(pool.tensor_parallel)}
    return {
        "requests": {**((user.requests if user else None) or {}), **accelerators},
        "limits": {**((user.limits if user else None) or {}), **accelerators},
    }


def _health() -> JsonObject:
    return {"path": "/health", "port": "http"}


def _first_completion(served_name: str) -> list[str]:
    # Kubernetes expands $(NAME) here, too.
    arguments = [served_name.replace("$", "$$"), str(PORT), str(_COMPLETION_SECONDS)]
    # Isolated, and without site: no environment variable and no package has a say, and it starts in 20 ms.
    return ["python3", "-I", "-S", "-c", FIRST_COMPLETION, *arguments]


def _container(tier: ServingTier, settings: TierSettings, pool: PoolSettings) -> JsonObject:
    ports: list[JsonObject] = [{"name": "http", "containerPort": PORT, "protocol": "TCP"}]
    if pool.role is not PoolRole.AGGREGATED:
        ports.append({"name": "nixl", "containerPort": NIXL_PORT, "protocol": "TCP"})
    return {
        "name": CONTAINER,
        "image": pool.image,
        "command": ["vllm", "serve"],
        "args": list(engine_args(tier, settings, pool)),
        "env": _environment(tier, settings, pool),
        "ports": ports,
        "resources": _resources(tier, pool),
        "startupProbe": {
            "exec": {"command": _first_completion(settings.served_name)},
            "periodSeconds": 5,
            "timeoutSeconds": _COMPLETION_SECONDS + 5,
            "failureThreshold": STARTUP_SECONDS // 5,
        },
        "readinessProbe": {
            "httpGet": _health(),
            "periodSeconds": 5,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
        # A long step may hold an answer up; only an engine that is silent for a minute is restarted.
        "livenessProbe": {
            "httpGet": _health(),
            "periodSeconds": 10,
            "timeoutSeconds": 10,
            "failureThreshold": 6,
        },
        "lifecycle": {"preStop": {"sleep": {"seconds": prestop_seconds(tier, pool.role)}}},
        "securityContext": container_security(),
        "volumeMounts": _volumes(tier, pool)[1],
    }


def pod_template(
    tier: ServingTier, settings: TierSettings, pool: PoolSettings, config: OperatorConfig
) -> JsonObject:
    """Return the pod template of one pool.

    ``config`` is what an administrator allows; the bindings a pool needs are already in its settings.
    """
    del config
    options = tier.spec.pod
    labels = names.engine_labels(
        tier,
        pool.name,
        pool.role,
        served_name=settings.served_name,
        accelerator=pool.accelerator,
    )
    spec: JsonObject = {
        # A Service called "vllm" would otherwise put VLLM_PORT=tcp://… into the environment, which vLLM rejects.
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": grace_seconds(tier, settings, pool.role),
        "containers": [_container(tier, settings, pool)],
        "volumes": _volumes(tier, pool)[0],
    }
    node_selector = {**((options.node_selector if options else None) or {}), **pool.binding.node_selector}
    if node_selector:
        spec["nodeSelector"] = node_selector
    tolerated = tolerations(pool.binding.tolerations, options.tolerations if options else None)
    if tolerated:
        spec["tolerations"] = tolerated
    if pool.binding.runtime_class_name is not None:
        spec["runtimeClassName"] = pool.binding.runtime_class_name
    if options is not None and options.priority_class_name is not None:
        spec["priorityClassName"] = options.priority_class_name
    if options is not None and options.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret.name} for secret in options.image_pull_secrets]
    # No spreading unless asked for: one engine on each of many nodes leaves no node whole for a larger one.
    if options is not None and options.topology_spread_constraints:
        spec["topologySpreadConstraints"] = [
            {
                "maxSkew": constraint.max_skew,
                "topologyKey": constraint.topology_key,
                "whenUnsatisfiable": constraint.when_unsatisfiable,
                "labelSelector": {"matchLabels": names.engine_selector(tier, pool.name)},
                "matchLabelKeys": ["pod-template-hash"],
            }
            for constraint in options.topology_spread_constraints
        ]
    annotations = {
        **((options.annotations if options else None) or {}),
        "kubectl.kubernetes.io/default-container": CONTAINER,
    }
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}
