"""What a learning rate schedule will still do: whether it warms up, how much of it is to come."""

import copy
import warnings
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from poprisk_integrations.diagnostics.learning_rate_scaling import (
    largest_lr,
    reacts,
    used_groups,
)

__all__ = ["ScheduleOutlook", "SchedulePoint"]

_POINTS = 1025
_LONGEST = 100_000  # steps of a schedule without a closed form that are tried out: a second
_STILL_DECAYS = 0.5  # a schedule whose last rate is below this share of the present one decays
_PEAK = 0.99  # of the largest rate: here a warm-up is over


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulePoint:
    """A place in a schedule; None where something cannot be known."""

    rising: bool = False  # the largest rate of the run is still to come: in a warm-up
    share_left: float | None = None  # of the run's sum of learning rates
    decay: float | None = None  # the run's last rate by the present one

    @property
    def still_decays(self) -> bool:
        """Whether the rate is still to fall by much: what anneals averages noise away itself."""
        return self.decay is not None and self.decay < _STILL_DECAYS

    @property
    def must_finish(self) -> bool:
        """Whether a run must not end here: in a warm-up everything is still to come."""
        return self.rising or self.still_decays


class ScheduleOutlook:
    """The rates of a whole run, found by trying its scheduler out on a copy.

    Of several groups the largest rate counts. A cut that multiplies all rates changes nothing here.

        known      every schedule that is a function of the step: closed forms at once, others
                   step by step
        unknown    schedules that react to a metric, runs without a known length, schedulers that
                   cannot be copied

    Optimizer and scheduler may be wrapped; None stands for a constant rate. The run has made `step`
    of `total_steps` optimizer steps; `every` are those per step of the scheduler.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> scheduler = LambdaLR(optimizer, lambda t: min((t + 1) / 10, 1 - (t - 9) / 91))
        >>> outlook = ScheduleOutlook(optimizer, scheduler, total_steps=100)
        >>> outlook.at(5).rising, outlook.at(9).rising, round(outlook.at(50).share_left, 2)
        (True, False, 0.28)
    """

    def __init__(
        self,
        optimizer: Any,
        scheduler: Any,
        *,
        total_steps: int | None,
        step: int = 0,
        every: int = 1,
    ) -> None:
        self.total_steps = total_steps
        # Optimizer steps, the rates from there on, and the sums of rates before. The last is the
        # end of the run.
        self._steps: list[int] = []
        self._rates: list[float] = []
        self._done: list[float] = []
        while hasattr(scheduler, "scheduler"):
            scheduler = scheduler.scheduler
        if total_steps is None or total_steps < 1 or reacts(scheduler):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler that is ahead of its optimizer
            try:
                rates = _rates(optimizer, scheduler, total_steps, step, every)
            except Exception:  # whatever somebody's scheduler does
                return
        self._keep([*rates, (total_steps, rates[-1][1])])

    def at(self, step: int) -> SchedulePoint:
        """Where the run is after so many optimizer steps."""
        if not self._steps or self._done[-1] <= 0:
            return SchedulePoint()
        place = max(0, bisect_right(self._steps, step) - 1)
        rate = self._rates[place]
        done = self._done[place] + rate * (step - self._steps[place])
        return SchedulePoint(
            rising=step < self.peak_step,
            share_left=min(1.0, max(0.0, 1 - done / self._done[-1])),
            decay=None if rate <= 0 else self._rates[-1] / rate,
        )

    @property
    def peak_step(self) -> int:
        """First optimizer step with (99 % of) the run's largest rate; 0 where it is unknown."""
        largest = _PEAK * max(self._rates, default=0.0)
        found = zip(self._steps, self._rates, strict=True)
        return next((step for step, rate in found if rate >= largest), 0)

    def state_dict(self) -> dict[str, Any]:
        """The curve: a resumed run sees what an uninterrupted one sees."""
        curve = torch.tensor([self._steps, self._rates, self._done], dtype=torch.float64)
        return {"total_steps": self.total_steps, "curve": curve.reshape(3, -1)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a curve over, unless it is of a run of another length."""
        curve: Tensor = state["curve"]
        if state["total_steps"] == self.total_steps and curve.numel():
            steps, self._rates, self._done = (row.tolist() for row in curve.unbind())
            self._steps = [int(value) for value in steps]

    def _keep(self, rates: list[tuple[int, float]]) -> None:
        """At most `_POINTS` of it."""
        lengths = (rate * (end - step) for (step, rate), (end, _) in pairwise(rates))
        sums = list(accumulate(lengths, initial=0.0))
        for place in (*_spread(len(rates) - 1, _POINTS - 1), len(rates) - 1):
            self._steps.append(rates[place][0])
            self._rates.append(rates[place][1])
            self._done.append(sums[place])


def _spread(length: int, most: int) -> list[int]:
    """Positions in a list of this length, at most so many, the first and the last among them."""
    count = max(2, min(length, most))
    return sorted({round(k * (length - 1) / (count - 1)) for k in range(count)})


def _rates(
    optimizer: Any, scheduler: Any, total: int, step: int, every: int
) -> list[tuple[int, float]]:
    """(first optimizer step, rate), ..."""
    if scheduler is None:
        return [(0, largest_lr(optimizer))]
    count = -(-total // every)
    if type(scheduler) is LambdaLR:
        forms = zip(scheduler.base_lrs, scheduler.lr_lambdas, used_groups(optimizer), strict=True)
        used = [(base, form) for base, form, is_used in forms if is_used]
        return [
            (t * every, max(float(base) * form(t) for base, form in used))
            for t in _spread(count, _POINTS - 1)
        ]
    if count > _LONGEST:
        raise ValueError(count)
    stand_in = _stand_in(optimizer)
    trial = copy.deepcopy(scheduler, _in_place_of(optimizer, scheduler, stand_in))
    rates = [(0, largest_lr(stand_in))]  # what was before a resume is taken to have been constant
    for t in range(step // every, count):
        rates.append((t * every, largest_lr(stand_in)))
        stand_in.step()
        try:
            trial.step()
        except ValueError:  # OneCycleLR beyond its end
            break
    return rates[1:] if rates[1][0] == 0 else rates


def _stand_in(optimizer: Any) -> torch.optim.Optimizer:
    """An optimizer over nothing with the same numbers in its groups."""
    groups = []
    for group, used in zip(optimizer.param_groups, used_groups(optimizer), strict=True):
        numbers = {key: _number(value) for key, value in group.items() if key != "params"}
        groups.append({**numbers, "params": [torch.zeros(1)] if used else []})
    return torch.optim.SGD(groups, lr=0.0)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def _in_place_of(optimizer: Any, scheduler: Any, stand_in: Any) -> dict[int, Any]:
    """For `deepcopy`: what not to copy."""
    memo: dict[int, Any] = {id(getattr(scheduler, "optimizer", None)): stand_in}
    memo.pop(id(None), None)
    while optimizer is not None:
        memo[id(optimizer)] = stand_in
        optimizer = getattr(optimizer, "optimizer", None)
    return memo
