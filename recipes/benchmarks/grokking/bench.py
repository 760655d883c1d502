"""Steps to 95 % on modular division, with and without a gate; see README.md for the rules.

Usage: python recipes/benchmarks/grokking/bench.py [--out DIR] [--traces DIR] [--seeds 0 1 ...]
       [--arms NAME ...] [--quick | --full [--device cuda]]
Resumable: a trace that exists is read back.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cells import BEST, cells_of, looked_at
from division_task import DivisionTask, Setting
from gate_harness.grid import run_arms
from gate_harness.scores import member_rows
from gate_harness.tasks import Member, members_of
from grokking_figures import draw
from grokking_scores import steps_of, summary_rows
from reporting import hardware, result_name, write_csv
from verdict import lines_of

HERE = Path(__file__).parent
ARMS = (  # others by --arms
    "AdamW",
    "paper",
    "soft-5",
    "soft-32",
    "soft-32-decay",
    "norm(soft-32)",
    "ratio(soft-32)",
    "mask(soft-32)",
    "grokfast",
    "paper-decay",
    "soft-5-decay",
)
LOOK = "look"
METRICS = ("accuracy", "train_accuracy", "weight_norm")
LRS, DECAYS = (3e-3, 1e-2, 3e-2), (0.1, 0.3, 1.0)
LOOK_SEED, LOOK_PART = 100, 3
DEFAULT = Setting(share=0.4, width=48, steps=3000)
FULL = Setting(p=97, width=128, layers=2, steps=40_000, every=50)
QUICK = Setting(p=11, width=16, steps=60, every=10)
Trace = dict[str, np.ndarray]


def main() -> None:
    """Train what is missing, write tables and the plot, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--quick", action="store_true", help="a toy of the same form, for tests")
    parser.add_argument("--full", action="store_true", help="p = 97, two layers: for a GPU")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = replace(QUICK if args.quick else FULL if args.full else DEFAULT, device=args.device)
    lrs, decays, folder = LRS, DECAYS, args.traces / setting.name.replace(" ", "_")
    if args.quick:
        args.arms, args.seeds = ["AdamW", "paper", "soft-5", "norm(soft-5)"], [0]
        lrs, decays, folder = LRS[1:], DECAYS[1:], args.out / "traces"
    members = members_of([LOOK_SEED], [LOOK], lrs, decays)
    look = look_at_grid(setting, looked_at(args.arms), members, folder / LOOK)
    traces = {arm: run_arm(setting, arm, look, folder, args.seeds) for arm in args.arms}
    report(look, traces, setting.steps, args.out, whole=not args.quick)


def look_at_grid(
    setting: Setting, arms: list[str], members: list[Member], folder: Path
) -> list[dict]:
    """Member rows of one seed on the whole grid, by a third of the budget."""
    build = partial(DivisionTask, setting=replace(setting, steps=setting.steps // LOOK_PART))
    traces = run_arms(build, arms, members, folder, group=len(members))
    return [row for arm, trace in traces.items() for row in member_rows(arm, trace, METRICS)]


def run_arm(setting: Setting, arm: str, look: list[dict], folder: Path, seeds: list[int]) -> Trace:
    """The trace of an arm in its cells, two cells at a time."""
    members = [
        Member(seed=seed, condition=setting.name, lr=float(lr), weight_decay=float(decay))
        for lr, decay in cells_of(arm, look)
        for seed in seeds
    ]
    build = partial(DivisionTask, setting=setting)
    return run_arms(build, [arm], members, folder, group=BEST * len(seeds))[arm]


def report(
    look: list[dict], traces: dict[str, Trace], budget: int, out: Path, *, whole: bool
) -> None:
    """Tables, plot and verdict."""
    rows = [row for arm, trace in traces.items() for row in member_rows(arm, trace, METRICS)]
    path = out / f"{result_name()}.csv"
    write_csv(path, look + rows)
    found = steps_of(rows)
    if whole:
        write_csv(out / f"summary_{hardware()}.csv", summary_rows(found, budget))
    draw(look, found, traces, path.with_suffix(".png"), (budget // LOOK_PART, budget))
    for line in lines_of(found, budget):
        print(line)


if __name__ == "__main__":
    main()
