"""vLLM's metrics as vLLM 0.32 shows them, for the simulated engines.

Names, types, help texts, labels and bucket bounds are those of a recorded ``/metrics`` page of a real engine; a
test compares the two line by line. The text is written by hand instead of with ``prometheus_client`` because a
laboratory hosts dozens of engines in one process: a page is joined from prepared line heads, and a value can be
observed many times in one call (one engine step yields one inter-token latency for each decoding sequence).
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import utils

__all__ = ["CONTENT_TYPE", "Counter", "EngineMetrics", "Gauge", "Histogram", "one_two_five"]

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"

_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_XFER = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 5.0)
_POST = (0.001, *_XFER)
_BYTES = tuple(2.0 ** (11 + 2 * step) for step in range(12))
_DESCRIPTORS = (10, 20, 30, 50, 75, 100, 200, 400, 1000, 2000, 4000, 10000, 20000, 50000)


def one_two_five(maximum: int) -> tuple[float, ...]:
    """Return the bounds 1, 2, 5, 10, 20, … up to ``maximum`` (vLLM's token buckets end at the model length)."""
    bounds: list[float] = []
    scale = 1
    while True:
        for mantissa in (1, 2, 5):
            if mantissa * scale > maximum:
                return tuple(bounds)
            bounds.append(float(mantissa * scale))
        scale *= 10


def _number(value: float) -> str:
    """Write a number as vLLM's own Prometheus client does."""
    return str(utils.floatToGoString(value))  # type: ignore[no-untyped-call]


def _labels(pairs: Iterable[tuple[str, str]]) -> str:
    escaped = ((k, v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for k, v in sorted(pairs))
    return ",".join(f'{k}="{v}"' for k, v in escaped)


class Counter:
    """A counter with one fixed label set."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Count ``amount`` more."""
        self.value += amount


class Gauge:
    """A gauge with one fixed label set."""

    __slots__ = ("value",)

    def __init__(self, value: float = 0.0) -> None:
        self.value = value


class Histogram:
    """A histogram with one fixed label set; an observation may carry a count."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = [float(bound) for bound in bounds]
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Observe ``value``, ``times`` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


@dataclass(frozen=True, slots=True)
class _Line:
    """One sample line: its text up to the value, and where the value is read."""

    head: str
    metric: Counter | Gauge | Histogram


class EngineMetrics:
    """All ``vllm:`` families of one engine, as attributes, and their text.

    Args:
        model_name: The served model name (label ``model_name``).
        max_model_len: Longest sequence; bounds the token histograms.
        kv_connector: Whether a NIXL connector is configured: adds its families.
        cache_config: Labels of ``vllm:cache_config_info``.
    """

    def __init__(
        self,
        model_name: str,
        *,
        max_model_len: int,
        kv_connector: bool = False,
        cache_config: Iterable[tuple[str, str]] = (),
    ) -> None:
        self._model = (("engine", "0"), ("model_name", model_name))
        self._parts: list[str | _Line] = []
        self._created = time.time()
        tokens = one_two_five(max_model_len)

        self.flops = self._counter(
            "estimated_flops_per_gpu",
            "Estimated number of floating point operations per GPU (for Model Flops Utilization calculations).",
        )
        self.read_bytes = self._counter(
            "estimated_read_bytes_per_gpu",
            "Estimated number of bytes read from memory per GPU (for Model Flops Utilization calculations).",
        )
        self.write_bytes = self._counter(
            "estimated_write_bytes_per_gpu",
            "Estimated number of bytes written to memory per GPU (for Model Flops Utilization calculations).",
        )
        self.running = self._gauge("num_requests_running", "Number of requests in model execution batches.")
        self.waiting = self._gauge("num_requests_waiting", "Number of requests waiting to be processed.")
        reasons = self._gauges(
            "num_requests_waiting_by_reason",
            "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling capacity; "
            "'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked status). Sum of all "
            "reasons equals vllm:num_requests_waiting.",
            "reason",
            ("capacity", "deferred"),
        )
        self.waiting_capacity, self.waiting_deferred = reasons
        self.awake, *_ = self._gauges(
            "engine_sleep_state",
            "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; "
            "weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.",
            "sleep_state",
            ("awake", "weights_offloaded", "discard_all"),
        )
        self.awake.value = 1.0
        self.kv_usage = self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "Prefix cache queries, in terms of number of queried tokens."
        )
        self.prefix_hits = self._counter(
            "prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens."
        )
        self.external_queries = self._counter(
            "external_prefix_cache_queries",
            "External prefix cache queries from KV connector cross-instance cache sharing, in terms of number of "
            "queried tokens.",
        )
        self.external_hits = self._counter(
            "external_prefix_cache_hits",
            "External prefix cache hits from KV connector cross-instance cache sharing, in terms of number of "
            "cached tokens.",
        )
        self._counter("mm_cache_queries", "Multi-modal cache queries, in terms of number of queried items.")
        self._counter("mm_cache_hits", "Multi-modal cache hits, in terms of number of cached items.")
        self.preemptions = self._counter(
            "num_preemptions", "Cumulative number of preemption from the engine."
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Number of prefill tokens processed.")
        sources = self._counters(
            "prompt_tokens_by_source",
            "Number of prompt tokens by source.",
            "source",
            ("local_compute", "local_cache_hit", "external_kv_transfer"),
        )
        self.local_compute, self.local_cache_hit, self.external_kv_transfer = sources
        self.prompt_tokens_cached = self._counter(
            "prompt_tokens_cached", "Number of cached prompt tokens (local + external)."
        )
        cached = self._counters(
            "prompt_tokens_cached_by_source",
            "Prefix-cache hit tokens by the cache tier that supplied them: device (local HBM), host (offloaded to "
            "DRAM), disk, p2p (transferred from another vLLM instance) or external_unspecified. Counted at "
            "admission; sums to vllm:prefix_cache_hits + vllm:external_prefix_cache_hits.",
            "source",
            ("device", "host", "p2p", "disk", "external_unspecified"),
        )
        self.cached_device, self.cached_p2p = cached[0], cached[2]
        self.generation_tokens = self._counter("generation_tokens", "Number of generation tokens processed.")
        finished = ("stop", "length", "abort", "error", "repetition")
        self.success = dict(
            zip(
                finished,
                self._counters(
                    "request_success",
                    "Count of successfully processed requests.",
                    "finished_reason",
                    finished,
                ),
                strict=True,
            )
        )
        # The one family without the engine label.
        rejections = self._counters(
            "admission_rejections",
            "Number of admission attempts rejected by a queue limit, by reason.",
            "reason",
            ("max_num_queued_reqs", "max_num_queued_tokens"),
            base=(("model_name", model_name),),
        )
        self.rejected_requests, self.rejected_tokens = rejections
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Number of prefill tokens processed.", tokens
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Number of generation tokens processed.", tokens
        )
        self.iteration_tokens = self._histogram(
            "iteration_tokens_total", "Histogram of number of tokens per engine_step.", _ITERATION
        )
        self.max_generation_tokens = self._histogram(
            "request_max_num_generation_tokens",
            "Histogram of maximum number of requested generation tokens.",
            tokens,
        )
        self.params_n = self._histogram(
            "request_params_n", "Histogram of the n request parameter.", (1, 2, 5, 10, 20)
        )
        self.params_max_tokens = self._histogram(
            "request_params_max_tokens", "Histogram of the max_tokens request parameter.", tokens
        )
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "Histogram of time to first token in seconds.", _TTFT
        )
        self.itl = self._histogram(
            "inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", _PER_TOKEN
        )
        self.tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "Histogram of time_per_output_token_seconds per request.",
            _PER_TOKEN,
        )
        self.e2e = self._histogram(
            "e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", _LATENCY
        )
        self.queue_time = self._phase("queue", "WAITING")
        self.inference_time = self._phase("inference", "RUNNING")
        self.prefill_time = self._phase("prefill", "PREFILL")
        self.decode_time = self._phase("decode", "DECODE")
        self.request_preemptions = self._histogram(
            "request_num_preemptions",
            "Histogram of the number of times a request was preempted.",
            (1, 2, 3, 4, 5, 10, 20),
        )
        self.prefill_computed = self._histogram(
            "request_prefill_kv_computed_tokens",
            "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
            tokens,
        )
        self.nixl: NixlMetrics | None = NixlMetrics(self) if kv_connector else None
        # vLLM registers this one without a model_name.
        self._head("cache_config_info", "Information of the LLMEngine CacheConfig", "gauge")
        self._sample("cache_config_info", (("engine", "0"), *cache_config), Gauge(1.0))

    # -- building -----------------------------------------------------------------------------------------

    def _phase(self, name: str, phase: str) -> Histogram:
        return self._histogram(
            f"request_{name}_time_seconds",
            f"Histogram of time spent in {phase} phase for request.",
            _LATENCY,
        )

    def _head(self, name: str, text: str, kind: str) -> None:
        self._parts.append(f"# HELP vllm:{name} {text}\n# TYPE vllm:{name} {kind}\n")

    def _sample(
        self, name: str, labels: Iterable[tuple[str, str]], metric: Counter | Gauge | Histogram
    ) -> None:
        self._parts.append(_Line(f"vllm:{name}{{{_labels(labels)}}} ", metric))

    def _born(self, name: str, text: str, label_sets: Sequence[Sequence[tuple[str, str]]]) -> None:
        self._head(f"{name}_created", text, "gauge")
        for labels in label_sets:
            self._sample(f"{name}_created", labels, Gauge(self._created))

    def _gauges(self, name: str, text: str, label: str, values: Sequence[str]) -> list[Gauge]:
        self._head(name, text, "gauge")
        gauges = [Gauge() for _ in values]
        for value, gauge in zip(values, gauges, strict=True):
            self._sample(name, (*self._model, (label, value)), gauge)
        return gauges

    def _gauge(self, name: str, text: str) -> Gauge:
        self._head(name, text, "gauge")
        gauge = Gauge()
        self._sample(name, self._model, gauge)
        return gauge

    def _counters(
        self,
        name: str,
        text: str,
        label: str,
        values: Sequence[str],
        base: tuple[tuple[str, str], ...] | None = None,
    ) -> list[Counter]:
        sets = [(*(self._model if base is None else base), (label, value)) for value in values]
        self._head(f"{name}_total", text, "counter")
        counters = [Counter() for _ in values]
        for labels, counter in zip(sets, counters, strict=True):
            self._sample(f"{name}_total", labels, counter)
        self._born(name, text, sets)
        return counters

    def _counter(self, name: str, text: str) -> Counter:
        self._head(f"{name}_total", text, "counter")
        counter = Counter()
        self._sample(f"{name}_total", self._model, counter)
        self._born(name, text, [self._model])
        return counter

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        self._head(name, text, "histogram")
        histogram = Histogram(bounds)
        model = self._model
        edges = [*(_number(bound) for bound in histogram.bounds), "+Inf"]
        heads = [f"vllm:{name}_bucket{{{_labels((*model, ('le', edge)))}}} " for edge in edges]
        heads += [f"vllm:{name}_{end}{{{_labels(model)}}} " for end in ("count", "sum")]
        self._parts.append(_Line("\0".join(heads), histogram))
        self._born(name, text, [model])
        return histogram

    # -- text ---------------------------------------------------------------------------------------------

    def text(self) -> str:
        """Return the page in the Prometheus text format."""
        out: list[str] = []
        for part in self._parts:
            if isinstance(part, str):
                out.append(part)
                continue
            metric = part.metric
            if not isinstance(metric, Histogram):
                out.append(f"{part.head}{_number(metric.value)}\n")
                continue
            heads = part.head.split("\0")
            total = 0
            for head, count in zip(heads, metric.counts, strict=False):
                total += count
                out.append(f"{head}{total}.0\n")
            out.append(f"{heads[-2]}{total}.0\n{heads[-1]}{_number(metric.sum)}\n")
        return "".join(out)


class NixlMetrics:
    """The families that the NIXL connector adds."""

    def __init__(self, of: EngineMetrics) -> None:
        self.xfer_time = of._histogram(  # noqa: SLF001 - one unit, split for reading
            "nixl_xfer_time_seconds", "Histogram of transfer duration for NIXL KV Cache transfers.", _XFER
        )
        self.post_time = of._histogram(  # noqa: SLF001
            "nixl_post_time_seconds", "Histogram of transfer post time for NIXL KV Cache transfers.", _POST
        )
        self.bytes = of._histogram(  # noqa: SLF001
            "nixl_bytes_transferred",
            "Histogram of bytes transferred per NIXL KV Cache transfers.",
            _BYTES,
        )
        self.descriptors = of._histogram(  # noqa: SLF001
            "nixl_num_descriptors",
            "Histogram of number of descriptors per NIXL  KV Cache transfers.",
            _DESCRIPTORS,
        )
        self.failed_transfers = of._counter(  # noqa: SLF001
            "nixl_num_failed_transfers",
            "Number of failed NIXL KV Cache transfers, including handshake and notification failures. NOTE: KV "
            "expiry is tracked separately in vllm:nixl_num_kv_expired_reqs.",
        )
        self.failed_notifications = of._counter(  # noqa: SLF001
            "nixl_num_failed_notifications",
            "Number of failed NIXL KV Cache notifications. Retained for compatibility; these failures are also "
            "included in vllm:nixl_num_failed_transfers.",
        )
        self.expired = of._counter(  # noqa: SLF001
            "nixl_num_kv_expired_reqs",
            "Number of requests that had their KV expire. NOTE: This metric is tracked on the P instance.",
        )
        self.late_notifications = of._counter(  # noqa: SLF001
            "nixl_num_notifications_after_expiry",
            "Number of completion notifications for requests that were no longer tracked, usually because their "
            "KV lease expired. The KV blocks may have been reused before the transfer finished. Counted per "
            "notification (one per remote rank), not per request.",
        )
        of._gauges(  # noqa: SLF001
            "num_requests_kv_fetch_by_stage",
            "Number of waiting requests by async KV load stage. Stage labels: 'waiting_to_start' = needs an async "
            "KV load that has not started; 'in_progress' = load started and not yet reported finished; "
            "'completed_waiting' = load finished, request not running yet.",
            "stage",
            ("waiting_to_start", "in_progress", "completed_waiting"),
        )
