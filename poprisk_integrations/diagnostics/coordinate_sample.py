"""A fixed sample of coordinates of each tensor, drawn by a counter: no random state is touched."""

from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk_integrations.optim._rounding import hash32

__all__ = [
    "LARGEST_WHOLE",
    "SAMPLED_COORDINATES",
    "CoordinateSample",
    "sample_coordinates",
    "sampled_count",
]

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


def sampled_count(local_numel: int, global_numel: int) -> int:
    """How many coordinates of a local shard are read.

    All of a tensor that has no more than `LARGEST_WHOLE`; of a larger one the shard's share of
    `SAMPLED_COORDINATES`, so that all shards together stay below it.

    Example:
        >>> sampled_count(1000, 1000), sampled_count(10**6, 10**6), sampled_count(10**6, 4 * 10**6)
        (1000, 16384, 4096)
    """
    if global_numel <= LARGEST_WHOLE:
        return local_numel
    return SAMPLED_COORDINATES * local_numel // global_numel


def sample_coordinates(numel: int, count: int, position: int) -> Tensor | None:
    """Stratified sample: one coordinate of each of `count` strata of equal size.

        stratum i   = [i n / m, (i + 1) n / m), rounded down at both ends
        coordinate  = its start + hash(i, position) mod its size
    Ascending, without repeats, every coordinate as likely as any other; the hash keeps the
    sample out of step with rows and columns. The same in every process and every run.

    Args:
        numel: n, coordinates of the tensor.
        count: m <= n.
        position: Place of the tensor in its list: tensors of one shape get different samples.

    Returns:
        Shape (m,), int32 where it can hold n, else int64; None if all coordinates are taken.

    Example:
        >>> sample_coordinates(10, 10, 0) is None, len(sample_coordinates(10, 4, 0))
        (True, 4)
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
    """Reads the sampled coordinates of a list of tensors into one flat fp32 vector.

    Args:
        tensors: The local shards: their shapes and their device count, not their values.
        numels: Coordinates of each whole tensor over all shards.

    Attributes:
        counts: Coordinates read of each local shard, in order.
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
        """Copy the sampled coordinates; those of an absent tensor become 0.

        Args:
            tensors: Local shards, shapes as in the constructor, any floating dtype.
            out: From `zeros`.
        """
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
    """One fp32 vector and its views per tensor, made once.

    Attributes:
        flat: Shape (sum of counts,).
        parts: Its piece of each tensor, shape (count,).
        whole: The same in the tensor's shape, of those tensors that are taken whole.
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
