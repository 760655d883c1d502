"""Logged numbers over the steps of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Curve", "changes", "thinned"]


@dataclass(frozen=True, slots=True)
class Curve:
    """One logged quantity: steps in ascending order, no step twice.

    Args:
        steps: Optimizer steps.
        values: One for each; NaN and infinities are kept, a gap in the chart.
    """

    steps: Sequence[float]
    values: Sequence[float]

    @classmethod
    def of(cls, points: dict[float, float]) -> "Curve":
        """From step -> value in any order.

        Example:
            >>> Curve.of({20: 0.5, 10: 1.0})
            Curve(steps=(10, 20), values=(1.0, 0.5))
        """
        steps = tuple(sorted(points))
        return cls(steps, tuple(points[step] for step in steps))

    def finite(self) -> "Curve":
        """Without NaN and infinities."""
        kept = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]
        return Curve(tuple(s for s, _ in kept), tuple(v for _, v in kept))

    def last(self) -> float | None:
        """The last finite value."""
        values = self.finite().values
        return values[-1] if values else None


def thinned(curve: Curve, most: int = 800) -> list[int]:
    """Indices of at most so many points that keep the curve's look.

    The first and the last point stay, and of each of equally long pieces the lowest and the
    highest point and, where there is one, the first that is not finite: no peak and no gap is lost.

    Args:
        curve: Of any length.
        most: Points to keep, >= 8.

    Example:
        >>> curve = Curve(range(1000), [0.0] * 500 + [9.0] + [0.0] * 499)
        >>> kept = thinned(curve, most=20)
        >>> len(kept) <= 20, 500 in kept, kept[0], kept[-1]
        (True, True, 0, 999)
    """
    count = len(curve.values)
    if count <= most:
        return list(range(count))
    kept = {0, count - 1}
    is_finite = [math.isfinite(v) for v in curve.values]
    pieces = (most - 2) // (2 if all(is_finite) else 3)
    for piece in range(pieces):
        indices = range(piece * count // pieces, (piece + 1) * count // pieces)
        good = [i for i in indices if is_finite[i]]
        if good:
            kept.add(min(good, key=curve.values.__getitem__))
            kept.add(max(good, key=curve.values.__getitem__))
        if len(good) < len(indices):
            kept.add(next(i for i in indices if not is_finite[i]))
    return sorted(kept)


def changes(curve: Curve) -> Curve:
    """Only the points at which the value is another than before.

    Loggers repeat the last window's value until the next window ends.

    Example:
        >>> changes(Curve((1, 2, 3), (5.0, 5.0, 4.0)))
        Curve(steps=(1, 3), values=(5.0, 4.0))
    """
    values = curve.values
    kept = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return Curve(tuple(curve.steps[i] for i in kept), tuple(values[i] for i in kept))
