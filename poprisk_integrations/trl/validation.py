"""Checks of preference data, models and the output directory, before any work starts."""

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers.trainer_utils import SaveStrategy

from poprisk_integrations.trl.pair_checks import Finding, label_findings, token_findings
from poprisk_integrations.trl.pair_scan import TOKENIZED, PairScan, is_scannable, scan_pairs
from poprisk_integrations.trl.pair_tokens import scan_tokens
from poprisk_integrations.trl.pairs import source_rows

__all__ = [
    "check_before_work",
    "check_output_dir",
    "check_preferences",
    "check_tokens",
    "check_vocabulary",
]

logger = logging.getLogger(__name__)

_SAMPLE = 256  # pairs that are tokenized before a training, evenly spaced


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
        if args.process_index == 0:
            _log_findings(label_findings(scan, len(train_dataset)))
    elif train_dataset is not None:
        _refuse_streamed(args)
    eval_sets = {"eval_dataset": eval_dataset}
    if isinstance(eval_dataset, dict):
        eval_sets = {f"eval_dataset[{key!r}]": value for key, value in eval_dataset.items()}
    for name, dataset in eval_sets.items():
        if isinstance(dataset, Dataset):
            check_preferences(dataset, name, strict=strict, tokenized=tokenized)


def check_tokens(args: Any, train_dataset: Any, processing_class: Any) -> None:
    """Warn of what the tokenizer and `max_length` do to a sample of the training pairs.

    How many pairs `max_length` leaves without an answer TRL tells of all.
    """
    if not isinstance(train_dataset, Dataset) or not is_scannable(train_dataset):
        return
    if {"image", "images"} & set(train_dataset.column_names):
        return
    places = range(0, len(train_dataset), -(-len(train_dataset) // _SAMPLE))
    sample = train_dataset.select(places)
    unusable = scan_pairs(sample)
    tokens = scan_tokens(
        sample,
        getattr(processing_class, "tokenizer", processing_class),
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        without={*unusable.empty, *unusable.identical},
    )
    tokens.emptied.clear()
    numbers = source_rows(train_dataset)
    rows = [numbers[place] for place in places]
    _log_findings(token_findings(tokens, rows, args.max_length))


def _log_findings(findings: list[Finding]) -> None:
    for finding in findings:
        logger.log(
            logging.INFO if finding.level == "note" else logging.WARNING,
            "train_dataset: %s.%s",
            finding,
            f" Advice: {finding.advice}." if finding.advice else "",
        )


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
    scan = scan_pairs(dataset, name, tokenized=tokenized)
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
