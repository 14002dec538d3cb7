"""Flags and environment of vLLM: which exist, and which a tier may set itself.

``extraArgs`` and ``env`` of an engine are allow-lists, not pass-throughs. A flag must be named in full (argparse
would take any unambiguous beginning, so ``trust-remote`` would pass a deny-list), must exist in the engine's
version, must not be one the operator sets, and its value must have the flag's type. Left out on purpose is
everything that runs code (plugins, middleware, qualified class names, ``hf-overrides``, ``compilation-config``,
pickled weights), that opens another way into the pod (ports, TLS, tool servers, local media) and that would send
the hub token elsewhere (``HF_ENDPOINT``, proxies).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from servingtiers.catalog.names import CatalogError, near_names

__all__ = [
    "ALLOWED_ENV",
    "ALLOWED_FLAGS",
    "OWNED_FLAGS",
    "check_env",
    "check_extra_args",
    "engine_flag_names",
    "recorded_versions",
    "render_extra_args",
    "router_flag_names",
]

_VERSION = re.compile(r"v?(\d+)\.(\d+)(?:[.+-].*)?")


@dataclass(frozen=True, slots=True)
class Switch:
    """A flag without a value."""

    def problem(self, value: str) -> str | None:
        """Return what is wrong with ``value``; None when nothing is."""
        return None if value == "" else 'is a switch: set it to ""'


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number within bounds."""

    low: int
    high: int

    def problem(self, value: str) -> str | None:
        """Return what is wrong with ``value``; None when nothing is."""
        if re.fullmatch(r"[0-9]{1,18}", value) and self.low <= int(value) <= self.high:
            return None
        return f"must be a whole number from {self.low} to {self.high}"


@dataclass(frozen=True, slots=True)
class Real:
    """A decimal number within bounds."""

    low: float
    high: float

    def problem(self, value: str) -> str | None:
        """Return what is wrong with ``value``; None when nothing is."""
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value) and self.low <= float(value) <= self.high:
            return None
        return f"must be a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words."""

    values: tuple[str, ...]

    def problem(self, value: str) -> str | None:
        """Return what is wrong with ``value``; None when nothing is."""
        return None if value in self.values else f"must be one of {', '.join(self.values)}"


@dataclass(frozen=True, slots=True)
class Text:
    """Text of a pattern."""

    pattern: str
    what: str
    """For people: what the pattern stands for."""

    def problem(self, value: str) -> str | None:
        """Return what is wrong with ``value``; None when nothing is."""
        return None if re.fullmatch(self.pattern, value) else f"must be {self.what}"


@dataclass(frozen=True, slots=True)
class Items:
    """Several values, separated by blanks; each becomes an argument of its own."""

    pattern: str
    what: str

    def problem(self, value: str) -> str | None:
        """Return what is wrong with ``value``; None when nothing is."""
        items = value.split(" ")
        return None if all(re.fullmatch(self.pattern, item) for item in items) else f"must be {self.what}"


@dataclass(frozen=True, slots=True)
class JsonValue:
    """A JSON object."""

    def problem(self, value: str) -> str | None:
        """Return what is wrong with ``value``; None when nothing is."""
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        return None if isinstance(parsed, dict) else "must be a JSON object"


Kind = Switch | Whole | Real | Choice | Text | Items | JsonValue

_WORD = Text(r"[a-z0-9][a-z0-9_-]{0,63}", "a name of lower-case letters, digits, _ and -")
_SWITCH = Switch()
_JSON = JsonValue()


def _switches(*flags: str) -> dict[str, Kind]:
    """Return switches that vLLM also knows with ``no-`` before them."""
    return {name: _SWITCH for flag in flags for name in (flag, f"no-{flag}")}


