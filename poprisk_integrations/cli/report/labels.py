"""What a run says about wrong labels: noise rate, suspect pairs, labels swapped on purpose."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.report.plain_text import plain
from poprisk_integrations.cli.report.read_json import read_json, read_text

__all__ = ["Pair", "Suspects", "read_noise", "read_suspects"]

# Read as text: the package's own reader needs pandas, and its package the extra [trl].
_COLUMNS = ("pair_id", "row", "probability_wrong", "margin", "action")
_TEXTS = ("prompt", "chosen", "rejected")
_LIKELY = 0.5  # more probably wrong than right


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One preference pair.

    Attributes:
        pair_id: The user's, or the row number.
        probability: That its label is wrong, in [0, 1].
        margin: Before it was trained on; None if unknown.
        action: That the report suggests.
        swapped: Whether its label was swapped on purpose; None if the run was no such study.
        texts: Prompt, chosen and rejected in short; empty where the report has none.
    """

    pair_id: str
    probability: float
    margin: float | None
    action: str
    swapped: bool | None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspects:
    """A flip report in short.

    Attributes:
        num_pairs: All pairs.
        num_scored: Those with a probability.
        num_likely: Those with a probability of at least 0.5; 0 where there are none, see
            `calibrated`.
        calibrated: Whether the probabilities are such, or a ranking alone.
        expected_wrong: Sum of the probabilities.
        actions: How often each is suggested.
        top: The most suspect pairs, the most probable first.
        num_swapped: Labels that were swapped on purpose; None if the run was no such study.
        likely_swapped: How many of `num_likely` were swapped; None likewise.
        margins: Of all pairs with a probability, the most suspect first: those of `num_likely` come
            before the others.
    """

    num_pairs: int
    num_scored: int
    num_likely: int
    calibrated: bool
    expected_wrong: float
    actions: dict[str, int]
    top: list[Pair]
    num_swapped: int | None
    likely_swapped: int | None
    margins: list[float]


def read_noise(path: Path) -> dict[str, Any]:
    """Content of a `poprisk_noise.json`.

    Raises:
        UsageError: If it is no such file.
    """
    noise = read_json(path)
    if not isinstance(noise, dict) or "rate" not in noise:
        raise UsageError(f"Invalid run_dir: {str(path)!r} is no estimate of a noise rate.")
    return noise


def read_suspects(path: Path, flips: Path | None, most: int = 20) -> Suspects:
    """A `flip_report.csv` in short.

    Args:
        path: Of the report.
        flips: A `label_flips.json`, if the run swapped labels on purpose.
        most: Pairs to keep in `top`.

    Raises:
        UsageError: If one of them is not what it should be.
    """
    rows = _rows(path)
    swapped = None if flips is None else _swapped_rows(flips)
    scored = []
    actions: dict[str, int] = {}
    for row in rows:
        action = plain(row["action"])
        actions[action] = actions.get(action, 0) + 1
        probability = _number(path, row["probability_wrong"])
        if probability is None:
            continue
        if not 0.0 <= probability <= 1.0:
            raise UsageError(
                f"Invalid run_dir: {str(path)!r} is not a flip report: probability_wrong "
                f"{probability:g} is outside [0, 1]."
            )
        scored.append(
            Pair(
                pair_id=plain(row["pair_id"]),
                probability=probability,
                margin=_number(path, row["margin"]),
                action=action,
                swapped=None if swapped is None else row["row"] in swapped,
                texts=tuple(plain(row.get(name, "")) for name in _TEXTS),
            )
        )
    scored.sort(key=lambda p: (-p.probability, math.inf if p.margin is None else p.margin))
    calibrated = all(row.get("calibrated", "").lower() not in ("false", "0") for row in rows)
    likely = [pair for pair in scored if calibrated and pair.probability >= _LIKELY]
    return Suspects(
        num_pairs=len(rows),
        num_scored=len(scored),
        num_likely=len(likely),
        calibrated=calibrated,
        expected_wrong=sum(pair.probability for pair in scored),
        actions=actions,
        top=scored[:most],
        num_swapped=None if swapped is None else len(swapped),
        likely_swapped=None if swapped is None else sum(bool(pair.swapped) for pair in likely),
        margins=[pair.margin for pair in scored if pair.margin is not None],
    )


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        header, *records = [line for line in lines if line]
    except ValueError:
        raise UsageError(f"Invalid run_dir: {str(path)!r} is empty. Half written?") from None
    except csv.Error as error:
        raise UsageError(f"Invalid run_dir: {str(path)!r} is not CSV ({error}).") from None
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise UsageError(
            f"Invalid run_dir: {str(path)!r} is not a flip report: no column {missing[0]!r}."
        )
    for number, record in enumerate(records, start=1):
        if len(record) != len(header):
            raise UsageError(
                f"Invalid run_dir: {str(path)!r} is not a whole flip report: record {number} has "
                f"{len(record)} of {len(header)} values."
            )
    return [dict(zip(header, record, strict=True)) for record in records]


def _number(path: Path, text: str) -> float | None:
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise UsageError(
            f"Invalid run_dir: {str(path)!r} is not a flip report: {text!r} is no number."
        ) from None
    return value if math.isfinite(value) else None


def _swapped_rows(path: Path) -> set[str]:
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise UsageError(f"Invalid run_dir: {str(path)!r} is no record of swapped labels.")
    return {str(row) for row in rows}
