"""The operator's configuration: what an administrator sets once for the cluster.

It comes from the chart's values through a ConfigMap. Prometheus' address and credentials are here and never in a
custom resource, where a tenant could point them elsewhere.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field

from servingtiers.api.base import Duration, Model
from servingtiers.api.spec import ResourceList, Toleration

__all__ = ["AcceleratorBinding", "Images", "OperatorConfig", "PrometheusConfig", "TelemetryConfig"]


class AcceleratorBinding(Model):
    """How a catalogue accelerator appears in this cluster."""

    resource: str = "nvidia.com/gpu"
    """Extended resource that one accelerator is requested by."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes that have it."""
    tolerations: list[Toleration] = []
    """Taints of those nodes that engines tolerate."""
    runtime_class_name: str | None = None
    """RuntimeClass of the engines, where the device needs one."""
    price_per_hour: Decimal | None = None
    """Price of one accelerator; the catalogue's dated default when left out."""


class Images(Model):
    """Default images, best by digest."""

    engine: str = "vllm/vllm-openai:v0.32.0"
    """Image of the engines, where a tier names none."""
    router: str = "vllm/vllm-router:v0.1.17"
    """Image of the routers."""


class PrometheusConfig(Model):
    """How to reach Prometheus."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    """Address, such as `http://prometheus.monitoring:9090`."""
    bearer_token_file: str | None = None
    """File in the operator's pod that holds a bearer token; read at every query."""
    ca_file: str | None = None
    """File in the operator's pod with the certificate authority of an https address."""
    timeout: Duration = "10s"
    """Longest one query may take."""
    scrape_interval: Duration = "15s"
    """How often this Prometheus scrapes engines and routers: older samples count as stale, and the window must hold
    two."""
    matchers: dict[str, str] = {}
    """Labels that every series must carry, where one Prometheus holds several clusters: `{cluster: eu-1}`."""


class TelemetryConfig(Model):
    """Where load is read."""

    source: Literal["Scrape", "Prometheus"] = "Scrape"
    """Scrape reads the engine and router pods directly; Prometheus asks `prometheus.url`."""
    prometheus: PrometheusConfig | None = None
    interval: Duration = "15s"
    """Tick of the control loop, and of the embedded scraper."""
    window: Duration = "60s"
    """Window of rates and percentiles."""


class OperatorConfig(Model):
    """Everything an administrator sets."""

    accelerators: dict[str, AcceleratorBinding] = {}
    """Catalogue key to its binding; a tier may only use what is bound."""
    images: Images = Images()
    telemetry: TelemetryConfig = TelemetryConfig()
    namespaces: list[str] = []
    """Watched namespaces; empty: the operator's own (namespaced mode) or all (cluster mode)."""
    operator_namespace: str | None = None
    """Namespace of the operator's pods, which NetworkPolicies admit to the metrics; set by the operator itself."""
    cluster_mode: bool = False
    """Watch the whole cluster and use cluster-scoped permissions."""
    allow_remote_code: bool = False
    """Let tiers set trustRemoteCode."""
    currency: Annotated[str, Field(max_length=8)] = "USD"
    """Currency of all prices."""
    router_service_account: str | None = None
    """ServiceAccount the chart made for routers; None: the operator makes one per tier."""
    router_resources: ResourceList | None = None
    """Resources of the routers; sensible ones when left out."""
    metrics_namespace: str | None = None
    """Namespace from which pods may read metrics, for NetworkPolicies; None: only the operator, and with Prometheus as
    the telemetry source pods labelled `app.kubernetes.io/name: prometheus`, in any namespace."""
    cluster_domain: str = "cluster.local"
    """Domain of the cluster's DNS."""
