"""What our callbacks ask of Lightning: its two import names, its private names, a run's lengths.

`lightning.pytorch` and `pytorch_lightning` are the same code under two names, with distinct
classes. The first is used where both are installed.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from poprisk_integrations._imports import require
from poprisk_integrations.diagnostics.data_pass import DataPass, joint_data_pass
from poprisk_integrations.diagnostics.run_length import RunPlan, agree_on, epoch_steps, total_steps
from poprisk_integrations.diagnostics.schedule_outlook import ScheduleOutlook

if TYPE_CHECKING or find_spec("lightning") is not None:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger as silent_logger
    from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
elif find_spec("pytorch_lightning") is not None:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.loggers.logger import DummyLogger as silent_logger
    from pytorch_lightning.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
    from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
else:
    require("lightning", extra="lightning")

__all__ = [
    "SHARDED",
    "Callback",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "callbacks_of",
    "can_stop_early",
    "checkpoint_saved_at",
    "hook_scale",
    "is_fast_dev_run",
    "is_logger_step",
    "loader_batch_size",
    "loss_scale",
    "new_fit_loop",
    "only_optimizer",
    "parts_of",
    "prepared_batch",
    "rank_zero_info",
    "rank_zero_warn",
    "refuse_strategy",
    "run_plan",
    "run_shape",
    "run_steps",
    "schedule_outlook",
    "silent_logger",
    "steps_per_epoch",
    "strategy_is",
    "takes",
    "train_dataloaders",
    "training_loaders",
    "write_line",
]

SHARDED = ("FSDPStrategy", "ModelParallelStrategy")


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks, in the order in which they are called."""
    return list(trainer.callbacks)  # type: ignore[attr-defined] # set outside of the class


def can_stop_early(trainer: Trainer) -> bool:
    """Whether `min_epochs` and `min_steps` of the trainer are met."""
    # It never takes `should_stop` back: set before they are met, it ends the run at that moment,
    # even if the reason has gone by then.
    return bool(getattr(trainer.fit_loop, "_can_stop_early", True))


def checkpoint_saved_at(trainer: Trainer, step: int) -> str:
    """A checkpoint that a ModelCheckpoint has saved at this optimizer step, its last one; or ""."""
    for callback in trainer.checkpoint_callbacks:
        if getattr(callback, "_last_global_step_saved", None) == step:
            return str(getattr(callback, "_last_checkpoint_saved", ""))
    return ""


def loss_scale(trainer: Trainer) -> float | Tensor:
    """What losses are multiplied by before their backward pass (fp16), without a sync."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    one = torch.ones((), device=trainer.strategy.root_device)
    return 1.0 if scaler is None else scaler.scale(one)


def hook_scale(trainer: Trainer, optimizer: Optimizer) -> float | Tensor:
    """What turns the gradients that hooks see into those of the loss."""
    # Fused optimizers unscale in their own step, all others have been unscaled by now.
    is_scaled = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    return 1 / loss_scale(trainer) if is_scaled else 1.0


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether this is a trial run of a few batches, which decides nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined] # set outside of the class


def is_logger_step(trainer: Trainer) -> bool:
    """Whether Lightning hands the logged values of this step to loggers, after the callbacks."""
    connector = getattr(trainer, "_logger_connector", None)
    return bool(trainer.loggers) and bool(getattr(connector, "should_update_logs", False))


def write_line(trainer: Trainer, values: dict[str, float]) -> None:
    """Write a line of the step that has just ended to every logger, past Lightning's `log`."""
    for logger in trainer.loggers:
        line = {**values, "epoch": trainer.current_epoch}
        logger.log_metrics(line, step=trainer.global_step - 1)  # Lightning counts lines from 0


def new_fit_loop(trainer: Trainer) -> Any:
    """A loop over the trainer's data that knows nothing of the one it was to run."""
    own = trainer.fit_loop
    loop = type(own)(trainer, min_epochs=0, max_epochs=-1)
    loop.epoch_loop = type(own.epoch_loop)(trainer)
    loop._data_source = own._data_source
    loop.epoch_loop.val_loop._data_source = own.epoch_loop.val_loop._data_source
    return loop


