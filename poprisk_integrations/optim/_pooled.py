"""One gate for the coordinates of a row or of a tensor, from their mean signal and mean noise.

Such a gate must be known before any coordinate moves. So it is made ahead of the step, for all
parameters at once and whatever path steps them: the moments as they will be are formed, summed and
dropped. States and counts stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poprisk_integrations.core.noise_law import effective_coordinates, pooled_alpha
from poprisk_integrations.distributed import sum_lists_over_shards
from poprisk_integrations.optim._fused_math import FusedPlan, Scalars, gate_of
from poprisk_integrations.optim._options import (
    GroupOptions,
    resolve_group,
    uses_pooling,
)
from poprisk_integrations.optim._scalars import COLUMNS, scalar_rows
from poprisk_integrations.optim._work import GroupWork, PooledGate

__all__ = ["check_grain", "pool_gates"]


def check_grain(group: dict[str, Any]) -> None:
    """Refuse rows and tensors of parameters that others have flattened.

    DeepSpeed's partitions are plain tensors, its ZeRO-3 parameters have `ds_id`; FSDP1 marks what
    it flattens.
    """
    if group["granularity"] == "coordinate":
        return
    for param in group["params"]:
        is_plain = not isinstance(param, nn.Parameter)
        if is_plain or hasattr(param, "ds_id") or getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                f"Invalid granularity: {group['granularity']!r}. Must be 'coordinate' for "
                "parameters without their own shape: FSDP1 and DeepSpeed flatten them, and plain "
                "tensors (no nn.Parameter) may be such. Rows are whole under FSDP2 and DDP."
            )


@dataclass(slots=True)
class _Grains:
    """Sums of one parameter's grains, of this rank's shard."""

    owner: Tensor
    options: GroupOptions
    plan: FusedPlan
    c: Scalars
    shape: tuple[int, ...]  # that broadcasts to the parameter
    coordinates: int  # of a grain, over all ranks
    is_calibrated: bool = False  # by how many coordinates a grain is worth


def pool_gates(
    works: Sequence[GroupWork],
    groups: Sequence[dict[str, Any]],
    keep: Tensor,
    grad_scale: Tensor | None,
) -> dict[int, PooledGate]:
    """Give the works of groups whose `granularity` is a row or a tensor their gates.

        signal S = mean of m_hat^2,   noise N = mean of s_hat, or max(mean v_hat - S, 0)

    over a row or a tensor, over all its shards: one collective per process group for the whole
    step. Both are gated as m_hat^2 and s_hat of a coordinate are. With alpha="calibrated" N stands
    beside the boundary of `core.noise_law.pooled_alpha`, for the effective number of
    coordinates. Returned by the id of the parameter.
    """
    found: list[_Grains] = []
    sums: list[Tensor] = []
    chosen: list[GroupWork] = []
    for work, group in zip(works, groups, strict=True):
        if not work.owners or not uses_pooling(group):
            continue
        check_grain(group)
        options = resolve_group(group)
        chosen.append(work)
        is_calibrated = group["alpha"] == "calibrated"
        rows, _ = scalar_rows(options, work.steps, work.dev_steps, keep, grad_scale, advance=False)
        for i, row in enumerate(rows):
            grains, total = _grains(
                work, i, row, options, is_calibrated=is_calibrated, has_scale=grad_scale is not None
            )
            grains.is_calibrated = is_calibrated and grains.coordinates > 1
            found.append(grains)
            sums.append(total)
    if not found:
        return {}
    by_row = [grains.plan.pooled == "row" for grains in found]
    sums = sum_lists_over_shards(sums, [grains.owner for grains in found], by_row)
    gates = [_gate(grains, total) for grains, total in zip(found, sums, strict=True)]
    rest = iter(gates)
    for work in chosen:
        work.pooled = [next(rest) for _ in work.params]
    return {id(grains.owner): gate for grains, gate in zip(found, gates, strict=True)}


def _grains(
    work: GroupWork,
    index: int,
    row: Tensor,
    options: GroupOptions,
    *,
    is_calibrated: bool,
    has_scale: bool,
) -> tuple[_Grains, Tensor]:
    """What is summed of a parameter: m^2, the noise and, for a calibrated alpha, its powers."""
    moments = [moment.read() for moment in work.moments(index)]
    param, dtype = work.params[index], moments[0].dtype
    row = row.to(device=param.device, dtype=dtype)
    c = dict(zip(COLUMNS, row.unbind(), strict=True))
    exp_avg, exp_avg_sq = moments[:2]
    grad = work.grads[index].to(dtype)
    if options.capturable or param.device.type != "cpu":
        # zeros instead of a non-finite gradient, so that 0 * grad is 0
        grad = torch.where(c["keep"] > 0, grad * c["grad_factor"], 0.0)
    elif has_scale:
        grad = grad * c["grad_factor"]
    if options.maximize:
        grad = -grad
    plan = FusedPlan.of(options, work, index, on_device=True)
    mean = torch.lerp(exp_avg, grad, c["mean_weight"])
    if options.from_moments:
        noise = exp_avg_sq * (c["sq_decay"] * c["noise_scale"])
        noise.addcmul_(grad, grad * (c["sq_weight"] * c["noise_scale"]))
    else:
        deviation = torch.addcmul(grad, exp_avg, c["mean_scale"], value=-1)
        noise = (moments[2] * c["dev_decay"]).addcmul_(deviation, deviation * c["dev_weight"])
        if not options.centered:
            noise = torch.where(c["noise_is_signal"] > 0, mean.square(), noise)
    owner = work.owners[index]
    real = 2 if owner.is_complex() else 1
    if plan.pooled == "row" and param.dim():
        shape = (param.shape[0], *(1 for _ in param.shape[1:]))
        coordinates = owner.shape[1:].numel() * real
    else:
        shape, coordinates = (), owner.numel() * real
    rows = shape[0] if shape else 1
    precise = torch.float32 if param.device.type == "mps" else torch.float64
    if not param.numel():
        nothing = torch.zeros(4, rows, dtype=precise, device=param.device)
        return _Grains(owner, options, plan, c, shape, coordinates), nothing
    mean, noise = mean.reshape(rows, -1), noise.reshape(rows, -1)
    sums = [torch.linalg.vector_norm(mean, dim=1).to(precise).square(), noise.sum(1).to(precise)]
    if is_calibrated and coordinates > 1:
        # sixth powers of gradients leave the range of float32, those of shares do not
        unit = noise.amax().clamp(min=torch.finfo(dtype).tiny)
        share, unit = noise.div_(unit), unit.to(precise)
        sums.append(torch.linalg.vector_norm(share, dim=1).to(precise).square() * unit.square())
        sums.append((share * share).mul_(share).sum(1).to(precise) * unit**3)
    else:
        sums += [torch.zeros_like(sums[0])] * 2
    total = torch.stack(sums)
    return _Grains(owner, options, plan, c, shape, coordinates), total


def _gate(grains: _Grains, total: Tensor) -> PooledGate:
    """The gates of a parameter's grains from the sums over all shards."""
    options, c = grains.options, grains.c
    n = max(1, grains.coordinates)
    mean_sq, noise = total[0] / n, total[1] / n
    if grains.is_calibrated:
        beta2 = options.beta2 if options.from_moments else None
        decay = options.rho if beta2 is None else beta2
        worth = effective_coordinates(total[1], total[2], total[3], n, decay)
        alpha = pooled_alpha(options.false_open_rate, *worth, beta1=options.beta1, beta2=beta2)
    else:
        alpha = torch.full_like(noise, options.alpha)
    if options.from_moments:
        noise = (noise - mean_sq).clamp_(min=0)
    # `boundary` and `penalty` hold the alpha of one coordinate
    noise = noise * (alpha / options.alpha if options.alpha > 0 else 1.0)
    c = {name: value.to(noise.dtype) for name, value in c.items()}
    gate = gate_of(mean_sq, noise, c, grains.plan)
    is_open = (mean_sq > c["boundary"] * noise) | (c["blend"] == 0)
    is_dead = ~is_open & (mean_sq == 0)
    shape = grains.shape
    return PooledGate(gate.reshape(shape), is_open.reshape(shape), is_dead.reshape(shape))
