"""``servingtiers predict``: the keys and arguments others build on, and wrong input that names its mend."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from servingtiers.cli import main
from servingtiers.performance.engine_sim import EngineConfig
from servingtiers.performance.planner import default_limits
from servingtiers.performance.prediction import Replica

BASE = ["predict", "--model", "meta-llama/Llama-3.1-8B-Instruct", "--accelerator", "h100-sxm-80gb"]
QUICK = ["--requests", "2000", "-o", "json"]


def predict(*arguments: str) -> dict:
    """Run the command and return its JSON."""
    result = CliRunner().invoke(main, [*BASE, *arguments, *QUICK])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_has_the_documented_keys() -> None:
    """Programs read these names; they are an interface."""
    answer = predict("--rate", "5")

    assert set(answer) == {
        "ttftMs", "tpotMs", "e2eMs", "tokensPerSecond", "requestsPerSecond", "kvUse", "saturated", "source",
        "bandPercent",
    }  # fmt: skip
    for key in ("ttftMs", "tpotMs", "e2eMs"):
        values = answer[key]
        assert list(values) == ["mean", "p50", "p90", "p95", "p99", "p999"]
        assert 0 < values["p50"] <= values["p90"] <= values["p95"] <= values["p99"] <= values["p999"]
    assert answer["saturated"] is False
    assert 0 < answer["kvUse"] < 1


def test_more_load_means_more_latency_and_at_last_saturation() -> None:
    """TPOT and mean TTFT rise with the rate; far beyond capacity the answer says so."""
    answers = [predict("--rate", str(rate)) for rate in (1, 10, 25, 200)]

    assert [a["tpotMs"]["mean"] for a in answers] == sorted(a["tpotMs"]["mean"] for a in answers)
    assert [a["ttftMs"]["mean"] for a in answers] == sorted(a["ttftMs"]["mean"] for a in answers)
    assert [a["saturated"] for a in answers] == [False, False, False, True]


def test_closed_loop_obeys_little_s_law() -> None:
    """Clients = throughput × time in the system, in the steady state."""
    answer = predict("--concurrency", "32", "--steady")

    assert answer["requestsPerSecond"] * answer["e2eMs"]["mean"] / 1e3 == pytest.approx(32, rel=0.05)


def test_a_closed_loop_run_counts_its_start_as_benchmarks_do() -> None:
    """All clients send at once at first, which shows in the tail of TTFT."""
    counted = predict("--concurrency", "32")
    steady = predict("--concurrency", "32", "--steady")

    assert counted["ttftMs"]["p99"] > 1.5 * steady["ttftMs"]["p99"]


def test_piecewise_graphs_cost_every_decode_step_a_time_for_each_layer(tmp_path) -> None:
    """As a flag and as a column; 32 layers at 10 us."""
    path = tmp_path / "rows.csv"
    path.write_text("concurrency,piecewise_graphs\n1,true\n1,no\n", encoding="utf-8")

    full = predict("--concurrency", "1")
    piecewise = predict("--concurrency", "1", "--piecewise-graphs")
    rows = CliRunner().invoke(main, [*BASE, "--batch", str(path), *QUICK])

    assert piecewise["tpotMs"]["mean"] - full["tpotMs"]["mean"] == pytest.approx(0.32, abs=0.005)
    assert [json.loads(row) for row in rows.stdout.splitlines()] == [piecewise, full]


def test_prefix_hits_and_quantized_weights_help() -> None:
    """Cached prompts shorten TTFT; FP8 weights shorten TPOT."""
    plain = predict("--rate", "5", "--prompt-tokens", "2000")
    cached = predict("--rate", "5", "--prompt-tokens", "2000", "--prefix-hit-rate", "0.8")
    quantized = predict("--rate", "5", "--prompt-tokens", "2000", "--weights", "fp8")

    assert cached["ttftMs"]["mean"] < 0.7 * plain["ttftMs"]["mean"]
    assert quantized["tpotMs"]["mean"] < 0.8 * plain["tpotMs"]["mean"]


def test_bursts_lengthen_the_tail_and_even_arrivals_shorten_it() -> None:
    """The arrival process is part of the answer."""
    tails = [
        predict("--rate", "20", "--arrivals", arrivals)["ttftMs"]["p99"]
        for arrivals in ("constant", "poisson", "gamma:3")
    ]

    assert tails == sorted(tails)
    assert tails[2] > 1.5 * tails[0]


def test_speculation_shortens_tpot() -> None:
    """Three draft tokens of which 80 % are kept gain more than they cost at a small batch."""
    assert (
        predict("--rate", "1", "--speculative-tokens", "3", "--acceptance", "0.8")["tpotMs"]["mean"]
        < 0.6 * predict("--rate", "1")["tpotMs"]["mean"]
    )


def test_batch_gives_a_line_for_each_row_equal_to_the_single_call(tmp_path) -> None:
    """Columns are named as the flags; others are ignored; empty cells take the flags' values."""
    path = tmp_path / "rows.csv"
    path.write_text(
        "id,model,accelerator,tensor_parallel,rate,concurrency,prompt_tokens,output_tokens,measured_ttft\n"
        "a,meta-llama/Llama-3.1-8B-Instruct,h100-sxm-80gb,1,5,,512,128,25\n"
        "b,,,,,16,300,50,\n"
        "c,,,2,0,8,300,50,\n",
        encoding="utf-8",
    )

    result = CliRunner().invoke(main, [*BASE, "--batch", str(path), *QUICK])

    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[0] == predict("--rate", "5")
    assert lines[1] == predict("--concurrency", "16", "--prompt-tokens", "300", "--output-tokens", "50")
    assert "2 x h100" in lines[2]["source"]


