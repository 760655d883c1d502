"""Regression on few relevant directions, along the coordinates or not; linear and a network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gate_harness.tasks import Member, SupervisedTask, squared_error
from torch import Tensor, nn

__all__ = ["CONDITIONS", "MODELS", "Drawn", "Model", "SparseSignalTask", "draw", "rotation"]


@dataclass(frozen=True)
class Model:
    """A family of problems.

    Args:
        inputs: Their number d.
        relevant: How many of them carry the signal, k.
        train: Training examples n.
        noise: Standard deviation of the noise on y; the signal's is 1.
        batch_size: Examples per step.
        steps: Of a run.
        group: Members that train side by side.
    """

    inputs: int
    relevant: int
    train: int
    noise: float
    batch_size: int
    steps: int
    group: int


MODELS = {
    "linear": Model(
        inputs=200, relevant=5, train=100, noise=0.7, batch_size=10, steps=3000, group=270
    ),
    "net": Model(inputs=50, relevant=3, train=300, noise=0.7, batch_size=32, steps=1500, group=70),
}
CONDITIONS = {
    "linear": ("linear sparse", "linear rotated", "linear dense"),
    "net": ("net sparse", "net rotated"),
}
WIDTH, TEACHER_UNITS, TEST = 32, 4, 1000


@dataclass(frozen=True)
class Drawn:
    """The data of one (condition, seed).

    Args:
        x: Training inputs, shape (n, d).
        y: Noisy targets, shape (n, 1).
        test_x: Test inputs.
        test_y: Test targets without noise.
        basis: Orthogonal R, shape (d, d); inputs are x = R z, the signal is of z.
        relevant: Which coordinates of z carry the signal, shape (d,), bool.
        weight: The linear signal in terms of x, shape (d,); zeros for the network.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    basis: Tensor
    relevant: Tensor
    weight: Tensor


def rotation(count: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrix, uniform (Haar)."""
    q, r = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def draw(condition: str, seed: int) -> Drawn:
    """Data of a seed; `rotated` differs from `sparse` by the rotation of the inputs alone.

    Args:
        condition: Of `CONDITIONS`.
        seed: Of everything.
    """
    name, kind = condition.split(" ")
    model, generator = MODELS[name], torch.Generator().manual_seed(seed)
    d, k = model.inputs, model.inputs if kind == "dense" else model.relevant
    relevant = torch.zeros(d, dtype=torch.bool)
    relevant[torch.randperm(d, generator=generator)[:k]] = True
    z = torch.randn(model.train + TEST, d, generator=generator)
    noise = model.noise * torch.randn(model.train, 1, generator=generator)
    turned = rotation(d, generator)
    basis = turned if kind == "rotated" else torch.eye(d)
    weight = torch.zeros(d)
    if name == "linear":
        signs = torch.randn(k, generator=generator).sign()
        weight[relevant] = signs / k**0.5
        clean = (z @ weight)[:, None]
        weight = basis @ weight
    else:
        clean = teacher(z[:, relevant], generator)
    x, n = z @ basis.T, model.train
    return Drawn(x[:n], clean[:n] + noise, x[n:], clean[n:], basis, relevant, weight)


def teacher(z: Tensor, generator: torch.Generator) -> Tensor:
    """Sum of ReLU units with random directions, mean 0 and variance 1 over Gaussian inputs."""
    directions = torch.randn(z.shape[1], TEACHER_UNITS, generator=generator)
    directions = directions / directions.norm(dim=0)
    signs = torch.tensor([1.0, -1.0]).repeat(TEACHER_UNITS // 2)

    def raw(a: Tensor) -> Tensor:
        return (a @ directions).relu() @ signs

    many = raw(torch.randn(20_000, z.shape[1], generator=generator))
    return ((raw(z) - many.mean()) / many.std())[:, None]


class SparseSignalTask(SupervisedTask):
    """Squared error on noisy targets, batch by batch.

    Metrics: `excess`, mean squared distance to the clean targets (exact for the linear model, where
    it is |w - w*|^2; on test inputs for the network), in units of the signal's variance. `on`,
    `off`: norm of the weights on the relevant inputs and on the others, in the basis z of the
    signal (of the first layer for the network).

    Args:
        members: All of one family.
        steps: Of the run; the family's own by default.
        eval_steps: When the metrics are taken.
    """

    def __init__(
        self, members: list[Member], *, steps: int | None = None, eval_steps: Sequence[int] = ()
    ) -> None:
        self.family = members[0].condition.split(" ")[0]
        model, drawn = MODELS[self.family], []

        def data(condition: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            drawn.append(draw(condition, seed))
            one = drawn[-1]
            return one.x, one.y, one.test_x, one.test_y

        steps = steps or model.steps
        super().__init__(
            members,
            data,
            linear if self.family == "linear" else network,
            squared_error,
            {"excess": squared_error},
            batch_size=model.batch_size,
            steps=steps,
            eval_steps=eval_steps or usual_eval_steps(steps),
        )
        self.basis = torch.stack([one.basis for one in drawn])
        self.relevant = torch.stack([one.relevant for one in drawn]).float()
        self.weight = torch.stack([one.weight for one in drawn])

    def metrics(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Excess error and where the weights are."""
        first = params["weight" if self.family == "linear" else "0.weight"]  # (M, out, d)
        size = (first @ self.basis[self.data_of]).square().sum(1)  # W x = (W R) z
        relevant = self.relevant[self.data_of]
        if self.family == "linear":
            excess = (first[:, 0] - self.weight[self.data_of]).square().sum(1)
        else:
            excess = super().metrics(params)["excess"]
        return {
            "excess": excess,
            "on": (size * relevant).sum(1).sqrt(),
            "off": (size * (1 - relevant)).sum(1).sqrt(),
        }


def linear() -> nn.Module:
    """Starts at zero: what it knows it has from the data."""
    module = nn.Linear(MODELS["linear"].inputs, 1, bias=False)
    nn.init.zeros_(module.weight)
    return module


def network() -> nn.Module:
    """Two layers, torch's own start."""
    return nn.Sequential(nn.Linear(MODELS["net"].inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


def usual_eval_steps(steps: int) -> list[int]:
    """About logarithmic, so that every rate has its best step near one; the last is `steps`."""
    early = (10, 20, 30, 50, 75, 100, 150, 200, 300, 400, 500, 600, 800, 1000, 1250, 1500, 2000)
    return sorted({s for s in (*early, 2500) if s < steps} | {steps})
