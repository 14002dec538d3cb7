"""What every model of the API shares, and the scalar types of the API.

Durations are Gateway-API strings (GEP-2257) plus ``us``; other quantities are decimal strings or integers with
the unit in the field's name. There are no floats: their rounding is not portable between clients.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.config import JsonDict

__all__ = [
    "DecimalString",
    "Duration",
    "Key",
    "Model",
    "Name",
    "cel",
    "format_duration",
    "parse_duration",
]

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
    """Return the shortest Gateway-API duration for ``seconds``, to the microsecond."""
    micros = round(seconds * 1e6)
    if micros <= 0:
        return "0s"
    if micros < 1_000:
        return f"{micros}us"
    if micros < 10_000_000 and micros % 1_000_000:
        millis = round(micros / 1_000)
        return f"{millis}ms"
    total = round(micros / 1e6)
    hours, rest = divmod(total, 3600)
    minutes, secs = divmod(rest, 60)
    parts = [(hours, "h"), (minutes, "m"), (secs, "s")]
    return "".join(f"{value}{unit}" for value, unit in parts if value)


_POSITIVE = cel(
    "duration(self) > duration('0s')",
    "must be longer than 0s; write it like 500ms, 30s, 5m or 1h30m",
)

Duration = Annotated[
    str,
    Field(
        pattern=DURATION_PATTERN,
        min_length=2,
        max_length=24,
        json_schema_extra={"x-kubernetes-validations": [_POSITIVE]},
    ),
]
"""A positive duration such as ``500ms`` or ``1h30m``."""

DecimalString = Annotated[str, Field(pattern=r"^[0-9]{1,9}(\.[0-9]{1,6})?$", max_length=16)]
"""A non-negative decimal number as a string, such as ``"20"`` or ``"0.5"``."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", min_length=1, max_length=253)]
"""The name of a Kubernetes object in the tier's own namespace."""

Key = Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", min_length=1, max_length=253)]
"""A key inside a Secret or ConfigMap."""
