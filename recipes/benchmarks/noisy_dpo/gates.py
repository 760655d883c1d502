"""Other gates: noise from within the batch, in some tensors only, in a rotated basis."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from arms import A1, CALIBRATED, Arm, Context, gated
from model import LAYERS
from torch import Tensor

from poprisk_integrations.core.gate import gate_factor
from poprisk_integrations.core.noise import update_dev_sq_

__all__ = ["GATES", "RotatedAdam", "SpectralStep", "in_pieces"]

Margins = Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]
ATTENTION, MLP = ("qkv", "out"), ("up", "down")
MATRICES = tuple(f"{i}.{name}" for i in range(LAYERS) for name in ATTENTION + MLP)
NAMES = ("embed", "place", "head", *MATRICES)


def in_pieces(
    arm: Arm,
    params: dict[str, Tensor],
    margins: Margins,
    context: Context,
    pieces: int,
    found: dict[str, Tensor] | None = None,
) -> Tensor:
    """As many backward passes as there are pieces of the batch, for `noise_source="microbatch"`.

    All pieces go through one forward pass, each with its own copy of the parameters, whose
    gradients then reach the parameters one by one. Returns the margins, shape (M, B), and leaves
    the gradients of the pieces, (M, pieces, ...), in `found`.
    """
    rows = context.rows
    member = torch.arange(len(rows)).repeat_interleave(pieces)[:, None]
    copies = {
        name: p.detach().repeat_interleave(pieces, 0).requires_grad_() for name, p in params.items()
    }
    h = margins(copies, member, rows.reshape(len(member), -1)).view(rows.shape)
    arm.loss(h, context).mean(1).sum().backward()
    found = {} if found is None else found
    for name, copy in copies.items():
        found[name] = copy.grad.unflatten(0, (len(rows), pieces))  # type: ignore[union-attr]
    for k in range(pieces):
        parts = [found[name][:, k] for name in params]
        torch.autograd.backward(list(params.values()), parts)
    return h


def only_in(params: list[Tensor], lr: float, b: int, n: int, places: tuple[str, ...]) -> Any:
    """The calibrated gate in the tensors whose names end so, plain AdamW in the others."""
    groups = [
        {"params": [p], "gate": "soft" if name.split(".")[-1] in places else "none"}
        for name, p in zip(NAMES, params, strict=True)
    ]
    return gated(groups, lr, b, n)  # type: ignore[arg-type]


class RotatedAdam(torch.optim.Optimizer):
    """Adam in the eigenbasis of each matrix's gradients, with or without the gate there.

    For a member's matrix G, with L = EMA of G G^T (and R of G^T G) = Q diag Q^T:
        g = Q_L^T G Q_R;  m, v, s and the update u as PopRiskAdamW's on g;  W -= lr Q_L u Q_R^T
    Where a basis turns by T = Q_old^T Q_new, m turns with it and v, s become (T^2)^T v: the
    variances of the new coordinates if the old ones were uncorrelated.

    Args:
        params: Stacked matrices, shape (M, a, b).
        lr: Learning rate.
        gate: Whether the calibrated gate acts on the rotated coordinates.
        sides: "smaller": only the shorter side is turned; "both".
        every: Steps between two turns.
        decay: Of L and R.
    """

    def __init__(
        self,
        params: list[Tensor],
        lr: float,
        *,
        gate: bool,
        sides: str = "smaller",
        every: int = 10,
        decay: float = 0.95,
        source: str = "gradient",
        betas: tuple[float, float] = (0.9, 0.999),
        rho: float = 0.99,
        alpha: float = CALIBRATED,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})
        self.gate, self.sides, self.every, self.decay = gate, sides, every, decay
        self.source, self.rho, self.alpha, self.at = source, rho, alpha, 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all matrices."""
        self.at += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self._move(p.grad, self.state[p], *group["betas"]), alpha=group["lr"])

    def _move(self, grad: Tensor, state: dict[str, Any], beta1: float, beta2: float) -> Tensor:
        t = self.at
        if not state:
            state.update({name: torch.zeros_like(grad) for name in ("m", "v", "s")})
            left, right = grad.shape[1] <= grad.shape[2], grad.shape[1] > grad.shape[2]
            if self.sides == "both":
                left = right = True
            state["bases"] = {
                side: torch.zeros_like(grad @ grad.mT if side == 0 else grad.mT @ grad)
                for side, wanted in ((0, left), (1, right))
                if wanted
            }
            state["turns"] = {}
        self._turn(grad, state)
        turns, m, v, s = state["turns"], state["m"], state["v"], state["s"]
        g = _rotate(grad, turns)
        if self.gate and t > 1:
            update_dev_sq_(s, g, m, self.rho, 1 - self.rho, 1 / (1 - beta1 ** (t - 1)))
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        mean = m / (1 - beta1**t)
        move = mean / ((v / (1 - beta2**t)).sqrt() + 1e-8)
        if self.gate and t > 1:
            move *= gate_factor(
                mean.square(),
                s / (1 - self.rho ** (t - 1)),
                gate="soft",
                alpha=self.alpha,
                lambda_pop=self.alpha,
            )
        return _rotate(move, {side: q.mT for side, q in turns.items()})

    def _turn(self, grad: Tensor, state: dict[str, Any]) -> None:
        seen = grad
        if self.source == "mean" and self.at > 1:
            seen = _rotate(state["m"], {side: q.mT for side, q in state["turns"].items()})
        for side, second in state["bases"].items():
            second.lerp_(seen @ seen.mT if side == 0 else seen.mT @ seen, 1 - self.decay)
            if (self.at - 1) % self.every:
                continue
            scale = second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
            new = torch.linalg.eigh(second / scale)[1]
            old = state["turns"].get(side)
            if old is not None:
                by = old.mT @ new
                state["m"] = _rotate(state["m"], {side: by})
                state["v"] = _rotate(state["v"], {side: by.square()})
                state["s"] = _rotate(state["s"], {side: by.square()})
            state["turns"][side] = new


