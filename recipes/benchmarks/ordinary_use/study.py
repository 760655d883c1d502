"""What stops keep in ordinary use, and how well test losses are estimated: runs, tables, plots.

`--only`: some conditions. `--arms`: train further ones (hold20, refit10, refit20). Resumable: a run
whose trace exists is not made again. See README.md for the rules.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import starmap
from pathlib import Path

import torch
from benchmarks.harness.provenance import result_name, write_csv
from benchmarks.ordinary_use.conditions import CONDITIONS
from benchmarks.ordinary_use.estimators import shipped
from benchmarks.ordinary_use.report import (
    arms_table,
    curve_verdict,
    curves_table,
    draw_curves,
    draw_differences,
    verdict,
)
from benchmarks.ordinary_use.runs import Runs, run_all
from benchmarks.ordinary_use.scores import curve_rows, rows_of, summary

TAKES = ("arms", "seeds", "traces", "only")
ARMS = ("full", "sit", "hold10")  # what the verdict needs
QUICK = ("digits-mlp-1200-clean", "breast-cancer-340-clean")  # seconds
SHOWN = (
    "train to the end",
    "train to the end, average",
    "hold-out 10 %",
    "hold-out 10 %, by accuracy",
    "hold-out 10 %, refit",
    "hold-out 10 %, cooldown",
    "hold-out 20 %, refit",
    "hold-out 20 %, cooldown",
    "signal",
    "signal, schedules finished",
    "signal, schedules finished + cooldown",
    "sit out, to the end",
    "sit out, as shipped: best",
    "sit out, as shipped: cooldown",
    "sit out: lowest, patience 10",
    "sit out: lowest, patience 10, cooldown",
    "oracle of clean accuracy",
)


def seeds_of(name: str) -> range:
    """Those of the verdict: fresh when the design was chosen that the condition is run with."""
    if name == "dpo-swapped-6-epochs":
        return range(20, 25)
    return range(15, 20) if 4 < CONDITIONS[name].epochs <= 10 else range(10, 15)


def scored(name: str, seed: int, folder: Path) -> tuple[list[dict], list[dict]]:
    """Rows of the arms and of the curves."""
    torch.set_num_threads(1)
    runs = Runs(condition=CONDITIONS[name], seed=seed, folder=folder)
    return rows_of(runs), curve_rows(runs)


def main(args: argparse.Namespace) -> list[str]:
    """Train what is missing, write tables and plots; the tables and the verdict."""
    torch.set_num_threads(1)
    names = list(QUICK) if args.quick else args.only or list(CONDITIONS)
    for name in names:
        if name not in CONDITIONS:
            raise SystemExit(f"Invalid --only: {name!r}. One of {list(CONDITIONS)}.")
    seeds = [100] if args.quick else args.seeds
    folder = args.out / "traces" if args.quick else args.traces or Path(__file__).parent / "traces"
    plan = [(name, seed) for name in names for seed in seeds or seeds_of(name)]
    run_all(plan, [*dict.fromkeys((*ARMS, *args.arms))], folder, args.jobs)
    cells = [(name, seed, folder) for name, seed in plan]
    if args.jobs == 1:
        found = list(starmap(scored, cells))
    else:
        with ProcessPoolExecutor(args.jobs) as pool:
            found = list(pool.map(scored, *zip(*cells, strict=True)))
    rows = [row for part, _ in found for row in part]
    curves = [row for _, part in found for row in part]
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw_differences(rows, list(SHOWN), path.with_suffix(".png"))
    lines = summary(rows)
    if args.quick:
        return [arms_table(lines), "quick form: no verdict"]
    write_csv(path.with_name(f"summary_{path.name}"), lines)
    write_csv(path.with_name(f"curves_{path.name}"), curves)
    first = dict(reversed(plan))  # a seed of each condition
    drawn = [Runs(condition=CONDITIONS[name], seed=first[name], folder=folder) for name in names]
    draw_curves(drawn, shipped, path.with_name(f"curves_{path.stem}.png"))
    tables = [arms_table(lines), "", curves_table(curves), ""]
    return [*tables, *verdict(rows), *curve_verdict(curves)]
