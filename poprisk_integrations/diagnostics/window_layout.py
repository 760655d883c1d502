"""What a window reads of a list of tensors: all coordinates or a sample, whole or in shards."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.distributed import (
    is_dtensor,
    local_tensor,
    max_over_shards,
    sum_over_shards,
)
from poprisk_integrations.optim._rounding import hash32

__all__ = [
    "LARGEST_EXACT",
    "LARGEST_WHOLE",
    "SAMPLED_COORDINATES",
    "CoordinateSample",
    "FlatVector",
    "PendingSteps",
    "WindowLayout",
    "real_view",
    "sample_coordinates",
    "sampled_count",
]

# Elements per process up to which "auto" keeps whole buffers, of 8 bytes each: 200 MB.
LARGEST_EXACT = 25_000_000

# Per tensor. Against all coordinates, in 100 windows of 8 steps each (as in
# tests/unit/diagnostics/test_sample_accuracy.py): F off by 0.6 % (median), 1.5 % (95 %), 2.9 %
# (most) on a 784-512-512-10 perceptron, by 0.2 %, 0.5 %, 1.0 % on a small language model; its
# standard error by -6 to +18 %, and by -39 to +67 % (median +4 %) where few rows of an embedding
# carry the noise. With 8,192: F off by up to 3.6 %, the error up to 2.4 times as large.
# Runs of neighbours would not be cheaper: with cold caches a gather of whole lines is no faster.
SAMPLED_COORDINATES = 16_384

# A gather costs as much as a copy of several times as many neighbours: up to this size a tensor
# is taken whole.
LARGEST_WHOLE = 32_768

PENDING = 8  # steps on the host that wait to be worked off together


class WindowLayout:
    """Sizes over all shards and the choice of accumulator, the same on all ranks.

    The columns are all trained tensors, on all ranks in the same order. Sharded ones take three
    small reductions and one host sync here, once.

    Attributes:
        locals: Their local shards, as they were; real and imaginary parts of complex ones.
        accumulator: "exact" or "sample".
        on_host: Whether values can be looked at without a device sync.
        sample: The sampled coordinates of the local shards.
        numel: Coordinates of each whole tensor, shape (L,), float64 on the CPU.
        sampled: How many of them are sampled over all shards, same shape.
    """

    def __init__(self, tensors: Sequence[Tensor], accumulator: str, shard_group: Any) -> None:
        self._tensors = list(tensors)
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
            largest = float(self.max(torch.tensor(largest, device=self.device)))
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
        return sum_over_shards(values, self._tensors, self._shard_group)

    def sum_row(self, row: Tensor | list[float]) -> Tensor | list[float]:
        """The same for one row of a step, floats on the host."""
        if isinstance(row, Tensor):
            return self.sum(row)
        return self.sum(torch.tensor(row, dtype=torch.float64)).tolist()

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all shards of all tensors."""
        return max_over_shards(values, self._tensors, self._shard_group)

    def _over_shards(self, counts: Sequence[int]) -> Tensor:
        if not self.is_sharded:
            return torch.tensor(counts, dtype=torch.float64)
        return self.sum(torch.tensor(counts, dtype=torch.float64, device=self.device)).cpu()


