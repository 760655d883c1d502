"""One parameter at a time: the specification that every other path is compared with."""

import torch
from torch import Tensor

from poprisk_integrations.core.gate import gate_factor
from poprisk_integrations.core.noise import update_dev_sq_
from poprisk_integrations.distributed import sum_over_shards
from poprisk_integrations.optim._gate_stats import parameter_sums, ungated_sums
from poprisk_integrations.optim._options import GroupOptions, step_scalars
from poprisk_integrations.optim._work import GroupWork

__all__ = ["norm_restoring_scale"]


def _single_tensor_poprisk_adamw(
    work: GroupWork, options: GroupOptions, sums: list[Tensor] | None
) -> None:
    """Step of one group.

    Args:
        work: Local tensors of the group; parameters and states are changed in place.
        options: Resolved options; `lr` on the host.
        sums: Where to append gate statistics, or None on steps that do not ask for them.
    """
    lr = float(options.lr)
    for i, target in enumerate(work.params):
        # low-precision parameters and states are updated in float32 and rounded once, at the end
        exp_avg, exp_avg_sq = work.exp_avgs[i].read(), work.exp_avg_sqs[i].read()
        exp_dev_sq = work.exp_dev_sqs[i].read()
        param = target.to(exp_avg.dtype)
        grad = work.grads[i].to(exp_avg.dtype)
        if options.maximize:
            grad = -grad

        # update step
        work.steps[i] += 1
        scalars = step_scalars(options, work.steps[i].item(), work.dev_steps[i].item())

        # update noise variance, before the mean moves
        if options.gated and scalars.mean_scale is not None:
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
            mean_sq = exp_avg.square()
            noise = mean_sq if scalars.noise_is_signal else exp_dev_sq
            gate = gate_factor(
                mean_sq,
                noise,
                gate=options.gate,
                alpha=options.alpha,
                lambda_pop=options.lambda_pop,
                eps=options.gate_eps * scalars.bias_correction1**2,
                noise_scale=scalars.noise_scale,
            )
            if options.gate_blend != 1.0:
                gate.mul_(options.gate_blend).add_(1 - options.gate_blend)
            update = exp_avg * gate
            if options.preserve_norm:
                update *= _restoring_scale(exp_avg / denom, update / denom, work.owners[i])
        if sums is not None:
            direction = exp_avg / denom
            sums.append(
                ungated_sums(direction, lr)
                if gate is None
                else parameter_sums(
                    mean_sq, noise, gate, direction, options.alpha * scalars.noise_scale, lr
                )
            )

        # decoupled weight decay, ungated unless the group asks for it
        if options.weight_decay != 0:
            if options.gate_decay and gate is not None:
                param.mul_(1 - (lr * options.weight_decay) * gate)
            else:
                param.mul_(1 - lr * options.weight_decay)

        # apply
        param.addcdiv_(update, denom, value=-(lr / scalars.bias_correction1))
        work.write_back(i, param, (exp_avg, exp_avg_sq, exp_dev_sq), options)


def norm_restoring_scale(ungated_sq: Tensor, gated_sq: Tensor) -> Tensor:
    """Factor that gives a gated update the norm of the ungated one; 1 where nothing is left.

        scale = |u| / |q u|   (>= 1, since q <= 1)

    Args:
        ungated_sq: |u|^2 over all shards, 0-dim.
        gated_sq: |q u|^2 over all shards, 0-dim.
    """
    # A norm in the denormal range has no digits left to be restored.
    usable = gated_sq > torch.finfo(gated_sq.dtype).tiny
    return torch.where(usable, (ungated_sq / gated_sq).sqrt(), 1.0)


def _restoring_scale(ungated: Tensor, gated: Tensor, owner: Tensor) -> Tensor:
    squares = torch.stack([ungated.square().sum(), gated.square().sum()]).unsqueeze(-1)
    total = sum_over_shards(squares, [owner])
    return norm_restoring_scale(total[0, 0], total[1, 0])
