"""The tables of a probe, and the sentences under them."""

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from poprisk_integrations.cli.probe.advice import noise_scale_text
from poprisk_integrations.cli.probe.report import OptimizerReport, ProbeReport
from poprisk_integrations.diagnostics.gradient_probe import GradientProbe
from poprisk_integrations.diagnostics.group_probe import GroupProbe
from poprisk_integrations.diagnostics.preset_probe import DEFAULT_PRESET

__all__ = ["print_report"]

_QUANTILES = (0.5, 0.9)
_EARLY = "note: These are first steps: signal fades in training; probe a checkpoint to see later."
_VERDICT_STYLES = {"selective": "green", "vacuous": "yellow", "lethal": "red", "no signal": "dim"}


def print_report(console: Console, report: ProbeReport) -> None:
    """Print one section per optimizer.

    Args:
        console: Where.
        report: What was found.
    """
    for optimizer in report.optimizers:
        _say(console, _headline(report, optimizer), style="bold")
        console.print(_layer_table(optimizer.probe))
        console.print(_preset_table(optimizer.probe))
        for line in _facts(report, optimizer):
            _say(console, line)
        _say(console, _EARLY, style="dim")
        for note in optimizer.notes:
            _say(console, f"note: {note}", style="dim")
        console.print()
        for sentence in optimizer.advice:
            _say(console, f"\u2022 {sentence}")


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False)


def _headline(report: ProbeReport, optimizer: OptimizerReport) -> str:
    probe = optimizer.probe
    looked = "" if probe.sampled >= 1 else f" ({probe.sampled:.0%} of the coordinates looked at)"
    return (
        f"{report.source}: {optimizer.name}, {optimizer.parameters:,} parameters in "
        f"{optimizer.tensors} tensors, {probe.steps} steps{looked}"
    )


def _layer_table(probe: GradientProbe) -> Table:
    unit = "examples" if probe.batch_size else "batches"
    table = Table(
        title="Signal per batch: |mean| / sd of the batch gradient; in brackets: uncertain",
        title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("layers", overflow="fold")
    for name in (
        "weights", "dead\n%", "SNR\nrms", *(f"SNR\n{100 * q:g} %" for q in _QUANTILES),
        f"noise scale\n({unit})", "passes\ncal. 32 %",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    default = probe.preset(DEFAULT_PRESET).measured
    for group, share in zip(probe.groups, default.open_fractions, strict=True):
        table.add_row(*_layer_row(group, share, probe.batch_size or 1))
    if len(probe.groups) > 1:
        table.add_section()
        table.add_row(*_layer_row(probe.total, default.open_fraction, probe.batch_size or 1))
    return table


def _layer_row(group: GroupProbe, open_share: float, unit: int) -> list[str]:
    head = [group.name, _amount(group.parameters), f"{100 * group.dead:.0f}"]
    if group.snr is None:
        return [*head, *["-"] * 5]
    scale, low = group.scale, unit * group.scale.interval()[0]
    rms = f"{group.rms_snr:.2f}"
    noise = f"{unit * scale.batches:,.3g}" if scale.is_significant() else f"> {low:,.3g}"
    return [
        *head,
        rms if group.has_signal() else f"({rms})",
        *(f"{group.snr.quantile(q):.2f}" for q in _QUANTILES),
        noise if math.isfinite(low) else "?",
        _percent(open_share),
    ]


def _preset_table(probe: GradientProbe) -> Table:
    table = Table(
        title="Coordinates that each alpha lets pass, %", title_justify="left",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("alpha", no_wrap=True)
    for name in (
        "value", "pure\nnoise", "expected\nhere", "measured\nhere",
        "signal\nkept", "step\nlength",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for preset in probe.presets:
        length = preset.measured.update_norm_ratio
        table.add_row(
            preset.name,
            f"{preset.alpha:.2g}",
            _percent(preset.noise_open),
            _percent(preset.expected_open),
            _percent(preset.measured.open_fraction),
            _percent(preset.signal_kept),
            "-" if math.isnan(length) else f"{length:.2f}",
            Text(preset.verdict, style=_VERDICT_STYLES[preset.verdict]),
        )
    return table


def _facts(report: ProbeReport, optimizer: OptimizerReport) -> list[str]:
    probe, sizes = optimizer.probe, report.sizes
    lines = [f"noise scale: {noise_scale_text(probe)}" + _compared(probe)]
    if sizes.epoch_steps:
        line = f"batches per epoch: {sizes.epoch_steps}"
        bound = 1 + 2 / (1 - probe.betas[0])
        is_many = sizes.epoch_steps > bound
        line += (
            f" ({'more' if is_many else 'no more'} than {bound:.0f}, so b/(n-b) is "
            f"{'below' if is_many else 'not below'} the noise of Adam's own mean)"
        )
        lines.append(line)
    if len(probe.presets) < 4:
        needed = "n > b" if probe.batch_size and probe.dataset_size else (
            "--batch-size and --dataset-size"
        )  # fmt: skip
        lines.append(f"finite b/(n-b): needs {needed}")
    stop = optimizer.stop
    if stop.window is not None:
        ends = "unknown length" if stop.total_steps is None else f"{stop.total_steps} steps"
        lines.append(f"stop: windows of {stop.window} steps, run of {ends}: {stop.verdict}")
    sized = ", ".join(f"{label} {_bytes(size)}" for label, size in optimizer.memory.items())
    lines.append(f"optimizer state: {sized}")
    plain = report.seconds_per_step * (1 - report.overhead)
    ratio = report.seconds_per_step / plain if plain else 1.0
    lines.append(f"a probed step took {report.seconds_per_step:.3g} s, {ratio:.2f} of a plain one")
    return lines


def _compared(probe: GradientProbe) -> str:
    scale, batch = probe.total.scale, probe.batch_size
    if batch is None or not scale.is_significant():
        return ""
    return f" (the batch has {batch})"


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
