"""Sampled values of a few steps, read at once and worked off together."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from poprisk_integrations.diagnostics.coordinate_sample import FlatVector
from poprisk_integrations.diagnostics.window_layout import WindowLayout

__all__ = ["PendingSteps"]

ROWS = 8


class PendingSteps:
    """Up to eight steps that were read and are not yet counted.

    After a backward pass code and caches are cold: of a small model the first operation costs
    up to 80 us, whatever its size, a repeated one a few. So `GradientWindow` only copies at each
    step and does the arithmetic of eight steps in a row; the sums are the same bits. On an
    accelerator, where nothing is gained, and on shards, which have to agree at each step on
    what is finite, steps do not wait.

    Args:
        layout: The tensors and the sample.
        with_weights: Whether weights are read too.
    """

    def __init__(self, layout: WindowLayout, with_weights: bool) -> None:
        rows = ROWS if layout.on_host and not layout.is_sharded else 1
        self._sample = layout.sample
        self._grads = [layout.sample.zeros() for _ in range(rows)]
        self._weights = [layout.sample.zeros() for _ in range(rows if with_weights else 0)]
        self._kinds: list[bool | None] = []

    @property
    def is_full(self) -> bool:
        """Whether they have to be worked off before the next step."""
        return len(self._kinds) == len(self._grads)

    def read(
        self,
        grads: Sequence[Tensor | None],
        scale: float | Tensor,
        weights: Sequence[Tensor] | None,
        is_second: bool,
    ) -> None:
        """Copy what is sampled of one step.

        Args:
            grads: Local shards.
            scale: Multiplies them.
            weights: Local shards; None if the step belongs to no pair.
            is_second: Whether the step completes a pair.
        """
        row = len(self._kinds)
        self._sample.read(grads, self._grads[row])
        if isinstance(scale, Tensor) or scale != 1.0:
            self._grads[row].flat.mul_(scale)
        if weights is not None:
            self._sample.read(weights, self._weights[row])
        self._kinds.append(None if weights is None else is_second)

    def drain(self) -> Iterator[tuple[FlatVector, FlatVector | None, bool]]:
        """Gradients, weights and `is_second` of each step, in order; forgets them."""
        kinds, self._kinds = self._kinds, []
        for row, kind in enumerate(kinds):
            weights = None if kind is None else self._weights[row]
            yield self._grads[row], weights, bool(kind)
