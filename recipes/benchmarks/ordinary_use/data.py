"""What a run needs to know of its data, and wrong labels of several kinds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Examples",
    "Task",
    "class_loss",
    "fit",
    "label_chances",
    "preference_loss",
    "pretrained",
    "squared_loss",
    "wrong_labels",
]

Inputs = tuple[Tensor, ...]


@dataclass(kw_only=True)
class Examples:
    """Inputs and labels of examples."""

    x: Inputs
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def part(self, rows: Tensor | slice) -> "Examples":
        """Some of them."""
        return Examples(x=rows_of(self.x, rows), y=self.y[rows])


@dataclass(kw_only=True)
class Task:
    """Data, model and loss of one run."""

    train: Examples  # with wrong labels
    clean: Examples  # test examples with right labels
    # The same with wrong labels of the same kind; where their chances are known, with those in
    # place of a draw, so that losses are expectations.
    noisy: Examples
    model: Callable[[], nn.Module]  # makes the model to start from, after the global seed was set
    # (prediction, y) -> loss and accuracy per example, (B,); accuracy is NaN where there are no
    # classes.
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    # (x, generator) -> x, for training only.
    augment: Callable[[Inputs, torch.Generator], Inputs] | None = None
    has_dropout: bool = False  # whether the model behaves differently in training


def rows_of(x: Inputs, rows: Tensor | slice) -> Inputs:
    """Some rows of every input."""
    return tuple(part[rows] for part in x)


def class_loss(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and whether the class is right, from logits (B, C), or (B, T, C) of tokens."""
    guess = logits.argmax(-1)
    if y.is_floating_point():  # chances of all classes, (B, C): the expectation
        return F.cross_entropy(logits, y, reduction="none"), _at(y, guess)
    right = (guess == y).float()
    if y.ndim == 1:
        return F.cross_entropy(logits, y, reduction="none"), right
    # Tokens: means over each text.
    nats = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    return nats.view(y.shape).mean(1), right.mean(1)


def squared_loss(prediction: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of predictions (B, 1); no accuracy."""
    found = prediction.squeeze(-1)
    if y.ndim == 1:
        loss = (found - y).square()
    else:  # the expectation over a value that may be replaced by one of this mean and variance
        value, share, mean, variance = y.unbind(1)
        other = (found - mean).square() + variance
        loss = (1 - share) * (found - value).square() + share * other
    return loss, torch.full_like(loss, torch.nan)


def preference_loss(margin: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """DPO's loss and reward accuracy; y is the chance that the pair's label is right."""
    right = (margin > 0).float()
    loss = y * F.softplus(-margin) + (1 - y) * F.softplus(margin)
    return loss, y * right + (1 - y) * (1 - right)


def wrong_labels(
    y: np.ndarray, share: float, kind: str, classes: int, random: np.random.Generator
) -> np.ndarray:
    """Labels of which an exact share is wrong.

    "symmetric": any other class; "pair": the next class; "class": the next one, in half of them.
    """
    found = y.copy()
    # "class": only the first half of the classes, which is then wrong twice as often.
    pool = np.flatnonzero(y < classes / 2) if kind == "class" else np.arange(len(y))
    chosen = random.choice(pool, round(share * len(y)), replace=False)
    step = random.integers(1, classes, len(chosen)) if kind == "symmetric" else 1
    found[chosen] = (found[chosen] + step) % classes
    return found


def label_chances(y: np.ndarray, share: float, kind: str, classes: int) -> Tensor:
    """What `wrong_labels` makes of each label, as chances of all classes, (N, C)."""
    chances = np.eye(classes)
    following = np.roll(chances, 1, axis=1)
    if kind == "symmetric":
        chances = (1 - share) * chances + share * (1 - chances) / (classes - 1)
    elif kind == "pair":
        chances = (1 - share) * chances + share * following
    else:
        assert kind == "class", kind
        first = np.arange(classes) < classes / 2
        rate = (share / np.isin(y, np.flatnonzero(first)).mean() * first)[:, None]
        chances = (1 - rate) * chances + rate * following
    return torch.tensor(chances[y], dtype=torch.float32)


def fit(
    model: nn.Module, loss: Callable[[Tensor], Tensor], *, examples: int, batch: int, epochs: int
) -> None:
    """AdamW from 3e-3 linearly to 0; the loss is that of some rows, in whole batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    total = epochs * (examples // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    for _ in range(epochs):
        for rows in torch.randperm(examples)[: examples // batch * batch].view(-1, batch):
            optimizer.zero_grad()
            loss(rows).backward()
            optimizer.step()
            schedule.step()


def pretrained(path: Path, train: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Weights that runs start from: trained once, then read from the file."""
    if path.exists():
        return torch.load(path, weights_only=True)
    with torch.random.fork_rng():
        weights = train().state_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(weights, temporary)
    temporary.replace(path)
    return weights


def _at(values: Tensor, place: Tensor) -> Tensor:
    return values.gather(-1, place[..., None]).squeeze(-1)
