"""How well scores rank positives above negatives."""

import math

import torch
from torch import Tensor

__all__ = ["ranking_auc"]


def ranking_auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve, as the probability of a correct ranking.

        AUC = P(score of a positive > score of a negative) + P(they are equal) / 2

    over all pairs of a positive and a negative, counted by mid-ranks: n log n, not n^2.

    Args:
        scores: Shape (n,), any units; infinities are ranked as such.
        positive: Shape (n,), boolean.

    Returns:
        A number in [0, 1]; 0.5 if the scores say nothing, NaN if one of the classes is empty.

    Raises:
        ValueError: If the shapes differ, or a score is NaN: it has no rank.

    Example:
        >>> positive = torch.tensor([True, True, False, False])
        >>> ranking_auc(torch.tensor([0.9, 0.4, 0.4, 0.1]), positive)
        0.875
    """
    if scores.shape != positive.shape or scores.dim() != 1:
        raise ValueError(
            f"scores and positive must be of one length, not of shapes {tuple(scores.shape)} and "
            f"{tuple(positive.shape)}."
        )
    if scores.isnan().any():
        raise ValueError("scores must not be NaN.")
    positive = positive.bool()
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return math.nan
    _, group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    # Mean of the ranks 1..n that the members of a group of equal scores share.
    mid_rank = counts.cumsum(0).double() - (counts.double() - 1) / 2
    wins = float(mid_rank[group][positive].sum()) - num_positive * (num_positive + 1) / 2
    return wins / (num_positive * num_negative)
