"""Scalars of a step as one row per parameter: what fused kernels read instead of arguments.

A kernel that takes its scalars from memory needs no recompilation when they change, and on
accelerators no host that knows them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk_integrations.optim._options import GroupOptions, StepScalars, step_scalars

__all__ = ["COLUMNS", "device_rows", "host_rows"]

COLUMNS = (
    "keep",  # 0: the step leaves no trace
    "grad_factor",  # 1 / loss scale
    "mean_scale",  # m_hat_{t-1} = mean_scale * m_{t-1}
    "dev_decay",  # s <- dev_decay * s + dev_weight * (g - m_hat_{t-1})^2
    "dev_weight",
    "mean_weight",  # m <- m + mean_weight * (g - m)
    "sq_decay",  # v <- sq_decay * v + sq_weight * g^2
    "sq_weight",
    "bias_correction2_sqrt",
    "eps",
    "boundary",  # alpha * noise_scale: open where m^2 > boundary * s
    "penalty",  # lambda_pop * noise_scale (soft), lambda_pop * alpha * noise_scale (snr)
    "gate_eps",  # times bias_correction1^2, on the scale of m^2
    "blend",  # the update takes blend * q + 1 - blend; 0 while ungated
    "noise_is_signal",  # 1: the published rule's first step, s taken as m^2
    "step_size",  # lr / bias_correction1
    "weight_decay",  # lr * weight_decay
    "param_scale",  # 1 - lr * weight_decay
)


def host_rows(
    options: GroupOptions, steps: Sequence[float], dev_steps: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, list[StepScalars]]:
    """Rows where the host knows the step counts; computed in double, rounded once.

    Args:
        options: Resolved options, `lr` on the host.
        steps: Step count of each parameter, this step included.
        dev_steps: Deviations in each s before this step.
        dtype: Of the rows: the dtype that the update is computed in.

    Returns:
        Tensor (parameters, columns) on the CPU, and the scalars of each row.
    """
    known: dict[tuple[float, float], tuple[StepScalars, list[float]]] = {}
    for pair in zip(steps, dev_steps, strict=True):
        if pair not in known:
            scalars = step_scalars(options, *pair)
            known[pair] = scalars, _host_row(options, scalars)
    found = [known[pair] for pair in zip(steps, dev_steps, strict=True)]
    return torch.tensor([row for _, row in found], dtype=dtype), [s for s, _ in found]


def _host_row(options: GroupOptions, scalars: StepScalars) -> list[float]:
    moves = options.gated and scalars.mean_scale is not None
    active = scalars.gate_is_active
    lr = float(options.lr)
    scale = 1.0 if scalars.noise_is_signal else scalars.noise_scale
    shrink = options.alpha if options.gate == "snr" else 1.0
    return [
        1.0,
        1.0,
        scalars.mean_scale or 0.0,
        options.rho if moves else 1.0,
        1.0 - options.rho if moves else 0.0,
        1.0 - options.beta1,
        options.beta2,
        1.0 - options.beta2,
        scalars.bias_correction2_sqrt,
        options.eps,
        options.alpha * scale,
        options.lambda_pop * shrink * scale,
        options.gate_eps * scalars.bias_correction1**2,
        options.gate_blend if active else 0.0,
        float(scalars.noise_is_signal),
        lr / scalars.bias_correction1,
        lr * options.weight_decay,
        1.0 - lr * options.weight_decay,
    ]


def device_rows(
    options: GroupOptions,
    steps: Sequence[Tensor],
    dev_steps: Sequence[Tensor],
    keep: Tensor,
    grad_scale: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Rows where only the device knows the step counts, and advance of these counts.

    Args:
        options: Resolved options; `lr` may be a tensor on the device.
        steps: 0-dim counts of one device, changed in place.
        dev_steps: 0-dim counts of the deviations, changed in place.
        keep: 0-dim float32, 0 if the step must leave no trace.
        grad_scale: 0-dim loss scale that the gradients still carry, or None.
        dtype: Of the rows: the dtype that the update is computed in.

    Returns:
        Tensor (parameters, columns) on the device, and the new step counts, float32 (parameters,).
    """
    # 1 - beta^t loses three digits in float32
    device = steps[0].device
    precise = torch.float32 if device.type == "mps" else torch.float64
    kept = keep.to(device=device, dtype=precise)
    before = torch.stack(list(steps)).to(precise)
    seen = torch.stack(list(dev_steps)).to(precise)
    zero, one = torch.zeros_like(before), torch.ones_like(before)

    has_mean = one > 0
    mean_scale = one
    if options.centered:
        previous = 1 - options.beta1**before
        has_mean = previous > 0
        mean_scale = torch.where(has_mean, 1 / torch.where(has_mean, previous, one), zero)
    measures = options.gated and not options.from_pieces
    moves = (kept * has_mean) if measures else zero
    count = (before + kept).clamp(min=1)
    seen = seen + moves
    bias_correction1 = 1 - options.beta1**count
    first = max(options.gate_warmup, 1) if options.centered else options.gate_warmup + 1
    first += options.from_pieces
    active = (seen >= first) if options.gated else one < 0
    signal = (count == 1) if not options.centered else one < 0
    noise_scale = bias_correction1.square() / (1 - options.rho ** seen.clamp(min=1))
    noise_scale = torch.where(active & ~signal, noise_scale, one)
    shrink = options.alpha if options.gate == "snr" else 1.0
    decay = kept * options.lr * options.weight_decay
    factor = one if grad_scale is None else (1 / grad_scale.to(device, precise)) * one
    columns = [
        kept * one,
        factor,
        mean_scale,
        1 - moves * (1 - options.rho),
        moves * (1 - options.rho),
        kept * (1 - options.beta1) * one,
        1 - kept * (1 - options.beta2) * one,
        kept * (1 - options.beta2) * one,
        (1 - options.beta2**count).sqrt(),
        options.eps * one,
        options.alpha * noise_scale,
        options.lambda_pop * shrink * noise_scale,
        options.gate_eps * bias_correction1.square(),
        torch.where(active, options.gate_blend, zero),
        signal.to(precise),
        kept * options.lr / bias_correction1,
        decay * one,
        (1 - decay) * one,
    ]
    torch._foreach_add_(list(steps), kept.to(steps[0].dtype))
    torch._foreach_add_(list(dev_steps), list(moves.to(dev_steps[0].dtype).unbind()))
    return torch.stack(columns, dim=1).to(dtype), count.float()
