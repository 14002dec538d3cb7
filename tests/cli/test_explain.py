"""``servingtiers explain`` tells the story of a tier from its status."""

# the names of the tests are the sentences

import copy
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import yaml
from click.testing import CliRunner

from servingtiers.cli.explain import command

TIER = {
    "apiVersion": "servingtiers.io/v1alpha1",
    "kind": "ServingTier",
    "metadata": {"name": "chat", "namespace": "llm", "generation": 3},
    "spec": {"tier": "Latency", "model": {"name": "meta-llama/Llama-3.1-8B-Instruct"}},
    "status": {
        "observedGeneration": 3,
        "endpoint": "http://chat.llm.svc.cluster.local:8000/v1",
        "conditions": [
            {
                "type": kind,
                "status": state,
                "reason": "Why",
                "message": f"{kind} says",
                "lastTransitionTime": "2026-01-02T03:04:05Z",
            }
            for kind, state in (("Ready", "True"), ("SLOMet", "False"), ("Stalled", "False"), ("Conflict", "True"))
        ],
        "effective": {
            "slo": {"ttft.p99": "500ms"},
            "sloReason": "given in spec.slo",
            "pools": [
                {
                    "name": "pool",
                    "accelerator": "h100-sxm-80gb",
                    "tensorParallel": 1,
                    "weights": "bf16",
                    "maxNumSeqs": 64,
                    "gpuMemoryUtilizationPercent": 90,
                    "image": "vllm/vllm-openai:v0.32.0",
                    "engineVersion": "0.32.0",
                    "reasons": {
                        "maxNumSeqs": "the largest batch that meets TPOT",
                        "gpuMemoryUtilizationPercent": "leaves a tenth",
                        "speculative": "off: drafts do not pay",
                    },
                }
            ],
        },
        "plan": {"requestsPerSecondPerReplica": "6.8", "bandPercent": 15, "source": "a table"},
        "pools": [
            {
                "name": "pool",
                "role": "Aggregated",
                "replicas": 3,
                "ready": 2,
                "desired": 4,
                "recommended": 5,
                "signals": {"running": "31"},
                "memory": {"lowPeak": 2},
            }
        ],
        "slo": [
            {
                "objective": "ttft.p99",
                "target": "500ms",
                "observed": "250ms–500ms",
                "attainmentPercent": "99.70",
                "errorBudgetLeftPercent": "70",
                "resolution": "the target is a bucket edge",
                "hours": [{"hour": "2026-01-02T03:00:00Z", "total": 10, "good": 9}],
            }
        ],
        "cost": {"perHour": "8.40", "idlePerHour": "1.10", "perMillionOutputTokens": "0.19", "priceSource": "catalogue"},
        "decisions": [
            {
                "time": "2026-01-02T03:04:05Z",
                "pool": "pool",
                "from": 3,
                "to": 4,
                "reason": "30 sequences run.",
                "binding": "Queue",
                "wouldChange": "Fewer of them.",
                "acted": False,
            },
            {
                "time": "2026-01-02T02:04:05Z",
                "pool": "pool",
                "from": 2,
                "to": 3,
                "reason": "Earlier.",
                "binding": "Queue",
            },
        ],
    },
}  # fmt: skip


def run(*arguments: str, stdin: str | None = None, env: dict[str, str] | None = None):
    return CliRunner().invoke(command, list(arguments), input=stdin, env=env)


@pytest.fixture
def tier_file(tmp_path):
    path = tmp_path / "tier.yaml"
    path.write_text(yaml.safe_dump(TIER))
    return str(path)


def test_every_part_of_the_status_is_told_with_its_reason(tier_file):
    result = run("-f", tier_file)
    assert result.exit_code == 0
    for said in (
        "llm/chat: Latency tier of meta-llama/Llama-3.1-8B-Instruct",
        "SLOMet False (Why) since 2026-01-02T03:04:05Z: SLOMet says",
        "maxNumSeqs                   64  (the largest batch that meets TPOT)",
        "gpuMemoryUtilizationPercent  90  (leaves a tenth)",
        "speculative                  not set  (off: drafts do not pay)",
        "one replica carries 6.8 requests/s ± 15 % (a table)",
        "pool (Aggregated): 2 ready of 3, wanted 4, recommended 5",
        "ttft.p99 within 500ms: now 250ms–500ms; met by 99.70 % over the window, 70 % of the error budget left",
        "8.40 USD an hour, 1.10 of it idle; 0.19 per 1M output tokens (prices: catalogue)",
        "pool 3 → 4 (Queue, not carried out): 30 sequences run.",
        "what would change it: Fewer of them.",
    ):
        assert said in result.output
    assert result.output.index("30 sequences run") < result.output.index("Earlier.")


