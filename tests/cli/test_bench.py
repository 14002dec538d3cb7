"""``servingtiers bench``: the figures of a live endpoint in the simulator's words; wrong input names its mend."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from servingtiers.cli import main
from servingtiers.lab.engines import EngineConfig, EngineFaults, SimulatedEngine


@dataclass(frozen=True)
class KnownSteps:
    """10 ms a step and 0.05 ms for each new prompt token."""

    kv_capacity_tokens: int = 60_000

    def step_ms(self, prompt_tokens, prompt_past_tokens, decoding, kv_tokens):
        return 10.0 + 0.05 * prompt_tokens


@pytest.fixture
def engine():
    """A simulated engine on a loop of its own: the command brings its own loop."""
    address = f"127.{165 + os.getpid() % 85}.{os.getpid() // 85 % 256}.1"
    config = EngineConfig(
        "m", ("m",), KnownSteps(), port=18086, stream_interval=1, max_model_len=1000, max_num_seqs=8
    )
    made = SimulatedEngine(config, address=address)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(made.start(), loop).result(10)
    yield made
    asyncio.run_coroutine_threadsafe(made.kill(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


TRACE = ["--trace", "step:4:8:5", "--prompt-tokens", "100", "--output-tokens", "20"]


def bench(engine, *arguments):
    return CliRunner().invoke(main, ["bench", "--url", engine.url, *arguments])


def test_the_figures_are_the_simulators(engine, tmp_path):
    tier = tmp_path / "tier.yaml"
    tier.write_text(
        "apiVersion: servingtiers.io/v1alpha1\nkind: ServingTier\nmetadata: {name: t}\nspec:\n  tier: Latency\n"
        "  model: {name: m}\n  slo: {ttft: {p99: 10s}, tpot: {p99: 1us}}\n  pool: {}\n"
    )
    record = tmp_path / "requests.jsonl"
    result = bench(
        engine, *TRACE, "--warm-up", "1", "--tier", str(tier), "--record", str(record), "-o", "json"
    )
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    # The names that `servingtiers simulate -o json` has, as far as one endpoint has them.
    for name in (
        "policy",
        "seed",
        "requests",
        "attainment",
        "worst5min",
        "rejected",
        "unfinished",
        "complete",
    ):
        assert name in run
    assert set(run["p99Seconds"]) == {"ttft", "tpot", "e2e"}
    # And those of `servingtiers predict -o json`.
    for name in ("ttftMs", "tpotMs", "e2eMs"):
        assert list(run[name]) == ["mean", "p50", "p90", "p95", "p99", "p999"]
    assert (run["rejected"], run["unfinished"], run["failures"], run["complete"]) == (0, 0, {}, True)
    assert run["answered"] == run["requests"] > 15
    assert run["attainment"]["ttft"] == 1.0
    assert (
        run["attainment"]["tpot"] < 0.2
    )  # nothing takes a microsecond; answers of one token have no such time
    assert run["attainment"]["joint"] == run["attainment"]["tpot"]
    assert 9 < run["tpotMs"]["p50"] < 25
    assert 10 < run["ttftMs"]["p50"] < 100
    assert run["objectives"] == {"ttft": 10.0, "tpot": 1e-6}
    assert run["client"]["lateMs"]["p50"] < 50
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(rows) > run["requests"]  # those of the warm-up, too
    assert run["outputTokens"] == sum(row["outputTokens"] for row in rows if row["arrival"] >= 1)
    assert run["tokensPerSecond"] == pytest.approx(run["outputTokens"] / 4, rel=0.25)


def test_what_fails_counts_as_slower_than_all_else(engine):
    class Later(EngineFaults):
        """Serves twelve requests, then no more."""

        asked = 0

        @property
        def answer_status(self):
            self.asked += 1
            return 200 if self.asked <= 12 else 503

        @answer_status.setter
        def answer_status(self, value):
            pass

    engine.faults = Later()
    result = bench(engine, *TRACE, "-o", "json")
    assert result.exit_code == 0, result.output
    (run,) = json.loads(result.stdout)["runs"]
    failed = run["failures"]["503"]
    assert 0 < failed < run["requests"]
    assert run["rejected"] == failed
    assert run["ttftMs"]["p50"] is None or run["ttftMs"]["p99"] is None
    assert run["attainment"]["joint"] == pytest.approx(1 - failed / run["requests"], abs=1e-5)
    table = bench(engine, *TRACE)
    assert table.exit_code == 2  # it refuses from the start now
    assert "503" in table.stderr


def test_the_table_says_the_same(engine):
    result = bench(engine, *TRACE, "--quiet")
    assert result.exit_code == 0, result.output
    assert "TTFT" in result.stdout
    assert "0 failed" in result.stdout
    assert "output tokens/s" in result.stdout


def test_requests_that_the_model_cannot_hold_are_left_out_and_said(engine):
    long = ["--trace", "step:4:8:3", "--prompt-tokens", "900", "--output-tokens", "300"]
    result = bench(engine, *long, "-o", "json")
    assert result.exit_code == 0, result.output
    assert "longer than the model's 1000 tokens" in result.stderr
    assert json.loads(result.stdout)["runs"][0]["leftOut"] > 0
    shorter = bench(engine, *long, "--length-scale", "0.05", "-o", "json")
    (run,) = json.loads(shorter.stdout)["runs"]
    assert run["leftOut"] == 0
    assert run["promptTokens"] / run["requests"] < 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trace", "nothing.csv"], "is no file"),
        (["--trace", "step:4:8"], "write SHAPE"),
        ([*TRACE, "--scale", "0"], "use a number above 0"),
        ([*TRACE, "--from", "1h"], "inside it"),
        ([*TRACE, "--warm-up", "9"], "shorten it"),
        ([*TRACE, "--max-requests", "3"], "raise --max-requests"),
        ([*TRACE, "--model", "other"], "serves m, not other"),
        ([*TRACE, "--to", "soon"], "is no time"),
        ([*TRACE, "--record", "no/such/folder/x"], "is no directory"),
        ([*TRACE, "--no-such"], "--help"),
        ([*TRACE[:2], "--prompt-tokens", "90000"], "use --length-scale"),
    ],
)
def test_wrong_input_is_one_line_with_the_mend(engine, arguments, message):
    result = bench(engine, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error:")]) == 1


def test_objectives_are_of_one_tier(engine, tmp_path):
    """Which of several was meant cannot be guessed."""
    tier = (Path(__file__).parents[2] / "manifests/examples/balanced.yaml").read_text()
    both = tmp_path / "both.yaml"
    both.write_text(f"{tier}\n---\n{tier}")
    result = bench(engine, *TRACE, "--tier", str(both))
    assert result.exit_code == 2
    assert "holds 2 ServingTiers" in result.stderr


def test_an_address_without_a_server_is_an_input_error():
    result = CliRunner().invoke(main, ["bench", "--url", "http://127.0.0.1:1", *TRACE])
    assert result.exit_code == 2
    assert "check --url" in result.stderr


def test_an_interrupt_keeps_what_is_done(engine):
    process = subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "servingtiers.cli",
                "bench",
                "--url",
                engine.url,
                "--trace",
                "step:4:8:60",
            ),
            *("--prompt-tokens", "100", "--output-tokens", "20", "-o", "json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "requests in 60 s" in process.stderr.readline()
    time.sleep(2.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    (run,) = json.loads(out)["runs"]
    assert run["complete"] is False
    assert run["answered"] >= 3
    assert run["failures"]["notSent"] > 100
