"""``servingtiers plan``: what it answers, in every form, and wrong input that names its mend."""

from __future__ import annotations

import json
import re
import time

import pytest
import yaml
from click.testing import CliRunner

from servingtiers.api.spec import ServingTier
from servingtiers.cli import main

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
BASE = ["plan", "--model", MODEL]
CHAT = ["--rate", "50", "--slo", "ttft.p99=500ms", "--slo", "tpot.p99=50ms"]
FEW = ["--accelerator", "h100", "--accelerator", "a100", "--tensor-parallel", "1"]


def run(*arguments: str, code: int = 0) -> str:
    """Run the command and return what it printed."""
    result = CliRunner().invoke(main, [*BASE, *arguments])
    assert result.exit_code == code, result.output
    return result.stdout


def test_json_ranks_fleets_by_cost() -> None:
    """Every fleet says what it is, what it costs, what binds it and where its numbers come from."""
    answer = json.loads(run(*CHAT, *FEW, "-o", "json"))

    assert answer["feasible"] is True
    costs = [choice["costPerHour"] for choice in answer["choices"]]
    assert costs == sorted(costs)
    first = answer["choices"][0]
    assert first["confirmedBySimulation"] is True
    assert first["ttftMs"]["p99"] * 1.4 <= 500
    assert first["tpotMs"]["p99"] <= 50
    assert first["pools"][0]["replicas"] == first["pools"][0]["replicasNeeded"] + 1
    assert first["binding"]
    assert first["bandPercent"] > 0
    assert "table" in first["pools"][0]["source"]


def test_the_thousand_qps_question_has_three_answers_in_one_command() -> None:
    """As end-to-end nothing can do it; as TTFT it is a fleet of a sane size; the third reading adds TPOT."""
    answer = json.loads(run("--rate", "1000", "--p99", "200ms", *FEW, "-o", "json"))["readings"]

    whole, first, both = answer
    assert whole["feasible"] is False
    assert "idle 1 x h100-sxm-80gb fits" in whole["verdict"]
    assert 24 <= int(re.search(r"fits (\d+) output", whole["verdict"])[1]) <= 32
    assert whole["nearestFeasible"][0]["targetMs"] > 200
    assert whole["nearestChoice"]["costPerHour"] > 0
    needed = {c["pools"][0]["accelerator"]: c["pools"][0]["replicasNeeded"] for c in first["choices"]}
    assert 15 <= needed["h100-sxm-80gb"] <= 26
    assert both["feasible"] is True
    assert both["choices"][0]["costPerHour"] >= first["choices"][0]["costPerHour"]


def test_the_table_is_read_by_people() -> None:
    """The verdict comes first; the source of the first fleet is named."""
    text = run(*CHAT, *FEW)

    assert text.splitlines()[1].startswith("feasible: ")
    assert "$/hour" in text
    assert "source of the first: " in text


def test_yaml_is_a_serving_tier_that_asks_for_the_plan() -> None:
    """What is printed validates against the API and names accelerator, parallelism and batch."""
    document = yaml.safe_load(run(*CHAT, *FEW, "--name", "chat", "-o", "yaml"))
    tier = ServingTier.model_validate(document)

    assert tier.metadata.name == "chat"
    assert tier.spec.model.name == MODEL  # not the base model, which has the same shape
    assert tier.spec.slo is not None
    assert tier.spec.slo.ttft is not None
    assert tier.spec.slo.ttft.p99 == "500ms"
    assert tier.spec.pool is not None
    assert tier.spec.pool.hardware.accelerators == ["h100-sxm-80gb"]
    assert tier.spec.pool.engine.max_num_seqs is not None
    assert tier.spec.workload is not None
    assert tier.spec.workload.requests_per_second == "50"


