"""A coordinate network on a noisy image: AdamW, gates, controls; see README.md for the rules.

Usage: python recipes/benchmarks/inr/bench.py [--arms A,B] [--out DIR] [--traces DIR] [--quick]
Resumable: a trace that exists is read back.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from gate_harness.arms import GATES
from gate_harness.figures import draw_rates
from gate_harness.grid import run_arms
from gate_harness.scores import RANGE, member_rows, score_rows
from gate_harness.tasks import members_of
from inr_figures import draw_images, draw_noise
from inr_task import CONDITIONS, InrTask
from inr_verdict import verdict
from reporting import hardware, result_name, write_csv

HERE = Path(__file__).parent
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
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
METRICS = ("psnr", "fit", "noise_share")
EPOCH = 16
SCHEDULE = {
    "steps": 96 * EPOCH,
    "eval_steps": [EPOCH * e for e in (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, *range(32, 97, 8))],
}
QUICK = {"steps": 2 * EPOCH, "eval_steps": [EPOCH, 2 * EPOCH]}
SHOWN = "china"


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
    schedule = QUICK if args.quick else SCHEDULE
    traces = run_arms(
        lambda part: InrTask(part, **schedule),
        ("AdamW", "soft-5", "norm(soft-5)") if args.quick else args.arms,
        members_of(seeds, CONDITIONS, LRS[3:5] if args.quick else LRS),
        args.out / "traces" if args.quick else args.traces,
        group=10,
    )
    rows = [row for arm, trace in traces.items() for row in member_rows(arm, trace, METRICS)]
    scores = [
        row for arm, trace in traces.items() for row in score_rows(arm, trace, "psnr", higher=True)
    ]
    path = args.out / f"{result_name()}.csv"
    write_csv(path, rows)
    draw_rates(
        traces, "psnr", path.with_suffix(".png"), higher=True, label="PSNR, dB (clean image)"
    )
    if not args.quick:
        write_csv(args.out / f"scores_{hardware()}.csv", scores)
    if not args.quick and {"AdamW", "soft-5", "soft-32"} <= set(traces):
        draw_noise(traces, args.out / f"noise_{hardware()}.png", RANGE[1:])
        best = _best_gate(scores)
        draw_images(
            [{arm: 3e-3 for arm in ("AdamW", "soft-5", best)}, _tuned(scores, best, seeds[0])],
            ["same rate", "tuned for the end"],
            args.out / f"images_{hardware()}.png",
            condition=SHOWN,
            seed=seeds[0],
            schedule=SCHEDULE,
        )
    for line in verdict(rows, scores) if "AdamW" in traces else ():
        print(line)


def _best_gate(scores: list[dict]) -> str:
    """Of the gated arms but soft-5 the one with the best mean over the range of rates."""
    means: dict[str, float] = {}
    for row in scores:
        if row["arm"] in GATES and row["arm"] not in ("AdamW", "soft-5"):
            means[row["arm"]] = means.get(row["arm"], 0.0) + float(row["range"])
    return max(means, key=lambda arm: means[arm])


def _tuned(scores: list[dict], best: str, seed: int) -> dict[str, float]:
    return {
        arm: float(row["tuned_lr"])
        for arm in ("AdamW", "soft-5", best)
        for row in scores
        if (row["arm"], row["condition"], row["seed"]) == (arm, SHOWN, seed)
    }


if __name__ == "__main__":
    main()
