"""vLLM's and vllm-router's metric names, by version, and what each is read as.

The names were read from the wheels of vLLM 0.9.2 to 0.33.0 (releases in between were sampled) and from the running
vllm-router 0.1.17. An engine is read by whichever of a metric's names it exposes, newest first, so a fleet in the
middle of an upgrade needs no configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["ENGINE_METRICS", "ROUTER_METRICS", "START_TIME", "Kind", "Metric"]


class Kind(StrEnum):
    """How a metric is read."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One quantity that engines expose."""

    key: str
    """Its name here."""
    kind: Kind
    names: tuple[str, ...]
    """Exposed names, newest first; counters with ``_total``, histograms without ``_bucket``."""
    limit: float
    """The most one engine can credibly report: of a gauge its value, of a counter its rate per second, of a
    histogram its observations per second. Above it the number is a fault, not load."""
    mean: bool = False
    """Pods and data-parallel ranks are averaged instead of added."""
    since: str = "0.9"
    """First vLLM version that has it under any of the names."""


ENGINE_METRICS: tuple[Metric, ...] = (
    Metric("running", Kind.GAUGE, ("vllm:num_requests_running",), 1e5),
    Metric("waiting", Kind.GAUGE, ("vllm:num_requests_waiting",), 1e7),
    # gpu_cache_usage_perc was hidden in 0.11 and is gone since 0.12. Both are shares in spite of their name.
    Metric(
        "kv_usage", Kind.GAUGE, ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"), 1.001, mean=True
    ),
    Metric("requests", Kind.COUNTER, ("vllm:request_success_total",), 1e6),
    Metric("prompt_token_count", Kind.COUNTER, ("vllm:prompt_tokens_total",), 1e9),
    Metric("output_token_count", Kind.COUNTER, ("vllm:generation_tokens_total",), 1e8),
    # Both count tokens.
    Metric(
        "prefix_queries",
        Kind.COUNTER,
        ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
        1e9,
    ),
    Metric(
        "prefix_hits", Kind.COUNTER, ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"), 1e9
    ),
    Metric("preemptions", Kind.COUNTER, ("vllm:num_preemptions_total",), 1e6),
    Metric("rejections", Kind.COUNTER, ("vllm:admission_rejections_total",), 1e6, since="0.32"),
    Metric("flops", Kind.COUNTER, ("vllm:estimated_flops_per_gpu_total",), 1e18, mean=True, since="0.18"),
    Metric(
        "read_bytes",
        Kind.COUNTER,
        ("vllm:estimated_read_bytes_per_gpu_total",),
        1e15,
        mean=True,
        since="0.18",
    ),
    Metric(
        "write_bytes",
        Kind.COUNTER,
        ("vllm:estimated_write_bytes_per_gpu_total",),
        1e15,
        mean=True,
        since="0.18",
    ),
    Metric("prompt_tokens", Kind.HISTOGRAM, ("vllm:request_prompt_tokens",), 1e6),
    Metric("output_tokens", Kind.HISTOGRAM, ("vllm:request_generation_tokens",), 1e6),
    Metric("ttft", Kind.HISTOGRAM, ("vllm:time_to_first_token_seconds",), 1e6),
    Metric("tpot", Kind.HISTOGRAM, ("vllm:request_time_per_output_token_seconds",), 1e6, since="0.11"),
    # time_per_output_token_seconds observed single gaps between tokens in spite of its name.
    Metric(
        "itl",
        Kind.HISTOGRAM,
        ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
        1e8,
    ),
    Metric("e2e", Kind.HISTOGRAM, ("vllm:e2e_request_latency_seconds",), 1e6),
    Metric("queue_time", Kind.HISTOGRAM, ("vllm:request_queue_time_seconds",), 1e6),
)
"""Every quantity that is read from engines."""

START_TIME = "process_start_time_seconds"
"""Unix time at which an engine's process started; absent with several API servers."""


@dataclass(frozen=True, slots=True)
class RouterMetrics:
    """Counters of vllm-router. They exist from their first increment on, so an absent one is a 0."""

    dispatched: str = "vllm_router_processed_requests_total"
    """Per worker, at dispatch, retries included. In prefill/decode mode a request counts once for each side."""
    completed: str = "vllm_router_requests_total"
    """Requests that ended, by route. The policy power_of_two does not count dispatches while it has one engine to
    choose from (vllm-router 0.1.17), so this and ``running`` are what such a router says of arrivals."""
    pd_completed: str = "vllm_router_pd_requests_total"
    """The same in prefill/decode mode; each request counts once."""
    running: str = "vllm_router_running_requests"
    """Gauge: requests in flight per worker."""
    exhausted: str = "vllm_router_retries_exhausted_total"
    """Requests given up after all retries."""
    errors: str = "vllm_router_request_errors_total"
    """Failed attempts by ``error_type``; ``no_available_workers`` where there was no engine to try."""
    pd_errors: str = "vllm_router_pd_errors_total"
    """The same in prefill/decode mode, where nothing is retried: ``server_selection``."""
    no_engine: tuple[str, ...] = ("no_available_workers", "server_selection")
    """Values of ``error_type`` that mean: no engine to send this to."""

    @property
    def counters(self) -> tuple[str, ...]:
        """All counters that are read."""
        return (
            self.dispatched,
            self.completed,
            self.pd_completed,
            self.exhausted,
            self.errors,
            self.pd_errors,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All metrics that are read."""
        return (*self.counters, self.running)


ROUTER_METRICS = RouterMetrics()
