"""Tables that the Triton kernel reads: addresses, sizes and blocks of the tensors of a launch."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk_integrations.distributed import is_dtensor
from poprisk_integrations.optim._options import GroupOptions
from poprisk_integrations.optim._rounding import shard_offsets
from poprisk_integrations.optim._work import GroupWork

__all__ = ["Kind", "Plan", "collect_launches", "local_tensors", "plan_of", "positions_on"]

_MAX_PLANS = 256


class Kind(NamedTuple):
    """What tensors of one launch have in common.

    Attributes:
        dtypes: Of parameters, gradients, m, v, s.
        is_vector: Whether 16 bytes can be moved at once, by address and by size.
    """

    dtypes: tuple[torch.dtype, ...]
    is_vector: bool


@dataclass(slots=True)
class Launch:
    """Tensors of one launch, as a step collects them; addresses five by five."""

    is_rounded: bool
    rows: list[int] = field(default_factory=list)
    numels: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)


def collect_launches(
    work: GroupWork, indices: Sequence[int], options: GroupOptions
) -> dict[Kind, Launch]:
    from poprisk_integrations.optim._triton_kernel import VECTOR_NUMEL

    # One pass with few calls: with thousands of small tensors this loop is what a step costs.
    launches: dict[Kind, Launch] = {}
    for row, i in enumerate(indices):
        tensors = p, g, m, v, s = local_tensors(work, i)
        numel = p.numel()
        if numel == 0:
            continue
        addresses = p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(), s.data_ptr()
        odd = numel % VECTOR_NUMEL
        for address in addresses:
            odd |= address % 16
        kind = Kind((p.dtype, g.dtype, m.dtype, v.dtype, s.dtype), not odd)
        launch = launches.get(kind)
        if launch is None:
            launch = launches[kind] = Launch(is_rounded(tensors, options))
        launch.rows.append(row)
        launch.numels.append(numel)
        launch.offsets.append(_first_index(work.owners[i]) if launch.is_rounded else 0)
        launch.addresses += addresses
    return launches


@dataclass(slots=True)
class Plan:
    """Tables of a launch on the device. None is ever overwritten: captured graphs read them.

    Attributes:
        device: Where the tables are.
        numel: Elements of all tensors.
        layout: int64 (tensors, 3), see the kernel.
        blocks: int32 (programs, 2).
        addresses: What `table` holds, on the host.
        table: int64 (tensors, 5).
    """

    device: torch.device
    numel: int
    layout: Tensor
    blocks: Tensor
    addresses: list[int]
    table: Tensor


_PLANS: OrderedDict[tuple[Any, ...], Plan] = OrderedDict()


_CAPTURED: list[object] = []  # what graphs read lives as long as the process


def plan_of(device: torch.device, kind: Kind, launch: Launch) -> Plan:
    """The tables of a launch: reused while sizes stay, addresses renewed where one has moved.

    Everything that a table says is compared, so that none is ever stale: the allocator moves
    gradients from step to step, and wrappers swap parameters behind the optimizer.
    """
    from poprisk_integrations.optim._triton_kernel import BLOCK

    addresses = launch.addresses
    key = (device, kind, tuple(launch.numels), tuple(launch.rows), tuple(launch.offsets))
    plan = _PLANS.get(key)
    if plan is None:
        layout = list(zip(launch.numels, launch.rows, launch.offsets, strict=True))
        plan = Plan(
            device=device,
            numel=sum(launch.numels),
            layout=_upload(torch.tensor(layout, dtype=torch.int64), device),
            blocks=_upload(_block_map(launch.numels, BLOCK), device),
            addresses=addresses,
            table=_upload(torch.tensor(addresses, dtype=torch.int64), device),
        )
    elif plan.addresses != addresses:
        table = _upload(torch.tensor(addresses, dtype=torch.int64), device)
        plan = replace(plan, addresses=addresses, table=table)
    _PLANS[key] = plan
    _PLANS.move_to_end(key)
    if len(_PLANS) > _MAX_PLANS:
        _PLANS.popitem(last=False)
    if is_capturing(device):
        _CAPTURED.append(plan)
    return plan


def _block_map(numels: Sequence[int], block: int) -> Tensor:
    """Which tensor each program works on, and which block of it: int32 (programs, 2)."""
    counts = torch.tensor([-(-numel // block) for numel in numels])
    tensor = torch.repeat_interleave(torch.arange(len(numels)), counts)
    start = counts.cumsum(0) - counts
    chunk = torch.arange(tensor.numel()) - start[tensor]
    return torch.stack([tensor, chunk], dim=1).to(torch.int32)


def _upload(host: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return host
    # the host's allocator keeps pinned memory until the copy is done
    return host.pin_memory().to(device, non_blocking=True)


def positions_on(device: torch.device, positions: tuple[int, ...]) -> Tensor:
    key = (device, positions)
    known = _POSITIONS.get(key)
    if known is None:
        known = _POSITIONS[key] = _upload(torch.tensor(positions, dtype=torch.int64), device)
    _POSITIONS.move_to_end(key)
    if len(_POSITIONS) > _MAX_PLANS:
        _POSITIONS.popitem(last=False)
    if is_capturing(device):
        _CAPTURED.append(known)
    return known


_POSITIONS: OrderedDict[tuple[torch.device, tuple[int, ...]], Tensor] = OrderedDict()


def local_tensors(work: GroupWork, index: int) -> tuple[Tensor, ...]:
    """Parameter, gradient, m, v, s of one parameter whose states are plain tensors."""
    m: Any = work.exp_avgs[index]
    v: Any = work.exp_avg_sqs[index]
    s: Any = work.exp_dev_sqs[index]
    return work.params[index], work.grads[index], m.tensor, v.tensor, s.tensor


def is_rounded(tensors: tuple[Tensor, ...], options: GroupOptions) -> bool:
    param, _, *moments = tensors
    is_low = param.dtype == torch.bfloat16 and options.stochastic_rounding
    return is_low or any(moment.dtype == torch.bfloat16 for moment in moments)


def _first_index(owner: Tensor) -> int:
    if not is_dtensor(owner) or owner.dim() == 0:
        return 0
    key = (owner.shape, owner.device_mesh, owner.placements)  # type: ignore[attr-defined]
    if key not in _FIRST_INDICES:  # a dozen microseconds per parameter otherwise
        if len(_FIRST_INDICES) >= 4096:
            _FIRST_INDICES.clear()
        _FIRST_INDICES[key] = shard_offsets(owner)[0] * math.prod(owner.shape[1:])
    return _FIRST_INDICES[key]


_FIRST_INDICES: dict[Any, int] = {}


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
