"""From pods to load: when a signal is a value, a proved zero, or unknown."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servingtiers.core.decisions import PoolRole
from servingtiers.core.signals import Coverage, Histogram, Load, RouterLoad, Unknown, Value, Zero
from servingtiers.core.telemetry import (
    PodTarget,
    PodWindow,
    PoolTargets,
    RouterScan,
    Scan,
    TierTargets,
    engine_window,
    increase,
    pool_load,
    router_window,
    tier_load,
)
from servingtiers.core.vllm_metrics import ENGINE_METRICS, Kind

NOW = 10_000.0
INF = float("inf")
SIGNALS = [f.name for f in fields(Load) if f.name not in {"window", "coverage", "resets"}]


def scan(at, value=0.0, **scalars):
    """Return a scrape in which every counter has one value and every gauge is 0."""
    found = {
        m.key: value if m.kind is Kind.COUNTER else 0.0
        for m in ENGINE_METRICS
        if m.kind is not Kind.HISTOGRAM
    }
    histograms = {
        m.key: Histogram((0.1, INF), (value, value), value / 20)
        for m in ENGINE_METRICS
        if m.kind is Kind.HISTOGRAM
    }
    return Scan(at, {**found, **scalars}, histograms)


def window(scans, **options):
    """Return what an engine said over a minute scraped every 15 s."""
    return engine_window(scans, **{"window": 60.0, "interval": 15.0, "now": NOW, **options})


def pool(count, desired=None):
    """Return a pool of some ready pods."""
    pods = tuple(PodTarget(f"p{i}", "10.0.0.1", 8000) for i in range(count))
    return PoolTargets("serve", PoolRole.AGGREGATED, count if desired is None else desired, pods)


numbers = st.sampled_from([0.0, 0.0, 1.0, 2.5, 40.0])


@st.composite
def windows(draw):
    """What a pod may have said: sound, in part, or nothing."""
    if draw(st.integers(0, 3)) == 0:
        return Unknown("hangs")
    gauges, rates, histograms, faults = {}, {}, {}, {}
    for metric in ENGINE_METRICS:
        value = draw(numbers)
        if draw(st.integers(0, 9)) == 0:
            faults[metric.key] = "NaN"
        elif metric.kind is Kind.GAUGE:
            gauges[metric.key] = min(value, metric.limit)
        elif metric.kind is Kind.COUNTER:
            rates[metric.key] = value
        else:
            histograms[metric.key] = Histogram((0.1, INF), (value, value), value / 20)
    whole = draw(st.booleans())
    return PodWindow(NOW - draw(st.floats(0, 30)), gauges, rates, histograms, faults, whole)


@given(st.lists(windows(), min_size=1, max_size=4))
def test_a_zero_is_only_said_when_every_pod_said_it_over_the_whole_window(said):
    load = pool_load(pool(len(said)), {f"p{i}": w for i, w in enumerate(said)}, window=60, now=NOW)
    answered = [w for w in said if isinstance(w, PodWindow)]

    assert load.coverage == Coverage(len(answered), len(said))
    for name in SIGNALS:
        signal = getattr(load, name)
        if isinstance(signal, Zero):
            assert len(answered) == len(said), name
            if name not in {"running", "waiting", "kv_usage"}:
                assert all(w.whole for w in answered), name
        if isinstance(signal, Value | Histogram) and not signal.partial:
            assert len(answered) == len(said), name
        if isinstance(signal, Unknown):
            assert signal.reason


@given(st.lists(windows(), min_size=2, max_size=4))
def test_what_is_known_of_fewer_pods_is_a_lower_bound_of_the_sums(said):
    every = {f"p{i}": w for i, w in enumerate(said)}
    fewer = {**every, "p0": Unknown("hangs")}
    more, less = (pool_load(pool(len(said)), w, window=60, now=NOW) for w in (every, fewer))

    for name in ("running", "waiting", "request_rate", "prompt_token_rate", "output_token_rate"):
        part, whole = getattr(less, name), getattr(more, name)
        assert not isinstance(part, Zero)
        if isinstance(part, Value):
            assert part.value <= whole.value + 1e-9
            assert part.partial


def test_the_reason_names_the_pod_and_counts_the_others():
    load = pool_load(pool(3), {"p0": Unknown("connection refused")}, window=60, now=NOW)
    assert load.running == Unknown("p0: connection refused (and 2 more of 3 pods)")


def test_ready_pods_that_nobody_asked_are_missing():
    assert pool_load(pool(1), {}, window=60, now=NOW).running == Unknown("p0: did not answer")


def test_a_pool_without_pods_is_zero_only_by_the_routers_word():
    quiet = RouterLoad(Coverage(1, 1), Zero(3.0), Zero(1.0))
    for routers in (
        None,
        RouterLoad(Coverage(0, 1)),
        replace(quiet, unserved=Value(1.0)),
        replace(quiet, arrival_rate=Unknown("x")),
    ):
        load = pool_load(pool(0), {}, window=60, now=NOW, routers=routers)
        assert all(isinstance(getattr(load, name), Unknown) for name in SIGNALS)
    load = pool_load(pool(0), {}, window=60, now=NOW, routers=quiet)
    assert all(getattr(load, name) == Zero(3.0) for name in SIGNALS)
    load = pool_load(pool(0, desired=1), {}, window=60, now=NOW, routers=quiet)
    assert all(isinstance(getattr(load, name), Unknown) for name in SIGNALS)


@pytest.mark.parametrize(("held", "of_both"), [(59.0, True), (60.0, False), (None, False), (-3600.0, False)])
def test_what_an_engine_counted_for_two_tiers_counts_for_neither(held, of_both):
    """Its gauges are of now, and count. When it came is not known where the clock was set back since."""
    whole = window([scan(NOW - 60 + 15 * i, 10.0 * i, running=3.0) for i in range(5)])
    there = PoolTargets(
        "pool",
        PoolRole.AGGREGATED,
        2,
        (
            PodTarget("p0", "10.0.0.1", 8000),
            PodTarget("p1", "10.0.0.2", 8000, held_since=None if held is None else NOW + 1000 - held),
        ),
    )
    load = pool_load(there, {"p0": whole, "p1": whole}, window=60, now=NOW, ahead=1000)
    alone = pool_load(pool(1), {"p0": whole}, window=60, now=NOW)
    assert load.coverage.complete
    assert load.running == Value(6.0, load.running.age)
    assert load.request_rate.partial is of_both
    assert load.request_rate.value == pytest.approx(alone.request_rate.value * (1 if of_both else 2))
    assert isinstance(load.ttft, Unknown | Histogram | Zero)
    only = replace(there, pods=there.pods[1:])
    rate = pool_load(only, {"p1": whole}, window=60, now=NOW, ahead=1000).request_rate
    if of_both:
        assert rate == Unknown("came from another tier 59 s ago: what it counted is of both")


def test_engines_that_serve_nobody_are_asked_and_count_in_no_load():
    said = window([scan(NOW - 60 + 15 * i, 10.0 * i, running=3.0) for i in range(5)])
    tier = TierTargets("llm", "chat", (pool(1),), unheld=(PodTarget("away", "10.0.0.9", 8000),))
    load = tier_load(tier, {"p0": said, "away": said}, {}, window=60, now=NOW)
    assert load.pools["serve"].running.value == 3.0
    assert {name: signal.value for name, signal in load.in_flight.items()} == {"p0": 3.0, "away": 3.0}
    silent = tier_load(tier, {"p0": said}, {}, window=60, now=NOW)
    assert silent.in_flight["away"] == Unknown("did not answer")


def test_a_lost_scrape_is_forgiven_and_two_are_not():
    scans = [scan(NOW - 60 + 15 * i, 10.0 * i) for i in range(5)]
    assert window([scans[0], scans[1], scans[3], scans[4]]).whole
    assert not window([scans[0], scans[3], scans[4]]).whole
    assert window(scans, now=NOW + 37).time == NOW
    assert "38 s old" in window(scans, now=NOW + 38).reason
    assert window(scans, now=NOW - 30).time == NOW
    assert "future" in window(scans, now=NOW - 31).reason


def test_history_need_not_reach_further_back_than_the_pod():
    scans = [scan(NOW - 15, 0.0), scan(NOW, 15.0)]
    assert not window(scans).whole
    assert window(scans, ready_since=NOW - 20).whole
    assert window(scans).rates["requests"] == 1.0


def test_m15_after_a_restart_all_counters_count_from_zero_even_those_that_overtook():
    scans = [
        scan(NOW - 45, 100.0, requests=5.0),
        scan(NOW - 30, 110.0, requests=6.0),
        scan(NOW - 15, 4.0, requests=9.0),
    ]
    scans.append(scan(NOW, 8.0, requests=12.0))
    found = window(scans)

    assert found.reset
    assert found.rates["prompt_token_count"] == pytest.approx((10 + 4 + 4) / 45)
    assert found.rates["requests"] == pytest.approx((1 + 9 + 3) / 45)
    assert found.histograms["ttft"].counts[0] == pytest.approx(18 * 60 / 45)


def test_m15_a_restart_between_scrapes_that_no_counter_shows_is_seen_by_the_start_time():
    scans = [
        replace(scan(NOW - 60 + 15 * i, 100.0), start_time=NOW - 900 if i < 3 else NOW - 20) for i in range(5)
    ]
    found = window(scans)

    assert found.reset
    assert found.rates["requests"] == pytest.approx(100 / 60)


def test_flops_that_the_engine_does_not_estimate_are_unknown_and_say_how():
    scans = [scan(NOW - 60 + 15 * i, 10.0 * i, flops=0.0) for i in range(5)]
    assert "--enable-mfu-metrics" in window(scans).faults["flops"]
    assert "flops" in window([scan(NOW - 60 + 15 * i) for i in range(5)]).rates


def test_m12_a_rate_that_cannot_be_is_a_fault():
    scans = [scan(NOW - 60 + 15 * i, 1e12 * i) for i in range(5)]
    found = window(scans)

    assert "cannot be" in found.faults["output_token_count"]
    assert "cannot be" in found.faults["ttft"]


@given(st.lists(st.floats(0, 100), min_size=2, max_size=6), st.floats(1, 15))
def test_an_increase_over_exactly_the_samples_is_their_difference(steps, every):
    times = [i * every for i in range(len(steps))]
    values = [sum(steps[: i + 1]) for i in range(len(steps))]

    assert increase(times, values, times[0], times[-1]) == pytest.approx(values[-1] - values[0])


@given(st.floats(0.1, 50), st.integers(2, 6), st.floats(0, 1), st.floats(0, 1))
def test_a_steady_counter_is_extended_to_the_window(rate, count, before, after):
    times = [15.0 * i for i in range(count)]
    values = [1000 + rate * t for t in times]
    start, end = -15.0 * before, times[-1] + 15.0 * after

    assert increase(times, values, start, end) == pytest.approx(rate * (end - start))


def test_an_increase_does_not_reach_back_before_the_counter_was_zero():
    assert increase([10, 20], [0, 5], 0, 20) == 5
    with pytest.raises(ValueError, match="two samples"):
        increase([10], [3], 0, 20)


def router_scans(*series, errors=None):
    return [RouterScan(NOW - 15 * (len(series) - 1 - i), s) for i, s in enumerate(series)]


def test_a_router_counter_that_appears_began_at_zero_and_one_that_was_there_did_not():
    name = "vllm_router_processed_requests_total"
    scans = router_scans({}, {name: {"a": 4}}, {name: {"a": 6, "b": 3}})
    assert router_window(scans, window=60, interval=15, now=NOW).dispatched == 9
    assert router_window(scans[1:], window=60, interval=15, now=NOW).dispatched == 5


def test_m15_a_restarted_router_counts_on():
    name = "vllm_router_processed_requests_total"
    scans = router_scans({name: {"a": 100}}, {name: {"a": 104}}, {name: {"a": 2}}, {name: {"a": 5}})
    assert router_window(scans, window=60, interval=15, now=NOW).dispatched == 4 + 2 + 3


@pytest.mark.parametrize("value", [float("nan"), INF, -1.0, 1e18])
def test_m10_m12_a_routers_number_that_cannot_be_is_unknown(value):
    name = "vllm_router_processed_requests_total"
    scans = router_scans({name: {"a": 1.0}}, {name: {"a": value}})
    assert isinstance(router_window(scans, window=60, interval=15, now=NOW), Unknown)


def test_a_disaggregated_router_without_a_pair_to_send_to_asks_to_be_woken():
    name = "vllm_router_pd_errors_total"
    scans = router_scans(
        {}, {}, {}, {}, {name: {'error_type="server_selection"': 3.0, 'error_type="prefill"': 9.0}}
    )
    said = router_window(scans, window=60, interval=15, now=NOW)
    tier = TierTargets("llm", "chat", (pool(0),), (PodTarget("r", "10.0.0.2", 29000),))
    load = tier_load(tier, {}, {"r": said}, window=60, now=NOW)

    assert load.router.unserved == Value(3.0)
    assert isinstance(load.pools["serve"].running, Unknown)


def test_a_tier_without_routers_knows_no_arrivals():
    load = tier_load(TierTargets("llm", "chat", (pool(0),)), {}, {}, window=60, now=NOW)
    assert load.router.arrival_rate == Unknown("no router is ready")


def arrivals(*series, tier_pools=None):
    """Return the arrival rate that one router's scrapes give."""
    said = router_window(router_scans(*series), window=60, interval=15, now=NOW)
    tier = TierTargets("llm", "chat", tier_pools or (pool(0),), (PodTarget("r", "10.0.0.2", 29000),))
    return tier_load(tier, {}, {"r": said}, window=60, now=NOW).router.arrival_rate


