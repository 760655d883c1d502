"""The benchmark's two pictures."""

from pathlib import Path

import matplotlib
import numpy as np
import ours

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw_regret", "draw_trajectories"]

OURS, RIVAL, HELD, ORACLE = "#c0504d", "#7f7f7f", "#4f81bd", "#9bbb59"


def _color(rule: str) -> str:
    if rule in ours.VARIANTS:
        return OURS
    if rule.startswith("hold-out"):
        return HELD
    return ORACLE if rule.startswith(("oracle", "fixed")) else RIVAL


def draw_regret(summary: list[dict], path: Path) -> None:
    """Left: difference to hold-out 10 % with its interval. Right: mean regret by task."""
    rows = [row for row in summary if not row["rule"].startswith("oracle")]
    rows.sort(key=lambda row: (row["minus hold-out"] == "", row["minus hold-out"] or 0.0))
    tasks = [f"T{i}" for i in range(1, 9) if any(row[f"T{i}"] != "" for row in rows)]
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(11, 0.28 * len(rows) + 1.6),
        layout="constrained",
        sharey=True,
        width_ratios=[1, 1.1],
    )
    for place, row in enumerate(rows):
        if row["minus hold-out"] == "":
            continue
        low, high = row["low"], row["high"]
        left.plot([low, high], [place, place], color=_color(row["rule"]), lw=2)
        left.plot(row["minus hold-out"], place, "o", color=_color(row["rule"]), ms=5)
    left.axvline(0, color="black", lw=0.8)
    left.set_xscale("symlog", linthresh=0.02)
    left.set_yticks(range(len(rows)), [row["rule"] for row in rows], fontsize=8)
    left.invert_yaxis()
    left.set_title(
        "regret minus hold-out 10 %, T1-T5\n(nats or squared error; 95 % interval)", fontsize=9
    )
    left.grid(axis="x", alpha=0.3)
    values = np.array([[np.nan if row[t] == "" else row[t] for t in tasks] for row in rows])
    image = right.imshow(
        np.log10(np.maximum(values, 1e-3)), aspect="auto", cmap="viridis_r", vmin=-3, vmax=0
    )
    for i, j in np.ndindex(values.shape):
        if np.isfinite(values[i, j]):
            dark = values[i, j] > 0.06
            right.text(
                j,
                i,
                f"{values[i, j]:.3f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    right.set_xticks(range(len(tasks)), tasks)
    right.set_title("mean regret by task", fontsize=9)
    bar = figure.colorbar(image, ax=right, ticks=[-3, -2, -1, 0], shrink=0.6)
    bar.ax.set_yticklabels(["<= 0.001", "0.01", "0.1", "1"], fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_trajectories(traces: dict, shown: tuple[tuple[str, str], ...], path: Path) -> None:
    """Test loss and F of the first seed of some conditions, with onset, stop and best epoch."""
    shown = tuple((task, condition) for task, condition in shown if task in traces)
    figure, axes = plt.subplots(
        2,
        len(shown),
        figsize=(3.4 * len(shown), 5),
        layout="constrained",
        sharex="col",
        squeeze=False,
    )
    kind, config = ours.VARIANTS["poprisk"]
    for column, (task, condition) in enumerate(shown):
        trace = traces[task]
        names = [str(c) for c in trace["condition"]]
        member = names.index(condition) if condition in names else 0
        stops, onsets = ours.stop_steps(trace, "constant", kind, config, stream=False)
        per_epoch = float(trace["full/epoch_steps"])
        at = trace["full/eval_step"] / per_epoch
        top, bottom = axes[:, column]
        top.plot(at, trace["full/test_loss"][:, member], color=OURS, label="test, same noise")
        top.plot(at, trace["full/train_loss"][:, member], color=RIVAL, lw=1, label="training")
        best = at[trace["full/test_loss"][:, member].argmin()]
        ratio = ours.ratios(trace, kind)[:, member]
        bottom.plot(trace["full/w_step"] / per_epoch, ratio, color=HELD, label="F")
        bottom.axhline(1, color="black", lw=0.8)
        bottom.set_yscale("log")
        for axis in (top, bottom):
            axis.axvline(best, color=ORACLE, lw=2, label="best epoch")
            if onsets[member] > 0:
                axis.axvline(onsets[member] / per_epoch, color=HELD, ls=":", label="onset")
            if stops[member] < int(trace["full/total_steps"]):
                axis.axvline(stops[member] / per_epoch, color=OURS, ls="--", label="stop")
            axis.grid(alpha=0.3)
        top.set_title(f"{task}: {names[member]}", fontsize=9)
        bottom.set_xlabel("epoch")
        top.legend(fontsize=7, frameon=False)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("F (whitened)")
    figure.savefig(path, dpi=130)
    plt.close(figure)
