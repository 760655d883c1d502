"""A closed window in plain numbers: for checkpoints, reports and logs of every framework."""

import math
from typing import Any

from poprisk_integrations.core.window import WindowRatio

__all__ = ["MEASURES", "history_row"]

MEASURES = ("risk_decrease", "risk_decrease_se", "agreement", "agreement_se")


def history_row(step: int, lr_sum: float, window: WindowRatio, *, reused: bool) -> dict[str, Any]:
    """A closed window ready for JSON; None for what was not measured.

    Args:
        step: Optimizer steps at its end.
        lr_sum: Training time at its end.
        window: What was measured.
        reused: Whether its examples had been trained on before.
    """
    row: dict[str, Any] = {
        "step": step,
        "lr_sum": lr_sum,
        "signal_ratio": window.ratio,
        "signal_ratio_se": window.ratio_se,
        **{name: getattr(window, name) for name in MEASURES},
        "noise": float(window.noise.sum()),
    }
    finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
    return {**finite, "steps": window.steps, "reused": reused}
