"""Arms beyond the field's: the noise rate estimated in the run, posteriors, and other gates.

Until the end of the first epoch, where the estimate is made, all of them train on DPO's loss.
"""

from dataclasses import replace
from typing import Any

import torch
from arms import A1, A9, Arm, Context, gated
from estimates import Estimate, estimate_from_ledger
from torch import Tensor

from poprisk_integrations.core.preference_losses import (
    dpo_loss,
    holder_dpo_loss,
    posterior_dpo_loss,
    robust_dpo_loss,
)

__all__ = ["VARIANTS"]

MAX_MARGIN = 4.0


def estimate(context: Context) -> Estimate:
    """As the trainer makes it after the first epoch."""
    return estimate_from_ledger(context.ledger)


def robust(h: Tensor, context: Context, max_margin: float | None = MAX_MARGIN) -> Tensor:
    if context.estimate is None:
        return dpo_loss(h)
    return robust_dpo_loss(h, context.estimate.rate, max_margin)


def unbounded(h: Tensor, context: Context) -> Tensor:
    return robust(h, context, None)


def close_bound(h: Tensor, context: Context) -> Tensor:
    return robust(h, context, 1.0)


def posterior(h: Tensor, context: Context) -> Tensor:
    """Both labels, each with its probability given the margin before training."""
    if context.estimate is None:
        return dpo_loss(h)
    member = torch.arange(len(h), device=h.device)[:, None]
    return posterior_dpo_loss(h, context.estimate.p_correct[member, context.rows].to(h))


def weighted(h: Tensor, context: Context) -> Tensor:
    """Probability that the label is right, as a factor of the loss."""
    if context.estimate is None:
        return dpo_loss(h)
    member = torch.arange(len(h), device=h.device)[:, None]
    return context.estimate.p_correct[member, context.rows].to(h) * dpo_loss(h)


def weighted_robust(h: Tensor, context: Context) -> Tensor:
    """Suspect pairs weigh less, and the noise that is left is corrected for."""
    if context.estimate is None:
        return dpo_loss(h)
    member = torch.arange(len(h), device=h.device)[:, None]
    w = context.estimate.p_correct[member, context.rows].to(h)
    left = ((1 - w) * w).mean(1, keepdim=True) / w.mean(1, keepdim=True)
    return w * robust_dpo_loss(h, left.clamp(max=0.35), MAX_MARGIN)


def filtered(h: Tensor, context: Context) -> Tensor:
    """Pairs whose label is more probably wrong than right are left out."""
    if context.estimate is None:
        return dpo_loss(h)
    member = torch.arange(len(h), device=h.device)[:, None]
    return (context.estimate.p_correct[member, context.rows] >= 0.5).to(h) * dpo_loss(h)


def holder(h: Tensor, context: Context) -> Tensor:
    return holder_dpo_loss(h, gamma=2.0)


def _both(name: str, **changes: Any) -> list[Arm]:
    """With AdamW, and with the calibrated gate."""
    return [
        replace(A1, name=f"{name} AdamW", **changes),
        replace(A9, name=f"{name}g gate", **changes),
    ]


VARIANTS = {
    arm.name.split()[0]: arm
    for arm in (
        *_both("E1", loss=robust, after_first_epoch=estimate),
        *_both("E2", loss=posterior, after_first_epoch=estimate),
        *_both("E3", loss=weighted, after_first_epoch=estimate),
        *_both("E4", loss=unbounded, after_first_epoch=estimate),
        *_both("E5", loss=close_bound, after_first_epoch=estimate),
        *_both("E6", loss=weighted_robust, after_first_epoch=estimate),
        *_both("E7", loss=filtered, after_first_epoch=estimate),
        replace(A9, name="A7g gate + Hoelder", loss=holder),
        replace(
            A1, name="G1 gate hard", optimizer=lambda p, lr, b, n: gated(p, lr, b, n, gate="hard")
        ),
        replace(
            A1, name="G2 gate snr", optimizer=lambda p, lr, b, n: gated(p, lr, b, n, gate="snr")
        ),
        replace(
            A1,
            name="G3 gate, half of the step",
            optimizer=lambda p, lr, b, n: gated(p, lr, b, n, gate_blend=0.5),
        ),
    )
}
