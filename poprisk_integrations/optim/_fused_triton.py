"""`fused=True` on CUDA, ROCm and XPU: one Triton launch per combination of dtypes.

The same steps as `_capturable.py`, with the same scalars on the device, but each tensor is read
and written once. Tensors whose address or size is odd share a second launch, where a thread moves
one element at a time. Triton is imported on first use.
"""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.distributed import is_dtensor
from poprisk_integrations.optim._capturable import _capturable_poprisk_adamw
from poprisk_integrations.optim._gate_stats import COLUMNS
from poprisk_integrations.optim._moments import MOMENTS
from poprisk_integrations.optim._options import GroupOptions
from poprisk_integrations.optim._rounding import hash32, rounding_key
from poprisk_integrations.optim._scalar_rows import device_rows
from poprisk_integrations.optim._triton_tables import (
    Kind,
    Plan,
    collect_launches,
    is_capturing,
    is_rounded,
    local_tensors,
    plan_of,
    positions_on,
)
from poprisk_integrations.optim._work import GroupWork

__all__ = ["triton_is_usable", "triton_poprisk_adamw", "triton_supports"]

_DTYPES = (torch.float32, torch.bfloat16)


def triton_poprisk_adamw(
    work: GroupWork,
    options: GroupOptions,
    sums: list[Tensor] | None,
    keep: Tensor,
    grad_scale: Tensor | None,
) -> None:
    """Step of one group on its devices, without a host sync.

    Args:
        work: Local tensors of the group, all accepted by `triton_supports`; steps on the device.
        options: Resolved options; `lr` may be a tensor on the device.
        sums: Where to append gate statistics, one row per launch, or None.
        keep: 0-dim float32, 1 if all gradients of the step are finite, else 0.
        grad_scale: 0-dim loss scale that the gradients still carry, or None.
    """
    for device, indices in _by_device(work).items():
        rows, counts = device_rows(
            options,
            [work.steps[i] for i in indices],
            [work.dev_steps[i] for i in indices],
            keep,
            grad_scale,
        )
        rows = rows.contiguous()
        launches = collect_launches(work, indices, options)
        if not launches:
            continue
        keys = _rounding_keys(counts, [work.positions[i] for i in indices], options.rounding_seed)
        torch.autograd.graph.increment_version([work.params[i] for i in indices])
        for kind, launch in launches.items():
            plan = plan_of(device, kind, launch)
            partials = _run(plan, kind, rows, keys, options, collect=sums is not None)
            if sums is not None:
                sums.append(_statistics(plan.numel, partials, options.lr))


def triton_supports(work: GroupWork, index: int, options: GroupOptions) -> bool:
    """Whether the kernel can update this parameter; the capturable path takes the others.

    Not in the kernel: 8-bit states, float64 and complex parameters, `preserve_norm`, tensors
    whose parameter, gradient and states are not laid out alike without gaps, and stochastic
    rounding of layouts where the n-th element in memory is not the n-th of the parameter.

    Args:
        work: The group's work.
        index: Which parameter of it.
        options: Resolved options.
    """
    owner = work.owners[index]
    if owner.is_complex() or (options.preserve_norm and options.gated):
        return False
    moments = (work.exp_avgs[index], work.exp_avg_sqs[index], work.exp_dev_sqs[index])
    if not all(hasattr(moment, "tensor") for moment in moments):
        return False
    tensors = local_tensors(work, index)
    if not all(tensor.dtype in _DTYPES for tensor in tensors):
        return False
    if all([tensor.is_contiguous() for tensor in tensors]):
        if not is_dtensor(owner) or not is_rounded(tensors, options):
            return True
        return _keeps_order(owner, tensors[0])
    orders = {_memory_order(tensor) for tensor in tensors}
    return len(orders) == 1 and None not in orders and not is_rounded(tensors, options)


def triton_is_usable(device: torch.device) -> bool:
    """Whether the kernel compiles, runs and gives the eager result here; probed once per device.

    One warning says why not, where it should. On the CPU only Triton's interpreter runs, which
    is for tests.

    Args:
        device: Of the parameters.
    """
    device = torch.device(device)
    if device in _USABLE:
        return _USABLE[device]
    if is_capturing(device):
        return False  # a probe cannot be captured; asked again later
    is_candidate = device.type in ("cuda", "xpu") or (device.type == "cpu" and _is_interpreted())
    problem: str | None = None
    if is_candidate:
        try:
            problem = _probe(device)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(
            f"The fused kernel cannot be used on {device} ({problem}). Steps take the path with "
            "one operation at a time, which gives the same results more slowly.",
            stacklevel=2,
        )
    _USABLE[device] = is_candidate and not problem
    return _USABLE[device]


