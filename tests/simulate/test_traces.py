"""Traces are read as they were logged, scaled without losing their bursts, and re-drawn as their statistics say."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from properties import examples
from servingtiers.simulate.traces import (
    JITTER_SECONDS,
    Trace,
    bundled,
    bundled_names,
    load_trace,
    read_azure,
    read_mooncake,
    redraw_servegen,
    synthetic,
)


def test_the_shipped_conversation_log_is_the_published_one():
    trace = load_trace("azure-conv")
    assert len(trace) == 19_366
    assert trace.origin == "real log"
    assert trace.arrival[0] == 0.0
    assert trace.rate == pytest.approx(5.53, abs=0.02)
    assert trace.cv == pytest.approx(1.1, abs=0.05)
    assert (trace.prompt[0], trace.output[0]) == (374, 44)
    assert trace.arrival[1] == pytest.approx(4.3145790, abs=1e-6)


def test_the_shipped_code_log_is_bursty():
    trace = load_trace("azure-code")
    assert len(trace) == 8_819
    assert trace.cv == pytest.approx(13.2, abs=0.2)


def test_an_azure_csv_may_be_plain_and_unsorted(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:10.5,20,2\n2024-01-01 00:00:08,10,1\n"
    )
    trace = read_azure(path)
    assert trace.name == "mine"
    assert trace.arrival.tolist() == [0.0, 2.5]
    assert trace.prompt.tolist() == [10, 20]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n"])
def test_a_csv_of_another_form_is_refused_with_the_columns(tmp_path, text):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"line [12]: .*TIMESTAMP, ContextTokens, GeneratedTokens"):
        read_azure(path)


def test_mooncake_hashes_tell_the_shared_prefix(tmp_path):
    rows = [
        {"timestamp": 0, "input_length": 1500, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 2500, "input_length": 1400, "output_length": 6, "hash_ids": [1, 2, 9]},
        {"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [8, 1]},
    ]
    path = tmp_path / "mooncake.jsonl.gz"
    with gzip.open(path, "wt") as stream:
        stream.write("\n".join(json.dumps(row) for row in rows))
    trace = read_mooncake(path)
    assert trace.arrival.tolist() == [0.0, 2.5, 3.0]
    assert trace.shared.tolist() == [0, 1024, 0]
    assert len(load_trace(str(path))) == 3


def test_a_cut_keeps_the_quiet_beginning():
    trace = synthetic("spike:0.01:50:600:20", prompt=100, output=10, seed=0).between(100, 400)
    assert trace.seconds == 300
    assert trace.arrival[0] > 0
    assert abs(np.median(trace.arrival) - 200) < 15
    with pytest.raises(ValueError, match="give --from below --to"):
        trace.between(400, 500)


@settings(deadline=None, max_examples=examples(30))
@given(factor=st.floats(0.05, 5.0), seed=st.integers(0, 2**31))
def test_scaling_changes_the_count_by_the_factor_and_stays_in_order(factor, seed):
    base = synthetic("step:5:15:600", prompt=100, output=10, seed=1)
    scaled = base.scaled(factor, seed)
    spread = 5 * math.sqrt(len(base) * max(factor % 1, 0.01)) + 1
    assert abs(len(scaled) - factor * len(base)) <= spread
    assert (np.diff(scaled.arrival) >= 0).all()
    assert scaled.arrival[0] >= 0
    assert scaled.arrival[-1] < scaled.seconds


def test_thinning_keeps_requests_as_they_are_and_superposing_jitters_copies():
    base = load_trace("azure-code", end=1200)
    half = base.scaled(0.5, 3)
    pairs = set(zip(base.arrival.tolist(), base.prompt.tolist(), strict=True))
    assert set(zip(half.arrival.tolist(), half.prompt.tolist(), strict=True)) <= pairs
    twice = base.scaled(2, 3)
    assert len(twice) == 2 * len(base)
    kept = np.isin(twice.arrival, base.arrival)
    assert kept.sum() == len(base)
    assert sorted(twice.prompt.tolist()) == sorted([*base.prompt.tolist(), *base.prompt.tolist()])
    # Copies moved by up to half a minute: counts of ten minutes hardly change, those of a second do.
    assert JITTER_SECONDS == 30.0
    coarse = np.histogram(base.arrival, 2, (0, 1200))[0], np.histogram(twice.arrival[~kept], 2, (0, 1200))[0]
    assert np.abs(coarse[0] - coarse[1]).max() < 0.15 * len(base)


@pytest.mark.parametrize(
    ("text", "early", "late"),
    [("step:2:20:900", 2, 20), ("ramp:0:20:900", 10 / 3, 50 / 3), ("sawtooth:0:20:900:300", 10, 10)],
)
def test_shapes_have_the_rates_they_say(text, early, late):
    trace = synthetic(text, prompt=500, output=50, seed=0)
    assert (trace.arrival < 300).sum() / 300 == pytest.approx(early, rel=0.15)
    assert (trace.arrival >= 600).sum() / 300 == pytest.approx(late, rel=0.1)
    assert trace.prompt.mean() == pytest.approx(500, rel=0.05)
    assert trace.output.mean() == pytest.approx(50, rel=0.05)


@pytest.mark.parametrize("text", ["step:2", "step:0:0:900", "wave:1:2:3", "step:a:b:c", "step:1:2:0"])
def test_a_shape_that_is_none_is_refused_with_the_form(text):
    with pytest.raises(ValueError, match="SHAPE:LOW:HIGH:SECONDS"):
        synthetic(text, prompt=10, output=10, seed=0)


def _redrawn(seed: int, scale: float = 0.01) -> Trace:
    return redraw_servegen(
        bundled("servegen"), bundled("servegen-lengths"), start=36_000, seconds=1800, scale=scale, seed=seed
    )


def test_a_redrawn_stream_says_so_and_has_the_published_rate():
    trace = _redrawn(0, scale=0.1)
    assert "re-drawn" in trace.origin
    rates = load_rates(36_000, 1800)
    assert trace.rate == pytest.approx(0.1 * rates, rel=0.1)
    assert np.array_equal(_redrawn(0).arrival, _redrawn(0).arrival)
    assert not np.array_equal(_redrawn(0).arrival, _redrawn(1).arrival)


def load_rates(start: float, seconds: float) -> float:
    """Mean of the published rates of a stretch, requests per second."""
    import csv

    with gzip.open(bundled("servegen"), "rt") as stream:
        rows = [(float(r["t"]), float(r["rate_rps"])) for r in csv.DictReader(stream)]
    first = min(t for t, _ in rows)
    inside = [rate for t, rate in rows if first + start <= t < first + start + seconds]
    return sum(inside) / (seconds / 600)


def test_a_stretch_outside_the_statistics_is_refused():
    with pytest.raises(ValueError, match="choose a start and a length inside it"):
        redraw_servegen(
            bundled("servegen"), bundled("servegen-lengths"), start=0, seconds=1e7, scale=1, seed=0
        )


def test_an_unknown_trace_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="azure-conv"):
        load_trace("nowhere.csv")
    with pytest.raises(ValueError, match="no trace 'x' ships"):
        bundled("x")
    assert all(bundled(name).is_file() for name in bundled_names())


def test_requests_too_long_for_the_engine_are_left_out_and_counted():
    trace = load_trace("azure-conv", end=600)
    kept, dropped = trace.capped(2000)
    assert dropped > 0
    assert len(kept) + dropped == len(trace)
    assert (kept.prompt + kept.output).max() <= 2000


@pytest.mark.parametrize(("arrival", "prompt"), [([1.0, 0.0], [1, 1]), ([0.0, 1.0], [1, 0]), ([0.0], [1, 1])])
def test_a_trace_that_makes_no_sense_cannot_be_made(arrival, prompt):
    ones = np.ones(2, dtype=np.int64)
    with pytest.raises(ValueError, match=r"ascend|1 token|one arrival"):
        Trace("x", "synthetic", 2.0, np.array(arrival), np.array(prompt), ones, ones)


HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def written(tmp_path, text, name="log.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "stamps",
    [
        ["2024-05-10 00:00:00+00:00", "2024-05-10 00:00:01.500000+00:00", "2024-05-10 00:00:03+00:00"],
        ["2024-05-10 00:00:00", "2024-05-10 00:00:01.5", "2024-05-10 00:00:03.0000000"],
        ["2024-05-10T00:00:00Z", "2024-05-10T00:00:01.5Z", "2024-05-10T00:00:03Z"],
        ["2024-05-10 02:00:00+02:00", "2024-05-10 00:00:01.5+00:00", "2024-05-09 23:00:03-01:00"],
        ["5", "6.5", "8"],
    ],
)
def test_times_are_read_with_and_without_fraction_and_zone(tmp_path, stamps):
    path = written(tmp_path, HEADER + "".join(f"{stamp},10,5\n" for stamp in stamps))
    assert read_azure(path).arrival.tolist() == [0.0, 1.5, 3.0]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("\ufeff" + HEADER + "2024-05-10 00:00:00,7,5\r\n2024-05-10 00:00:01,8,5\r\n\r\n", [7, 8]),
        (HEADER + '"2024-05-10 00:00:00","7","5"\n2024-05-10 00:00:01,8,5', [7, 8]),
        (HEADER + "2024-05-10 00:00:00,7.0,5\n2024-05-10 00:00:01,0,5\n", [7, 1]),
        (
            "model,TIMESTAMP,x,ContextTokens,GeneratedTokens\na,2024-05-10 00:00:00,,7,5\nb,2024-05-10 00:00:01,y,8,5\n",
            [7, 8],
        ),
        (
            "Timestamp,Model,Request tokens,Response tokens,Log Type\n5,ChatGPT,472,18,a\n45,GPT-4,1087,0,b\n",
            [472, 1087],
        ),
    ],
)
def test_logs_as_tools_write_them_are_read(tmp_path, text, prompts):
    """A byte-order mark, CRLF, a blank end, quotes, floats, further columns, BurstGPT's names."""
    found = read_azure(written(tmp_path, text))
    assert found.prompt.tolist() == prompts
    assert found.output.min() >= 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("2024-05-10 00:00:00,seven,5", "line 4"),
        ("2024-05-10 00:00:00,7", "line 4"),
        ("2024-13-10 00:00:00,7,5", "line 4"),
        ("2024-02-30 00:00:00,7,5", "line 4"),
        ("yesterday,7,5", "line 4"),
        ("2024-05-10 00:00:00,-7,5", "line 4"),
        ("2024-05-10 00:00:00,nan,5", "line 4"),
        ("2024-05-10 00:00:00,,5", "line 4"),
        ("2024-05-10 00:00:00,7.5,5", "line 4"),
        ("nan,7,5", "line 4"),
        ("2024-05-10 00:00:00,9999999999,5", "line 4"),
    ],
)
def test_a_broken_line_is_named(tmp_path, row, reason):
    good = "2024-05-10 00:00:00,7,5\n"
    with pytest.raises(ValueError, match=reason):
        read_azure(written(tmp_path, HEADER + good + good + row + "\n" + good))


