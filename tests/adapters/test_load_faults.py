"""What both sources say when something is wrong; names carry the fault's number in the catalogue (M1 to M29)."""

import asyncio
import gzip
import re

import pytest
from aiohttp import web

from servingtiers.core.decisions import PoolRole
from servingtiers.core.signals import Coverage, Histogram, Load, Unknown, Value, Zero


def busy(*engines, requests=15):
    """Return what makes engines finish requests before each scrape."""

    def each():
        for engine in engines:
            engine.finish(requests)
            engine.metrics.running.value = 4
            engine.metrics.waiting.value = 2
            engine.metrics.kv_usage.value = 0.5

    return each


def pool(load) -> Load:
    """Return the only pool."""
    (only,) = load.pools.values()
    return only


def assert_never_small(load):
    """No signal is a proved zero and no value passes for complete."""
    for name in Load.__dataclass_fields__:
        signal = getattr(load, name)
        assert not isinstance(signal, Zero), name
        if isinstance(signal, Value | Histogram):
            assert signal.partial, name


async def test_a_busy_pool_is_read_in_full(rig):
    a, b = await rig.engine("a"), await rig.engine("b")
    load = pool(await rig.tick(6, each=busy(a, b)))

    assert load.coverage == Coverage(2, 2)
    assert load.running == Value(8.0)
    assert load.waiting == Value(4.0)
    assert load.kv_usage == Value(0.5)
    assert load.request_rate.value == pytest.approx(2.0)
    assert load.prompt_token_rate.value == pytest.approx(200.0)
    assert load.output_token_rate.value == pytest.approx(100.0)
    assert load.prefix_hit_share.value == pytest.approx(0.25)
    assert load.flops_utilization.value == pytest.approx(1e12)
    assert load.bytes_rate.value == pytest.approx(3e9)
    assert load.preemption_rate == load.rejection_rate == Zero(0.0)
    assert load.ttft.total == pytest.approx(120.0)
    assert (load.ttft.quantile(0.99).low, load.ttft.quantile(0.99).high) == (0.1, 0.25)
    assert load.prompt_tokens.mean == pytest.approx(100.0)
    assert load.itl.total == pytest.approx(6000.0)
    assert not load.ttft.partial
    assert load.resets == 0


async def test_m23_no_traffic_is_a_proved_zero(rig):
    await rig.engine("a")
    load = pool(await rig.tick(6))

    assert isinstance(load.running, Zero)
    assert isinstance(load.request_rate, Zero)
    assert isinstance(load.ttft, Zero)
    assert isinstance(load.prefix_hit_share, Zero)
    assert isinstance(load.flops_utilization, Zero)


async def test_m9_with_pods_missing_the_rest_is_a_lower_bound(rig):
    a, b = await rig.engine("a"), await rig.engine("b")
    await b.page.stop()
    load = pool(await rig.tick(6, each=busy(a)))

    assert load.coverage == Coverage(1, 2)
    assert load.running == Value(4.0, partial=True)
    assert load.request_rate.partial
    assert load.ttft.partial
    assert_never_small(load)


async def test_m9_a_missing_pod_never_lets_an_idle_rest_pass_for_zero(rig):
    await rig.engine("a")
    b = await rig.engine("b")
    await b.page.stop()

    assert_never_small(pool(await rig.tick(6)))


@pytest.mark.parametrize(
    ("fault", "value"), [("M10", "NaN"), ("M11", "+Inf"), ("M11", "-Inf"), ("M12", "-1"), ("M12", "1e18")]
)
async def test_m10_m11_m12_a_number_that_cannot_be_is_unknown(rig, fault, value):
    a = await rig.engine("a")

    def spoil(text):
        text = re.sub(r"(num_requests_(?:running|waiting)\{.*\}) .*", rf"\1 {value}", text)
        text = re.sub(r"((?:prompt_tokens|generation_tokens)_total\{.*\}) .*", rf"\1 {value}", text)
        return re.sub(r"(kv_cache_usage_perc\{.*\}) .*", rf"\1 {value}", text)

    await rig.tick(5, each=busy(a))
    a.rewrite = spoil
    load = pool(await rig.tick(1, each=busy(a)))

    for signal in (load.running, load.waiting, load.kv_usage, load.prompt_token_rate, load.output_token_rate):
        assert isinstance(signal, Unknown), fault
    assert isinstance(load.request_rate, Value)


