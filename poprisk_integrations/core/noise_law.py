"""Boundaries that pure noise crosses with a given probability, beyond `core.gate.calibrated_alpha`.

Noise that is read off Adam's own moments has a law of its own, and so has a mean over coordinates.
"""

import math
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from poprisk_integrations.core.noise import ema_mean_variance

__all__ = ["effective_coordinates", "moments_alpha", "moments_open_rate", "pooled_alpha"]

FOLDS = 14.0  # e-folds of an exponential average that are summed
BLOCK = 0.02  # e-folds that stand for one, where a sum over lags is smooth
NODES = 64  # of the integral along the cut


def moments_alpha(betas: tuple[float, float], false_open_rate: float) -> float:
    """Boundary for the noise s_hat = max(v_hat - m_hat^2, 0) that pure noise crosses so often.

    m_hat^2 > alpha * s_hat is m_hat^2 / v_hat > alpha / (1 + alpha): a bound on the squared
    length of Adam's own step. It is found from the law of that ratio (`moments_open_rate`).

    Args:
        betas: Decays of the first and second moment, each in [0, 1).
        false_open_rate: Share of pure-noise coordinates that pass, in (0, 1).

    Raises:
        ValueError: If the rate is out of range, or below the share of pure noise with m_hat^2 >=
            v_hat, whose s_hat is zero: no boundary closes those. It matters for short averages:
            1e-5 at betas (0.9, 0.999), but 0.32 at (0, 0.999).

    Example:
        >>> round(moments_alpha((0.9, 0.999), 0.05), 3), round(moments_alpha((0.9, 0.99), 0.05), 3)
        (0.253, 0.249)
    """
    if not 0.0 < false_open_rate < 1.0:
        raise ValueError(f"Invalid false_open_rate: {false_open_rate}. Must be in (0, 1).")
    # Schedulers may move betas at each step: the law is solved for betas of two digits, and what
    # beta1 is beyond them scales the variance of m_hat.
    beta1, near1, near2 = betas[0], *(1 - float(f"{1 - beta:.2g}") for beta in betas)
    tau = _moments_tau(near1, near2, float(false_open_rate))
    tau *= ema_mean_variance(beta1, 1 << 20) / ema_mean_variance(near1, 1 << 20)
    return tau / (1.0 - tau)


