"""`fused=True` without a hand-written kernel: one compiled pass over each parameter."""

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

from poprisk_integrations.distributed import is_dtensor
from poprisk_integrations.optim._block_codes import BLOCK
from poprisk_integrations.optim._fused_math import FusedPlan, fused_update, sampled_sums
from poprisk_integrations.optim._gate_stats import COLUMNS as STATISTICS
from poprisk_integrations.optim._moments import Moment
from poprisk_integrations.optim._options import GroupOptions
from poprisk_integrations.optim._rounding import rounding_key, shard_offsets
from poprisk_integrations.optim._scalar_rows import COLUMNS, device_rows, host_rows
from poprisk_integrations.optim._work import GroupWork

__all__ = ["compiled_poprisk_adamw", "compiler_is_found"]

Update = Callable[..., None]
_failures: list[str] = []
logger = logging.getLogger("poprisk_integrations")

PARALLEL_NUMEL = 1 << 15


def compiler_is_found() -> bool:
    """Whether torch.compile can be expected to work here; no compilation is started."""
    if _failures:
        return False
    return any(shutil.which(name) for name in _compilers())


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

    Args:
        work: Local tensors of the group; parameters and states are changed in place.
        options: Resolved options.
        sums: Where to append gate statistics, or None on steps that do not ask for them.
        keep: Where step counts live on the device: 0-dim, 0 for a step that leaves no trace.
        grad_scale: With `keep`: 0-dim loss scale that the gradients still carry, or None.

    Returns:
        The parameters that were left out, for want of a usable layout or of a compiler. Their
        states and step counts are untouched.
    """
    left, chosen = GroupWork(), GroupWork()
    calls: list[tuple[_Flat, FusedPlan, Update]] = []
    for i in range(len(work.params)):
        flat = _flatten(work, i, options)
        update = None
        if flat is not None:
            plan = FusedPlan.of(
                options,
                formats=flat.formats,
                rounds_param=flat.rounds_param,
                on_device=keep is not None,
            )
            dtypes = flat.param.dtype, flat.grad.dtype
            update = _compiled(
                plan, *dtypes, flat.param.device.type, is_parallel=_is_parallel(flat.param)
            )
        if flat is None or update is None:
            left.extend_from(work, i)
        else:
            chosen.extend_from(work, i)
            calls.append((flat, plan, update))
    if not calls:
        return left
    rows = _rows(chosen, options, keep, grad_scale)
    keys = _rounding_keys(chosen, options) if any(flat.rounds for flat, *_ in calls) else None
    for i, (flat, plan, update) in enumerate(calls):
        key = None if keys is None or not flat.rounds else keys[i].clone()
        row = rows[i].to(flat.math_dtype, copy=True)  # no view, see `_reshaped`
        update(flat.param, flat.grad, flat.moments, row, key, flat.offset)
        # `_reshaped` tensors count their own changes; autograd must see those of the parameter.
        increment_version(chosen.params[i])
        if sums is not None:
            row_of_sums = sampled_sums(flat.moments, row, plan)
            row_of_sums[STATISTICS.index("lr_numel")] = options.lr * flat.param.numel()
            sums.append(row_of_sums)
    return left


def _rounding_keys(work: GroupWork, options: GroupOptions) -> Tensor:
    device = work.params[0].device
    steps, positions = torch.stack(work.steps), torch.tensor(work.positions)
    return rounding_key(steps.to(device), positions.to(device), options.rounding_seed)


def _rows(
    work: GroupWork, options: GroupOptions, keep: Tensor | None, grad_scale: Tensor | None
) -> Tensor:
    """Scalars in float64, and advance of the step counts."""
    if keep is not None:
        rows, _ = device_rows(
            options, work.steps, work.dev_steps, keep, grad_scale, dtype=torch.float64
        )
        return rows
    steps = [step.item() + 1 for step in work.steps]
    seen = [dev_step.item() for dev_step in work.dev_steps]
    rows, scalars = host_rows(options, steps, seen, torch.float64)
    torch._foreach_add_(work.steps, 1)
    moved = [
        dev_step
        for dev_step, s in zip(work.dev_steps, scalars, strict=True)
        if options.gated and s.mean_scale is not None
    ]
    if moved:
        torch._foreach_add_(moved, 1)
    return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flat:
    """One parameter with its gradient and moments in the shape that the compiled function takes."""

    param: Tensor
    grad: Tensor
    moments: tuple[tuple[Tensor, ...], ...]
    formats: tuple[str, str, str]
    rounds_param: bool
    offset: Tensor | None

    @property
    def math_dtype(self) -> torch.dtype:
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32

    @property
    def rounds(self) -> bool:
        return self.rounds_param or any(f in ("bfloat16", "8bit") for f in self.formats)


def _flatten(work: GroupWork, index: int, options: GroupOptions) -> _Flat | None:
    """Flat views that share memory, or None where the layout does not allow them."""
    param, grad = work.params[index], work.grads[index]
    # One element would be a graph of its own.
    if param.numel() < 2:
        return None
    stored: list[Moment] = [
        moments[index] for moments in (work.exp_avgs, work.exp_avg_sqs, work.exp_dev_sqs)
    ]
    formats = tuple(moment.kind for moment in stored)
    tensors = [moment.tensors for moment in stored]
    rounds_param = param.dtype == torch.bfloat16 and options.stochastic_rounding
    rounds = rounds_param or any(kind in ("bfloat16", "8bit") for kind in formats)
    parallel = [param, *(parts[0] for parts in tensors)]
    if any(t.stride() != param.stride() for t in parallel) or not _is_dense(param):
        return None
    offset = None
    if rounds:
        # The draws are numbered in row-major order.
        offset = _linear_offset(work.owners[index]) if param.is_contiguous() else None
        if offset is None:
            return None
    if grad.stride() != param.stride():
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    shape: tuple[int, ...] = (param.numel(),)
    if "8bit" in formats:
        shape = (param.shape[0], param[0].numel())

    return _Flat(
        param=_reshaped(param, shape),
        grad=_reshaped(grad, shape),
        moments=tuple(
            (_reshaped(parts[0], shape), *(_reshaped(p, p.shape) for p in parts[1:]))
            for parts in tensors
        ),
        formats=formats,  # type: ignore[arg-type]
        rounds_param=rounds_param,
        offset=torch.tensor(offset, device=param.device) if rounds else None,
    )


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Another shape on the same memory, for dense tensors."""
    # Not a view: Dynamo guards on the sizes of a view's base and would compile each anew.
    place = tensor.untyped_storage(), tensor.storage_offset()
    return tensor.new_empty(0).set_(*place, shape, (*shape[1:], 1))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a block of memory without holes or overlap, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _linear_offset(owner: Tensor) -> int | None:
    """Global index of a shard's first element, or None if its elements are not consecutive."""
    if not is_dtensor(owner):
        return 0
    first, *rest = shard_offsets(owner)
    local_shape = owner._local_tensor.shape  # type: ignore[attr-defined]
    if any(rest) or local_shape[1:] != owner.shape[1:]:
        return None
    return int(first * owner.shape[1:].numel())