def test_a_printed_tier_can_be_planned_again(tmp_path) -> None:
    """-f reads what -o yaml wrote, and comes to the same fleet."""
    first = run(*CHAT, *FEW, "-o", "yaml")
    path = tmp_path / "tier.yaml"
    path.write_text(first, encoding="utf-8")

    result = CliRunner().invoke(main, ["plan", "-f", str(path), "-o", "yaml"])

    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["spec"] == yaml.safe_load(first)["spec"]


def test_a_tier_s_own_words_are_kept(tmp_path) -> None:
    """What the plan does not decide stays as it was written; flags override the file."""
    path = tmp_path / "tier.yaml"
    path.write_text(
        """
apiVersion: servingtiers.io/v1alpha1
kind: ServingTier
metadata: {name: chat, namespace: llm}
spec:
  tier: Latency
  model: {name: meta-llama/Llama-3.1-8B-Instruct, servedName: chat}
  workload: {requestsPerSecond: "20", promptTokens: {mean: 512, p95: 2048}, outputTokens: {mean: 128, p95: 512}}
  pool:
    hardware: {accelerators: [h100-sxm-80gb], tensorParallel: 1}
    scaling: {minReplicas: 2, maxReplicas: 30}
  drainTimeout: 90s
""",
        encoding="utf-8",
    )

    result = CliRunner().invoke(main, ["plan", "-f", str(path), "--rate", "30", "-o", "yaml"])

    assert result.exit_code == 0, result.output
    spec = yaml.safe_load(result.stdout)["spec"]
    assert spec["model"] == {"name": MODEL, "servedName": "chat"}
    assert spec["workload"]["requestsPerSecond"] == "30"
    assert spec["workload"]["promptTokens"] == {"mean": 512, "p95": 2048}
    assert spec["drainTimeout"] == "90s"
    assert spec["pool"]["hardware"] == {"accelerators": ["h100-sxm-80gb"], "tensorParallel": 1}
    assert spec["pool"]["scaling"]["minReplicas"] == 2
    # No SLO in the file: the Latency tier's own.
    answer = json.loads(CliRunner().invoke(main, ["plan", "-f", str(path), "-o", "json"]).stdout)
    assert [o["targetMs"] for o in answer["objectives"]] == [500.0, 50.0]


def test_a_disaggregated_tier_is_planned_pool_by_pool(tmp_path) -> None:
    """Each role keeps to its own accelerators, and the YAML has both pools."""
    path = tmp_path / "tier.yaml"
    path.write_text(
        """
apiVersion: servingtiers.io/v1alpha1
kind: ServingTier
metadata: {name: chat}
spec:
  tier: Balanced
  model: {name: meta-llama/Llama-3.1-8B-Instruct}
  workload: {requestsPerSecond: "20", promptTokens: {mean: 1000, p95: 1000}, outputTokens: {mean: 100, p95: 100}}
  disaggregation:
    prefill: {hardware: {accelerators: [a100-sxm-80gb]}}
    decode: {hardware: {accelerators: [h100-sxm-80gb]}}
""",
        encoding="utf-8",
    )

    result = CliRunner().invoke(main, ["plan", "-f", str(path), "-o", "yaml"])

    assert result.exit_code == 0, result.output
    pools = yaml.safe_load(result.stdout)["spec"]["disaggregation"]
    assert pools["prefill"]["hardware"]["accelerators"] == ["a100-sxm-80gb"]
    assert pools["decode"]["hardware"]["accelerators"] == ["h100-sxm-80gb"]


def test_html_is_one_self_contained_page() -> None:
    """No network is needed to read it, and it follows the reader's colour scheme."""
    page = run(*CHAT, *FEW, "-o", "html")

    assert page.startswith("<!doctype html>")
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', page)
    assert "Pareto front" in page
    assert page.count("figure('figure") == 3


def test_infeasible_is_a_verdict_and_an_exit_code_of_its_own() -> None:
    """Scripts tell it from wrong input, which is 2."""
    text = run("--rate", "10", "--slo", "e2e.p99=100ms", *FEW, code=3)

    assert "infeasible at any number of replicas" in text
    assert "nearest feasible: E2E p99" in text


