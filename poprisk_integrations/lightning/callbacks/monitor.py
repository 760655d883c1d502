"""Logs what the gate did."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk_integrations.diagnostics.guard import Guarded, guarded
from poprisk_integrations.diagnostics.joint_mean import joint_mean
from poprisk_integrations.diagnostics.layer_groups import check_per_layer
from poprisk_integrations.diagnostics.layer_sample import LayerSample
from poprisk_integrations.distributed import is_dtensor
from poprisk_integrations.lightning._upstream import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    gradients_stay_scaled,
    is_logger_step,
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
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ValueError(f"Invalid every_n_steps: {every_n_steps!r}. Must be an integer >= 1.")
        check_per_layer(per_layer)
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self._steps = 0  # of this fit
        self._global_step = 0
        self._sample: LayerSample | None = None
        self._last: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch sampling on; after a resume too, since it is not part of the checkpoint."""
        self.switched_off = None
        optimizer = _gated_optimizer(trainer)
        for group in optimizer.param_groups:
            group["collect_stats_every"] = self.every_n_steps
        self._sample, self._last = None, {}
        if not trainer.barebones:
            names = pl_module.named_parameters()
            self._sample = LayerSample(optimizer, names, self.per_layer)
        self._steps = 0
        self._global_step = trainer.global_step

    @guarded
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Sample the gradients of a step that is sampled."""
        is_ours = isinstance(optimizer, PopRiskAdamW) and self._is_due()
        if self._sample is not None and is_ours and not gradients_stay_scaled(trainer, optimizer):
            self._sample.before_step()

    @guarded
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the sample that this optimizer step has taken."""
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        is_due = self._is_due()
        self._steps += 1
        if self._sample is None:
            return
        if is_due:
            self._sample.after_step()
            optimizer, device = _gated_optimizer(trainer), trainer.strategy.root_device
            self._last = _metrics(optimizer, self._sample, device)
        # Not by `log`, which costs time per value at every step of the run.
        is_logged_now = bool(trainer.loggers) and is_logger_step(trainer)
        if is_due or is_logged_now:
            trainer.callback_metrics.update({k: torch.tensor(v) for k, v in self._last.items()})
        if is_logged_now:
            for logger in trainer.loggers:
                line = {**self._last, "epoch": trainer.current_epoch}
                logger.log_metrics(line, step=trainer.global_step - 1)  # counted from 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizer."""
        self._sample = None

    def _is_due(self) -> bool:
        return self._steps % self.every_n_steps == 0


def _gated_optimizer(trainer: Trainer) -> PopRiskAdamW:
    gated = [o for o in trainer.optimizers if isinstance(o, PopRiskAdamW)]
    if len(gated) != 1:
        names = ", ".join(type(o).__name__ for o in trainer.optimizers) or "none"
        raise MisconfigurationException(
            f"PopRiskMonitor needs exactly one PopRiskAdamW, found: {names}. Return one from "
            "configure_optimizers, or add the callback PopRiskOptimizer."
        )
    return gated[0]


def _metrics(
    optimizer: PopRiskAdamW, sample: LayerSample, device: torch.device
) -> dict[str, float]:
    """The last sample. Every rank calls it: shards of a tensor are added over ranks."""
    gate, layers = optimizer.gate_sums(), sample.sums()
    if any(_is_shard(p) for group in optimizer.param_groups for p in group["params"]):
        gate, layers = joint_mean([gate, layers], device)
    stats = {k: float(v) for k, v in optimizer.gate_stats(gate).items() if "/" not in k}
    return {f"poprisk/{name}": v for name, v in (stats | sample.metrics(layers)).items()}


def _is_shard(param: Tensor) -> bool:
    return is_dtensor(param) or getattr(param, "_fsdp_flattened", False)
