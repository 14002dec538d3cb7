"""The plan as a page: what to buy, and the latency–throughput front it was chosen from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from servingtiers.performance.planner import (
    FRONT_END_MS,
    Choice,
    Constraints,
    Metric,
    Option,
    Plan,
    Role,
    curve,
    duration,
)
from servingtiers.reporting.page import PALETTE, Figure, Page, Table, Text

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CHOICE_COLUMNS", "choice_cells", "plan_page"]

CHOICE_COLUMNS = (
    "fleet",
    "$/hour",
    "$/1M output",
    "GPUs",
    "batch limit",
    "TTFT p99",
    "TPOT p99",
    "E2E p99",
    "bound by",
    "±",
    "checked",
)
"""What is said of a fleet, in a terminal and on the page."""


def choice_cells(choice: Choice, *, with_model: bool) -> tuple[str, ...]:
    """Return one fleet's cells under :data:`CHOICE_COLUMNS`."""
    fleet = " + ".join(
        f"{pool.replicas} × {pool.option.hardware.replace(' x ', '×')}"
        + ("" if pool.role is Role.AGGREGATED else f" {pool.role.value}")
        for pool in choice.pools
    )
    first = choice.pools[-1].option
    if with_model:
        fleet = f"{choice.model.name} {first.weights}: {fleet}"
    elif first.weights != "bf16":
        fleet = f"{first.weights}: {fleet}"
    return (
        fleet,
        f"{choice.cost_per_hour:,.2f}",
        f"{choice.cost_per_million_output:.3f}",
        str(choice.accelerators),
        "/".join(str(pool.option.max_num_seqs) for pool in choice.pools if pool.role is not Role.PREFILL),
        duration(choice.ttft.p99),
        duration(choice.tpot.p99),
        duration(choice.e2e.p99),
        choice.binding,
        f"{choice.band_percent:.0f} %",
        "simulated" if choice.confirmed else "closed form",
    )


def plan_page(plans: Sequence[tuple[str, Plan]], constraints: Constraints) -> str:
    """Return the page of one plan, or of several readings of one question.

    Args:
        plans: Heading and plan, at least one.
        constraints: What was chosen from; its prices are used for the cost figure.
    """
    demand = plans[0][1].demand
    models = list(dict.fromkeys(choice.model.name for _, plan in plans for choice in plan.choices))
    sections: list[tuple[str, list[Text | Table | Figure]]] = []
    for heading, plan in plans:
        parts: list[Text | Table | Figure] = [
            Text(plan.verdict[0].upper() + plan.verdict[1:] + ".", "good" if plan.feasible else "bad")
        ]
        if plan.choices:
            cells = [choice_cells(c, with_model=len(models) > 1) for c in plan.choices[:8]]
            parts.append(Table(CHOICE_COLUMNS, cells, frozenset({"fleet", "bound by"})))
        elif plan.rejections:
            rows = [(r.what, r.reason) for r in plan.rejections[:8]]
            parts.append(Table(("option", "why not"), rows, frozenset({"option", "why not"})))
        sections.append((heading, parts))
    options = _shown_options([plan for _, plan in plans], constraints)
    if options:
        sections += _figures(options, plans[-1][1], constraints)
    prices = ", ".join(
        f"{a.key} {constraints.price(a):.2f}"
        for a in sorted({o.accelerator for o in options}, key=lambda a: a.key)
    )
    sources = sorted({constraints.price_source(o.accelerator) for o in options} - {"given"})
    rate = f"{demand.rate:g} requests/s of {demand.prompt_tokens:g} prompt and {demand.output_tokens:g} output tokens"
    return Page(
        title=f"Capacity plan: {', '.join(models) or 'no fleet'}",
        summary=f"{rate}; {100 * demand.prefix_hit_rate:.0f} % of prompt tokens cached; "
        f"{constraints.spare} spare replica(s) per pool; TTFT p99 is held against the objective × {constraints.tail_margin:g}.",
        sections=sections,
        footer=f"USD per accelerator and hour: {prices}. {' · '.join(sources)} "
        + " · ".join(sorted({p.source for _, plan in plans for c in plan.choices[:8] for p in c.pools})),
    ).html()


