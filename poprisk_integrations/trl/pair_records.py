"""Log-ratios of the pairs of all ranks, collected without communication in each step."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from poprisk_integrations.core.untrained_margins import UntrainedMargins

__all__ = ["PairRecords"]


class PairRecords:
    """Keeps what each batch says about its pairs and gathers it when it is wanted.

    Args:
        gather: Concatenates a tensor over the ranks, as `accelerator.gather`.
        beta: DPO's beta.
        margins: Gets the margins of rows that are seen for the first time in training, or None.

    Example:
        >>> records = PairRecords(lambda tensor: tensor, beta=0.5, margins=UntrainedMargins(4))
        >>> records.add("train", torch.tensor([[1.0, -1.0]]), torch.tensor([2]), step=0)
        >>> records.take("train")[1].tolist(), records.margins.margin[2].item()
        ([2], 1.0)
    """

    def __init__(
        self,
        gather: Callable[[Tensor], Tensor],
        beta: float,
        margins: UntrainedMargins | None = None,
    ) -> None:
        self.margins = margins
        self._gather = gather
        self._beta = beta
        # mode -> (log-ratios, rows and steps) of this rank, and the same of all ranks
        self._pending: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._gathered: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def add(self, mode: str, log_ratios: Tensor, rows: Tensor | None, step: int) -> None:
        """Keep a batch of this rank.

        Args:
            mode: "train" or "eval".
            log_ratios: Shape (B, 2), see `pair_log_ratios`.
            rows: Shape (B,), or None where rows have no number.
            step: Optimizer steps done.
        """
        if rows is None:
            rows = torch.full((len(log_ratios),), -1, device=log_ratios.device)
        self._pending[mode].append(
            (log_ratios, torch.stack([rows, torch.full_like(rows, step)], dim=1))
        )

    def flush(self, mode: str = "train") -> None:
        """Gather what is pending; all ranks must call it at the same step."""
        pending = self._pending.pop(mode, [])
        if not pending:
            return
        log_ratios = self._gather(torch.cat([ratios for ratios, _ in pending]))
        numbers = self._gather(torch.cat([numbers for _, numbers in pending]))
        self._gathered[mode].append((log_ratios, numbers))
        if mode == "train" and self.margins is not None:
            # In the order of the steps, not of the ranks: a row's first sight is what counts.
            order = numbers[:, 1].argsort(stable=True)
            margins = self._beta * (log_ratios[:, 0] - log_ratios[:, 1])
            self.margins.record(numbers[order, 0], margins[order], numbers[order, 1])

    def take(self, mode: str) -> tuple[Tensor, Tensor]:
        """Log-ratios, shape (N, 2), and rows, shape (N,), of all ranks since the last call."""
        self.flush(mode)
        gathered = self._gathered.pop(mode, [])
        if not gathered:
            return torch.empty(0, 2), torch.empty(0, dtype=torch.int64)
        return (
            torch.cat([ratios for ratios, _ in gathered]),
            torch.cat([numbers[:, 0] for _, numbers in gathered]),
        )
