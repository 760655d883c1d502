"""What a window's three statistics say together: learning, overshooting or memorising."""

import math
from typing import Literal

from poprisk_integrations.core.window import WindowRatio

__all__ = ["diagnose", "explain"]


def diagnose(
    window: WindowRatio, *, threshold: float = 1.0, confidence: float = 2.0
) -> Literal["learning", "overshooting", "memorising", "unknown"]:
    """Tell a learning rate that is too high from memorising.

        overshooting    C + z se(C) < 0 < U - z se(U)   steps undo each other, batches agree
        memorising      F < threshold                   batches agree no more than noise does
        learning        otherwise
    with C = `risk_decrease`, U = `agreement`, F = `ratio`. Both drive F down, and in a first pass
    over the data F < threshold can only mean that nothing is left to gain at this learning rate.

    Args:
        window: A closed window.
        threshold: Below this F is called small.
        confidence: z, standard errors that count as significant.

    Example:
        >>> import torch
        >>> window = WindowRatio(ratio=0.7, per_tensor=torch.ones(1), noise=torch.ones(1), steps=9)
        >>> diagnose(window)
        'memorising'
    """
    if math.isnan(window.ratio):
        return "unknown"
    gain = window.risk_decrease + confidence * window.risk_decrease_se
    agreement = window.agreement - confidence * window.agreement_se
    if gain < 0 < agreement:
        return "overshooting"
    return "memorising" if window.ratio < threshold else "learning"


def explain(window: WindowRatio, *, threshold: float = 1.0) -> str:
    """The diagnosis as half a sentence with its numbers, for logs.

    Args:
        window: A closed window.
        threshold: As in `diagnose`.
    """
    numbers = (
        f"F = {window.ratio:.3g} +- {window.ratio_se:.2g}, "
        f"C = {window.risk_decrease:.2g} +- {window.risk_decrease_se:.2g}, "
        f"U = {window.agreement:.2g} +- {window.agreement_se:.2g}"
    )
    said = {
        "learning": "batches still agree on where to go",
        "overshooting": "steps undo each other while batches agree: the learning rate is too high",
        "memorising": "batches agree no more than noise does: memorising",
        "unknown": "no noise was measured",
    }
    return f"{said[diagnose(window, threshold=threshold)]} ({numbers})"
