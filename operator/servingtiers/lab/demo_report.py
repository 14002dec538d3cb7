"""The demo's report: load, replicas and p99 over time, and every decision with its reason, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from servingtiers import __version__
from servingtiers.lab.demo import Decision, Outcome, TierOutcome, attainment
from servingtiers.reporting.page import PALETTE, Figure, Page, Table, Text

__all__ = ["PROVED", "outcome_page", "percent", "truth", "write_report"]

_BIN_SECONDS = 5.0
PROVED = (
    "Within the objective: what clients measured of each request, and what the operator can prove from the buckets of"
    " the engines' histograms: at least this share."
)


def truth(outcome: Outcome) -> str:
    """Return what was real, what was simulated, and what was shortened."""
    router = "vllm-router, " if outcome.real_router else ""
    simulated = "nodes and engines" if outcome.real_router else "nodes, engines and routers"
    settings = outcome.settings
    return (
        f"Real: etcd, kube-apiserver, controller manager, scheduler, the operator (its own process, under the shipped"
        f" Role), {router}and the recorded traffic. Simulated: {simulated}; an engine computes nothing, its step"
        f" times come from a simple model of the GPU. Shortened: the trace runs {outcome.compress:.0f}× faster than"
        f" it was recorded, engines start in {settings.ring.time_factor:g} of the time real ones take, and"
        f" scaleDownHold is {settings.hold} (60 s or more by itself). No latency here is a measurement of a GPU."
    )


def percent(share: float | None) -> str:
    """Return a share of requests for people; never rounded up to all of them."""
    if share is None:
        return "–"
    return "100 %" if share == 1 else f"{min(share * 100, 99.99):.2f} %"


def outcome_page(outcome: Outcome) -> Page:
    """Return the page."""
    problems = outcome.problems()
    names = list(outcome.tiers)
    if problems:
        verdict = Text("Not all was shown: " + "; ".join(problems) + ".", kind="bad")
    else:
        moves = ", ".join(f"{tier.name} {tier.ups}↑ {tier.downs}↓" for tier in outcome.tiers.values())
        verdict = Text(
            f"All {len(names)} tiers Ready. Replicas decided by the operator: {moves}.", kind="good"
        )
    sections: list[tuple[str, list[Text | Table | Figure]]] = [
        ("", [verdict]),
        ("Outcome", [Text(PROVED), _outcome_table(outcome)]),
    ]
    sections += [_tier_section(outcome, tier) for tier in outcome.tiers.values()]
    return Page(
        title="ServingTiers demo",
        summary=truth(outcome),
        sections=sections,
        footer=f"ServingTiers {__version__}. Trace: Azure LLM inference trace 2023, conversation (Patel et al., ISCA 2024),"
        " CC BY 4.0. Clients' latencies count from when the trace says a request was due.",
    )


def _outcome_table(outcome: Outcome) -> Table:
    rows = []
    for tier in outcome.tiers.values():
        records = [each.record for each in tier.finished]
        for objective, target in tier.objectives.items():
            first = objective == next(iter(tier.objectives))
            rows.append(
                [
                    tier.name if first else "",
                    f"{objective} ≤ {_seconds(target)}",
                    percent(attainment(records, objective, target)),
                    percent(tier.operator_attainment.get(objective)),
                    str(len(records)) if first else "",
                    str(sum(1 for record in records if not record.ok)) if first else "",
                    f"{tier.ups} / {tier.downs}" if first else "",
                    f"{tier.gpu_seconds / 3600:.3f}" if first else "",
                    f"{tier.cost:.2f} {tier.currency}" if first else "",
                ]
            )
    return Table(
        columns=(
            "tier",
            "objective",
            "within it, clients",
            "within it, operator ≥",
            "requests",
            "failed",
            "up / down",
            "GPU hours",
            "cost",
        ),
        rows=rows,
        text=frozenset({"tier", "objective"}),
    )


def _tier_section(outcome: Outcome, tier: TierOutcome) -> tuple[str, list[Text | Table | Figure]]:
    kinds = sorted(
        {
            f"{pool.name} on {pool.accelerator}"
            for sample in outcome.samples[-1:]
            for each in sample.tiers
            if each.name == tier.name
            for pool in each.pools
        }
    )
    intro = Text(f"{tier.tier} tier of {tier.model}: {', '.join(kinds)}.")
    label = f"Requests, replicas, p99 TTFT and p99 TPOT of {tier.name} over the replay"
    figure = Figure(_traces(outcome, tier), _layout(outcome, tier), label)
    return tier.name, [intro, figure, _decision_table(tier)]


def _decision_table(tier: TierOutcome) -> Table:
    return Table(
        columns=("at", "pool", "replicas", "bound by", "reason", "what would change it"),
        rows=[
            [
                f"{each.at:.0f} s",
                each.pool,
                f"{each.before} → {each.after}" + ("" if each.acted else " (not carried out)"),
                each.binding,
                each.reason,
                each.would_change,
            ]
            for each in tier.decisions
        ],
        text=frozenset({"pool", "bound by", "reason", "what would change it"}),
    )


def _rates(tier: TierOutcome, seconds: float) -> tuple[list[float], list[float]]:
    """Return the middles of bins and the requests per second in them."""
    bins = max(1, int(seconds / _BIN_SECONDS))
    counts = [0] * bins
    for at in tier.sent:
        if at < bins * _BIN_SECONDS:
            counts[int(at / _BIN_SECONDS)] += 1
    return [(n + 0.5) * _BIN_SECONDS for n in range(bins)], [count / _BIN_SECONDS for count in counts]


def _traces(outcome: Outcome, tier: TierOutcome) -> list[dict[str, Any]]:
    end = outcome.samples[-1].at if outcome.samples else 0.0
    at, rates = _rates(tier, end)
    traces: list[dict[str, Any]] = [
        {
            "x": at,
            "y": rates,
            "type": "scatter",
            "mode": "lines",
            "fill": "tozeroy",
            "name": "requests sent",
            "line": {"color": PALETTE[4], "width": 1.5},
            "hovertemplate": "%{y:.1f} requests/s<extra></extra>",
            "yaxis": "y",
        }
    ]
    seen = [
        (sample.at, each) for sample in outcome.samples for each in sample.tiers if each.name == tier.name
    ]
    times = [round(at, 1) for at, _ in seen]
    pools = [pool.name for pool in seen[-1][1].pools] if seen else []
    several = len(pools) > 1
    for number, name in enumerate(pools):
        rows = [next((pool for pool in each.pools if pool.name == name), None) for _, each in seen]
        of = f" {name}" if several else ""
        line = {"color": PALETTE[number], "shape": "hv"}
        for what, style in (("ready", {"width": 2.5}), ("desired", {"width": 1.5, "dash": "dot"})):
            traces.append(
                {
                    "x": times,
                    "y": [None if row is None else getattr(row, what) for row in rows],
                    "type": "scatter",
                    "mode": "lines",
                    "name": f"{what}{of}",
                    "line": line | style,
                    "hovertemplate": f"%{{y}} {what}{of}<extra></extra>",
                    "yaxis": "y2",
                }
            )
        traces.append(_markers([each for each in tier.decisions if each.pool == name], of))
    for metric, axis, colour in (("ttft", "y3", PALETTE[2]), ("tpot", "y4", PALETTE[3])):
        traces.append(
            {
                "x": times,
                "y": [
                    None if value is None else round(value * 1000, 1)
                    for _, each in seen
                    for value in [getattr(each, f"{metric}_p99")]
                ],
                "type": "scatter",
                "mode": "lines",
                "name": f"p99 {metric.upper()}",
                "line": {"color": colour, "width": 2},
                "hovertemplate": f"p99 {metric.upper()} %{{y:.0f}} ms<extra></extra>",
                "yaxis": axis,
            }
        )
    return traces


def _markers(decisions: list[Decision], of: str) -> dict[str, Any]:
    return {
        "x": [round(each.at, 1) for each in decisions],
        "y": [each.after for each in decisions],
        "text": [
            _wrapped(f"{each.before} → {each.after} ({each.binding}): {each.reason}") for each in decisions
        ],
        "type": "scatter",
        "mode": "markers",
        "name": f"decisions{of}",
        "marker": {
            "size": 10,
            "symbol": ["triangle-up" if each.up else "triangle-down" for each in decisions],
            "color": [PALETTE[2] if each.up else PALETTE[1] for each in decisions],
        },
        "hovertemplate": "%{text}<extra></extra>",
        "yaxis": "y2",
        "showlegend": False,
    }


def _wrapped(text: str, width: int = 70) -> str:
    import html
    import textwrap

    return "<br>".join(html.escape(line) for line in textwrap.wrap(text, width))


def _layout(outcome: Outcome, tier: TierOutcome) -> dict[str, Any]:
    end = max([sample.at for sample in outcome.samples[-1:]], default=1.0)
    domains = {"yaxis": [0.80, 1.0], "yaxis2": [0.52, 0.74], "yaxis3": [0.26, 0.46], "yaxis4": [0.0, 0.20]}
    titles = {"yaxis": "requests/s", "yaxis2": "replicas", "yaxis3": "TTFT p99, ms", "yaxis4": "TPOT p99, ms"}
    layout: dict[str, Any] = {
        "height": 720,
        "xaxis": {"title": {"text": "seconds of the replay"}, "range": [0, end], "anchor": "y4"},
        "legend": {"orientation": "h", "y": 1.06, "x": 0},
        "margin": {"l": 72, "r": 20, "t": 36, "b": 52},
        "hovermode": "x",
    }
    for axis, domain in domains.items():
        layout[axis] = {
            "domain": domain,
            "title": {"text": titles[axis]},
            "rangemode": "tozero",
            "anchor": "x",
        }
    layout["yaxis2"] |= {"dtick": 1, "rangemode": "tozero"}
    layout["shapes"] = [
        {
            "type": "line",
            "xref": "x",
            "yref": axis,
            "x0": 0,
            "x1": end,
            "y0": target * 1000,
            "y1": target * 1000,
            "line": {"color": PALETTE[7], "width": 1.5, "dash": "dash"},
        }
        for metric, axis in (("ttft", "y3"), ("tpot", "y4"))
        if (target := tier.objectives.get(f"{metric}.p99")) is not None
    ]
    layout["annotations"] = [
        {
            "text": f"objective {_seconds(shape['y0'] / 1000)}",
            "xref": "x",
            "yref": shape["yref"],
            "x": end,
            "y": shape["y0"],
            "xanchor": "right",
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 11, "color": PALETTE[7]},
        }
        for shape in layout["shapes"]
    ]
    return layout


def _seconds(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1000:g} ms"


def write_report(outcome: Outcome, path: Path) -> None:
    """Write ``report.html``. Needs Plotly, of the ``reports`` extra."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(outcome_page(outcome).html(), encoding="utf-8")