def test_a_wrong_row_says_why_and_the_others_are_answered(tmp_path) -> None:
    """One bad cell does not cost the rest of a long file; the command still fails."""
    path = tmp_path / "rows.csv"
    path.write_text("rate,prompt_tokens\n5,512\nfast,512\n0,512\n", encoding="utf-8")

    result = CliRunner().invoke(main, [*BASE, "--batch", str(path), *QUICK])

    assert result.exit_code == 2
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert "ttftMs" in lines[0]
    assert lines[1] == {"row": 2, "error": "rate 'fast' is not a number: correct the cell"}
    assert lines[2]["row"] == 3
    assert "row 2" in result.stderr


def test_batch_reads_what_spreadsheets_write(tmp_path) -> None:
    """Semicolons, a byte-order mark, capitals and hyphens in names, whole numbers with a point, every flag a column."""
    path = tmp_path / "rows.csv"
    path.write_text(
        "\ufeffModel;Accelerator;Tensor-Parallel;Rate;Concurrency;Prefix_Hit_Rate;Max Num Seqs;Arrivals;Requests;Seed;Steady\n"
        "meta-llama/Llama-3.1-8B-Instruct;NVIDIA H100 80GB HBM3;1.0;5;;0.25;256.0;gamma:2;2000;3;\n"
        "Meta-Llama-3.1-8B-Instruct;H100 SXM;;;8;;;;2000;;true\n",
        encoding="utf-8",
    )

    result = CliRunner().invoke(main, ["predict", "--batch", str(path)])

    assert result.exit_code == 0, result.output
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    flags = ["--requests", "2000", "--model", "meta-llama/Llama-3.1-8B", "--accelerator", "h100"]
    flags = ["predict", "-o", "json", *flags]
    one = ["--rate", "5", "--prefix-hit-rate", "0.25", "--max-num-seqs", "256", "--arrivals", "gamma:2"]
    for answer, more in ((first, [*one, "--seed", "3"]), (second, ["--concurrency", "8", "--steady"])):
        single = CliRunner().invoke(main, [*flags, *more])
        assert json.loads(single.stdout) == answer


def test_a_row_s_kind_of_load_replaces_the_command_s(tmp_path) -> None:
    """With --concurrency for all rows, one may still be open loop."""
    path = tmp_path / "rows.csv"
    path.write_text("rate,prompt_tokens\n5,512\n,512\n", encoding="utf-8")

    result = CliRunner().invoke(main, [*BASE, "--batch", str(path), "--concurrency", "16", *QUICK])

    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[0]["requestsPerSecond"] == pytest.approx(5.0, rel=0.1)
    assert lines[1]["requestsPerSecond"] > 10.0


