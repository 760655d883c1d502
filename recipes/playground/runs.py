"""The runs behind the page: digits with wrong training labels, all models side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarks.harness.arms import ARMS
from benchmarks.harness.grid import run_arms
from benchmarks.harness.stacked_adam import StackedAdam
from benchmarks.harness.train import Member, members_of
from benchmarks.noisy_labels.study import SETS, NoisyLabelsTask
from torch import Tensor

from poprisk_integrations.core import coordinate_ratio, window_signal_ratio

__all__ = ["FULL", "QUICK", "Plan", "WatchedAdam", "run_rows"]

EPOCH_STEPS = SETS["digits"].train // SETS["digits"].batch_size
GROUP = 28  # models side by side, so that their tensors stay in cache
WINDOW = {"ratio": 4, "ratio_se": 3, "noise_sum": 3}  # significant digits
# A control comes after what it imitates.
ARM_NAMES = ("AdamW", "soft-32", "norm(soft-32)", "paper")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run."""

    noise: Sequence[int]  # wrong training labels in per cent, ascending
    lrs: Sequence[float]  # constant learning rates, ascending
    seeds: Sequence[int]  # of split, wrong labels, start and batches
    epochs: int  # of each run


FULL = Plan(noise=range(0, 51, 5), lrs=(3e-4, 1e-3, 3e-3, 1e-2), seeds=range(5), epochs=60)
QUICK = Plan(noise=(0, 30), lrs=(1e-3, 1e-2), seeds=range(2), epochs=4)


class WatchedAdam(StackedAdam):
    """The harness's optimizer, which also closes a window of gradients every `window` steps.

    Per member the numbers are those of `diagnostics.GradientWindow`, with which the tests compare
    them: gradients as they come, before the step.
    A window is one epoch, as `auto_window_steps` has it for runs this long.
    """

    def __init__(self, *args, window: int) -> None:
        super().__init__(*args)
        self.window = window
        self.windows: dict[str, list[list[float]]] = {"ratio": [], "ratio_se": [], "noise_sum": []}
        self.norms_sq: list[Tensor] = []
        self.sums = self.squares = torch.empty(0)

    @torch.no_grad()
    def step(self, theta: Tensor, grad: Tensor, factor: float = 1.0) -> None:
        """Take in the gradients, then step."""
        if not self.norms_sq:
            self.sums, self.squares = torch.zeros_like(grad), torch.zeros_like(grad)
        self.sums += grad
        self.squares.addcmul_(grad, grad)
        parts = grad.split(self.sizes, 1)
        self.norms_sq.append(torch.stack([part.square().sum(1) for part in parts], 1))
        if len(self.norms_sq) == self.window:
            self._close()
        super().step(theta, grad, factor)

    def _close(self) -> None:
        norms_sq = torch.stack(self.norms_sq)  # (T, M, L)
        numel = torch.tensor([float(size) for size in self.sizes])
        found: dict[str, list[float]] = {name: [] for name in self.windows}
        for member in range(norms_sq.shape[1]):
            sums = self.sums[member].split(self.sizes)
            squares = self.squares[member].split(self.sizes)
            result = window_signal_ratio(
                torch.stack([part.square().sum() for part in sums]),
                norms_sq[:, member].sum(0),
                numel,
                self.window,
                norm_sq=norms_sq[:, member],
            )
            pairs = zip(sums, squares, strict=True)
            total, alive = sum(coordinate_ratio(a, q, self.window) for a, q in pairs).tolist()
            found["ratio"].append(total / alive if alive else float("nan"))
            found["ratio_se"].append(result.ratio_se)
            found["noise_sum"].append(float(result.noise.sum()))
        for name, row in found.items():
            self.windows[name].append(row)
        self.norms_sq = []

    def arrays(self) -> dict[str, np.ndarray]:
        """Also the windows, each of shape (W, M)."""
        found = {f"window_{name}": np.array(rows) for name, rows in self.windows.items()}
        return {**super().arrays(), **found}


def run_rows(plan: Plan, folder: Path, arms: Sequence[str] = ARM_NAMES) -> list[dict]:
    """Train what is missing; one row for each run.

    Columns: arm, lr, noise (per cent), seed, epoch_steps, and as numbers with blanks between
    them, one for each epoch: `accuracy` on held-out images with right labels, `fitted_right` and
    `fitted_wrong` (training labels of each kind that the network answers), these three in
    thousandths and from epoch 0, before training; `open` (coordinates that moved, mean over the
    epoch's steps, in thousandths); and of the epoch's window the stop's F (`ratio`), its standard
    error and the noise S.

    What is in `folder`, which holds the traces, is read back.
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
