"""Reads load from Prometheus: one query per metric for all tiers.

Gauges and plain counters are fetched as the raw samples of the window, because only those carry the time at which
they were taken: an instant query stamps everything with the time of evaluation and shows the series of dead pods
for five minutes. From there on the way to load is the scraper's. Histograms, the bulk of the data, are added up by
Prometheus (``sum by (le) (increase(...))``).

Series are joined to pods by the labels ``namespace`` and ``pod``, which every Kubernetes scrape configuration sets,
and by ``instance`` (address and port) where they are missing. Where a series names a pod and an address that is not
the pod's, it is left out.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from prometheus_api_client import PrometheusApiClientException, PrometheusConnect
from urllib3.util.retry import Retry

from servingtiers.api.base import parse_duration
from servingtiers.core.config import PrometheusConfig
from servingtiers.core.exposition import together
from servingtiers.core.signals import Histogram, TierLoad, Unknown
from servingtiers.core.telemetry import (
    MAX_FUTURE,
    PodTarget,
    PodWindow,
    RouterScan,
    RouterWindow,
    Scan,
    TierTargets,
    engine_window,
    router_window,
    tier_load,
)
from servingtiers.core.vllm_metrics import ENGINE_METRICS, ROUTER_METRICS, Kind, Metric

__all__ = ["PrometheusSource", "quote"]

_MAX_BODY = 128 * 1024 * 1024
"""Bytes of one answer; 1200 engines' buckets of one histogram are some 4 MiB, their gauges and counters 10 MiB."""

_METRIC_LABELS = frozenset(
    {"__name__", "engine", "model_name", "finished_reason", "reason", "worker", "error_type"}
)
"""Labels that the programs set. All others come from the scrape and must be the same for all series of a pod."""

_ADDRESS = re.compile(r"\[?([0-9a-fA-F.:]+)\]?:([0-9]{1,5})")

_Pod = tuple[str, str]
"""Namespace and name."""

_SCALARS = {
    name: (metric, rank)
    for metric in ENGINE_METRICS
    if metric.kind is not Kind.HISTOGRAM
    for rank, name in enumerate(metric.names)
}


class _QueryError(Exception):
    """A query gave no usable answer; the message says why."""


class _UnreachableError(_QueryError):
    """Prometheus did not answer at all: asking for the next metric would only wait again."""


