"""The tables of a probe with the sentences under them, and its picture."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from poprisk_integrations.cli.probe.advice import noise_scale_text
from poprisk_integrations.cli.probe.report import OptimizerReport, ProbeReport
from poprisk_integrations.diagnostics.learning_rate_finder import LearningRateSuggestion
from poprisk_integrations.diagnostics.probe import (
    DEFAULT_PRESET,
    SNR_GRID,
    GradientProbe,
)

__all__ = ["draw_probe", "draw_rates", "print_rates", "print_report"]

_QUANTILES = (0.5, 0.9)
_EARLY = "note: These are first steps: signal fades in training; probe a checkpoint to see later."
_VERDICT_STYLES = {"selective": "green", "vacuous": "yellow", "lethal": "red", "no signal": "dim"}
# Okabe-Ito: distinct also to the colour-blind and in grey.
_PRESET_COLORS = ("#D55E00", "#0072B2", "#56B4E9", "#CC79A7")
_GREY, _GREEN, _YELLOW = "#555555", "#009E73", "#E69F00"


def print_report(console: Console, report: ProbeReport) -> None:
    """Print one section per optimizer."""

    def say(text: str, style: str = "", soft_wrap: bool = False) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=soft_wrap)

    for optimizer in report.optimizers:
        probe = optimizer.probe
        part = f" ({probe.sampled:.0%} of the coordinates looked at)"
        say(
            f"{report.source}: {optimizer.name}, {optimizer.parameters:,} parameters in "
            f"{optimizer.tensors} tensors, {probe.steps} steps{part if probe.sampled < 1 else ''}",
            style="bold",
            soft_wrap=True,  # the source may be a long path
        )
        console.print(_layer_table(probe))
        console.print(_preset_table(probe))
        for line in _facts(report, optimizer):
            say(line)
        say(_EARLY, style="dim")
        for note in optimizer.notes:
            say(f"note: {note}", style="dim")
        console.print()
        for sentence in optimizer.advice:
            say(f"\u2022 {sentence}")


def print_rates(console: Console, found: LearningRateSuggestion) -> None:
    """Print what a search has tried, and the sentence that it comes to."""
    title = f"Loss on {found.score_batches} fresh batches, after {found.steps} steps at each rate"
    console.print(title, markup=False, highlight=False)
    table = _table("", "rate", ["loss"])
    for candidate in found.candidates:
        loss = "failed" if candidate.loss is None else f"{candidate.loss:.4g}"
        table.add_row(f"{candidate.rate:.1e}", loss)
    console.print(table)
    for sentence in (found.sentence, *found.notes):
        console.print(f"\u2022 {sentence}", markup=False, highlight=False)


def draw_rates(found: LearningRateSuggestion) -> Any:
    """Losses over rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    found.plot(figure.add_subplot())
    return figure


