"""Whether probabilities of wrong labels are kept: shares with intervals, and bins against truth."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Z95", "ReliabilityBin", "calibration_error", "reliability", "wilson_interval"]

Z95 = 1.959963984540054  # standard errors on both sides of an interval that covers 95 %
_BINS = 10


def wilson_interval(share: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a probability whose draws had this share of successes.

        [s + z^2 / 2n -+ z sqrt(s (1 - s) / n + z^2 / 4n^2)] / (1 + z^2 / n)

    Of a mean of probabilities it is an interval on the safe side: no variable in [0, 1] with mean s
    varies more than s (1 - s).

    Args:
        share: s, in [0, 1].
        count: n, draws, > 0.
        z: Standard errors on either side; the default is for 95 %.

    Returns:
        Both ends, in [0, 1].

    Raises:
        ValueError: If there is no draw.

    Example:
        >>> [round(end, 3) for end in wilson_interval(0.2, 50)]
        [0.112, 0.33]
    """
    if count <= 0:
        raise ValueError(f"Invalid count: {count}. Must be > 0.")
    n = count
    spread = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((share + z**2 / (2 * n) + sign * spread) / (1 + z**2 / n) for sign in (-1, 1))
    return (max(low, 0.0) if share > 0 else 0.0), (min(high, 1.0) if share < 1 else 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReliabilityBin:
    """Labels whose probability of being wrong is about the same, and how many of them are.

    Attributes:
        low: Lower end of the bin, which belongs to it.
        high: Upper end, which belongs to the next bin; 1 belongs to the last one.
        count: Labels in it.
        predicted: Mean of their probabilities; None where there is none.
        share: Share of them that are wrong; None where there is none.
        share_low: Lower end of the share's 95 % interval (Wilson); None where there is none.
        share_high: Upper end.
        by_chance: |predicted - share| that is expected if every probability is right; None where
            there is none.
    """

    low: float
    high: float
    count: int
    predicted: float | None
    share: float | None
    share_low: float | None
    share_high: float | None
    by_chance: float | None


def reliability(probabilities: Iterable[float], wrong: Iterable[bool]) -> list[ReliabilityBin]:
    """Ten bins of equal width: the mean probability of a wrong label against the share of them.

    Args:
        probabilities: In [0, 1], one per label.
        wrong: Whether it is, where that is known: in a study that swapped labels on purpose.

    Raises:
        ValueError: If there are not as many of both.

    Example:
        >>> bins = reliability([0.05, 0.05, 0.93, 1.0], [False, False, True, True])
        >>> [(one.count, one.share) for one in bins if one.count]
        [(2, 0.0), (2, 1.0)]
    """
    found: list[list[tuple[float, bool]]] = [[] for _ in range(_BINS)]
    for p, is_wrong in zip(probabilities, wrong, strict=True):
        found[min(int(p * _BINS), _BINS - 1)].append((p, is_wrong))
    return [_bin(place, labels) for place, labels in enumerate(found)]


def _bin(place: int, labels: list[tuple[float, bool]]) -> ReliabilityBin:
    ends, n = (place / _BINS, (place + 1) / _BINS), len(labels)
    if not n:
        nothing = dict.fromkeys(("predicted", "share", "share_low", "share_high", "by_chance"))
        return ReliabilityBin(low=ends[0], high=ends[1], count=0, **nothing)
    share = sum(is_wrong for _, is_wrong in labels) / n
    low, high = wilson_interval(share, n)
    # Of a normal variable with this variance the mean distance from its mean.
    variance = sum(p * (1 - p) for p, _ in labels) / n**2
    return ReliabilityBin(
        low=ends[0],
        high=ends[1],
        count=n,
        predicted=sum(p for p, _ in labels) / n,
        share=share,
        share_low=low,
        share_high=high,
        by_chance=math.sqrt(2 * variance / math.pi),
    )


def calibration_error(bins: Iterable[ReliabilityBin]) -> tuple[float, float] | None:
    """Expected calibration error, and what it is on average if every probability is right.

        sum over bins of (labels in the bin / all labels) |predicted - share|

    With few labels it is above 0 by chance alone, hence the second number.

    Returns:
        Both; None without a label.

    Example:
        >>> error, by_chance = calibration_error(reliability([0.25] * 4, [True, False] * 2))
        >>> round(error, 2), round(by_chance, 2)
        (0.25, 0.17)
    """
    error = by_chance = 0.0
    total = 0
    for one in bins:
        if one.predicted is None or one.share is None or one.by_chance is None:
            continue
        error += one.count * abs(one.predicted - one.share)
        by_chance += one.count * one.by_chance
        total += one.count
    return (error / total, by_chance / total) if total else None
