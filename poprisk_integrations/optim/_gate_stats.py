"""Sums and counts behind `gate_stats()`, additive over parameters and ranks."""

import torch
from torch import Tensor

__all__ = ["COLUMNS", "gate_ratios", "parameter_sums"]

COLUMNS = (
    "numel",
    "open",
    "gate",
    "ungated_sq",
    "gated_sq",
    "closed_zero_grad",
    "closed_noise",
    "lr_numel",
)


def parameter_sums(
    mean_sq: Tensor,
    noise: Tensor,
    gate: Tensor,
    direction: Tensor,
    alpha: float | Tensor,
    lr: float | Tensor,
) -> Tensor:
    """The columns of one parameter at one step, no host sync.

    Args:
        mean_sq: m^2, squared first moment.
        noise: s, same shape.
        gate: q that was applied, same shape.
        direction: Ungated Adam direction m_hat / (sqrt(v_hat) + eps) up to a constant.
        alpha: Boundary times the scale of s. A coordinate is open where m^2 > alpha * s.
        lr: Learning rate.

    Returns:
        Shape (8,), in the order of `COLUMNS`.
    """
    is_open = mean_sq > alpha * noise
    dead = ~is_open & (mean_sq == 0)
    numel = mean_sq.new_full((), float(mean_sq.numel()))
    n_open, n_dead = is_open.sum(), dead.sum()
    return torch.stack(
        [
            numel,
            n_open.to(numel.dtype),
            gate.sum(),
            direction.square().sum(),
            (direction * gate).square().sum(),
            n_dead.to(numel.dtype),
            numel - n_open - n_dead,
            numel * lr,
        ]
    )


def ungated_sums(direction: Tensor, lr: float | Tensor) -> Tensor:
    """The columns of a parameter whose update is not gated at this step: all open."""
    numel = direction.new_full((), float(direction.numel()))
    norm_sq = direction.square().sum()
    zero = torch.zeros_like(numel)
    return torch.stack([numel, numel, numel, norm_sq, norm_sq, zero, zero, numel * lr])


def gate_ratios(sums: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """Readable ratios from one row of sums.

    Args:
        sums: Shape (8,), possibly added over parameters and ranks.
        prefix: Put before each name.
    """
    row = dict(zip(COLUMNS, sums.double().cpu(), strict=True))
    numel = row["numel"].clamp(min=1)
    ratio = (row["gated_sq"] / row["ungated_sq"]).sqrt() if row["ungated_sq"] > 0 else numel * 0 + 1
    stats = {
        "open_fraction": row["open"] / numel,
        "mean_gate": row["gate"] / numel,
        "update_norm_ratio": ratio,
        "closed_zero_grad": row["closed_zero_grad"] / numel,
        "closed_noise": row["closed_noise"] / numel,
        "effective_lr": row["lr_numel"] / numel * ratio,
    }
    return {prefix + name: value for name, value in stats.items()}
