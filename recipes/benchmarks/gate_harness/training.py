"""One run of all members of a task under one arm."""

from collections.abc import Callable

import numpy as np
import torch
from gate_harness.arms import Arm
from gate_harness.stacked_adam import StackedAdam
from gate_harness.tasks import Task, as_array
from torch import Tensor

__all__ = ["train"]


def train(
    task: Task,
    arm: Arm,
    *,
    recorded: dict[str, np.ndarray] | None = None,
    schedule: Callable[[float], float] | None = None,
    optimizer_class: Callable[..., StackedAdam] = StackedAdam,
) -> dict[str, np.ndarray]:
    """Train and measure.

    A member whose gradient is no longer finite stops there: its parameters stay and `diverged` is
    set. The others go on.

    Args:
        task: Data, model and members; is used up.
        arm: What to train with.
        recorded: Trace of the arm that a control imitates, same members.
        schedule: From the share of the run that is done to a factor of the learning rates.
        optimizer_class: Makes the optimizer; arguments as those of `StackedAdam`.

    Returns:
        Arrays by name: those of the members (M,), `eval_step` (E,), each metric (E, M),
        `finished_at` (M,) the step of the evaluation at which a member finished or -1, `diverged`
        (M,), `update_norm` and `moved_share` (T, M).
    """
    members = list(task.members)
    found = as_array(members)
    start = task.initial()
    names, shapes = list(start), [p.shape[1:] for p in start.values()]
    sizes = [shape.numel() for shape in shapes]
    theta = torch.cat([p.flatten(1) for p in start.values()], 1).requires_grad_()
    optimizer = optimizer_class(
        arm,
        sizes,
        torch.tensor(found["lr"]).to(theta),
        torch.tensor(found["weight_decay"]).to(theta),
        [m.seed for m in members],
        recorded,
    )

    def unflatten(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split(sizes, 1)
        triples = zip(names, shapes, parts, strict=True)
        return {name: part.unflatten(1, s) if s else part[:, 0] for name, s, part in triples}

    log = _Log(len(members))
    diverged = torch.zeros(len(members), dtype=torch.bool)
    with torch.no_grad():
        log(0, task.metrics(unflatten(theta)))
    evaluations = set(task.eval_steps)
    for step in range(task.steps):
        loss = task.losses(unflatten(theta), step)
        (grad,) = torch.autograd.grad(loss.sum(), theta)
        fine = grad.sum(1).isfinite()
        if not bool(fine.all()):
            lost = (~fine).cpu()
            diverged[log.active[lost]] = True
            optimizer.lr = torch.where(fine[:, None], optimizer.lr, 0.0)
            grad = torch.where(fine[:, None], grad, 0.0)
        optimizer.step(theta, grad, 1.0 if schedule is None else schedule(step / task.steps))
        if step + 1 not in evaluations:
            continue
        with torch.no_grad():
            metrics = task.metrics(unflatten(theta))
        log(step + 1, metrics)
        done = task.finished(metrics)
        if done is None or not bool(done.any()):
            continue
        log.finish(step + 1, done.cpu())
        index = (~done).nonzero()[:, 0]
        if len(index) == 0:
            break
        task.keep(index)
        optimizer.keep(index)
        theta = theta.detach()[index].requires_grad_()
    return {**found, **log.arrays(), **optimizer.arrays(), "diverged": diverged.numpy()}


class _Log:
    """Metrics of all members; those that finished keep their last value."""

    def __init__(self, count: int) -> None:
        self.active = torch.arange(count)
        self.finished_at = torch.full((count,), -1)
        self.steps: list[int] = []
        self.rows: dict[str, list[Tensor]] = {}

    def __call__(self, step: int, metrics: dict[str, Tensor]) -> None:
        self.steps.append(step)
        for name, values in metrics.items():
            rows = self.rows.setdefault(name, [])
            row = rows[-1].clone() if rows else torch.zeros(len(self.finished_at))
            row[self.active] = values.detach().float().cpu()
            rows.append(row)

    def finish(self, step: int, done: Tensor) -> None:
        self.finished_at[self.active[done]] = step
        self.active = self.active[~done]

    def arrays(self) -> dict[str, np.ndarray]:
        found = {name: torch.stack(rows).numpy() for name, rows in self.rows.items()}
        return {
            "eval_step": np.array(self.steps),
            "finished_at": self.finished_at.numpy(),
            **found,
        }
