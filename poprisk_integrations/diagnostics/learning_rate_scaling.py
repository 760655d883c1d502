"""Multiplies learning rates so that their schedulers do not undo it."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["cut_factor", "is_undone", "largest_lr", "scale_learning_rates"]

_NAMED_OTHERWISE = ("eta_min", "eta_max")  # learning rates whose name does not say so
_BOUNDS = ("min_lrs", "max_lrs", "default_min_lr")  # of schedulers that react to a metric


def largest_lr(optimizer: Any) -> float:
    """Of groups with different learning rates the largest; empty groups do not count.

    ZeRO-3 shows all groups empty, and then all count.
    """
    groups = [group for group in optimizer.param_groups if len(group["params"])]
    return max((float(group["lr"]) for group in groups or optimizer.param_groups), default=0.0)


def cut_factor(optimizers: Iterable[Any], factor: float, min_lr: float) -> float:
    """The factor of a cut that leaves the largest learning rate at `min_lr` or more.

    One factor for all groups keeps their ratios, and lets every schedule go on from the cut.

    Args:
        optimizers: With the groups to cut.
        factor: Wanted, in (0, 1).
        min_lr: >= 0.

    Returns:
        `factor` or a larger one; 1.0 where nothing is left to cut.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> cut_factor([optimizer], 0.3, 0.0), cut_factor([optimizer], 0.3, 0.05)
        (0.3, 0.5)
    """
    largest = max((largest_lr(optimizer) for optimizer in optimizers), default=0.0)
    return 1.0 if largest <= 0 else min(1.0, max(factor, min_lr / largest))


def is_undone(before: float, after: float, now: float) -> bool:
    """Whether a rate, when it first changed after a cut, lies nearer to what it was before.

    A scheduler that computes rates from constants overwrites a cut, and nothing shows that before.

    Args:
        before: The cut.
        after: It.
        now: At the first change since.

    Example:
        >>> is_undone(0.1, 0.03, 0.099), is_undone(0.1, 0.03, 0.0297)
        (True, False)
    """
    return now > math.sqrt(before * after)


def scale_learning_rates(
    optimizers: Iterable[Any], schedulers: Iterable[Any], factor: float
) -> None:
    """Multiply all learning rates, now and as the schedulers go on.

    From here on every scheduler of torch gives `factor` times what it would have given:
        LambdaLR and other closed forms       start from `base_lrs`
        StepLR and other chainable forms      multiply the group's present rate
        CosineAnnealingLR, warm restarts      also hold `eta_min`
        OneCycleLR, CyclicLR, SWALR           also hold rates in the groups, `max_lrs`
        SequentialLR, ChainedScheduler        hold schedulers
    So does one of a user's own that keeps rates in attributes named as torch names them, ending
    in `lr` or `lrs`. ReduceLROnPlateau and GreedyLR go on from the present rate, and their bounds
    stay the user's.

    Args:
        optimizers: Of torch, or wrapped by accelerate.
        schedulers: Theirs, wrapped or not; None is skipped.
        factor: > 0.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key, value in group.items():
                if _is_rate(key, value):
                    group[key] = _scaled(value, factor)
    seen: set[int] = set()
    for scheduler in schedulers:
        _scale_scheduler(scheduler, factor, seen)


def _scale_scheduler(scheduler: Any, factor: float, seen: set[int]) -> None:
    if id(scheduler) in seen or not hasattr(scheduler, "__dict__"):
        return
    seen.add(id(scheduler))
    reacts = isinstance(scheduler, ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"
    for name, value in list(vars(scheduler).items()):
        parts = value if isinstance(value, (list, tuple)) else (value,)
        is_bound = reacts and name in _BOUNDS
        if parts and not is_bound and all(_is_rate(name, part) for part in parts):
            scaled = [_scaled(part, factor, in_place=False) for part in parts]
            setattr(scheduler, name, scaled if parts is value else scaled[0])
        for part in parts:
            if isinstance(part, LRScheduler) or name == "scheduler":  # accelerate's wrapper
                _scale_scheduler(part, factor, seen)


def _is_rate(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        return False
    return name.rpartition("_")[2] in ("lr", "lrs") or name in _NAMED_OTHERWISE


def _scaled(value: Any, factor: float, *, in_place: bool = True) -> Any:
    """Tensors in the groups of capturable optimizers in place: a captured graph reads them."""
    if isinstance(value, Tensor) and in_place:
        return value.mul_(factor)
    return value * factor
