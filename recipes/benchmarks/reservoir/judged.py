"""What is compared: values of a number by seed, and their line in the table of verdicts."""

from collections.abc import Sequence

import numpy as np
from benchmarks.harness.tables import interval, word

BySeed = dict[int, float]
Compared = tuple[str, str, BySeed, bool]  # what, condition, values, whether these are differences


def line(question: str, what: str, condition: str, values: BySeed, is_difference: bool) -> dict:
    """Mean, 95 % interval over seeds, and the word of a difference ("better": above 0)."""
    found = interval({("", seed): value for seed, value in values.items()})
    return {
        **{"question": question, "what": what, "condition": condition, "seeds": len(values)},
        **{k: f"{v:.4g}" for k, v in zip(("mean", "low", "high"), found, strict=True)},
        "word": word(*found[1:]) if is_difference else "",
    }


def points(found: Sequence[dict], **where: object) -> BySeed:
    """Accuracy in % by seed, the mean over all rows that have these values."""
    by_seed: dict[int, list[float]] = {}
    for row in found:
        if all(str(row[name]) == str(value) for name, value in where.items()):
            by_seed.setdefault(int(row["seed"]), []).append(100 * float(row["accuracy"]))
    return {seed: float(np.mean(values)) for seed, values in by_seed.items()}


def gain(one: BySeed, other: BySeed) -> BySeed:
    return {seed: value - other[seed] for seed, value in one.items()}
