"""Charts as matplotlib figures: one for the page, all of them for a PNG."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from poprisk_integrations.cli.report.chart import Chart, Line
from poprisk_integrations.cli.report.curve import thinned
from poprisk_integrations.cli.report.palette import LIGHT, SERIES
from poprisk_integrations.cli.report.plain_text import short

__all__ = ["draw_chart", "draw_overview", "drawing", "plain_log_ticks"]

# Points of 1/72 inch, which are the units of the SVG: a phone shows it at about this size.
_WIDTH, _PLOT = 350.0, 150.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 18.0, 10.0, 34.0
_ROW = 13.0  # of the legend
_TITLE = 20.0
_FONT = 10.0
_DASHES: Sequence[Any] = (
    "-",
    (0, (5, 2)),
    (0, (1.2, 1.6)),
    (0, (6, 2, 1.2, 2)),
    (0, (8, 2, 2, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
_MARKERS = "osD^vX"
_HATCHES = ("////", "....", "xxxx", "----")
_MARKS = {"onset": (0, (1.2, 1.6)), "stop": (0, (5, 2)), "predicted stop": (0, (6, 2, 1.2, 2))}
_ALL_MARKED = 60  # points of a line, up to which each has a marker
_FEW = 200  # points of a line, up to which it is thick beside others
_LOG_FROM = 30.0  # ratio of the largest to the smallest value


@contextmanager
def drawing() -> Iterator[None]:
    """Text of files is text: no mathematics in it, and no complaint about rare characters."""
    options: dict[Any, Any] = {
        "text.parse_math": False,
        "font.size": _FONT,
        "axes.unicode_minus": False,
        "path.simplify": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "poprisk",
    }
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def draw_chart(chart: Chart) -> Figure:
    """One chart without its title."""
    height = _height(chart)
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)
    _add(figure, chart, 0.0, 0.0, (_WIDTH, height))
    return figure


def draw_overview(charts: Sequence[Chart], title: str, columns: int = 3) -> Figure:
    """All charts with their titles, row by row."""
    rows = [charts[start : start + columns] for start in range(0, len(charts), columns)]
    heights = [max(map(_height, row)) + _TITLE for row in rows]
    size = (_WIDTH * min(columns, len(charts)), sum(heights) + 1.5 * _TITLE)
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=110, facecolor=LIGHT["card"])
    FigureCanvasAgg(figure)
    figure.text(12 / size[0], 1 - 18 / size[1], title, color=LIGHT["ink"], size=12, weight="bold")
    bottom = size[1] - 1.5 * _TITLE
    for row, height in zip(rows, heights, strict=True):
        bottom -= height
        for place, chart in enumerate(row):
            lift = height - _TITLE - _height(chart)  # legends of a row may differ in height
            left = place * _WIDTH
            _add(figure, chart, left, bottom + lift, size)
            figure.text(
                (left + 12) / size[0],
                (bottom + height - 13) / size[1],
                short(chart.title, 46),
                color=LIGHT["ink"],
                weight="bold",
            )
    return figure


def _height(chart: Chart) -> float:
    return _TOP + _ROW * _legend(chart)[1] + _PLOT + _BOTTOM


def _legend(chart: Chart) -> tuple[int, int]:
    """Columns and rows."""
    labels = [label for label, _ in _entries(chart)]
    if not labels:
        return 1, 0
    longest = max(map(len, labels))
    columns = 3 if longest <= 10 else 2 if longest <= 22 else 1
    return columns, math.ceil(len(labels) / columns)


def _add(
    figure: Figure, chart: Chart, left: float, bottom: float, size: tuple[float, float]
) -> None:
    """Draw into a rectangle whose corner and whose figure's size are in points."""
    width, height = size
    box = (
        (left + _LEFT) / width,
        (bottom + _BOTTOM) / height,
        (_WIDTH - _LEFT - _RIGHT) / width,
        _PLOT / height,
    )
    axes = figure.add_axes(box, facecolor="none")
    _draw_stacked(axes, chart) if chart.stacked else _draw_lines(axes, chart)
    for mark in chart.marks:
        color = _run_color(chart, mark.run)
        axes.axvline(mark.step, color=color, lw=1.1, ls=_MARKS[mark.kind])
    if chart.level is not None:
        axes.axhline(chart.level[0], color=LIGHT["muted"], lw=1.0)
    _scale(axes, chart)
    entries = _entries(chart)
    if entries:
        axes.legend(
            [handle for _, handle in entries],
            [label for label, _ in entries],
            loc="lower left",
            bbox_to_anchor=(-(_LEFT - 6) / (_WIDTH - _LEFT - _RIGHT), 1.0),
            ncols=_legend(chart)[0],
            frameon=False,
            fontsize=_FONT - 1,
            labelcolor=LIGHT["ink"],
            handlelength=2.6,
            borderpad=0.1,
            borderaxespad=0.5,
            labelspacing=0.25,
            columnspacing=1.2,
        )


