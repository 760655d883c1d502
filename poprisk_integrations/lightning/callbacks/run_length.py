"""How long a run and its epochs are, in optimizer steps."""

from poprisk_integrations.diagnostics import auto_window_steps
from poprisk_integrations.lightning._upstream import Trainer, rank_zero_warn

__all__ = ["complete_steps", "micro_batches_per_step", "total_steps", "window_steps"]


def complete_steps(micro_batches: int, accumulation: int) -> int:
    """Optimizer steps of an epoch without the short one that may end it.

    Lightning steps at the end of an epoch with the micro-batches that it has.

    Args:
        micro_batches: Of one epoch on one rank.
        accumulation: Micro-batches per optimizer step.

    Example:
        >>> complete_steps(8, 3), complete_steps(9, 3), complete_steps(2, 3)
        (2, 3, 1)
    """
    return max(1, micro_batches // accumulation)


def micro_batches_per_step(trainer: Trainer) -> int:
    """Micro-batches of a complete optimizer step.

    An epoch shorter than the accumulation makes one step, each time of as many micro-batches.

    Args:
        trainer: Fitting, so that it knows its data.
    """
    return int(min(trainer.accumulate_grad_batches, trainer.num_training_batches))


def total_steps(epoch_steps: int | None, max_epochs: int | None, max_steps: int) -> int | None:
    """Optimizer steps of a run; None if it has no known end.

    Args:
        epoch_steps: Of one epoch; None if unknown.
        max_epochs: The trainer's; None or -1 for no limit.
        max_steps: The trainer's; -1 for no limit.

    Example:
        >>> total_steps(100, 3, -1), total_steps(100, 3, 120), total_steps(None, 3, -1)
        (300, 120, None)
    """
    limits = [max_steps] if max_steps >= 0 else []
    if epoch_steps is not None and max_epochs is not None and max_epochs >= 0:
        limits.append(max_epochs * epoch_steps)
    return min(limits, default=None)


def window_steps(trainer: Trainer, window: int | str, *, must_stop: bool = False) -> int:
    """Length of a window in optimizer steps.

    Args:
        trainer: Fitting, so that it knows its data.
        window: A length, or "auto" for `diagnostics.auto_window_steps`.
        must_stop: Whether to warn if the run is too short for a stop.

    Raises:
        ValueError: If `window` is "auto" and nothing is known about the length of the run.
    """
    length = trainer.num_training_batches
    epoch_steps = None
    if length != float("inf"):
        epoch_steps = complete_steps(int(length), trainer.accumulate_grad_batches)
    total = total_steps(epoch_steps, trainer.max_epochs, trainer.max_steps)
    if window == "auto" and epoch_steps is None and total is None:
        raise ValueError(
            "Invalid window: 'auto'. The data has no length and the run no max_steps; set the "
            "window to an integer >= 2."
        )
    steps = window if isinstance(window, int) else auto_window_steps(total, epoch_steps)
    if must_stop and total is not None and total < 2 * steps:
        rank_zero_warn(
            f"PopRiskEarlyStopping: the run has {total} steps, fewer than two windows of {steps}: "
            "it can never stop early. Set a smaller window."
        )
    return steps
