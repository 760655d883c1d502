"""Adaptive halting: a recurrent lookup that must learn to take a second step on hard inputs."""

import math
from statistics import NormalDist

import torch
from gate_harness.tasks import Member, SupervisedTask
from torch import Tensor, nn
from torch.nn.functional import nll_loss, one_hot
from toy import Toy

__all__ = ["HALTING", "best_accuracy", "halting_data"]

NODES, CUES, HARD, LABEL_NOISE, TRAIN, TEST = 8, 64, 0.4, 0.2, 4000, 1000
FLOOR = 1e-6


def halting_data(condition: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs (cues, one-hot node); targets (label, whether hard); the test labels are clean.

    A seed draws one cycle pi through all nodes. Label: pi(x) for an easy input, pi(pi(x)) for a
    hard one. Which it is shows in CUES Gaussian features of unit variance, whose mean is +c (hard)
    or -c (easy) with |c| = 1. Of the training labels 20 % are redrawn from all nodes.
    """
    g = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(NODES, generator=g)
    after = torch.empty_like(order)
    after[order] = order.roll(-1)
    count = TRAIN + TEST
    hard = torch.rand(count, generator=g) < HARD
    centre = torch.randn(CUES, generator=g)
    centre = centre / centre.norm()
    cues = torch.randn(count, CUES, generator=g) + torch.where(hard, 1.0, -1.0)[:, None] * centre
    node = torch.randint(NODES, (count,), generator=g)
    label = torch.where(hard, after[after[node]], after[node])
    redrawn = torch.rand(count, generator=g) < LABEL_NOISE
    redrawn[TRAIN:] = False
    label = torch.where(redrawn, torch.randint(NODES, (count,), generator=g), label)
    x = torch.cat([cues, one_hot(node, NODES).float()], 1)
    y = torch.stack([label, hard.long()], 1)
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


class HaltingNet(nn.Module):
    """Belief over nodes, moved by a learned transition matrix P; a router halts after one step.

        h = sigmoid(w . cues + b)          chance of halting after the first step
        out = h * (x P) + (1 - h) * (x P P)

    Outputs log out, and h in the last column.
    """

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(CUES, 1)
        self.table = nn.Parameter(0.1 * torch.randn(NODES, NODES))
        with torch.no_grad():
            self.router.weight.mul_(0.3)
            self.router.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        move = self.table.softmax(1)
        h = self.router(x[:, :CUES]).sigmoid()
        once = x[:, CUES:] @ move
        out = h * once + (1 - h) * (once @ move)
        return torch.cat([out.clamp_min(FLOOR).log(), h], 1)


def _loss(out: Tensor, y: Tensor) -> Tensor:
    return nll_loss(out[:, :NODES], y[:, 0])


def _right(out: Tensor, y: Tensor) -> Tensor:
    return (out[:, :NODES].argmax(1) == y[:, 0]).float()


def _accuracy(out: Tensor, y: Tensor) -> Tensor:
    return _right(out, y).mean()


def _hard_accuracy(out: Tensor, y: Tensor) -> Tensor:
    return (_right(out, y) * y[:, 1]).sum() / y[:, 1].sum()


def best_accuracy() -> float:
    """Accuracy of the best decision from the cue, given pi.

    Along c the cue is N(+-1, 1); hard is decided where the cue exceeds t = log((1-p)/p) / 2.
    """
    threshold = math.log((1 - HARD) / HARD) / 2
    law = NormalDist()
    return HARD * (1 - law.cdf(threshold - 1)) + (1 - HARD) * law.cdf(threshold + 1)


def _build(members: list[Member], steps: int) -> SupervisedTask:
    return SupervisedTask(
        members,
        halting_data,
        HaltingNet,
        _loss,
        {"accuracy": _accuracy, "loss": _loss, "probe": _hard_accuracy},
        batch_size=16,
        steps=steps,
        eval_steps=sorted({steps * k // 20 for k in range(1, 21)}),
    )


HALTING = Toy(
    name="halting",
    title="halting router",
    affected=("router",),
    module=HaltingNet,
    build=_build,
    steps=1000,
    lrs=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    seeds=tuple(range(8)),
    group=40,
    jump=0.5,
)
