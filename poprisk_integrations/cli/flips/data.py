"""The data set of a flip report: which row is which pair, cleaned, and written."""

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, Value, disable_progress_bars

from poprisk_integrations._files import write_whole
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.cli.preference_data import load_split
from poprisk_integrations.trl.cleaning import suspects
from poprisk_integrations.trl.flip_report import DROP_AT, FlipReport
from poprisk_integrations.trl.label_flips import EXCHANGED, swap_labels
from poprisk_integrations.trl.pairs import excerpts

__all__ = ["clean_data", "load_data"]

_TEXT = "chosen"  # a column of reports that have the first words of some pairs
_SAME_DATA = (
    "it must be the data that the trainer got, same split, order and number of rows. Pairs of data "
    "that have changed since are told by an id only: train with pair_id_column=NAME, and give "
    "--id-column NAME here."
)


def load_data(
    args: argparse.Namespace, report: FlipReport, swapped_rows: set[int], *, quiet: bool
) -> tuple[Dataset, list[int]]:
    """The pairs as the trainer got them, and the row of each pair of the report, in its order.

    `args` are those of `add_data_arguments`.
    """
    if quiet:
        disable_progress_bars()
    dataset = load_split(args.dataset, args.split, args.dataset_config)
    rows = _match_rows(report, dataset, args.id_column)
    annotators = args.annotator_column
    if annotators is not None and annotators not in dataset.column_names:
        raise UsageError(
            f"Invalid --annotator-column: {annotators!r}. The data set has {dataset.column_names}."
        )
    numbers = report.to_pandas()["row"].tolist()
    swapped = {row for row, number in zip(rows, numbers, strict=True) if number in swapped_rows}
    return swap_labels(dataset, swapped), rows


def _match_rows(report: FlipReport, dataset: Dataset, id_column: str | None) -> list[int]:
    """By id if a column is named, else by row number."""
    columns = dataset.column_names
    for name in ("chosen", "rejected"):
        if name not in columns:
            raise UsageError(f"Invalid --dataset: no column {name!r}; found {columns}.")
    table = report.to_pandas()
    ids: list[Any] = table["pair_id"].tolist()
    rows: list[int] = table["row"].tolist()
    if id_column is not None:
        return _match_ids(ids, dataset, id_column)
    if ids != rows:
        raise UsageError(
            f"The pairs of the report have ids of their own (such as {ids[0]!r}): name their "
            f"column of the data set with --id-column (pair_id_column of the run); it has "
            f"{columns}."
        )
    # Rows that were dropped before training leave gaps; the texts then show whose rows these are.
    whole = len(dataset) == len(report) and max(rows, default=-1) < len(dataset)
    gaps = len(report) < len(dataset) and len(report) <= max(rows, default=-1) < len(dataset)
    if not (whole or (gaps and _TEXT in table)):
        raise UsageError(
            f"The flip report is of {len(report)} pairs, --dataset has {len(dataset)}: {_SAME_DATA}"
        )
    if _TEXT in table:
        _check_texts(table, dataset)
    return rows


def _check_texts(table: Any, dataset: Dataset) -> None:
    """Refuse data whose texts are not those of which the report has the first words."""
    names = [name for name in ("prompt", "chosen", "rejected") if name in dataset.column_names]
    texts = dataset.with_format(None).select_columns(names)
    for pair in table[table[_TEXT].ne("")].to_dict("records"):
        prompt, *answers = excerpts(texts[pair["row"]])
        # In any order: labels may have been swapped on purpose.
        if (prompt, *sorted(answers)) != (pair["prompt"], *sorted((pair[_TEXT], pair["rejected"]))):
            raise UsageError(
                f"Row {pair['row']} of --dataset has other texts than the flip report "
                f"({pair[_TEXT][:40]!r}): {_SAME_DATA}"
            )


def _match_ids(ids: list[Any], dataset: Dataset, id_column: str) -> list[int]:
    if id_column not in dataset.column_names:
        raise UsageError(
            f"Invalid --id-column: {id_column!r}. The data set has {dataset.column_names}."
        )
    # As text: CSV files do not tell 7 from "7".
    position: dict[str, int] = {}
    for row, value in enumerate(dataset.with_format(None)[id_column]):
        if value is None:  # not the text "None", which may be an id
            continue
        if position.setdefault(str(value), row) != row:
            raise UsageError(f"Invalid --id-column: {value!r} occurs twice in {id_column!r}.")
    missing = [value for value in ids if str(value) not in position]
    if missing:
        raise UsageError(
            f"{len(missing)} of the report's {len(ids)} pairs (such as {missing[0]!r}) are not in "
            f"column {id_column!r} of the data set: it must be the data that the trainer got."
        )
    return [position[str(value)] for value in ids]


def clean_data(
    args: argparse.Namespace, report: FlipReport, dataset: Dataset, rows: list[int]
) -> dict[str, Any]:
    """Leave pairs out, or exchange their labels, and write the data; what was done."""
    mode, threshold = args.mode or "drop", args.min_probability
    table = report.to_pandas().assign(place=rows)
    if mode != "suggested" and threshold is None:
        if not report.calibrated:
            raise UsageError(
                "The report ranks the pairs; how many labels are wrong is not known, so there is "
                "no place to cut: say where with --min-probability."
            )
        threshold = DROP_AT
    drop, swap = suspects(report, mode, threshold)
    dropped, swapped = set(table["place"][drop].tolist()), set(table["place"][swap].tolist())
    cleaned = swap_labels(dataset, swapped)
    if dropped:
        cleaned = cleaned.select([row for row in range(len(cleaned)) if row not in dropped])
    with write_whole(args.write) as temporary:
        _WRITERS[args.write.suffix](cleaned.with_format(None), temporary)
    # Columns that seem to tell of one completion and that `swap_labels` leaves alone.
    exchanged = {name for pair in EXCHANGED for name in pair}
    names = [name for name in dataset.column_names if name not in exchanged]
    kept = [name for name in names if "chosen" in name or "rejected" in name]
    return {
        "path": str(args.write),
        "mode": mode,
        "min_probability": threshold,
        "pairs": len(cleaned),
        "dropped": len(dropped),
        "swapped": len(swapped),
        "columns_not_swapped": kept if swapped else [],
    }


def _write_json_lines(dataset: Dataset, path: Path) -> None:
    # Not Dataset.to_json: it turns integers beside missing values into fractions.
    with path.open("w", encoding="utf-8") as file:
        for row, example in enumerate(dataset):
            try:
                file.write(json.dumps(example, ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise UsageError(
                    f"row {row} cannot be written as JSON ({one_line(error)}); use .parquet."
                ) from None


def _write_csv(dataset: Dataset, path: Path) -> None:
    for name, feature in dataset.features.items():
        if not isinstance(feature, Value) or "binary" in feature.dtype:
            raise UsageError(f"column {name!r} does not fit into CSV; use .jsonl or .parquet.")
        is_text = feature.dtype in ("string", "large_string")
        if is_text and "" in (values := dataset[name][:]):
            raise UsageError(
                f"column {name!r} has an empty text in row {values.index('')}, which in CSV is no "
                "text; use .jsonl or .parquet."
            )
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, dataset.column_names)
        writer.writeheader()
        writer.writerows(dataset)


_WRITERS: dict[str, Callable[[Dataset, Path], Any]] = {
    ".jsonl": _write_json_lines,
    ".csv": _write_csv,
    ".parquet": lambda dataset, path: dataset.to_parquet(str(path)),
}
