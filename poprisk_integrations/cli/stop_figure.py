"""The picture of a stop: what the gradients said, window by window."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from poprisk_integrations.cli.report.draw import plain_log_ticks
from poprisk_integrations.cli.report.stop_file import middle_step, stop_record

__all__ = ["draw_stop"]

# Okabe-Ito: distinct also to the colour-blind and in grey.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#555555"


def draw_stop(report: Mapping[str, Any], title: str) -> Figure:
    """F over the steps with onset and stop, and below it what tells the reasons apart.

    A window stands at its middle, so that F falls below the threshold where the onset is drawn.

    Args:
        report: Content of `poprisk_stop.json`, with at least one window in its history.
        title: First line of the picture; then the reason and how sure it is.
    """
    history: Sequence[Mapping[str, Any]] = report["history"]
    record = stop_record(report)
    steps = [middle_step(row) for row in history]
    figure = Figure(figsize=(8.0, 6.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[2, 1, 1])
    ratio, error = _column(history, "signal_ratio"), _column(history, "signal_ratio_se")
    low = [max(r - e, 1e-3) for r, e in zip(ratio, error, strict=True)]
    high = [r + e for r, e in zip(ratio, error, strict=True)]
    top.fill_between(steps, low, high, color=_BLUE, alpha=0.15, lw=0, label="one standard error")
    top.plot(steps, ratio, color=_BLUE, marker="o", ms=3, label="F of a window")
    top.axhline(record.threshold, color=_GREY, lw=0.8)
    top.set_yscale("log")
    _limit(top, [record.threshold, *ratio, *high])
    plain_log_ticks(top.yaxis)
    top.set_ylabel("how far batches\nagree (F)")
    _band(middle, steps, history, "risk_decrease", _GREEN)
    middle.set_ylabel("gain of the\nlast step (C)")
    _band(bottom, steps, history, "agreement", _ORANGE)
    bottom.set_ylabel("agreement of\nbatches (U)")
    bottom.set_xlabel("optimizer step")
    for axis in (top, middle, bottom):
        for kind, at, color, dashes in (
            ("onset", record.onset_at, _GREY, ":"),
            ("stop", record.stop_step, _ORANGE, "--"),
        ):
            if at is not None:
                axis.axvline(at, color=color, ls=dashes, label=f"{kind} (step {at:.0f})")
        axis.grid(alpha=0.3)
    top.set_xlim(left=0)
    top.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="upper right")
    figure.suptitle(f"{title}\n{_wrapped(record.verdict)}", fontsize=9, ha="left", x=0.02)
    return figure


def _limit(axis: Any, values: Sequence[float]) -> None:
    """Room below the smallest and above the largest; nothing at 0, which a logarithm has not."""
    drawn = [value for value in values if math.isfinite(value) and value > 0]
    axis.set_ylim(0.5 * min(drawn), 1.5 * max(drawn))


def _band(axis: Any, steps: Sequence[float], rows: Sequence[Any], name: str, color: str) -> None:
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
