"""Row numbers and weights of the pairs, carried from the data set to the loss."""

# mypy: disable-error-code="no-untyped-call"

from collections.abc import Collection
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

__all__ = [
    "PAIR_COLUMNS",
    "ROW_COLUMN",
    "PairCollator",
    "add_pair_columns",
    "drop_rows",
    "source_rows",
    "take_pair_columns",
]

SOURCE_COLUMN = "poprisk_source_row"  # of the data before `drop_rows`
ROW_COLUMN = "poprisk_row"
WEIGHT_COLUMN = "poprisk_weight"
PAIR_COLUMNS = (ROW_COLUMN, WEIGHT_COLUMN)


def add_pair_columns(dataset: Dataset, weights: list[float] | None = None) -> Dataset:
    """Number the rows, before anything is filtered, so that a row can be told later.

    Columns of an earlier call are replaced: a prepared data set, or a part of it, can be used
    again, and its rows are then numbered anew.

    Args:
        dataset: Preference pairs; it is not changed.
        weights: One per row, to be carried along.

    Example:
        >>> add_pair_columns(Dataset.from_dict({"chosen": ["a", "b"]}))["poprisk_row"][:]
        [0, 1]
    """
    dataset = dataset.remove_columns([c for c in PAIR_COLUMNS if c in dataset.column_names])
    dataset = dataset.add_column(ROW_COLUMN, list(range(len(dataset))))
    if weights is not None:
        dataset = dataset.add_column(WEIGHT_COLUMN, weights)
    return dataset


def drop_rows(dataset: Dataset, rows: Collection[int]) -> Dataset:
    """The data without some rows, the others knowing which row they were.

    Args:
        dataset: Preference pairs; it is not changed.
        rows: Which to leave out.

    Example:
        >>> source_rows(drop_rows(Dataset.from_dict({"chosen": ["a", "b", "c"]}), {1}))
        [0, 2]
    """
    kept = [row for row in range(len(dataset)) if row not in rows]
    numbers = source_rows(dataset)
    dataset = dataset.remove_columns([c for c in (SOURCE_COLUMN,) if c in dataset.column_names])
    return dataset.select(kept).add_column(SOURCE_COLUMN, [numbers[row] for row in kept])


def source_rows(dataset: Dataset) -> list[int]:
    """Row numbers before `drop_rows`; of data that were not dropped from, the row numbers.

    Args:
        dataset: Preference pairs.
    """
    numbers = range(len(dataset))
    if SOURCE_COLUMN in dataset.column_names:
        known = list(dataset.with_format(None)[SOURCE_COLUMN])
        if len(set(known)) == len(known):  # not of data that were joined afterwards
            return known
    return list(numbers)


class PairCollator:
    """A collator that keeps the columns of `add_pair_columns` of what another one collates.

    Args:
        collator: Gets the examples without these columns.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, and add `poprisk_row` (int64) and `poprisk_weight` (fp32) where there are."""
        rest = [{k: v for k, v in example.items() if k not in PAIR_COLUMNS} for example in examples]
        batch: dict[str, Any] = self.collator(rest)
        for name, dtype in zip(PAIR_COLUMNS, (torch.int64, torch.float32), strict=True):
            # A column of this name may also be the user's own.
            if name in examples[0] and not isinstance(examples[0][name], str):
                batch[name] = torch.tensor([example[name] for example in examples], dtype=dtype)
        return batch


def take_pair_columns(
    inputs: dict[str, Any],
) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
    """A batch without our columns (models know no such inputs), its row numbers and weights."""
    rest = {k: v for k, v in inputs.items() if k not in PAIR_COLUMNS}
    return rest, inputs.get(ROW_COLUMN), inputs.get(WEIGHT_COLUMN)
