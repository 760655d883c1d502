"""The window statistic F: is the training gradient larger than its own sampling noise?"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WindowRatio", "window_signal_ratio"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRatio:
    """F of one window, pooled and per tensor.

    Attributes:
        ratio: Size-weighted mean of F_l over tensors with noise; NaN if there is none.
        per_tensor: F_l, shape (L,); NaN where a tensor had no noise (frozen, never used).
        noise: S_l, shape (L,): unbiased variance of the batch gradient summed over coordinates.
        steps: T, optimizer steps in the window.
    """

    ratio: float
    per_tensor: Tensor
    noise: Tensor
    steps: int


def window_signal_ratio(
    norm_sq_of_sum: Tensor, sum_of_norm_sq: Tensor, numel: Tensor, steps: int
) -> WindowRatio:
    """Ratio of accumulated signal to accumulated noise over a window of T batch gradients.

    Per tensor l, with A_l = sum_t g_t and Q_l = sum_t |g_t|^2 (batch-mean gradients):
        S_l = (Q_l - |A_l|^2 / T) / (T - 1)        unbiased, summed over coordinates
        F_l = |A_l|^2 / (T S_l)
        F   = sum_l numel_l F_l / sum_l numel_l    over tensors with S_l > 0
    E F is about 1 + T * b * U / tr(Sigma): F < 1 says that the mean training gradient is no
    larger than sampling noise alone would make it (the criterion of Mahsereci et al. 2017,
    arXiv:1703.09580, accumulated over a window and pooled per tensor).

    Args:
        norm_sq_of_sum: |A_l|^2, shape (L,).
        sum_of_norm_sq: Q_l, shape (L,).
        numel: Coordinates of each tensor over all shards, shape (L,).
        steps: T >= 2.

    Raises:
        ValueError: If fewer than two steps were accumulated.

    Example:
        >>> sums = torch.tensor([16.0]), torch.tensor([10.0])  # g = 1 and 3
        >>> window_signal_ratio(*sums, torch.tensor([1.0]), steps=2).ratio
        4.0
    """
    if steps < 2:
        raise ValueError(f"Invalid steps: {steps}. A window needs at least 2 optimizer steps.")
    signal = norm_sq_of_sum.double()
    total = sum_of_norm_sq.double()
    noise = (total - signal / steps) / (steps - 1)
    # Identical gradients leave only rounding, which is not noise.
    noisy = noise > 1e-12 * total
    per_tensor = torch.where(noisy, signal / (steps * noise), torch.nan)
    weight = torch.where(noisy, numel.double(), 0.0)
    ratio = (weight * per_tensor.nan_to_num(nan=0.0)).sum() / weight.sum()
    return WindowRatio(ratio=float(ratio), per_tensor=per_tensor, noise=noise, steps=steps)
