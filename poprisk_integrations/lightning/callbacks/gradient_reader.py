"""What the stopping rule needs from an optimizer, step by step: gradients and training time."""

from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from poprisk_integrations.core import WindowRatio
from poprisk_integrations.diagnostics import GradientWindow, window_fits
from poprisk_integrations.diagnostics.learning_rate_scaling import largest_lr
from poprisk_integrations.distributed import is_dtensor

__all__ = ["GradientReader"]


class GradientReader:
    """Feeds a window with an optimizer's gradients, and knows which steps were applied.

    Call `read` when the gradients are complete, `take_lr` when the step is over, and `close` after
    that where the window is full. It registers a hook on the optimizer's step, which does not
    fire when a grad scaler skips the step; call `release` at the end.

    Args:
        optimizer: Any torch optimizer.
        steps: Optimizer steps per window.
        accumulator: As in `GradientWindow`.
        shard_group: As in `GradientWindow`.
        epoch_steps: As in `GradientWindow`.

    Attributes:
        window: The window.
        is_sharded: Whether each rank holds its own part of the window.
        lr: The learning rate of the last step, of groups with different ones the largest.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps: int,
        *,
        accumulator: Literal["auto", "exact", "sample"] = "auto",
        shard_group: Any = None,
        epoch_steps: int | None = None,
    ) -> None:
        params = _trained_parameters(optimizer)
        self._accumulator, self._shard_group = accumulator, shard_group
        self.start_anew(steps, epoch_steps)
        self.is_sharded = shard_group is not None or any(is_dtensor(p) for p in params)
        self.lr = 0.0
        self._params = params
        self._was_applied = False
        self._listen_to(optimizer)

    def start_anew(self, steps: int, epoch_steps: int | None) -> None:
        """Begin with windows of another length.

        Args:
            steps: Optimizer steps per window.
            epoch_steps: As in `GradientWindow`.
        """
        self.window = GradientWindow(
            steps,
            accumulator=self._accumulator,
            shard_group=self._shard_group,
            epoch_steps=epoch_steps,
        )

    def read(
        self, optimizer: Optimizer, *, scale: float | Tensor = 1.0, count: bool = True
    ) -> None:
        """Read the learning rate and, unless `count` is False, the gradients of one step.

        Args:
            optimizer: The optimizer, before its step; another one than before is followed.
            scale: Makes the gradients those of the mean loss of the step's examples.
            count: Whether there are new gradients.
        """
        self.lr = largest_lr(optimizer)
        if optimizer is not self._optimizer:
            self._handle.remove()
            self._listen_to(optimizer)
        self._params = _trained_parameters(optimizer)
        if count:
            self.window.add(self._params, scale=scale)

    @property
    def owed_lr(self) -> float | None:
        """`lr` of a step that was applied and not taken; None if there is none."""
        return self.lr if self._was_applied else None

    def owe(self, lr: float) -> None:
        """Continue from where such a step was owed."""
        self.lr, self._was_applied = lr, True

    def take_lr(self) -> float:
        """`lr` of the step that has just ended; 0 if it was skipped."""
        applied, self._was_applied = self._was_applied, False
        return self.lr if applied else 0.0

    def close(self) -> WindowRatio | None:
        """Close the window. All ranks."""
        return self.window.close()

    def state_dict(self) -> dict[str, Any] | None:
        """The unfinished window, on its devices; None where it is sharded.

        A Lightning checkpoint keeps the callback state of rank 0 only.
        """
        return None if self.is_sharded else self.window.state_dict()

    def resume(self, state_dict: dict[str, Any] | None) -> str | None:
        """Continue an unfinished window.

        Args:
            state_dict: From `state_dict`; None if there is none.

        Returns:
            Why the window starts afresh; None if nothing was lost.
        """
        if self.is_sharded:
            return "windows of sharded gradients are not in the checkpoint"
        if state_dict is not None and not window_fits(state_dict, self._params):
            return "the checkpoint's window does not fit the trained parameters"
        if state_dict is not None:
            self.window.load_state_dict(state_dict)
            if self.window.is_full:  # saved after its last step, before it was closed
                self.window.place(self._params)
        return None

    def release(self) -> dict[str, Any] | None:
        """Let go of the optimizer.

        Returns:
            The unfinished window on the CPU, as `state_dict`.
        """
        self._handle.remove()
        state = self.state_dict()
        return None if state is None else _on_cpu(state)

    def _listen_to(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._handle = optimizer.register_step_post_hook(self._note_applied)

    def _note_applied(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimizers under a grad scaler are told what it found, and skip by themselves.
        found_inf = getattr(optimizer, "found_inf", None)
        self._was_applied = found_inf is None or not bool(found_inf)


def _trained_parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_cpu(v) for key, v in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value
