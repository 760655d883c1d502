"""Checks of ids and weights of pairs, and of what the trainer made of the data."""

import logging
import math
from typing import Any

from datasets import Dataset
from torch import nn

from poprisk_integrations.trl.pair_columns import source_rows

__all__ = ["check_vocabulary", "check_weights", "pair_ids"]

logger = logging.getLogger(__name__)


def pair_ids(dataset: Dataset, column: str | None) -> list[int] | list[str]:
    """One id per row: of the column, or the row numbers (those before `drop_rows`).

    Args:
        dataset: Training pairs, before anything is filtered.
        column: Name of the column; None for row numbers.

    Raises:
        ValueError: If the column is missing, an id is missing, occurs twice, or is neither text
            nor an integer of 64 bits, or some are text and some integers.

    Example:
        >>> pair_ids(Dataset.from_dict({"id": ["a", "b"]}), "id")
        ['a', 'b']
    """
    if column is None:
        return source_rows(dataset)
    values = _column(dataset, "pair_id_column", column)
    first_seen: dict[Any, int] = {}
    for row, value in zip(source_rows(dataset), values, strict=True):
        if value is None or value == "":
            raise ValueError(f"Invalid pair_id_column: {column!r}. Row {row} has no id.")
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise ValueError(
                f"Invalid pair_id_column: {column!r}. Row {row} has {value!r}; ids must be text or "
                "integers."
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(
                f"Invalid pair_id_column: {column!r}. Row {row} has {value!r}; integers must fit "
                "64 bits. Use text."
            )
        other = next(iter(first_seen), value)
        if isinstance(value, str) != isinstance(other, str):
            raise ValueError(
                f"Invalid pair_id_column: {column!r}. Row {first_seen[other]} has {other!r} and "
                f"row {row} has {value!r}; ids must be all text or all integers."
            )
        if value in first_seen:
            raise ValueError(
                f"Invalid pair_id_column: {column!r}. Rows {first_seen[value]} and {row} have the "
                f"same id {value!r}."
            )
        first_seen[value] = row
    return values


def check_weights(dataset: Dataset, column: str) -> list[float]:
    """The weights of the pairs.

    Args:
        dataset: Training pairs, before anything is filtered.
        column: Name of the column.

    Raises:
        ValueError: If the column is missing, a weight is missing, not finite or negative, or all
            are zero. The message names the first such row.

    Example:
        >>> check_weights(Dataset.from_dict({"w": [1, 0]}), "w")
        [1.0, 0.0]
    """
    weights = _column(dataset, "pair_weight_column", column)
    for row, weight in zip(source_rows(dataset), weights, strict=True):
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ValueError(
                f"Invalid pair_weight_column: {column!r}. Row {row} has {weight!r}; weights must "
                "be finite and >= 0."
            )
    if not any(weights):
        raise ValueError(f"Invalid pair_weight_column: {column!r}. All weights are zero.")
    return [float(weight) for weight in weights]


def check_vocabulary(
    model: nn.Module | None, ref_model: nn.Module | None, *, strict: bool = True
) -> None:
    """Refuse a reference whose tokens are not the policy's.

    Args:
        model: The policy.
        ref_model: The reference; None where it is the policy itself.
        strict: False for a warning: embeddings may only be padded to different sizes.

    Raises:
        ValueError: If the vocabulary sizes differ.
    """
    sizes = [_vocabulary_size(model), None if ref_model is None else _vocabulary_size(ref_model)]
    if None not in sizes and sizes[0] != sizes[1]:
        problem = (
            f"Invalid ref_model: its vocabulary has {sizes[1]} tokens, that of the model "
            f"{sizes[0]}. Log-ratios between them mean nothing: use a reference with the same "
            "tokenizer."
        )
        if strict:
            raise ValueError(problem)
        logger.warning("%s", problem)


def _column(dataset: Dataset, argument: str, column: str) -> list[Any]:
    if column not in dataset.column_names:
        raise ValueError(
            f"Invalid {argument}: {column!r}. train_dataset has no such column; found "
            f"{dataset.column_names}."
        )
    return list(dataset.with_format(None)[column])


def _vocabulary_size(model: Any) -> int | None:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "vocab_size", None)
