"""Ties the stop without validation data to the settings of a DPO run."""

from typing import TYPE_CHECKING, Any

from poprisk_integrations.diagnostics import auto_window_steps
from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback

if TYPE_CHECKING:
    from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig

__all__ = ["add_stop", "auto_window", "stopping_callback"]


def auto_window(num_pairs: int, *, per_device: int, accumulation: int, world_size: int) -> int:
    """Optimizer steps in a third of an epoch, at least 8: what "auto" means for DPO.

    Unlike in `auto_window_steps`, also for runs of many epochs: wrong labels are fitted within a
    few epochs, and at large learning rates within the second, which leaves no window of a whole
    one. `recipes/benchmarks/noisy_dpo` compares the two.

    Args:
        num_pairs: Pairs in the training set.
        per_device: Pairs per device and micro-batch.
        accumulation: Micro-batches per optimizer step.
        world_size: Processes.

    Example:
        >>> auto_window(2000, per_device=4, accumulation=2, world_size=2)
        41
    """
    micro_batches = -(-num_pairs // (per_device * world_size))
    epoch_steps = -(-micro_batches // accumulation)
    return auto_window_steps(max_steps=epoch_steps, epoch_steps=epoch_steps)


def stopping_callback(
    args: "PopRiskDPOConfig", window: int | str | None = None
) -> PopRiskEarlyStoppingCallback:
    """The callback that the options `stop_*` describe.

    Args:
        args: Settings of the run.
        window: Takes the place of `args.stop_window`.

    Raises:
        ValueError: If an option is outside its range; the message names it.
    """
    try:
        return PopRiskEarlyStoppingCallback(
            kappa=args.stop_kappa,
            window=window or args.stop_window or "auto",
            threshold=args.stop_threshold,
            min_steps=args.stop_min_steps,
            action=args.stop_action,
            restore=args.stop_restore,
        )
    except ValueError as error:  # "Invalid kappa: ...": here the option is called stop_kappa
        raise ValueError(str(error).replace("Invalid ", "Invalid stop_", 1)) from None


def add_stop(trainer: Any) -> PopRiskEarlyStoppingCallback | None:
    """Add the stop to a trainer, unless it has one or `args.stop` is off.

    For "auto" it gets a rule, not a number of steps: how many make a third of a pass is known when
    training starts (`auto_find_batch_size`, a trial of a search, other data).

    Returns:
        What was added.
    """
    args = trainer.args
    present = any(
        isinstance(callback, PopRiskEarlyStoppingCallback)
        for callback in trainer.callback_handler.callbacks
    )
    if not args.stop or present:
        return None
    stop = stopping_callback(args, "third" if args.stop_window == "auto" else None)
    trainer.add_callback(stop)
    return stop