@lru_cache(maxsize=1024)
def _moments_tau(beta1: float, beta2: float, rate: float) -> float:
    lowest = moments_open_rate((beta1, beta2), 1.0)
    if rate <= lowest:
        raise ValueError(
            f"Invalid false_open_rate: {rate}. With noise_source='moments' it must be above "
            f"{lowest:.2g} at betas ({beta1:.4g}, {beta2:.4g}), the share of pure noise where "
            "m_hat^2 exceeds v_hat. Raise it or betas[0], or use noise_source='temporal'."
        )
    low, high = -30.0, 0.0  # of log(tau): the rate falls with tau
    while high - low > 1e-6:
        middle = (low + high) / 2
        if moments_open_rate((beta1, beta2), math.exp(middle)) > rate:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def moments_open_rate(betas: tuple[float, float], tau: float) -> float:
    """Probability that m_hat^2 > tau * v_hat for i.i.d. Gaussian gradients of mean zero.

    With the weights a_j, b_j of the two averages, m_hat^2 - tau * v_hat is a quadratic form of
    Gaussians with one positive eigenvalue. Its moment generating function D(s)^(-1/2),
        D(s) = prod_j (1 + 2 s tau b_j) * (1 - 2 s sum_j a_j^2 / (1 + 2 s tau b_j)),
    has one branch point s_1 on the positive axis; the probability is the integral along the cut:
        P = 1/pi * integral from s_1 to infinity of ds / (s * sqrt(-D(s)))

    Args:
        betas: Decays of the first and second moment, each in [0, 1).
        tau: Bound on m_hat^2 / v_hat, in (0, 1].

    Example:
        >>> round(moments_open_rate((0.9, 0.999), 0.0526), 2)
        0.32
    """
    beta1, beta2 = betas
    lag = torch.arange(1 + math.ceil(FOLDS / 2 / (1 - beta1)), dtype=torch.float64)
    a_sq = ((1 - beta1) * beta1**lag).square()
    b_near = (1 - beta2) * beta2**lag
    # The product runs over many more lags, but smoothly: one of each block stands for all.
    size = max(1, int(BLOCK / (1 - beta2)))
    blocks = torch.arange(1 + math.ceil(FOLDS / (1 - beta2) / size), dtype=torch.float64)
    b = (1 - beta2) * beta2 ** (blocks * size + (size - 1) / 2)

    def excess(s: Tensor) -> Tensor:
        """The second factor of -D: negative before the branch point."""
        return 2 * s * (a_sq / (1 + 2 * tau * s.unsqueeze(-1) * b_near)).sum(-1) - 1

    low, high = torch.tensor(-30.0).double(), torch.tensor(30.0).double()  # of log(s_1)
    if excess(high.exp()) <= 0:
        return 0.0  # no sequence of gradients gets there
    for _ in range(56):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle.exp()) > 0 else (middle, high)
    branch = high.exp()
    # s = s_1 + y^2 takes the root out of the singularity; y = u / (1 - u) maps the rest to [0, 1).
    u = (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES
    unit = branch.sqrt()
    y = unit * u / (1 - u)
    s = branch + y.square()
    log_product = size * torch.log1p(2 * tau * s[:, None] * b).sum(1)
    root = ((excess(s).log() + log_product) / 2).exp()
    return float((2 * y / (s * root) * unit / (1 - u).square()).mean() / math.pi)


def effective_coordinates(
    noise: Tensor, noise_sq: Tensor, noise_cube: Tensor, coordinates: int, decay: float
) -> tuple[Tensor, Tensor]:
    """How many coordinates of equal noise a mean over unequal ones is worth.

        n_eff = S1^2 / S2,   n_skew = S2^3 / S3^2,   S_k = sum_j s_j^k,   1 <= n_skew <= n_eff <= n

    sum_j s_j z_j^2 has the variance of a chi-square of n_eff degrees of freedom and the skewness of
    one of n_skew. Each s_j is itself known from f = (1+decay)/(1-decay) gradients only, which makes
    squares too large by 1 + 2/f and cubes by (1 + 2/f)(1 + 4/f).

    Args:
        noise: S1 over the coordinates of a mean, any scale.
        noise_sq: S2.
        noise_cube: S3.
        coordinates: n.
        decay: Of the average that s_j is.

    Example:
        >>> s = torch.tensor([1.0, 1.0, 0.0, 0.0])
        >>> effective_coordinates(s.sum(), s.square().sum(), (s**3).sum(), 4, decay=1.0)
        (tensor(2.), tensor(2.))
    """
    per_gradient = (1 - decay) / (1 + decay)
    tiny = torch.finfo(noise_sq.dtype).tiny
    second = noise_sq / (1 + 2 * per_gradient)
    third = noise_cube / ((1 + 2 * per_gradient) * (1 + 4 * per_gradient))
    variance = (noise.square() / second.clamp(min=tiny)).clamp(min=1, max=coordinates)
    # as a square of ratios: cubes of squares leave any range
    relative = second / third.clamp(min=tiny)
    skewness = (relative.square() * second).clamp(min=1)
    return variance, torch.minimum(skewness, variance)


def pooled_alpha(
    false_open_rate: float,
    coordinates: Tensor,
    skew_coordinates: Tensor | None = None,
    *,
    beta1: float,
    beta2: float | None = None,
) -> Tensor:
    """Boundary for a mean over independent coordinates, that pure noise crosses so often.

    The mean of m_hat^2 over coordinates of pure noise is Var(m_hat) * w, where w has mean 1, the
    variance of chi2_n / n and the skewness of a chi-square of k degrees of freedom. Its quantile is
        w = 1 + (W_k - 1) * sqrt(k / n),   W_k = (1 - h + z sqrt(h))^3,   h = 2/(9k)
    with W_k that of chi2_k / k by Wilson and Hilferty (5 % too often at k = 1, below 1 % from k = 4
    on) and the normal quantile z of 1 - false_open_rate. Then
        alpha = (1 - beta1)/2 * w
    or, where the noise is mean v_hat - mean m_hat^2,
        alpha = tau / (1 - tau),   tau = (1-beta1)/(1+beta1) * (1 + (w - 1) * r)
    r^2 = 1 + 1/f - 2d/c says that m and v share gradients: f = (1+beta2)/(1-beta2), d = sum_j
    a_j^2 b_j over the weights of the two averages, c = sum_j a_j^2.

    Coordinates that move together are worth fewer than they are: both tails are wider, and small
    rates are exceeded.

    Args:
        false_open_rate: Share of means of pure noise that pass, in (0, 1).
        coordinates: n, or n_eff of `effective_coordinates`; any shape.
        skew_coordinates: k, its n_skew; None for n.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment, where the noise is read off the moments.

    Example:
        >>> pooled_alpha(0.05, torch.tensor([10.0, 1e6]), beta1=0.9)
        tensor([0.0915, 0.0501])
    """
    k = coordinates if skew_coordinates is None else skew_coordinates
    h = 2 / (9 * k)
    w = (1 - h + NormalDist().inv_cdf(1 - false_open_rate) * h.sqrt()).clamp(min=0) ** 3
    w = (1 + (w - 1) * (k / coordinates).sqrt()).clamp(min=0)
    if beta2 is None:
        return (1 - beta1) / 2 * w
    c, scatter = (1 - beta1) / (1 + beta1), (1 - beta2) / (1 + beta2)
    shared = (1 - beta1) ** 2 * (1 - beta2) / (1 - beta1**2 * beta2)
    tau = c * (1 + (w - 1) * math.sqrt(max(0.0, 1 + scatter - 2 * shared / c)))
    return tau / (1 - tau).clamp(min=torch.finfo(tau.dtype).tiny)
