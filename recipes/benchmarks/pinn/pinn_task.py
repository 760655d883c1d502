"""u_t + 5 u_x = 0 from a noisy initial condition, as a physics-informed network.

u(x, 0) = sin x for x in [0, 2 pi), periodic, t in [0, 1]; exact: u = sin(x - 5 t). The initial
condition is known at `KNOWN` places, with Gaussian noise of sd `NOISE`. Two conditions:

- fresh: each step draws its collocation points anew, and some of the known places;
- fixed: each step sees all known places and the same collocation points.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from gate_harness.tasks import Member, Task
from torch import Tensor

__all__ = ["CONDITIONS", "Counts", "PinnTask", "exact", "network", "transported"]

BETA, NOISE, KNOWN = 5.0, 0.5, 64
WIDTHS = (2, 50, 50, 50, 1)
CONDITIONS = ("fresh", "fixed")
Params = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Points of a step: on the initial condition, of the periodic boundary, inside."""

    initial: int
    boundary: int
    inside: int


COUNTS = {
    "fresh": Counts(initial=16, boundary=16, inside=64),
    "fixed": Counts(initial=KNOWN, boundary=32, inside=128),
}


def exact(x: Tensor, t: Tensor) -> Tensor:
    """sin(x - 5 t)."""
    return torch.sin(x - BETA * t)


def scaled(x: Tensor, t: Tensor) -> Tensor:
    """Inputs of the network, both in [-1, 1], shape (..., 2)."""
    return torch.stack([x / math.pi - 1, 2 * t - 1], -1)


def network(params: Params, z: Tensor) -> Tensor:
    """The values of u at scaled inputs, shape (M, B, 2) -> (M, B)."""
    last = len(params) // 2 - 1
    for i in range(last + 1):
        z = torch.baddbmm(params[f"b{i}"][:, None], z, params[f"w{i}"])
        z = z if i == last else z.tanh()
    return z[..., 0]


def transported(params: Params, z: Tensor, skip: int = 0) -> tuple[Tensor, Tensor]:
    """The values of u at all inputs and u_t + 5 u_x at those after the first `skip`.

    The residual is the derivative of u in the direction (x, t) = (5, 1), so one tangent is carried
    along: for h = tanh(z), h' = (1 - h^2) z'.
    """
    last = len(params) // 2 - 1
    direction = torch.tensor([BETA / math.pi, 2.0]).to(z)  # of the scaled inputs
    dz = direction.expand_as(z[:, skip:])
    for i in range(last + 1):
        z = torch.baddbmm(params[f"b{i}"][:, None], z, params[f"w{i}"])
        dz = torch.bmm(dz, params[f"w{i}"])
        if i < last:
            z = z.tanh()
            dz = (1 - z[:, skip:].square()) * dz
    return z[..., 0], dz[..., 0]


class PinnTask(Task):
    """Members of one condition.

    Args:
        members: The models; those of a seed share noise, start and points.
        steps: Of the run.
        every: Steps between two evaluations.
    """

    def __init__(self, members: list[Member], *, steps: int, every: int) -> None:
        (self.condition,) = {m.condition for m in members}
        self.members, self.steps = members, steps
        self.eval_steps = range(every, steps + 1, every)
        self.counts = COUNTS[self.condition]
        self.seeds = list(dict.fromkeys(m.seed for m in members))
        self.place = torch.tensor([self.seeds.index(m.seed) for m in members])
        self.generators = [torch.Generator().manual_seed(40_000 + s) for s in self.seeds]
        known = [self._known(s) for s in self.seeds]
        self.known_x, self.known_u = (torch.stack(c) for c in zip(*known, strict=True))
        self.fixed = self._draw() if self.condition == "fixed" else None
        # A grid whose points are none of the training's: x is periodic, t includes both ends.
        x, t = torch.arange(32) * (2 * math.pi / 32), torch.linspace(0, 1, 11)
        x, t = (a.flatten() for a in torch.meshgrid(x, t, indexing="ij"))
        self.grid, self.truth = scaled(x, t), exact(x, t)

    @staticmethod
    def _known(seed: int) -> tuple[Tensor, Tensor]:
        """Places and noisy values; the same for both conditions."""
        g = torch.Generator().manual_seed(20_000 + seed)
        x = 2 * math.pi * torch.rand(KNOWN, generator=g)
        return x, exact(x, torch.zeros(())) + NOISE * torch.randn(KNOWN, generator=g)

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Inputs of a step, (seeds, B, 2): initial, left, right, inside; and the known values."""
        inputs, targets = [], []
        for place, g in enumerate(self.generators):
            rows = torch.randperm(KNOWN, generator=g)[: self.counts.initial]
            inside = torch.rand(2, self.counts.inside, generator=g)
            x, t = 2 * math.pi * inside[0], inside[1]
            edge = torch.rand(self.counts.boundary, generator=g)
            left, right = torch.zeros_like(edge), torch.full_like(edge, 2 * math.pi)
            places = torch.cat([self.known_x[place, rows], left, right, x])
            inputs.append(scaled(places, torch.cat([torch.zeros(len(rows)), edge, edge, t])))
            targets.append(self.known_u[place, rows])
        return torch.stack(inputs), torch.stack(targets)

    def initial(self) -> Params:
        """Glorot normal weights, biases 0; one draw for each seed."""
        drawn: dict[str, list[Tensor]] = {}
        for seed in self.seeds:
            g = torch.Generator().manual_seed(30_000 + seed)
            for i, (a, b) in enumerate(itertools.pairwise(WIDTHS)):
                weight = torch.randn(a, b, generator=g) * math.sqrt(2 / (a + b))
                drawn.setdefault(f"w{i}", []).append(weight)
                drawn.setdefault(f"b{i}", []).append(torch.zeros(b))
        return {name: torch.stack(values)[self.place] for name, values in drawn.items()}

    def losses(self, params: Params, step: int) -> Tensor:
        """Mean squares of: u - noisy u at t = 0, u(0, t) - u(2 pi, t), u_t + 5 u_x; weights 1."""
        z, target = (a[self.place] for a in self.fixed or self._draw())
        n, b = self.counts.initial, self.counts.boundary
        u, residual = transported(params, z, skip=n + 2 * b)
        return (
            (u[:, :n] - target).square().mean(1)
            + (u[:, n : n + b] - u[:, n + b : n + 2 * b]).square().mean(1)
            + residual.square().mean(1)
        )

    def metrics(self, params: Params) -> dict[str, Tensor]:
        """Relative l2 error against the exact solution; squared error on the noisy points."""
        u = network(params, self.grid.expand(len(self.members), -1, -1))
        start = scaled(self.known_x, torch.zeros_like(self.known_x))[self.place]
        misfit = (network(params, start) - self.known_u[self.place]).square().mean(1)
        return {"error": (u - self.truth).norm(dim=1) / self.truth.norm(), "misfit": misfit}

    def keep(self, index: Tensor) -> None:
        """Go on with these members only."""
        super().keep(index)
        self.place = self.place[index]
