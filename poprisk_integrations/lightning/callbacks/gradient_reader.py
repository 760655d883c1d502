"""What the stopping rule needs from an optimizer, step by step: gradients and training time."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from poprisk_integrations.diagnostics import GradientWindow, window_fits
from poprisk_integrations.distributed import is_dtensor

__all__ = ["GradientReader"]


class GradientReader:
    """Feeds a window with an optimizer's gradients, and knows which steps were applied.

    Call `read` when the gradients are complete and `take_lr` when the step is over. It registers
    a hook on the optimizer's step, which does not fire when a grad scaler skips the step; call
    `release` at the end.

    Args:
        optimizer: Any torch optimizer.
        steps: Optimizer steps per window, >= 2.

    Attributes:
        window: The window.
        is_sharded: Whether each rank holds its own part of the window (DTensor gradients).
        lr: The learning rate of the last step, of groups with different ones the largest.
    """

    def __init__(self, optimizer: Optimizer, steps: int) -> None:
        params = _trained_parameters(optimizer)
        self.window = GradientWindow(steps)
        self.is_sharded = any(is_dtensor(p) for p in params)
        self.lr = 0.0
        self._params = params
        self._was_applied = False
        self._handle = optimizer.register_step_post_hook(self._note_applied)

    @torch.no_grad()
    def read(self, optimizer: Optimizer, *, count: bool) -> None:
        """Read the learning rate and, unless `count` is False, the gradients of one step.

        A change of the set of trained parameters starts the window afresh: its sums go by
        position.
        """
        self.lr = max((float(g["lr"]) for g in optimizer.param_groups if g["params"]), default=0.0)
        params = _trained_parameters(optimizer)
        if len(params) != len(self._params) or any(
            p is not q for p, q in zip(params, self._params, strict=True)
        ):
            self.window.reset()
        self._params = params
        if count:
            self.window.add(params)

    def take_lr(self) -> float:
        """The learning rate of the step that has just ended; 0 if it was skipped."""
        applied, self._was_applied = self._was_applied, False
        return self.lr if applied else 0.0

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
        return None

    def release(self) -> dict[str, Any] | None:
        """Let go of the optimizer.

        Returns:
            The unfinished window on the CPU, as `state_dict`.
        """
        self._handle.remove()
        state = self.state_dict()
        return None if state is None else _on_cpu(state)

    def _note_applied(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._was_applied = True


def _trained_parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _on_cpu(v) for key, v in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value
