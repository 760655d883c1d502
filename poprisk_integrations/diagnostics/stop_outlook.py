"""Whether the stop can work in a run, from its length alone."""

from dataclasses import dataclass
from typing import Literal

from poprisk_integrations.diagnostics.window_length import auto_window_steps

__all__ = ["StopOutlook", "stop_outlook"]

Verdict = Literal["works", "coarse", "single_pass", "too_short", "full_batch", "unknown"]
FEW_BATCHES = 4  # per epoch: below, a window is several passes and the batches hardly differ


@dataclass(frozen=True, kw_only=True, slots=True)
class StopOutlook:
    """What the stop would see.

    Attributes:
        verdict: "works"; "coarse": fewer than four batches per epoch; "single_pass": no example
            is seen twice; "too_short": the run ends before a first window on data seen before;
            "full_batch": a batch is the whole data set, so there is no noise to see; "unknown".
        epoch_steps: Optimizer steps of one pass; None if unknown.
        total_steps: Optimizer steps of the run; None if unknown.
        window: Steps of a window for `window="auto"`; None if unknown.
        first_step: End of the first window on data seen before; None if unknown.
        windows: Windows in the whole run; None if unknown.
    """

    verdict: Verdict
    epoch_steps: int | None
    total_steps: int | None
    window: int | None = None
    first_step: int | None = None
    windows: int | None = None


def stop_outlook(total_steps: int | None, epoch_steps: int | None) -> StopOutlook:
    """Judge a run by its length.

    Args:
        total_steps: Optimizer steps of the whole run; None if unknown.
        epoch_steps: Optimizer steps of one pass over the data; None if unknown.

    Example:
        >>> stop_outlook(1000, 100).verdict, stop_outlook(100, 100).verdict
        ('works', 'single_pass')
    """
    if epoch_steps is None:
        return StopOutlook(verdict="unknown", epoch_steps=None, total_steps=total_steps)
    window = auto_window_steps(total_steps, epoch_steps)
    first = -(-epoch_steps // window) * window + window
    verdict: Verdict = "coarse" if epoch_steps < FEW_BATCHES else "works"
    if epoch_steps == 1:
        verdict = "full_batch"
    elif total_steps is not None and total_steps <= epoch_steps:
        verdict = "single_pass"
    elif total_steps is not None and total_steps < first:
        verdict = "too_short"
    return StopOutlook(
        verdict=verdict,
        epoch_steps=epoch_steps,
        total_steps=total_steps,
        window=window,
        first_step=first,
        windows=None if total_steps is None else total_steps // window,
    )
