"""First-order decrease of the population risk along the steps that were really taken."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk_integrations.diagnostics.coordinate_sample import FlatVector
from poprisk_integrations.diagnostics.window_layout import WindowLayout
from poprisk_integrations.diagnostics.window_rows import StepRows

__all__ = ["StepDisplacement"]


class StepDisplacement:
    """Lagged cross products of displacements and fresh gradients, per tensor and measured step.

        P_t,l = - sum_k (w_{t-1,k} - w_{t-2,k}) g_{t,k}
    The last displacement, whatever made it (preconditioner, momentum, gate, rounding, weight
    decay), times the gradient of a batch that it has not seen. The two noises are independent, so
    nothing is subtracted: in the first pass over the data E P_t = - (w_{t-1} - w_{t-2})' mu, the
    first-order decrease of the population's loss if that step were repeated. Not clamped: it is
    negative while the weights oscillate, or where the steps go after noise.

    Only sampled coordinates are read; the sum is scaled up when the window closes.

    Args:
        layout: The tensors and the sample.

    Attributes:
        rows: Per pair of steps P_t,l over the sample, L numbers, and whether any weight had moved
            (> 0); NaN without a step before.
    """

    def __init__(self, layout: WindowLayout) -> None:
        self._on_host = layout.on_host
        self._before = layout.sample.zeros()
        self._has_before = False
        self._columns = len(layout.locals) + 1
        self.rows = StepRows(layout.device, layout.on_host)

    @property
    def previous(self) -> list[Tensor] | None:
        """Sampled weights of the last step that was read, per tensor."""
        return self._before.parts if self._has_before else None

    @previous.setter
    def previous(self, values: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._before.parts, list(values))
        self._has_before = True

    def add(self, weights: FlatVector, grads: FlatVector) -> None:
        """Multiply the displacement since the step before with fresh gradients.

        Args:
            weights: Sampled weights, before the optimizer's step.
            grads: Sampled gradients.
        """
        before = self._before
        if self._has_before:
            before.flat.sub_(weights.flat)
            products = [torch.dot(d, g) for d, g in zip(before.parts, grads.parts, strict=True)]
            row = self.rows.row(products)
            if not isinstance(row, list):
                row = torch.cat([row, torch.dot(before.flat, before.flat)[None]])
            else:  # products that are not all zero answer for free
                row.append(float(any(row) or bool(before.flat.any())))
            self.rows.append(row)
        else:
            self.pad(1)
        self.remember(weights)

    def remember(self, weights: FlatVector) -> None:
        """Start a pair: the next displacement begins here."""
        self._before.flat.copy_(weights.flat)
        self._has_before = True

    def pad(self, pairs: int) -> None:
        """Account for pairs of which nothing is known."""
        device = self._before.flat.device
        for _ in range(pairs):
            self.rows.append(
                [math.nan] * self._columns
                if self._on_host
                else torch.full((self._columns,), math.nan, device=device)
            )

    def start_window(self) -> None:
        """Forget the products, not the weights: the next displacement counts."""
        self.rows.load(None)