def _shown_options(plans: Sequence[Plan], constraints: Constraints) -> list[Option]:
    """The cheapest option of each model and accelerator, cheapest first, at most as many as there are colours.

    Where nothing is feasible, those that the nearest feasible objectives allow.
    """
    found: dict[tuple[str, str], tuple[float, Option]] = {}
    for plan in plans:
        candidates = list(plan.choices) + ([plan.nearest_choice] if plan.nearest_choice else [])
        for choice in candidates:
            if len(choice.pools) == 1:
                option = choice.pools[0].option
                key = (option.model.name, option.accelerator.key)
                if key not in found or choice.cost_per_hour < found[key][0]:
                    found[key] = (
                        choice.cost_per_hour,
                        replace(option, max_num_seqs=constraints.batch_limits[-1]),
                    )
    ordered = sorted(found.values(), key=lambda pair: pair[0])
    return [option for _, option in ordered[: len(PALETTE)]]


def _figures(
    options: Sequence[Option], plan: Plan, constraints: Constraints
) -> list[tuple[str, list[Text | Table | Figure]]]:
    demand = plan.demand
    several = len({option.model.name for option in options}) > 1
    front: list[dict[str, Any]] = []
    cost: list[dict[str, Any]] = []
    points: list[tuple[float, float]] = []
    for option, colour in zip(options, PALETTE, strict=False):
        found = curve(option, Role.AGGREGATED, replace(demand, rate=1.0), constraints.link_gb_s)
        per_gpu = [rate * demand.output_tokens / option.tensor_parallel for rate in found.rates]
        tpot = found.values(Metric.TPOT, "p99")
        ttft = [v + FRONT_END_MS for v in found.values(Metric.TTFT, "p99")]
        price = constraints.price(option.accelerator)
        dollars = [1e6 * price / (tokens * 3600.0) for tokens in per_gpu]
        name = f"{option.model.name.rsplit('/', 1)[-1]} on {option.hardware}" if several else option.hardware
        text = [
            f"{name}<br>{rate:.2f} requests/s per replica, batch {point.mean_batch:.0f}<br>"
            f"TPOT p99 {duration(t)}, TTFT p99 {duration(f)}<br>${usd:.3f} per 1M output tokens"
            for rate, point, t, f, usd in zip(found.rates, found.points, tpot, ttft, dollars, strict=True)
        ]
        trace = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "line": {"color": colour, "width": 2},
            "marker": {"size": 6},
            "text": text,
            "hoverinfo": "text",
        }
        front.append(trace | {"x": per_gpu[1:], "y": tpot[1:], "text": text[1:]})
        cost.append(trace | {"x": ttft[1:], "y": dollars[1:], "text": text[1:], "showlegend": False})
        points += list(zip(per_gpu[1:], tpot[1:], strict=True))
    front.append(_pareto(points))
    lines = {"tpot": _target(plan, Metric.TPOT), "ttft": _target(plan, Metric.TTFT)}
    legend = {"orientation": "h", "y": -0.22, "x": 0}
    front_figure = Figure(
        front,
        {
            "height": 520,
            "legend": legend,
            "xaxis": {"title": {"text": "output tokens per second and GPU"}, "rangemode": "tozero"},
            "yaxis": {"title": {"text": "TPOT p99, ms"}, "rangemode": "tozero"},
            "shapes": _line("y", lines["tpot"]),
            "annotations": _note("y", lines["tpot"], "objective"),
        },
        "Lines of time per output token over throughput per GPU, one for each accelerator, and their Pareto front",
    )
    cost_figure = Figure(
        cost,
        {
            "height": 430,
            "xaxis": {"title": {"text": "TTFT p99, ms (before the margin)"}, **_log_axis()},
            "yaxis": {"title": {"text": "USD per 1M output tokens"}, **_log_axis()},
            "shapes": _line("x", lines["ttft"] and lines["ttft"] / constraints.tail_margin),
            "annotations": _note(
                "x", lines["ttft"] and lines["ttft"] / constraints.tail_margin, "objective / margin"
            ),
        },
        "Lines of cost over time to first token, one for each accelerator",
    )
    sections: list[tuple[str, list[Text | Table | Figure]]] = [
        (
            "The trade-off: time per token against throughput",
            [
                Text(
                    "Each line is one replica from idle (left) to nearly saturated (right). The dotted line is the Pareto "
                    "front: no accelerator gives more throughput at that time per token."
                ),
                front_figure,
            ],
        ),
        (
            "What speed costs",
            [
                Text("The price of a million output tokens, had each replica just the load of that point."),
                cost_figure,
            ],
        ),
    ]
    if plan.choices:
        sections.append(("Cost of the fleets", [_bars(plan)]))
    return sections


