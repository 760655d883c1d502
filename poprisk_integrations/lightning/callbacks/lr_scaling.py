"""Multiplies an optimizer's learning rates so that its schedulers do not undo it."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from poprisk_integrations.lightning._upstream import Trainer

__all__ = ["largest_lr", "scale_learning_rates"]

# Where torch's schedulers keep learning rates as absolute numbers.
_GROUP_KEYS = ("initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULER_ATTRIBUTES = ("base_lrs", "max_lrs", "eta_min", "_last_lr")


def largest_lr(optimizer: Optimizer) -> float:
    """Of the groups that hold parameters."""
    return max((float(g["lr"]) for g in optimizer.param_groups if g["params"]), default=0.0)


def scale_learning_rates(trainer: Trainer, factor: float) -> None:
    """Multiply the learning rates of all optimizers, now and as their schedulers go on.

    From here on every scheduler of torch gives `factor` times what it would have given:
        LambdaLR and other closed forms       start from `base_lrs`
        StepLR and other chainable forms      multiply the group's present rate
        CosineAnnealingLR, warm restarts      also hold `eta_min`
        OneCycleLR, CyclicLR                  also hold rates in the groups, `max_lrs`
        SequentialLR, ChainedScheduler        hold schedulers
    ReduceLROnPlateau goes on from the present rate; its floor `min_lrs` stays.

    Args:
        trainer: Fitting.
        factor: > 0.
    """
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for key in ("lr", *_GROUP_KEYS):
                if key in group:
                    group[key] = _scaled(group[key], factor)
    seen: set[int] = set()
    for config in trainer.lr_scheduler_configs:
        _scale_scheduler(config.scheduler, factor, seen)


def _scale_scheduler(scheduler: Any, factor: float, seen: set[int]) -> None:
    if id(scheduler) in seen:
        return
    seen.add(id(scheduler))
    for name in _SCHEDULER_ATTRIBUTES:
        value = getattr(scheduler, name, None)
        if isinstance(value, (list, tuple)):
            setattr(scheduler, name, [_scaled(v, factor) for v in value])
        elif value is not None:
            setattr(scheduler, name, _scaled(value, factor))
    for value in list(vars(scheduler).values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, LRScheduler):
                _scale_scheduler(item, factor, seen)


def _scaled(value: Any, factor: float) -> Any:
    """Tensors (of capturable optimizers) in place: a captured graph reads them."""
    if isinstance(value, Tensor):
        return value.mul_(factor)
    return value * factor
