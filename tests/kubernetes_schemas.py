"""Kubernetes' own strict schemas, as ``kubernetes-validate`` brings them: what it does, each file read once."""

from __future__ import annotations

import functools
import re

from jsonschema.validators import Draft202012Validator
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from servingtiers.core.state import JsonObject


def _folder(version: str) -> str:
    return f"kubernetes-json-schema/v{version}.0-local-strict"


@functools.cache
def _definitions(version: str) -> Registry:
    registry: Registry = (
        Resource.from_contents(schema_contents(f"{_folder(version)}/_definitions.json", version)) @ Registry()
    )
    return registry.crawl()


@functools.cache
def _validator(kind: str, api_version: str, version: str) -> Draft202012Validator:
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = schema_contents(f"{_folder(version)}/{kind.lower()}-{group}.json", version)
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(version))


def assert_valid(obj: JsonObject, version: str = "1.37") -> None:
    """Hold an object against the strict schema of a version of Kubernetes: a misspelt field is an error.

    Raises:
        jsonschema.ValidationError: The object does not fit.
        FileNotFoundError: That version has no such kind.
    """
    _validator(obj["kind"], obj["apiVersion"], version).validate(obj)
