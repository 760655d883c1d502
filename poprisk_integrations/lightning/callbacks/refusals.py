"""Set-ups in which a callback would not see complete, unscaled gradients."""

from torch.optim import LBFGS, Optimizer

from poprisk_integrations.lightning._upstream import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    gradients_stay_scaled,
    strategy_is,
)

__all__ = ["only_optimizer", "refuse_engine", "refuse_scaled_gradients", "refuse_strategy"]


def refuse_strategy(trainer: Trainer, restore: str | None) -> None:
    """Refuse DeepSpeed and FSDP1, and `restore="onset"` where checkpoints are sharded.

    Raises:
        MisconfigurationException: Naming the strategy and what to use instead.
    """
    name = type(trainer.strategy).__name__
    if strategy_is(trainer, "DeepSpeedStrategy", "FSDPStrategy"):
        raise MisconfigurationException(
            f"PopRiskEarlyStopping cannot run under {name}, which shows callbacks no complete "
            "gradients. Use DDPStrategy or ModelParallelStrategy (FSDP2)."
        )
    if restore == "onset" and strategy_is(trainer, "ModelParallelStrategy"):
        raise MisconfigurationException(
            f"Invalid restore: 'onset'. Under {name} checkpoints are sharded and cannot be loaded "
            "back when fit ends. Use restore='stop' or None."
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


def only_optimizer(trainer: Trainer, pl_module: LightningModule) -> Optimizer:
    """The optimizer of automatic optimization.

    Raises:
        MisconfigurationException: For manual optimization, LBFGS, or optimizers not of torch.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "PopRiskEarlyStopping needs automatic optimization with one optimizer: with "
            f"automatic_optimization=False, {type(pl_module).__name__} steps by itself, with "
            f"{len(trainer.optimizers)} optimizer(s), and may clip gradients before."
        )
    optimizer = trainer.optimizers[0]
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS):
        raise MisconfigurationException(
            "PopRiskEarlyStopping needs a torch.optim.Optimizer that evaluates one gradient per "
            f"step, found {type(optimizer).__name__}."
        )
    return optimizer


def refuse_scaled_gradients(trainer: Trainer, optimizer: Optimizer) -> None:
    """Refuse optimizers that unscale fp16 gradients in their own step.

    Raises:
        MisconfigurationException: Naming the optimizer and the setting to change.
    """
    if gradients_stay_scaled(trainer, optimizer):
        raise MisconfigurationException(
            f"PopRiskEarlyStopping cannot read the gradients of a fused {type(optimizer).__name__} "
            "under 16-mixed precision: they are still multiplied by the loss scale. Use "
            "fused=False, or bf16-mixed."
        )
