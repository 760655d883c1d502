"""Changes a learning rate so that the scheduler does not change it back."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

__all__ = ["check_scheduler", "scale_learning_rates"]

_LISTS = ("base_lrs", "max_lrs")  # per group; max_lrs of CyclicLR
_IN_GROUPS = ("initial_lr", "max_lr", "min_lr")  # where OneCycleLR keeps them


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that would overwrite a changed learning rate.

    Args:
        scheduler: As Trainer hands it to callbacks; None for none.

    Raises:
        ValueError: Naming it.
    """
    for part in _parts(scheduler):
        if not (hasattr(part, "base_lrs") or _only_lowers_groups(part)):
            raise ValueError(
                f"PopRiskLRCut cannot work with {type(part).__name__}: it has no base_lrs, so it "
                "would overwrite a cut learning rate. Use one of Trainer's own lr_scheduler_type."
            )


def scale_learning_rates(optimizer: Any, scheduler: Any, factors: Sequence[float]) -> None:
    """Multiply the learning rate of each parameter group, now and in the scheduler.

    Trainer's schedules are `base_lrs[i] * lambda(step)`; ReduceLROnPlateau and GreedyLR change
    the groups' present values only.

    Args:
        optimizer: As Trainer hands it to callbacks.
        scheduler: Same; None for none.
        factors: One for each group.
    """
    parts = list(_parts(scheduler))
    in_groups = _IN_GROUPS if any(isinstance(part, OneCycleLR) for part in parts) else ()
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        for key in ("lr", *in_groups):
            if isinstance(group.get(key), Tensor):
                group[key].mul_(factor)  # a captured step reads this very tensor
            elif key in group:
                group[key] *= factor
    for part in parts:
        for name in () if _only_lowers_groups(part) else _LISTS:
            values = getattr(part, name, None)
            if values is not None:
                setattr(part, name, [v * f for v, f in zip(values, factors, strict=True)])


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler without accelerate's wrapper, and those that it chains."""
    if scheduler is None:
        return
    if hasattr(scheduler, "scheduler"):
        yield from _parts(scheduler.scheduler)
        return
    inner = getattr(scheduler, "_schedulers", None)  # SequentialLR, ChainedScheduler
    if inner is None or hasattr(scheduler, "base_lrs"):
        yield scheduler
    for part in inner or ():
        yield from _parts(part)


def _only_lowers_groups(scheduler: Any) -> bool:
    return isinstance(scheduler, ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"
