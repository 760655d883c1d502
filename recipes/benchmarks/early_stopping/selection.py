"""What was chosen on the selection seeds (100-104) of T1-T3, and what it was chosen from.

Usage: python recipes/benchmarks/early_stopping/selection.py [--traces DIR] [--out DIR]
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import ours
import rivals
import torch
from grid import FULL_GRID, SELECTION_SEEDS, cells, load, trace
from scores import CAP, between, task_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import hardware, write_csv

HERE = Path(__file__).parent


def candidates(found: dict, schedule: str) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (run, kept evaluation) for all settings that were compared."""
    loss = found["full/test_loss"]
    tried: dict[str, tuple[str, np.ndarray]] = {}
    for kind in ("pooled", "white"):
        for kappa in (1.5, 1.75, 2.0, 2.25, 2.5, 3.0):
            for stretch in (1.0, 1.5, 2.0):
                config = replace(ours.DEFAULT, kappa=kappa, stretch=stretch)
                tried[f"{kind}, kappa {kappa:g}, stretch {stretch:g}"] = config, kind
    for confidence in (0.25, 0.5, 1.0):
        config = replace(ours.DEFAULT, confidence=confidence)
        tried[f"white, confidence {confidence:g}"] = config, "white"
    for threshold in (0.8, 0.9, 1.1):
        config = replace(ours.DEFAULT, threshold=threshold, arm_threshold=1.05 * max(1, threshold))
        tried[f"white, threshold {threshold:g}"] = config, "white"
    for windows in (4, 10**9):
        config = replace(ours.DEFAULT, unarmed_windows=windows)
        tried[f"white, unarmed windows {windows:g}"] = config, "white"
    kept = {}
    for name, (config, kind) in tried.items():
        stops, _ = ours.stop_steps(found, schedule, kind, config, stream=False)
        at = np.interp(stops, found["full/eval_step"], np.arange(len(loss)))
        kept[name] = "full", at
    for patience in (1, 2, 3, 5):
        for name, rule in (
            ("EB criterion", rivals.eb_criterion(found, patience)),
            ("EB criterion x 2", rivals.eb_criterion(found, patience, stretch=2.0)),
            ("raw U < 0", rivals.raw_u(found, patience)),
            ("C_t < 0", rivals.lagged_product(found, patience)),
            ("gradient disparity t1", rivals.gradient_disparity(found, patience)),
            ("gradient disparity t2", rivals.gradient_disparity(found, patience, in_a_row=True)),
            ("Label Wave", rivals.label_wave(found, patience=patience)),
        ):
            if rule is not None:
                kept[f"{name}, patience {patience}"] = "full", rule
    for patience in (3, 5, 10, 20):
        held = rivals.hold_out(found, 10, patience)
        kept[f"hold-out 10 %, patience {patience}"] = "hold10", held
    return kept


def main() -> None:
    """Train what is missing, score all candidates, write one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    regrets: dict[str, dict[str, list[float]]] = {}
    for cell in cells(FULL_GRID):
        found = load(trace(cell, SELECTION_SEEDS, args.traces))
        best = found["full/test_loss"].min(0)
        tasks = np.array([task_of(cell.task, str(c)) for c in found["condition"]])
        for name, (run, at) in candidates(found, cell.schedule).items():
            regret = np.nan_to_num(between(found[f"{run}/test_loss"], at) - best, nan=CAP)
            regret = np.minimum(regret, CAP)
            for task in np.unique(tasks):
                regrets.setdefault(name, {}).setdefault(task, []).append(
                    float(regret[tasks == task].mean())
                )
        print(cell.name, flush=True)
    rows = []
    for name, by_task in regrets.items():
        means = {task: float(np.mean(values)) for task, values in sorted(by_task.items())}
        total = np.mean([means[t] for t in ("T1", "T2", "T3") if t in means])
        shown = {t: round(means[t], 5) if t in means else "" for t in ("T1", "T2", "T3", "T7")}
        rows.append({"rule": name, "mean T1-T3": round(float(total), 5), **shown})
    rows.sort(key=lambda row: row["mean T1-T3"])
    write_csv(args.out / f"selection_{hardware()}.csv", rows)
    for row in rows:
        print(f"{row['rule']:42s}", *(f"{key} {row[key]}" for key in list(row)[1:6]))


if __name__ == "__main__":
    main()
