"""What a demo prints, step by step, and its picture."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from poprisk_integrations.cli.check import print_check
from poprisk_integrations.cli.demo.findings import Arm, Comparison
from poprisk_integrations.cli.demo.job import DemoResult
from poprisk_integrations.cli.demo.runs import RunResult
from poprisk_integrations.cli.flips.show import print_pairs
from poprisk_integrations.cli.output import say

__all__ = ["draw", "print_arms", "print_results"]

# Okabe-Ito: distinct also to the colour-blind and in grey.
_COLORS = {"plain": "#D55E00", "held out": "#009E73", "ours": "#0072B2", "folds": "#000000"}
_TRUTH = {"right label": (False, "#BBBBBB"), "swapped label": (True, "#CC79A7")}
_GREY = "#555555"


def print_results(console: Console, result: DemoResult, title: str) -> None:
    """Print the loop: check, suspects, models, what it shows, what one would do now."""
    _head(console, f"1. Check, as `poprisk check` ({title})")
    print_check(console, "the training pairs", result.check, advise=False)
    _head(console, "2. Suspects, as `poprisk clean` finds them (swapped: what the demo knows)")
    examples = result.suspects
    print_pairs(console, examples, examples, swapped=[pair["swapped"] for pair in examples])
    _head(console, "3. Models from these pairs, on held-out pairs with right labels")
    compared = {row["arm"]: row for row in result.record["comparisons"] if row["minus"] == "plain"}
    print_arms(console, result.arms, compared)
    for sentence in result.sentences:
        console.print(f"\u2022 {sentence}\n", highlight=False, markup=False)
    why, commands = result.advice
    _head(console, f"4. On pairs of your own: {why}.")
    for command in commands:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def _head(console: Console, text: str) -> None:
    console.print(text, style="bold", markup=False, highlight=False)


def print_arms(
    console: Console, arms: Mapping[str, Arm], compared: Mapping[str, Mapping[str, Any]]
) -> None:
    """Print the table of models, and its definitions; `compared` are those beside plain."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("price", "accuracy", "minus first", "wrong\nfitted", "right\nfitted"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, arm in arms.items():
        difference = ""
        if key in compared:
            found = Comparison(compared[key]["difference"], compared[key]["standard_error"])
            difference = f"{found.difference:+.3f} \u00b1 {found.standard_error:.3f}"
        table.add_row(
            arm.name,
            f"{arm.trainings:.1f}",
            f"{arm.accuracy:.3f}",
            difference,
            f"{arm.swapped_fitted:.2f}",
            f"{arm.clean_fitted:.2f}",
        )
    console.print(table)
    say(
        console,
        "price: in trainings of the first. accuracy: pairs whose human continuation the\n"
        "policy prefers more than the reference does. fitted: training pairs ranked as\n"
        "their label says, which is wrong or right. \u00b1: standard error, paired by pair.\n",
        style="dim",
    )


def draw(result: DemoResult, subtitle: str) -> Figure:
    """Accuracy and wrong labels fitted over the epochs, and P(wrong) by truth."""
    layout = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 0.86), w_pad=0.1)
    figure = Figure(figsize=(13.0, 4.8), dpi=130, layout=layout)
    accuracy, fitted, suspects = figure.subplots(1, 3)
    _draw_epochs(accuracy, result, "accuracy")
    accuracy.set_title("held-out pairs with right labels, ranked rightly", fontsize=11)
    _draw_epochs(fitted, result, "swapped_fitted")
    fitted.set_title("wrong labels of training pairs that are fitted", fontsize=11)
    fitted.set_ylim(0.0, 1.04)
    fitted.legend(frameon=False, loc="lower right")  # what is fitted rises from a half
    for name, (swapped, color) in _TRUTH.items():
        p = [one["probability_wrong"] for one in result.judged if one["swapped"] is swapped]
        suspects.hist(p, bins=20, range=(0, 1), color=color, alpha=0.75, label=f"{name} ({len(p)})")
    suspects.set_xlabel("P(wrong), by models that never saw the pair")
    suspects.set_ylabel("training pairs")
    suspects.legend(frameon=False)
    told = result.record["noise"]["rate"] is not None
    suspects.set_title("P(wrong)" if told else "P(wrong), a ranking here", fontsize=11)
    for axis in (accuracy, fitted, suspects):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axis.set_axisbelow(True)
    title = "DPO with swapped labels: to the end, with a hold-out, with a stop, from fold models"
    figure.text(0.012, 0.95, title, fontsize=15, fontweight="bold", va="center")
    figure.text(0.012, 0.89, subtitle, fontsize=10, color=_GREY, va="center")
    return figure


def _draw_epochs(axis: Any, result: DemoResult, metric: str) -> None:
    """Lines along the trainings, with a square at the model that is kept; level lines else."""
    for key, arm in result.arms.items():
        run: RunResult = result.runs[key]
        color, kept = _COLORS[key], getattr(arm, metric)
        if not run.points:
            axis.axhline(kept, color=color, lw=2.0, ls=(0, (4, 2)), label=arm.name)
            continue
        values = [getattr(point, metric) for point in run.points]
        axis.plot(range(len(values)), values, color=color, lw=2.0, marker="o", ms=3, label=arm.name)
        steps = [point.step for point in run.points]
        epoch = steps.index(run.end.step) if run.end.step in steps else len(steps) - 1
        square = {"marker": "s", "markerfacecolor": "white", "markeredgewidth": 2.0}
        axis.plot([epoch], [kept], color=color, markersize=8, ls="none", zorder=5, **square)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epochs (squares: the models that are kept)")
