"""The gate: signal and noise of a coordinate in, a factor in [0, 1] out."""

import torch
from torch import Tensor

__all__ = ["GATES", "default_lambda_pop", "gate_factor", "open_mask"]

GATES = ("soft", "hard", "snr", "none")


def default_lambda_pop(gate: str, alpha: float) -> float:
    """The gate's own shrinkage when the user gives none.

    Soft: lambda_pop = alpha, which makes it the positive-part shrinker max(0, 1 - alpha/r).
    SNR: lambda_pop = 1, which puts q = 1/2 exactly on the boundary r = alpha.

    Args:
        gate: One of `GATES`.
        alpha: The resolved boundary.

    Example:
        >>> default_lambda_pop("soft", 0.19), default_lambda_pop("snr", 0.19)
        (0.19, 1.0)
    """
    return alpha if gate == "soft" else 1.0


def open_mask(mean_sq: Tensor, noise: Tensor, alpha: float, noise_scale: float = 1.0) -> Tensor:
    """Where the squared signal beats the noise: m_hat^2 > alpha * s_hat.

    Args:
        mean_sq: Squared first moment, same shape as `noise`.
        noise: Noise variance.
        alpha: Boundary, >= 0.
        noise_scale: As in `gate_factor`.

    Returns:
        Boolean tensor of the same shape. A coordinate with zero gradient (0 > 0) is closed.
    """
    return mean_sq > (alpha * noise_scale) * noise


def gate_factor(
    mean_sq: Tensor,
    noise: Tensor,
    *,
    gate: str,
    alpha: float,
    lambda_pop: float,
    eps: float = 0.0,
    noise_scale: float = 1.0,
) -> Tensor:
    """Gate q in [0, 1] per coordinate (arXiv:2605.01172, eqs. 241-243).

    With d = max(m_hat^2 - alpha * s_hat, 0):
        hard:  q = 1 if m_hat^2 > alpha * s_hat else 0
        soft:  q = d / (d + lambda_pop * s_hat + eps)
        snr:   q = m_hat^2 / (m_hat^2 + lambda_pop * alpha * s_hat + eps)
        none:  q = 1
    With eps = 0 every form depends on the ratio m_hat^2 / s_hat alone, so it does not move when
    the loss is rescaled. 0/0 (a coordinate that never had a gradient) is 0: its update is 0
    anyway, and a closed gate is what the statistics should count.

    Args:
        mean_sq: Squared first moment m_hat^2.
        noise: Noise variance s_hat >= 0, same shape: variance of the batch-mean gradient (a mean
            over the batch, not a sum).
        gate: One of `GATES`.
        alpha: Boundary, >= 0.
        lambda_pop: Shrinkage beyond the boundary, >= 0.
        eps: Absolute constant on the scale of `mean_sq`. 0 outside the published rule.
        noise_scale: Stands before every s_hat. It saves correcting both moments coordinate by
            coordinate: for m^2 and s as stored it is bias_correction1^2 / noise_correction (and
            eps takes the factor bias_correction1^2), which leaves q as it is.

    Returns:
        Tensor of the same shape and dtype as `mean_sq`.

    Example:
        >>> r = torch.tensor([0.0, 1.0, 4.0])
        >>> gate_factor(r, torch.ones(3), gate="soft", alpha=1.0, lambda_pop=1.0)
        tensor([0.0000, 0.0000, 0.7500])
        >>> gate_factor(r, torch.ones(3), gate="snr", alpha=1.0, lambda_pop=1.0)
        tensor([0.0000, 0.5000, 0.8000])
    """
    if gate == "none":
        return torch.ones_like(mean_sq)
    if gate == "hard":
        return open_mask(mean_sq, noise, alpha, noise_scale).to(mean_sq.dtype)
    if gate == "soft":
        signal = torch.sub(mean_sq, noise, alpha=alpha * noise_scale).clamp_(min=0)
        total = torch.add(signal, noise, alpha=lambda_pop * noise_scale)
    elif gate == "snr":
        signal = mean_sq
        total = torch.add(signal, noise, alpha=lambda_pop * alpha * noise_scale)
    else:
        raise ValueError(f"Invalid gate: {gate!r}. Must be one of {GATES}.")
    if eps:
        total.add_(eps)
    # signal <= total, so the floor only turns 0/0 into 0.
    return signal / total.clamp_(min=torch.finfo(mean_sq.dtype).tiny)