def test_prices_and_models_compete() -> None:
    """An override of a price, and a smaller model, each change the winner."""
    cheap = json.loads(run(*CHAT, *FEW, "--price", "a100=0.01", "-o", "json"))
    small = json.loads(run(*CHAT, *FEW, "--model", "meta-llama/Llama-3.2-1B", "-o", "json"))

    assert cheap["choices"][0]["pools"][0]["accelerator"] == "a100-sxm-80gb"
    assert small["choices"][0]["model"] == "meta-llama/Llama-3.2-1B"


def test_throughput_without_objectives_is_the_cheapest_token() -> None:
    """No SLO: bound by what the engines sustain."""
    answer = json.loads(run("--rate", "50", *FEW, "-o", "json"))

    assert answer["choices"][0]["binding"].startswith("throughput")


def test_a_plan_over_every_accelerator_takes_two_seconds_at_most() -> None:
    """Once the compiled code is loaded; the bound of the product's promise."""
    run(*CHAT, *FEW)
    begin = time.process_time()
    run("--rate", "37", "--slo", "ttft.p99=700ms", "--slo", "tpot.p99=60ms", "--prompt-tokens", "777")

    assert time.process_time() - begin < 2.0


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        ([], "--rate is missing"),
        (["--rate", "0"], "above 0"),
        (["--rate", "x"], "not a valid float"),
        (["--rate", "1", "--slo", "ttft=1s"], "write it like ttft.p99=500ms"),
        (["--rate", "1", "--slo", "ttft.p98=1s"], "write it like"),
        (["--rate", "1", "--slo", "ttft.p99=fast"], "write it like 200ms"),
        (["--rate", "1", "--slo", "ttft.p99=0ms"], "write it like 200ms"),
        (["--rate", "1", "--p99", "1s", "--slo", "ttft.p99=1s"], "exclude each other"),
        (["--rate", "1", "--price", "h100=free"], "write it like h100-sxm-80gb=2.50"),
        (["--rate", "1", "--price", "h99=1"], "unknown accelerator"),
        (["--rate", "1", "--accelerator", "z9"], "unknown accelerator"),
        (["--rate", "1", "--prompt-tokens", "500000"], "longer context"),
        (["--rate", "1", "--weights", "fp2"], "use one of bf16"),
        (["--rate", "1", "--max-num-seqs", "0"], "use 1 to 4096"),
        (["--rate", "1", "--tail-margin", "0.5"], "use 1 to 10"),
        (["--rate", "1", "--spare", "-1"], "use 0 or more"),
        (["--rate", "1", "--top", "0"], "use 1 or more"),
        (["--rate", "1", "--name", "Chat!"], "a-z, 0-9 and -"),
        (["--rate", "1", "--max-num-seqs", "64", "--max-num-batched-tokens", "32"], "below max-num-seqs 64"),
        (["--rate", "1", "--arrivals", "lumpy"], "use poisson"),
        (["--rate", "1", "-f", "/no/such/tier.yaml"], "does not exist"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_mend(arguments, mend) -> None:
    """Exit code 2, nothing on standard output."""
    result = CliRunner().invoke(main, [*BASE, *arguments])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert mend in result.stderr


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("{", "no YAML"),
        ("kind: Pod\n", "holds 0 ServingTiers"),
        (
            "apiVersion: servingtiers.io/v1alpha1\nkind: ServingTier\nmetadata: {name: a}\nspec: {tier: Fast}\n",
            "spec.tier",
        ),
    ],
)
def test_a_malformed_tier_names_what_is_wrong(tmp_path, text, mend) -> None:
    """The file and the field are in the message."""
    path = tmp_path / "tier.yaml"
    path.write_text(text, encoding="utf-8")

    result = CliRunner().invoke(main, ["plan", "-f", str(path), "--rate", "1"])

    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert mend in result.stderr


