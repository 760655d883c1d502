"""Logs what the gate did."""

from typing import Any

from poprisk_integrations.distributed import is_dtensor, mean_over_ranks
from poprisk_integrations.lightning._upstream import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
)
from poprisk_integrations.optim import PopRiskAdamW

__all__ = ["PopRiskMonitor"]


class PopRiskMonitor(Callback):
    """Logs PopRiskAdamW's gate statistics as `poprisk/open_fraction`, `poprisk/mean_gate`, ...

    See `PopRiskAdamW.gate_stats` for their meaning. Sampled at the first optimizer step of a fit
    and every `every_n_steps` after it; loggers get the last sample at the trainer's
    `log_every_n_steps`. Training is not changed.

    Args:
        every_n_steps: Optimizer steps between samples, >= 1.

    Raises:
        ValueError: If `every_n_steps` is not an integer >= 1.
        MisconfigurationException: When training starts, if the module does not have exactly one
            PopRiskAdamW.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if type(every_n_steps) is not int or every_n_steps < 1:
            raise ValueError(f"Invalid every_n_steps: {every_n_steps!r}. Must be an integer >= 1.")
        self.every_n_steps = every_n_steps
        self._steps = 0  # of this fit
        self._global_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch sampling on; after a resume too, since it is not part of the checkpoint."""
        for group in _gated_optimizer(trainer).param_groups:
            group["collect_stats_every"] = self.every_n_steps
        self._steps = 0
        self._global_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the sample that this optimizer step has taken."""
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        is_sampled = self._steps % self.every_n_steps == 0
        self._steps += 1
        if is_sampled and not trainer.barebones:
            metrics = _gate_metrics(_gated_optimizer(trainer))
            pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1)


def _gated_optimizer(trainer: Trainer) -> PopRiskAdamW:
    gated = [o for o in trainer.optimizers if isinstance(o, PopRiskAdamW)]
    if len(gated) != 1:
        names = ", ".join(type(o).__name__ for o in trainer.optimizers) or "none"
        raise MisconfigurationException(
            f"PopRiskMonitor needs exactly one PopRiskAdamW, found: {names}. Return one from "
            "configure_optimizers, or add the callback PopRiskOptimizer."
        )
    return gated[0]


def _gate_metrics(optimizer: PopRiskAdamW) -> dict[str, float]:
    """Totals of the last sample. Every rank calls it: shards of a tensor are added over ranks."""
    sums = None
    if any(is_dtensor(p) for group in optimizer.param_groups for p in group["params"]):
        sums = mean_over_ranks(optimizer.gate_sums())
    stats = optimizer.gate_stats(sums)
    return {f"poprisk/{name}": float(v) for name, v in stats.items() if "/" not in name}
