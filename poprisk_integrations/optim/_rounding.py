"""Counter-based randomness for stochastic rounding: the same on replicas and after a resume."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.distributed import is_dtensor

__all__ = [
    "first_index",
    "global_index",
    "hash32",
    "rounding_key",
    "to_bfloat16",
    "uniform16",
]

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive seeds over the word
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
STREAMS = ("param", "exp_dev_sq", "exp_avg", "exp_avg_sq")


def hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash of low bias (Wellons, "lowbias32") of int32 numbers.

    Products wrap and right shifts are made logical by masks, so the bits are those of the
    unsigned original; int32 vectorises where int64 does not.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MULTIPLIERS[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (_MULTIPLIERS[1] - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def rounding_key(step: Tensor, position: int | Tensor, seed: int) -> Tensor:
    """One int32 per (seed, step, parameter), on the device and in the shape of `step`.

    `position` is the parameter's over all groups.
    """
    word = (step.to(torch.int64) * _GOLDEN + position).to(torch.int32)  # the low 32 bits
    return hash32(word ^ seed) if seed else hash32(word)


def uniform16(index: Tensor, key: Tensor, stream: str) -> Tensor:
    """16 random bits per element, as int32, from the low bits of its GLOBAL row-major index.

    Two streams share a hash, one takes its lower and one its upper half, so a bfloat16
    parameter with bfloat16 states costs two hashes instead of four.
    """
    number = STREAMS.index(stream)
    word = hash32(index ^ (key if number < 2 else hash32(key ^ 1)))
    return word & 0xFFFF if number % 2 == 0 else (word >> 16) & 0xFFFF


def to_bfloat16(source: Tensor, draw: Tensor | None) -> Tensor:
    """float32 values as bfloat16, rounded up with the probability of the rest.

    Unbiased: E[result] = source, while rounding to nearest (`draw` None) loses every update below
    half an ulp (2^-9 of the value). Draws are those of `uniform16`.
    """
    if draw is None:
        return source.to(torch.bfloat16)
    source = source.contiguous()
    rounded = ((source.view(torch.int32) + draw) & -65536).view(torch.float32)  # upper 16 bits
    # the sum carries some NaNs to zero; compilers vectorise the comparison, but not isnan
    return torch.where(source == source, rounded, source).to(torch.bfloat16)


def global_index(owner: Tensor, local: Tensor) -> Tensor:
    """Row-major index of each element of a shard within its parameter, low 32 bits as int32.

    A draw that depends on it, and on no generator, gives replicas under DDP and HSDP the same
    bits and shards those of the whole tensor.
    """
    if not is_dtensor(owner):
        index = torch.arange(local.numel(), device=local.device).view(local.shape)
        return index.to(torch.int32)
    index = torch.zeros((), dtype=torch.int64, device=local.device)
    _, offsets = _shard_of(owner.shape, owner.device_mesh, owner.placements)  # type: ignore[attr-defined]
    for dim, offset in enumerate(offsets):
        stride = math.prod(owner.shape[dim + 1 :])
        along = (torch.arange(local.shape[dim], device=local.device) + offset) * stride
        index = index.unsqueeze(-1) + along
    return index.reshape(local.shape).to(torch.int32)


def first_index(owner: Tensor) -> int | None:
    """Global index of a shard's first element; None if its elements are not consecutive."""
    if not is_dtensor(owner) or owner.dim() == 0:
        return 0
    shape = owner.shape
    local_shape, (first, *_) = _shard_of(shape, owner.device_mesh, owner.placements)  # type: ignore[attr-defined]
    return first * math.prod(shape[1:]) if local_shape[1:] == shape[1:] else None


@lru_cache(maxsize=4096)  # a dozen microseconds per parameter otherwise
def _shard_of(shape: torch.Size, mesh: Any, placements: Any) -> tuple[tuple[int, ...], Any]:
    """Shape of this rank's shard of a DTensor, and the global index of its first element."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local_shape, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(local_shape), tuple(offsets)
