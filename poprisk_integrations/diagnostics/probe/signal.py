"""Signal and noise of gradients: noise scale, and the SNR of each coordinate, noise taken off."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from poprisk_integrations.core import coordinate_ratio

__all__ = ["SNR_GRID", "GroupProbe", "GroupSums"]

# Per-batch SNR: none, then from far below what a probe of tens of steps resolves to beyond need.
SNR_GRID = torch.cat(
    [torch.zeros(1), torch.logspace(math.log10(0.03), math.log10(10), 40)]
).double()
# Of |t|: 0.1 apart where pure noise lives, then wider; the last bin is open.
_EDGES = torch.cat([torch.arange(0, 8, 0.1), torch.logspace(math.log10(8), 3, 25)]).double()
_EM_STEPS = 400
_NODES = 400
_CHUNK = 1 << 16  # coordinates worked on at a time, in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseScale:
    """Signal and noise of the batch gradient, and their ratio."""

    signal: float  # estimate of |G|^2, G the expected gradient; may be negative
    noise: float  # estimate of tr(S), S the covariance of the batch-mean gradient
    ratio: float  # signal / noise = b / B_simple; may be negative
    ratio_se: float  # its standard error

    @property
    def batches(self) -> float:
        """B_simple / b; infinite where no signal was found."""
        return 1.0 / self.ratio if self.ratio > 0 else math.inf

    @property
    def batches_se(self) -> float:
        """Standard error of `batches` to first order."""
        return self.ratio_se / self.ratio**2 if self.ratio > 0 else math.inf

    def interval(self) -> tuple[float, float]:
        """Range of `batches` for a ratio within two standard errors.

        Example:
            >>> NoiseScale(signal=1.0, noise=2.0, ratio=0.5, ratio_se=0.25).interval()
            (1.0, inf)
        """
        ends = self.ratio + 2 * self.ratio_se, self.ratio - 2 * self.ratio_se
        low, high = (1.0 / end if end > 0 else math.inf for end in ends)
        return low, high

    def is_significant(self) -> bool:
        """Whether the signal is more than two standard errors above zero."""
        return self.ratio - 2 * self.ratio_se > 0


def noise_scale(gram: Tensor) -> NoiseScale:
    """Noise scale of McCandlish et al. 2018 (arXiv:1812.06162), in batches, from one run.

    With batch-mean gradients g_t of b examples each, K_ts = g_t . g_s and L = T // 6:
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

    Example:
        >>> g = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0], [1.0, 0.0]])  # |G|^2 = 2/3
        >>> round(noise_scale(g @ g.T).batches, 6)
        1.25
    """
    steps = len(gram)
    lags = max(1, steps // 6)
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
    # Variance of the product of two steps' noises, tr(S^2): of the centred off-diagonal K.
    centred = k - k.mean(0) - k.mean(1)[:, None] + k.mean()
    pair_variance = float(centred[distance > 0].var())
    scatter = ((1 + ratio) / noise) ** 2 * pair_variance
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


@dataclass(frozen=True, kw_only=True, slots=True)
class SnrDistribution:
    """Share of coordinates at each value of `SNR_GRID`; sum 1."""

    shares: Tensor

    def mean(self, values: Tensor) -> float:
        """Mean over coordinates of a function of the SNR, given at `SNR_GRID`."""
        return float(self.shares @ values.double())

    def share_above(self, snr: float) -> float:
        """Share of coordinates with an SNR of at least `snr`."""
        return float(self.shares[snr <= SNR_GRID].sum())

    def quantile(self, level: float) -> float:
        """Smallest SNR of the grid that at least a share `level` of the coordinates stays below."""
        place = int(torch.searchsorted(self.shares.cumsum(0), level - 1e-12))
        return float(SNR_GRID[min(place, len(SNR_GRID) - 1)])


@functools.cache
def abs_t_probabilities(steps: int) -> Tensor:
    """Law of |t| for every SNR of the grid: shape (bins, SNRs), columns of sum 1.

    With T = `steps` batch gradients of a coordinate, mean g_bar and unbiased variance s^2:
        t = sqrt(T) g_bar / s = (z + sqrt(T) SNR) / c,    z ~ N(0, 1),  c^2 ~ chi2_{T-1} / (T-1)
        P(|t| <= x) = E_c[ Phi(x c - d) - Phi(-x c - d) ],    d = sqrt(T) SNR
    for Gaussian noise (non-central Student); the mean over c is a sum over its density.
    """
    dof = steps - 1
    spread = 8 / math.sqrt(2 * dof)
    nodes = torch.linspace(max(1e-6, 1 - spread), 1 + spread, _NODES).double()
    log_density = (dof - 1) * nodes.log() - dof * nodes.square() / 2
    weight = (log_density - log_density.max()).exp()
    weight = weight / weight.sum()
    shift = math.sqrt(steps) * SNR_GRID[:, None]
    normal_cdf = torch.special.ndtr
    below = torch.stack(
        [(normal_cdf(x * nodes - shift) - normal_cdf(-x * nodes - shift)) @ weight for x in _EDGES]
    )
    return torch.cat([below.diff(dim=0), 1 - below[-1:]]).clamp(min=0)


def deconvolve(histogram: Tensor, steps: int) -> SnrDistribution:
    """Distribution of the true SNR that makes the histogram of |t| most likely.

        pi_j <- pi_j * sum_i h_i P_ij / (P pi)_i          (EM for a mixture over a fixed grid)
    An SNR measured from T steps scatters by 1/sqrt(T) (0.18 at T = 30), so the histogram of
    measured values shows signal where there is none; the mixture takes that scatter off. It
    resolves differences of about 1/sqrt(T) at best, and weak signals, below half of that, are
    known as an average only. Noise that is not Gaussian, and weights that move, enter as errors.

    Example:
        >>> pure_noise = abs_t_probabilities(30)[:, 0]
        >>> round(deconvolve(pure_noise, 30).share_above(0.3), 3)
        0.0
    """
    share, probabilities = histogram / histogram.sum(), abs_t_probabilities(steps)
    mixture = torch.full_like(SNR_GRID, 1 / len(SNR_GRID))
    for _ in range(_EM_STEPS):
        expected = (probabilities @ mixture).clamp(min=1e-300)
        mixture = mixture * (probabilities.T @ (share / expected))
    return SnrDistribution(shares=mixture / mixture.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupProbe:
    """One group of layers, or all together."""

    name: str
    parameters: int  # trained ones with a gradient
    dead: float  # share of them whose gradient was 0 at every step; they count in nothing else
    snr: SnrDistribution | None  # of the per-batch SNR over coordinates; None if all are dead
    rms_snr_sq: float  # mean square of the SNR, scatter taken off; may be negative
    rms_snr_sq_se: float  # its standard error
    scale: NoiseScale  # every coordinate with its own size
    signal_ratio: float  # F of the probed steps as one window, as in `core.coordinate_ratio`

    @property
    def rms_snr(self) -> float:
        """Root of the mean square, 0 where the estimate is negative."""
        return math.sqrt(self.rms_snr_sq) if self.rms_snr_sq > 0 else 0.0

    def has_signal(self) -> bool:
        """Whether batches agree by more than two standard errors, in either weighting."""
        return self.scale.is_significant() or self.rms_snr_sq > 2 * self.rms_snr_sq_se


class GroupSums:
    """Sums over the coordinates of a group, from which all of its numbers come."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.parameters = self.sampled = 0
        self._alive = 0.0
        self._gram = torch.zeros(steps, steps).double()
        self._white_gram = torch.zeros(steps, steps).double()
        self._histogram = torch.zeros(len(_EDGES)).double()
        self._ratio = torch.zeros(2).double()

    def add(self, values: Tensor, weight: float, numel: int) -> None:
        """Take in a tensor's coordinates, of which each stands for `weight`."""
        self.parameters += numel
        self.sampled += values.shape[1]
        for part in torch.split(values, _CHUNK, dim=1):
            g = part.double()
            g = g[:, (g != 0).any(0)]
            if g.shape[1] == 0:
                continue
            mean, variance = g.mean(0), g.var(0)
            # A gradient that never changes would count without end: `coordinate_ratio`'s cap.
            floor = (mean.square() * self._steps / 100).clamp(min=torch.finfo(g.dtype).tiny)
            white = g / torch.maximum(variance, floor).sqrt()
            abs_t = white.mean(0).abs() * math.sqrt(self._steps)
            self._gram += weight * (g @ g.T)
            self._white_gram += weight * (white @ white.T)
            bins = torch.bucketize(abs_t, _EDGES[1:])
            self._histogram += weight * torch.bincount(bins, minlength=len(_EDGES))
            self._ratio += weight * coordinate_ratio(g.sum(0), g.square().sum(0), self._steps)
            self._alive += weight * g.shape[1]

    def merge(self, other: "GroupSums") -> None:
        """Take in another group."""
        for name, value in vars(other).items():
            if name != "_steps":
                setattr(self, name, getattr(self, name) + value)

    def finish(self, name: str) -> GroupProbe:
        """The group's numbers."""
        is_dead = self._alive == 0
        # A coordinate is whitened by its own estimated noise s: E[g_bar^2 / s^2] is
        # (T-1)/(T-3) (SNR^2 + 1/T), of which the pairs of steps leave 1/T out.
        shrink = (self._steps - 3) / (self._steps - 1)
        white = noise_scale(self._white_gram)
        rms_snr_sq = shrink * (white.ratio + 1 / self._steps) - 1 / self._steps
        return GroupProbe(
            name=name,
            parameters=self.parameters,
            dead=1 - self._alive / self.parameters,
            snr=None if is_dead else deconvolve(self._histogram, self._steps),
            rms_snr_sq=math.nan if is_dead else rms_snr_sq,
            rms_snr_sq_se=math.nan if is_dead else shrink * white.ratio_se,
            scale=noise_scale(self._gram),
            signal_ratio=math.nan if is_dead else float(self._ratio[0] / self._ratio[1]),
        )
