"""Gate statistics of PopRiskAdamW under Trainer."""

from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.optim import PopRiskAdamW
from poprisk_integrations.optim._gate_stats import COLUMNS, gate_ratios

__all__ = [
    "GateSampler",
    "gate_metrics",
    "sample_gate_stats",
    "total_metrics",
    "unwrap_optimizer",
]


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer under the wrappers of accelerate and DeepSpeed."""
    while not isinstance(optimizer, PopRiskAdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def sample_gate_stats(optimizer: Any, every_n_steps: int) -> bool:
    """Switch sampling on, whatever the period was before.

    Args:
        optimizer: Any optimizer, wrapped or not.
        every_n_steps: Optimizer steps between samples.

    Returns:
        Whether the optimizer has a gate.
    """
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, PopRiskAdamW):
        return False
    for group in optimizer.param_groups:
        group["collect_stats_every"] = every_n_steps
    return True


class GateSampler:
    """Samples the gate at chosen steps, in groups that have no period of their own.

    A period of the optimizer counts the steps of a process, so a resumed run would sample other
    steps than an uninterrupted one.

    Args:
        optimizer: Any optimizer, wrapped or not.
    """

    def __init__(self, optimizer: Any) -> None:
        inner = unwrap_optimizer(optimizer)
        self._optimizer = inner if isinstance(inner, PopRiskAdamW) else None
        self._chosen: list[dict[str, Any]] = []

    def before_step(self) -> None:
        """Sample the step to come."""
        if self._optimizer is not None:
            groups = self._optimizer.param_groups
            self._chosen = [g for g in groups if not g["collect_stats_every"]]
            for group in self._chosen:
                group["collect_stats_every"] = 1

    def after_step(self) -> None:
        """No more, until `before_step`."""
        for group in self._chosen:
            group["collect_stats_every"] = 0
        self._chosen = []


def gate_metrics(optimizer: Any, device: torch.device) -> dict[str, float]:
    """Totals of the last sample as `poprisk/<name>`; empty for other optimizers.

    Every rank must call it: shards of a tensor are added over ranks, in whichever way they are
    sharded; whole tensors stay as they are, since only ratios of the sums are read.

    Args:
        optimizer: Any optimizer, wrapped or not.
        device: Of the ranks' communication.
    """
    optimizer = unwrap_optimizer(optimizer)
    if not isinstance(optimizer, PopRiskAdamW):
        return {}
    return total_metrics(mean_over_ranks(optimizer.gate_sums().to(device)).cpu())


def total_metrics(sums: Tensor) -> dict[str, float]:
    """Totals as `poprisk/<name>`; empty where no coordinate was sampled on any rank.

    Args:
        sums: `PopRiskAdamW.gate_sums()`, added or averaged over ranks.
    """
    total = sums[:, : len(COLUMNS)].sum(0)
    if total[0] == 0:
        return {}
    stats = {**gate_ratios(total), "skipped_nonfinite": sums[0, -2] / sums[0, -1]}
    return {f"poprisk/{name}": float(v) for name, v in stats.items()}
