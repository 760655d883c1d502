"""What a run measured and why it ended: numbers for loggers, a file for people and scripts."""

import json
import os
from collections.abc import Mapping
from typing import Any

import fsspec

from poprisk_integrations._files import write_whole
from poprisk_integrations.diagnostics.window_history import MEASURES
from poprisk_integrations.lightning._upstream import Trainer

__all__ = ["STOP_REPORT", "logged_values", "report_directory", "write_report"]

STOP_REPORT = "poprisk_stop.json"


def logged_values(
    record: Mapping[str, float | None], onset_step: int | None, predicted_stop_step: int | None
) -> dict[str, float]:
    """All that is logged, without what does not exist yet.

    Args:
        record: The last window's, empty before the first.
        onset_step: Step of the onset.
        predicted_stop_step: Step of the stop at the present learning rate.
    """
    values = {name: record.get(name) for name in ("signal_ratio", "signal_ratio_se", *MEASURES)}
    values |= {"onset_step": onset_step, "predicted_stop_step": predicted_stop_step}
    return {f"poprisk/{k}": float(v) for k, v in values.items() if v is not None}


def report_directory(trainer: Trainer) -> str | None:
    """The run's own directory at its logger, else ModelCheckpoint's; None without either.

    A logger that many runs share (`save_dir` of a tracker) has a directory for each below it,
    where ModelCheckpoint puts the run's checkpoints too. Ask on the first rank.
    """
    for logger in trainer.loggers:
        if directory := getattr(logger, "log_dir", None):
            return str(directory)
        version = logger.version
        if logger.save_dir and version is not None:
            version = version if isinstance(version, str) else f"version_{version}"
            return os.path.join(logger.save_dir, str(logger.name), version)
    return getattr(trainer.checkpoint_callback, "dirpath", None)


def write_report(directory: str, report: Mapping[str, Any]) -> None:
    """Write `poprisk_stop.json`; a file of this name is whole or absent.

    Args:
        directory: Created if missing; may be a URL.
        report: Ready for JSON.
    """
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    path = os.path.join(directory, STOP_REPORT)
    if "://" not in directory:
        with write_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return
    filesystem, _ = fsspec.core.url_to_fs(directory)
    filesystem.makedirs(directory, exist_ok=True)
    with fsspec.open(path, "w", encoding="utf-8") as file:  # object stores take it whole
        file.write(text)