def _is_parallel(param: Tensor) -> bool:
    """Whether threads pay: waking them costs as much as some ten thousand elements."""
    return param.numel() >= PARALLEL_NUMEL and torch.get_num_threads() > 1


@cache
def _compiled(
    plan: FusedPlan,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: str,
    *,
    is_parallel: bool,
) -> Update | None:
    """The function compiled for one plan, tried on a small problem; None if that failed."""

    def update(
        param: Tensor,
        grad: Tensor,
        moments: tuple[tuple[Tensor, ...], ...],
        row: Tensor,
        key: Tensor | None,
        offset: Tensor | None,
    ) -> None:
        fused_update(param, grad, moments, row, key, offset, plan)

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
    threads: dict[str, Any] = {} if is_parallel or device != "cpu" else {"cpp.threads": 1}
    compiled: Update = torch.compile(update, fullgraph=True, dynamic=True, options=threads or None)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the compiler's own imports
            rows = 4001 if is_parallel else 5
            compiled(*_small_problem(plan, param_dtype, grad_dtype, device, rows))
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
    plan: FusedPlan, param_dtype: torch.dtype, grad_dtype: torch.dtype, device: str, rows: int
) -> tuple[object, ...]:
    # Sizes that are neither 1 nor equal, so that none is taken for a constant or for another. The
    # compiler uses threads only if the size that it sees is worth them.
    shape = (rows, 71) if "8bit" in plan.formats else (rows * 71,)
    math_dtype = torch.float64 if param_dtype == torch.float64 else torch.float32
    stored = {"bfloat16": torch.bfloat16, "8bit": torch.uint8}
    rounds = plan.rounds
    moments = []
    for kind in plan.formats:
        values = torch.zeros(shape, dtype=stored.get(kind, math_dtype), device=device)
        scale = torch.zeros(rows, -(-71 // BLOCK), device=device)
        moments.append((values, scale) if kind == "8bit" else (values,))
    return (
        torch.zeros(shape, dtype=param_dtype, device=device),
        torch.zeros(shape, dtype=grad_dtype, device=device),
        tuple(moments),
        torch.ones(len(COLUMNS), dtype=math_dtype, device=device),
        torch.zeros((), dtype=torch.int32, device=device) if rounds else None,
        torch.tensor(0, device=device) if rounds else None,
    )
