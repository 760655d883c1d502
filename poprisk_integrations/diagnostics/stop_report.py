"""What a run measured and why it ended: rows of windows, and a file for people and scripts."""

import json
import os
from collections.abc import Mapping
from typing import Any

from poprisk_integrations._files import write_whole

__all__ = ["STOP_REPORT", "full_row", "report_text", "write_report"]

STOP_REPORT = "poprisk_stop.json"
_ROW = ("step", "train_loss", "estimated_gap", "estimated_test_loss", "signal_ratio")


def full_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of either criterion with what both have in common; None for what was not measured."""
    return {**dict.fromkeys(_ROW), **row}


def report_text(report: Mapping[str, Any]) -> str:
    """As it stands in the file."""
    return json.dumps(report, indent=2, allow_nan=False) + "\n"


def write_report(directory: str, report: Mapping[str, Any], place: int = 1) -> None:
    """Write `poprisk_stop.json`; a file of this name is whole or absent.

    `place` is that of the callback among its like; the second writes `poprisk_stop_2.json`.
    """
    stem, extension = os.path.splitext(STOP_REPORT)
    path = os.path.join(directory, STOP_REPORT if place == 1 else f"{stem}_{place}{extension}")
    with write_whole(path) as temporary:
        temporary.write_text(report_text(report), encoding="utf-8")