@pytest.mark.parametrize(
    ("content", "mend"),
    [
        (b"", "begin with a header"),
        (b"a,b\n1,2\n", "begin with a header"),
        (b"model,accelerator,rate\n", "give one for each prediction"),
        (b"\xff\xfem\x00o\x00", "in UTF-8"),
        (b"rate\n1\n\x00\n", "row 2"),
        (b"rate,steady\n1,maybe\n", "true or false"),
        (b"rate,tensor_parallel\n1,1.5\n", "not a whole number"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(content, mend, tmp_path) -> None:
    """Whatever is given as a file, the answer is a line that names it and the mend."""
    path = tmp_path / "rows.csv"
    path.write_bytes(content)

    result = CliRunner().invoke(main, [*BASE, "--batch", str(path), *QUICK])

    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert str(path) in result.stderr
    assert mend in result.stderr


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        (["--rate", "0"], "above 0"),
        (["--rate", "-1"], "above 0"),
        (["--rate", "nan"], "above 0"),
        ([], "exactly one of rate"),
        (["--rate", "1", "--concurrency", "2"], "exactly one of rate"),
        (["--rate", "fast"], "not a valid float"),
        (["--rate", "1", "--weights", "fp3"], "use one of bf16, fp8"),
        (["--rate", "1", "--kv-dtype", "int2"], "use one of bf16, fp8"),
        (["--rate", "1", "--prompt-tokens", "200000"], "shorten them"),
        (["--rate", "1", "--prompt-tokens", "0"], "use 1 or more"),
        (["--rate", "1", "--max-model-len", "1000000"], "lower it"),
        (["--rate", "1", "--max-num-seqs", "0"], "use 1 to"),
        (["--rate", "1", "--tensor-parallel", "3"], "choose 1, 2, 4 or 8"),
        (["--rate", "1", "--arrivals", "bursty"], "use poisson"),
        (["--rate", "1", "--prefix-hit-rate", "80"], "share from 0 to 1"),
        (["--rate", "1", "--model", "meta-llama/Llama-3.1-405B"], "raise the tensor parallelism"),
        (["--rate", "1", "--model", "meta-llama/Lama-3.1-8B"], "near names"),
        (["--rate", "1", "--accelerator", "h1000"], "near names"),
        (["--rate", "1", "--speculative-tokens", "0"], "leave speculation out"),
        (["--rate", "1", "--requests", "1"], "100 or more"),
        (["--rate", "1", "--requests", "1000000000000"], "10000000 at most"),
        (["--concurrency", "1000000000"], "clients at most"),
        (["--rate", "1", "--speculative-tokens", "3", "--draft-cost", "nan"], "0 to 1"),
        (["--rate", "1", "--no-such-flag"], "No such option"),
        (["--rate", "1", "--profile", "/no/such/file.csv"], "file.csv"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_mend(arguments, mend) -> None:
    """Exit code 2, nothing on standard output, and one line of help."""
    result = CliRunner().invoke(main, [*BASE, *arguments])

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert mend in result.stderr


def test_a_malformed_profile_names_its_line(tmp_path) -> None:
    """A profile is the user's own file; what is wrong in it must be findable."""
    path = tmp_path / "mine.csv"
    path.write_text("kind,batch\ndecode,one\n", encoding="utf-8")

    result = CliRunner().invoke(main, [*BASE, "--rate", "1", "--profile", str(path)])

    assert result.exit_code == 2
    assert "mine.csv" in result.stderr
    assert result.stderr.count("\n") == 1


def test_limits_left_out_are_vllm_s() -> None:
    """What vLLM would choose on that accelerator is what is simulated."""
    from servingtiers.catalog.accelerators import accelerator
    from servingtiers.catalog.models import model

    assert default_limits(accelerator("h100-sxm-80gb")) == (1024, 8192)
    assert default_limits(accelerator("a100-sxm-80gb")) == (256, 2048)
    assert default_limits(accelerator("b200")) == (1024, 16384)
    replica = Replica(model("meta-llama/Llama-3.1-8B"), accelerator("l4-24gb"), max_num_seqs=4)
    assert replica.engine() == EngineConfig(max_num_seqs=4, max_num_batched_tokens=2048)


def test_the_table_says_what_was_predicted() -> None:
    """Defaults that were filled in are in the first line, under the model's name as it was asked for."""
    result = CliRunner().invoke(main, [*BASE, "--rate", "1", "--requests", "200"])

    assert result.exit_code == 0, result.output
    assert "max-num-seqs 1024, max-num-batched-tokens 8192" in result.stdout.splitlines()[0]
    assert result.stdout.startswith(f"{BASE[2]} in bf16 on 1 x h100-sxm-80gb")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (["--rate", "1", "--acceptance", "0.8"], "--acceptance has no effect without --speculative-tokens"),
        (["--rate", "1", "--steady"], "--steady has no effect without --concurrency"),
        (["--concurrency", "1", "--arrivals", "constant"], "--arrivals has no effect with --concurrency"),
        (["--rate", "1", "--model", "Qwen/Qwen3-32B-AWQ"], "--weights int4 is what its name says"),
    ],
)
def test_what_was_given_for_nothing_is_pointed_out(flags, note) -> None:
    """On standard error; the answer is the one without it."""
    result = CliRunner().invoke(main, [*BASE, *flags, "--requests", "200", "-o", "json"])

    assert result.exit_code == 0, result.output
    assert note in result.stderr
    assert json.loads(result.stdout)["ttftMs"]


def test_without_the_simulator_s_libraries_the_mend_is_named() -> None:
    """The operator's image has none of them."""
    program = (
        "import sys; sys.modules['numba'] = None; from servingtiers.cli import main; "
        "main(['predict', '--model', 'Qwen/Qwen3-8B', '--accelerator', 'l4', '--rate', '1'])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert ended.returncode == 2
    assert ended.stderr == "Error: numba is not installed: pip install 'servingtiers[simulator]'\n"
