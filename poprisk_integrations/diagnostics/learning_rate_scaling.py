"""Multiplies learning rates so that their schedulers do not undo it."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["CutWatch", "cut_factor", "largest_lr", "reacts", "scale_learning_rates", "used_groups"]

_NAMED_OTHERWISE = ("eta_min", "eta_max")  # learning rates whose name does not say so
_BOUNDS = ("min_lrs", "max_lrs", "default_min_lr")  # of schedulers that react to a metric


def used_groups(optimizer: Any) -> list[bool]:
    """Which groups' learning rates count: empty ones do not.

    ZeRO-3 shows all groups empty, and then all count.
    """
    used = [len(group["params"]) > 0 for group in optimizer.param_groups]
    return used if any(used) else [True] * len(used)


def largest_lr(optimizer: Any) -> float:
    """Of groups with different learning rates the largest."""
    groups = zip(optimizer.param_groups, used_groups(optimizer), strict=True)
    return max((float(group["lr"]) for group, is_used in groups if is_used), default=0.0)


def reacts(scheduler: Any) -> bool:
    """Whether a metric decides what a scheduler does; GreedyLR is transformers' own."""
    return isinstance(scheduler, ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"


def cut_factor(optimizers: Iterable[Any], factor: float, min_lr: float) -> float:
    """`factor`, or a larger one that leaves the largest learning rate at `min_lr` or more.

    One factor for all groups keeps their ratios, and lets every schedule go on from the cut; it is
    1.0 where nothing is left to cut.
    """
    largest = max((largest_lr(optimizer) for optimizer in optimizers), default=0.0)
    return 1.0 if largest <= 0 else min(1.0, max(factor, min_lr / largest))


class CutWatch:
    """Tells once if a scheduler undoes a cut: one that computes rates from constants overwrites it.

    Nothing shows that before the rate next changes; then the rate lies nearer to what it was
    before the cut.

    Example:
        >>> watch = CutWatch()
        >>> watch.cut(before=0.1, after=0.03)
        >>> watch.look(0.03), "overwrites it" in watch.look(0.099), watch.look(0.1)
        ('', True, '')
    """

    def __init__(self) -> None:
        self._rates: tuple[float, float] | None = None  # until they change again
        self._has_told = False

    def cut(self, before: float, after: float) -> None:
        """Note the largest learning rate before and after a cut."""
        self._rates = before, after

    def look(self, lr: float) -> str:
        """A warning, or "", at the largest learning rate of the step that was taken."""
        if self._rates is None or math.isclose(lr, self._rates[1]):
            return ""
        (before, after), self._rates = self._rates, None
        if lr <= math.sqrt(before * after) or self._has_told:
            return ""
        self._has_told = True
        return (
            f"the learning rate was cut from {before:.3g} to {after:.3g} and is {lr:.3g} again: "
            "the scheduler overwrites it. Let it start from base_lrs, or keep its rates in "
            "attributes whose names end in _lr."
        )


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
    stay the user's. Optimizers and schedulers may be wrapped by accelerate; None is skipped.
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
    for name, value in list(vars(scheduler).items()):
        parts = value if isinstance(value, (list, tuple)) else (value,)
        is_bound = name in _BOUNDS and reacts(scheduler)
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
