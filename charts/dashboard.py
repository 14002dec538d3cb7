"""The Grafana dashboard, as data: rows of panels, each with its unit and its queries.

``dashboards/servingtiers.json`` in the chart is written by ``generate.py`` from `document`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ROWS", "Panel", "document"]

_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_TIER = 'namespace=~"$namespace", tier=~"$tier"'
_ENGINE = 'namespace=~"$namespace", servingtiers_io_tier=~"$tier"'
_WIDTH, _HEIGHT = 8, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph."""

    title: str
    unit: str
    """Grafana's name of the unit."""
    queries: tuple[tuple[str, str], ...]
    """PromQL and the legend of its series."""
    description: str = ""


_SCALINGS = f'servingtiers_decisions_total{{{_TIER}, direction!="hold"}}'


def _rate(counter: str, by: str, labels: str = "") -> str:
    selector = f"{counter}{{{labels}}}" if labels else counter
    return f"sum by ({by}) (rate({selector}[$__rate_interval]))"


def _p99(histogram: str) -> str:
    return f"histogram_quantile(0.99, {_rate(f'{histogram}_bucket', 'le, namespace, servingtiers_io_tier', _ENGINE)})"


_BY_TIER = "{{namespace}}/{{tier}}"
_BY_POOL = "{{namespace}}/{{tier}} {{pool}}"
_BY_OBJECTIVE = "{{namespace}}/{{tier}} {{objective}}"
_BY_ENGINE_TIER = "{{namespace}}/{{servingtiers_io_tier}}"

ROWS: dict[str, tuple[Panel, ...]] = {
    "Objectives": (
        Panel(
            "Attainment",
            "percentunit",
            ((f"servingtiers_slo_attainment_ratio{{{_TIER}}}", _BY_OBJECTIVE),),
            "Share of the SLO window's requests within the target.",
        ),
        Panel(
            "Error budget left",
            "percentunit",
            ((f"servingtiers_slo_error_budget_left_ratio{{{_TIER}}}", _BY_OBJECTIVE),),
            "Share of the allowed misses that is left; negative when overspent.",
        ),
        Panel(
            "Time to first token, p99",
            "s",
            (
                (_p99("vllm:time_to_first_token_seconds"), _BY_ENGINE_TIER),
                (f'servingtiers_slo_target_seconds{{{_TIER}, objective="ttft.p99"}}', f"target {_BY_TIER}"),
            ),
            "From the engines' histograms: needs the PodMonitor.",
        ),
        Panel(
            "Time per output token, p99",
            "s",
            (
                (_p99("vllm:request_time_per_output_token_seconds"), _BY_ENGINE_TIER),
                (f'servingtiers_slo_target_seconds{{{_TIER}, objective="tpot.p99"}}', f"target {_BY_TIER}"),
            ),
            "From the engines' histograms: needs the PodMonitor.",
        ),
        Panel(
            "Arrivals",
            "reqps",
            ((f"servingtiers_tier_arrivals_per_second{{{_TIER}}}", _BY_TIER),),
        ),
        Panel(
            "Output tokens",
            "short",
            (
                (
                    _rate("vllm:generation_tokens_total", "namespace, servingtiers_io_tier", _ENGINE),
                    _BY_ENGINE_TIER,
                ),
            ),
            "Tokens per second: needs the PodMonitor.",
        ),
    ),
    "Capacity": (
        Panel(
            "Replicas",
            "short",
            (
                (f"servingtiers_pool_replicas_desired{{{_TIER}}}", f"desired {_BY_POOL}"),
                (f"servingtiers_pool_replicas_ready{{{_TIER}}}", f"ready {_BY_POOL}"),
            ),
        ),
        Panel(
            "Utilisation",
            "percentunit",
            ((f"servingtiers_pool_utilization_ratio{{{_TIER}}}", _BY_POOL),),
            "Load over what the ready replicas carry within the SLO; 100 % is full.",
        ),
        Panel(
            "Requests in engines",
            "short",
            (
                (f"servingtiers_pool_requests_running{{{_TIER}}}", f"running {_BY_POOL}"),
                (f"servingtiers_pool_requests_waiting{{{_TIER}}}", f"waiting {_BY_POOL}"),
            ),
        ),
        Panel(
            "Decisions",
            "short",
            (
                (
                    f"sum by (namespace, tier, pool, direction, binding) (increase({_SCALINGS}[$__rate_interval]))",
                    f"{_BY_POOL} {{{{direction}}}}: {{{{binding}}}}",
                ),
            ),
            "Scalings by direction and by the limit that was binding.",
        ),
        Panel(
            "Cost per hour",
            "short",
            (
                (f"servingtiers_cost_per_hour{{{_TIER}}}", f"{_BY_TIER} {{{{currency}}}}"),
                (f"servingtiers_cost_idle_per_hour{{{_TIER}}}", f"idle {_BY_TIER} {{{{currency}}}}"),
            ),
        ),
        Panel(
            "Cost per million output tokens",
            "short",
            (
                (
                    f"servingtiers_cost_per_million_output_tokens{{{_TIER}}}",
                    f"{_BY_TIER} {{{{currency}}}}",
                ),
            ),
        ),
    ),
    "Operator": (
        Panel(
            "Age of the load last used",
            "s",
            ((f"servingtiers_tier_load_age_seconds{{{_TIER}}}", _BY_TIER),),
            "Nothing shrinks on old data.",
        ),
        Panel(
            "Signals without data",
            "short",
            ((f"servingtiers_tier_load_unknown_signals{{{_TIER}}}", _BY_TIER),),
        ),
        Panel(
            "Reconcile time",
            "s",
            (
                (
                    f"histogram_quantile(0.99, {_rate('servingtiers_reconcile_duration_seconds_bucket', 'le')})",
                    "p99",
                ),
                ("max(servingtiers_reconcile_oldest_key_age_seconds)", "oldest waiting"),
            ),
        ),
        Panel(
            "Reconciles",
            "ops",
            (
                (_rate("servingtiers_reconciles_total", "result"), "{{result}}"),
                ("max(servingtiers_reconcile_queue_depth)", "waiting"),
            ),
        ),
        Panel(
            "Writes",
            "ops",
            (
                (
                    _rate("servingtiers_api_writes_total", "verb, kind"),
                    "{{verb}} {{kind}}",
                ),
            ),
            "A settled fleet makes none.",
        ),
        Panel(
            "Leaders, and silence of the watches",
            "short",
            (
                ("sum(servingtiers_leader)", "leaders"),
                ("max by (kind) (servingtiers_watch_age_seconds)", "{{kind}} silent, s"),
            ),
        ),
    ),
}
"""Title of each row to its panels."""


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "gridPos": {"h": _HEIGHT, "w": _WIDTH, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for place, (query, legend) in enumerate(panel.queries)
        ],
    }


def document() -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": place}
        )
        y += 1
        per_line = 24 // _WIDTH
        for index, panel in enumerate(row):
            x, down = index % per_line * _WIDTH, index // per_line * _HEIGHT
            panels.append(_panel(len(panels) + 1, panel, x, y + down))
        y += -(-len(row) // per_line) * _HEIGHT
    return {
        "title": "ServingTiers",
        "uid": "servingtiers",
        "tags": ["servingtiers", "vllm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("namespace", "label_values(servingtiers_pool_replicas_desired, namespace)"),
                _variable(
                    "tier", 'label_values(servingtiers_pool_replicas_desired{namespace=~"$namespace"}, tier)'
                ),
            ]
        },
        "panels": panels,
    }
