"""Whether gradients of consecutive batches point the same way."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from poprisk_integrations.diagnostics.coordinate_sample import FlatVector
from poprisk_integrations.diagnostics.window_layout import WindowLayout
from poprisk_integrations.diagnostics.window_rows import StepRows

__all__ = ["GradientAgreement"]


class GradientAgreement:
    """Products of gradients one step apart, per tensor and measured step.

        U_t,l = sum_k g_{t-1,k} g_{t,k}
    Two batches with independent noise, at almost the same weights: E U = |E g|^2, the
    leave-one-out estimate with nothing to subtract, in the first pass over the data a statement
    about the population. Of a training set seen again it is unbiased for |g_S|^2 minus its own
    sampling noise, so it falls to 0 and slightly below when only noise is left. Unlike the sum
    over a window it does not see whether the steps in between undo each other, which is how
    overshooting (C < 0 < U) is told from memorising.

    Only sampled coordinates are read; the sum is scaled up when the window closes.

    Args:
        layout: The tensors and the sample.

    Attributes:
        rows: Per pair of steps U_t,l over the sample, L numbers; NaN without a step before.
    """

    def __init__(self, layout: WindowLayout) -> None:
        self._last = layout.sample.zeros()
        self._has_last = False
        self._columns, self._on_host = len(layout.locals), layout.on_host
        self.rows = StepRows(layout.device, layout.on_host)

    @property
    def last_grads(self) -> list[Tensor] | None:
        """Sampled gradients of the last step that was read, per tensor."""
        return self._last.parts if self._has_last else None

    @last_grads.setter
    def last_grads(self, values: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._last.parts, list(values))
        self._has_last = True

    def add(self, grads: FlatVector) -> None:
        """Multiply fresh gradients with those of the step before.

        Args:
            grads: Sampled gradients.
        """
        if self._has_last:
            pairs = zip(self._last.parts, grads.parts, strict=True)
            self.rows.append(self.rows.row([torch.dot(a, b) for a, b in pairs]))
        else:
            self.pad(1)
        self.remember(grads)

    def remember(self, grads: FlatVector) -> None:
        """Start a pair: the next product is with these gradients."""
        self._last.flat.copy_(grads.flat)
        self._has_last = True

    def pad(self, pairs: int) -> None:
        """Account for pairs of which nothing is known."""
        for _ in range(pairs):
            unknown = [math.nan] * self._columns
            self.rows.append(
                unknown if self._on_host else torch.tensor(unknown, device=self._last.flat.device)
            )

    def start_window(self) -> None:
        """Forget the products, not the gradients: the next product counts."""
        self.rows.load(None)