async def test_m10_a_pod_with_nan_makes_the_others_partial(rig):
    a, b = await rig.engine("a"), await rig.engine("b")
    a.rewrite = lambda text: re.sub(r"(num_requests_running\{.*\}) .*", r"\1 NaN", text)

    assert pool(await rig.tick(6, each=busy(a, b))).running == Value(4.0, partial=True)


async def test_m13_old_samples_are_unknown_and_say_their_age(rig):
    a = await rig.engine("a")
    await rig.tick(6, each=busy(a))
    rig.scraping = False
    a.page.answer = lambda _: web.Response(status=503)

    kept = pool(await rig.tick(2))
    assert kept.running == Value(4.0, age=30.0)
    load = pool(await rig.tick(1))
    assert isinstance(load.running, Unknown)
    assert_never_small(load)


async def test_m13_an_engine_at_work_whose_counters_stand_still_shrinks_nothing(rig):
    a = await rig.engine("a")
    a.metrics.running.value = 4
    load = pool(await rig.tick(6))

    assert load.running == Value(4.0)
    assert isinstance(load.request_rate, Unknown)
    assert isinstance(load.ttft, Unknown)


async def test_m14_dead_pods_are_not_counted(rig):
    a, b = await rig.engine("a"), await rig.engine("b")
    await rig.tick(6, each=busy(a, b))
    rig.engines.remove(b)
    load = pool(await rig.tick(1, each=busy(a)))
    await b.page.stop()

    assert load.coverage == Coverage(1, 1)
    assert load.running == Value(4.0)
    assert load.request_rate.value == pytest.approx(1.0)


async def test_m15_a_restarted_engine_counts_on(rig):
    a = await rig.engine("a")
    await rig.tick(4, each=busy(a))
    a.metrics = type(a.metrics)("chat", max_model_len=2000)
    load = pool(await rig.tick(2, each=busy(a)))

    assert load.resets == 1
    assert load.request_rate.value == pytest.approx(1.0)
    assert load.ttft.total == pytest.approx(60.0)


async def test_m16_m17_after_a_gap_nothing_is_complete_until_the_window_has_filled(rig):
    a = await rig.engine("a")
    await rig.tick(6, each=busy(a))
    rig.scraping = False
    a.page.answer = lambda _: web.Response(status=503)
    await rig.tick(6)
    rig.scraping = True
    a.page.answer = None

    first = pool(await rig.tick(1))
    assert isinstance(first.request_rate, Unknown)
    assert_never_small(first.__class__(window=first.window, coverage=first.coverage, ttft=first.ttft))
    for _ in range(2):
        again = pool(await rig.tick(1, each=busy(a)))
        assert again.request_rate.partial
        assert again.request_rate.value == pytest.approx(1.0)
        assert again.ttft.partial
    await rig.tick(3, each=busy(a))
    assert not pool(await rig.tick(1, each=busy(a))).request_rate.partial


async def test_m17_an_idle_first_sample_is_no_zero_rate(rig):
    await rig.engine("a")
    assert isinstance(pool(await rig.tick(1)).request_rate, Unknown)
    second = pool(await rig.tick(1))
    assert isinstance(second.request_rate, Unknown)
    assert isinstance(second.ttft, Unknown)


async def test_a_new_pod_needs_only_the_history_it_has(rig):
    a = await rig.engine("a")
    await rig.tick(6, each=busy(a))
    b = await rig.engine("b", ready_since=rig.now)
    one = pool(await rig.tick(1, each=busy(a)))
    assert one.request_rate.partial
    two = pool(await rig.tick(1, each=busy(a)))

    assert isinstance(two.request_rate, Value)
    assert not two.request_rate.partial
    assert two.coverage == Coverage(2, 2)
    await b.page.stop()


async def test_m19_a_sample_from_the_future_is_unknown(prometheus_rig):
    rig = prometheus_rig
    a = await rig.engine("a")
    await rig.tick(5, each=busy(a))
    rig.now -= 60
    rig.prometheus.skew = 60 - 15
    load = pool(await rig.tick(0) or await rig.read())

    assert "clock" in load.running.reason


@pytest.mark.parametrize("skew", [-300.0, 300.0])
async def test_m19_a_prometheus_with_another_clock_is_not_believed(prometheus_rig, skew):
    rig = prometheus_rig
    a = await rig.engine("a")
    rig.prometheus.skew = skew
    load = pool(await rig.tick(6, each=busy(a)))

    assert "clock" in load.running.reason
    assert f"{skew:+.0f} s" in load.running.reason