ALLOWED_FLAGS: Mapping[str, Kind] = MappingProxyType(
    {
        # Cache and scheduler.
        "block-size": Whole(1, 1024),
        "kv-cache-memory-bytes": Text(r"[0-9]{1,15}[KMGkmg]?", "bytes, such as 8G"),
        "kv-offloading-size": Real(0, 100_000),
        "kv-offloading-backend": Choice(("native",)),
        **_switches("enable-prefix-caching", "enable-chunked-prefill", "async-scheduling"),
        "prefix-caching-hash-algo": Choice(("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")),
        "long-prefill-token-threshold": Whole(0, 10_000_000),
        "max-num-queued-tokens": Whole(1, 10**12),
        **_switches("scheduler-reserve-full-isl"),
        "stream-interval": Whole(1, 1000),
        "watermark": Real(0, 0.99),
        # Kernels and compilation.
        **_switches("enforce-eager", "disable-cascade-attn", "disable-custom-all-reduce"),
        **_switches("enable-expert-parallel", "enable-flashinfer-autotune"),
        "optimization-level": Whole(0, 3),
        "max-cudagraph-capture-size": Whole(1, 65_536),
        "cudagraph-capture-sizes": Items(r"[1-9][0-9]{0,5}", "whole numbers separated by blanks"),
        "moe-backend": _WORD,
        "linear-backend": _WORD,
        "distributed-executor-backend": Choice(("mp", "uni")),
        # Loading; no format that unpickles.
        "load-format": Choice(("auto", "safetensors", "instanttensor", "runai_streamer", "dummy")),
        "safetensors-load-strategy": Choice(("eager", "lazy", "prefetch")),
        "seed": Whole(0, 2**31 - 1),
        # Chat, tools, reasoning.
        **_switches("enable-auto-tool-choice"),
        "tool-call-parser": _WORD,
        "reasoning-parser": _WORD,
        "chat-template-content-format": Choice(("auto", "openai", "string")),
        "default-chat-template-kwargs": _JSON,
        "generation-config": Choice(("auto", "vllm")),
        "override-generation-config": _JSON,
        "max-logprobs": Whole(0, 1_000_000),
        "tokenizer-mode": Choice(("auto", "hf", "mistral", "deepseek_v32", "deepseek_v4")),
        # Multi-modal input.
        "limit-mm-per-prompt": _JSON,
        "mm-processor-cache-gb": Real(0, 1000),
        **_switches("language-model-only", "skip-mm-profiling"),
        "allowed-media-domains": Items(
            r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "domains separated by blanks"
        ),
        # What the answers and the metrics say.
        **_switches(
            "enable-prompt-tokens-details", "enable-force-include-usage", "enable-request-id-headers"
        ),
        **_switches("enable-server-load-tracking", "kv-cache-metrics", "cudagraph-metrics"),
        **_switches("enable-logging-iteration-details"),
        "kv-cache-metrics-sample": Real(0, 1),
        "per-request-spec-decode-metrics": Choice(("none", "summary", "detailed")),
        "show-hidden-metrics-for-version": Text(r"[0-9]+\.[0-9]+(\.[0-9]+)?", "a version such as 0.31"),
        "uvicorn-log-level": Choice(("critical", "error", "warning", "info", "debug")),
    }
)
"""Flags a tier may set, with the type of their value."""

OWNED_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "model": "set model.name or model.source",
        "revision": "set model.revision",
        "tokenizer-revision": "set model.revision",
        "code-revision": "set model.revision",
        "served-model-name": "set model.servedName",
        "trust-remote-code": "set model.trustRemoteCode",
        "hf-token": "set model.source.huggingFace.tokenSecretRef",
        "download-dir": "set model.cache",
        "host": "remove it, the operator sets it",
        "port": "remove it, the operator sets it",
        "tensor-parallel-size": "set hardware.tensorParallel",
        "max-num-seqs": "set engine.maxNumSeqs",
        "max-num-active-seqs": "set engine.maxNumSeqs",
        "max-num-batched-tokens": "set engine.maxNumBatchedTokens",
        "max-model-len": "set engine.maxModelLen",
        "max-num-queued-reqs": "set engine.maxQueuedRequests",
        "gpu-memory-utilization": "set engine.gpuMemoryUtilizationPercent",
        "device-memory-utilization": "set engine.gpuMemoryUtilizationPercent",
        "performance-mode": "set spec.tier",
        "quantization": "set engine.quantization",
        "dtype": "set engine.dtype",
        "kv-cache-dtype": "set engine.kvCacheDtype",
        "attention-backend": "set engine.attentionBackend",
        "speculative-config": "set engine.speculative",
        "spec-method": "set engine.speculative.method",
        "spec-model": "set engine.speculative.model",
        "spec-tokens": "set engine.speculative.numSpeculativeTokens",
        "scheduling-policy": "set engine.priorityScheduling",
        "kv-transfer-config": "set spec.disaggregation",
        "shutdown-timeout": "set spec.drainTimeout",
        "disable-access-log-for-endpoints": "remove it, the operator sets it",
        "disable-fastapi-docs": "remove it, the operator sets it",
        "enable-mfu-metrics": "remove it, the operator sets it",
        "disable-log-stats": "remove it, scaling reads the engine's metrics",
    }
)
"""Flags the operator sets, with what to do instead."""

