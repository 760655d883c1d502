"""Probability that a gate is open, from a coordinate's true signal-to-noise ratio."""

import math

import torch
from torch import Tensor

from poprisk_integrations.core.noise import deviation_scale, ema_mean_variance

__all__ = ["half_open_snr", "noise_open_at_step", "open_probability"]


def open_probability(snr: Tensor, alpha: float, beta1: float) -> Tensor:
    """P(m_hat^2 > alpha * s_hat) under Adam's averages, in the long run.

    For i.i.d. Gaussian batch gradients of mean SNR and variance 1:
        m_hat ~ N(SNR, c),  c = (1 - beta1)/(1 + beta1);    s_hat ~ 2/(1 + beta1)
        P     = Phi((SNR - x)/sqrt(c)) + Phi((-SNR - x)/sqrt(c)),   x = sqrt(alpha 2/(1 + beta1))
    At SNR 0 it is the share of pure noise that passes: for a calibrated alpha its
    `false_open_rate`. s_hat's own scatter (10 % at rho = 0.99) is left out.

    Args:
        snr: |E g| / sd of the batch gradient, any shape.
        alpha: Boundary, >= 0.
        beta1: Decay of the mean, in [0, 1).

    Example:
        >>> from poprisk_integrations.core.alpha import calibrated_alpha
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

    Args:
        alpha: Boundary, >= 0.
        beta1: Decay of the mean, in [0, 1).

    Example:
        >>> round(half_open_snr(1.0, 0.9), 2)
        1.03
    """
    return math.sqrt(alpha * deviation_scale(beta1))


def noise_open_at_step(alpha: float, beta1: float, rho: float, step: int) -> float:
    """Share of pure noise that passes at a step, when the averages have just begun.

        c_t     = Var(m_hat_t)                                          (`ema_mean_variance`)
        E s_hat = weighted mean of 1 + c_{k-1} over k = 2..t, weights (1 - rho) rho^(t-k)
        P       = P(chi2_1 > alpha E[s_hat] / c_t)
    A probe of tens of steps is compared with it, not with the long run.

    Args:
        alpha: Boundary, >= 0.
        beta1: Decay of the mean, in [0, 1).
        rho: Decay of the noise, in [0, 1).
        step: t >= 2, the first at which the gate acts.

    Example:
        >>> noise_open_at_step(1.0, 0.9, 0.99, 2) > noise_open_at_step(1.0, 0.9, 0.99, 30)
        True
    """
    weights = [rho ** (step - k) for k in range(2, step + 1)]
    deviations = [1 + ema_mean_variance(beta1, k - 1) for k in range(2, step + 1)]
    noise = sum(w * d for w, d in zip(weights, deviations, strict=True)) / sum(weights)
    return math.erfc(math.sqrt(alpha * noise / ema_mean_variance(beta1, step) / 2))