@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b\x08broken", b"\x89PNG\r\n\x1a\n\x00\x01", b"\xff\xfe\x00"]
)
def test_what_is_no_log_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"log\.csv"):
        load_trace(str(written(tmp_path, content)))


def test_a_part_of_a_long_log_is_that_part_of_the_whole(tmp_path, monkeypatch):
    """Small blocks: the part begins and ends in the middle of them, and lines are a little out of order."""
    from servingtiers.simulate import logs

    monkeypatch.setattr(logs, "_BLOCK", 4096)
    random = np.random.default_rng(3)
    moments = np.sort(random.random(4000)) * 6 * 3600 + random.uniform(-10, 10, 4000)
    start = np.datetime64("2024-05-10T00:01:00")
    stamps = np.datetime_as_string(start + (moments * 1e3).astype("timedelta64[ms]"))
    lines = [f"{stamp.replace('T', ' ')}+00:00,{n % 900 + 1},5\n" for n, stamp in enumerate(stamps)]
    for name, content in (("log.csv", "".join(lines)), ("log.csv.gz", "".join(lines))):
        packed = (HEADER + content).encode()
        path = written(tmp_path, gzip.compress(packed) if name.endswith("gz") else packed, name)
        whole = read_azure(path)
        assert len(whole) == 4000
        for begin, end in ((0, 600), (1000.5, 9000), (20_000, math.inf), (7200, 7210)):
            part, cut = read_azure(path, start=begin, end=end), whole.between(begin, end)
            assert np.array_equal(part.arrival, cut.arrival)
            assert np.array_equal(part.prompt, cut.prompt)
            assert part.seconds == cut.seconds
    with pytest.raises(ValueError, match="no part of log"):
        read_azure(path, start=30_000)


def test_a_part_of_a_log_in_no_order_is_read_right_too(tmp_path, monkeypatch):
    from servingtiers.simulate import logs

    monkeypatch.setattr(logs, "_BLOCK", 2048)
    random = np.random.default_rng(4)
    moments = random.permutation(2000) * 3
    path = written(tmp_path, HEADER + "".join(f"{at},{at % 900 + 1},5\n" for at in moments))
    part = read_azure(path, start=300, end=900)
    assert part.arrival.tolist() == [float(3 * n) for n in range(200)]


def test_a_stretch_without_requests_says_so(tmp_path):
    path = written(tmp_path, HEADER + "0,7,5\n100,7,5\n")
    with pytest.raises(ValueError, match="no request comes from 10 s to 20 s"):
        load_trace(str(path), start=10, end=20)
