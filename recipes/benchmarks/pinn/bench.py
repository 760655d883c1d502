"""A PINN with a noisy initial condition: AdamW, gates, controls; see README.md for the rules.

Usage: python recipes/benchmarks/pinn/bench.py [--arms A,B] [--out DIR] [--traces DIR] [--quick]
Resumable: a trace that exists is read back.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from crossing import crossing_rows, first_steps
from gate_harness.figures import draw_rates
from gate_harness.grid import run_arms
from gate_harness.scores import member_rows, score_rows
from gate_harness.tasks import members_of
from pinn_figures import draw_crossing
from pinn_task import CONDITIONS, PinnTask
from pinn_verdict import verdict
from reporting import hardware, result_name, write_csv

HERE = Path(__file__).parent
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ARMS = (
    "AdamW",
    "paper",
    "snr-fresh",
    "soft-5",
    "soft-32",
    "snr-32",
    "norm(soft-5)",
    "ratio(soft-5)",
    "norm(soft-32)",
    "ratio(soft-32)",
)
STEPS, EVERY = 2000, 10


def main() -> None:
    """Train what is missing, write tables and plots, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=ARMS)
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")])
    parser.add_argument("--quick", action="store_true", help="few steps and rates, for tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = args.seeds or ([0, 1] if args.quick else list(range(5)))
    lrs = LRS[3:5] if args.quick else LRS
    steps = 150 if args.quick else STEPS
    members = members_of(seeds, CONDITIONS, lrs)
    traces = run_arms(
        lambda part: PinnTask(part, steps=steps, every=EVERY),
        ("AdamW", "soft-5", "norm(soft-5)") if args.quick else args.arms,
        members,
        args.out / "traces" if args.quick else args.traces,
        group=len(members) // len(CONDITIONS),
    )
    rows, scores = [], []
    for arm, trace in traces.items():
        firsts = first_steps(trace["error"], trace["eval_step"])
        for row, first in zip(member_rows(arm, trace, ("error", "misfit")), firsts, strict=True):
            rows.append(row | {"first": "never" if first == float("inf") else int(first)})
        for row, iterations in zip(
            score_rows(arm, trace, "error", higher=False), crossing_rows(arm, trace), strict=True
        ):
            scores.append(row | iterations)
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw_rates(
        traces, "error", path.with_suffix(".png"), higher=False, label="relative l2 error", log=True
    )
    if not args.quick:
        write_csv(args.out / f"scores_{hardware()}.csv", scores)
        draw_crossing(traces, scores, args.out / f"crossing_{hardware()}.png")
    for line in verdict(scores) if "AdamW" in traces else ():
        print(line)


if __name__ == "__main__":
    main()