async def test_m19_a_step_of_the_wall_clock_changes_nothing(scrape_rig):
    a = await scrape_rig.engine("a", ready_since=scrape_rig.now)
    before = pool(await scrape_rig.tick(6, each=busy(a)))
    scrape_rig.now += 300
    after = pool(await scrape_rig.tick(1, each=busy(a)))
    scrape_rig.now -= 600
    earlier = pool(await scrape_rig.tick(1, each=busy(a)))

    assert before.request_rate == after.request_rate == earlier.request_rate


OLD = {
    "vllm:kv_cache_usage_perc": "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache_": "vllm:gpu_prefix_cache_",
    "vllm:inter_token_latency_seconds": "vllm:time_per_output_token_seconds",
    "vllm:request_time_per_output_token_seconds": "other:tpot",
    "vllm:admission_rejections": "other:rejections",
    "vllm:estimated_": "other:estimated_",
}


def as_old(text):
    """Return a page as vLLM 0.9 named it."""
    for new, old in OLD.items():
        text = text.replace(new, old)
    return text


async def test_m20_old_and_new_names_are_read_side_by_side(rig):
    a, b = await rig.engine("a"), await rig.engine("b")
    b.rewrite = as_old
    load = pool(await rig.tick(6, each=busy(a, b)))

    assert load.kv_usage == Value(0.5)
    assert load.prefix_hit_share.value == pytest.approx(0.25)
    assert load.itl.total == pytest.approx(6000.0)
    assert not load.itl.partial
    assert load.tpot.partial
    assert load.running == Value(8.0)


async def test_m20_what_a_version_lacks_is_unknown_and_says_which_has_it(rig):
    a = await rig.engine("a")
    a.rewrite = as_old
    load = pool(await rig.tick(6, each=busy(a)))

    assert "request_time_per_output_token_seconds (vLLM 0.11" in load.tpot.reason
    assert "vLLM 0.32" in load.rejection_rate.reason


async def test_m20_both_names_at_once_are_not_added_up(rig):
    """VLLM 0.12 to 0.14 can show hidden metrics beside their successors."""
    a = await rig.engine("a")
    a.rewrite = lambda text: (
        text
        + as_old(
            "\n".join(
                line for line in text.split("\n") if "vllm:inter_token" in line or "vllm:kv_cache" in line
            )
            + "\n"
        )
    )
    load = pool(await rig.tick(6, each=busy(a)))

    assert load.itl.total == pytest.approx(3000.0)
    assert load.kv_usage == Value(0.5)


async def test_m20_a_renamed_metric_is_unknown(rig):
    a = await rig.engine("a")
    a.rewrite = lambda text: text.replace("vllm:num_requests_running", "vllm:sequences_running")

    assert "num_requests_running" in pool(await rig.tick(6, each=busy(a))).running.reason


async def test_m22_pods_with_other_buckets_are_counted_by_the_common_ones(rig):
    a, b = await rig.engine("a"), await rig.engine("b")
    b.rewrite = lambda text: re.sub(r'.*time_to_first_token_seconds_bucket\{.*le="0\.(1|25)".*\n', "", text)
    load = pool(await rig.tick(6, each=busy(a, b)))

    assert load.ttft.total == pytest.approx(120.0)
    assert not {0.1, 0.25} & set(load.ttft.bounds)
    assert (load.ttft.quantile(0.5).low, load.ttft.quantile(0.5).high) == (0.08, 0.5)


async def test_m22_buckets_that_change_with_a_restart_do_not_make_the_quantile_jump(scrape_rig):
    a = await scrape_rig.engine("a")
    await scrape_rig.tick(4, each=busy(a))
    a.metrics = type(a.metrics)("chat", max_model_len=2000)
    a.rewrite = lambda text: re.sub(r'.*time_to_first_token_seconds_bucket\{.*le="0\.25".*\n', "", text)
    load = pool(await scrape_rig.tick(2, each=busy(a)))

    assert load.ttft.total == pytest.approx(60.0)
    assert (load.ttft.quantile(0.99).low, load.ttft.quantile(0.99).high) == (0.1, 0.5)


