"""One parameter at a time with scalars on the device: no host knows the step count.

Used wherever `capturable=True`, and on accelerators for what the Triton kernel does not take: some
30 launches per parameter, but a non-finite gradient is skipped without a host sync. The same steps
as `_single_tensor.py`; scalars are 0-dim tensors, and `keep` is 1 where the step counts, 0 where it
must leave no trace.
"""

import torch
from torch import Tensor

from poprisk_integrations.core.gate import gate_factor
from poprisk_integrations.core.noise import update_dev_sq_
from poprisk_integrations.distributed import sum_over_shards
from poprisk_integrations.optim._gate_stats import parameter_sums
from poprisk_integrations.optim._options import GroupOptions
from poprisk_integrations.optim._single_tensor import norm_restoring_scale
from poprisk_integrations.optim._work import GroupWork

__all__: list[str] = []


def _capturable_poprisk_adamw(
    work: GroupWork, options: GroupOptions, sums: list[Tensor] | None, keep: Tensor
) -> None:
    """Step of one group on its device.

    Args:
        work: Local tensors of the group, steps on the device.
        options: Resolved options; `lr` may be a tensor on the device.
        sums: Where to append gate statistics, or None.
        keep: 0-dim float32, 1 if all gradients of the step are finite, else 0.
    """
    for i, target in enumerate(work.params):
        # low-precision parameters and states are updated in float32 and rounded once, at the end
        exp_avg, exp_avg_sq = work.exp_avgs[i].read(), work.exp_avg_sqs[i].read()
        exp_dev_sq, step, dev_step = work.exp_dev_sqs[i].read(), work.steps[i], work.dev_steps[i]
        dtype = exp_avg.dtype
        # 1 - beta^t loses three digits in float32; 0-dim doubles do not promote tensors with dims
        precise = torch.float32 if target.device.type == "mps" else torch.float64
        kept = keep.to(device=target.device, dtype=precise)
        one = torch.ones_like(kept)
        param = target.to(dtype)
        # zeros instead of a non-finite gradient, so that 0 * grad is 0
        grad = torch.where(kept > 0, work.grads[i].to(dtype), 0.0)
        if options.maximize:
            grad = -grad

        # update noise variance, before the mean moves
        if options.gated and not options.from_pieces:
            correction = 1 - options.beta1 ** step.to(dtype)
            has_mean = correction > 0 if options.centered else torch.ones_like(kept) > 0
            counts = kept * has_mean
            scale = 1 / torch.where(has_mean, correction, one) if options.centered else one
            mean = torch.where(counts > 0, exp_avg * scale, grad)  # no deviation, no trace
            decay = torch.where(counts > 0, options.rho * one, one)
            update_dev_sq_(exp_dev_sq, grad, mean, decay, 1 - options.rho)
            dev_step += counts.to(dev_step.dtype)

        # update step
        step += kept.to(step.dtype)
        count, seen = step.to(precise).clamp(min=1), dev_step.to(precise)

        # decay the first and second moment running average coefficient
        exp_avg.lerp_(grad, (kept * (1 - options.beta1)).to(dtype))
        exp_avg_sq.mul_(torch.where(kept > 0, options.beta2 * one, one))
        exp_avg_sq.addcmul_(grad, grad, value=1 - options.beta2)
        bias_correction1 = 1 - options.beta1**count
        denom = (exp_avg_sq.sqrt() / (1 - options.beta2**count).sqrt()).add_(options.eps)

        # gate
        gate = torch.ones_like(exp_avg)
        mean_sq = (exp_avg / bias_correction1).square_()
        noise = torch.zeros_like(exp_avg)
        if options.gated:
            noise = exp_dev_sq / (1 - options.rho ** seen.clamp(min=1))
            if not options.centered:
                noise = torch.where(count == 1, mean_sq, noise)
            gate = gate_factor(
                mean_sq,
                noise,
                gate=options.gate,
                alpha=options.alpha,
                lambda_pop=options.lambda_pop,
                eps=options.gate_eps,
            )
            if options.gate_blend != 1.0:
                gate.mul_(options.gate_blend).add_(1 - options.gate_blend)
            first = max(options.gate_warmup, 1) if options.centered else options.gate_warmup + 1
            first += options.from_pieces
            active = seen >= first
            gate = torch.where(active, gate, 1.0)
            noise = torch.where(active, noise, -1.0)  # ungated counts as open, for alpha = 0 too
            mean_sq = torch.where(active, mean_sq, 1.0)
        ratio = exp_avg / denom
        update = ratio * gate
        if options.preserve_norm and options.gated:
            squares = torch.stack([ratio.square().sum(), update.square().sum()]).unsqueeze(-1)
            total = sum_over_shards(squares, [work.owners[i]])
            update *= norm_restoring_scale(total[0, 0], total[1, 0])
        if sums is not None:
            bound = noise if options.gated else noise - 1
            sums.append(parameter_sums(mean_sq, bound, gate, ratio, options.alpha, options.lr))

        # decoupled weight decay, ungated unless the group asks for it
        if options.weight_decay != 0:
            amount = kept * options.lr * options.weight_decay
            param.mul_(1 - amount * gate if options.gate_decay and options.gated else 1 - amount)

        # apply
        param.sub_(update.mul_(kept * options.lr / bias_correction1))
        work.write_back(i, param, (exp_avg, exp_avg_sq, exp_dev_sq), options, kept)
