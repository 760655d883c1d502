"""How long a run, a pass over its data and a window are, and whether a stop can work in that time.

In optimizer steps: plain numbers in.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from poprisk_integrations.diagnostics.data_pass import DataPass
from poprisk_integrations.diagnostics.stop_options import SHORTEST_WINDOW
from poprisk_integrations.distributed import world_size

__all__ = [
    "SHORTEST_AUTO_WINDOW",
    "SHORTEST_WINDOW",
    "RunPlan",
    "StopOutlook",
    "agree_on",
    "auto_window_steps",
    "epoch_steps",
    "pass_steps",
    "setup_changes",
    "stop_outlook",
    "total_steps",
]

SHORTEST_AUTO_WINDOW = 8  # with fewer terms the noise of a window's own estimate decides
EPOCHS_FOR_WHOLE_ONES = 8
WINDOW_WITHOUT_END = 50  # where neither the data nor the run have a length
FEW_BATCHES = 4  # per epoch: below, a window is several passes and the batches hardly differ

Verdict = Literal["works", "coarse", "single_pass", "too_short", "full_batch", "unknown"]


def auto_window_steps(max_steps: int | None, epoch_steps: int | None) -> int:
    """Window length for `window="auto"`.

        one epoch               if the run has eight epochs or more, or no known end
        a third of an epoch     if it has fewer
        max_steps / 20          if the length of an epoch is unknown
        but at least 8 steps

    Over a whole epoch each example is seen once and its sampling noise cancels: on digits with
    wrong labels the mean regret of the stop was 0.027 nats with one epoch, 0.029 with half of
    one, 0.14 with a third (`recipes/benchmarks/stop_digits`). But two windows must fit before the
    onset and as much time after it, which in a short run only shorter windows leave.
    `max_steps` is None for a run without a known end.

    Example:
        >>> auto_window_steps(800, 100), auto_window_steps(300, 100), auto_window_steps(400, None)
        (100, 33, 20)
    """
    if epoch_steps is None:
        steps = (max_steps or 0) // 20
    elif max_steps is None or max_steps >= EPOCHS_FOR_WHOLE_ONES * epoch_steps:
        steps = epoch_steps
    else:
        steps = epoch_steps // 3
    return max(SHORTEST_AUTO_WINDOW, steps)


def epoch_steps(epoch_batches: float | None, accumulation: int) -> int | None:
    """Optimizer steps of one of a trainer's epochs, by its own count; the last may be short."""
    if epoch_batches is None or math.isinf(epoch_batches):
        return None
    return max(1, -(-int(epoch_batches) // accumulation))


def total_steps(steps_per_epoch: int | None, max_epochs: int | None, max_steps: int) -> int | None:
    """Optimizer steps of a run; None if it has no known end. -1 is no limit."""
    limits = [max_steps] if max_steps >= 0 else []
    if steps_per_epoch is not None and max_epochs is not None and max_epochs >= 0:
        limits.append(max_epochs * steps_per_epoch)
    return min(limits, default=None)


def pass_steps(
    pass_batches: int | None, epoch_batches: float | None, accumulation: int
) -> int | None:
    """Optimizer steps of one pass over the data; trainers also step at the end of an epoch.

    An epoch may be shorter or longer than a pass.
    """
    if pass_batches is None:
        return None
    epochs, rest = divmod(pass_batches, epoch_batches or math.inf)
    in_epochs = int(epochs) and int(epochs) * -(-int(epoch_batches or 1) // accumulation)
    return max(1, in_epochs + -(-int(rest) // accumulation))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """Lengths that may change while a run lasts; None for what is unknown."""

    window: int  # optimizer steps of a window
    epoch_steps: int | None  # of one pass over the data
    pass_batches: int | None  # micro-batches of one in this process
    unknown_because: str  # why it is; "" if it is known
    accumulation: int  # micro-batches of a step
    batch_size: int | None  # examples in a micro-batch of one process
    asked: bool  # whether `epoch_steps` is the user's word

    @classmethod
    def of(
        cls,
        found: DataPass,
        *,
        window: int | str,
        asked: int | None,
        run_steps: int | None,
        epoch_batches: float | None,
        accumulation: int,
        batch_size: int | None,
    ) -> "RunPlan":
        """The plan of a run; where ranks may differ, from what they have agreed on.

        `found` is what the loaders show, `asked` the user's steps of one pass, `window` a number,
        "auto", or "third": a third of a pass, however long the run.
        """
        steps = asked or pass_steps(found.batches, epoch_batches, accumulation)
        if isinstance(window, str):
            each = steps
            if steps is None and run_steps is None:
                each = epoch_steps(epoch_batches, accumulation)
            length = each if window == "third" and each else run_steps
            is_endless = each is None and run_steps is None
            window = WINDOW_WITHOUT_END if is_endless else auto_window_steps(length, each)
        return cls(
            window=window,
            epoch_steps=steps,
            pass_batches=found.batches,
            unknown_because=found.reason,
            accumulation=accumulation,
            batch_size=batch_size,
            asked=asked is not None,
        )


def agree_on(
    found: DataPass, lengths: Sequence[float | None], device: Any
) -> tuple[DataPass, list[int | None]]:
    """The largest over all ranks, whose loaders may differ; None where any does not know.

    Windows must close on all ranks together. Every rank must call.
    """
    known = [math.inf if n is None else float(n) for n in (found.batches, *lengths)]
    if world_size() > 1:
        tensor = torch.tensor(known, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        known = tensor.tolist()
    batches, *agreed = [None if math.isinf(n) else int(n) for n in known]
    reason = "" if batches is not None else found.reason or "another process does not know"
    return DataPass(batches=batches, reason=reason), agreed


def setup_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Entries that differ, as "name old -> new", in the order of `now`."""
    return [f"{k} {before[k]} -> {v}" for k, v in now.items() if k in before and before[k] != v]


@dataclass(frozen=True, kw_only=True, slots=True)
class StopOutlook:
    """What the stop would see; None for what is not known."""

    # "coarse": fewer than four batches per epoch; "single_pass": no example is seen twice;
    # "too_short": the run ends before a first window on data seen before; "full_batch": a batch is
    # the whole data set, so there is no noise to see.
    verdict: Verdict
    epoch_steps: int | None  # optimizer steps of one pass
    total_steps: int | None  # of the run
    window: int | None = None  # steps of a window for `window="auto"`
    first_step: int | None = None  # end of the first window on data seen before
    windows: int | None = None  # in the whole run

    def line(self, *, unknown_because: str = "", min_steps: int = 0) -> str:
        """What the stop can do in this run: one line for its start, in words that need no paper.

        `unknown_because` says why the length of a pass is unknown (`data_pass`).

        Example:
            >>> stop_outlook(None, 100).line()
            'one pass over the data is 100 steps; memorising can be noticed from step 200 on'
        """
        total, epoch, first = self.total_steps, self.epoch_steps, self.first_step
        if self.verdict == "unknown":
            because = f" ({unknown_because})" if unknown_because else ""
            return (
                f"cannot stop this run: nothing shows when an example is seen again{because}, so "
                "it counts as a single pass over the data, in which nothing can be memorised. If "
                "data repeat, set epoch_steps to the optimizer steps of one pass"
            )
        if self.verdict == "full_batch":
            return (
                "cannot tell anything in this run: each step takes all the data, so batches do not "
                "differ and there is no noise to compare the gradient with"
            )
        if self.verdict == "single_pass":
            return (
                f"cannot stop this run: its {total} steps are one pass over the data ({epoch} "
                "steps), in which nothing can be memorised"
            )
        if self.verdict == "too_short":
            return (
                f"cannot stop this run: the first window of {self.window} steps on data seen "
                f"before would end at step {first}, the run ends at {total}. A smaller window may "
                "help"
            )
        if total is not None and min_steps > total:
            return f"cannot stop this run: min_steps={min_steps} is beyond its {total} steps"
        end = "" if total is None else f" of {total}"
        coarse = (
            f", coarsely: with {epoch} steps a pass, a window takes several passes"
            if self.verdict == "coarse"
            else ""
        )
        return (
            f"one pass over the data is {epoch} steps; memorising can be noticed from step "
            f"{max(first or 0, min_steps)}{end} on{coarse}"
        )


def stop_outlook(
    total_steps: int | None, epoch_steps: int | None, window: int | None = None
) -> StopOutlook:
    """Judge a run by its length, in optimizer steps; `window` is that of "auto" if None.

    Example:
        >>> stop_outlook(1000, 100).verdict, stop_outlook(100, 100).verdict
        ('works', 'single_pass')
    """
    if epoch_steps is None:
        return StopOutlook(verdict="unknown", epoch_steps=None, total_steps=total_steps)
    window = window or auto_window_steps(total_steps, epoch_steps)
    first = -(-epoch_steps // window) * window + window
    verdict: Verdict = "coarse" if epoch_steps < FEW_BATCHES else "works"
    if epoch_steps == 1:
        verdict = "full_batch"
    elif total_steps is not None and total_steps <= epoch_steps:
        verdict = "single_pass"
    elif total_steps is not None and total_steps < first:
        verdict = "too_short"
    return StopOutlook(
        verdict=verdict,
        epoch_steps=epoch_steps,
        total_steps=total_steps,
        window=window,
        first_step=first,
        windows=None if total_steps is None else total_steps // window,
    )
