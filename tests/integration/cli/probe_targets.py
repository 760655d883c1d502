"""Trainings that the probe's tests name on its command line."""

from tempfile import TemporaryDirectory

import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from tests.helpers.tiny_trainer import TinyModel, arguments, train
from tests.integration.lightning.toy import Classifier, noisy_data

STEPS = 12
NOT_CALLABLE = 3
trained: list[nn.Module] = []  # what a function left behind, for tests that look at the weights


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4)
    return nn.Sequential(*layers).to(dtype)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, closure: bool = False):
    """`steps` steps with shuffled batches and dropout, so that a stray random draw would show."""
    x, y = noisy_data(128).tensors
    x = x.to(next(model.parameters()).dtype)

    def loss_on(rows):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]).float(), y[rows])
        loss.backward()
        return loss

    for _ in range(steps):
        rows = torch.randperm(len(x))[:16]
        if closure:
            optimizer.step(lambda rows=rows: loss_on(rows))
        else:
            loss_on(rows)
            optimizer.step()
    trained.append(model)


def function() -> None:
    model = net()
    fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2), STEPS)


def bfloat16() -> None:
    model = net(torch.bfloat16)
    fit(model, torch.optim.SGD(model.parameters(), lr=1e-2), STEPS)


def with_closure() -> None:
    model = net()
    fit(model, torch.optim.AdamW(model.parameters(), lr=1e-2), STEPS, closure=True)


def deep() -> None:
    """More blocks than a picture of the probe once had groups, wrapped as torch.compile does."""
    torch.manual_seed(1)
    blocks = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20)))
    model = nn.Module()
    model._orig_mod = nn.ModuleDict({"layers": blocks, "head": nn.Linear(16, 4)})
    model.forward = lambda x: model._orig_mod["head"](blocks(x))
    fit(model, torch.optim.AdamW(model.parameters(), lr=1e-3), STEPS)


def endless() -> None:
    """Catches whatever goes wrong in a step, and goes on for ever."""
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    while True:
        try:
            fit(model, optimizer, 5)
        except Exception:
            continue


def prints_and_exits() -> None:
    print("chatter of the training")
    function()
    raise SystemExit(0)


def trainer() -> None:
    """transformers.Trainer, two micro-batches per step: 16 steps."""
    model = TinyModel()
    trained.append(model)
    with TemporaryDirectory() as directory:
        options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        train(arguments(directory, optim="adamw_torch", **options), model=model)


def two_optimizers() -> None:
    """A second one steps every other time."""
    model, other = net(), net()
    first = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.8, 0.99))
    second = torch.optim.SGD(other.parameters(), lr=1e-2)
    for _ in range(STEPS):
        fit(model, first, 2)
        fit(other, second, 1)


def few_steps() -> None:
    model = net()
    fit(model, torch.optim.AdamW(model.parameters()), 7)


def never_steps() -> None:
    net()


def step_often(optimizer: torch.optim.Optimizer, before=lambda: None) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        before()
        optimizer.step()


def frozen() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_(False)
    step_often(optimizer)


def empty() -> None:
    torch.optim.SGD([], lr=0.1)


def sparse() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    step_often(optimizer, lambda: embedding(torch.tensor([1, 2])).sum().backward())


def without_gradients() -> None:
    step_often(torch.optim.SGD(net().parameters(), lr=0.1))


def not_finite() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step_often(optimizer, lambda: (model(torch.ones(1, 16)).sum() * torch.nan).backward())


def needs_arguments(data, epochs=3) -> None: ...


def fails() -> None:
    raise RuntimeError("an error of the training")


def exits() -> None:
    raise SystemExit(3)


class NoModule:
    """A class, but no LightningModule."""


class Digits(Classifier):
    """Its own data: 8 batches of 16 per epoch."""

    def __init__(self, width: int = 32):
        super().__init__(width=width)

    def train_dataloader(self):
        return DataLoader(noisy_data(128), batch_size=16, shuffle=True)


class NoData(Classifier):
    """Needs a data module."""

    def __init__(self):
        super().__init__()


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(noisy_data(128), batch_size=8, shuffle=True)


def long_training(closure: bool = False) -> None:
    """Sixty steps, long enough for a search of learning rates; sets no seed for its batches."""
    model = net()
    fit(model, torch.optim.AdamW(model.parameters(), lr=1e-5), 60, closure=closure)


def long_training_with_closures() -> None:
    long_training(closure=True)


def scaled_losses() -> None:
    """As under fp16: `backward` sees a multiple of the loss."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    x, y = noisy_data(128).tensors
    for _ in range(60):
        rows = torch.randperm(len(x))[:16]
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x[rows]), y[rows])).backward()
        scaler.step(optimizer)
        scaler.update()


class LongDigits(Classifier):
    """40 batches of 16 per epoch."""

    def __init__(self):
        super().__init__()

    def train_dataloader(self):
        return DataLoader(noisy_data(640), batch_size=16, shuffle=True)
