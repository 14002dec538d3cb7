"""A small asynchronous API-server client of the laboratory.

The product reaches the API server through ``kubernetes.aio``; what tests it must not share its bugs, so this one
is written on plain HTTP: JSON in, JSON out, and a watch that survives what a fault test does to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Self

import aiohttp

from servingtiers.lab.controlplane import ApiError, Connection

__all__ = ["APPLY", "JSON_PATCH", "MERGE", "STRATEGIC", "Kube"]

logger = logging.getLogger(__name__)

MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"
APPLY = "application/apply-patch+yaml"


class Kube:
    """An asynchronous connection to one API server, as one user. Use it as an async context manager."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def from_kubeconfig(cls, path: Path) -> Self:
        """Return a client for a kubeconfig that the laboratory wrote (JSON, with a token)."""
        document = json.loads(path.read_text())
        cluster = document["clusters"][0]["cluster"]
        token = document["users"][0]["user"]["token"]
        return cls(Connection(cluster["server"], Path(cluster["certificate-authority"]), token))

    async def __aenter__(self) -> Self:
        context = ssl.create_default_context(cafile=str(self.connection.ca_file))
        self._session = aiohttp.ClientSession(
            base_url=self.connection.url,
            headers={"Authorization": f"Bearer {self.connection.token}"},
            connector=aiohttp.TCPConnector(ssl=context, limit=64),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """The HTTP session."""
        if self._session is None:
            raise RuntimeError("not connected: use `async with Kube(...)`")
        return self._session

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        content_type: str = "application/json",
        params: Mapping[str, str] | None = None,
        timeout: float = 30.0,  # noqa: ASYNC109 - one request's own limit, handed to the HTTP client
    ) -> Any:
        """Send one request and return the decoded answer.

        Raises:
            ApiError: The server answered with an error status.
        """
        async with self.session.request(
            method,
            path,
            data=None if body is None else json.dumps(body),
            headers={"Content-Type": content_type},
            params=params,
            timeout=aiohttp.ClientTimeout(total=timeout),
        ) as answer:
            text = await answer.text()
            if answer.status >= 400:
                try:
                    status = json.loads(text)
                except ValueError:
                    status = {"message": text}
                raise ApiError(answer.status, status.get("reason", ""), status.get("message", text))
            return json.loads(text) if text.startswith(("{", "[")) else text

    async def get(self, path: str) -> Any:
        """Return an object or a list."""
        return await self.request("GET", path)

    async def patch(self, path: str, body: object, content_type: str = MERGE) -> Any:
        """Patch an object."""
        return await self.request("PATCH", path, body, content_type=content_type)

    async def delete(self, path: str, *, grace: int | None = None, uid: str | None = None) -> None:
        """Delete an object; one that is already gone is fine."""
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        try:
            await self.request("DELETE", path, options)
        except ApiError as error:
            if error.status not in {404, 409}:
                raise

    async def follow(self, path: str, **selectors: str) -> AsyncGenerator[tuple[str, dict[str, Any]]]:
        """Yield ``(ADDED | MODIFIED | DELETED, object)`` for ever: a list, then watches, relisting when needed.

        An object that vanished while the watch was down is yielded as DELETED at the next list.
        """
        known: dict[str, dict[str, Any]] = {}
        version = ""
        while True:
            try:
                if not version:
                    listed = await self.request("GET", path, params=selectors)
                    version = listed["metadata"]["resourceVersion"]
                    fresh = {item["metadata"]["uid"]: item for item in listed["items"]}
                    for uid in [uid for uid in known if uid not in fresh]:
                        yield "DELETED", known.pop(uid)
                    for uid, item in fresh.items():
                        kind = "MODIFIED" if uid in known else "ADDED"
                        known[uid] = item
                        yield kind, item
                async with contextlib.aclosing(self._watch(path, version, selectors)) as events:
                    async for kind, item in events:
                        if kind == "ERROR":
                            version = ""
                            break
                        version = item["metadata"]["resourceVersion"]
                        if kind == "BOOKMARK":
                            continue
                        if kind == "DELETED":
                            known.pop(item["metadata"]["uid"], None)
                        else:
                            known[item["metadata"]["uid"]] = item
                        yield kind, item
            except ApiError as error:
                version = ""
                logger.debug("watch of %s: %s", path, error)
                await asyncio.sleep(0.3)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                logger.debug("watch of %s: %s", path, error)
                await asyncio.sleep(0.3)

    async def _watch(
        self, path: str, version: str, selectors: Mapping[str, str]
    ) -> AsyncGenerator[tuple[str, dict[str, Any]]]:
        params = {**selectors, "watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true"}
        async with self.session.get(
            path, params=params, timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=180)
        ) as answer:
            if answer.status != 200:
                raise ApiError(answer.status, "", await answer.text())
            buffer = b""
            async for piece in answer.content.iter_any():
                *lines, buffer = (buffer + piece).split(b"\n")
                for line in lines:
                    if line:
                        event = json.loads(line)
                        yield event["type"], event["object"]
