"""The picture of a stop: numbers on its axes, and its onset where its curve crosses."""

import math
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from poprisk_integrations.cli.report.chart import Chart, Line
from poprisk_integrations.cli.report.curve import Curve
from poprisk_integrations.cli.report.draw import draw_chart, drawing
from poprisk_integrations.cli.stop_figure import draw_stop


def report(ratios: list[float], threshold: float = 1.0, **more: Any) -> dict[str, Any]:
    names = ("signal_ratio", "risk_decrease", "agreement")
    rows = [
        {"step": 10 * (i + 1), "steps": 10, **dict.fromkeys(names, ratio)}
        | {f"{name}_se": 0.1 for name in names}
        for i, ratio in enumerate(ratios)
    ]
    settings = {"threshold": threshold}
    return {"reason": "cost $1 and $2", "history": rows, "settings": settings, **more}


def top_axes(content: dict[str, Any]) -> Axes:
    with drawing():
        figure = draw_stop(content, "a $run$ of $mine$")
        figure.canvas.draw()
    axes: Axes = figure.axes[0]
    return axes


@pytest.mark.parametrize(
    "ratios",
    [
        [6.3, 2.0, 0.9],  # less than a decade: matplotlib would label the ticks in between
        [900.0, 20.0, 0.9],
        [2e3, 1e-2],
        [1.3, 1.2],
        [0.0, -0.5, 2.0],
    ],
)
def test_tick_labels_are_numbers(ratios: list[float]) -> None:
    axes = top_axes(report(ratios))
    labels = axes.get_yticklabels(which="both")
    shown = [t.get_text() for t in labels if t.get_text()]
    low, high = axes.get_ylim()
    inside = {float(text) for text in shown if low <= float(text) <= high}
    assert 2 <= len(inside) <= 9
    assert all(math.isfinite(value) for value in inside)


def test_the_onset_is_where_the_curve_crosses_the_threshold() -> None:
    middles, ratios = [5.0, 15.0, 25.0, 35.0], [6.0, 3.0, 1.5, 0.5]
    for threshold in (1.0, 2.0):
        logs = np.log(ratios)[::-1]
        at = float(np.interp(math.log(threshold), logs, middles[::-1]))
        axes = top_axes(report(ratios, threshold, onset_step=40, onset_at=at, stop_step=60))
        curve = next(line for line in axes.lines if len(line.get_xdata()) == 4)
        assert list(curve.get_xdata()) == middles
        found = {str(line.get_label()): line.get_xdata()[0] for line in axes.lines}
        assert found[f"onset (step {at:.0f})"] == at
        assert found["stop (step 60)"] == 60
        assert [threshold] * 2 in [list(line.get_ydata()) for line in axes.lines]


def test_text_of_the_user_is_no_mathematics() -> None:
    with drawing():
        figure = draw_stop(report([2.0, 1.0]), "a $run$ of $mine$")
        figure.canvas.draw()
    title = figure.get_suptitle()
    assert title.startswith("a $run$ of $mine$\ncost $1 and $2; very probably still learning")


def test_a_curve_that_crosses_a_threshold_is_logarithmic_on_the_page_too() -> None:
    """However little it changes: the onset is interpolated between logarithms."""
    line = Line(what="F", curve=Curve((5.0, 15.0), (3.0, 0.5)))
    for level, scale in (((1.0, "threshold"), "log"), ((0.0, "zero"), "linear")):
        with drawing():
            figure = draw_chart(Chart(title="F", lines=[line], level=level, log=True))
        assert figure.axes[0].get_yscale() == scale
