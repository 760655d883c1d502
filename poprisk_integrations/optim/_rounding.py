"""Counter-based randomness for stochastic rounding: the same on replicas and after a resume."""

import math

import torch
from torch import Tensor

from poprisk_integrations.distributed import is_dtensor

__all__ = ["global_index", "hash32", "round_to_bfloat16_", "rounding_key", "uniform16"]

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive seeds over the word
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
STREAMS = ("param", "exp_dev_sq", "exp_avg", "exp_avg_sq")


def hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash of low bias (Wellons, "lowbias32") in int32 lanes.

    Products wrap and right shifts are made logical by masks, so the bits are those of the
    unsigned original; int32 vectorises where int64 does not.

    Args:
        x: int32, any shape.

    Returns:
        int32, same shape.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * _MULTIPLIERS[0]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (_MULTIPLIERS[1] - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def rounding_key(step: Tensor, position: int | Tensor, seed: int) -> Tensor:
    """One word per (seed, step, parameter), on the device of `step`.

    Args:
        step: Count of the parameter's steps: 0-dim, or one per parameter.
        position: Position of the parameter over all groups; int64, shape of `step`, for several.
        seed: The group's `rounding_seed`.

    Returns:
        int32, shape of `step`.
    """
    word = (step.to(torch.int64) * _GOLDEN + position).to(torch.int32)  # the low 32 bits
    return hash32(word ^ seed) if seed else hash32(word)


def uniform16(index: Tensor, key: Tensor, stream: str) -> Tensor:
    """16 random bits per element.

    Two streams share a hash, one takes its lower and one its upper half, so a bfloat16
    parameter with bfloat16 states costs two hashes instead of four.

    Args:
        index: int32 low bits of the GLOBAL row-major element index.
        key: 0-dim int32 from `rounding_key`.
        stream: One of `STREAMS`.

    Returns:
        int32 in [0, 65535], same shape as `index`.
    """
    number = STREAMS.index(stream)
    word = hash32(index ^ (key if number < 2 else hash32(key ^ 1)))
    return word & 0xFFFF if number % 2 == 0 else (word >> 16) & 0xFFFF


def round_to_bfloat16_(target: Tensor, source: Tensor, draw: Tensor | None) -> None:
    """Write float32 values to a bfloat16 tensor, rounded up with the probability of the rest.

    Unbiased: E[target] = source, while rounding to nearest loses every update below half an ulp
    (2^-9 of the value).

    Args:
        target: bfloat16, changed in place.
        source: float32, same shape, finite.
        draw: int32 in [0, 65535], same shape; None rounds to nearest.
    """
    if draw is None:
        target.copy_(source)
        return
    source = source.contiguous()
    rounded = ((source.view(torch.int32) + draw) & -65536).view(torch.float32)  # upper 16 bits
    # the sum carries some NaNs to zero; compilers vectorise the comparison, but not isnan
    target.copy_(torch.where(source == source, rounded, source))


def global_index(owner: Tensor, local: Tensor) -> Tensor:
    """Row-major index of each element of a shard within the whole parameter, low 32 bits.

    A draw that depends on it, and on no generator, gives replicas under DDP and HSDP the same
    bits and shards those of the whole tensor.

    Args:
        owner: The parameter whose shard this is; its layout gives the offset.
        local: The shard.

    Returns:
        int32, shape of `local`.
    """
    if not is_dtensor(owner):
        index = torch.arange(local.numel(), device=local.device).view(local.shape)
        return index.to(torch.int32)
    index = torch.zeros((), dtype=torch.int64, device=local.device)
    for dim, offset in enumerate(shard_offsets(owner)):
        stride = math.prod(owner.shape[dim + 1 :])
        along = (torch.arange(local.shape[dim], device=local.device) + offset) * stride
        index = index.unsqueeze(-1) + along
    return index.reshape(local.shape).to(torch.int32)


def shard_offsets(owner: Tensor) -> tuple[int, ...]:
    """Global index of a DTensor shard's first element along each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        owner.shape,
        owner.device_mesh,  # type: ignore[attr-defined]
        owner.placements,  # type: ignore[attr-defined]
    )
    return tuple(offsets)
