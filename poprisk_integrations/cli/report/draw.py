"""Charts as pictures: all of them in a PNG, and each as SVG in the colours of the page."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from poprisk_integrations.cli.report.charts import Chart, Line
from poprisk_integrations.cli.report.run import short

__all__ = ["DARK", "LIGHT", "draw_charts", "drawing", "panel_svg", "svg_of", "thinned"]

# Text and lines have a contrast of at least 4.5:1 to both backgrounds of their theme. Series go
# from blue to grey so that neighbours differ in brightness too.
LIGHT = {
    "page": "#f6f7f9", "card": "#ffffff", "ink": "#1b2127", "muted": "#535c66", "line": "#d4d9df",
    "link": "#0a58a6", "s0": "#0b60a8", "s1": "#b4400a", "s2": "#006f4e", "s3": "#7b35b8",
    "s4": "#7a5800", "s5": "#4c5661",
}  # fmt: skip
DARK = {
    "page": "#0f1317", "card": "#181d23", "ink": "#e6eaee", "muted": "#a7b1bb", "line": "#38414b",
    "link": "#7db8ff", "s0": "#6fb4ff", "s1": "#ff9a5a", "s2": "#45cfa0", "s3": "#c7a2ff",
    "s4": "#e2c05c", "s5": "#c4ccd4",
}  # fmt: skip
_SERIES = [LIGHT[f"s{index}"] for index in range(6)]
_INK, _MUTED = LIGHT["ink"], LIGHT["muted"]
_DASHES: Sequence[Any] = (
    "-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (8, 2, 2, 2)), (0, (3, 1, 1, 1)),
)  # fmt: skip
_MARKERS = "osD^vX"
_MARKS: dict[str, Any] = {
    "onset": (0, (1.2, 1.6)), "best window": "-", "cooldown": (0, (1.2, 3)), "stop": (0, (5, 2)),
    "predicted stop": (0, (6, 2, 1.2, 2)),
}  # fmt: skip
# Points of 1/72 inch, which are the units of the SVG: a phone shows it at about this size.
_WIDTH, _PLOT = 350.0, 150.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 18.0, 10.0, 34.0
_LEGEND_ROW, _TITLE, _FONT = 13.0, 20.0, 10.0
_OPTIONS: dict[Any, Any] = {
    "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "poprisk",
    "font.size": _FONT, "legend.fontsize": _FONT - 1, "legend.labelcolor": _INK,
    "legend.frameon": False, "legend.borderpad": 0.1, "legend.labelspacing": 0.25,
    "legend.handlelength": 2.6, "legend.columnspacing": 1.2,
    "axes.facecolor": "none", "axes.edgecolor": _MUTED, "axes.unicode_minus": False,
    "axes.labelcolor": _MUTED, "axes.labelsize": _FONT - 1, "axes.labelpad": 2,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": LIGHT["line"], "grid.linewidth": 0.6,
    "xtick.color": _MUTED, "xtick.labelsize": _FONT - 1,
    "xtick.major.size": 3, "xtick.major.pad": 2,
    "ytick.color": _MUTED, "ytick.labelsize": _FONT - 1,
    "ytick.major.size": 3, "ytick.major.pad": 2,
}  # fmt: skip
_ALL_MARKED = 60  # points of a line, up to which each has a marker
_FEW = 200  # points of a line, up to which it is thick
_LOG_FROM = 30.0  # ratio of the largest to the smallest value
_UNUSED = r"^.*?<svg[^>]*>|<metadata>.*?</metadata>|<style.*?</style>|(?<=<g) id=\"[^\"]*\"|\n *"
_GEOMETRY = r" (?:d|x|y|width|height|transform)=\"[^\"]*\""


@contextmanager
def drawing() -> Iterator[None]:
    """Text of files is text: no mathematics in it, and no complaint about rare characters."""
    with matplotlib.rc_context(_OPTIONS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def draw_charts(charts: Sequence[Chart], title: str, columns: int = 3) -> Figure:
    """Charts with their titles, row by row, as one picture."""
    columns = min(columns, len(charts))
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, 54 * columns)]
    rows = [charts[start : start + columns] for start in range(0, len(charts), columns)]
    heights = [max(map(_height, row)) + _TITLE for row in rows]
    top = 14 * len(lines) + 10
    width, height = _WIDTH * columns, sum(heights) + top
    figure = Figure(figsize=(width / 72, height / 72), dpi=110, facecolor=LIGHT["card"])
    FigureCanvasAgg(figure)
    x, y = 12 / width, 1 - 6 / height
    figure.suptitle("\n".join(lines), x=x, y=y, ha="left", va="top", color=_INK, size=_FONT)
    bottom = height - top
    for row, row_height in zip(rows, heights, strict=True):
        for place, chart in enumerate(row):
            x, y = (place * _WIDTH + 12) / width, (bottom - 13) / height
            figure.text(x, y, short(chart.of.title, 46), color=_INK, weight="bold")
            lift = bottom - _TITLE - _height(chart)  # legends of a row may differ in height
            _draw(_axes(figure, chart, place * _WIDTH, lift), chart)
        bottom -= row_height
    return figure


@drawing()
def svg_of(chart: Chart, name: str, description: str) -> str:
    """A chart as an element of the page, whose identifiers begin with `name`."""
    figure = Figure(figsize=(_WIDTH / 72, _height(chart) / 72))
    _draw(_axes(figure, chart, 0.0, 0.0), chart)
    return _svg(figure, name, chart.of.title, description)


@drawing()
def panel_svg(
    fill: Callable[[Axes], None],
    name: str,
    title: str,
    description: str,
    *,
    margins: tuple[float, float, float, float],
    height: float = _PLOT,
) -> str:
    """A plot that `fill` draws, as an element of the page.

    `margins` are left, right, top and bottom of the plot, which is `height` high: points.
    """
    left, right, top, bottom = margins
    whole = top + height + bottom
    figure = Figure(figsize=(_WIDTH / 72, whole / 72))
    width = (_WIDTH - left - right) / _WIDTH
    fill(figure.add_axes((left / _WIDTH, bottom / whole, width, height / whole)))
    return _svg(figure, name, title, description)


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """Text stays text in the page's font, and the colours become the page's variables."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(_UNUSED, "", file.getvalue(), flags=re.DOTALL).replace("xlink:href", "href")
    # Identifiers are unique within a picture only, and a page has many.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    # More digits than a tenth of a point would make the page larger and no finer.
    svg = re.sub(_GEOMETRY, lambda found: re.sub(r"\d+\.\d+", _rounded, found[0]), svg)
    for variable, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{variable})")
    width, height = (72 * inches for inches in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" tabindex="0" class="chart" '
        f'aria-labelledby="{name}-title" aria-describedby="{name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{svg}'
    )


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def thinned(curve: pd.Series, most: int = 800) -> pd.Series:
    """A curve of at most so many points that keep its look.

    The first and the last point stay, and of each of equally long pieces the lowest and the
    highest point and, where there is one, the first that is not finite: no peak and no gap is lost.

    Example:
        >>> curve = pd.Series([0.0] * 500 + [9.0] + [0.0] * 499)
        >>> kept = thinned(curve, most=20)
        >>> len(kept) <= 20, {0, 500, 999} <= {*kept.index}
        (True, True)
    """
    count = len(curve)
    if count <= most:
        return curve
    by_place = curve.reset_index(drop=True)
    is_finite = np.isfinite(by_place)
    num_pieces = (most - 2) // (2 if is_finite.all() else 3)
    starts = np.arange(num_pieces) * count // num_pieces
    piece = starts.searchsorted(by_place.index, side="right")
    good, bad = (by_place[kind].groupby(piece[kind]) for kind in (is_finite, ~is_finite))
    kept = {0, count - 1, *good.idxmin(), *good.idxmax(), *bad.head(1).index}
    return curve.iloc[sorted(kept)]


