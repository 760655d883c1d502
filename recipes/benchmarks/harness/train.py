"""What a study trains, data and model of all members, and one run of them under one arm."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from benchmarks.harness.arms import Arm
from benchmarks.harness.stacked_adam import StackedAdam
from torch import Tensor, nn
from torch.func import functional_call, vmap

__all__ = [
    "Member",
    "Params",
    "SupervisedTask",
    "Task",
    "Trace",
    "accuracy",
    "as_array",
    "cross_entropy",
    "members_of",
    "squared_error",
    "train",
]

Params = dict[str, Tensor]
Trace = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One model of a run; the seed is that of its data, its start and its batches."""

    seed: int
    condition: str = ""
    lr: float = 1e-3
    weight_decay: float = 0.0


class Task(ABC):
    """Data and model of some members, which differ in seed, condition and rates.

    Subclasses set `members` (a list), `steps` and `eval_steps` (ascending, the last = `steps`).
    Members of the same seed start alike and see the same batches, whatever their rates.
    """

    members: list[Member]
    steps: int
    eval_steps: Sequence[int]

    @abstractmethod
    def initial(self) -> Params:
        """Stacked parameters, each of shape (M, ...)."""

    @abstractmethod
    def losses(self, params: Params, step: int) -> Tensor:
        """Batch-mean loss of each member at a step, shape (M,)."""

    @abstractmethod
    def metrics(self, params: Params) -> dict[str, Tensor]:
        """What is measured, each of shape (M,)."""


