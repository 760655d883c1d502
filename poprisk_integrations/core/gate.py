"""The gate: where it opens (alpha), and how much it lets through (q)."""

from statistics import NormalDist

import torch
from torch import Tensor

from poprisk_integrations.core.noise_law import moments_alpha

__all__ = [
    "GATES",
    "calibrated_alpha",
    "chi2_quantile_1dof",
    "default_lambda_pop",
    "finite_alpha",
    "gate_factor",
    "open_mask",
    "resolve_alpha",
]

GATES = ("soft", "hard", "snr", "none")
_ALLOWED = "Must be a number >= 0 or one of ('calibrated', 'fresh', 'finite')."


def chi2_quantile_1dof(upper_tail: float) -> float:
    """Quantile of the chi-square law with one degree of freedom, from its upper tail.

    The square of a standard normal exceeds x with probability p where sqrt(x) is the normal
    quantile of 1 - p/2. Written with the lower tail p/2, which keeps precision for tiny p.

    Args:
        upper_tail: Probability p of exceeding the quantile, in (0, 1).

    Raises:
        ValueError: If `upper_tail` is not inside (0, 1).

    Example:
        >>> round(chi2_quantile_1dof(0.05), 4)
        3.8415
    """
    if not 0.0 < upper_tail < 1.0:
        raise ValueError(f"Invalid upper_tail: {upper_tail}. Must be in (0, 1).")
    return NormalDist().inv_cdf(upper_tail / 2.0) ** 2


def calibrated_alpha(beta1: float, false_open_rate: float) -> float:
    """Boundary that a pure-noise coordinate crosses with probability `false_open_rate`.

    For i.i.d. batch gradients g with mean 0 and variance s_B (variance of the batch mean):
        Var(m_hat)  = s_B * (1 - beta1) / (1 + beta1)   (averages ~2/(1-beta1) batches)
        E[s_hat]    = s_B * 2 / (1 + beta1)             (g and m_prev are independent)
        m_hat^2 / s_hat  ~  (1 - beta1)/2 * chi2_1
        alpha = (1 - beta1)/2 * chi2inv_1(1 - false_open_rate)
    The published alpha=1 is the case false_open_rate = 7.7e-6 at beta1 = 0.9.

    Args:
        beta1: Decay of the first moment, in [0, 1).
        false_open_rate: Share of pure-noise coordinates that pass, in (0, 1).

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> round(calibrated_alpha(0.9, 0.05), 4)
        0.1921
    """
    if not 0.0 <= beta1 < 1.0:
        raise ValueError(f"Invalid beta1: {beta1}. Must be in [0, 1).")
    if not 0.0 < false_open_rate < 1.0:
        raise ValueError(f"Invalid false_open_rate: {false_open_rate}. Must be in (0, 1).")
    return (1.0 - beta1) / 2.0 * chi2_quantile_1dof(false_open_rate)


def finite_alpha(batch_size: int, dataset_size: int) -> float:
    """The paper's finite-dataset boundary b / (n - b) (arXiv:2605.01172, section F.4).

    It turns the streaming variance of a batch drawn without replacement into the leave-one-out
    penalty of the whole data set, if the mean is known over all n examples. With beta1 = 0.9 it
    is a near no-op once n/b exceeds about 21.

    Args:
        batch_size: Global batch size b (per-device size x accumulation x ranks).
        dataset_size: Number of training examples n, larger than b.

    Raises:
        ValueError: If either size is not positive or b >= n.

    Example:
        >>> finite_alpha(32, 1032)
        0.032
    """
    if batch_size <= 0:
        raise ValueError(f"Invalid batch_size: {batch_size}. Must be > 0.")
    if dataset_size <= batch_size:
        raise ValueError(
            f"Invalid dataset_size: {dataset_size}. alpha='finite' needs more examples than "
            f"batch_size={batch_size}."
        )
    return batch_size / (dataset_size - batch_size)


def resolve_alpha(
    alpha: float | str,
    *,
    beta1: float,
    false_open_rate: float,
    beta2: float | None = None,
    batch_size: int | None = None,
    dataset_size: int | None = None,
) -> float:
    """Turn the `alpha` option of the optimizer into a number.

    Args:
        alpha: A number >= 0, or "calibrated", "fresh" (1.0) or "finite".
        beta1: Decay of the first moment; used by "calibrated".
        false_open_rate: Used by "calibrated".
        beta2: Decay of the second moment where the noise is v_hat - m_hat^2, else None; used by
            "calibrated".
        batch_size: Global batch size; used by "finite".
        dataset_size: Number of training examples; used by "finite".

    Raises:
        ValueError: If the name is unknown, the number negative or not finite, or "finite" lacks
            a size.

    Example:
        >>> resolve_alpha("fresh", beta1=0.9, false_open_rate=0.05)
        1.0
    """
    if isinstance(alpha, str):
        if alpha == "calibrated":
            if beta2 is not None:
                return moments_alpha((beta1, beta2), false_open_rate)
            return calibrated_alpha(beta1, false_open_rate)
        if alpha == "fresh":
            return 1.0
        if alpha == "finite":
            if batch_size is None or dataset_size is None:
                raise ValueError(
                    "alpha='finite' needs batch_size and dataset_size (got "
                    f"batch_size={batch_size}, dataset_size={dataset_size})."
                )
            return finite_alpha(batch_size, dataset_size)
        raise ValueError(f"Invalid alpha: {alpha!r}. {_ALLOWED}")
    number = float(alpha)
    if not 0.0 <= number < float("inf"):
        raise ValueError(f"Invalid alpha: {alpha}. {_ALLOWED}")
    return number


