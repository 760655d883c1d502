"""The benchmark's picture, from the results file alone."""

from pathlib import Path

import matplotlib
import numpy as np
from matched import frontier
from runs import Point, Run, reported, title

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

__all__ = ["draw"]

# Few are highlighted, others grey.
COLORS = {
    "A1": "#1f4e79",
    "A9": "#c0504d",
    "A2": "#e0912f",
    "C1": "#7b5ea7",
    "C3": "#a8577e",
    "V3b": "#2a9d8f",
    "V3bc": "#8ecf5a",
    "A15": "black",
}
GREY = "#c8c8c8"
CONDITIONS = ("flips 0", "flips 30")
STYLES = {True: "--", False: "-"}  # last epoch; stop
KL_SHOWN = 13.0
LEAST_ACCURACY = {"flips 0": 0.78, "flips 30": 0.6}


def draw(runs: list[Run], path: Path) -> None:
    """Above without wrong labels, below with 30 %: reward over KL, accuracy over learning rate."""
    runs = [run for run in runs if run.setting[1:] == (0.1, "constant")]
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 8), layout="constrained")
    for row, condition in zip(axes, CONDITIONS, strict=True):
        arms: dict[str, list[Run]] = {}
        for run in runs:
            if run.setting[0] == condition:
                arms.setdefault(run.arm, []).append(run)
        if condition == CONDITIONS[0]:
            arms.pop("A15", None)  # removes nothing there
        _rewards(row[0], arms, condition)
        _accuracies(row[1], arms, condition)
        if condition == CONDITIONS[1]:
            _flips(row[2], arms, condition)
    _rates(axes[0, 2], runs)
    handles = {h.get_label(): h for axis in axes[:, 0] for h in axis.get_legend_handles_labels()[0]}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncol=7, frameon=False
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rewards(axis: Axes, arms: dict[str, list[Run]], condition: str) -> None:
    for arm, runs in _in_order(arms):
        _scatter(axis, arm, runs, "kl", "reward")
        if arm in COLORS:
            chosen = [Point(None), *(p for p in frontier(runs) if p.run is not None)]
            chosen = list(dict.fromkeys(chosen))
            x, y = _means(chosen, "kl"), _means(chosen, "reward")
            axis.plot(x, y, color=COLORS[arm], lw=1.6, zorder=4, label=title(arm))
    axis.plot([], [], "o", color=GREY, ms=4, label="other arms")
    axis.set_xlim(0, KL_SHOWN)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("KL to the reference, nats")
    axis.set_ylabel("reward of samples, minus the reference's, sd")
    axis.set_title(f"{condition} %: learning rates x epochs; line: best at KL <= k", fontsize=9)
    axis.grid(alpha=0.3)


def _accuracies(axis: Axes, arms: dict[str, list[Run]], condition: str) -> None:
    for arm, runs in _in_order(arms):
        color = COLORS.get(arm, GREY)
        for is_epoch, style in STYLES.items():
            ends = [p for run in runs for p in run.ends]
            points = [p for p in ends if p.is_epoch == is_epoch and (is_epoch or p.end == "stop")]
            points.sort(key=lambda point: point.lr)
            lrs = [point.lr for point in points]
            axis.plot(
                lrs,
                _means(points, "accuracy"),
                style,
                color=color,
                marker="o" if arm in COLORS else None,
                ms=4,
                lw=1.8 if arm in COLORS else 0.8,
                zorder=3 if arm in COLORS else 1,
            )
    axis.set_xscale("log")
    axis.set_ylim(bottom=LEAST_ACCURACY[condition])
    axis.set_xlabel("learning rate")
    axis.set_ylabel("clean accuracy")
    axis.set_title(f"{condition} %: last epoch (dashed), stop (solid)", fontsize=9)
    axis.grid(alpha=0.3)


def _flips(axis: Axes, arms: dict[str, list[Run]], condition: str) -> None:
    for arm, runs in _in_order(arms):
        _scatter(axis, arm, runs, "accuracy", "flipped_fitted")
    axis.set_xlim(left=LEAST_ACCURACY[condition])
    axis.set_xlabel("clean accuracy")
    axis.set_ylabel("share of wrong labels fitted")
    axis.set_title(f"{condition} %: learning rates x epochs", fontsize=9)
    axis.grid(alpha=0.3)


def _scatter(axis: Axes, arm: str, runs: list[Run], x: str, y: str) -> None:
    """All learning rates and epochs of an arm; the highlighted ones larger and in front."""
    points = [point for run in runs for point in run.epochs]
    size, order = (16, 3) if arm in COLORS else (7, 1)
    axis.scatter(
        _means(points, x),
        _means(points, y),
        s=size,
        color=COLORS.get(arm, GREY),
        alpha=0.6,
        lw=0,
        zorder=order,
    )


def _rates(axis: Axes, runs: list[Run]) -> None:
    """Estimated against true noise rate, for each seed and learning rate of two arms."""
    for arm, aside in (("A1", -0.004), ("A9", 0.004)):
        found = [run for run in runs if run.arm == arm]
        rate = np.array([r for run in found for r in run.single["noise_rate"].values()])
        estimate = np.array([e for run in found for e in run.single["e_hat"].values()])
        axis.scatter(rate + aside, estimate, s=14, color=COLORS[arm], alpha=0.6, lw=0)
    axis.plot([0, 0.49], [0, 0.49], color="black", lw=0.8)
    axis.fill_between([0, 0.49], [-0.05, 0.44], [0.05, 0.54], color=GREY, alpha=0.4, lw=0)
    axis.set_xlim(-0.02, 0.5)
    axis.set_ylim(-0.02, 0.5)
    axis.set_xlabel("share of wrong labels")
    axis.set_ylabel("estimate after the first epoch")
    axis.set_title("noise rate, all conditions, learning rates, seeds; band: 0.05", fontsize=9)
    axis.grid(alpha=0.3)


def _in_order(arms: dict[str, list[Run]]) -> list[tuple[str, list[Run]]]:
    """Grey ones first; the first of `COLORS` last, so that it is on top where some coincide."""
    places = {arm: -place for place, arm in enumerate(COLORS)}
    return sorted(arms.items(), key=lambda item: places.get(item[0], -len(COLORS)))


def _means(points: list[Point], metric: str) -> list[float]:
    """Over the seeds that are reported."""
    return [
        0.0 if point.run is None else point.mean(metric, reported([point])[0]) for point in points
    ]
