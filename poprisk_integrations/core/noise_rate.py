"""How many labels are wrong, estimated from margins that never saw them."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.core.untrained_margins import UntrainedMargins

__all__ = ["NoiseRateEstimate", "double_annotation_rate", "estimate_noise_rate"]

LARGEST_RATE = 0.49
MOST_CONFIDENT = 0.1  # the anchor's share of the pairs
FEWEST_PAIRS = 50
# Prior of the slope in units of 1 / rms(h): log-normal. If margins of right labels are N(mu, v) and
# of wrong ones N(-mu, v), the slope is 2 mu / v, which is 1.6 in these units where the model ranks
# three quarters of the pairs rightly, 0.8 at two thirds, 4 at nine tenths.
SLOPE_MEDIAN = 1.5
SLOPE_FACTOR = 2.0
_BINS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseRateEstimate:
    """A noise rate with its interval, and what it was made from.

    Attributes:
        rate: Posterior mean, in [0, 0.49].
        low: Lower end of the 95 % credible interval (2.5 % of the posterior below).
        high: Upper end of it.
        slope: k > 0: a pair of margin h has log-odds k |h| that the model ranks it as a clean label
            would. 0 where all margins are zero.
        maximum_likelihood: The rate of largest likelihood: the fixed point of EM, with k free. Of
            large spread where the model is weak, since k and the rate can make up for each other.
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
    maximum_likelihood: float
    upper_bound: float
    anchor: float
    num_pairs: int

    @property
    def informative(self) -> bool:
        """Whether the margins agree with the labels more often than guesses, by two errors.

        If they do not, half of the labels may be wrong or the model may have learned nothing: the
        interval then starts at zero.
        """
        return 0.5 - self.upper_bound > 1 / math.sqrt(self.num_pairs)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        """One line for people."""
        interval = f"{100 * self.low:.0f} to {100 * self.high:.0f} %, {self.num_pairs} pairs"
        if not self.informative:
            return f"the margins do not tell how many labels are wrong ({interval})"
        return f"{100 * self.rate:.0f} % of the labels look wrong (95 % interval {interval})"


def estimate_noise_rate(margins: UntrainedMargins) -> NoiseRateEstimate:
    """Posterior of the share of wrong labels in a mixture of right and wrong ones.

        P(margin agrees with the label | |h|) = (1 - e) s(k |h|) + e s(-k |h|)

    with s the logistic function; prior flat for e in [0, 0.49], log-normal for k (median 1.5 /
    rms(h), a factor of 2 for one standard deviation). The curve starts at 1/2 for margins that
    carry no information and saturates at 1 - e: pairs the model is sure about decide e, the others
    decide k. Without the prior of k the estimate is that of RE-PO's EM (arXiv:2509.24159, with a
    free scale), and a weak model then passes for one that is always sure, with every
    contradiction a wrong label. Labels that are wrong for a reason the margins share (length, an
    annotator's habit) count as right.

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
    rms = float(size.square().mean().sqrt())
    # Neighbours in |h| share a bin: the likelihood then costs the same for any number of pairs.
    parts = torch.tensor_split(order, min(_BINS, len(h)))
    centre = torch.stack([size[part].mean() for part in parts]) / (rms or 1.0)
    agreeing = torch.stack([agree[part].sum() for part in parts])
    contradicting = torch.tensor([float(len(part)) for part in parts]).double() - agreeing

    rates = torch.linspace(0, LARGEST_RATE, 99, dtype=torch.float64)
    slopes = torch.logspace(-2, 2, 81, dtype=torch.float64)
    table = _log_likelihood(rates, slopes, centre, agreeing, contradicting)
    prior = -0.5 * ((slopes / SLOPE_MEDIAN).log() / math.log(SLOPE_FACTOR)) ** 2
    posterior = (table + prior).flatten().softmax(0).reshape(table.shape)
    of_rate = posterior.sum(1)
    slope = float((posterior.sum(0) @ slopes.log()).exp())
    estimate = NoiseRateEstimate(
        rate=float(of_rate @ rates),
        low=_quantile(rates, of_rate, 0.025),
        high=_quantile(rates, of_rate, 0.975),
        slope=slope / rms if rms > 0 else 0.0,
        maximum_likelihood=float(rates[int(table.amax(1).argmax())]),
        upper_bound=1 - float(agree.mean()),
        anchor=1 - float(agree[top].mean()),
        num_pairs=len(h),
    )
    return estimate if estimate.informative else replace(estimate, low=0.0)


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


def _quantile(values: Tensor, weights: Tensor, share: float) -> float:
    """Smallest value with at least `share` of the weight up to it."""
    place = int(torch.searchsorted(weights.cumsum(0), share))
    return float(values[min(place, len(values) - 1)])