def test_a_router_that_does_not_count_dispatches_tells_arrivals_by_what_ended_and_what_is_in_flight():
    """vllm-router 0.1.17 with power_of_two and one engine never moves its dispatch counter."""
    ended, running = "vllm_router_requests_total", "vllm_router_running_requests"
    rate = arrivals(
        {ended: {"a": 10.0}, running: {"w": 1.0}},
        {ended: {"a": 12.0}, running: {"w": 3.0}},
        {ended: {"a": 14.0}, running: {"w": 6.0}},
        {ended: {"a": 16.0}, running: {"w": 8.0}},
        {ended: {"a": 18.0}, running: {"w": 9.0}},
    )

    assert rate.value == pytest.approx((8 + 8) / 60)


def test_requests_that_end_are_not_counted_on_top_of_those_that_were_dispatched():
    dispatched, ended = "vllm_router_processed_requests_total", "vllm_router_requests_total"
    rows = [{dispatched: {"a": 3.0 * n}, ended: {"a": 3.0 * n}} for n in range(5)]

    assert arrivals(*rows).value == pytest.approx(12 / 60)


def test_a_router_that_only_finishes_what_it_had_has_no_arrivals():
    """The last answers of a burst are no new requests: the tier may go idle."""
    ended, running = "vllm_router_requests_total", "vllm_router_running_requests"
    rows = [{ended: {"a": float(n)}, running: {"w": 4.0 - n}} for n in range(5)]

    assert isinstance(arrivals(*rows), Zero)


