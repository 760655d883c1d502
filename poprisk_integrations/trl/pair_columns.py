"""Row numbers and weights of the pairs, carried from the data set to the loss."""

# mypy: disable-error-code="no-untyped-call"

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

__all__ = ["PAIR_COLUMNS", "ROW_COLUMN", "PairCollator", "add_pair_columns", "take_pair_columns"]

ROW_COLUMN = "poprisk_row"
WEIGHT_COLUMN = "poprisk_weight"
PAIR_COLUMNS = (ROW_COLUMN, WEIGHT_COLUMN)


def add_pair_columns(dataset: Dataset, weights: list[float] | None = None) -> Dataset:
    """Number the rows, before anything is filtered, so that a row can be told later.

    Args:
        dataset: Preference pairs; it is not changed.
        weights: One per row, to be carried along.

    Example:
        >>> add_pair_columns(Dataset.from_dict({"chosen": ["a", "b"]}))["poprisk_row"][:]
        [0, 1]
    """
    dataset = dataset.add_column(ROW_COLUMN, list(range(len(dataset))))
    if weights is not None:
        dataset = dataset.add_column(WEIGHT_COLUMN, weights)
    return dataset


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
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=dtype)
        return batch


def take_pair_columns(
    inputs: dict[str, Any],
) -> tuple[dict[str, Any], Tensor | None, Tensor | None]:
    """A batch without our columns (models know no such inputs), its row numbers and weights."""
    rest = {k: v for k, v in inputs.items() if k not in PAIR_COLUMNS}
    return rest, inputs.get(ROW_COLUMN), inputs.get(WEIGHT_COLUMN)
