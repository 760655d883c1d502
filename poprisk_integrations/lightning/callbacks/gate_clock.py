"""How far the gate of PopRiskAdamW is open: only then does training time pass."""

import torch
from torch.optim import Optimizer

from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.optim import PopRiskAdamW
from poprisk_integrations.optim._gate_stats import COLUMNS

__all__ = ["GateClock"]


class GateClock:
    """Samples PopRiskAdamW's mean gate at single steps; other optimizers have a gate of 1.

    A sample changes nothing but what `gate_stats()` shows: the period that a user or
    PopRiskMonitor has set goes on unchanged.

    Args:
        optimizer: Any torch optimizer.
        device: Of the process group's tensors.

    Attributes:
        gate: Mean over all coordinates, and shards, at the last sample taken; 1 before.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device | str) -> None:
        self.gate = 1.0
        self._optimizer = optimizer if isinstance(optimizer, PopRiskAdamW) else None
        self._device = device
        self._periods: list[int] | None = None

    def sample(self) -> None:
        """Have the coming step measure its gate."""
        if self._optimizer is not None and self._periods is None:
            groups = self._optimizer.param_groups
            self._periods = [group["collect_stats_every"] for group in groups]
            for group in groups:
                group["collect_stats_every"] = 1

    def end_step(self) -> None:
        """Give the groups their own periods back."""
        if self._optimizer is not None and self._periods is not None:
            groups = self._optimizer.param_groups
            for group, period in zip(groups, self._periods, strict=False):
                group["collect_stats_every"] = period
            self._periods = None

    def update(self) -> None:
        """Take the last sample. One host sync and one reduction: every rank must call."""
        if self._optimizer is None:
            return
        sums = mean_over_ranks(self._optimizer.gate_sums().to(self._device)).double().sum(0).cpu()
        numel = float(sums[COLUMNS.index("numel")])
        if numel > 0:
            self.gate = float(sums[COLUMNS.index("gate")]) / numel