class SpectralStep(torch.optim.Optimizer):
    """The mean gradient with all singular values made equal, or only those above the noise.

    m_hat = U diag(S) V^T;  W -= lr 0.2 sqrt(max(a, b)) U diag(q) V^T, root mean square 0.2 at q = 1
    q = 1; gated max(0, 1 - e / S^2), e = (sqrt(a) + sqrt(b))^2 mean(s_hat) (1 - beta1)/2:
    the square of the largest singular value of pure noise of the variance that m_hat has.

    Args:
        params: Stacked matrices, shape (M, a, b).
        lr: Learning rate.
        gate: Whether singular values inside the noise are left out.
    """

    def __init__(
        self, params: list[Tensor], lr: float, *, gate: bool, beta1: float = 0.9, rho: float = 0.99
    ) -> None:
        super().__init__(params, {"lr": lr})
        self.gate, self.beta1, self.rho, self.at = gate, beta1, rho, 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all matrices."""
        self.at += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self._move(p.grad, self.state[p]), alpha=group["lr"])

    def _move(self, grad: Tensor, state: dict[str, Any]) -> Tensor:
        t, beta1, rho = self.at, self.beta1, self.rho
        if not state:
            state["m"], state["s"] = torch.zeros_like(grad), grad.new_zeros(len(grad))
        m, s = state["m"], state["s"]
        if t > 1:
            s.mul_(rho).add_(
                (grad - m / (1 - beta1 ** (t - 1))).square().mean((1, 2)), alpha=1 - rho
            )
        m.lerp_(grad, 1 - beta1)
        mean = m / (1 - beta1**t)
        a, b = mean.shape[1:]
        wide = mean if a <= b else mean.mT
        scale = wide.square().sum((1, 2), keepdim=True).sqrt().clamp_min(1e-30)
        values, u = torch.linalg.eigh((wide / scale) @ (wide / scale).mT)
        factor = values.clamp_min(1e-7).rsqrt()
        if self.gate and t > 1:
            edge = (a**0.5 + b**0.5) ** 2 * s / (1 - rho ** (t - 1)) * (1 - beta1) / 2
            squares = values.clamp_min(1e-7) * scale[:, 0].square()
            factor = factor * (1 - edge[:, None] / squares).clamp_min(0)
        move = (u * factor[:, None]) @ u.mT @ (wide / scale)
        found: Tensor = (move if a <= b else move.mT) * (0.2 * max(a, b) ** 0.5)
        return found


def _rotate(x: Tensor, turns: dict[int, Tensor]) -> Tensor:
    """Q_L^T x Q_R."""
    if 0 in turns:
        x = turns[0].mT @ x
    return x @ turns[1] if 1 in turns else x


def rotated(params: list[Tensor], lr: float, b: int, n: int, **options: Any) -> RotatedAdam:
    return RotatedAdam(params, lr, **options)


def spectral(params: list[Tensor], lr: float, b: int, n: int, gate: bool) -> SpectralStep:
    return SpectralStep(params, lr, gate=gate)


def microbatch(params: list[Tensor], lr: float, b: int, n: int, **options: Any) -> Any:
    return gated(params, lr, b, n, noise_source="microbatch", **options)


V1 = replace(A1, name="V1 gate, s from 8 parts", optimizer=microbatch)
V3 = replace(A1, name="V3 rotated gate", optimizer=partial(rotated, gate=True))
V3C = replace(A1, name="V3c rotated Adam", optimizer=partial(rotated, gate=False))
GATES = {
    arm.name.split()[0]: arm
    for arm in (
        replace(V1, backward=partial(in_pieces, pieces=8)),
        replace(V1, name="V1p gate, s from 32 pairs", backward=partial(in_pieces, pieces=32)),
        replace(A1, name="V2a gate in attention", optimizer=partial(only_in, places=ATTENTION)),
        replace(A1, name="V2b gate in MLP", optimizer=partial(only_in, places=MLP)),
        replace(A1, name="V2c gate in both", optimizer=partial(only_in, places=ATTENTION + MLP)),
        V3,
        V3C,
        replace(V3, name="V3b both sides", optimizer=partial(rotated, gate=True, sides="both")),
        replace(V3C, name="V3bc both sides", optimizer=partial(rotated, gate=False, sides="both")),
        replace(
            V3,
            name="V3b5 both sides, gate 0.05",
            optimizer=partial(rotated, gate=True, sides="both", alpha=0.05),
        ),
        replace(
            V3C,
            name="V3bmc both sides, basis of the mean",
            optimizer=partial(rotated, gate=False, sides="both", source="mean"),
        ),
        replace(A1, name="V6 spectral gate", optimizer=partial(spectral, gate=True)),
        replace(A1, name="V6c equal singular values", optimizer=partial(spectral, gate=False)),
        replace(A1, name="C1V3bc step of V3bc", update="norm", needs="V3bc"),
        replace(
            V3C,
            name="C1rot both sides, step of V3b",
            optimizer=partial(rotated, gate=False, sides="both"),
            update="norm",
            needs="V3b",
        ),
    )
}
