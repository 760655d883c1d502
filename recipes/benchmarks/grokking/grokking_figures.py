"""Steps to 95 % over learning rate and decay, and held-out accuracy over steps."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from gate_harness.figures import style_of
from grokking_scores import Cell, Steps, best_cell
from matplotlib.axes import Axes

__all__ = ["draw", "draw_curves"]

MAPPED = ("AdamW", "paper", "soft-5", "soft-32")
Trace = dict[str, np.ndarray]


def draw(
    look: list[dict],
    found: dict[str, dict[Cell, Steps]],
    traces: dict[str, Trace],
    path: Path,
    budgets: tuple[int, int],
) -> None:
    """Above: the look at the grid. Below: each arm in its best cell (in hindsight), all seeds."""
    short, budget = budgets
    rows = {arm: [row for row in look if row["arm"] == arm] for arm in MAPPED}
    mapped = [arm for arm in MAPPED if rows[arm]]
    fig = plt.figure(figsize=(12, 7.5), dpi=120, layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=(1, 1.3))
    axes = above.subplots(1, len(mapped), squeeze=False, sharey=True)[0]
    for axis, arm in zip(axes, mapped, strict=True):
        _heat_map(axis, rows[arm], short)
        axis.set(title=arm, xlabel="learning rate")
    axes[0].set_ylabel("weight decay")
    above.suptitle(
        f"steps to 95 % held-out accuracy, one seed, budget {short} (max: best held-out accuracy)"
    )
    axis = below.subplots()
    for place, (arm, trace) in enumerate(traces.items()):
        lr, decay = best_cell(found[arm], budget)
        here = np.isclose(trace["lr"], float(lr)) & np.isclose(trace["weight_decay"], float(decay))
        label = f"{arm} (lr {lr}, decay {decay})"
        curve = trace["accuracy"][:, here].mean(1)
        steps = trace["eval_step"]
        # An arm whose members are all done has no more rows; its accuracy stays what it was.
        steps, curve = np.append(steps, budget), np.append(curve, curve[-1])
        axis.plot(steps, curve, label=label, **style_of(place))
    axis.axhline(0.95, color="0.6", linewidth=0.8)
    axis.set(xlabel="step", ylabel="held-out accuracy, mean over seeds", xlim=(0, budget))
    axis.grid(color="0.92")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def draw_curves(traces: dict[str, Trace], path: Path) -> None:
    """Held-out accuracy over steps, a thin line for each seed and a thick one for their mean."""
    fig, axis = plt.subplots(figsize=(9, 4.5), dpi=120, layout="constrained")
    last = max(int(trace["eval_step"][-1]) for trace in traces.values())
    for place, (arm, trace) in enumerate(traces.items()):
        style, steps = style_of(place), np.append(trace["eval_step"], last)
        curves = np.concatenate([trace["accuracy"], trace["accuracy"][-1:]])
        axis.plot(steps, curves, linewidth=0.5, alpha=0.5, **style)
        axis.plot(steps, curves.mean(1), label=arm, **style)
    axis.axhline(0.95, color="0.6", linewidth=0.8)
    axis.set(xlabel="step", ylabel="held-out accuracy", xlim=(0, last))
    axis.grid(color="0.92")
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def _heat_map(axis: Axes, rows: list[dict], budget: int) -> None:
    lrs = sorted({row["lr"] for row in rows}, key=float)
    decays = sorted({row["weight_decay"] for row in rows}, key=float)
    grid = np.full((len(decays), len(lrs)), np.nan)
    for row in rows:
        done, at = row["finished_at"], (decays.index(row["weight_decay"]), lrs.index(row["lr"]))
        if done > 0:
            grid[at] = math.log(done)
            text, colour = f"{done}", "white" if done < budget / 2 else "black"
        else:
            text, colour = f"> {budget}\n(max {float(row['accuracy_max']):.2f})", "0.3"
        axis.text(at[1], at[0], text, ha="center", va="center", fontsize=8, color=colour)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.9")
    limits = {"vmin": math.log(budget / 10), "vmax": math.log(budget)}
    axis.imshow(grid, cmap=colours, aspect="auto", origin="lower", **limits)
    axis.set_xticks(range(len(lrs)), lrs)
    axis.set_yticks(range(len(decays)), decays)
