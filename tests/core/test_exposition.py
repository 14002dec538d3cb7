"""The pages of real engines and routers, and pages that are none."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from servingtiers.core.exposition import parse_engine, parse_router
from servingtiers.core.vllm_metrics import ENGINE_METRICS, Kind
from servingtiers.lab.vllm_metrics import EngineMetrics

DATA = Path(__file__).parent / "data" / "metrics"
PAGE = (DATA / "vllm-0.32.0.txt").read_text(encoding="utf-8")


def as_prometheus_client_reads(text):
    """Return samples by name as the reference parser reads them."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_a_real_page_is_read_as_the_reference_parser_reads_it():
    scan = parse_engine(PAGE, 50.0)
    samples = as_prometheus_client_reads(PAGE)

    assert scan.time == 50.0
    assert not scan.faults
    assert scan.start_time == samples["process_start_time_seconds"][0].value
    for metric in ENGINE_METRICS:
        name = metric.names[0]
        if metric.kind is Kind.HISTOGRAM:
            histogram = scan.histograms[metric.key]
            buckets = {float(s.labels["le"]): s.value for s in samples[f"{name}_bucket"]}
            assert dict(zip(histogram.bounds, histogram.counts, strict=True)) == buckets
            assert histogram.sum == samples[f"{name}_sum"][0].value
            assert histogram.total == samples[f"{name}_count"][0].value > 0
        else:
            assert scan.scalars[metric.key] == sum(s.value for s in samples[name])


def test_every_metric_is_on_the_real_page():
    scan = parse_engine(PAGE, 0.0)
    assert {m.key for m in ENGINE_METRICS} == scan.scalars.keys() | scan.histograms.keys()


@given(st.text(max_size=40))
def test_any_model_name_is_read(name):
    registry = CollectorRegistry()
    gauge = Gauge("vllm:num_requests_running", "x", ["model_name", "engine"], registry=registry)
    gauge.labels(name, "0").set(7)
    try:
        text = generate_latest(registry).decode()
    except UnicodeEncodeError:  # lone surrogates: no client can send them
        return
    assert parse_engine(text, 0.0).scalars == {"running": 7.0}


def test_an_engine_says_the_time_of_its_samples_where_it_has_an_older_one():
    text = "vllm:num_requests_running 1 40000\nvllm:num_requests_waiting 1 90000\n"
    assert parse_engine(text, 50.0).time == 40.0


def test_a_router_that_has_served_nothing_answers_an_empty_page():
    assert parse_router("", 5.0).series == {}


def test_real_router_pages_are_read():
    plain = parse_router((DATA / "vllm-router-0.1.17.txt").read_text(encoding="utf-8"), 0.0)
    paired = parse_router((DATA / "vllm-router-0.1.17-pd.txt").read_text(encoding="utf-8"), 0.0)
    name = "vllm_router_processed_requests_total"

    assert sum(plain.series[name].values()) == 8
    # One more than the 11 requests that ended well, at both sides.
    assert list(paired.series[name].values()) == [12.0, 12.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "# HELP x y\n",
        "<html>\n",
        "vllm:num_requests_running",
        "vllm:num_requests_running{} \n",
        "vllm:num_requests_running one\n",
        "vllm:num_requests_running 1 2 3\n",
        "vllm:num_requests_running{a=\n",
        'vllm:time_to_first_token_seconds_bucket{engine="0"} 1\n',
        'vllm:time_to_first_token_seconds_bucket{le="x"} 1\n',
    ],
)
def test_what_is_no_page_of_an_engine_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_engine(text, 0.0)


@pytest.mark.parametrize(
    "text", ["<html>\n", "vllm_router_x 1", "vllm_router_processed_requests_total one\n"]
)
def test_what_is_no_page_of_a_router_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_router(text, 0.0)


@given(st.integers(0, len(PAGE) - 1))
def test_m29_a_page_cut_off_anywhere_never_yields_a_wrong_histogram(length):
    whole = parse_engine(PAGE, 0.0)
    try:
        scan = parse_engine(PAGE[:length], 0.0)
    except ValueError:
        return
    for key, histogram in scan.histograms.items():
        assert histogram == whole.histograms[key]
    for key, value in scan.scalars.items():
        assert value <= whole.scalars[key]


@given(st.text(alphabet=st.sampled_from('vllm:num_requests_running{}="0",le 1.eE+-NaInf#\n\\'), max_size=200))
def test_a_garbled_page_is_refused_or_read_but_never_breaks(text):
    try:
        parse_engine(text, 0.0)
        parse_router(text, 0.0)
    except ValueError:
        pass


def test_a_page_is_read_several_times_as_fast_as_by_the_reference_parser(capsys):
    metrics = EngineMetrics("chat", max_model_len=131072)
    text = metrics.text()

    def took(parse, times):
        parse(text)
        started = time.process_time()
        for _ in range(times):
            parse(text)
        return (time.process_time() - started) / times * 1e3

    ours = took(lambda page: parse_engine(page, 0.0), 50)
    reference = took(lambda page: list(text_string_to_metric_families(page)), 5)
    with capsys.disabled():
        print(f"\n{len(text) // 1024} KiB page: {ours:.2f} ms, prometheus_client {reference:.2f} ms")
    assert ours * 4 < reference


# What each release's page lacks or names otherwise, from the names in its wheel.
NEWER_THAN_0_9 = ("request_time_per_output_token_seconds", "admission_rejections", "estimated_")
RELEASES = {
    "0.9.2": (
        {
            "kv_cache_usage_perc": "gpu_cache_usage_perc",
            "prefix_cache_": "gpu_prefix_cache_",
            "inter_token_latency_seconds": "time_per_output_token_seconds",
        },
        NEWER_THAN_0_9,
    ),
    "0.10.2": (
        {"kv_cache_usage_perc": "gpu_cache_usage_perc", "prefix_cache_": "gpu_prefix_cache_"},
        NEWER_THAN_0_9,
    ),
    "0.12.0": ({}, ("admission_rejections", "estimated_")),
    "0.18.0": ({}, ("admission_rejections",)),
    "0.33.0": ({}, ()),
}


@pytest.mark.parametrize("release", RELEASES)
def test_m20_the_pages_of_old_and_new_releases_say_the_same_of_what_they_have(release):
    renamed, lacking = RELEASES[release]
    lines = [line for line in PAGE.split("\n") if not any(f"vllm:{name}" in line for name in lacking)]
    text = "\n".join(lines)
    for new, old in renamed.items():
        text = text.replace(f"vllm:{new}", f"vllm:{old}")
    now, then = parse_engine(PAGE, 0.0), parse_engine(text, 0.0)
    gone = {m.key for m in ENGINE_METRICS if any(m.names[0].startswith(f"vllm:{name}") for name in lacking)}

    assert then.scalars == {k: v for k, v in now.scalars.items() if k not in gone}
    assert then.histograms == {k: v for k, v in now.histograms.items() if k not in gone}
    assert all(m.since != "0.9" for m in ENGINE_METRICS if m.key in gone)
