"""Set-ups in which a callback would not see complete gradients, or could not do its work."""

from collections.abc import Sequence
from typing import Any

from torch.optim import LBFGS, Optimizer

from poprisk_integrations.lightning._upstream import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    strategy_is,
)

__all__ = ["only_optimizer", "refuse_engine", "refuse_second_stop", "refuse_strategy"]


def refuse_strategy(trainer: Trainer, owner: str, restore: str | None = None) -> None:
    """Refuse DeepSpeed, and `restore="onset"` where checkpoints are sharded.

    Args:
        trainer: Any.
        owner: Name of the callback.
        restore: Which weights the callback is to restore.

    Raises:
        MisconfigurationException: Naming the strategy and what to use instead.
    """
    name = type(trainer.strategy).__name__
    if strategy_is(trainer, "DeepSpeedStrategy"):
        raise MisconfigurationException(
            f"{owner} cannot run under {name}, whose engine keeps complete gradients to itself. "
            "Use DDPStrategy, FSDPStrategy or ModelParallelStrategy (FSDP2)."
        )
    if restore == "onset" and strategy_is(trainer, "FSDPStrategy", "ModelParallelStrategy"):
        raise MisconfigurationException(
            f"Invalid restore: 'onset'. Under {name} weights are sharded and cannot be loaded "
            "back when fit ends. Use restore='stop' or None."
        )


def refuse_second_stop(callbacks: Sequence[Any]) -> None:
    """Refuse two callbacks that may both end the run: the first would hide the second.

    Args:
        callbacks: All early-stopping callbacks of this package in a trainer.

    Raises:
        MisconfigurationException: Saying what to change.
    """
    stops = [callback for callback in callbacks if callback.action == "stop"]
    if len(stops) > 1:
        raise MisconfigurationException(
            f"Invalid action: 'stop' on {len(stops)} PopRiskEarlyStopping callbacks of one "
            "Trainer. Set action='monitor' on all but one."
        )


def refuse_engine(trainer: Trainer) -> None:
    """Refuse to replace an optimizer under DeepSpeed, whose engine would step the old one.

    Raises:
        MisconfigurationException: Saying what to do instead.
    """
    if strategy_is(trainer, "DeepSpeedStrategy"):
        raise MisconfigurationException(
            f"PopRiskOptimizer cannot replace an optimizer under {type(trainer.strategy).__name__}:"
            " DeepSpeed's engine holds the old one and would go on stepping it. Return "
            'PopRiskAdamW from configure_optimizers, with no "optimizer" section in the '
            "DeepSpeed config."
        )


def only_optimizer(trainer: Trainer, pl_module: LightningModule, owner: str) -> Optimizer:
    """The optimizer of automatic optimization.

    Args:
        trainer: Fitting.
        pl_module: Its module.
        owner: Name of the callback.

    Raises:
        MisconfigurationException: For manual optimization, LBFGS, optimizers not of torch, and
            where nothing is trained.
    """
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
