"""Where the gate opens: the published boundaries and the calibrated one."""

from statistics import NormalDist

__all__ = ["calibrated_alpha", "chi2_quantile_1dof", "finite_alpha", "resolve_alpha"]

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
    penalty of the whole data set. It presumes that the mean is known over all n examples; with
    beta1 = 0.9 it is a near no-op once n/b exceeds about 21.

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
    batch_size: int | None = None,
    dataset_size: int | None = None,
) -> float:
    """Turn the `alpha` option of the optimizer into a number.

    Args:
        alpha: A number >= 0, or "calibrated", "fresh" (1.0) or "finite".
        beta1: Decay of the first moment; used by "calibrated".
        false_open_rate: Used by "calibrated".
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
