"""What Lightning's CSVLogger writes."""

import csv
import io
import math
from pathlib import Path

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.report.curve import Curve
from poprisk_integrations.cli.report.read_json import read_text

__all__ = ["read_metrics_csv"]


def read_metrics_csv(path: Path) -> tuple[dict[str, Curve], list[str]]:
    """Logged name -> curve, and what could not be read.

    Args:
        path: A `metrics.csv`.

    Raises:
        UsageError: If it is empty, or no such file.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        header, *records = [row for row in rows if row]
    except ValueError:
        raise UsageError(f"Invalid run_dir: {str(path)!r} is empty. Half written?") from None
    except csv.Error as error:
        raise UsageError(f"Invalid run_dir: {str(path)!r} is not CSV ({error}).") from None
    if "step" not in header:
        raise UsageError(
            f"Invalid run_dir: {str(path)!r} is not of Lightning's CSVLogger: no column 'step'."
        )
    notes = []
    if records and len(records[-1]) < len(header):
        notes.append(f"The last line of {path.name} is not complete and was left out.")
        records.pop()
    points: dict[str, dict[float, float]] = {}
    for line, record in enumerate(records, start=2):
        if len(record) != len(header):
            raise UsageError(
                f"Invalid run_dir: {str(path)!r}, row {line}: {len(record)} values for "
                f"{len(header)} columns."
            )
        _take(dict(zip(header, record, strict=True)), points)
    return _without_placeholders({name: Curve.of(p) for name, p in points.items()}), notes


def _take(row: dict[str, str], points: dict[str, dict[float, float]]) -> None:
    step = _parsed(row.pop("step"))
    if step is None or not math.isfinite(step):
        return
    for name, text in row.items():
        value = _parsed(text)
        if value is not None:
            points.setdefault(name, {})[step] = value


def _parsed(text: str) -> float | None:
    """None for an empty cell, and for text: loggers take numbers only."""
    try:
        return float(text)
    except ValueError:
        return None


def _without_placeholders(curves: dict[str, Curve]) -> dict[str, Curve]:
    """Drop the -1 that Lightning's callbacks log for "none yet".

    Their C and U may be negative, so there it is the standard error that says -1.
    """
    kept = {}
    for name, curve in curves.items():
        judge = curves.get(f"{name}_se", curve) if name.startswith("poprisk/") else None
        if judge is None or len(judge.values) != len(curve.values):
            kept[name] = curve
            continue
        points = zip(curve.steps, curve.values, judge.values, strict=True)
        kept[name] = Curve.of({s: v for s, v, by in points if by != -1.0})
    return {name: curve for name, curve in kept.items() if curve.steps}
