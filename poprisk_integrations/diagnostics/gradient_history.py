"""Sampled gradients of every step of a short run, in bounded memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk_integrations.diagnostics.coordinate_sample import sample_coordinates
from poprisk_integrations.distributed import local_tensor

__all__ = ["GradientHistory", "budget_counts"]

# Values kept of all steps together, 4 bytes each (128 MB at most), and of one step (2 MB).
VALUES_KEPT = 2**25
VALUES_PER_STEP = 2**19
SMALLEST_SAMPLE = 2048


def budget_counts(numels: Sequence[int], budget: int) -> list[int]:
    """How many coordinates to keep of each tensor: in proportion to its size, small ones whole.

    Half of the budget, up to 2,048 each, goes to the tensors alike, so that biases and norms are
    not lost beside embeddings.

    Args:
        numels: Coordinates of each tensor.
        budget: Coordinates of all tensors together, about: at least one of each is kept.

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
    trainer clips), never written, and no random number is drawn. Steps without any gradient or
    with a non-finite one (which an optimizer skips) are counted, not kept.

    Args:
        params: The trained parameters. Their local shards are read.
        steps: Most steps to keep.

    Attributes:
        numels: Coordinates of each tensor; of a complex one its real and imaginary parts.
        counts: How many of them are kept.
        present: Whether each tensor has had a dense gradient.
        sparse: Whether each tensor has had a sparse gradient, which is passed over.
        norms: |g| of each kept step over all coordinates of all tensors.
        without_gradient: Steps at which no tensor had a dense gradient.
        nonfinite: Steps with a non-finite gradient.

    Raises:
        ValueError: If there is no parameter or no step.

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
        if not params or steps < 1:
            raise ValueError(f"Invalid params and steps: {len(params)} and {steps}. Must be >= 1.")
        self._params = list(params)
        self.numels = [_flat(p.detach()).numel() for p in params]
        self.counts = budget_counts(self.numels, min(VALUES_PER_STEP, VALUES_KEPT // steps))
        self._index = [
            index if index is None else index.to(local_tensor(param).device)
            for position, (param, numel, count) in enumerate(
                zip(params, self.numels, self.counts, strict=True)
            )
            for index in [sample_coordinates(numel, count, position)]
        ]
        self._rows = torch.zeros(steps, sum(self.counts))
        self.present = [False] * len(params)
        self.sparse = [False] * len(params)
        self.norms: list[float] = []
        self.without_gradient = self.nonfinite = 0

    def __len__(self) -> int:
        return len(self.norms)

    @property
    def values(self) -> Tensor:
        """What was kept: one row per step, the tensors' coordinates side by side."""
        return self._rows[: len(self)]

    @torch.no_grad()
    def record(self, scale: float = 1.0) -> None:
        """Take in the gradients of one step.

        Args:
            scale: Multiplies them, to undo a loss scale.

        Raises:
            ValueError: If the history is full.
        """
        if len(self) == len(self._rows):
            raise ValueError(f"The history is full: {len(self)} steps.")
        for i, param in enumerate(self._params):
            self.sparse[i] |= param.grad is not None and param.grad.layout is not torch.strided
        grads = [
            None if p.grad is None or p.grad.layout is not torch.strided else _flat(p.grad)
            for p in self._params
        ]
        dense = [grad for grad in grads if grad is not None]
        if not dense:
            self.without_gradient += 1
            return
        norm = scale * math.sqrt(sum(_norm(grad) ** 2 for grad in dense))
        if not math.isfinite(norm):
            self.nonfinite += 1
            return
        row = self._rows[len(self)]
        for i, part in enumerate(row.split_with_sizes(self.counts)):
            grad, index = grads[i], self._index[i]
            if grad is None:
                part.zero_()
                continue
            self.present[i] = True
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