PROFILE = """# engine: vLLM 0.32.0
kind,batch,context_tokens,new_tokens,ms
decode,1,512,,{slow}
decode,1,4096,,{slow}
decode,64,512,,{slow}
decode,64,4096,,{slow}
prefill,,0,128,{slow}
prefill,,0,2048,60
"""
ONE = ["--accelerator", "h100", "--tensor-parallel", "1", "--no-simulation", "-o", "json"]


def test_a_profile_is_what_the_plan_stands_on(tmp_path) -> None:
    """A slower engine than the table's takes more replicas, and the source says so."""
    found = {}
    for slow in (8.0, 45.0):
        path = tmp_path / f"{slow}.csv"
        path.write_text(PROFILE.format(slow=slow), encoding="utf-8")
        answer = json.loads(run("--rate", "200", *CHAT[2:], *ONE, "--profile", str(path)))
        pool = answer["choices"][0]["pools"][0]
        assert pool["source"].startswith("profile: ")
        found[slow] = pool["replicasNeeded"]
    assert found[45.0] > found[8.0]


def test_a_profile_of_few_noisy_points_can_be_planned_with(tmp_path) -> None:
    """Here a longer context costs a batch of four less than it costs one sequence: times beyond both fell below zero."""
    profile = tmp_path / "profile.csv"
    profile.write_text(
        "kind,batch,context_tokens,new_tokens,ms,kv_capacity_tokens\n"
        "decode,1,128,,0.919,32768\ndecode,4,128,,1.205,32768\ndecode,1,256,,1.057,32768\ndecode,4,256,,1.066,32768\n"
        "prefill,,0,32,2.781,32768\nprefill,,0,256,8.177,32768\n"
        "mixed,1,128,128,0.919,32768\nmixed,1,256,256,1.057,32768\n"
    )
    answer = run(
        *("--accelerator", "h100-sxm-80gb", "--tensor-parallel", "1", "--rate", "20"),
        *("--slo", "ttft.p99=500ms", "--profile", str(profile), "-o", "json"),
    )
    assert json.loads(answer)["choices"]


def test_a_plan_asks_for_no_larger_batches_than_its_profile_can_tell_of(tmp_path) -> None:
    """Eight sequences were measured: more than 32 are anybody's guess, and a fleet of such engines is still a plan."""
    profile = tmp_path / "profile.csv"
    profile.write_text(
        "kind,batch,context_tokens,new_tokens,ms,kv_capacity_tokens\n"
        "decode,1,128,,4.0,65536\ndecode,8,128,,4.4,65536\ndecode,1,512,,4.1,65536\ndecode,8,512,,4.6,65536\n"
        "prefill,,0,32,5.0,65536\nprefill,,0,256,6.0,65536\n"
    )
    asked = (
        *("--accelerator", "h100-sxm-80gb", "--tensor-parallel", "1", "--rate", "500"),
        *("--slo", "ttft.p99=500ms", "--profile", str(profile), "-o", "json"),
    )
    pool = json.loads(run(*asked))["choices"][0]["pools"][0]
    assert pool["maxNumSeqs"] <= 32
    assert pool["source"].startswith("profile: ")
    # Who asks for larger ones is told why not.
    result = CliRunner().invoke(main, [*BASE, *asked, "--max-num-seqs", "256"])
    assert result.exit_code == 3
    assert "measure a profile that covers it" in result.output


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--tensor-parallel", "2"], "--tensor-parallel"),
        (["--accelerator", "a100"], "--accelerator"),
        (["--model", "meta-llama/Llama-3.1-70B"], "--model"),
        (["--weights", "bf16", "--weights", "fp8"], "--weights"),
    ],
)
def test_a_profile_is_of_one_engine(tmp_path, more, told) -> None:
    """Several engines cannot have been measured in one file."""
    path = tmp_path / "p.csv"
    path.write_text(PROFILE.format(slow=8.0), encoding="utf-8")
    result = CliRunner().invoke(main, [*BASE, *CHAT, *ONE, "--profile", str(path), *more])
    assert result.exit_code == 2
    assert f"2 {told} values are allowed: give one" in result.stderr
    assert len(result.stderr.splitlines()) == 1


