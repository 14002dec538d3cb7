"""Alerts, dashboard and monitors speak of metrics that exist, and alerts fire when they should."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from chart.rendering import CHART, ROOT, case_objects, of_kind, only, render
from servingtiers.adapters.operator_metrics import reference
from servingtiers.core.vllm_metrics import ENGINE_METRICS, ROUTER_METRICS, Kind
from servingtiers.render import engine, names, router

ALERTS = CHART / "alerts/servingtiers.yaml"
DASHBOARD = json.loads((CHART / "dashboards/servingtiers.json").read_text())
_NAME = re.compile(r"\b(?:servingtiers_[a-z_]+|vllm(?::|_router_)[a-z_]+)\b(?!\s*=~)")
_LABELS_OF_SCRAPES = {"servingtiers_io_tier", "servingtiers_io_pool"}
"""The pods' labels, as the Prometheus Operator writes them."""


def _exposed():
    """Return every sample name that operator, engines and routers expose."""
    found = set(ROUTER_METRICS.names)
    for line in reference().splitlines():
        if match := re.match(r"\| `(\w+)` \| (\w+) ", line):
            name, kind = match.groups()
            found |= _samples(name, histogram=kind == "histogram")
    for metric in ENGINE_METRICS:
        for name in metric.names:
            found |= _samples(name, histogram=metric.kind is Kind.HISTOGRAM)
    return found


def _samples(name, *, histogram):
    return {f"{name}_{part}" for part in ("bucket", "sum", "count")} if histogram else {name}


def _rules():
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def _dashboard_queries():
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def _promtool():
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed: Debian's prometheus package has it")
    return found


@pytest.mark.parametrize("query", [rule["expr"] for rule in _rules()] + _dashboard_queries())
def test_every_query_names_metrics_that_exist(query):
    """A query of a misspelt metric is silent for ever."""
    used = set(_NAME.findall(query)) - _LABELS_OF_SCRAPES

    assert used
    assert used <= _exposed()


def test_the_dashboards_variables_are_filled_from_metrics_that_exist():
    """Else no tier can be chosen."""
    for variable in DASHBOARD["templating"]["list"][1:]:
        assert set(_NAME.findall(variable["query"]["query"])) <= _exposed()


def test_no_panel_covers_another():
    """The grid is 24 wide."""
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_prometheus_understands_the_alerts(tmp_path):
    """As they are in the file, and as the chart puts them into a PrometheusRule."""
    rule = only(case_objects("monitoring"), "PrometheusRule")
    installed = tmp_path / "rules.yaml"
    installed.write_text(yaml.safe_dump({"groups": rule["spec"]["groups"]}))
    for path in (ALERTS, installed):
        result = subprocess.run(
            [_promtool(), "check", "rules", path], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_prometheus_understands_every_query_of_the_dashboard(tmp_path):
    """Grafana's variables replaced as Grafana replaces them."""
    rules = [
        {
            "record": f"panel:{number}",
            "expr": query.replace("$__rate_interval", "5m")
            .replace("$namespace", ".*")
            .replace("$tier", ".*"),
        }
        for number, query in enumerate(_dashboard_queries())
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    result = subprocess.run(
        [_promtool(), "check", "rules", path], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_fires_on_its_fault_and_is_silent_without(tmp_path):
    """Prometheus' own rule tests, over made-up series."""
    document = yaml.safe_load((ROOT / "tests/chart/alerts.yaml").read_text())
    tested = {case["alertname"] for test in document["tests"] for case in test["alert_rule_test"]}
    assert tested == {rule["alert"] for rule in _rules()}
    for name in tested:
        outcomes = {
            bool(case.get("exp_alerts"))
            for test in document["tests"]
            for case in test["alert_rule_test"]
            if case["alertname"] == name
        }
        assert outcomes == {True, False}, f"{name} is tested one way only"
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(document | {"rule_files": [str(ALERTS)]}))
    result = subprocess.run(
        [_promtool(), "test", "rules", tmp_path / "alerts.yaml"], capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_has_a_runbook():
    """The page has a heading for each, and the alert points to it."""
    page = (ROOT / "docs/how-to/monitoring.md").read_text()
    headings = {
        line.removeprefix("### ").strip().lower() for line in page.splitlines() if line.startswith("### ")
    }
    plain = only(render({"metrics": {"prometheusRule": {"enabled": True}}}), "PrometheusRule")
    linked = only(case_objects("monitoring"), "PrometheusRule")
    for rule, key, base in (
        (plain, "runbook", "docs/how-to/monitoring.md"),
        (linked, "runbook_url", "https://docs.example.com/servingtiers/monitoring"),
    ):
        for alert in (r for group in rule["spec"]["groups"] for r in group["rules"]):
            where, _, anchor = alert["annotations"][key].partition("#")
            assert where == base
            assert anchor in headings


def test_labels_of_the_values_are_added_to_alerts_and_cannot_hide_their_severity():
    """Routing of alerts."""
    labels = {"team": "serving", "severity": "none"}
    rule = only(
        render({"metrics": {"prometheusRule": {"enabled": True, "alertLabels": labels}}}), "PrometheusRule"
    )

    for alert in (r for group in rule["spec"]["groups"] for r in group["rules"]):
        assert alert["labels"]["team"] == "serving"
        assert alert["labels"]["severity"] in {"critical", "warning"}


def test_the_monitors_select_what_the_chart_and_the_operator_make():
    """By the very labels and port names of the renderers."""
    objects = case_objects("monitoring")
    service = only(objects, "Service")
    monitor = only(objects, "ServiceMonitor")["spec"]
    pods = {obj["metadata"]["name"]: obj["spec"] for obj in of_kind(objects, "PodMonitor")}

    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert monitor["endpoints"][0]["honorLabels"] is True
    for component, port in ((names.ENGINE, "http"), (names.ROUTER, "metrics")):
        spec = pods[f"servingtiers-{component}s"]
        assert spec["selector"]["matchLabels"] == {
            names.MANAGED_BY_LABEL: names.MANAGED_BY,
            names.COMPONENT_LABEL: component,
        }
        assert spec["podMetricsEndpoints"][0]["port"] == port
        assert spec["podTargetLabels"][0] == names.TIER_LABEL
    golden = yaml.safe_load_all(
        "\n---\n".join(p.read_text() for p in (ROOT / "tests/golden").rglob("*.yaml"))
    )
    templates = [o["spec"]["template"] for o in golden if o and o.get("kind") == "Deployment"]
    found = {
        (t["metadata"]["labels"][names.COMPONENT_LABEL], port["name"]): port["containerPort"]
        for t in templates
        for container in t["spec"]["containers"]
        for port in container["ports"]
    }
    assert found[names.ENGINE, "http"] == engine.PORT
    assert found[names.ROUTER, "metrics"] == router.METRICS_PORT


def test_the_dashboard_is_installed_as_it_is():
    """Grafana's sidecar reads the ConfigMap."""
    config = only(case_objects("monitoring"), "ConfigMap", "servingtiers-dashboard")

    assert json.loads(config["data"]["servingtiers.json"]) == DASHBOARD
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_monitoring_is_off_by_default():
    """Its kinds exist only where the Prometheus Operator is."""
    assert not {obj["kind"] for obj in render()} & {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
