"""How many labels are wrong, and which, from margins of pairs before they were trained on."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.core.calibration import wilson_interval

__all__ = [
    "FEWEST_PAIRS",
    "LARGEST_RATE",
    "WIDEST",
    "NoiseRateEstimate",
    "UntrainedMargins",
    "double_annotation_rate",
    "estimate_noise_rate",
    "fitted_slope",
    "flip_probability",
    "label_log_likelihood",
]

LARGEST_RATE = 0.49
FEWEST_PAIRS = 50
WIDEST = 0.25  # an interval wider than this names no rate
SMALLEST_SHARE = 0.05  # of the usual size, below which margins are those of an unmoved model
# The upper end: shares of the surest pairs that are looked at, and one-sided errors (2.5 % over 4).
SURE_SHARES = (0.1, 0.2, 0.4, 1.0)
SURE_ERRORS = 2.5
# The lower end: what is allowed for. Both are from recipes/benchmarks/noise_rate_coverage.
MODEL_ERROR = 0.03  # the model's own mistakes about the pairs it is surest of
HEAVY_TAILS = 3.5  # kurtosis from which the size of a margin may say nothing of its certainty
LIKELIHOOD_DROP = 2.7  # of the log-likelihood, at the end of the interval
_RATES, _SLOPES, _BINS = 50, 31, 50


class UntrainedMargins:
    """A record that keeps the first margin of every pair, and no later one.

    A model fits the labels it was trained on, wrong ones too: margins of pairs that were trained on
    say nothing about whether a label is wrong. The noise rate and the flip report are made from
    this record alone, and it takes a margin only at a pair's first sight, which in training is the
    forward pass before its first update. Nothing replaces it afterwards.

    Args:
        num_pairs: Number of rows of the data set.

    Attributes:
        margin: Shape (num_pairs,), fp64, NaN where there is none yet. Reward units.
        step: Shape (num_pairs,), int64: optimizer steps done when it was taken, -1 where there is
            none.

    Example:
        >>> record = UntrainedMargins(3)
        >>> record.record(torch.tensor([2, 0]), torch.tensor([0.5, -1.0]), step=0)
        >>> record.record(torch.tensor([0]), torch.tensor([7.0]), step=4)  # has been trained on
        >>> record.margin.tolist()
        [-1.0, nan, 0.5]
    """

    def __init__(self, num_pairs: int) -> None:
        self.margin = torch.full((num_pairs,), torch.nan, dtype=torch.float64)
        self.step = torch.full((num_pairs,), -1, dtype=torch.int64)

    def __len__(self) -> int:
        """Rows of the data set."""
        return len(self.margin)

    @property
    def seen(self) -> Tensor:
        """Boolean, shape (num_pairs,): rows that have a margin."""
        return self.step >= 0

    @property
    def judged(self) -> Tensor:
        """Boolean, shape (num_pairs,): rows whose margin says something about their label.

        Not those of the first steps, up to the first whose margins have at least a twentieth of the
        usual size: until then the model is still the reference. Nor a margin of exactly zero.
        """
        judged = self.margin.isfinite() & (self.margin != 0)
        if not judged.any():
            return judged
        size = self.margin[judged].abs()
        steps, place = torch.unique(self.step[judged], return_inverse=True)
        largest = torch.zeros(len(steps), dtype=size.dtype).scatter_reduce(0, place, size, "amax")
        moved = int(steps[largest >= SMALLEST_SHARE * size.median()][0])
        return judged & (self.step >= moved)

    def record(self, rows: Tensor, margins: Tensor, step: int | Tensor) -> None:
        """Take the margins of rows that have none; of a row that occurs twice, the first.

        Args:
            rows: Shape (k,), row numbers; negative ones (padding) are left out.
            margins: Shape (k,), reward units. One that is not finite counts as seen, and stays NaN.
            step: Optimizer steps done before, >= 0; one number or shape (k,).

        Raises:
            IndexError: If a row is not below `num_pairs`.
        """
        rows = rows.detach().cpu().to(torch.int64)
        margins = margins.detach().cpu().to(torch.float64)
        steps = torch.as_tensor(step, dtype=torch.int64).cpu().expand(rows.shape)
        if rows.numel() and int(rows.max()) >= len(self):
            raise IndexError(f"row {int(rows.max())} of a data set of {len(self)} rows")
        numbered = torch.nonzero(rows >= 0).squeeze(1)
        new = numbered[~self.seen[rows[numbered]]]
        first = torch.full_like(self.step, len(rows))
        first.scatter_reduce_(0, rows[new], new, "amin")
        first = first[first < len(rows)]
        finite = margins[first].isfinite()
        self.margin[rows[first]] = margins[first].masked_fill(~finite, torch.nan)
        self.step[rows[first]] = steps[first]

    def state_dict(self) -> dict[str, Tensor]:
        """The record as two tensors."""
        return {"margin": self.margin, "step": self.step}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the place of what is recorded.

        Raises:
            ValueError: If the record is of a data set of another size.
        """
        if len(state["margin"]) != len(self):
            raise ValueError(
                f"The recorded margins are of {len(state['margin'])} pairs, the data have "
                f"{len(self)}."
            )
        self.margin = state["margin"].to(torch.float64).clone()
        self.step = state["step"].to(torch.int64).clone()


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseRateEstimate:
    """A noise rate with its interval, and what it was made from.

    Attributes:
        rate: In [low, high], the middle of it where nothing but its upper end is known; None
            where the margins do not tell.
        low: Lower end of the 95 % interval; 0 where the margins do not tell.
        high: Upper end of it, at most 0.49.
        reference_rate: What probabilities of single labels are made with: the rate, or, where it
            is not told, the value that a logistic curve fits best. They are then no
            probabilities, but still a ranking.
        slope: k >= 0: a pair of margin h has log-odds k |h| that the model ranks it as a clean
            label would, if the rate is `reference_rate`. 0 where all margins are zero.
        upper_bound: Share of the labels that the margins contradict. The true rate is below it but
            for sampling error, if the model is right more often than not.
        anchor: Share of contradicted labels among the tenth of the pairs with the largest absolute
            margin. It is above the true rate by the model's errors on these pairs.
        num_pairs: Pairs that were judged.
        num_not_judged: Pairs whose margin is from before the model had moved; they do not count.
    """

    rate: float | None
    low: float
    high: float
    reference_rate: float
    slope: float
    upper_bound: float
    anchor: float
    num_pairs: int
    num_not_judged: int

    @property
    def informative(self) -> bool:
        """Whether the margins tell the rate: the interval is at most 0.25 wide."""
        return self.rate is not None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, and None for a rate that is not told."""
        return {name: getattr(self, name) for name in self.__slots__}

    def __str__(self) -> str:
        """One line for people."""
        interval = f"{100 * self.low:.0f} to {100 * self.high:.0f} %, {self.num_pairs} pairs"
        if self.rate is None:
            return f"the margins do not tell how many labels are wrong ({interval})"
        return f"{100 * self.rate:.0f} % of the labels look wrong (95 % interval {interval})"


def estimate_noise_rate(margins: UntrainedMargins) -> NoiseRateEstimate:
    """Interval for the share of wrong labels, and the rate where it is narrow enough to name one.

        P(margin agrees with the label) = (1 - e) c + e (1 - c)

    with e the rate and c the probability that the model ranks a clean label rightly. Two ends:

    - Upper: since c <= 1, no group of pairs has fewer contradicted labels than e, whatever c is.
      The smallest upper confidence limit among the 10, 20, 40 and 100 % surest pairs bounds e.
    - Lower: nothing bounds e from below but a statement on c. Here it is c = s(k |h|), s the
      logistic function, with another k for each of up to four stretches of the epoch, since the
      model learns meanwhile: the curve starts at 1/2 and saturates at 1 - e. That is exact where
      margins of right labels are N(mu, v), so it counts only while the tails of the margins are no
      heavier than those of N (kurtosis at most 3.5, less its error). With heavier ones a large
      margin need not be a sure one, and the end is 0. And the model may be wrong about 3 % of the
      pairs it is surest of.

    Labels that are wrong for a reason the margins share (length, an annotator's habit) count as
    right. Coverage over families of margins, signals and sizes, also where c is no logistic curve:
    `recipes/benchmarks/noise_rate_coverage`.

    Args:
        margins: Taken before the pairs were trained on. Only those that `judged` counts are used.

    Raises:
        ValueError: If fewer than 50 pairs have a margin.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> clean = 2 + torch.randn(4000, generator=generator)
        >>> flipped = torch.rand(4000, generator=generator) < 0.3
        >>> record = UntrainedMargins(4000)
        >>> record.record(torch.arange(4000), torch.where(flipped, -clean, clean), step=9)
        >>> estimate = estimate_noise_rate(record)
        >>> estimate.low < 0.3 < estimate.high
        True
    """
    found = int(margins.margin.isfinite().sum())
    if found < FEWEST_PAIRS:
        raise ValueError(
            f"{found} pairs have a margin from before they were trained on; an estimate of the "
            f"noise rate needs at least {FEWEST_PAIRS}."
        )
    judged = margins.judged
    raw = margins.margin[judged][margins.step[judged].argsort(stable=True)]
    # In units of their size at that time: early margins are small, which says nothing of them.
    parts = raw.tensor_split(_between(1, len(raw) // 100, 10))
    h = torch.cat([part / part.square().mean().sqrt() for part in parts if len(part)] or [raw])
    order = h.abs().argsort(descending=True)
    wrong = (h[order] < 0).double()
    ends = (0.0, LARGEST_RATE, LARGEST_RATE / 2, False)
    low, high, fitted, is_logistic = _ends(h, wrong) if len(h) >= FEWEST_PAIRS else ends
    agreeing = 0.5 - float(wrong.mean()) if len(h) else 0.0
    told = high - low <= WIDEST and agreeing > 1 / math.sqrt(len(h))
    rate = fitted if is_logistic else (low + high) / 2
    reference = rate if told else fitted
    return NoiseRateEstimate(
        rate=rate if told else None,
        low=low if told else 0.0,
        high=high,
        reference_rate=reference,
        slope=fitted_slope(margins, reference),
        upper_bound=0.5 - agreeing,
        anchor=float(wrong[: max(round(0.1 * len(h)), 1)].mean()) if len(h) else 0.5,
        num_pairs=len(h),
        num_not_judged=found - len(h),
    )


def fitted_slope(margins: UntrainedMargins, rate: float) -> float:
    """The k of `estimate_noise_rate` that fits best if the rate is known; the same for all pairs.

    Args:
        margins: As there.
        rate: Share of wrong labels, in [0, 0.5).

    Returns:
        k > 0 per unit of the margins; 0 if none was judged.

    Example:
        >>> record = UntrainedMargins(200)
        >>> record.record(torch.arange(200), torch.linspace(-1, 3, 200), step=1)
        >>> fitted_slope(record, 0.2) > fitted_slope(record, 0.0) > 0
        True
    """
    h = margins.margin[margins.judged]
    if not len(h):
        return 0.0
    rms = float(h.square().mean().sqrt())
    rates = torch.tensor([rate], dtype=torch.float64)
    slopes = torch.logspace(-2, 2, 201, dtype=torch.float64)
    return float(slopes[label_log_likelihood(rates, slopes, h / rms)[0].argmax()]) / rms


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
    if noise_rate == 0.0:  # the log-odds would be infinite, and slope * margin may be too
        return torch.where(margins.isnan(), margins, torch.zeros_like(margins))
    log_odds = torch.logit(torch.as_tensor(noise_rate, dtype=torch.float64)).to(margins)
    return torch.sigmoid(log_odds - slope * margins)


def double_annotation_rate(num_pairs: int, num_disagreements: float) -> tuple[float, float]:
    """Noise rate of single labels from pairs that were labelled twice, independently.

        D = 2 e (1 - e),   e = (1 - sqrt(1 - 2 D)) / 2

    The most trustworthy of all estimates, since it needs no model. It assumes that both labels are
    wrong with the same probability, independently: pairs that are hard for every annotator make it
    too low.

    Args:
        num_pairs: Pairs with two labels, or more.
        num_disagreements: How many of them have two different labels. A pair with more than two
            labels counts as the share of its label pairs that differ.

    Returns:
        The rate and its standard error (delta method; of pairs with more than two labels it is too
        large if anything). More disagreements than half of the pairs give 0.5, with an infinite
        standard error.

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


def _ends(h: Tensor, wrong: Tensor) -> tuple[float, float, float, bool]:
    """Both ends, the rate that a logistic curve fits best, and whether it is one.

    `wrong` are the contradicted labels, those of the surest pairs first.
    """
    high = LARGEST_RATE
    for share in SURE_SHARES:
        high = min(high, _upper_limit(wrong[: round(share * len(h))]))
    rates = torch.linspace(0, LARGEST_RATE, _RATES, dtype=torch.float64)
    slopes = torch.logspace(-1.5, 1.5, _SLOPES, dtype=torch.float64)
    profile = torch.zeros_like(rates)
    for stretch in h.tensor_split(_between(1, len(h) // 250, 4)):
        profile += label_log_likelihood(rates, slopes, stretch).amax(1)
    low = float(rates[profile >= profile.max() - LIKELIHOOD_DROP][0])
    low = max(low - MODEL_ERROR, 0.0) / (1 - 2 * MODEL_ERROR)
    kurtosis = float(h.pow(4).mean())  # the mean square is 1
    is_logistic = kurtosis <= HEAVY_TAILS - math.sqrt(24 / len(h))
    low = min(low, high) if is_logistic else 0.0
    inside = (rates >= low) & (rates <= high)
    if not inside.any():
        return low, high, (low + high) / 2, is_logistic
    fitted = float(profile.masked_fill(~inside, -math.inf).softmax(0) @ rates)
    return low, high, fitted, is_logistic


def _upper_limit(wrong: Tensor) -> float:
    """Wilson's, of the probability whose draws these are."""
    return wilson_interval(float(wrong.mean()), len(wrong), SURE_ERRORS)[1]


def label_log_likelihood(rates: Tensor, slopes: Tensor, h: Tensor) -> Tensor:
    """Of the labels, shape (rates, slopes), summed over the margins h, each of shape (N,).

        sum of log[(1 - e) s(k h) + e s(-k h)]

    Neighbours in |h| share a bin, so the cost is that of the bins.
    """
    size = h.abs()
    parts = size.argsort().tensor_split(min(_BINS, len(h)))
    centre = torch.stack([size[part].mean() for part in parts])
    agreeing = torch.stack([(h[part] > 0).double().sum() for part in parts])
    contradicting = torch.tensor([float(len(part)) for part in parts]).double() - agreeing
    right = torch.sigmoid(slopes[:, None] * centre)  # (slopes, bins)
    p = (1 - rates)[:, None, None] * right + rates[:, None, None] * (1 - right)
    tiny = torch.finfo(p.dtype).tiny
    return p.clamp(min=tiny).log() @ agreeing + (1 - p).clamp(min=tiny).log() @ contradicting


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))
