"""Data, model and loss of a task, with held-out examples whose targets are averaged over the noise.

The noise of the labels is known, so the held-out loss is taken in expectation over it (flips: the
mean over classes; regression: the noise adds a constant): the same population, measured with less
noise of its own.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["TASKS", "Problem", "build"]

FLIPS = 0.2


@dataclass(kw_only=True)
class Problem:
    """One task with one seed's data.

    Attributes:
        module: Drawn for this seed.
        losses: (outputs, targets) -> loss of each example, shape (B,).
        x, y: Training examples, in the order of a stream.
        held_x, held_y: Held-out examples.
        batch_size: Examples per step.
        stream: Whether every example is seen once.
        steps: Of the run.
    """

    module: nn.Module
    losses: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    batch_size: int
    stream: bool
    steps: int

    @property
    def epoch_steps(self) -> int:
        """Steps of one pass; a short last batch is dropped."""
        return len(self.x) // self.batch_size

    def start(self) -> Tensor:
        """All weights in one vector."""
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])

    def per_example(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each example, shape (B,)."""
        shapes = {name: p.shape for name, p in self.module.named_parameters()}
        parts = weights.split([shape.numel() for shape in shapes.values()])
        params = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        return self.losses(functional_call(self.module, params, (x,)), y)


def cross_entropies(out: Tensor, y: Tensor) -> Tensor:
    """Per example; mean over positions. Classes, or probabilities of the classes."""
    if y.is_floating_point():  # few classes: a softmax over the first dimension is faster
        log_p, p = out.transpose(0, -1).log_softmax(0), y.transpose(0, -1)
        loss = -(log_p * p).sum(0).transpose(0, -1)
    else:
        loss = -out.log_softmax(-1).gather(-1, y[..., None])[..., 0]
    return loss.flatten(1).mean(1) if loss.dim() > 1 else loss


def squared_errors(out: Tensor, y: Tensor) -> Tensor:
    """Per example, against one number."""
    return (out[..., 0] - y).square()


def mlp(*widths: int) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(
        nn.Linear(widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], widths[2])
    )


def flipped(clean: np.ndarray, classes: int, rng: np.random.Generator) -> Tensor:
    """Labels, a fifth of them replaced by another class."""
    wrong = rng.random(len(clean)) < FLIPS
    return torch.tensor(
        np.where(wrong, (clean + rng.integers(1, classes, len(clean))) % classes, clean)
    )


def expected(clean: np.ndarray, classes: int) -> Tensor:
    """Probabilities of the flipped label given the clean one."""
    p = np.full((len(clean), classes), FLIPS / (classes - 1), dtype=np.float32)
    p[np.arange(len(clean)), clean] = 1 - FLIPS
    return torch.tensor(p)


def mixture(seed: int, size: int, held: int) -> dict:
    """Six Gaussians in 50 dimensions, 20 % flips."""
    rng = np.random.default_rng(1000 + seed)
    centres = 0.45 * rng.normal(size=(6, 50))
    clean = rng.integers(0, 6, size + held)
    x = torch.tensor((centres[clean] + rng.normal(size=(size + held, 50))).astype(np.float32))
    y = flipped(clean[:size], 6, rng)
    torch.manual_seed(seed)
    return {
        "module": mlp(50, 32, 6),
        "losses": cross_entropies,
        "x": x[:size],
        "y": y,
        "held_x": x[size:],
        "held_y": expected(clean[size:], 6),
        "batch_size": 32,
    }


def teacher(seed: int, size: int, held: int) -> dict:
    """Regression on a random network, signal sd 1, noise sd 0.5."""
    rng = np.random.default_rng(2000 + seed)
    x = rng.normal(size=(size + held, 20))
    hidden = np.tanh(x @ rng.normal(size=(20, 8)) / 20**0.5 * 1.5)
    clean = hidden @ rng.normal(size=8)
    clean = (clean - clean.mean()) / clean.std()
    y = clean[:size] + 0.5 * rng.normal(size=size)
    torch.manual_seed(seed)
    return {
        "module": mlp(20, 32, 1),
        "losses": squared_errors,
        "x": torch.tensor(x[:size].astype(np.float32)),
        "y": torch.tensor(y.astype(np.float32)),
        "held_x": torch.tensor(x[size:].astype(np.float32)),
        "held_y": torch.tensor(clean[size:].astype(np.float32)),
        "batch_size": 32,
    }


def digits(seed: int, size: int, held: int) -> dict:
    """The digits of scikit-learn, 20 % flips; at most 1,797 - size are left to be held out."""
    from sklearn.datasets import load_digits

    images, clean = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(clean))[: size + held]
    x = torch.tensor((images[order] / 16.0).astype(np.float32))
    clean = clean[order]
    torch.manual_seed(seed)
    return {
        "module": mlp(64, 64, 10),
        "losses": cross_entropies,
        "x": x[:size],
        "y": flipped(clean[:size], 10, rng),
        "held_x": x[size:],
        "held_y": expected(clean[size:], 10),
        "batch_size": 32,
    }


@cache
def language_module() -> ModuleType:
    """`early_stopping/language.py`, without making its neighbours importable."""
    path = Path(__file__).parents[1] / "early_stopping" / "language.py"
    spec = importlib.util.spec_from_file_location("_early_stopping_language", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def language(seed: int, size: int, held: int) -> dict:
    """Python's own documentation in pieces of 48 characters, some to train on, others held out."""
    language = language_module()
    text = language.characters()
    length = language.LENGTH + 1
    rng = np.random.default_rng(5000 + seed)
    starts = rng.choice(len(text) // length, size + held, replace=False) * length
    rows = torch.tensor(text[starts[:, None] + np.arange(length)])
    torch.manual_seed(seed)
    return {
        "module": language.CharModel(width=32),
        "losses": cross_entropies,
        "x": rows[:size, :-1],
        "y": rows[:size, 1:],
        "held_x": rows[size:, :-1],
        "held_y": rows[size:, 1:],
        "batch_size": 16,
    }


# (maker, examples of the reused set, epochs, steps of the stream, held-out examples)
TASKS: dict[str, tuple[Callable[[int, int, int], dict], int, int, int, int]] = {
    "A": (mixture, 600, 30, 800, 20_000),
    "B": (teacher, 600, 45, 800, 20_000),
    "C": (digits, 800, 30, 0, 997),
    "D": (language, 200, 8, 200, 256),
}


def build(name: str, seed: int, *, stream: bool, quick: bool = False) -> Problem:
    """A task; `quick` cuts steps and held-out examples."""
    maker, size, epochs, stream_steps, held = TASKS[name]
    if quick:
        epochs, stream_steps, held = min(epochs, 6), min(stream_steps, 310), min(held, 2000)
    batch = 16 if name == "D" else 32
    size = (stream_steps + 1) * batch if stream else size  # one more for the lagged product
    parts = maker(seed, size, held)
    steps = stream_steps if stream else epochs * (size // batch)
    return Problem(**parts, stream=stream, steps=steps)
