"""Which runs there are, and their traces on disk: a trace that exists is not computed again."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ensemble import LRS, OPTIMIZERS, train
from tasks import build

__all__ = [
    "BATCH",
    "CONFIRMATION_SEEDS",
    "SELECTION_SEEDS",
    "Cell",
    "cells",
    "load",
    "seeds_of",
    "trace",
]

SELECTION_SEEDS = range(100, 105)
# Fewer where a run takes minutes.
CONFIRMATION_SEEDS = {"T1-800": range(5), "T5": range(5), "T6": range(3)}
BATCH = {"T5": 16, "T6": 128}
# Grokking needs decay and a large rate; the others would only be slow.
ONLY = {"T6": {("AdamW", 1e-3), ("AdamW", 3e-3), ("PopRiskAdamW", 3e-3)}}
FULL_GRID = ("T1-300", "T1-800", "T2", "T3")
HELD = {"full": 1.0, "hold10": 0.9, "hold20": 0.8}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One ensemble: a task under one optimizer, learning rate, batch size and schedule."""

    task: str
    optimizer: str
    lr: float
    batch: int
    schedule: str

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.task}_{self.optimizer}_{self.lr:g}_b{self.batch}_{self.schedule}"


def cells(tasks: tuple[str, ...]) -> Iterator[Cell]:
    """Learning rates x optimizers at constant rate; cosine and other batch sizes on T1-T3."""
    for task in tasks:
        usual = BATCH.get(task, 32)
        for optimizer in OPTIMIZERS:
            for place, lr in enumerate(LRS[optimizer]):
                if task in ONLY and (optimizer, lr) not in ONLY[task]:
                    continue
                variants = [(usual, "constant")]
                if task in FULL_GRID and (optimizer == "AdamW" or place == 1):
                    variants.append((usual, "cosine"))
                if task in FULL_GRID and place == 1:
                    variants += [(16, "constant"), (128, "constant")]
                for batch, schedule in variants:
                    yield Cell(
                        task=task, optimizer=optimizer, lr=lr, batch=batch, schedule=schedule
                    )


def trace(cell: Cell, seeds: range, folder: Path, epochs: int | None = None) -> Path:
    """Train on all data, on 90 % and on 80 %; write one file, whole or not at all."""
    path = folder / f"{cell.name}_s{seeds.start}-{seeds.stop}.npz"
    if path.exists():
        return path
    began = time.time()
    task = build(cell.task, seeds)
    arrays = {}
    for kind, keep in HELD.items():
        if task.stream and kind != "full":
            continue
        found = train(
            task, cell.optimizer, cell.lr, cell.batch, cell.schedule, keep=keep, epochs=epochs
        )
        arrays |= {f"{kind}/{name}": value for name, value in found.items()}
    arrays["condition"] = np.array([m["condition"] for m in task.members])
    arrays["seed"] = np.array([m["seed"] for m in task.members])
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)
    print(f"{path.stem}: {time.time() - began:.0f} s", flush=True)
    return path


def seeds_of(task: str) -> range:
    """Confirmation seeds of a task."""
    return CONFIRMATION_SEEDS.get(task, range(10))


def load(path: Path) -> dict[str, np.ndarray]:
    """A trace; arrays only, nothing pickled. The loss of a run that diverged is infinite."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    for name in found:
        if name.endswith("loss"):
            found[name] = np.nan_to_num(found[name], nan=np.inf)
    return found
