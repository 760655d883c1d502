"""Predicted against measured change of the held-out loss, per step, window and epoch; see README.

Usage: python recipes/benchmarks/risk_estimate/bench.py [--out DIR] [--traces DIR] [--quick]
Resumable: a trace that exists is read back. `--tasks A B` makes the traces of some tasks only.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from half_time import half_time_rows
from reporting import hardware, result_name, write_csv
from risk_figures import draw, draw_epochs, draw_windows
from risk_record import load, trace
from risk_statistics import epoch_rows, rows_of
from risk_verdict import sign_rows, summary_rows, verdict

HERE = Path(__file__).parent
SEEDS = range(5)
LRS = (3e-4, 1e-3, 1e-2)
USUAL = [*(("AdamW", lr) for lr in LRS), ("PopRiskAdamW", 1e-3)]
# (task, whether a stream): optimizers and rates
RUNS: dict[tuple[str, bool], list[tuple[str, float]]] = {
    ("A", True): USUAL,
    ("A", False): USUAL,
    ("B", True): USUAL,
    ("B", False): USUAL,
    ("C", False): USUAL,
    ("D", True): [("AdamW", 3e-3)],
    ("D", False): [("AdamW", 3e-3)],
}
QUICK: dict[tuple[str, bool], list[tuple[str, float]]] = {
    ("B", True): [("AdamW", 1e-3)],
    ("A", True): [("PopRiskAdamW", 1e-3)],
    ("A", False): [("AdamW", 1e-2)],
    ("B", False): [("AdamW", 1e-2)],
}


def main() -> None:
    """Train what is missing, write tables and pictures, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tasks", nargs="+", help="make the traces of these tasks and stop")
    parser.add_argument("--quick", action="store_true", help="one seed, short runs, for tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.out / "traces" if args.quick else args.traces
    seeds = args.seeds[:1] if args.quick else args.seeds
    runs = QUICK if args.quick else RUNS
    found = {}
    for (task, stream), settings in runs.items():
        if args.tasks and task not in args.tasks:
            continue
        for optimizer, lr in settings:
            paths = [trace(folder, task, stream, optimizer, lr, s, args.quick) for s in seeds]
            found[task, stream, optimizer, lr] = dict(zip(seeds, map(load, paths), strict=True))
    if not args.tasks:
        report(found, args.out, args.quick)


def report(found: dict, out: Path, quick: bool) -> None:
    """Everything that is made from traces."""
    rows, epochs = [], []
    for (task, stream, optimizer, lr), traces in found.items():
        cell = {
            "task": task,
            "data": "stream" if stream else "reused",
            "optimizer": optimizer,
            "lr": f"{lr:g}",
        }
        for seed, run in traces.items():
            rows += [{**cell, "seed": seed, **row} for row in rows_of(run, stream)]
        if not stream:
            epochs += [{**cell, **row} for row in epoch_rows(list(traces.values()))]
    path = out / f"{result_name()}.csv"
    write_csv(path, rows)
    summary, signs = summary_rows(rows), sign_rows(found)
    halves = half_time_rows(100 if quick else 2000)
    draw(rows, path.with_suffix(".png"))
    if not quick:
        tables = {"summary": summary, "epochs": epochs, "sign_change": signs, "half_time": halves}
        for name, table in tables.items():
            write_csv(out / f"{name}_{hardware()}.csv", table)
        draw_windows(found, out / f"windows_{hardware()}.png")
        draw_epochs(epochs, out / f"epochs_{hardware()}.png")
    for line in verdict(summary, signs, halves):
        print(line)


if __name__ == "__main__":
    main()
