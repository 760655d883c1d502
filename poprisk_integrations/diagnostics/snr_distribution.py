"""Distribution of the gradient's signal-to-noise ratio over coordinates, noise taken off."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SNR_GRID", "SnrDistribution", "abs_t_histogram", "abs_t_probabilities", "deconvolve"]

# Per-batch SNR: none, then from far below what a probe of tens of steps resolves to beyond need.
SNR_GRID = torch.cat(
    [torch.zeros(1), torch.logspace(math.log10(0.03), math.log10(10), 40)]
).double()
# Of |t|: 0.1 apart where pure noise lives, then wider; the last bin is open.
_EDGES = torch.cat([torch.arange(0, 8, 0.1), torch.logspace(math.log10(8), 3, 25)]).double()
_EM_STEPS = 400
_NODES = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class SnrDistribution:
    """Share of coordinates at each value of `SNR_GRID`.

    Attributes:
        shares: Shape of `SNR_GRID`, sum 1.
    """

    shares: Tensor

    def mean(self, values: Tensor) -> float:
        """Mean over coordinates of a function of the SNR, given at `SNR_GRID`."""
        return float(self.shares @ values.double())

    def share_above(self, snr: float) -> float:
        """Share of coordinates with an SNR of at least `snr`."""
        return float(self.shares[snr <= SNR_GRID].sum())

    def quantile(self, level: float) -> float:
        """Smallest SNR of the grid that at least a share `level` of the coordinates stays below.

        Example:
            >>> shares = torch.zeros(len(SNR_GRID)).double()
            >>> shares[0] = 1.0
            >>> SnrDistribution(shares=shares).quantile(0.9)
            0.0
        """
        place = int(torch.searchsorted(self.shares.cumsum(0), level - 1e-12))
        return float(SNR_GRID[min(place, len(SNR_GRID) - 1)])


def abs_t_histogram(abs_t: Tensor, weight: Tensor) -> Tensor:
    """Weighted counts of |t| in the bins of `abs_t_probabilities`.

    Args:
        abs_t: |t| of each coordinate, shape (M,).
        weight: How many coordinates each stands for, same shape.
    """
    bins = torch.bucketize(abs_t.double(), _EDGES[1:])
    return torch.bincount(bins, weights=weight.double(), minlength=len(_EDGES))


def abs_t_probabilities(steps: int) -> Tensor:
    """Law of |t| for every SNR of the grid: shape (bins, SNRs), columns of sum 1.

    With T batch gradients of a coordinate, mean g_bar and unbiased variance s^2:
        t = sqrt(T) g_bar / s = (z + sqrt(T) SNR) / c,    z ~ N(0, 1),  c^2 ~ chi2_{T-1} / (T-1)
        P(|t| <= x) = E_c[ Phi(x c - d) - Phi(-x c - d) ],    d = sqrt(T) SNR
    for Gaussian noise (non-central Student); the mean over c is a sum over its density.

    Args:
        steps: T >= 4.
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


def deconvolve(histogram: Tensor, probabilities: Tensor) -> SnrDistribution:
    """Distribution of the true SNR that makes the histogram of |t| most likely.

        pi_j <- pi_j * sum_i h_i P_ij / (P pi)_i          (EM for a mixture over a fixed grid)
    An SNR measured from T steps scatters by 1/sqrt(T) (0.18 at T = 30), so the histogram of
    measured values shows signal where there is none; the mixture takes that scatter off. It
    resolves differences of about 1/sqrt(T) at best, and weak signals, below half of that, are
    known as an average only. Noise that is not Gaussian, and weights that move, enter as errors.

    Args:
        histogram: From `abs_t_histogram`, of positive sum.
        probabilities: From `abs_t_probabilities`, for the number of steps.

    Example:
        >>> p = abs_t_probabilities(30)
        >>> round(deconvolve(p[:, 0], p).share_above(0.3), 3)
        0.0
    """
    share = histogram.double() / histogram.sum()
    mixture = torch.full_like(SNR_GRID, 1 / len(SNR_GRID))
    for _ in range(_EM_STEPS):
        expected = (probabilities @ mixture).clamp(min=1e-300)
        mixture = mixture * (probabilities.T @ (share / expected))
    return SnrDistribution(shares=mixture / mixture.sum())
