"""`fused=True` on CPU: one compiled pass over each parameter."""

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from poprisk_integrations.optim._fused_math import (
    FusedPlan,
    Parts,
    fused_update,
    sampled_sums,
    stored,
)
from poprisk_integrations.optim._options import GroupOptions
from poprisk_integrations.optim._rounding import first_index, rounding_key
from poprisk_integrations.optim._scalars import COLUMNS, positions_on, scalar_rows
from poprisk_integrations.optim._states import BLOCK
from poprisk_integrations.optim._work import GroupWork, PooledGate, memory_order

__all__ = ["compiled_poprisk_adamw", "compiler_is_found", "warn_without_compiler"]

Update = Callable[..., None]
_failures: list[str] = []
logger = logging.getLogger("poprisk_integrations")

PARALLEL_NUMEL = 1 << 15  # waking threads costs as much as some ten thousand elements


def compiler_is_found() -> bool:
    """Whether torch.compile can be expected to work here; no compilation is started."""
    return not _failures and any(shutil.which(name) for name in _compilers())


def warn_without_compiler() -> None:
    """Say once in a process why `fused=True` has no effect."""
    if not _failures:
        _failures.append("no C++ compiler")
        warnings.warn(
            "PopRiskAdamW(fused=True) steps without compilation: none of the C++ compilers "
            f"{_compilers()} was found. Install one, or name it in the environment variable CXX.",
            stacklevel=2,
        )


def _compilers() -> list[str]:
    chosen = os.environ.get("CXX")
    return [chosen] if chosen else ["g++", "clang++"]