def _log_axis() -> dict[str, Any]:
    """A logarithmic axis labelled by 1, 2, 5 and their multiples of ten."""
    values = [step * 10.0**power for power in range(-4, 7) for step in (1, 2, 5)]
    return {"type": "log", "tickvals": values, "ticktext": [f"{value:g}" for value in values]}


def _pareto(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The points that none beats in both throughput and time per token."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (-p[0], p[1])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [x for x, _ in reversed(front)],
        "y": [y for _, y in reversed(front)],
        "line": {"color": "#898781", "width": 2, "dash": "dot"},
        "hoverinfo": "skip",
    }


def _target(plan: Plan, metric: Metric) -> float | None:
    targets = [o.target_ms for o in plan.objectives if o.metric is metric]
    return min(targets) if targets else None


def _line(axis: str, value: float | None) -> list[dict[str, Any]]:
    if not value:
        return []
    other = "x" if axis == "y" else "y"
    return [
        {
            "type": "line",
            f"{axis}0": value,
            f"{axis}1": value,
            f"{other}0": 0,
            f"{other}1": 1,
            f"{other}ref": "paper",
            "line": {"color": "#d03b3b", "width": 1.5, "dash": "dash"},
        }
    ]


def _note(axis: str, value: float | None, text: str) -> list[dict[str, Any]]:
    if not value:
        return []
    if axis == "y":
        place: dict[str, Any] = {"xref": "paper", "x": 1, "y": value, "xanchor": "right", "yanchor": "bottom"}
    else:
        place = {"yref": "paper", "y": 1, "x": math.log10(value), "xanchor": "left", "yanchor": "top"}
    return [{**place, "text": f"{text} {duration(value)}", "showarrow": False, "font": {"color": "#d03b3b"}}]


def _bars(plan: Plan) -> Figure:
    shown = list(plan.choices[:10])[::-1]
    several = len({choice.model.name for choice in shown}) > 1
    labels = [choice_cells(choice, with_model=several)[0] for choice in shown]
    spare = [choice.cost_per_hour * (1.0 - _needed_share(choice)) for choice in shown]
    needed = [choice.cost_per_hour - part for choice, part in zip(shown, spare, strict=True)]
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": labels,
        "hovertemplate": "%{x:.2f} USD/hour<extra>%{fullData.name}</extra>",
    }
    return Figure(
        [
            bar | {"name": "needed for the load", "x": needed, "marker": {"color": PALETTE[0]}},
            bar | {"name": "spare (N+1)", "x": spare, "marker": {"color": "#898781"}},
        ],
        {
            "height": 120 + 34 * len(shown),
            "barmode": "stack",
            "legend": {"orientation": "h", "y": 1.08, "x": 0},
            "xaxis": {"title": {"text": "USD per hour"}},
            "yaxis": {"automargin": True},
        },
        "Bars of cost per hour of the cheapest fleets",
    )


def _needed_share(choice: Choice) -> float:
    """Share of a fleet's accelerators' replicas that the load needs."""
    total = sum(pool.replicas * pool.option.tensor_parallel for pool in choice.pools)
    return sum(pool.needed * pool.option.tensor_parallel for pool in choice.pools) / total
