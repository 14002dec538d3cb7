"""What the tests of rendering share: golden scenarios, drawn cases, and the checks of Kubernetes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
import yaml
from pydantic import TypeAdapter

from kubernetes_schemas import assert_valid
from servingtiers.api.base import parse_duration
from servingtiers.api.spec import RouterPolicy, ServingTier, Toleration
from servingtiers.core.config import AcceleratorBinding, OperatorConfig, TelemetryConfig
from servingtiers.core.decisions import PoolRole
from servingtiers.core.effective import PoolSettings, TierSettings
from servingtiers.core.state import JsonObject
from servingtiers.render import tier_objects

GOLDEN = Path(__file__).parents[1] / "golden"
_SETTINGS = TypeAdapter(TierSettings)


@dataclass(frozen=True)
class Scenario:
    """What rendering is called with, and what came of it."""

    folder: Path
    tier: ServingTier
    settings: TierSettings
    config: OperatorConfig
    replicas: dict[str, int | None]
    surge: dict[str, bool]
    objects: tuple[JsonObject, ...]

    def of_kind(self, kind: str) -> list[JsonObject]:
        """Return the objects of a kind."""
        return [obj for obj in self.objects if obj["kind"] == kind]


def load_scenario(folder: Path) -> Scenario:
    """Read one folder of ``tests/golden`` and render it."""
    tier = ServingTier.model_validate(yaml.safe_load((folder / "tier.yaml").read_text()))
    given = yaml.safe_load((folder / "settings.yaml").read_text())
    settings = _SETTINGS.validate_python(given["settings"])
    operator = folder / "operator.yaml"
    config = OperatorConfig.model_validate(yaml.safe_load(operator.read_text()) if operator.exists() else {})
    surge = given.get("surge", {})
    objects = tier_objects(tier, settings, given["replicas"], config, surge=surge)
    return Scenario(folder, tier, settings, config, given["replicas"], surge, objects)


FOLDERS = sorted(folder for folder in GOLDEN.iterdir() if (folder / "tier.yaml").exists())


@pytest.fixture(params=FOLDERS, ids=[folder.name for folder in FOLDERS])
def scenario(request: pytest.FixtureRequest) -> Scenario:
    """Every scenario in turn."""
    return load_scenario(request.param)


@pytest.fixture(scope="session")
def valid() -> Callable[[JsonObject], None]:
    """The check of one object against Kubernetes' schema."""
    return assert_valid


def pod_security_violations(pod: JsonObject) -> list[str]:
    """Return what the ``restricted`` Pod Security Standard (v1.36) forbids in a pod spec.

    Every control of https://kubernetes.io/docs/concepts/security/pod-security-standards/ that concerns Linux pods,
    baseline ones included.
    """
    found: list[str] = []
    context = pod.get("securityContext", {})
    found += [f"{field} is set" for field in ("hostNetwork", "hostPID", "hostIPC") if pod.get(field)]
    found += [f"sysctl {entry['name']}" for entry in context.get("sysctls", [])]
    allowed = {
        "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret",
    }  # fmt: skip
    for volume in pod.get("volumes", []):
        found += [f"volume type {kind}" for kind in volume if kind not in allowed | {"name"}]
    for container in [
        *pod["containers"],
        *pod.get("initContainers", []),
        *pod.get("ephemeralContainers", []),
    ]:
        name = container["name"]
        own = container.get("securityContext", {})
        effective = {**context, **own}
        capabilities = own.get("capabilities", {})
        if own.get("privileged"):
            found.append(f"{name} is privileged")
        if own.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name} may escalate privileges")
        if capabilities.get("drop") != ["ALL"]:
            found.append(f"{name} keeps capabilities")
        if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append(f"{name} adds capabilities")
        if effective.get("runAsNonRoot") is not True or effective.get("runAsUser") == 0:
            found.append(f"{name} may run as root")
        if effective.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
            found.append(f"{name} has no seccomp profile")
        if effective.get("appArmorProfile", {}).get("type", "RuntimeDefault") == "Unconfined":
            found.append(f"{name} is unconfined")
        if effective.get("procMount", "Default") != "Default" or effective.get("seLinuxOptions"):
            found.append(f"{name} changes procMount or SELinux")
        found += [
            f"{name} has host port {port['hostPort']}"
            for port in container.get("ports", [])
            if "hostPort" in port
        ]
        for hook in ("livenessProbe", "readinessProbe", "startupProbe"):
            if "host" in container.get(hook, {}).get("httpGet", {}):
                found.append(f"{name}.{hook} names a host")
    return found


