"""What the gate of PopRiskAdamW did, at chosen steps of a run: for the logs of every framework."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.diagnostics.layer_sample import LayerNaming, LayerSample, check_per_layer
from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.optim import PopRiskAdamW
from poprisk_integrations.optim._gate_stats import COLUMNS, gate_ratios, gated_optimizer

__all__ = ["GateMonitor", "GateSampler", "check_monitor", "gate_metrics", "joint_mean"]


class GateMonitor:
    """Samples gate, noise and layers at the first step of a run and every n-th after it.

    An adapter calls `before_step` when the gradients of a step are complete and `after_step` once
    it was made. `names` are the named parameters of the model.
    """

    def __init__(
        self,
        optimizer: PopRiskAdamW,
        names: Iterable[tuple[str, Tensor]],
        per_layer: LayerNaming,
        every: int,
    ) -> None:
        for group in optimizer.param_groups:  # whatever period a checkpoint brought along
            group["collect_stats_every"] = every
        self._optimizer, self._every = optimizer, every
        self._sample = LayerSample(optimizer, names, per_layer)
        self._steps = 0

    @property
    def groups(self) -> list[str]:
        """The layers that are told apart."""
        return self._sample.groups

    def before_step(self, scale: float | Tensor = 1.0) -> None:
        """Look at the gradients, times `scale`, of a step that is sampled."""
        if self._steps % self._every == 0:
            self._sample.before_step(scale)

    def after_step(self) -> bool:
        """Look at the step; whether it was sampled."""
        is_due = self._steps % self._every == 0
        if is_due:
            self._sample.after_step()
        self._steps += 1
        return is_due

    def metrics(self, device: Any) -> dict[str, float]:
        """The last sample as `poprisk/<name>`; empty before the first. Every rank must call it.

        Shards of a tensor are added over ranks, in whichever way they are sharded; whole tensors
        stay as they are, since only ratios of the sums are read.
        """
        gate, layers = joint_mean([self._optimizer.gate_sums(), self._sample.sums()], device)
        found = {**_total_metrics(gate), **self._sample.metrics(layers)}
        return {f"poprisk/{name}": value for name, value in found.items()}


class GateSampler:
    """Samples the gate at chosen steps, in groups that have no period of their own.

    A period of the optimizer counts the steps of a process, so a resumed run would sample other
    steps than an uninterrupted one. Any optimizer will do, wrapped or not.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = gated_optimizer(optimizer)
        self._chosen: list[dict[str, Any]] = []

    def before_step(self) -> None:
        """Sample the step to come."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        self._chosen = [group for group in groups if not group["collect_stats_every"]]
        for group in self._chosen:
            group["collect_stats_every"] = 1

    def after_step(self) -> None:
        """No more, until `before_step`."""
        for group in self._chosen:
            group["collect_stats_every"] = 0
        self._chosen = []


def check_monitor(every_n_steps: Any, per_layer: Any) -> None:
    """Raise ValueError for a period or a naming of layers that a monitor cannot have."""
    if type(every_n_steps) is not int or every_n_steps < 1:
        raise ValueError(f"Invalid every_n_steps: {every_n_steps!r}. Must be an integer >= 1.")
    check_per_layer(per_layer)


def gate_metrics(optimizer: Any, device: Any) -> dict[str, float]:
    """Totals of the last sample as `poprisk/<name>`; empty for other optimizers. Every rank."""
    gated = gated_optimizer(optimizer)
    if gated is None:
        return {}
    (sums,) = joint_mean([gated.gate_sums()], device)
    return {f"poprisk/{name}": value for name, value in _total_metrics(sums).items()}


def joint_mean(tensors: Sequence[Tensor], device: Any) -> list[Tensor]:
    """Means over all ranks in one collective, on the host."""
    device = torch.device(device)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    flat = torch.cat([t.detach().to(device, dtype).reshape(-1) for t in tensors])
    parts = torch.split(mean_over_ranks(flat).cpu(), [t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _total_metrics(sums: Tensor) -> dict[str, float]:
    """Empty where no coordinate was sampled on any rank."""
    total = sums[:, : len(COLUMNS)].sum(0)
    if total[0] == 0:
        return {}
    stats = {**gate_ratios(total), "skipped_nonfinite": sums[0, -2] / sums[0, -1]}
    return {name: float(value) for name, value in stats.items()}