def quote(value: str) -> str:
    """Return a PromQL string literal."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _any_of(values: Iterable[str]) -> str:
    """Return a PromQL regular expression literal that matches exactly the values."""
    return quote("|".join(re.sub(r"([^0-9A-Za-z_:-])", r"\\\1", value) for value in values))


@dataclass(frozen=True, slots=True)
class _Pods:
    """The ready pods by what series may know of them."""

    by_name: Mapping[_Pod, PodTarget]
    by_address: Mapping[tuple[str, int], _Pod]

    @classmethod
    def of(cls, pods: Iterable[tuple[str, PodTarget]]) -> _Pods:
        by_name = {(namespace, pod.name): pod for namespace, pod in pods}
        return cls(by_name, {(pod.ip, pod.port): key for key, pod in by_name.items()})

    def named_by(self, labels: Mapping[str, str]) -> _Pod | None:
        """Return the pod that a series belongs to; None for a dead, a foreign or a forged one."""
        namespace, name = labels.get("namespace"), labels.get("pod")
        address = _address(labels.get("instance", ""))
        if namespace and name:
            pod = self.by_name.get((namespace, name))
            if pod is None or (address is not None and address[0] != pod.ip):
                return None
            return namespace, name
        found = self.by_address.get(address) if address is not None and not name else None
        return None if found is None or (namespace and namespace != found[0]) else found


def _address(instance: str) -> tuple[str, int] | None:
    match = _ADDRESS.fullmatch(instance)
    if match is None:
        return None
    try:
        return str(ipaddress.ip_address(match[1])), int(match[2])
    except ValueError:
        return None


@dataclass(slots=True)
class _Series:
    """The samples of one series within the window."""

    name: str
    own: str
    """Labels that the program set, as text."""
    scrape: Mapping[str, str]
    """Labels that the scrape added."""
    times: list[float]
    values: list[float]


@dataclass(slots=True)
class PrometheusSource:
    """A :class:`~servingtiers.core.telemetry.LoadSource` that asks Prometheus.

    Made by :meth:`of`. A tick is about ten queries however many tiers there are; they run in a thread, because the
    client library blocks.
    """

    config: PrometheusConfig
    window: float
    """Seconds over which rates and percentiles are taken."""
    monotonic: Callable[[], float] = time.monotonic
    _interval: float = field(init=False)
    _timeout: float = field(init=False)
    _client: PrometheusConnect = field(init=False)
    _session: requests.Session = field(init=False)
    _deadline: float = field(default=math.inf, init=False)
    _busy: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._interval = parse_duration(self.config.scrape_interval)
        self._timeout = parse_duration(self.config.timeout)
        if self.window < 2 * self._interval:
            raise ValueError(
                f"telemetry.window ({self.window:g} s) must be at least twice"
                f" telemetry.prometheus.scrapeInterval ({self._interval:g} s): a rate needs two samples,"
                " so raise window"
            )
        session = requests.Session()
        session.trust_env = (
            False  # no proxy and no .netrc from the environment: the address is the administrator's
        )
        session.max_redirects = 0  # and the token is for that address only
        session.stream = True
        session.verify = self.config.ca_file or True
        session.hooks["response"].append(self._take)
        self._session = session
        self._client = PrometheusConnect(
            self.config.url.rstrip("/"),
            session=session,
            timeout=self._timeout,
            # The next tick is the retry; only a connection that cannot be made is tried again at once.
            retry=Retry(
                total=1, connect=1, read=False, status=False, other=False, redirect=False, backoff_factor=0.1
            ),
        )

    async def read(
        self, tiers: Sequence[TierTargets], now: float, *, complete: bool = True
    ) -> Mapping[str, TierLoad]:
        """Return the load of each tier by its key.

        Args:
            tiers: The tiers that are asked for.
            now: Unix time, seconds.
            complete: Whether these are all tiers; Prometheus remembers for itself.
        """
        del complete
        if not tiers:
            return {}
        return await asyncio.to_thread(self._read, tiers, now)

    async def close(self) -> None:
        """Close connections."""
        self._session.close()

    def _read(self, tiers: Sequence[TierTargets], now: float) -> Mapping[str, TierLoad]:
        with self._busy:
            return self._read_alone(tiers, now)

    def _read_alone(self, tiers: Sequence[TierTargets], now: float) -> Mapping[str, TierLoad]:
        started = self.monotonic()
        self._deadline = started + 3 * self._timeout
        engines = _Pods.of((t.namespace, pod) for t in tiers for pod in t.engines)
        routers = _Pods.of((t.namespace, pod) for t in tiers for pod in t.routers)
        try:
            self._authorize()
            self._check_clock(now, started)
            where = self._where(tiers)
            engine_windows = self._engines(engines, where, now, started)
            router_windows = self._routers(routers, where, now, started)
        except _QueryError as error:
            reason = Unknown(f"Prometheus {error}")
            engine_windows = dict.fromkeys(engines.by_name, reason)
            router_windows = dict.fromkeys(routers.by_name, reason)
        clock = now + self.monotonic() - started
        return {
            tier.key: tier_load(
                tier,
                {p.name: engine_windows[tier.namespace, p.name] for p in tier.engines},
                {p.name: router_windows[tier.namespace, p.name] for p in tier.routers},
                window=self.window,
                now=clock,
            )
            for tier in tiers
        }

    # --- queries

    def _authorize(self) -> None:
        """Take the token anew: a projected one is replaced every hour."""
        if self.config.bearer_token_file is None:
            return
        try:
            token = Path(self.config.bearer_token_file).read_text("utf-8").strip()
        except OSError as error:
            raise _QueryError(f"is not asked: its token cannot be read: {error.strerror}") from None
        self._session.headers["Authorization"] = f"Bearer {token}"

    def _check_clock(self, now: float, started: float) -> None:
        answer = self._ask("time()")
        try:
            theirs = float(answer[1])
        except (IndexError, TypeError, ValueError):
            raise _QueryError("answered something that is no time to time()") from None
        ahead = theirs - (now + self.monotonic() - started)
        if not abs(ahead) <= MAX_FUTURE:
            raise _QueryError(f"has another clock: it is {ahead:+.0f} s from the operator's")

    def _where(self, tiers: Sequence[TierTargets]) -> str:
        namespaces = sorted({tier.namespace for tier in tiers})
        # The empty alternative admits series that the scrape gave no namespace.
        matchers = [f"namespace=~{_any_of([*namespaces, ''])}"]
        matchers += [f"{label}={quote(value)}" for label, value in sorted(self.config.matchers.items())]
        return ",".join(matchers)

    def _ask(self, query: str) -> list[Any]:
        """Run one query and return ``data.result``.

        Raises:
            _QueryError: It was refused, warned about, or its answer makes no sense.
            _UnreachableError: There was no answer.
        """
        left = self._deadline - self.monotonic()
        late = _UnreachableError(f"took more than {3 * self._timeout:g} s for one tick")
        if left <= 0:
            raise late
        try:
            result = self._client.custom_query(query, timeout=min(self._timeout, left))
        except PrometheusApiClientException as error:
            raise _QueryError(f"refused a query: {error}"[:300]) from None
        except requests.exceptions.JSONDecodeError:
            raise _QueryError("answered something that is not JSON") from None
        except requests.exceptions.TooManyRedirects:
            raise _QueryError(
                "redirects elsewhere: set telemetry.prometheus.url to its final address"
            ) from None
        except requests.exceptions.Timeout:
            if left < self._timeout:
                raise late from None
            raise _UnreachableError(f"gave no answer within {self._timeout:g} s") from None
        except requests.exceptions.RequestException as error:
            raise _UnreachableError(f"cannot be reached: {_root(error)}"[:300]) from None
        except (KeyError, TypeError) as error:
            raise _QueryError(f"answered JSON without {error}") from None
        if not isinstance(result, list):
            raise _QueryError("answered JSON that is no query result")
        return result

    def _take(self, response: requests.Response, **_: Any) -> None:
        """Read a body: not for ever, not without bound, and not when Prometheus says that it is incomplete."""
        parts: list[bytes] = []
        size = 0
        for part in response.iter_content(65536):
            size += len(part)
            if size > _MAX_BODY:
                response.close()
                raise _QueryError(f"answered more than {_MAX_BODY >> 20} MiB")
            if self.monotonic() > self._deadline:
                response.close()
                raise _UnreachableError(f"took more than {3 * self._timeout:g} s for one tick")
            parts.append(part)
        body = b"".join(parts)
        response._content = body  # noqa: SLF001 - where requests keeps a body it has read
        if response.status_code == 200 and b'"warnings"' in body:
            try:
                warnings = json.loads(body).get("warnings")
            except (ValueError, AttributeError):
                return  # the caller meets the same error
            if warnings:
                raise _QueryError(f"warns that its answer is incomplete: {warnings[0]}"[:300])

    # --- answers

    def _engines(
        self, pods: _Pods, where: str, now: float, started: float
    ) -> dict[_Pod, PodWindow | Unknown]:
        if not pods.by_name:
            return {}
        by_pod = self._raw(_SCALARS, pods, where)
        histograms: dict[str, Mapping[_Pod, Histogram | str] | str] = {}
        for metric in ENGINE_METRICS:
            if metric.kind is Kind.HISTOGRAM:
                try:
                    histograms[metric.key] = self._histograms(metric, pods, where)
                except _UnreachableError:
                    raise
                except _QueryError as error:
                    histograms[metric.key] = f"Prometheus {error}"
        clock = now + self.monotonic() - started
        windows: dict[_Pod, PodWindow | Unknown] = {}
        for key, pod in pods.by_name.items():
            series = by_pod.get(key)
            if series is None:
                windows[key] = Unknown(
                    "Prometheus has no series of it: is it scraped, with labels namespace and pod?"
                )
                continue
            twice = _twice(series)
            if twice is not None:
                windows[key] = Unknown(twice)
                continue
            own: dict[str, Histogram | str] = {}
            for name, found in histograms.items():
                histogram = found if isinstance(found, str) else found.get(key)
                if histogram is not None:
                    own[name] = histogram
            windows[key] = engine_window(
                _scans(series),
                window=self.window,
                interval=self._interval,
                now=clock,
                ready_since=pod.ready_since,
                histograms=own,
            )
        return windows

    def _routers(
        self, pods: _Pods, where: str, now: float, started: float
    ) -> dict[_Pod, RouterWindow | Unknown]:
        if not pods.by_name:
            return {}
        by_pod = self._raw(["up", *ROUTER_METRICS.names], pods, where)
        clock = now + self.monotonic() - started
        windows: dict[_Pod, RouterWindow | Unknown] = {}
        for key, pod in pods.by_name.items():
            series = by_pod.get(key)
            if series is None:
                windows[key] = Unknown(
                    "Prometheus has no series of it: is it scraped, with labels namespace and pod?"
                )
                continue
            twice = _twice(series)
            windows[key] = (
                Unknown(twice)
                if twice is not None
                else router_window(
                    _router_scans(series),
                    window=self.window,
                    interval=self._interval,
                    now=clock,
                    ready_since=pod.ready_since,
                )
            )
        return windows

    def _raw(self, names: Iterable[str], pods: _Pods, where: str) -> dict[_Pod, list[_Series]]:
        """Fetch the samples of the window, with the times at which they were taken."""
        millis = round((self.window + self._interval / 2) * 1000)
        result = self._ask(f"{{__name__=~{_any_of(names)},{where}}}[{millis}ms]")
        by_pod: dict[_Pod, list[_Series]] = {}
        try:
            for item in result:
                labels = item["metric"]
                pod = pods.named_by(labels)
                if pod is None:
                    continue
                own = ",".join(f'{k}="{v}"' for k, v in sorted(labels.items()) if k in _METRIC_LABELS)
                by_pod.setdefault(pod, []).append(
                    _Series(
                        name=labels["__name__"],
                        own=own,
                        scrape={k: v for k, v in labels.items() if k not in _METRIC_LABELS},
                        times=[float(at) for at, _ in item["values"]],
                        values=[float(value) for _, value in item["values"]],
                    )
                )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _QueryError(f"answered series that cannot be read: {error!r}"[:300]) from None
        return by_pod

    def _histograms(self, metric: Metric, pods: _Pods, where: str) -> dict[_Pod, Histogram | str]:
        """Fetch the observations of the window per pod; an older name counts where the newer is not there."""
        labels = "namespace, pod, instance"
        millis = round(self.window * 1000)
        query = f" or on ({labels}) ".join(
            f"sum by ({labels}, le) (increase({{__name__=~{_any_of([f'{name}_bucket', f'{name}_sum'])},{where}}}"
            f"[{millis}ms]))"
            for name in metric.names
        )
        counts: dict[_Pod, dict[float, float]] = {}
        sums: dict[_Pod, float] = {}
        try:
            for item in self._ask(query):
                pod = pods.named_by(item["metric"])
                if pod is None:
                    continue
                value = float(item["value"][1])
                le = item["metric"].get("le")
                if le is None:
                    sums[pod] = sums.get(pod, 0.0) + value
                else:
                    # Prometheus 3 writes le="1.0" where Prometheus 2 kept le="1": the same bucket.
                    by_le = counts.setdefault(pod, {})
                    by_le[float(le)] = by_le.get(float(le), 0.0) + value
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise _QueryError(f"answered buckets that cannot be read: {error!r}"[:300]) from None
        return {pod: _histogram(metric, by_le, sums.get(pod)) for pod, by_le in counts.items()}


def _histogram(metric: Metric, by_le: Mapping[float, float], total: float | None) -> Histogram | str:
    if total is None:
        return f"{metric.names[0]} has no sum"
    ordered = sorted(by_le.items())
    counts: list[float] = []
    for _, count in ordered:
        highest = counts[-1] if counts else 0.0
        # Rounding apart, a cumulative count falls only where an engine came back with other buckets.
        counts.append(highest if highest > count >= highest * (1 - 1e-9) else count)
    try:
        return Histogram(tuple(le for le, _ in ordered), tuple(counts), total)
    except ValueError as error:
        return f"{metric.names[0]}: {error}: its buckets changed within the window"


def _twice(series: Sequence[_Series]) -> str | None:
    """Say where two series were scraped side by side though one is expected; one after the other is a relabelling."""
    by_own: dict[str, _Series] = {}
    for one in series:
        other = by_own.setdefault(one.own, one)
        if other is one or one.times[0] > other.times[-1] or other.times[0] > one.times[-1]:
            continue
        differing = sorted(
            k for k in one.scrape.keys() | other.scrape.keys() if one.scrape.get(k) != other.scrape.get(k)
        )
        return (
            f"{one.name} comes in two series that differ in {', '.join(differing) or 'nothing'}: scrape each pod"
            " once and ask a deduplicated Prometheus, or tell them apart with telemetry.prometheus.matchers"
        )
    return None


def _scans(series: Sequence[_Series]) -> list[Scan]:
    """Put samples that were scraped together together again: Prometheus gives them one time."""
    at: dict[float, dict[str, dict[int, list[float]]]] = {}
    for one in series:
        metric, rank = _SCALARS[one.name]
        for when, value in zip(one.times, one.values, strict=True):
            at.setdefault(when, {}).setdefault(metric.key, {}).setdefault(rank, []).append(value)
    metrics = {metric.key: metric for metric, _ in _SCALARS.values()}
    return [
        # By the newest of a metric's names that the engine exposes.
        Scan(when, {key: together(metrics[key], ranks[min(ranks)]) for key, ranks in found.items()})
        for when, found in sorted(at.items())
    ]


def _router_scans(series: Sequence[_Series]) -> list[RouterScan]:
    """Return one scan per successful scrape; without any counter yet it is an empty one."""
    at: dict[float, dict[str, dict[str, float]]] = {}
    failed: set[float] = set()
    for one in series:
        for when, value in zip(one.times, one.values, strict=True):
            found = at.setdefault(when, {})
            if one.name == "up":
                if value != 1:
                    failed.add(when)
            else:
                found.setdefault(one.name, {})[one.own] = value
    return [RouterScan(when, found) for when, found in sorted(at.items()) if when not in failed]


def _root(error: BaseException) -> str:
    """Return the operating system's words for a failed request; requests buries them several layers deep."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        reason = getattr(seen, "reason", None) or (seen.args[0] if seen.args else None)
        seen = reason if isinstance(reason, BaseException) else seen.__cause__ or seen.__context__
    return str(error)
