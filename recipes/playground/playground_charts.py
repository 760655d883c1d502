"""The charts: their numbers for a setting, and the picture of one setting.

`playground.js` draws the other settings into the same picture by the same arithmetic; a browser
test compares the two.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any
from xml.etree.ElementTree import Element

from playground_kinds import ARMS, CHARTS, MARKS, ChartKind
from playground_table import Run, cell_of

from poprisk_integrations.cli.report.html_tree import details, table, tag

__all__ = ["figure", "geometry", "key", "numbers", "rates_figure", "sample"]

WIDTH, PLOT = 350, 150
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 8, 34
TABLE_EPOCHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60)

Numbers = list[list[int]]  # mean, and how far the lowest and the highest seed lie from it


def numbers(runs: Sequence[Run], noise: int) -> dict[str, Any]:
    """An arm in a setting: by chart means, distances to lowest and highest; the stop's marks."""
    found: dict[str, Any] = {}
    for chart in CHARTS:
        columns = list(zip(*(chart.of(run) for run in runs), strict=True))
        means = [_rounded(fmean(column)) for column in columns]
        found[chart.id] = [
            means,
            [m - _rounded(min(c)) for m, c in zip(means, columns, strict=True)],
            [_rounded(max(c)) - m for m, c in zip(means, columns, strict=True)],
        ]
    epoch = cell_of(runs, noise).middle_stop
    shares = [_rounded(fmean(run.at_stop(name) for run in runs)) for name in MARKS]
    found["stop"] = None if epoch is None else [epoch, *shares]
    return found


def figure(chart: ChartKind, arms: Sequence[Mapping[str, Any]], epochs: int) -> Element:
    """The chart of one setting, with its numbers as a table."""
    x_of, y_of = _scales(chart, epochs)
    frame = _frame(
        chart.id,
        chart.title,
        _description(chart, arms),
        [(x_of(e), str(e)) for e in _epoch_ticks(epochs)],
        [(y_of(v), _tick(chart, v)) for v in chart.ticks],
        "epoch (the first ones stretched)",
    )
    if chart.id == "signal":
        y = _number(y_of(100))
        frame.append(tag("line", class_="one", x1=str(LEFT), x2=str(WIDTH - RIGHT), y1=y, y2=y))
    inside = tag("g", clip_path=f"url(#{chart.id}-clip)")
    for place, values in enumerate(arms):
        points, band = _paths(chart, values[chart.id], x_of, y_of)
        inside.append(tag("path", class_=f"band a{place}", id=f"{chart.id}-b{place}", d=band))
        inside.append(tag("path", class_=f"line a{place}", id=f"{chart.id}-l{place}", d=points))
    frame.append(inside)
    if chart.mark:
        for place, values in reversed(list(enumerate(arms))):  # AdamW on top
            frame.append(_mark(chart, place, values["stop"], x_of, y_of))
    rows = [
        [str(e), *(_cell(chart, values[chart.id], e - chart.first) for values in arms)]
        for e in table_epochs(epochs)
        if e >= chart.first
    ]
    numbers_of = table(
        f"{chart.title}: mean (lowest to highest seed)", ["epoch", *(a.name for a in ARMS)], rows
    )
    body = numbers_of.find(".//tbody")
    assert body is not None
    body.set("id", f"{chart.id}-rows")
    note = chart.note + (" Marks: where the stop says stop." if chart.mark else "")
    return tag(
        "figure",
        tag("h3", chart.title),
        key(),
        frame,
        tag("figcaption", note),
        details("Numbers", numbers_of),
    )


