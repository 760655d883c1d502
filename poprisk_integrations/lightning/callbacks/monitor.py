"""Logs what the gate did."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from poprisk_integrations.diagnostics.gate_monitor import GateMonitor, check_monitor
from poprisk_integrations.diagnostics.guard import Guarded, guarded
from poprisk_integrations.lightning._upstream import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    hook_scale,
    is_logger_step,
    write_line,
)
from poprisk_integrations.optim import PopRiskAdamW

__all__ = ["PopRiskMonitor"]


class PopRiskMonitor(Guarded, Callback):
    """Logs PopRiskAdamW's gate and noise as `poprisk/open_fraction`, `poprisk/mean_gate`, ...

    See `PopRiskAdamW.gate_stats` for the gate's statistics, `diagnostics.layer_sample.LayerSample`
    for `poprisk/signal_to_noise` and `poprisk/predicted_decrease` (before clipping). Sampled at
    the first optimizer step of a fit and every `every_n_steps` after it; loggers get the last
    sample at the trainer's `log_every_n_steps`. Training is not changed.

    Args:
        every_n_steps: Optimizer steps between samples, >= 1.
        per_layer: Log also `poprisk/<layer>/open_fraction`, ..., of layers of the module. True for
            its numbered blocks ("model.layers.3") and the modules outside of them, 30 groups at
            most; an integer for so many leading parts of the parameters' names; or a function
            from a parameter's name to its group (None for no group). Off by default: six numbers
            per layer.

    Raises:
        ValueError: If an argument has a value that it cannot have.
        MisconfigurationException: When training starts, if the module does not have exactly one
            PopRiskAdamW.
    """

    def __init__(
        self, every_n_steps: int = 50, per_layer: bool | int | Callable[[str], str | None] = False
    ) -> None:
        check_monitor(every_n_steps, per_layer)
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self._global_step = 0
        self._monitor: GateMonitor | None = None
        self._last: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch sampling on; after a resume too, since it is not part of the checkpoint."""
        self.switched_off = None
        gated = [o for o in trainer.optimizers if isinstance(o, PopRiskAdamW)]
        if len(gated) != 1:
            found = ", ".join(type(o).__name__ for o in trainer.optimizers) or "none"
            raise MisconfigurationException(
                f"PopRiskMonitor needs exactly one PopRiskAdamW, found: {found}. Return one from "
                "configure_optimizers, or add the callback PopRiskOptimizer."
            )
        names = pl_module.named_parameters()
        monitor = GateMonitor(gated[0], names, self.per_layer, self.every_n_steps)
        self._monitor, self._last = None if trainer.barebones else monitor, {}
        self._global_step = trainer.global_step

    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Sample the gradients of a step that is sampled."""
        if self._monitor is not None and isinstance(optimizer, PopRiskAdamW):
            self._monitor.before_step(hook_scale(trainer, optimizer))

    @guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the sample that this optimizer step has taken."""
        if trainer.global_step == self._global_step or self._monitor is None:
            return
        self._global_step = trainer.global_step
        is_due = self._monitor.after_step()
        if is_due:
            self._last = self._monitor.metrics(trainer.strategy.root_device)
        # Not by `log`, which costs time per value at every step of the run.
        is_logged_now = is_logger_step(trainer)
        if is_due or is_logged_now:
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in self._last.items()})
        if is_logged_now:
            write_line(trainer, self._last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizer."""
        self._monitor = None
