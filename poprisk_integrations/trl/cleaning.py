"""Data without the pairs whose label is probably wrong."""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from poprisk_integrations.trl.flip_report import DROP_AT, FlipReport
from poprisk_integrations.trl.label_flips import swap_labels
from poprisk_integrations.trl.pairs import drop_rows, source_rows

__all__ = ["CLEANING_MODES", "CleanedPairs", "clean_pairs", "suspects"]

CLEANING_MODES = ("drop", "swap", "suggested")


@dataclass(frozen=True, kw_only=True)
class CleanedPairs:
    """What `clean_pairs` made of a data set.

    Attributes:
        dataset: The cleaned pairs, which know the rows that they had.
        dropped: Rows of the data that are left out, ascending.
        swapped: Rows whose labels are exchanged, ascending.
        expected_wrong: Share of wrong labels that is expected among the pairs that are kept; None
            where the report is no more than a ranking.
    """

    dataset: Dataset
    dropped: list[int] = field(default_factory=list)
    swapped: list[int] = field(default_factory=list)
    expected_wrong: float | None = None


def suspects(report: FlipReport, mode: str, min_probability: float | None) -> tuple[Any, Any]:
    """Which pairs of the report's table are to be left out, and which to be exchanged.

    Of a report that is no more than a ranking there are none without a probability to cut at.
    """
    table = report.to_pandas()
    if mode == "suggested":
        return table["action"].eq("drop"), table["action"].eq("swap")
    found = table["probability_wrong"].ge(DROP_AT if min_probability is None else min_probability)
    if not report.calibrated and min_probability is None:
        found &= False
    return found & (mode == "drop"), found & (mode == "swap")  # False for NaN


def clean_pairs(
    dataset: Dataset,
    report: FlipReport,
    *,
    mode: str = "drop",
    min_probability: float | None = None,
) -> CleanedPairs:
    """Leave out pairs whose label is probably wrong, or exchange their labels.

    Args:
        dataset: The pairs that the report is of, as they were passed to make it.
        report: Says how probably each label is wrong.
        mode: "drop" leaves suspect pairs out, "swap" exchanges chosen and rejected in them,
            "suggested" does what the report's column `action` says.
        min_probability: From which probability on a pair is suspect, in [0, 1]. None for 0.5, and
            for nothing at all where the report is no more than a ranking: there is then no place to
            cut.

    Raises:
        ValueError: If mode or probability is none of these, the report is of other pairs, or no
            pair would be left.

    Example:
        >>> data = Dataset.from_dict({"chosen": ["a", "b"], "rejected": ["c", "d"]})
        >>> report = FlipReport(
        ...     pair_id=[0, 1], row=[0, 1], probability_wrong=[0.8, 0.1], margin=[-1.0, 2.0],
        ...     step=[1, 1],
        ... )
        >>> cleaned = clean_pairs(data, report)
        >>> cleaned.dataset["chosen"][:], cleaned.dropped, cleaned.expected_wrong
        (['b'], [0], 0.1)
    """
    if mode not in CLEANING_MODES:
        raise ValueError(f"Invalid mode: {mode!r}. Must be one of {CLEANING_MODES}.")
    if min_probability is not None and not 0.0 <= min_probability <= 1.0:
        raise ValueError(f"Invalid min_probability: {min_probability}. Must be in [0, 1].")
    table = report.to_pandas()
    place_of = {row: place for place, row in enumerate(source_rows(dataset))}
    if not set(table["row"]) <= place_of.keys():
        raise ValueError(
            f"Invalid report: it is of {len(table)} pairs, some of which are not among the "
            f"{len(dataset)} of the data set."
        )
    drop, swap = suspects(report, mode, min_probability)
    dropped, swapped = sorted(table["row"][drop]), sorted(table["row"][swap])
    if len(dropped) == len(dataset):
        raise ValueError("No pair would be left: raise min_probability.")
    p = table["probability_wrong"].where(~swap, 1 - table["probability_wrong"])[~drop].dropna()
    cleaned = swap_labels(dataset, [place_of[row] for row in swapped])
    return CleanedPairs(
        dataset=drop_rows(cleaned, {place_of[row] for row in dropped}),
        dropped=dropped,
        swapped=swapped,
        expected_wrong=float(p.mean()) if report.calibrated and len(p) else None,
    )
