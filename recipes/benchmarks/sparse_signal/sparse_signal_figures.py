"""Pictures of sparse_signal beyond error against learning rate."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from gate_harness.figures import style_of
from sparse_signal_verdict import COLUMNS, found

__all__ = ["draw_differences", "draw_weights"]

LARGEST = 5.0  # norms beyond are of runs that broke down
TITLES = {"tuned": "tuned, at the end", "tuned_stopped": "tuned, stopped", "range": "33x range"}


def draw_differences(scores: list[dict], path: Path) -> None:
    """Relative difference to AdamW of every arm, with intervals; one panel for each score."""
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in scores) if arm != "AdamW"]
    fig, axes = plt.subplots(
        1, len(COLUMNS), figsize=(12, 1.5 + 0.34 * len(arms)), sharey=True, dpi=120
    )
    looks = {"sparse": ("#d55e00", "o", -0.14), "rotated or dense": ("#0072b2", "s", 0.14)}
    for axis, column in zip(axes, COLUMNS, strict=True):
        for group, (colour, marker, shift) in looks.items():
            triples = [found(scores, arm, "AdamW", column, group) for arm in arms]
            mean, low, high = 100 * np.array(triples).T
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
        axis.set(title=TITLES[column], xlabel="gain in excess error, % of AdamW's")
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].set_ylim(len(arms) - 0.4, -0.6)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    fig.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def draw_weights(rows: list[dict], path: Path) -> None:
    """Norm of the weights off the relevant inputs against that on them, at the end of training.

    A point is the mean over seeds at one learning rate, decay 0; one line per arm. For the linear
    model the target is (1, 0).
    """
    rows = [r for r in rows if r["weight_decay"] == "0" and not r["condition"].endswith("dense")]
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    fig, axes = plt.subplots(2, 2, figsize=(11, 8), squeeze=False, dpi=120)
    for axis, condition in zip(axes.flat, conditions, strict=True):
        for place, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
            mine = [r for r in rows if (r["arm"], r["condition"]) == (arm, condition)]
            points = []
            for lr in dict.fromkeys(row["lr"] for row in mine):
                at = [row for row in mine if row["lr"] == lr]
                points.append([mean_of(at, "on_end"), mean_of(at, "off_end")])
            x, y = np.array([point for point in points if point[1] < LARGEST]).T
            axis.plot(x, y, marker=".", label=arm, **style_of(place))
        axis.set(title=condition, xlabel="norm on the relevant inputs", ylabel="norm off them")
        axis.grid(color="0.9")
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    fig.set_layout_engine("constrained")
    fig.savefig(path)
    plt.close(fig)


def mean_of(rows: list[dict], column: str) -> float:
    """Over rows."""
    return sum(float(row[column]) for row in rows) / len(rows)
