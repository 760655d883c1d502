"""Sums and counts behind `gate_stats()`, additive over parameters and ranks."""

from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.optim._work import PooledGate

__all__ = [
    "COLUMNS",
    "StepRecord",
    "gate_ratios",
    "gated_optimizer",
    "named_ratios",
    "parameter_sums",
    "pooled_gate",
    "pooled_sums",
    "row_of_sums",
    "ungated_sums",
]

COLUMNS = (
    "numel",
    "open",
    "gate",
    "ungated_sq",
    "gated_sq",
    "closed_zero_grad",
    "closed_noise",
    "lr_numel",
)


def row_of_sums(
    numel: Tensor,
    n_open: Tensor,
    gate: Tensor,
    ungated_sq: Tensor,
    gated_sq: Tensor,
    n_dead: Tensor,
    lr: float | Tensor,
) -> Tensor:
    """The columns in their order, in the dtype of `numel`."""
    row = [numel, n_open, gate, ungated_sq, gated_sq, n_dead, numel - n_open - n_dead, numel * lr]
    return torch.stack([column.to(numel.dtype) for column in row])


def parameter_sums(
    mean_sq: Tensor,
    noise: Tensor,
    gate: Tensor,
    direction: Tensor,
    alpha: float | Tensor,
    lr: float | Tensor,
) -> Tensor:
    """The columns of one parameter at one step, no host sync.

    Takes m^2, s, the gate q that was applied, and the ungated direction up to a constant. A
    coordinate is open where m^2 > alpha * s.
    """
    is_open = mean_sq > alpha * noise
    numel = mean_sq.new_full((), float(mean_sq.numel()))
    return row_of_sums(
        numel,
        is_open.sum(),
        gate.sum(),
        direction.square().sum(),
        (direction * gate).square().sum(),
        (~is_open & (mean_sq == 0)).sum(),
        lr,
    )


def pooled_sums(pooled: PooledGate, direction: Tensor, lr: float | Tensor) -> Tensor:
    """The columns of a parameter whose coordinates share gates; each coordinate counts."""
    gate = pooled.gate.to(direction.dtype)
    numel = direction.new_full((), float(direction.numel()))
    share = numel / max(1, gate.numel())  # coordinates to a gate
    return row_of_sums(
        numel,
        pooled.is_open.sum() * share,
        gate.sum() * share,
        direction.square().sum(),
        (direction * gate).square().sum(),
        pooled.is_dead.sum() * share,
        lr,
    )


def ungated_sums(direction: Tensor, lr: float | Tensor) -> Tensor:
    """The columns of a parameter whose update is not gated at this step: all open."""
    numel = direction.new_full((), float(direction.numel()))
    norm_sq = direction.square().sum()
    return row_of_sums(numel, numel, numel, norm_sq, norm_sq, torch.zeros_like(numel), lr)


class StepRecord:
    """What an optimizer remembers beside its states: skipped steps, and sums of sampled ones.

    No part of the trajectory: it is never checkpointed, and copies of an optimizer start anew.
    """

    def __init__(self) -> None:
        self.skipped: Tensor | None = None  # steps skipped for a non-finite gradient
        self.idle = 0  # steps that found no gradient at all
        self.pooled: dict[int, PooledGate] = {}  # of the last step, by the parameter's id
        self.samples: dict[int, Tensor] = {}  # by group: sums of the last sampled step
        self._offered: dict[int, int] = {}  # by group: steps that could have been sampled

    def skipped_on(self, device: torch.device) -> Tensor:
        """The count of skipped steps, made where it is first needed and never replaced."""
        if self.skipped is None:
            self.skipped = torch.zeros((), device=device)
        return self.skipped

    def is_sampled(self, index: int, every: int) -> bool:
        """Whether this step of a group is one of every `every`, the first included."""
        if not every:
            return False
        offered = self._offered.get(index, 0)
        self._offered[index] = offered + 1
        return offered % every == 0

    def sums(self, groups: int) -> Tensor:
        """Rows of all groups: the columns, the number of skipped steps, and 1 for this rank."""
        like = next(iter(self.samples.values()), self.skipped)
        device = torch.device("cpu") if like is None else like.device
        rows = torch.zeros(groups, len(COLUMNS) + 2, device=device)
        for index, row in self.samples.items():
            rows[index, : len(COLUMNS)] = row.to(rows)
        if self.skipped is not None:
            rows[:, -2] = self.skipped.to(rows)
        rows[:, -1] = 1
        return rows


def gate_ratios(sums: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """Readable ratios from one row of sums, possibly added over parameters and ranks."""
    row = dict(zip(COLUMNS, sums.double().cpu(), strict=True))
    numel = row["numel"].clamp(min=1)
    ratio = (row["gated_sq"] / row["ungated_sq"]).sqrt() if row["ungated_sq"] > 0 else numel * 0 + 1
    stats = {
        "open_fraction": row["open"] / numel,
        "mean_gate": row["gate"] / numel,
        "update_norm_ratio": ratio,
        "closed_zero_grad": row["closed_zero_grad"] / numel,
        "closed_noise": row["closed_noise"] / numel,
        "effective_lr": row["lr_numel"] / numel * ratio,
    }
    return {prefix + name: value for name, value in stats.items()}


def named_ratios(rows: Tensor) -> dict[str, Tensor]:
    """All statistics from `StepRecord.sums`, added over ranks or not, with one device sync."""
    host = rows.double().cpu()
    columns = host[:, : len(COLUMNS)]
    stats = gate_ratios(columns.sum(0))
    stats["skipped_nonfinite"] = host[0, -2] / host[0, -1]
    for index, row in enumerate(columns):
        if row[0] > 0:
            stats.update(gate_ratios(row, f"group{index}/"))
    return stats


def pooled_gate(optimizer: Any, param: Tensor) -> PooledGate | None:
    """The gates of a parameter's rows or tensor at the last step; None where it has none."""
    record = vars(optimizer).get("_poprisk_record")
    return None if record is None else record.pooled.get(id(param))


def gated_optimizer(optimizer: Any) -> Any:
    """The PopRiskAdamW under the wrappers of accelerate and DeepSpeed; None if there is none."""
    while optimizer is not None and not hasattr(optimizer, "gate_sums"):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
