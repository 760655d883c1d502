"""Sampled gradients of every step of a short run, in bounded memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk_integrations.diagnostics.window_layout import sample_coordinates
from poprisk_integrations.distributed import local_tensor

__all__ = ["GradientHistory"]

VALUES_KEPT = 2**25  # of all steps together, 4 bytes each: 128 MB at most
VALUES_PER_STEP = 2**19  # 2 MB
SMALLEST_SAMPLE = 2048


def budget_counts(numels: Sequence[int], budget: int) -> list[int]:
    """How many coordinates to keep of each tensor: in proportion to its size, small ones whole.

    Half of the budget, up to 2,048 each, goes to the tensors alike, so that biases and norms are
    not lost beside embeddings; at least one coordinate of each is kept.

    Example:
        >>> budget_counts([10, 1000], 2000), budget_counts([10, 10**6, 10**6], 10_000)
        ([10, 1000], [10, 4995, 4995])
    """
    total = sum(numels)
    if total <= budget:
        return list(numels)
    floor = max(1, min(SMALLEST_SAMPLE, budget // (2 * len(numels))))
    small = sum(min(numel, floor) for numel in numels)
    share = max(0, budget - small) / max(1, total - small)
    return [min(n, floor) + int(share * max(0, n - floor)) for n in numels]


class GradientHistory:
    """Keeps the gradients of the same coordinates at each optimizer step, as float32 on the CPU.

    Gradients are read as they reach the optimizer (averaged over micro-batches, clipped if the
    trainer clips), never written, and no random number is drawn. Of sharded parameters the local
    shard is read. Steps without any gradient, or with a non-finite one (which an optimizer skips),
    are not kept.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(3))
        >>> history = GradientHistory([p], steps=2)
        >>> for value in (1.0, 2.0):
        ...     p.grad = torch.full((3,), value)
        ...     history.record()
        >>> history.values
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
    """

    def __init__(self, params: Sequence[Tensor], steps: int) -> None:
        self._params = list(params)
        # Coordinates of each tensor, of a complex one its real and imaginary parts; how many of
        # them are kept, and which (None for all).
        self.numels = [_flat(p.detach()).numel() for p in params]
        self.counts = budget_counts(self.numels, min(VALUES_PER_STEP, VALUES_KEPT // steps))
        self._index = []
        for position, (param, numel) in enumerate(zip(params, self.numels, strict=True)):
            index = sample_coordinates(numel, self.counts[position], position)
            self._index.append(index if index is None else index.to(local_tensor(param).device))
        self._rows = torch.zeros(steps, sum(self.counts))
        self.present = [False] * len(params)  # whether each tensor has had a dense gradient
        self.sparse = [False] * len(params)  # or a sparse one, which is passed over
        self.norms: list[float] = []  # of each kept step, over all coordinates of all tensors
        self.nonfinite = 0  # steps with a non-finite gradient

    def __len__(self) -> int:
        return len(self.norms)

    @property
    def values(self) -> Tensor:
        """What was kept: one row per step, the tensors' coordinates side by side."""
        return self._rows[: len(self)]

    @torch.no_grad()
    def record(self, scale: float = 1.0) -> None:
        """Take in the gradients of one step, times `scale`, which undoes a loss scale."""
        grads: list[Tensor | None] = []
        for place, param in enumerate(self._params):
            is_sparse = param.grad is not None and param.grad.layout is not torch.strided
            self.sparse[place] |= is_sparse
            grads.append(None if param.grad is None or is_sparse else _flat(param.grad))
        dense = [grad for grad in grads if grad is not None]
        if not dense:
            return
        norm = scale * math.sqrt(sum(_norm(grad) ** 2 for grad in dense))
        if not math.isfinite(norm):
            self.nonfinite += 1
            return
        row = self._rows[len(self)]
        for place, part in enumerate(row.split_with_sizes(self.counts)):
            grad, index = grads[place], self._index[place]
            if grad is None:
                part.zero_()
                continue
            self.present[place] = True
            part.copy_(grad if index is None else grad.index_select(0, index))
        if scale != 1.0:
            row.mul_(scale)
        self.norms.append(norm)


def _norm(grad: Tensor) -> float:
    # Of 16-bit gradients too in float32: equal norms tell clipped steps.
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return float(torch.linalg.vector_norm(grad, dtype=dtype))


def _flat(tensor: Tensor) -> Tensor:
    local = local_tensor(tensor)
    return (torch.view_as_real(local) if local.is_complex() else local).reshape(-1)
