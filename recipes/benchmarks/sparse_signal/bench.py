"""Few relevant inputs: excess error under gates and controls; rules in README.md.

Usage: python recipes/benchmarks/sparse_signal/bench.py [--selection] [--arms MORE ...] [--quick]
Resumable: a trace that exists is read back.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sparse_signal_verdict import table, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))
from gate_harness.arms import GATES
from gate_harness.figures import draw_rates
from gate_harness.grid import run_arms
from gate_harness.scores import member_rows, score_rows
from gate_harness.tasks import members_of
from reporting import hardware, result_name, write_csv
from sparse_signal_figures import draw_differences, draw_weights
from sparse_signal_task import CONDITIONS, MODELS, SparseSignalTask

HERE = Path(__file__).parent
RATES = {  # learning rates and decays
    "linear": ((3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), (0.0, 0.1)),
    "net": ((3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (0.0,)),
}
METRICS = ("excess", "on", "off")
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
        found = run(arms, args.seeds or seeds, folder, steps=20, few=True)
    else:
        kind = "selection" if args.selection else "report"
        arms = list(dict.fromkeys((*(SELECTION_ARMS if args.selection else ARMS), *args.arms)))
        seeds = args.seeds or list(range(100, 105) if args.selection else range(5))
        found = run(arms, seeds, args.traces / kind)
    rows = [
        row
        for traces in found.values()
        for arm, trace in traces.items()
        for row in member_rows(arm, trace, METRICS)
    ]
    scores = scores_of(found)
    stem = f"selection_{hardware()}" if args.selection else result_name()
    write_csv(args.out / f"{stem}.csv", rows)
    draw_differences(scores, args.out / f"{stem}.png")
    if not args.quick:
        prefix = "selection_" if args.selection else ""
        write_csv(args.out / f"{prefix}scores_{hardware()}.csv", scores)
        write_csv(args.out / f"{prefix}summary_{hardware()}.csv", table(scores))
        undecayed = table(scores_of(found, decay=0.0))
        write_csv(args.out / f"{prefix}undecayed_{hardware()}.csv", undecayed)
    if not (args.quick or args.selection):
        for name, traces in found.items():
            path = args.out / f"rates_{name}_{hardware()}.png"
            draw_rates(shown(traces), "excess", path, higher=False, label="excess error", log=True)
        draw_weights(
            [row for row in rows if row["arm"] in SHOWN], args.out / f"weights_{hardware()}.png"
        )
    for line in verdict(scores):
        print(line)


def run(
    arms: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    steps: int | None = None,
    few: bool = False,
) -> dict[str, Traces]:
    """Traces by family and arm."""
    found = {}
    for name, (lrs, decays) in RATES.items():
        members = members_of(seeds, CONDITIONS[name], lrs[2:5:2] if few else lrs, decays)
        build = partial(SparseSignalTask, steps=steps)
        found[name] = run_arms(build, arms, members, folder / name, group=MODELS[name].group)
    return found


def scores_of(found: dict[str, Traces], decay: float | None = None) -> list[dict]:
    """Score rows of all families and arms, of all decays or of one."""
    return [
        {"metric": "excess", "higher": 0, **row}
        for traces in found.values()
        for arm, trace in traces.items()
        for row in score_rows(
            arm, trace if decay is None else with_decay(trace, decay), "excess", higher=False
        )
    ]


def with_decay(trace: dict, decay: float) -> dict:
    """The members of one weight decay."""
    mine = trace["weight_decay"] == decay
    return {key: x if key == "eval_step" else x[..., mine] for key, x in trace.items()}


def shown(traces: Traces) -> Traces:
    """What the figures draw: some arms; worse than untrained counts as untrained."""
    return {
        arm: {**traces[arm], "excess": np.fmin(traces[arm]["excess"], traces[arm]["excess"][:1])}
        for arm in SHOWN
        if arm in traces
    }


if __name__ == "__main__":
    main()
