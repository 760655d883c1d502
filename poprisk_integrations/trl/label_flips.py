"""Swaps the labels of some preference pairs, for studies of label noise."""

import math
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["flip_preferences", "flipped_rows"]

_COLUMNS = (
    ("chosen", "rejected"),
    ("chosen_ids", "rejected_ids"),
    ("ref_chosen_logps", "ref_rejected_logps"),
)


def flipped_rows(num_rows: int, rate: float, seed: int = 0) -> list[int]:
    """Rows whose labels are to be swapped: an exact count, drawn without replacement.

    Args:
        num_rows: Number of pairs.
        rate: Share of them in [0, 1]; the count is `num_rows * rate`, rounded half up.
        seed: Of the draw. The same arguments give the same rows on every machine and rank.

    Returns:
        Row numbers, ascending.

    Raises:
        ValueError: If `rate` is outside [0, 1].

    Example:
        >>> len(flipped_rows(10, rate=0.3))
        3
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"Invalid flip_rate: {rate}. Must be in [0, 1].")
    count = math.floor(num_rows * rate + 0.5)
    return sorted(random.Random(seed).sample(range(num_rows), count))


def flip_preferences(dataset: "Dataset", rate: float, seed: int = 0) -> tuple["Dataset", list[int]]:
    """Swap `chosen` and `rejected` in a share of the rows, and what TRL keeps of both.

    Args:
        dataset: Preference pairs; it is not changed.
        rate: Share of the rows in [0, 1].
        seed: Of the draw.

    Returns:
        The new data set, same order and columns, and the rows that were swapped.

    Raises:
        ValueError: If `rate` is outside [0, 1].
    """
    rows = flipped_rows(len(dataset), rate, seed)
    swapped = set(rows)
    columns = [(a, b) for a, b in _COLUMNS if {a, b} <= set(dataset.column_names)]

    def swap(example: dict[str, Any], index: int) -> dict[str, Any]:
        first, second = (1, 0) if index in swapped else (0, 1)
        values = [(example[pair[first]], example[pair[second]]) for pair in columns]
        return {
            name: value
            for pair, both in zip(columns, values, strict=True)
            for name, value in zip(pair, both, strict=True)
        }

    return dataset.map(swap, with_indices=True, desc="Swapping labels"), rows
