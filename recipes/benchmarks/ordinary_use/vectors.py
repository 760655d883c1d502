"""Tasks on images, tables and a mixture of Gaussians."""

from collections.abc import Callable

import numpy as np
import torch
from benchmarks.ordinary_use.data import (
    Examples,
    Inputs,
    Task,
    class_loss,
    label_chances,
    squared_loss,
    wrong_labels,
)
from benchmarks.ordinary_use.networks import Cnn, mlp
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import Tensor, nn

__all__ = ["classification", "diabetes", "digits", "mixture", "table"]


def classification(
    x: np.ndarray | Tensor,
    y: np.ndarray,
    n: int,
    share: float,
    kind: str,
    random: np.random.Generator,
    model: Callable[[], nn.Module],
) -> Task:
    """The first n rows for training, the rest for testing; both get wrong labels of one kind."""
    classes = int(y.max()) + 1
    inputs = x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32)
    test_x = (inputs[n:],)
    return Task(
        train=Examples(
            x=(inputs[:n],), y=torch.tensor(wrong_labels(y[:n], share, kind, classes, random))
        ),
        clean=Examples(x=test_x, y=torch.tensor(y[n:])),
        noisy=Examples(x=test_x, y=label_chances(y[n:], share, kind, classes)),
        model=model,
        loss=class_loss,
    )


def digits(
    seed: int,
    n: int,
    share: float,
    kind: str,
    model: str = "mlp",
    dropout: float = 0.0,
    shift: bool = False,
) -> Task:
    """scikit-learn's 1,797 images of 8x8 pixels."""
    random = np.random.default_rng(seed)
    images, y = load_digits(return_X_y=True)
    order = random.permutation(len(y))
    x = images[order] / 16.0
    if model == "cnn":
        x = x.reshape(-1, 1, 8, 8)
    make = (lambda: Cnn(dropout=dropout)) if model == "cnn" else mlp(64, 128, 10, dropout=dropout)
    task = classification(x, y[order], n, share, kind, random, make)
    task.augment, task.has_dropout = shifted if shift else None, dropout > 0
    return task


def shifted(x: Inputs, generator: torch.Generator) -> Inputs:
    """Images moved by up to one pixel either way."""
    (images,) = x
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    down, right = torch.randint(0, 3, (2, len(images), 1), generator=generator)
    place = torch.arange(8)
    rows, columns = (down + place)[:, :, None], (right + place)[:, None, :]
    return (padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None],)


def table(seed: int, n: int, share: float, kind: str, name: str, dropout: float = 0.0) -> Task:
    """breast_cancer or wine, standardised."""
    random = np.random.default_rng(seed)
    x, y = {"breast_cancer": load_breast_cancer, "wine": load_wine}[name](return_X_y=True)
    order = random.permutation(len(y))
    x, y = _standard(x[order], n), y[order]
    make = mlp(x.shape[1], 64, int(y.max()) + 1, dropout=dropout)
    return classification(x, y, n, share, kind, random, make)


def diabetes(seed: int, n: int, share: float, kind: str) -> Task:
    """Regression; wrong labels are those of other patients."""
    assert kind == "exchanged"
    random = np.random.default_rng(seed)
    x, y = load_diabetes(return_X_y=True)
    order = random.permutation(len(y))
    x, y = _standard(x[order], n), y[order]
    y = torch.tensor((y - y[:n].mean()) / y[:n].std(), dtype=torch.float32)
    inputs = torch.tensor(x, dtype=torch.float32)
    noisy = y[:n].clone()
    chosen = random.choice(n, round(share * n), replace=False)
    noisy[chosen] = y[np.roll(chosen, 1)]
    test_x, test_y = (inputs[n:],), y[n:]
    fixed = torch.tensor([share, float(y[:n].mean()), float(y[:n].var())])
    return Task(
        train=Examples(x=(inputs[:n],), y=noisy),
        clean=Examples(x=test_x, y=test_y),
        noisy=Examples(x=test_x, y=torch.cat([test_y[:, None], fixed.expand(len(test_y), 3)], 1)),
        model=mlp(x.shape[1], 64, 1),
        loss=squared_loss,
    )


def mixture(
    seed: int,
    n: int,
    share: float,
    kind: str,
    dimension: int = 40,
    classes: int = 8,
    distance: float = 0.5,
    width: int = 128,
) -> Task:
    """Overlapping Gaussians; 4,000 test examples."""
    random = np.random.default_rng(1000 + seed)
    centres = random.normal(size=(classes, dimension)) * distance
    y = random.integers(0, classes, n + 4000)
    x = centres[y] + random.normal(size=(len(y), dimension))
    return classification(x, y, n, share, kind, random, mlp(dimension, width, classes))


def _standard(x: np.ndarray, n: int) -> np.ndarray:
    """By the training rows' mean and deviation."""
    return (x - x[:n].mean(0)) / x[:n].std(0)