@pytest.fixture(scope="session")
def violations() -> Callable[[JsonObject], list[str]]:
    """The check of one pod spec against the restricted Pod Security Standard."""
    return pod_security_violations


_NAME = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True)
_TIER_NAMES = st.from_regex(
    r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?){0,4}", fullmatch=True
).filter(lambda name: len(name) <= 253)
"""Names the API server takes for a custom resource: DNS subdomains (RFC 1123)."""


@pytest.fixture(scope="session")
def tier_names() -> st.SearchStrategy[str]:
    """Names the API server takes for a tier."""
    return _TIER_NAMES


_MODEL_ID = st.from_regex(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}(/[A-Za-z0-9][A-Za-z0-9._-]{0,60})?", fullmatch=True
)


@st.composite
def _tiers(draw: st.DrawFn) -> ServingTier:
    disaggregated = draw(st.booleans())
    model: JsonObject = {"name": draw(_MODEL_ID)}
    source = draw(st.sampled_from(["hub", "token", "claim", "image"]))
    if source == "token":
        model["source"] = {"huggingFace": {"tokenSecretRef": {"name": draw(_NAME), "key": "token"}}}
    elif source == "claim":
        model["source"] = {"persistentVolumeClaim": {"claimName": draw(_NAME), "path": "a/b"}}
    elif source == "image":
        model["source"] = {"image": {"reference": "registry.example/models/m:1"}}
    if source in {"hub", "token"} and draw(st.booleans()):
        model["cache"] = {"persistentVolumeClaim": {"claimName": draw(_NAME)}}
    if draw(st.booleans()):
        model["revision"] = "0" * 40
        model["trustRemoteCode"] = draw(st.booleans())
    spec: JsonObject = {
        "tier": draw(st.sampled_from(["Latency", "Balanced", "Throughput"])),
        "model": model,
        "drainTimeout": draw(st.sampled_from(["1s", "60s", "90500ms", "1h"])),
    }
    scaling = {"minReplicas": draw(st.integers(0, 2))}
    if disaggregated:
        spec["disaggregation"] = {
            "prefill": {"scaling": scaling},
            "decode": {"scaling": scaling},
            "elasticRoles": draw(st.booleans()),
        }
    else:
        spec["pool"] = {"scaling": scaling}
        if draw(st.booleans()):
            spec["sharedPool"] = {"name": draw(_NAME)}
    if draw(st.booleans()):
        spec["pod"] = {
            "labels": {
                draw(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,20}[A-Za-z0-9])?", fullmatch=True)): "x"
            },
            "resources": {"requests": {"cpu": "4", "nvidia.com/gpu": "7"}, "limits": {"memory": "64Gi"}},
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "a", "operator": "Exists"}],
            "topologySpreadConstraints": [{"topologyKey": "zone"}],
        }
    metadata = {"name": draw(_TIER_NAMES), "namespace": draw(_NAME), "uid": "u"}
    return ServingTier.model_validate(
        {"apiVersion": "servingtiers.io/v1alpha1", "kind": "ServingTier", "metadata": metadata, "spec": spec}
    )


