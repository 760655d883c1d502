"""A mixture of experts: a softmax router must learn which expert an input belongs to."""

import math

import torch
from gate_harness.tasks import Member, SupervisedTask
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from toy import Toy

__all__ = ["EXPERTS", "experts_data", "routing_information"]

KINDS, CUES, INPUTS, LABEL_NOISE, TRAIN, TEST = 4, 32, 32, 0.2, 8000, 1000


def experts_data(condition: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs (cues, z); targets (label, kind); the test labels are clean.

    Each kind k has its own rule: label = [a_k . z > 0], with sum_k a_k = 0, so that no single
    linear rule does better than chance on all kinds. The kind shows in Gaussian cues of unit
    variance around a centre of norm 2. Of the training labels 20 % are flipped.
    """
    g = torch.Generator().manual_seed(1000 + seed)
    centres = torch.randn(KINDS, CUES, generator=g)
    centres = centres - centres.mean(0)
    centres = 2 * centres / centres.norm(dim=1, keepdim=True)
    rules = torch.randn(KINDS, INPUTS, generator=g)
    rules = rules - rules.mean(0)
    count = TRAIN + TEST
    kind = torch.randint(KINDS, (count,), generator=g)
    cues = centres[kind] + torch.randn(count, CUES, generator=g)
    z = torch.randn(count, INPUTS, generator=g)
    label = ((rules[kind] * z).sum(1) > 0).long()
    flipped = torch.rand(count, generator=g) < LABEL_NOISE
    flipped[TRAIN:] = False
    label = torch.where(flipped, 1 - label, label)
    x, y = torch.cat([cues, z], 1), torch.stack([label, kind], 1)
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


class ExpertsNet(nn.Module):
    """Linear experts, their logits mixed by a linear softmax router; outputs logits and mix."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(CUES, KINDS)
        self.experts = nn.Linear(INPUTS, 2 * KINDS)

    def forward(self, x: Tensor) -> Tensor:
        mix = self.router(x[:, :CUES]).softmax(1)
        each = self.experts(x[:, CUES:]).unflatten(1, (KINDS, 2))
        return torch.cat([(mix[:, :, None] * each).sum(1), mix], 1)


def _loss(out: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(out[:, :2], y[:, 0])


def _accuracy(out: Tensor, y: Tensor) -> Tensor:
    return (out[:, :2].argmax(1) == y[:, 0]).float().mean()


def routing_information(out: Tensor, y: Tensor) -> Tensor:
    """What the mean mix of a kind tells about the kind: 0 (routed alike) to 1 (own expert each).

    (H(mean_k p_k) - mean_k H(p_k)) / log KINDS, with p_k the mean mix over inputs of kind k.
    """
    is_kind = one_hot(y[:, 1], KINDS).float()
    mix = (is_kind.T @ out[:, 2:]) / is_kind.sum(0)[:, None]
    whole = torch.special.entr(mix.mean(0)).sum()
    return (whole - torch.special.entr(mix).sum(1).mean()) / math.log(KINDS)


def _build(members: list[Member], steps: int) -> SupervisedTask:
    return SupervisedTask(
        members,
        experts_data,
        ExpertsNet,
        _loss,
        {"accuracy": _accuracy, "loss": _loss, "probe": routing_information},
        batch_size=32,
        steps=steps,
        eval_steps=sorted({steps * k // 20 for k in range(1, 21)}),
    )


EXPERTS = Toy(
    name="experts",
    title="router of experts",
    affected=("router",),
    module=ExpertsNet,
    build=_build,
    steps=1500,
    lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    seeds=tuple(range(8)),
    group=24,
    jump=0.2,
)
