"""The runs behind the page: digits with wrong training labels, all models side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from gate_harness.arms import ARMS
from gate_harness.grid import run_arms
from gate_harness.tasks import Member, members_of
from noisy_labels_task import SETS, NoisyLabelsTask
from playground_windows import WatchedAdam

__all__ = ["EPOCH_STEPS", "FULL", "QUICK", "Plan", "run_rows"]

EPOCH_STEPS = SETS["digits"].train // SETS["digits"].batch_size
GROUP = 28  # models side by side, so that their tensors stay in cache
WINDOW = {"ratio": 4, "ratio_se": 3, "noise_sum": 3}  # significant digits
# A control comes after what it imitates.
ARM_NAMES = ("AdamW", "soft-32", "norm(soft-32)", "paper")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Args:
        noise: Wrong training labels in per cent, ascending.
        lrs: Constant learning rates, ascending.
        seeds: Of split, wrong labels, start and batches.
        epochs: Of each run.
    """

    noise: Sequence[int]
    lrs: Sequence[float]
    seeds: Sequence[int]
    epochs: int


FULL = Plan(noise=range(0, 51, 5), lrs=(3e-4, 1e-3, 3e-3, 1e-2), seeds=range(5), epochs=60)
QUICK = Plan(noise=(0, 30), lrs=(1e-3, 1e-2), seeds=range(2), epochs=4)


def run_rows(plan: Plan, folder: Path, arms: Sequence[str] = ARM_NAMES) -> list[dict]:
    """Train what is missing; one row for each run.

    Columns: arm, lr, noise (per cent), seed, epoch_steps, and as numbers with blanks between
    them, one for each epoch: `accuracy` on held-out images with right labels, `fitted_right` and
    `fitted_wrong` (training labels of each kind that the network answers), these three in
    thousandths and from epoch 0, before training; `open` (coordinates that moved, mean over the
    epoch's steps, in thousandths); and of the epoch's window the stop's F (`ratio`), its standard
    error and the noise S.

    Args:
        plan: Which runs.
        folder: Of the traces; what is there is read back.
        arms: Names of `gate_harness.arms.ARMS`.
    """

    def build(members: list[Member]) -> NoisyLabelsTask:
        steps = plan.epochs * EPOCH_STEPS
        ends = range(EPOCH_STEPS, steps + 1, EPOCH_STEPS)
        return NoisyLabelsTask(members, steps=steps, eval_steps=ends)

    rows = []
    for lr in plan.lrs:
        members = members_of(plan.seeds, [f"digits {noise}%" for noise in plan.noise], [lr])
        traces = run_arms(
            build,
            [ARMS[name] for name in arms],
            members,
            folder / f"{lr:g}",
            group=GROUP,
            optimizer_class=partial(WatchedAdam, window=EPOCH_STEPS),
        )
        rows += [_row(arm, traces[arm], i, plan) for arm in arms for i in range(len(members))]
    return rows


def _row(arm: str, trace: dict[str, np.ndarray], i: int, plan: Plan) -> dict:
    moved = trace["moved_share"][:, i].reshape(plan.epochs, EPOCH_STEPS).mean(1)
    return {
        "arm": arm,
        "lr": f"{trace['lr'][i]:g}",
        "noise": trace["condition"][i].removeprefix("digits ").rstrip("%"),
        "seed": str(trace["seed"][i]),
        "epoch_steps": str(EPOCH_STEPS),
        "accuracy": _thousandths(trace["accuracy"][:, i]),
        "fitted_right": _thousandths(trace["fitted_clean"][:, i]),
        "fitted_wrong": _thousandths(trace["fitted_wrong"][:, i]),
        "open": _thousandths(moved),
        **{name: _floats(trace[f"window_{name}"][:, i], digits) for name, digits in WINDOW.items()},
    }


def _floats(values: np.ndarray, digits: int) -> str:
    return " ".join(f"{value:.{digits}g}" for value in values.tolist())


def _thousandths(shares: np.ndarray) -> str:
    return " ".join(str(round(1000 * share)) for share in shares.tolist())
