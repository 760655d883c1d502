"""Stochastic rounding to bfloat16 from counter-based randomness."""

import math

import torch
from torch import Tensor

from poprisk_integrations.distributed import is_dtensor

__all__ = ["stochastic_round_"]

_MASK32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive seeds over the word


def stochastic_round_(
    target: Tensor, source: Tensor, owner: Tensor, position: int, step: Tensor
) -> None:
    """Write `source` to the bfloat16 tensor `target`, rounded up with the probability of the rest.

    Unbiased: E[target] = source, while rounding to nearest loses every update below half an ulp
    (2^-9 of the value). The draw is a hash of (position, step, GLOBAL element index), not a
    generator's: replicas under DDP and HSDP get the same bits, shards get those of the whole
    tensor, and a resumed run repeats them.

    Args:
        target: bfloat16, local shard.
        source: float32, same shape, finite.
        owner: The parameter whose shard this is; its layout gives the global index.
        position: Position of the parameter over all groups.
        step: 0-dim count of the parameter's steps.
    """
    index = _global_index(owner, target)
    seed = (step.to(device=target.device, dtype=torch.int64) * _GOLDEN + position) & _MASK32
    draw = _hash32(index ^ _hash32(seed)) & 0xFFFF
    bits = source.contiguous().view(torch.int32)
    rounded = (bits + draw.to(torch.int32)) & -65536  # keep the upper 16 bits
    target.copy_(rounded.view(torch.float32))


def _hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash of low bias (Wellons, "lowbias32"), in int64 lanes."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK32
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK32
    return x ^ (x >> 16)


def _global_index(owner: Tensor, local: Tensor) -> Tensor:
    """Row-major index of each element of the shard within the whole parameter, low 32 bits."""
    if not is_dtensor(owner):
        return torch.arange(local.numel(), device=local.device).view(local.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(
        owner.shape,
        owner.device_mesh,  # type: ignore[attr-defined]
        owner.placements,  # type: ignore[attr-defined]
    )
    index = torch.zeros((), dtype=torch.int64, device=local.device)
    for dim, offset in enumerate(offsets):
        stride = math.prod(owner.shape[dim + 1 :])
        along = (torch.arange(local.shape[dim], device=local.device) + offset) * stride
        index = index.unsqueeze(-1) + along
    return index.view(local.shape) & _MASK32
