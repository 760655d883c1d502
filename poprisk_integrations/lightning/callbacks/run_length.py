"""How long a run and its epochs are, in optimizer steps."""

from poprisk_integrations.diagnostics import auto_window_steps
from poprisk_integrations.lightning._upstream import Trainer

__all__ = [
    "loader_batch_size",
    "pass_steps",
    "run_steps",
    "steps_per_epoch",
    "total_steps",
    "window_steps",
]

WINDOW_WITHOUT_END = 50  # where neither the data nor the run have a length


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimizer steps of one epoch, a short last one included; None if unknown.

    Args:
        trainer: Fitting, so that it knows its data.
    """
    if trainer.num_training_batches == float("inf"):
        return None
    return max(1, -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches))


def loader_batch_size(trainer: Trainer) -> int | None:
    """Examples in a batch of one rank; None where the loader does not say."""
    loader = trainer.train_dataloader
    for owner in (getattr(loader, "batch_sampler", None), loader):  # a schedule changes the first
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int):
            return size
    return None


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


def run_steps(trainer: Trainer) -> int | None:
    """`total_steps` of this trainer's run."""
    return total_steps(steps_per_epoch(trainer), trainer.max_epochs, trainer.max_steps)


def pass_steps(
    pass_batches: int | None, epoch_batches: float, accumulate_grad_batches: int
) -> int | None:
    """Optimizer steps of one pass over the data; Lightning also steps at the end of an epoch.

    Args:
        pass_batches: Batches of a pass; None if unknown.
        epoch_batches: Of one of the trainer's epochs, which may be shorter or longer; infinite
            if unknown.
        accumulate_grad_batches: Batches of a step.

    Example:
        >>> pass_steps(100, 100, 8), pass_steps(100, 20, 8), pass_steps(100, float("inf"), 8)
        (13, 15, 13)
    """
    if pass_batches is None:
        return None
    epochs, rest = divmod(pass_batches, epoch_batches)
    in_epochs = int(epochs) and int(epochs) * -(-int(epoch_batches) // accumulate_grad_batches)
    return in_epochs + -(-int(rest) // accumulate_grad_batches)


def window_steps(trainer: Trainer, window: int | str, pass_steps: int | None) -> int:
    """Length of a window in optimizer steps.

    Args:
        trainer: Fitting, so that it knows its data.
        window: A length, or "auto" for `diagnostics.auto_window_steps`.
        pass_steps: Optimizer steps of one pass over the data; None if unknown.
    """
    if isinstance(window, int):
        return window
    total = run_steps(trainer)
    if pass_steps is None and total is None:
        pass_steps = steps_per_epoch(trainer)
    if pass_steps is None and total is None:
        return WINDOW_WITHOUT_END
    return auto_window_steps(total, pass_steps)
