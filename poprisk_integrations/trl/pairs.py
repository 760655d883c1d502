"""The training pairs: numbered, so that each is known again later, with ids, weights and texts."""

# mypy: disable-error-code="no-untyped-call"

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from poprisk_integrations.trl.flip_report import FlipReport, suggested_actions
from poprisk_integrations.trl.label_noise import LabelNoise

__all__ = [
    "PAIR_COLUMNS",
    "ROW_COLUMN",
    "SOURCE_COLUMN",
    "LabelledPairs",
    "PairCollator",
    "drop_rows",
    "excerpts",
    "on_one_line",
    "pair_texts",
    "source_rows",
    "take_pair_columns",
]

logger = logging.getLogger(__name__)

SOURCE_COLUMN = "poprisk_source_row"  # of the data before `drop_rows`
ROW_COLUMN = "poprisk_row"
WEIGHT_COLUMN = "poprisk_weight"
PAIR_COLUMNS = (ROW_COLUMN, WEIGHT_COLUMN)

SHOWN = 20  # pairs of a report that have a few words of their texts
EXCERPT = 80  # characters of each text that a report shows
_BEFORE = 20  # of them, before the place where the answers part


class LabelledPairs:
    """Ids, weights and row numbers of the pairs, from before TRL filters and shards them.

    Streamed data (without a length) have none of them. Ids are those of `id_column`, else the row
    numbers. `dataset` is what to train on, with `ROW_COLUMN`, and with `WEIGHT_COLUMN` if there
    are weights.

    Example:
        >>> data = Dataset.from_dict({"chosen": ["a", "b"], "name": ["x", "y"]})
        >>> pairs = LabelledPairs(data, id_column="name")
        >>> pairs.ids, pairs.dataset["poprisk_row"][:]
        (['x', 'y'], [0, 1])
    """

    def __init__(
        self, dataset: Any, id_column: str | None = None, weight_column: str | None = None
    ) -> None:
        self.dataset = dataset
        self.dropped: set[int] = set()  # places of the pairs that are not trained on
        self.ids: list[int] | list[str] = []
        self._rows: list[int] = []
        if not isinstance(dataset, Dataset):
            return
        self._rows = source_rows(dataset)
        self.ids = self._rows if id_column is None else _pair_ids(dataset, id_column)
        weights = None if weight_column is None else _pair_weights(dataset, weight_column)
        # Those of an earlier trainer: its data, or a part of them, can be used again, and are then
        # numbered anew.
        self.dataset = _without(dataset, *PAIR_COLUMNS)
        self.dataset = self.dataset.add_column(ROW_COLUMN, list(range(len(dataset))))
        if weights is not None:
            self.dataset = self.dataset.add_column(WEIGHT_COLUMN, weights)

    def __len__(self) -> int:
        """Rows before any was dropped; 0 for streamed data."""
        return len(self.ids)

    def note_dropped(self, prepared: Any, because: str) -> None:
        """Compare with what TRL made of the data, and say how many pairs are missing."""
        if not len(self) or not isinstance(prepared, Dataset):
            return
        self.dropped = set(range(len(self))) - set(prepared.with_format(None)[ROW_COLUMN])
        if self.dropped:
            logger.warning(
                "%d of %d training pairs were dropped: %s.", len(self.dropped), len(self), because
            )

    def flip_report(self, noise: LabelNoise) -> FlipReport:
        """The report of these pairs, from the margins and the estimate of a run."""
        if not len(self):
            raise ValueError("A flip report needs map-style training data, not streamed ones.")
        if noise.rate_of_report is None or not bool(noise.margins.seen.any()):
            raise ValueError(
                "No flip report yet: it needs margins of at least 50 pairs from before they were "
                "trained on, and is made in the first epoch of training."
            )
        probability = noise.probability_wrong()
        actions = suggested_actions(probability.tolist(), noise.calibrated)
        not_judged = noise.margins.margin.isfinite() & ~noise.margins.judged
        for place in not_judged.nonzero().flatten().tolist():
            actions[place] = "not_judged"
        for place in self.dropped:
            probability[place] = math.nan
            actions[place] = "too_long"
        suspects = probability.nan_to_num(nan=-1.0).argsort(descending=True)[:SHOWN].tolist()
        return FlipReport(
            pair_id=self.ids,
            row=self._rows,
            probability_wrong=probability.tolist(),
            margin=noise.margins.margin.tolist(),
            step=noise.margins.step.tolist(),
            action=actions,
            calibrated=noise.calibrated,
            texts=self._texts(suspects),
        )

    def _texts(self, places: list[int]) -> dict[int, tuple[str, str, str]]:
        """A few words of the texts of these pairs; none of data that hold tokens alone."""
        columns = self.dataset.column_names
        names = [name for name in ("prompt", "chosen", "rejected") if name in columns]
        if not {"chosen", "rejected"} <= set(names):
            return {}
        pairs = self.dataset.with_format(None).select_columns(names)
        return {self._rows[place]: excerpts(pairs[place]) for place in places}


