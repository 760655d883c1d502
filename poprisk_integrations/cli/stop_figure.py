"""The picture of a stop: what the gradients said, window by window."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_stop"]

# Okabe-Ito: distinct also to the colour-blind and in grey.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


def draw_stop(report: Mapping[str, Any], title: str) -> Figure:
    """F over the steps with onset and stop, and below it what tells the reasons apart.

    Args:
        report: Content of `poprisk_stop.json`, with at least one window in its history.
        title: First line of the picture; the second is the reason.
    """
    history: Sequence[Mapping[str, Any]] = report["history"]
    steps = [row["step"] for row in history]
    figure = Figure(figsize=(8.0, 6.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    ratio, error = _column(history, "signal_ratio"), _column(history, "signal_ratio_se")
    low = [max(r - e, 1e-3) for r, e in zip(ratio, error, strict=True)]
    high = [r + e for r, e in zip(ratio, error, strict=True)]
    top.fill_between(steps, low, high, color=_BLUE, alpha=0.15, lw=0, label="one standard error")
    top.plot(steps, ratio, color=_BLUE, marker="o", ms=3, label="F of a window")
    top.axhline(1.0, color=_GREY, lw=0.8)
    top.set_yscale("log")
    floor = min((value for value in ratio if value > 0 or math.isnan(value)), default=1.0)
    top.set_ylim(bottom=0.5 * min(floor, 1.0) if math.isfinite(floor) else None)
    top.set_ylabel("signal / noise (F)")
    _band(middle, steps, history, "risk_decrease", _GREEN)
    middle.set_ylabel("gain of the\nlast step (C)")
    _band(bottom, steps, history, "agreement", _ORANGE)
    bottom.set_ylabel("agreement of\nbatches (U)")
    bottom.set_xlabel("optimizer step")
    for axis in (top, middle, bottom):
        if report.get("onset_step") is not None:
            axis.axvline(report["onset_step"], color=_GREY, ls=":", label="onset")
        if report.get("stop_step") is not None:
            axis.axvline(report["stop_step"], color=_ORANGE, ls="--", label="stop")
        axis.grid(alpha=0.3)
    top.legend(fontsize=8, frameon=False, loc="upper right")
    reason = str(report.get("reason", ""))
    figure.suptitle(f"{title}\n{_wrapped(reason)}", fontsize=9, ha="left", x=0.02)
    return figure


def _band(axis: Any, steps: Sequence[int], rows: Sequence[Any], name: str, color: str) -> None:
    values, errors = _column(rows, name), _column(rows, f"{name}_se")
    low = [v - e for v, e in zip(values, errors, strict=True)]
    high = [v + e for v, e in zip(values, errors, strict=True)]
    axis.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
    axis.plot(steps, values, color=color, marker="o", ms=3)
    axis.axhline(0.0, color=_GREY, lw=0.8)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]


def _wrapped(text: str, width: int = 110) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
