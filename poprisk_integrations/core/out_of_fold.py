"""Margins of pairs that a model never saw, averaged along its training, up to their best epoch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk_integrations.core.noise_rate import LARGEST_RATE, label_log_likelihood

__all__ = ["MarginAverage", "mean_of_judges"]

_PATIENCE = 2  # epochs without a better fit after which a training has told what it can


class MarginAverage:
    """Averages the margins of held-out pairs over epochs, and keeps the average that fits best.

    A model first learns what most labels say, and later the wrong ones too. Held-out pairs show
    when: their labels, noisy as they are, are explained less well from then on. With h_t the
    margins after epoch t, whose size grows as training goes on,

        a_t = (1/t) sum over i <= t of h_i / rms(h_i)
        fit_t = max over e, k of the mean of log[(1 - e) s(k a_t) + e s(-k a_t)]

    with s the logistic function, e < 0.49 a rate of wrong labels and k a slope: the likelihood of
    the labels under the mixture of `estimate_noise_rate`. The average over a training ranks wrong
    labels better than any one epoch that could be known to be the best, and loses little where
    training goes on too long (`recipes/benchmarks/cleaned_pairs`).

    Attributes:
        fits: fit_t of each epoch, in nats per pair; -0.693 where margins tell nothing.
        best: Place of the largest of them; -1 before the first epoch.

    Example:
        >>> average = MarginAverage()
        >>> right = torch.tensor([True, True, True, False]).repeat(25)
        >>> average.add(torch.where(right, 0.2, -0.2))  # the model contradicts every fourth label
        >>> average.add(torch.where(right, -0.1, 0.1))  # nothing but noise
        >>> average.best, round(average.margins()[0].item(), 3)
        (0, 0.2)
    """

    def __init__(self) -> None:
        self.fits: list[float] = []
        self.best = -1
        self._sum: Tensor | None = None
        self._kept: Tensor | None = None

    def add(self, margins: Tensor) -> None:
        """Take the margins after an epoch, shape (pairs,), reward units, NaN where there is none.

        The same pairs in the same order each time.
        """
        margins = margins.detach().cpu().double()
        known = margins[margins.isfinite()]
        size = known.square().mean().sqrt() if len(known) else margins.new_tensor(0.0)
        scaled = margins / size if size > 0 else margins
        self._sum = scaled if self._sum is None else self._sum + scaled
        average = self._sum / (len(self.fits) + 1)
        self.fits.append(_fit(average))
        if self.best < 0 or self.fits[-1] > self.fits[self.best]:
            self.best = len(self.fits) - 1
            self._kept = average * size if size > 0 else average

    @property
    def has_told(self) -> bool:
        """Whether two further epochs have not explained the labels better."""
        return len(self.fits) - 1 - self.best >= _PATIENCE

    def margins(self) -> Tensor:
        """The average up to the best epoch, fp64, in the reward units of that epoch.

        Raises:
            ValueError: If no epoch was added.
        """
        if self._kept is None:
            raise ValueError("No margins yet: add those of an epoch first.")
        return self._kept


def mean_of_judges(margins: Sequence[Tensor]) -> Tensor:
    """The margins of several judges of the same pairs, each in units of its size, averaged.

        sum over j of h_j / rms(h_j), / J, times the mean of the rms(h_j)

    Judges that were trained on different pairs make different mistakes: their mean ranks wrong
    labels better than any of them (`recipes/benchmarks/cleaned_pairs`).

    Args:
        margins: Each of shape (pairs,), reward units; NaN where a judge has none, or one that is
            not finite.

    Returns:
        fp64; NaN where no judge has a margin.

    Raises:
        ValueError: If there is no judge.

    Example:
        >>> one, two = torch.tensor([1.0, -1.0]), torch.tensor([4.0, float("nan")])
        >>> mean_of_judges([one, two]).tolist()
        [2.5, -2.5]
    """
    if not margins:
        raise ValueError("No margins: there must be a judge.")
    stacked = torch.stack([h.detach().cpu().double() for h in margins])
    if len(stacked) == 1:
        return stacked[0]
    stacked = stacked.masked_fill(~stacked.isfinite(), torch.nan)
    sizes = stacked.square().nanmean(1, keepdim=True).sqrt()
    return (stacked / sizes.where(sizes > 0, 1.0)).nanmean(0) * sizes.nanmean()


def _fit(margins: Tensor) -> float:
    h = margins[margins.isfinite()]
    size = float(h.square().mean().sqrt()) if len(h) else 0.0
    if size == 0.0:
        return -float(torch.log(torch.tensor(2.0)))
    rates = torch.linspace(0, LARGEST_RATE, 50, dtype=torch.float64)
    slopes = torch.logspace(-1.5, 1.5, 31, dtype=torch.float64)
    return float(label_log_likelihood(rates, slopes, h / size).max()) / len(h)
