"""Wrong training labels: accuracy on clean test data under gates and controls; rules in README.md.

Usage: python recipes/benchmarks/noisy_labels/bench.py [--selection] [--arms MORE ...] [--quick]
Resumable: a trace that exists is read back.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from noisy_labels_verdict import table, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
from gate_harness.arms import GATES
from gate_harness.figures import draw_rates
from gate_harness.grid import run_arms
from gate_harness.scores import member_rows, score_rows
from gate_harness.tasks import members_of
from noisy_labels_figures import draw_differences, draw_fitted
from noisy_labels_task import FLIPS, SETS, NoisyLabelsTask
from reporting import hardware, result_name, write_csv

HERE = Path(__file__).parent
LRS = {
    "digits": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "breast_cancer": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}
METRICS = {"accuracy": True, "loss": False, "fitted_wrong": False, "fitted_clean": True}
SCORED = ("accuracy", "loss")
ARMS = (
    "AdamW",
    "soft-32",
    "norm(soft-32)",
    "ratio(soft-32)",
    "paper",
    "soft-5",
    "norm(soft-5)",
    "ratio(soft-5)",
    "mask(soft-5)",
    "snr-32",
    "snr-fresh",
    "soft-5-norm",
    "snr-fresh-norm",
)
SELECTION_ARMS = (*GATES, "ratio(soft-5)", "norm(soft-5)")
SHOWN = (
    "AdamW",
    "soft-32",
    "norm(soft-32)",
    "ratio(soft-32)",
    "paper",
    "soft-5",
    "ratio(soft-5)",
    "snr-32",
)

Traces = dict[str, dict]


def main() -> None:
    """Train what is missing, write tables and plots, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+", default=[], help="added to the usual ones")
    parser.add_argument("--selection", action="store_true", help="all gates on seeds 100-104")
    parser.add_argument("--quick", action="store_true", help="few arms and steps, for tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        arms, seeds, folder = ["AdamW", "soft-5", "norm(soft-5)"], [0, 1], args.out / "traces"
        found = run(arms, args.seeds or seeds, folder, steps=20, flips=(0, 20), few=True)
    else:
        kind = "selection" if args.selection else "report"
        arms = list(dict.fromkeys((*(SELECTION_ARMS if args.selection else ARMS), *args.arms)))
        seeds = args.seeds or list(range(100, 105) if args.selection else range(5))
        found = run(arms, seeds, args.traces / kind)
    rows = [
        row
        for traces in found.values()
        for arm, trace in traces.items()
        for row in member_rows(arm, trace, tuple(METRICS))
    ]
    scores = scores_of(found)
    stem = f"selection_{hardware()}" if args.selection else result_name()
    write_csv(args.out / f"{stem}.csv", rows)
    draw_differences(scores, args.out / f"{stem}.png")
    if not args.quick:
        prefix = "selection_" if args.selection else ""
        write_csv(args.out / f"{prefix}scores_{hardware()}.csv", scores)
        write_csv(args.out / f"{prefix}summary_{hardware()}.csv", table(scores))
    if not (args.quick or args.selection):
        for name, traces in found.items():
            path = args.out / f"rates_{name}_{hardware()}.png"
            some = {arm: traces[arm] for arm in SHOWN if arm in traces}
            draw_rates(some, "accuracy", path, higher=True, label="clean test accuracy")
        draw_fitted(
            [row for row in rows if row["arm"] in SHOWN], args.out / f"fitted_{hardware()}.png"
        )
    for line in verdict(scores):
        print(line)


def run(
    arms: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    steps: int | None = None,
    flips: Sequence[int] = FLIPS,
    few: bool = False,
) -> dict[str, Traces]:
    """Traces by data set and arm."""
    found = {}
    for name, lrs in LRS.items():
        conditions = [f"{name} {share}%" for share in flips]
        members = members_of(seeds, conditions, (3e-4, 3e-3) if few else lrs)
        build = partial(NoisyLabelsTask, steps=steps)
        found[name] = run_arms(build, arms, members, folder / name, group=SETS[name].group)
    return found


def scores_of(found: dict[str, Traces]) -> list[dict]:
    """Score rows of all data sets, arms and scored metrics."""
    return [
        {"metric": metric, "higher": int(METRICS[metric]), **row}
        for metric in SCORED
        for traces in found.values()
        for arm, trace in traces.items()
        for row in score_rows(arm, trace, metric, higher=METRICS[metric])
    ]


if __name__ == "__main__":
    main()
