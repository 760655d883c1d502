"""Probability that a label is wrong, given a margin from before it was trained on."""

import torch
from torch import Tensor

__all__ = ["flip_probability"]


def flip_probability(margins: Tensor, noise_rate: float, slope: float) -> Tensor:
    """Posterior of a wrong label under the mixture of `estimate_noise_rate`.

        P(wrong | h) = e s(-k h) / [(1 - e) s(k h) + e s(-k h)]

    Args:
        margins: Any shape, reward units, each from before its pair was trained on.
        noise_rate: e, the probability without a margin, in [0, 0.5).
        slope: k >= 0, as estimated.

    Returns:
        Same shape; NaN stays NaN.

    Example:
        >>> p = flip_probability(torch.tensor([-2.0, 0.0, 2.0]), noise_rate=0.3, slope=2.0)
        >>> [round(value, 3) for value in p.tolist()]
        [0.959, 0.3, 0.008]
    """
    if noise_rate == 0.0:
        return torch.where(margins.isnan(), margins, torch.zeros_like(margins))
    log_odds = torch.logit(torch.as_tensor(noise_rate, dtype=torch.float64)).to(margins)
    return torch.sigmoid(log_odds - slope * margins)
