"""Signal and noise of a group of tensors, from the gradients of some steps."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from poprisk_integrations.core.window import coordinate_ratio
from poprisk_integrations.diagnostics.noise_scale import NoiseScale, noise_scale
from poprisk_integrations.diagnostics.snr_distribution import (
    SnrDistribution,
    abs_t_histogram,
    deconvolve,
)

__all__ = ["GroupProbe", "GroupSums"]

_CHUNK = 1 << 16  # coordinates worked on at a time, in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupProbe:
    """One group of layers, or all together.

    Attributes:
        name: Of the group.
        parameters: Trained parameters with a gradient.
        dead: Share of them whose gradient was 0 at every step. They count in nothing else.
        snr: Distribution of the per-batch SNR over coordinates; None if all are dead.
        rms_snr_sq: Mean square of the SNR, scatter taken off; may be negative.
        rms_snr_sq_se: Its standard error.
        scale: Signal and noise, every coordinate with its own size: the noise scale.
        signal_ratio: F of the probed steps as one window, as in `core.coordinate_ratio`.
    """

    name: str
    parameters: int
    dead: float
    snr: SnrDistribution | None
    rms_snr_sq: float
    rms_snr_sq_se: float
    scale: NoiseScale
    signal_ratio: float

    @property
    def rms_snr(self) -> float:
        """Root of the mean square, 0 where the estimate is negative."""
        return math.sqrt(self.rms_snr_sq) if self.rms_snr_sq > 0 else 0.0

    def has_signal(self, z: float = 2.0) -> bool:
        """Whether batches agree by more than `z` standard errors, in either weighting."""
        return self.scale.is_significant(z) or self.rms_snr_sq > z * self.rms_snr_sq_se


class GroupSums:
    """Sums over the coordinates of a group, from which all of its numbers come."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.parameters = self.sampled = 0
        self._alive = 0.0
        self._gram = torch.zeros(steps, steps).double()
        self._white_gram = torch.zeros(steps, steps).double()
        self._histogram: Tensor | None = None
        self._ratio = torch.zeros(2).double()

    def add(self, values: Tensor, weight: float, numel: int) -> None:
        """Take in a tensor's coordinates, of which each stands for `weight`."""
        self.parameters += numel
        self.sampled += values.shape[1]
        for part in torch.split(values, _CHUNK, dim=1):
            g = part.double()
            g = g[:, (g != 0).any(0)]
            if g.shape[1] == 0:
                continue
            mean, variance = g.mean(0), g.var(0)
            # A gradient that never changes would count without end: `coordinate_ratio`'s cap.
            floor = (mean.square() * self._steps / 100).clamp(min=torch.finfo(g.dtype).tiny)
            white = g / torch.maximum(variance, floor).sqrt()
            abs_t = white.mean(0).abs() * math.sqrt(self._steps)
            self._gram += weight * (g @ g.T)
            self._white_gram += weight * (white @ white.T)
            counts = abs_t_histogram(abs_t, torch.full_like(abs_t, weight))
            self._histogram = counts if self._histogram is None else self._histogram + counts
            self._ratio += weight * coordinate_ratio(g.sum(0), g.square().sum(0), self._steps)
            self._alive += weight * g.shape[1]

    def merge(self, other: "GroupSums") -> None:
        """Take in another group."""
        self.parameters += other.parameters
        self.sampled += other.sampled
        self._alive += other._alive
        self._gram += other._gram
        self._white_gram += other._white_gram
        self._ratio += other._ratio
        if other._histogram is not None:
            before = 0 if self._histogram is None else self._histogram
            self._histogram = before + other._histogram

    def finish(self, name: str, probabilities: Tensor) -> GroupProbe:
        """The group's numbers."""
        is_dead = self._alive == 0 or self._histogram is None
        # A coordinate is whitened by its own estimated noise s: E[g_bar^2 / s^2] is
        # (T-1)/(T-3) (SNR^2 + 1/T), of which the pairs of steps leave 1/T out.
        shrink = (self._steps - 3) / (self._steps - 1)
        white = noise_scale(self._white_gram)
        rms_snr_sq = shrink * (white.ratio + 1 / self._steps) - 1 / self._steps
        return GroupProbe(
            name=name,
            parameters=self.parameters,
            dead=1 - self._alive / self.parameters,
            snr=None if is_dead else deconvolve(self._histogram, probabilities),  # type: ignore[arg-type]
            rms_snr_sq=math.nan if is_dead else rms_snr_sq,
            rms_snr_sq_se=math.nan if is_dead else shrink * white.ratio_se,
            scale=noise_scale(self._gram),
            signal_ratio=math.nan if is_dead else float(self._ratio[0] / self._ratio[1]),
        )
