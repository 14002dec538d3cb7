"""Kopf, and nothing else: watches feed the controller, start-up and shutdown are ordered, probes answer.

Only ``@kopf.on.event`` is used. Kopf's change handlers, timers and daemons would add finalizers and annotations to
every object and react to edges; the controller reacts to levels (docs/decisions/0001).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kopf
import yaml
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError

from servingtiers import __version__
from servingtiers.adapters.cluster import AUTOSCALER, TIER, TIER_POOL, Cluster
from servingtiers.adapters.leadership import Leadership, LeaseTimes
from servingtiers.adapters.prometheus import PrometheusSource
from servingtiers.adapters.scrape import ScrapeSource
from servingtiers.api.base import parse_duration
from servingtiers.controller import WATCHED, Controller
from servingtiers.core.config import OperatorConfig
from servingtiers.core.state import JsonObject
from servingtiers.core.telemetry import LoadSource
from servingtiers.render import names

__all__ = ["Options", "load_config", "run"]

_log = logging.getLogger(__name__)

_STALLED_LOOP = 10.0
_STUCK_KEY = 300.0
_KOPF_EXIT = 5.0


@dataclass(frozen=True, slots=True)
class Options:
    """How one operator process runs."""

    config: OperatorConfig
    kubeconfig: str | None = None
    namespace: str = "default"
    """The operator's own namespace: its Lease is here, and in namespaced mode it watches this one by default."""
    identity: str = field(
        default_factory=lambda: f"{os.environ.get('HOSTNAME', 'local')}_{uuid.uuid4().hex[:8]}"
    )
    lease: LeaseTimes | None = field(default_factory=LeaseTimes)
    """None: no leader election, for tests and one-replica set-ups that say so."""
    health_port: int | None = 8080
    metrics_port: int | None = 8081
    workers: int = 8
    resync_seconds: float = 300.0


def load_config(path: str | None) -> OperatorConfig:
    """Read the operator's configuration from a YAML file; the defaults without one.

    Raises:
        ValueError: The file is no such configuration; the message names field and mend.
    """
    if path is None:
        return OperatorConfig()
    document = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    try:
        return OperatorConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}") from error


def load_source(config: OperatorConfig) -> LoadSource:
    """Return the telemetry the configuration asks for.

    Raises:
        ValueError: It asks for what cannot be; the message states the mend.
    """
    telemetry = config.telemetry
    window = parse_duration(telemetry.window)
    if telemetry.source == "Scrape":
        return ScrapeSource(interval=parse_duration(telemetry.interval), window=window)
    if telemetry.prometheus is None:
        raise ValueError("telemetry.source is Prometheus: set telemetry.prometheus.url, or source: Scrape")
    return PrometheusSource(telemetry.prometheus, window)


async def run(options: Options, *, stop: asyncio.Event | None = None) -> None:
    """Run the operator until ``stop`` is set, a signal arrives or leadership is lost."""
    stop = stop or asyncio.Event()
    config = _in_place(options)
    loads = load_source(config)
    with _stopped_by_signals(stop):
        await _run(options, config, loads, stop)


async def _run(options: Options, config: OperatorConfig, loads: LoadSource, stop: asyncio.Event) -> None:
    async with Cluster.connect(kubeconfig=options.kubeconfig) as cluster:
        controller = Controller(
            cluster,
            config,
            loads,
            identity=options.identity,
            workers=options.workers,
            resync_seconds=options.resync_seconds,
        )
        try:
            async with _serving(options, controller):
                if options.lease is None:
                    await _until_first(stop.wait(), controller.run(), _watch(options, controller, stop))
                else:
                    await _lead(options, options.lease, cluster, controller, stop)
        finally:
            await loads.close()


async def _lead(
    options: Options, times: LeaseTimes, cluster: Cluster, controller: Controller, stop: asyncio.Event
) -> None:
    """Wait for the Lease, work while it is held, give it up."""
    leadership = Leadership(
        cluster.api,
        name="servingtiers-operator",
        namespace=options.namespace,
        identity=options.identity,
        times=times,
    )
    controller.leading = lambda: leadership.leading
    cluster.guard = leadership.check
    try:
        await _until_first(stop.wait(), leadership.acquire())
        if stop.is_set():
            return
        await _until_first(
            stop.wait(), leadership.hold(), controller.run(), _watch(options, controller, stop)
        )
    finally:
        # Also where the Lease came in the same moment as the signal.
        await leadership.release()


