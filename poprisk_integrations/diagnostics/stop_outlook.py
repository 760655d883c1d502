"""Whether the stop can work in a run, from its length alone, and the line that says so."""

from dataclasses import dataclass
from typing import Literal

from poprisk_integrations.diagnostics.window_length import auto_window_steps

__all__ = ["StopOutlook", "outlook_line", "stop_outlook"]

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


def stop_outlook(
    total_steps: int | None, epoch_steps: int | None, window: int | None = None
) -> StopOutlook:
    """Judge a run by its length.

    Args:
        total_steps: Optimizer steps of the whole run; None if unknown.
        epoch_steps: Optimizer steps of one pass over the data; None if unknown.
        window: Optimizer steps of a window; None for those of `window="auto"`.

    Example:
        >>> stop_outlook(1000, 100).verdict, stop_outlook(100, 100).verdict
        ('works', 'single_pass')
    """
    if epoch_steps is None:
        return StopOutlook(verdict="unknown", epoch_steps=None, total_steps=total_steps)
    window = window or auto_window_steps(total_steps, epoch_steps)
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


def outlook_line(outlook: StopOutlook, *, unknown_because: str = "", min_steps: int = 0) -> str:
    """What the stop can do in this run: one line for its start, in words that need no paper.

    Args:
        outlook: Of the run.
        unknown_because: Why the length of a pass is unknown (`data_pass`).
        min_steps: No stop before this many optimizer steps.

    Example:
        >>> outlook_line(stop_outlook(1000, 100))
        'one pass over the data is 100 steps; memorising can be noticed from step 200 of 1000 on'
    """
    total, epoch, first = outlook.total_steps, outlook.epoch_steps, outlook.first_step
    if outlook.verdict == "unknown":
        because = f" ({unknown_because})" if unknown_because else ""
        return (
            f"cannot stop this run: nothing shows when an example is seen again{because}, so it "
            "counts as a single pass over the data, in which nothing can be memorised. If data "
            "repeat, set epoch_steps to the optimizer steps of one pass"
        )
    if outlook.verdict == "full_batch":
        return (
            "cannot tell anything in this run: each step takes all the data, so batches do not "
            "differ and there is no noise to compare the gradient with"
        )
    if outlook.verdict == "single_pass":
        return (
            f"cannot stop this run: its {total} steps are one pass over the data ({epoch} steps), "
            "in which nothing can be memorised"
        )
    if outlook.verdict == "too_short":
        return (
            f"cannot stop this run: the first window of {outlook.window} steps on data seen before "
            f"would end at step {first}, the run ends at {total}. A smaller window may help"
        )
    if total is not None and min_steps > total:
        return f"cannot stop this run: min_steps={min_steps} is beyond its {total} steps"
    end = "" if total is None else f" of {total}"
    coarse = (
        f", coarsely: with {epoch} steps a pass, a window takes several passes"
        if outlook.verdict == "coarse"
        else ""
    )
    return (
        f"one pass over the data is {epoch} steps; memorising can be noticed from step "
        f"{max(first or 0, min_steps)}{end} on{coarse}"
    )
