"""How many optimizer steps a window of the stopping statistic holds."""

from typing import Any

__all__ = ["SHORTEST_AUTO_WINDOW", "auto_window_steps", "steps_per_epoch"]

SHORTEST_AUTO_WINDOW = 8  # with fewer terms the noise of a window's own estimate decides


def auto_window_steps(max_steps: int, epoch_steps: int | None) -> int:
    """Window length for `window="auto"`.

        one epoch               if the run has two epochs or more
        a third of an epoch     if it has fewer
        max_steps / 20          if the length of an epoch is unknown
        but at least 8 steps

    A whole epoch sees each example once, so differences between examples cancel; a shorter run
    needs shorter windows to have several of them.

    Args:
        max_steps: Optimizer steps of the whole run.
        epoch_steps: Optimizer steps of one epoch, or None if unknown.

    Example:
        >>> auto_window_steps(300, 100), auto_window_steps(150, 100), auto_window_steps(400, None)
        (100, 33, 20)
    """
    if epoch_steps is None:
        steps = max_steps // 20
    elif max_steps >= 2 * epoch_steps:
        steps = epoch_steps
    else:
        steps = epoch_steps // 3
    return max(SHORTEST_AUTO_WINDOW, steps)


def steps_per_epoch(dataloader: Any, accumulation_steps: int) -> int | None:
    """Optimizer steps of one epoch by Trainer's own count; None for data without a length.

    Args:
        dataloader: This rank's data loader.
        accumulation_steps: Micro-batches per optimizer step.
    """
    try:
        micro_batches = len(dataloader)
    except (TypeError, NotImplementedError):
        return None
    return max(1, -(-micro_batches // accumulation_steps))
