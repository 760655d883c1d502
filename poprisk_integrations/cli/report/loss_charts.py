"""Loss, learning rate and gradient norm."""

import re
from collections.abc import Sequence

from poprisk_integrations.cli.report.chart import Chart
from poprisk_integrations.cli.report.key_names import parse_key
from poprisk_integrations.cli.report.quantity_chart import quantity_chart
from poprisk_integrations.cli.report.run import Run

__all__ = ["gradient_norm_bases", "learning_rate_bases", "loss_bases", "loss_charts"]

_MOST_LOSSES = 6  # several evaluation sets


def loss_charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts of the first section."""
    charts = []
    for base in loss_bases(runs)[:_MOST_LOSSES]:
        title = "Loss" if base == "loss" else f"Loss: {base}"
        charts += quantity_chart(runs, title, {base: ""}, log=True)
    rates = learning_rate_bases(runs)
    names = {base: "" if len(rates) == 1 else base for base in rates}
    charts += quantity_chart(runs, "Learning rate", names)
    norms = gradient_norm_bases(runs)[:1]
    charts += quantity_chart(runs, "Gradient norm", dict.fromkeys(norms, ""), log=True)
    return charts


def loss_bases(runs: Sequence[Run]) -> list[str]:
    """Losses by name, "loss" itself first."""
    found = {b for b in _bases(runs) if re.fullmatch(r"(.*[_/ ])?loss", b)}
    return sorted(found, key=lambda base: (base != "loss", base))


def learning_rate_bases(runs: Sequence[Run]) -> list[str]:
    """Trainer's `learning_rate`, or what Lightning's LearningRateMonitor logs."""
    return sorted(b for b in _bases(runs) if b in ("learning_rate", "lr") or b.startswith("lr-"))


def gradient_norm_bases(runs: Sequence[Run]) -> list[str]:
    """Trainer's `grad_norm`, or Lightning's `grad_2.0_norm_total`."""
    return sorted(b for b in _bases(runs) if re.fullmatch(r"grad(ient)?_(.*_)?norm(_total)?", b))


def _bases(runs: Sequence[Run]) -> set[str]:
    names = {parse_key(name).base for run in runs for name in run.curves}
    return {name for name in names if not name.startswith("poprisk/")}
