"""Two values of each pair: gathered over the ranks, recorded at first sight, summarised."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from poprisk_integrations.core.noise_rate import UntrainedMargins

__all__ = ["PairRecords", "margin_metrics", "reward_accuracy", "reward_margins"]


def reward_margins(log_ratios: Tensor, beta: float) -> Tensor:
    """Margins beta (log-ratio of chosen - log-ratio of rejected), on TRL's scale; (B, 2) to (B,).

    Example:
        >>> reward_margins(torch.tensor([[1.0, -1.0]]), beta=0.5).tolist()
        [1.0]
    """
    return beta * (log_ratios[:, 0] - log_ratios[:, 1])


def reward_accuracy(margins: Tensor) -> Tensor:
    """1 where a pair is ranked as labelled, 0 where not, 1/2 where the rewards are equal.

    Example:
        >>> reward_accuracy(torch.tensor([1.0, 0.0, -2.0])).tolist()
        [1.0, 0.5, 0.0]
    """
    return ((margins > 0).float() + (margins >= 0).float()) / 2


def margin_metrics(margins: Tensor, suspect: Tensor | None = None) -> dict[str, float]:
    """What is logged of the margins, shape (N,), of the pairs since the last log; N > 0.

    With `suspect`, shape (N,), the quantiles of both kinds of pairs, and `poprisk/flips_fitted`:
    near 0 wrong labels are resisted, near 1 they are memorised; the accuracy on the training
    labels (TRL's `rewards/accuracies`, `accuracy`) rises with both. A host sync.

    Example:
        >>> margin_metrics(torch.tensor([1.0, 3.0]))["poprisk/margin_p50"]
        2.0
    """
    margins = margins.cpu()
    found = {
        "poprisk/reward_accuracy": float(reward_accuracy(margins).mean()),
        **_quantiles(margins, ""),
    }
    if suspect is not None:
        suspect = suspect.cpu()
        found |= _quantiles(margins[~suspect], "_clean") | _quantiles(margins[suspect], "_suspect")
        if bool(suspect.any()):
            found["poprisk/flips_fitted"] = float((margins[suspect] > 0).float().mean())
    return found


def _quantiles(margins: Tensor, kind: str) -> dict[str, float]:
    if not margins.numel():
        return {}
    p10, p50 = torch.quantile(margins, margins.new_tensor([0.1, 0.5])).tolist()
    return {f"poprisk/margin_p10{kind}": p10, f"poprisk/margin_p50{kind}": p50}


class PairRecords:
    """Keeps what each batch says about its pairs, and gathers it over the ranks when it is wanted.

    That are two values of each pair, of its chosen and of its rejected completion: log-ratios of a
    policy, or rewards, with `beta` 1. `gather` is that of the accelerator; `margins` gets the
    margins of rows that are seen for the first time in training.

    Example:
        >>> records = PairRecords(lambda tensor: tensor, beta=0.5, margins=UntrainedMargins(4))
        >>> records.add("train", torch.tensor([[1.0, -1.0]]), torch.tensor([2]), step=0)
        >>> records.take("train")[1].tolist(), records.margins.margin[2].item()
        ([2], 1.0)
    """

    def __init__(
        self, gather: Callable[[Tensor], Tensor], beta: float, margins: UntrainedMargins
    ) -> None:
        self.margins = margins
        # Whether training has begun. What is measured before, to see whether it can be, is not a
        # pair's first sight: margins of a model that has not moved say nothing.
        self.takes_sitters = False
        self._gather = gather
        self.beta = beta
        # mode -> (values, rows and steps) of this rank, and the same of all ranks
        self._pending: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._gathered: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def add(self, mode: str, values: Tensor, rows: Tensor | None, step: int) -> None:
        """Keep a batch of this rank: values (B, 2), row numbers (B,) if known, steps done.

        `mode` is "train", "eval", or "sitters" for pairs that are measured and not trained on: they
        count for `margins`, which takes the first sight of a pair whichever it is, and not for
        `take`.
        """
        if mode == "sitters" and not (self.takes_sitters and rows is not None):
            return
        if rows is None:
            rows = torch.full((len(values),), -1, device=values.device)
        numbers = torch.stack([rows, torch.full_like(rows, step)], dim=1)
        self._pending[mode].append((values, numbers))

    def flush(self, mode: str = "train") -> None:
        """Gather what is pending; all ranks must call it at the same step."""
        modes = ("train", "sitters") if mode == "train" else (mode,)
        found = {name: self._joined(self._pending.pop(name, [])) for name in modes}
        own = found[mode]
        if own is not None:
            self._gathered[mode].append(own)
        firsts = [part for part in found.values() if part is not None]
        if mode == "train" and firsts:
            values, numbers = (torch.cat(parts) for parts in zip(*firsts, strict=True))
            # In the order of the steps, not of the ranks: a row's first sight is what counts.
            order = numbers[:, 1].argsort(stable=True)
            margins = reward_margins(values, self.beta)
            self.margins.record(numbers[order, 0], margins[order], numbers[order, 1])

    def take(self, mode: str) -> tuple[Tensor, Tensor]:
        """Values, shape (N, 2), and rows, shape (N,), of all ranks since the last call."""
        self.flush(mode)
        gathered = self._gathered.pop(mode, [])
        if not gathered:
            return torch.empty(0, 2), torch.empty(0, dtype=torch.int64)
        values, numbers = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        return values, numbers[:, 0]

    def _joined(self, pending: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
        """Of all ranks; None where nothing is pending, which is so on all of them or on none."""
        if not pending:
            return None
        values, numbers = (torch.cat(parts) for parts in zip(*pending, strict=True))
        return self._gather(values), self._gather(numbers)
