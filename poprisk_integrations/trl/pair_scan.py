"""One pass over preference pairs: empty and identical ones, and who labelled what how often."""

from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from datasets import ClassLabel, Dataset, Value

from poprisk_integrations.trl.pairs import source_rows

__all__ = [
    "ANNOTATOR_COLUMNS", "TOKENIZED", "PairScan", "annotator_column_of", "is_scannable",
    "scan_pairs",
]  # fmt: skip

# Names under which data sets say who labelled a pair.
ANNOTATOR_COLUMNS = (
    *("annotator", "annotator_id", "labeler", "labeler_id", "labeller", "labeller_id"),
    *("worker", "worker_id", "rater", "rater_id"),
)
# Of data that need no text any more: all columns of one of the sets.
TOKENIZED = (frozenset({"prompt_ids", "chosen_ids", "rejected_ids"}),)
_BATCH = 1000


@dataclass(kw_only=True, slots=True)
class PairScan:
    """What one pass over preference pairs found.

    `labels` has a line for each pair that expresses a preference: `row` (of the data as they were
    read), `key` (a hash of the prompt and of both answers in any order: the same for copies and for
    labels the other way), `direction` (which of the two is chosen), `longer` (1: the chosen one has
    more characters, -1: fewer) and `annotator` (missing where that is not known).
    """

    # Places of pairs with an empty chosen or rejected, or no prompt.
    empty: list[int] = field(default_factory=list)
    # Places of conversations without a prompt column of which one ends in an empty message.
    unanswered: list[int] = field(default_factory=list)
    identical: list[int] = field(default_factory=list)  # places of pairs of equal completions
    repeated: int = 0  # how many pairs are copies of an earlier one
    # How many pairs of completions are labelled in one direction and in the other.
    both_ways: int = 0
    annotator_column: str | None = None
    labels: pd.DataFrame = field(default_factory=lambda: _labels(), compare=False, repr=False)


def is_scannable(dataset: Dataset, tokenized: Collection[frozenset[str]] = TOKENIZED) -> bool:
    """Not of data that are tokenized already, or made on the fly by `set_transform`."""
    columns = dataset.column_names
    has_tokens = any(names.issubset(columns) for names in tokenized)
    return ("chosen" in columns or not has_tokens) and dataset.format["type"] != "custom"


def scan_pairs(
    dataset: Dataset,
    name: str = "train_dataset",
    *,
    annotator_column: str | None = None,
    tokenized: Collection[frozenset[str]] = TOKENIZED,
    progress: Callable[[int], Any] | None = None,
) -> PairScan:
    """Look at every pair once: one pass over the two to four columns.

    The formats are those of TRL: text or conversations (lists of messages), with a `prompt` column
    or with the prompt as the common start of `chosen` and `rejected`. Data that are tokenized
    already, or made on the fly by `set_transform`, are not looked at. Without `annotator_column` it
    is found by the usual names. Texts are not kept: about 40 bytes stay of each pair. `progress` is
    told how many pairs are done.

    Example:
        >>> data = {"chosen": ["a", "a", "b"], "rejected": ["b", "b", "a"]}
        >>> scan = scan_pairs(Dataset.from_dict(data))
        >>> scan.repeated, scan.both_ways, scan.empty
        (1, 1, [])
    """
    scan = PairScan()
    if not is_scannable(dataset, tokenized):
        return scan
    columns = dataset.column_names
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if missing:
        raise ValueError(
            f"{name} has no column {' and no column '.join(repr(c) for c in missing)}. "
            f"Preference data need 'chosen' and 'rejected' (and 'prompt', unless both start with "
            f"it); found {columns}."
        )
    scan.annotator_column = who = annotator_column_of(dataset, name, annotator_column)
    wanted = [column for column in ("prompt", "chosen", "rejected", who) if column in columns]
    keys, directions, longer, places, codes = (array(code) for code in "qbbqq")
    people: dict[str, int] = {}
    index = 0
    for batch in dataset.with_format(None).select_columns(wanted).iter(batch_size=_BATCH):
        size = len(batch["chosen"])
        prompts = batch.get("prompt", [""] * size)
        labellers = [None] * size if who is None else batch[who]
        for prompt, chosen, rejected, labeller in zip(
            prompts, batch["chosen"], batch["rejected"], labellers, strict=True
        ):
            for completion in (chosen, rejected):
                _check_completion(completion, f"{name} row {index}")
            if prompt is None or _is_empty(chosen) or _is_empty(rejected):
                scan.empty.append(index)
            elif chosen == rejected:
                scan.identical.append(index)
            else:
                first, second = str(chosen), str(rejected)
                keys.append(hash((str(prompt), *sorted((first, second)))))
                directions.append(first < second)
                more = _length(chosen) - _length(rejected)
                longer.append((more > 0) - (more < 0))
                places.append(index)
                known = labeller is not None and labeller != ""
                codes.append(people.setdefault(str(labeller), len(people)) if known else -1)
                if "prompt" not in batch and _is_unanswered(chosen, rejected):
                    scan.unanswered.append(index)
            index += 1
        if progress is not None:
            progress(index)
    numbers = source_rows(dataset)
    scan.labels = _labels([numbers[p] for p in places], keys, directions, longer, codes, people)
    distinct = scan.labels.drop_duplicates(["key", "direction"])
    scan.repeated = len(scan.labels) - len(distinct)
    scan.both_ways = int(distinct["key"].duplicated().sum())
    return scan


def _labels(
    rows: Any = (),
    keys: Any = (),
    directions: Any = (),
    longer: Any = (),
    codes: Any = (),
    people: Collection[str] = (),
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "row": pd.Series(rows, dtype="int64"),
            "key": pd.Series(keys, dtype="int64"),
            "direction": pd.Series(directions, dtype="int8"),
            "longer": pd.Series(longer, dtype="int8"),
            "annotator": pd.Categorical.from_codes(list(codes), categories=list(people)),
        }
    )


def annotator_column_of(
    dataset: Dataset, name: str = "dataset", wanted: str | None = None
) -> str | None:
    """The column that was asked for, else the first of the usual names that holds single values."""
    scalar = [
        column
        for column, feature in dataset.features.items()
        if isinstance(feature, ClassLabel)
        or (isinstance(feature, Value) and "binary" not in feature.dtype)
    ]
    if wanted is None:
        by_name = {column.lower(): column for column in reversed(scalar)}
        return next((by_name[usual] for usual in ANNOTATOR_COLUMNS if usual in by_name), None)
    if wanted not in dataset.column_names:
        raise ValueError(
            f"Invalid annotator_column: {wanted!r}. {name} has no such column; found "
            f"{dataset.column_names}."
        )
    if wanted not in scalar:
        raise ValueError(
            f"Invalid annotator_column: {wanted!r}. It must hold a text or a number for each pair, "
            f"not {dataset.features[wanted]}."
        )
    return wanted


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


def _is_unanswered(*completions: Any) -> bool:
    """Of whole conversations: whether one of them ends in an empty message."""
    return any(isinstance(one, list) and _is_empty(one[-1:]) for one in completions)


def _length(completion: Any) -> int:
    """Characters of text, or of the texts of all messages."""
    if isinstance(completion, str):
        return len(completion)
    contents = [message.get("content") or "" for message in completion]
    return sum(
        len(content)
        if isinstance(content, str)
        else sum(len(part.get("text") or "") for part in content)
        for content in contents
    )
