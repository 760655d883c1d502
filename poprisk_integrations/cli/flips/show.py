"""The table of the most suspect pairs, and the picture of a flip report."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from poprisk_integrations.trl.flip_report import DROP_AT, REVIEW_AT, SWAP_AT, FlipReport
from poprisk_integrations.trl.pairs import on_one_line, pair_texts

__all__ = ["draw_flips", "print_pairs"]

_STYLES = {"swap": "bold red", "drop": "red", "review": "yellow"}
# Okabe-Ito: distinct also to the colour-blind and in grey.
_BLUE, _PURPLE, _GREY = "#0072B2", "#CC79A7", "#555555"
_COLORS = {
    "keep": _BLUE,
    "review": "#56B4E9",
    "drop": "#E69F00",
    "swap": "#D55E00",
    "swapped on purpose": _PURPLE,
    "not swapped": _BLUE,
}
_BINS = 50


def print_pairs(
    console: Console,
    pairs: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]] | None = None,
    swapped: Sequence[bool] | None = None,
) -> None:
    """Print rows of a report: a table, or blocks with the texts of `examples` cut to the terminal.

    `swapped` tells whose labels were swapped on purpose, if that is known.
    """
    columns = {
        "pair": [on_one_line(str(pair["pair_id"])) for pair in pairs],
        "P(wrong)": [f"{pair['probability_wrong']:.3f}" for pair in pairs],
        "margin": [f"{pair['margin']:.3f}" for pair in pairs],
        "action": [pair["action"] for pair in pairs],
    }
    if swapped is not None:
        columns["swapped"] = ["yes" if swap else "no" for swap in swapped]
    rows = list(zip(*columns.values(), strict=True))
    if examples is None:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in columns:
            numeric = name in ("P(wrong)", "margin")
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        console.print(table)
        return
    for row, example in zip(rows, examples, strict=True):
        head = Text("\n")
        for name, cell in zip(columns, row, strict=True):
            head.append(f"{name} ", style="dim").append(cell, style=_STYLES.get(cell, "bold"))
            head.append("  ")
        console.print(head)
        for name, text in zip(("prompt", "chosen", "rejected"), pair_texts(example), strict=True):
            line = Text(f"  {name:<8}  ", style="dim")
            # More would not fit; to cut here spares the console very long texts.
            line.append(Text(on_one_line(text)[: console.width], style="not dim"))
            console.print(line, no_wrap=True, overflow="ellipsis")
    console.print()


def draw_flips(report: FlipReport, title: str, swapped_rows: Collection[int] | None = None) -> Any:
    """Histogram of the margins, and the cumulative number of wrong labels over the ranked pairs.

    Where it is known which rows were swapped on purpose, the histogram tells them apart, and the
    curve has the true number beside it. The report must have a probability.
    """
    from matplotlib.figure import Figure

    table = report.top(len(report))
    figure = Figure(figsize=(8.0, 6.4), dpi=130, layout="constrained")
    top, bottom = figure.subplots(2, 1)
    swapped = None if swapped_rows is None else table["row"].isin(set(swapped_rows)).to_numpy()
    if swapped is None:
        action = table["action"].to_numpy()
        groups = {name: action == name for name in ("swap", "drop", "review", "keep")}
        groups["no action"] = ~np.isin(action, list(groups))  # of a report edited by hand
    else:
        groups = {"swapped on purpose": swapped, "not swapped": ~swapped}
    _histogram(top, table["margin"].to_numpy(), groups)
    expected = "expected wrong labels" if report.calibrated else "sum of P(wrong), not calibrated"
    _curve(bottom, table["probability_wrong"].to_numpy(), swapped, expected)
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    figure.suptitle(f"{title}\n{report}", fontsize=9, ha="left", x=0.02, parse_math=False)
    return figure


def _histogram(axis: Any, margin: Any, groups: dict[str, Any]) -> None:
    low, high = np.quantile(margin, [0.005, 0.995])
    room = 0.25 * (high - low)
    low, high = max(margin.min(), low - room), min(margin.max(), high + room)
    tails = int(((margin < low) | (margin > high)).sum())
    if low == high:  # one value
        low, high = low - 0.5, high + 0.5
    shown = {name: mask for name, mask in groups.items() if mask.any()}
    axis.hist(
        [np.clip(margin[mask], low, high) for mask in shown.values()],
        bins=np.linspace(low, high, _BINS + 1),
        stacked=True,
        color=[_COLORS.get(name, _GREY) for name in shown],
        label=[f"{name} ({mask.sum()})" for name, mask in shown.items()],
        edgecolor="white",
        linewidth=0.3,
    )
    axis.axvline(0.0, color=_GREY, lw=0.8)
    rest = f"; the outermost bars hold {tails} from beyond" if tails else ""
    axis.set_xlabel(f"margin before training (reward units{rest})")
    axis.set_ylabel("pairs")
    axis.legend(fontsize=8, frameon=False, loc="upper right")


def _curve(axis: Any, p: Any, swapped: Any, expected: str) -> None:
    count = np.arange(len(p) + 1)
    axis.plot(count, np.r_[0, np.cumsum(p)], color=_BLUE, label=expected)
    if swapped is not None:
        true = np.r_[0, np.cumsum(swapped)]
        axis.plot(count, true, color=_PURPLE, ls="--", label="swapped on purpose")
    axis.plot(count, count, color=_GREY, lw=0.8, label="if all of them were wrong")
    top = max(float(p.sum()), 1.0 if swapped is None else float(swapped.sum()), 1.0)
    axis.set_ylim(0, 1.15 * top)
    axis.set_xlim(0, len(p))
    for name, threshold in (("swap", SWAP_AT), ("drop", DROP_AT), ("review", REVIEW_AT)):
        last = int((p >= threshold).sum())
        if 0 < last < len(p):
            axis.axvline(last, color=_COLORS[name], ls=":", label=f"{name}: P >= {threshold}")
    axis.set_xlabel("pairs, the most suspect first")
    axis.set_ylabel("wrong labels among them")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
