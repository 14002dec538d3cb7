"""The page of ``servingtiers simulate -o html``: what each policy did with the traffic, and what it cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from servingtiers.reporting.page import PALETTE, Figure, Page, Table, Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from servingtiers.simulate.fleet import RunResult, TierOutcome
    from servingtiers.simulate.limits import Clairvoyant
    from servingtiers.simulate.scoring import Score

__all__ = ["simulation_page"]

_COLUMNS = (
    "policy",
    "seed",
    "violations",
    "TTFT kept",
    "TPOT kept",
    "E2E kept",
    "worst 5 min",
    "GPU-hours",
    "÷ clairvoyant",
    "ups",
    "downs",
    "reversals",
    "rejected",
    "unfinished",
    "peak",
)


def simulation_page(
    scores: Sequence[Score], results: Sequence[RunResult], limits: Sequence[Clairvoyant | None]
) -> str:
    """Return the page as HTML.

    Args:
        scores: Figures of every run.
        results: The runs, in the same order.
        limits: Sweep of the clairvoyant by seed; None where it was not searched.
    """
    sections: list[tuple[str, Sequence[Text | Table | Figure]]] = [
        (
            "",
            [
                _verdict(scores),
                Table(
                    _COLUMNS,
                    [
                        row
                        for score in scores
                        for row in (
                            _row(score),
                            *(_row(part, f"{score.policy}: {key}") for key, part in score.tiers.items()),
                        )
                    ],
                    frozenset({"policy"}),
                ),
            ],
        ),
    ]
    pareto = _pareto(scores, limits)
    sections.append(
        (
            "What attainment costs",
            [
                Text("Down and to the left is better: fewer violations for fewer GPU-hours."),
                pareto,
            ],
        )
    )
    for index, outcome in enumerate(results[0].tiers):
        sections.append((f"Tier {outcome.plan.key}", _tier(results, index)))
    moves = [
        (
            result.policy,
            f"{move.time:.0f} s",
            move.pool,
            f"{move.before} → {move.after}",
            move.binding,
            move.reason,
        )
        for result in results
        if result.policy == "servingtiers" and result.seed == 0
        for move in result.moves
    ]
    if moves:
        columns = ("policy", "time", "pool", "replicas", "binding", "reason")
        sections.append(
            (
                "Every move and its reason",
                [Table(columns, moves, frozenset({"policy", "pool", "binding", "reason"}))],
            )
        )
    passages = [
        (
            result.policy,
            f"{passage.time:.0f} s",
            passage.engine,
            passage.home,
            passage.holder or f"(on its way to {passage.bound_for or passage.home})",
            passage.reason,
        )
        for result in results
        if result.seed == 0
        for passage in result.passages
    ]
    if passages:
        columns = ("policy", "time", "engine", "home", "holder", "reason")
        sections.append(
            ("Engines that changed hands", [Table(columns, passages, frozenset(columns) - {"time"})])
        )
    traces = {outcome.plan.trace.name: outcome.plan.trace.origin for outcome in results[0].tiers}
    return Page(
        title="Simulated traffic against " + ", ".join(o.plan.spec.model.name for o in results[0].tiers),
        summary="; ".join(f"{name} ({origin})" for name, origin in traces.items())
        + f". {results[0].seconds / 60:.0f} minutes of it on a virtual clock.",
        sections=sections,
        footer="Engines serve from step tables with noise; policies see vLLM's buckets at every scrape. Requests refused, "
        "lost or not finished count as violations; start-up and drain count as GPU time.",
    ).html()


def _verdict(scores: Sequence[Score]) -> Text:
    mine = [score for score in scores if score.policy == "servingtiers"] or list(scores)
    worst = max(mine, key=lambda score: score.violations)
    good = worst.violations <= 0.01
    hours = math.fsum(score.gpu_hours for score in mine) / len(mine)
    return Text(
        f"{worst.policy}: {100 * worst.violations:.2f} % of requests missed an objective"
        f"{' in the worst run' if len(mine) > 1 else ''}, for {hours:.2f} GPU-hours.",
        "good" if good else "bad",
    )


def _row(score: Score, name: str | None = None) -> tuple[str, ...]:
    over = score.gpu_hours_over_clairvoyant
    return (
        name or score.policy,
        str(score.seed),
        f"{100 * score.violations:.2f} %",
        *(f"{100 * score.attainment[metric]:.2f} %" for metric in ("ttft", "tpot", "e2e")),
        f"{100 * score.worst5min:.1f} %",
        f"{score.gpu_hours:.2f}",
        "–" if over is None else f"{over:.2f}",
        *(
            str(value)
            for value in (
                score.scale_ups,
                score.scale_downs,
                score.reversals,
                score.rejected,
                score.unfinished,
                score.peak_replicas,
            )
        ),
    )


def _colours(names: Sequence[str]) -> dict[str, str]:
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(dict.fromkeys(names))}


def _pareto(scores: Sequence[Score], limits: Sequence[Clairvoyant | None]) -> Figure:
    colours = _colours([score.policy for score in scores])
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "marker": {"color": colour, "size": 11},
            "x": [score.gpu_hours for score in scores if score.policy == name],
            # A logarithm has no 0: what is below one in ten thousand is drawn there.
            "y": [max(100 * score.violations, 0.01) for score in scores if score.policy == name],
            "hovertemplate": f"{name}<br>%{{x:.2f}} GPU-hours<br>%{{y:.2f}} % missed<extra></extra>",
        }
        for name, colour in colours.items()
    ]
    for seed, limit in enumerate(limits):
        if limit is None:
            continue
        points = sorted((each.gpu_hours, max(100 * each.violations, 0.01)) for each in limit.scores)
        front: list[tuple[float, float]] = []
        for hours, missed in points:
            if not front or missed < front[-1][1]:
                front.append((hours, missed))
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "clairvoyant" if len(limits) == 1 else f"clairvoyant, seed {seed}",
                "line": {"dash": "dot", "width": 1.5, "color": "#8a8880"},
                "x": [hours for hours, _ in front],
                "y": [missed for _, missed in front],
                "hoverinfo": "skip",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "GPU-hours"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "requests that missed an objective, %"}, "type": "log"},
        "legend": {"orientation": "h", "y": -0.22},
    }
    return Figure(traces, layout, "GPU-hours against violations, one point per run")


def _tier(results: Sequence[RunResult], index: int) -> list[Text | Table | Figure]:
    first = [result for result in results if result.seed == results[0].seed]
    colours = _colours([result.policy for result in first])
    parts: list[Text | Table | Figure] = []
    for place, pool in enumerate(first[0].tiers[index].pools):
        traces: list[dict[str, Any]] = []
        for result in first:
            history = result.tiers[index].pools[place]
            line = {"color": colours[result.policy], "shape": "hv", "width": 2}
            traces.append(_line(result.policy, history.time.tolist(), history.ready.tolist(), line))
        layout = {
            "xaxis": {"title": {"text": "minutes"}},
            "yaxis": {"title": {"text": f"ready replicas, {pool.name}"}, "rangemode": "tozero"},
            "legend": {"orientation": "h", "y": -0.22},
        }
        parts.append(Figure(traces, layout, f"Ready replicas of pool {pool.name} over time, by policy"))
    parts.append(_attainment(first, index, colours))
    return parts


def _line(
    name: str, seconds: Sequence[float], values: Sequence[float | None], line: dict[str, Any]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "line": line,
        "x": [round(each / 60, 3) for each in seconds],
        "y": list(values),
    }


def _attainment(results: Sequence[RunResult], index: int, colours: dict[str, str]) -> Figure:
    from servingtiers.simulate.scoring import missed

    traces = []
    for result in results:
        outcome: TierOutcome = result.tiers[index]
        bad = missed(outcome)
        starts = [60.0 * minute for minute in range(math.ceil(result.seconds / 60))]
        values: list[float | None] = []
        for start in starts:
            window = bad[(outcome.arrival >= start) & (outcome.arrival < start + 60)]
            values.append(None if not len(window) else round(100 - 100 * float(window.mean()), 3))
        traces.append(_line(result.policy, starts, values, {"color": colours[result.policy], "width": 1.5}))
    layout = {
        "xaxis": {"title": {"text": "minutes"}},
        "yaxis": {
            "title": {"text": "requests that kept every objective, %, per minute"},
            "rangemode": "tozero",
        },
        "legend": {"orientation": "h", "y": -0.22},
    }
    return Figure(traces, layout, "Joint attainment per minute of arrival, by policy")
