"""Runs as the results file has them, and the choice of a learning rate and an epoch among them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from grid import RUNNABLE, SELECTION
from rows import CHOSEN, ENDPOINTS, METRICS, SINGLE

__all__ = ["Point", "Run", "best", "read", "reported", "title", "tuned"]

EPOCHS = len(ENDPOINTS) - len(CHOSEN)
NAMES = {
    "onset": "stop",
    "third": "stop, kappa 2",
    "epoch": "stop, epochs, kappa 2",
    "held": "hold-out",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """All seeds of an arm at one learning rate.

    Attributes:
        arm: Short name.
        setting: Condition, beta, schedule.
        lr: Peak learning rate.
        values: By metric and seed, shape (endpoints,), NaN where there is nothing.
        single: By name and seed: noise rate, its estimate and the like.
    """

    arm: str
    setting: tuple[str, float, str]
    lr: float
    values: dict[str, dict[int, np.ndarray]]
    single: dict[str, dict[int, float]]

    @property
    def seeds(self) -> set[int]:
        return set(self.values["accuracy"])

    @property
    def ends(self) -> list["Point"]:
        """The last evaluated epoch, and the stops that there are."""
        return [self.epochs[-1], *(p for p in self._points if not p.is_epoch)]

    @property
    def epochs(self) -> list["Point"]:
        """The evaluated epochs."""
        return [p for p in self._points if p.is_epoch]

    @property
    def _points(self) -> list["Point"]:
        seen = np.isfinite(next(iter(self.values["accuracy"].values())))
        return [Point(self, int(place)) for place in np.flatnonzero(seen)]


@dataclass(frozen=True)
class Point:
    """A run at one of its endpoints; without a run, the reference model."""

    run: Run | None
    place: int = 0

    @property
    def is_epoch(self) -> bool:
        return self.place < EPOCHS

    @property
    def end(self) -> str:
        return NAMES.get(ENDPOINTS[self.place], f"epoch {ENDPOINTS[self.place]}")

    @property
    def lr(self) -> float:
        return math.nan if self.run is None else self.run.lr

    @property
    def seeds(self) -> set[int]:
        return set() if self.run is None else self.run.seeds

    def of(self, metric: str, seeds: Iterable[int]) -> np.ndarray:
        """One value for each seed, in their order; zeros for the reference."""
        seeds = sorted(seeds)
        if self.run is None:
            return np.zeros(len(seeds))
        return np.array([self.run.values[metric][seed][self.place] for seed in seeds])

    def mean(self, metric: str, seeds: Iterable[int]) -> float:
        return float(self.of(metric, seeds).mean())

    def __str__(self) -> str:
        return "reference" if self.run is None else f"lr {self.lr:g}, {self.end}"


def read(rows: list[dict[str, str]]) -> list[Run]:
    """Runs from the rows of a results file, in its order."""
    found: dict[tuple, Run] = {}
    for row in rows:
        setting = row["condition"], float(row["beta"]), row["schedule"]
        arm, lr, seed = row["arm"], float(row["lr"]), int(row["seed"])
        values: dict[str, dict[int, np.ndarray]] = {metric: {} for metric in METRICS}
        single: dict[str, dict[int, float]] = {name: {} for name in SINGLE}
        empty = Run(arm=arm, setting=setting, lr=lr, values=values, single=single)
        run = found.setdefault((arm, setting, lr), empty)
        for metric in METRICS:
            series = [_number(row[f"{metric} {end}"]) for end in ENDPOINTS]
            run.values[metric][seed] = np.array(series)
        for name in SINGLE:
            run.single[name][seed] = _number(row[name])
    return list(found.values())


def best(
    runs: list[Run], value: Callable[[Point, set[int]], float], otherwise: Point | None = None
) -> Point | None:
    """Learning rate and epoch of the largest value on the selection seeds, the first of equal ones.

    Args:
        runs: Of one arm.
        value: Of a point on some seeds; -inf where it must not be chosen.
        otherwise: Where no value is above -inf.
    """
    largest, found = -math.inf, otherwise
    for run in runs:
        seeds = run.seeds & set(SELECTION)
        for point in run.epochs if seeds else []:
            score = value(point, seeds)
            if score > largest:
                largest, found = score, point
    return found


def tuned(runs: list[Run], metric: str) -> Point | None:
    """The best by a metric's mean."""
    return best(runs, lambda point, seeds: point.mean(metric, seeds))


def reported(points: Iterable[Point]) -> tuple[set[int], str]:
    """Seeds of a comparison: fresh ones that all have, else selection seeds; and the word for it.

    The reference has all seeds.
    """
    common = set.intersection(*(point.seeds for point in points if point.run is not None))
    fresh = common - set(SELECTION)
    return (fresh, "fresh") if fresh else (common, "selection only")


def title(arm: str) -> str:
    """An arm's name for people; of one that the grid does not know, the short name."""
    return RUNNABLE[arm].name if arm in RUNNABLE else arm


def _number(text: str) -> float:
    return float(text) if text != "" else math.nan
