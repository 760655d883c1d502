"""Held-out loss of a small Llama with and without gates; see README.md for the decision rule.

Usage: python recipes/benchmarks/small_lm/bench.py [--selection] [--arms A,B] [--seeds 0,1,2]
    [--size 400k|1m|10m] [--device cuda] [--out DIR] [--traces DIR] [--quick]
Resumable: a trace that exists is read back.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from gate_harness.figures import draw_rates
from gate_harness.grid import run_arms
from gate_harness.scores import interval, member_rows, relative, score_rows
from gate_harness.tasks import members_of
from reporting import hardware, result_name, write_csv
from small_lm_figures import draw_training, gate_rows
from small_lm_task import SIZES, LanguageTask

HERE = Path(__file__).parent
METRICS = ("held_out_loss", "train_loss")
LRS = (3e-4, 1e-3, 3e-3, 1e-2)
FINER = {"1m": (3e-4, 1e-3, 1.7e-3, 3e-3, 1e-2)}  # one more where the arms' best rates lie
SEEDS = {"tiny": "0,1", "400k": "0,1,2", "1m": "0,1,2,3,4", "10m": "0,1,2"}
REPORTED_SIZE = "1m"  # others go to a folder of their own
WEIGHT_DECAY = 0.1
WARM_UP = 0.05
LEVEL = 0.005  # smaller differences count as level
REPORTED = ("AdamW", "soft-32", "norm(soft-32)", "ratio(soft-32)", "soft-5", "paper")
CANDIDATES = (
    "AdamW",
    "soft-5",
    "snr-32",
    "snr-32-norm",
    "snr-fresh-norm",
    "soft-32",
    "soft-5-norm",
    "snr-fresh",
    "hard-32",
    "snr-5",
    "soft-32-norm",
    "soft-32-decay",
    "soft-32-rho999",
    "soft-32-warmup",
    "soft-32-blend",
)
Trace = dict[str, np.ndarray]


def main() -> None:
    """Train what is missing, write tables and plots arm by arm, print the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--traces", type=Path, default=HERE / "traces")
    parser.add_argument("--selection", action="store_true", help="candidates on seeds 100, 101")
    parser.add_argument("--arms", help="comma-separated names of gate_harness.arms.ARMS")
    parser.add_argument("--seeds", help="comma-separated")
    parser.add_argument("--lrs", help="comma-separated")
    parser.add_argument("--size", choices=SIZES, help="1m; 400k with --selection")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--finished", action="store_true", help="tables of what there is")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for tests")
    args = parser.parse_args()
    torch.set_num_threads(1)
    usual_size = "400k" if args.selection else REPORTED_SIZE
    size = "tiny" if args.quick else args.size or usual_size
    arms = (args.arms or ",".join(CANDIDATES if args.selection else REPORTED)).split(",")
    usual = "100,101" if args.selection else SEEDS[size]
    seeds = [int(seed) for seed in (args.seeds or usual).split(",")]
    lrs = [float(lr) for lr in args.lrs.split(",")] if args.lrs else FINER.get(size, LRS)
    folder = (args.out / "traces" if args.quick else args.traces) / size
    traces: dict[str, Trace] = {}
    for arm in arms:
        here = [s for s in seeds if not args.finished or is_finished(arm, s, len(lrs), folder)]
        if not here:
            continue
        traces[arm] = joined([train_seed(arm, s, lrs, size, args.device, folder) for s in here])
        rows, scores = tables(traces, size)
        if args.selection:
            write_csv(args.out / f"selection_{hardware()}.csv", rows)
            write_csv(args.out / f"selection_scores_{hardware()}.csv", scores)
    if not args.selection:
        out = args.out if size in ("tiny", REPORTED_SIZE) else args.out / size
        path = out / f"{result_name()}.csv"
        write_csv(path, rows)
        if not args.quick:
            write_csv(out / f"scores_{hardware()}.csv", scores)
            write_csv(out / f"gate_{hardware()}.csv", gate_rows(traces))
            draw_training(traces, out / f"training_{hardware()}.png")
        picture = path.with_suffix(".png")
        draw_rates(traces, METRICS[0], picture, higher=False, label="held-out loss (nats)")
    for line in verdict(scores):
        print(line)