async def test_m24_one_slow_request_stays_one(rig):
    a = await rig.engine("a")
    await rig.tick(6, each=busy(a))
    a.finish(1, ttft=300.0)
    load = pool(await rig.tick(1, each=busy(a)))

    assert load.ttft.quantile(0.5).high == 0.25
    low, high = load.ttft.count_at_most(160.0)
    assert low == high
    # Prometheus extends the increase of the samples it has, 45 of 60 seconds, to the window.
    assert 1.0 <= load.ttft.total - high <= 60 / 45 + 1e-9


async def test_m25_a_series_that_is_there_twice_is_unknown(scrape_rig):
    a = await scrape_rig.engine("a")
    a.rewrite = lambda text: text + 'vllm:num_requests_running{engine="0",model_name="chat"} 9\n'
    load = pool(await scrape_rig.tick(6, each=busy(a)))

    assert "twice" in load.running.reason
    assert isinstance(load.waiting, Value)


async def test_m25_m18_a_pod_scraped_twice_is_unknown_and_the_reason_names_the_label(prometheus_rig):
    rig = prometheus_rig
    a = await rig.engine("a")

    def again():
        busy(a)()
        labels = {"namespace": "llm", "pod": "a", "instance": f"127.0.0.1:{a.page.port}", "job": "other"}
        rig.prometheus.scrape({**labels, "prometheus_replica": "1"}, a.text())

    load = pool(await rig.tick(6, each=again))
    assert "job, prometheus_replica" in load.running.reason
    assert_never_small(load)


async def test_m25_data_parallel_ranks_are_added_or_averaged(rig):
    a = await rig.engine("a")

    def two_ranks(text):
        lines = [line for line in text.split("\n") if 'engine="0"' in line]
        return text + "".join(line.replace('engine="0"', 'engine="1"') + "\n" for line in lines)

    a.rewrite = two_ranks
    load = pool(await rig.tick(6, each=busy(a)))
    assert load.running == Value(8.0)
    assert load.kv_usage == Value(0.5)
    assert load.request_rate.value == pytest.approx(2.0)
    assert load.flops_utilization.value == pytest.approx(1e12)
    assert load.ttft.total == pytest.approx(120.0)
    assert load.prompt_tokens.mean == pytest.approx(100.0)


async def test_m27_another_tenants_series_with_our_labels_is_left_out(prometheus_rig):
    rig = prometheus_rig
    a = await rig.engine("a")

    def forge():
        busy(a)()
        rig.prometheus.scrape(
            {"namespace": "llm", "pod": "a", "instance": "10.9.9.9:8000", "job": "evil"}, a.text()
        )

    assert pool(await rig.tick(6, each=forge)).running == Value(4.0)


async def test_series_without_pod_labels_are_joined_by_address(prometheus_rig):
    rig = prometheus_rig
    a = await rig.engine("a", labels={"namespace": "", "pod": ""})

    assert pool(await rig.tick(6, each=busy(a))).running == Value(4.0)


async def test_m28_without_engines_only_the_routers_can_prove_idleness(rig):
    rig.desired = 0
    load = await rig.tick(6)
    assert isinstance(pool(load).running, Unknown)

    router = await rig.router()
    load = await rig.tick(6)
    assert isinstance(load.router.arrival_rate, Zero)
    assert isinstance(load.router.unserved, Zero)
    assert isinstance(pool(load).running, Zero)
    assert isinstance(pool(load).ttft, Zero)

    # vllm-router: five attempts, one request given up, and the counters were not there before.
    router.count("request_errors_total", 'error_type="no_available_workers"', 5)
    router.count("retries_exhausted_total", 'route="/v1/completions"', 1)
    load = await rig.tick(1)
    assert load.router.unserved == Value(1.0)
    assert isinstance(pool(load).running, Unknown)


async def test_m28_pods_that_are_wanted_and_not_ready_are_no_zero(rig):
    rig.desired = 2
    await rig.router()
    load = await rig.tick(6)

    assert pool(load).running == Unknown("none of 2 pods is ready")


async def test_m28_a_silent_router_proves_nothing(rig):
    rig.desired = 0
    await rig.router()
    other = await rig.router("router-1")
    await other.page.stop()
    load = await rig.tick(6)

    assert load.router.coverage == Coverage(1, 2)
    assert isinstance(load.router.arrival_rate, Unknown)
    assert isinstance(pool(load).running, Unknown)


