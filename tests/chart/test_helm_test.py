"""The program of the `helm test` pod, run as it is."""

import io
import urllib.error

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from chart.rendering import only, render
from servingtiers.adapters.operator_metrics import OperatorMetrics, Probes


def _page(*, leading):
    registry = CollectorRegistry()
    OperatorMetrics(registry, Probes(lambda: 0, lambda: 0.0, lambda: leading, dict), "0.1.0")
    return generate_latest(registry)


def _run(monkeypatch, answers):
    """Run the pod's program; return its exit status and the addresses it asked."""
    pod = only(render(), "Pod")
    container = pod["spec"]["containers"][0]
    assert container["command"] == ["python3", "-c"]
    asked = []
    pages = iter(answers)

    def urlopen(url, timeout):
        asked.append(url)
        page = next(pages, None)
        if page is None:
            raise urllib.error.URLError("refused")
        return io.BytesIO(page)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        exec(container["args"][0], {})  # noqa: S102 - the program under test
    return ended.value.code, asked


def test_it_passes_when_the_operator_leads_and_asks_the_metrics_service(monkeypatch):
    """Also when the first answers do not come or another waits to lead."""
    status, asked = _run(monkeypatch, [_page(leading=False), _page(leading=True)])
    service = only(render(), "Service")

    assert status == 0
    assert asked == 2 * [
        f"http://{service['metadata']['name']}.llm:{service['spec']['ports'][0]['port']}/metrics"
    ]


def test_it_fails_with_the_next_command_when_nobody_leads_or_answers(monkeypatch):
    """A person reads it in `helm test --logs`."""
    for answers in ([_page(leading=False)] * 40, []):
        status, asked = _run(monkeypatch, answers)
        assert "kubectl logs deployment/servingtiers-operator" in status
        assert len(asked) == 30


def test_the_pod_may_reach_the_metrics_port():
    """Its labels are those that the NetworkPolicy admits."""
    objects = render()
    admitted = only(objects, "NetworkPolicy", "servingtiers-operator")["spec"]["ingress"][0]["from"]
    labels = only(objects, "Pod")["metadata"]["labels"]

    assert any(
        peer.get("podSelector", {}).get("matchLabels", {}).items() <= labels.items()
        for peer in admitted
        if "namespaceSelector" not in peer
    )
