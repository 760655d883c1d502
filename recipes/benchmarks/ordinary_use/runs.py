"""The training runs, each on disk as one file: what exists is not run again."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.harness.grid import read_trace, write_trace
from benchmarks.harness.train import Trace
from benchmarks.ordinary_use.conditions import CONDITIONS, Condition
from benchmarks.ordinary_use.training import PATIENCE, Plan, run

__all__ = ["Runs", "best_with_patience", "load", "row_at", "run_all"]


def path_of(folder: Path, condition: str, arm: str, seed: int) -> Path:
    """Where the trace of a run is."""
    return folder / condition / f"{arm}_s{seed}.npz"


def load(folder: Path, condition: str, arm: str, seed: int) -> Trace | None:
    """A trace; None if there is none."""
    path = path_of(folder, condition, arm, seed)
    return read_trace(path) if path.exists() else None


@dataclass(kw_only=True)
class Runs:
    """All traces of a condition and seed."""

    condition: Condition
    seed: int
    folder: Path

    def __post_init__(self) -> None:
        self._traces: dict[str, Trace | None] = {}
        self._made: dict[Any, Any] = {}

    def get(self, arm: str) -> Trace | None:
        """The trace of an arm; None if it was not run."""
        if arm not in self._traces:
            self._traces[arm] = load(self.folder, self.condition.name, arm, self.seed)
        return self._traces[arm]

    def once(self, make: Callable[["Runs"], Any]) -> Any:
        """make(self), made once: several rules use one estimate."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def __getitem__(self, arm: str) -> Trace:
        found = self.get(arm)
        if found is None:
            raise KeyError(f"{self.condition.name}: no run {arm!r} of seed {self.seed}")
        return found


def row_at(trace: Trace, epoch: float) -> float:
    """Row of the evaluation after so many epochs; between two of them a fraction."""
    return float(np.interp(epoch, trace["at"], np.arange(len(trace["at"]))))


def best_with_patience(losses: np.ndarray, patience: int) -> int:
    """Row of the lowest loss before as many rows without a lower one; row 0 is untrained."""
    best = 1
    for row in range(1, len(losses)):
        if losses[row] < losses[best]:
            best = row
        elif row - best >= patience:
            break
    return best


def plan_of(condition: Condition, arm: str, seed: int, folder: Path) -> Plan | None:
    """What an arm trains; None where a refit is a part of the run on all data."""
    if arm == "full":
        return Plan(signal=True, cool_from=condition.cool_from)
    if arm == "sit":
        return Plan(sit_out=True, cool_from=condition.cool_from)
    if arm.startswith("hold"):
        return Plan(hold=int(arm[4:]) / 100)
    assert arm.startswith("refit"), arm
    if condition.schedule == "constant":
        return None  # the run on all data, cut at that epoch
    held = load(folder, condition.name, f"hold{arm[5:]}", seed)
    assert held is not None, f"{arm} needs hold{arm[5:]}"
    whole = held["at"] == held["at"].round()
    epochs = best_with_patience(held["held_loss"][whole], PATIENCE)
    return None if epochs == condition.epochs else Plan(epochs=epochs, only_end=True)


def run_one(name: str, arm: str, seed: int, folder: Path) -> None:
    """Train one run and write its trace."""
    torch.set_num_threads(1)
    condition = CONDITIONS[name]
    plan = plan_of(condition, arm, seed, folder)
    if plan is None:
        return
    trace = run(condition, condition.task(seed, folder), seed, plan)
    write_trace(path_of(folder, name, arm, seed), trace)
    best = int(np.argmin(trace["noisy_loss"]))
    at, accuracy, loss = trace["at"], trace["clean_accuracy"], trace["noisy_loss"]
    print(
        f"{name} {arm} s{seed}: {trace['seconds'].sum():.1f} s"
        f" ({trace['seconds'][1]:.1f} cooling), noisy loss {loss[best]:.3f} at epoch"
        f" {at[best]:g}, end {loss[-1]:.3f}; clean accuracy {accuracy[best]:.3f},"
        f" end {accuracy[-1]:.3f}",
        flush=True,
    )


def run_all(plan: list[tuple[str, int]], arms: list[str], folder: Path, jobs: int) -> None:
    """All runs that are missing; a refit needs its hold-out, so it comes later."""
    for later in (False, True):
        todo = [
            (name, arm, seed, folder)
            for name, seed in plan
            for arm in arms
            if arm.startswith("refit") == later and not path_of(folder, name, arm, seed).exists()
        ]
        if jobs == 1:
            list(starmap(run_one, todo))
        elif todo:
            with ProcessPoolExecutor(jobs) as pool:
                list(pool.map(run_one, *zip(*todo, strict=True)))
