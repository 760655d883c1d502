"""What a run measured and why it ended: numbers for loggers, a file for people and scripts."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import fsspec

from poprisk_integrations.core import StoppingState, WindowRatio
from poprisk_integrations.lightning._upstream import Trainer

__all__ = ["STOP_REPORT", "logged_values", "report_directory", "window_record", "write_report"]

STOP_REPORT = "poprisk_stop.json"
_NONE = -1.0  # for quantities that cannot be negative: logged metrics must be finite numbers


def window_record(
    step: int, state: StoppingState, window: WindowRatio
) -> dict[str, int | float | None]:
    """One window as plain numbers; None where something was not measured.

    Args:
        step: Optimizer step at which it ended.
        state: The rule's, after that step.
        window: The window.
    """
    record: dict[str, int | float | None] = {
        "step": step,
        "lr_sum": state.lr_sum,
        "signal_ratio": window.ratio,
        "signal_ratio_se": window.ratio_se,
        "risk_decrease": window.risk_decrease,
        "risk_decrease_se": window.risk_decrease_se,
        "agreement": window.agreement,
        "agreement_se": window.agreement_se,
        "noise": float(window.noise.sum()),
    }
    return {k: v if v is not None and math.isfinite(v) else None for k, v in record.items()}


def logged_values(
    record: Mapping[str, float | None], onset_step: int | None, predicted_stop_step: int | None
) -> dict[str, float]:
    """All that is logged: -1 stands for none, 0 where a quantity may be negative.

    Args:
        record: The last window's, empty before the first.
        onset_step: Step of the onset.
        predicted_stop_step: Step of the stop at the present learning rate.
    """
    values = {
        "signal_ratio": (record.get("signal_ratio"), _NONE),
        "signal_ratio_se": (record.get("signal_ratio_se"), _NONE),
        "risk_decrease": (record.get("risk_decrease"), 0.0),
        "risk_decrease_se": (record.get("risk_decrease_se"), _NONE),
        "agreement": (record.get("agreement"), 0.0),
        "agreement_se": (record.get("agreement_se"), _NONE),
        "onset_step": (onset_step, _NONE),
        "predicted_stop_step": (predicted_stop_step, _NONE),
    }
    return {f"poprisk/{k}": none if v is None else float(v) for k, (v, none) in values.items()}


def report_directory(trainer: Trainer) -> str | None:
    """The logger's directory, else ModelCheckpoint's; None where a run keeps no files.

    Every rank must call.
    """
    directory = trainer.log_dir if trainer.loggers else None
    return directory or getattr(trainer.checkpoint_callback, "dirpath", None)


def write_report(directory: str, report: Mapping[str, Any]) -> None:
    """Write `poprisk_stop.json`; on a local disk, a file of this name is whole or absent.

    Args:
        directory: Created if missing; may be a URL.
        report: Ready for JSON.
    """
    text = json.dumps(report, indent=2) + "\n"
    path = os.path.join(directory, STOP_REPORT)
    filesystem, _ = fsspec.core.url_to_fs(directory)
    filesystem.makedirs(directory, exist_ok=True)
    if "://" in directory:
        with fsspec.open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:  # fsspec's stays open on a full disk
        file.write(text)
    os.replace(f"{path}.tmp", path)
