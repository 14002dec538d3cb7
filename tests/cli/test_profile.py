"""``servingtiers profile``: the file it writes is what ``predict`` reads; wrong input names its mend on one line."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from servingtiers.cli import main
from servingtiers.lab.engines import EngineConfig, SimulatedEngine


@dataclass(frozen=True)
class KnownSteps:
    """10 ms a step, 0.2 ms a sequence, 0.05 ms for each new prompt token."""

    kv_capacity_tokens: int = 60_000

    def step_ms(self, prompt_tokens, prompt_past_tokens, decoding, kv_tokens):
        return 10.0 + 0.2 * decoding + 1e-3 * kv_tokens + 0.05 * prompt_tokens


@pytest.fixture
def url():
    """A simulated engine on a loop of its own: the command brings its own loop."""
    address = f"127.{162 + os.getpid() % 90}.{os.getpid() // 90 % 256}.1"
    config = EngineConfig("m", ("m",), KnownSteps(), port=18082, stream_interval=1)
    engine = SimulatedEngine(config, address=address)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(engine.start(), loop).result(10)
    yield engine.url
    asyncio.run_coroutine_threadsafe(engine.kill(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


SMALL = (
    "--batch 1 --batch 4 --context 256 --context 512 --prompt-tokens 128 --prompt-tokens 512".split()  # noqa: SIM905 - as typed
)


def test_what_is_measured_can_be_predicted_with(url, tmp_path):
    path = tmp_path / "profile.csv"
    result = CliRunner().invoke(main, ["profile", "--url", url, "--model", "m", *SMALL, "-o", str(path)])
    assert result.exit_code == 0, result.output
    assert "requests; network, HTTP and client take" in result.stderr
    assert "decode at batch    4" in result.stderr
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# engine: vLLM 0.32.0+simulated, m\n")
    assert ",60000\n" in text
    found = CliRunner().invoke(
        main,
        [
            "predict",
            "--model",
            "meta-llama/Llama-3.1-8B",
            "--accelerator",
            "h100",
            "--rate",
            "1",
            "--requests",
            "300",
            "--output-tokens",
            "50",
            "--profile",
            str(path),
            "-o",
            "json",
        ],
    )
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert answer["source"].startswith("profile: profile profile.csv, vLLM 0.32.0+simulated, m")
    assert 8.0 < answer["tpotMs"]["p50"] < 16.0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--url", "http://127.0.0.1:9"], "check --url"),
        (["--url", "http://127.0.0.1:9", "--batch", "4"], "give 2 or more different ones"),
        (["--url", "http://127.0.0.1:9", "--batch", "0", "--batch", "2"], "use 1 or more"),
        (["--url", "http://127.0.0.1:9", "--max-requests", "10"], "raise --max-requests"),
        (["--url", "http://127.0.0.1:9", "--max-num-batched-tokens", "0"], "--help"),
        ([], "--url"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_mend(arguments, told, tmp_path):
    path = tmp_path / "p.csv"
    result = CliRunner().invoke(main, ["profile", "--model", "m", "-o", str(path), *arguments])
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert len(lines) == 1
    assert told in lines[0]
    assert not path.exists()


def test_a_folder_that_is_not_there_is_told_before_anything_is_measured(tmp_path):
    where = tmp_path / "none" / "p.csv"
    arguments = ["profile", "--url", "http://127.0.0.1:9", "--model", "m", "-o", str(where)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "create it" in result.stderr
