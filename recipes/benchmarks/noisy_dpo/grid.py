"""Which runs there are, and their shards on disk: a run that exists is not made again.

Usage: python recipes/benchmarks/noisy_dpo/grid.py [--runs DIR] [--jobs N] [--only A1,A2]
"""

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from arms import ARMS
from gates import GATES
from pairs import Sizes, Task, build
from sft import references
from training import EPOCHS, train
from variants import VARIANTS

__all__ = [
    "FRESH",
    "GROUPS",
    "LRS",
    "RUNNABLE",
    "SELECTION",
    "Cell",
    "cells",
    "load",
    "run",
    "run_all",
]

HERE = Path(__file__).parent
SELECTION, FRESH = (100, 101, 102), (0, 1, 2, 3, 4)
LRS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
GROUPS = {
    "main": ("flips 0", "flips 30"),
    "rates": ("flips 10", "flips 20", "flips 40"),
    "structured": ("length", "annotators", "bt 30"),
}
RUNNABLE = ARMS | VARIANTS | GATES
# The most informative first.
FIRST = ("A1", "A9", "A2", "A8")
SECOND = tuple(arm for arm in VARIANTS if arm not in FIRST)
THIRD = tuple(arm for arm in ARMS if arm not in FIRST)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One ensemble: all seeds under the conditions of a group."""

    arm: str
    lr: float
    beta: float = 0.1
    schedule: str = "constant"
    group: str = "main"
    seeds: tuple[int, ...] = SELECTION + FRESH
    epochs: tuple[int, ...] = EPOCHS
    quick: bool = False

    @property
    def name(self) -> str:
        """For file names."""
        name = f"{self.arm}_lr{self.lr:g}_beta{self.beta:g}_{self.schedule}_{self.group}"
        full = self.seeds == SELECTION + FRESH and not self.quick
        return name if full else f"{name}_s{'-'.join(map(str, self.seeds))}"


def cells() -> Iterator[Cell]:
    """In the order in which they are worth having."""
    for arms in (FIRST, SECOND, THIRD):
        for arm in arms:
            for lr in (3e-4, 1e-3, 1e-4, 3e-3, 3e-5):
                yield Cell(arm=arm, lr=lr)
    yield Cell(arm="A1", lr=1e-5)  # below the grid, to show that its best rate is inside
    for group in ("rates", "structured"):
        for arm in ("A1", "A9", "E1", "E1g", "A2", "A7", "C1", "C3"):
            for lr in (1e-4, 3e-4, 1e-3):
                yield Cell(arm=arm, lr=lr, group=group)
    for beta in (0.05, 0.3):
        for arm in ("A1", "A2", "A9"):
            for lr in (1e-4, 3e-4, 1e-3):
                yield Cell(arm=arm, lr=lr, beta=beta)
    for arm in ("A1", "A2", "A9"):
        for lr in LRS:
            yield Cell(arm=arm, lr=lr, schedule="linear")


def shard(cell: Cell, folder: Path) -> Path:
    """Where a run is kept."""
    return folder / f"{cell.name}.npz"


@cache
def task_of(group: str, seeds: tuple[int, ...], folder: Path, quick: bool) -> Task:
    """The data; made once in a process."""
    sizes = Sizes(train=384, held=100, sampled=50) if quick else Sizes()
    reference = references(list(seeds), folder, _samples(quick))
    return build(list(GROUPS[group]), list(seeds), reference, sizes)


def run(cell: Cell, folder: Path) -> Path:
    """Train, write one file, whole or not at all."""
    path = shard(cell, folder)
    if path.exists():
        return path
    torch.set_num_threads(1)
    arm = RUNNABLE[cell.arm]
    recorded = None
    if arm.needs is not None:
        other = Cell(**{**cell.__dict__, "arm": arm.needs})
        recorded = load(run(other, folder))
    arrays = train(
        task_of(cell.group, cell.seeds, folder, cell.quick),
        arm,
        cell.lr,
        beta=cell.beta,
        schedule=cell.schedule,
        epochs=cell.epochs,
        recorded=recorded,
    )
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)
    return path


def run_all(wanted: list[Cell], folder: Path, jobs: int) -> None:
    """What is missing; with several jobs, those that need another run last."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in wanted if not shard(cell, folder).exists()]
    if not missing:
        return
    if jobs == 1:
        for cell in missing:
            _report(cell, run(cell, folder))
        return
    # Threads of one process wait for each other when cores are shared, so every process has one.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_reference, *zip(*_references_of(missing, folder), strict=True)))
        for needy in (False, True):
            part = [cell for cell in missing if (RUNNABLE[cell.arm].needs is not None) == needy]
            futures = {pool.submit(run, cell, folder): cell for cell in part}
            for future in as_completed(futures):
                _report(futures[future], future.result())


def _references_of(wanted: list[Cell], folder: Path) -> list[tuple[int, Path, bool]]:
    return list(dict.fromkeys((s, folder, cell.quick) for cell in wanted for s in cell.seeds))


def _reference(seed: int, folder: Path, quick: bool) -> None:
    torch.set_num_threads(1)
    references([seed], folder, _samples(quick))


def _samples(quick: bool) -> int:
    return 4000 if quick else 20_000


def load(path: Path) -> dict[str, np.ndarray]:
    """A run, or what there is of it: that of the selection seeds. Arrays, nothing pickled."""
    if not path.exists():
        path = path.with_stem(f"{path.stem}_s{'-'.join(map(str, SELECTION))}")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _report(cell: Cell, path: Path) -> None:
    found = load(path)
    accuracy = "  ".join(
        f"{c} {found['accuracy'][-1][found['condition'] == c].mean():.3f}"
        for c in dict.fromkeys(found["condition"])
    )
    spent = f"{float(found['seconds']):.0f} s, {float(found['processor_seconds']):.0f} of a core"
    print(f"{time.strftime('%H:%M:%S')} {cell.name}: {spent}; {accuracy}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--only", default="", help="arms, with commas between")
    parser.add_argument("--groups", default="main,rates,structured")
    parser.add_argument("--lrs", default="", help="learning rates, with commas between")
    parser.add_argument("--seeds", default="", help="instead of all, with commas between")
    parser.add_argument("--count", type=int, default=None, help="only so many of the runs")
    args = parser.parse_args()
    wanted = list(cells())
    if args.only:
        wanted = [cell for cell in wanted if cell.arm in args.only.split(",")]
    if args.lrs:
        wanted = [cell for cell in wanted if cell.lr in map(float, args.lrs.split(","))]
    wanted = [cell for cell in wanted if cell.group in args.groups.split(",")]
    if args.seeds:
        seeds = tuple(int(seed) for seed in args.seeds.split(","))
        wanted = [Cell(**{**cell.__dict__, "seeds": seeds}) for cell in wanted]
    run_all(wanted[: args.count], args.runs, args.jobs)


if __name__ == "__main__":
    main()
