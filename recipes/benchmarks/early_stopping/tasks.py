"""The benchmark's tasks: data with wrong labels or noise, and small models, M members at once.

A member is one (condition, seed): its own data, its own initial weights. All members of a task
have the same shapes, so they train side by side in stacked tensors, shape (M, ...).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from language import language_task
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ["TASKS", "Task", "build"]

TEST = 500


@dataclass(kw_only=True)
class Task:
    """Data and model of M members.

    Attributes:
        name: As in the README, e.g. "T1".
        members: One dict of labels per member, for the CSV: condition and seed.
        model: Module with `forward(x)`; weights are drawn per member.
        loss: (prediction, y) -> mean loss of one member.
        train: x (M, n, ...) and y (M, n, ...).
        test: The same for fresh examples with the same noise: what stopping is about.
        clean: y of the test examples without noise, or None.
        metric: (prediction, clean y) -> larger is better, e.g. accuracy.
        epochs: Of the whole run.
        init: Weights to start from instead of drawn ones, e.g. pretrained.
        is_classification: Whether predictions are class scores.
        stream: Whether each example is seen once (`train` then holds the whole stream).
    """

    name: str
    members: list[dict]
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    clean: Tensor | None
    metric: Callable[[Tensor, Tensor], Tensor]
    epochs: int
    init: dict[str, Tensor] | None = None
    is_classification: bool = True
    stream: bool = False
    weight_decay: float = 0.01
    lrs: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Training examples of one member."""
        return self.train[0].shape[1]


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU) -> Callable[[], nn.Module]:
    """A maker of MLPs."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), act()]
        return nn.Sequential(*layers[:-1])

    return make


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over all labels of one member."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())


def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of one member."""
    return (prediction - y).square().mean()


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of right classes; works on (M, n, C) too."""
    return (logits.argmax(-1) == y).float().flatten(1).mean(1)


def negative_error(prediction: Tensor, y: Tensor) -> Tensor:
    """Minus the error against clean targets."""
    return -(prediction - y).square().flatten(1).mean(1)


def flip(y: np.ndarray, share: float, kind: str, classes: int, rng: np.random.Generator):
    """Exact count of wrong labels: to any other class ("sym") or to the next one ("pair")."""
    y = y.copy()
    chosen = rng.choice(len(y), round(share * len(y)), replace=False)
    step = rng.integers(1, classes, len(chosen)) if kind == "sym" else 1
    y[chosen] = (y[chosen] + step) % classes
    return y


def stack(rows: list[tuple[np.ndarray, ...]]) -> list[Tensor]:
    """Member-wise arrays to stacked tensors."""
    columns = zip(*rows, strict=True)
    return [torch.tensor(np.stack(c)) for c in columns]


FLIPS = ((0.0, "sym"), (0.1, "sym"), (0.2, "sym"), (0.4, "sym"), (0.2, "pair"))


def digits(n: int) -> Callable[[range], Task]:
    """T1 (and T7, the members without flips): scikit-learn's digits."""

    def make(seeds: range) -> Task:
        images, labels = load_digits(return_X_y=True)
        rows, members = [], []
        for share, kind in FLIPS:
            for seed in seeds:
                rng = np.random.default_rng(seed)
                order = rng.permutation(len(labels))[: n + TEST]
                x, clean = (images[order] / 16.0).astype(np.float32), labels[order]
                noisy = [flip(part, share, kind, 10, rng) for part in (clean[:n], clean[n:])]
                rows.append((x[:n], noisy[0], x[n:], noisy[1], clean[n:]))
                members.append({"condition": f"n={n} {share:.0%} {kind}", "seed": seed})
        x, y, test_x, test_y, clean = stack(rows)
        return Task(
            name="T1",
            members=members,
            model=mlp(64, 128, 10),
            loss=cross_entropy,
            train=(x, y),
            test=(test_x, test_y),
            clean=clean,
            metric=accuracy,
            epochs=100,
        )

    return make


def mixture(seeds: range, n: int = 600, d: int = 50, classes: int = 6) -> Task:
    """T2: Gaussian mixture, 20 % symmetric flips."""
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(1000 + seed)
        centres = rng.normal(size=(classes, d)) * 0.45
        clean = rng.integers(0, classes, n + TEST)
        x = (centres[clean] + rng.normal(size=(n + TEST, d))).astype(np.float32)
        noisy = [flip(part, 0.2, "sym", classes, rng) for part in (clean[:n], clean[n:])]
        rows.append((x[:n], noisy[0], x[n:], noisy[1], clean[n:]))
    x, y, test_x, test_y, clean = stack(rows)
    return Task(
        name="T2",
        members=[{"condition": "20% sym", "seed": s} for s in seeds],
        model=mlp(d, 64, classes),
        loss=cross_entropy,
        train=(x, y),
        test=(test_x, test_y),
        clean=clean,
        metric=accuracy,
        epochs=100,
    )


def teacher(seeds: range, n: int = 400, d: int = 20) -> Task:
    """T3: regression on a random teacher network, noise sd 0.3 and 1 (signal sd 1)."""
    rows, members = [], []
    for noise in (0.3, 1.0):
        for seed in seeds:
            rng = np.random.default_rng(2000 + seed)
            x = rng.normal(size=(n + TEST, d))
            hidden = np.tanh(x @ rng.normal(size=(d, 8)) / d**0.5 * 1.5)
            clean = hidden @ rng.normal(size=8)
            clean = ((clean - clean.mean()) / clean.std())[:, None]
            y = clean + noise * rng.normal(size=clean.shape)
            f = np.float32
            rows.append(
                (
                    x[:n].astype(f),
                    y[:n].astype(f),
                    x[n:].astype(f),
                    y[n:].astype(f),
                    clean[n:].astype(f),
                )
            )
            members.append({"condition": f"sd {noise}", "seed": seed})
    x, y, test_x, test_y, clean = stack(rows)
    return Task(
        name="T3",
        members=members,
        model=mlp(d, 64, 1),
        loss=squared_error,
        train=(x, y),
        test=(test_x, test_y),
        clean=clean,
        metric=negative_error,
        epochs=100,
        is_classification=False,
    )


