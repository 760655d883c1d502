"""Which implementation steps a group, and the step."""

import warnings
from functools import cache
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from poprisk_integrations.distributed import local_tensor
from poprisk_integrations.optim._cpu import cpu_poprisk_adamw
from poprisk_integrations.optim._cpu_build import (
    compiler_is_found,
    load_kernel,
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

__all__ = ["path_of", "paths_now", "step_group"]

# Compiling takes seconds: below this size a training run may end before they are earned back.
AUTO_FUSED_NUMEL = 1 << 20


def path_of(group: dict[str, Any]) -> str:
    """The implementation of a group: the user's choice where it works, else the fastest.

    "fused_triton", "fused_compiled", "capturable" (scalars on the device), "foreach" or
    "single_tensor" (scalars on the host).
    """
    params: list[Tensor] = group["params"]
    # With scalars on the device, all tensors of a shape are taken at once, `foreach` or not.
    on_device = bool(params) and needs_device_step(params[0], group)  # all are on one device
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
    if type(local_tensor(params[0])) not in (Tensor, Parameter):
        return eager  # no memory to work on: a FakeTensor, say
    if (is_asked_for or _pays(params)) and compiler_is_found():
        return "fused_compiled"
    if is_asked_for:
        warn_without_compiler()
    return eager


def _pays(params: list[Tensor]) -> bool:
    numel = 0
    for param in params:
        numel += local_tensor(param).numel()
        if numel >= AUTO_FUSED_NUMEL:
            return True
    return False


def paths_now(groups: list[dict[str, Any]]) -> list[str]:
    """The paths of a step that is taken now: what must be compiled first is, or found not to be."""
    paths = [path_of(group) for group in groups]
    if "fused_compiled" in paths and load_kernel() is None:
        paths = [path_of(group) for group in groups]
    return paths


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
    on_device = options.capturable or work.owners[0].device.type != "cpu"
    if path == "fused_triton":
        work = triton_poprisk_adamw(work, options, sums, keep, grad_scale)
    elif path == "fused_compiled":
        if not keep:
            return
        work = cpu_poprisk_adamw(work, options, sums, grad_scale)
    if not work.owners:
        return
    if grad_scale is not None and not on_device:
        # copies: a gradient is never written
        inverse = grad_scale.double().reciprocal().float()
        work.grads = [grad * inverse.to(grad.device) for grad in work.grads]
        grad_scale = None
    if on_device:
        capturable_poprisk_adamw(work, options, sums, keep, grad_scale)
    elif path == "foreach":
        multi_tensor_poprisk_adamw(work, options, sums)
    else:
        single_tensor_poprisk_adamw(work, options, sums)