def rates_figure(lasts: Sequence[Sequence[int]], lrs: Sequence[float], chosen: int) -> Element:
    """Accuracy at the last epoch against the learning rate.

    Args:
        lasts: By arm, by learning rate, thousandths.
        lrs: Learning rates.
        chosen: Index of the one that the other charts show.
    """
    chart = CHARTS[0]
    _, y_of = _scales(chart, 1)
    places = rate_places(len(lrs))
    frame = _frame(
        "rates",
        "Accuracy at the last epoch, by learning rate",
        "The numbers are in the table of results of each learning rate.",
        [(x, f"{lr:g}") for x, lr in zip(places, lrs, strict=True)],
        [(y_of(v), _tick(chart, v)) for v in chart.ticks],
        "learning rate",
    )
    x = _number(places[chosen] - 22)
    frame.append(
        tag("rect", id="rates-here", class_="here", x=x, y=str(TOP), width="44", height=str(PLOT))
    )
    inside = tag("g", clip_path="url(#rates-clip)")
    for place, values in enumerate(lasts):
        pairs = [(x, y_of(v)) for x, v in zip(places, values, strict=True)]
        inside.append(
            tag("path", class_=f"line a{place}", id=f"rates-l{place}", d="M" + _joined(pairs))
        )
        for index, (x_at, y_at) in enumerate(pairs):
            inside.append(
                tag(
                    "path",
                    class_=f"mark a{place}",
                    id=f"rates-m{place}-{index}",
                    d=ARMS[place].mark,
                    transform=f"translate({_number(x_at)},{_number(y_at)})",
                )
            )
    frame.append(inside)
    rows = [
        [f"{lr:g}", *(f"{values[index] / 10:.1f} %" for values in lasts)]
        for index, lr in enumerate(lrs)
    ]
    numbers_of = table(
        "Accuracy at the last epoch, mean over seeds",
        ["learning rate", *(a.name for a in ARMS)],
        rows,
    )
    body = numbers_of.find(".//tbody")
    assert body is not None
    body.set("id", "rates-rows")
    return tag(
        "figure",
        tag("h3", "Right answers at the last epoch, by learning rate"),
        key(),
        frame,
        tag("figcaption", "Held-out images, as above. The grey band is the chosen rate."),
        details("Numbers", numbers_of),
    )


def key() -> Element:
    """Which line is which; the descriptions say it in words."""
    items = [tag("span", sample(place), arm.name) for place, arm in enumerate(ARMS)]
    return tag("p", *items, class_="key", aria_hidden="true")


def sample(place: int) -> Element:
    """A short piece of an arm's line with its mark."""
    return tag(
        "svg",
        tag("path", class_=f"line s{place}", d="M0,7H34"),
        tag("path", class_=f"mark s{place}", d=ARMS[place].mark, transform="translate(17,7)"),
        viewBox="0 0 34 14",
        class_="sample",
        aria_hidden="true",
    )


def geometry(epochs: int, lrs: Sequence[float]) -> dict[str, Any]:
    """What `playground.js` draws by."""
    return {
        "width": WIDTH,
        "plot": PLOT,
        "left": LEFT,
        "right": RIGHT,
        "top": TOP,
        "epochs": epochs,
        "tableEpochs": table_epochs(epochs),
        "ratePlaces": rate_places(len(lrs)),
        "names": [arm.name for arm in ARMS],
        "charts": [
            {
                "id": chart.id,
                "unit": chart.unit,
                "first": chart.first,
                "low": chart.low,
                "high": chart.high,
                "log": chart.log,
                "mark": MARKS.index(chart.mark) + 1 if chart.mark else 0,
            }
            for chart in CHARTS
        ],
    }


def table_epochs(epochs: int) -> list[int]:
    """Rows of the tables."""
    return [*(e for e in TABLE_EPOCHS if e < epochs), epochs]


