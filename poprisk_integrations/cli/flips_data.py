"""The data set of a flip report: which row is which pair, cleaned, and written."""

import csv
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from datasets import Dataset, Value

from poprisk_integrations._files import write_whole
from poprisk_integrations.cli.errors import UsageError, one_line
from poprisk_integrations.trl.flip_report import FlipReport
from poprisk_integrations.trl.pair_texts import excerpts

__all__ = ["columns_of_one_side", "match_rows", "plan_cleaning", "swap_labels", "write_data"]

_TEXT = "chosen"  # a column of reports that have the first words of some pairs
_SAME_DATA = (
    "it must be the data that the trainer got, same split, order and number of rows. Pairs of data "
    "that have changed since are told by an id only: train with pair_id_column=NAME, and give "
    "--id-column NAME here."
)
# Whatever else TRL's trainer reads of each completion goes with it.
_EXCHANGED = (
    ("chosen", "rejected"),
    ("chosen_ids", "rejected_ids"),
    ("ref_chosen_logps", "ref_rejected_logps"),
)


def match_rows(report: FlipReport, dataset: Dataset, id_column: str | None = None) -> list[int]:
    """Row of the data set that each pair of the report is, in the report's order.

    By id if a column is named, else by row number.

    Args:
        report: Of a run on these data.
        dataset: Preference pairs.
        id_column: The column of the data set that holds the report's ids.

    Raises:
        UsageError: If the report is not of these data, or it cannot be known.
    """
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


def plan_cleaning(
    report: FlipReport, rows: list[int], *, mode: str, min_probability: float
) -> tuple[frozenset[int], frozenset[int]]:
    """Which rows of the data set to leave out, and in which to exchange chosen and rejected.

    Args:
        report: The pairs.
        rows: Row of the data set for each of them, see `match_rows`.
        mode: "drop" or "swap" the pairs from `min_probability` on; or "suggested", to do what the
            column `action` says, where "review" is no change.
        min_probability: Not used by "suggested".
    """
    table = report.to_pandas()
    if mode == "suggested":
        drop, swap = table["action"].eq("drop"), table["action"].eq("swap")
    else:
        suspect = table["probability_wrong"].ge(min_probability)  # False for NaN
        drop, swap = suspect & (mode == "drop"), suspect & (mode == "swap")

    def chosen(mask: Any) -> frozenset[int]:
        return frozenset(row for row, true in zip(rows, mask.tolist(), strict=True) if true)

    return chosen(drop), chosen(swap)


def columns_of_one_side(dataset: Dataset) -> list[str]:
    """Columns that seem to tell of one completion and that `swap_labels` leaves alone.

    Example:
        >>> row = {"chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1, "n": 0}
        >>> columns_of_one_side(Dataset.from_list([row]))
        ['score_chosen', 'score_rejected']
    """
    exchanged = {name for pair in _EXCHANGED for name in pair}
    sides = ("chosen", "rejected")
    return [
        name
        for name in dataset.column_names
        if name not in exchanged and any(side in name for side in sides)
    ]


def swap_labels(dataset: Dataset, rows: Collection[int]) -> Dataset:
    """Exchange chosen and rejected in some rows; order and other columns are kept.

    Args:
        dataset: Preference pairs; it is not changed.
        rows: Which. What TRL computes of each completion, token ids and log-probabilities of the
            reference, is exchanged with it.

    Raises:
        UsageError: If the two columns are not of one type.
    """
    if not rows:
        return dataset
    features = dataset.features
    pairs = [pair for pair in _EXCHANGED if all(name in features for name in pair)]
    for first, second in pairs:
        if _kind(features[first]) != _kind(features[second]):
            raise UsageError(
                f"cannot swap: {first!r} and {second!r} are of different types, {features[first]} "
                f"and {features[second]}."
            )
    names = [name for pair in pairs for name in pair]

    def swapped(*values: Any) -> dict[str, Any]:
        *cells, row = values
        if row in rows:
            cells = [cells[index ^ 1] for index in range(len(cells))]  # 1 0 3 2 ...
        return dict(zip(names, cells, strict=True))

    return dataset.map(
        swapped,
        with_indices=True,
        input_columns=names,  # the others, images for one, are not decoded
        features=features,
        load_from_cache_file=False,
        desc="Swapping labels",
    )


def _kind(feature: Any) -> Any:
    text = isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    return "text" if text else feature


def write_data(dataset: Dataset, out: Path) -> None:
    """Write a data set by the suffix of the file, whole or not at all.

    Args:
        dataset: What to write.
        out: Ends in .jsonl, .csv or .parquet. An existing file is replaced.

    Raises:
        UsageError: If the format cannot hold the data.
    """
    with write_whole(out) as temporary:
        _WRITERS[out.suffix](dataset.with_format(None), temporary)


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
        if feature.dtype in ("string", "large_string") and "" in (values := dataset[name][:]):
            raise UsageError(
                f"column {name!r} has an empty text in row {values.index('')}, which in CSV is no "
                "text; use .jsonl or .parquet."
            )
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, dataset.column_names)
        writer.writeheader()
        writer.writerows(dataset)


def _write_parquet(dataset: Dataset, path: Path) -> None:
    dataset.to_parquet(str(path))


_WRITERS: dict[str, Callable[[Dataset, Path], None]] = {
    ".jsonl": _write_json_lines,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
