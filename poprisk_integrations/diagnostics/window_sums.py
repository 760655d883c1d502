"""Sums of a window, of g and of g^2 per coordinate: of all coordinates, or of the sampled ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from poprisk_integrations.core.window import coordinate_ratio
from poprisk_integrations.diagnostics.coordinate_sample import FlatVector
from poprisk_integrations.diagnostics.window_layout import WindowLayout

__all__ = ["ExactSums", "SampledSums"]


class ExactSums:
    """Two fp32 buffers per tensor, made when its first gradient comes.

    Args:
        layout: The tensors.

    Attributes:
        measured: Coordinates behind each number, over all shards.
    """

    def __init__(self, layout: WindowLayout) -> None:
        self._layout = layout
        self.measured = layout.numel
        self._sums: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}
        self._present: list[int] = []
        self._targets: tuple[list[Tensor], list[Tensor]] = [], []
        self._zero = torch.zeros((), device=layout.device)

    def norms(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """|g_l| of the local shards before scaling, L 0-dim tensors, fp32."""
        present = [g for g in grads if g is not None]
        norms = torch._foreach_norm(present, 2, torch.float32) if present else ()
        if len(present) == len(grads):
            return list(norms)
        found = iter(norms)
        return [self._zero if g is None else next(found) for g in grads]

    def add_(
        self, grads: Sequence[Tensor | None], scale: float | Tensor, keep: Tensor | None
    ) -> None:
        """A += scale g, Q += (scale g)^2.

        Args:
            grads: Local shards.
            scale: A number where values may be looked at.
            keep: 0-dim bool on the device; False adds nothing. None adds.
        """
        present = [i for i, grad in enumerate(grads) if grad is not None]
        values = [grad for grad in grads if grad is not None]
        if present != self._present:  # else the lists of the last call serve again
            for i, grad in zip(present, values, strict=True):
                if i not in self._sums:
                    self._sums[i] = torch.zeros_like(grad, dtype=torch.float32)
                    self._squares[i] = torch.zeros_like(grad, dtype=torch.float32)
            self._present = present
            self._targets = [self._sums[i] for i in present], [self._squares[i] for i in present]
        if keep is None:
            assert not isinstance(scale, Tensor)
            if present:
                torch._foreach_add_(self._targets[0], values, alpha=scale)
                torch._foreach_addcmul_(self._targets[1], values, values, value=scale**2)
            return
        for i, grad in zip(present, values, strict=True):
            # A factor of 0 would not do: NaN * 0 is NaN.
            kept = torch.where(keep, grad, self._zero.to(grad.dtype)).float()
            if isinstance(scale, Tensor) or scale != 1.0:
                kept = kept * scale
            self._sums[i].add_(kept)
            self._squares[i].addcmul_(kept, kept)

    def coordinate_ratios(self, steps: int | Tensor) -> Tensor:
        """`core.coordinate_ratio` of the local shards, shape (2, L)."""
        nothing = self._zero.expand(2)
        positions = range(len(self._layout.locals))
        parts = [
            coordinate_ratio(self._sums[i], self._squares[i], steps) if i in self._sums else nothing
            for i in positions
        ]
        return torch.stack(parts, 1)

    def norms_of_sum(self) -> Tensor:
        """|A_l| of the local shards, shape (L,)."""
        sums = [self._sums.get(i, self._zero) for i in range(len(self._layout.locals))]
        return torch.stack(torch._foreach_norm(sums))

    def zero_(self) -> None:
        """Start afresh in the same buffers."""
        if self._sums:
            torch._foreach_zero_([*self._sums.values(), *self._squares.values()])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the sums and of the sums of squares, by position."""
        return (
            {str(i): t.clone() for i, t in self._sums.items()},
            {str(i): t.clone() for i, t in self._squares.items()},
        )

    def load(self, sums: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> None:
        """Take copies of saved sums."""
        for saved, own in ((sums, self._sums), (squares, self._squares)):
            for i, tensor in saved.items():
                like = self._layout.locals[int(i)]  # its memory layout makes the next sums bitwise
                own[int(i)] = torch.zeros_like(like, dtype=torch.float32).copy_(tensor)
        self._present = []


class SampledSums:
    """Two flat fp32 vectors over the sampled coordinates of all tensors.

    Args:
        layout: The tensors and the sample.

    Attributes:
        measured: Coordinates behind each number, over all shards.
    """

    def __init__(self, layout: WindowLayout) -> None:
        self.measured = layout.sampled
        self._sums, self._squares = layout.sample.zeros(), layout.sample.zeros()
        self._zero = torch.zeros((), device=layout.device)

    def norms(self, grads: FlatVector) -> list[Tensor]:
        """|g_l| over the sampled coordinates."""
        return list(torch._foreach_norm(grads.parts))

    def add_(self, grads: FlatVector, scale: float | Tensor, keep: Tensor | None) -> None:
        """A += g, Q += g^2.

        Args:
            grads: Sampled, scaled already.
            scale: Ignored.
            keep: As in `ExactSums.add_`.
        """
        flat = grads.flat if keep is None else torch.where(keep, grads.flat, self._zero)
        self._sums.flat.add_(flat)
        self._squares.flat.addcmul_(flat, flat)

    def coordinate_ratios(self, steps: int | Tensor) -> Tensor:
        """`core.coordinate_ratio` over the sampled coordinates, shape (2, L)."""
        pairs = zip(self._sums.parts, self._squares.parts, strict=True)
        return torch.stack([coordinate_ratio(a, q, steps) for a, q in pairs], 1)

    def norms_of_sum(self) -> Tensor:
        """|A_l| over the sampled coordinates, shape (L,)."""
        return torch.stack(torch._foreach_norm(self._sums.parts))

    def zero_(self) -> None:
        """Start afresh in the same buffers."""
        self._sums.flat.zero_()
        self._squares.flat.zero_()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Copies of the sums and of the sums of squares, by position."""
        return (
            {str(i): t.clone() for i, t in enumerate(self._sums.parts)},
            {str(i): t.clone() for i, t in enumerate(self._squares.parts)},
        )

    def load(self, sums: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> None:
        """Take copies of saved sums."""
        for saved, own in ((sums, self._sums), (squares, self._squares)):
            for i, tensor in saved.items():
                own.parts[int(i)].copy_(tensor)
