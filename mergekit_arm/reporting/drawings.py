"""Figures, as plotly's data and layout: plain dictionaries, made without plotly.

What comes from outside, a name of a model, a weight or a set, passes through :func:`label`: plotly
reads some HTML in its texts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit_arm.reporting.spread import Spread

# Okabe and Ito's colours, which people with any colour vision tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY = "#888888"
_COLOURS = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", GREY, "#B8A800")
_DASHES = ("solid", "dash", "dot", "dashdot")
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_ROW, _AROUND = 24, 130
"""Pixels: of a row of a heat map or of boxes, and of all around them."""


@dataclass(frozen=True)
class Drawing:
    """One figure."""

    name: str
    """Of letters and dashes: its place in the page, and the name of its PNG."""
    title: str
    caption: str
    """What is drawn and how to read it; no markup."""
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int
    """In pixels."""


@dataclass(frozen=True)
class Curve:
    """One line, or a set of points, of a figure."""

    label: str
    points: Sequence[tuple[float | str, float]]
    """x, a number or a word, and y."""
    colour: str | None = None
    """None: the next that is free."""
    dash: str = "solid"
    mode: str = "lines+markers"
    symbol: str = "circle"
    size: int = 6
    shape: str = "linear"
    """``hv`` for steps."""
    texts: Sequence[str] = field(default=())
    """What each point says under the pointer, in plain text."""


def label(text: object) -> str:
    """Return ``text`` such that plotly shows it letter by letter."""
    return html.escape(str(text), quote=False)


def heat_map(
    name: str,
    title: str,
    caption: str,
    cells: Mapping[tuple[str, int], float],
    unit: str,
    *,
    logarithmic: bool = False,
) -> Drawing:
    """Draw values by kind (rows) and layer (columns).

    ``logarithmic`` colours by the logarithm where all values are positive.
    """
    rows = list(dict.fromkeys(kind for kind, _ in cells))
    columns = sorted({layer for _, layer in cells})
    values = [[cells.get((row, column)) for column in columns] for row in rows]
    logarithmic = logarithmic and min(cells.values(), default=0.0) > 0
    colours = [
        [None if v is None else _short(math.log10(v) if logarithmic else v) for v in row]
        for row in values
    ]
    bar: dict[str, Any] = {
        "orientation": "h", "y": 1.02, "yanchor": "bottom", "thickness": 10, "len": 1,
        "title": {"text": label(unit), "side": "top"}, "tickangle": 0,
    }  # fmt: skip
    if logarithmic:
        bar |= _decades(list(cells.values()))
    data = {
        "type": "heatmap",
        "x": columns,
        "y": [label(row) for row in rows],
        "z": colours,
        "text": [["" if v is None else f"{v:.4g}" for v in row] for row in values],
        "hovertemplate": "%{y}, layer %{x}: %{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": "Viridis",
        "colorbar": bar,
        "xgap": 1,
        "ygap": 1,
    }
    layout = _layout("layer", "")
    layout["xaxis"] |= {"showgrid": False, "zeroline": False}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    if len(columns) < 10:
        layout["xaxis"]["dtick"] = 1
    return Drawing(name, title, caption, [data], layout, _AROUND + _ROW * len(rows))


def curves(
    name: str,
    title: str,
    caption: str,
    lines: Sequence[Curve],
    x: str,
    y: str,
    *,
    whole: bool = True,
    from_zero: bool = False,
) -> Drawing:
    """Draw lines over a common axis; ``whole`` where x counts."""
    free = iter((colour, dash) for dash in _DASHES for colour in _COLOURS)  # more than a figure has
    data = []
    for line in lines:
        colour, dash = (line.colour, line.dash) if line.colour else next(free, (GREY, "solid"))
        data.append(
            {
                "type": "scatter",
                "name": label(line.label),
                "x": [label(at) if isinstance(at, str) else _short(at) for at, _ in line.points],
                "y": [_short(value) for _, value in line.points],
                "mode": line.mode,
                "line": {"color": colour, "dash": dash, "width": 2, "shape": line.shape},
                "marker": {"color": colour, "symbol": line.symbol, "size": line.size},
                "text": [label(text) for text in line.texts] or None,
                "hovertemplate": (
                    "%{text}<extra></extra>" if line.texts else f"{label(x)} %{{x}}: %{{y}}"
                ),
            }
        )
    layout = _layout(x, y)
    spans = {at for line in lines for at, _ in line.points if not isinstance(at, str)}
    if whole and spans and max(spans) - min(spans) < 10:
        layout["xaxis"]["dtick"] = 1
    if from_zero:
        layout["yaxis"]["rangemode"] = "tozero"
    layout["showlegend"] = len(data) > 1
    return Drawing(name, title, caption, data, layout, 340)


def histogram(name: str, title: str, caption: str, spread: Spread, x: str) -> Drawing:
    """Draw how values in [0, 1] are distributed, their shares on a logarithmic axis."""
    bins = 50
    shares = spread.shares(bins)
    data = {
        "type": "bar",
        "x": [_short((i + 0.5) / bins) for i in range(bins)],
        "y": [_short(share) if share else None for share in shares],
        "marker": {"color": BLUE},
        "hovertemplate": "%{x}: %{y:.3%}<extra></extra>",
    }
    layout = _layout(x, "share of the channels")
    layout["xaxis"] |= {"range": [_tenth(spread.least), 1.005]}
    layout["yaxis"] |= {"type": "log", "tickformat": "~p", "dtick": 1}
    layout |= {"bargap": 0.05, "showlegend": False}
    return Drawing(name, title, caption, [data], layout, 300)


def boxes(name: str, title: str, caption: str, spreads: Mapping[str, Spread], x: str) -> Drawing:
    """Draw a box for every kind: quartiles, and the 1st and 99th hundredth."""
    found = {kind: one for kind, one in spreads.items() if one.total}

    def each(share: float) -> list[float]:
        return [one.quantile(share) for one in found.values()]

    data = {
        "type": "box",
        "orientation": "h",
        "y": [label(kind) for kind in found],
        "lowerfence": each(0.01),
        "q1": each(0.25),
        "median": each(0.5),
        "q3": each(0.75),
        "upperfence": each(0.99),
        "line": {"color": BLUE, "width": 1.5},
        "fillcolor": "#56B4E9",
    }
    layout = _layout(x, "")
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False}
    layout["xaxis"] |= {"range": [_tenth(min(each(0.01), default=0.0)), 1.005]}
    layout["showlegend"] = False
    return Drawing(name, title, caption, [data], layout, 80 + _ROW * len(found))


def panels(name: str, title: str, caption: str, each: Mapping[str, Curve], y: str) -> Drawing:
    """Draw point clouds one below the other, each with an x-axis of its own and a common y."""
    count, gap = len(each), 0.35
    data, layout = [], _layout("", y)
    height = 1 / (count + gap * (count - 1))
    for number, (x, curve) in enumerate(each.items()):
        end = "" if number == 0 else str(number + 1)
        top = 1 - number * height * (1 + gap)
        one = curves("", "", "", [curve], x, y, whole=False)
        axes = _layout(x, y)
        layout[f"xaxis{end}"] = axes["xaxis"] | {"anchor": f"y{end}"}
        layout[f"yaxis{end}"] = axes["yaxis"] | {
            "anchor": f"x{end}",
            "domain": [max(top - height, 0), top],
        }
        data.append(one.data[0] | {"xaxis": f"x{end}", "yaxis": f"y{end}"})
        if curve.points and any(isinstance(at, str) for at, _ in curve.points):
            layout[f"xaxis{end}"]["type"] = "category"
    layout["showlegend"] = False
    return Drawing(name, title, caption, data, layout, 40 + 230 * count)


def _layout(x: str, y: str) -> dict[str, Any]:
    axis = {"automargin": True, "gridcolor": "#dddddd", "zerolinecolor": "#bbbbbb"}
    return {
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "font": {"family": _FONT, "size": 12, "color": "#222222"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "dragmode": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {**axis, "title": {"text": label(x)}},
        "yaxis": {**axis, "title": {"text": label(y)}},
    }


def _decades(values: Sequence[float]) -> dict[str, Any]:
    """Return ticks of a colour bar that runs over logarithms: 1, 2 and 5 of every decade."""
    low, high = min(values), max(values)
    ticks = [
        step * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for step in (1, 2, 5)
    ]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) > 6:
        ticks = [tick for tick in ticks if math.log10(tick) == round(math.log10(tick))]
    if len(ticks) < 2:
        ticks = [low, high]
    return {
        "tickvals": [math.log10(tick) for tick in ticks],
        "ticktext": [f"{tick:.3g}" for tick in ticks],
    }


def _tenth(value: float) -> float:
    """Return the tenth below a value, with some room before it."""
    return max(0.0, math.floor(10 * value - 0.2) / 10)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
