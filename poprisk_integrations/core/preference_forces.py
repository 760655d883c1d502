"""The force -dL/dh with which each loss of `preference_losses` acts on a pair, in closed form."""

import torch
from torch import Tensor

__all__ = [
    "conservative_dpo_force",
    "dpo_force",
    "holder_dpo_force",
    "posterior_dpo_force",
    "robust_dpo_force",
]


def dpo_force(margins: Tensor) -> Tensor:
    """s(-h): between 1 on contradicted and 0 on fitted pairs.

    Example:
        >>> dpo_force(torch.tensor(0.0)).item()
        0.5
    """
    return torch.sigmoid(-margins)


def conservative_dpo_force(margins: Tensor, noise_rate: float | Tensor) -> Tensor:
    """s(-h) - e: zero at h = log((1 - e) / e), negative beyond.

    Example:
        >>> conservative_dpo_force(torch.tensor(0.0), 0.25).item()
        0.25
    """
    return torch.sigmoid(-margins) - noise_rate


def robust_dpo_force(
    margins: Tensor, noise_rate: float | Tensor, max_margin: float | None = None
) -> Tensor:
    """s(-h) + e / (1 - 2e), without the second term beyond `max_margin`.

    Example:
        >>> force = robust_dpo_force(torch.tensor([0.0, 9.0]), 0.25, max_margin=4.0)
        >>> [round(value, 3) for value in force.tolist()]
        [1.0, 0.0]
    """
    push = noise_rate / (1 - 2 * noise_rate) * torch.ones_like(margins)
    if max_margin is not None:
        push = push * (margins <= max_margin)
    return torch.sigmoid(-margins) + push


def holder_dpo_force(margins: Tensor, gamma: float = 2.0) -> Tensor:
    """s(h) s(-h) [s(h)^(g-1) s(-h) + s(-h)^g].

    Example:
        >>> holder_dpo_force(torch.tensor(0.0)).item()
        0.125
    """
    right, wrong = torch.sigmoid(margins), torch.sigmoid(-margins)
    return right**gamma * wrong**2 + right * wrong ** (1 + gamma)


def posterior_dpo_force(margins: Tensor, p_correct: Tensor) -> Tensor:
    """The force w s(-h) - (1 - w) s(h), which is w - s(h).

    Example:
        >>> posterior_dpo_force(torch.tensor(0.0), torch.tensor(0.75)).item()
        0.25
    """
    return p_correct - torch.sigmoid(margins)
