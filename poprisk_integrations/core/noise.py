"""Noise of the batch gradient, estimated from one training run."""

import torch
from torch import Tensor

__all__ = ["ema_mean_variance", "noise_is_ready", "update_dev_sq_"]


def update_dev_sq_(
    exp_dev_sq: Tensor,
    grad: Tensor,
    mean: Tensor,
    rho: float | Tensor,
    weight: float,
    mean_scale: float = 1.0,
) -> Tensor:
    """One step of the noise variance, in place (arXiv:2605.01172, Algorithm 1, eq. 240).

        s_t = rho * s_{t-1} + (1 - rho) * (g_t - mean_scale * mean_{t-1})^2

    It estimates the variance of the batch-MEAN gradient (not of one example): biased up by the
    variance of `mean` itself, 2/(1+beta1) for a bias-corrected EMA of i.i.d. gradients, and by
    its drift.

    Args:
        exp_dev_sq: s_{t-1}, changed in place.
        grad: g_t, same shape.
        mean: m_{t-1}, the mean before this step, same shape.
        rho: Decay of s; a 0-dim tensor where the step may be skipped on the device.
        weight: 1 - rho.
        mean_scale: 1 / (1 - beta1^(t-1)) for deviations from the bias-corrected mean (default of
            the optimizer), 1 for those from the uncorrected one (the published rule).

    Returns:
        `exp_dev_sq`.
    """
    deviation = torch.sub(grad, mean, alpha=mean_scale)
    return exp_dev_sq.mul_(rho).addcmul_(deviation, deviation, value=weight)


def noise_is_ready(dev_step: int, gate_warmup: int, *, centered: bool) -> bool:
    """Whether the gate acts at this step, or the update is still ungated (q = 1).

    With the bias-corrected mean (`centered`) the first step has no mean to deviate from, so
    `dev_step` is one behind the step count and the first step is ungated. The published rule
    starts at once.

    Args:
        dev_step: Deviations seen so far, this step's included.
        gate_warmup: Steps that the user wants ungated.
        centered: True for the bias-corrected mean, False for the published rule.

    Example:
        >>> [noise_is_ready(k, 0, centered=True) for k in (0, 1)]
        [False, True]
        >>> [noise_is_ready(k, 2, centered=False) for k in (1, 2, 3)]
        [False, False, True]
    """
    if centered:
        return dev_step >= max(gate_warmup, 1)
    return dev_step > gate_warmup


def ema_mean_variance(beta1: float, step: int) -> float:
    """Variance of a bias-corrected EMA of `step` i.i.d. values of unit variance.

        c_t = (1 - beta1)/(1 + beta1) * (1 + beta1^t)/(1 - beta1^t)

    Args:
        beta1: Decay, in [0, 1).
        step: Number of values t >= 1.

    Example:
        >>> ema_mean_variance(0.9, 1), round(ema_mean_variance(0.9, 10_000), 4)
        (1.0, 0.0526)
    """
    decayed = beta1**step
    return (1 - beta1) / (1 + beta1) * (1 + decayed) / (1 - decayed)
