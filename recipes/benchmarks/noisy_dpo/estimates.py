"""What the package makes of the margins of the first epoch, member by member."""

from dataclasses import dataclass

import torch
from torch import Tensor

from poprisk_integrations.core.flip_probability import flip_probability
from poprisk_integrations.core.noise_rate import NoiseRateEstimate, estimate_noise_rate
from poprisk_integrations.core.untrained_margins import UntrainedMargins

__all__ = ["Estimate", "estimate_from_ledger", "estimate_of"]

LARGEST_USED_RATE, SURE_FROM = 0.35, 0.05  # as in PopRiskDPOTrainer


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """As a loss needs it. M members, n pairs.

    Attributes:
        rate: (M, 1), the rate in use: at most 0.35, and 0 where there is no sign of wrong labels.
        p_correct: (M, n), NaN where there is no margin.
        found: The estimates as reported.
    """

    rate: Tensor
    p_correct: Tensor
    found: list[NoiseRateEstimate]

    def cpu(self) -> Tensor:
        """The reported rates, (M,)."""
        return torch.tensor([estimate.reference_rate for estimate in self.found])


def estimate_of(margins: Tensor) -> NoiseRateEstimate:
    """Of one member's margins, shape (n,), NaN where a pair has none."""
    record = UntrainedMargins(len(margins))
    rows = torch.nonzero(margins.isfinite()).squeeze(1)
    record.record(rows, margins[rows], step=0)
    return estimate_noise_rate(record)


def estimate_from_ledger(ledger: Tensor) -> Estimate:
    """As `PopRiskDPOTrainer` does with `noise="auto"`."""
    found = [estimate_of(margins) for margins in ledger]
    used = [
        0.0 if e.rate is None or e.low < SURE_FROM else min(e.rate, LARGEST_USED_RATE)
        for e in found
    ]
    p_wrong = torch.stack(
        [
            flip_probability(margins, rate, estimate.slope)
            for margins, rate, estimate in zip(ledger, used, found, strict=True)
        ]
    )
    return Estimate(
        rate=torch.tensor(used, device=ledger.device)[:, None],
        p_correct=1 - p_wrong,
        found=found,
    )
