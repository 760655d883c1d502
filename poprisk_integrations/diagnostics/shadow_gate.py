"""What a gate would have done: its averages, run beside a training that knows nothing of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poprisk_integrations.core.gate import default_lambda_pop, gate_factor, open_mask
from poprisk_integrations.core.noise import update_dev_sq_
from poprisk_integrations.diagnostics.open_probability import noise_open_at_step

__all__ = ["ShadowGate", "run_shadow_gates"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowGate:
    """One boundary, measured over the last steps.

    Attributes:
        open_fractions: Share of open coordinates, one per group.
        open_fraction: Of all groups together.
        noise_open: What pure Gaussian noise would have given at the same steps.
        mean_gate: Mean of the soft gate q.
        update_norm_ratio: |gated| / |ungated| update of the soft gate.
    """

    open_fractions: tuple[float, ...]
    open_fraction: float
    noise_open: float
    mean_gate: float
    update_norm_ratio: float


@torch.no_grad()
def run_shadow_gates(
    gradients: Tensor,
    weight: Tensor,
    group: Tensor,
    alphas: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    rho: float = 0.99,
    eps: float = 1e-8,
    measured: int | None = None,
) -> list[ShadowGate]:
    """Run m, v and s of PopRiskAdamW over recorded gradients and count what each alpha lets pass.

    Args:
        gradients: g_t of each coordinate, shape (T, M), T >= 2.
        weight: How many coordinates each stands for, shape (M,); 0 for those to leave out.
        group: Group of each coordinate, integers from 0, shape (M,).
        alphas: Boundaries.
        betas: Of Adam.
        rho: Decay of s.
        eps: Of Adam.
        measured: Last steps to measure at; None for a third.

    Returns:
        One for each alpha; fractions of an empty group are NaN.

    Example:
        >>> g = torch.ones(10, 2) * torch.tensor([1.0, 0.0])
        >>> gates = run_shadow_gates(g, torch.ones(2), torch.arange(2), [1.0])
        >>> gates[0].open_fractions
        (1.0, 0.0)
    """
    steps = len(gradients)
    first = steps - (measured or max(1, steps // 3)) + 1
    beta1, beta2 = betas
    mean, square, noise = (torch.zeros(gradients.shape[1]) for _ in range(3))
    weight = weight.double()
    sizes = torch.bincount(group, weights=weight)
    opened = [torch.zeros_like(sizes) for _ in alphas]
    gate_sum = [0.0 for _ in alphas]
    gated_sq = [0.0 for _ in alphas]
    ungated_sq = 0.0
    for t, grad in enumerate(gradients, start=1):
        if t > 1:
            update_dev_sq_(noise, grad, mean, rho, 1 - rho, 1 / (1 - beta1 ** (t - 1)))
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if t < max(first, 2):
            continue
        m_hat = mean / (1 - beta1**t)
        m_sq, s_hat = m_hat.square(), noise / (1 - rho ** (t - 1))
        update = (m_hat / ((square / (1 - beta2**t)).sqrt() + eps)).double()
        ungated_sq += float(weight @ update.square())
        for i, alpha in enumerate(alphas):
            is_open = open_mask(m_sq, s_hat, alpha).double()
            opened[i] += torch.bincount(group, weights=weight * is_open)
            shrunk = default_lambda_pop("soft", alpha)
            q = gate_factor(m_sq, s_hat, gate="soft", alpha=alpha, lambda_pop=shrunk).double()
            gate_sum[i] += float(weight @ q)
            gated_sq[i] += float(weight @ (q * update).square())
    used = range(max(first, 2), steps + 1)
    total = float(sizes.sum()) * len(used)
    return [
        ShadowGate(
            open_fractions=tuple((opened[i] / sizes / len(used)).tolist()),
            open_fraction=float(opened[i].sum()) / total if total else math.nan,
            noise_open=sum(noise_open_at_step(alpha, beta1, rho, t) for t in used) / len(used),
            mean_gate=gate_sum[i] / total if total else math.nan,
            update_norm_ratio=math.sqrt(gated_sq[i] / ungated_sq) if ungated_sq else math.nan,
        )
        for i, alpha in enumerate(alphas)
    ]
