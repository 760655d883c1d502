"""Standard error of a mean of serially correlated values."""

import math

from torch import Tensor

__all__ = ["mean_standard_error"]


def mean_standard_error(values: Tensor, lags: int | None = None) -> tuple[float, float]:
    """Mean of a series and its standard error, with Bartlett weights on the autocovariances.

        c_j  = (1/T) sum_{t > j} (x_t - x_bar)(x_{t-j} - x_bar)
        V    = (c_0 + 2 sum_{j=1}^{lags} k_j c_j) / b,    k_j = 1 - j / (lags + 1)
        b    = 1 - 1/T - 2 sum_j k_j (T - j) / T^2
        se   = sqrt(V / T)
    b is what the same sum gives for independent values of variance 1: taking off the mean makes
    every c_j too small by about 1/T. With it V is unbiased for independent values, and `lags=0`
    is the usual sd / sqrt(T) with the unbiased (T-1) variance. V is never negative.

    The default, lags = floor(4 (T/100)^(2/9)) and at least 1 (Newey and West 1994), grows slowly
    enough for windows of eight values (2 lags). It is meant for short memory: of the variance of
    a mean of AR(1) values with coefficient 0.5 it finds about three quarters at T = 100.

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
