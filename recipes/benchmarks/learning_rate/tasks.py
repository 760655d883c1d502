"""Fourteen small trainings of the usual kinds, none of which the search was designed on."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarks.ordinary_use.data import Examples, Task, squared_loss
from benchmarks.ordinary_use.preferences import preferences
from benchmarks.ordinary_use.texts import language, sparse_text, text_classes
from benchmarks.ordinary_use.vectors import diabetes, digits, mixture
from torch import Tensor, nn

__all__ = ["SETTINGS", "Setting"]

PRETRAINED = Path(__file__).parent / "traces" / "pretrained"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A task, and how it is trained.

    Attributes:
        make: Data and model of a seed.
        batch: Examples of a step.
        epochs: Of run and schedule.
        default: What the task's usual framework sets: torch's 1e-3, Trainer's 5e-5, TRL's 1e-6.
        optimizer: AdamW, or SGD with momentum.
        is_squared: Whether the loss is a squared error, whose root is compared.
    """

    name: str
    make: Callable[[int], Task]
    batch: int
    epochs: int
    default: float
    optimizer: str = "AdamW"
    is_squared: bool = False


class Wave(nn.Module):
    """An implicit representation: coordinates to a value through sines (30 per unit at first)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, width) for a in (2, width, width))
        self.out = nn.Linear(width, 1)
        for place, layer in enumerate(self.layers):
            bound = 1 / 2 if place == 0 else (6 / width) ** 0.5 / 30
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        (h,) = x
        for layer in self.layers:
            h = torch.sin(30 * layer(h))
        return self.out(h)


class Bar(nn.Module):
    """The residual of -u'' = f on (0, 1) with u(0) = u(1) = 0, shape (B, 1), for points (B, 1)."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        sizes = (1, width, width, width)
        layers = [
            part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())
        ]
        self.body = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        with torch.enable_grad():  # the equation has derivatives in it
            points = x[0].detach().requires_grad_()
            u = points * (1 - points) * self.body(points)
            (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), points, create_graph=True)
        pi = torch.pi
        force = pi**2 * torch.sin(pi * points) + 4 * (4 * pi) ** 2 * torch.sin(4 * pi * points) / 16
        return (bend + force) / 10


def picture(seed: int, n: int = 3072, side: int = 64) -> Task:
    """Pixels of a smooth random picture; those that are left out are the test."""
    random = np.random.default_rng(6000 + seed)
    place = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * 2), -1).reshape(-1, 2)
    waves = random.normal(size=(24, 2)) * 6
    phase, size = random.uniform(0, 2 * np.pi, 24), random.normal(size=24)
    value = (np.sin(place @ waves.T + phase) * size).sum(1)
    value = (value - value.mean()) / value.std()
    order = random.permutation(len(value))
    x = torch.tensor(place[order], dtype=torch.float32)
    y = torch.tensor(value[order], dtype=torch.float32)
    return _regression(x, y, n, Wave)


def equation(seed: int, n: int = 6400) -> Task:
    """Points of a differential equation, drawn afresh: an epoch repeats none."""
    generator = torch.Generator().manual_seed(7000 + seed)
    x = torch.rand(n + 2000, 1, generator=generator)
    return _regression(x, torch.zeros(len(x)), n, Bar)


def _regression(x: Tensor, y: Tensor, n: int, model: Callable[[], nn.Module]) -> Task:
    test = Examples(x=(x[n:],), y=y[n:])
    train = Examples(x=(x[:n],), y=y[:n])
    return Task(train=train, clean=test, noisy=test, model=model, loss=squared_loss)


def _of(function: Callable[..., Task], n: int, share: float = 0.0, kind: str = "", **options):
    return partial(function, n=n, share=share, kind=kind, **options)


_text = partial(_of, language, kind="tokens", folder=PRETRAINED, test=800)
_cnn = _of(digits, 1300, kind="symmetric", share=0.1, model="cnn", dropout=0.25, shift=True)
_table = _of(mixture, 4000, 0.2, "symmetric")
_tuned = {"text": "code", "start": "pretrained"}

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(name="lm-1m", make=_text(3200, width=192), batch=16, epochs=2, default=1e-3),
        Setting(name="lm-tune", make=_text(3000, **_tuned), batch=16, epochs=2, default=5e-5),
        Setting(name="lora", make=_text(3000, **_tuned, rank=8), batch=16, epochs=2, default=5e-5),
        Setting(
            name="dpo",
            make=_of(preferences, 3200, 0.1, "swapped", folder=PRETRAINED),
            batch=16,
            epochs=2,
            default=1e-6,
        ),
        Setting(
            name="text-transformer",
            make=_of(text_classes, 1500, 0.0, "symmetric", model="transformer"),
            batch=16,
            epochs=6,
            default=5e-5,
        ),
        Setting(
            name="text-bag",
            make=_of(text_classes, 1500, 0.1, "symmetric", model="bag"),
            batch=16,
            epochs=6,
            default=1e-3,
        ),
        Setting(
            name="sparse-text",
            make=_of(sparse_text, 1500, 0.15, "class"),
            batch=16,
            epochs=4,
            default=1e-3,
        ),
        Setting(name="digits-cnn", make=_cnn, batch=16, epochs=6, default=1e-3),
        Setting(name="table-wrong-labels", make=_table, batch=32, epochs=4, default=1e-3),
        Setting(
            name="diabetes",
            make=_of(diabetes, 330, 0.1, "exchanged"),
            batch=8,
            epochs=8,
            default=1e-3,
            is_squared=True,
        ),
        Setting(name="pinn", make=equation, batch=32, epochs=3, default=1e-3, is_squared=True),
        Setting(name="inr", make=picture, batch=32, epochs=6, default=1e-3, is_squared=True),
        Setting(
            name="digits-cnn-sgd", make=_cnn, batch=16, epochs=6, default=1e-3, optimizer="SGD"
        ),
        Setting(
            name="table-wrong-labels-sgd",
            make=_table,
            batch=32,
            epochs=4,
            default=1e-3,
            optimizer="SGD",
        ),
    )
}
