"""What every model of the API shares, and the scalar types of the API.

Durations are Gateway-API strings (GEP-2257) plus ``us``; other quantities are decimal strings or integers with
the unit in the field's name. There are no floats: their rounding is not portable between clients.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.config import JsonDict

__all__ = [
    "API_VERSION",
    "GROUP",
    "KIND",
    "PLURAL",
    "POOL_KIND",
    "POOL_PLURAL",
    "VERSION",
    "DecimalString",
    "Duration",
    "Key",
    "Model",
    "Name",
    "Quantity",
    "cel",
    "duration_rule",
    "format_duration",
    "key_rule",
    "parse_duration",
]

GROUP = "servingtiers.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "ServingTier"
PLURAL = "servingtiers"
POOL_KIND = "TierPool"
POOL_PLURAL = "tierpools"

DURATION_PATTERN = r"^([0-9]{1,5}(h|m|s|ms|us)){1,4}$"
_DURATION_PART = re.compile(r"([0-9]{1,5})(h|ms|us|m|s)")
_UNIT_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}


class Model(BaseModel):
    """A frozen part of the API. Fields are camelCase in Kubernetes and snake_case here."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
        serialize_by_alias=True,
    )


def cel(rule: str, message: str, *, field_path: str | None = None) -> JsonDict:
    """Return one ``x-kubernetes-validations`` entry; the message must state the mend."""
    entry: JsonDict = {"rule": rule, "message": message}
    if field_path is not None:
        entry["fieldPath"] = field_path
    return entry


def parse_duration(text: str) -> float:
    """Return the seconds of a Gateway-API duration such as ``1h30m`` or ``500ms`` (also ``us``).

    Raises:
        ValueError: The text is no such duration.
    """
    if not re.fullmatch(DURATION_PATTERN, text):
        raise ValueError(f"{text!r} is not a duration: write it like 500ms, 30s, 5m or 1h30m")
    return sum(int(number) * _UNIT_SECONDS[unit] for number, unit in _DURATION_PART.findall(text))


def format_duration(seconds: float) -> str:
    """Return a short Gateway-API duration for ``seconds``, rounded to at least two significant digits.

    Whole microseconds below 10 ms, whole milliseconds below 10 s, whole seconds above; at most 99999h.
    """
    micros = round(min(max(seconds, 0.0), 99_999 * 3600.0) * 1e6)
    if micros <= 0:
        return "0s"
    if micros < 10_000 and micros % 1_000:
        return f"{micros}us"
    if micros < 10_000_000 and micros % 1_000_000:
        return f"{round(micros / 1_000)}ms"
    total = round(micros / 1e6)
    hours, rest = divmod(total, 3600)
    minutes, secs = divmod(rest, 60)
    parts = [(hours, "h"), (minutes, "m"), (secs, "s")]
    return "".join(f"{value}{unit}" for value, unit in parts if value)


def duration_rule(low: str, high: str) -> JsonDict:
    """Return what makes a `Duration` field bounded, for its ``json_schema_extra``.

    The rule tests the pattern again, so that a malformed text gets this message and not an evaluation error.
    """
    return {
        "x-kubernetes-validations": [
            cel(
                f"self.matches('{DURATION_PATTERN}') && duration(self) >= duration('{low}')"
                f" && duration(self) <= duration('{high}')",
                f"must be a duration from {low} to {high}: write it like 500ms, 30s, 5m or 1h30m",
            )
        ]
    }


def key_rule(pattern: str, max_length: int, message: str, *more: JsonDict) -> JsonDict:
    """Return what bounds the keys of a map, for its ``json_schema_extra``: OpenAPI v3.0 cannot say it.

    Args:
        pattern: What every key must match.
        max_length: Most characters of a key.
        message: States the mend.
        more: Further rules of the same map.
    """
    keys = cel(f"self.all(k, k.size() <= {max_length} && k.matches('{pattern}'))", message)
    return {"x-kubernetes-validations": [keys, *more]}


Duration = Annotated[
    str,
    Field(
        pattern=DURATION_PATTERN,
        min_length=2,
        max_length=28,
        json_schema_extra=duration_rule("1us", "8760h"),
    ),
]
"""A positive duration such as ``500ms`` or ``1h30m``."""


def _from_integer(value: object) -> object:
    """Turn an integer into its text: people write ``cpu: 4`` and ``requestsPerSecond: 20``."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


DECIMAL_PATTERN = r"^[0-9]{1,9}([.][0-9]{1,6})?$"
DecimalString = Annotated[
    str,
    Field(
        pattern=DECIMAL_PATTERN,
        max_length=16,
        json_schema_extra={"x-kubernetes-int-or-string": True, "minimum": 0, "maximum": 999_999_999},
    ),
    BeforeValidator(_from_integer),
]
"""A non-negative decimal number, such as ``20`` or ``"0.5"``: a string where it has a fraction."""

QUANTITY_PATTERN = r"^[0-9]{1,12}([.][0-9]{1,6})?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
Quantity = Annotated[
    str,
    Field(
        pattern=QUANTITY_PATTERN,
        max_length=32,
        json_schema_extra={"x-kubernetes-int-or-string": True, "minimum": 0, "maximum": 999_999_999_999},
    ),
    BeforeValidator(_from_integer),
]
"""A Kubernetes quantity, such as ``4``, ``"500m"`` or ``"16Gi"``."""

Name = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
        min_length=1,
        max_length=253,
    ),
]
"""The name of a Kubernetes object in the tier's own namespace."""

Key = Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", min_length=1, max_length=253)]
"""A key inside a Secret or ConfigMap."""