def warm_up(steps: int) -> Callable[[float], float]:
    """From the share of the run that is done to a factor: linear over 5 % of it, then 1."""
    warm = max(1, round(WARM_UP * steps))
    return lambda done: min(1.0, (round(done * steps) + 1) / warm)


def train_seed(
    arm: str,
    seed: int,
    lrs: Sequence[float],
    size: str,
    device: str,
    folder: Path,
) -> Trace:
    """All rates of a seed, one model at a time: stacking gains nothing at this size."""
    members = members_of([seed], [""], lrs, [WEIGHT_DECAY])
    return run_arms(
        lambda some: LanguageTask(some, SIZES[size], device=device),
        [arm],
        members,
        folder / f"seed_{seed}",
        group=1,
        schedule=warm_up(SIZES[size].steps),
    )[arm]


def is_finished(arm: str, seed: int, rates: int, folder: Path) -> bool:
    """Whether all rates of a seed have been trained."""
    return all((folder / f"seed_{seed}" / f"{arm}_{k}.npz").exists() for k in range(rates))


def joined(traces: list[Trace]) -> Trace:
    """One trace of the members of several, which were evaluated at the same steps."""
    columns = {key: [trace[key] for trace in traces] for key in traces[0] if key != "eval_step"}
    return {
        "eval_step": traces[0]["eval_step"],
        **{key: np.concatenate(parts, -1) for key, parts in columns.items()},
    }


def tables(traces: dict[str, Trace], size: str) -> tuple[list[dict], list[dict]]:
    """Rows of members and of scores; training loss at the rates that the held-out loss chose."""
    rows, scores = [], []
    for arm, trace in traces.items():
        rows += [row | {"size": size} for row in member_rows(arm, trace, METRICS)]
        of_train = score_rows(arm, trace, METRICS[1], higher=False)
        for row, train in zip(
            score_rows(arm, trace, METRICS[0], higher=False), of_train, strict=True
        ):
            here = np.isclose(trace["lr"], float(row["tuned_lr"])) & (trace["seed"] == row["seed"])
            (m,) = np.flatnonzero(here)
            row |= {"train_tuned": f"{trace[METRICS[1]][-1, m]:.6g}", "train_range": train["range"]}
            scores.append(row | {"metric": METRICS[0], "higher": 0, "size": size})
    return rows, scores


def compared(scores: list[dict], arm: str, base: str, column: str) -> tuple[float, float, float]:
    """Mean relative difference over seeds and its interval; positive where `arm` is better."""
    found = {(r["arm"], int(r["seed"])): float(r[column]) for r in scores if r[column] != ""}
    seeds = sorted({seed for name, seed in found if name == arm})
    return interval({("", s): relative(found[arm, s], found[base, s], higher=False) for s in seeds})


def word(mean: float, low: float, high: float) -> str:
    """Point 2 of the decision rule."""
    if low > 0 and mean >= LEVEL:
        return "better"
    return "worse" if high < 0 and mean <= -LEVEL else "level"


def verdict(scores: list[dict]) -> list[str]:
    """The decision rule of the README, a line for each arm and control."""
    arms = list(dict.fromkeys(row["arm"] for row in scores))
    lines = []
    for arm in arms:
        bases = ["AdamW", f"norm({arm})", f"ratio({arm})"]
        for base in (b for b in bases if b in arms and b != arm):
            parts = []
            for column in ("tuned", "range"):
                found = compared(scores, arm, base, column)
                mean, low, high = (100 * x for x in found)
                parts.append(f"{column} {mean:+.2f} % [{low:+.2f}, {high:+.2f}]: {word(*found)}")
            lines.append(f"{arm} against {base}: " + "; ".join(parts))
    return lines


if __name__ == "__main__":
    main()