def default_lambda_pop(gate: str, alpha: float) -> float:
    """The gate's own shrinkage when the user gives none.

    Soft: lambda_pop = alpha, which makes it the positive-part shrinker max(0, 1 - alpha/r).
    SNR: lambda_pop = 1, which puts q = 1/2 exactly on the boundary r = alpha.

    Args:
        gate: One of `GATES`.
        alpha: The resolved boundary.

    Example:
        >>> default_lambda_pop("soft", 0.19), default_lambda_pop("snr", 0.19)
        (0.19, 1.0)
    """
    return alpha if gate == "soft" else 1.0


def open_mask(mean_sq: Tensor, noise: Tensor, alpha: float, noise_scale: float = 1.0) -> Tensor:
    """Where the squared signal beats the noise: m_hat^2 > alpha * s_hat.

    Args:
        mean_sq: Squared first moment, same shape as `noise`.
        noise: Noise variance.
        alpha: Boundary, >= 0.
        noise_scale: As in `gate_factor`.

    Returns:
        Boolean tensor of the same shape. A coordinate with zero gradient (0 > 0) is closed.
    """
    return mean_sq > (alpha * noise_scale) * noise


def gate_factor(
    mean_sq: Tensor,
    noise: Tensor,
    *,
    gate: str,
    alpha: float,
    lambda_pop: float,
    eps: float = 0.0,
    noise_scale: float = 1.0,
) -> Tensor:
    """Gate q in [0, 1] per coordinate (arXiv:2605.01172, eqs. 241-243).

    With d = max(m_hat^2 - alpha * s_hat, 0):
        hard:  q = 1 if m_hat^2 > alpha * s_hat else 0
        soft:  q = d / (d + lambda_pop * s_hat + eps)
        snr:   q = m_hat^2 / (m_hat^2 + lambda_pop * alpha * s_hat + eps)
        none:  q = 1
    With eps = 0 every form depends on the ratio m_hat^2 / s_hat alone, so it does not move when
    the loss is rescaled. 0/0 (a coordinate that never had a gradient) is 0.

    Args:
        mean_sq: Squared first moment m_hat^2.
        noise: Noise variance s_hat >= 0, same shape: variance of the batch-mean gradient (a mean
            over the batch, not a sum).
        gate: One of `GATES`.
        alpha: Boundary, >= 0.
        lambda_pop: Shrinkage beyond the boundary, >= 0.
        eps: Absolute constant on the scale of `mean_sq`. 0 outside the published rule.
        noise_scale: Stands before every s_hat, which saves correcting both moments: for m^2 and s
            as stored it is bias_correction1^2 / noise_correction, and eps takes the factor
            bias_correction1^2.

    Returns:
        Tensor of the same shape and dtype as `mean_sq`.

    Example:
        >>> r = torch.tensor([0.0, 1.0, 4.0])
        >>> gate_factor(r, torch.ones(3), gate="soft", alpha=1.0, lambda_pop=1.0)
        tensor([0.0000, 0.0000, 0.7500])
        >>> gate_factor(r, torch.ones(3), gate="snr", alpha=1.0, lambda_pop=1.0)
        tensor([0.0000, 0.5000, 0.8000])
    """
    if gate == "none":
        return torch.ones_like(mean_sq)
    if gate == "hard":
        return open_mask(mean_sq, noise, alpha, noise_scale).to(mean_sq.dtype)
    if gate == "soft":
        signal = torch.sub(mean_sq, noise, alpha=alpha * noise_scale).clamp_(min=0)
        total = torch.add(signal, noise, alpha=lambda_pop * noise_scale)
    elif gate == "snr":
        signal = mean_sq
        total = torch.add(signal, noise, alpha=lambda_pop * alpha * noise_scale)
    else:
        raise ValueError(f"Invalid gate: {gate!r}. Must be one of {GATES}.")
    if eps:
        total.add_(eps)
    # signal <= total, so the floor only turns 0/0 into 0: without a gradient the update is 0
    # anyway, and a closed gate is what the statistics should count.
    return signal / total.clamp_(min=torch.finfo(mean_sq.dtype).tiny)
