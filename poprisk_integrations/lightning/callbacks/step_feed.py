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
    rank_zero_info,
    rank_zero_warn,
)
from poprisk_integrations.lightning.callbacks.gradient_reader import GradientReader
from poprisk_integrations.lightning.callbacks.refusals import only_optimizer
from poprisk_integrations.lightning.callbacks.run_plan import (
    RunPlan,
    largest_over_ranks,
    run_plan,
    run_shape,
    setup_changes,
)
from poprisk_integrations.lightning.callbacks.shard_group import plain_shard_group

__all__ = ["NO_FEED", "StepFeed", "over_ranks"]

# A state of before the first step.
NO_FEED: dict[str, Any] = {
    "window": None,
    "is_open": False,
    "reused": False,
    "passes": None,
    "owed_lr": None,
}

_RESTARTS = 3  # in a row, without a window that ended in between: it will not end by itself


class StepFeed:
    """Reads each optimizer step of a Trainer once, for one callback.

    Make it in `on_train_start`; call `settle` before the first batch, `count_micro_batch` in
    `on_after_backward`, `read` in `on_before_optimizer_step`, `has_stepped` in
    `on_train_batch_end` and, if that is so, `take_lr` and, if `is_full`, `close`; `release` in the
    end.

    Gradients are the mean over the micro-batches of their step. Lightning divides each
    micro-batch's loss by N = `accumulate_grad_batches`, also where an epoch ends after k < N of
    them: such a step is multiplied by N / k. Those of a fused optimizer under fp16 are divided
    by the loss scale.

    Accumulation, batch size and the length of the run may change while it trains
    (GradientAccumulationScheduler): windows follow, and an unfinished one starts afresh. An
    example counts as seen before when the batches drawn are as many as one pass over the data
    has (`diagnostics.data_pass`), which an epoch of the trainer need not be.

    Args:
        trainer: Training.
        pl_module: Its module.
        owner: Name of the callback, for error messages.
        window: Steps per window, or "auto".
        accumulator: As in `GradientWindow`.
        epoch_steps: Optimizer steps of one pass over the data; None to ask the loaders.

    Attributes:
        step: The trainer's optimizer steps so far.
        plan: Lengths of windows and passes at the moment.
        passes: Passes over the data so far, as far as their length is known.
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
        self._owner = owner
        self._asked = (window, epoch_steps)
        self.plan: RunPlan = run_plan(trainer, window, epoch_steps)
        self._shape = run_shape(trainer)
        self.step = trainer.global_step
        self.passes = self._passes_before = 0.0  # now, and at the last optimizer step
        self.reused = False
        self.reader = GradientReader(
            optimizer,
            self.plan.window,
            accumulator=accumulator,
            shard_group=plain_shard_group(trainer),
            epoch_steps=self.plan.epoch_steps,
        )
        self._has_warned = False
        self._micro_batches = 0  # since the last optimizer step
        self._is_open = False  # whether the window has begun

    @property
    def is_full(self) -> bool:
        """Whether the window ended with the last step."""
        return self.reader.window.is_full

    @property
    def setup(self) -> dict[str, int | str | None]:
        """What decides how a window's numbers compare with those of another run's window."""
        return {**self.plan.setup, "accumulator": self.reader.window.accumulator}

    def settle(self, trainer: Trainer) -> None:
        """Look at the run once more before its first batch: callbacks may have changed it."""
        self._plan_anew(trainer)

    def follow(self, trainer: Trainer) -> None:
        """Let windows follow a run that has changed, with a line that says so. Every rank."""
        changes = self._plan_anew(trainer)
        if changes:
            rank_zero_info(
                f"{self._owner}: {', '.join(changes)}; a window of {self.plan.window} steps "
                "starts here."
            )

    def count_micro_batch(self) -> None:
        """Account for a backward pass."""
        self._micro_batches += 1

    def read(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Take in the gradients of the coming step; without a backward pass they are stale."""
        micro_batches, self._micro_batches = self._micro_batches, 0
        if micro_batches and trainer.world_size == 1:  # several agree once an epoch
            self.follow(trainer)
        if micro_batches and not self._is_open:
            self._is_open = True
            self.reused = self._has_seen_all(trainer)
        scale: float | Tensor = trainer.accumulate_grad_batches / max(1, micro_batches)
        if gradients_stay_scaled(trainer, optimizer):
            scale = scale / loss_scale(trainer)
        self.reader.read(optimizer, scale=scale, count=micro_batches > 0)
        if self.reader.window.restarts >= _RESTARTS and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{self._owner}: the trained parameters change (frozen, thawed or added) before a "
                f"window of {self.plan.window} steps ends, so nothing is measured. Set window to "
                "fewer steps than lie between two changes."
            )

    def has_stepped(self, trainer: Trainer) -> bool:
        """Account for a batch; whether the trainer has made an optimizer step with it."""
        self._count_batch()
        before, self.step = self.step, trainer.global_step
        if before == self.step:
            return False
        self._passes_before = self.passes
        return True

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
        """Continue. A state of an older version did not count batches.

        Args:
            state: From `state_dict`.
            keep_window: Whether to continue the unfinished window.

        Returns:
            Why the window starts afresh although it was to be kept; None if it does not.
        """
        self.passes = state["passes"] or 0.0
        if state["passes"] is None and self.plan.pass_batches is not None:
            batches = self.step * self.plan.accumulate_grad_batches
            self.passes = batches / self.plan.pass_batches
        if state["owed_lr"] is not None:
            self.reader.owe(state["owed_lr"])
            self._count_batch()
        self._passes_before = self.passes
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
            "passes": self.passes,
            "owed_lr": self.reader.owed_lr,  # of a step after which another callback saved first
        }

    def _count_batch(self) -> None:
        if self.plan.pass_batches is not None:
            self.passes += 1 / self.plan.pass_batches

    def _plan_anew(self, trainer: Trainer) -> list[str]:
        """Make a new plan if the run is another; what changed for windows, as text."""
        shape = run_shape(trainer)
        is_other = shape != self._shape
        if trainer.world_size > 1:
            is_other = largest_over_ranks(trainer, [float(is_other)]) == [1.0]
        if not is_other:
            return []
        self._shape, (window, epoch_steps) = shape, self._asked
        plan = run_plan(trainer, window, epoch_steps)
        changes = setup_changes(self.plan.setup, plan.setup)
        self.plan = plan
        if changes:
            self.reader.start_anew(plan.window, plan.epoch_steps)
            self._is_open = False
        return changes

    def _has_seen_all(self, trainer: Trainer) -> bool:
        """Whether a whole pass over the data was drawn before the coming step's batches."""
        if self._asked[1] is not None:
            return trainer.global_step >= self._asked[1]
        return self._passes_before >= 1 - 1e-9  # a sum of floats


def over_ranks(trainer: Trainer, value: float) -> float:
    """Mean of a number over ranks, the same bits on each; every rank must call."""
    if trainer.world_size == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=trainer.strategy.root_device)
    return float(mean_over_ranks(tensor))
