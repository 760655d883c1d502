"""One AdamW step of M models at once, each with its own learning rate and decay, gated or not.

The parameters of a member are one row of a matrix (M, P). Per member the arithmetic is that of
`PopRiskAdamW` on a CPU (`optim/_eager.py`), which the tests compare it with.
"""

import math

import numpy as np
import torch
from benchmarks.harness.arms import BETAS, Arm
from torch import Tensor

from poprisk_integrations.core import (
    default_lambda_pop,
    effective_coordinates,
    gate_factor,
    noise_is_ready,
    pooled_alpha,
    update_dev_sq_,
)

__all__ = ["StackedAdam"]

EPS = 1e-8
CACHED = 1 << 18  # elements stepped at a time: the step is bound by memory


class StackedAdam:
    """AdamW, PopRiskAdamW or a control, over stacked models.

    Args:
        arm: What to step with.
        sizes: Elements of each of a member's tensors, in the order of the row.
        lr: Learning rate of each member, shape (M,).
        decay: Decoupled weight decay of each member, shape (M,).
        seeds: Seed of each member, for the random mask.
        recorded: `update_norm` and `moved_share`, (T, M), of the arm that a control imitates.
    """

    def __init__(
        self,
        arm: Arm,
        sizes: list[int],
        lr: Tensor,
        decay: Tensor,
        seeds: list[int],
        recorded: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.arm, self.sizes, self.seeds = arm, sizes, seeds
        self.rows_of = sizes  # rows of each tensor; vectors until `train` says otherwise
        self.lr, self.decay = lr[:, None], decay[:, None]
        self.at = self.dev_at = 0
        self.moments: list[Tensor] = []
        ends = np.cumsum(sizes).tolist()
        self.exempt = [slice(ends[i] - sizes[i], ends[i]) for i in arm.exempt]  # of the row
        self.recorded = {
            name: torch.from_numpy(recorded[name])
            for name in (("update_norm", "moved_share") if recorded else ())
        }
        self.rows: dict[str, list[Tensor]] = {"update_norm": [], "moved_share": []}

    @torch.no_grad()
    def step(self, theta: Tensor, grad: Tensor, factor: float = 1.0) -> None:
        """Change parameters, shape (M, P), in place, with finite gradients of each batch mean.

        `factor` is that of a schedule, of all learning rates.
        """
        arm = self.arm
        if not self.moments:
            self.moments = [torch.zeros_like(theta) for _ in range(3 if self.has_s else 2)]
        self.at += 1
        if arm.gate != "none" and (arm.noise_mean == "raw" or self.at > 1):
            self.dev_at += 1
        norms, shares = [], []
        width = max(1, CACHED // theta.shape[1])
        for first in range(0, len(theta), width):
            part = slice(first, first + width)
            states = [x[part] for x in self.moments]
            move, gate = self._move(grad[part], states)
            if arm.control is not None:
                move = self._controlled(move, states, part)
            lr = factor * self.lr[part]
            decayed = lr * self.decay[part]
            if gate is not None and arm.gate_decay:
                decayed = decayed * gate
            theta[part].mul_(1 - decayed).addcmul_(lr.expand_as(move), move, value=-1)
            norms.append(move.square().sum(1).sqrt())
            shares.append((move != 0).float().mean(1))
        # In units of the learning rate: what a control imitates is the direction's length.
        self.rows["update_norm"].append(torch.cat(norms))
        self.rows["moved_share"].append(torch.cat(shares))

    def _move(self, grad: Tensor, states: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The update before the learning rate, and the gate where one acts."""
        arm, t, (beta1, beta2) = self.arm, self.at, BETAS
        m, v = states[:2]
        published = arm.noise_mean == "raw"
        if self.has_s and (published or t > 1):
            scale = 1.0 if published else 1 / (1 - beta1 ** (t - 1))
            update_dev_sq_(states[2], grad, m, arm.rho, 1 - arm.rho, scale)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = 1 - beta1**t
        denom = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(EPS)
        move = (m / denom).div_(correction)
        ready = noise_is_ready(self.dev_at, arm.gate_warmup, centered=not published)
        if arm.gate == "none" or not ready:
            return move, None
        mean_sq = m.square()
        noise, noise_scale = mean_sq, 1.0
        if not self.has_s:
            noise = v * (correction**2 / (1 - beta2**t))
        elif not (published and t == 1):  # where s_hat = m_hat^2 by algebra
            noise, noise_scale = states[2], correction**2 / (1 - arm.rho**self.dev_at)
        if arm.granularity != "coordinate":
            mean_sq, noise = self._pooled(mean_sq, noise)
        elif not self.has_s:
            noise = (noise - mean_sq).clamp_min(0)
        gate = gate_factor(
            mean_sq,
            noise,
            gate=arm.gate,
            alpha=arm.alpha,
            lambda_pop=default_lambda_pop(arm.gate, arm.alpha)
            if arm.lambda_pop is None
            else arm.lambda_pop,
            eps=arm.gate_eps * correction**2,
            noise_scale=noise_scale,
        )
        if arm.gate_blend != 1.0:
            gate.mul_(arm.gate_blend).add_(1 - arm.gate_blend)
        gated = move * gate
        if arm.preserve_norm:
            whole = move.split(self.sizes, 1)
            for before, after in zip(whole, gated.split(self.sizes, 1), strict=True):
                lost = after.square().sum(1, keepdim=True)
                usable = lost > torch.finfo(lost.dtype).tiny
                kept = (before.square().sum(1, keepdim=True) / lost).sqrt()
                after *= torch.where(usable, kept, 1.0)
        for span in self.exempt:
            mean = m[:, span] / (1 - beta1**t)
            gated[:, span] = mean / ((v[:, span] / (1 - beta2**t)).sqrt() + EPS)
            gate[:, span] = 1.0
        return gated, gate

    @property
    def has_s(self) -> bool:
        """Whether there is a noise variance of its own."""
        return self.arm.gate != "none" and self.arm.noise_source != "moments"

    def _pooled(self, mean_sq: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Both as means over rows or tensors, the noise beside the boundary of one coordinate."""
        arm, beta2 = self.arm, None if self.has_s else BETAS[1]
        found = []
        parts = (x.split(self.sizes, 1) for x in (mean_sq, noise))
        for signal, spread, rows in zip(*parts, self.rows_of, strict=True):
            count = rows if arm.granularity == "row" else 1
            shape = (len(signal), count, -1)
            s, y = signal.reshape(shape), spread.reshape(shape).double()
            n = y.shape[2]
            sums = [(y**power).sum(2, keepdim=True) for power in (1, 2, 3)]
            pooled, mean = s.mean(2, keepdim=True), sums[0] / n
            if beta2 is not None:
                mean = (mean - pooled).clamp_min(0)
            if n > 1 and arm.false_open_rate is not None:
                worth = effective_coordinates(*sums, n, arm.rho if beta2 is None else beta2)
                alpha = pooled_alpha(arm.false_open_rate, *worth, beta1=BETAS[0], beta2=beta2)
                mean = mean * (alpha / arm.alpha)
            found.append([x.to(s).expand_as(s).reshape_as(signal) for x in (pooled, mean)])
        wide = [torch.cat(column, 1) for column in zip(*found, strict=True)]
        return wide[0], wide[1]

    def _controlled(self, move: Tensor, states: list[Tensor], part: slice) -> Tensor:
        kind, step = self.arm.control, self.at - 1
        if kind == "norm":
            wanted = self.recorded["update_norm"][step, part].to(move)[:, None]
            return move * (wanted / move.square().sum(1, keepdim=True).sqrt().clamp_min(1e-30))
        if kind == "mask":
            share = self.recorded["moved_share"][step, part].to(move)[:, None]
            draws = []
            for seed in self.seeds[part]:
                generator = torch.Generator(move.device).manual_seed(1_000_003 * seed + self.at)
                draws.append(torch.rand(move.shape[1], generator=generator, device=move.device))
            return move * (torch.stack(draws) < share)
        # "ratio": the gate on s = v_hat - m_hat^2, i.e. a threshold on m^2 / v
        (beta1, beta2), t = BETAS, self.at
        mean_sq = (states[0] / (1 - beta1**t)).square()
        spread = (states[1] / (1 - beta2**t) - mean_sq).clamp_min_(0.0)
        return move * (1 - self.arm.alpha * spread / mean_sq.clamp_min(1e-38)).clamp_min(0.0)

    def arrays(self) -> dict[str, np.ndarray]:
        """Per step, shape (T, M); what the controls need and the open fraction."""
        return {name: torch.stack(rows).cpu().numpy() for name, rows in self.rows.items()}