@pytest.mark.parametrize(
    ("attainment", "budget", "said"),
    [
        ("97.02–99.10", "-198–10", "met by at least 97.02 % and at most 99.10 % over the window, at least -198 % and"),
        ("99.20–100.00", "20–100", "met by at least 99.20 % over the window, at least 20 % of the error budget left"),
        ("99.70", "70", "met by 99.70 % over the window, 70 % of the error budget left"),
    ],
)  # fmt: skip
def test_what_is_only_bounded_is_told_as_a_bound(attainment, budget, said):
    """Times of two engines are not paired, and targets lie between bucket edges: what is proved comes first."""
    objective = {
        **TIER["status"]["slo"][0],
        "attainmentPercent": attainment,
        "errorBudgetLeftPercent": budget,
    }
    tier = {**TIER, "status": {**TIER["status"], "slo": [objective]}}
    assert said in run("-f", "-", stdin=yaml.safe_dump(tier)).output


def test_who_lends_and_borrows_is_told(tmp_path):
    tier = copy.deepcopy(TIER)
    tier["status"]["pools"][0] |= {"lent": 1, "borrowed": 2}
    move = {"engine": "batch-pool-x", "reason": "chat needs 3 engines and has 2.", "binding": "Borrowed"}
    tier["status"]["decisions"].insert(
        0, {"time": "2026-01-02T03:05:05Z", "pool": "pool", "from": 2, "to": 3} | move
    )
    path = tmp_path / "tier.yaml"
    path.write_text(yaml.safe_dump(tier))
    said = run("-f", str(path)).output
    assert "1 of them lent or on their way, and 2 borrowed of other tiers" in said
    assert (
        "engine batch-pool-x came, engines that serve 2 → 3 (Borrowed): chat needs 3 engines and has 2."
        in said
    )


def test_conditions_that_are_well_are_left_out(tier_file):
    output = run("-f", tier_file).output
    assert "Conflict True" in output
    assert "Stalled" not in output


def test_json_holds_the_same_without_the_operators_own_notes(tier_file):
    told = json.loads(run("-f", tier_file, "-o", "json").output)
    assert told["upToDate"] is True
    assert told["decisions"][0]["to"] == 4
    assert told["effective"]["pools"][0]["reasons"]["speculative"].startswith("off")
    assert "hours" not in told["slo"][0]
    assert "memory" not in told["pools"][0]


def test_a_tier_the_operator_has_not_seen_says_so():
    fresh = {key: value for key, value in TIER.items() if key != "status"}
    output = run("-f", "-", stdin=yaml.safe_dump(fresh)).output
    assert "the operator has not seen this tier" in output


def test_a_status_of_an_older_spec_says_so():
    older = {**TIER, "metadata": {**TIER["metadata"], "generation": 5}}
    output = run("-f", "-", stdin=yaml.safe_dump(older)).output
    assert "of generation 3; the spec is at 5" in output


def test_one_tier_of_a_list_is_found_by_its_name(tmp_path):
    other = {**TIER, "metadata": {**TIER["metadata"], "name": "batch"}}
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump({"kind": "List", "items": [TIER, other]}))
    assert run("batch", "-f", str(path)).output.startswith("llm/batch")
    ambiguous = run("-f", str(path))
    assert ambiguous.exit_code == 2
    assert "name one of chat, batch" in ambiguous.output


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ((), None, "name a tier, or a file with -f"),
        (("-f", "missing.yaml"), None, "cannot be read"),
        (("-f", "-"), "a: [", "is no YAML"),
        (("-f", "-"), "kind: Pod", "holds no ServingTier"),
        (("-f", "-"), "kind: List\nitems:", "holds no ServingTier"),
        (("chat", "-f", "-"), "kind: ServingTier\nmetadata: 3", "holds no ServingTier named chat"),
        (
            ("-f", "-"),
            "kind: ServingTier\napiVersion: v1\nmetadata: {name: a}\nspec: {}",
            "not a ServingTier",
        ),
        (("chat", "-o", "xml"), None, "xml"),
    ],
)
def test_errors_are_one_line_that_states_the_mend(arguments, stdin, said):
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 2
    assert said in result.output
    assert result.output.strip().count("\n") == 0


class _Api(BaseHTTPRequestHandler):
    def do_GET(self):  # the name http.server calls
        found = self.path == "/apis/servingtiers.io/v1alpha1/namespaces/llm/servingtiers/chat"
        body = json.dumps(TIER if found else {"kind": "Status", "code": 404}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Stay silent."""


@pytest.fixture
def kubeconfig(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Api)
    Thread(target=server.serve_forever, daemon=True).start()
    path = tmp_path / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "llm"}}],
                "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
                "users": [{"name": "u", "user": {}}],
            }
        )
    )
    yield str(path)
    server.shutdown()
    server.server_close()


def test_the_cluster_is_asked_by_the_usual_kubeconfig(kubeconfig, monkeypatch):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", kubeconfig)
    result = run("chat")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("llm/chat: Latency tier")
    missing = run("chat", "-n", "elsewhere")
    assert missing.exit_code == 2
    assert "no ServingTier chat in namespace elsewhere" in missing.output


def test_without_a_kubeconfig_the_mend_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    result = run("chat")
    assert result.exit_code == 2
    assert "set KUBECONFIG" in result.output
