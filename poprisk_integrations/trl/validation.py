"""Checks of preference data and of the output directory, before any work starts."""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

__all__ = [
    "check_before_work",
    "check_num_pairs",
    "check_output_dir",
    "check_preferences",
    "unusable_rows",
]

_TOKENIZED_COLUMNS = {"prompt_ids", "chosen_ids", "rejected_ids"}


def check_before_work(args: TrainingArguments, train_dataset: Any, eval_dataset: Any) -> None:
    """All checks of this module, in the order of their cost.

    Args:
        args: Settings of the run.
        train_dataset: Checked if it is a map-style `datasets.Dataset`.
        eval_dataset: Same, or a dict of them, or None; it may be smaller than a batch.

    Raises:
        OSError: If `args.output_dir` cannot be written.
        ValueError: If the data do not pass.
    """
    if args.should_save:
        check_output_dir(str(args.output_dir))
    if isinstance(train_dataset, Dataset):
        check_num_pairs(
            len(train_dataset),
            per_device=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
        )
        check_preferences(train_dataset)
    eval_sets = {"eval_dataset": eval_dataset}
    if isinstance(eval_dataset, dict):
        eval_sets = {f"eval_dataset[{key!r}]": value for key, value in eval_dataset.items()}
    for name, dataset in eval_sets.items():
        if isinstance(dataset, Dataset):
            check_preferences(dataset, name)


def check_preferences(dataset: Dataset, name: str = "train_dataset") -> None:
    """Refuse a preference data set that no method could learn from.

    The formats are those of TRL: text or conversations (lists of messages), with a `prompt`
    column or with the prompt as the common start of `chosen` and `rejected`. One pass over the
    two or three columns.

    Args:
        dataset: A map-style data set.
        name: How the error should call it.

    Raises:
        ValueError: If `chosen` or `rejected` is missing, a row is empty, or the two completions of
            a row are the same. The message counts the rows and names the first.
    """
    empty, identical = unusable_rows(dataset, name)
    if empty:
        raise ValueError(
            f"{name} has {_rows(empty)} with an empty prompt, chosen or rejected. Remove them "
            "(in a recipe of `poprisk dpo`: drop_unusable_pairs: true)."
        )
    if identical:
        raise ValueError(
            f"{name} has {_rows(identical)} whose chosen and rejected are the same: they express "
            "no preference. Remove them, e.g. with "
            'dataset.filter(lambda row: row["chosen"] != row["rejected"]) '
            "(in a recipe of `poprisk dpo`: drop_unusable_pairs: true)."
        )


def unusable_rows(dataset: Dataset, name: str = "train_dataset") -> tuple[list[int], list[int]]:
    """Rows that express no preference.

    Args:
        dataset: A map-style data set in one of TRL's formats.
        name: How an error should call it.

    Returns:
        Rows with an empty chosen or rejected (or no prompt), and rows whose completions are the
        same. Both are empty for data that are tokenized already.

    Raises:
        ValueError: If a column is missing, or a completion is neither text nor messages.

    Example:
        >>> data = {"chosen": ["a", "b", ""], "rejected": ["c", "b", "d"]}
        >>> unusable_rows(Dataset.from_dict(data))
        ([2], [1])
    """
    columns = dataset.column_names
    if _TOKENIZED_COLUMNS.issubset(columns):
        return [], []
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(
            f"{name} has no column {' and no column '.join(repr(c) for c in missing)}. "
            f"Preference data need 'chosen' and 'rejected' (and 'prompt', unless both start with "
            f"it); found {columns}."
        )
    wanted = [column for column in ("prompt", "chosen", "rejected") if column in columns]
    empty: list[int] = []
    identical: list[int] = []
    index = 0
    for batch in dataset.with_format(None).select_columns(wanted).iter(batch_size=1000):
        prompts = batch.get("prompt", [""] * len(batch["chosen"]))
        for prompt, chosen, rejected in zip(
            prompts, batch["chosen"], batch["rejected"], strict=True
        ):
            for completion in (chosen, rejected):
                if not isinstance(completion, (str, list, type(None))):
                    raise ValueError(
                        f"{name} row {index}: chosen and rejected must be text or lists of "
                        f"messages, not {type(completion).__name__}."
                    )
            if prompt is None or _is_empty(chosen) or _is_empty(rejected):
                empty.append(index)
            elif chosen == rejected:
                identical.append(index)
            index += 1
    return empty, identical


def check_num_pairs(num_pairs: int, *, per_device: int, accumulation: int, world_size: int) -> None:
    """Refuse a training set that does not fill one global batch.

    Args:
        num_pairs: Pairs in the training set.
        per_device: Pairs per device and micro-batch.
        accumulation: Micro-batches per optimizer step.
        world_size: Processes.

    Raises:
        ValueError: If the data are fewer than `per_device * accumulation * world_size` pairs.

    Example:
        >>> check_num_pairs(16, per_device=2, accumulation=4, world_size=2)
    """
    global_batch = per_device * accumulation * world_size
    if num_pairs < global_batch:
        raise ValueError(
            f"train_dataset has {num_pairs} pairs, fewer than one global batch of {global_batch} "
            f"(per_device_train_batch_size={per_device} x gradient_accumulation_steps="
            f"{accumulation} x {world_size} processes). Use more data or a smaller batch."
        )


def check_output_dir(path: str | os.PathLike[str]) -> None:
    """Refuse a directory that cannot be written, now and not at the first checkpoint.

    Args:
        path: Directory that is to be written; it need not exist, and is not created.

    Raises:
        NotADirectoryError: If the path, or a part of it, is a file.
        PermissionError: If it, or the nearest existing part of it, is not writable.
    """
    nearest = Path(path).absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(f"output_dir {str(path)!r}: {str(nearest)!r} is not a directory.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output_dir {str(path)!r}: no permission to write to {str(nearest)!r}."
        )


def _is_empty(completion: Any) -> bool:
    """True for None, blank text, no messages, or messages that all lack content."""
    if completion is None:
        return True
    if isinstance(completion, str):
        return not completion.strip()
    return not any(message.get("content") or message.get("tool_calls") for message in completion)


def _rows(indices: list[int]) -> str:
    noun = "row" if len(indices) == 1 else "rows"
    return f"{len(indices)} {noun} (first: row {indices[0]})"
