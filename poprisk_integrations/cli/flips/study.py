"""What the files beside a flip report add: labels swapped on purpose, and the noise rate."""

import json
from pathlib import Path
from typing import Any

from poprisk_integrations.cli.clean import CLEAN_REPORT
from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.core._plain import number
from poprisk_integrations.core.calibration import ReliabilityBin, calibration_error, reliability
from poprisk_integrations.core.noise_rate import WIDEST, NoiseRateEstimate
from poprisk_integrations.trl.flip_report import DROP_AT, FlipReport
from poprisk_integrations.trl.label_noise_callback import NOISE_REPORT

__all__ = [
    "flips_found", "load_noise", "load_swapped_rows", "noise_line", "reliability_bins",
    "study_line",
]  # fmt: skip

LABEL_FLIPS = "label_flips.json"  # `poprisk dpo` writes it where flip_rate > 0


def load_swapped_rows(directory: Path, report: FlipReport) -> set[int] | None:
    """Rows whose labels were swapped on purpose, or None if the run was no such study."""
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


def flips_found(report: FlipReport, swapped_rows: set[int]) -> dict[str, Any]:
    """Agreement of a report with the truth, over the pairs that have a probability.

    `auc` is the probability that a swapped pair is ranked above another one, ties counted half. The
    ranking is the report's: by probability, and by margin among equal ones, as where a noise rate
    of 0 was given. A pair is flagged from a probability of 0.5 on; `precision` is the share of the
    flagged pairs that were swapped, `recall` that of the swapped ones that are flagged.
    `calibration_error` is the expected one over ten bins, `calibration_error_by_chance` what it is
    on average where every probability is right. What is not defined is None.
    """
    table = report.to_pandas()
    table = table[table["probability_wrong"].notna()]
    swapped = table["row"].isin(swapped_rows)
    flagged = table["probability_wrong"].ge(DROP_AT)
    positive, negative = int(swapped.sum()), int((~swapped).sum())
    # Mid-ranks: equal pairs share one.
    rank = table.groupby(["probability_wrong", -table["margin"]]).ngroup().rank()
    wins = float(rank[swapped].sum()) - positive * (positive + 1) / 2
    hits = int((flagged & swapped).sum())
    error, by_chance = calibration_error(reliability_bins(report, swapped_rows)) or (None, None)
    return {
        "num_swapped": len(swapped_rows),
        "num_scored": len(table),
        "swapped_scored": positive,
        "flagged": int(flagged.sum()),
        "auc": wins / (positive * negative) if positive and negative else None,
        "precision": hits / int(flagged.sum()) if flagged.any() else None,
        "recall": hits / positive if positive else None,
        "calibration_error": error,
        "calibration_error_by_chance": by_chance,
    }


def reliability_bins(report: FlipReport, swapped_rows: set[int]) -> list[ReliabilityBin]:
    """Ten bins of P(wrong), and what share of each was swapped on purpose."""
    table = report.top(len(report))
    return reliability(table["probability_wrong"].tolist(), table["row"].isin(swapped_rows))


def study_line(found: dict[str, Any]) -> str:
    """One line for people."""
    shown = {k: "not defined" if v is None else f"{v:.3f}" for k, v in found.items()}
    return (
        f"{found['num_swapped']} labels were swapped on purpose ({LABEL_FLIPS}): AUC "
        f"{shown['auc']}; at {DROP_AT} precision {shown['precision']}, recall {shown['recall']}; "
        f"calibration error {shown['calibration_error']} "
        f"({shown['calibration_error_by_chance']} by chance alone) "
        f"({found['num_scored']} pairs with a margin, {found['swapped_scored']} of them swapped, "
        f"{found['flagged']} flagged)"
    )


def load_noise(directory: Path) -> dict[str, Any] | None:
    """The noise rate that the run or `poprisk clean` found, or None if it kept none."""
    path = directory / NOISE_REPORT
    if not path.is_file():
        path = directory / CLEAN_REPORT
    if not path.is_file():
        return None
    try:
        noise = json.loads(path.read_text(encoding="utf-8"))
        noise = noise["noise"] if path.name == CLEAN_REPORT else noise
    except (ValueError, KeyError, TypeError):
        noise = None
    if not isinstance(noise, dict):
        raise UsageError(f"{str(path)!r} is no estimate of a noise rate.")
    return noise


def noise_line(noise: dict[str, Any]) -> str:
    """One line for people."""
    rate, low, high, pairs = (number(noise, n) for n in ("rate", "low", "high", "num_pairs"))
    if low is None or high is None or pairs is None:  # given by the user, or of another method
        looks = "noise rate not estimated"
        return looks if rate is None else f"{100 * rate:.0f} % of the labels look wrong"
    estimate = NoiseRateEstimate(
        rate=rate if high - low <= WIDEST else None,  # earlier versions named one in any case
        low=low,
        high=high,
        num_pairs=int(pairs),
        **dict.fromkeys(("reference_rate", "slope", "upper_bound", "anchor"), 0.0),
        num_not_judged=0,
    )
    return str(estimate)
