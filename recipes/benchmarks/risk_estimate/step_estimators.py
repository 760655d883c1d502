"""Predicted first-order decrease of the population risk by one step of AdamW, gated or not.

The step is u = w_t - w_{t+1} (what really happened, weight decay included) and the quantity to
estimate is mu' u, with mu the population's gradient at w_t. The batch made both g and u, so g' u is
biased up. With u = D g + (what does not depend on the batch), D the diagonal by which the step
multiplies the batch's gradient, the leave-one-out form is

    mu' u  ~  g' u - g' D g + U_D,    U_D = (1/(b(b-1))) sum_{i != j} g_i' D g_j
"""

from dataclasses import dataclass

import torch
from gate_harness.arms import BETAS, GATES, Arm
from gate_harness.stacked_adam import EPS, StackedAdam
from torch import Tensor

from poprisk_integrations.core.gate import default_lambda_pop, gate_factor
from poprisk_integrations.core.noise import deviation_scale, ema_mean_variance
from poprisk_integrations.core.risk import population_risk_decrease, risk_decrease_from_sums

__all__ = ["OPTIMIZERS", "Moments", "fixed_direction", "leave_one_out_step", "step_predictions"]

OPTIMIZERS = {"AdamW": GATES["AdamW"], "PopRiskAdamW": GATES["soft-5"]}


@dataclass(kw_only=True)
class Moments:
    """Adam's state after `step` steps, and the noise of the batch gradient beside it.

    Attributes:
        exp_avg, exp_avg_sq, exp_dev_sq: As in `PopRiskAdamW` (the last one also under AdamW,
            where the study keeps it itself); not bias-corrected.
        step: Steps so far.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_dev_sq: Tensor
    step: int

    def hats(self, rho: float) -> tuple[Tensor, Tensor, Tensor]:
        """Bias-corrected m, v, s; s is 0 before there is a deviation."""
        beta1, beta2 = BETAS
        noise = self.exp_dev_sq / (1 - rho ** (self.step - 1)) if self.step > 1 else self.exp_dev_sq
        return (
            self.exp_avg / (1 - beta1**self.step),
            self.exp_avg_sq / (1 - beta2**self.step),
            noise,
        )


def fixed_direction(after: Moments, arm: Arm, lr: float) -> tuple[Tensor, Tensor]:
    """Preconditioner P = lr q / (sqrt(v_hat) + eps) and D = P (1 - beta1) / (1 - beta1^t)."""
    mean, second, noise = after.hats(arm.rho)
    precondition = lr / (second.sqrt() + EPS)
    if arm.gate != "none" and after.step > 1:
        precondition = precondition * gate_factor(
            mean.square(),
            noise,
            gate=arm.gate,
            alpha=arm.alpha,
            lambda_pop=default_lambda_pop(arm.gate, arm.alpha),
        )
    return precondition, precondition * (1 - BETAS[0]) / (1 - BETAS[0] ** after.step)


def leave_one_out_step(
    weights: Tensor, grads: Tensor, before: Moments, arm: Arm, lr: float, decay: float
) -> Tensor:
    """Mean over i of g_i' u(-i): the whole step, made anew without example i.

    Moments, preconditioner and gate of u(-i) have not seen example i, so nothing is assumed fixed:
    unbiased for the step of a batch with b - 1 examples.

    Args:
        weights: w_t, shape (P,).
        grads: Per-example gradients, shape (b, P).
        before: The optimizer's state before the step.
        arm: What the step is made with.
        lr: Learning rate.
        decay: Decoupled weight decay.
    """
    count = len(grads)
    others = (grads.sum(0) - grads) / (count - 1)
    optimizer = StackedAdam(
        arm,
        [weights.numel()],
        torch.full((count,), lr),
        torch.full((count,), decay),
        list(range(count)),
    )
    states = [before.exp_avg, before.exp_avg_sq, before.exp_dev_sq][: 2 + (arm.gate != "none")]
    optimizer.moments = [state.repeat(count, 1) for state in states]
    optimizer.at, optimizer.dev_at = before.step, max(0, before.step - 1)
    moved = weights.repeat(count, 1)
    optimizer.step(moved, others)
    return (grads * (weights - moved)).sum() / count


def pieces_error(pieces: Tensor, rest: Tensor, direction: Tensor) -> Tensor:
    """Squared standard error of g' rest + U_D from the spread of K pieces.

        psi_i = g_i' rest + 2 g_i' D g(-i),    se^2 = var(psi) / K
    The first-order (delete-one) form: exact where the mean dominates, too large (by up to 2 in the
    variance) where noise does.
    """
    count = len(pieces)
    mean = pieces.mean(0)
    crossed = (count * (pieces @ (direction * mean)) - pieces.square() @ direction) / (count - 1)
    return (pieces @ rest + 2 * crossed).var() / count


def step_predictions(
    grads: Tensor, move: Tensor, after: Moments, arm: Arm, lr: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All estimates that a single batch and the optimizer's state give, and squared errors.

    Args:
        grads: Per-example gradients at w_t, shape (b, P).
        move: u = w_t - w_{t+1}, shape (P,).
        after: State after the step.
        arm: What the step was made with.
        lr: Learning rate.

    Returns:
        Estimates by name, and squared standard errors of those that have pieces.
    """
    grad = grads.mean(0)
    precondition, direction = fixed_direction(after, arm, lr)
    own = grad @ (direction * grad)
    naive = grad @ move
    rest = move - direction * grad
    root = direction.sqrt()
    found = {"naive": naive, "exact": naive - own + population_risk_decrease(grads * root)}
    errors = {"exact": pieces_error(grads, rest, direction)}
    for count in (8, 4):
        pieces = grads.unflatten(0, (count, -1)).mean(1)
        scaled = pieces * root
        cross = risk_decrease_from_sums(scaled.sum(0).square().sum(), scaled.square().sum(), count)
        found[f"micro-{count}"] = naive - own + cross
        errors[f"micro-{count}"] = pieces_error(pieces, rest, direction)
    mean, _, noise = after.hats(arm.rho)
    variance = noise / deviation_scale(BETAS[0])  # of the batch mean
    decayed = mean @ (move - precondition * mean)  # the weight decay's part
    # One step has no deviation yet: the batch's own product counts as noise.
    found["streaming"] = naive - (direction @ variance if after.step > 1 else own)
    spread = variance * ema_mean_variance(BETAS[0], after.step)
    found["moments"] = decayed + precondition @ (mean.square() - spread)
    found["moments, alpha=1"] = decayed + precondition @ (mean.square() - noise)
    return found, errors
