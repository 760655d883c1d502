"""A learning rate from a few short trainings, each scored on batches that it has not seen."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

__all__ = [
    "HORIZON_EXPONENT",
    "horizon_factor",
    "indistinguishable_rates",
    "next_rate",
    "parabola_minimum",
    "search_rates",
    "warmup_decay_factor",
]

HORIZON_EXPONENT = 0.3  # Bjorck et al. 2024 (arXiv:2409.19913) fit 0.32 to language models
UNKNOWN_HORIZON = 0.5  # what the exponent gives for a run ten times as long as the probe
_LIKE_THE_BEST = 2.0  # standard errors of a paired difference


def warmup_decay_factor(step: int, steps: int) -> float:
    """Share of its peak rate that a probe trains with at one optimizer step.

        min(1, (step + 1) / w) * (1 - step / steps),  w = steps / 10;  0 from `steps` on

    The decay makes rates comparable: at a constant rate the noise of the last steps hides what a
    large rate has gained. Without the warm-up a large rate wins a probe from random weights by
    leaving the start faster, and fails in the run.

    Args:
        step: Optimizer steps taken before this one.
        steps: Optimizer steps of the probe that train, >= 1.

    Example:
        >>> [round(warmup_decay_factor(step, 20), 3) for step in (0, 1, 10, 19, 20)]
        [0.5, 0.95, 0.5, 0.05, 0.0]
    """
    warmup = max(1, round(steps / 10))
    return max(0.0, min(1.0, (step + 1) / warmup) * (1.0 - step / steps))


def horizon_factor(steps: int, total_steps: int | None) -> float:
    """What the best rate of a probe is multiplied by for a run of another length.

        (steps / total_steps) ** 0.3, at most 1;  1/2 where the length is unknown

    The longer a run, the smaller its best peak rate (Bjorck et al. 2024, arXiv:2409.19913).

    Args:
        steps: Optimizer steps of the probe.
        total_steps: Those of the run; None if it has no known end.

    Example:
        >>> horizon_factor(100, 50), round(horizon_factor(100, 1000), 3), horizon_factor(100, None)
        (1.0, 0.501, 0.5)
    """
    if total_steps is None:
        return UNKNOWN_HORIZON
    return float(min(1.0, (steps / max(1, total_steps)) ** HORIZON_EXPONENT))


def next_rate(losses: Mapping[float, float], start: float, factor: float) -> float | None:
    """The rate to try next: from `start` uphill while that helps, else downhill.

    Args:
        losses: Rates tried so far to their mean losses; a loss that is not finite is worse than
            any other.
        start: First rate to try.
        factor: Ratio of neighbouring rates, > 1.

    Returns:
        None when the best rate so far has a worse one on either side.

    Example:
        >>> next_rate({}, 1e-3, 4.0), next_rate({1e-3: 2.0}, 1e-3, 4.0)
        (0.001, 0.004)
        >>> next_rate({1e-3: 2.0, 4e-3: 2.5}, 1e-3, 4.0)
        0.00025
        >>> next_rate({1e-3: 2.0, 4e-3: 2.5, 2.5e-4: 3.0}, 1e-3, 4.0) is None
        True
    """
    if not losses:
        return start
    best = _best(losses)
    if best == max(losses) and math.isfinite(losses[best]):
        return best * factor
    return best / factor if best == min(losses) else None


def search_rates(
    evaluate: Callable[[float], Sequence[float]], *, start: float, factor: float, candidates: int
) -> dict[float, list[float]]:
    """Train and score one rate after the other until the best one lies between two others.

    Args:
        evaluate: Trains from the same weights on the same batches at a peak rate, and returns the
            losses of the batches after them, the same ones for each rate.
        start: First rate to try.
        factor: Ratio of neighbouring rates, > 1.
        candidates: No more rates than this.

    Returns:
        The losses of each rate, in the order tried.

    Example:
        >>> list(search_rates(lambda rate: [abs(rate - 0.005)], start=1e-3, factor=4, candidates=8))
        [0.001, 0.004, 0.016]
    """
    scores: dict[float, list[float]] = {}
    while len(scores) < candidates:
        rate = next_rate(_means(scores), start, factor)
        if rate is None:
            break
        scores[rate] = list(evaluate(rate))
    return scores


def parabola_minimum(losses: Mapping[float, float], untrained: float) -> float:
    """Where a parabola through the best rate and its two neighbours has its minimum.

    In log rate and, where all losses are positive, log loss. It is never further from the best
    rate than half of the way to a neighbour.

    Args:
        losses: Rates, each the same factor from the next, to mean losses.
        untrained: Loss before training. A rate whose training failed counts as this at least.

    Returns:
        A rate; the best one tried if it has no neighbour on one side.

    Example:
        >>> round(parabola_minimum({1.0: 2.0, 4.0: 1.0, 16.0: 2.0}, 9.0), 2)
        4.0
        >>> round(parabola_minimum({1.0: 1.1, 4.0: 1.0, 16.0: float("nan")}, 9.0), 2)
        2.12
    """
    best, rates = _best(losses), sorted(losses)
    place = rates.index(best)
    if not 0 < place < len(rates) - 1 or not math.isfinite(losses[best]):
        return best
    around = [losses[rate] for rate in rates[place - 1 : place + 2]]
    worst = max(untrained, *(loss for loss in around if math.isfinite(loss)))
    low, middle, high = (loss if math.isfinite(loss) else worst for loss in around)
    if min(low, middle, high) > 0:
        low, middle, high = math.log(low), math.log(middle), math.log(high)
    curvature = low - 2.0 * middle + high
    shift = 0.5 * (low - high) / curvature if curvature > 0 else 0.0
    step = math.log(rates[place + 1] / best)
    return best * math.exp(shift * step)


def indistinguishable_rates(scores: Mapping[float, Sequence[float]]) -> list[float]:
    """Rates whose losses are no more than two standard errors above those of the best.

        d_i = loss of batch i at this rate - its loss at the best rate
        mean(d) <= 2 * sqrt(var(d) / M), with the unbiased variance over the M batches

    All rates are scored on the same batches, so the differences between batches drop out.

    Args:
        scores: Rates to the losses of M >= 2 batches. A rate with a loss that is not finite, or
            with fewer of them, is never like the best.

    Returns:
        Sorted, the best among them; only those without a worse rate between them and the best.

    Example:
        >>> indistinguishable_rates(
        ...     {1.0: [2.0, 3.0, 4.0], 4.0: [2.1, 2.8, 4.0], 16.0: [4.0, 5.0, 6.1]}
        ... )
        [1.0, 4.0]
    """
    best, rates = _best(_means(scores)), sorted(scores)

    def is_like_the_best(rate: float) -> bool:
        difference = [a - b for a, b in zip(scores[rate], scores[best], strict=False)]
        if len(scores[rate]) < len(scores[best]) or not all(map(math.isfinite, difference)):
            return False
        error = stdev(difference) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
        return fmean(difference) <= _LIKE_THE_BEST * error

    low = high = rates.index(best)
    while low > 0 and is_like_the_best(rates[low - 1]):
        low -= 1
    while high < len(rates) - 1 and is_like_the_best(rates[high + 1]):
        high += 1
    return rates[low : high + 1]


def _means(scores: Mapping[float, Sequence[float]]) -> dict[float, float]:
    return {rate: fmean(losses) if losses else math.nan for rate, losses in scores.items()}


def _best(losses: Mapping[float, float]) -> float:
    """Of equal ones, and where none is finite, the smallest rate."""
    return min(sorted(losses), key=lambda rate: _or_inf(losses[rate]))


def _or_inf(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
