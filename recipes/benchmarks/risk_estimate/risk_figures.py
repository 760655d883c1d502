"""The study's pictures: correlation per estimator, windows, bias over epochs."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from gate_harness.figures import COLOURS
from risk_statistics import ESTIMATORS, measured, windows
from risk_verdict import cell_window

__all__ = ["draw", "draw_epochs", "draw_windows"]

SHOWN = (*ESTIMATORS, "persistence", "first order")
PHASES = {"first epoch": "#0072b2", "from step 50": "#56b4e9", "second half": "#d55e00"}


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def draw(rows: list[dict], path: Path) -> None:
    """Correlation per window for each estimator and stream: mean and range over seeds."""
    streams = [row for row in rows if row["data"] == "stream"]
    cells = list(dict.fromkeys((row["task"], row["optimizer"], row["lr"]) for row in streams))
    columns = min(5, len(cells))
    shape = (math.ceil(len(cells) / columns), columns)
    size = (2.2 + 2.7 * columns, 0.6 + 4.3 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(cells) :]:
        axis.axis("off")
    for axis, cell in zip(axes.flat, cells, strict=False):
        wanted = cell_window(cell[0])
        part = [row for row in streams if (row["task"], row["optimizer"], row["lr"]) == cell]
        for shift, (phase, colour) in zip((-0.27, 0.0, 0.27), PHASES.items(), strict=True):
            for place, name in enumerate(SHOWN):
                values = [
                    float(row["correlation"])
                    for row in part
                    if (row["phase"], row["estimator"]) == (phase, name)
                    and int(row["horizon"]) == wanted
                ]
                values = [value for value in values if np.isfinite(value)]
                if not values:
                    continue
                label = phase if place == 0 else None
                axis.barh(place + shift, np.mean(values), 0.25, color=colour, label=label)
                axis.plot([min(values), max(values)], [place + shift] * 2, color="0.25", lw=0.8)
        axis.axvline(0.8, color="black", lw=0.8, ls="--")
        axis.axvline(0.0, color="black", lw=0.8)
        axis.axhspan(len(ESTIMATORS) - 0.5, len(SHOWN) - 0.5, color="0.93", zorder=0)
        axis.set_title(f"{cell[0]}, {cell[1]} {cell[2]}, {wanted} steps", fontsize=9)
        axis.set(xlim=(-1.02, 1.02), ylim=(len(SHOWN) - 0.4, -0.6))
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(range(len(SHOWN)), SHOWN)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        "correlation of predicted and measured change of the held-out loss per window, streams\n"
        "(line: range over seeds; grey: needs held-out data)",
        fontsize=10,
    )
    figure.set_layout_engine("constrained")
    _save(figure, path)


def draw_windows(found: dict, path: Path) -> None:
    """Predicted against measured per window, `lagged`, AdamW at 1e-3, all seeds."""
    panels: Sequence[tuple[str, bool, str]] = (
        ("A", True, "first epoch"),
        ("A", True, "second half"),
        ("A", False, "reused"),
        ("B", True, "first epoch"),
        ("B", True, "second half"),
        ("B", False, "reused"),
    )
    figure, axes = plt.subplots(2, 3, figsize=(11, 7), dpi=120, layout="constrained")
    for axis, (task, stream, phase) in zip(axes.flat, panels, strict=True):
        predicted, actual, time = [], [], []
        for run in found[task, stream, "AdamW", 1e-3].values():
            steps = len(run["lagged"])
            first = {"first epoch": 0, "second half": steps // 2}.get(phase, 0)
            length = 25 if stream else int(run["epoch_steps"])
            predicted.append(windows(run["lagged"], first, steps, length).sum(1))
            actual.append(windows(measured(run), first, steps, length).sum(1))
            time.append(np.arange(len(actual[-1])))
        x, y, t = map(np.concatenate, (predicted, actual, time))
        dots = axis.scatter(x, y, c=t, s=12, cmap="viridis", alpha=0.8)
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color="0.5", lw=0.8)
        axis.axhline(0, color="0.85", zorder=0)
        axis.axvline(0, color="0.85", zorder=0)
        if phase != "second half":
            axis.set_xscale("symlog", linthresh=1e-2)
            axis.set_yscale("symlog", linthresh=1e-2)
        else:
            axis.locator_params(nbins=5)
        unit = "25 steps" if stream else "one epoch"
        r = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(predicted, actual, strict=True)])
        axis.set_title(f"{task}, {phase}: r = {r:.2f}", fontsize=10)
        axis.set(xlabel=f"predicted decrease, {unit}", ylabel="measured decrease")
        axis.tick_params(labelsize=7)
        figure.colorbar(dots, ax=axis, label="window" if stream else "epoch")
    _save(figure, path)


def draw_epochs(epochs: list[dict], path: Path) -> None:
    """Predicted and measured decrease per epoch on reused data, AdamW at 1e-3 or its only rate."""
    shown = ("measured", "first order", "training set", "lagged", "exact", "moments", "naive")
    tasks = list(dict.fromkeys(row["task"] for row in epochs))
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(3.4 * len(tasks), 6.4), dpi=120, squeeze=False
    )
    for column, task in enumerate(tasks):
        mine = [row for row in epochs if (row["task"], row["optimizer"]) == (task, "AdamW")]
        rates = {row["lr"] for row in mine}
        lr = "0.001" if "0.001" in rates else min(rates)
        part = [row for row in mine if row["lr"] == lr]
        at = [row["epoch"] for row in part]
        held = np.array([float(row["held_loss"]) for row in part])
        best = at[int(held.argmin())]
        upper, lower = axes[0][column], axes[1][column]
        upper.plot(at, held, color="black")
        upper.set(title=f"{task}, lr {lr}", ylabel="held-out loss" if column == 0 else None)
        for place, name in enumerate(shown):
            values = np.array([float(row[name]) for row in part])
            style = {"color": "black", "lw": 2.2} if name == "measured" else {"lw": 1.2}
            colour = {"color": COLOURS[place]} if name != "measured" else {}
            lower.plot(at, values, label=name, **style, **colour)
        after = np.array([[float(row[name]) for name in shown] for row in part[3:]])
        low, high = after[:, :-1].min(), after[:, :-1].max()
        lower.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))
        lower.axhline(0, color="0.6", lw=0.8)
        lower.set(xlabel="epoch", ylabel="decrease per epoch" if column == 0 else None)
        for axis in (upper, lower):
            axis.axvline(best, color="0.6", ls=":")
            axis.grid(color="0.92")
            axis.tick_params(labelsize=7)
    handles, labels = axes[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(shown), frameon=False)
    figure.set_layout_engine("constrained")
    _save(figure, path)
