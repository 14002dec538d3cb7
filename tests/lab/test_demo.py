"""The demo's figures and pages; that it runs is in test_demo_ring.py."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from properties import examples
from servingtiers.api.spec import ServingTier
from servingtiers.cli.demo import command
from servingtiers.core.config import OperatorConfig
from servingtiers.lab.demo import (
    CURVES,
    Decision,
    DemoSettings,
    Finished,
    Outcome,
    PoolSample,
    Sample,
    TierOutcome,
    TierSample,
    _tiers,
    attainment,
    replayed,
    summary,
    write_summary,
)
from servingtiers.lab.demo_report import outcome_page, percent
from servingtiers.lab.demo_ring import NODES, source_root
from servingtiers.lab.load import RequestRecord, TraceRequest, azure_conversation
from servingtiers.policy import presets

TRACE = azure_conversation()
RECORD = RequestRecord(
    at=1.0,
    late=0.0,
    status=200,
    attempts=1,
    ttft=0.4,
    tpot=0.02,
    e2e=2.0,
    prompt_tokens=100,
    output_tokens=80,
)


def decision(at: float, before: int, after: int, *, acted: bool = True) -> Decision:
    return Decision(
        at, "2026-01-01T00:00:00Z", "pool", before, after, "Queue", "3 wait & 2 < 3", "Less.", acted
    )


def outcome() -> Outcome:
    """A demo of two tiers that went well."""
    tiers = {}
    for name in ("chat", "assistant"):
        tiers[name] = TierOutcome(
            name,
            "Latency",
            "a/b",
            {"ttft.p99": 0.5, "tpot.p99": 0.05},
            ready=True,
            decisions=[decision(10.0, 1, 2), decision(30.0, 2, 1)],
            finished=[Finished(2.0, RECORD), Finished(3.0, replace(RECORD, ttft=0.9))],
            sent=[1.0, 2.0, 7.0],
            operator_attainment={"ttft.p99": 0.5},
            gpu_seconds=7200.0,
        )
    pool = PoolSample("pool", "Aggregated", "1× h100-sxm-80gb", 1, 2, 3.0, 0.0)
    samples = [
        Sample(
            at,
            tuple(
                TierSample(
                    name, "Latency", True, (pool,), 1.0, 0.4, None, 2.8, "USD", "why", tiers[name].objectives
                )
                for name in tiers
            ),
        )
        for at in (1.0, 2.0, 9.0)
    ]
    return Outcome(DemoSettings(), tiers, samples, compress=24.0)


# -- the load --


@settings(deadline=None, max_examples=examples(40))  # a busy machine is no failure
@given(
    seconds=st.floats(20, 300),
    tail=st.floats(0, 90),
    kind=st.sampled_from(sorted(CURVES)),
    seed=st.integers(0, 1000),
)
def test_a_replay_is_in_order_within_its_time_and_the_same_again(seconds, tail, kind, seed):
    trace = TRACE[::50]
    once = list(replayed(trace, CURVES[kind], seconds, tail=tail, seed=seed))
    assert once == list(replayed(trace, CURVES[kind], seconds, tail=tail, seed=seed))
    times = [request.at for request in once]
    assert times == sorted(times)
    assert all(0 <= at <= seconds + tail for at in times)


def test_a_replay_invents_no_request():
    trace = TRACE
    kept = list(replayed(trace, CURVES["Latency"], 150.0))
    real = {(request.prompt_tokens, request.output_tokens) for request in trace}
    assert 100 < len(kept) < len(trace)
    assert all((request.prompt_tokens, request.output_tokens) in real for request in kept)


def test_the_mean_rate_of_a_replay_is_the_curve_s_times_the_trace_s_own_shape():
    """A trace of an even rate gives the curve itself."""
    even = [TraceRequest(n * 0.1, 10, 10) for n in range(36000)]
    curve = ((0.0, 2.0), (0.5, 2.0), (0.5, 20.0))
    times = [request.at for request in replayed(even, curve, 200.0)]
    assert sum(at < 100 for at in times) / 100 == pytest.approx(2.0, rel=0.2)
    assert sum(at >= 100 for at in times) / 100 == pytest.approx(20.0, rel=0.1)


def test_after_its_end_a_replay_goes_on_at_the_curve_s_last_rate():
    kept = list(replayed(TRACE, CURVES["Balanced"], 100.0, tail=100.0))
    after = [request for request in kept if request.at > 100]
    assert len(after) / 100 == pytest.approx(CURVES["Balanced"][-1][1], rel=0.3)


# -- figures --


def test_a_failed_request_missed_every_objective():
    broken = replace(RECORD, status=0, ttft=0.1, error="refused")
    assert attainment([RECORD, broken], "ttft.p99", 0.5) == 0.5


def test_a_request_of_one_token_has_no_time_per_token_to_miss():
    assert attainment([RECORD, replace(RECORD, tpot=None)], "tpot.p99", 0.05) == 1.0


def test_no_requests_are_no_attainment():
    assert attainment([], "ttft.p99", 0.5) is None


def test_the_summary_holds_what_is_promised_under_each_tier_s_name(tmp_path):
    write_summary(outcome(), tmp_path / "deep" / "summary.json")
    tiers = json.loads((tmp_path / "deep" / "summary.json").read_text())["tiers"]
    assert list(tiers) == ["chat", "assistant"]
    chat = tiers["chat"]
    assert chat["ready"] is True
    assert (chat["scaleUps"], chat["scaleDowns"], chat["gpuHours"]) == (1, 1, 2.0)
    assert chat["attainment"]["ttft.p99"] == {"targetSeconds": 0.5, "client": 0.5, "operator": 0.5}
    assert chat["attainment"]["tpot.p99"]["operator"] is None
    assert [(each["from"], each["to"]) for each in chat["decisions"]] == [(1, 2), (2, 1)]
    assert all(each["reason"] and each["wouldChange"] for each in chat["decisions"])


def test_decisions_that_were_not_carried_out_are_no_scaling():
    played = outcome()
    played.tiers["chat"].decisions = [decision(1.0, 1, 2, acted=False), decision(9.0, 2, 1, acted=False)]
    assert (played.tiers["chat"].ups, played.tiers["chat"].downs) == (0, 0)


def test_a_demo_that_went_well_has_no_problems():
    assert outcome().problems() == []


def test_a_tier_that_is_not_ready_is_a_problem():
    played = outcome()
    played.tiers["chat"].ready = False
    assert played.problems() == ["chat is not Ready"]


def test_a_tier_that_never_shrank_is_a_problem_of_a_whole_demo_only():
    played = outcome()
    played.tiers["chat"].decisions.pop()
    assert "chat 1↑ 0↓" in played.problems()[0]
    assert summary(played)["ok"] is False
    short = replace(played, settings=DemoSettings(seconds=40.0))
    assert short.problems() == []


@pytest.mark.parametrize(
    ("share", "text"), [(None, "–"), (1.0, "100 %"), (0.99999, "99.99 %"), (0.5, "50.00 %")]
)
def test_a_share_is_never_rounded_up_to_all(share, text):
    assert percent(share) == text


# -- the page --


def test_the_page_holds_every_decision_escaped_and_says_what_is_simulated():
    page = outcome_page(outcome()).html()
    assert page.count('<td class="text">3 wait &amp; 2 &lt; 3</td>') == 4
    assert "Simulated: nodes and engines" in page
    assert "24× faster" in page
    assert "No latency here is a measurement of a GPU" in page


def test_the_page_says_so_when_the_router_was_simulated_too():
    played = replace(outcome(), real_router=False)
    assert "nodes, engines and routers" in outcome_page(played).html()
    assert "vllm-router" in summary(played)["simulated"]


def test_the_page_loads_nothing_from_elsewhere():
    page = outcome_page(outcome()).html()
    head = page[: page.index("<main>")]
    assert "<script src" not in page
    assert "<link" not in head


# -- the examples --


def test_the_demo_changes_nothing_of_the_examples_but_the_hold():
    documents = _tiers(DemoSettings())
    assert [document["spec"]["tier"] for document in documents] == ["Latency", "Balanced", "Throughput"]
    for document in documents:
        parts = document["spec"].get("disaggregation", {"pool": document["spec"].get("pool")})
        for pool in parts.values():
            assert pool["scaling"].pop("scaleDownHold") == "15s"
    shipped = [
        yaml.safe_load(path.read_text())
        for path in sorted((source_root() / "manifests/examples").glob("*.yaml"))
    ]
    assert sorted(documents, key=str) == sorted(shipped, key=str)


def test_the_nodes_carry_every_example_at_its_largest():
    """A demo in which pods wait for GPUs shows a shortage, not scaling."""
    config = OperatorConfig.model_validate(
        yaml.safe_load((source_root() / "manifests/base/config.yaml").read_text())
    )
    products = {
        key: binding.node_selector["nvidia.com/gpu.product"] for key, binding in config.accelerators.items()
    }
    free = dict.fromkeys(products.values(), 0)
    for shape in NODES:
        free[shape.product] += shape.gpus
    for document in _tiers(DemoSettings()):
        document["metadata"] |= {"namespace": "demo", "uid": "u"}
        tier = ServingTier.model_validate(document)
        parts = document["spec"].get("disaggregation") or {"pool": document["spec"]["pool"]}
        for chosen in presets.choose(tier, config).pools:
            most = parts[chosen.name]["scaling"]["maxReplicas"]
            free[products[chosen.accelerator]] -= most * chosen.tensor_parallel
    assert min(free.values()) >= 0, free


# -- the command --


def test_nothing_kept_is_nothing_to_stop(tmp_path):
    done = CliRunner().invoke(command, ["--stop", "--output", str(tmp_path)])
    assert (done.exit_code, done.output) == (0, "nothing is kept\n")


def test_a_process_that_took_the_id_of_a_kept_demo_is_left_alone(tmp_path):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "kept.json").write_text(json.dumps({"pid": stranger.pid, "kubeconfig": ""}))
        done = CliRunner().invoke(command, ["--stop", "--output", str(tmp_path)])
        assert done.output == "nothing is kept\n"
        assert stranger.poll() is None
    finally:
        os.kill(stranger.pid, signal.SIGKILL)
        stranger.wait()


def test_a_wrong_option_is_one_line():
    done = CliRunner().invoke(command, ["--seconds", "1"])
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
