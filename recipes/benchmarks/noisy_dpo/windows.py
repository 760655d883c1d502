"""Window statistics of all members, for a replay of the package's stopping rule afterwards."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["WindowRecorder"]

LARGEST_RATIO = 100.0  # as in core.window


class WindowRecorder:
    """F whitened per coordinate, its standard error and the noise, per window and member.

    Two lengths at once: a third of an epoch, and an epoch, whose sums are those of its thirds.

    Args:
        values: The stacked parameters.
        epoch_steps: Optimizer steps of one pass over the data.
    """

    def __init__(self, values: list[Tensor], epoch_steps: int) -> None:
        self.values, self.epoch_steps = values, epoch_steps
        self.ends = {round(epoch_steps * k / 3) for k in (1, 2, 3)}
        self.rows: dict[str, list[np.ndarray]] = {}
        self.numel = torch.tensor([float(v[0].numel()) for v in values])
        self.third, self.epoch = _Sums(values), _Sums(values)
        self.at = 0

    @torch.no_grad()
    def add(self) -> None:
        """Take in the gradients of one step, before the step."""
        self.third.add([v.grad for v in self.values])
        self.at += 1
        within = (self.at - 1) % self.epoch_steps + 1
        if within in self.ends:
            self._close("third", self.third)
            self.epoch.join(self.third)
            self.third = _Sums(self.values)
        if within == self.epoch_steps:
            self._close("epoch", self.epoch)
            self.epoch = _Sums(self.values)

    def _close(self, name: str, sums: "_Sums") -> None:
        found = {**sums.statistics(self.numel), "end": torch.tensor(float(self.at))}
        for key, value in found.items():
            self.rows.setdefault(f"{name}_{key}", []).append(value.cpu().numpy())

    def arrays(self) -> dict[str, np.ndarray]:
        """`third_*` and `epoch_*`: ratio, error, noise of shape (W, M), end of shape (W,)."""
        return {name: np.stack(v).astype(np.float32) for name, v in self.rows.items()}


class _Sums:
    def __init__(self, values: list[Tensor]) -> None:
        self.sums = [torch.zeros_like(v) for v in values]
        self.squares = [torch.zeros_like(v) for v in values]
        self.norms: list[Tensor] = []  # each of shape (M, L)

    def add(self, grads: list[Any]) -> None:
        torch._foreach_add_(self.sums, grads)
        torch._foreach_addcmul_(self.squares, grads, grads)
        self.norms.append(_squares(grads))

    def join(self, other: "_Sums") -> None:
        torch._foreach_add_(self.sums, other.sums)
        torch._foreach_add_(self.squares, other.squares)
        self.norms += other.norms

    def statistics(self, numel: Tensor) -> dict[str, Tensor]:
        steps = len(self.norms)
        white, count = torch.zeros(()), torch.zeros(())
        for a, q in zip(self.sums, self.squares, strict=True):
            s = (q - a.square() / steps) / (steps - 1)
            alive = q > 0
            ratio = torch.where(alive, a.square() / steps / s.clamp_min(1e-30), 0.0)
            ratio.clamp_(max=LARGEST_RATIO)
            white = white + ratio.flatten(1).sum(1)
            count = count + alive.float().flatten(1).sum(1)
        norms = torch.stack(self.norms)  # (T, M, L)
        noise = ((norms.sum(0) - _squares(self.sums) / steps) / (steps - 1)).clamp_min(1e-30)
        weights = (numel / numel.sum()).to(norms)
        each = ((norms / noise).double() * weights).sum(-1)
        return {
            "ratio": white / count * (steps - 3) / (steps - 1),
            "error": each.std(0),
            "noise": noise.sum(-1),
        }


def _squares(tensors: list[Any]) -> Tensor:
    return torch.stack([t.flatten(1).square().sum(1) for t in tensors], 1)