TIER = """
apiVersion: servingtiers.io/v1alpha1
kind: ServingTier
metadata: {name: chat, namespace: llm}
spec:
  tier: Latency
  model: {name: meta-llama/Llama-3.1-8B-Instruct, servedName: chat, revision: abc}
  slo: {window: 48h, ttft: {p99: 500ms}, tpot: {p99: 50ms}}
  workload: {requestsPerSecond: "200", promptTokens: {mean: 512, p95: 512}, outputTokens: {mean: 128, p95: 128}}
  pool:
    hardware: {accelerators: [h100-sxm-80gb], tensorParallel: 1, onShortage: NextCheapest}
    engine: {maxNumSeqs: 64, quantization: FP8, env: {UCX_TLS: tcp}}
    scaling: {minReplicas: 1, maxReplicas: 2}
"""


def test_what_flags_override_is_what_is_printed(tmp_path) -> None:
    """A tier that names the old model, objectives or batch beside a fleet for the new ones would be a trap."""
    path = tmp_path / "tier.yaml"
    path.write_text(TIER, encoding="utf-8")

    def printed(*flags: str) -> tuple[str, dict]:
        result = CliRunner().invoke(main, ["plan", "-f", str(path), "--no-simulation", "-o", "yaml", *flags])
        assert result.exit_code == 0, result.output
        return result.stdout, yaml.safe_load(result.stdout)["spec"]

    text, same = printed()
    given = yaml.safe_load(TIER)["spec"]
    assert {key: same[key] for key in ("model", "slo")} == {key: given[key] for key in ("model", "slo")}
    assert same["pool"]["engine"].items() >= given["pool"]["engine"].items()
    assert same["pool"]["hardware"] == given["pool"]["hardware"]
    assert "CAUTION: maxReplicas 2 is below the" in text

    _, other = printed("--model", "Qwen/Qwen2.5-7B-Instruct", "--slo", "ttft.p99=2s", "--max-num-seqs", "32")
    assert other["model"] == {"name": "Qwen/Qwen2.5-7B-Instruct", "servedName": "chat"}
    assert other["slo"] == {"window": "48h", "ttft": {"p99": "2s"}}
    assert other["pool"]["engine"]["maxNumSeqs"] == 32
    assert other["pool"]["engine"]["env"] == {"UCX_TLS": "tcp"}

    _, wide = printed("--weights", "bf16", "--prompt-tokens", "1000", "--length-cv", "0")
    assert "quantization" not in wide["pool"]["engine"]
    assert wide["workload"]["promptTokens"] == {"mean": 1000, "p95": 1000}
    assert wide["workload"]["outputTokens"] == given["workload"]["outputTokens"]


def test_a_model_is_called_as_it_was_asked_for() -> None:
    """Several checkpoints have one shape; the part after the slash finds the publisher's spelling."""
    answer = CliRunner().invoke(
        main,
        ["plan", "--model", "llama-3.1-8b-instruct", "--rate", "5", *FEW, "--no-simulation", "-o", "json"],
    )

    assert json.loads(answer.stdout)["choices"][0]["model"] == MODEL


