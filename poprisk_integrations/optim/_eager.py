"""Scalars on the host: one tensor at a time, and lists of them with horizontally fused kernels.

The first is the specification that every other path is compared with; the second is the same
arithmetic in the same order.
"""

import torch
from torch import Tensor

from poprisk_integrations.core.gate import gate_factor
from poprisk_integrations.core.noise import moments_noise, update_dev_sq_
from poprisk_integrations.distributed import sum_over_shards
from poprisk_integrations.optim._gate_stats import parameter_sums, pooled_sums, ungated_sums
from poprisk_integrations.optim._options import GroupOptions
from poprisk_integrations.optim._scalars import StepScalars, step_scalars
from poprisk_integrations.optim._work import GroupWork

__all__ = ["multi_tensor_poprisk_adamw", "norm_restoring_scale", "single_tensor_poprisk_adamw"]


def single_tensor_poprisk_adamw(
    work: GroupWork, options: GroupOptions, sums: list[Tensor] | None
) -> None:
    """Step of one group, in place; gate statistics are appended to `sums` where asked for."""
    lr = float(options.lr)
    for i, target in enumerate(work.params):
        # low-precision parameters and states are updated in float32 and rounded once, at the end
        exp_avg, exp_avg_sq = work.exp_avgs[i].read(), work.exp_avg_sqs[i].read()
        exp_dev_sq = work.exp_dev_sqs[i].read() if work.exp_dev_sqs else None
        param = target.to(exp_avg.dtype)
        grad = work.grads[i].to(exp_avg.dtype)
        if options.maximize:
            grad = -grad

        # update step
        work.steps[i] += 1
        seen = work.dev_steps[i].item() if work.dev_steps else 0.0
        scalars = step_scalars(options, work.steps[i].item(), seen)

        # update noise variance, before the mean moves
        if options.gated and scalars.mean_scale is not None and exp_dev_sq is not None:
            work.dev_steps[i] += 1
            rho, scale = options.rho, scalars.mean_scale
            update_dev_sq_(exp_dev_sq, grad, exp_avg, rho, 1 - rho, scale)

        # decay the first and second moment running average coefficient
        exp_avg.lerp_(grad, 1 - options.beta1)
        exp_avg_sq.mul_(options.beta2).addcmul_(grad, grad, value=1 - options.beta2)
        denom = (exp_avg_sq.sqrt() / scalars.bias_correction2_sqrt).add_(options.eps)

        # gate
        gate = None
        update = exp_avg
        if scalars.gate_is_active:
            if work.pooled:
                gate = work.pooled[i].gate.to(exp_avg.dtype)
            else:
                mean_sq = exp_avg.square()
                if exp_dev_sq is None:
                    noise = moments_noise(exp_avg_sq, mean_sq, scalars.noise_scale)
                    noise_scale = 1.0
                else:
                    noise = mean_sq if scalars.noise_is_signal else exp_dev_sq
                    noise_scale = scalars.noise_scale
                gate = gate_factor(
                    mean_sq,
                    noise,
                    gate=options.gate,
                    alpha=options.alpha,
                    lambda_pop=options.lambda_pop,
                    eps=options.gate_eps * scalars.bias_correction1**2,
                    noise_scale=noise_scale,
                )
                if options.gate_blend != 1.0:
                    gate.mul_(options.gate_blend).add_(1 - options.gate_blend)
            update = exp_avg * gate
            if options.preserve_norm:
                _restore_norms([exp_avg], [update], [denom], [work.owners[i]])
        if sums is not None and gate is None:
            sums.append(ungated_sums(exp_avg / denom, lr))
        elif sums is not None and work.pooled:
            sums.append(pooled_sums(work.pooled[i], exp_avg / denom, lr))
        elif sums is not None and gate is not None:
            boundary = options.alpha * noise_scale
            sums.append(parameter_sums(mean_sq, noise, gate, exp_avg / denom, boundary, lr))

        # decoupled weight decay, ungated unless the group asks for it
        if options.weight_decay != 0:
            if options.gate_decay and gate is not None:
                param.mul_(1 - (lr * options.weight_decay) * gate)
            else:
                param.mul_(1 - lr * options.weight_decay)

        # apply
        param.addcdiv_(update, denom, value=-(lr / scalars.bias_correction1))
        moved = exp_avg, exp_avg_sq, exp_dev_sq
        work.write_back(i, param, [m for m in moved if m is not None], options)


