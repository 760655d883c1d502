"""Iterations until the error is small, at a tuned learning rate, and their ratios."""

from collections.abc import Sequence

import numpy as np
from gate_harness.scores import interval

__all__ = ["LEVEL", "crossing_rows", "first_steps", "ratio"]

LEVEL = 0.40
WINDOW = 5
Trace = dict[str, np.ndarray]


def first_steps(error: np.ndarray, steps: np.ndarray, window: int = 1) -> np.ndarray:
    """Step of the first evaluation with an error of at most `LEVEL`, infinity where there is none.

    Args:
        error: Of each evaluation and member, shape (E, M).
        steps: Of the evaluations, shape (E,).
        window: Above 1: the median of so many evaluations counts, at the last of them.
    """
    if window > 1:
        views = np.lib.stride_tricks.sliding_window_view(error, window, axis=0)
        error, steps = np.median(views, -1), steps[window - 1 :]
    below = error <= LEVEL
    return np.where(below.any(0), steps[below.argmax(0)].astype(np.float64), np.inf)


def crossing_rows(arm: str, trace: Trace) -> list[dict]:
    """One row for each condition and seed: iterations at the rate that is best for the others.

    Best: the smallest median over the other seeds (a single seed: itself), never = infinity; among
    equals the smallest mean with never = the run's steps.
    """
    end = float(trace["eval_step"][-1])
    first = {
        "first": first_steps(trace["error"], trace["eval_step"]),
        "settled": first_steps(trace["error"], trace["eval_step"], WINDOW),
    }
    rows = []
    for condition in dict.fromkeys(trace["condition"].tolist()):
        chosen = trace["condition"] == condition
        rates = list(dict.fromkeys(trace["lr"][chosen].tolist()))
        seeds = list(dict.fromkeys(trace["seed"][chosen].tolist()))
        tables = {
            name: np.array([_of_rate(values, trace, chosen, lr, seeds) for lr in rates])
            for name, values in first.items()
        }
        for place, seed in enumerate(seeds):
            row: dict = {"arm": arm, "condition": condition, "seed": seed}
            for name, table in tables.items():
                others = np.delete(table, place, 1) if len(seeds) > 1 else table
                keys = [(np.median(x), np.minimum(x, end).mean()) for x in others]
                best = keys.index(min(keys))
                value = table[best, place]
                row |= {
                    f"{name}_lr": f"{rates[best]:g}",
                    name: int(min(value, end)),
                    f"{name}_never": int(np.isinf(value)),
                }
            rows.append(row)
    return rows


def _of_rate(values, trace: Trace, chosen, lr: float, seeds: list[int]) -> list[float]:
    return [values[chosen & (trace["lr"] == lr) & (trace["seed"] == s)].item() for s in seeds]


def ratio(
    rows: Sequence[dict], arm: str, condition: str, base: str = "AdamW", column: str = "first"
) -> tuple[float, float, float]:
    """Iterations of `base` over those of `arm`, above 1 where `arm` is faster, with its interval.

    Geometric mean over seeds, paired. A run that never got there counts with all its steps, so
    that the ratio is too large where `arm` has such runs.
    """
    of = {
        (row["arm"], int(row["seed"])): float(row[column])
        for row in rows
        if row["condition"] == condition
    }
    seeds = sorted(seed for name, seed in of if name == arm)
    logs = {(condition, s): float(np.log(of[base, s] / of[arm, s])) for s in seeds}
    mean, low, high = np.exp(interval(logs))
    return float(mean), float(low), float(high)
