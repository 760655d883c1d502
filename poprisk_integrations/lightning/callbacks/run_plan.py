"""What a run looks like at the moment: numbers that a window depends on and that may change."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from poprisk_integrations.diagnostics.data_pass import DataPass, joint_data_pass
from poprisk_integrations.lightning._upstream import Trainer, training_loaders
from poprisk_integrations.lightning.callbacks.run_length import (
    loader_batch_size,
    pass_steps,
    window_steps,
)

__all__ = ["RunPlan", "largest_over_ranks", "run_plan", "run_shape", "setup_changes"]

_LENGTHS = ("window", "epoch_steps", "pass_batches", "batch_size", "accumulate_grad_batches")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """Lengths, and what they were computed from.

    Attributes:
        window: Optimizer steps of a window.
        epoch_steps: Optimizer steps of one pass over the data; None if unknown.
        pass_batches: Batches of one; None if unknown.
        unknown_because: Why it is unknown; "" if it is not.
        world_size: Processes.
        batch_size: Examples in a batch of one process; None if unknown.
        accumulate_grad_batches: Batches of a step.
    """

    window: int
    epoch_steps: int | None
    pass_batches: int | None
    unknown_because: str
    world_size: int
    batch_size: int | None
    accumulate_grad_batches: int

    @property
    def setup(self) -> dict[str, int | str | None]:
        """What decides how a window's numbers compare with those of another window."""
        return {
            "window_steps": self.window,
            "epoch_steps": self.epoch_steps,
            "world_size": self.world_size,
            "batch_size": self.batch_size,
            "accumulate_grad_batches": self.accumulate_grad_batches,
        }


def run_plan(trainer: Trainer, window: int | str, epoch_steps: int | None) -> RunPlan:
    """The present plan, the same on all ranks: their loaders may differ. Every rank must call.

    Args:
        trainer: Fitting, so that it knows its data.
        window: Steps, or "auto".
        epoch_steps: The user's optimizer steps of one pass; None to ask the loaders.
    """
    batches, found = trainer.num_training_batches, _data_pass(trainer)
    if epoch_steps is None:
        epoch_steps = pass_steps(found.batches, batches, trainer.accumulate_grad_batches)
    plan = RunPlan(
        window=window_steps(trainer, window, epoch_steps),
        epoch_steps=epoch_steps,
        pass_batches=found.batches,
        unknown_because=found.reason,
        world_size=trainer.world_size,
        batch_size=loader_batch_size(trainer),
        accumulate_grad_batches=trainer.accumulate_grad_batches,
    )
    if trainer.world_size == 1:
        return plan
    own = [getattr(plan, name) for name in _LENGTHS]
    largest = largest_over_ranks(trainer, [math.inf if n is None else n for n in own])
    agreed: dict[str, Any] = {
        n: None if math.isinf(v) else int(v) for n, v in zip(_LENGTHS, largest, strict=True)
    }
    if agreed["pass_batches"] is None and not plan.unknown_because:
        agreed["unknown_because"] = "another process does not know"
    return replace(plan, **agreed)


def largest_over_ranks(trainer: Trainer, values: list[float]) -> list[float]:
    """Elementwise; every rank must call."""
    tensor = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    return trainer.strategy.reduce(tensor, reduce_op="max").tolist()


def run_shape(trainer: Trainer) -> tuple[Any, ...]:
    """Cheap to ask at each step: as long as it is the same, so is the plan."""
    return (
        trainer.accumulate_grad_batches,
        trainer.num_training_batches,
        trainer.max_epochs,
        trainer.max_steps,
        loader_batch_size(trainer),
        *map(id, training_loaders(trainer)),
    )


def setup_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Entries that differ, as "name old -> new", in the order of `now`.

    Example:
        >>> setup_changes({"world_size": 1, "window": 8}, {"world_size": 2, "window": 8})
        ['world_size 1 -> 2']
    """
    return [f"{k} {before[k]} -> {v}" for k, v in now.items() if k in before and before[k] != v]


def _data_pass(trainer: Trainer) -> DataPass:
    every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined] # set outside
    if every:
        why = f"loaders are made anew with reload_dataloaders_every_n_epochs={every}"
        return DataPass(batches=None, reason=why)
    batches = trainer.num_training_batches
    return joint_data_pass(
        training_loaders(trainer), None if batches == float("inf") else int(batches)
    )