def norm_restoring_scale(ungated_sq: Tensor, gated_sq: Tensor) -> Tensor:
    """Factor that gives a gated update the norm of the ungated one; 1 where nothing is left.

    scale = |u| / |q u|   (>= 1, since q <= 1), from the squared norms over all shards
    """
    # A norm in the denormal range has no digits left to be restored.
    usable = gated_sq > torch.finfo(gated_sq.dtype).tiny
    return torch.where(usable, (ungated_sq / gated_sq).sqrt(), 1.0)


def multi_tensor_poprisk_adamw(
    work: GroupWork, options: GroupOptions, sums: list[Tensor] | None
) -> None:
    """The same, all parameters of a dtype at once."""
    for part in work.parts(lambda i: (work.params[i].device, work.params[i].dtype)):
        _step_one_dtype(work.only(part), options, float(options.lr), sums)


def _step_one_dtype(
    work: GroupWork, options: GroupOptions, lr: float, sums: list[Tensor] | None
) -> None:
    # low-precision parameters and states are updated in float32 and rounded once, at the end
    exp_avgs = [m.read() for m in work.exp_avgs]
    exp_avg_sqs = [m.read() for m in work.exp_avg_sqs]
    exp_dev_sqs = [m.read() for m in work.exp_dev_sqs]
    dtype = exp_avgs[0].dtype
    params = [p.to(dtype) for p in work.params]
    grads = [g.to(dtype) for g in work.grads]
    if options.maximize:
        grads = list(torch._foreach_neg(grads))

    # update step
    scalars = []
    for i, step in enumerate(work.steps):
        step += 1
        seen = work.dev_steps[i].item() if work.dev_steps else 0.0
        scalars.append(step_scalars(options, step.item(), seen))

    # update noise variance, before the mean moves
    if options.gated and exp_dev_sqs:
        _update_noise(work, grads, exp_avgs, exp_dev_sqs, scalars, options.rho)

    # decay the first and second moment running average coefficient
    torch._foreach_lerp_(exp_avgs, grads, 1 - options.beta1)
    torch._foreach_mul_(exp_avg_sqs, options.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - options.beta2)
    denoms = list(torch._foreach_sqrt(exp_avg_sqs))
    torch._foreach_div_(denoms, [s.bias_correction2_sqrt for s in scalars])
    torch._foreach_add_(denoms, options.eps)

    # gate
    active = [i for i, s in enumerate(scalars) if s.gate_is_active]
    updates = list(exp_avgs)
    gates: dict[int, Tensor] = {}
    if active:
        means = [exp_avgs[i] for i in active]
        if work.pooled:
            gated = [work.pooled[i].gate.to(dtype) for i in active]
        else:
            noises = [(exp_dev_sqs or exp_avg_sqs)[i] for i in active]
            gated, mean_sqs, noises, scales = _gates(
                means, noises, [scalars[i] for i in active], options
            )
        gates = dict(zip(active, gated, strict=True))
        moved = list(torch._foreach_mul(means, gated))
        if options.preserve_norm:
            owners = [work.owners[i] for i in active]
            _restore_norms(means, moved, [denoms[i] for i in active], owners)
        for i, update in zip(active, moved, strict=True):
            updates[i] = update
    if sums is not None:
        directions = torch._foreach_div(exp_avgs, denoms)
        for i, direction in enumerate(directions):
            if i in gates and work.pooled:
                row = pooled_sums(work.pooled[i], direction, lr)
            elif i in gates:
                k = active.index(i)
                boundary = options.alpha * scales[k]
                row = parameter_sums(mean_sqs[k], noises[k], gates[i], direction, boundary, lr)
            else:
                row = ungated_sums(direction, lr)
            sums.append(row)

    # decoupled weight decay, ungated unless the group asks for it
    if options.weight_decay != 0:
        plain = [p for i, p in enumerate(params) if not (options.gate_decay and i in gates)]
        if plain:
            torch._foreach_mul_(plain, 1 - lr * options.weight_decay)
        for i in gates if options.gate_decay else ():
            params[i].mul_(1 - (lr * options.weight_decay) * gates[i])

    # apply
    step_sizes = [-(lr / s.bias_correction1) for s in scalars]
    torch._foreach_addcdiv_(params, updates, denoms, step_sizes)
    moved_moments = [m for m in (exp_avgs, exp_avg_sqs, exp_dev_sqs) if m]
    for i, param in enumerate(params):
        work.write_back(i, param, [values[i] for values in moved_moments], options)


