"""First-order decrease of the population risk along the steps that were really taken."""

from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk_integrations.diagnostics.coordinate_sample import CoordinateSample, FlatVector

__all__ = ["StepDisplacement"]


class StepDisplacement:
    """Lagged cross products of displacements and fresh gradients, per tensor and step.

        P_t,l = - sum_k (w_{t-1,k} - w_{t-2,k}) g_{t,k}
    The last displacement, whatever made it (preconditioner, momentum, gate, rounding, weight
    decay), times the gradient of a batch that it has not seen. The two noises are independent, so
    nothing is subtracted: in the first pass over the data E P_t = - (w_{t-1} - w_{t-2})' mu, the
    first-order decrease of the population's loss if that step were repeated. Not clamped: it is
    negative while the weights oscillate, or where the steps go after noise.

    Only sampled coordinates are read; the sum is scaled up when the window closes.

    Args:
        sample: Which coordinates.
    """

    def __init__(self, sample: CoordinateSample) -> None:
        self._sample = sample
        self._before, self._now = sample.zeros(), sample.zeros()
        self._has_before = False
        self._none = torch.full((len(sample.counts),), torch.nan, device=self._now.flat.device)
        self._unmoved = torch.zeros((), device=self._none.device)
        self.products: list[Tensor] = []  # per step P_t,l of the sample, NaN without a step before
        self.moved: list[Tensor] = []  # per step 0-dim, > 0 if any weight had changed

    @property
    def previous(self) -> list[Tensor] | None:
        """Sampled weights at the last `add`, per tensor."""
        return self._before.parts if self._has_before else None

    @previous.setter
    def previous(self, values: Sequence[Tensor] | None) -> None:
        self._has_before = values is not None
        if values is not None:
            torch._foreach_copy_(self._before.parts, list(values))

    def add(self, weights: Sequence[Tensor], grads: FlatVector, *, on_host: bool) -> None:
        """Multiply the displacement since the last call with fresh gradients.

        Args:
            weights: Local shards, before the optimizer's step.
            grads: Sampled gradients.
            on_host: Whether values may be looked at without a device sync.
        """
        before, now = self._before, self._now
        self._sample.read(weights, now)
        if not self._has_before:
            self._has_before = True
            self.products.append(self._none)
            self.moved.append(self._unmoved)
        else:
            if on_host:  # ends at the first difference
                moved = torch.tensor(float(not torch.equal(before.flat, now.flat)))
            before.flat.sub_(now.flat)
            if not on_host:
                moved = torch.dot(before.flat, before.flat)
            pairs = zip(before.parts, grads.parts, strict=True)
            self.products.append(torch.stack([torch.dot(d, g) for d, g in pairs]))
            self.moved.append(moved)
        self._before, self._now = now, before

    def start_window(self, unmeasured: int = 0) -> None:
        """Forget the products, not the weights: the next displacement counts.

        Args:
            unmeasured: Steps of the window that have passed without this.
        """
        self.products = [self._none] * unmeasured
        self.moved = [self._unmoved] * unmeasured