class HeatNet(nn.Module):
    """tanh network u(x, t) that returns u and the residual u_t - 0.1 u_xx, without autograd.

    Derivatives are carried along: for h = tanh(z), h' = (1-h^2) z', h'' = (1-h^2) z'' - 2 h h' z'.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 1)])

    def forward(self, x: Tensor) -> Tensor:
        h = x
        hx = torch.zeros_like(x).index_fill(-1, torch.tensor([0]), 1.0)
        ht = torch.zeros_like(x).index_fill(-1, torch.tensor([1]), 1.0)
        hxx = torch.zeros_like(x)
        for i, layer in enumerate(self.layers):
            w = layer.weight.transpose(0, 1)
            z, zx, zt, zxx = layer(h), hx @ w, ht @ w, hxx @ w
            if i == len(self.layers) - 1:
                return torch.cat([z, zt - 0.1 * zxx], -1)
            h = z.tanh()
            slope = 1 - h.square()
            hx, ht, hxx = slope * zx, slope * zt, slope * zxx - 2 * h * slope * zx.square()
        raise AssertionError("no last layer")


def heat_loss(prediction: Tensor, y: Tensor) -> Tensor:
    """Data error + 0.1 squared residual; y holds (target, is data, is collocation)."""
    u, residual = prediction.unbind(-1)
    target, is_data, inner = y.unbind(-1)
    return ((u - target).square() * is_data + 0.1 * residual.square() * inner).mean()


def heat_error(prediction: Tensor, clean: Tensor) -> Tensor:
    """Minus the relative l2 error against the exact solution."""
    error = (prediction[..., 0] - clean).square().sum(-1) / clean.square().sum(-1)
    return -error.sqrt()


def heat(seeds: range, n: int = 128) -> Task:
    """T4: heat equation u_t = 0.1 u_xx on the unit square; initial condition with noise sd 0.5.

    A quarter of the points lie at t = 0 (noisy targets), a quarter on the boundary, the rest
    inside.
    """

    def draw(rng: np.random.Generator, count: int):
        x = rng.uniform(size=(count, 2))
        quarter = count // 4
        x[:quarter, 1] = 0.0
        x[quarter : 2 * quarter, 0] = rng.integers(0, 2, quarter)
        exact = np.exp(-0.1 * np.pi**2 * x[:, 1]) * np.sin(np.pi * x[:, 0])
        y = np.stack([exact, np.arange(count) < 2 * quarter, np.arange(count) >= 2 * quarter], -1)
        y[:quarter, 0] += 0.5 * rng.normal(size=quarter)
        order = rng.permutation(count)
        return x[order].astype(np.float32), y[order].astype(np.float32), exact[order]

    rows = []
    for seed in seeds:
        rng = np.random.default_rng(3000 + seed)
        x, y, _ = draw(rng, n)
        test_x, test_y, exact = draw(rng, TEST)
        rows.append((x, y, test_x, test_y, exact.astype(np.float32)))
    x, y, test_x, test_y, clean = stack(rows)
    return Task(
        name="T4",
        members=[{"condition": "heat", "seed": s} for s in seeds],
        model=HeatNet,
        loss=heat_loss,
        train=(x, y),
        test=(test_x, test_y),
        clean=clean,
        metric=heat_error,
        epochs=400,
        is_classification=False,
    )


class Adder(nn.Module):
    """Two embedded numbers, one hidden layer, p classes."""

    def __init__(self, p: int = 59, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(p, width) / width**0.5)
        self.net = nn.Sequential(nn.Linear(2 * width, 128), nn.ReLU(), nn.Linear(128, p))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.embed[x].flatten(-2))


def addition(seeds: range, p: int = 59) -> Task:
    """T6, negative control: addition modulo 59, 40 % of the table for training, decay 1."""
    table = np.stack(np.meshgrid(np.arange(p), np.arange(p), indexing="ij"), -1).reshape(-1, 2)
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(4000 + seed)
        x = table[rng.permutation(len(table))]
        y, n = x.sum(1) % p, round(0.4 * len(x))
        rows.append((x[:n], y[:n], x[n:], y[n:], y[n:]))
    x, y, test_x, test_y, clean = stack(rows)
    return Task(
        name="T6",
        members=[{"condition": "p=59", "seed": s} for s in seeds],
        model=Adder,
        loss=cross_entropy,
        train=(x, y),
        test=(test_x, test_y),
        clean=clean,
        metric=accuracy,
        epochs=800,
        weight_decay=1.0,
    )


def stream(seeds: range, n: int = 48_000) -> Task:
    """T8: the mixture of T2 with 20 % flips as a stream that is seen once."""
    task = mixture(seeds, n=n)
    task.name, task.stream, task.epochs = "T8", True, 1
    return task


TASKS: dict[str, Callable[[range], Task]] = {
    "T1-300": digits(300),
    "T1-800": digits(800),
    "T2": mixture,
    "T3": teacher,
    "T4": heat,
    "T5": language_task,
    "T6": addition,
    "T8": stream,
}


def build(name: str, seeds: range) -> Task:
    """A task for some seeds."""
    return TASKS[name](seeds)
