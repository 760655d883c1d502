"""Which implementation steps a group, and the step."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from poprisk_integrations.distributed import local_tensor
from poprisk_integrations.optim._capturable import _capturable_poprisk_adamw
from poprisk_integrations.optim._foreach import _multi_tensor_poprisk_adamw
from poprisk_integrations.optim._fused_compiled import (
    compiled_poprisk_adamw,
    compiler_is_found,
    warn_without_compiler,
)
from poprisk_integrations.optim._fused_triton import (
    triton_is_usable,
    triton_poprisk_adamw,
    triton_supports,
)
from poprisk_integrations.optim._options import GroupOptions
from poprisk_integrations.optim._single_tensor import _single_tensor_poprisk_adamw
from poprisk_integrations.optim._work import GroupWork

__all__ = ["needs_device_step", "path_of", "step_group"]

# Compiling takes seconds: below this size a training run may end before they are earned back.
AUTO_FUSED_NUMEL = 1 << 20


def path_of(group: dict[str, Any]) -> str:
    """The implementation of a group: the user's choice where it works, else the fastest.

    Args:
        group: A parameter group, complete.

    Returns:
        "fused_triton", "fused_compiled", "capturable" (scalars on the device), "foreach" or
        "single_tensor" (scalars on the host).
    """
    params: Sequence[Tensor] = group["params"]
    on_device = any(needs_device_step(p, group) for p in params)
    eager = "capturable" if on_device else "foreach" if group["foreach"] else "single_tensor"
    # Norms of whole tensors, which one elementwise pass cannot know.
    if group["preserve_norm"] or group["fused"] is False or not params:
        return eager
    if params[0].device.type != "cpu":
        # With `foreach=True` too: it asks for a kernel that takes all tensors at once: this one.
        return "fused_triton" if triton_is_usable(params[0].device) else eager
    if group["foreach"]:
        return eager
    is_asked_for = bool(group["fused"])
    pays = sum(local_tensor(p).numel() for p in params) >= AUTO_FUSED_NUMEL
    if (is_asked_for or pays) and compiler_is_found():
        return "fused_compiled"
    if is_asked_for:
        warn_without_compiler()
    return eager


def needs_device_step(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether the parameter's step counts live on its device."""
    return group["capturable"] or param.device.type != "cpu"


def step_group(
    path: str,
    work: GroupWork,
    options: GroupOptions,
    sums: list[Tensor] | None,
    keep: Tensor,
    grad_scale: Tensor | None,
) -> None:
    """Step of one group on one path; what a fused path leaves out goes to the eager one.

    Args:
        path: From `path_of`.
        work: Local tensors of the group.
        options: Resolved options.
        sums: Where to append gate statistics, or None.
        keep: 0-dim float32, 0 if the step must leave no trace; only for device scalars.
        grad_scale: 0-dim loss scale that the gradients still carry, or None.
    """
    on_device = work.params[0].device.type != "cpu" or options.capturable
    if path == "fused_triton":
        work = _step_by_triton(work, options, sums, keep, grad_scale)
    elif path == "fused_compiled":
        if not on_device and grad_scale is not None:
            work.grads = _unscaled(work.grads, grad_scale)
            grad_scale = None
        work = compiled_poprisk_adamw(work, options, sums, keep if on_device else None, grad_scale)
    if path.startswith("fused"):
        if not work.params:
            return
        path = "capturable" if on_device else "single_tensor"
    if grad_scale is not None:
        work.grads = _unscaled(work.grads, grad_scale)
    if path == "capturable":
        _capturable_poprisk_adamw(work, options, sums, keep)
    elif path == "foreach":
        _multi_tensor_poprisk_adamw(work, options, sums)
    else:
        _single_tensor_poprisk_adamw(work, options, sums)


def _step_by_triton(
    work: GroupWork,
    options: GroupOptions,
    sums: list[Tensor] | None,
    keep: Tensor,
    grad_scale: Tensor | None,
) -> GroupWork:
    """The kernel's step; returns the parameters that it does not support."""
    taken, left = GroupWork(), GroupWork()
    for i in range(len(work.params)):
        part = taken if triton_supports(work, i, options) else left
        part.extend_from(work, i)
    if taken.params:
        triton_poprisk_adamw(taken, options, sums, keep, grad_scale)
    return left


def _unscaled(grads: list[Tensor], grad_scale: Tensor) -> list[Tensor]:
    """Copies: a gradient is never written."""
    inverse = grad_scale.double().reciprocal().float()
    return [grad * inverse.to(grad.device) for grad in grads]
