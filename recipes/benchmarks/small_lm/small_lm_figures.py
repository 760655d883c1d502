"""Training loss, open fraction and step length over training, at the same rate for all arms."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from gate_harness.figures import style_of

__all__ = ["draw_training", "gate_rows"]

Trace = dict[str, np.ndarray]
SHOWN_LR = 1e-3
WINDOW = 16  # steps of a mean


def gate_rows(traces: dict[str, Trace]) -> list[dict]:
    """For each arm and rate, over seeds: open fraction and step length at moments of the run.

    The step length is that of the update in units of the learning rate, relative to AdamW's at
    the same rate, seed and step (1 where AdamW was not run). An open fraction counts coordinates
    that move at all: one for gates that only shrink.
    """
    rows = []
    for arm, trace in traces.items():
        for lr in dict.fromkeys(trace["lr"].tolist()):
            share, length = _curves(traces, arm, lr)
            row = {"arm": arm, "lr": f"{lr:g}"}
            marks = np.unique(np.linspace(0, len(share) - 1, 7).round().astype(int)[1:])
            for at in marks:
                row[f"open_{at + 1}"] = f"{share[at]:.4f}"
            for at in marks:
                row[f"length_{at + 1}"] = f"{length[at]:.4f}"
            rows.append(row)
    return rows


def draw_training(traces: dict[str, Trace], path: Path) -> None:
    """Three panels: training loss, open fraction, step length."""
    fig, axes = plt.subplots(1, 3, figsize=(13, 4), dpi=120)
    for place, (arm, trace) in enumerate(traces.items()):
        style = style_of(place)
        here = np.isclose(trace["lr"], SHOWN_LR)
        axes[0].plot(trace["eval_step"], trace["train_loss"][:, here].mean(1), label=arm, **style)
        share, length = _curves(traces, arm, SHOWN_LR)
        steps = np.arange(1, len(share) + 1)
        axes[1].plot(steps, share, **style)
        axes[2].plot(steps, length, **style)
    titles = ("training loss (nats)", "share of coordinates that move", "step length over AdamW's")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="step", title=title)
        axis.grid(color="0.9")
    axes[2].set_yscale("log")
    fig.suptitle(f"learning rate {SHOWN_LR:g}")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    fig.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def _curves(traces: dict[str, Trace], arm: str, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds and the last steps, each of shape (T,)."""
    trace = traces[arm]
    here = np.isclose(trace["lr"], lr)
    base = traces.get("AdamW", trace)
    there = np.isclose(base["lr"], lr) & np.isin(base["seed"], trace["seed"])
    assert trace["seed"][here].tolist() == base["seed"][there].tolist()
    share = trace["moved_share"][:, here]
    norm, whole = trace["update_norm"][:, here], base["update_norm"][:, there]
    length = norm / whole if base is not trace else np.ones_like(norm)
    return _smooth(share.mean(1)), _smooth(length.mean(1))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of this step and up to `WINDOW` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values.astype(np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - WINDOW)
    return (sums[ends] - sums[starts]) / (ends - starts)
