"""What is drawn of wrong labels, on the page and by `poprisk flips`: margins, groups, calibration.

Each function fills axes that are made within `drawing`, in the colours that the page has variables
for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from poprisk_integrations.cli.report.draw import LIGHT, thinned
from poprisk_integrations.cli.report.run import short
from poprisk_integrations.core.calibration import ReliabilityBin

__all__ = ["MOST_GROUPS", "MarginBars", "draw_groups", "draw_margins", "draw_reliability"]

MOST_GROUPS = 12  # of a chart
_INK, _MUTED, _CARD = LIGHT["ink"], LIGHT["muted"], LIGHT["card"]
# Series with their strength: neighbours in a stack differ in brightness too.
_LOOKS = {
    "swap": ("s3", 1.0),
    "drop": ("s1", 1.0),
    "review": ("s4", 0.55),
    "keep": ("s0", 0.6),
    "no action": ("s5", 0.3),
    "swapped on purpose": ("s1", 1.0),
    "not swapped": ("s0", 0.6),
}
_BINS = 40
_LABEL = 16  # characters of a group's name


@dataclass(frozen=True)
class MarginBars:
    """A histogram of margins, and P(wrong) over them."""

    counts: pd.DataFrame  # a row for each bar, by its left end, and a column for each kind of pair
    width: float  # of a bar
    tails: int  # pairs that the outermost bars hold from beyond
    curve: pd.Series  # P(wrong) over ascending margins
    calibrated: bool

    @classmethod
    def of(cls, pairs: pd.DataFrame, *, by_truth: bool, calibrated: bool) -> "MarginBars":
        """From pairs with `margin`, `probability_wrong` and `action`; by truth with `swapped`.

        Every pair is counted once: `by_truth` by whether its label was swapped on purpose, else by
        its action.
        """
        margin = pairs["margin"].to_numpy()
        if by_truth:
            swapped = pairs["swapped"].to_numpy(dtype=bool)
            kinds = {"swapped on purpose": swapped, "not swapped": ~swapped}
        else:
            action = pairs["action"].to_numpy()
            kinds = {name: action == name for name in ("swap", "drop", "review", "keep")}
            kinds["no action"] = ~np.isin(action, list(kinds))  # of a report edited by hand
        low, high = np.quantile(margin, [0.005, 0.995])
        room = 0.25 * (high - low)
        low, high = max(margin.min(), low - room), min(margin.max(), high + room)
        tails = int(((margin < low) | (margin > high)).sum())
        if low == high:  # one value
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, _BINS + 1)
        counts = {
            kind: np.histogram(np.clip(margin[mask], low, high), edges)[0]
            for kind, mask in kinds.items()
            if mask.any()
        }
        curve = pairs.sort_values("margin").set_index("margin")["probability_wrong"]
        curve = thinned(curve[(curve.index >= low) & (curve.index <= high)], 200)
        bars = pd.DataFrame(counts, index=edges[:-1])
        return cls(bars, float(edges[1] - edges[0]), tails, curve, calibrated)


def draw_margins(axes: Axes, bars: MarginBars, taken: str = "before training") -> None:
    """The histogram with a legend above it, and P(wrong) as a line on an axis of its own."""
    floor = np.zeros(len(bars.counts))
    left = bars.counts.index.to_numpy()
    for kind, counts in bars.counts.items():
        color, alpha = _LOOKS[str(kind)]
        axes.bar(
            left, counts, bars.width, floor, align="edge", color=LIGHT[color], alpha=alpha,
            edgecolor=_CARD, linewidth=0.3, label=f"{kind} ({counts.sum()})",
        )  # fmt: skip
        floor = floor + counts.to_numpy()
    low, high = left[0], left[-1] + bars.width
    if low < 0 < high:
        axes.axvline(0.0, color=_MUTED, lw=0.8)
    rest = f"; outermost bars hold {bars.tails} from beyond" if bars.tails else ""
    axes.set_xlabel(f"margin {taken} (reward units{rest})")
    axes.set_ylabel("pairs")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlim(low - 0.5 * bars.width, high + 0.5 * bars.width)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, handlelength=1.0,
        handletextpad=0.4, columnspacing=0.8,
    )  # fmt: skip
    right = axes.twinx()
    marker = "o" if len(bars.curve) <= 20 else ""
    right.plot(bars.curve.index, bars.curve, color=_INK, lw=1.4, marker=marker, ms=3.0)
    right.spines["right"].set_visible(True)
    right.set_ylim(0.0, 1.02)
    right.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "", "0.5", "", "1"])
    right.grid(visible=False)
    right.set_ylabel("P(wrong), line" if bars.calibrated else "line: ranking only", color=_INK)


def draw_groups(axes: Axes, groups: Sequence[Mapping[str, Any]], overall: float) -> None:
    """A dot with its interval for each group, from the top down, and a line at the mean of all."""
    shown = groups[:MOST_GROUPS]
    places = np.arange(len(shown))[::-1]
    mean, low, high = (np.array([one[name] for one in shown]) for name in ("mean", "low", "high"))
    axes.hlines(places, low, high, color=LIGHT["s0"], lw=2.0)
    axes.plot(mean, places, "o", color=LIGHT["s0"], ms=5.0)
    axes.axvline(overall, color=_INK, lw=1.1, ls=(0, (5, 2)))
    axes.set_yticks(places, [f"{short(one['group'], _LABEL)} ({one['pairs']})" for one in shown])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlim(0.0, min(1.0, 1.1 * max(float(high.max()), overall)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("mean P(wrong), 95 % interval; dashed: all pairs")


def draw_reliability(axes: Axes, bins: Sequence[ReliabilityBin]) -> None:
    """Share of wrong labels over their mean probability, with intervals, beside the diagonal."""
    axes.plot([0.0, 1.0], [0.0, 1.0], color=_MUTED, lw=1.0, label="if P(wrong) is right")
    rows = [
        (one.predicted, one.share, one.share_low, one.share_high, one.count)
        for one in bins
        if one.count
    ]
    predicted, share, low, high, count = zip(*rows, strict=True)
    axes.vlines(predicted, low, high, color=LIGHT["s0"], lw=2.0)
    label = "swapped on purpose, 95 % interval; pairs in the bin"
    axes.plot(predicted, share, "o", color=LIGHT["s0"], ms=5.0, label=label)
    for x, y, n in zip(predicted, high, count, strict=True):
        axes.annotate(
            str(n), (x, y), (0, 2), textcoords="offset points", ha="center", color=_MUTED, size=8
        )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.03, 1.12)
    axes.set_xlabel("mean P(wrong) of the bin")
    axes.set_ylabel("share swapped")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
