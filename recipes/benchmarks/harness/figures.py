"""Pictures that several studies draw alike."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from benchmarks.harness.tables import RANGE, SCORES, against
from benchmarks.harness.train import Trace
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "draw_differences",
    "draw_ends",
    "draw_rates",
    "interval_bar",
    "legend",
    "percent",
    "plt",
    "save",
    "style_of",
]

COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
DASHES = ("-", "--", ":", "-.")
TITLES = {"tuned": "tuned, at the end", "tuned_stopped": "tuned, stopped", "range": "33x range"}


def style_of(place: int) -> dict:
    """Colour and dash of the arm at this place; tells apart up to 32."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
    }


def legend(fig: Figure, axis: Axes, loc: str = "right upper", **options) -> None:
    """The legend of one panel, beside all of them."""
    options = {"frameon": False, **options}
    fig.legend(*axis.get_legend_handles_labels(), loc=f"outside {loc}", **options)


def save(fig: Figure, path: Path, dpi: float | str = "figure") -> None:
    """Lay out, write, forget."""
    if fig.get_layout_engine() is None:
        fig.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=dpi)
    plt.close(fig)


def draw_rates(
    traces: dict[str, Trace],
    metric: str,
    path: Path,
    *,
    higher: bool,
    label: str,
    log: bool = False,
) -> None:
    """Metric at the end against learning rate, and over training at each arm's best rate.

    One column for each condition; of several decays the best at each rate. Bands: plus and minus
    one standard error over seeds. The grey band is the range of the scores.
    """
    conditions = list(dict.fromkeys(next(iter(traces.values()))["condition"].tolist()))
    fig, axes = plt.subplots(
        2, len(conditions), figsize=(1.5 + 3.6 * len(conditions), 7), squeeze=False, dpi=120
    )
    for column, condition in enumerate(conditions):
        upper, lower = axes[0][column], axes[1][column]
        for place, (arm, trace) in enumerate(traces.items()):
            _draw_arm(upper, lower, trace, metric, condition, higher, arm, style_of(place))
        upper.axvspan(min(RANGE), max(RANGE), color="0.93", zorder=0)
        upper.set(xscale="log", xlabel="learning rate", title=condition or None)
        lower.set(xlabel="step")
        for axis in (upper, lower):
            axis.grid(color="0.9")
            if log:
                axis.set_yscale("log")
    axes[0][0].set_ylabel(f"{label}, at the end")
    axes[1][0].set_ylabel(f"{label}, best rate")
    legend(fig, axes[0][0])
    save(fig, path)


def _draw_arm(upper, lower, trace, metric, condition, higher, arm, style) -> None:
    chosen = trace["condition"] == condition
    turn = 1 if higher else -1
    points = []  # rate, mean at the end, its error, the curves
    for lr in sorted(set(trace["lr"][chosen].tolist())):
        found = []
        for decay in sorted(set(trace["weight_decay"][chosen].tolist())):
            here = chosen & (trace["lr"] == lr) & (trace["weight_decay"] == decay)
            curves = trace[metric][:, here].astype(np.float64)
            curves[-1, trace["diverged"][here]] = curves[0, trace["diverged"][here]]
            if not np.isfinite(curves[-1]).all():
                curves[-1] = curves[0]
            found.append(curves)
        curves = max(found, key=lambda c: turn * c[-1].mean())
        error = curves[-1].std() / max(1, curves.shape[1] - 1) ** 0.5
        points.append((lr, curves[-1].mean(), error, curves))
    lrs, ends, errors = (np.array([point[k] for point in points]) for k in range(3))
    upper.plot(lrs, ends, marker=".", label=arm, **style)
    upper.fill_between(lrs, ends - errors, ends + errors, color=style["color"], alpha=0.12, lw=0)
    best = max(points, key=lambda point: turn * point[1])[3]
    lower.plot(trace["eval_step"], np.nanmean(best, 1), **style)


def percent(row: dict, name: str = "mean", ends: Sequence[str] = ("low", "high")) -> list[float]:
    """A number and the ends of its interval, in %."""
    return [100 * float(row[key]) for key in (name, *ends)]


def draw_differences(
    summary: Sequence[dict], groups: Sequence[str], path: Path, xlabel: str
) -> None:
    """Relative difference to AdamW of every arm in two groups; one panel for each score."""
    arms = list(dict.fromkeys(row["arm"] for row in summary if row["base"] == "AdamW"))
    fig, axes = plt.subplots(
        1, len(SCORES), figsize=(12, 1.5 + 0.34 * len(arms)), sharey=True, dpi=120
    )
    looks = (("#d55e00", "o", -0.14), ("#0072b2", "s", 0.14))
    for axis, column in zip(axes, SCORES, strict=True):
        for group, (colour, marker, shift) in zip(groups, looks, strict=True):
            rows = [against(summary, arm, "AdamW", column, group) for arm in arms]
            mean, low, high = np.array([percent(row) for row in rows]).T
            axis.errorbar(
                mean,
                np.arange(len(arms)) + shift,
                xerr=[np.maximum(mean - low, 0), np.maximum(high - mean, 0)],
                fmt=marker,
                color=colour,
                markersize=4,
                capsize=2,
                label=group,
            )
        axis.axvline(0, color="0.4", lw=0.8)
        axis.grid(axis="x", color="0.9")
        axis.set(title=TITLES[column], xlabel=xlabel)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    legend(fig, axes[0], "lower center", ncols=2, frameon=True)
    save(fig, path)


def draw_ends(
    rows: Sequence[dict],
    conditions: Sequence[str],
    columns: tuple[str, str],
    labels: tuple[str, str],
    path: Path,
    *,
    figsize: tuple[float, float],
    largest: float = np.inf,
) -> None:
    """One column of member rows against another, one line per arm, in two rows of panels.

    A point is the mean over seeds at one learning rate; those beyond `largest` are left out.
    """
    across = (len(conditions) + 1) // 2
    fig, axes = plt.subplots(2, across, figsize=figsize, squeeze=False, dpi=120)
    for axis, condition in zip(axes.flat, conditions, strict=False):
        for place, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
            mine = [r for r in rows if (r["arm"], r["condition"]) == (arm, condition)]
            points = [
                [np.mean([float(r[c]) for r in mine if r["lr"] == lr]) for c in columns]
                for lr in dict.fromkeys(row["lr"] for row in mine)
            ]
            x, y = np.array([point for point in points if point[1] < largest]).T
            axis.plot(x, y, marker=".", label=arm, **style_of(place))
        axis.set(title=condition, xlabel=labels[0], ylabel=labels[1])
        axis.grid(color="0.9")
    legend(fig, axes.flat[0])
    save(fig, path)


def interval_bar(axis: Axes, place: int, row: dict, name: str, colour: str) -> None:
    """A bar of a share in %, its interval (`NAME_low`, `NAME_high`) and its number."""
    share, low, high = percent(row, name, (f"{name}_low", f"{name}_high"))
    axis.bar(place, share, 0.6, color=colour)
    axis.errorbar(place, share, [[share - low], [high - share]], color="#333333", capsize=3)
    axis.text(place + 0.04, high, f" {share:.2f}", fontsize=9, va="bottom", ha="left")
