"""Ties the stop without validation data to the settings of a DPO run."""

from typing import TYPE_CHECKING, Any

from poprisk_integrations.huggingface import (
    PopRiskEarlyStoppingCallback,
    PopRiskMonitorCallback,
)

if TYPE_CHECKING:
    from poprisk_integrations.trl.poprisk_dpo_config import PopRiskDPOConfig

__all__ = ["add_stop", "stopping_callback", "tracked_metrics"]


def stopping_callback(args: "PopRiskDPOConfig") -> PopRiskEarlyStoppingCallback:
    """The callback that the options `stop_*` describe.

    Args:
        args: Settings of the run.

    Raises:
        ValueError: If an option is outside its range; the message names it.
    """
    try:
        return PopRiskEarlyStoppingCallback(
            kappa=args.stop_kappa,
            window=args.stop_window or "auto",
            threshold=args.stop_threshold,
            min_steps=args.stop_min_steps,
            action=args.stop_action,
            restore=args.stop_restore,
        )
    except ValueError as error:  # "Invalid kappa: ...": here the option is called stop_kappa
        raise ValueError(str(error).replace("Invalid ", "Invalid stop_", 1)) from None


def add_stop(trainer: Any) -> None:
    """Add the stop to a trainer, unless it has one or `args.stop` is off."""
    present = any(
        isinstance(callback, PopRiskEarlyStoppingCallback)
        for callback in trainer.callback_handler.callbacks
    )
    if trainer.args.stop and not present:
        trainer.add_callback(stopping_callback(trainer.args))


def tracked_metrics(trainer: Any, logs: dict[str, Any]) -> dict[str, float]:
    """Numbers of our callbacks for a training log line.

    Trackers see a line before any callback of the user, so only `Trainer.log` can pass them on.
    """
    metrics: dict[str, float] = {}
    if "loss" in logs or "train_loss" in logs:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, (PopRiskEarlyStoppingCallback, PopRiskMonitorCallback)):
                metrics.update(callback.metrics())
    return metrics