def compiled_poprisk_adamw(
    work: GroupWork,
    options: GroupOptions,
    sums: list[Tensor] | None,
    keep: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> GroupWork:
    """Step of one group, one call of a compiled function per parameter.

    Tensors are flattened, so that one compilation serves all shapes of a dtype; scalars are data.
    Arguments as in `step_group`, `keep` and `grad_scale` only where step counts live on the device.
    Returns the parameters that were left out untouched, for want of a usable layout or a compiler.
    """
    calls: dict[int, tuple[_Flat, Update]] = {}
    for i in range(len(work.params)):
        plan = FusedPlan.of(options, work, i, on_device=keep is not None)
        flat = _flatten(work, i, plan)
        update = None if flat is None else _update_for(flat)
        if flat is not None and update is not None:
            calls[i] = flat, update
    left = work.only(i for i in range(len(work.params)) if i not in calls)
    if not calls:
        return left
    chosen = work.only(calls)
    rows, counts = scalar_rows(options, chosen.steps, chosen.dev_steps, keep, grad_scale)
    positions = positions_on(counts.device, chosen.positions)
    keys = rounding_key(counts, positions, options.rounding_seed)
    for row, key, param, (flat, update) in zip(
        rows, keys, chosen.params, calls.values(), strict=True
    ):
        row = row.to(flat.math_dtype, copy=True)  # no view, see `_reshaped`
        key = key.clone() if flat.plan.rounds else None
        gate = None if flat.shared is None else flat.shared.gate
        update(flat.param, flat.grad, flat.moments, row, key, flat.offset, gate)
        # `_reshaped` tensors count their own changes; autograd must see those of the parameter.
        increment_version(param)
        if sums is not None:
            c = dict(zip(COLUMNS, row.unbind(), strict=True))
            sums.append(sampled_sums(flat.moments, c, flat.plan, options.lr, shared=flat.shared))
    return left


@dataclass(frozen=True, slots=True)
class _Flat:
    """One parameter with its gradient and moments in the shape that the compiled function takes."""

    plan: FusedPlan
    param: Tensor
    grad: Tensor
    moments: Parts
    offset: Tensor | None  # global index of the first element, where anything is rounded
    shared: PooledGate | None  # in the shape of `FusedPlan.gate_shape`

    @property
    def math_dtype(self) -> torch.dtype:
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32


def _flatten(work: GroupWork, index: int, plan: FusedPlan) -> _Flat | None:
    """Flat views that share memory, or None where the layout does not allow them."""
    param, grad = work.params[index], work.grads[index]
    # One element would be a graph of its own.
    if param.numel() < 2:
        return None
    tensors = [moment.tensors for moment in work.moments(index)]
    parallel = [param, *(parts[0] for parts in tensors)]
    if any(t.stride() != param.stride() for t in parallel) or memory_order(param) is None:
        return None
    offset = None
    if plan.rounds:
        # The draws are numbered in row-major order.
        offset = first_index(work.owners[index]) if param.is_contiguous() else None
        if offset is None:
            return None
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    shape, shared = plan.shape_of(param), None
    if plan.pooled:
        # Sizes of one would be graphs of their own, and rows are those of row-major order.
        if plan.pooled == "row" and (1 in shape or not param.is_contiguous()):
            return None
        gates = plan.gate_shape(shape[0])
        shared = PooledGate(*(_reshaped(part.clone(), gates) for part in work.pooled[index]))
    return _Flat(
        plan,
        _reshaped(param, shape),
        _reshaped(grad, shape),
        tuple(
            (_reshaped(parts[0], shape), *(_reshaped(p, p.shape) for p in parts[1:]))
            for parts in tensors
        ),
        None if offset is None else torch.tensor(offset, device=param.device),
        shared,
    )


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Another shape on the same memory, for dense tensors."""
    # Not a view: Dynamo guards on the sizes of a view's base and would compile each anew.
    place = tensor.untyped_storage(), tensor.storage_offset()
    return tensor.new_empty(0).set_(*place, shape, (*shape[1:], 1) if shape else ())


def _update_for(flat: _Flat) -> Update | None:
    param, threads = flat.param, torch.get_num_threads()
    is_parallel = param.numel() >= PARALLEL_NUMEL and threads > 1
    return _compiled(flat.plan, param.dtype, flat.grad.dtype, is_parallel)


@cache
def _compiled(
    plan: FusedPlan, param_dtype: torch.dtype, grad_dtype: torch.dtype, is_parallel: bool
) -> Update | None:
    """The function compiled for one plan, tried on a small problem; None if that failed."""

    def update(
        param: Tensor,
        grad: Tensor,
        moments: Parts,
        row: Tensor,
        key: Tensor | None,
        offset: Tensor | None,
        gate: Tensor | None,
    ) -> None:
        c = dict(zip(COLUMNS, row.unbind(), strict=True))
        values = fused_update(param, grad, moments, c, plan, None, gate)
        index = None
        if offset is not None:
            index = torch.arange(param.numel(), device=param.device) + offset
            index = index.to(torch.int32).view(param.shape)
        new_param, parts = stored(values, moments, c["keep"], plan, key, index)
        param.copy_(new_param)
        for targets, part in zip(moments, parts, strict=True):
            for target, value in zip(targets, part, strict=True):
                if value is not target:
                    target.copy_(value)

    if _failures:
        return None
    # Not through `warnings`: nothing is wrong, but a training that stands still must say why.
    logger.warning(
        "PopRiskAdamW compiles its fused step for %s parameters: some %d seconds of CPU time, "
        "once; later runs take most of it from torch's cache. fused=False does without.",
        str(param_dtype).removeprefix("torch."),
        30 if "8bit" in plan.formats else 15,
    )
    # Dynamo limits recompilations per code object, which all closures would share.
    update.__code__ = update.__code__.replace(co_name=f"poprisk_adamw_{abs(hash(plan)):x}")
    # An option, because the compiler's cache on disk does not tell sizes apart.
    threads: dict[str, Any] = {} if is_parallel else {"cpp.threads": 1}
    compiled: Update = torch.compile(update, fullgraph=True, dynamic=True, options=threads or None)
    try:
        with torch.device("cpu"):  # whatever the default is
            rows = 4001 if is_parallel else 5
            problem = _small_problem(plan, param_dtype, grad_dtype, rows)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the compiler's own imports
            compiled(*problem)
    except Exception as error:  # whatever a compiler can do wrong: the eager path is right
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _failures.append(reason)
        warnings.warn(
            f"PopRiskAdamW(fused=True) steps without compilation, which failed: {reason}",
            stacklevel=2,
        )
        return None
    return compiled


def _small_problem(
    plan: FusedPlan, param_dtype: torch.dtype, grad_dtype: torch.dtype, rows: int
) -> tuple[object, ...]:
    # Sizes that are neither 1 nor equal, so that none is taken for a constant or for another. The
    # compiler uses threads only if the size that it sees is worth them.
    shape = plan.shape_of(torch.empty(rows, 71))
    math_dtype = torch.float64 if param_dtype == torch.float64 else torch.float32
    dtypes = {"bfloat16": torch.bfloat16, "8bit": torch.uint8}
    moments = []
    for kind in plan.formats:
        values = torch.zeros(shape, dtype=dtypes.get(kind, math_dtype))
        scale = torch.zeros(rows, -(-71 // BLOCK))
        moments.append((values, scale) if kind == "8bit" else (values,))
    return (
        torch.zeros(shape, dtype=param_dtype),
        torch.zeros(shape, dtype=grad_dtype),
        tuple(moments),
        torch.ones(len(COLUMNS), dtype=math_dtype),
        torch.zeros((), dtype=torch.int32) if plan.rounds else None,
        torch.tensor(0) if plan.rounds else None,
        torch.ones(plan.gate_shape(rows), dtype=math_dtype) if plan.pooled else None,
    )
