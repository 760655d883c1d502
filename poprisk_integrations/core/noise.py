"""Noise of the batch gradient, estimated from one training run."""

import torch
from torch import Tensor

__all__ = [
    "deviation_scale",
    "ema_mean_variance",
    "gradient_scale",
    "moments_noise",
    "noise_is_ready",
    "sum_variance",
    "update_dev_sq_",
]


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


def moments_noise(exp_avg_sq: Tensor, mean_sq: Tensor, noise_scale: float | Tensor) -> Tensor:
    """Noise variance read off Adam's moments, on the scale of `mean_sq`.

        s_hat = max(v_hat - m_hat^2, 0)

    For i.i.d. gradients of mean mu and variance s_B its expectation before the floor is
        E[v_hat] - E[m_hat^2] = (mu^2 + s_B) - (mu^2 + c_t s_B) = s_B (1 - c_t)
    with c_t of `ema_mean_variance(beta1, t)`: 5 % below s_B at beta1 = 0.9, and nothing at t = 1.
    It is no variance over one window, so it can be negative; while the mean moves it has a bias:
    v remembers mu^2 for 1/(1-beta2) steps, m for 1/(1-beta1). A mean that shrinks leaves its old
    square in s_hat and closes the gate; one that grows leaves too little and opens it.

    Args:
        exp_avg_sq: v.
        mean_sq: m^2, same shape.
        noise_scale: bias_correction1^2 / bias_correction2, which puts v on the scale of m^2.

    Example:
        >>> moments_noise(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 4.0]), 1.0)
        tensor([3., 0.])
    """
    return torch.sub(exp_avg_sq * noise_scale, mean_sq).clamp_(min=0)


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


def deviation_scale(beta1: float) -> float:
    """Mean squared deviation from Adam's mean, in units of the gradient's variance.

        E[(g_t - m_hat_{t-1})^2] = Var(g) * (1 + c_{t-1})  ->  Var(g) * 2 / (1 + beta1)

    for i.i.d. g, with c of `ema_mean_variance`. A variance measured otherwise is multiplied by
    it, so that a calibrated alpha means the same for every noise source.

    Args:
        beta1: Decay of the mean, in [0, 1).

    Example:
        >>> round(deviation_scale(0.9), 4), round(1 + ema_mean_variance(0.9, 10_000), 4)
        (1.0526, 1.0526)
    """
    return 2.0 / (1.0 + beta1)


def sum_variance(
    sum_sq: Tensor, total: Tensor, pieces: float | Tensor, scale: float | Tensor = 1.0
) -> Tensor:
    """Unbiased variance of a SUM of independent pieces, elementwise, from their squares.

        Var(g) = N/(N-1) * (c^2 * sum_k y_k^2 - g^2 / N),   g = c * sum_k y_k

    With N micro-batches or ranks whose contributions add up to the gradient of the batch MEAN,
    it is the variance of that mean. Unbiased for pieces of equal expectation; pieces of unequal
    weight w_k (sum 1) add N/(N-1) * sum_k (w_k - 1/N)^2 * E[g]^2. Its relative standard
    deviation is sqrt(2/(N-1)) for Gaussian pieces. Rounding below zero is cut off.

    Args:
        sum_sq: sum_k y_k^2, at least float32.
        total: g, same shape.
        pieces: N >= 2.
        scale: c, what happened to the sum after the pieces were seen (unscaling, clipping).

    Example:
        >>> y = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
        >>> sum_variance(y.square().sum(0), y.sum(0), 2)  # twice the unbiased variance of 1, 3
        tensor([4., 0.])
    """
    spread = sum_sq * scale**2 - total.to(sum_sq.dtype).square() / pieces
    return spread.clamp_(min=0).mul_(pieces / (pieces - 1))


def gradient_scale(total: Tensor, seen: Tensor, default: float) -> Tensor:
    """Factor c that fits `total = c * seen` best; `default` where `seen` is all zero.

        c = <total, seen> / <seen, seen>

    Args:
        total: Some coordinates of the gradient that reached the optimizer, 1-d.
        seen: The same coordinates of the sum of its pieces.
        default: For want of any non-zero coordinate.

    Returns:
        0-dim, non-finite if the input is; nothing is read from the device.

    Example:
        >>> gradient_scale(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0]), 1.0)
        tensor(0.2500)
    """
    # Relative to the largest coordinate: squares of tiny or loss-scaled gradients leave the range.
    largest = seen.abs().amax()
    unit = seen / torch.where(largest == 0, 1.0, largest)
    return torch.where(largest == 0, default, (total @ unit) / (unit @ unit) / largest)