_NUMBER = r"[0-9]{1,9}"
_BIT = r"[01]"
_LIST = r"[A-Za-z0-9_.,:^=/|-]{1,256}"

ALLOWED_ENV: Mapping[str, str] = MappingProxyType(
    {
        # Transport of KV blocks and of tensor parallelism.
        "UCX_TLS": _LIST,
        "UCX_NET_DEVICES": _LIST,
        "UCX_RNDV_SCHEME": r"[a-z_]{1,32}",
        "UCX_RNDV_THRESH": r"[A-Za-z0-9:,]{1,64}",
        "UCX_LOG_LEVEL": r"[a-z]{1,16}",
        "NCCL_DEBUG": r"[A-Z]{1,16}",
        "NCCL_IB_DISABLE": _BIT,
        "NCCL_P2P_DISABLE": _BIT,
        "NCCL_P2P_LEVEL": r"[A-Z0-9]{1,8}",
        "NCCL_CUMEM_ENABLE": _BIT,
        "NCCL_NVLS_ENABLE": _BIT,
        "NCCL_SOCKET_IFNAME": _LIST,
        "VLLM_NIXL_ABORT_REQUEST_TIMEOUT": _NUMBER,
        # CPU engines.
        "OMP_NUM_THREADS": _NUMBER,
        "VLLM_CPU_KVCACHE_SPACE": _NUMBER,
        "VLLM_CPU_OMP_THREADS_BIND": _LIST,
        "VLLM_TARGET_DEVICE": r"cpu|cuda|rocm",
        "VLLM_ENABLE_V1_MULTIPROCESSING": _BIT,
        # Loading and logging.
        "HF_HUB_DOWNLOAD_TIMEOUT": _NUMBER,
        "HF_XET_HIGH_PERFORMANCE": _BIT,
        "TOKENIZERS_PARALLELISM": r"true|false",
        "PYTORCH_CUDA_ALLOC_CONF": _LIST,
        "VLLM_LOGGING_LEVEL": r"DEBUG|INFO|WARNING|ERROR",
        "VLLM_USE_DEEP_GEMM": _BIT,
        "VLLM_MAX_N_SEQUENCES": _NUMBER,
        "VLLM_IMAGE_FETCH_TIMEOUT": _NUMBER,
        "VLLM_VIDEO_FETCH_TIMEOUT": _NUMBER,
        "VLLM_AUDIO_FETCH_TIMEOUT": _NUMBER,
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": _BIT,
    }
)
"""Environment a tier may set, with the pattern of the whole value."""


@cache
def _document() -> Mapping[str, Mapping[str, Mapping[str, object]]]:
    text = (files(__package__) / "data" / "flags" / "flags.json").read_text(encoding="utf-8")
    document: Mapping[str, Mapping[str, Mapping[str, object]]] = json.loads(text)
    return document


def _names(program: str, version: str) -> frozenset[str]:
    entry = _document()[program][version]
    found: set[str] = set()
    like = entry.get("like")
    if isinstance(like, str):
        found |= _names(program, like)
    for key in ("flags", "adds"):
        listed = entry.get(key, [])
        if isinstance(listed, list):
            found |= set(listed)
    return frozenset(found)