def prepared_batch(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """A batch of a loader as `training_step` gets it, through the module's own hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def takes(pl_module: LightningModule, name: str, *, least: int | None = None) -> bool:
    """Whether `training_step` has an argument of this name, or `least` of whatever names."""
    step = pl_module.training_step
    return is_param_in_hook_signature(step, name, explicit=least is None, min_args=least)


def parts_of(trainer: Trainer) -> list[Any]:
    """Objects whose attributes a loop sets: the trainer, and what it keeps its metrics in."""
    return [trainer, trainer.strategy, trainer._logger_connector]


def train_dataloaders(trainer: Trainer) -> list[Any]:
    """What the fit's data source gives, before Lightning has given them samplers."""
    return list(CombinedLoader(trainer.fit_loop._data_source.dataloader()).flattened)


def training_loaders(trainer: Trainer) -> list[Any]:
    """The loaders that are drawn from, with the samplers that Lightning gave them."""
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    return [] if combined is None else list(combined.flattened)


def steps_per_epoch(trainer: Trainer) -> int | None:
    """Optimizer steps of one epoch, a short last one included; None if unknown."""
    return epoch_steps(trainer.num_training_batches, trainer.accumulate_grad_batches)


def run_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of this trainer's run; None if it has no known end."""
    return total_steps(steps_per_epoch(trainer), trainer.max_epochs, trainer.max_steps)


def loader_batch_size(trainer: Trainer) -> int | None:
    """Examples in a batch of one rank; None where the loader does not say."""
    loader = trainer.train_dataloader
    for owner in (getattr(loader, "batch_sampler", None), loader):  # a schedule changes the first
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int):
            return size
    return None


def run_plan(trainer: Trainer, window: int | str, asked: int | None) -> RunPlan:
    """The present plan, the same on all ranks. Every rank must call.

    `asked` are the user's optimizer steps of one pass; None to ask the loaders.
    """
    every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined] # set outside
    batches = trainer.num_training_batches
    if every:
        why = f"loaders are made anew with reload_dataloaders_every_n_epochs={every}"
        found = DataPass(batches=None, reason=why)
    else:
        limit = None if batches == float("inf") else int(batches)
        found = joint_data_pass(training_loaders(trainer), limit)
    lengths = (batches, loader_batch_size(trainer), trainer.accumulate_grad_batches)
    found, (agreed, size, accumulation) = agree_on(found, lengths, trainer.strategy.root_device)
    return RunPlan.of(
        found,
        window=window,
        asked=asked,
        run_steps=run_steps(trainer),
        epoch_batches=agreed,
        accumulation=accumulation or 1,
        batch_size=size,
    )


def run_shape(trainer: Trainer) -> tuple[Any, ...]:
    """Cheap to ask at each step: as long as it is the same, so is the plan."""
    return (
        trainer.accumulate_grad_batches,
        trainer.num_training_batches,
        trainer.max_epochs,
        trainer.max_steps,
        loader_batch_size(trainer),
        *map(id, training_loaders(trainer)),
    )


def schedule_outlook(trainer: Trainer) -> ScheduleOutlook:
    """What the learning rate of the first optimizer will do."""
    configs = trainer.lr_scheduler_configs
    scheduler, every = None, 1
    if configs:
        scheduler, every = configs[0].scheduler, configs[0].frequency
        every *= (steps_per_epoch(trainer) or 1) if configs[0].interval == "epoch" else 1
    return ScheduleOutlook(
        trainer.optimizers[0],
        scheduler,
        total_steps=run_steps(trainer),
        step=trainer.global_step,
        every=every,
    )


def strategy_is(trainer: Trainer, *names: str) -> bool:
    """Whether the strategy is, or derives from, a class of one of these names."""
    # By name, since a Trainer may come from the other of the two import names.
    return any(cls.__name__ in names for cls in type(trainer.strategy).__mro__)


def refuse_strategy(trainer: Trainer, owner: str) -> None:
    """Refuse DeepSpeed, whose gradients nobody can read."""
    if strategy_is(trainer, "DeepSpeedStrategy"):
        raise MisconfigurationException(
            f"{owner} cannot run under {type(trainer.strategy).__name__}, whose engine keeps "
            "complete gradients to itself. Use DDPStrategy, FSDPStrategy or ModelParallelStrategy "
            "(FSDP2)."
        )


def only_optimizer(trainer: Trainer, pl_module: LightningModule, owner: str) -> Optimizer:
    """The optimizer of automatic optimization: one of torch's but LBFGS, that trains something."""
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{owner} needs automatic optimization with one optimizer: with "
            f"automatic_optimization=False, {type(pl_module).__name__} steps by itself, with "
            f"{len(trainer.optimizers)} optimizer(s), and may clip gradients before."
        )
    if not trainer.optimizers:
        raise MisconfigurationException(
            f"{owner} needs an optimizer, and configure_optimizers returned none."
        )
    optimizer = trainer.optimizers[0]
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS):
        raise MisconfigurationException(
            f"{owner} needs a torch.optim.Optimizer that evaluates one gradient per step, found "
            f"{type(optimizer).__name__}."
        )
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise MisconfigurationException(
            f"{owner} needs parameters to train: none of the optimizer's requires a gradient."
        )
    return optimizer