def _draw_lines(axes: Axes, chart: Chart) -> None:
    for line in chart.lines:
        kept = thinned(line.curve)
        steps = [line.curve.steps[i] for i in kept]
        values = [_drawable(line.curve.values[i]) for i in kept]
        color, marker = _look(chart, line)
        if line.low is not None and line.high is not None:
            axes.fill_between(
                steps,
                [line.low[i] for i in kept],
                [line.high[i] for i in kept],
                color=color,
                alpha=0.18,
                lw=0,
                step="post" if line.steps_hold else None,
            )
        is_alone = len(chart.lines) == 1
        every = 1 if len(kept) <= _ALL_MARKED else max(1, len(kept) // 8)
        axes.plot(
            steps,
            values,
            color=color,
            lw=1.5 if is_alone or len(kept) <= _FEW else 1.0,
            ls=_DASHES[line.style % len(_DASHES)],
            marker="" if is_alone and every > 1 else marker,
            ms=3.2,
            markevery=(line.style * every // 4, every) if every > 1 else None,
            drawstyle="steps-post" if line.steps_hold else "default",
        )


def _draw_stacked(axes: Axes, chart: Chart) -> None:
    floor: list[float] | None = None
    kept = sorted({i for line in chart.lines for i in thinned(line.curve, 400)})
    for line in chart.lines:
        steps = [line.curve.steps[i] for i in kept]
        values = [line.curve.values[i] for i in kept]
        base = floor if floor is not None else [0.0] * len(values)
        floor = [a + b for a, b in zip(base, values, strict=True)]
        color = SERIES[line.style % len(SERIES)]
        hatch = _HATCHES[line.style % len(_HATCHES)]
        axes.fill_between(steps, base, floor, facecolor="none", edgecolor=color, hatch=hatch, lw=0)
        axes.plot(steps, floor, color=color, lw=1.5, ls=_DASHES[line.style % len(_DASHES)])


def _drawable(value: float) -> float:
    return value if math.isfinite(value) and abs(value) < 1e300 else math.nan


def _look(chart: Chart, line: Line) -> tuple[str, str]:
    index = line.run if chart.num_runs > 1 else line.style
    return SERIES[index % len(SERIES)], _MARKERS[index % len(_MARKERS)]


def _run_color(chart: Chart, run: int) -> str:
    return SERIES[run % len(SERIES)] if chart.num_runs > 1 else LIGHT["ink"]


def _entries(chart: Chart) -> list[tuple[str, Any]]:
    """Label and sample of the legend's entries; none for a line that the title names."""
    entries: list[tuple[str, Any]] = []
    if chart.stacked:
        for line in chart.lines:
            color, hatch = SERIES[line.style % len(SERIES)], _HATCHES[line.style % len(_HATCHES)]
            sample = Patch(facecolor="none", edgecolor=color, hatch=hatch, lw=1.0)
            entries.append((line.label, sample))
    elif chart.num_runs > 1:
        entries += _entries_of_runs(chart)
    elif len(chart.lines) > 1:
        entries += [(line.label, _sample(*_look(chart, line), line.style)) for line in chart.lines]
    kinds = dict.fromkeys(mark.kind for mark in chart.marks)
    for kind in kinds:
        at = [mark.step for mark in chart.marks if mark.kind == kind]
        label = f"{kind} ({at[0]:.0f})" if chart.num_runs == 1 else kind
        entries.append((label, Line2D([], [], color=LIGHT["ink"], ls=_MARKS[kind], lw=1.1)))
    if chart.level is not None:
        label = f"{chart.level[1]} ({chart.level[0]:g})" if chart.level[0] else chart.level[1]
        entries.append((label, Line2D([], [], color=LIGHT["muted"], lw=1.0)))
    return entries


def _entries_of_runs(chart: Chart) -> list[tuple[str, Any]]:
    """A colour for each run; and a pattern for each quantity, where there are several."""
    runs = {line.run: line for line in reversed(chart.lines)}
    kinds = {line.style: line for line in reversed(chart.lines)}
    entries = [(runs[r].run_name, _sample(*_look(chart, runs[r]), 0)) for r in sorted(runs)]
    if len(kinds) > 1:
        entries += [(kinds[k].what, _sample(LIGHT["ink"], "", k)) for k in sorted(kinds)]
    return entries


def _sample(color: str, marker: str, style: int) -> Line2D:
    dashes = _DASHES[style % len(_DASHES)]
    return Line2D([], [], color=color, ls=dashes, marker=marker, ms=3.2, lw=1.5)


def _scale(axes: Axes, chart: Chart) -> None:
    values = [_drawable(v) for line in chart.lines for v in line.curve.values]
    values = [v for v in values if not math.isnan(v)]
    is_log = chart.log and bool(values) and min(values) > 0
    # The onset is where F crosses its threshold on a logarithmic axis, however little F changes.
    crosses = chart.level is not None and chart.level[0] > 0
    is_log = is_log and (crosses or max(values) / min(values) > _LOG_FROM)
    if is_log:
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    if chart.bounds is not None and all(chart.bounds[0] <= v <= chart.bounds[1] for v in values):
        slack = 0.03 * (chart.bounds[1] - chart.bounds[0])
        axes.set_ylim(chart.bounds[0] - slack, chart.bounds[1] + slack)
    if chart.last_step > 0:
        axes.set_xlim(-0.01 * chart.last_step, 1.01 * chart.last_step)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_Distinct())
    axes.set_xlabel("optimizer step", color=LIGHT["muted"], fontsize=_FONT - 1, labelpad=2)
    axes.tick_params(colors=LIGHT["muted"], labelsize=_FONT - 1, length=3, pad=2)
    axes.grid(color=LIGHT["line"], lw=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LIGHT["muted"])


def plain_log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis as plain numbers, not as TeX, which `drawing` does not read.

    At powers of ten; over less than two decades also at 2 and 5 times these.
    """
    low, high = axis.get_view_interval()
    steps = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=6 if len(steps) == 1 else 12))
    axis.set_major_formatter(_Distinct())
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


class _Distinct(Formatter):
    """As few digits as tell the ticks apart, and never an offset."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        return _tick(value, 4)

    def format_ticks(self, values: list[float]) -> list[str]:
        """All labels of an axis."""
        for digits in range(3, 10):
            labels = [_tick(value, digits) for value in values]
            if len(set(labels)) == len(set(values)):
                break
        return labels


def _tick(value: float, digits: int) -> str:
    if value and 1e5 <= abs(value) < 1e15 and float(value).is_integer():
        for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.{digits}g}{unit}"
    text = (
        f"{value:.{max(digits, 5) if abs(value) < 1e5 and float(value).is_integer() else digits}g}"
    )
    mantissa, mark, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if mark else text
