"""Controls that isolate the gate: what they do to AdamW's update after each step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["UPDATES", "member_norm", "moved_share"]

Update = Callable[..., list[Tensor]]


def member_norm(tensors: list[Tensor]) -> Tensor:
    """Norm over all tensors of a member, shape (M,)."""
    return sum((t.flatten(1).square().sum(1) for t in tensors), torch.zeros(())).sqrt()


def moved_share(tensors: list[Tensor]) -> Tensor:
    """Share of a member's coordinates that moved, shape (M,): a gate's open fraction."""
    moved = sum(((t != 0).flatten(1).sum(1) for t in tensors), torch.zeros(()))
    return moved / sum(t[0].numel() for t in tensors)


def norm(moves: list[Tensor], recorded: dict[str, np.ndarray], step: int, **_: Any) -> list[Tensor]:
    """C1: the direction of AdamW, the length of the gated run's step."""
    wanted = torch.from_numpy(recorded["update_norm"][step]).to(moves[0])
    factor = wanted / member_norm(moves).clamp_min(1e-30)
    return [move * _along(factor, move) for move in moves]


def mask(
    moves: list[Tensor],
    recorded: dict[str, np.ndarray],
    step: int,
    generator: torch.Generator,
    **_: Any,
) -> list[Tensor]:
    """C2: as many coordinates move as in the gated run, drawn anew each step."""
    share = torch.from_numpy(recorded["moved_share"][step]).to(moves[0])
    return [
        move * (torch.rand(move.shape, generator=generator) < _along(share, move).cpu()).to(move)
        for move in moves
    ]


def ratio(
    moves: list[Tensor],
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
    alpha: float,
    **_: Any,
) -> list[Tensor]:
    """C3: the gate with s = v - m^2, so that it needs no state of its own.

    q = max(0, 1 - alpha (v_hat - m_hat^2) / m_hat^2);  q > 0 where m_hat^2 > a/(1+a) v_hat
    """
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    found = []
    for param, move in zip(params, moves, strict=True):
        state = optimizer.state[param]
        t = float(state["step"])
        mean_sq = (state["exp_avg"] / (1 - beta1**t)).square()
        spread = (state["exp_avg_sq"] / (1 - beta2**t) - mean_sq).clamp_min(0.0)
        found.append(move * (1 - alpha * spread / mean_sq.clamp_min(1e-38)).clamp_min(0.0))
    return found


def pull(
    moves: list[Tensor],
    before: list[Tensor],
    reference: list[Tensor],
    lr: float,
    strength: float,
    **_: Any,
) -> list[Tensor]:
    """C4: weight decay towards the reference instead of zero, decoupled."""
    return [m - lr * strength * (b - r) for m, b, r in zip(moves, before, reference, strict=True)]


UPDATES: dict[str, Update] = {"norm": norm, "mask": mask, "ratio": ratio, "pull": pull}


def _along(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
