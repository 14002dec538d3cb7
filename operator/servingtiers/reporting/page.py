"""One self-contained HTML page: text, tables and Plotly figures, light and dark.

Plotly's script is in the page, so that it opens from a file, an artefact store or an e-mail without a network. The
colours follow ``prefers-color-scheme``, also when it changes while the page is open.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PALETTE", "Figure", "Page", "Table", "Text"]

PALETTE = ("#3987e5", "#d95926", "#199e70", "#c98500", "#9085e9", "#d55181", "#008300", "#e66767")
"""Series colours in the order they are used: told apart by colour-blind readers, and legible on light and dark."""

_STYLE = """
:root { color-scheme: light dark; --page: #f9f9f7; --card: #ffffff; --ink: #16160f; --soft: #5f5e58; --line: #e1e0d9;
  --good: #0a7a3c; --bad: #b3261e; --accent: #2a78d6; }
@media (prefers-color-scheme: dark) { :root { --page: #10100e; --card: #1a1a18; --ink: #f4f3ee; --soft: #a8a69e;
  --line: #33322e; --good: #4cc38a; --bad: #ff8a80; --accent: #6da7ec; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 17px; margin: 36px 0 4px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 82ch; }
p.verdict { color: var(--ink); font-size: 17px; border-left: 4px solid var(--accent); padding: 6px 14px; margin: 16px 0;
  background: var(--card); }
p.verdict.good { border-color: var(--good); } p.verdict.bad { border-color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; margin: 10px 0 18px;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } tr:last-child td { border-bottom: 0; }
th.text, td.text { text-align: left; white-space: normal; } td.text:first-child { min-width: 190px; }
footer { color: var(--soft); font-size: 13px; margin-top: 40px; }
"""

_SCRIPT = """
const dark = matchMedia('(prefers-color-scheme: dark)');
function colours() {
  const of = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return { ink: of('--ink'), soft: of('--soft'), line: of('--line'), card: of('--card') };
}
function themed(layout) {
  const c = colours();
  const axes = Object.fromEntries(Object.keys(layout).filter(k => /^[xy]axis[0-9]*$/.test(k)).map(k => [k,
    { ...layout[k], gridcolor: c.line, linecolor: c.line, zerolinecolor: c.line, tickcolor: c.line }]));
  return { ...layout, ...axes, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { family: 'system-ui, sans-serif', size: 13, color: c.ink },
    hoverlabel: { bgcolor: c.card, bordercolor: c.line, font: { color: c.ink } } };
}
const drawn = [];
function figure(id, data, layout) {
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  Plotly.newPlot(id, data, themed(layout), options);
  drawn.push([id, layout]);
}
dark.addEventListener('change', () => drawn.forEach(([id, layout]) => Plotly.relayout(id, themed(layout))));
"""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; ``kind`` is empty, ``good`` or ``bad`` for a verdict, or ``plain``."""

    text: str
    kind: str = "plain"

    def html(self, _: int) -> str:
        """Return the paragraph."""
        style = "" if self.kind == "plain" else f' class="verdict {self.kind}"'
        return f"<p{style}>{html.escape(self.text)}</p>"


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the columns named in ``text`` are aligned left."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: frozenset[str] = frozenset()

    def html(self, _: int) -> str:
        """Return the table."""

        def cell(tag: str, column: str, value: str) -> str:
            style = ' class="text"' if column in self.text else ""
            return f"<{tag}{style}>{html.escape(value)}</{tag}>"

        head = "".join(cell("th", column, column) for column in self.columns)
        body = "".join(
            "<tr>" + "".join(cell("td", c, v) for c, v in zip(self.columns, row, strict=True)) + "</tr>"
            for row in self.rows
        )
        return f'<div class="card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@dataclass(frozen=True, slots=True)
class Figure:
    """A Plotly figure given as data: traces and a layout without colours of the page."""

    traces: Sequence[dict[str, Any]]
    layout: dict[str, Any]
    label: str
    """What the figure shows, for readers who cannot see it."""

    def html(self, number: int) -> str:
        """Return the place of the figure and the script that draws it."""
        height = int(self.layout.get("height", 430))
        layout = {"margin": {"l": 64, "r": 20, "t": 14, "b": 56}, "hovermode": "closest", **self.layout}
        return (
            f'<div class="card"><div id="figure{number}" role="img" aria-label="{html.escape(self.label)}" '
            f'style="height:{height}px"></div></div>'
            f"<script>figure('figure{number}', {_json(list(self.traces))}, {_json(layout)});</script>"
        )


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, nor begin another."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


@dataclass(frozen=True, slots=True)
class Page:
    """A page of sections, each with a heading (empty: none) and its parts."""

    title: str
    summary: str
    sections: Sequence[tuple[str, Sequence[Text | Table | Figure]]]
    footer: str = ""

    def html(self) -> str:
        """Return the whole document. Needs Plotly, of the ``reports`` extra."""
        from plotly.offline import get_plotlyjs

        number = 0
        parts: list[str] = []
        for heading, members in self.sections:
            parts.append(f"<h2>{html.escape(heading)}</h2>" if heading else "")
            for member in members:
                number += 1
                parts.append(member.html(number))
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style>"
            f"<script>{get_plotlyjs()}</script><script>{_SCRIPT}</script></head><body><main>"
            f"<h1>{html.escape(self.title)}</h1><p>{html.escape(self.summary)}</p>"
            + "\n".join(parts)
            + (f"<footer>{html.escape(self.footer)}</footer>" if self.footer else "")
            + "</main></body></html>\n"
        )
