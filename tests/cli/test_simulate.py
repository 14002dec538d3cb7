"""``servingtiers simulate`` answers in one line where it cannot, and in the promised form where it can."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import pytest
import yaml
from click.testing import CliRunner, Result

from servingtiers.cli import main
from servingtiers.simulate.fleet import Fleet
from servingtiers.simulate.rivals import POLICIES

DOCUMENT = {
    "apiVersion": "servingtiers.io/v1alpha1",
    "kind": "ServingTier",
    "metadata": {"name": "chat", "namespace": "llm"},
    "spec": {
        "tier": "Balanced",
        "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"},
        "pool": {
            "hardware": {"accelerators": ["a100-sxm-80gb"]},
            "engine": {"maxNumSeqs": 64},
            "scaling": {"minReplicas": 1, "maxReplicas": 6},
        },
    },
}


@pytest.fixture
def tier(tmp_path: Path) -> Path:
    path = tmp_path / "tier.yaml"
    path.write_text(yaml.safe_dump(DOCUMENT))
    return path


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)])


def test_json_has_the_promised_fields_per_policy_and_seed(tier):
    result = call(
        *("--trace", "step:4:10:300", "--tier", tier, "--policy", "servingtiers,keda-waiting", "--seeds", 2),
        *("--start-up-seconds", "30", "--no-clairvoyant", "-o", "json"),
    )
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    assert [(each["policy"], each["seed"]) for each in runs] == [
        ("servingtiers", 0),
        ("keda-waiting", 0),
        ("servingtiers", 1),
        ("keda-waiting", 1),
    ]
    for each in runs:
        assert set(each["attainment"]) == {"ttft", "tpot", "e2e", "joint"}
        assert {
            "worst5min",
            "gpuHours",
            "gpuHoursOverClairvoyant",
            "scaleUps",
            "scaleDowns",
            "reversals",
            "rejected",
            "unfinished",
            "peakReplicas",
        } <= set(each)
        assert 0 < each["gpuHours"] < 0.6


def test_the_limits_are_policies_too_and_give_the_ratio(tier):
    result = call(
        *("--trace", "sawtooth:2:20:600:300", "--tier", tier, "--start-up-seconds", "constant:20"),
        *("--policy", "servingtiers,static-optimal,clairvoyant", "-o", "json"),
    )
    assert result.exit_code == 0, result.output
    found = {each["policy"]: each for each in json.loads(result.stdout)["runs"]}
    assert set(found) == {"servingtiers", "static-optimal", "clairvoyant"}
    assert found["clairvoyant"]["gpuHoursOverClairvoyant"] == pytest.approx(1.0, abs=1e-6)
    assert found["static-optimal"]["attainment"]["joint"] >= 0.99


def test_the_table_has_a_row_per_policy(tier):
    result = call(
        "--trace", "step:4:4:120", "--tier", tier, "--policy", "servingtiers,wva-v2", "--no-clairvoyant"
    )
    assert result.exit_code == 0, result.output
    head, *rows = result.stdout.strip().splitlines()
    assert head.startswith("policy")
    assert [row.split()[0] for row in rows] == ["servingtiers", "wva-v2"]


def test_the_page_is_self_contained_and_tells_every_move(tier):
    result = call(
        *("--trace", "step:2:20:900:700", "--tier", tier, "--policy", "servingtiers", "-o", "html"),
        *("--start-up-seconds", "20", "--clairvoyant"),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("<!doctype html>")
    assert "<script src" not in result.stdout
    for text in ("Ready replicas", "Every move and its reason", "synthetic", "clairvoyant"):
        assert text in result.stdout


def test_faults_errors_and_shortages_are_taken(tier):
    result = call(
        *("--trace", "step:4:8:400", "--tier", tier, "--model-error", "1.4", "--metric-gap", "1m:2m"),
        *("--metric-fault", "nan:150:200", "--crash", "250", "--outage", "100:130", "--shortage", "0:200"),
        *("--accelerators", 4, "--max-replicas", 5, "--min-replicas", 2, "-o", "json"),
    )
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["runs"]
    assert found["rejected"] > 0  # lost with the engine that crashed
    assert found["peakReplicas"] <= 4


def test_a_trace_is_cut_and_scaled(tier):
    def requests(*more: object) -> int:
        result = call("--trace", "azure-conv", "--tier", tier, "-o", "json", "--to", "5m", *more)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["runs"][0]["requests"]

    whole = requests()
    assert requests("--scale", "0.25") == pytest.approx(0.25 * whole, rel=0.15)
    assert requests("--from", "3m") < 0.6 * whole


def test_two_tiers_share_a_trace_or_have_their_own(tier, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**DOCUMENT, "metadata": {"name": "batch", "namespace": "llm"}}))
    result = call(
        "--trace", "step:2:2:60", "--trace", "step:4:4:60", "--tier", tier, "--tier", other, "-o", "json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runs"][0]["requests"] == pytest.approx(360, rel=0.25)
    again = call("--trace", "step:2:2:60", "--tier", tier, "--tier", tier)
    assert again.exit_code == 2
    assert "rename one" in again.stderr


@pytest.mark.parametrize("policy", ["servingtiers", "servingtiers,static-optimal"])
def test_ctrl_c_keeps_what_is_done(tier, monkeypatch, policy):
    """The interrupt comes in the second run (of a policy, or of the search for a limit)."""
    original, calls = Fleet._scrape, {"count": 0}

    def impatient(self):
        calls["count"] += 1
        if calls["count"] == 40:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Fleet, "_scrape", impatient)
    result = call(
        *("--trace", "step:3:3:300", "--tier", tier, "--policy", policy, "--seeds", 3),
        *("--no-clairvoyant", "-o", "json"),
    )
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
    runs = json.loads(result.stdout)["runs"]
    assert runs[0]["complete"]
    if policy == "servingtiers":
        # 21 scrapes are the first run; the second ends at its 19th.
        assert [each["complete"] for each in runs] == [True, False]
        assert runs[1]["requests"] < runs[0]["requests"]
    else:
        assert len(runs) == 1


def test_policies_are_listed_with_their_sources():
    result = call("--list-policies")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.strip().splitlines()] == list(POLICIES)


def test_recorded_traffic_is_replayed_against_candidate_settings(tier):
    """A Prometheus of this test answers the range queries over HTTP."""
    queries: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            given = {key: value[0] for key, value in parse_qs(urlsplit(self.path).query).items()}
            result = []
            if "query" in given:
                queries.append(given["query"])
                start, end = float(given["start"]), float(given["end"])
                times = [start + 60 * step for step in range(int((end - start) // 60) + 1)]
                bounds = ["200", "1000", "+Inf"] if "bucket" in given["query"] else [""]
                result = [
                    {
                        "metric": {"le": bound} if bound else {},
                        "values": [
                            [at, "3" if not bound else str({"200": 0}.get(bound, 90))] for at in times
                        ],
                    }
                    for bound in bounds
                ]
            body = json.dumps(
                {"status": "success", "data": {"resultType": "matrix", "result": result}}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        result = call("--from-prometheus", url, "--last", "10m", "--tier", tier, "-o", "json")
    finally:
        server.shutdown()
        server.server_close()
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["runs"]
    assert found["requests"] == pytest.approx(1800, rel=0.15)
    assert any('namespace="llm"' in query and "chat" in query for query in queries)


def test_a_prometheus_that_does_not_answer_is_one_line(tier):
    result = call("--from-prometheus", "http://127.0.0.1:9", "--tier", tier)
    assert result.exit_code == 2
    assert "check the address" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        (["--trace", "azure-conv"], "give --tier FILE.yaml"),
        (["--tier", "TIER"], "give --trace"),
        (["--trace", "no.csv", "--tier", "TIER"], "azure-conv"),
        (["--trace", "azure-conv", "--tier", "TIER", "--policy", "magic"], "use servingtiers"),
        (["--trace", "azure-conv", "--tier", "TIER", "--from", "2h"], "give --from below --to"),
        (["--trace", "azure-conv", "--tier", "TIER", "--from", "soon"], "such as 90 or 15m"),
        (["--trace", "azure-conv", "--tier", "TIER", "--scale", "0"], "use a number above 0"),
        (["--trace", "azure-conv", "--tier", "TIER", "--metric-gap", "5m"], "write FROM:TO"),
        (["--trace", "azure-conv", "--tier", "TIER", "--metric-gap", "5m:1m"], "FROM must come before TO"),
        (["--trace", "azure-conv", "--tier", "TIER", "--metric-fault", "odd:1:2"], "the kinds are"),
        (["--trace", "azure-conv", "--tier", "TIER", "--start-up-seconds", "x"], "lognormal:130:0.25"),
        (["--trace", "azure-conv", "--tier", "TIER", "--model-error", "-1"], "use a factor from"),
        (
            ["--trace", "azure-conv", "--trace", "azure-code", "--tier", "TIER"],
            "one for all, or one for each",
        ),
        (["--trace", "azure-conv", "--tier", "TIER", "--metric-gap", "a:b"], "is no time"),
        (["--trace", "azure-conv", "--tier", "TIER", "--metric-gap", "2h:3h"], "choose an earlier time"),
        (["--trace", "azure-conv", "--tier", "TIER", "--crash", "2h"], "choose an earlier time"),
        (["--trace", "azure-conv", "--tier", "TIER", "--scale", "1e7"], "lower the rate"),
        (["--trace", "step:1:1e9:3600", "--tier", "TIER"], "lower the rate"),
        (["--trace", "sawtooth:1:2:60:0", "--tier", "TIER"], "write SHAPE"),
        (["--trace", "step:1:2:60", "--tier", "TIER", "--prompt-tokens", "0"], "use 1 to"),
        (["--trace", "step:1:2:60", "--tier", "TIER", "--output-tokens", "nan"], "use 1 to"),
        (["--trace", "azure-conv", "--tier", "TIER", "--model-error", "inf"], "from 0.01 to 100"),
        (
            ["--trace", "azure-conv", "--tier", "TIER", "--from", "10m", "--to", "5m"],
            "give --from below --to",
        ),
        (
            ["--trace", "azure-conv", "--tier", "TIER", "--min-replicas", "9", "--max-replicas", "3"],
            "give a smaller one",
        ),
        (["--from-prometheus", "http://127.0.0.1:9", "--tier", "TIER", "--last", "0"], "look back"),
        (["--trace", "azure-conv", "--tier", "no-such.yaml"], "no-such.yaml"),
        (["--trace", "azure-conv", "--tier", "chat"], "no such file, and"),
        (["--trace", "azure-conv", "--tier", "EMPTY"], "kind: ServingTier"),
        (["--trace", "azure-conv", "--tier", "BROKEN"], "no YAML"),
        (["--trace", "azure-conv", "--tier", "WRONG"], "Field required (and 1 more)"),
    ],
)
def test_what_cannot_be_simulated_is_one_line_that_names_the_mend(
    tier, tmp_path, monkeypatch, arguments, mend
):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    (tmp_path / "empty.yaml").write_text("kind: ConfigMap\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    (tmp_path / "wrong.yaml").write_text("kind: ServingTier\nspec: {tier: Fast, model: {name: x}}\n")
    files = {"TIER": tier} | {
        name.upper(): tmp_path / f"{name}.yaml" for name in ("empty", "broken", "wrong")
    }
    result = call(*(files.get(each, each) for each in arguments))
    assert result.exit_code == 2, result.output
    assert mend in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


def test_a_tier_can_be_the_one_in_the_cluster(monkeypatch):
    asked: list[tuple[object, ...]] = []

    def found(*arguments: object) -> dict[str, object]:
        asked.append(arguments)
        return DOCUMENT

    monkeypatch.setattr("servingtiers.cli.simulate.tier_from_cluster", found)
    result = call("--trace", "step:2:2:60", "--tier", "chat", "-n", "llm", "-o", "json")
    assert result.exit_code == 0, result.output
    assert asked == [("chat", "llm", None)]


def test_tiers_of_a_pool_lend_and_have_figures_of_their_own(tmp_path):
    documents: list[dict[str, object]] = [
        {"apiVersion": "servingtiers.io/v1alpha1", "kind": "TierPool", "metadata": {"name": "shared", "namespace": "llm"},
         "spec": {"servedModelName": "meta-llama/Llama-3.1-8B-Instruct", "maxAccelerators": 6}}
    ]  # fmt: skip
    for name, tier, count, priority in (("chat", "Latency", 2, 200), ("batch", "Throughput", 4, 50)):
        scaling = {"minReplicas": count, "maxReplicas": count}
        hint = {"promptTokens": {"mean": 900, "p95": 2700}, "outputTokens": {"mean": 200, "p95": 600}}
        spec = {
            **DOCUMENT["spec"],  # type: ignore[dict-item]
            "tier": tier,
            "workload": hint,
            "sharedPool": {"name": "shared", "priority": priority},
            "pool": {
                "hardware": {"accelerators": ["a100-sxm-80gb"], "tensorParallel": 1},
                "engine": {"maxNumSeqs": 64, "maxModelLen": 16384},
                "scaling": scaling,
            },
        }
        documents.append({**DOCUMENT, "metadata": {"name": name, "namespace": "llm"}, "spec": spec})
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    arguments = (
        *("--tier", path, "--trace", "spike:2:24:900:240", "--trace", "step:3:3:900"),
        *("--prompt-tokens", 900, "--output-tokens", 200, "--policy", "servingtiers,servingtiers-unshared"),
        "--no-clairvoyant",
    )
    result = call(*arguments, "-o", "json")
    assert result.exit_code == 0, result.output
    lending, apart = json.loads(result.stdout)["runs"]
    assert set(lending["tiers"]) == {"llm/chat", "llm/batch"}
    assert lending["tiers"]["llm/chat"]["borrowed"] > 0 == apart["borrowed"]
    assert lending["requests"] == sum(each["requests"] for each in lending["tiers"].values())
    rows = call(*arguments).stdout.splitlines()
    tiers = ["llm/chat", "llm/batch"]
    assert [row.split()[0] for row in rows[1:]] == ["servingtiers", *tiers, "servingtiers-unshared", *tiers]
    documents[2]["spec"]["pool"]["engine"]["maxModelLen"] = 8192  # type: ignore[index]
    path.write_text(yaml.safe_dump_all(documents))
    refused = call(*arguments)
    assert refused.exit_code == 2
    assert "maxModelLen" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    documents[2]["spec"]["pool"]["engine"]["maxModelLen"] = 16384  # type: ignore[index]
    path.write_text(yaml.safe_dump_all(documents))
    page = call(*arguments, "-o", "html").stdout
    assert "Engines that changed hands" in page


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no prometheus on the PATH: install it (Debian: apt-get install prometheus)",
)
def test_traffic_that_a_real_prometheus_recorded_is_replayed(tier, tmp_path):
    """An hour of samples is put into its store as blocks: 3 requests/s, then 9, prompts of 200 to 500 tokens."""
    now = int(time.time()) // 60 * 60
    begin = now - 3600
    lines: list[str] = []
    kinds = {
        "vllm_router_processed_requests": ('worker="http://10.0.0.1:8000"', "llm", "chat-router-abc"),
        "vllm:request_success": ('finished_reason="stop"', "llm", "chat-pool-abc-1"),
    }

    def count(at: int) -> float:
        return 3.0 * min(at - begin, 1800) + 9.0 * max(at - begin - 1800, 0)

    for name, (labels, namespace, pod) in kinds.items():
        lines.append(f"# TYPE {name} counter")
        lines.extend(
            f'{name}_total{{{labels},namespace="{namespace}",pod="{pod}"}} {count(at)} {at}'
            for at in range(begin, now + 1, 15)
        )
    for name, low, high in (
        ("vllm:request_prompt_tokens", "200", "500"),
        ("vllm:request_generation_tokens", "50", "100"),
    ):
        lines.append(f"# TYPE {name} histogram")
        for at in range(begin, now + 1, 15):
            pod = 'namespace="llm",pod="chat-pool-abc-1"'
            for bound, value in ((low, 0.0), (high, count(at)), ("+Inf", count(at))):
                lines.append(f'{name}_bucket{{le="{bound}",{pod}}} {value} {at}')
            lines.append(f"{name}_count{{{pod}}} {count(at)} {at}")
            lines.append(f"{name}_sum{{{pod}}} {count(at) * 300} {at}")
    samples = tmp_path / "samples.txt"
    samples.write_text("\n".join([*lines, "# EOF", ""]))
    store = tmp_path / "store"
    subprocess.run(
        ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(samples), str(store)],
        check=True,
        capture_output=True,
    )
    config = tmp_path / "prometheus.yml"
    config.write_text("scrape_configs: []\n")
    port = _free_port()
    process = subprocess.Popen(
        [
            *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={store}"),
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                with urlopen(f"{url}/-/ready", timeout=1):  # noqa: S310
                    break
            except OSError:
                time.sleep(0.1)
        result = call("--from-prometheus", url, "--last", "55m", "--tier", tier, "-o", "json")
    finally:
        process.terminate()
        process.wait(10)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["runs"]
    assert found["requests"] == pytest.approx(3 * 1500 + 9 * 1800, rel=0.06)


def test_requests_that_the_engines_cannot_take_are_left_out_and_said(tier, tmp_path):
    """Figures of half the traffic must not look like figures of all of it."""
    short = yaml.safe_load(tier.read_text())
    short["spec"]["pool"]["engine"]["maxModelLen"] = 1500
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump(short))
    traffic = ("--trace", "step:4:8:300", "--prompt-tokens", 1200, "--no-clairvoyant", "--seeds", 2)

    assert "requests are longer than llm/chat takes" in call(*traffic, "--tier", path).stderr
    assert call(*traffic, "--tier", tier).stderr == ""
