"""The sums A_l = sum_t g_t of a window: of all coordinates, or of the sampled ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from poprisk_integrations.diagnostics.coordinate_sample import FlatVector
from poprisk_integrations.diagnostics.window_layout import WindowLayout

__all__ = ["ExactSums", "SampledSums"]


class ExactSums:
    """One fp32 buffer per tensor, made when its first gradient comes.

    Args:
        layout: The tensors.

    Attributes:
        measured: Coordinates behind each number, over all shards.
        norms_are_scaled: Whether `norms` has seen the scale.
    """

    norms_are_scaled = False

    def __init__(self, layout: WindowLayout) -> None:
        self._layout = layout
        self.measured = layout.numel
        self._sums: dict[int, Tensor] = {}
        self._zero = torch.zeros((), device=layout.device)

    def norms(self, grads: Sequence[Tensor | None], sampled: FlatVector | None) -> list[Tensor]:
        """|g_l| of the local shards before scaling, L 0-dim tensors, fp32."""
        present = [g for g in grads if g is not None]
        if len(present) == len(grads):
            return list(torch._foreach_norm(present, 2, torch.float32))
        found = iter(torch._foreach_norm(present, 2, torch.float32) if present else ())
        return [self._zero if g is None else next(found) for g in grads]

    def add_(
        self,
        grads: Sequence[Tensor | None],
        sampled: FlatVector | None,
        scale: float | Tensor,
        keep: Tensor | None,
    ) -> None:
        """A_l += scale g_l.

        Args:
            grads: Local shards.
            sampled: Ignored.
            scale: A number where values may be looked at.
            keep: 0-dim bool on the device; False adds nothing. None adds.
        """
        for i, grad in enumerate(grads):
            if grad is not None and i not in self._sums:
                self._sums[i] = torch.zeros_like(grad, dtype=torch.float32)
        sums = [self._sums[i] for i, g in enumerate(grads) if g is not None]
        present = [g for g in grads if g is not None]
        if keep is None:
            assert not isinstance(scale, Tensor)
            if sums:
                torch._foreach_add_(sums, present, alpha=scale)
            return
        for total, grad in zip(sums, present, strict=True):
            # A factor of 0 would not do: NaN * 0 is NaN.
            kept = torch.where(keep, grad, self._zero.to(grad.dtype))
            if isinstance(scale, Tensor):
                total.addcmul_(kept, scale)
            else:
                total.add_(kept, alpha=scale)

    def norms_of_sum(self) -> Tensor:
        """|A_l| of the local shards, shape (L,)."""
        sums = [self._sums.get(i, self._zero) for i in range(len(self._layout.tensors))]
        return torch.stack(torch._foreach_norm(sums))

    def zero_(self) -> None:
        """Start afresh in the same buffers."""
        if self._sums:
            torch._foreach_zero_(list(self._sums.values()))

    def state(self) -> dict[str, Tensor]:
        """Copies of the sums, by position."""
        return {str(i): t.clone() for i, t in self._sums.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take copies of saved sums."""
        for i, tensor in state.items():
            like = self._layout.locals[int(i)]  # its memory layout makes the next sums bitwise
            self._sums[int(i)] = torch.zeros_like(like, dtype=torch.float32).copy_(tensor)


class SampledSums:
    """One flat fp32 vector over the sampled coordinates of all tensors.

    Args:
        layout: The tensors and the sample.

    Attributes:
        measured: Coordinates behind each number, over all shards.
        norms_are_scaled: Whether `norms` has seen the scale.
    """

    norms_are_scaled = True

    def __init__(self, layout: WindowLayout) -> None:
        self.measured = layout.sampled
        self._sums = layout.sample.zeros()
        self._zero = torch.zeros((), device=layout.device)

    def norms(self, grads: Sequence[Tensor | None], sampled: FlatVector | None) -> list[Tensor]:
        """|g_l| over the sampled coordinates, which hold it scaled."""
        assert sampled is not None
        return list(torch._foreach_norm(sampled.parts))

    def add_(
        self,
        grads: Sequence[Tensor | None],
        sampled: FlatVector | None,
        scale: float | Tensor,
        keep: Tensor | None,
    ) -> None:
        """A_l += g_l, both over the sampled coordinates; arguments as in `ExactSums.add_`."""
        assert sampled is not None
        flat = sampled.flat
        self._sums.flat.add_(flat if keep is None else torch.where(keep, flat, self._zero))

    def norms_of_sum(self) -> Tensor:
        """|A_l| over the sampled coordinates, shape (L,)."""
        return torch.stack(torch._foreach_norm(self._sums.parts))

    def zero_(self) -> None:
        """Start afresh in the same buffer."""
        self._sums.flat.zero_()

    def state(self) -> dict[str, Tensor]:
        """Copies of the sums, by position."""
        return {str(i): t.clone() for i, t in enumerate(self._sums.parts)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take copies of saved sums."""
        for i, tensor in state.items():
            self._sums.parts[int(i)].copy_(tensor)
