"""Trains all members of a task side by side under one arm and records what the tables need.

Optimizers act coordinate by coordinate, so M models in stacked tensors train exactly as alone.
"""

import time
from typing import Any

import numpy as np
import torch
from arms import CALIBRATED, PULL, Arm, Context
from metrics import Evaluator
from model import completion_log_probs
from pairs import Task
from torch import Tensor
from updates import UPDATES, member_norm, moved_share
from windows import WindowRecorder

__all__ = ["BATCH", "EPOCHS", "log_ratio_margins", "train"]

BATCH, EPOCHS = 32, (1, 2, 3, 4, 5, 6, 8, 10, 12)


def train(
    task: Task,
    arm: Arm,
    lr: float,
    *,
    beta: float = 0.1,
    schedule: str = "constant",
    epochs: tuple[int, ...] = EPOCHS,
    recorded: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """One run of all members.

    Args:
        task: Data and reference.
        arm: What to train with.
        lr: Peak learning rate.
        beta: Of the margins, reward units per nat.
        schedule: "constant", or "linear" to zero at the end.
        epochs: After which the members are evaluated; the last ends the run.
        recorded: The run that the arm needs, for controls that imitate it.

    Returns:
        Arrays by name: metrics of shape (E, M), of steps (T, M), of windows (W, M), of pairs
        (M, n).
    """
    began, processor = time.time(), time.process_time()
    params = {name: p.clone().requires_grad_() for name, p in task.reference.items()}
    values = list(params.values())
    n = task.prompts.shape[1]
    kept = round(n * arm.keep)
    optimizer = arm.optimizer(values, lr, BATCH, kept)
    epoch_steps = kept // BATCH
    total = epoch_steps * epochs[-1]
    recorder = WindowRecorder(values, epoch_steps)
    evaluate = Evaluator(task, beta, kept)
    context = Context(
        noise_rate=task.noise_rate[:, None],
        ledger=torch.full_like(task.reference_margin, torch.nan),
        annotator=task.annotator,
    )
    change = _Change(arm, task, values, optimizer, recorded)
    order = _orders(task, arm, kept, total * BATCH)
    member = torch.arange(len(task.seeds))[:, None]

    def margins(params: dict[str, Tensor], member: Tensor, rows: Tensor) -> Tensor:
        return beta * log_ratio_margins(params, task, member, rows)

    evaluate(params, 0)
    for step in range(total):
        context.epoch, within = divmod(step, epoch_steps)
        if context.epoch == 1 and within == 0 and arm.after_first_epoch is not None:
            context.estimate = arm.after_first_epoch(context)
        context.rows = rows = order[:, step * BATCH : (step + 1) * BATCH]
        if arm.backward is None:
            h = margins(params, member, rows)
        else:
            h = arm.backward(arm, params, margins, context)
        seen = context.ledger[member, rows]
        context.ledger[member, rows] = torch.where(seen.isnan(), h.detach(), seen)
        if arm.backward is None:
            arm.loss(h, context).mean(1).sum().backward()
        recorder.add()
        now = lr if schedule == "constant" else lr * (1 - step / total)
        for group in optimizer.param_groups:
            group["lr"] = now
        change(step, now)
        if within == epoch_steps - 1 and context.epoch + 1 in epochs:
            evaluate(params, context.epoch + 1)
    return {
        **evaluate.arrays(),
        **recorder.arrays(),
        **change.arrays(),
        "ledger": context.ledger.cpu().numpy(),
        "flipped": task.flipped.cpu().numpy(),
        "annotator": task.annotator.cpu().numpy().astype(np.int8),
        "noise_rate": task.noise_rate.cpu().numpy(),
        "estimate": np.asarray(
            np.nan if context.estimate is None else context.estimate.cpu().numpy()
        ),
        "condition": np.array(task.conditions),
        "seed": np.array(task.seeds),
        "epoch_steps": np.array(epoch_steps),
        "seconds": np.array(time.time() - began),
        "processor_seconds": np.array(time.process_time() - processor),
    }


def log_ratio_margins(
    params: dict[str, Tensor], task: Task, member: Tensor, rows: Tensor
) -> Tensor:
    """Log-ratio of chosen minus that of rejected, shape (M, B)."""
    prompts = task.prompts[member, rows]
    both = torch.cat([task.chosen[member, rows], task.rejected[member, rows]], 1)
    chosen, rejected = completion_log_probs(params, prompts.repeat(1, 2, 1), both).chunk(2, 1)
    return chosen - rejected - task.reference_margin[member, rows]


def _orders(task: Task, arm: Arm, kept: int, count: int) -> Tensor:
    """Rows of all steps, shape (M, T * B): the same for all arms and conditions of a seed.

    An epoch is a permutation without its short last batch. Where rows are left out by an oracle the
    rest is passed more often, so that runs have the same number of steps.
    """
    found = []
    for place, seed in enumerate(task.seeds):
        generator = torch.Generator().manual_seed(40_000 + seed)
        parts: list[Tensor] = []
        while sum(map(len, parts)) < count:
            order = torch.randperm(kept, generator=generator)
            if arm.oracle:
                parts.append(order[~task.flipped[place, order]])
            else:
                parts.append(order[: kept // BATCH * BATCH])
        found.append(torch.cat(parts)[:count])
    return torch.stack(found)


class _Change:
    """Steps the optimizer, lets a control change the update, records its length."""

    def __init__(
        self,
        arm: Arm,
        task: Task,
        values: list[Tensor],
        optimizer: torch.optim.Optimizer,
        recorded: dict[str, np.ndarray] | None,
    ) -> None:
        self.values, self.optimizer, self.recorded = values, optimizer, recorded
        self.rule = None if arm.update is None else UPDATES[arm.update]
        self.reference = list(task.reference.values())
        self.generator = torch.Generator().manual_seed(50)
        self.rows: dict[str, list[Tensor]] = {"update_norm": [], "moved_share": []}

    @torch.no_grad()
    def __call__(self, step: int, lr: float) -> None:
        before = [v.clone() for v in self.values]
        self.optimizer.step()
        self.optimizer.zero_grad()
        moves = list(torch._foreach_sub(self.values, before))
        if self.rule is not None:
            moves = self.rule(
                moves,
                recorded=self.recorded,
                step=step,
                generator=self.generator,
                optimizer=self.optimizer,
                params=self.values,
                before=before,
                reference=self.reference,
                lr=lr,
                alpha=CALIBRATED,
                strength=PULL,
            )
            for value, old, move in zip(self.values, before, moves, strict=True):
                value.copy_(old + move)
        self.rows["update_norm"].append(member_norm(moves))
        self.rows["moved_share"].append(moved_share(moves))

    def arrays(self) -> dict[str, Any]:
        return {name: torch.stack(v).cpu().numpy() for name, v in self.rows.items()}
