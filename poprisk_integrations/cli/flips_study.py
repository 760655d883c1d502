"""How well a flip report found labels that were swapped on purpose."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.core.ranking_auc import ranking_auc
from poprisk_integrations.trl.flip_report import DROP_AT, FlipReport

__all__ = ["LABEL_FLIPS", "FlipsFound", "flips_found", "load_swapped_rows"]

LABEL_FLIPS = "label_flips.json"  # `poprisk dpo` writes it where flip_rate > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FlipsFound:
    """Agreement of a report with the truth, over the pairs that have a probability.

    Attributes:
        num_swapped: Labels that were swapped, with a probability or without.
        num_scored: Pairs with a probability; all below is over these.
        swapped_scored: How many of them were swapped.
        flagged: Pairs with a probability of at least 0.5.
        auc: Probability that a swapped pair is ranked above another one, ties counted half. The
            ranking is the report's: by probability, and by margin among equal ones, as where a
            noise rate of 0 was given.
        precision: Share of the flagged pairs that were swapped.
        recall: Share of the swapped pairs that are flagged.
    """

    num_swapped: int
    num_scored: int
    swapped_scored: int
    flagged: int
    auc: float
    precision: float
    recall: float

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; None where one is not defined."""
        return {k: None if math.isnan(v) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.num_swapped} labels were swapped on purpose ({LABEL_FLIPS}): AUC "
            f"{_shown(self.auc)}; at {DROP_AT} precision {_shown(self.precision)}, recall "
            f"{_shown(self.recall)} ({self.num_scored} pairs with a margin, {self.swapped_scored} "
            f"of them swapped, {self.flagged} flagged)"
        )


def load_swapped_rows(directory: Path, report: FlipReport) -> set[int] | None:
    """Rows whose labels were swapped on purpose, or None if the run was no such study.

    Args:
        directory: Of the run.
        report: Of the same run.

    Raises:
        UsageError: If the file cannot be read, or is of other data than the report.
    """
    path = directory / LABEL_FLIPS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, num_pairs = set(content["rows"]), int(content["num_pairs"])
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{str(path)!r} is no record of swapped labels.") from None
    if num_pairs != len(report) or not rows <= set(report.to_pandas()["row"].tolist()):
        raise UsageError(
            f"{str(path)!r} is of {num_pairs} pairs, the flip report of {len(report)}: they are "
            "not of one run. Remove the older one."
        )
    return rows


def flips_found(report: FlipReport, swapped_rows: set[int]) -> FlipsFound:
    """Compare a report with the truth.

    Args:
        report: Of a run on labels of which some were swapped.
        swapped_rows: Their row numbers.

    Example:
        >>> report = FlipReport(
        ...     pair_id=[0, 1, 2],
        ...     row=[0, 1, 2],
        ...     probability_wrong=[0.9, 0.6, 0.2],
        ...     margin=[-1.0, -0.2, 1.0],
        ...     step=[0, 0, 1],
        ... )
        >>> found = flips_found(report, {0})
        >>> found.auc, found.precision, found.recall
        (1.0, 0.5, 1.0)
    """
    table = report.to_pandas()
    table = table[table["probability_wrong"].notna()]
    scores = torch.tensor(table["probability_wrong"].tolist(), dtype=torch.float64)
    rank = table.groupby(["probability_wrong", -table["margin"]]).ngroup()  # equal pairs share one
    swapped = torch.tensor(table["row"].isin(swapped_rows).tolist(), dtype=torch.bool)
    flagged = scores >= DROP_AT
    hits, num_flagged = int((flagged & swapped).sum()), int(flagged.sum())
    swapped_scored = int(swapped.sum())
    return FlipsFound(
        num_swapped=len(swapped_rows),
        num_scored=len(table),
        swapped_scored=swapped_scored,
        flagged=num_flagged,
        auc=ranking_auc(torch.tensor(rank.tolist(), dtype=torch.int64), swapped),
        precision=hits / num_flagged if num_flagged else math.nan,
        recall=hits / swapped_scored if swapped_scored else math.nan,
    )


def _shown(value: float) -> str:
    return "not defined" if math.isnan(value) else f"{value:.3f}"
