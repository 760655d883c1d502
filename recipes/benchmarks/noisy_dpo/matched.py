"""Arms compared at equal cost: reward at equal KL, wrong labels fitted at equal clean fit."""

import math

import numpy as np
from runs import Point, Run, best

__all__ = ["CLEAN_FITS", "KL_GRID", "area", "fewest_flips", "frontier", "with_common_rates"]

KL_GRID = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
CLEAN_FITS = (0.85, 0.9)


def with_common_rates(runs: list[Run], rivals: list[Run]) -> tuple[list[Run], list[Run]]:
    """Those at learning rates that both have: more to choose from would be an advantage."""
    lrs = {run.lr for run in runs} & {run.lr for run in rivals}
    return [run for run in runs if run.lr in lrs], [run for run in rivals if run.lr in lrs]


def frontier(runs: list[Run]) -> list[Point]:
    """For each k of the grid the learning rate and epoch of the largest reward at KL <= k.

    Both means are those of the selection seeds; on other seeds KL may be a little above k. The
    reference, with reward 0 and KL 0, is always among those to choose from.
    """
    reference = Point(None)
    found = []
    for k in KL_GRID:

        def reward(point: Point, seeds: set[int], k: float = k) -> float:
            value = point.mean("reward", seeds)
            return value if value > 0 and point.mean("kl", seeds) <= k else -math.inf

        found.append(best(runs, reward, reference) or reference)
    return found


def area(points: list[Point], seeds: set[int]) -> np.ndarray:
    """Mean reward over KL from 0 to 10 by trapezoids, for each seed."""
    rewards = np.stack([Point(None).of("reward", seeds), *(p.of("reward", seeds) for p in points)])
    widths = np.diff((0.0, *KL_GRID))
    found: np.ndarray = widths @ (rewards[1:] + rewards[:-1]) / 2 / KL_GRID[-1]
    return found


def fewest_flips(runs: list[Run], clean_fit: float) -> Point | None:
    """Least share of wrong labels fitted where at least `clean_fit` of the right ones is."""

    def unfitted(point: Point, seeds: set[int]) -> float:
        flips = point.mean("flipped_fitted", seeds)
        enough = point.mean("clean_fitted", seeds) >= clean_fit
        return -flips if enough and math.isfinite(flips) else -math.inf

    return best(runs, unfitted)
