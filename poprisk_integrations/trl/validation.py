"""Checks of preference data, models and the output directory, before any work starts."""

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers.trainer_utils import SaveStrategy

__all__ = [
    "PairScan",
    "check_before_work",
    "check_output_dir",
    "check_preferences",
    "check_vocabulary",
    "scan_pairs",
]

logger = logging.getLogger(__name__)

# Of data that need no text any more: all columns of one of the sets.
TOKENIZED = (frozenset({"prompt_ids", "chosen_ids", "rejected_ids"}),)


@dataclass(kw_only=True, slots=True)
class PairScan:
    """What one pass over preference pairs found."""

    # Rows with an empty chosen or rejected, or no prompt.
    empty: list[int] = field(default_factory=list)
    identical: list[int] = field(default_factory=list)  # rows whose completions are the same
    repeated: int = 0  # how many pairs are copies of an earlier one
    # How many pairs of completions are labelled in one direction and in the other.
    both_ways: int = 0


def check_before_work(
    args: Any,
    train_dataset: Any,
    eval_dataset: Any,
    tokenized: Collection[frozenset[str]] = TOKENIZED,
) -> None:
    """Everything that can be refused before a model is loaded, in the order of its cost.

    `args` are training arguments with `PairOptions`. With `noise="off"` nothing is refused that TRL
    trains on: there are warnings. Only map-style data are looked at.
    """
    if args.should_save:
        check_output_dir(
            str(args.output_dir), needed=SaveStrategy(args.save_strategy) != SaveStrategy.NO
        )
    strict = args.noise != "off"
    if isinstance(train_dataset, Dataset):
        scan = check_preferences(train_dataset, strict=strict, tokenized=tokenized)
        if args.process_index == 0 and (scan.repeated or scan.both_ways):
            logger.log(
                logging.WARNING if scan.both_ways else logging.INFO,
                "train_dataset: %d of %d pairs are copies of an earlier one, and %d pairs of "
                "completions are labelled both ways.",
                scan.repeated,
                len(train_dataset),
                scan.both_ways,
            )
    elif train_dataset is not None:
        _refuse_streamed(args)
    eval_sets = {"eval_dataset": eval_dataset}
    if isinstance(eval_dataset, dict):
        eval_sets = {f"eval_dataset[{key!r}]": value for key, value in eval_dataset.items()}
    for name, dataset in eval_sets.items():
        if isinstance(dataset, Dataset):
            check_preferences(dataset, name, strict=strict, tokenized=tokenized)


def _refuse_streamed(args: Any) -> None:
    for name in ("pair_id_column", "pair_weight_column"):
        column = getattr(args, name, None)
        if column is not None:
            raise ValueError(
                f"Invalid {name}: {column!r}. It needs map-style training data, not streamed ones."
            )
    if args.noise in ("cdpo", "rdpo", "weights") and args.noise_rate is None:
        raise ValueError(
            f"Invalid noise_rate: None. With noise={args.noise!r} it is estimated from map-style "
            "training data; these are streamed. Give the rate."
        )


def check_preferences(
    dataset: Dataset,
    name: str = "train_dataset",
    *,
    strict: bool = True,
    tokenized: Collection[frozenset[str]] = TOKENIZED,
) -> PairScan:
    """Refuse preference data that no method could learn from; the error calls them `name`.

    Not strict, empty rows and equal completions are a warning: TRL trains on such data.
    """
    scan = scan_pairs(dataset, name, tokenized)
    faults = []
    if scan.empty:
        faults.append(
            f"{name} has {_rows(scan.empty)} with an empty prompt, chosen or rejected. Remove them "
            "(in a config of `poprisk dpo`: drop_unusable_pairs: true)."
        )
    if scan.identical:
        faults.append(
            f"{name} has {_rows(scan.identical)} whose chosen and rejected are the same: they "
            "express no preference. Remove them, e.g. with "
            'dataset.filter(lambda row: row["chosen"] != row["rejected"]) '
            "(in a config of `poprisk dpo`: drop_unusable_pairs: true)."
        )
    if faults and strict:
        raise ValueError(faults[0])
    for fault in faults:
        logger.warning("%s", fault)
    return scan


def scan_pairs(
    dataset: Dataset,
    name: str = "train_dataset",
    tokenized: Collection[frozenset[str]] = TOKENIZED,
) -> PairScan:
    """Look at every pair once: one pass over the two or three columns.

    The formats are those of TRL: text or conversations (lists of messages), with a `prompt` column
    or with the prompt as the common start of `chosen` and `rejected`. Data that are tokenized
    already, or made on the fly by `set_transform`, are not looked at.

    Example:
        >>> data = {"chosen": ["a", "a", "b"], "rejected": ["b", "b", "a"]}
        >>> scan = scan_pairs(Dataset.from_dict(data))
        >>> scan.repeated, scan.both_ways, scan.empty
        (1, 1, [])
    """
    scan = PairScan()
    columns = dataset.column_names
    if "chosen" not in columns and any(names.issubset(columns) for names in tokenized):
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


def _check_completion(completion: Any, where: str) -> None:
    """Raise unless it is text, messages, or None."""
    if completion is None or isinstance(completion, str):
        return
    wanted = f"{where}: chosen and rejected must be text or lists of messages"
    if not isinstance(completion, list):
        raise ValueError(f"{wanted}, not {type(completion).__name__}.")
    for message in completion:
        if not isinstance(message, dict):
            raise ValueError(f"{wanted}, not lists of {type(message).__name__}.")
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


def check_output_dir(path: str | os.PathLike[str], *, needed: bool = True) -> None:
    """Refuse a directory that cannot be written, now and not at the first checkpoint.

    It need not exist, and is not created. Where it exists and Trainer writes nothing into it
    (`needed=False`) there is a warning.
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


def check_vocabulary(
    model: nn.Module | None, ref_model: nn.Module | None, *, strict: bool = True
) -> None:
    """Refuse a reference whose tokens are not the policy's.

    Not strict, it is a warning: embeddings may only be padded to different sizes.
    """
    sizes = [_vocabulary_size(one) for one in (model, ref_model)]
    if None not in sizes and sizes[0] != sizes[1]:
        problem = (
            f"Invalid ref_model: its vocabulary has {sizes[1]} tokens, that of the model "
            f"{sizes[0]}. Log-ratios between them mean nothing: use a reference with the same "
            "tokenizer."
        )
        if strict:
            raise ValueError(problem)
        logger.warning("%s", problem)


def _vocabulary_size(model: Any) -> int | None:
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "vocab_size", None)
