"""The page: HTML with everything in it. Nothing is loaded, and its own policy forbids it to.

The policy names the scripts by their hashes, so that no other script runs, whatever a card or a
model's name holds. Colours follow the reader's setting by CSS alone: figures are drawn in dark on
white, which their PNG keeps, and the page recolours what it shows.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from mergekit_arm import __version__
from mergekit_arm.errors import InputError
from mergekit_arm.reporting.drawings import Drawing

_CONFIG = {"displayModeBar": False, "displaylogo": False, "responsive": True}
_SCRIPT = re.compile(r"<script[^>]*>(.*?)</script>", re.DOTALL)

_LONG = 45
"""Characters from which on a table's cell has several lines."""

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src {hashes}; \
style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
{head}
</head>
<body>
<main>
<h1>{title}</h1>
<noscript><p class="note">The figures are drawn by a script inside this page: allow it to run.\
</p></noscript>
{body}
<footer>Written by mergekit-arm {version} with plotly {plotly}. This page loads nothing.</footer>
</main>
{tail}
</body>
</html>
"""


@dataclass(frozen=True)
class Grid:
    """A table."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Page:
    """What a report says, in plain text: nothing here is markup."""

    title: str
    facts: Sequence[tuple[str, str]]
    drawings: Sequence[Drawing]
    notes: Sequence[str] = ()
    """What could not be drawn, and why."""
    tables: Sequence[Grid] = ()
    listings: Sequence[tuple[str, str]] = field(default=())
    """Headings, and texts that are shown as they are."""


def load_plotly() -> Any:
    """Return the package ``plotly``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import plotly  # an optional extra
        import plotly.io
        import plotly.offline
    except ImportError as error:
        raise InputError(
            'reports need the package plotly: pip install "mergekit-arm[report]"'
        ) from error
    return plotly


def render(page: Page) -> str:
    """Return the page's HTML: the same page, the same text.

    Raises:
        InputError: plotly is not installed.
    """
    plotly = load_plotly()
    head = f"<script>{plotly.offline.get_plotlyjs()}</script>" if page.drawings else ""
    tail = f"<script>{_text('page.js')}</script>" if page.drawings else ""
    body = "\n".join(
        [
            *_facts(page.facts),
            *(f'<p class="note">{_escaped(note)}</p>' for note in page.notes),
            *(_figure(plotly, drawing) for drawing in page.drawings),
            *(_table(table) for table in page.tables),
            *(f"<h2>{_escaped(t)}</h2>\n<pre>{_escaped(x)}</pre>" for t, x in page.listings),
        ]
    )
    scripts = [one for part in (head, body, tail) for one in _SCRIPT.findall(part)]
    return _TEMPLATE.format(
        hashes=" ".join(f"'sha256-{_hash(one)}'" for one in scripts) or "'none'",
        title=_escaped(page.title),
        style=_text("page.css"),
        head=head,
        body=body,
        tail=tail,
        version=__version__,
        plotly=plotly.__version__,
    )


def _figure(plotly: Any, drawing: Drawing) -> str:
    drawn = plotly.io.to_html(
        {"data": drawing.data, "layout": drawing.layout},
        config=_CONFIG,
        include_plotlyjs=False,
        full_html=False,
        default_height=f"{drawing.height}px",
        div_id=drawing.name,
    )
    return (
        f"<figure>\n<h2>{_escaped(drawing.title)}</h2>\n{drawn}\n"
        f"<figcaption>{_escaped(drawing.caption)}</figcaption>\n"
        f'<button type="button" data-figure="{drawing.name}" data-height="{drawing.height}">'
        "Save as PNG</button>\n</figure>"
    )


def _facts(facts: Sequence[tuple[str, str]]) -> list[str]:
    rows = [f"<dt>{_escaped(name)}</dt><dd>{_escaped(value)}</dd>" for name, value in facts]
    return ["<dl>", *rows, "</dl>"]


def _table(table: Grid) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        shown = (f"<{tag}{_class(cell)}>{_escaped(cell)}</{tag}>" for cell in cells)
        return f"<tr>{''.join(shown)}</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    return (
        f'<h2>{_escaped(table.title)}</h2>\n<div class="wide"><table>\n<thead>'
        f"{row(table.header, 'th')}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _class(cell: str) -> str:
    return ' class="long"' if len(cell) > _LONG else ""


def _escaped(text: str) -> str:
    return html.escape(str(text))


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _text(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