def test_two_scans_of_one_time_are_one_sample():
    """A store with coarse times, or a clock that was set back, must not end in a rate over no time."""
    same = window([scan(NOW - 5, 10.0), scan(NOW - 5, 40.0)])
    assert isinstance(same, PodWindow)
    assert same.rates == {}
    assert "one sample only" in same.faults["requests"]
    found = window([scan(NOW - 35, 10.0), scan(NOW - 20, 30.0), scan(NOW - 5, 40.0), scan(NOW - 5, 70.0)])
    assert isinstance(found, PodWindow)
    assert found.rates["requests"] == pytest.approx(2.0)  # the later one is the news
    assert found.histograms["ttft"].total > 0


def test_a_clock_that_was_set_back_leaves_what_is_older_than_the_news():
    found = window([scan(NOW - 3, 90.0), scan(NOW - 20, 30.0), scan(NOW - 5, 60.0)])
    assert isinstance(found, PodWindow)
    assert found.rates["requests"] == pytest.approx(2.0)
    assert isinstance(window([scan(NOW - 3, 90.0), scan(NOW - 5, 60.0)]), PodWindow)


def test_two_scans_of_a_router_at_one_time_are_one_sample():
    def router(at, count):
        return RouterScan(at, {"vllm_router_processed_requests_total": {'worker="a"': count}})

    given = {"window": 60.0, "interval": 15.0, "now": NOW}
    assert router_window([router(NOW - 5, 4.0), router(NOW - 5, 9.0)], **given) == Unknown(
        "one sample only: a rate needs two within the window"
    )
    found = router_window([router(NOW - 15, 3.0), router(NOW - 5, 4.0), router(NOW - 5, 9.0)], **given)
    assert (found.dispatched, found.span) == (6.0, 10.0)


def test_an_increase_over_no_time_is_refused():
    with pytest.raises(ValueError, match="time between them"):
        increase([5.0, 5.0], [1.0, 2.0], 0.0, 10.0)
