"""What a window adds up: g and g^2 per coordinate, norms per step, products over pairs of steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.core.window import coordinate_ratio
from poprisk_integrations.diagnostics.window_layout import (
    FlatVector,
    PendingSteps,
    WindowLayout,
    real_view,
)
from poprisk_integrations.distributed import is_dtensor, mean_over_ranks

__all__ = ["WindowBuffers"]


class _Sums:
    """A = sum of g and Q = sum of g^2 per coordinate, by position of the tensor.

    `measured` is the number of coordinates behind each number, over all shards.
    """

    measured: Tensor

    def __init__(self, layout: WindowLayout) -> None:
        self._layout = layout
        self._sums: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}
        self._zero = torch.zeros((), device=layout.device)

    def coordinate_ratios(self, steps: int | Tensor) -> Tensor:
        """`core.coordinate_ratio` of the local shards, shape (2, L)."""
        nothing = self._zero.expand(2)
        parts = [
            coordinate_ratio(self._sums[i], self._squares[i], steps) if i in self._sums else nothing
            for i in range(len(self._layout.locals))
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

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Copies, by position."""
        both = {"sums": self._sums, "squares": self._squares}
        return {key: {str(i): t.clone() for i, t in own.items()} for key, own in both.items()}

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take copies of what `state` gave."""
        for key, own in (("sums", self._sums), ("squares", self._squares)):
            for i, tensor in state[key].items():
                self._buffer(own, int(i)).copy_(tensor)

    def _buffer(self, own: dict[int, Tensor], position: int) -> Tensor:
        return own[position]


class ExactSums(_Sums):
    """Two fp32 buffers per tensor, made when its first gradient comes."""

    def __init__(self, layout: WindowLayout) -> None:
        super().__init__(layout)
        self.measured = layout.numel
        self._present: list[int] = []
        self._targets: tuple[list[Tensor], list[Tensor]] = [], []

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
        """A += scale g, Q += (scale g)^2; where `keep`, a bool on the device, is False nothing."""
        present = [i for i, grad in enumerate(grads) if grad is not None]
        values = [grad for grad in grads if grad is not None]
        if present != self._present:  # else the lists of the last call serve again
            self._present = present
            sums = [self._buffer(self._sums, i) for i in present]
            self._targets = sums, [self._buffer(self._squares, i) for i in present]
        if keep is None:
            if present:
                torch._foreach_add_(self._targets[0], values, alpha=scale)  # type: ignore[arg-type]
                torch._foreach_addcmul_(self._targets[1], values, values, value=scale**2)  # type: ignore[arg-type]
            return
        for i, grad in zip(present, values, strict=True):
            # A factor of 0 would not do: NaN * 0 is NaN.
            kept = torch.where(keep, grad, self._zero.to(grad.dtype)).float()
            if isinstance(scale, Tensor) or scale != 1.0:
                kept = kept * scale
            self._sums[i].add_(kept)
            self._squares[i].addcmul_(kept, kept)

    def _buffer(self, own: dict[int, Tensor], position: int) -> Tensor:
        if position not in own:
            # The memory layout of the parameter makes the sums after a resume the same bits.
            like = self._layout.locals[position]
            own[position] = torch.zeros_like(like, dtype=torch.float32)
        return own[position]


class SampledSums(_Sums):
    """Two flat fp32 vectors over the sampled coordinates of all tensors."""

    def __init__(self, layout: WindowLayout) -> None:
        super().__init__(layout)
        self.measured = layout.sampled
        self._flat = layout.sample.zeros(), layout.sample.zeros()
        self._sums, self._squares = (dict(enumerate(vector.parts)) for vector in self._flat)

    def norms(self, grads: FlatVector) -> list[Tensor]:
        """|g_l| over the sampled coordinates."""
        return list(torch._foreach_norm(grads.parts))

    def add_(self, grads: FlatVector, scale: float | Tensor, keep: Tensor | None) -> None:
        """A += g, Q += g^2; the sample was scaled when it was read."""
        flat = grads.flat if keep is None else torch.where(keep, grads.flat, self._zero)
        self._flat[0].flat.add_(flat)
        self._flat[1].flat.addcmul_(flat, flat)


class StepRows:
    """One row of so many `columns` per step, without a device sync.

    Floats on the host, tensors on an accelerator: on the CPU a value costs no sync, and reading L
    of them is cheaper than one tensor operation with its caches cold after a backward pass.
    """

    def __init__(self, layout: WindowLayout, columns: int) -> None:
        self._device, self._on_host = layout.device, layout.on_host
        self._columns = columns
        self._rows: list[Any] = []

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, values: Sequence[Tensor]) -> Tensor | list[float]:
        """0-dim tensors as one row."""
        return [v.item() for v in values] if self._on_host else torch.stack(list(values))

    def append(self, row: Tensor | list[float]) -> None:
        """Keep a row."""
        self._rows.append(row)

    def pad(self, rows: int) -> None:
        """Rows of which nothing is known."""
        unknown = torch.full((rows, self._columns), math.nan, device=self._device)
        self._rows += unknown.tolist() if self._on_host else unknown.unbind()

    def stacked(self) -> Tensor:
        """All rows, shape (T, columns): float64 from the host, else as they are."""
        if self._rows and not self._on_host:
            return torch.stack(self._rows)
        rows = torch.tensor(self._rows, dtype=torch.float64, device=self._device)
        return rows.view(-1, self._columns)

    def load(self, stacked: Tensor | None) -> None:
        """Replace all rows by those of `stacked`; None for no rows."""
        if stacked is None:
            self._rows = []
        elif self._on_host:
            self._rows = stacked.tolist()
        else:
            self._rows = list(stacked.to(self._device, torch.float32).unbind())


class StepPairs:
    """Products over pairs of consecutive steps, per tensor, on the sampled coordinates.

        P_t,l = - sum_k (w_{t-1,k} - w_{t-2,k}) g_{t,k}      gain of repeating the last step
        U_t,l = sum_k g_{t-1,k} g_{t,k}                      agreement of consecutive batches
    P is the last displacement, whatever made it (preconditioner, momentum, gate, rounding, weight
    decay), times the gradient of a batch that it has not seen. The two noises are independent, so
    nothing is subtracted: in the first pass over the data E P_t is the first-order decrease of the
    population's loss if that step were repeated. It is not clamped: it is negative while the
    weights oscillate, or where the steps go after noise.

    U is of two batches with independent noise at almost the same weights: E U = |E g|^2. Of a
    training set seen again it is unbiased for |g_S|^2 minus its own sampling noise, so it falls to
    0 and slightly below when only noise is left. Unlike the sum over a window it does not see
    whether the steps in between undo each other, which is how overshooting (C < 0 < U) is told
    from memorising.

    A row of `rows` is a pair: U of all tensors, P of all tensors, and whether any weight has moved
    (> 0). It is NaN where there was no step before.
    """

    def __init__(self, layout: WindowLayout) -> None:
        self._weights, self._grads = layout.sample.zeros(), layout.sample.zeros()
        self._has_last = False
        self._tensors = len(layout.locals)
        self.rows = StepRows(layout, 2 * self._tensors + 1)

    def add(self, weights: FlatVector, grads: FlatVector, *, is_second: bool) -> None:
        """Take in a step, from before the optimizer's: it completes a pair, or starts one."""
        if is_second and self._has_last:
            moved = self._weights
            moved.flat.sub_(weights.flat)
            pairs = zip([*self._grads.parts, *moved.parts], grads.parts * 2, strict=True)
            row = self.rows.row([torch.dot(a, b) for a, b in pairs])
            if isinstance(row, list):  # products that are not all zero answer for free
                row.append(float(any(row[self._tensors :]) or bool(moved.flat.any())))
            else:
                row = torch.cat([row, torch.dot(moved.flat, moved.flat)[None]])
            self.rows.append(row)
        elif is_second:
            self.rows.pad(1)
        self._weights.flat.copy_(weights.flat)
        self._grads.flat.copy_(grads.flat)
        self._has_last = True

    def reduced(self, layout: WindowLayout) -> list[Tensor]:
        """U and P over all shards, shape (T, 2, L), and whether a weight has moved on any."""
        rows = self.rows.stacked()
        sums = layout.sum(rows[:, :-1].reshape(-1, 2, self._tensors))
        return [sums, layout.max(rows[:, -1:])]

    def state(self) -> dict[str, Any]:
        """The last step, and the products so far."""
        if not self._has_last:
            return {}
        last = {"previous": self._weights.parts, "last_grads": self._grads.parts}
        state: dict[str, Any] = {
            key: {str(i): t.clone() for i, t in enumerate(parts)} for key, parts in last.items()
        }
        if self.rows:
            rows = self.rows.stacked()
            state["agreements"] = rows[:, : self._tensors].clone()
            state["products"] = rows[:, self._tensors :].clone()
        return state

    def load(self, state: Mapping[str, Any], pairs: int) -> None:
        """Take copies of what `state` gave; of `pairs` pairs, unless the stride was another."""
        both = (("previous", self._weights.parts), ("last_grads", self._grads.parts))
        self._has_last = all(state[key] for key, _ in both)
        if self._has_last:
            for key, parts in both:
                torch._foreach_copy_(parts, [state[key][str(i)] for i in range(self._tensors)])
        saved = state["agreements"], state["products"]
        if any(rows is None or len(rows) != pairs for rows in saved):
            self.rows.pad(pairs)
        else:
            self.rows.load(torch.cat(saved, 1))


