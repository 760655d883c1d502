"""Data sets with wrong training labels, and the task that watches which labels are fitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from gate_harness.tasks import Member, SupervisedTask, accuracy, cross_entropy
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

__all__ = ["FLIPS", "SETS", "DataSet", "Drawn", "NoisyLabelsTask", "draw", "flip"]

FLIPS = (0, 10, 20, 40)


@dataclass(frozen=True)
class DataSet:
    """One data set and its network.

    Args:
        train: Training examples.
        test: Test examples at most.
        width: Hidden units.
        batch_size: Examples per step.
        steps: Of a run.
        group: Members that train side by side, so that their tensors stay in cache.
    """

    train: int
    test: int
    width: int
    batch_size: int
    steps: int
    group: int


SETS = {
    "digits": DataSet(train=800, test=500, width=128, batch_size=32, steps=1000, group=35),
    "breast_cancer": DataSet(train=300, test=269, width=64, batch_size=32, steps=1000, group=80),
}


@dataclass(frozen=True)
class Drawn:
    """The data of one (condition, seed); `wrong` marks the flipped training labels."""

    x: Tensor
    y: Tensor
    wrong: Tensor
    test_x: Tensor
    test_y: Tensor


@cache
def whole(name: str) -> tuple[Tensor, Tensor]:
    """All examples of a data set."""
    load = {"digits": load_digits, "breast_cancer": load_breast_cancer}[name]
    x, y = load(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def flip(y: Tensor, percent: float, classes: int, generator: torch.Generator) -> Tensor:
    """Change exactly this share of labels to another class, each other class alike.

    With the same generator a higher share changes the same labels and more.
    """
    chosen = torch.randperm(len(y), generator=generator)[: round(len(y) * percent / 100)]
    offsets = torch.randint(1, classes, (len(y),), generator=generator)
    flipped = y.clone()
    flipped[chosen] = (y[chosen] + offsets[chosen]) % classes
    return flipped


def draw(condition: str, seed: int) -> Drawn:
    """Split, inputs scaled (digits) or standardised by the training set, training labels flipped.

    Args:
        condition: Data set and share of wrong labels, e.g. "digits 20%".
        seed: Of split and flips; the split does not depend on the share.
    """
    name, share = condition.rsplit(" ", 1)
    x, y = whole(name)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    size = SETS[name]
    train, test = order[: size.train], order[size.train : size.train + size.test]
    x = x / 16 if name == "digits" else (x - x[train].mean(0)) / x[train].std(0)
    noisy = flip(y[train], float(share.rstrip("%")), int(y.max()) + 1, generator)
    return Drawn(x[train], noisy, noisy != y[train], x[test], y[test])


class NoisyLabelsTask(SupervisedTask):
    """A network with one hidden layer on labels of which some are wrong.

    Metrics on clean test data: `accuracy`, `loss`. On the training set: `fitted_wrong`, share of
    the wrong labels that the network answers (0 where none is wrong), and `fitted_clean`, of the
    others.

    Args:
        members: All of one data set.
        steps: Of the run; the data set's own by default.
        eval_steps: When the metrics are taken.
    """

    def __init__(
        self, members: list[Member], *, steps: int | None = None, eval_steps: Sequence[int] = ()
    ) -> None:
        name = members[0].condition.rsplit(" ", 1)[0]
        size = SETS[name]
        wrong: list[Tensor] = []

        def data(condition: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            drawn = draw(condition, seed)
            wrong.append(drawn.wrong)
            return drawn.x, drawn.y, drawn.test_x, drawn.test_y

        x, y = whole(name)

        def module() -> nn.Module:
            out = int(y.max()) + 1
            return nn.Sequential(
                nn.Linear(x.shape[1], size.width), nn.ReLU(), nn.Linear(size.width, out)
            )

        steps = steps or size.steps
        super().__init__(
            members,
            data,
            module,
            cross_entropy,
            {"accuracy": accuracy, "loss": cross_entropy},
            batch_size=size.batch_size,
            steps=steps,
            eval_steps=eval_steps or usual_eval_steps(steps),
        )
        self.wrong = torch.stack(wrong)

    def metrics(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the test set and on the training set."""
        out = self.predict(params, self.x[self.data_of])
        fitted = (out.argmax(-1) == self.y[self.data_of]).float()
        wrong = self.wrong[self.data_of].float()
        return {
            **super().metrics(params),
            "fitted_wrong": (fitted * wrong).sum(1) / wrong.sum(1).clamp_min(1),
            "fitted_clean": (fitted * (1 - wrong)).sum(1) / (1 - wrong).sum(1),
        }


def usual_eval_steps(steps: int) -> list[int]:
    """Dense where the networks learn; the last is `steps`."""
    usual = (25, 50, 100, 150, 200, 300, 400, 600, 800)
    return sorted({s for s in usual if s < steps} | {steps})
