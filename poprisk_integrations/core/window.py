"""The window statistic F: is the training gradient larger than its own sampling noise?"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["WindowRatio", "coordinate_ratio", "mean_standard_error", "window_signal_ratio"]

_LARGEST_RATIO = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRatio:
    """F of one window, pooled and per tensor, and what else was measured in it.

    Attributes:
        ratio: F, whitened per coordinate (`coordinate_ratio`) where the squares of single
            coordinates were summed, else `pooled_ratio`; NaN if there is no noise.
        pooled_ratio: The size-weighted mean of F_l over tensors with noise.
        per_tensor: F_l, pooled, shape (L,); NaN where a tensor had no noise (frozen, never used).
        noise: S_l, shape (L,): unbiased variance of the batch gradient summed over coordinates.
        steps: T, optimizer steps in the window.
        ratio_se: Standard error of `pooled_ratio` under pure noise, which is no smaller than that
            of `ratio` as a rule; NaN if it was not asked for.
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
    pooled_ratio: float = math.nan
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
    passes: float = 1.0,
) -> WindowRatio:
    """Ratio of accumulated signal to accumulated noise over a window of T batch gradients.

    Per tensor l, with A_l = sum_t g_t and Q_l = sum_t |g_t|^2 (batch-mean gradients):
        S_l = (Q_l - |A_l|^2 / T) / (T - 1)        unbiased, summed over coordinates
        F_l = |A_l|^2 / (T S_l) / passes
        F   = sum_l w_l F_l,  w_l = numel_l / sum_l numel_l    over tensors with S_l > 0
    E F is about 1 + T * b * U / tr(Sigma): F < 1 says that the mean training gradient is no
    larger than sampling noise alone would make it (the criterion of Mahsereci et al. 2017,
    arXiv:1703.09580, accumulated over a window and pooled per tensor).

    Its standard error comes from the squared norms of the single batches:
        f_t = sum_l w_l |g_t,l|^2 / S_l,    se(F) = sd over t of f_t, unbiased (T-1)
    If g ~ N(0, Sigma), then A / sqrt(T) ~ N(0, Sigma) too: |A|^2 / T and |g_t|^2 have the same
    law, so the spread of the T squared norms is the spread of F's numerator. It is the error under
    pure noise, where F = 1 has to be told from more:
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
        passes: Passes over the data in the window, >= 1; 1 for a part of a pass too.

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
    # Several passes see each example as often, so their sum averages the noise of one pass only.
    per_tensor = torch.where(noisy, signal / (steps * noise * passes), torch.nan)
    weight = torch.where(noisy, numel.double(), 0.0)
    weight = weight / weight.sum()
    ratio = (weight * per_tensor.nan_to_num(nan=0.0)).sum()
    ratio_se = math.nan
    if norm_sq is not None:
        # Pooled before the spread is taken: a noisy batch is noisy in all tensors at once.
        per_step = norm_sq.double() @ torch.where(noisy, weight / noise, 0.0)
        ratio_se = float(per_step.std()) if bool(noisy.any()) else math.nan
    return WindowRatio(
        ratio=float(ratio),
        pooled_ratio=float(ratio),
        per_tensor=per_tensor,
        noise=noise,
        steps=steps,
        ratio_se=ratio_se / passes,
    )


def coordinate_ratio(sums: Tensor, sums_of_squares: Tensor, steps: int | Tensor) -> Tensor:
    """Numerator and denominator of F, whitened per coordinate, for one tensor.

    With A_k = sum_t g_t,k and Q_k = sum_t g_t,k^2:
        s_k^2 = (Q_k - A_k^2 / T) / (T - 1)              unbiased variance of the batch gradient
        R_k   = min(A_k^2 / (T s_k^2), 100)
        F     = (T - 3)/(T - 1) * mean of R_k            over coordinates with Q_k > 0, / passes
    It is the EB criterion of Mahsereci et al. 2017 (arXiv:1703.09580, eq. 7) with a window's sum
    in place of a batch's mean. Every coordinate counts in units of its own noise, as for Adam. In
    the benchmark the regret was lower than with the pooled F (`recipes/benchmarks/early_stopping`).

    Args:
        sums: A_k, any shape.
        sums_of_squares: Q_k, same shape.
        steps: T >= 4; a 0-dim tensor where only the device knows it.

    Returns:
        Shape (2,): the sum of (T-3)/(T-1) R_k, and the number of coordinates with Q_k > 0.

    Example:
        >>> coordinate_ratio(torch.tensor([5.0, 0.0, 0.0]), torch.tensor([9.0, 2.0, 0.0]), 5)
        tensor([2.5000, 2.0000])
    """
    is_alive = sums_of_squares > 0
    signal = sums.square() / steps
    noise = (sums_of_squares - signal) / (steps - 1)
    # The cap keeps a coordinate whose gradient never changes from deciding for all; rounding may
    # leave it no noise, or less.
    ratio = torch.where(noise > 0, signal / noise, _LARGEST_RATIO).clamp(max=_LARGEST_RATIO)
    # 1 / E[1/s_k^2] of Gaussian noise, without which F would be too large. A coordinate that is
    # hit once in a window (a row of an embedding) has R_k = 1 without it: many of those start F a
    # little low, by 2/T.
    total = torch.where(is_alive, ratio, 0.0).sum() * ((steps - 3) / (steps - 1))
    return torch.stack([total, is_alive.sum().to(total.dtype)])


def mean_standard_error(values: Tensor, lags: int | None = None) -> tuple[float, float]:
    """Mean of a series and its standard error, with Bartlett weights on the autocovariances.

        c_j  = (1/T) sum_{t > j} (x_t - x_bar)(x_{t-j} - x_bar)
        V    = (c_0 + 2 sum_{j=1}^{lags} k_j c_j) / b,    k_j = 1 - j / (lags + 1)
        b    = 1 - 1/T - 2 sum_j k_j (T - j) / T^2
        se   = sqrt(V / T)
    b is what the same sum gives for independent values of variance 1: taking off the mean makes
    every c_j too small by about 1/T. With it V is unbiased for independent values, and `lags=0`
    is the usual sd / sqrt(T) with the unbiased (T-1) variance. V is never negative.

    The default, lags = floor(4 (T/100)^(2/9)) and at least 1 (Newey and West 1994), is meant for
    short memory: of the variance of a mean of AR(1) values with coefficient 0.5 it finds about
    three quarters at T = 100.

    Args:
        values: Shape (T,), finite.
        lags: Autocovariances to count, >= 0, cut at T - 1; None for the default.

    Returns:
        (mean, standard error); (NaN, NaN) for fewer than two values.

    Raises:
        ValueError: If `lags` < 0.

    Example:
        >>> import torch
        >>> mean_standard_error(torch.tensor([1.0, 3.0]), lags=0)
        (2.0, 1.0)
    """
    if lags is not None and lags < 0:
        raise ValueError(f"Invalid lags: {lags}. Must be >= 0.")
    count = values.numel()
    if count < 2:
        return math.nan, math.nan
    if lags is None:
        lags = max(1, math.floor(4 * (count / 100) ** (2 / 9)))
    x = values.double().cpu()
    mean = x.mean()
    x = x - mean
    total = float(x.dot(x)) / count
    expected = 1 - 1 / count
    for lag in range(1, min(lags, count - 1) + 1):
        weight = 1 - lag / (lags + 1)
        total += 2 * weight * float(x[lag:].dot(x[:-lag])) / count
        expected -= 2 * weight * (count - lag) / count**2
    # Rounding may leave a constant series a little below zero.
    return float(mean), math.sqrt(max(total, 0.0) / expected / count)
