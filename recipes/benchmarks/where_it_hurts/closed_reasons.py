"""Why coordinates are closed: one member of each toy, trained with `PopRiskAdamW` itself."""

from typing import Any

import torch
from gate_harness.arms import BETAS, GATES
from gate_harness.tasks import Member
from torch import Tensor, nn
from toy import Toy

from poprisk_integrations import PopRiskAdamW

__all__ = ["closed_rows", "is_open", "watched"]

# AdamW's path with the noise measured along it: q = 1 wherever there is an update.
WATCHED_ADAMW: dict[str, Any] = {"gate": "soft", "alpha": 0.0, "lambda_pop": 0.0}
PATHS: dict[str, dict[str, Any]] = {
    "AdamW": WATCHED_ADAMW,
    "soft-5": {"false_open_rate": 0.05},
}


def watched(toy: Toy, params: dict[str, nn.Parameter], lr: float, path: str) -> PopRiskAdamW:
    """The optimizer of a path, the affected parameters in the first of two groups."""
    hit = {name: any(part in name for part in toy.affected) for name in params}
    groups = [{"params": [p for n, p in params.items() if hit[n] == is_hit]} for is_hit in (1, 0)]
    return PopRiskAdamW(groups, lr, weight_decay=0.0, collect_stats_every=1, **PATHS[path])


def is_open(state: dict[str, Tensor], alpha: float, rho: float = 0.99) -> Tensor:
    """Where m_hat^2 > alpha * s_hat, from the optimizer's state after a step."""
    mean = state["exp_avg"] / (1 - BETAS[0] ** float(state["step"]))
    noise = state["exp_dev_sq"] / (1 - rho ** max(1.0, float(state["dev_step"])))
    return mean.square() > alpha * noise


def closed_rows(toy: Toy, lr: float, steps: int, every: int, seed: int = 0) -> list[dict]:
    """Shares of each group's coordinates, at some steps of AdamW's path and that of `soft-5`.

    `open` and `closed_*` are at the 5 % boundary. The two reasons are those of `gate_stats`:
    no mean gradient at all, or noise. `no_gradient_now` counts the closed coordinates whose
    gradient at this very step is zero, whatever the reason that `gate_stats` gives.

    Args:
        toy: What to train.
        lr: Learning rate.
        steps: Of the run.
        every: A row at each multiple.
        seed: Of the member.
    """
    rows = []
    alpha = GATES["soft-5"].alpha
    for path in PATHS:
        task = toy.build([Member(seed=seed, lr=lr)], steps)
        params = {name: nn.Parameter(p.clone()) for name, p in task.initial().items()}
        optimizer = watched(toy, params, lr, path)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            task.losses(params, step - 1).sum().backward()
            optimizer.step()
            if step % every:
                continue
            probe = float(task.metrics({n: p.detach() for n, p in params.items()})["probe"])
            for group, name in zip(optimizer.param_groups, ("affected", "rest"), strict=True):
                shares = _shares(optimizer, group["params"], alpha)
                rows.append(
                    {
                        "task": toy.name,
                        "path": path,
                        "lr": f"{lr:g}",
                        "seed": seed,
                        "step": step,
                        "group": name,
                        **{key: f"{value:.4f}" for key, value in shares.items()},
                        "probe": f"{probe:.4f}",
                    }
                )
    return rows


def _shares(optimizer: PopRiskAdamW, params: list[nn.Parameter], alpha: float) -> dict[str, float]:
    opened = torch.cat([is_open(optimizer.state[p], alpha).flatten() for p in params])
    mean = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in params])
    grad = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
    dead = ~opened & (mean.square() == 0)
    return {
        "open": opened.float().mean().item(),
        "closed_zero_grad": dead.float().mean().item(),
        "closed_noise": (~opened & ~dead).float().mean().item(),
        "closed_no_gradient_now": (~opened & (grad == 0)).float().mean().item(),
    }
