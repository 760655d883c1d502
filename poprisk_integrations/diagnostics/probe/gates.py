"""What each choice of the option `alpha` would let pass at probed gradients.

With noise_source="temporal", whose boundary is in units of the batch's noise, so that alphas can be
compared. At the same `false_open_rate` the default source lets pass as much pure noise; its numbers
for alpha are some 10 % larger at betas (0.9, 0.999), 30 % at a rate of 5 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from poprisk_integrations.core import (
    default_lambda_pop,
    deviation_scale,
    ema_mean_variance,
    gate_factor,
    open_mask,
    resolve_alpha,
    update_dev_sq_,
)
from poprisk_integrations.diagnostics.probe.signal import SNR_GRID, GroupProbe

__all__ = [
    "DEFAULT_PRESET",
    "STRICT_PRESET",
    "PresetProbe",
    "judge_preset",
    "run_shadow_gates",
    "usable_presets",
]

DEFAULT_PRESET = "calibrated 32 %"  # of PopRiskAdamW
STRICT_PRESET = "calibrated 5 %"  # of PopRiskDPOConfig
# Choices of the option `alpha` by a name for tables, and the `false_open_rate` that goes with it.
PRESETS = {
    "fresh (paper)": ("fresh", 0.3173),
    STRICT_PRESET: ("calibrated", 0.05),
    DEFAULT_PRESET: ("calibrated", 0.3173),
    "finite b/(n-b)": ("finite", 0.3173),
}
_RHO, _EPS = 0.99, 1e-8  # defaults of PopRiskAdamW

GateVerdict = Literal["vacuous", "lethal", "selective", "no signal"]


def open_probability(snr: Tensor, alpha: float, beta1: float) -> Tensor:
    """P(m_hat^2 > alpha * s_hat) under Adam's averages, in the long run.

    For i.i.d. Gaussian batch gradients of mean SNR and variance 1:
        m_hat ~ N(SNR, c),  c = (1 - beta1)/(1 + beta1);    s_hat ~ 2/(1 + beta1)
        P     = Phi((SNR - x)/sqrt(c)) + Phi((-SNR - x)/sqrt(c)),   x = sqrt(alpha 2/(1 + beta1))
    At SNR 0 it is the share of pure noise that passes: for a calibrated alpha its
    `false_open_rate`. s_hat's own scatter (10 % at rho = 0.99) is left out.

    Example:
        >>> from poprisk_integrations.core import calibrated_alpha
        >>> p = open_probability(torch.tensor([0.0, 0.5]), calibrated_alpha(0.9, 0.05), 0.9)
        >>> [round(float(x), 3) for x in p]
        [0.05, 0.587]
    """
    sd = math.sqrt((1 - beta1) / (1 + beta1))
    x = half_open_snr(alpha, beta1)
    snr = snr.double()
    opened: Tensor = torch.special.ndtr((snr - x) / sd) + torch.special.ndtr((-snr - x) / sd)
    return opened


def half_open_snr(alpha: float, beta1: float) -> float:
    """Per-batch SNR from which on a coordinate is open more often than not.

        x = sqrt(alpha * 2 / (1 + beta1))

    Example:
        >>> round(half_open_snr(1.0, 0.9), 2)
        1.03
    """
    return math.sqrt(alpha * deviation_scale(beta1))


def noise_open_at_step(alpha: float, beta1: float, step: int) -> float:
    """Share of pure noise that passes at a step >= 2, when the averages have just begun.

        c_t     = Var(m_hat_t)                                          (`ema_mean_variance`)
        E s_hat = weighted mean of 1 + c_{k-1} over k = 2..t, weights (1 - rho) rho^(t-k)
        P       = P(chi2_1 > alpha E[s_hat] / c_t)
    A probe of tens of steps is compared with it, not with the long run.
    """
    weights = [_RHO ** (step - k) for k in range(2, step + 1)]
    deviations = [1 + ema_mean_variance(beta1, k - 1) for k in range(2, step + 1)]
    noise = sum(w * d for w, d in zip(weights, deviations, strict=True)) / sum(weights)
    return math.erfc(math.sqrt(alpha * noise / ema_mean_variance(beta1, step) / 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowGate:
    """What one boundary did over the last steps of a run that knew nothing of it."""

    open_fractions: tuple[float, ...]  # share of open coordinates, one per group; NaN of none
    open_fraction: float  # of all groups together
    noise_open: float  # what pure Gaussian noise would have given at the same steps
    mean_gate: float  # of the soft gate q
    update_norm_ratio: float  # |gated| / |ungated| update of the soft gate


@torch.no_grad()
def run_shadow_gates(
    gradients: Tensor,
    weight: Tensor,
    group: Tensor,
    alphas: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
) -> list[ShadowGate]:
    """Run m, v and s of PopRiskAdamW over recorded gradients and count what each alpha lets pass.

    `gradients` have the shape (T, M), T >= 2. Each of the M coordinates stands for so many as
    `weight` says (none for those to leave out) and belongs to a `group`, integers from 0. Counted
    is over the last third of the steps.

    Example:
        >>> g = torch.ones(10, 2) * torch.tensor([1.0, 0.0])
        >>> gates = run_shadow_gates(g, torch.ones(2), torch.arange(2), [1.0])
        >>> gates[0].open_fractions
        (1.0, 0.0)
    """
    steps = len(gradients)
    first = max(steps - max(1, steps // 3) + 1, 2)
    beta1, beta2 = betas
    mean, square, noise = (torch.zeros(gradients.shape[1]) for _ in range(3))
    weight = weight.double()
    sizes = torch.bincount(group, weights=weight)
    opened = [torch.zeros_like(sizes) for _ in alphas]
    gate_sum, gated_sq, ungated_sq = [0.0] * len(alphas), [0.0] * len(alphas), 0.0
    for t, grad in enumerate(gradients, start=1):
        if t > 1:
            update_dev_sq_(noise, grad, mean, _RHO, 1 - _RHO, 1 / (1 - beta1 ** (t - 1)))
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if t < first:
            continue
        m_hat = mean / (1 - beta1**t)
        m_sq, s_hat = m_hat.square(), noise / (1 - _RHO ** (t - 1))
        update = (m_hat / ((square / (1 - beta2**t)).sqrt() + _EPS)).double()
        ungated_sq += float(weight @ update.square())
        for i, alpha in enumerate(alphas):
            is_open = open_mask(m_sq, s_hat, alpha).double()
            opened[i] += torch.bincount(group, weights=weight * is_open)
            shrunk = default_lambda_pop("soft", alpha)
            q = gate_factor(m_sq, s_hat, gate="soft", alpha=alpha, lambda_pop=shrunk).double()
            gate_sum[i] += float(weight @ q)
            gated_sq[i] += float(weight @ (q * update).square())
    used = range(first, steps + 1)
    total = float(sizes.sum()) * len(used)
    return [
        ShadowGate(
            open_fractions=tuple((opened[i] / sizes / len(used)).tolist()),
            open_fraction=float(opened[i].sum()) / total if total else math.nan,
            noise_open=sum(noise_open_at_step(alpha, beta1, t) for t in used) / len(used),
            mean_gate=gate_sum[i] / total if total else math.nan,
            update_norm_ratio=math.sqrt(gated_sq[i] / ungated_sq) if ungated_sq else math.nan,
        )
        for i, alpha in enumerate(alphas)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class PresetProbe:
    """One boundary at the probed gradients."""

    name: str  # of the preset
    alpha: float  # its value here
    half_open_snr: float  # per batch; from it on a coordinate is open more often than not
    noise_open: float  # share of pure noise that passes in the long run
    expected_open: float  # share of coordinates that pass in the long run, at the probed SNRs
    # Share of the squared SNR that sits on coordinates that pass: of each group with a significant
    # signal, averaged over these by their size, since one layer of large SNRs must not speak for
    # the rest; NaN without any.
    signal_kept: float
    measured: ShadowGate  # what its averages did in the last third of the probe
    verdict: GateVerdict


def gate_verdict(noise_open: float, signal_kept: float) -> GateVerdict:
    """Judge a boundary by the shares of pure noise and of the squared SNR that it lets pass."""
    if noise_open > 0.5:
        return "vacuous"  # nearly no gate
    if math.isnan(signal_kept):
        return "no signal"  # that it could keep or lose
    return "lethal" if signal_kept < 0.5 else "selective"


def usable_presets(
    beta1: float, batch_size: int | None, dataset_size: int | None
) -> dict[str, float]:
    """Presets and their alphas; "finite" only where both sizes are known and n > b.

    Example:
        >>> [round(alpha, 3) for alpha in usable_presets(0.9, 32, 1032).values()]
        [1.0, 0.192, 0.05, 0.032]
    """
    sizes = {"batch_size": batch_size, "dataset_size": dataset_size}
    can_finite = batch_size is not None and dataset_size is not None and dataset_size > batch_size
    return {
        name: resolve_alpha(alpha, beta1=beta1, false_open_rate=rate, **sizes)
        for name, (alpha, rate) in PRESETS.items()
        if alpha != "finite" or can_finite
    }


def judge_preset(
    name: str,
    alpha: float,
    beta1: float,
    total: GroupProbe,
    groups: Sequence[GroupProbe],
    measured: ShadowGate,
) -> PresetProbe:
    """Everything about a boundary, of all parameters and of the same in groups of layers."""
    opening = open_probability(SNR_GRID, alpha, beta1)
    noise_open, kept = float(opening[0]), math.nan
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
