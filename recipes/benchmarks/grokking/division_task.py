"""Modular division a * b^-1 mod p from a quarter of the table."""

from dataclasses import dataclass

import torch
from division_model import DivisionModel
from gate_harness.tasks import Member, SupervisedTask, accuracy, cross_entropy
from torch import Tensor

TRAIN_SHOWN = 500
__all__ = ["DivisionTask", "Setting", "division_data", "division_table"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Size of the study.

    Args:
        p: Modulus, a prime.
        width: Of the transformer.
        layers: Of the transformer.
        share: Of the pairs that is trained on.
        steps: Budget; who is not done by then counts as "> steps".
        every: Steps between evaluations.
        shown: Held-out pairs that are evaluated.
        device: Of everything.
    """

    p: int = 59
    width: int = 64
    layers: int = 1
    share: float = 0.25
    steps: int = 6000
    every: int = 25
    shown: int = 1000
    device: str = "cpu"

    @property
    def name(self) -> str:
        """For tables."""
        return f"p={self.p} {self.share:.0%}"

    @property
    def count(self) -> int:
        """Training pairs."""
        return int(self.share * self.p * (self.p - 1))

    @property
    def batch_size(self) -> int:
        """As in Power et al.: 512 or half of the training set."""
        return min(512, self.count // 2)


def division_table(p: int) -> tuple[Tensor, Tensor]:
    """Tokens (p(p-1), 4) "a op b =" and answers c with c * b = a mod p, for all a and b != 0."""
    inverse = torch.tensor([pow(b, -1, p) for b in range(1, p)])
    a, b = torch.meshgrid(torch.arange(p), torch.arange(1, p), indexing="ij")
    a, b = a.flatten(), b.flatten()
    x = torch.stack([a, torch.full_like(a, p), b, torch.full_like(a, p + 1)], 1)
    return x, a * inverse[b - 1] % p


def division_data(setting: Setting, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pairs, then held-out pairs that are evaluated; another draw for each seed."""
    x, y = division_table(setting.p)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(90_000 + seed))
    train, rest = order[: setting.count], order[setting.count :][: setting.shown]
    parts = (x[train], y[train], x[rest], y[rest])
    return tuple(part.to(setting.device) for part in parts)  # type: ignore[return-value]


class DivisionTask(SupervisedTask):
    """Members leave at 95 % held-out accuracy.

    Metrics: `accuracy` on held-out pairs, `train_accuracy` on the first 500 training pairs,
    `weight_norm` over all parameters.
    """

    ENOUGH = 0.95

    def __init__(self, members: list[Member], setting: Setting) -> None:
        super().__init__(
            members,
            lambda _, seed: division_data(setting, seed),
            lambda: DivisionModel(setting.p, setting.width, setting.layers).to(setting.device),
            cross_entropy,
            {"accuracy": accuracy},
            batch_size=setting.batch_size,
            steps=setting.steps,
            eval_steps=range(setting.every, setting.steps + 1, setting.every),
        )
        self.data_of = self.data_of.to(setting.device)
        self.setting = setting

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The examples of a step, each of shape (M, B, ...)."""
        count = self.x.shape[1]
        within = step % (count // self.batch_size)
        if within == 0:
            device = self.setting.device
            for seed, generator in self.generators.items():  # drawn on the CPU: alike anywhere
                self.order[seed] = torch.randperm(count, generator=generator).to(device)
        chosen = slice(within * self.batch_size, (within + 1) * self.batch_size)
        rows = torch.stack([self.order[m.seed][chosen] for m in self.members])
        return self.x[self.data_of[:, None], rows], self.y[self.data_of[:, None], rows]

    def metrics(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Held-out and training accuracy, and the length of all parameters."""
        found = super().metrics(params)
        out = self.predict(params, self.x[self.data_of, :TRAIN_SHOWN])
        right = out.argmax(-1) == self.y[self.data_of, :TRAIN_SHOWN]
        found["train_accuracy"] = right.float().mean(-1)
        squares = sum(part.square().flatten(1).sum(1) for part in params.values())
        found["weight_norm"] = squares.sqrt()
        return found

    def finished(self, metrics: dict[str, Tensor]) -> Tensor:
        """Who has 95 %."""
        return metrics["accuracy"] >= self.ENOUGH
