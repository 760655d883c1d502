"""A comparison by seed, and its line in the table of verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from benchmarks.harness.tables import interval, word

__all__ = ["Comparison", "gain", "points"]


@dataclass(frozen=True)
class Comparison:
    """Values of one number by seed; of a difference, positive where the first is better."""

    question: str
    what: str
    condition: str
    values: dict[int, float]
    is_difference: bool = False

    def row(self) -> dict:
        """Mean, 95 % interval over seeds, and the word for a difference."""
        mean, low, high = interval({("", seed): value for seed, value in self.values.items()})
        return {
            "question": self.question,
            "what": self.what,
            "condition": self.condition,
            "seeds": len(self.values),
            **{k: f"{v:.4g}" for k, v in (("mean", mean), ("low", low), ("high", high))},
            "word": word(low, high) if self.is_difference else "",
        }


def points(found: Sequence[dict], **where: object) -> dict[int, float]:
    """Accuracy in % by seed, the mean over all rows that have these values."""
    by_seed: dict[int, list[float]] = {}
    for row in found:
        if all(str(row[name]) == str(value) for name, value in where.items()):
            by_seed.setdefault(int(row["seed"]), []).append(100 * float(row["accuracy"]))
    return {seed: float(np.mean(values)) for seed, values in by_seed.items()}


def gain(one: dict[int, float], other: dict[int, float]) -> dict[int, float]:
    """Differences by seed."""
    return {seed: value - other[seed] for seed, value in one.items()}
