"""The test loss, estimated from examples not trained on yet: each window, and its trend."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.core._plain import number

__all__ = [
    "RiskEstimate",
    "RiskTrend",
    "first_pass_estimate",
    "late_joiner_estimate",
    "risk_trend",
]

FEWEST = 8  # examples; of fewer nothing is said
_FEWEST_TREND = 30  # for a trend within the window
_BACK = 3  # windows
RECENT = 5  # windows whose mean says that the loss has risen: one alone is noise
_DEGREE = 4  # of the trend within the first pass, where losses fall fast


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskEstimate:
    """A value on data never trained on, for the middle of a window.

    Attributes:
        value: Estimated mean over the distribution that the examples were drawn from.
        se: Its standard error.
        change_se: Standard error of the change since the estimates that it builds on; smaller
            than `se`, because the same examples are compared with themselves.
        residuals: Shape (m,): by how much each example lies above the estimate of its moment.
    """

    value: float
    se: float
    change_se: float
    residuals: Tensor


def first_pass_estimate(values: Tensor, places: Tensor) -> RiskEstimate | None:
    """The mean over examples none of which has been trained on: the first pass over the data.

    There the loss of a batch before its update is the test loss of that moment, so
        R = mean_i L_i,    standard error = sd(L_i - trend) / sqrt(m)

    Args:
        values: Shape (m,), measured before the update.
        places: Shape (m,), share of the epoch that was done by then.

    Returns:
        None for fewer than eight examples.
    """
    m = len(values)
    if m < FEWEST:
        return None
    y = values.double()
    x = _from_minus_one_to_one(places.double())
    # What a run learns within the window is no noise: a polynomial takes it off.
    trend = [x**k for k in range(1, 1 + min(_DEGREE, (m - FEWEST) // 10))]
    slopes, _, centred, _ = _least_squares(y, trend)
    residuals = y - _mean(y) - _sum_of(slopes, centred)
    se = math.sqrt(_dot(residuals, residuals) / max(1, m - 1 - len(trend)) / m)
    return RiskEstimate(value=_mean(y), se=se, change_se=se, residuals=residuals)


def late_joiner_estimate(
    values: Tensor, places: Tensor, before: Tensor, before_se: Tensor
) -> RiskEstimate | None:
    """The mean over all data never trained on, from those few that have not been trained on yet.

    The regression estimator of survey sampling. `before` says by how much the same examples lay
    above the estimate of an earlier moment. Its mean over the whole distribution is 0, so where
    the few are harder than the rest, it shows, and is taken out:
        R = mean_i L_i - b mean_i before_i,    b = cov(L, before) / var(before)
        se^2 = s^2 (1/m + q) + b^2 se_before^2
    with the residual variance s^2 (unbiased), and q = x' (X'X)^-1 x for the means x of the
    centred regressors X. Chained from window to window it keeps the precision of earlier, larger
    samples, back to the first pass, in which all examples count.

    Args:
        values: Shape (m,), of examples never trained on.
        places: Shape (m,), share of the epoch that was done by then.
        before: Shape (m,), `residuals` of their last estimate; NaN where there is none.
        before_se: Shape (m,), the standard error of that estimate.

    Returns:
        None for fewer than eight examples.

    Example:
        >>> before = torch.tensor([1.0, -1.0] * 5 + [1.0] * 4)  # harder than the average
        >>> found = late_joiner_estimate(
        ...     2.0 + before, torch.zeros(14), before, torch.zeros(14)
        ... )
        >>> round(found.value, 6)
        2.0
    """
    known = before.isfinite()
    is_chained = int(known.sum()) >= max(FEWEST, len(values) / 2)
    if is_chained:
        values, places = values[known], places[known]
    m = len(values)
    if m < FEWEST:
        return None
    y = values.double()
    place = _from_minus_one_to_one(places.double())
    regressors = [before[known].double()] if is_chained else []
    has_trend = m >= _FEWEST_TREND  # the place is a regressor too: so R belongs to the middle
    if has_trend:
        regressors.append(place)
    slopes, means, _, gram = _least_squares(y, regressors)
    value = _mean(y) - sum(slope * mean for slope, mean in zip(slopes, means, strict=True))
    errors = y - value - _sum_of(slopes, regressors)
    variance = _dot(errors, errors) / max(1, m - 1 - len(regressors))
    q = sum(a * b for a, b in zip(means, _solve(gram, means), strict=True))
    own = variance * (1 / m + q)
    b = slopes[0] if is_chained else 0.0
    known_variance = _mean(before_se[known].double() ** 2) if is_chained else 0.0
    residuals = torch.full(known.shape, math.nan, dtype=torch.float64, device=y.device)
    trend = slopes[-1] * place if has_trend else 0.0
    residuals[known if is_chained else slice(None)] = y - value - trend
    return RiskEstimate(
        value=value,
        se=math.sqrt(own + b**2 * known_variance),
        change_se=math.sqrt(own + (1 - b) ** 2 * known_variance),
        residuals=residuals,
    )


def _from_minus_one_to_one(places: Tensor) -> Tensor:
    """Places in the window, so that their powers are of one size."""
    low, high = places.min(), places.max()
    return (2 * places - low - high) / (high - low).clamp(min=1e-9)


# Sums and plain floats, no BLAS: its last bits depend on where a tensor lies in memory, and a
# resumed run must say what an uninterrupted one says.


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


def _mean(values: Tensor) -> float:
    return float(values.sum()) / max(1, len(values))


def _sum_of(slopes: list[float], columns: list[Tensor]) -> Tensor | float:
    return sum((slope * column for slope, column in zip(slopes, columns, strict=True)), 0.0)


def _least_squares(
    y: Tensor, columns: list[Tensor]
) -> tuple[list[float], list[float], list[Tensor], list[list[float]]]:
    """Slopes, means of the columns, the columns less their means, and the Gram matrix of these."""
    means = [_mean(column) for column in columns]
    centred = [column - mean for column, mean in zip(columns, means, strict=True)]
    gram = [[_dot(a, b) for b in centred] for a in centred]
    slopes = _solve(gram, [_dot(column, y) for column in centred])
    return slopes, means, centred, gram


def _solve(gram: list[list[float]], right: list[float]) -> list[float]:
    """Gram matrix times x = right; 0 for a column that says nothing beyond those before it."""
    rows = [[*row, value] for row, value in zip(gram, right, strict=True)]
    size = len(rows)
    sizes = [gram[k][k] for k in range(size)]
    for k in range(size):
        pivot = rows[k][k]
        if pivot <= 1e-12 * sizes[k] or pivot <= 0:
            rows[k] = [0.0] * k + [1.0] + [0.0] * (size - k)
            for other in range(size):
                if other != k:
                    rows[other][k] = 0.0
            continue
        rows[k] = [value / pivot for value in rows[k]]
        for other in range(size):
            if other != k:
                factor = rows[other][k]
                pairs = zip(rows[other], rows[k], strict=True)
                rows[other] = [value - factor * own for value, own in pairs]
    return [row[-1] for row in rows]


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskTrend:
    """The last window against the lowest one and against earlier ones.

    Attributes:
        value: Of the last window.
        se: Its standard error.
        best: The lowest estimate.
        best_step: Optimizer step at the end of its window.
        rise: By how many standard errors of the change the last five windows since the lowest one
            lie above it, on average; of two at least, as `RiskStopping` counts its evidence.
        fall: Estimate of three windows before (of the lowest, if that was later) minus the last
            one, in the same way.
        train_loss: Of the last window; None where it was not measured.
        gap_rise: Share of the rise that the training loss did not make too; 1 or more where it
            fell, NaN where nothing rose or it was not measured.
    """

    value: float
    se: float
    best: float
    best_step: int
    rise: float
    fall: float
    train_loss: float | None
    gap_rise: float


def risk_trend(rows: Sequence[Mapping[str, Any]]) -> RiskTrend | None:
    """Compare the last window with the lowest one and with an earlier one.

    The standard error of a change from window i to window j is
        se^2 = min(sum over i < k <= j of change_se_k^2,  se_i^2 + se_j^2)

    since consecutive windows measure mostly the same examples.

    Args:
        rows: One per window, in order: "step", "train_loss", "estimated_test_loss" and its "_se"
            and "_change_se"; None where something was not measured.

    Returns:
        None without any estimate.

    Example:
        >>> rows = [{"step": k, "train_loss": 1 / k, "estimated_test_loss": loss,
        ...          "estimated_test_loss_se": 0.1, "estimated_test_loss_change_se": 0.02}
        ...         for k, loss in enumerate([2.0, 1.0, 1.2, 1.3], start=1)]
        >>> trend = risk_trend(rows)
        >>> trend.best_step, round(trend.rise, 1), round(trend.gap_rise, 1)
        (2, 10.3, 1.8)
    """
    found = [row for row in rows if number(row, "estimated_test_loss") is not None]
    if not found:
        return None
    values = [number(row, "estimated_test_loss") or 0.0 for row in found]
    last = len(found) - 1
    best = min(range(len(found)), key=lambda index: values[index])
    after = range(max(best + 1, last + 1 - RECENT), last + 1)
    rises = [_in_errors(found, best, index) for index in after]
    rise = sum(rises) / len(rises) if len(rises) > 1 or len(rises) == last == 1 else 0.0
    back = max(0, last - _BACK)
    start = back if best == last else max(back, best)  # what fell before the lowest, rose since
    train, before = (number(found[index], "train_loss") for index in (last, best))
    gap_rise = math.nan
    if train is not None and before is not None and values[last] > values[best]:
        gap_rise = 1.0 - (train - before) / (values[last] - values[best])
    return RiskTrend(
        value=values[last],
        se=number(found[last], "estimated_test_loss_se") or 0.0,
        best=values[best],
        best_step=int(found[best]["step"]),
        rise=rise,
        fall=-_in_errors(found, start, last),
        train_loss=train,
        gap_rise=gap_rise,
    )


def _in_errors(rows: Sequence[Mapping[str, Any]], i: int, j: int) -> float:
    """By how many standard errors window j lies above window i; 0 where nothing tells them."""
    changes = [number(row, "estimated_test_loss_change_se") for row in rows[i + 1 : j + 1]]
    variance = sum((change or math.inf) ** 2 for change in changes)
    ends = [number(rows[k], "estimated_test_loss_se") for k in (i, j)]
    if all(end is not None for end in ends):
        variance = min(variance, sum(end**2 for end in ends if end is not None))
    low, high = (number(rows[k], "estimated_test_loss") or 0.0 for k in (i, j))
    return (high - low) / math.sqrt(variance) if 0.0 < variance < math.inf else 0.0
