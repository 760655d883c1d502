"""DPO of all members side by side; models judged on the pairs that they did not see, and averaged.

Optimizers act coordinate by coordinate, so M models in stacked tensors train exactly as alone.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmarks.cleaned_pairs.model import Params, completion_log_probs, scores
from benchmarks.cleaned_pairs.pairs import Task, log_probs_of
from torch import Tensor
from torch.nn.functional import softplus

from poprisk_integrations.core.out_of_fold import MarginAverage

__all__ = [
    "BATCH", "BETA", "Run", "accuracy", "dpo", "filled", "judged", "margins_of", "parts",
    "policy_margin", "reward_margin",
]  # fmt: skip

BATCH, BETA = 32, 0.1
Margin = Callable[[Params, Task, Tensor, Tensor], Tensor]  # of rows (M, k) of members (M, 1)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Learning rate, its course, and epochs of one training."""

    lr: float
    schedule: str  # "linear" to zero, or "constant"
    epochs: int


def policy_margin(params: Params, task: Task, member: Tensor, rows: Tensor) -> Tensor:
    """Of a policy, in reward units, shape (M, k)."""
    chosen, rejected = _both(completion_log_probs, params, task, member, rows)
    return BETA * (chosen - rejected - task.reference_margin[member, rows])


def reward_margin(params: Params, task: Task, member: Tensor, rows: Tensor) -> Tensor:
    """Of a reward model."""
    chosen, rejected = _both(scores, params, task, member, rows)
    return chosen - rejected


def _both(
    of: Callable, params: Params, task: Task, member: Tensor, rows: Tensor
) -> tuple[Tensor, ...]:
    prompts = task.prompts[member, rows]
    both = torch.cat([task.chosen[member, rows], task.rejected[member, rows]], 1)
    return of(params, prompts.repeat(1, 2, 1), both).chunk(2, 1)


def dpo(
    task: Task,
    run: Run,
    rows: Tensor,
    p_right: Tensor | None = None,
    seed: int = 0,
    margin: Margin = policy_margin,
):
    """Yields the parameters after each epoch; the same steps in an epoch whatever rows there are.

    Args:
        task: Pairs and reference.
        run: How to train.
        rows: Shape (M, k), the rows that each member trains on.
        p_right: Shape (M, n), probability that a label is right: the loss is then
            -p log s(h) - (1 - p) log s(-h). None for 1.
        seed: Of the order.
        margin: h.
    """
    params = {name: p.clone().requires_grad_() for name, p in task.reference.items()}
    optimizer = torch.optim.AdamW(list(params.values()), lr=run.lr, weight_decay=0.0, foreach=True)
    generator = torch.Generator().manual_seed(seed)
    member = torch.arange(len(rows))[:, None]
    steps = rows.shape[1] // BATCH
    for epoch in range(run.epochs):
        order = rows[member, torch.rand(rows.shape, generator=generator).argsort(1)]
        for step in range(steps):
            done = (epoch * steps + step) / (run.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = run.lr * (1 - done if run.schedule == "linear" else 1)
            batch = order[:, step * BATCH : (step + 1) * BATCH]
            h = margin(params, task, member, batch)
            loss = softplus(-h)
            if p_right is not None:
                p = p_right[member, batch]
                loss = p * loss + (1 - p) * softplus(h)
            loss.mean(1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        yield {name: p.detach().clone() for name, p in params.items()}


def margins_of(params: Params, task: Task, rows: Tensor, margin: Margin = policy_margin) -> Tensor:
    """Without gradients, in chunks that fit a cache. Shape (M, k)."""
    member = torch.arange(len(rows))[:, None]
    with torch.no_grad():
        return torch.cat([margin(params, task, member, part) for part in rows.split(128, 1)], 1)


def accuracy(params: Params, task: Task) -> Tensor:
    """Share of clean held-out pairs that are ranked as the true reward does, shape (M,)."""
    better, worse = (
        log_probs_of(params, task.held_prompts, y) for y in (task.held_better, task.held_worse)
    )
    margin = better - worse - (task.held_reference[..., 0] - task.held_reference[..., 1])
    return (margin > 0).float().mean(1)


def parts(task: Task, folds: int, partition: int = 0) -> list[tuple[Tensor, Tensor]]:
    """For each fold the rows to train on and those to judge, both of shape (M, ...)."""
    n = task.prompts.shape[1]
    first = 60_000 + 1_000 * partition
    orders = [
        torch.randperm(n, generator=torch.Generator().manual_seed(first + seed))
        for seed in task.seeds
    ]
    order = torch.stack(orders)
    edges = [n * k // folds for k in range(folds + 1)]
    return [
        (torch.cat([order[:, :low], order[:, high:]], 1), order[:, low:high])
        for low, high in itertools.pairwise(edges)
    ]


def judged(
    task: Task,
    run: Run,
    folds: int,
    p_right: Tensor | None = None,
    kept: Tensor | None = None,
    *,
    partition: int = 0,
    margin: Margin = policy_margin,
) -> tuple[Tensor, Params, Tensor]:
    """What `cross_fit_flip_report` does: margins of pairs that a model did not see, and its mean.

    Each member's average goes up to the epoch at which its margins explain the labels best.

    Args:
        task: Pairs and reference.
        run: How a fold is trained.
        folds: Parts of the data.
        p_right: As for `dpo`.
        kept: Shape (M, n), bool: rows that are trained on at all. Others are judged as well.
        partition: Which division into folds.
        margin: Of a policy or of a reward model.

    Returns:
        Margins of shape (M, n); the mean over folds and epochs of the parameters; the last epoch
        of each member's average, shape (folds, M), counted from 1.
    """
    members, n = task.prompts.shape[:2]
    margins = torch.full((members, n), torch.nan, dtype=torch.float64)
    mean: Params = {name: torch.zeros_like(p) for name, p in task.reference.items()}
    ends = []
    for fold, (others, held) in enumerate(parts(task, folds, partition)):
        if kept is not None:
            others = filled(others, kept)
        averages = [MarginAverage() for _ in range(members)]
        total = {name: torch.zeros_like(p) for name, p in task.reference.items()}
        best = {name: torch.zeros_like(p) for name, p in task.reference.items()}
        seed = 61_000 + fold + 1_000 * partition
        for epoch, params in enumerate(dpo(task, run, others, p_right, seed, margin)):
            found = margins_of(params, task, held, margin)
            for name, p in params.items():
                total[name] += p
            for m, average in enumerate(averages):
                if average.has_told:
                    continue
                average.add(found[m])
                if average.best == epoch:
                    for name, value in total.items():
                        best[name][m] = value[m] / (epoch + 1)
            if all(average.has_told for average in averages):
                break
        for m, average in enumerate(averages):
            margins[m, held[m]] = average.margins()
        for name, p in best.items():
            mean[name] += p / folds
        ends.append(torch.tensor([average.best + 1 for average in averages]))
    return margins, mean, torch.stack(ends)


def filled(rows: Tensor, kept: Tensor) -> Tensor:
    """Rows of `rows` that are kept, some of them twice so that there are as many as before."""
    found = []
    for own, keeps in zip(rows, kept, strict=True):
        chosen = own[keeps[own]]
        repeats = -(-len(own) // len(chosen))
        found.append(chosen.repeat(repeats)[: len(own)])
    return torch.stack(found)