def _height(chart: Chart) -> float:
    entries = _entries(chart)
    rows = math.ceil(len(entries) / _columns(entries)) if entries else 0
    return _TOP + _LEGEND_ROW * rows + _PLOT + _BOTTOM


def _axes(figure: Figure, chart: Chart, left: float, bottom: float) -> Axes:
    """A plot whose box, legend included, has its corner at these points of the figure."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    plot_width = _WIDTH - _LEFT - _RIGHT
    box = (left + _LEFT) / width, (bottom + _BOTTOM) / height, plot_width / width, _PLOT / height
    axes = figure.add_axes(box)
    entries = _entries(chart)
    if entries:
        axes.legend(
            list(entries.values()),
            list(entries),
            loc="lower left",
            bbox_to_anchor=(-(_LEFT - 6) / plot_width, 1.0),
            ncols=_columns(entries),
        )
    return axes


def _columns(entries: Mapping[str, Any]) -> int:
    longest = max(map(len, entries))
    return 3 if longest <= 10 else 2 if longest <= 22 else 1


def _entries(chart: Chart) -> dict[str, Line2D]:
    """Label -> sample of the legend; none for a line that the title names.

    Of several runs: a colour for each, and a pattern for each quantity where there are several.
    """
    entries: dict[str, Line2D] = {}
    if chart.is_compared:
        for line in chart.lines:
            sample = Line2D([], [], **{**_look(chart, line), "ls": "-"})
            entries.setdefault(chart.runs[line.run].label, sample)
        whats = {line.style: line.what for line in reversed(chart.lines)}
        for style in sorted(whats) if len(whats) > 1 else ():
            dashes = _DASHES[style % len(_DASHES)]
            entries[whats[style]] = Line2D([], [], color=_INK, lw=1.5, ls=dashes)
    elif len(chart.lines) > 1:
        entries = {line.what: Line2D([], [], **_look(chart, line)) for line in chart.lines}
    for kind, step, _ in chart.marks:
        label = kind if chart.is_compared else f"{kind} ({step:.0f})"
        entries[label] = Line2D([], [], color=_INK, lw=1.1, ls=_MARKS[kind])
    if chart.level is not None:
        value, name = chart.level
        entries[f"{name} ({value:g})" if value else name] = Line2D([], [], color=_MUTED, lw=1.0)
    return entries


def _look(chart: Chart, line: Line) -> dict[str, Any]:
    place = line.run if chart.is_compared else line.style
    color, marker = _SERIES[place % len(_SERIES)], _MARKERS[place % len(_MARKERS)]
    dashes = _DASHES[line.style % len(_DASHES)]
    return {"color": color, "marker": marker, "ms": 3.2, "lw": 1.5, "ls": dashes}


def _draw(axes: Axes, chart: Chart) -> None:
    floor = pd.Series(0.0, index=chart.lines[0].curve.index)
    for line in chart.lines:
        curve = thinned(line.curve.where(line.curve.abs() < 1e300))
        look, low, high = _look(chart, line), line.low, line.high
        if chart.of.stacked:  # on the areas before
            low, high = floor, floor + line.curve
            curve, floor = high[curve.index], high
        if low is not None and high is not None:
            ends = low.reindex(curve.index), high.reindex(curve.index)
            how = {"color": look["color"], "step": "post" if chart.of.hold else None}
            axes.fill_between(curve.index, *ends, alpha=0.18, lw=0, **how)
        if len(curve) > _ALL_MARKED:
            look |= {"marker": "", "lw": 1.5 if len(curve) <= _FEW else 1.0}
        axes.plot(curve.index, curve, drawstyle="steps-post" if chart.of.hold else None, **look)
    for kind, step, run in chart.marks:
        color = _SERIES[run % len(_SERIES)] if chart.is_compared else _INK
        axes.axvline(step, color=color, lw=1.1, ls=_MARKS[kind])
    if chart.level is not None:
        axes.axhline(chart.level[0], color=_MUTED, lw=1.0)
    _scale(axes, chart)
    axes.set_xlabel("optimizer step")


def _scale(axes: Axes, chart: Chart) -> None:
    values = pd.concat([line.curve for line in chart.lines])
    values = values[values.abs() < 1e300]
    # The onset is where F crosses its threshold on a logarithmic axis, however little F changes.
    crosses = chart.level is not None and chart.level[0] > 0
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if chart.of.log and values.min() > 0 and (crosses or values.max() > _LOG_FROM * values.min()):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        between = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
        is_wide = high > 10 * low
        axes.yaxis.set_major_locator(LogLocator(subs=between) if is_wide else MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    bounds = chart.of.bounds
    if bounds is not None and values.between(*bounds).all():
        slack = 0.03 * (bounds[1] - bounds[0])
        axes.set_ylim(bounds[0] - slack, bounds[1] + slack)
    if chart.last_step > 0:
        axes.set_xlim(-0.01 * chart.last_step, 1.01 * chart.last_step)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # no offset, no mathematics
