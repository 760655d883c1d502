"""Steps to 95 % with censoring: medians, ratios of medians, cells chosen on the other seeds."""

import math
from collections.abc import Iterable, Mapping

import numpy as np

__all__ = ["Cell", "Ratio", "Steps", "best_cell", "ratio", "steps_of", "summary_rows", "tuned"]

Cell = tuple[str, str]  # learning rate, decay, as written in the CSV
Steps = dict[int, float]  # by seed; inf where the budget ran out
DRAWS = 10_000
PAPER_RATIO = 4.9  # 29,450 / 5,950


class Ratio(tuple[float, float, float]):
    """Ratio of medians, low, high: inf or 0 where one side ran out of budget, nan where both."""

    def __str__(self) -> str:
        return "{} [{}, {}]".format(*(_text(value) for value in self))

    @property
    def word(self) -> str:
        """Faster or slower where the interval excludes 1; both may be without a figure."""
        value, low, high = self
        if math.isnan(value):
            return "not decided"
        return "faster" if low > 1 else "slower" if high < 1 else "level"


def _text(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.2f}"


def steps_of(rows: Iterable[Mapping[str, object]]) -> dict[str, dict[Cell, Steps]]:
    """By arm, cell and seed, from member rows."""
    found: dict[str, dict[Cell, Steps]] = {}
    for row in rows:
        cell = (str(row["lr"]), str(row["weight_decay"]))
        done = int(str(row["finished_at"]))
        steps = found.setdefault(str(row["arm"]), {}).setdefault(cell, {})
        steps[int(str(row["seed"]))] = done if done > 0 else math.inf
    return found


def middle(values: np.ndarray) -> np.ndarray:
    """Median over the last axis; the upper of the two middle ones, so that inf stays inf."""
    return np.sort(values, -1)[..., values.shape[-1] // 2]


def _resampled(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, count, (DRAWS, count))


def _ends(values: np.ndarray) -> tuple[float, float]:
    """95 % interval by order statistics, since some values may be infinite."""
    ordered = np.sort(values)
    return float(ordered[int(0.025 * len(ordered))]), float(ordered[int(0.975 * len(ordered))])


def median(steps: Steps) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval over seeds."""
    values = np.array(list(steps.values()))
    return float(middle(values)), *_ends(middle(values[_resampled(len(values))]))


def ratio(base: Steps, arm: Steps, budget: int) -> Ratio:
    """Median steps of `base` over those of `arm`, above 1 where the arm is faster; paired seeds.

    A median that ran out of budget counts as the budget, which makes the ratio a bound: too small
    if the base ran out, too large if the arm did. nan if both did.
    """
    seeds = [seed for seed in base if seed in arm]
    both = np.array([[base[s] for s in seeds], [arm[s] for s in seeds]])
    if np.isinf(middle(both)).all():
        return Ratio((math.nan,) * 3)
    top, bottom = np.minimum(middle(both[:, _resampled(len(seeds))]), budget)
    value = np.minimum(middle(both), budget)
    return Ratio((float(value[0] / value[1]), *_ends(top / bottom)))


def best_cell(cells: Mapping[Cell, Steps], budget: int, without: int | None = None) -> Cell:
    """Smallest median over the seeds but one; ties by the mean, unfinished ones at the budget."""

    def cost(cell: Cell) -> tuple[float, float]:
        values = np.array([v for seed, v in cells[cell].items() if seed != without])
        return float(middle(values)), float(np.minimum(values, 1.0 * budget).mean())

    return min(cells, key=cost)


def tuned(cells: Mapping[Cell, Steps], budget: int) -> tuple[Steps, dict[int, Cell]]:
    """Each seed's steps in the cell that is best on the other seeds, and that cell."""
    seeds = list(next(iter(cells.values())))
    alone = len(seeds) == 1
    chosen = {s: best_cell(cells, budget, None if alone else s) for s in seeds}
    return {s: cells[cell][s] for s, cell in chosen.items()}, chosen


def summary_rows(found: dict[str, dict[Cell, Steps]], budget: int) -> list[dict]:
    """For each arm: every cell, then "tuned"; medians and ratios to AdamW's same line."""
    tuned_base = tuned(found["AdamW"], budget)[0] if "AdamW" in found else None
    rows = []
    for arm, cells in found.items():
        lines = [
            (lr, decay, steps, found.get("AdamW", {}).get((lr, decay)))
            for (lr, decay), steps in cells.items()
        ]
        steps, chosen = tuned(cells, budget)
        often = max(chosen.values(), key=list(chosen.values()).count)
        lines.append((f"tuned ({often[0]})", f"tuned ({often[1]})", steps, tuned_base))
        for lr, decay, steps, base in lines:
            values = [f"> {budget}" if math.isinf(v) else f"{v:g}" for v in median(steps)]
            row = {"arm": arm, "lr": lr, "weight_decay": decay, "seeds": len(steps)}
            row["finished"] = sum(map(math.isfinite, steps.values()))
            row |= dict(zip(("median", "low", "high"), values, strict=True))
            compared = ratio(base, steps, budget) if base else Ratio((math.nan,) * 3)
            names = ("AdamW_over_arm", "ratio_low", "ratio_high")
            row |= {n: _text(v) for n, v in zip(names, compared, strict=True)}
            rows.append(row)
    return rows
