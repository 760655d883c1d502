"""The table of a demo with the sentences under it, and its picture."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from poprisk_integrations.cli.demo.findings import Arm
from poprisk_integrations.cli.demo.runs import RunResult

__all__ = ["draw", "print_results"]

# Okabe-Ito: distinct also to the colour-blind and in grey.
_COLORS = {"AdamW": "#D55E00", "PopRiskAdamW": "#0072B2"}
_GREY = "#555555"
_DASHES = (0, (2, 2))
_SQUARE: dict[str, Any] = {"marker": "s", "markerfacecolor": "white", "markeredgewidth": 2.2}
_ROWS = (
    ("accuracy", "clean held-out accuracy"),
    ("swapped_fitted", "swapped labels fitted"),
    ("drift", "drift from the reference"),
)


def print_results(
    console: Console, title: str, arms: Sequence[Arm], default_lr: float, sentences: Sequence[str]
) -> None:
    """Print the table, a line between learning rates, its definitions and the findings."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("lr", "optimizer", "stop"):
        table.add_column(name, no_wrap=True)
    for name in ("steps", "accuracy", "swapped\nfitted", "clean\nfitted", "drift"):
        table.add_column(name, justify="right", no_wrap=True)
    for rate in sorted({arm.learning_rate for arm in arms}):
        for index, arm in enumerate(arm for arm in arms if arm.learning_rate == rate):
            mark = "*" if rate == default_lr else ""
            table.add_row(
                f"{rate:.3g}{mark}" if index == 0 else "",
                arm.optimizer,
                "off" if not arm.stop else ("ended it" if arm.stopped else "not due"),
                str(arm.steps),
                f"{arm.accuracy:.3f}",
                f"{arm.swapped_fitted:.2f}",
                f"{arm.clean_fitted:.2f}",
                f"{arm.drift:.2f}",
            )
        table.add_section()
    console.print(table)
    console.print(
        "*: the default. accuracy: share of the held-out pairs, none swapped, whose human "
        "continuation the policy prefers more than the reference does; ties count half. Its "
        f"standard error is up to {max(arm.accuracy_se for arm in arms):.3f}. fitted: training "
        "pairs ranked as their label says, wrong (swapped) or right (clean). drift: mean of "
        "|beta log(policy/reference)| over held-out continuations. stop: by the signal "
        "ratio (criterion='signal'); a stopped run is the beginning of the run without it, so both "
        "are read off one run.",
        style="dim",
    )
    for sentence in sentences:
        console.print(f"\n\u2022 {sentence}", highlight=False)


def draw(runs: Sequence[RunResult], default_lr: float, subtitle: str) -> Figure:
    """Three measures (rows) over steps per learning rate, and at the end over learning rates."""
    rates = sorted({run.learning_rate for run in runs})
    layout = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 0.905), w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(3.1 * (len(rates) + 1) + 0.8, 9.2), dpi=130, layout=layout)
    axes = figure.subplots(len(_ROWS), len(rates) + 1, sharey="row", squeeze=False)
    for row, (metric, label) in zip(axes, _ROWS, strict=True):
        for axis, rate in zip(row, rates, strict=False):
            _draw_steps(axis, [run for run in runs if run.learning_rate == rate], metric)
        _draw_rates(row[-1], runs, metric, rates)
        row[0].set_ylabel(label, fontsize=11)
        if metric == "swapped_fitted":
            row[0].set_ylim(0.0, 1.04)
        elif metric == "drift":
            row[0].set_ylim(bottom=0.0)
    for column, rate in enumerate(rates):
        name = f"learning rate {rate:.3g}" + (" (default)" if rate == default_lr else "")
        axes[0][column].set_title(name, fontsize=11, pad=8)
        axes[-1][column].set_xlabel("optimizer steps")
    axes[0][-1].set_title("at the last step", fontsize=11, pad=8)
    axes[-1][-1].set_xlabel("learning rate")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9.5)
    figure.text(0.012, 0.975, "DPO with swapped labels: AdamW and PopRiskAdamW",
                fontsize=15, fontweight="bold", va="center")  # fmt: skip
    figure.text(0.012, 0.944, subtitle, fontsize=10, color=_GREY, va="center")
    handles = [Line2D([], [], color=color, lw=2.6, label=name) for name, color in _COLORS.items()]
    if any(run.stop_step is not None for run in runs):
        handles += [
            Line2D([], [], color=_GREY, **_SQUARE, markersize=8, ls="none", label="the stop"),
            Line2D([], [], color=_GREY, ls=_DASHES, label="without the stop"),
        ]
    else:
        handles.append(Line2D([], [], ls="none", label="(the stop ended no run)"))
    figure.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(0.995, 0.998), ncols=len(handles),
        frameon=False, fontsize=10.5, columnspacing=1.4, handletextpad=0.5,
    )  # fmt: skip
    return figure


def _draw_steps(axis: Any, runs: Sequence[RunResult], metric: str) -> None:
    """A run, dashed after the square where the stop would have ended it."""
    for run in runs:
        color = _COLORS[run.optimizer]
        steps = [point.step for point in run.points]
        values = [getattr(point, metric) for point in run.points]
        cut = len(steps) if run.stop_step is None else steps.index(run.stop_step) + 1
        axis.plot(steps[:cut], values[:cut], color=color, lw=2.2, marker="o", markersize=3)
        axis.plot(steps[cut - 1 :], values[cut - 1 :], color=color, lw=1.6, ls=_DASHES)
        if run.stop_step is not None:
            at = [steps[cut - 1]], [values[cut - 1]]
            axis.plot(*at, color=color, **_SQUARE, markersize=9, zorder=5)
    axis.set_xlim(left=0)


def _draw_rates(axis: Any, runs: Sequence[RunResult], metric: str, rates: Sequence[float]) -> None:
    for optimizer, color in _COLORS.items():
        ends = {
            run.learning_rate: getattr(run.points[-1], metric)
            for run in runs
            if run.optimizer == optimizer
        }
        axis.plot(rates, [ends[r] for r in rates], color=color, lw=2.2, marker="o", markersize=7)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(rates)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{rate:.3g}" for rate in rates])
    axis.set_xlim(rates[0] / 1.5, rates[-1] * 1.5)
    axis.set_facecolor("#F4F4F4")
