"""What each choice of the option `alpha` would let pass at probed gradients."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from poprisk_integrations.core.alpha import resolve_alpha
from poprisk_integrations.diagnostics.group_probe import GroupProbe
from poprisk_integrations.diagnostics.open_probability import half_open_snr, open_probability
from poprisk_integrations.diagnostics.shadow_gate import ShadowGate
from poprisk_integrations.diagnostics.snr_distribution import SNR_GRID

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "STRICT_PRESET",
    "Preset",
    "PresetProbe",
    "gate_verdict",
    "judge_preset",
    "usable_presets",
]

DEFAULT_PRESET = "calibrated 32 %"  # of PopRiskAdamW
STRICT_PRESET = "calibrated 5 %"  # of PopRiskDPOConfig

GateVerdict = Literal["vacuous", "lethal", "selective", "no signal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A choice of the option `alpha`.

    Attributes:
        name: For tables.
        alpha: Option value of `PopRiskAdamW`.
        false_open_rate: The option that goes with alpha="calibrated".
    """

    name: str
    alpha: str
    false_open_rate: float = 0.3173


PRESETS = (
    Preset(name="fresh (paper)", alpha="fresh"),
    Preset(name=STRICT_PRESET, alpha="calibrated", false_open_rate=0.05),
    Preset(name=DEFAULT_PRESET, alpha="calibrated", false_open_rate=0.3173),
    Preset(name="finite b/(n-b)", alpha="finite"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PresetProbe:
    """One boundary at the probed gradients.

    Attributes:
        name: Of the preset.
        alpha: Its value here.
        half_open_snr: Per-batch SNR from which on a coordinate is open more often than not.
        noise_open: Share of pure noise that passes in the long run.
        expected_open: Share of coordinates that pass in the long run, at the probed SNRs.
        signal_kept: Share of the squared SNR that sits on coordinates that pass: of each group
            with a significant signal, averaged over these by their size, since one layer of large
            SNRs must not speak for the rest; NaN without any.
        measured: What its averages did in the last third of the probe.
        verdict: See `gate_verdict`.
    """

    name: str
    alpha: float
    half_open_snr: float
    noise_open: float
    expected_open: float
    signal_kept: float
    measured: ShadowGate
    verdict: GateVerdict


def gate_verdict(noise_open: float, signal_kept: float) -> GateVerdict:
    """Judge a boundary by what it lets pass.

        vacuous      most pure noise passes: nearly no gate
        no signal    no signal was found that it could keep or lose
        lethal       less than half of the signal (squared SNR) passes
        selective    otherwise

    Args:
        noise_open: Share of pure noise that passes.
        signal_kept: Share of the squared SNR that passes; NaN without signal.

    Example:
        >>> gate_verdict(0.84, 1.0), gate_verdict(0.05, 0.9), gate_verdict(7.7e-6, 0.1)
        ('vacuous', 'selective', 'lethal')
    """
    if noise_open > 0.5:
        return "vacuous"
    if math.isnan(signal_kept):
        return "no signal"
    return "lethal" if signal_kept < 0.5 else "selective"


def usable_presets(
    beta1: float, batch_size: int | None, dataset_size: int | None
) -> list[tuple[Preset, float]]:
    """Presets and their alphas; "finite" only where both sizes are known and n > b.

    Args:
        beta1: Decay of Adam's mean.
        batch_size: Examples per step, b; None if unknown.
        dataset_size: Training examples, n; None if unknown.

    Example:
        >>> [round(alpha, 3) for _, alpha in usable_presets(0.9, 32, 1032)]
        [1.0, 0.192, 0.05, 0.032]
    """
    sizes = {"batch_size": batch_size, "dataset_size": dataset_size}
    can_finite = batch_size is not None and dataset_size is not None and dataset_size > batch_size
    return [
        (p, resolve_alpha(p.alpha, beta1=beta1, false_open_rate=p.false_open_rate, **sizes))
        for p in PRESETS
        if p.alpha != "finite" or can_finite
    ]


def judge_preset(
    name: str,
    alpha: float,
    beta1: float,
    total: GroupProbe,
    groups: Sequence[GroupProbe],
    measured: ShadowGate,
) -> PresetProbe:
    """Everything about a boundary.

    Args:
        name: Of the preset.
        alpha: Its value.
        beta1: Decay of Adam's mean.
        total: All parameters.
        groups: The same in groups of layers.
        measured: What the boundary did.
    """
    opening = open_probability(SNR_GRID, alpha, beta1)
    noise_open = float(opening[0])
    kept = math.nan
    if total.has_signal():
        kept = _signal_kept([g for g in groups if g.has_signal()] or [total], opening)
    return PresetProbe(
        name=name,
        alpha=alpha,
        half_open_snr=half_open_snr(alpha, beta1),
        noise_open=noise_open,
        expected_open=math.nan if total.snr is None else total.snr.mean(opening),
        signal_kept=kept,
        measured=measured,
        verdict=gate_verdict(noise_open, kept),
    )


def _signal_kept(groups: Sequence[GroupProbe], opening: Tensor) -> float:
    power = SNR_GRID.square()
    weights, shares = [], []
    for group in groups:
        if group.snr is not None and (whole := group.snr.mean(power)) > 0:
            weights.append(group.parameters * (1 - group.dead))
            shares.append(group.snr.mean(power * opening) / whole)
    if not weights:
        return math.nan
    return sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)
