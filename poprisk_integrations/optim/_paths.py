"""Which implementation steps a group, and the step."""

import warnings
from functools import cache
from typing import Any

from torch import Tensor

from poprisk_integrations.distributed import local_tensor
from poprisk_integrations.optim._compiled import (
    compiled_poprisk_adamw,
    compiler_is_found,
    warn_without_compiler,
)
from poprisk_integrations.optim._eager import (
    multi_tensor_poprisk_adamw,
    single_tensor_poprisk_adamw,
)
from poprisk_integrations.optim._fused_math import capturable_poprisk_adamw
from poprisk_integrations.optim._options import GroupOptions, needs_device_step, uses_pooling
from poprisk_integrations.optim._triton import triton_is_usable, triton_poprisk_adamw
from poprisk_integrations.optim._work import GroupWork

__all__ = ["path_of", "step_group"]

# Compiling takes seconds: below this size a training run may end before they are earned back.
AUTO_FUSED_NUMEL = 1 << 20


def path_of(group: dict[str, Any]) -> str:
    """The implementation of a group: the user's choice where it works, else the fastest.

    "fused_triton", "fused_compiled", "capturable" (scalars on the device), "foreach" or
    "single_tensor" (scalars on the host).
    """
    params: list[Tensor] = group["params"]
    # With scalars on the device, all tensors of a shape are taken at once, `foreach` or not.
    on_device = any(needs_device_step(p, group) for p in params)
    eager = "capturable" if on_device else "foreach" if group["foreach"] else "single_tensor"
    # Norms of whole tensors, which one elementwise pass cannot know.
    if group["preserve_norm"] or group["fused"] is False or not params:
        return eager
    if params[0].device.type != "cpu" and uses_pooling(group):
        if group["fused"]:
            _warn_of_grain(group["granularity"], params[0].device.type)
        return eager
    if params[0].device.type != "cpu":
        # One launch for all tensors is what `foreach=True` asks for, too.
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


@cache
def _warn_of_grain(granularity: str, device: str) -> None:
    """Say once in a process why `fused=True` has no effect."""
    warnings.warn(
        f"PopRiskAdamW(fused=True, granularity={granularity!r}) steps without the fused kernel on "
        f"{device}, which has a gate for each coordinate: one operation at a time.",
        stacklevel=2,
    )


def step_group(
    path: str,
    work: GroupWork,
    options: GroupOptions,
    sums: list[Tensor] | None,
    keep: Tensor,
    grad_scale: Tensor | None,
) -> None:
    """Step of one group on the path of `path_of`; what a fused one leaves out, an eager one takes.

    Gate statistics are appended to `sums`, if there is such a list. `keep` is 0-dim float32, 0 if
    the step must leave no trace (which only paths with scalars on the device look at), and
    `grad_scale` a 0-dim loss scale that the gradients still carry.
    """
    on_device = options.capturable or work.params[0].device.type != "cpu"
    if grad_scale is not None and not on_device:
        # copies: a gradient is never written
        inverse = grad_scale.double().reciprocal().float()
        work.grads = [grad * inverse.to(grad.device) for grad in work.grads]
        grad_scale = None
    if path == "fused_triton":
        work = triton_poprisk_adamw(work, options, sums, keep, grad_scale)
    elif path == "fused_compiled":
        work = compiled_poprisk_adamw(work, options, sums, keep if on_device else None, grad_scale)
    if not work.params:
        return
    if on_device:
        capturable_poprisk_adamw(work, options, sums, keep, grad_scale)
    elif path == "foreach":
        multi_tensor_poprisk_adamw(work, options, sums)
    else:
        single_tensor_poprisk_adamw(work, options, sums)
