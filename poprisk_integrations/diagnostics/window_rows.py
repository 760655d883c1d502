"""A few numbers of each step of a window, without a device sync."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["StepRows"]


class StepRows:
    """One row of L numbers per step: floats on the host, tensors on an accelerator.

    On the CPU a value costs no sync, and reading L of them is cheaper than one tensor operation
    with its caches cold after a backward pass.

    Args:
        device: Of the numbers.
        on_host: Whether they may be looked at.
    """

    def __init__(self, device: torch.device, on_host: bool) -> None:
        self._device, self._on_host = device, on_host
        self._rows: list[Tensor] | list[list[float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, values: Sequence[Tensor]) -> "Tensor | list[float]":
        """0-dim tensors as one row."""
        return [v.item() for v in values] if self._on_host else torch.stack(list(values))

    def append(self, row: "Tensor | list[float]") -> None:
        """Keep a row."""
        self._rows.append(row)  # type: ignore[arg-type]

    def stacked(self) -> Tensor:
        """All rows, shape (T, L): float64 from the host, else as they are."""
        if self._on_host:
            return torch.tensor(self._rows, dtype=torch.float64)
        return torch.stack(self._rows)  # type: ignore[arg-type]

    def load(self, stacked: Tensor | None) -> None:
        """Replace all rows by those of `stacked`; None for no rows."""
        if stacked is None:
            self._rows = []
        elif self._on_host:
            self._rows = stacked.tolist()
        else:
            self._rows = list(stacked.to(self._device, torch.float32).unbind())
