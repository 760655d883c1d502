"""Bags of words: an embedding most of whose rows have no gradient in most steps."""

import torch
from gate_harness.tasks import Member, SupervisedTask
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy import Toy

__all__ = ["RARE", "WORDS", "WordsNet", "word_frequencies", "words_data"]

VOCABULARY, BAG, WIDTH, CLASSES, TRAIN, TEST = 500, 5, 8, 4, 6000, 1000
RARE = 100  # words from this rank on are each in under 0.8 % of the bags, in one batch of five


def word_frequencies() -> Tensor:
    """Zipf: p(rank) ~ 1 / rank."""
    inverse = 1 / torch.arange(1, VOCABULARY + 1)
    return inverse / inverse.sum()


def words_data(condition: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs: BAG words; targets (label, whether one of them is rare).

    Each word votes for its own topic, one of CLASSES, with weight log(1 + rank), since frequent
    words say little; the label is the topic with the largest sum.
    """
    g = torch.Generator().manual_seed(1000 + seed)
    topic = torch.randint(CLASSES, (VOCABULARY,), generator=g)
    count = TRAIN + TEST
    drawn = torch.multinomial(word_frequencies(), count * BAG, replacement=True, generator=g)
    x = drawn.reshape(count, BAG)
    weight = torch.arange(2, VOCABULARY + 2).log()
    votes = torch.zeros(count, CLASSES).scatter_add_(1, topic[x], weight[x])
    y = torch.stack([votes.argmax(1), (x >= RARE).any(1).long()], 1)
    return x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:]


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


def _loss(out: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(out, y[:, 0])


def _right(out: Tensor, y: Tensor) -> Tensor:
    return (out.argmax(1) == y[:, 0]).float()


def _accuracy(out: Tensor, y: Tensor) -> Tensor:
    return _right(out, y).mean()


def _rare_accuracy(out: Tensor, y: Tensor) -> Tensor:
    return (_right(out, y) * y[:, 1]).sum() / y[:, 1].sum()


def _build(members: list[Member], steps: int) -> SupervisedTask:
    return SupervisedTask(
        members,
        words_data,
        WordsNet,
        _loss,
        {"accuracy": _accuracy, "loss": _loss, "probe": _rare_accuracy},
        batch_size=32,
        steps=steps,
        eval_steps=sorted({steps * k // 20 for k in range(1, 21)}),
    )


WORDS = Toy(
    name="words",
    title="rare words",
    affected=("embed",),
    module=WordsNet,
    build=_build,
    steps=1500,
    lrs=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    seeds=tuple(range(5)),
    group=30,
)
