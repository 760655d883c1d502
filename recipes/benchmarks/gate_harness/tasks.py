"""What a study trains: data and model of all members."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

__all__ = [
    "Member",
    "SupervisedTask",
    "Task",
    "accuracy",
    "as_array",
    "cross_entropy",
    "members_of",
    "squared_error",
]

Params = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One model of a run.

    Args:
        seed: Of its data, its start and its batches.
        condition: Of its data, e.g. a noise level.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """

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

    def finished(self, metrics: dict[str, Tensor]) -> Tensor | None:
        """Members that need not go on, shape (M,); None where all do."""
        return None

    def keep(self, index: Tensor) -> None:
        """Go on with these members only."""
        self.members = [self.members[i] for i in index.tolist()]


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
        self.model: nn.Module | None = None
        self.generators = {m.seed: torch.Generator().manual_seed(40_000 + m.seed) for m in members}
        self.order: dict[int, Tensor] = {}

    def initial(self) -> Params:
        """One draw for each seed."""
        drawn: dict[int, Params] = {}
        for member in self.members:
            if member.seed not in drawn:
                torch.manual_seed(member.seed)
                self.model = self.module()
                drawn[member.seed] = {name: p.detach() for name, p in self.model.named_parameters()}
        names = list(drawn[self.members[0].seed])
        return {n: torch.stack([drawn[m.seed][n] for m in self.members]) for n in names}

    def predict(self, params: Params, x: Tensor) -> Tensor:
        """Outputs of each member for its own inputs, shape (M, B, ...)."""
        assert self.model is not None
        model = self.model
        return vmap(lambda p, a: functional_call(model, p, (a,)))(params, x)

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

    def keep(self, index: Tensor) -> None:
        """Go on with these members only."""
        super().keep(index)
        self.data_of = self.data_of[index]


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


def as_array(members: list[Member]) -> dict[str, Any]:
    """Columns that tell members apart, for a trace."""
    import numpy as np

    return {
        "seed": np.array([m.seed for m in members]),
        "condition": np.array([m.condition for m in members]),
        "lr": np.array([m.lr for m in members]),
        "weight_decay": np.array([m.weight_decay for m in members]),
    }
