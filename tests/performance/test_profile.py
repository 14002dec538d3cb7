"""The user's measured profile: read as documented, and refused with the line and the mend."""

from __future__ import annotations

import pytest

from servingtiers.performance.profile import ProfileError, load_profile, parse_profile

HEADER = "kind,batch,context_tokens,new_tokens,ms"
GOOD = [
    "# engine: vLLM 0.24.0",
    HEADER,
    "decode,1,512,,8.1",
    "decode,1,4096,,9.0",
    "decode,32,512,,11.9",
    "",
    "prefill,,0,1024,61.3",
    "prefill,,,128,12",
    "mixed,32,1024,512,44.0",
]


def test_the_documented_example_is_read():
    profile = parse_profile("p.csv", GOOD)
    assert [row.kind for row in profile.rows] == ["decode"] * 3 + ["prefill"] * 2 + ["mixed"]
    assert profile.rows[0].ms == 8.1
    assert profile.rows[4].context == 0
    assert profile.rows[5].new_tokens == 512
    assert profile.kv_capacity_tokens is None
    assert profile.describe() == "profile p.csv, vLLM 0.24.0, 6 steps"


def test_columns_come_in_any_order_and_further_ones_are_ignored():
    lines = [
        "note,ms,new_tokens,context_tokens,batch,kind,kv_capacity_tokens",
        "x,8.1,,512,1,decode,1000",
        "x,9.1,,4096,2,decode,1000",
        "x,61.3,1024,0,,prefill,1000",
        "x,30.3,512,0,,prefill,1000",
    ]
    assert parse_profile("p.csv", lines).kv_capacity_tokens == 1000


def test_a_file_is_loaded_by_path(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(GOOD))
    assert load_profile(path).name == "mine.csv"


def test_a_missing_or_binary_file_is_one_line(tmp_path):
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(tmp_path / "none.csv")
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="UTF-8"):
        load_profile(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("decoding,1,512,,8.1", r"line 10: kind 'decoding' is none of decode, prefill, mixed"),
        ("decode,1,512,,fast", r"line 10: ms 'fast' must be a positive number"),
        ("decode,1,512,,-3", "must be a positive number"),
        ("decode,1,512,,nan", "must be a positive number"),
        ("decode,1,512,,inf", "must be a positive number"),
        ("decode,,512,,8", "batch '' must be a whole number"),
        ("decode,0,512,,8", "batch '0' must be a whole number of at least 1"),
        ("decode,1.5,512,,8", "batch '1.5' must be a whole number"),
        ("decode,1,,,8", "context_tokens '' must be a whole number"),
        ("prefill,,0,,8", "new_tokens '' must be a whole number"),
        ("mixed,4,1024,0,8", "new_tokens '0' must be a whole number of at least 1"),
    ],
)
def test_a_malformed_line_is_named(line, words):
    with pytest.raises(ProfileError, match=words) as caught:
        parse_profile("p.csv", [*GOOD, line])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "lacks the column 'kind'"),
        (["batch,ms", "1,2"], "lacks the column 'kind'"),
        ([HEADER], "two batches and two contexts"),
        ([line for line in GOOD if not line.startswith("decode,32")], "two batches and two contexts"),
        ([line for line in GOOD if ",128,12" not in line], "two prompt lengths"),
    ],
)
def test_a_profile_that_lacks_something_says_what(lines, words):
    with pytest.raises(ProfileError, match=words):
        parse_profile("p.csv", lines)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_file_that_a_spreadsheet_has_saved_is_read(tmp_path, delimiter):
    """With a byte-order mark, capitals, quotes or another delimiter it means the same."""
    lines = [line if line.startswith("#") else line.replace(",", delimiter) for line in GOOD]
    header = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    lines[header] = lines[header].replace("kind", '"Kind"')
    path = tmp_path / "mine.csv"
    path.write_text("\r\n".join(lines), encoding="utf-8-sig")

    assert load_profile(path).rows == parse_profile("p.csv", GOOD).rows