def _update_noise(
    work: GroupWork,
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_dev_sqs: list[Tensor],
    scalars: list[StepScalars],
    rho: float,
) -> None:
    known = [i for i, s in enumerate(scalars) if s.mean_scale is not None]
    if not known:
        return
    for i in known:
        work.dev_steps[i] += 1
    scales = [scalars[i].mean_scale or 1.0 for i in known]
    means = [exp_avgs[i] for i in known]
    if any(scale != 1.0 for scale in scales):
        means = list(torch._foreach_mul(means, scales))
    deviations = torch._foreach_sub([grads[i] for i in known], means)
    moving = [exp_dev_sqs[i] for i in known]
    torch._foreach_mul_(moving, rho)
    torch._foreach_addcmul_(moving, deviations, deviations, 1 - rho)


def _gates(
    means: list[Tensor], noises: list[Tensor], scalars: list[StepScalars], options: GroupOptions
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:
    """q, m^2, s and what stands before s, of the parameters whose gate is active.

    `noises` are s, or v where there is no s; see `core.gate.gate_factor`.
    """
    mean_sqs = list(torch._foreach_mul(means, means))
    scales = [s.noise_scale for s in scalars]
    if options.from_moments:
        noises = list(torch._foreach_sub(torch._foreach_mul(noises, scales), mean_sqs))
        torch._foreach_clamp_min_(noises, 0)
        scales = [1.0] * len(scales)
    noises = [
        mean_sq if s.noise_is_signal else noise
        for mean_sq, noise, s in zip(mean_sqs, noises, scalars, strict=True)
    ]
    bounds = list(torch._foreach_mul(noises, [options.alpha * scale for scale in scales]))
    if options.gate == "hard":
        gates = [
            (mean_sq > bound).to(mean_sq.dtype)
            for mean_sq, bound in zip(mean_sqs, bounds, strict=True)
        ]
    else:
        if options.gate == "soft":
            gates = list(torch._foreach_sub(mean_sqs, bounds))
            torch._foreach_clamp_min_(gates, 0)
            penalties = [options.lambda_pop * scale for scale in scales]
            totals = list(torch._foreach_mul(noises, penalties))
        else:
            gates = [mean_sq.clone() for mean_sq in mean_sqs]
            totals = list(torch._foreach_mul(bounds, options.lambda_pop))
        torch._foreach_add_(totals, gates)
        if options.gate_eps:
            corrections = [options.gate_eps * s.bias_correction1**2 for s in scalars]
            torch._foreach_add_(totals, corrections)
        torch._foreach_clamp_min_(totals, torch.finfo(totals[0].dtype).tiny)
        torch._foreach_div_(gates, totals)
    if options.gate_blend != 1.0:
        torch._foreach_mul_(gates, options.gate_blend)
        torch._foreach_add_(gates, 1 - options.gate_blend)
    return gates, mean_sqs, noises, scales


def _restore_norms(
    means: list[Tensor], moved: list[Tensor], denoms: list[Tensor], owners: list[Tensor]
) -> None:
    """Scale each gated update to the norm of its ungated one, one reduction for all."""
    ungated, gated = torch._foreach_div(means, denoms), torch._foreach_div(moved, denoms)
    squares = [torch.stack([x.square().sum() for x in part]) for part in (ungated, gated)]
    total = sum_over_shards(torch.stack(squares), owners)
    scales = norm_restoring_scale(total[0], total[1])
    for update, scale in zip(moved, scales, strict=True):
        update *= scale