def test_no_fleet_is_exit_code_three_in_every_form() -> None:
    """Nothing that could be applied is printed."""
    result = CliRunner().invoke(main, [*BASE, "--rate", "10", "--slo", "e2e.p99=100ms", *FEW, "-o", "yaml"])

    assert result.exit_code == 3
    assert result.stdout == ""
    assert "infeasible at any number of replicas" in result.stderr


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--tensor-parallel", "3"], "choose 1, 2, 4 or 8"),
        (["--tensor-parallel", "16"], "exceeds the 8 GPUs of a node"),
        (["--disaggregation", "only", "--slo", "ttft.p99=2ms"], "for prefill"),
        (["--disaggregation", "only", "--slo", "tpot.p99=1ms"], "for decode"),
        (["--disaggregation", "only", "--output-tokens", "1"], "nothing to decode"),
        (["--disaggregation", "only", "--kv-link", "0.001", "--slo", "e2e.p99=20s"], "for decode"),
    ],
)
def test_why_there_is_no_fleet_is_told_whatever_was_allowed(flags, reason) -> None:
    """Not "no accelerator is allowed" where the reason is another one, and of many the one that says most."""
    result = CliRunner().invoke(main, [*BASE, "--rate", "1", *flags, "--no-simulation"])

    assert result.exit_code == 3, result.output
    assert reason in result.stdout.splitlines()[1]


@pytest.mark.parametrize("how", ["auto", "only"])
def test_a_model_that_fits_nowhere_is_told_of_the_largest_replica(how) -> None:
    """That it does not fit one L4 says nothing where four B200 were allowed."""
    few = ("--accelerator", "l4", "--accelerator", "b200", "--tensor-parallel", "1", "--tensor-parallel", "4")
    asked = ["plan", "--model", "meta-llama/Llama-3.1-405B", "--rate", "1", *few, "--disaggregation", how]
    result = CliRunner().invoke(main, [*asked, "--no-simulation"])

    assert result.exit_code == 3, result.output
    assert "does not fit 4 x b200-sxm-180gb" in result.stdout.splitlines()[1]


def test_no_fleet_is_of_engines_that_cannot_hold_one_request() -> None:
    """Closed forms alone recommended L4s with room for 9,030 tokens for prompts of 20,000."""
    asked = ("--rate", "1", "--prompt-tokens", "20000", "--tensor-parallel", "1", "--no-simulation")
    text = run(*asked, "--accelerator", "l4", code=3)
    larger = json.loads(run(*asked, "--accelerator", "l4", "--accelerator", "l40s", "-o", "json"))

    assert "the KV cache of 1 x l4-24gb does not hold one request" in text.splitlines()[1]
    used = {pool["accelerator"] for choice in larger["choices"] for pool in choice["pools"]}
    assert used == {"l40s-48gb"}


def test_a_prompt_that_some_accelerators_cannot_hold_is_planned_for_the_others() -> None:
    """Also where the others miss the objectives: the search for the nearest ones ended in an error once."""
    text = run(
        *("--rate", "1", "--prompt-tokens", "20000", "--slo", "ttft.p99=10ms", "--no-simulation"),
        *("--accelerator", "l4", "--accelerator", "h100", "--tensor-parallel", "1"),
        code=3,
    )

    assert "nearest feasible: TTFT p99" in text


def test_a_token_budget_leaves_out_batches_it_has_no_room_for() -> None:
    """A budget below its batch is refused by vLLM; it was raised silently to the largest batch that is tried."""
    answer = json.loads(
        run("--rate", "5", "--max-num-batched-tokens", "64", *FEW, "--no-simulation", "-o", "json")
    )
    pools = [pool for choice in answer["choices"] for pool in choice["pools"]]

    assert {pool["maxNumBatchedTokens"] for pool in pools} == {64}
    assert all(pool["maxNumSeqs"] <= 64 for pool in pools)


def test_weights_that_a_name_contradicts_are_pointed_out() -> None:
    """The shape is the same, the bytes are not."""
    asked = ["plan", "--model", "nvidia/Llama-3.1-8B-Instruct-FP8", "--rate", "5", *FEW, "--no-simulation"]

    assert "--weights fp8" in CliRunner().invoke(main, asked).stderr
    assert CliRunner().invoke(main, [*asked, "--weights", "fp8"]).stderr == ""
