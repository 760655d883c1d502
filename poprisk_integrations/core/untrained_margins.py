"""Margins of pairs, each taken before the pair was trained on."""

import torch
from torch import Tensor

__all__ = ["UntrainedMargins"]

SMALLEST_SHARE = 0.05  # of the usual size, below which margins are those of an unmoved model


class UntrainedMargins:
    """A record that keeps the first margin of every pair, and no later one.

    A model fits the labels it was trained on, wrong ones too: margins of pairs that were trained on
    say nothing about whether a label is wrong. The noise rate and the flip report are made from
    this record alone, and this record takes a margin only at a pair's first sight, which in
    training is the forward pass before its first update. Nothing replaces it afterwards.

    Args:
        num_pairs: Number of rows of the data set.

    Attributes:
        margin: Shape (num_pairs,), fp64, NaN where there is none yet. Reward units.
        step: Shape (num_pairs,), int64: optimizer steps done when it was taken, -1 where there is
            none.

    Example:
        >>> record = UntrainedMargins(3)
        >>> record.record(torch.tensor([2, 0]), torch.tensor([0.5, -1.0]), step=0)
        >>> record.record(torch.tensor([0]), torch.tensor([7.0]), step=4)  # has been trained on
        >>> record.margin.tolist()
        [-1.0, nan, 0.5]
    """

    def __init__(self, num_pairs: int) -> None:
        self.margin = torch.full((num_pairs,), torch.nan, dtype=torch.float64)
        self.step = torch.full((num_pairs,), -1, dtype=torch.int64)

    def __len__(self) -> int:
        """Rows of the data set."""
        return len(self.margin)

    @property
    def seen(self) -> Tensor:
        """Boolean, shape (num_pairs,): rows that have a margin."""
        return self.step >= 0

    @property
    def judged(self) -> Tensor:
        """Boolean, shape (num_pairs,): rows whose margin says something about their label.

        Not those of the first steps, up to the first whose margins have at least a twentieth of the
        usual size: the model, a copy of the reference at first, had seen nothing. Nor a margin of
        exactly zero.
        """
        judged = self.margin.isfinite() & (self.margin != 0)
        if not judged.any():
            return judged
        size = self.margin[judged].abs()
        steps, place = torch.unique(self.step[judged], return_inverse=True)
        largest = torch.zeros(len(steps), dtype=size.dtype).scatter_reduce(0, place, size, "amax")
        moved = int(steps[largest >= SMALLEST_SHARE * size.median()][0])
        return judged & (self.step >= moved)

    def record(self, rows: Tensor, margins: Tensor, step: int | Tensor) -> None:
        """Take the margins of rows that have none; of a row that occurs twice, the first.

        Args:
            rows: Shape (k,), row numbers; negative ones (padding) are left out.
            margins: Shape (k,), reward units. One that is not finite counts as seen, and stays NaN.
            step: Optimizer steps done before, >= 0; one number or shape (k,).

        Raises:
            IndexError: If a row is not below `num_pairs`.
        """
        rows = rows.detach().cpu().to(torch.int64)
        margins = margins.detach().cpu().to(torch.float64)
        steps = torch.as_tensor(step, dtype=torch.int64).cpu().expand(rows.shape)
        if rows.numel() and int(rows.max()) >= len(self):
            raise IndexError(f"row {int(rows.max())} of a data set of {len(self)} rows")
        numbered = torch.nonzero(rows >= 0).squeeze(1)
        new = numbered[~self.seen[rows[numbered]]]
        first = torch.full_like(self.step, len(rows))
        first.scatter_reduce_(0, rows[new], new, "amin")
        first = first[first < len(rows)]
        self.margin[rows[first]] = torch.where(
            margins[first].isfinite(), margins[first], torch.full_like(margins[first], torch.nan)
        )
        self.step[rows[first]] = steps[first]

    def state_dict(self) -> dict[str, Tensor]:
        """The record as two tensors."""
        return {"margin": self.margin, "step": self.step}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the place of what is recorded.

        Raises:
            ValueError: If the record is of a data set of another size.
        """
        if len(state["margin"]) != len(self):
            raise ValueError(
                f"The recorded margins are of {len(state['margin'])} pairs, the data have "
                f"{len(self)}."
            )
        self.margin = state["margin"].to(torch.float64).clone()
        self.step = state["step"].to(torch.int64).clone()