async def test_a_failed_attempt_without_a_request_given_up_wakes_too(rig):
    router = await rig.router()
    await rig.tick(5)
    router.count("request_errors_total", 'error_type="no_available_workers"', 2)
    router.count("request_errors_total", 'error_type="timeout"', 7)

    assert (await rig.tick(1)).router.unserved == Value(2.0)


async def test_arrivals_are_counted_at_the_routers_and_a_new_engines_first_ones_too(rig):
    a, b = await rig.router("r-a"), await rig.router("r-b")

    def dispatch():
        a.count("processed_requests_total", 'worker="http://10.0.0.1:8000"', 30)
        b.count("processed_requests_total", 'worker="http://10.0.0.1:8000"', 15)

    load = await rig.tick(6, each=dispatch)
    assert load.router.arrival_rate.value == pytest.approx(3.0)
    a.count("processed_requests_total", 'worker="http://10.0.0.2:8000"', 60)
    load = await rig.tick(1, each=dispatch)
    assert load.router.arrival_rate.value == pytest.approx(4.0)


async def test_a_disaggregated_request_is_dispatched_twice_and_arrives_once(rig):
    await rig.engine("p", PoolRole.PREFILL)
    await rig.engine("d", PoolRole.DECODE)
    router = await rig.router()

    def dispatch():
        router.count("processed_requests_total", 'worker="http://10.0.0.1:8000"', 15)
        router.count("processed_requests_total", 'worker="http://10.0.0.2:8000"', 15)

    load = await rig.tick(6, each=dispatch)
    assert load.router.arrival_rate.value == pytest.approx(1.0)
    assert set(load.pools) == {"prefill", "decode"}


# --- a pod that misbehaves, scraped


async def hang(_):
    """Answer long after everybody has gone."""
    await asyncio.sleep(30)
    return web.Response(text="")


async def drip(request):
    """Send headers, then a byte now and then."""
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(100):
        await response.write(b"#")
        await asyncio.sleep(0.2)
    return response


async def cut(request):
    """Promise more than is sent."""
    response = web.StreamResponse(headers={"Content-Length": "100000"})
    await response.prepare(request)
    await response.write(b"vllm:num_requests_running 0\n")
    request.transport.abort()
    return response


