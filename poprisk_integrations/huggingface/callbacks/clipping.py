"""What clipping by global norm did to the gradients of a run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.distributed import is_dtensor, sum_over_shards

__all__ = ["Clipping"]

_TOLERANCE = 1e-3
_EPS = 1e-6  # in torch's clip_grad_norm_ and in DeepSpeed's
_LOOKS_PER_WINDOW = 8


class Clipping:
    """Undoes clipping where the norm before it is known, else counts the clipped steps.

    Clipping multiplies the gradient of step t by
        s_t = min(1, max_norm / (|g_t| + 1e-6))
    so 1 / s_t undoes it. Without |g_t|, a step counts as clipped if its norm is `max_norm` to
    1e-3; as the norm takes a pass over all gradients, eight steps of a window are looked at.
    Nothing is read from the device, and no rank asks another, before `close`.

    Args:
        max_norm: `max_grad_norm`; 0 for no clipping.
        window_steps: Optimizer steps per window.

    Attributes:
        max_norm: May be changed between steps.
        steps: Steps that were looked at, in closed windows.
        clipped: How many of them were clipped.
        is_undone: Whether the norm before clipping was known.
    """

    def __init__(self, max_norm: float, window_steps: int) -> None:
        self.max_norm = max_norm
        self.steps = self.clipped = 0
        self.is_undone = False
        self._every = max(1, window_steps // _LOOKS_PER_WINDOW)
        self._seen = 0
        self._norm: Any = None
        self._was_clipped: list[Tensor | float] = []  # per step with a known norm
        self._norms_sq: list[Tensor] = []  # per step without, (L,) each
        self._tensors: list[Tensor] = []

    @property
    def fraction(self) -> float | None:
        """Share of clipped steps; None before the first closed window or without clipping."""
        return self.clipped / self.steps if self.steps else None

    def note_norm(self, norm: Any) -> None:
        """Tell the norm before clipping of the step to come.

        Args:
            norm: A number or a tensor of one, DTensor included; None if it is not known.
        """
        self._norm = norm

    def factor(self, params: Sequence[Tensor]) -> float | Tensor:
        """1 / s_t of the present step, 1 where it is not known. Once per step.

        Args:
            params: All parameters, with their gradients.
        """
        self._seen += 1
        norm, self._norm = self._norm, None
        if not self.max_norm:
            return 1.0
        if norm is None:
            if (self._seen - 1) % self._every == 0:
                self._look(params)
            return 1.0
        self.is_undone = True
        factor: float | Tensor
        if isinstance(norm, Tensor):
            whole: Tensor = norm.full_tensor() if is_dtensor(norm) else norm  # type: ignore[attr-defined]
            factor = ((whole.detach().float() + _EPS) / self.max_norm).clamp(min=1.0)
            # On the host no sync is saved, and numbers are cheaper than tensors.
            factor = factor if whole.device.type != "cpu" else float(factor)
        else:
            factor = max(1.0, (float(norm) + _EPS) / self.max_norm)
        self._was_clipped.append(factor > 1.0)
        return factor

    def close(self, shard_group: Any = None) -> None:
        """Count, once per window and on all ranks alike. At most one sync.

        Args:
            shard_group: Processes over which tensors that are no DTensors are sharded.
        """
        flags: list[bool] = []
        if self._norms_sq:
            totals = sum_over_shards(torch.stack(self._norms_sq), self._tensors, shard_group)
            norms = totals.sum(1).sqrt().cpu()
            flags += ((norms / self.max_norm - 1.0).abs() < _TOLERANCE).tolist()
        if self._was_clipped:
            values = self._was_clipped
            on_host = not isinstance(values[0], Tensor)
            flags += values if on_host else torch.stack(values).tolist()  # type: ignore[arg-type]
        self.steps += len(flags)
        self.clipped += sum(flags)
        self._norms_sq, self._was_clipped, self._seen = [], [], 0

    def verdict(self) -> str | None:
        """What the clipped steps mean for F, in one line; None if no step was clipped."""
        if not self.clipped:
            return None
        share = f"{self.clipped / self.steps:.0%} of the steps were clipped to {self.max_norm:g}"
        if self.is_undone:
            return f"{share}, which is undone for F."
        return (
            f"{share}, so F is of clipped gradients, in which steps with large gradients weigh "
            "less. transformers >= 5.3 tells the norm before clipping, which undoes it."
        )

    @property
    def matters(self) -> bool:
        """Whether most steps were clipped and nothing undoes it."""
        return not self.is_undone and self.clipped > 0.5 * self.steps

    def _look(self, params: Sequence[Tensor]) -> None:
        tensors = [p for p in params if p.requires_grad]
        if not tensors:
            return
        if [id(p) for p in tensors] != [id(p) for p in self._tensors]:
            self._norms_sq = []  # the trained parameters have changed, and the window starts afresh
        grads = [None if p.grad is None else p.grad for p in tensors]
        local = [g._local_tensor if g is not None and is_dtensor(g) else g for g in grads]  # type: ignore[attr-defined]
        present = [g for g in local if g is not None]
        found = iter(torch._foreach_norm(present, 2, torch.float32) if present else ())
        zero = torch.zeros((), device=tensors[0].device)
        self._norms_sq.append(
            torch.stack(
                [zero if g is None else next(found).to(zero.device) for g in local]
            ).square()
        )
        self._tensors = tensors