def drop_rows(dataset: Dataset, rows: Collection[int]) -> Dataset:
    """The data without some rows, the others knowing which row they were.

    Example:
        >>> source_rows(drop_rows(Dataset.from_dict({"chosen": ["a", "b", "c"]}), {1}))
        [0, 2]
    """
    kept = [row for row in range(len(dataset)) if row not in rows]
    numbers = source_rows(dataset)
    dataset = _without(dataset, SOURCE_COLUMN).select(kept)
    return dataset.add_column(SOURCE_COLUMN, [numbers[row] for row in kept])


def source_rows(dataset: Dataset) -> list[int]:
    """Row numbers before `drop_rows`; of data that were not dropped from, the row numbers."""
    numbers = range(len(dataset))
    if SOURCE_COLUMN in dataset.column_names:
        known = list(dataset.with_format(None)[SOURCE_COLUMN])
        if len(set(known)) == len(known):  # not of data that were joined afterwards
            return known
    return list(numbers)


def _without(dataset: Dataset, *names: str) -> Dataset:
    return dataset.remove_columns([name for name in names if name in dataset.column_names])


class PairCollator:
    """A collator that keeps the columns of `LabelledPairs` of what another one collates."""

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


def _pair_ids(dataset: Dataset, column: str) -> list[int] | list[str]:
    """One id per row: unique, all text or all integers of 64 bits."""

    def refuse(fault: str) -> None:
        raise ValueError(f"Invalid pair_id_column: {column!r}. {fault}")

    values = _column(dataset, "pair_id_column", column)
    first_seen: dict[Any, int] = {}
    for row, value in zip(source_rows(dataset), values, strict=True):
        if value is None or value == "":
            refuse(f"Row {row} has no id.")
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            refuse(f"Row {row} has {value!r}; ids must be text or integers.")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            refuse(f"Row {row} has {value!r}; integers must fit 64 bits. Use text.")
        other = next(iter(first_seen), value)
        if isinstance(value, str) != isinstance(other, str):
            refuse(
                f"Row {first_seen[other]} has {other!r} and row {row} has {value!r}; ids must be "
                "all text or all integers."
            )
        if value in first_seen:
            refuse(f"Rows {first_seen[value]} and {row} have the same id {value!r}.")
        first_seen[value] = row
    return values


def _pair_weights(dataset: Dataset, column: str) -> list[float]:
    """The weights of the pairs: finite, >= 0, not all of them zero."""
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


def _column(dataset: Dataset, argument: str, column: str) -> list[Any]:
    if column not in dataset.column_names:
        raise ValueError(
            f"Invalid {argument}: {column!r}. train_dataset has no such column; found "
            f"{dataset.column_names}."
        )
    return list(dataset.with_format(None)[column])


def excerpts(example: Mapping[str, Any]) -> tuple[str, str, str]:
    """Prompt and answers on one line each, at most 80 characters: answers where they differ.

    Example:
        >>> excerpts({"prompt": "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."})
        ('2 + 2?', 'It is 4.', 'It is 5.')
    """
    prompt, *answers = map(on_one_line, pair_texts(example))
    alike = len(_common_start(*answers))
    start = 0 if max(map(len, answers)) <= EXCERPT else max(alike - _BEFORE, 0)
    chosen, rejected = (_cut(answer, start) for answer in answers)
    return _cut(prompt, max(len(prompt) - EXCERPT, 0)), chosen, rejected  # its end is the question


def on_one_line(text: str) -> str:
    """Without line ends, and without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def pair_texts(example: Mapping[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected: of conversations the last user message and both answers.

    The formats are those of TRL: with a prompt, or with it as the common start of both answers.

    Example:
        >>> user = {"role": "user", "content": "Red or blue?"}
        >>> answers = [{"role": "assistant", "content": text} for text in ("Red.", "Blue.")]
        >>> pair_texts({"chosen": [user, answers[0]], "rejected": [user, answers[1]]})
        ('Red or blue?', 'Red.', 'Blue.')
    """
    prompt, chosen, rejected = (example.get(key) for key in ("prompt", "chosen", "rejected"))
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        start = _common_start(chosen, rejected)
        # The last turn is what the answers are to; a transcript puts a blank line between turns.
        turns = [turn for turn in start.split("\n\n") if turn.strip()]
        return "\n\n".join(turns[-2:]), chosen[len(start) :], rejected[len(start) :]
    if prompt is None:
        prompt = chosen
    return _message(prompt, "user"), _message(chosen, "assistant"), _message(rejected, "assistant")


def _cut(text: str, start: int) -> str:
    shown = f"…{text[start + 1 :]}" if start else text
    return shown if len(shown) <= EXCERPT else f"{shown[: EXCERPT - 1]}…"


def _common_start(first: str, second: str) -> str:
    places = range(min(len(first), len(second)))
    return first[: next((n for n in places if first[n] != second[n]), len(places))]


def _message(text: Any, role: str) -> str:
    """Text as it is; of a conversation the last message of a role, or else the last message."""
    if not isinstance(text, list):
        return "" if text is None else str(text)
    messages = [message for message in text if isinstance(message, Mapping)]
    found = [message for message in messages if message.get("role") == role] or messages
    if not found:
        return ""
    content = found[-1].get("content")
    if isinstance(content, list):  # parts: text, images
        return " ".join(str(part.get("text") or f"[{part.get('type')}]") for part in content)
    return str(content or ("[tool call]" if found[-1].get("tool_calls") else ""))
