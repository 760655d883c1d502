"""First-order population-risk decrease from training gradients: U-statistics of |E g|^2.

All forms estimate |mu|^2, mu = E g, without bias for fresh data. None is clamped at zero: the
positive part is biased up. On reused data they are statements about the training set (see
`core/README.md`).
"""

import torch
from torch import Tensor

__all__ = [
    "lagged_risk_decrease",
    "population_risk_decrease",
    "risk_decrease_from_ranks",
    "risk_decrease_from_sums",
    "risk_decrease_variance",
    "risk_decrease_weighted",
]


def risk_decrease_from_sums(
    norm_sq_of_sum: Tensor | float, sum_of_norm_sq: Tensor | float, count: float
) -> Tensor | float:
    """Unbiased |E g|^2 from two running sums over K exchangeable gradients.

        U = (|sum_j G_j|^2 - sum_j |G_j|^2) / (K (K - 1))
          = |G_bar|^2 - tr(S)/K,    S = unbiased (K-1) covariance of the G_j

    The G_j are per-example gradients (K = b) or micro-batch means (K = micro-batches).

    Args:
        norm_sq_of_sum: |sum_j G_j|^2.
        sum_of_norm_sq: sum_j |G_j|^2.
        count: K >= 2.

    Raises:
        ValueError: If fewer than two gradients were summed.

    Example:
        >>> risk_decrease_from_sums(9.0, 5.0, 2)  # G = 1 and 2: the cross product 1*2
        2.0
    """
    if count < 2:
        raise ValueError(f"Invalid count: {count}. At least 2 gradients are needed.")
    return (norm_sq_of_sum - sum_of_norm_sq) / (count * (count - 1))


def population_risk_decrease(grads: Tensor) -> Tensor:
    """Unbiased first-order population-risk decrease per unit learning rate, per example form.

        U = |g_bar|^2 - tr(S)/b = (1/(b(b-1))) sum_{i != j} <g_i, g_j>

    With the biased (1/b) covariance Sigma the same number is |g_bar|^2 - tr(Sigma)/(b-1), the
    paper's form; mixing the two is an error of b/(b-1).

    Args:
        grads: Per-example gradients, shape (b, ...), b >= 2.

    Returns:
        0-dim tensor, may be negative.

    Example:
        >>> population_risk_decrease(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.)
    """
    flat = grads.flatten(1)
    norm_sq_of_sum = flat.sum(0).square().sum()
    return torch.as_tensor(
        risk_decrease_from_sums(norm_sq_of_sum, flat.square().sum(), grads.shape[0])
    )


def risk_decrease_from_ranks(
    mean_norm_sq: Tensor | float, mean_of_norm_sq: Tensor | float, world_size: int
) -> Tensor | float:
    """The same statistic from data-parallel ranks: one extra scalar all-reduce.

        U_R = (R |G_bar|^2 - mean_r |G_r|^2) / (R - 1)

    Args:
        mean_norm_sq: |G_bar|^2 of the gradient averaged over ranks.
        mean_of_norm_sq: Mean over ranks of |G_r|^2, local gradients before the reduction.
        world_size: R >= 2.

    Raises:
        ValueError: If there is one rank only.

    Example:
        >>> risk_decrease_from_ranks(1.5**2, 2.5, 2)  # G = 1 and 2
        2.0
    """
    if world_size < 2:
        raise ValueError(f"Invalid world_size: {world_size}. At least 2 ranks are needed.")
    return (world_size * mean_norm_sq - mean_of_norm_sq) / (world_size - 1)


def risk_decrease_weighted(
    norm_sq_of_sum: Tensor | float, sum_of_norm_sq: Tensor | float, sum_of_weight_sq: float
) -> Tensor | float:
    """The same statistic for unequal weights, e.g. micro-batches under a token-mean loss.

    With a_j = w_j G_j and sum_j w_j = 1:
        U_w = (|sum_j a_j|^2 - sum_j |a_j|^2) / (1 - sum_j w_j^2)

    Args:
        norm_sq_of_sum: |sum_j a_j|^2, i.e. of the accumulated gradient.
        sum_of_norm_sq: sum_j |a_j|^2.
        sum_of_weight_sq: sum_j w_j^2, < 1.

    Raises:
        ValueError: If one micro-batch has all the weight.

    Example:
        >>> risk_decrease_weighted(1.5**2, 0.5**2 + 1.0**2, 0.5)  # G = 1 and 2, equal weights
        2.0
    """
    if not 0.0 < sum_of_weight_sq < 1.0:
        raise ValueError(f"Invalid sum_of_weight_sq: {sum_of_weight_sq}. Must be in (0, 1).")
    return (norm_sq_of_sum - sum_of_norm_sq) / (1.0 - sum_of_weight_sq)


def risk_decrease_variance(
    signal: float, trace_sq: float, count: int, examples_per_gradient: int = 1
) -> float:
    """Exact sampling variance of the statistic for Gaussian gradients.

        Var U_K = 4 mu' Sigma mu / (K m) + 2 tr(Sigma^2) / (m^2 K (K - 1))

    Args:
        signal: mu' Sigma mu, Sigma the per-example covariance.
        trace_sq: tr(Sigma^2).
        count: K, number of gradients that were summed.
        examples_per_gradient: m, examples averaged in each (1 = per-example form).

    Example:
        >>> risk_decrease_variance(0.0, 3.0, count=3)
        1.0
    """
    m, k = examples_per_gradient, count
    return 4.0 * signal / (k * m) + 2.0 * trace_sq / (m**2 * k * (k - 1))


def lagged_risk_decrease(
    exp_avg_hat: Tensor, grad: Tensor, preconditioner: Tensor | None = None
) -> Tensor:
    """Population-risk decrease along the last momentum, judged by a fresh batch.

        C_t = sum_k d_k * m_hat_{t-1,k} * g_{t,k}

    The two noises are independent, so no variance is subtracted, and selection by a gate inside
    `preconditioner` does not bias it, as long as gate and m_hat are those of step t-1.
    Oscillation along stiff directions makes it negative: C_t < 0 < U means that the learning
    rate is too high, not that the run memorises.

    Args:
        exp_avg_hat: Bias-corrected first moment before this step.
        grad: Gradient of the fresh batch, same shape.
        preconditioner: d, e.g. q / (sqrt(v_hat) + eps) of the step before; None for 1.

    Returns:
        0-dim tensor, may be negative.
    """
    product = exp_avg_hat * grad
    return (product if preconditioner is None else product * preconditioner).sum()
