"""What is measured of a policy, from log-ratios of pairs; pure functions."""

import math

from torch import Tensor

__all__ = ["drift", "paired_difference", "ranking_scores", "share"]


def ranking_scores(log_ratios: Tensor, *, prefer_sample: bool = False) -> Tensor:
    """1 where the policy's implicit reward ranks a pair as wanted, 0.5 on ties, else 0.

    The reward of a continuation is beta * log(policy / reference), so beta does not matter here,
    and at the start of training every pair is a tie.

    Args:
        log_ratios: Shape (n, 2): human continuation, sample.
        prefer_sample: Wanted is the sample above the human text (a swapped label) instead of the
            reverse.

    Returns:
        Shape (n,).

    Example:
        >>> from torch import tensor
        >>> ranking_scores(tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])).tolist()
        [1.0, 0.0, 0.5]
    """
    margins = log_ratios[:, 0] - log_ratios[:, 1]
    if prefer_sample:
        margins = -margins
    return 0.5 * (margins.sign() + 1.0)


def share(scores: Tensor) -> float:
    """Mean of ranking scores; NaN of none."""
    return float(scores.double().mean()) if scores.numel() else math.nan


def drift(log_ratios: Tensor, beta: float) -> float:
    """Distance from the reference: the mean absolute reward.

        drift = mean over continuations of |beta * log(policy / reference)|

    Args:
        log_ratios: Shape (n, 2), in nats.
        beta: Of DPO.

    Example:
        >>> from torch import tensor
        >>> drift(tensor([[1.0, -3.0]]), beta=0.5)
        1.0
    """
    return float((beta * log_ratios.double()).abs().mean())


def paired_difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Mean of first - second over the same pairs, and the standard error of that mean.

    Args:
        first: Ranking scores of one policy, shape (n,).
        second: Those of the other on the same pairs, shape (n,).

    Example:
        >>> from torch import tensor
        >>> paired_difference(tensor([1.0, 1.0]), tensor([0.0, 1.0]))
        (0.5, 0.5)
    """
    difference = first.double() - second.double()
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()), error
