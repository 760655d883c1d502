"""Wrong training labels: accuracy on clean test data under gates; rules in README.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from benchmarks.harness.figures import draw_ends, draw_rates
from benchmarks.harness.gate_study import (
    DRAWN,
    GATE_OPTIONS,
    Family,
    GateStudy,
    Traces,
    against_controls,
    judged,
    said,
)
from benchmarks.harness.provenance import hardware
from benchmarks.harness.tables import SCORES, against
from benchmarks.harness.train import Member, SupervisedTask, accuracy, cross_entropy
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

__all__ = ["SETS", "STUDY", "DataSet", "Drawn", "NoisyLabelsTask", "draw", "flip", "whole"]

FLIPS = (0, 10, 20, 40)
CLEAN_COST = -0.005


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set, its network (hidden units) and its run; `test`: examples at most."""

    train: int
    test: int
    width: int
    batch_size: int = 32
    steps: int = 1000


SETS = {
    "digits": DataSet(train=800, test=500, width=128),
    "breast_cancer": DataSet(train=300, test=269, width=64),
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

    The condition is data set and share of wrong labels, e.g. "digits 20%".
    """
    name, share = condition.rsplit(" ", 1)
    x, y = whole(name)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)  # the same for all shares
    size = SETS[name]
    train, test = order[: size.train], order[size.train : size.train + size.test]
    x = x / 16 if name == "digits" else (x - x[train].mean(0)) / x[train].std(0)
    noisy = flip(y[train], float(share.rstrip("%")), int(y.max()) + 1, generator)
    return Drawn(x[train], noisy, noisy != y[train], x[test], y[test])


class NoisyLabelsTask(SupervisedTask):
    """A network with one hidden layer on labels of which some are wrong.

    Metrics on clean test data: `accuracy`, `loss`. On the training set: `fitted_wrong`, share of
    the wrong labels that the network answers (0 where none is wrong), and `fitted_clean`, of the
    others. All members are of one data set, whose steps are the default.
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
        steps = steps or size.steps
        usual = (25, 50, 100, 150, 200, 300, 400, 600, 800)
        super().__init__(
            members,
            data,
            lambda: nn.Sequential(
                nn.Linear(x.shape[1], size.width),
                nn.ReLU(),
                nn.Linear(size.width, int(y.max()) + 1),
            ),
            cross_entropy,
            {"accuracy": accuracy, "loss": cross_entropy},
            batch_size=size.batch_size,
            steps=steps,
            eval_steps=eval_steps or sorted({s for s in usual if s < steps} | {steps}),
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


def _conditions(name: str, flips: Sequence[int] = FLIPS) -> list[str]:
    return [f"{name} {share}%" for share in flips]


def _pictures(found: Traces, rows: list[dict], out: Path) -> None:
    for name, traces in found.items():
        some = {arm: traces[arm] for arm in DRAWN if arm in traces}
        path = out / f"rates_{name}_{hardware()}.png"
        draw_rates(some, "accuracy", path, higher=True, label="clean test accuracy")
    conditions = [c for c in dict.fromkeys(row["condition"] for row in rows) if " 0%" not in c]
    draw_ends(
        rows,
        conditions,
        ("fitted_wrong_end", "accuracy_end"),
        ("wrong labels fitted", "clean test accuracy"),
        out / f"fitted_{hardware()}.png",
        figsize=(4 * ((len(conditions) + 1) // 2) + 2, 7.5),
    )


def _verdict(summary: list[dict]) -> list[str]:
    lines = []
    for arm in judged(summary):
        noisy = {c: against(summary, arm, "AdamW", c, "wrong labels") for c in SCORES}
        clean = against(summary, arm, "AdamW", "tuned", "clean labels")
        own = against_controls(summary, arm, "wrong labels")
        lines += [said(row) for row in (*noisy.values(), clean, *own)]
        costs = clean["word"] == "worse" and float(clean["mean"]) < CLEAN_COST
        lines.append(
            f"=> {arm}: {_conclusion(noisy['tuned']['word'], noisy['range']['word'], own)}; "
            f"on clean labels it {'costs accuracy' if costs else 'costs at most 0.5 %'}"
        )
    return lines


def _conclusion(tuned: str, ranged: str, own: list[dict]) -> str:
    """Rules 3 and 5: of the words against AdamW and against the controls."""
    if "worse" in (tuned, ranged):
        return f"does not help with wrong labels (tuned {tuned}, range {ranged})"
    if ranged != "better":
        return "no difference shown, or in one of two scores only"
    text = "helps with wrong labels"
    if tuned == "level":
        text += " where the rate is not tuned, and only there"
    if own:
        alone = all(row["word"] == "better" for row in own)
        text += "; the gain is the gate's own" if alone else "; a control reaches it in some score"
    return text


STUDY = GateStudy(
    folder=Path(__file__).parent,
    families={
        "digits": Family(
            conditions=_conditions("digits"),
            lrs=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            group=35,
        ),
        "breast_cancer": Family(
            conditions=_conditions("breast_cancer"),
            lrs=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
            group=80,
        ),
    },
    quick={
        name: Family(conditions=_conditions(name, (0, 20)), lrs=(3e-4, 3e-3), group=80)
        for name in SETS
    },
    build=lambda members, steps: NoisyLabelsTask(members, steps=steps),
    metrics={"accuracy": True, "loss": False, "fitted_wrong": False, "fitted_clean": True},
    scored=("accuracy", "loss"),
    groups={
        "all": lambda condition: True,
        "wrong labels": lambda condition: not condition.endswith(" 0%"),
        "clean labels": lambda condition: condition.endswith(" 0%"),
    },
    shown=("wrong labels", "clean labels"),
    better="clean test accuracy, % relative to AdamW",
    verdict=_verdict,
    pictures=_pictures,
)
TAKES = GATE_OPTIONS
main = STUDY.main
