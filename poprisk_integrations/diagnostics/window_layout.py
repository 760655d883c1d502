"""What a window measures of a list of tensors: all coordinates or a sample, whole or sharded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.diagnostics.coordinate_sample import CoordinateSample
from poprisk_integrations.distributed import (
    is_dtensor,
    local_tensor,
    max_over_shards,
    sum_over_shards,
)

__all__ = ["LARGEST_EXACT", "WindowLayout", "real_view"]

# Elements per process up to which "auto" keeps whole buffers, of 8 bytes each: 200 MB.
LARGEST_EXACT = 25_000_000


class WindowLayout:
    """Sizes over all shards and the choice of accumulator, the same on all ranks.

    Sharded tensors take three small reductions and one host sync here, once.

    Args:
        tensors: The columns: all trained tensors, on all ranks in the same order.
        accumulator: "auto", "exact" or "sample".
        shard_group: Process group over which plain tensors are sharded; None if they are whole.

    Attributes:
        tensors: As given.
        locals: Their local shards, as they were; real and imaginary parts of complex ones.
        accumulator: "exact" or "sample".
        is_sharded: Whether any tensor is.
        on_host: Whether values can be looked at without a device sync.
        sample: The sampled coordinates of the local shards.
        numel: Coordinates of each whole tensor, shape (L,), float64 on the CPU.
        sampled: How many of them are sampled over all shards, same shape.
    """

    def __init__(self, tensors: Sequence[Tensor], accumulator: str, shard_group: Any) -> None:
        self.tensors = list(tensors)
        self._ids = list(map(id, tensors))
        self.locals = [real_view(local_tensor(t)) for t in tensors]
        self._shard_group = shard_group
        self.device = self.locals[0].device
        self.on_host = self.device.type == "cpu"
        self._has_dtensors = any(is_dtensor(t) for t in tensors)
        self._has_complex = any(t.is_complex() for t in tensors)
        self.is_sharded = shard_group is not None or self._has_dtensors
        largest = float(sum(t.numel() for t in self.locals))
        self.numel = self._over_shards([t.numel() for t in self.locals])
        if self.is_sharded:
            total = torch.tensor(largest, device=self.device)
            largest = float(max_over_shards(total, self.tensors, shard_group))
        if accumulator == "auto":
            accumulator = "exact" if largest <= LARGEST_EXACT else "sample"
        self.accumulator = accumulator
        self.sample = CoordinateSample(self.locals, [int(n) for n in self.numel.tolist()])
        self.sampled = self._over_shards(self.sample.counts)

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the very tensors."""
        return list(map(id, tensors)) == self._ids

    def to_locals(self, values: Sequence[Any]) -> Sequence[Any]:
        """Local shards of tensors or gradients, one per column."""
        if not (self._has_dtensors or self._has_complex):
            return values
        return [None if v is None else real_view(local_tensor(v)) for v in values]

    def sum(self, values: Tensor) -> Tensor:
        """Sum columns (last dimension) over shards."""
        return sum_over_shards(values, self.tensors, self._shard_group)

    def sum_row(self, row: Tensor | list[float]) -> Tensor | list[float]:
        """The same for one row of a step, floats on the host."""
        if isinstance(row, Tensor):
            return self.sum(row)
        return self.sum(torch.tensor(row, dtype=torch.float64)).tolist()

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all shards of all tensors."""
        return max_over_shards(values, self.tensors, self._shard_group)

    def _over_shards(self, counts: Sequence[int]) -> Tensor:
        if not self.is_sharded:
            return torch.tensor(counts, dtype=torch.float64)
        return self.sum(torch.tensor(counts, dtype=torch.float64, device=self.device)).cpu()


def real_view(tensor: Tensor) -> Tensor:
    """Real and imaginary parts of a complex tensor as a last dimension; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
