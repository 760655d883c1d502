"""The committed table of runs, where the stop ends them, and one cell for each setting and arm."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median_high

from poprisk_integrations.core import StoppingRule

__all__ = ["Cell", "Run", "Runs", "cell_of", "read_runs", "stop_step"]

SHARES = ("accuracy", "fitted_right", "fitted_wrong", "open")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run, shares in thousandths.

    Lists start with epoch 0, before training, but for `open` and `ratio` (epoch 1).
    """

    accuracy: Sequence[int]  # on held-out images with right labels
    fitted_right: Sequence[int]  # right training labels that the network answers
    fitted_wrong: Sequence[int]  # the same of wrong ones
    open: Sequence[int]  # coordinates that moved
    ratio: Sequence[float]  # F of each epoch's window
    stop_epoch: int | None  # in which the stop ends the run; None if it never does

    def at_stop(self, name: str) -> int:
        """A share at the end of the epoch in which the stop falls, or at the end of the run."""
        values: Sequence[int] = getattr(self, name)
        return values[-1 if self.stop_epoch is None else self.stop_epoch]


# (arm, noise in per cent, learning rate) -> runs, seed by seed
Runs = dict[tuple[str, int, float], list[Run]]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """An arm in a setting; percentages, lists over seeds.

    Where the stop does not end a run, its last epoch counts as the stop's.
    """

    last: Sequence[float]  # accuracy at the end of the run
    stopped: Sequence[float]  # where the stop ends it
    best: Sequence[float]  # at the highest point of the mean curve
    best_epoch: int
    stop_epochs: Sequence[int]  # of the runs that the stop ends, ascending
    learned: float  # wrong labels learned by heart at the end, mean; NaN without wrong labels
    learned_stopped: float
    fitted: float  # right labels fitted at the end, mean
    fitted_stopped: float

    @property
    def middle_stop(self) -> int | None:
        """Median epoch of the stop over all seeds; None if most runs reach their end."""
        never = [10**9] * (len(self.last) - len(self.stop_epochs))
        middle = median_high([*self.stop_epochs, *never])
        return None if middle == 10**9 else middle


def cell_of(runs: Sequence[Run], noise: int) -> Cell:
    """Sums up the runs of one arm in one setting."""
    curve = [fmean(values) for values in zip(*(run.accuracy for run in runs), strict=True)]
    best_epoch = curve.index(max(curve))

    def share(name: str, *, stopped: bool) -> float:
        return fmean((run.at_stop(name) if stopped else getattr(run, name)[-1]) for run in runs)

    return Cell(
        last=[run.accuracy[-1] / 10 for run in runs],
        stopped=[run.at_stop("accuracy") / 10 for run in runs],
        best=[run.accuracy[best_epoch] / 10 for run in runs],
        best_epoch=best_epoch,
        stop_epochs=sorted(run.stop_epoch for run in runs if run.stop_epoch is not None),
        learned=share("fitted_wrong", stopped=False) / 10 if noise else math.nan,
        learned_stopped=share("fitted_wrong", stopped=True) / 10 if noise else math.nan,
        fitted=share("fitted_right", stopped=False) / 10,
        fitted_stopped=share("fitted_right", stopped=True) / 10,
    )


def read_runs(path: Path) -> Runs:
    """The table, with the stop replayed on the recorded windows."""
    found: Runs = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["arm"], int(row["noise"]), float(row["lr"])
            found.setdefault(key, []).append(_run(row))
    return found


def _run(row: dict[str, str]) -> Run:
    shares = {name: [int(word) for word in row[name].split()] for name in SHARES}
    ratios, errors, noises = (
        [float(word) for word in row[name].split()] for name in ("ratio", "ratio_se", "noise_sum")
    )
    window = int(row["epoch_steps"])
    step = stop_step(float(row["lr"]), window, ratios, errors, noises)
    epoch = None if step is None else math.ceil(step / window)
    return Run(**shares, ratio=ratios, stop_epoch=epoch)


def stop_step(
    lr: float,
    window_steps: int,
    ratios: Sequence[float],
    errors: Sequence[float],
    noises: Sequence[float],
) -> int | None:
    """Optimizer step of the stop; None if the run reaches its end.

    The package's rule on recorded windows (F, its standard error, S), as in training with the
    callbacks and a constant rate: the first window is of fresh data, and between two windows
    nothing but time passes, so that the rule's own prediction is the stop.
    """
    rule = StoppingRule()
    step = 0
    for ratio, error, noise in zip(ratios, errors, noises, strict=True):
        due = rule.predicted_stop_step(step, lr)
        if due is not None and due < step + window_steps:
            return due
        step += window_steps
        decision = rule.update(
            step=step,
            lr=lr * window_steps,
            ratio=ratio,
            ratio_se=error,
            noise=noise,
            reused=step > window_steps,
        )
        if decision.stop:
            return step
    return None
