"""The picture of the choice: each arm against AdamW, tuned and over the range."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw"]

COLOURS = {
    "sparse_signal": "#0072b2",
    "noisy_labels": "#d55e00",
    "small_lm": "#009e73",
    "pinn": "#cc79a7",
    "inr": "#e69f00",
}


def draw(rows: list[dict], path: Path) -> None:
    """Upper panels: selection seeds; lower: fresh ones. A dot for each study, bars are 95 %."""
    stages = [s for s in ("selection", "confirmation") if any(r["stage"] == s for r in rows)]
    arms = {s: list(dict.fromkeys(r["arm"] for r in rows if r["stage"] == s)) for s in stages}
    heights = [1.5 + len(arms[stage]) for stage in stages]
    fig, axes = plt.subplots(
        len(stages),
        2,
        figsize=(11, 1.5 + 0.33 * sum(heights)),
        squeeze=False,
        dpi=120,
        gridspec_kw={"height_ratios": heights},
    )
    for line, stage in enumerate(stages):
        for column, score in enumerate(("tuned", "range")):
            _panel(axes[line][column], rows, stage, score, arms[stage])
        axes[line][1].set_yticklabels([])
    handles, labels = axes[0][0].get_legend_handles_labels()
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles, labels = [*handles, handle], [*labels, label]
    fig.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    fig.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def _panel(axis, rows: list[dict], stage: str, score: str, arms: list[str]) -> None:
    studies = [name for name in COLOURS if any(r["study"] == name for r in rows)]
    for row in rows:
        if row["stage"] != stage or row["study"] not in COLOURS:
            continue
        place = studies.index(row["study"])
        y = arms.index(row["arm"]) + 0.14 * (place - (len(studies) - 1) / 2)
        mean, low, high = (100 * float(row[score + end]) for end in ("", "_low", "_high"))
        axis.errorbar(
            mean,
            y,
            xerr=[[mean - low], [high - mean]],
            fmt="o",
            markersize=3.5,
            linewidth=1,
            color=COLOURS[row["study"]],
            label=row["study"] if row["arm"] == arms[0] else None,
        )
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(
        yticks=range(len(arms)),
        yticklabels=arms,
        ylim=(len(arms) - 0.4, -0.6),
        title=f"{stage}: {score}",
        xlabel="better than AdamW by, % (linear within 1 %)",
    )
    axis.grid(axis="x", color="0.9")
