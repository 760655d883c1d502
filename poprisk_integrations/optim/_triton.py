"""The fused step on CUDA, ROCm and XPU: one Triton launch per combination of dtypes.

The step of `_fused_math.py`, with the same scalars on the device, but each tensor is read and
written once. Tensors whose address or size is odd share a second launch, where a thread moves one
element at a time. Triton is imported on first use.
"""

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poprisk_integrations.optim._fused_math import capturable_poprisk_adamw
from poprisk_integrations.optim._gate_stats import row_of_sums
from poprisk_integrations.optim._options import DEFAULTS, MOMENTS, GroupOptions, resolve_group
from poprisk_integrations.optim._rounding import first_index, hash32, rounding_key
from poprisk_integrations.optim._scalars import (
    CAPTURED,
    is_capturing,
    positions_on,
    scalar_rows,
    upload,
)
from poprisk_integrations.optim._work import GroupWork, memory_order

__all__ = ["triton_is_usable", "triton_poprisk_adamw"]

_DTYPES = (torch.float32, torch.bfloat16)


def triton_poprisk_adamw(
    work: GroupWork,
    options: GroupOptions,
    sums: list[Tensor] | None,
    keep: Tensor,
    grad_scale: Tensor | None,
) -> GroupWork:
    """Step of one group on its device, without a host sync; arguments as in `step_group`.

    Returns the parameters that the kernel does not take; nothing of theirs has changed.
    """
    chosen = [i for i in range(len(work.params)) if supports(work, i, options)]
    if not chosen:
        return work
    left = work.only(set(range(len(work.params))).difference(chosen))
    work = work.only(chosen)
    rows, counts = scalar_rows(options, work.steps, work.dev_steps, keep, grad_scale)
    rows = rows.float().contiguous()
    launches = _collect_launches(work, options)
    if not launches:
        return left
    device = counts.device
    key = rounding_key(counts, positions_on(device, work.positions), options.rounding_seed)
    keys = torch.stack([key, hash32(key ^ 1)], dim=1)
    torch.autograd.graph.increment_version(work.params)
    for kind, launch in launches.items():
        tables = _tables_of(device, kind, launch)
        partials = _run(tables, kind, rows, keys, options, collect=sums is not None)
        if sums is not None:
            numel = partials.new_full((), float(sum(launch.numels)))
            n_open, gate, ungated_sq, gated_sq, n_dead = partials.sum(0).unbind()
            row = row_of_sums(numel, n_open, gate, ungated_sq, gated_sq, n_dead, options.lr)
            sums.append(row)
    return left


def supports(work: GroupWork, index: int, options: GroupOptions) -> bool:
    """Whether the kernel can update this parameter.

    Not in the kernel: 8-bit states, float64 and complex parameters, `preserve_norm`, gates of rows
    and tensors, tensors
    whose parameter, gradient and states are not laid out alike without gaps, and stochastic
    rounding of layouts where the n-th element in memory is not the n-th of the parameter.
    """
    owner = work.owners[index]
    if owner.is_complex() or (options.preserve_norm and options.gated) or options.pooled:
        return False
    tensors = _tensors_of(work, index)
    if not all(tensor.dtype in _DTYPES for tensor in tensors):
        return False
    is_rounded = _is_rounded(tensors, options)
    if all([tensor.is_contiguous() for tensor in tensors]):
        return not is_rounded or first_index(owner) is not None
    orders = {memory_order(tensor) for tensor in tensors}
    return len(orders) == 1 and None not in orders and not is_rounded


def _tensors_of(work: GroupWork, index: int) -> tuple[Tensor, ...]:
    """Parameter, gradient, m, v, s as stored (or the codes, of a dtype that is not supported).

    Where there is no s, v stands in its place: the kernel does not look there.
    """
    moments = [moment.tensors[0] for moment in work.moments(index)]
    return work.params[index], work.grads[index], *moments, *moments[1:][: 3 - len(moments)]


def _is_rounded(tensors: tuple[Tensor, ...], options: GroupOptions) -> bool:
    param, _, *moments = tensors
    is_low = param.dtype == torch.bfloat16 and options.stochastic_rounding
    return is_low or any(moment.dtype == torch.bfloat16 for moment in moments)


class Kind(NamedTuple):
    """What tensors of one launch have in common."""

    dtypes: tuple[torch.dtype, ...]  # of parameters, gradients, m, v, s
    is_vector: bool  # whether 16 bytes can be moved at once, by address and by size


@dataclass(slots=True)
class Launch:
    """Tensors of one launch, as a step collects them; addresses five by five."""

    is_rounded: bool
    rows: list[int] = field(default_factory=list)
    numels: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)


def _collect_launches(work: GroupWork, options: GroupOptions) -> dict[Kind, Launch]:
    from poprisk_integrations.optim._triton_kernel import VECTOR_NUMEL

    # One pass with few calls: with thousands of small tensors this loop is what a step costs.
    launches: dict[Kind, Launch] = {}
    for i in range(len(work.params)):
        tensors = p, g, m, v, s = _tensors_of(work, i)
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
            launch = launches[kind] = Launch(_is_rounded(tensors, options))
        launch.rows.append(i)
        launch.numels.append(numel)
        launch.offsets.append((first_index(work.owners[i]) or 0) if launch.is_rounded else 0)
        launch.addresses += addresses
    return launches


@dataclass(slots=True)
class Tables:
    """Tables of a launch on the device. None is ever overwritten: captured graphs read them."""

    layout: Tensor  # int64 (tensors, 3), see the kernel
    blocks: Tensor  # int32 (programs, 2)
    addresses: list[int] | None = None  # what `table` holds, on the host
    table: Tensor | None = None  # int64 (tensors, 5)