def _table(title: str, first: str, others: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _layer_table(probe: GradientProbe) -> Table:
    unit = probe.batch_size or 1
    table = _table(
        "Signal per batch: |mean| / sd of the batch gradient; in brackets: uncertain",
        "layers",
        ["weights", "dead\n%", "SNR\nrms", *(f"SNR\n{100 * q:g} %" for q in _QUANTILES),
         f"noise scale\n({'examples' if probe.batch_size else 'batches'})", "passes\ncal. 32 %"],
    )  # fmt: skip
    default = probe.preset(DEFAULT_PRESET).measured
    rows = [*zip(probe.groups, default.open_fractions, strict=True)]
    if len(rows) > 1:
        rows.append((probe.total, default.open_fraction))
    for group, share in rows:
        if group is probe.total:
            table.add_section()
        cells = ["-"] * 5
        if group.snr is not None:
            scale, low = group.scale, unit * group.scale.interval()[0]
            rms = f"{group.rms_snr:.2f}"
            noise = f"{unit * scale.batches:,.3g}" if scale.is_significant() else f"> {low:,.3g}"
            cells = [
                rms if group.has_signal() else f"({rms})",
                *(f"{group.snr.quantile(q):.2f}" for q in _QUANTILES),
                noise if math.isfinite(low) else "?",
                _percent(share),
            ]
        table.add_row(group.name, _amount(group.parameters), f"{100 * group.dead:.0f}", *cells)
    return table


def _preset_table(probe: GradientProbe) -> Table:
    table = _table(
        "Coordinates that each alpha lets pass, % (temporal noise)",
        "alpha",
        ["value", "pure\nnoise", "expected\nhere", "measured\nhere", "signal\nkept",
         "step\nlength"],
    )  # fmt: skip
    table.add_column("verdict", no_wrap=True)
    for preset in probe.presets:
        measured = preset.measured
        shares = (preset.noise_open, preset.expected_open, measured.open_fraction)
        length = measured.update_norm_ratio
        table.add_row(
            preset.name,
            f"{preset.alpha:.2g}",
            *map(_percent, (*shares, preset.signal_kept)),
            "-" if math.isnan(length) else f"{length:.2f}",
            Text(preset.verdict, style=_VERDICT_STYLES[preset.verdict]),
        )
    return table


def _facts(report: ProbeReport, optimizer: OptimizerReport) -> list[str]:
    probe, epoch, stop = optimizer.probe, report.sizes.epoch_steps, optimizer.stop
    is_compared = probe.batch_size is not None and probe.total.scale.is_significant()
    compared = f" (the batch has {probe.batch_size})" if is_compared else ""
    lines = [f"noise scale: {noise_scale_text(probe)}{compared}"]
    if epoch:
        bound = 1 + 2 / (1 - probe.betas[0])
        more, below = ("more", "below") if epoch > bound else ("no more", "not below")
        lines.append(
            f"batches per epoch: {epoch} ({more} than {bound:.0f}, so b/(n-b) is {below} the noise "
            "of Adam's own mean)"
        )
    if len(probe.presets) < 4:
        both = probe.batch_size and probe.dataset_size
        needed = "n > b" if both else "--batch-size and --dataset-size"
        lines.append(f"finite b/(n-b): needs {needed}")
    if stop.window is not None:
        ends = "unknown length" if stop.total_steps is None else f"{stop.total_steps} steps"
        lines.append(
            f"F: windows of {stop.window} steps, run of {ends}: {stop.verdict.replace('_', ' ')}"
        )
    sized = ", ".join(f"{label} {_bytes(size)}" for label, size in optimizer.memory.items())
    lines.append(f"optimizer state: {sized}")
    seconds, ratio = report.seconds_per_step, 1 / (1 - report.overhead)
    lines.append(f"a probed step took {seconds:.3g} s, {ratio:.2f} of a plain one")
    return lines


def _percent(share: float) -> str:
    if math.isnan(share):
        return "-"
    value = 100 * share
    return f"{value:.1g}" if 0 < value < 0.1 else f"{value:.1f}"


def _amount(number: int) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def _bytes(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def draw_probe(report: ProbeReport) -> Any:
    """One row of three panels per optimizer, its advice above it."""
    from matplotlib.figure import Figure

    count = len(report.optimizers)
    figure = Figure(figsize=(13.0, 5.4 * count), dpi=120, layout="constrained")
    rows = figure.subfigures(count, 1, squeeze=False)[:, 0]
    for row, optimizer in zip(rows, report.optimizers, strict=True):
        left, middle, right = row.subplots(1, 3, width_ratios=[5, 4.4, 2.6])
        _draw_snr(left, optimizer.probe)
        _draw_presets(middle, optimizer.probe)
        _draw_scale(right, optimizer.probe)
        head = (
            f"{report.source}: {optimizer.name}, {optimizer.parameters:,} parameters, "
            f"{optimizer.probe.steps} steps"
        )
        title = "\n".join([head, *(x for s in optimizer.advice for x in textwrap.wrap(s, 185))])
        row.suptitle(title, fontsize=9, ha="left", x=0.01, parse_math=False)
    return figure


def _draw_snr(axis: Any, probe: GradientProbe) -> None:
    """Share of coordinates above each SNR, per group; where each alpha opens."""
    from matplotlib import colormaps

    shown = [(group.name, group.snr.shares) for group in probe.groups if group.snr is not None]
    grid = SNR_GRID.numpy()[1:]
    lines = []
    for place, (name, shares) in enumerate(shown):
        color = colormaps["viridis"](0.9 * place / max(len(shown) - 1, 1))
        above = shares.flip(0).cumsum(0).flip(0).numpy()[1:]
        lines += axis.step(grid, 100 * above, where="pre", color=color, lw=1.4, label=name)
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
    columns = 1 + (len(lines) > 16)
    axis.legend(handles=lines, loc="upper right", fontsize=7, framealpha=0.85, ncols=columns)


def _draw_presets(axis: Any, probe: GradientProbe) -> None:
    """Pure noise, expected, measured and signal kept, side by side for each alpha."""
    bars = {
        "pure noise": (_GREY, [p.noise_open for p in probe.presets]),
        "expected here": ("#0072B2", [p.expected_open for p in probe.presets]),
        "measured": ("#56B4E9", [p.measured.open_fraction for p in probe.presets]),
        "signal kept": (_GREEN, [p.signal_kept for p in probe.presets]),
    }
    places = range(len(probe.presets))
    for i, (name, (color, values)) in enumerate(bars.items()):
        heights = [0.0 if math.isnan(v) else 100 * v for v in values]
        at = [place + 0.2 * (i - 1.5) for place in places]
        drawn = axis.bar(at, heights, 0.19, color=color, label=name)
        axis.bar_label(drawn, [f"{h:.0f}" if h >= 1 else "" for h in heights], fontsize=6)
    names = [f"{p.name.replace(' ', chr(10), 1)}\n{p.verdict}" for p in probe.presets]
    axis.set_xticks(places, names, fontsize=8)
    axis.set_ylim(0, 118)
    axis.set_ylabel("% that pass")
    axis.legend(fontsize=7, frameon=False, loc="upper center", ncols=4, columnspacing=1)
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)


def _draw_scale(axis: Any, probe: GradientProbe) -> None:
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