def _pool(name: str, role: PoolRole) -> st.SearchStrategy[PoolSettings]:
    return st.builds(
        PoolSettings,
        name=st.just(name),
        role=st.just(role),
        accelerator=st.sampled_from(["h100-sxm-80gb", "a100-sxm-80gb"]),
        binding=st.sampled_from(
            [
                AcceleratorBinding(),
                AcceleratorBinding(
                    resource="amd.com/gpu",
                    node_selector={"gpu": "mi300x"},
                    tolerations=[Toleration(key="a", operator="Exists"), Toleration(operator="Exists")],
                    runtime_class_name="nvidia",
                ),
            ]
        ),
        tensor_parallel=st.sampled_from([1, 2, 8]),
        image=st.just("vllm/vllm-openai:v0.32.0"),
        engine_version=st.sampled_from(["0.32.0", "0.33.0"]),
        weights=st.just("bf16"),
        quantization=st.none() | st.just("fp8"),
        dtype=st.none() | st.just("bfloat16"),
        kv_cache_dtype=st.none() | st.just("fp8"),
        max_num_seqs=st.integers(1, 4096),
        max_num_batched_tokens=st.none() | st.integers(32, 262_144),
        max_model_len=st.none() | st.integers(16, 10_000_000),
        performance_mode=st.none() | st.sampled_from(["balanced", "interactivity", "throughput"]),
        attention_backend=st.none() | st.just("FLASH_ATTN"),
        speculative=st.none()
        | st.sampled_from(
            [
                {"method": "ngram", "num_speculative_tokens": 3},
                {"method": "eagle3", "model": "a/b", "num_speculative_tokens": 3},
            ]
        ),
        priority_scheduling=st.booleans(),
        max_queued_requests=st.none() | st.integers(1, 1_000_000),
        gpu_memory_utilization=st.none() | st.just(0.9),
        extra_args=st.just({})
        | st.just({"block-size": "32", "enforce-eager": "", "cudagraph-capture-sizes": "1 2"}),
        env=st.just({}) | st.just({"UCX_TLS": "tcp", "VLLM_LOGGING_LEVEL": "DEBUG"}),
        reasons=st.just({}),
    )


@dataclass(frozen=True)
class Case:
    """Anything that may be rendered."""

    tier: ServingTier
    settings: TierSettings
    config: OperatorConfig
    replicas: dict[str, int | None]
    surge: dict[str, bool]

    @property
    def objects(self) -> tuple[JsonObject, ...]:
        """The rendered objects."""
        return tier_objects(self.tier, self.settings, self.replicas, self.config, surge=self.surge)


@st.composite
def _cases(draw: st.DrawFn) -> Case:
    tier = draw(_tiers())
    pools = (
        (draw(_pool("prefill", PoolRole.PREFILL)), draw(_pool("decode", PoolRole.DECODE)))
        if tier.spec.disaggregation
        else (draw(_pool("pool", PoolRole.AGGREGATED)),)
    )
    settings = TierSettings(
        served_name=tier.spec.model.served_name or tier.spec.model.name,
        pools=pools,
        router_image="vllm/vllm-router:v0.1.17",
        router_policy=draw(st.sampled_from(list(RouterPolicy))).value,
        router_policy_reason="drawn",
        request_timeout_seconds=draw(st.floats(0.001, 3600)),
        request_timeout_reason="drawn",
        drain_seconds=parse_duration(tier.spec.drain_timeout),
    )
    config = draw(
        st.builds(
            OperatorConfig,
            cluster_mode=st.booleans(),
            namespaces=st.just([]) | st.just(["a", "b"]),
            router_service_account=st.none() | st.just("routers"),
            metrics_namespace=st.none() | st.just("monitoring"),
            telemetry=st.sampled_from([TelemetryConfig(), TelemetryConfig(source="Prometheus")]),
        )
    )
    replicas = {pool.name: draw(st.none() | st.integers(0, 1000)) for pool in pools}
    return Case(tier, settings, config, replicas, {pool.name: draw(st.booleans()) for pool in pools})


@pytest.fixture(scope="session")
def cases() -> st.SearchStrategy[Case]:
    """Every shape of tier: source, cache, roles, shared pool, placement, sizes, operator configuration.

    A fixture, because test modules do not import one another; draw from it with ``data.draw(cases)``.
    """
    return _cases()


@pytest.fixture(scope="session")
def make_tier() -> Callable[[JsonObject], ServingTier]:
    """Read a tier from JSON, as from the API server."""
    return ServingTier.model_validate


@pytest.fixture(scope="session")
def load() -> Callable[..., Scenario]:
    """Load one scenario by its folder's name, if wanted with another configuration of the operator."""

    def read(folder: str, config: JsonObject | None = None) -> Scenario:
        found = load_scenario(GOLDEN / folder)
        if config is None:
            return found
        other = OperatorConfig.model_validate(config)
        objects = tier_objects(found.tier, found.settings, found.replicas, other, surge=found.surge)
        return dataclasses.replace(found, config=other, objects=objects)

    return read
