"""Length of an epoch by Trainer's own count, and when data are seen again."""

from typing import Any

__all__ = ["is_second_pass", "steps_per_epoch"]


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


def is_second_pass(step: int, epoch_steps: int | None, passes: int) -> bool:
    """Whether a window that begins now holds examples that were trained on before.

    Args:
        step: Optimizer steps so far.
        epoch_steps: Optimizer steps of one pass; None if unknown.
        passes: Passes that have ended, which decide where the length of one is unknown.

    Example:
        >>> is_second_pass(99, 100, 0), is_second_pass(100, 100, 1), is_second_pass(500, None, 0)
        (False, True, False)
    """
    return passes > 0 if epoch_steps is None else step >= epoch_steps
