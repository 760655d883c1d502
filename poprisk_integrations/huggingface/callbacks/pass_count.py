"""How much of a pass over the data was drawn, and the windows that follow from its length."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from poprisk_integrations.diagnostics import auto_window_steps
from poprisk_integrations.diagnostics.data_pass import DataPass, data_pass
from poprisk_integrations.distributed import world_size
from poprisk_integrations.huggingface.callbacks.epoch_length import steps_per_epoch

__all__ = ["PassCount", "WindowPlan"]


@dataclass(frozen=True)
class WindowPlan:
    """What follows from the length of a pass and the accumulation, which may change.

    Attributes:
        window: Optimizer steps of a window.
        epoch_steps: Optimizer steps of one pass; None if unknown.
        accumulation: Micro-batches per optimizer step.
    """

    window: int
    epoch_steps: int | None
    accumulation: int


class PassCount:
    """The length of a pass, from the data or from the user, never from Trainer's epochs.

    Args:
        loader: This process's data loader, as Trainer hands it to callbacks.
        asked: Optimizer steps of one pass by the user's word; None to look at the loader.
        device: Of the ranks' communication: with several, all must make this object together.

    Attributes:
        found: What the loader shows; `batches` are micro-batches of this process, of the rank that
            has most.
    """

    def __init__(self, loader: Any, asked: int | None, device: Any = None) -> None:
        # Not the loader itself: callbacks are copied and pickled.
        self._epoch_batches = steps_per_epoch(loader, 1)
        self._asked = asked
        self.found: DataPass = data_pass(loader)
        if world_size() > 1 and device is not None:
            # Loaders of the user's own may differ: windows must close on all ranks together.
            lengths = (self.found.batches, self._epoch_batches)
            known = [math.inf if length is None else length for length in lengths]
            tensor = torch.tensor(known, dtype=torch.float64, device=device)
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
            largest = [None if math.isinf(n) else int(n) for n in tensor.tolist()]
            reason = self.found.reason or "another rank's loader does not show it"
            is_known = largest[0] is not None
            self.found = DataPass(batches=largest[0], reason="" if is_known else reason)
            self._epoch_batches = largest[1]

    def epoch_steps(self, accumulation: int) -> int | None:
        """Optimizer steps of one pass; None if unknown.

        Args:
            accumulation: Micro-batches per optimizer step, but for the last one of an epoch.
        """
        if self._asked is not None or self.found.batches is None:
            return self._asked
        batches = self._epoch_batches or self.found.batches
        each = -(-batches // accumulation)  # the last step of an epoch may take fewer
        return max(1, -(-self.found.batches * each // batches))

    def is_over(self, steps: int, batches: int) -> bool:
        """Whether a window that begins now holds examples that were trained on before.

        Args:
            steps: Optimizer steps so far.
            batches: Micro-batches that this process has drawn so far.
        """
        if self._asked is not None:
            return steps >= self._asked
        return self.found.batches is not None and batches >= self.found.batches

    def plan(self, window: int | str, max_steps: int, accumulation: int) -> WindowPlan:
        """The windows of a run.

        Args:
            window: As the callback was given it.
            max_steps: Of the run.
            accumulation: Micro-batches per optimizer step.
        """
        epoch = self.epoch_steps(accumulation)
        if not isinstance(window, int):
            window = auto_window_steps(epoch if window == "third" and epoch else max_steps, epoch)
        return WindowPlan(window=window, epoch_steps=epoch, accumulation=accumulation)