def _release(version: str) -> tuple[int, int] | None:
    match = _VERSION.fullmatch(version)
    return (int(match[1]), int(match[2])) if match else None


@cache
def recorded_versions() -> tuple[str, ...]:
    """Return the vLLM minor versions whose flags are recorded, oldest first."""
    return tuple(sorted(_document()["vllm"], key=lambda version: _release(version) or (0, 0)))


@cache
def engine_flag_names(version: str) -> frozenset[str]:
    """Return the names, without dashes, of all flags of ``vllm serve``.

    A version newer than the newest recorded one is taken to have its flags.

    Raises:
        CatalogError: The version is older than every recorded one, or is no version.
    """
    wanted = _release(version)
    recorded = recorded_versions()
    older = [known for known in recorded if wanted is not None and (_release(known) or (0, 0)) <= wanted]
    if not older:
        raise CatalogError(
            f"vLLM {version!r} is not supported: use {recorded[0]} or newer, or state engine.version"
        )
    return _names("vllm", older[-1])


@cache
def router_flag_names() -> frozenset[str]:
    """Return the names, without dashes, of all flags of the recorded vllm-router."""
    return frozenset().union(*(_names("vllm-router", version) for version in _document()["vllm-router"]))


def _flag_problem(version: str, known: frozenset[str], name: str, value: str) -> str | None:
    bare = name.removeprefix("no-")
    owned = OWNED_FLAGS.get(name) or OWNED_FLAGS.get(bare)
    if owned is not None:
        return f"extraArgs.{name} belongs to the operator: {owned}"
    if name not in known:
        near = near_names(name, ALLOWED_FLAGS, limit=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"extraArgs.{name} is no flag of vLLM {version}: name one in full or remove it{hint}"
    kind = ALLOWED_FLAGS.get(name)
    if kind is None:
        return f"extraArgs.{name} is not on the allow-list: remove it"
    problem = kind.problem(value)
    return f"extraArgs.{name} {problem}" if problem else None


def check_extra_args(version: str, arguments: Mapping[str, str]) -> tuple[str, ...]:
    """Return what is wrong with ``extraArgs``: one line for each flag, stating the mend; empty when all is well.

    Raises:
        CatalogError: The engine's version is not supported.
    """
    known = engine_flag_names(version)
    problems = (_flag_problem(version, known, name, value) for name, value in sorted(arguments.items()))
    return tuple(problem for problem in problems if problem is not None)


def check_env(values: Mapping[str, str]) -> tuple[str, ...]:
    """Return what is wrong with ``env``: one line for each name, stating the mend; empty when all is well."""
    problems: list[str] = []
    for name, value in sorted(values.items()):
        pattern = ALLOWED_ENV.get(name)
        if pattern is None:
            near = near_names(name, ALLOWED_ENV, limit=3)
            hint = f"; near names: {', '.join(near)}" if near else ""
            problems.append(f"env.{name} is not on the allow-list: remove it{hint}")
        elif not re.fullmatch(pattern, value):
            problems.append(f"env.{name} must match {pattern}")
    return tuple(problems)


def render_extra_args(version: str, arguments: Mapping[str, str]) -> tuple[str, ...]:
    """Return ``extraArgs`` as arguments of ``vllm serve``, sorted by name.

    Raises:
        CatalogError: An argument is not allowed, or the engine's version is not supported.
    """
    if not arguments:
        return ()
    problems = check_extra_args(version, arguments)
    if problems:
        raise CatalogError(problems[0])
    rendered: list[str] = []
    for name, value in sorted(arguments.items()):
        kind = ALLOWED_FLAGS[name]
        if isinstance(kind, Switch):
            rendered.append(f"--{name}")
        elif isinstance(kind, Items):
            rendered.extend((f"--{name}", *value.split(" ")))
        else:
            rendered.append(f"--{name}={value}")
    return tuple(rendered)
