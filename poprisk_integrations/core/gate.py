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


def open_mask(mean_sq: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """Where the squared signal beats the noise: m_hat^2 > alpha * s_hat.

    Args:
        mean_sq: Squared bias-corrected first moment m_hat^2.
        noise: Bias-corrected noise variance s_hat, same shape.
        alpha: Boundary, >= 0.

    Returns:
        Boolean tensor of the same shape. A coordinate with zero gradient (0 > 0) is closed.
    """
    return mean_sq > alpha * noise


def gate_factor(
    mean_sq: Tensor, noise: Tensor, *, gate: str, alpha: float, lambda_pop: float, eps: float = 0.0
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
        mean_sq: Squared bias-corrected first moment m_hat^2.
        noise: Bias-corrected noise variance s_hat >= 0, same shape: variance of the batch-mean
            gradient (a mean over the batch, not a sum).
        gate: One of `GATES`.
        alpha: Boundary, >= 0.
        lambda_pop: Shrinkage beyond the boundary, >= 0.
        eps: Absolute constant on the scale of squared gradients. 0 outside the published rule.

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
        return open_mask(mean_sq, noise, alpha).to(mean_sq.dtype)
    if gate == "soft":
        signal = (mean_sq - alpha * noise).clamp_(min=0)
        penalty = lambda_pop * noise
    elif gate == "snr":
        signal, penalty = mean_sq, (lambda_pop * alpha) * noise
    else:
        raise ValueError(f"Invalid gate: {gate!r}. Must be one of {GATES}.")
    # signal <= total, so the floor only turns 0/0 into 0.
    total = (signal + penalty).add_(eps).clamp_(min=torch.finfo(mean_sq.dtype).tiny)
    return signal / total
