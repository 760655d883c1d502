"""How soon the error is small: error over iterations, and iterations of each seed."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from crossing import LEVEL
from gate_harness.figures import style_of

__all__ = ["draw_crossing"]

Trace = dict[str, np.ndarray]


def draw_crossing(traces: dict[str, Trace], scores: Sequence[dict], path: Path) -> None:
    """One column for each condition.

    Above: median error over seeds, each at the rate that is best for the others' iterations.
    Below: iterations of each seed until the error is at most `LEVEL`; hollow = never, at the end.
    """
    conditions = list(dict.fromkeys(row["condition"] for row in scores))
    fig, axes = plt.subplots(
        2, len(conditions), figsize=(2 + 4.4 * len(conditions), 8), squeeze=False, dpi=120
    )
    for column, condition in enumerate(conditions):
        upper, lower = axes[0][column], axes[1][column]
        for place, (arm, trace) in enumerate(traces.items()):
            rows = [r for r in scores if r["arm"] == arm and r["condition"] == condition]
            curves = [_curve(trace, condition, row) for row in rows]
            upper.plot(
                trace["eval_step"], np.median(curves, 0), label=arm, lw=1.1, **style_of(place)
            )
            colour = style_of(place)["color"]
            for row in rows:
                fill = "none" if int(row["first_never"]) else colour
                lower.scatter(row["first"], place, s=24, facecolors=fill, edgecolors=colour)
        upper.axhline(LEVEL, color="0.5", lw=0.8)
        upper.set(title=condition, xlabel="iteration", yscale="log")
        lower.set(xscale="log", xlabel=f"iterations to an error of {LEVEL:g}", xlim=(90, 2300))
        lower.minorticks_off()
        ticks = [100, 200, 500, 1000, 2000]
        lower.set_xticks(ticks, [str(tick) for tick in ticks])
        lower.set_yticks(range(len(traces)), list(traces) if column == 0 else [])
        lower.invert_yaxis()
        for axis in (upper, lower):
            axis.grid(color="0.9")
            axis.set_axisbelow(True)
    axes[0][0].set_ylabel("relative l2 error, median")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False)
    fig.set_layout_engine("constrained")
    fig.savefig(path)
    plt.close(fig)


def _curve(trace: Trace, condition: str, row: dict) -> np.ndarray:
    here = (trace["condition"] == condition) & (trace["seed"] == int(row["seed"]))
    (m,) = np.flatnonzero(here & np.isclose(trace["lr"], float(row["first_lr"])))
    return trace["error"][:, m]