def _probe(device: torch.device) -> str | None:
    """Three steps by the kernel and by single operations; what is wrong, or None."""
    options = GroupOptions(
        lr=1e-2,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        gate="soft",
        alpha=0.2,
        lambda_pop=0.2,
        gate_eps=0.0,
        rho=0.9,
        gate_warmup=0,
        gate_blend=1.0,
        gate_decay=False,
        preserve_norm=False,
        centered=True,
        maximize=False,
        capturable=True,
        from_pieces=False,
        stochastic_rounding=True,
        rounding_seed=0,
    )
    keep = torch.ones((), device=device)
    for dtype in _DTYPES:
        fused, eager = ([torch.linspace(-1, 1, 1500, device=device).to(dtype)] for _ in range(2))
        for tensors in (fused, eager):
            tensors += [torch.zeros_like(tensors[0]) for _ in MOMENTS]
        fused_counts, eager_counts = (torch.zeros(2, device=device).unbind() for _ in range(2))
        for step in range(3):
            grad = torch.linspace(step - 1.5, 1, 1500, device=device).cos().to(dtype)
            triton_poprisk_adamw(_one(fused, grad, fused_counts), options, None, keep, None)
            _capturable_poprisk_adamw(_one(eager, grad, eager_counts), options, None, keep)
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


_USABLE: dict[torch.device, bool] = {}


def _rounding_keys(counts: Tensor, positions: list[int], seed: int) -> Tensor:
    where = positions_on(counts.device, tuple(positions))
    key = rounding_key(counts, where, seed)
    return torch.stack([key, hash32(key ^ 1)], dim=1)


def _run(
    plan: Plan,
    kind: Kind,
    rows: Tensor,
    keys: Tensor,
    options: GroupOptions,
    *,
    collect: bool,
) -> Tensor:
    from poprisk_integrations.optim import _triton_kernel as kernel

    programs = plan.blocks.shape[0]
    partials = torch.empty(programs if collect else 1, kernel.PARTIALS, device=plan.device)
    with _on(plan.device):
        kernel.poprisk_adamw_kernel[(programs,)](
            plan.table,
            plan.layout,
            plan.blocks,
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
    from poprisk_integrations.optim._triton_kernel import BLOCK

    return {
        **dict(zip("PGMVS", map(_triton_dtype, kind.dtypes), strict=True)),
        "GATE": options.gate if options.gated else "none",
        "GATE_DECAY": options.gate_decay and options.gated,
        "HAS_GATE_EPS": options.gate_eps > 0,
        "MAXIMIZE": options.maximize,
        "ROUND_PARAM": options.stochastic_rounding and kind.dtypes[0] == torch.bfloat16,
        "COLLECT": collect,
        "VECTOR": kind.is_vector,
        "BLOCK": BLOCK,
    }


def _statistics(numel: int, partials: Tensor, lr: float | Tensor) -> Tensor:
    """The columns of `_gate_stats.parameter_sums`, added over the tensors of a launch."""
    n_open, gate, ungated_sq, gated_sq, dead = partials.sum(0).unbind()
    total = partials.new_full((), float(numel))
    lr_numel = (total * lr).reshape(())
    row = [total, n_open, gate, ungated_sq, gated_sq, dead, total - n_open - dead, lr_numel]
    assert len(row) == len(COLUMNS)
    return torch.stack([column.to(partials.dtype) for column in row])


def _by_device(work: GroupWork) -> dict[torch.device, list[int]]:
    indices: dict[torch.device, list[int]] = {}
    for i, param in enumerate(work.params):
        indices.setdefault(param.device, []).append(i)
    return indices


def _keeps_order(owner: Tensor, local: Tensor) -> bool:
    # whole rows: the shard is one run of the parameter's elements
    return local.dim() == 0 or local.shape[1:] == owner.shape[1:]


def _memory_order(tensor: Tensor) -> tuple[tuple[int, int], ...] | None:
    """(stride, size) from the fastest dimension on; None if elements overlap or leave gaps."""
    order = sorted(
        (stride, size, dim)
        for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True))
        if size != 1
    )
    expected = 1
    for stride, size, _ in order:
        if stride != expected:
            return None
        expected *= size
    return tuple((dim, stride) for stride, _, dim in order)


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


def _on(device: torch.device) -> Any:
    if device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, device.type).device(device)


def _is_interpreted() -> bool:
    try:
        from triton.runtime.jit import JITFunction

        from poprisk_integrations.optim._triton_kernel import poprisk_adamw_kernel
    except ImportError:
        return False
    return not isinstance(poprisk_adamw_kernel, JITFunction)
