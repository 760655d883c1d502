"""Why a run was stopped: from its report, or from the trainer's state while there is none."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poprisk_integrations.cli.errors import UsageError
from poprisk_integrations.cli.report.plain_text import number, plain
from poprisk_integrations.cli.report.read_json import read_json
from poprisk_integrations.core import Diagnosis, diagnose

__all__ = ["StopRecord", "drawable", "load_report", "middle_step", "stop_record"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRecord:
    """What the rule saw and decided.

    Attributes:
        reason: One line.
        stopped: Whether it ended the run.
        stop_step: Step of the stop, or of the one that a monitor would have made.
        onset_step: Step at which F was first seen below the threshold.
        onset_at: Step at which F, drawn at the middles of its windows, crossed the threshold.
        threshold: Of F.
        diagnosis: What the windows say, made anew from `history` whoever wrote the report.
        best: Checkpoint that was kept; "" if none or unknown.
        settings: Of the callback.
        history: One row per window.
    """

    reason: str
    stopped: bool
    stop_step: float | None
    onset_step: float | None
    onset_at: float | None
    threshold: float
    diagnosis: Diagnosis
    best: str
    settings: Mapping[str, Any]
    history: list[dict[str, Any]]

    @property
    def verdict(self) -> str:
        """The reason, and how surely the windows say so."""
        return f"{self.reason}; {self.diagnosis}" if self.history else self.reason


def load_report(path: Path) -> dict[str, Any]:
    """Content of a `poprisk_stop.json`; its history may be empty.

    Raises:
        UsageError: If it is no such report.
    """
    report: Any = read_json(path)
    rows = report.get("history") if isinstance(report, dict) else None
    if not isinstance(rows, list) or "reason" not in report:
        raise UsageError(f"Invalid run_dir: {str(path)!r} is not a report of a stop.")
    if not all(isinstance(row, dict) and number(row.get("step")) is not None for row in rows):
        raise UsageError(f"Invalid run_dir: {str(path)!r} is not a report of a stop.")
    found: dict[str, Any] = report
    return found


def drawable(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report in which everything that should be a number is one, or None."""
    names = ("onset_step", "onset_at", "stop_step")
    steps = {name: number(report.get(name)) for name in names}
    rows = [{name: number(value) for name, value in row.items()} for row in report["history"]]
    return {**report, **steps, "history": rows, "reason": plain(report["reason"])}


def stop_record(report: Mapping[str, Any]) -> StopRecord:
    """A report in the form that the page needs, whichever framework wrote it."""
    settings = _first_mapping(report.get("settings"), report.get("setup"))
    threshold = number(settings.get("threshold")) or 1.0
    onset, at = number(report.get("onset_step")), number(report.get("onset_at"))
    best = report.get("best_model_checkpoint") or report.get("best_model_path") or ""
    return StopRecord(
        reason=plain(report.get("reason", "")),
        stopped=report.get("stopped") is True,
        stop_step=number(report.get("stop_step")),
        onset_step=onset,
        onset_at=onset if at is None else at,
        threshold=threshold,
        diagnosis=diagnose(report["history"], since=onset, threshold=threshold),
        best=plain(best),
        settings=settings,
        history=report["history"],
    )


def middle_step(row: Mapping[str, Any]) -> float:
    """Where the number of a window belongs on an axis of steps: it is of all its steps."""
    return float(row["step"]) - (number(row.get("steps")) or 0.0) / 2


def _first_mapping(*values: Any) -> Mapping[str, Any]:
    return next((value for value in values if isinstance(value, dict)), {})
