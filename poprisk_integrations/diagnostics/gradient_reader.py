"""Between an optimizer's steps and a window: which gradients, of which pass over the data."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from poprisk_integrations.core.window import WindowRatio
from poprisk_integrations.diagnostics.gradient_window import GradientWindow, window_fits
from poprisk_integrations.diagnostics.learning_rate_scaling import largest_lr
from poprisk_integrations.diagnostics.run_length import RunPlan, setup_changes
from poprisk_integrations.distributed import is_dtensor, world_size

__all__ = ["GradientReader", "fsdp1_group"]

_RESTARTS = 3  # in a row, without a window that ended in between: it will not end by itself
# How entries of `setup` were called in older checkpoints.
_OLDER = {
    "world size": "world_size",
    "per-device batch size": "batch_size",
    "accumulation steps": "accumulation_steps",
    "window steps": "window_steps",
    "accumulate_grad_batches": "accumulation_steps",
}


class GradientReader:
    """Feeds a window with an optimizer's gradients, and knows which steps were applied.

    An adapter calls `count_batch` for each micro-batch that was drawn, `read` when the gradients of
    a step are complete, before it is made, `step_ends` after the last micro-batch of a step and
    then `take_lr` and, if the window is full, `close`; `release` in the end. A hook on the
    optimizer's step, which does not fire when a grad scaler skips it, tells what was applied.

    Accumulation, batch size and the length of the run may change while it trains: windows follow
    the plan (`follow`), and an unfinished one starts afresh. An example counts as seen before when
    the batches drawn are as many as one pass over the data has (`data_pass`), which an epoch of
    the trainer need not be.
    """

    def __init__(
        self,
        optimizer: Any,
        plan: RunPlan,
        *,
        accumulator: str = "auto",
        shard_group: Any = None,
        warn: Callable[[str], None],
    ) -> None:
        self.plan = plan  # lengths of windows and passes at the moment
        self._accumulator, self._shard_group, self._warn = accumulator, shard_group, warn
        self._listen_to(optimizer)
        self.window = self._new_window()
        sharded = any(is_dtensor(p) for p in self.parameters())
        self.is_sharded = shard_group is not None or sharded  # each rank holds its own part
        self.lr = largest_lr(optimizer)  # of the last step
        # Passes over the data, as far as their length is known: now, and at the last step.
        self.passes = self._passes_before = 0.0
        self.reused = False  # whether the window's examples had been trained on before it started
        self._was_applied = False
        self._has_warned: set[str] = set()

    def parameters(self) -> list[Tensor]:
        """The optimizer's parameters."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    @property
    def setup(self) -> dict[str, Any]:
        """What decides how a window's numbers compare with those of another run's window."""
        return {
            "window_steps": self.plan.window,
            "epoch_steps": self.plan.epoch_steps,
            "world_size": world_size(),
            "batch_size": self.plan.batch_size,
            "accumulation_steps": self.plan.accumulation,
            "accumulator": self._accumulator,
        }

    def follow(self, plan: RunPlan) -> list[str]:
        """Let windows follow a run that has changed; what changed for them, as text."""
        before, old, self.plan = self.setup, self.plan, plan
        changes = setup_changes(before, self.setup)
        if old.pass_batches and plan.pass_batches and plan.batch_size == old.batch_size:
            # Data that have grown are new to the run, however often the others were drawn.
            self.passes *= min(1.0, old.pass_batches / plan.pass_batches)
            self._passes_before = self.passes
        if changes:
            self.window = self._new_window()
        return changes

    def count_batch(self) -> None:
        """Account for a micro-batch that was drawn."""
        if self.plan.pass_batches is not None:
            self.passes += 1 / self.plan.pass_batches

    def read(
        self, optimizer: Any, steps: int, *, scale: float | Tensor = 1.0, count: bool = True
    ) -> None:
        """Read the learning rate and, unless `count` is False, the gradients of the coming step.

        There are `steps` optimizer steps before it; `scale` makes the gradients those of the mean
        loss of the step's examples. Another optimizer than before is followed.
        """
        self.lr = largest_lr(optimizer)
        if optimizer is not self._optimizer:
            self._handle_remove()
            self._listen_to(optimizer)
        if not count:
            return
        self._add(scale)
        if self.window.seen == 1:  # also where the trained parameters have changed
            # Whether a whole pass over the data was drawn before this step's batches.
            self.reused = self._passes_before >= 1 - 1e-9  # a sum of floats
            if self.plan.asked:
                self.reused = steps >= (self.plan.epoch_steps or 0)
        if self.window.restarts >= _RESTARTS:
            self._warn_once(
                "restarts",
                "the trained parameters change (frozen, thawed or added) before a window of "
                f"{self.plan.window} steps ends, so nothing is measured. Set window to fewer steps "
                "than lie between two changes.",
            )

    def step_ends(self) -> None:
        """Account for an optimizer step."""
        self._passes_before = self.passes

    @property
    def owed_lr(self) -> float | None:
        """`lr` of a step that was applied and not taken; None if there is none."""
        return self.lr if self._was_applied else None

    def take_lr(self) -> float:
        """`lr` of the step that has just ended; 0 if it was skipped."""
        applied, self._was_applied = self._was_applied, False
        return self.lr if applied else 0.0

    def close(self, step: int) -> WindowRatio | None:
        """End the window; None where nothing was measured. Every rank must call."""
        closed = self.window.close()
        if closed is None or closed.ratio != closed.ratio:
            self._warn_once(
                "empty",
                f"the window that ended at step {step} had fewer than four steps with finite, "
                "varying gradients and does not count.",
            )
        return closed

    def state_dict(self) -> dict[str, Any]:
        """Its numbers and the unfinished window, on its devices; None for one that is sharded.

        A checkpoint keeps the state of rank 0 only.
        """
        return {
            "window": None if self.is_sharded else self.window.state_dict(),
            "reused": self.reused,
            "passes": self.passes,
            "owed_lr": self.owed_lr,  # of a step after which another callback saved first
        }

    def resume(
        self,
        state: Mapping[str, Any],
        steps: int,
        before: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        *,
        was_open: bool = True,
    ) -> str | None:
        """Continue a checkpoint's window, if it is of the same kind as the coming ones.

        `state` is what `state_dict` gave after so many optimizer `steps`, `before` the `setup` and
        `settings` of that run (no window depends on the latter), `was_open` whether it may have
        been within a window. Gives a line to warn with; None if the run continues as if it had
        never been interrupted.
        """
        before = {_OLDER.get(key, key): value for key, value in before.items()}
        self.passes = state["passes"] or 0.0
        # A run that did not count batches has None.
        if state["passes"] is None and self.plan.pass_batches is not None:
            self.passes = steps * self.plan.accumulation / self.plan.pass_batches
        if state.get("owed_lr") is not None:
            self.lr, self._was_applied = state["owed_lr"], True
            self.count_batch()
        self._passes_before = self.passes
        keep_window = not setup_changes(before, self.setup)
        lost = self._resume_window(state["window"]) if keep_window else ""
        if lost is None and state["window"] is not None:
            self.reused = bool(state["reused"])
        changes = setup_changes(before, {**self.setup, **(settings or {})})
        if changes:
            window = "." if keep_window else "; the unfinished window starts afresh."
            return f"resumed with {', '.join(changes)}. What was counted so far is kept{window}"
        if not lost or not was_open:
            return None
        return f"{lost}. An unfinished window starts afresh, so the stop may come at another step."

    def release(self) -> dict[str, Any]:
        """Let go of the optimizer; returns the state with tensors on the CPU."""
        self._handle_remove()
        state: dict[str, Any] = _on_cpu(self.state_dict())
        return state

    def _resume_window(self, state: Mapping[str, Any] | None) -> str | None:
        """Why the window starts afresh; None if nothing was lost."""
        if self.is_sharded:
            return "windows of sharded gradients are not in the checkpoint"
        if state is not None and not window_fits(state, self.parameters()):
            return "the checkpoint's window does not fit the trained parameters"
        if state is not None:
            self.window.load_state_dict(state)
            if self.window.is_full:  # saved after its last step, before it was closed
                self.window.place(self.parameters())
        return None

    def _new_window(self) -> GradientWindow:
        return GradientWindow(
            self.plan.window,
            accumulator=self._accumulator,  # type: ignore[arg-type]
            shard_group=self._shard_group,
            epoch_steps=self.plan.epoch_steps,
        )

    def _add(self, scale: float | Tensor) -> None:
        self.window.add(self.parameters(), scale=scale)

    def _listen_to(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        self._handle: Any = None
        if isinstance(inner, Optimizer):
            self._handle = inner.register_step_post_hook(self._note_applied)

    def _note_applied(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimizers under a grad scaler are told what it found, and skip by themselves.
        found_inf = getattr(optimizer, "found_inf", None)
        self._was_applied = found_inf is None or not bool(found_inf)

    def _handle_remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _warn_once(self, topic: str, line: str) -> None:
        if topic not in self._has_warned:
            self._has_warned.add(topic)
            self._warn(line)


def fsdp1_group(model: nn.Module | None) -> Any:
    """Process group over which FSDP1 shards, as plain tensors; None if it does not."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    for module in model.modules() if model is not None else ():
        if isinstance(module, FullyShardedDataParallel):
            is_whole = module.sharding_strategy is ShardingStrategy.NO_SHARD
            return None if is_whole else module.process_group
    return None


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_cpu(v) for key, v in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value
