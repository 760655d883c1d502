"""From traces to one row per member and rule, and to the verdict that the README defines."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import ours
import rivals
from grid import Cell, load

__all__ = [
    "CHOSEN",
    "PRIMARY",
    "between",
    "bootstrap",
    "hold_out_rules",
    "per_seed",
    "rows_of",
    "task_of",
]

CAP = 1.0
PRIMARY = "hold-out 10 %"
# Rivals' open numbers, the best of those tried on the selection seeds (`selection.py`).
CHOSEN = {
    "EB criterion": 1,
    "EB criterion x 2": 1,
    "raw U < 0": 1,
    "C_t < 0": 3,
    "gradient disparity t1": 5,
    "gradient disparity t2": 2,
    "Label Wave": 5,
    "hold-out": 10,
}

Kept = tuple[str, np.ndarray]  # the run that the weights come from, and the evaluation per member


def hold_out_rules(trace: dict, patience: dict[str, int] = CHOSEN) -> Iterator[tuple[str, Kept]]:
    """All ways of holding data out: share, criterion, patience, refit."""
    for share in (10, 20):
        for by in ("loss", "accuracy"):
            for wait in (5, 10):
                kept = rivals.hold_out(trace, share, wait, by)
                if kept is None:
                    continue
                usual = by == "loss" and wait == patience["hold-out"]
                name = (
                    f"hold-out {share} %" if usual else f"hold-out {share} %, {by}, patience {wait}"
                )
                yield name, (f"hold{share}", kept)
                if usual:
                    last = len(trace["full/test_loss"]) - 1
                    yield f"{name}, refit", ("full", np.minimum(kept, last))


def rival_rules(trace: dict, chosen: dict[str, int]) -> Iterator[tuple[str, Kept]]:
    """Everything that is not ours."""
    ported: dict[str, Callable[[int], np.ndarray | None]] = {
        "EB criterion": lambda p: rivals.eb_criterion(trace, p),
        "EB criterion x 2": lambda p: rivals.eb_criterion(trace, p, stretch=2.0),
        "raw U < 0": lambda p: rivals.raw_u(trace, p),
        "C_t < 0": lambda p: rivals.lagged_product(trace, p),
        "gradient disparity t1": lambda p: rivals.gradient_disparity(trace, p),
        "gradient disparity t2": lambda p: rivals.gradient_disparity(trace, p, in_a_row=True),
        "Label Wave": lambda p: rivals.label_wave(trace, patience=p),
    }
    for name, rule in ported.items():
        kept = rule(chosen[name])
        if kept is not None:
            yield name, ("full", kept)
    yield from hold_out_rules(trace, chosen)
    loss = trace["full/test_loss"]
    yield "train to the end", ("full", np.full(loss.shape[1], len(loss) - 1))
    yield "fixed budget", ("full", rivals.fixed_budget(trace))
    yield "oracle", ("full", loss.argmin(0))
    yield "oracle of accuracy", ("full", np.nanargmax(trace["full/test_metric"], 0))


def rows_of(cell: Cell, path: Path, chosen: dict[str, int] = CHOSEN) -> list[dict]:
    """One row per member: the regret of each rule, and what it loses of the clean metric."""
    trace = load(path)
    loss, metric = trace["full/test_loss"], trace["full/test_metric"]
    steps, last = trace["full/eval_step"], len(loss) - 1
    best, best_metric = loss.min(0), np.nanmax(metric, 0)
    fired: dict[str, np.ndarray] = {}
    onsets: dict[str, np.ndarray] = {}
    rules: list[tuple[str, Kept]] = list(rival_rules(trace, chosen))
    for name, (kind, config) in ours.VARIANTS.items():
        stops, onset = ours.stop_steps(trace, cell.schedule, kind, config, stream=cell.task == "T8")
        kept = np.interp(stops, steps, np.arange(last + 1))  # a stop may fall between evaluations
        fired[name], onsets[name] = stops < int(trace["full/total_steps"]), onset
        rules.append((name, ("full", kept)))
    member = np.arange(loss.shape[1])
    rows = [
        {
            "task": task_of(cell.task, str(trace["condition"][m])),
            "condition": str(trace["condition"][m]),
            "optimizer": cell.optimizer,
            "lr": cell.lr,
            "batch": cell.batch,
            "schedule": cell.schedule,
            "seed": int(trace["seed"][m]),
            "oracle": round(float(loss[:, m].argmin()) / last, 4),
            "kept": round(float(dict(rules)["poprisk"][1][m]) / last, 4),
            "onset": int(onsets["poprisk"][m]),
            "stopped": int(fired["poprisk"][m]),
        }
        for m in member
    ]
    for name, (run, kept) in rules:
        found = between(trace[f"{run}/test_loss"], kept) - best
        regret = np.minimum(np.nan_to_num(found, nan=CAP), CAP)
        lost = best_metric - between(trace[f"{run}/test_metric"], kept)
        for m in member:
            rows[m][f"regret: {name}"] = round(float(regret[m]), 5)
            rows[m][f"lost: {name}"] = round(float(lost[m]), 5)
    return rows


def between(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values of shape (E, M) at the fractional row `at[m]` of each column, linearly."""
    values = np.minimum(values, 1e30)  # a run that diverged is infinite, and 0 * inf is NaN
    below = np.floor(at).astype(int)
    above = np.minimum(below + 1, len(values) - 1)
    member, part = np.arange(values.shape[1]), at - below
    return (1 - part) * values[below, member] + part * values[above, member]


def task_of(task: str, condition: str) -> str:
    """T7 is the part of T1 that has no flips; the sizes of T1 are one task."""
    if not task.startswith("T1"):
        return task
    return "T7" if " 0% " in f" {condition} " else "T1"


def per_seed(rows: list[dict], rule: str, value: str = "regret") -> dict[tuple[str, int], float]:
    """Mean over a task's cells, per (task, seed); without the tasks a rule does not apply to."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.get(f"{value}: {rule}", "") != "":
            found[row["task"], int(row["seed"])].append(float(row[f"{value}: {rule}"]))
    return {key: float(np.mean(values)) for key, values in found.items()}


def bootstrap(
    differences: dict[tuple[str, int], float], draws: int = 10_000
) -> tuple[float, float, float]:
    """Mean over tasks, and its 95 % interval with seeds drawn anew within each task."""
    tasks = sorted({task for task, _ in differences})
    random = np.random.default_rng(0)
    means, samples = [], []
    for task in tasks:
        values = np.array([v for (t, _), v in sorted(differences.items()) if t == task])
        means.append(values.mean())
        samples.append(values[random.integers(0, len(values), (draws, len(values)))].mean(1))
    low, high = np.quantile(np.mean(samples, axis=0), [0.025, 0.975])
    return float(np.mean(means)), float(low), float(high)