class WindowBuffers:
    """The buffers of a window over one list of tensors.

    `stride`: every how many steps a pair of consecutive ones ends; None to measure no pairs.
    """

    def __init__(self, layout: WindowLayout, stride: int | None) -> None:
        self.layout = layout
        self._stride = stride or 1
        is_exact = layout.accumulator == "exact"
        self.sums: Any = ExactSums(layout) if is_exact else SampledSums(layout)
        self._norm_sq = StepRows(layout, len(layout.locals))  # |g_t,l|^2 of every step
        self.pairs = None if stride is None else StepPairs(layout)
        is_read = self.pairs is not None or not is_exact
        self._pending = PendingSteps(layout, self.pairs is not None) if is_read else None
        self._taken = 0  # steps with gradients, finite or not, and so with a row of norms
        self._is_plain = True  # no gradient is sparse, complex or float64, as of the first step

    @property
    def is_empty(self) -> bool:
        """Whether no step had gradients."""
        return self._taken == 0

    def add(
        self, tensors: Sequence[Tensor], grads: Sequence[Tensor | None], scale: float | Tensor
    ) -> None:
        """Take in a step."""
        if self._taken == 0:
            self._is_plain = all(g is None or _is_plain(g) for g in grads)
        if not self._is_plain:
            grads = [None if g is None else _plain(g) for g in grads]
        read = self.layout.to_locals(grads)
        scale = _plain_scale(scale, self.layout.on_host)
        is_exact = isinstance(self.sums, ExactSums)
        if is_exact:
            self._count(read, scale)
        phase = self._taken % self._stride
        self._taken += 1
        is_paired = self.pairs is not None and phase >= self._stride - 2
        if self._pending is not None and (is_paired or not is_exact):
            weights = self.layout.to_locals(tensors) if is_paired else None
            self._pending.read(read, scale, weights, phase == self._stride - 1)
            if self._pending.is_full:
                self._work_off()

    def _count(self, grads: Sequence[Tensor | None] | FlatVector, scale: float | Tensor) -> None:
        """Add one step to the sums, if it is finite, and its norms to the rows."""
        row = self._norm_sq.row(self.sums.norms(grads))
        if isinstance(row, list):
            row = [(norm * scale) ** 2 for norm in row]  # type: ignore[misc]
        else:
            row = (row * scale).square_()
        if self.layout.is_sharded:  # the same verdict on all shards: the total is finite or not
            row = self.layout.sum_row(row)
        self._norm_sq.append(row)
        if not isinstance(row, list):
            self.sums.add_(grads, scale, torch.isfinite(row.sum()))
        elif math.isfinite(sum(row)):
            self.sums.add_(grads, scale, None)

    @torch.no_grad()
    def _work_off(self) -> None:
        """Count the steps that were only read."""
        for grads, weights, is_second in () if self._pending is None else self._pending.drain():
            if isinstance(self.sums, SampledSums):
                self._count(grads, 1.0)
            if weights is not None and self.pairs is not None:
                self.pairs.add(weights, grads, is_second=is_second)

    def reduced(self) -> list[Tensor]:
        """All numbers of the window, over shards and ranks, in float64 on the host."""
        self._work_off()
        layout, norm_sq = self.layout, self._norm_sq.stacked()
        counted = norm_sq.sum(1).isfinite().sum()
        blocks = [
            norm_sq,
            layout.sum(self.sums.norms_of_sum().square()),
            layout.sum(self.sums.coordinate_ratios(int(counted) if layout.on_host else counted)),
        ]
        if self.pairs is not None:
            blocks += self.pairs.reduced(layout)
        flat = mean_over_ranks(torch.cat([block.flatten() for block in blocks])).double().cpu()
        parts = flat.split_with_sizes([block.numel() for block in blocks])
        return [part.view(block.shape) for part, block in zip(parts, blocks, strict=True)]

    def start_window(self) -> None:
        """Empty sums and rows; the last step is kept for the next pair."""
        self._work_off()
        self._taken = 0
        self.sums.zero_()
        self._norm_sq.load(None)
        if self.pairs is not None:
            self.pairs.rows.load(None)

    def state(self) -> dict[str, Any]:
        """What was measured."""
        self._work_off()
        state: dict[str, Any] = {"accumulator": self.layout.accumulator}
        if self._norm_sq:
            norm_sq = self._norm_sq.stacked()
            state |= {**self.sums.state(), "norm_sq": norm_sq}
            state["counted"] = norm_sq.sum(1).isfinite().sum()
        return state if self.pairs is None else {**state, **self.pairs.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take copies of what `state` gave."""
        self.sums.load(state)
        self._norm_sq.load(state["norm_sq"])
        self._taken = len(self._norm_sq)
        if self.pairs is not None:
            self.pairs.load(state, self._taken // self._stride)


def _is_plain(grad: Tensor) -> bool:
    is_wide = grad.dtype is torch.float64 or grad.is_complex()
    return grad.layout is torch.strided and not is_wide


def _plain(grad: Tensor) -> Tensor:
    """Dense, real and fp32 at most, as the window's buffers are."""
    plain = real_view(grad if grad.layout is torch.strided else grad.to_dense())
    return plain.float() if plain.dtype is torch.float64 else plain


def _plain_scale(scale: float | Tensor, on_host: bool) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return scale
    if is_dtensor(scale):
        scale = scale.full_tensor()  # type: ignore[attr-defined]
    return float(scale) if on_host else scale.to(torch.float32)  # type: ignore[union-attr]