@contextlib.contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """Stop on SIGINT and SIGTERM for the body.

    Kopf has handlers of its own, which take the place of these, but only while it runs: a process that waits for the
    Lease must go too, and must not win it on its way out.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are another's business
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _in_place(options: Options) -> OperatorConfig:
    """Return the configuration with what only the running process knows: where it runs, and so what it watches."""
    config = options.config.model_copy(update={"operator_namespace": options.namespace})
    if config.namespaces or config.cluster_mode:
        return config
    return config.model_copy(update={"namespaces": [options.namespace]})


async def _until_first(*waits: Any) -> None:
    """Run all until the first ends, then end the others; its exception, if any, is raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- Kopf ------------------------------------------------------------------------------------------------------


async def _watch(options: Options, controller: Controller, stop: asyncio.Event) -> None:
    """Feed the controller from Kopf's watches."""
    registry = kopf.OperatorRegistry()
    settings = kopf.OperatorSettings()
    _configure(settings)
    config = _in_place(options)

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> Any:
        if options.kubeconfig is not None:
            os.environ["KUBECONFIG"] = options.kubeconfig
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(TIER.api_version.split("/")[0], "v1alpha1", TIER.plural, registry=registry)
    async def tier(event: kopf.RawEvent, **_: Any) -> None:
        controller.tier_seen(_plain(event), gone=event["type"] == "DELETED")

    @kopf.on.event(TIER_POOL.api_version.split("/")[0], "v1alpha1", TIER_POOL.plural, registry=registry)
    async def tier_pool(event: kopf.RawEvent, **_: Any) -> None:
        controller.pool_seen(_plain(event), gone=event["type"] == "DELETED")

    async def child(event: kopf.RawEvent, **_: Any) -> None:
        controller.object_seen(_plain(event), gone=event["type"] == "DELETED")

    for kind in (*WATCHED, AUTOSCALER):
        group, _, version = kind.api_version.rpartition("/")
        labels = None if kind is AUTOSCALER else {names.MANAGED_BY_LABEL: names.MANAGED_BY}
        kopf.on.event(group, version, kind.plural, labels=labels, id=kind.plural, registry=registry)(child)
        if labels:
            settings.watching.label_selectors[group, kind.plural] = (
                f"{names.MANAGED_BY_LABEL}={names.MANAGED_BY}"
            )

    # Kopf closes its connections in order when its flag is raised, and leaks them when it is cancelled.
    flag = asyncio.Event()
    watching = asyncio.ensure_future(
        kopf.operator(
            registry=registry,
            settings=settings,
            # Left out, Kopf asks for the user's name, which a container's user does not have.
            identity=options.identity,  # type: ignore[arg-type]  # its NewType is not public
            standalone=True,
            clusterwide=not config.namespaces,
            namespaces=config.namespaces,
            stop_flag=flag,
        )
    )
    try:
        await asyncio.shield(watching)
    finally:
        flag.set()
        stop.set()
        await asyncio.wait([watching], timeout=_KOPF_EXIT)
        watching.cancel()


def _configure(settings: kopf.OperatorSettings) -> None:
    settings.posting.enabled = False  # the controller posts what was decided, not what was logged
    settings.scanning.disabled = (
        True  # resources are named and namespaces are configured: nothing to discover
    )
    settings.watching.server_timeout = 480
    settings.watching.client_timeout = 510
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 20
    settings.networking.connect_timeout = 5
    settings.networking.error_backoffs = (0.5, 1, 2, 4)
    settings.queueing.error_delays = (1, 2, 5, 10, 30, 60)
    settings.process.ultimate_exiting_timeout = 25


def _plain(event: kopf.RawEvent) -> JsonObject:
    return dict(event["object"])


# -- probes and metrics ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _serving(options: Options, controller: Controller) -> AsyncIterator[None]:
    """Answer ``/healthz``, ``/readyz`` and ``/metrics`` for the body."""
    from aiohttp import web

    async def healthz(_: web.Request) -> web.Response:
        problem = unhealthy(controller)
        return web.json_response({"problem": problem, "version": __version__}, status=503 if problem else 200)

    async def serve_metrics(_: web.Request) -> web.Response:
        body = generate_latest(controller.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    runners = []
    for port, routes in (
        (options.health_port, [web.get("/healthz", healthz), web.get("/readyz", healthz)]),
        (options.metrics_port, [web.get("/metrics", serve_metrics)]),
    ):
        if port is None:
            continue
        app = web.Application()
        app.add_routes(routes)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, port=port).start()
        runners.append(runner)
    try:
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


def unhealthy(controller: Controller) -> str | None:
    """Return why the process should be restarted; None while it is well.

    A follower that waits for the Lease is well. Kopf's own liveness says nothing of a stalled loop.
    """
    if not controller.running:
        return None
    silent = time.monotonic() - controller.heartbeat
    if silent > _STALLED_LOOP:
        return f"the event loop has not turned for {silent:.0f} s"
    if controller.queue.oldest_age > _STUCK_KEY:
        return f"a tier has waited {controller.queue.oldest_age:.0f} s for a worker"
    return None
