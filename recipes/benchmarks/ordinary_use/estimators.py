"""Curves of the test loss from what a run in which examples sit out has recorded."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from benchmarks.harness.train import Trace
from benchmarks.ordinary_use.runs import Runs, row_at

from poprisk_integrations.diagnostics.sitting_out import SittingOut

__all__ = [
    "ESTIMATORS",
    "Curve",
    "held_out_curve",
    "replay",
    "shipped",
    "shipped_accuracy",
    "truth",
]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Estimates window by window, shape (W,); NaN where there is none."""

    middle: np.ndarray  # epochs done in the middle of the window: what the value belongs to
    end: np.ndarray  # epochs done at its end: the first weights that can still be kept
    value: np.ndarray  # estimated noisy loss (or accuracy)
    se: np.ndarray  # its standard error
    train: np.ndarray  # training loss of the window


def replay(runs: Runs) -> SittingOut:
    """The experiment of the run "sit", fed again with what was recorded, batch by batch.

    So a change of the estimator needs no new training, a change of who sits does.
    """
    trace = runs["sit"]
    losses, accuracies = (torch.tensor(trace[k]).float() for k in ("losses", "accuracies"))
    positions, sits = torch.tensor(trace["positions"]), torch.tensor(trace["sits"])
    epochs, n = losses.shape
    steps = int(trace["epoch_steps"])
    experiment = SittingOut(n, seed=runs.seed, epochs=epochs)
    for epoch in range(epochs):
        experiment.begin_epoch(epoch)
        assert torch.equal(experiment.sits(), sits[epoch]), "recorded with another design"
        batch = (positions[epoch] * steps).round().nan_to_num(-1).int()
        order = batch.argsort(stable=True)
        order = order[batch[order] >= 0]
        counts = torch.bincount(batch[order], minlength=steps)
        for j, rows in enumerate(order.split(counts.tolist())):
            values = {"loss": losses[epoch, rows]}
            if np.isfinite(trace["accuracies"][0]).any():
                values["accuracy"] = accuracies[epoch, rows]
            experiment.record(rows, values, position=j / steps)
            experiment.visited(rows[~sits[epoch, rows]], j / steps)
            if experiment.window_ends((j + 1) / steps):
                experiment.close_window(step=epoch * steps + j + 1)
    return experiment


def curve_of(experiment: SittingOut, name: str = "loss") -> Curve:
    """The history of an experiment as a curve."""
    rows = experiment.history

    def column(key: str) -> np.ndarray:
        return np.array([np.nan if row[key] is None else row[key] for row in rows], float)

    end = column("epoch")
    return Curve(
        middle=end - 0.5 / experiment.windows_per_epoch,
        end=end,
        value=column(f"estimated_test_{name}"),
        se=column(f"estimated_test_{name}_se"),
        train=column(f"train_{name}"),
    )


def shipped(runs: Runs) -> Curve:
    """What the package estimates."""
    return curve_of(runs.once(replay))


def shipped_accuracy(runs: Runs) -> Curve | None:
    """The same of the accuracy; None without classes."""
    experiment = runs.once(replay)
    if "estimated_test_accuracy" not in experiment.history[-1]:
        return None
    return curve_of(experiment, "accuracy")


def training_loss(runs: Runs) -> Curve:
    """The training loss taken for the test loss: what a curve must be better than."""
    found = runs.once(shipped)
    return replace(found, value=found.train, se=np.zeros_like(found.train))


# Rows of the table of curves; a candidate is one more function.
ESTIMATORS: dict[str, Callable[[Runs], Curve]] = {
    "shipped": shipped,
    "training loss": training_loss,
}


def truth(trace: Trace, at: np.ndarray, name: str = "noisy_loss") -> np.ndarray:
    """A recorded curve at some epochs, straight between evaluations."""
    column = trace[name]
    return np.interp([row_at(trace, x) for x in at], np.arange(len(column)), column)


def held_out_curve(runs: Runs, name: str = "loss") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epochs, held-out loss or accuracy, and the noisy one of the same weights."""
    trace = runs["hold10"]
    return trace["at"], trace[f"held_{name}"], trace[f"noisy_{name}"]
