"""Plans are pinned: what was chosen for a pool is recorded on its Deployment and chosen anew when the spec changes.

An operator of another version, catalogue or profile would choose or write something else; that must restart no
engine. So the pod template is recorded as it was written, and used again for as long as the part of the spec that
it was made from stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from servingtiers.api.spec import ServingTier
from servingtiers.core.decisions import PoolRole
from servingtiers.core.diff import content_hash
from servingtiers.core.effective import PoolSettings
from servingtiers.core.state import JsonObject

__all__ = ["PLAN_ANNOTATION", "REPLAN_ANNOTATION", "Pin", "annotation", "read", "spec_hash"]

PLAN_ANNOTATION: Final = "servingtiers.io/plan"
"""On a pool's Deployment: the recorded plan, as JSON."""
REPLAN_ANNOTATION: Final = "servingtiers.io/replan"
"""On a ServingTier: any new value makes the operator choose anew, which may restart engines."""

_SETTINGS = TypeAdapter(PoolSettings)


_SHORT = TypeAdapter(dict[str, float])


@dataclass(frozen=True, slots=True)
class Pin:
    """What was chosen and written for one pool."""

    spec_hash: str
    operator_version: str
    template: JsonObject
    """The pod template as it was written."""
    settings: PoolSettings | None
    """None where an older or newer operator recorded settings of another shape; the template still holds."""
    short: Mapping[str, float] = field(default_factory=dict)
    """Accelerators that the pool gave up because no node had room for its engines, and when: Unix time, seconds."""


def spec_hash(tier: ServingTier, role: PoolRole) -> str:
    """Return the hash of everything in the spec that a pool's engines are made from.

    Defaults are left out, so that a field which a later version adds changes nothing. Scaling bounds, the router
    and the mode are left out because engines do not depend on them.
    """
    spec = tier.spec
    match role:
        case PoolRole.AGGREGATED:
            pool = spec.pool
        case PoolRole.PREFILL:
            pool = spec.disaggregation.prefill if spec.disaggregation else None
        case PoolRole.DECODE:
            pool = spec.disaggregation.decode if spec.disaggregation else None
    whole = spec.model_dump(mode="json", exclude_defaults=True)
    slo = {key: value for key, value in whole.get("slo", {}).items() if key != "window"}
    parts: dict[str, Any] = {
        "role": role,
        "tier": spec.tier,
        "slo": slo,
        **{key: whole.get(key) for key in ("model", "workload", "pod", "drainTimeout")},
        "pool": pool.model_dump(mode="json", exclude_defaults=True, exclude={"scaling"}) if pool else {},
        **{key: whole.get("disaggregation", {}).get(key) for key in ("transfer", "elasticRoles")},
        "replan": tier.metadata.annotations.get(REPLAN_ANNOTATION),
    }
    return content_hash(parts)


def annotation(pin: Pin) -> str:
    """Return the pin as the value of its annotation."""
    return json.dumps(
        {
            "specHash": pin.spec_hash,
            "operator": pin.operator_version,
            "template": pin.template,
            "settings": None if pin.settings is None else _SETTINGS.dump_python(pin.settings, mode="json"),
            # Left out where there is none: an annotation that an older operator wrote is not written anew for it.
            **({"short": dict(pin.short)} if pin.short else {}),
        },
        separators=(",", ":"),
        sort_keys=True,
    )


def read(deployment: Mapping[str, Any]) -> Pin | None:
    """Return the pin of a Deployment; None where there is none that can be read."""
    text = deployment["metadata"].get("annotations", {}).get(PLAN_ANNOTATION)
    if text is None:
        return None
    try:
        record = json.loads(text)
        template, hashed, version = record["template"], record["specHash"], record["operator"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(template, dict):
        return None
    try:
        settings = _SETTINGS.validate_python(record.get("settings"))
    except ValidationError:
        settings = None
    try:
        short = _SHORT.validate_python(record.get("short", {}))
    except ValidationError:
        short = {}
    return Pin(hashed, version, template, settings, short)
