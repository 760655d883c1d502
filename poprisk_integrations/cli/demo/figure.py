"""The picture of a demo: what happens over the steps, and what remains over learning rates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from poprisk_integrations.cli.demo.dpo_runs import OPTIMIZERS, RunResult

__all__ = ["COLORS", "draw", "save_figure"]

# Okabe-Ito: distinct also to the colour-blind and in grey.
COLORS = {"AdamW": "#D55E00", "PopRiskAdamW": "#0072B2"}
_ROWS = (
    ("accuracy", "clean held-out accuracy"),
    ("swapped_fitted", "swapped labels fitted"),
    ("drift", "drift from the reference"),
)
_GREY = "#555555"


def draw(runs: Sequence[RunResult], default_lr: float, subtitle: str) -> Figure:
    """Three measures (rows) over steps per learning rate, and at the end over learning rates.

    Args:
        runs: One per optimizer and learning rate.
        default_lr: Marked in the titles.
        subtitle: One line under the title.
    """
    rates = sorted({run.learning_rate for run in runs})
    layout = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 0.905), w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(3.1 * (len(rates) + 1) + 0.8, 9.2), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(_ROWS), len(rates) + 1, sharey="row", squeeze=False)
    for row, (metric, label) in enumerate(_ROWS):
        for column, rate in enumerate(rates):
            _draw_steps(axes[row][column], [r for r in runs if r.learning_rate == rate], metric)
        _draw_rates(axes[row][-1], runs, metric, rates)
        axes[row][0].set_ylabel(label, fontsize=11)
        if metric == "swapped_fitted":
            axes[row][0].set_ylim(0.0, 1.04)
        elif metric == "drift":
            axes[row][0].set_ylim(bottom=0.0)
    for column, rate in enumerate(rates):
        name = f"learning rate {rate:.3g}" + (" (default)" if rate == default_lr else "")
        axes[0][column].set_title(name, fontsize=11, pad=8)
        axes[-1][column].set_xlabel("optimizer steps")
    axes[0][-1].set_title("at the last step", fontsize=11, pad=8)
    axes[-1][-1].set_xlabel("learning rate")
    _decorate(figure, runs, subtitle)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    figure.savefig(path, format="png", facecolor="white")


def _draw_steps(axis: Any, runs: Sequence[RunResult], metric: str) -> None:
    for run in runs:
        color = COLORS[run.optimizer]
        steps = [point.step for point in run.points]
        values = [getattr(point, metric) for point in run.points]
        cut = len(steps) if run.stop_step is None else steps.index(run.stop_step) + 1
        axis.plot(steps[:cut], values[:cut], color=color, linewidth=2.2, marker="o", markersize=3)
        if cut < len(steps):
            axis.plot(
                steps[cut - 1 :],
                values[cut - 1 :],
                color=color,
                linewidth=1.6,
                linestyle=(0, (2, 2)),
            )
        if run.stop_step is not None:
            axis.plot(
                [steps[cut - 1]], [values[cut - 1]], color="white", marker="s", markersize=9,
                markeredgecolor=color, markeredgewidth=2.2, zorder=5,
            )  # fmt: skip
    axis.set_xlim(left=0)
    _plain(axis)


def _draw_rates(axis: Any, runs: Sequence[RunResult], metric: str, rates: Sequence[float]) -> None:
    for optimizer in OPTIMIZERS:
        ends = sorted(
            (run.learning_rate, getattr(run.points[-1], metric))
            for run in runs
            if run.optimizer == optimizer
        )
        axis.plot(
            *zip(*ends, strict=True),
            color=COLORS[optimizer],
            linewidth=2.2,
            marker="o",
            markersize=7,
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(rates)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{rate:.3g}" for rate in rates])
    axis.set_xlim(rates[0] / 1.5, rates[-1] * 1.5)
    axis.set_facecolor("#F4F4F4")
    _plain(axis)


def _plain(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=9.5)


def _decorate(figure: Figure, runs: Sequence[RunResult], subtitle: str) -> None:
    figure.text(0.012, 0.975, "DPO with swapped labels: AdamW and PopRiskAdamW",
                fontsize=15, fontweight="bold", va="center")  # fmt: skip
    figure.text(0.012, 0.944, subtitle, fontsize=10, color=_GREY, va="center")
    handles = [Line2D([], [], color=COLORS[name], linewidth=2.6, label=name) for name in OPTIMIZERS]
    if any(run.stop_step is not None for run in runs):
        handles += [
            Line2D([], [], color=_GREY, marker="s", markersize=8, markerfacecolor="white",
                   markeredgewidth=2, linestyle="none", label="the stop"),
            Line2D([], [], color=_GREY, linestyle=(0, (2, 2)), label="without the stop"),
        ]  # fmt: skip
    else:
        handles.append(Line2D([], [], linestyle="none", label="(the stop ended no run)"))
    figure.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(0.995, 0.998), ncols=len(handles),
        frameon=False, fontsize=10.5, columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip
