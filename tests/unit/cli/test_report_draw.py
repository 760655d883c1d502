"""Charts as pictures: what thinning keeps, ticks that are numbers, text that is text, contrast."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from poprisk_integrations.cli.report.charts import sections_of
from poprisk_integrations.cli.report.draw import DARK, LIGHT, draw_charts, drawing, thinned
from poprisk_integrations.cli.report.sources import load_run


@pytest.mark.parametrize("seed", range(5))
def test_minima_maxima_and_gaps_stay(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(801, 20000)
    curve = pd.Series([rng.gauss(0, 1) for _ in range(count)])
    high, low, gap = rng.sample(range(count), 3)
    curve[high], curve[low], curve[gap] = 50.0, -50.0, math.nan
    kept = thinned(curve, most=800)
    assert len(kept) <= 800
    assert {0, count - 1, high, low, gap} <= {*kept.index}
    assert kept.index.is_monotonic_increasing
    for start in range(0, count - count // 50, count // 100):  # parts keep their own extremes
        part = curve[start : start + count // 50]
        inside = part[len(part) // 4 : -len(part) // 4]
        assert kept[part.index.intersection(kept.index)].max() >= inside.max()


def stop_figure(directory: Path, ratios: list[float], **report: Any) -> Figure:
    """The picture of a stop by F, whose windows have ten steps."""
    rows = [
        {"step": 10 * (place + 1), "steps": 10, "signal_ratio": ratio, "signal_ratio_se": 0.1}
        for place, ratio in enumerate(ratios)
    ]
    content = {"reason": "cost $1 and $x^{$", "history": rows, **report}
    (directory / "poprisk_stop.json").write_text(json.dumps(content))
    run = load_run(directory)
    charts = next(section.charts for section in sections_of([run]) if section.name == "stop")
    assert run.stop is not None
    with drawing():
        figure = draw_charts(charts, f"$run$\n{run.stop.verdict}", columns=1)
        figure.canvas.draw()
    return figure


@pytest.mark.parametrize(
    ("ratios", "scale"),
    [
        ([6.3, 2.0, 0.9], "log"),  # less than a decade: matplotlib would label the ticks in between
        ([900.0, 20.0, 0.9], "log"),
        ([2e3, 1e-2], "log"),
        ([1.3, 1.2], "log"),  # the onset is interpolated between logarithms
        ([0.0, -0.5, 2.0], "linear"),
    ],
)
def test_tick_labels_are_numbers(ratios: list[float], scale: str, tmp_path: Path) -> None:
    (axes,) = stop_figure(tmp_path, ratios).axes
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    found = [label.get_text() for label in axes.get_yticklabels(which="both")]
    labels = [text.replace("\u2212", "-") for text in found]  # outside of `drawing`
    inside = {float(label) for label in labels if label and low <= float(label) <= high}
    assert 2 <= len(inside) <= 9


def test_lines_stand_where_they_should(tmp_path: Path) -> None:
    """A window at its middle, the onset where the curve crosses, text as it is."""
    report = {"onset_step": 40, "onset_at": 28.5, "stop_step": 60, "settings": {"threshold": 2.0}}
    figure = stop_figure(tmp_path, [6.0, 3.0, 1.5, 0.5], **report)
    (axes,) = figure.axes
    curve, onset, stop, level = ([*line.get_xdata()] for line in axes.lines)
    assert curve == [5.0, 15.0, 25.0, 35.0]
    assert (onset[0], stop[0]) == (28.5, 60)
    assert [*axes.lines[3].get_ydata()] == [2.0, 2.0]
    assert level == [0, 1]  # from edge to edge
    assert figure.get_suptitle().startswith("$run$\ncost $1 and $x^{$; very probably memorising")


def _contrast(one: str, two: str) -> float:
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(colour: str) -> float:
        channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(theme: dict[str, str]) -> None:
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    drawn = [name for name in theme if name not in ("page", "card", "line")]
    assert len(drawn) == 9
    for name in drawn:
        for ground in ("page", "card"):
            assert _contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
    assert len(set(theme.values())) == len(theme)
