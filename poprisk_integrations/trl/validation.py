"""Checks of preference data and of the output directory, before any work starts."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers.trainer_utils import SaveStrategy

if TYPE_CHECKING:
    from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig

__all__ = [
    "PairScan",
    "check_before_work",
    "check_output_dir",
    "check_preferences",
    "scan_pairs",
    "unusable_rows",
]

logger = logging.getLogger(__name__)

_TOKENIZED_COLUMNS = {"prompt_ids", "chosen_ids", "rejected_ids"}


@dataclass(kw_only=True, slots=True)
class PairScan:
    """What one pass over preference pairs found.

    Attributes:
        empty: Rows with an empty chosen or rejected, or no prompt.
        identical: Rows whose completions are the same.
        repeated: How many pairs are copies of an earlier one.
        both_ways: How many pairs of completions are labelled in one direction and in the other.
    """

    empty: list[int] = field(default_factory=list)
    identical: list[int] = field(default_factory=list)
    repeated: int = 0
    both_ways: int = 0


def check_before_work(args: "PopRiskDPOConfig", train_dataset: Any, eval_dataset: Any) -> None:
    """All checks of this module, in the order of their cost.

    With `noise="off"` nothing is refused that `trl.DPOTrainer` trains on: there are warnings.

    Args:
        args: Settings of the run.
        train_dataset: Checked if it is a map-style `datasets.Dataset`.
        eval_dataset: Same, or a dict of them, or None.

    Raises:
        OSError: If `args.output_dir` cannot be written.
        ValueError: If the data do not pass.
    """
    if args.should_save:
        check_output_dir(
            str(args.output_dir), needed=SaveStrategy(args.save_strategy) != SaveStrategy.NO
        )
    strict = args.noise != "off"
    if isinstance(train_dataset, Dataset):
        scan = check_preferences(train_dataset, strict=strict)
        if args.process_index == 0 and (scan.repeated or scan.both_ways):
            logger.log(
                logging.WARNING if scan.both_ways else logging.INFO,
                "train_dataset: %d of %d pairs are copies of an earlier one, and %d pairs of "
                "completions are labelled both ways.",
                scan.repeated,
                len(train_dataset),
                scan.both_ways,
            )
    eval_sets = {"eval_dataset": eval_dataset}
    if isinstance(eval_dataset, dict):
        eval_sets = {f"eval_dataset[{key!r}]": value for key, value in eval_dataset.items()}
    for name, dataset in eval_sets.items():
        if isinstance(dataset, Dataset):
            check_preferences(dataset, name, strict=strict)


def check_preferences(
    dataset: Dataset, name: str = "train_dataset", *, strict: bool = True
) -> PairScan:
    """Refuse a preference data set that no method could learn from.

    The formats are those of TRL: text or conversations (lists of messages), with a `prompt`
    column or with the prompt as the common start of `chosen` and `rejected`. One pass over the
    two or three columns.

    Args:
        dataset: A map-style data set.
        name: How the error should call it.
        strict: False for a warning where rows are empty or completions the same: TRL trains on
            such data.

    Raises:
        ValueError: If `chosen` or `rejected` is missing, a row is empty, or the two completions of
            a row are the same. The message counts the rows and names the first.
    """
    scan = scan_pairs(dataset, name)
    faults = []
    if scan.empty:
        faults.append(
            f"{name} has {_rows(scan.empty)} with an empty prompt, chosen or rejected. Remove them "
            "(in a recipe of `poprisk dpo`: drop_unusable_pairs: true)."
        )
    if scan.identical:
        faults.append(
            f"{name} has {_rows(scan.identical)} whose chosen and rejected are the same: they "
            "express no preference. Remove them, e.g. with "
            'dataset.filter(lambda row: row["chosen"] != row["rejected"]) '
            "(in a recipe of `poprisk dpo`: drop_unusable_pairs: true)."
        )
    if faults and strict:
        raise ValueError(faults[0])
    for fault in faults:
        logger.warning("%s", fault)
    return scan


def unusable_rows(dataset: Dataset, name: str = "train_dataset") -> tuple[list[int], list[int]]:
    """Rows that express no preference, see `scan_pairs`.

    Args:
        dataset: A map-style data set in one of TRL's formats.
        name: How an error should call it.

    Returns:
        Rows with an empty chosen or rejected (or no prompt), and rows whose completions are the
        same.

    Example:
        >>> data = {"chosen": ["a", "b", ""], "rejected": ["c", "b", "d"]}
        >>> unusable_rows(Dataset.from_dict(data))
        ([2], [1])
    """
    scan = scan_pairs(dataset, name)
    return scan.empty, scan.identical


def scan_pairs(dataset: Dataset, name: str = "train_dataset") -> PairScan:
    """Look at every pair once.

    Args:
        dataset: A map-style data set in one of TRL's formats. Data that are tokenized already, or
            made on the fly by `set_transform`, are not looked at.
        name: How an error should call it.

    Raises:
        ValueError: If a column is missing, or a completion is neither text nor messages.

    Example:
        >>> data = {"chosen": ["a", "a", "b"], "rejected": ["b", "b", "a"]}
        >>> scan = scan_pairs(Dataset.from_dict(data))
        >>> scan.repeated, scan.both_ways
        (1, 1)
    """
    scan = PairScan()
    columns = dataset.column_names
    if _TOKENIZED_COLUMNS.issubset(columns) and "chosen" not in columns:
        return scan
    if dataset.format["type"] == "custom":
        return scan
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(
            f"{name} has no column {' and no column '.join(repr(c) for c in missing)}. "
            f"Preference data need 'chosen' and 'rejected' (and 'prompt', unless both start with "
            f"it); found {columns}."
        )
    wanted = [column for column in ("prompt", "chosen", "rejected") if column in columns]
    directions: dict[int, int] = {}  # bits of the directions in which two completions are labelled
    index = 0
    for batch in dataset.with_format(None).select_columns(wanted).iter(batch_size=1000):
        prompts = batch.get("prompt", [""] * len(batch["chosen"]))
        for prompt, chosen, rejected in zip(
            prompts, batch["chosen"], batch["rejected"], strict=True
        ):
            for completion in (chosen, rejected):
                _check_completion(completion, f"{name} row {index}")
            if prompt is None or _is_empty(chosen) or _is_empty(rejected):
                scan.empty.append(index)
            elif chosen == rejected:
                scan.identical.append(index)
            else:
                first, second = str(chosen), str(rejected)
                key = hash((str(prompt), *sorted((first, second))))
                known, direction = directions.get(key, 0), 1 if first < second else 2
                scan.repeated += bool(known & direction)
                scan.both_ways += known == 3 - direction
                directions[key] = known | direction
            index += 1
    return scan


def check_output_dir(path: str | os.PathLike[str], *, needed: bool = True) -> None:
    """Refuse a directory that cannot be written, now and not at the first checkpoint.

    Args:
        path: Directory that is to be written; it need not exist, and is not created.
        needed: False where Trainer writes nothing into a directory that exists: then there is a
            warning.

    Raises:
        NotADirectoryError: If the path, or a part of it, is a file.
        PermissionError: If it, or the nearest existing part of it, is not writable.
    """
    nearest = Path(path).absolute()
    exists = os.path.lexists(nearest)
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(f"output_dir {str(path)!r}: {str(nearest)!r} is not a directory.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        problem = f"output_dir {str(path)!r}: no permission to write to {str(nearest)!r}."
        if needed or not exists:
            raise PermissionError(problem)
        logger.warning("%s No report is written.", problem)


def _check_completion(completion: Any, where: str) -> None:
    """Raise unless it is text, messages, or None."""
    if completion is None or isinstance(completion, str):
        return
    if not isinstance(completion, list):
        raise ValueError(
            f"{where}: chosen and rejected must be text or lists of messages, not "
            f"{type(completion).__name__}."
        )
    for message in completion:
        if not isinstance(message, dict):
            raise ValueError(
                f"{where}: chosen and rejected must be text or lists of messages, not lists of "
                f"{type(message).__name__}."
            )
        if "role" not in message:
            raise ValueError(
                f"{where}: a message needs 'role' and 'content', and has {sorted(message)}."
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
