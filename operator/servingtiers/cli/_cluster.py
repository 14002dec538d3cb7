"""Reading a tier from the cluster that the kubeconfig names."""

from __future__ import annotations

from typing import Any

from servingtiers.cli._options import InputError

__all__ = ["tier_from_cluster"]

_GROUP, _VERSION, _PLURAL = "servingtiers.io", "v1alpha1", "servingtiers"
_TIMEOUT_SECONDS = 15


def tier_from_cluster(name: str, namespace: str | None, context: str | None) -> dict[str, Any]:
    """Return a ServingTier as the API server has it.

    Args:
        name: Of the tier.
        namespace: Of the tier; None: the kubeconfig's own.
        context: Of the kubeconfig; None: the current one.

    Raises:
        InputError: There is no such tier, or no cluster that answers.
    """
    # The client takes half a second to import: --help and -f need not wait for it.
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        config.load_kube_config(context=context)
        if namespace is None:
            contexts, current = config.list_kube_config_contexts()
            chosen = next((each for each in contexts if each["name"] == context), current)
            namespace = chosen["context"].get("namespace") or "default"
    except config.ConfigException as error:
        raise InputError(f"no cluster to ask: {error}; set KUBECONFIG, or give the tier with -f") from error
    api = client.CustomObjectsApi()
    try:
        found: dict[str, Any] = api.get_namespaced_custom_object(
            _GROUP, _VERSION, namespace, _PLURAL, name, _request_timeout=_TIMEOUT_SECONDS
        )
    except ApiException as error:
        if error.status == 404:
            raise InputError(
                f"no ServingTier {name} in namespace {namespace}: see kubectl get servingtiers -A"
            ) from error
        raise InputError(
            f"the API server answers {error.status} {error.reason} for {namespace}/{name}"
        ) from error
    except HTTPError as error:
        raise InputError(f"the API server does not answer: {' '.join(str(error).split())}") from error
    return found