class SupervisedTask(Task):
    """Examples in tensors, drawn in batches without replacement, epoch by epoch.

    Args:
        members: The models.
        data: For a (condition, seed): tensors x, y, test x, test y.
        module: Makes a model; called after `torch.manual_seed(seed)`.
        loss: From outputs and targets of one member to a scalar, a mean over examples.
        scores: For each metric, from outputs and targets of the test set to a scalar.
        batch_size: Examples per step; a short last batch of an epoch is dropped.
        steps: Of the run.
        eval_steps: When the metrics are taken.
    """

    def __init__(
        self,
        members: list[Member],
        data: Callable[[str, int], tuple[Tensor, Tensor, Tensor, Tensor]],
        module: Callable[[], nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        scores: dict[str, Callable[[Tensor, Tensor], Tensor]],
        *,
        batch_size: int,
        steps: int,
        eval_steps: Sequence[int],
    ) -> None:
        self.members, self.steps, self.eval_steps = members, steps, eval_steps
        self.batch_size, self.loss, self.scores = batch_size, loss, scores
        keys = list(dict.fromkeys((m.condition, m.seed) for m in members))
        columns = zip(*(data(*key) for key in keys), strict=True)
        self.x, self.y, self.test_x, self.test_y = (torch.stack(c) for c in columns)
        self.data_of = torch.tensor([keys.index((m.condition, m.seed)) for m in members])
        self.module = module
        self.model = module()  # its parameters are never used, those of `initial` are
        self.generators = {m.seed: torch.Generator().manual_seed(40_000 + m.seed) for m in members}
        self.order: dict[int, Tensor] = {}

    def initial(self) -> Params:
        """One draw for each seed."""
        drawn: dict[int, Params] = {}
        for seed in dict.fromkeys(m.seed for m in self.members):
            torch.manual_seed(seed)
            drawn[seed] = {name: p.detach() for name, p in self.module().named_parameters()}
        names = list(drawn[self.members[0].seed])
        return {n: torch.stack([drawn[m.seed][n] for m in self.members]) for n in names}

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Outputs of each member for its own inputs, shape (M, B, ...)."""
        return vmap(lambda p, a: functional_call(self.model, p, (a,)))(params, x)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The examples of a step, each of shape (M, B, ...)."""
        count = self.x.shape[1]
        within = step % (count // self.batch_size)
        if within == 0:
            self.order = {s: torch.randperm(count, generator=g) for s, g in self.generators.items()}
        chosen = slice(within * self.batch_size, (within + 1) * self.batch_size)
        rows = torch.stack([self.order[m.seed][chosen] for m in self.members])
        return self.x[self.data_of[:, None], rows], self.y[self.data_of[:, None], rows]

    def losses(self, params: Params, step: int) -> Tensor:
        """Of the batch of this step."""
        x, y = self.batch(step)
        return vmap(self.loss)(self.predict(params, x), y)

    def metrics(self, params: Params) -> dict[str, Tensor]:
        """On the test set."""
        out, y = self.predict(params, self.test_x[self.data_of]), self.test_y[self.data_of]
        return {name: vmap(score)(out, y) for name, score in self.scores.items()}


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """Mean over examples (and positions)."""
    return nn.functional.cross_entropy(out.flatten(0, -2), y.flatten())


def squared_error(out: Tensor, y: Tensor) -> Tensor:
    """Mean over examples and outputs."""
    return (out - y).square().mean()


def accuracy(out: Tensor, y: Tensor) -> Tensor:
    """Share of right answers."""
    return (out.argmax(-1) == y).float().mean()


def members_of(
    seeds: Sequence[int],
    conditions: Sequence[str],
    lrs: Sequence[float],
    decays: Sequence[float] = (0.0,),
) -> list[Member]:
    """All combinations."""
    return [
        Member(seed=seed, condition=condition, lr=lr, weight_decay=decay)
        for condition in conditions
        for lr in lrs
        for decay in decays
        for seed in seeds
    ]


def as_array(members: list[Member]) -> Trace:
    """Columns that tell members apart, for a trace."""
    names = ("seed", "condition", "lr", "weight_decay")
    return {name: np.array([getattr(m, name) for m in members]) for name in names}


def train(
    task: Task,
    arm: Arm,
    *,
    recorded: Trace | None = None,
    schedule: Callable[[float], float] | None = None,
    optimizer_class: Callable[..., StackedAdam] = StackedAdam,
) -> Trace:
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
        Arrays by name: those of the members (M,), `eval_step` (E,), each metric (E, M), `diverged`
        (M,), `update_norm` and `moved_share` (T, M).
    """
    found = as_array(task.members)
    start = task.initial()
    shapes = {name: p.shape[1:] for name, p in start.items()}
    sizes = [shape.numel() for shape in shapes.values()]
    theta = torch.cat([p.flatten(1) for p in start.values()], 1).requires_grad_()
    rates = (torch.tensor(found[name]).to(theta) for name in ("lr", "weight_decay"))
    seeds = [m.seed for m in task.members]
    optimizer = optimizer_class(arm, sizes, *rates, seeds, recorded)
    optimizer.rows_of = [shape[0] if shape else 1 for shape in shapes.values()]

    def unflatten(flat: Tensor) -> Params:
        pairs = zip(shapes.items(), flat.split(sizes, 1), strict=True)
        return {name: part.unflatten(1, s) if s else part[:, 0] for (name, s), part in pairs}

    log: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def measure() -> None:
        for name, values in task.metrics(unflatten(theta)).items():
            log.setdefault(name, []).append(values.float().cpu())

    diverged = torch.zeros(len(seeds), dtype=torch.bool)
    evaluations = sorted({s for s in task.eval_steps if s <= task.steps})
    measure()
    for step in range(task.steps):
        loss = task.losses(unflatten(theta), step)
        (grad,) = torch.autograd.grad(loss.sum(), theta)
        fine = grad.sum(1).isfinite()
        if not bool(fine.all()):
            diverged |= (~fine).cpu()
            optimizer.lr = torch.where(fine[:, None], optimizer.lr, 0.0)
            grad = torch.where(fine[:, None], grad, 0.0)
        optimizer.step(theta, grad, 1.0 if schedule is None else schedule(step / task.steps))
        if step + 1 in evaluations:
            measure()
    return {
        **found,
        "eval_step": np.array([0, *evaluations]),
        **{name: torch.stack(rows).numpy() for name, rows in log.items()},
        **optimizer.arrays(),
        "diverged": diverged.numpy(),
    }
