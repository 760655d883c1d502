"""Noise scale: the batch size at which gradient noise and gradient are of equal size."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["NoiseScale", "noise_scale"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseScale:
    """Signal and noise of the batch gradient, and their ratio.

    Attributes:
        signal: Estimate of |G|^2, G the expected gradient; may be negative.
        noise: Estimate of tr(S), S the covariance of the batch-mean gradient.
        ratio: signal / noise = b / B_simple; may be negative.
        ratio_se: Its standard error.
    """

    signal: float
    noise: float
    ratio: float
    ratio_se: float

    @property
    def batches(self) -> float:
        """B_simple / b; infinite where no signal was found."""
        return 1.0 / self.ratio if self.ratio > 0 else math.inf

    @property
    def batches_se(self) -> float:
        """Standard error of `batches` to first order; infinite where no signal was found."""
        return self.ratio_se / self.ratio**2 if self.ratio > 0 else math.inf

    def interval(self, z: float = 2.0) -> tuple[float, float]:
        """Range of `batches` for a ratio within `z` standard errors.

        Example:
            >>> NoiseScale(signal=1.0, noise=2.0, ratio=0.5, ratio_se=0.25).interval()
            (1.0, inf)
        """
        low, high = self.ratio + z * self.ratio_se, self.ratio - z * self.ratio_se
        return (1.0 / low if low > 0 else math.inf), (1.0 / high if high > 0 else math.inf)

    def is_significant(self, z: float = 2.0) -> bool:
        """Whether the signal is more than `z` standard errors above zero."""
        return self.ratio - z * self.ratio_se > 0


def noise_scale(gram: Tensor, lags: int | None = None) -> NoiseScale:
    """Noise scale of McCandlish et al. 2018 (arXiv:1812.06162), in batches, from one run.

    With batch-mean gradients g_t of b examples each, K_ts = g_t . g_s and L = `lags`:
        |G|^2     = mean of K_ts over pairs with 0 < |t - s| <= L      (no noise in common)
        tr(S)     = mean of K_tt - |G|^2                               S = Sigma / b
        B_simple  = tr(Sigma) / |G|^2 = b tr(S) / |G|^2
    Both are unbiased for gradients at fixed weights, as the paper's two-batch-size form. Weights
    move while a probe runs: only pairs of near steps are compared, so that a slow turn of the
    gradient does not pass for noise. Noise scale and standard error go by the ratio
    |G|^2 / tr(S), which is nearly linear in the estimate; 1 / ratio is not. The error is
        Var = V_1 + V_2,    V_2 = tr(S^2) ((1 + ratio)/tr(S))^2 / (pairs within L)
    with V_1, linear in the noise, from the jackknife over steps with all pairs, which gives
    V_1 + 2 V_2; a turning gradient makes V_1, and so the error, too large.

    Args:
        gram: K, shape (T, T), symmetric, T >= 3.
        lags: L >= 1; None for T // 6.

    Raises:
        ValueError: If there are fewer than three steps, or L < 1.

    Example:
        >>> g = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])  # G = (1, 0)
        >>> round(noise_scale(g @ g.T, lags=3).batches, 6)
        2.0
    """
    steps = len(gram)
    if steps < 3 or (lags is not None and lags < 1):
        raise ValueError(f"Invalid gram or lags: {steps} steps, {lags}. Must be >= 3 and >= 1.")
    lags = lags or max(1, steps // 6)
    k = gram.double()
    position = torch.arange(steps)
    distance = (position[:, None] - position).abs()
    near = (distance > 0) & (distance <= lags)
    signal = float(k[near].mean())
    noise = float(k.diagonal().mean()) - signal
    if noise <= 1e-12 * abs(signal):  # identical gradients leave rounding, not noise
        ratio = math.inf if signal > 0 else math.nan
        return NoiseScale(signal=signal, noise=noise, ratio=ratio, ratio_se=0.0)
    ratio = signal / noise
    slope_sq = ((1 + ratio) / noise) ** 2
    scatter = slope_sq * _pair_variance(k)
    linear = _jackknife_variance(k) - 2 * scatter / math.comb(steps, 2)
    variance = max(linear, 0.0) + scatter / (int(near.sum()) / 2)
    return NoiseScale(signal=signal, noise=noise, ratio=ratio, ratio_se=math.sqrt(variance))


def _jackknife_variance(k: Tensor) -> float:
    """Delete-one-step jackknife of the ratio with all pairs.

    It has the part of the variance that is linear in the noise of a step once, and the part from
    products of two noises twice (as of any U-statistic of degree two).
    """
    steps = len(k)
    row, square, total = k.sum(1), k.diagonal(), k.sum()
    left = steps - 1
    pairs = total - 2 * row + square - (square.sum() - square)
    signal = pairs / (left * (left - 1))
    ratios = signal / ((square.sum() - square) / left - signal)
    return float((ratios - ratios.mean()).square().sum()) * left / steps


def _pair_variance(k: Tensor) -> float:
    """Variance of the product of two steps' noises, tr(S^2): of the centred off-diagonal K."""
    centred = k - k.mean(0) - k.mean(1)[:, None] + k.mean()
    return float(centred[~torch.eye(len(k), dtype=torch.bool)].var())
