"""Pictures: accuracy against rate, differences to AdamW, the routers' jumps."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from gate_harness.arms import GATES
from gate_harness.figures import style_of
from gate_harness.scores import RANGE
from hurt_verdict import MARGIN
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from remedies import REMEDIES
from toy import Toy

__all__ = ["draw_hurt", "draw_jumps"]

Trace = dict[str, np.ndarray]
MARKS = {"": "o", "no_gate": "s", "blend": "^", "warmup": "v", "norm": "x"}
LABELS = {"": "gate", "norm": "AdamW, step as short"}


def draw_hurt(
    toys: Sequence[Toy], traces: dict[str, dict[str, Trace]], summary: list[dict], path: Path
) -> None:
    """Upper row: accuracy at the end against rate. Lower: tuned accuracy relative to AdamW.

    Args:
        toys: One column each.
        traces: By toy and arm.
        summary: Rows of `summarise`.
        path: Of the PNG.
    """
    fig, axes = plt.subplots(2, len(toys), figsize=(4 * len(toys), 8.2), squeeze=False, dpi=120)
    gates = [arm for arm in traces[toys[0].name] if arm in GATES]
    for column, toy in enumerate(toys):
        upper, lower = axes[0][column], axes[1][column]
        for place, arm in enumerate(gates):
            _draw_rates(upper, traces[toy.name][arm], arm, style_of(place))
        upper.axvspan(min(RANGE), max(RANGE), color="0.93", zorder=0)
        upper.set(xscale="log", xlabel="learning rate", title=toy.title)
        upper.grid(color="0.9")
        _draw_differences(lower, [r for r in summary if r["task"] == toy.name], gates[1:])
        if column:
            lower.set_yticklabels([])
    axes[0][0].set_ylabel("held-out accuracy at the end")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    marks = [
        Line2D(
            [],
            [],
            color="0.2",
            marker=mark,
            mfc="w" if kind else "0.2",
            ls="",
            label=LABELS.get(kind, kind),
        )
        for kind, mark in MARKS.items()
    ]
    fig.legend(handles=marks, loc="outside right lower", frameon=False)
    fig.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def _draw_rates(axis: Axes, trace: Trace, arm: str, style: dict) -> None:
    lrs = np.unique(trace["lr"])
    ends = np.stack([trace["accuracy"][-1, trace["lr"] == lr] for lr in lrs])
    error = ends.std(1) / max(1, ends.shape[1] - 1) ** 0.5
    axis.plot(lrs, ends.mean(1), marker=".", label=arm, **style)
    axis.fill_between(
        lrs, ends.mean(1) - error, ends.mean(1) + error, color=style["color"], alpha=0.12, lw=0
    )


def _draw_differences(axis: Axes, summary: list[dict], gates: Sequence[str]) -> None:
    """One line for each gate; its remedies and its control below it."""
    found = {row["arm"]: row for row in summary}
    for line, gate in enumerate(gates):
        for below, kind in enumerate(("", *REMEDIES, "norm")):
            row = found.get(f"{kind}({gate})" if kind else gate)
            if row is None:
                continue
            mean, low, high = (
                100 * float(row[f"tuned vs AdamW{part}"]) for part in ("", " low", " high")
            )
            y = -line - 0.16 * (below - 2)
            colour = style_of(line + 1)["color"]
            axis.plot([low, high], [y, y], color=colour, lw=1.2)
            axis.plot(mean, y, MARKS[kind], color=colour, ms=5, mfc="w" if kind else colour)
    axis.axvline(0, color="0.2", lw=0.8)
    axis.axvline(-100 * MARGIN, color="0.2", lw=0.8, ls=":")
    axis.set_xscale("symlog", linthresh=2)
    axis.set_xticks([-30, -10, -3, -1, 0, 1], ["-30", "-10", "-3", "-1", "0", "1"])
    axis.minorticks_off()
    axis.set_yticks([-i for i in range(len(gates))], gates)
    axis.set(xlabel="tuned accuracy against AdamW, %", ylim=(0.6 - len(gates), 0.6), xlim=(-60, 2))
    axis.grid(axis="x", color="0.9")


def draw_jumps(
    toys: Sequence[Toy],
    traces: dict[str, dict[str, Trace]],
    lr: dict[str, float],
    arms: Sequence[str],
    path: Path,
) -> None:
    """The probe over training at one rate, one line for each seed.

    Args:
        toys: Those with a jump.
        traces: By toy and arm.
        lr: Rate of each toy.
        arms: One column each.
        path: Of the PNG.
    """
    fig, axes = plt.subplots(
        len(toys), len(arms), figsize=(2.4 * len(arms), 2.6 * len(toys)), squeeze=False, dpi=120
    )
    for line, toy in enumerate(toys):
        assert toy.jump is not None
        for column, arm in enumerate(arms):
            axis, trace = axes[line][column], traces[toy.name][arm]
            here = np.isclose(trace["lr"], lr[toy.name])
            axis.plot(trace["eval_step"], trace["probe"][:, here], color="#0072b2", lw=0.9)
            axis.axhline(toy.jump, color="0.2", lw=0.8, ls=":")
            axis.set(ylim=(-0.02, 0.95 if toy.jump > 0.3 else 0.7), title="" if line else arm)
            axis.grid(color="0.9")
            if line == len(toys) - 1:
                axis.set_xlabel("step")
            if column:
                axis.set_yticklabels([])
        axes[line][0].set_ylabel(f"{toy.title}\nprobe, rate {lr[toy.name]:g}")
    fig.set_layout_engine("constrained")
    fig.savefig(path)
    plt.close(fig)
