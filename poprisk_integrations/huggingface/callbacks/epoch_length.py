"""Length of an epoch by Trainer's own count, which need not be a pass over the data."""

from typing import Any

__all__ = ["steps_per_epoch"]


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
