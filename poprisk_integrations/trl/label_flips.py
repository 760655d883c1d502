"""Swaps the labels of some preference pairs: for studies of label noise, and to correct them."""

import math
import random
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["EXCHANGED", "flip_preferences", "flipped_rows", "swap_labels"]

# Whatever else TRL's trainer reads of each completion goes with it.
EXCHANGED = (
    ("chosen", "rejected"),
    ("chosen_ids", "rejected_ids"),
    ("ref_chosen_logps", "ref_rejected_logps"),
)


def flipped_rows(num_rows: int, rate: float, seed: int = 0) -> list[int]:
    """Rows whose labels are to be swapped, ascending: `num_rows * rate` of them, rounded half up.

    The same arguments give the same rows on every machine and rank.

    Example:
        >>> len(flipped_rows(10, rate=0.3))
        3
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"Invalid flip_rate: {rate}. Must be in [0, 1].")
    count = math.floor(num_rows * rate + 0.5)
    return sorted(random.Random(seed).sample(range(num_rows), count))


def flip_preferences(dataset: "Dataset", rate: float, seed: int = 0) -> tuple["Dataset", list[int]]:
    """Swap the labels of a share of the rows; the new data set, and the rows that were swapped."""
    rows = flipped_rows(len(dataset), rate, seed)
    return swap_labels(dataset, rows), rows


def swap_labels(dataset: "Dataset", rows: Collection[int]) -> "Dataset":
    """Exchange chosen and rejected in some rows; order and other columns are kept.

    What TRL computes of each completion, token ids and log-probabilities of the reference, is
    exchanged with it. ValueError if the two columns are not of one type.
    """
    if not rows:
        return dataset
    features = dataset.features
    pairs = [pair for pair in EXCHANGED if all(name in features for name in pair)]
    for first, second in pairs:
        if _kind(features[first]) != _kind(features[second]):
            raise ValueError(
                f"cannot swap: {first!r} and {second!r} are of different types, {features[first]} "
                f"and {features[second]}."
            )
    names = [name for pair in pairs for name in pair]
    wanted = frozenset(rows)

    def swapped(*values: Any) -> dict[str, Any]:
        *cells, row = values
        if row in wanted:
            cells = [cells[index ^ 1] for index in range(len(cells))]  # 1 0 3 2 ...
        return dict(zip(names, cells, strict=True))

    return dataset.map(
        swapped,
        with_indices=True,
        input_columns=names,  # the others, images for one, are not decoded
        features=features,
        load_from_cache_file=False,
        desc="Swapping labels",
    )


def _kind(feature: Any) -> Any:
    is_text = getattr(feature, "dtype", None) in ("string", "large_string")
    return "text" if is_text else feature
