"""The one file that knows where Lightning keeps things: its two import names, its private names.

`lightning.pytorch` and `pytorch_lightning` are the same code under two names, with distinct
classes. The first is used where both are installed.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk_integrations._imports import require

if TYPE_CHECKING or find_spec("lightning") is not None:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
elif find_spec("pytorch_lightning") is not None:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
else:
    require("lightning", extra="lightning")

__all__ = [
    "Callback",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "callbacks_of",
    "can_stop_early",
    "checkpoint_saved_at",
    "gradients_stay_scaled",
    "has_step_hooks",
    "is_fast_dev_run",
    "is_logger_step",
    "loss_scale",
    "rank_zero_info",
    "rank_zero_warn",
    "strategy_is",
    "training_loaders",
]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks, in the order in which they are called."""
    return list(trainer.callbacks)  # type: ignore[attr-defined] # set outside of the class


def can_stop_early(trainer: Trainer) -> bool:
    """Whether `min_epochs` and `min_steps` of the trainer are met.

    The trainer never takes `should_stop` back: set before they are met, it ends the run at that
    moment even if the reason has gone by then.
    """
    return bool(getattr(trainer.fit_loop, "_can_stop_early", True))


def checkpoint_saved_at(callback: Any, step: int) -> str:
    """Path of the checkpoint that a ModelCheckpoint saved last, if at this optimizer step."""
    if getattr(callback, "_last_global_step_saved", None) != step:
        return ""
    return str(getattr(callback, "_last_checkpoint_saved", ""))


def gradients_stay_scaled(trainer: Trainer, optimizer: Optimizer) -> bool:
    """Whether fp16 gradients reach hooks multiplied by the scaler's factor.

    Optimizers that unscale in their own step (the fused ones) are left to do so.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether someone registered hooks on this optimizer's step."""
    names = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return any(getattr(optimizer, name, None) for name in names)


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether this is a trial run of a few batches, which decides nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined] # set outside of the class


def is_logger_step(trainer: Trainer) -> bool:
    """Whether Lightning hands the logged values of this step to loggers, after the callbacks."""
    connector = getattr(trainer, "_logger_connector", None)
    return bool(getattr(connector, "should_update_logs", False))


def loss_scale(trainer: Trainer) -> Tensor:
    """Present factor of the fp16 grad scaler, 0-dim on the device, without a sync."""
    one = torch.ones((), device=trainer.strategy.root_device)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return one if scaler is None else scaler.scale(one)


def strategy_is(trainer: Trainer, *names: str) -> bool:
    """Whether the strategy is, or derives from, a class of one of these names.

    By name, since a Trainer may come from the other of the two import names.
    """
    return any(cls.__name__ in names for cls in type(trainer.strategy).__mro__)


def training_loaders(trainer: Trainer) -> list[Any]:
    """The loaders that are drawn from, with the samplers that Lightning gave them."""
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    return [] if combined is None else list(combined.flattened)