def _tables_of(device: torch.device, kind: Kind, launch: Launch) -> Tables:
    """The tables of a launch: reused while sizes stay, addresses renewed where one has moved.

    Everything that a table says is compared, so that none is ever stale: the allocator moves
    gradients from step to step, and wrappers swap parameters behind the optimizer.
    """
    layout = tuple(zip(launch.numels, launch.rows, launch.offsets, strict=True))
    tables = _tables(device, kind, layout)
    if tables.addresses != launch.addresses:
        tables.addresses = launch.addresses
        tables.table = upload(torch.tensor(launch.addresses, dtype=torch.int64), device)
    if is_capturing(device):
        CAPTURED.append((tables.layout, tables.blocks, tables.table))
    return tables


@lru_cache(maxsize=256)
def _tables(device: torch.device, kind: Kind, layout: tuple[tuple[int, int, int], ...]) -> Tables:
    from poprisk_integrations.optim._triton_kernel import BLOCK

    # which tensor each program works on, and which block of it
    counts = torch.tensor([-(-numel // BLOCK) for numel, _, _ in layout])
    tensor = torch.repeat_interleave(torch.arange(len(layout)), counts)
    start = counts.cumsum(0) - counts
    block = torch.arange(tensor.numel()) - start[tensor]
    blocks = torch.stack([tensor, block], dim=1).to(torch.int32)
    return Tables(upload(torch.tensor(layout, dtype=torch.int64), device), upload(blocks, device))


def _run(
    tables: Tables, kind: Kind, rows: Tensor, keys: Tensor, options: GroupOptions, *, collect: bool
) -> Tensor:
    from poprisk_integrations.optim import _triton_kernel as kernel

    programs, device = tables.blocks.shape[0], rows.device
    partials = torch.empty(programs if collect else 1, kernel.PARTIALS, device=device)
    on_device: Any = contextlib.nullcontext()  # on the CPU, for Triton's interpreter
    if device.type != "cpu":
        on_device = getattr(torch, device.type).device(device)
    with on_device:
        kernel.poprisk_adamw_kernel[(programs,)](
            tables.table,
            tables.layout,
            tables.blocks,
            rows,
            keys,
            partials,
            **kernel_constants(kind, options, collect=collect),
            num_warps=4 if kind.is_vector else 8,  # registers: a mask per element takes many
            # a product and a sum round separately, as in the other paths
            enable_fp_fusion=False,
        )
    return partials


def kernel_constants(kind: Kind, options: GroupOptions, *, collect: bool) -> dict[str, Any]:
    """What the kernel is compiled for; few combinations occur in one run."""
    import triton.language as tl

    from poprisk_integrations.optim._triton_kernel import BLOCK

    names = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    return {
        **dict(zip("PGMVS", (names[dtype] for dtype in kind.dtypes), strict=True)),
        "GATE": options.gate if options.gated else "none",
        "HAS_S": options.gated and not options.from_moments,
        "GATE_DECAY": options.gate_decay and options.gated,
        "HAS_GATE_EPS": options.gate_eps > 0,
        "MAXIMIZE": options.maximize,
        "ROUND_PARAM": options.stochastic_rounding and kind.dtypes[0] == torch.bfloat16,
        "COLLECT": collect,
        "VECTOR": kind.is_vector,
        "BLOCK": BLOCK,
    }


_USABLE: dict[torch.device, bool] = {}


def triton_is_usable(device: torch.device) -> bool:
    """Whether the kernel compiles, runs and gives the eager result here; probed once per device.

    One warning says why not, where it should.
    """
    if device.type not in ("cuda", "xpu"):
        return False
    if device not in _USABLE and not is_capturing(device):  # a probe cannot be captured
        try:
            problem = _probe(device)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            warnings.warn(
                f"The fused kernel cannot be used on {device} ({problem}). Steps take the path "
                "with one operation at a time, which gives the same results more slowly.",
                stacklevel=2,
            )
        _USABLE[device] = not problem
    return _USABLE.get(device, False)


def _probe(device: torch.device) -> str | None:
    """Three steps by the kernel and by single operations; what is wrong, or None."""
    chosen = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "alpha": 0.2, "rho": 0.9}
    chosen |= {"noise_source": "temporal", "capturable": True}  # all that the kernel can do
    options = resolve_group({**DEFAULTS, **chosen})
    keep = torch.ones((), device=device)
    for dtype in _DTYPES:
        fused, eager = ([torch.linspace(-1, 1, 1500, device=device).to(dtype)] for _ in range(2))
        for tensors in (fused, eager):
            tensors += [torch.zeros_like(tensors[0]) for _ in MOMENTS]
        fused_counts, eager_counts = (torch.zeros(2, device=device).unbind() for _ in range(2))
        for step in range(3):
            grad = torch.linspace(step - 1.5, 1, 1500, device=device).cos().to(dtype)
            triton_poprisk_adamw(_one(fused, grad, fused_counts), options, None, keep, None)
            capturable_poprisk_adamw(_one(eager, grad, eager_counts), options, None, keep, None)
        digits = 1e-4 if dtype == torch.float32 else 2**-6
        for name, ours, theirs in zip(("param", *MOMENTS), fused, eager, strict=True):
            if not torch.allclose(ours, theirs, rtol=digits, atol=1e-6):
                return f"{name} in {dtype} differs from the eager result"
    return None


def _one(tensors: list[Tensor], grad: Tensor, counts: Sequence[Tensor]) -> GroupWork:
    work = GroupWork()
    state = dict(zip((*MOMENTS, "step", "dev_step"), (*tensors[1:], *counts), strict=True))
    work.append(tensors[0], grad, 0, state)
    return work
