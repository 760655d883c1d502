"""The picture of a flip report: margins, wrong labels over the ranking, groups, calibration."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from poprisk_integrations.cli.report.draw import LIGHT, drawing
from poprisk_integrations.cli.report.draw_labels import (
    MOST_GROUPS,
    MarginBars,
    draw_groups,
    draw_margins,
    draw_reliability,
)
from poprisk_integrations.core.calibration import ReliabilityBin
from poprisk_integrations.trl.flip_report import DROP_AT, REVIEW_AT, SWAP_AT, FlipReport

__all__ = ["draw_flips"]

_TITLES = {
    "annotator": "By annotator (judged pairs)",
    "length": "By length, chosen - rejected in characters (judged pairs)",
}
_PANEL, _ROW = 2.9, 0.24  # inches: a panel, and a group of one


@drawing()
def draw_flips(
    report: FlipReport,
    title: str,
    swapped_rows: Collection[int] | None = None,
    *,
    groups: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    bins: Sequence[ReliabilityBin] | None = None,
    taken: str = "before training",
) -> Figure:
    """Histogram of the margins, and the cumulative number of wrong labels over the ranked pairs.

    Where it is known which rows were swapped on purpose, the histogram tells them apart, the curve
    has the true number beside it, and `bins` are drawn; `groups` are those of `group_pairs`, and
    `taken` says when the margins were taken. The report must have a probability.
    """
    table = report.top(len(report))
    groups = groups or {}
    rows = [min(len(found), MOST_GROUPS) for found in groups.values()]
    heights = [_PANEL, _PANEL, *([_PANEL] if bins else []), *(1.2 + _ROW * n for n in rows)]
    figure = Figure(
        figsize=(8.0, sum(heights) + 0.5), dpi=130, layout="constrained", facecolor=LIGHT["card"]
    )
    margins, curve, *more = figure.subplots(len(heights), 1, height_ratios=heights)
    swapped = None if swapped_rows is None else table["row"].isin(set(swapped_rows))
    shown = table if swapped is None else table.assign(swapped=swapped)
    by_truth = swapped is not None
    bars = MarginBars.of(shown, by_truth=by_truth, calibrated=report.calibrated)
    draw_margins(margins, bars, taken)
    expected = "expected wrong labels" if report.calibrated else "sum of P(wrong), not calibrated"
    _curve(
        curve,
        table["probability_wrong"].to_numpy(),
        None if swapped is None else swapped.to_numpy(),
        expected,
    )
    if bins:
        draw_reliability(more.pop(0), bins)
    overall = float(table["probability_wrong"].mean())
    for axes, (kind, found) in zip(more, groups.items(), strict=True):
        draw_groups(axes, found, overall)
        axes.set_title(_TITLES[kind], loc="left", fontsize="medium")
    figure.suptitle(f"{title}\n{report}", fontsize=9, ha="left", x=0.02)
    return figure


def _curve(axis: Any, p: Any, swapped: Any, expected: str) -> None:
    count = np.arange(len(p) + 1)
    axis.plot(count, np.r_[0, np.cumsum(p)], color=LIGHT["s0"], label=expected)
    if swapped is not None:
        true = np.r_[0, np.cumsum(swapped)]
        axis.plot(count, true, color=LIGHT["s1"], ls="--", label="swapped on purpose")
    axis.plot(count, count, color=LIGHT["muted"], lw=0.8, label="if all of them were wrong")
    top = max(float(p.sum()), 1.0 if swapped is None else float(swapped.sum()), 1.0)
    axis.set_ylim(0, 1.15 * top)
    axis.set_xlim(0, len(p))
    places = (("swap", SWAP_AT, "s3"), ("drop", DROP_AT, "s1"), ("review", REVIEW_AT, "s4"))
    for name, threshold, color in places:
        last = int((p >= threshold).sum())
        if 0 < last < len(p):
            axis.axvline(last, color=LIGHT[color], ls=":", label=f"{name}: P >= {threshold}")
    axis.set_xlabel("pairs, the most suspect first")
    axis.set_ylabel("wrong labels among them")
    axis.legend(loc="lower right")