def real_view(tensor: Tensor) -> Tensor:
    """Real and imaginary parts of a complex tensor as a last dimension; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def sampled_count(local_numel: int, global_numel: int) -> int:
    """How many coordinates of a local shard are read.

    All of a tensor that has no more than `LARGEST_WHOLE`; of a larger one the shard's share of
    `SAMPLED_COORDINATES`, so that all shards together stay below it.
    """
    if global_numel <= LARGEST_WHOLE:
        return local_numel
    return SAMPLED_COORDINATES * local_numel // global_numel


def sample_coordinates(numel: int, count: int, position: int) -> Tensor | None:
    """Stratified sample: one coordinate of each of `count` strata of equal size.

        stratum i   = [i n / m, (i + 1) n / m), rounded down at both ends
        coordinate  = its start + hash(i, position) mod its size
    Ascending, without repeats, every coordinate as likely as any other; the hash keeps the
    sample out of step with rows and columns. It is drawn by a counter, so it is the same in every
    process and every run, and no random state is touched. `position` is the tensor's place in its
    list: tensors of one shape get different samples. None if all coordinates are taken.
    """
    if count >= numel:
        return None
    dtype = torch.int32 if numel < 2**31 else torch.int64
    if count == 0:
        return torch.empty(0, dtype=dtype)
    edges = torch.arange(count + 1) * numel // count
    key = hash32(torch.tensor(position, dtype=torch.int32))
    draw = hash32(torch.arange(count, dtype=torch.int32) ^ key) & 0x7FFFFFFF
    return (edges[:-1] + draw % edges.diff()).to(dtype)


class CoordinateSample:
    """Reads the sampled coordinates of a list of local shards into one flat fp32 vector.

    `numels` are the coordinates of each whole tensor, `counts` those read of each local shard.
    """

    def __init__(self, tensors: Sequence[Tensor], numels: Sequence[int]) -> None:
        self.counts = [sampled_count(t.numel(), n) for t, n in zip(tensors, numels, strict=True)]
        self._shapes = [t.shape for t in tensors]
        self._device = tensors[0].device
        indices = [
            sample_coordinates(tensor.numel(), count, position)
            for position, (tensor, count) in enumerate(zip(tensors, self.counts, strict=True))
        ]
        self._whole = [i for i, index in enumerate(indices) if index is None]
        self._drawn = [(i, x.to(self._device)) for i, x in enumerate(indices) if x is not None]

    def zeros(self) -> "FlatVector":
        """A vector of the sample's length."""
        return FlatVector(self.counts, self._shapes, self._device)

    def read(self, tensors: Sequence[Tensor | None], out: "FlatVector") -> None:
        """Copy the sampled coordinates of local shards; those of an absent tensor become 0."""
        targets = out.whole
        sources = [x for i in self._whole if (x := tensors[i]) is not None]
        if len(sources) < len(targets):
            is_here = [tensors[i] is not None for i in self._whole]
            torch._foreach_zero_(targets)
            targets = [t for t, here in zip(targets, is_here, strict=True) if here]
        if sources:
            torch._foreach_copy_(targets, sources)
        for i, index in self._drawn:
            tensor, part = tensors[i], out.parts[i]
            if tensor is None:
                part.zero_()
            elif tensor.dtype == part.dtype:
                torch.index_select(tensor.reshape(-1), 0, index, out=part)
            else:
                part.copy_(torch.index_select(tensor.reshape(-1), 0, index))


class FlatVector:
    """One fp32 vector `flat` and its views per tensor, made once.

    `parts` are the pieces of all tensors, shape (count,); `whole` the same in the tensor's shape,
    of those tensors that are taken whole.
    """

    def __init__(
        self, counts: Sequence[int], shapes: Sequence[torch.Size], device: torch.device
    ) -> None:
        self.flat = torch.zeros(sum(counts), device=device)
        self.parts = list(self.flat.split_with_sizes(list(counts)))
        self.whole = [
            part.view(shape)
            for part, shape in zip(self.parts, shapes, strict=True)
            if part.numel() == shape.numel()
        ]


class PendingSteps:
    """Sampled values of up to eight steps that were read and are not yet counted.

    After a backward pass code and caches are cold: of a small model the first operation costs
    up to 80 us, whatever its size, a repeated one a few. So a step is only copied, and the
    arithmetic of eight steps is done in a row; the sums are the same bits. On an accelerator,
    where nothing is gained, and on shards, which have to agree at each step on what is finite,
    steps do not wait.
    """

    def __init__(self, layout: WindowLayout, with_weights: bool) -> None:
        rows = PENDING if layout.on_host and not layout.is_sharded else 1
        self._sample = layout.sample
        self._grads = [layout.sample.zeros() for _ in range(rows)]
        self._weights = [layout.sample.zeros() for _ in range(rows if with_weights else 0)]
        self._kinds: list[bool | None] = []  # per step: does it complete a pair; None: it has none

    @property
    def is_full(self) -> bool:
        """Whether they have to be worked off before the next step."""
        return len(self._kinds) == len(self._grads)

    def read(
        self,
        grads: Sequence[Tensor | None],
        scale: float | Tensor,
        weights: Sequence[Tensor] | None,
        is_second: bool,
    ) -> None:
        """Copy what is sampled of the local shards of one step; no weights: it is in no pair."""
        row = len(self._kinds)
        self._sample.read(grads, self._grads[row])
        if isinstance(scale, Tensor) or scale != 1.0:
            self._grads[row].flat.mul_(scale)
        if weights is not None:
            self._sample.read(weights, self._weights[row])
        self._kinds.append(None if weights is None else is_second)

    def drain(self) -> Iterator[tuple[FlatVector, FlatVector | None, bool]]:
        """Gradients, weights and `is_second` of each step, in order; forgets them."""
        kinds, self._kinds = self._kinds, []
        for row, kind in enumerate(kinds):
            yield self._grads[row], None if kind is None else self._weights[row], bool(kind)
