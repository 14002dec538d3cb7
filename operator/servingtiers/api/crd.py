"""The CustomResourceDefinition, made from the models.

pydantic speaks JSON Schema; an API server takes *structural* OpenAPI v3.0 schemas. `structural_schema` rewrites the
one into the other: references inlined, `null` alternatives and `default: null` dropped, constants as one-value
enums, exclusive bounds as booleans, and nothing that a structural schema cannot say is let through silently.

Defaults: a structural default is filled in only where its parent object exists. So a parent whose members all have
defaults has a default too; it is written out in full, because CEL rules are tested on it before its members are
filled in (`scaling: {}` is refused: "no such key: minReplicas"). A parent that means something by being absent
(`slo`, `pool`, `workload`) has none. The status has no defaults: what the operator did not write is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from servingtiers.api.base import GROUP, KIND, PLURAL, POOL_KIND, POOL_PLURAL, VERSION, Model
from servingtiers.api.pool import TierPoolSpec, TierPoolStatus
from servingtiers.api.spec import ServingTierSpec
from servingtiers.api.status import ServingTierStatus

__all__ = ["crd_document", "crd_documents", "pool_crd_document", "structural_schema"]

Json: TypeAlias = dict[str, Any]

_KEPT = (
    "description", "type", "format", "x-kubernetes-int-or-string", "enum", "pattern", "minLength", "maxLength",
    "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minItems", "maxItems", "minProperties",
    "maxProperties", "default", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type",
    "x-kubernetes-validations", "required", "properties", "additionalProperties", "items",
)  # fmt: skip
"""What a structural schema may say, in the order in which it is written."""

_INT32_MAX = 2**31 - 1


def structural_schema(model: type[Model], *, defaults: bool) -> Json:
    """Return the structural OpenAPI v3.0 schema of a model.

    Args:
        model: The model.
        defaults: Whether defaults are part of the schema.

    Raises:
        ValueError: The model says something that a structural schema cannot.
    """
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.pop("$defs", {})
    return _structural(schema, definitions, defaults=defaults, path=model.__name__)


def crd_documents() -> tuple[Json, ...]:
    """Return the CustomResourceDefinitions of all kinds."""
    return crd_document(), pool_crd_document()


def crd_document() -> Json:
    """Return the CustomResourceDefinition of ServingTier."""
    return _document(
        KIND,
        PLURAL,
        "st",
        "ServingTier serves one model with vLLM in one tier of the latency–throughput trade-off.",
        ServingTierSpec,
        ServingTierStatus,
        _printer_columns(),
    )


def pool_crd_document() -> Json:
    """Return the CustomResourceDefinition of TierPool."""
    return _document(
        POOL_KIND,
        POOL_PLURAL,
        "tp",
        "TierPool lets the tiers of one model that name it lend each other engines.",
        TierPoolSpec,
        TierPoolStatus,
        _pool_printer_columns(),
    )


def _document(
    kind: str,
    plural: str,
    short: str,
    description: str,
    spec: type[Model],
    status: type[Model],
    columns: list[Json],
) -> Json:
    text = {"type": "string", "maxLength": 253}
    schema: Json = {
        "description": description,
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"description": "Version of the schema of this object.", **text},
            "kind": {"description": "Kind of this object.", **text},
            "metadata": {"type": "object"},
            "spec": structural_schema(spec, defaults=True),
            "status": structural_schema(status, defaults=False),
        },
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short],
                # Not `all`, or `kubectl delete all --all` would delete tiers; and not the plural, which would then
                # stand for every kind of the category.
                "categories": ["llm"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def _column(name: str, path: str, description: str, *, wide: bool = False, kind: str = "string") -> Json:
    """Return one column of `kubectl get`; a wide one shows only with `-o wide`."""
    return {
        "name": name,
        "type": kind,
        "description": description,
        "jsonPath": path,
        "priority": 1 if wide else 0,
    }


def _condition_column(name: str, title: str, description: str, *, wide: bool = False) -> Json:
    return _column(title, f'.status.conditions[?(@.type=="{name}")].status', description, wide=wide)


def _printer_columns() -> list[Json]:
    return [
        _column("Tier", ".spec.tier", "Latency, Balanced or Throughput"),
        _column("Model", ".spec.model.name", "Model served"),
        _column("Replicas", ".status.replicas", "Ready and desired engines of all pools"),
        _condition_column("Ready", "Ready", "Whether the tier can serve"),
        _condition_column("SLOMet", "SLO met", "Whether every objective is met"),
        _column("Cost/h", ".status.cost.perHour", "Cost of the tier's accelerators per hour"),
        _column("Mode", ".spec.scaling.mode", "Who sets the replicas", wide=True),
        _column(
            "Accelerator",
            ".status.effective.pools[0].accelerator",
            "Accelerator of the first pool",
            wide=True,
        ),
        _condition_column("Feasible", "Feasible", "Whether the objectives can be met at all", wide=True),
        _column("Endpoint", ".status.endpoint", "Address inside the cluster", wide=True),
        _column("Age", ".metadata.creationTimestamp", "Time since creation", kind="date"),
    ]


def _pool_printer_columns() -> list[Json]:
    return [
        _column("Model", ".spec.servedModelName", "Name that the members serve"),
        _column("Engines", ".status.engines", "Ready engines of all members", kind="integer"),
        _column("Moved", ".status.moved", "Engines that are not at home", kind="integer"),
        _column("Accelerators", ".status.accelerators", "Accelerators in use", kind="integer"),
        _condition_column("Accepted", "Accepted", "Whether the members can stand in for one another"),
        _condition_column("Ready", "Ready", "Whether there is somebody to lend to and from"),
        _column("Age", ".metadata.creationTimestamp", "Time since creation", kind="date"),
    ]


def _structural(
    node: Mapping[str, Any], definitions: Mapping[str, Json], *, defaults: bool, path: str
) -> Json:
    """Return one node of a JSON Schema, and all below it, as a structural schema."""
    flat = _resolved(node, definitions, path)
    out: Json = {}
    for key, value in flat.items():
        match key:
            case "title" | "propertyNames":
                pass  # keys of maps are bounded by a CEL rule instead; see below
            case "description":
                out[key] = " ".join(str(value).split())
            case "const":
                out["enum"] = [value]
            case "exclusiveMinimum" | "exclusiveMaximum":
                out[key] = True
                out["minimum" if key == "exclusiveMinimum" else "maximum"] = value
            case "additionalProperties" if value is False:
                pass  # structural schemas prune unknown fields; clients see them by field validation
            case "additionalProperties" | "items":
                out[key] = _structural(value, definitions, defaults=defaults, path=f"{path}[*]")
            case "patternProperties" if len(value) == 1:
                inner = next(iter(value.values()))
                out["additionalProperties"] = _structural(
                    inner, definitions, defaults=defaults, path=f"{path}[*]"
                )
            case "properties":
                out[key] = {
                    name: _structural(child, definitions, defaults=defaults, path=f"{path}.{name}")
                    for name, child in value.items()
                }
            case "default":
                if defaults and value is not None:
                    out[key] = _without_nulls(value)
            case _ if key in _KEPT:
                out[key] = value
            case _:
                raise ValueError(f"{path}: a structural schema cannot say {key!r}")
    if ("propertyNames" in flat or "patternProperties" in flat) and "x-kubernetes-validations" not in out:
        raise ValueError(f"{path}: bound the keys for the API server too, with key_rule()")
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    if out.get("type") == "integer":
        out["format"] = "int32" if out.get("maximum", _INT32_MAX + 1) <= _INT32_MAX else "int64"
    return {key: out[key] for key in _KEPT if key in out}


def _resolved(node: Mapping[str, Any], definitions: Mapping[str, Json], path: str) -> Json:
    """Return a node with its reference and its `null` alternative replaced by what they stand for.

    What stands beside a reference (description, default) wins over the definition's own.
    """
    flat = dict(node)
    while True:
        if "$ref" in flat:
            name = flat.pop("$ref").removeprefix("#/$defs/")
            flat = {**definitions[name], **flat}
        elif "anyOf" in flat:
            options = [option for option in flat.pop("anyOf") if option != {"type": "null"}]
            if len(options) != 1:
                raise ValueError(
                    f"{path}: a structural schema has no unions; use sibling fields and a CEL rule"
                )
            flat = {**options[0], **flat}
        else:
            return flat


def _without_nulls(value: Any) -> Any:
    """Return a default without the members that default to nothing."""
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(member) for name, member in value.items() if member is not None}
