"""The picture of a probe: SNRs, what each alpha lets pass, and the noise scale."""

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from poprisk_integrations.cli.probe.advice import noise_scale_text
from poprisk_integrations.cli.probe.report import OptimizerReport, ProbeReport
from poprisk_integrations.diagnostics.gradient_probe import GradientProbe
from poprisk_integrations.diagnostics.snr_distribution import SNR_GRID

__all__ = ["draw_probe"]

# Okabe-Ito: distinct also to the colour-blind and in grey.
_PRESET_COLORS = ("#D55E00", "#0072B2", "#56B4E9", "#CC79A7")
_GREY, _GREEN, _YELLOW = "#555555", "#009E73", "#E69F00"


def draw_probe(report: ProbeReport) -> Figure:
    """One row of three panels per optimizer, its advice above it.

    Args:
        report: What was found.
    """
    count = len(report.optimizers)
    figure = Figure(figsize=(13.0, 5.4 * count), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(count, 1, squeeze=False)[:, 0]
    for row, optimizer in zip(rows, report.optimizers, strict=True):
        left, middle, right = row.subplots(1, 3, width_ratios=[5, 4.4, 2.6])
        _snr(left, optimizer.probe)
        _presets(middle, optimizer.probe)
        _scale(right, optimizer.probe)
        row.suptitle(_title(report, optimizer), fontsize=9, ha="left", x=0.01, parse_math=False)
    return figure


def _title(report: ProbeReport, optimizer: OptimizerReport) -> str:
    head = (
        f"{report.source}: {optimizer.name}, {optimizer.parameters:,} parameters, "
        f"{optimizer.probe.steps} steps"
    )
    return "\n".join([head, *(line for s in optimizer.advice for line in _wrapped(s))])


def _snr(axis: Any, probe: GradientProbe) -> None:
    """Share of coordinates above each SNR, per group; where each alpha opens."""
    shown = [group for group in probe.groups if group.snr is not None]
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    grid = SNR_GRID.numpy()[1:]
    for group, color in zip(shown, colors, strict=True):
        assert group.snr is not None
        above = group.snr.shares.flip(0).cumsum(0).flip(0).numpy()[1:]
        axis.step(grid, 100 * above, where="pre", color=color, lw=1.4, label=group.name)
    openings = [
        axis.axvline(preset.half_open_snr, color=color, ls="--", lw=1.2, label=preset.name)
        for preset, color in zip(probe.presets, _PRESET_COLORS, strict=False)
    ]
    axis.set_xscale("log")
    axis.set_xlim(grid[0], 5)
    axis.set_ylim(0, 101)
    axis.set_xlabel("per-batch SNR, scatter taken off; dashed: open half of the time")
    axis.set_ylabel("% of the coordinates above it")
    axis.grid(alpha=0.3)
    style = {"fontsize": 7, "frameon": False, "columnspacing": 1.2, "handlelength": 1.6}
    above = axis.legend(handles=openings, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, **style)
    axis.add_artist(above)
    lines = [line for line in axis.get_lines() if line not in openings]
    columns = 1 + (len(lines) > 16)
    axis.legend(handles=lines, loc="upper right", fontsize=7, framealpha=0.85, ncols=columns)


def _presets(axis: Any, probe: GradientProbe) -> None:
    """Pure noise, expected, measured and signal kept, side by side for each alpha."""
    bars = {
        "pure noise": (_GREY, [p.noise_open for p in probe.presets]),
        "expected here": ("#0072B2", [p.expected_open for p in probe.presets]),
        "measured": ("#56B4E9", [p.measured.open_fraction for p in probe.presets]),
        "signal kept": (_GREEN, [p.signal_kept for p in probe.presets]),
    }
    place = np.arange(len(probe.presets))
    for i, (name, (color, values)) in enumerate(bars.items()):
        heights = [0.0 if math.isnan(v) else 100 * v for v in values]
        drawn = axis.bar(place + 0.2 * (i - 1.5), heights, 0.19, color=color, label=name)
        axis.bar_label(drawn, [f"{h:.0f}" if h >= 1 else "" for h in heights], fontsize=6)
    axis.set_xticks(
        place,
        [f"{p.name.replace(' ', chr(10), 1)}\n{p.verdict}" for p in probe.presets],
        fontsize=8,
    )
    axis.set_ylim(0, 118)
    axis.set_ylabel("% that pass")
    axis.legend(fontsize=7, frameon=False, loc="upper center", ncols=4, columnspacing=1)
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)


def _scale(axis: Any, probe: GradientProbe) -> None:
    """Noise scale with its range, beside batch and data set."""
    unit = probe.batch_size or 1
    scale = probe.total.scale
    low, high = (unit * x for x in scale.interval())
    known = [x for x in (unit * scale.batches, low, high, unit, probe.dataset_size) if x]
    finite = [float(x) for x in known if math.isfinite(x)]
    bottom, top = min(finite) / 4, max(finite) * 4
    if math.isfinite(low):
        axis.fill_between([0.1, 0.4], low, min(high, top), color=_YELLOW, alpha=0.35, lw=0)
    if scale.is_significant() and scale.batches > 0:
        axis.hlines(unit * scale.batches, 0.1, 0.4, color=_YELLOW, lw=3)
    batch = f"batch {unit:,}" if probe.batch_size else "one batch"
    data = probe.dataset_size or 0
    for name, value in ((batch, unit), (f"data set {data:,}", data)):
        if value:
            axis.axhline(value, color=_GREY, ls=":")
            axis.annotate(
                name, (0.98, value), xycoords=("axes fraction", "data"), xytext=(0, 2),
                textcoords="offset points", fontsize=8, color=_GREY, ha="right",
            )  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylim(bottom, top)
    axis.set_xlim(0, 1)
    axis.set_xticks([])
    axis.set_ylabel("examples" if probe.batch_size else "batches")
    axis.set_title(f"noise scale (+- 2 se)\n{noise_scale_text(probe)}", fontsize=8)
    axis.grid(alpha=0.3, axis="y")


def _wrapped(text: str, width: int = 185) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
