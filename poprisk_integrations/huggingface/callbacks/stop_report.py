"""Why a run ended, as a file for people and scripts."""

import json
import os
from typing import Any

from poprisk_integrations._files import write_whole

__all__ = ["STOP_REPORT", "write_stop_report"]

STOP_REPORT = "poprisk_stop.json"


def write_stop_report(directory: str, report: dict[str, Any], place: int = 1) -> None:
    """Write `poprisk_stop.json`; a file of this name is either whole or absent.

    Args:
        directory: The run's output directory; created if missing.
        report: What to write, ready for JSON.
        place: Of the callback among its like; the second writes `poprisk_stop_2.json`.
    """
    stem, extension = os.path.splitext(STOP_REPORT)
    name = STOP_REPORT if place == 1 else f"{stem}_{place}{extension}"
    with write_whole(os.path.join(directory, name)) as temporary:
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
