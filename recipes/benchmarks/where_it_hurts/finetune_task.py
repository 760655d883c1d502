"""Fine-tuning a good network on few examples of slightly shifted data."""

from functools import lru_cache

import torch
from gate_harness.tasks import Member, Params, SupervisedTask, accuracy, cross_entropy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from toy import Toy

__all__ = ["FINETUNE", "blurred", "finetune_data", "pretrained"]

OLD, NEW, TEST = 900, 200, 600
EPOCHS, RATE, BATCH, DECAY = 30, 3e-3, 64, 1e-2


@lru_cache
def _digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def _split(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of pretraining, fine-tuning and test images."""
    order = torch.randperm(len(_digits()[1]), generator=torch.Generator().manual_seed(1000 + seed))
    return order[:OLD], order[OLD : OLD + NEW], order[OLD + NEW : OLD + NEW + TEST]


def blurred(x: Tensor) -> Tensor:
    """Mean over 3 x 3 pixels, with zeros beyond the edge."""
    return avg_pool2d(x.unflatten(1, (1, 8, 8)), 3, 1, 1).flatten(1)


def finetune_data(condition: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """NEW blurred digits to train on, TEST others, blurred too; no network saw them sharp."""
    (x, y), (_, new, test) = _digits(), _split(seed)
    return blurred(x[new]), y[new], blurred(x[test]), y[test]


def network() -> nn.Module:
    """MLP 64-64-10."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@lru_cache(maxsize=64)
def pretrained(seed: int) -> Params:
    """Parameters after training with AdamW on OLD sharp digits to a training loss near zero."""
    torch.manual_seed(seed)
    (x, y), (old, _, _), model = _digits(), _split(seed), network()
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

    def __init__(self, members: list[Member], steps: int) -> None:
        super().__init__(
            members,
            finetune_data,
            network,
            cross_entropy,
            {"accuracy": accuracy, "loss": cross_entropy},
            batch_size=16,
            steps=steps,
            eval_steps=sorted({steps * k // 20 for k in range(1, 21)}),
        )
        x, seeds = _digits()[0], list(dict.fromkeys(m.seed for m in members))
        self.sharp = torch.stack([x[_split(seed)[2]] for seed in seeds])

    def initial(self) -> Params:
        """The pretrained network of each member's seed."""
        names = list(super().initial())
        return {n: torch.stack([pretrained(m.seed)[n] for m in self.members]) for n in names}

    def metrics(self, params: Params) -> dict[str, Tensor]:
        """On the blurred test images; `probe` on the same images, sharp."""
        out = self.predict(params, self.sharp[self.data_of])
        probe = (out.argmax(-1) == self.test_y[self.data_of]).float().mean(1)
        return {**super().metrics(params), "probe": probe}


FINETUNE = Toy(
    name="finetune",
    title="fine-tuning",
    affected=("0.",),
    module=network,
    build=FineTuneTask,
    steps=300,
    lrs=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds=tuple(range(10)),
    group=60,
)
