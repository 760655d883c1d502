"""Losses of preference pairs for labels that may be wrong, as functions of the reward margin.

Throughout, `margins` is h = beta * (log-ratio of chosen - log-ratio of rejected) with log-ratio
log pi(y | x) - log pi_ref(y | x), and s is the logistic function. Every function returns one loss
per pair, of the shape of `margins`; the caller takes the mean. The force on a pair is -dL/dh.
"""

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "conservative_dpo_loss",
    "dpo_loss",
    "holder_dpo_loss",
    "posterior_dpo_loss",
    "robust_dpo_loss",
]


def dpo_loss(margins: Tensor) -> Tensor:
    """DPO's loss.

        L = -log s(h)

    (Rafailov et al. 2023, eq. 7.)

    Args:
        margins: Any shape, reward units.

    Example:
        >>> import torch
        >>> round(dpo_loss(torch.tensor(0.0)).item(), 4)
        0.6931
    """
    return -logsigmoid(margins)


def conservative_dpo_loss(margins: Tensor, noise_rate: float | Tensor) -> Tensor:
    """Cross-entropy against a label that is wrong with known probability (cDPO).

        L = -(1 - e) log s(h) - e log s(-h)

    (Mitchell 2023.) Its optimum is finite, h = log((1 - e) / e). A pair that reached it stops
    pulling, while one with a wrong label still does.

    Args:
        margins: Any shape, reward units.
        noise_rate: e in [0, 0.5), or a tensor of such that broadcasts.

    Raises:
        ValueError: If a float `noise_rate` is outside [0, 0.5).

    Example:
        >>> import torch
        >>> h = torch.tensor(math.log(0.7 / 0.3), requires_grad=True)
        >>> abs(torch.autograd.grad(conservative_dpo_loss(h, 0.3), h)[0].item()) < 1e-7
        True
    """
    _check_noise_rate(noise_rate)
    return -(1 - noise_rate) * logsigmoid(margins) - noise_rate * logsigmoid(-margins)


def robust_dpo_loss(
    margins: Tensor, noise_rate: float | Tensor, max_margin: float | None = None
) -> Tensor:
    """Unbiased estimate of the loss on clean labels (rDPO), bounded on request.

        L = [-(1 - e) log s(h) + e log s(-h)] / (1 - 2e)  =  -log s(h) - c h,  c = e / (1 - 2e)

    (Chowdhury et al. 2024, arXiv:2403.00409.) It is DPO plus a constant push c on every margin and
    has no finite optimum: with fitted pairs it falls without end. With `max_margin` H the push ends
    there,

        L = -log s(h) - c min(h, H)

    so that beyond H a pair is treated as by DPO.

    Args:
        margins: Any shape, reward units.
        noise_rate: e in [0, 0.5), or a tensor of such that broadcasts.
        max_margin: H > 0, reward units; None for the published loss.

    Raises:
        ValueError: If a float `noise_rate` is outside [0, 0.5), or `max_margin` is not positive.

    Example:
        >>> import torch
        >>> h = torch.tensor([1.0, 9.0])
        >>> (dpo_loss(h) - robust_dpo_loss(h, 0.25, max_margin=4.0)).tolist()
        [0.5, 2.0]
    """
    _check_noise_rate(noise_rate)
    if max_margin is not None and not max_margin > 0:
        raise ValueError(f"Invalid max_margin: {max_margin}. Must be > 0 or None.")
    pushed = margins if max_margin is None else margins.clamp(max=max_margin)
    return -logsigmoid(margins) - noise_rate / (1 - 2 * noise_rate) * pushed


def holder_dpo_loss(margins: Tensor, gamma: float = 2.0) -> Tensor:
    """Density-power divergence to the Bradley-Terry model: large contradictions stop pulling.

        L = s(h)^(1+g) + s(-h)^(1+g) - (1 + 1/g) s(h)^g,   divided by (1 + g)

    The member phi(z) = g - (1 + g) z of the family of Hoelder divergences behind Hoelder-DPO
    (arXiv:2505.17859; Basu et al. 1998 for the divergence), written for the two outcomes of a
    pair. A proper scoring rule, so clean labels are fitted as by DPO, and redescending: the force
    on a pair vanishes for h to minus infinity. The division makes the force at h = 0 independent
    of how the divergence is scaled: it is 2^-(1+g), against DPO's 1/2.

    Args:
        margins: Any shape, reward units.
        gamma: g > 0; towards 0 this is DPO, up to a constant.

    Raises:
        ValueError: If `gamma` is not positive.

    Example:
        >>> import torch
        >>> h = torch.tensor([-20.0, 0.0], requires_grad=True)
        >>> force = -torch.autograd.grad(holder_dpo_loss(h).sum(), h)[0]
        >>> [round(value, 4) for value in force.tolist()]
        [0.0, 0.125]
    """
    if not gamma > 0:
        raise ValueError(f"Invalid gamma: {gamma}. Must be > 0.")
    # Powers as exponentials: the derivative of a root of a vanished probability is infinite.
    log_right, log_wrong, power = logsigmoid(margins), logsigmoid(-margins), 1 + gamma
    model_term = ((power * log_right).exp() + (power * log_wrong).exp()) / power
    return model_term - (gamma * log_right).exp() / gamma


def posterior_dpo_loss(margins: Tensor, p_correct: Tensor) -> Tensor:
    """Expected DPO loss under the probability that each label is right (RE-PO's form).

        L = -w log s(h) - (1 - w) log s(-h)

    (arXiv:2509.24159.) With one w for all pairs this is cDPO.

    Args:
        margins: Any shape, reward units.
        p_correct: w in [0, 1], broadcasts; no gradient flows into it.

    Example:
        >>> import torch
        >>> loss = posterior_dpo_loss(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]))
        >>> [round(value, 3) for value in loss.tolist()]
        [0.127, 2.127]
    """
    w = p_correct.detach()
    return -w * logsigmoid(margins) - (1 - w) * logsigmoid(-margins)


def _check_noise_rate(noise_rate: float | Tensor) -> None:
    if isinstance(noise_rate, Tensor):  # a check of its values would wait for the device
        return
    if not (math.isfinite(noise_rate) and 0.0 <= noise_rate < 0.5):
        raise ValueError(f"Invalid noise_rate: {noise_rate}. Must be in [0, 0.5).")