BAD_PODS = {
    "M3 hang": (hang, "gave no answer"),
    "M3 drip": (drip, "gave no answer"),
    "M4": (lambda _: web.Response(status=500), "HTTP 500"),
    "M5": (lambda _: web.Response(status=401), "HTTP 401"),
    "M6": (lambda _: web.Response(status=429), "HTTP 429"),
    "redirect": (lambda _: web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"}), "HTTP 302"),
    "M8": (lambda _: web.Response(text=""), "cut off"),
    "M29 html": (lambda _: web.Response(text="<html>\n"), "no vLLM metric"),
    "M29 cut body": (cut, "broke off"),
    "M29 no last newline": (lambda _: web.Response(text="vllm:num_requests_running 0"), "cut off"),
    "M29 not utf-8": (lambda _: web.Response(body=b"\xff\xfe\n"), "cannot be read"),
    "M29 garbled": (lambda _: web.Response(text="vllm:num_requests_running{ 0 1 2 3\n"), "cannot be read"),
    "M29 gzip bomb": (
        lambda _: web.Response(body=gzip.compress(b"\n" * 2**26), headers={"Content-Encoding": "gzip"}),
        "compressed",
    ),
    "M29 huge": (lambda _: web.Response(body=b"#" * (5 * 2**20)), "more than 4 MiB"),
}


@pytest.mark.parametrize("fault", BAD_PODS)
async def test_m3_to_m8_m29_a_pod_that_misbehaves_is_unknown_with_its_reason(scrape_rig, fault):
    answer, reason = BAD_PODS[fault]
    a, b = await scrape_rig.engine("a"), await scrape_rig.engine("b")
    a.page.answer = answer
    load = pool(await scrape_rig.tick(2, each=busy(b)))

    assert load.coverage == Coverage(1, 2)
    assert load.running == Value(4.0, partial=True)
    scrape_rig.engines.remove(b)
    alone = pool(await scrape_rig.tick(1))
    assert reason in alone.running.reason
    assert alone.running.reason.startswith("a: ")
    assert "\n" not in alone.running.reason
    await b.page.stop()


async def test_m1_a_refused_connection_is_unknown(scrape_rig):
    a = await scrape_rig.engine("a")
    await a.page.stop()

    assert "refused" in pool(await scrape_rig.tick(1)).running.reason.lower()


async def test_m3_many_hanging_pods_neither_delay_the_tick_nor_hide_the_others(scrape_rig):
    scrape_rig.source_options = {"timeout": 0.3, "concurrency": 4}
    for index in range(12):
        engine = await scrape_rig.engine(f"hanging-{index}")
        engine.page.answer = hang
    a = await scrape_rig.engine("a")
    loop = asyncio.get_running_loop()
    await scrape_rig.tick(1, each=busy(a))
    started = loop.time()
    load = pool(await scrape_rig.tick(1, each=busy(a)))

    assert loop.time() - started < 2.0
    assert load.running.value == 4.0
    assert load.coverage == Coverage(1, 13)


async def test_a_router_that_answers_something_else_is_unknown(scrape_rig):
    router = await scrape_rig.router()
    router.page.answer = lambda _: web.Response(text="<html>hello</html>\n")

    assert "cannot be read" in (await scrape_rig.tick(2)).router.arrival_rate.reason


def test_m21_a_window_that_cannot_hold_two_samples_is_refused_with_its_mend(rig):
    if rig.how == "scrape":
        rig.source_options = {"interval": 40.0}
    else:
        rig.source_options = {"scrape_interval": "40s"}
    with pytest.raises(ValueError, match="raise window"):
        rig.make_source()


async def test_pods_that_are_gone_are_forgotten(scrape_rig):
    a = await scrape_rig.engine("a")
    await scrape_rig.tick(2)
    scrape_rig.engines.remove(a)
    await scrape_rig.tick(1)
    await a.page.stop()

    assert not scrape_rig.source._engines


async def test_pods_of_tiers_that_are_not_asked_for_are_neither_asked_nor_forgotten(scrape_rig):
    """While engines move between some tiers the others keep their history."""
    await scrape_rig.engine("a")
    await scrape_rig.tick(2)
    (before,) = scrape_rig.source._engines.values()
    answers = len(before.scans)

    assert await scrape_rig.source.read([], 0.0, complete=False) == {}
    assert list(scrape_rig.source._engines.values()) == [before]
    assert len(before.scans) == answers


# --- a Prometheus that misbehaves


BAD_PROMETHEUS = {
    "M3 hang": (hang, "gave no answer"),
    "M4": (lambda _: web.Response(status=503, text="starting"), "refused a query"),
    "M5 401": (lambda _: web.Response(status=401), "refused a query"),
    "M5 403": (lambda _: web.Response(status=403), "refused a query"),
    "M6": (lambda _: web.Response(status=429), "refused a query"),
    "redirect": (
        lambda _: web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"}),
        "redirects",
    ),
    "M29 html": (lambda _: web.Response(text="<html>"), "not JSON"),
    "M29 cut": (lambda _: web.Response(text='{"status":"success","data":{"resul'), "not JSON"),
    "M29 not gzip": (
        lambda _: web.Response(body=b"x", headers={"Content-Encoding": "gzip"}),
        "answered",
    ),
    "error object": (lambda _: web.json_response({"status": "error", "error": "x"}), "without 'data'"),
    "list": (lambda _: web.json_response([1]), "JSON"),
    "wrong shape": (lambda _: web.json_response({"data": {"result": {"a": 1}}}), "no query result"),
    "wrong member": (lambda _: web.json_response({"data": {"result": [{"x": 1}]}}), "answered"),
}


@pytest.mark.parametrize("fault", BAD_PROMETHEUS)
@pytest.mark.parametrize("part", ["time()", "num_requests_running"])
async def test_m3_to_m6_m29_a_prometheus_that_misbehaves_leaves_everything_unknown(
    prometheus_rig, fault, part
):
    rig = prometheus_rig
    answer, reason = BAD_PROMETHEUS[fault]
    a = await rig.engine("a")
    await rig.tick(5, each=busy(a))
    rig.prometheus.override[part] = answer
    load = pool(await rig.tick(1, each=busy(a)))

    assert reason in load.running.reason
    assert "\n" not in load.running.reason
    assert load.running.reason.startswith("a: Prometheus ")
    assert_never_small(load)


async def test_m1_a_prometheus_that_is_down_is_unknown_and_back_again(prometheus_rig):
    rig = prometheus_rig
    a = await rig.engine("a")
    await rig.tick(5, each=busy(a))
    await rig.prometheus.page.stop()
    assert "refused" in pool(await rig.tick(1, each=busy(a))).running.reason.lower()
    await rig.prometheus.page.start()
    assert pool(await rig.tick(1, each=busy(a))).running == Value(4.0)


async def test_m2_a_name_that_does_not_resolve_is_unknown(prometheus_rig):
    rig = prometheus_rig
    rig.source_options = {"url": "http://prometheus.invalid:9090"}
    await rig.engine("a")

    assert "cannot be reached" in pool(await rig.tick(1)).running.reason


async def test_m7_an_answer_with_warnings_is_unknown(prometheus_rig):
    rig = prometheus_rig
    a = await rig.engine("a")
    await rig.tick(5, each=busy(a))
    rig.prometheus.extra = {"warnings": ["store 10.0.0.7 did not answer"]}
    load = pool(await rig.tick(1, each=busy(a)))
    assert "store 10.0.0.7" in load.running.reason

    rig.prometheus.extra = {"warnings": [], "infos": ["metric might not be a counter"]}
    assert pool(await rig.tick(1, each=busy(a))).running == Value(4.0)


async def test_m7_a_warning_about_one_histogram_leaves_the_rest(prometheus_rig):
    rig = prometheus_rig
    a = await rig.engine("a")
    await rig.tick(5, each=busy(a))
    warned = web.json_response
    rig.prometheus.override["time_to_first_token"] = lambda _: warned(
        {"status": "success", "warnings": ["partial"], "data": {"resultType": "vector", "result": []}}
    )
    load = pool(await rig.tick(1, each=busy(a)))

    assert "partial" in load.ttft.reason
    assert load.running == Value(4.0)
    assert isinstance(load.e2e, Histogram)


async def test_m8_an_empty_vector_is_unknown_and_says_what_to_look_at(prometheus_rig):
    rig = prometheus_rig
    await rig.engine("a")
    rig.scraping = False

    assert "is it scraped" in pool(await rig.tick(1)).running.reason


async def test_m21_a_prometheus_that_scrapes_more_slowly_than_told_is_noticed(prometheus_rig):
    rig = prometheus_rig
    a = await rig.engine("a")
    for turn in range(12):
        rig.scraping = turn % 4 == 0
        load = pool(await rig.tick(1, each=busy(a)))
        for signal in (load.request_rate, load.ttft):
            assert isinstance(signal, Unknown) or signal.partial


async def test_m26_the_number_of_queries_does_not_grow_with_the_tiers(prometheus_rig):
    rig = prometheus_rig
    a = await rig.engine("a")
    await rig.router()
    await rig.tick(5, each=busy(a))
    rig.prometheus.queries.clear()
    tiers = [rig.tier()] + [
        type(rig.tier())(f"team-{i}", "chat", rig.tier().pools, rig.tier().routers) for i in range(50)
    ]
    loads = await rig.source.read(tiers, rig.now)

    assert len(rig.prometheus.queries) == 10
    assert len(loads) == 51
    assert pool(loads["llm/chat"]).running == Value(4.0)
    assert isinstance(pool(loads["team-7/chat"]).running, Unknown)


async def test_m26_slow_queries_end_with_the_tick(prometheus_rig):
    rig = prometheus_rig
    rig.source_options = {"timeout": "400ms"}
    rig.real_time = True
    a = await rig.engine("a")

    async def slow(request):
        await asyncio.sleep(0.3)
        page, rig.prometheus.override = rig.prometheus.override, {}
        answer = rig.prometheus.answer(request)
        rig.prometheus.override = page
        return answer

    rig.prometheus.override[""] = slow
    loop = asyncio.get_running_loop()
    started = loop.time()
    load = pool(await rig.tick(1, each=busy(a)))

    assert loop.time() - started < 2.5
    assert "for one tick" in load.running.reason


async def test_the_token_is_read_anew_and_sent_to_prometheus_only(prometheus_rig, tmp_path):
    rig = prometheus_rig
    token = tmp_path / "token"
    token.write_text("first\n")
    rig.source_options = {"bearer_token_file": str(token)}
    await rig.engine("a")
    await rig.tick(1)
    assert rig.prometheus.page.last.headers["Authorization"] == "Bearer first"
    token.write_text("second\n")
    await rig.tick(1)
    assert rig.prometheus.page.last.headers["Authorization"] == "Bearer second"
    token.unlink()
    load = pool(await rig.tick(1))
    assert "token cannot be read" in load.running.reason
    assert "second" not in load.running.reason
