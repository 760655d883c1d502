"""One short training of a search for a learning rate: its rates, and its losses."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from poprisk_integrations.core.learning_rate_search import warmup_decay_factor
from poprisk_integrations.distributed import mean_over_ranks

__all__ = ["RateProbe", "peak_rate"]


class RateProbe:
    """One short training: sets the rates of its steps, and keeps the losses.

    A framework calls `before_step` with the optimizer right before each of its steps, `add` with
    the loss of each micro-batch, and `after_step`; it ends its loop when `is_over`. Nothing here
    waits for a device before `losses`.

    Attributes:
        rate: Peak rate of the group with the largest one; the others keep their ratio to it.
        steps: Optimizer steps that train; the `score_batches` after them have a rate of zero.
        done: Optimizer steps taken.
    """

    def __init__(self, rate: float, steps: int, score_batches: int) -> None:
        self.rate = rate
        self.steps = steps
        self.score_batches = score_batches
        self.done = 0
        self.on_step: Callable[[], Any] = lambda: None
        self._shares: list[float] | None = None
        self._present: list[Tensor] = []  # losses of the micro-batches since the last step
        self._losses: list[Tensor] = []  # of all steps

    @property
    def is_over(self) -> bool:
        """Whether the last step was taken."""
        return self.done >= self.steps + self.score_batches

    def before_step(self, optimizer: Any) -> None:
        """Set the rates of the step to come."""
        groups = optimizer.param_groups
        if self._shares is None:
            peaks = [peak_rate(group) for group in groups]
            self._shares = [peak / max(peaks) for peak in peaks]
        factor = self.rate * warmup_decay_factor(self.done, self.steps)
        for group, share in zip(groups, self._shares, strict=True):
            rate = share * factor
            # A captured graph reads the tensor of a capturable optimizer.
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate

    def add(self, loss: Tensor) -> None:
        """Take in what one micro-batch adds to the loss of its step."""
        self._present.append(loss.detach().float().reshape(()))

    def after_step(self) -> None:
        """The step was taken. One without a loss has none that is finite."""
        loss = torch.stack(self._present).sum() if self._present else torch.tensor(math.nan)
        self._losses.append(loss)
        self._present = []
        self.done += 1
        self.on_step()

    def losses(self) -> list[float]:
        """Of all steps, the same on all ranks, each of which must call: their mean over ranks."""
        device = self._losses[0].device
        losses = torch.stack([loss.to(device) for loss in self._losses])
        values: list[float] = mean_over_ranks(losses).tolist()
        return values


def peak_rate(group: dict[str, Any]) -> float:
    """The rate that a group is meant to reach, whatever a schedule has made of it by now.

    Raises:
        ValueError: If there is none above zero to keep the ratios of.

    Example:
        >>> peak_rate({"lr": 1e-6, "initial_lr": 1e-3}), peak_rate({"lr": 0.1, "max_lr": 0.5})
        (0.001, 0.5)
    """
    rate = next((group[key] for key in ("max_lr", "initial_lr", "lr") if key in group), None)
    if rate is None or float(rate) <= 0.0:
        raise ValueError(
            f"Invalid lr: {rate} in a parameter group. A search keeps the ratios of the groups' "
            "rates and needs one above 0 in each; an optimizer that sets its own has none to find."
        )
    return float(rate)
