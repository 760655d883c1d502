"""PopRiskAdamW without touching the module."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from poprisk_integrations.lightning._upstream import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    strategy_is,
)
from poprisk_integrations.optim import PopRiskAdamW

__all__ = ["PopRiskOptimizer", "poprisk_adamw_from", "rebind_scheduler"]

# Keys of Adam's groups that PopRiskAdamW has no use for: its decay is always decoupled, and how
# Adam computes its step (foreach, fused) is not how ours does.
_DROPPED = ("amsgrad", "differentiable", "foreach", "fused", "decoupled_weight_decay")
_KEPT = ("lr", "betas", "eps", "weight_decay", "maximize", "capturable")
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class PopRiskOptimizer(Callback):
    """Replaces the Adam or AdamW that `configure_optimizers` returns by PopRiskAdamW.

    Same parameter groups, learning rates, betas, eps and weight decay; learning-rate schedulers
    are re-bound. It happens in `on_fit_start`: after the strategy has wrapped the module, before
    a checkpoint's optimizer states are restored, so checkpoints of AdamW and of PopRiskAdamW both
    load (with the gate options that PopRiskAdamW's checkpoint was written with). List it before
    callbacks that keep the optimizer from `on_fit_start` on. `Tuner.lr_find` and
    `scale_batch_size` run without callbacks, hence with the module's own optimizer.

    A parameter group of the module may carry any of these options, e.g.
    `{"params": router, "gate": "none"}`; the ones given here are for groups without their own.

    Args:
        **options: Options of `PopRiskAdamW`, with its defaults. Not those that are Adam's own: lr,
            betas, eps, weight_decay, maximize, foreach, fused, capturable, differentiable.
            `noise_source="microbatch"` needs accumulate_grad_batches >= 2, "ranks" needs DDP;
            the callback PopRiskMonitor sets `collect_stats_every`.

    Raises:
        ValueError: If an option has a value that it cannot have, or is Adam's own.
        MisconfigurationException: When `fit` starts, for any other optimizer, by name, for one
            whose settings or state would be lost, and under DeepSpeed.

    Example:
        >>> PopRiskOptimizer(gate="hard", false_open_rate=0.01).options["gate"]
        'hard'
    """

    def __init__(self, **options: Any) -> None:
        for name in options:
            if name in (*_KEPT, "foreach", "fused", "differentiable"):
                raise ValueError(
                    f"Invalid {name}: {options[name]!r}. PopRiskOptimizer takes it from the Adam "
                    "that it replaces: set it in configure_optimizers."
                )
        # Refuses bad values now, not in fit. LightningCLI lists the options of this call, without
        # those that are named in it.
        PopRiskAdamW(
            [torch.zeros(1)],
            lr=0.0,
            betas=(0.0, 0.0),
            eps=0.0,
            weight_decay=0.0,
            maximize=False,
            foreach=None,
            fused=None,
            capturable=False,
            differentiable=False,
            **options,
        )
        self.options = options

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace every optimizer and re-bind its schedulers."""
        if strategy_is(trainer, "DeepSpeedStrategy"):
            raise MisconfigurationException(
                "PopRiskOptimizer cannot replace an optimizer under "
                f"{type(trainer.strategy).__name__}: DeepSpeed's engine holds the old one and "
                "would go on stepping it. Return PopRiskAdamW from configure_optimizers, with no "
                '"optimizer" section in the DeepSpeed config.'
            )
        old = trainer.optimizers
        new = [poprisk_adamw_from(optimizer, self.options) for optimizer in old]
        for config in trainer.lr_scheduler_configs:
            index = next(i for i, o in enumerate(old) if o is config.scheduler.optimizer)
            rebind_scheduler(config.scheduler, old[index], new[index])
        trainer.strategy.optimizers = list(new)
        names = " and ".join(sorted({type(o).__name__ for o in old}))
        rank_zero_info(
            f"PopRiskOptimizer: PopRiskAdamW (gate={new[0].defaults['gate']!r}, "
            f"alpha={new[0].defaults['alpha']!r}) replaces {names} over the same "
            f"{sum(len(o.param_groups) for o in new)} parameter group(s)."
        )


def poprisk_adamw_from(optimizer: Optimizer, options: dict[str, Any]) -> PopRiskAdamW:
    """A PopRiskAdamW over the same groups, with `options` for those that have none of their own."""
    _refuse(optimizer)
    groups = [
        {key: value for key, value in group.items() if key not in _DROPPED}
        for group in optimizer.param_groups
    ]
    defaults = {key: optimizer.defaults[key] for key in _KEPT if key in optimizer.defaults}
    replacement = PopRiskAdamW(groups, **{**defaults, **options})
    if any("initial_lr" in group for group in groups):
        # A scheduler wraps its optimizer's `step` when constructed, and warns at its first step if
        # that was replaced since: the new one is to be wrapped too.
        _KeepLR(replacement)
    return replacement


def rebind_scheduler(scheduler: Any, old: Optimizer, new: Optimizer) -> None:
    """Let a scheduler, and those inside it, set the learning rates of another optimizer.

    Covers torch's own (SequentialLR, ChainedScheduler and ReduceLROnPlateau too), and any that
    keeps its optimizer as `.optimizer`.
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
    """Changes no learning rate."""

    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]


def _refuse(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    groups = getattr(optimizer, "param_groups", [])
    if type(optimizer) not in (Adam, AdamW):
        problem = "only torch.optim.Adam and AdamW have settings that carry over"
    elif optimizer.state:
        problem = "it has state already, which would be lost"
    elif any(getattr(optimizer, hooks, None) for hooks in _STEP_HOOKS):
        problem = "hooks are registered on its step, which would be lost"
    elif any(group["amsgrad"] for group in groups):
        problem = "PopRiskAdamW has no amsgrad"
    elif any(group["differentiable"] for group in groups):
        problem = "PopRiskAdamW is not differentiable"
    elif any(
        group["weight_decay"] != 0
        and not group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))
        for group in groups
    ):
        problem = (
            "its weight_decay is added to the gradient (coupled), PopRiskAdamW's is decoupled; "
            "return AdamW, or Adam with weight_decay=0"
        )
    else:
        return
    raise MisconfigurationException(f"PopRiskOptimizer cannot replace {name}: {problem}.")
