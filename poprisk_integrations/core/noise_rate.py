"""How many labels are wrong, estimated from margins that never saw them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.core.untrained_margins import UntrainedMargins

__all__ = ["NoiseRateEstimate", "double_annotation_rate", "estimate_noise_rate"]

LARGEST_RATE = 0.49
MOST_CONFIDENT = 0.1  # the anchor's share of the pairs
FEWEST_PAIRS = 50
WIDEST_INTERVAL = 0.25
_HALF_CHI2 = 1.9207  # half the 95 % point of chi-square with one degree of freedom
_BINS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseRateEstimate:
    """A noise rate with its interval, and what it was made from.

    Attributes:
        rate: Maximum-likelihood estimate, in [0, 0.49].
        low: Lower end of the 95 % profile-likelihood interval.
        high: Upper end of it.
        slope: k > 0: a pair of margin h has log-odds k |h| that the model ranks it as a clean label
            would. 0 where the margins tell nothing; `rate` is then not determined by the data.
        upper_bound: Share of the labels that the margins contradict. The true rate is below it but
            for sampling error, if the model is right more often than not.
        anchor: The same among the tenth of the pairs with the largest absolute margin. Above the
            true rate by the model's errors there.
        num_pairs: Pairs with a margin.
    """

    rate: float
    low: float
    high: float
    slope: float
    upper_bound: float
    anchor: float
    num_pairs: int

    @property
    def determined(self) -> bool:
        """Whether the interval is narrow enough (0.25) for the rate to mean something."""
        return self.high - self.low <= WIDEST_INTERVAL

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        """One line for people."""
        interval = (
            f"(95 % interval {100 * self.low:.0f} to {100 * self.high:.0f} %, "
            f"{self.num_pairs} pairs)"
        )
        if not self.determined:
            return f"the margins do not tell how many labels are wrong {interval}"
        return f"{100 * self.rate:.0f} % of the labels look wrong {interval}"


def estimate_noise_rate(margins: UntrainedMargins) -> NoiseRateEstimate:
    """Maximum likelihood of a mixture of right and wrong labels.

        P(margin agrees with the label | |h|) = (1 - e) s(k |h|) + e s(-k |h|)

    with s the logistic function; e and k are fitted together. The curve starts at 1/2 for margins
    that carry no information and saturates at 1 - e: pairs the model is sure about decide e, the
    others decide k. Alternating between e and the posterior of each label is the EM of RE-PO
    (arXiv:2509.24159), whose fixed point this is; here k is free, since a model in training is not
    calibrated, and the likelihood is maximized on a grid, which also gives the interval.

    Args:
        margins: Taken before the pairs were trained on.

    Raises:
        ValueError: If fewer than 50 pairs have a margin.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> h = 2 * torch.randn(4000, generator=generator).abs()
        >>> clean = torch.rand(4000, generator=generator) < torch.sigmoid(2 * h)
        >>> flipped = torch.rand(4000, generator=generator) < 0.3
        >>> record = UntrainedMargins(4000)
        >>> record.record(torch.arange(4000), torch.where(clean ^ flipped, h, -h), step=0)
        >>> estimate = estimate_noise_rate(record)
        >>> estimate.low < 0.3 < estimate.high
        True
    """
    h = margins.margin[margins.margin.isfinite()]
    if len(h) < FEWEST_PAIRS:
        raise ValueError(
            f"{len(h)} pairs have a margin from before they were trained on; an estimate of the "
            f"noise rate needs at least {FEWEST_PAIRS}."
        )
    size, agree = h.abs(), (h > 0).double() + 0.5 * (h == 0).double()
    order = size.argsort(stable=True)
    top = order[-max(round(MOST_CONFIDENT * len(h)), 1) :]
    scale = float(size.square().mean().sqrt())
    common: dict[str, Any] = {
        "upper_bound": 1 - float(agree.mean()),
        "anchor": 1 - float(agree[top].mean()),
        "num_pairs": len(h),
    }
    if scale == 0.0:
        return NoiseRateEstimate(rate=0.0, low=0.0, high=LARGEST_RATE, slope=0.0, **common)
    # Neighbours in |h| share a bin: the likelihood then costs the same for any number of pairs.
    parts = torch.tensor_split(order, min(_BINS, len(h)))
    centre = torch.stack([size[part].mean() for part in parts]) / scale
    agreeing = torch.stack([agree[part].sum() for part in parts])
    contradicting = torch.tensor([float(len(part)) for part in parts]).double() - agreeing

    rates = torch.linspace(0, LARGEST_RATE, 50, dtype=torch.float64)
    slopes = torch.logspace(-2, 2, 81, dtype=torch.float64)
    table = _log_likelihood(rates, slopes, centre, agreeing, contradicting)
    profile = table.amax(dim=1)
    at = int(profile.argmax())
    fine_rates = torch.linspace(
        float(rates[max(at - 1, 0)]), float(rates[min(at + 1, len(rates) - 1)]), 41
    ).double()
    slope_at = int(table[at].argmax())
    fine_slopes = torch.logspace(-0.1, 0.1, 41, dtype=torch.float64) * slopes[slope_at]
    fine = _log_likelihood(fine_rates, fine_slopes, centre, agreeing, contradicting)
    best = int(fine.argmax())
    rate, slope = float(fine_rates[best // 41]), float(fine_slopes[best % 41])
    peak = max(float(fine.max()), float(profile.max()))
    low, high = _interval(rates, profile, peak)
    return NoiseRateEstimate(
        rate=rate, low=min(low, rate), high=max(high, rate), slope=slope / scale, **common
    )


def double_annotation_rate(num_pairs: int, num_disagreements: int) -> tuple[float, float]:
    """Noise rate of single labels from pairs that were labelled twice, independently.

        D = 2 e (1 - e),   e = (1 - sqrt(1 - 2 D)) / 2

    The most trustworthy of all estimates, since it needs no model. It assumes that both labels are
    wrong with the same probability, independently: pairs that are hard for every annotator make it
    too low.

    Args:
        num_pairs: Pairs with two labels.
        num_disagreements: How many of them have two different labels.

    Returns:
        The rate and its standard error (delta method). More disagreements than half of the pairs
        give 0.5, with an infinite standard error.

    Raises:
        ValueError: If the counts are not such.

    Example:
        >>> rate, error = double_annotation_rate(300, 96)
        >>> round(rate, 3), round(error, 3)
        (0.2, 0.022)
    """
    if num_pairs <= 0:
        raise ValueError(f"Invalid num_pairs: {num_pairs}. Must be > 0.")
    if not 0 <= num_disagreements <= num_pairs:
        raise ValueError(
            f"Invalid num_disagreements: {num_disagreements}. Must be in [0, num_pairs]."
        )
    share = num_disagreements / num_pairs
    if share >= 0.5:
        return 0.5, math.inf
    root = math.sqrt(1 - 2 * share)
    return (1 - root) / 2, math.sqrt(share * (1 - share) / num_pairs) / (2 * root)


def _log_likelihood(
    rates: Tensor, slopes: Tensor, centre: Tensor, agreeing: Tensor, contradicting: Tensor
) -> Tensor:
    """Shape (rates, slopes)."""
    right = torch.sigmoid(slopes[:, None] * centre)  # (slopes, bins)
    p = (1 - rates)[:, None, None] * right + rates[:, None, None] * (1 - right)
    tiny = torch.finfo(p.dtype).tiny
    return p.clamp(min=tiny).log() @ agreeing + (1 - p).clamp(min=tiny).log() @ contradicting


def _interval(rates: Tensor, profile: Tensor, peak: float) -> tuple[float, float]:
    """Where the profile likelihood falls by half the chi-square point, interpolated."""
    inside = torch.nonzero(profile >= peak - _HALF_CHI2).squeeze(1)
    if not len(inside):  # the interval is narrower than the grid
        nearest = float(rates[int(profile.argmax())])
        step = float(rates[1] - rates[0])
        return max(nearest - step, 0.0), min(nearest + step, LARGEST_RATE)

    def crossing(inner: int, outer: int) -> float:
        if not 0 <= outer < len(rates):
            return float(rates[inner])
        drop = float(profile[inner] - (peak - _HALF_CHI2))
        whole = float(profile[inner] - profile[outer])
        return float(rates[inner] + (rates[outer] - rates[inner]) * drop / whole)

    first, last = int(inside[0]), int(inside[-1])
    return crossing(first, first - 1), crossing(last, last + 1)
