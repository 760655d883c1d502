"""Four tasks in which a gate was reported to fail, each as small as shows how."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from benchmarks.harness.train import Member, Params, SupervisedTask
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, nll_loss, one_hot

__all__ = ["TOYS", "Toy"]

LABEL_NOISE = 0.2
Data = tuple[Tensor, Tensor, Tensor, Tensor]
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A task; metrics are `accuracy`, `loss` and `probe`, every twentieth of the run."""

    name: str  # in tables and file names
    title: str  # in pictures
    affected: tuple[str, ...]  # substrings of the names of the parameters that the report is about
    module: Callable[[], nn.Module]  # makes a model
    data: Callable[[int], Data]  # of a seed: training and test inputs and targets
    loss: Score  # mean over examples, from outputs and targets
    scores: dict[str, Score]  # `accuracy` and `probe`, the latter unless `task` adds it
    batch_size: int  # examples per step
    steps: int  # of a full run
    lrs: tuple[float, ...]  # learning rates of every arm
    seeds: tuple[int, ...]  # of a full run
    group: int  # members that train side by side
    # The run made the transition where `probe` ends above this; None where there is none.
    jump: float | None = None
    task: type[SupervisedTask] = SupervisedTask  # its class

    def build(self, members: list[Member], steps: int) -> SupervisedTask:
        """The task of some members."""
        scores = {"accuracy": self.scores["accuracy"], "loss": self.loss, **self.scores}
        return self.task(
            members,
            lambda condition, seed: self.data(seed),
            self.module,
            self.loss,
            scores,
            batch_size=self.batch_size,
            steps=steps,
            eval_steps=sorted({steps * k // 20 for k in range(1, 21)}),
        )

    @property
    def tensors(self) -> list[str]:
        """Parameter names in the order of a member's row."""
        return [name for name, _ in self.module().named_parameters()]


def _right(out: Tensor, y: Tensor, classes: int) -> Tensor:
    """By example; the first column of the targets is the label."""
    return (out[:, :classes].argmax(1) == y[:, 0]).float()


def _accuracy(classes: int) -> Score:
    return lambda out, y: _right(out, y, classes).mean()


def _accuracy_where(classes: int) -> Score:
    """On the examples that the second column of the targets marks."""
    return lambda out, y: (_right(out, y, classes) * y[:, 1]).sum() / y[:, 1].sum()


# Adaptive halting: a recurrent lookup that must learn to take a second step on hard inputs.

NODES, HALTING_CUES, HARD, FLOOR = 8, 64, 0.4, 1e-6


def halting_data(seed: int, train: int = 4000, test: int = 1000) -> Data:
    """Inputs (cues, one-hot node); targets (label, whether hard); the test labels are clean.

    A seed draws one cycle pi through all nodes. Label: pi(x) for an easy input, pi(pi(x)) for a
    hard one. Which it is shows in Gaussian cues of unit variance, whose mean is +c (hard) or -c
    (easy) with |c| = 1. Of the training labels 20 % are redrawn from all nodes.
    """
    g = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(NODES, generator=g)
    after = torch.empty_like(order)
    after[order] = order.roll(-1)
    count = train + test
    hard = torch.rand(count, generator=g) < HARD
    centre = torch.randn(HALTING_CUES, generator=g)
    centre = centre / centre.norm()
    cues = torch.randn(count, HALTING_CUES, generator=g)
    cues = cues + torch.where(hard, 1.0, -1.0)[:, None] * centre
    node = torch.randint(NODES, (count,), generator=g)
    label = torch.where(hard, after[after[node]], after[node])
    redrawn = torch.rand(count, generator=g) < LABEL_NOISE
    redrawn[train:] = False
    label = torch.where(redrawn, torch.randint(NODES, (count,), generator=g), label)
    x = torch.cat([cues, one_hot(node, NODES).float()], 1)
    y = torch.stack([label, hard.long()], 1)
    return x[:train], y[:train], x[train:], y[train:]


class HaltingNet(nn.Module):
    """Belief over nodes, moved by a learned transition matrix P; a router halts after one step.

        h = sigmoid(w . cues + b)          chance of halting after the first step
        out = h * (x P) + (1 - h) * (x P P)

    Outputs log out, and h in the last column.
    """

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HALTING_CUES, 1)
        self.table = nn.Parameter(0.1 * torch.randn(NODES, NODES))
        with torch.no_grad():
            self.router.weight.mul_(0.3)
            self.router.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        move = self.table.softmax(1)
        h = self.router(x[:, :HALTING_CUES]).sigmoid()
        once = x[:, HALTING_CUES:] @ move
        out = h * once + (1 - h) * (once @ move)
        return torch.cat([out.clamp_min(FLOOR).log(), h], 1)


# A mixture of experts: a softmax router must learn which expert an input belongs to.

KINDS, CUES, INPUTS = 4, 32, 32


def experts_data(seed: int, train: int = 8000, test: int = 1000) -> Data:
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
    count = train + test
    kind = torch.randint(KINDS, (count,), generator=g)
    cues = centres[kind] + torch.randn(count, CUES, generator=g)
    z = torch.randn(count, INPUTS, generator=g)
    label = ((rules[kind] * z).sum(1) > 0).long()
    flipped = torch.rand(count, generator=g) < LABEL_NOISE
    flipped[train:] = False
    label = torch.where(flipped, 1 - label, label)
    x, y = torch.cat([cues, z], 1), torch.stack([label, kind], 1)
    return x[:train], y[:train], x[train:], y[train:]


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


def routing_information(out: Tensor, y: Tensor) -> Tensor:
    """What the mean mix of a kind tells about the kind: 0 (routed alike) to 1 (own expert each).

    (H(mean_k p_k) - mean_k H(p_k)) / log KINDS, with p_k the mean mix over inputs of kind k.
    """
    is_kind = one_hot(y[:, 1], KINDS).float()
    mix = (is_kind.T @ out[:, 2:]) / is_kind.sum(0)[:, None]
    whole = torch.special.entr(mix.mean(0)).sum()
    return (whole - torch.special.entr(mix).sum(1).mean()) / math.log(KINDS)


# Bags of words: an embedding most of whose rows have no gradient in most steps.

VOCABULARY, BAG, WIDTH, CLASSES = 500, 5, 8, 4
RARE = 100  # words from this rank on are each in under 0.8 % of the bags, in one batch of five


def word_frequencies() -> Tensor:
    """Zipf: p(rank) ~ 1 / rank."""
    inverse = 1 / torch.arange(1, VOCABULARY + 1)
    return inverse / inverse.sum()


def words_data(seed: int, train: int = 6000, test: int = 1000) -> Data:
    """Inputs: BAG words; targets (label, whether one of them is rare).

    Each word votes for its own topic, one of CLASSES, with weight log(1 + rank), since frequent
    words say little; the label is the topic with the largest sum.
    """
    g = torch.Generator().manual_seed(1000 + seed)
    topic = torch.randint(CLASSES, (VOCABULARY,), generator=g)
    count = train + test
    drawn = torch.multinomial(word_frequencies(), count * BAG, replacement=True, generator=g)
    x = drawn.reshape(count, BAG)
    weight = torch.arange(2, VOCABULARY + 2).log()
    votes = torch.zeros(count, CLASSES).scatter_add_(1, topic[x], weight[x])
    y = torch.stack([votes.argmax(1), (x >= RARE).any(1).long()], 1)
    return x[:train], y[:train], x[train:], y[train:]


class WordsNet(nn.Module):
    """Sum of the words' embeddings, then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            self.embed.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).sum(1))


# Fine-tuning a good network on few examples of slightly shifted data.

OLD, NEW, TEST = 900, 200, 600
EPOCHS, RATE, BATCH, DECAY = 30, 3e-3, 64, 1e-2


@cache
def _digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def split_digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of pretraining, fine-tuning and test images."""
    order = torch.randperm(len(_digits()[1]), generator=torch.Generator().manual_seed(1000 + seed))
    return order[:OLD], order[OLD : OLD + NEW], order[OLD + NEW : OLD + NEW + TEST]


def blurred(x: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels, with zeros beyond the edge."""
    return avg_pool2d(x.unflatten(1, (1, 8, 8)), 3, 1, 1).flatten(1)


def finetune_data(seed: int) -> Data:
    """NEW blurred digits to train on, TEST others, blurred too; no network saw them sharp."""
    (x, y), (_, new, test) = _digits(), split_digits(seed)
    return blurred(x[new]), y[new], blurred(x[test]), y[test]


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@cache
def pretrained(seed: int) -> Params:
    """Parameters after training with AdamW on OLD sharp digits to a training loss near zero."""
    torch.manual_seed(seed)
    (x, y), (old, _, _), model = _digits(), split_digits(seed), _perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    g = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in old[torch.randperm(OLD, generator=g)].split(BATCH)[:-1]:
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class FineTuneTask(SupervisedTask):
    """Starts from `pretrained`; `probe` is the accuracy on the sharp test images."""

    def initial(self) -> Params:
        """The pretrained network of each member's seed."""
        found = [pretrained(m.seed) for m in self.members]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}

    def metrics(self, params: Params) -> dict[str, Tensor]:
        """On the blurred test images; `probe` on the same images, sharp."""
        sharp = torch.stack([_digits()[0][split_digits(m.seed)[2]] for m in self.members])
        probe = (self.predict(params, sharp).argmax(-1) == self.test_y[self.data_of]).float()
        return {**super().metrics(params), "probe": probe.mean(1)}


TOYS = (
    Toy(
        name="halting",
        title="halting router",
        affected=("router",),
        module=HaltingNet,
        data=halting_data,
        loss=lambda out, y: nll_loss(out[:, :NODES], y[:, 0]),
        scores={"accuracy": _accuracy(NODES), "probe": _accuracy_where(NODES)},
        batch_size=16,
        steps=1000,
        lrs=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        seeds=tuple(range(8)),
        group=40,
        jump=0.5,
    ),
    Toy(
        name="experts",
        title="router of experts",
        affected=("router",),
        module=ExpertsNet,
        data=experts_data,
        loss=lambda out, y: cross_entropy(out[:, :2], y[:, 0]),
        scores={"accuracy": _accuracy(2), "probe": routing_information},
        batch_size=32,
        steps=1500,
        lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        seeds=tuple(range(8)),
        group=24,
        jump=0.2,
    ),
    Toy(
        name="words",
        title="rare words",
        affected=("embed",),
        module=WordsNet,
        data=words_data,
        loss=lambda out, y: cross_entropy(out, y[:, 0]),
        scores={"accuracy": _accuracy(CLASSES), "probe": _accuracy_where(CLASSES)},
        batch_size=32,
        steps=1500,
        lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        seeds=tuple(range(5)),
        group=30,
    ),
    Toy(
        name="finetune",
        title="fine-tuning",
        affected=("0.",),
        module=_perceptron,
        data=finetune_data,
        loss=cross_entropy,
        scores={"accuracy": lambda out, y: (out.argmax(-1) == y).float().mean()},
        batch_size=16,
        steps=300,
        lrs=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        seeds=tuple(range(10)),
        group=60,
        task=FineTuneTask,
    ),
)
