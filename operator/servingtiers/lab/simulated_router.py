"""A stand-in for vllm-router where the real one cannot be had; it says so in every answer.

It takes the same flags (Kubernetes discovery by labels, prefill/decode mode, the metrics address), serves the
same probes and the same names of the metrics that the operator reads. It knows one policy, fewest running
requests, and retries as the real one does: in regular mode only. Anything else about it is no evidence about
vllm-router.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
from aiohttp import web

from servingtiers.lab.kube import Kube

__all__ = ["SimulatedRouter"]

_ATTEMPTS = 5  # --retry-max-retries of the real one
_BACKOFF_SECONDS = 0.05
_HEADERS = {"x-servingtiers-router": "simulated"}


def _flags(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each flag; ``--flag=value`` and ``--flag v1 v2`` are understood."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name] = [value] if equals else []
        elif name:
            found[name].append(word)
    return found


def _matches(labels: Mapping[str, str], selector: Sequence[str]) -> bool:
    pairs = [entry.partition("=")[::2] for entry in selector]
    return bool(pairs) and all(labels.get(key) == value for key, value in pairs)


class SimulatedRouter:
    """One simulated router.

    Args:
        arguments: The flags of a vllm-router command line.
        address: The pod's address.
        kube: The API server to discover pods with.
        namespace: The pod's namespace, where no ``--service-discovery-namespace`` is given.
    """

    def __init__(self, arguments: Sequence[str], *, address: str, kube: Kube, namespace: str) -> None:
        flags = _flags(arguments)
        self.address = address
        self.port = int(flags.get("port", ["30000"])[0])
        self._metrics_at = (
            flags.get("prometheus-host", ["127.0.0.1"])[0],
            int(flags.get("prometheus-port", ["29000"])[0]),
        )
        self._pd = "vllm-pd-disaggregation" in flags
        self._selectors = {
            "decode": flags.get("decode-selector" if self._pd else "selector", []),
            "prefill": flags.get("prefill-selector", []) if self._pd else [],
        }
        self._worker_port = int(flags.get("service-discovery-port", ["80"])[0])
        self._namespace = flags.get("service-discovery-namespace", [namespace])[0]
        self._timeout = float(flags.get("request-timeout-secs", ["1800"])[0])
        self._kube = kube
        self._workers: dict[str, dict[str, str]] = {"decode": {}, "prefill": {}}  # role -> pod uid -> URL
        self._running: Counter[str] = Counter()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._tasks: list[asyncio.Task[None]] = []
        self._runners: list[web.AppRunner] = []
        self._session: aiohttp.ClientSession | None = None
        self._alive = False

    async def start(self) -> None:
        """Listen, and follow the pods."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=self._timeout)
        )
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/liveness", self._get_liveness)
        app.router.add_get("/readiness", self._get_readiness)
        app.router.add_get("/health", self._get_readiness)
        app.router.add_get("/workers", self._get_workers)
        app.router.add_post("/v1/completions", self._post)
        app.router.add_post("/v1/chat/completions", self._post)
        metrics = web.Application()
        metrics.router.add_get("/metrics", self._get_metrics)
        for served, (host, port) in ((app, (self.address, self.port)), (metrics, self._metrics_at)):
            runner = web.AppRunner(served, access_log=None, handle_signals=False, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, host, port, reuse_address=True).start()
            self._runners.append(runner)
        self._tasks.append(asyncio.create_task(self._discover()))
        self._alive = True

    def running(self) -> bool:
        """Whether it serves."""
        return self._alive

    async def terminate(self) -> None:
        """Wait for what is in flight, then end."""
        while self._running.total():  # noqa: ASYNC110 - a drain of seconds
            await asyncio.sleep(0.05)
        await self.kill()

    async def kill(self) -> None:
        """End at once."""
        self._alive = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for runner in self._runners:
            await runner.cleanup()
        self._runners.clear()
        if self._session is not None:
            await self._session.close()

    async def _discover(self) -> None:
        async for kind, pod in self._kube.follow(f"/api/v1/namespaces/{self._namespace}/pods"):
            uid = pod["metadata"]["uid"]
            labels = pod["metadata"].get("labels") or {}
            conditions = pod.get("status", {}).get("conditions") or []
            ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
            present = kind != "DELETED" and ready and not pod["metadata"].get("deletionTimestamp")
            for role, selector in self._selectors.items():
                if present and _matches(labels, selector):
                    self._workers[role][uid] = f"http://{pod['status']['podIP']}:{self._worker_port}"
                else:
                    self._workers[role].pop(uid, None)

    def _pick(self, role: str, tried: set[str]) -> str | None:
        urls = [url for url in self._workers[role].values() if url not in tried]
        return min(urls, key=lambda url: (self._running[url], self._counts["processed", url]), default=None)

    async def _get_liveness(self, _: web.Request) -> web.Response:
        return web.Response(text="OK", headers=_HEADERS)

    async def _get_readiness(self, _: web.Request) -> web.Response:
        roles = ("prefill", "decode") if self._pd else ("decode",)
        ready = all(self._workers[role] for role in roles)
        status = {"status": "ready" if ready else "not ready", "router": "simulated"}
        return web.json_response(status, status=200 if ready else 503, headers=_HEADERS)

    async def _get_workers(self, _: web.Request) -> web.Response:
        urls = {role: sorted(workers.values()) for role, workers in self._workers.items()}
        return web.json_response({**urls, "router": "simulated"}, headers=_HEADERS)

    async def _post(self, request: web.Request) -> web.StreamResponse:
        route = request.path
        body = await request.json()
        if self._pd:
            answer = await self._prefill(route, body)
            if isinstance(answer, web.Response):
                return answer
            body["kv_transfer_params"] = answer
        tried: set[str] = set()
        attempts = 1 if self._pd else _ATTEMPTS
        for attempt in range(attempts):
            if attempt:
                self._counts["retries_total", route] += 1
                await asyncio.sleep(_BACKOFF_SECONDS * 2**attempt)
            url = self._pick("decode", tried)
            if url is None:
                self._counts["request_errors_total", "no_available_workers"] += 1
                tried.clear()
                continue
            self._counts["processed", url] += 1
            self._running[url] += 1
            try:
                response = await self._forward(request, url, body)
            except (aiohttp.ClientError, OSError):
                tried.add(url)
                continue
            finally:
                self._running[url] -= 1
            self._counts["requests_total", route] += 1
            return response
        self._counts["retries_exhausted_total", route] += 1
        return self._refuse(503, "No available workers")

    async def _prefill(self, route: str, body: Mapping[str, Any]) -> dict[str, Any] | web.Response:
        self._counts["pd_requests_total", route] += 1
        url = self._pick("prefill", set())
        if url is None or not self._workers["decode"]:
            self._counts["request_errors_total", "no_available_workers"] += 1
            return self._refuse(503, "No available workers")
        remote = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None}
        asked = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": remote}
        asked.pop("stream_options", None)
        self._counts["processed", url] += 1
        self._running[url] += 1
        try:
            async with self._client.post(f"{url}{route}", json=asked) as answer:
                document = await answer.json()
                if answer.status != 200:
                    return self._refuse(answer.status, json.dumps(document))
                return dict(document["kv_transfer_params"])
        except (aiohttp.ClientError, OSError) as error:
            return self._refuse(500, f"prefill: {error}")
        finally:
            self._running[url] -= 1

    @property
    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the simulated router is not started")
        return self._session

    async def _forward(self, request: web.Request, url: str, body: Mapping[str, Any]) -> web.StreamResponse:
        async with self._client.post(f"{url}{request.path}", json=body) as answer:
            headers = {"Content-Type": answer.headers.get("Content-Type", "application/json"), **_HEADERS}
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(request)
            # From here on the client has the head: what breaks now cannot be retried.
            try:
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
            except (aiohttp.ClientError, OSError):
                if request.transport is not None:
                    request.transport.abort()
            return response

    @staticmethod
    def _refuse(status: int, message: str) -> web.Response:
        return web.json_response({"error": {"message": message}}, status=status, headers=_HEADERS)

    async def _get_metrics(self, _: web.Request) -> web.Response:
        labels = {
            "processed": ("processed_requests_total", "worker"),
            "requests_total": ("requests_total", "route"),
            "pd_requests_total": ("pd_requests_total", "route"),
            "retries_total": ("retries_total", "route"),
            "retries_exhausted_total": ("retries_exhausted_total", "route"),
            "request_errors_total": ("request_errors_total", "error_type"),
        }
        lines = []
        for key, (name, label) in labels.items():
            lines.append(f"# TYPE vllm_router_{name} counter")
            lines += [
                f'vllm_router_{name}{{{label}="{value}"}} {count}'
                for (kind, value), count in self._counts.items()
                if kind == key
            ]
        workers = {url for of_role in self._workers.values() for url in of_role.values()}
        lines.append("# TYPE vllm_router_running_requests gauge")
        lines += [f'vllm_router_running_requests{{worker="{url}"}} {self._running[url]}' for url in workers]
        lines += ["# TYPE vllm_router_active_workers gauge", f"vllm_router_active_workers {len(workers)}", ""]
        return web.Response(text="\n".join(lines))
