"""Between a Trainer and a window: which gradients, on what scale, of which pass over the data."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk_integrations.core import WindowRatio
from poprisk_integrations.distributed import mean_over_ranks
from poprisk_integrations.lightning._upstream import (
    LightningModule,
    Trainer,
    gradients_stay_scaled,
    loss_scale,
)
from poprisk_integrations.lightning.callbacks.gradient_reader import GradientReader
from poprisk_integrations.lightning.callbacks.refusals import only_optimizer
from poprisk_integrations.lightning.callbacks.run_length import (
    loader_batch_size,
    steps_per_epoch,
    window_steps,
)
from poprisk_integrations.lightning.callbacks.shard_group import plain_shard_group

__all__ = ["NO_FEED", "StepFeed", "over_ranks"]

# A state of before the first step.
NO_FEED: dict[str, Any] = {"window": None, "is_open": False, "reused": False}


class StepFeed:
    """Reads each optimizer step of a Trainer once, for one callback.

    Make it in `on_train_start`; call `count_micro_batch` in `on_after_backward`, `read` in
    `on_before_optimizer_step`, `has_stepped` in `on_train_batch_end` and, if that is so,
    `take_lr` and, if `is_full`, `close`; `release` in the end.

    Gradients are the mean over the micro-batches of their step. Lightning divides each
    micro-batch's loss by N = `accumulate_grad_batches`, also where an epoch ends after k < N of
    them: such a step is multiplied by N / k. Those of a fused optimizer under fp16 are divided
    by the loss scale.

    Args:
        trainer: Training.
        pl_module: Its module.
        owner: Name of the callback, for error messages.
        window: Steps per window, or "auto".
        accumulator: As in `GradientWindow`.
        epoch_steps: Optimizer steps of one pass over the data; None for the trainer's own count.

    Attributes:
        step: The trainer's optimizer steps so far.
        steps: Optimizer steps per window.
        epoch_steps: Of one pass over the data; None if unknown.
        reused: Whether the window's examples had been trained on before it started.
        reader: What reads the optimizer.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        *,
        owner: str,
        window: int | str,
        accumulator: Literal["auto", "exact", "sample"] = "auto",
        epoch_steps: int | None = None,
    ) -> None:
        optimizer = only_optimizer(trainer, pl_module, owner)
        self._asked_epoch_steps = epoch_steps
        self.epoch_steps = steps_per_epoch(trainer) if epoch_steps is None else epoch_steps
        self.steps = window_steps(trainer, window, self.epoch_steps)
        self.step = trainer.global_step
        self.reused = False
        self.reader = GradientReader(
            optimizer,
            self.steps,
            accumulator=accumulator,
            shard_group=plain_shard_group(trainer),
            epoch_steps=self.epoch_steps,
        )
        self._micro_batches = 0  # since the last optimizer step
        self._is_open = False  # whether the window has begun

    @property
    def is_full(self) -> bool:
        """Whether the window ended with the last step."""
        return self.reader.window.is_full

    def setup_of(self, trainer: Trainer) -> dict[str, int | str | None]:
        """What decides how a window's numbers compare with those of another run's window."""
        return {
            "window_steps": self.steps,
            "epoch_steps": self.epoch_steps,
            "accumulator": self.reader.window.accumulator,
            "world_size": trainer.world_size,
            "batch_size": loader_batch_size(trainer),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        }

    def count_micro_batch(self) -> None:
        """Account for a backward pass."""
        self._micro_batches += 1

    def read(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Take in the gradients of the coming step; without a backward pass they are stale."""
        micro_batches, self._micro_batches = self._micro_batches, 0
        if micro_batches and not self._is_open:
            self._is_open = True
            self.reused = self._is_second_pass(trainer)
        scale: float | Tensor = trainer.accumulate_grad_batches / max(1, micro_batches)
        if gradients_stay_scaled(trainer, optimizer):
            scale = scale / loss_scale(trainer)
        self.reader.read(optimizer, scale=scale, count=micro_batches > 0)

    def has_stepped(self, trainer: Trainer) -> bool:
        """Whether the trainer has made an optimizer step since the last call."""
        before, self.step = self.step, trainer.global_step
        return before != self.step

    def take_lr(self) -> float:
        """Training time of the step that has just ended, on this rank."""
        return self.reader.take_lr()

    def close(self) -> WindowRatio | None:
        """End the window. Every rank must call."""
        self._is_open = False
        return self.reader.close()

    def state_dict(self) -> dict[str, Any]:
        """The unfinished window and what belongs to it, tensors on their devices."""
        return self._state(self.reader.state_dict())

    def load_state_dict(self, state: dict[str, Any], *, keep_window: bool) -> str | None:
        """Continue.

        Args:
            state: From `state_dict`.
            keep_window: Whether to continue the unfinished window.

        Returns:
            Why the window starts afresh although it was to be kept; None if it does not.
        """
        if not keep_window:
            return None
        lost = self.reader.resume(state["window"])
        if lost is None and state["window"] is not None:
            self._is_open, self.reused = state["is_open"], state["reused"]
        return lost

    def release(self) -> dict[str, Any]:
        """Let go of the optimizer; returns the state with tensors on the CPU."""
        return self._state(self.reader.release())

    def _state(self, window: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "window": window,
            "is_open": self._is_open,
            "reused": self.reused,
        }

    def _is_second_pass(self, trainer: Trainer) -> bool:
        if self._asked_epoch_steps is not None:
            return trainer.global_step >= self._asked_epoch_steps
        return trainer.current_epoch > 0


def over_ranks(trainer: Trainer, value: float) -> float:
    """Mean of a number over ranks, the same bits on each; every rank must call."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)
    return float(mean_over_ranks(tensor))
