"""Pictures that every gate study draws alike."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from gate_harness.scores import RANGE

__all__ = ["draw_rates", "style_of"]

Trace = dict[str, np.ndarray]
COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
DASHES = ("-", "--", ":", "-.")


def style_of(place: int) -> dict:
    """Colour and dash of the arm at this place; tells apart up to 32."""
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
    }


def draw_rates(
    traces: dict[str, Trace],
    metric: str,
    path: Path,
    *,
    higher: bool,
    label: str,
    conditions: Sequence[str] | None = None,
    log: bool = False,
) -> None:
    """Metric at the end against learning rate, and over training at each arm's best rate.

    One column for each condition; of several decays the best at each rate. Bands: plus and minus
    one standard error over seeds. The grey band is the range of the scores.
    """
    first = next(iter(traces.values()))
    conditions = list(conditions or dict.fromkeys(first["condition"].tolist()))
    fig, axes = plt.subplots(
        2, len(conditions), figsize=(1.5 + 3.6 * len(conditions), 7), squeeze=False, dpi=120
    )
    for column, condition in enumerate(conditions):
        upper, lower = axes[0][column], axes[1][column]
        for place, (arm, trace) in enumerate(traces.items()):
            _draw_arm(upper, lower, trace, metric, condition, higher, arm, style_of(place))
        upper.axvspan(min(RANGE), max(RANGE), color="0.93", zorder=0)
        upper.set(xscale="log", xlabel="learning rate", title=condition or None)
        lower.set(xlabel="step")
        for axis in (upper, lower):
            axis.grid(color="0.9")
            if log:
                axis.set_yscale("log")
    axes[0][0].set_ylabel(f"{label}, at the end")
    axes[1][0].set_ylabel(f"{label}, best rate")
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False)
    fig.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def _draw_arm(upper, lower, trace, metric, condition, higher, arm, style) -> None:
    chosen = trace["condition"] == condition
    best_curve, best_end, points = None, None, []
    for lr in sorted(set(trace["lr"][chosen].tolist())):
        ends = []
        for decay in sorted(set(trace["weight_decay"][chosen].tolist())):
            here = chosen & (trace["lr"] == lr) & (trace["weight_decay"] == decay)
            curves = trace[metric][:, here].astype(np.float64)
            curves[-1, trace["diverged"][here]] = curves[0, trace["diverged"][here]]
            if not np.isfinite(curves[-1]).all():
                curves[-1] = curves[0]
            ends.append((curves[-1].mean(), curves))
        pick = max if higher else min
        end, curves = pick(ends, key=lambda pair: pair[0])
        points.append((lr, end, curves[-1].std() / max(1, curves.shape[1] - 1) ** 0.5))
        if best_end is None or (end > best_end if higher else end < best_end):
            best_end, best_curve = end, curves
    lrs, ends, errors = map(np.array, zip(*points, strict=True))
    upper.plot(lrs, ends, marker=".", label=arm, **style)
    upper.fill_between(lrs, ends - errors, ends + errors, color=style["color"], alpha=0.12, lw=0)
    lower.plot(trace["eval_step"], np.nanmean(best_curve, 1), **style)
