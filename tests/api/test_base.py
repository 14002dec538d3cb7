"""Durations and quantities of the API."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from servingtiers.api.base import (
    DURATION_PATTERN,
    DecimalString,
    Duration,
    Name,
    Quantity,
    format_duration,
    parse_duration,
)

durations = st.from_regex(DURATION_PATTERN, fullmatch=True)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("1h30m", 5400.0),
        ("90us", 9e-5),
        ("1m1ms", 60.001),
        ("1s1h", 3601.0),
        ("0s", 0.0),
        ("99999h", 359_996_400.0),
    ],
)
def test_a_duration_is_the_sum_of_its_parts_in_any_order(text: str, seconds: float) -> None:
    """Go's ParseDuration, which the API server's rules use, reads them so."""
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["", "5", "1.5s", "-1s", "1d", "1s ", "1s\n", "100000s", "1h1h1h1h1h", "１s"]
)
def test_what_is_no_duration_is_refused_with_an_example_of_one(text: str) -> None:
    """The message states the mend."""
    with pytest.raises(ValueError, match="write it like 500ms"):
        parse_duration(text)


@given(durations)
def test_every_text_of_the_pattern_has_a_length_the_field_takes(text: str) -> None:
    """Otherwise the pattern, which users read, would promise more than the field takes."""
    assert TypeAdapter(Duration).validate_python(text) == text


@given(st.floats(min_value=1e-6, max_value=359_996_400))
def test_a_formatted_duration_is_valid_and_within_five_percent(seconds: float) -> None:
    """Status shows rounded durations, which must still be durations."""
    text = format_duration(seconds)
    assert re.fullmatch(DURATION_PATTERN, text)
    assert parse_duration(text) == pytest.approx(seconds, rel=0.05, abs=5e-7)


@given(st.one_of(st.floats(max_value=0, allow_infinity=False), st.floats(min_value=3.6e8, max_value=1e300)))
def test_a_duration_out_of_range_is_formatted_at_the_end_of_the_range(seconds: float) -> None:
    """A wild measurement must not stop a status write."""
    assert format_duration(seconds) in {"0s", "99999h"}


@pytest.mark.parametrize(
    ("kind", "given_value", "kept"),
    [
        (Quantity, 4, "4"),
        (Quantity, "500m", "500m"),
        (Quantity, "1.5Gi", "1.5Gi"),
        (DecimalString, 20, "20"),
        (DecimalString, "0.5", "0.5"),
    ],
)
def test_a_quantity_may_be_an_integer_and_is_kept_as_text(
    kind: object, given_value: object, kept: str
) -> None:
    """People write `cpu: 4`."""
    assert TypeAdapter(kind).validate_python(given_value) == kept


@pytest.mark.parametrize("value", [True, 1.5, -1, "-1", "1e3", "", "4 ", "4gb", "1000000000000000", None])
@pytest.mark.parametrize("kind", [Quantity, DecimalString])
def test_what_is_no_quantity_is_refused(kind: object, value: object) -> None:
    """Signs, exponents, spaces and lower-case units included."""
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize(
    ("name", "valid"), [("a", True), ("a.b-c", True), ("a..b", False), ("a.-b", False), ("A", False)]
)
def test_a_name_is_a_dns_subdomain(name: str, valid: bool) -> None:
    """As Kubernetes checks names of Secrets and claims."""
    adapter = TypeAdapter(Name)
    if valid:
        assert adapter.validate_python(name) == name
    else:
        with pytest.raises(ValidationError):
            adapter.validate_python(name)
