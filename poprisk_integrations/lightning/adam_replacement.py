"""PopRiskAdamW in the place of an Adam that exists already, with its schedulers."""

from typing import Any

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from poprisk_integrations.lightning._upstream import MisconfigurationException, has_step_hooks
from poprisk_integrations.optim import PopRiskAdamW

__all__ = ["poprisk_adamw_from", "rebind_scheduler"]

# Keys of Adam's groups that PopRiskAdamW has no use for: its decay is always decoupled, and how
# Adam computes its step (foreach, fused) is not how ours does.
_DROPPED = ("amsgrad", "differentiable", "foreach", "fused", "decoupled_weight_decay")
_KEPT = ("lr", "betas", "eps", "weight_decay", "maximize", "capturable")


def poprisk_adamw_from(optimizer: Optimizer, options: dict[str, Any]) -> PopRiskAdamW:
    """A PopRiskAdamW over the same parameter groups.

    Learning rates, betas, eps, weight decay, `maximize` and `capturable` are Adam's, group by
    group; `foreach` and `fused` are not, they may be chosen in `options`. Any further key of a
    group is kept, so `{"params": ..., "gate": "none"}` works.

    Args:
        optimizer: A torch Adam or AdamW that has not stepped; left as it is.
        options: Options of PopRiskAdamW for all groups without their own.

    Raises:
        MisconfigurationException: For any other optimizer, one with state, step hooks, amsgrad,
            `differentiable`, or Adam's coupled weight decay.
        ValueError: If PopRiskAdamW refuses an option.

    Example:
        >>> p = Tensor([0.0, 0.0])
        >>> ours = poprisk_adamw_from(AdamW([p], lr=0.5), {"gate": "hard"})
        >>> ours.param_groups[0]["lr"], ours.param_groups[0]["gate"]
        (0.5, 'hard')
    """
    _refuse(optimizer)
    groups = [
        {key: value for key, value in group.items() if key not in _DROPPED}
        for group in optimizer.param_groups
    ]
    defaults = {key: optimizer.defaults[key] for key in _KEPT if key in optimizer.defaults}
    replacement = PopRiskAdamW(groups, **{**defaults, **options})
    if any("initial_lr" in group for group in groups):
        _KeepLR(replacement)
    return replacement


def rebind_scheduler(scheduler: Any, old: Optimizer, new: Optimizer) -> None:
    """Let a scheduler, and those inside it, set the learning rates of another optimizer.

    Covers torch's own (SequentialLR, ChainedScheduler and ReduceLROnPlateau too), and any that
    keeps its optimizer as `.optimizer`.

    Args:
        scheduler: Changed in place.
        old: The optimizer that it was made for.
        new: One with the same groups.

    Raises:
        MisconfigurationException: If it keeps its optimizer elsewhere.
    """
    pending, seen = [scheduler], set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, (list, tuple)):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, LRScheduler) or getattr(item, "optimizer", None) is old:
            if getattr(item, "optimizer", None) is old:
                item.optimizer = new
            pending.extend(vars(item).values())
    if getattr(scheduler, "optimizer", None) is not new:
        raise MisconfigurationException(
            f"PopRiskOptimizer cannot re-bind {type(scheduler).__name__}: it has no attribute "
            "`optimizer`. Return PopRiskAdamW from configure_optimizers instead."
        )


class _KeepLR(LRScheduler):
    """Changes no learning rate: constructing it marks `step` as seen by a scheduler.

    Every scheduler wraps its optimizer's `step` when constructed, and warns at its first step if
    someone replaced it since.
    """

    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]


def _refuse(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    groups = getattr(optimizer, "param_groups", [])
    if type(optimizer) not in (Adam, AdamW):
        problem = "only torch.optim.Adam and AdamW have settings that carry over"
    elif optimizer.state:
        problem = "it has state already, which would be lost"
    elif has_step_hooks(optimizer):
        problem = "hooks are registered on its step, which would be lost"
    elif any(group["amsgrad"] for group in groups):
        problem = "PopRiskAdamW has no amsgrad"
    elif any(group["differentiable"] for group in groups):
        problem = "PopRiskAdamW is not differentiable"
    elif any(_is_coupled(optimizer, group) for group in groups):
        problem = (
            "its weight_decay is added to the gradient (coupled), PopRiskAdamW's is decoupled; "
            "return AdamW, or Adam with weight_decay=0"
        )
    else:
        return
    raise MisconfigurationException(f"PopRiskOptimizer cannot replace {name}: {problem}.")


def _is_coupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))
    return group["weight_decay"] != 0 and not decoupled
