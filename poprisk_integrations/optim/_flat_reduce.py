"""Many tensors added over ranks in few collectives."""

import torch
import torch.distributed as dist
from torch import Tensor

from poprisk_integrations.distributed import world_size

__all__ = ["same_on_all_ranks", "sum_over_ranks"]

BUCKET_ELEMENTS = 2**24  # 64 MiB of float32: large enough for bandwidth, small beside a model


def sum_over_ranks(tensors: list[Tensor], bucket_elements: int = BUCKET_ELEMENTS) -> list[Tensor]:
    """Each tensor added over the ranks of the default process group, the same bits on each.

    Args:
        tensors: The same shapes, dtypes and order on all ranks.
        bucket_elements: Tensors of a device and dtype share a flat buffer until it has this size.

    Returns:
        Tensors of the same shapes, contiguous views of the flat buffers; the input without a
        process group.
    """
    if world_size() == 1:
        return tensors
    buckets: dict[tuple[torch.device, torch.dtype], list[list[int]]] = {}
    filled: dict[tuple[torch.device, torch.dtype], int] = {}
    for index, tensor in enumerate(tensors):
        key = (tensor.device, tensor.dtype)
        if key not in buckets or filled[key] + tensor.numel() > bucket_elements:
            buckets.setdefault(key, []).append([])
            filled[key] = 0
        buckets[key][-1].append(index)
        filled[key] += tensor.numel()
    result = list(tensors)
    for members in (m for parts in buckets.values() for m in parts):
        flat = torch.cat([tensors[i].reshape(-1) for i in members])
        dist.all_reduce(flat)
        pieces = torch.split(flat, [tensors[i].numel() for i in members])
        for i, piece in zip(members, pieces, strict=True):
            result[i] = piece.view(tensors[i].shape)
    return result


def same_on_all_ranks(numbers: list[int], device: torch.device) -> bool:
    """Whether all ranks gave the same numbers; the same answer on each (reads the device)."""
    if world_size() == 1:
        return True
    both = torch.tensor([numbers, [-x for x in numbers]], dtype=torch.int64, device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    largest, minus_smallest = both.tolist()
    return all(a == -b for a, b in zip(largest, minus_smallest, strict=True))
