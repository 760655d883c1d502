"""The window statistic F: is the training gradient larger than its own sampling noise?"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WindowRatio", "window_signal_ratio"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRatio:
    """F of one window, pooled and per tensor, and what else was measured in it.

    Attributes:
        ratio: F, the size-weighted mean of F_l over tensors with noise; NaN if there is none.
        per_tensor: F_l, shape (L,); NaN where a tensor had no noise (frozen, never used).
        noise: S_l, shape (L,): unbiased variance of the batch gradient summed over coordinates.
        steps: T, optimizer steps in the window.
        ratio_se: Standard error of `ratio` under pure noise; NaN if it was not asked for.
        risk_decrease: Mean over the window of the first-order decrease of the population risk if
            the last step were repeated, in units of the loss, may be negative; NaN if not
            measured (`diagnostics.GradientWindow`).
        risk_decrease_se: Its standard error, serial correlation allowed for.
        agreement: Mean over the window of the product of gradients one step apart, in units of
            the noise and weighted like `ratio`, may be negative; NaN if not measured.
        agreement_se: Its standard error, serial correlation allowed for.
    """

    ratio: float
    per_tensor: Tensor
    noise: Tensor
    steps: int
    ratio_se: float = math.nan
    risk_decrease: float = math.nan
    risk_decrease_se: float = math.nan
    agreement: float = math.nan
    agreement_se: float = math.nan


def window_signal_ratio(
    norm_sq_of_sum: Tensor,
    sum_of_norm_sq: Tensor,
    numel: Tensor,
    steps: int,
    *,
    norm_sq: Tensor | None = None,
) -> WindowRatio:
    """Ratio of accumulated signal to accumulated noise over a window of T batch gradients.

    Per tensor l, with A_l = sum_t g_t and Q_l = sum_t |g_t|^2 (batch-mean gradients):
        S_l = (Q_l - |A_l|^2 / T) / (T - 1)        unbiased, summed over coordinates
        F_l = |A_l|^2 / (T S_l)
        F   = sum_l w_l F_l,  w_l = numel_l / sum_l numel_l    over tensors with S_l > 0
    E F is about 1 + T * b * U / tr(Sigma): F < 1 says that the mean training gradient is no
    larger than sampling noise alone would make it (the criterion of Mahsereci et al. 2017,
    arXiv:1703.09580, accumulated over a window and pooled per tensor).

    Its standard error comes from the squared norms of the single batches:
        f_t = sum_l w_l |g_t,l|^2 / S_l,    se(F) = sd over t of f_t, unbiased (T-1)
    If g ~ N(0, Sigma), then A / sqrt(T) ~ N(0, Sigma) too: |A|^2 / T and |g_t|^2 have the same
    law, so the spread of the T squared norms is the spread of F's numerator. Tensors are pooled
    before the spread is taken, since a noisy batch is noisy in all of them at once. It is the
    error under pure noise, where F = 1 has to be told from more:
        - of a mean gradient mu it sees 4 mu' Sigma mu where Var(|A|^2 / T) has T times that, so
          far above F = 1 it is too small;
        - heavy tails widen the spread of one batch, not of a sum of T: there it is too large;
        - the noise of S_l is left out: too small by about 1 / (2 T).

    Args:
        norm_sq_of_sum: |A_l|^2, shape (L,).
        sum_of_norm_sq: Q_l, shape (L,).
        numel: Coordinates of each tensor over all shards, shape (L,).
        steps: T >= 2.
        norm_sq: |g_t,l|^2, shape (T, L); None leaves `ratio_se` NaN.

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
    weight = weight / weight.sum()
    ratio = (weight * per_tensor.nan_to_num(nan=0.0)).sum()
    ratio_se = math.nan
    if norm_sq is not None:
        per_step = norm_sq.double() @ torch.where(noisy, weight / noise, 0.0)
        ratio_se = float(per_step.std()) if bool(noisy.any()) else math.nan
    return WindowRatio(
        ratio=float(ratio), per_tensor=per_tensor, noise=noise, steps=steps, ratio_se=ratio_se
    )
