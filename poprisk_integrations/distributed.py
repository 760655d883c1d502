"""Reductions over ranks and shards; exact no-ops without a process group.

A reduced DTensor read with `.item()` silently gives the local shard's value. Everything here works
on local tensors and reduces explicitly, many numbers in one collective.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "is_dtensor",
    "local_tensor",
    "max_over_shards",
    "mean_over_ranks",
    "same_on_all_ranks",
    "sum_lists_over_shards",
    "sum_over_ranks",
    "sum_over_shards",
    "world_size",
]

BUCKET_ELEMENTS = 2**24  # 64 MiB of float32: large enough for bandwidth, small beside a model


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor (without importing DTensor where torch lacks it)."""
    return hasattr(tensor, "_local_tensor") and hasattr(tensor, "device_mesh")


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's plain tensor: the shard of a DTensor, or the tensor itself.

    It shares memory with the DTensor, so in-place work on it is work on the shard.
    """
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def world_size() -> int:
    """Number of ranks of the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over all ranks, the same bits on each of them.

    The shape is the same on all ranks, the device that of their communication.
    """
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world_size()


def sum_over_ranks(tensors: list[Tensor], bucket_elements: int = BUCKET_ELEMENTS) -> list[Tensor]:
    """Each tensor added over the ranks of the default process group, the same bits on each.

    Shapes, dtypes and order are the same on all ranks. Tensors of a device and dtype share a flat
    buffer until it has `bucket_elements`; what is returned are views of these buffers.
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


def sum_over_shards(values: Tensor, tensors: Sequence[Tensor], plain_group: Any = None) -> Tensor:
    """Sum per-tensor numbers over the shards of each tensor.

    Args:
        values: Shape (..., L): one column per tensor, computed from its local shard.
        tensors: The L tensors, on all ranks in the same order.
        plain_group: Processes over which tensors that are no DTensors are sharded; None if these
            are whole, and their columns stay as they are.

    Returns:
        Same shape; columns of DTensors hold the sum over the mesh dimensions that shard them.
    """
    groups = _shard_groups(tensors, plain_group)
    if not groups:
        return values
    result = values.clone()
    for group, columns in groups:
        index = torch.tensor(columns, device=values.device)
        part = result.index_select(-1, index)
        dist.all_reduce(part, group=group)
        result.index_copy_(-1, index, part)
    return result


def sum_lists_over_shards(
    values: Sequence[Tensor], tensors: Sequence[Tensor], by_row: Sequence[bool]
) -> list[Tensor]:
    """Sum numbers of rows or of whole tensors over the shards of each tensor.

    One collective per process group for all tensors; none where rows are whole on each rank.

    Args:
        values: Per tensor, numbers of its local shard: the same many on all ranks that share it.
        tensors: The tensors, on all ranks in the same order; plain ones are whole.
        by_row: Per tensor, whether the numbers are of its rows, which shards of dimension 0 hold
            whole.
    """
    result = list(values)
    for by_rows in (True, False):
        chosen = [i for i, flag in enumerate(by_row) if flag == by_rows]
        groups = _shard_groups([tensors[i] for i in chosen], rows_are_whole=by_rows)
        for group, places in groups:
            members = [chosen[place] for place in places]
            flat = torch.cat([result[i].reshape(-1) for i in members])
            dist.all_reduce(flat, group=group)
            pieces = torch.split(flat, [result[i].numel() for i in members])
            for i, piece in zip(members, pieces, strict=True):
                result[i] = piece.view(result[i].shape)
    return result


def max_over_shards(value: Tensor, tensors: Iterable[Tensor], plain_group: Any = None) -> Tensor:
    """Largest of each number over all shards of all tensors (e.g. a found-non-finite flag)."""
    groups = _shard_groups(tensors, plain_group)
    if not groups:
        return value
    result = value.clone()
    for group in {id(group): group for group, _ in groups}.values():
        dist.all_reduce(result, op=dist.ReduceOp.MAX, group=group)
    return result


def _shard_groups(
    tensors: Iterable[Tensor], plain_group: Any = None, *, rows_are_whole: bool = False
) -> list[tuple[Any, list[int]]]:
    """(process group, positions of the tensors that it shards), same order on all ranks.

    `rows_are_whole` leaves out the groups that share nothing but dimension 0.
    """
    if plain_group is None and not (dist.is_available() and dist.is_initialized()):
        return []
    found: dict[tuple[Any, int], list[int]] = {}
    plain: list[int] = []
    for position, tensor in enumerate(tensors):
        if not is_dtensor(tensor):
            plain.append(position)
            continue
        for dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
            # `is_shard` does not know strided shards (FSDP2 over tensor parallelism)
            dim_of = getattr(placement, "dim", None)
            if dim_of is not None and not (rows_are_whole and dim_of == 0):
                found.setdefault((tensor.device_mesh, dim), []).append(position)  # type: ignore[attr-defined]
    groups = [(mesh.get_group(dim), columns) for (mesh, dim), columns in found.items()]
    return [*groups, (plain_group, plain)] if plain_group is not None and plain else groups
