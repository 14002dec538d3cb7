"""The Kubernetes API as the operator uses it: read, create, apply, relabel, delete; nothing else.

Writes go out one way each. A new object is a POST, so that somebody else's object of the same name is a 409 and is
never adopted. Later changes are server-side applies with one field manager and the object's uid, so that an object
which was deleted and made again by somebody else is a conflict and is never touched. Deletes carry the uid too.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from servingtiers.api import API_VERSION, KIND, PLURAL, POOL_KIND, POOL_PLURAL
from servingtiers.core.state import JsonObject, Ref

__all__ = ["FIELD_MANAGER", "ApiError", "Cluster", "Kind", "kind_of"]

FIELD_MANAGER: Final = "servingtiers"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind and where the API server keeps it."""

    api_version: str
    kind: str
    plural: str

    @property
    def prefix(self) -> str:
        """Path of the API group and version."""
        return f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"


TIER: Final = Kind(API_VERSION, KIND, PLURAL)
TIER_POOL: Final = Kind(API_VERSION, POOL_KIND, POOL_PLURAL)
CHILDREN: Final = (
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("rbac.authorization.k8s.io/v1", "Role", "roles"),
    Kind("rbac.authorization.k8s.io/v1", "RoleBinding", "rolebindings"),
    Kind("v1", "Service", "services"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    Kind("apps/v1", "Deployment", "deployments"),
)
"""Kinds the operator writes; what a tier no longer plans of these is deleted."""
POD: Final = Kind("v1", "Pod", "pods")
AUTOSCALER: Final = Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
EVENT: Final = Kind("events.k8s.io/v1", "Event", "events")
LEASE: Final = Kind("coordination.k8s.io/v1", "Lease", "leases")
_KINDS: Final = {
    (k.api_version, k.kind): k for k in (TIER, TIER_POOL, *CHILDREN, POD, AUTOSCALER, EVENT, LEASE)
}

_RETRIED_READS: Final = frozenset({429, 500, 502, 503, 504})
_MAX_READ_TRIES: Final = 4
_PAGE: Final = 500


def kind_of(ref: Ref) -> Kind:
    """Return the kind of a reference.

    Raises:
        KeyError: The operator does not deal in that kind.
    """
    return _KINDS[(ref.api_version, ref.kind)]


class ApiError(Exception):
    """The API server said no, or did not answer (status 0)."""

    def __init__(self, status: int, reason: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after

    @property
    def ambiguous(self) -> bool:
        """The write may or may not have happened."""
        return self.status == 0 or self.status >= 500


class Cluster:
    """A connection to one API server, by the official client's configuration, authentication and TLS."""

    def __init__(
        self,
        api: kubernetes_client.ApiClient,
        *,
        timeout: float = 20.0,
        guard: Callable[[], None] = lambda: None,
        on_write: Callable[[str, str], None] = lambda _verb, _kind: None,
    ) -> None:
        self._api = api
        self._timeout = timeout
        self.guard = guard
        """Called before every write; raises where this process may no longer write (leadership)."""
        self.on_write = on_write
        """Told of every write: verb and kind."""

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, *, kubeconfig: str | None = None, request_timeout: float = 20.0
    ) -> AsyncIterator[Cluster]:
        """Connect as a pod does inside a cluster, otherwise by kubeconfig."""
        configuration = kubernetes_client.Configuration()
        configuration.connection_pool_maxsize = 64
        if kubeconfig is None:
            try:
                kubernetes_config.load_incluster_config(client_configuration=configuration)
            except kubernetes_config.ConfigException:
                await kubernetes_config.load_kube_config(client_configuration=configuration)
        else:
            await kubernetes_config.load_kube_config(kubeconfig, client_configuration=configuration)
        async with kubernetes_client.ApiClient(configuration) as api:
            yield cls(api, timeout=request_timeout)

    @property
    def api(self) -> kubernetes_client.ApiClient:
        """The official client, for its own helpers (the Lease lock)."""
        return self._api

    # -- reads -------------------------------------------------------------------------------------------------

    async def get(self, ref: Ref) -> JsonObject | None:
        """Return the object; None when there is none.

        Raises:
            ApiError: The API server refused or did not answer.
        """
        try:
            return await self._read(self._path(kind_of(ref), ref.namespace, ref.name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list_all(
        self, kind: Kind, namespace: str | None, *, labels: str = ""
    ) -> tuple[list[JsonObject], int]:
        """Return all objects of a kind in one namespace (None: all), page by page, and the version of the list.

        Raises:
            ApiError: The API server refused or did not answer.
        """
        items: list[JsonObject] = []
        token = ""
        while True:
            query = {"limit": str(_PAGE)}
            if labels:
                query["labelSelector"] = labels
            if token:
                query["continue"] = token
            page = await self._read(self._path(kind, namespace), query)
            # Items of a list lack apiVersion and kind; everybody downstream relies on them.
            items += [{"apiVersion": kind.api_version, "kind": kind.kind} | item for item in page["items"]]
            token = page["metadata"].get("continue", "")
            if not token:
                return items, int(page["metadata"]["resourceVersion"])

    async def _read(self, path: str, query: dict[str, str] | None = None) -> JsonObject:
        for attempt in range(1, _MAX_READ_TRIES + 1):
            try:
                return await self._request("GET", path, query)
            except ApiError as error:
                retried = error.status in _RETRIED_READS or error.status == 0
                if not retried or attempt == _MAX_READ_TRIES:
                    raise
                # Full jitter: many tiers failing together must not come back together.
                pause = error.retry_after or random.uniform(0.0, 0.25 * 2**attempt)  # noqa: S311 - not a secret
                await asyncio.sleep(min(pause, 10.0))
        raise AssertionError("unreachable")

    # -- writes ------------------------------------------------------------------------------------------------

    async def create(self, body: JsonObject) -> JsonObject:
        """POST a new object.

        Raises:
            ApiError: 409 when an object of that name exists already, whoever owns it.
        """
        ref = Ref.of(body)
        return await self._write(
            "create",
            ref,
            "POST",
            self._path(kind_of(ref), ref.namespace),
            body,
            {"fieldManager": FIELD_MANAGER},
        )

    async def apply(self, body: JsonObject) -> JsonObject:
        """Server-side apply of an object of ours; ``metadata.uid`` must be set.

        Raises:
            ApiError: 409 or 422 when the object of that name is no longer the one with that uid.
        """
        ref = Ref.of(body)
        if not body["metadata"].get("uid"):
            raise ValueError(f"{ref}: apply needs metadata.uid, or it could adopt somebody else's object")
        return await self._write(
            "apply",
            ref,
            "PATCH",
            self._path(kind_of(ref), ref.namespace, ref.name),
            body,
            {"fieldManager": FIELD_MANAGER, "force": "true"},
            content_type="application/apply-patch+yaml",
        )

    async def apply_status(self, body: JsonObject) -> JsonObject:
        """Server-side apply of a status; ``metadata.uid`` must be set.

        Raises:
            ApiError: The API server refused or did not answer.
        """
        ref = Ref.of(body)
        return await self._write(
            "status",
            ref,
            "PATCH",
            self._path(kind_of(ref), ref.namespace, ref.name) + "/status",
            body,
            {"fieldManager": FIELD_MANAGER, "force": "true"},
            content_type="application/apply-patch+yaml",
        )

    async def relabel(self, body: JsonObject) -> JsonObject:
        """Merge labels and annotations into a pod (null removes); ``metadata`` has uid and resourceVersion.

        Raises:
            ApiError: 409 when the pod changed meanwhile, 422 when it is another one of that name, 404 when it is gone.
        """
        ref = Ref.of(body)
        meta = body["metadata"]
        if not (meta.get("uid") and meta.get("resourceVersion")):
            raise ValueError(
                f"{ref}: a relabel needs uid and resourceVersion, or it could move another engine"
            )
        patch = {
            "metadata": {
                name: meta[name]
                for name in ("uid", "resourceVersion", "labels", "annotations")
                if name in meta
            }
        }
        return await self._write(
            "label",
            ref,
            "PATCH",
            self._path(kind_of(ref), ref.namespace, ref.name),
            patch,
            {"fieldManager": FIELD_MANAGER},
            content_type="application/merge-patch+json",
        )

    async def take_over_fields(self, obj: JsonObject, managed_fields: list[JsonObject]) -> JsonObject:
        """Replace managedFields of an object of ours, at the very version it was read.

        Raises:
            ApiError: 409 when it changed meanwhile.
        """
        ref = Ref.of(obj)
        patch = [
            {"op": "replace", "path": "/metadata/managedFields", "value": managed_fields},
            {
                "op": "replace",
                "path": "/metadata/resourceVersion",
                "value": obj["metadata"]["resourceVersion"],
            },
        ]
        return await self._write(
            "fields",
            ref,
            "PATCH",
            self._path(kind_of(ref), ref.namespace, ref.name),
            patch,
            {"fieldManager": FIELD_MANAGER},
            content_type="application/json-patch+json",
        )

    async def delete(self, obj: JsonObject) -> None:
        """Delete exactly this object; gone already is fine.

        Raises:
            ApiError: 409 when another object bears the name now.
        """
        ref = Ref.of(obj)
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": obj["metadata"]["uid"]},
        }
        try:
            await self._write(
                "delete", ref, "DELETE", self._path(kind_of(ref), ref.namespace, ref.name), body, {}
            )
        except ApiError as error:
            if error.status != 404:
                raise

    async def _write(
        self,
        verb: str,
        ref: Ref,
        method: str,
        path: str,
        body: JsonObject | list[JsonObject],
        query: dict[str, str],
        *,
        content_type: str = "application/json",
    ) -> JsonObject:
        self.guard()
        self.on_write(verb, ref.kind)
        return await self._request(method, path, query, body, content_type)

    # -- transport ---------------------------------------------------------------------------------------------

    @staticmethod
    def _path(kind: Kind, namespace: str | None, name: str | None = None) -> str:
        parts = [kind.prefix]
        if namespace is not None:
            parts.append(f"namespaces/{quote(namespace, safe='')}")
        parts.append(kind.plural)
        if name is not None:
            parts.append(quote(name, safe=""))
        return "/".join(parts)

    async def _request(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> JsonObject:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = self._api.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        try:
            response = await self._api.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=self._timeout
            )
            text = await response.read()
        except (TimeoutError, aiohttp.ClientError) as error:
            raise ApiError(
                0, type(error).__name__, f"{method} {path}: no answer from the API server"
            ) from error
        if response.status >= 400:
            raise _api_error(response.status, text, response.getheader("Retry-After"))
        result: JsonObject = json.loads(text)
        return result


def _api_error(status: int, text: bytes, retry_after: str | None) -> ApiError:
    try:
        document = json.loads(text)
        reason, message = document.get("reason", ""), document.get("message", "")
    except (ValueError, AttributeError):
        reason, message = "", text[:200].decode(errors="replace")
    return ApiError(
        status,
        reason,
        message,
        retry_after=float(retry_after) if retry_after and retry_after.isdigit() else None,
    )
