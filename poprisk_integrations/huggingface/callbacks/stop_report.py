"""Why a run ended, as a file for people and scripts."""

import json
import os
from typing import Any

__all__ = ["STOP_REPORT", "write_stop_report"]

STOP_REPORT = "poprisk_stop.json"


def write_stop_report(directory: str, report: dict[str, Any], place: int = 1) -> None:
    """Write `poprisk_stop.json`; a file of this name is either whole or absent.

    Args:
        directory: The run's output directory; created if missing.
        report: What to write, ready for JSON.
        place: Of the callback among its like; the second writes `poprisk_stop_2.json`.
    """
    os.makedirs(directory, exist_ok=True)
    stem, extension = os.path.splitext(STOP_REPORT)
    name = STOP_REPORT if place == 1 else f"{stem}_{place}{extension}"
    path = os.path.join(directory, name)
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2, allow_nan=False)
        file.write("\n")
    os.replace(f"{path}.tmp", path)