def rate_places(count: int) -> list[int]:
    """Horizontal places of the learning rates."""
    room = WIDTH - LEFT - RIGHT
    return [LEFT + room * (2 * index + 1) // (2 * count) for index in range(count)]


def _frame(
    name: str,
    title: str,
    description: str,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_label: str,
) -> Element:
    """Axes without lines."""
    bottom = TOP + PLOT
    room = {"x": str(LEFT), "y": str(TOP), "width": str(WIDTH - LEFT - RIGHT), "height": str(PLOT)}
    svg = tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", description, id=f"{name}-desc"),
        tag("clipPath", tag("rect", **room), id=f"{name}-clip"),
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        viewBox=f"0 0 {WIDTH} {bottom + BOTTOM}",
        class_="chart",
    )
    for y, text in y_ticks:
        at = _number(y)
        svg.append(tag("line", class_="grid", x1=str(LEFT), x2=str(WIDTH - RIGHT), y1=at, y2=at))
        svg.append(tag("text", text, x=str(LEFT - 5), y=_number(y + 3.5), text_anchor="end"))
    for x, text in x_ticks:
        svg.append(tag("text", text, x=_number(x), y=str(bottom + 14), text_anchor="middle"))
    middle = (LEFT + WIDTH - RIGHT) // 2
    svg.append(tag("text", x_label, x=str(middle), y=str(bottom + 28), text_anchor="middle"))
    return svg


def _scales(
    chart: ChartKind, epochs: int
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    def x_of(epoch: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.sqrt(epoch / epochs)

    def y_of(value: float) -> float:
        if chart.log:
            share = math.log2(chart.high / max(value, 1)) / math.log2(chart.high / chart.low)
        else:
            share = (chart.high - value) / (chart.high - chart.low)
        return TOP + PLOT * share

    return x_of, y_of


def _paths(
    chart: ChartKind,
    values: Numbers,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
) -> tuple[str, str]:
    means, below, above = values
    xs = [x_of(index + chart.first) for index in range(len(means))]
    line = [(x, y_of(m)) for x, m in zip(xs, means, strict=True)]
    upper = [(x, y_of(m + a)) for x, m, a in zip(xs, means, above, strict=True)]
    lower = [(x, y_of(m - b)) for x, m, b in zip(xs, means, below, strict=True)]
    return "M" + _joined(line), "M" + _joined([*upper, *reversed(lower)]) + "Z"


def _mark(
    chart: ChartKind,
    place: int,
    stop: Sequence[int] | None,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
) -> Element:
    element = tag("path", class_=f"mark a{place}", id=f"{chart.id}-m{place}", d=ARMS[place].mark)
    if stop is None:
        element.set("visibility", "hidden")
        element.set("transform", "translate(0,0)")
    else:
        y = max(y_of(stop[1 + MARKS.index(chart.mark)]), TOP)
        element.set("visibility", "visible")
        element.set(
            "transform", f"translate({_number(x_of(stop[0]))},{_number(min(y, TOP + PLOT))})"
        )
    return element


def _description(chart: ChartKind, arms: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for arm, values in zip(ARMS, arms, strict=True):
        means = values[chart.id][0]
        top = max(means)
        parts.append(
            f"{arm.name}: {_shown(chart, means[0])} in epoch {chart.first}, highest "
            f"{_shown(chart, top)} in epoch {means.index(top) + chart.first}, "
            f"{_shown(chart, means[-1])} in epoch {len(means) - 1 + chart.first}."
        )
    return " ".join(parts)


def _cell(chart: ChartKind, values: Numbers, index: int) -> str:
    mean, below, above = (column[index] for column in values)
    low, high = _shown(chart, mean - below, bare=True), _shown(chart, mean + above, bare=True)
    return f"{_shown(chart, mean)} ({low} to {high})"


def _shown(chart: ChartKind, value: int, *, bare: bool = False) -> str:
    if chart.unit == 100:
        return f"{value / 100:.2f}"
    return f"{value / 10:.1f}" + ("" if bare else " %")


def _tick(chart: ChartKind, value: int) -> str:
    return f"{value / 100:g}" if chart.unit == 100 else f"{value // 10} %"


def _epoch_ticks(epochs: int) -> list[int]:
    return [e for e in (0, 1, 3, 6, 10, 20, 30, 40, 50, 60) if e <= epochs]


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{_number(x)},{_number(y)}" for x, y in points)


def _number(value: float) -> str:
    """Tenths, rounded as the script does."""
    return f"{math.floor(value * 10 + 0.5) / 10:g}"


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)
