"""The claim at equal settings: AdamW and the gates at the rate and decay of Power et al.

Usage: python recipes/benchmarks/grokking/equal.py [--out DIR] [--traces DIR] [--arms NAME ...]
Resumable: a trace that exists is read back. Rule: README.md, "Equal settings, a longer budget".
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import DEFAULT, HERE, METRICS
from cells import POWER
from division_task import DivisionTask
from gate_harness.grid import run_arms
from gate_harness.scores import member_rows
from gate_harness.tasks import Member
from grokking_figures import draw_curves
from grokking_scores import median, ratio, steps_of
from reporting import hardware, write_csv

STEPS = 15_000
ARMS = (
    "AdamW",
    "paper",
    "soft-32",
    "norm(soft-32)",
    "ratio(soft-32)",
    "soft-32-decay",
    "mask(soft-32)",
    "grokfast",
    "paper-decay",
)


def main() -> None:
    """Train what is missing, write the table and the picture, print ratios to AdamW."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--traces", type=Path, default=HERE / "traces" / "equal")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    setting = replace(DEFAULT, steps=STEPS, every=50)
    lr, decay = map(float, POWER)
    members = [
        Member(seed=seed, condition=setting.name, lr=lr, weight_decay=decay) for seed in range(5)
    ]
    build = partial(DivisionTask, setting=setting)
    traces = {}
    for arm in args.arms:
        traces |= run_arms(build, [arm], members, args.traces, group=len(members))
        rows = [row for name, trace in traces.items() for row in member_rows(name, trace, METRICS)]
        write_csv(args.out / f"equal_{hardware()}.csv", rows)
    draw_curves(traces, args.out / f"equal_{hardware()}.png")
    found = steps_of(rows)
    for arm in args.arms:
        steps = found[arm][POWER]
        done = sum(step <= STEPS for step in steps.values())
        said = (
            ""
            if arm == "AdamW"
            else f"; AdamW / {arm} {ratio(found['AdamW'][POWER], steps, STEPS)}"
        )
        print(f"{arm}: {done} of {len(steps)} done, median {median(steps)[0]:.0f}{said}")


if __name__ == "__main__":
    main()
