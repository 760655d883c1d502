"""Gates against AdamW on the selection seeds: reward at matched KL, accuracy, flips fitted.

Usage: python recipes/benchmarks/noisy_dpo/gates_table.py [--runs DIR] [--out FILE] [ARM ...]

A row is an arm under a condition. `reward_kl4` is the largest mean reward over learning rates and
epochs at a KL of at most 4, along straight lines between evaluations, of the means over seeds;
`delta_kl4` its difference from A1's, with `se_kl4` the standard error over seeds of the same
difference seed by seed; `points_delta_kl4` is the difference without what lies between evaluations.
A1 has all of its learning rates to choose from, an arm those in `lrs`: too few cost it some reward.
"""

import argparse
import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
from grid import load

KLS, FITS = (1.0, 2.0, 4.0, 8.0), (0.92, 0.94)
BASELINE = "A1"

Trace = dict[str, np.ndarray]


def reward_at(kl: np.ndarray, reward: np.ndarray, limit: float, between: bool = True) -> float:
    """Largest reward of a path where kl <= limit, linear between its points or at them only."""
    best = -np.inf
    for i in range(len(kl)):
        if kl[i] <= limit:
            best = max(best, reward[i])
        if between and i and (kl[i] - limit) * (kl[i - 1] - limit) < 0:
            share = (limit - kl[i - 1]) / (kl[i] - kl[i - 1])
            best = max(best, reward[i - 1] + share * (reward[i] - reward[i - 1]))
    return best


def frontier(traces: list[Trace], members: np.ndarray, limit: float, between: bool = True) -> float:
    """Of the members' mean, over learning rates and epochs."""
    return max(
        reward_at(t["kl"][:, members].mean(1), t["reward"][:, members].mean(1), limit, between)
        for t in traces
    )


def flips_at(traces: list[Trace], members: np.ndarray, fit: float) -> float:
    """Fewest wrong labels fitted where so many right ones are, on the same lines."""
    return -max(
        reward_at(
            -t["clean_fitted"][1:, members].mean(1), -t["flipped_fitted"][1:, members].mean(1), -fit
        )
        for t in traces
    )


def mean_accuracy(traces: list[Trace], members: np.ndarray) -> np.ndarray:
    """Of each learning rate and epoch."""
    return np.stack([t["accuracy"][1:, members].mean(1) for t in traces])


def best_accuracies(traces: list[Trace], members: np.ndarray) -> np.ndarray:
    """Of each member, over learning rates and epochs."""
    found: np.ndarray = np.stack([t["accuracy"][1:, members] for t in traces]).max((0, 1))
    return found


def row_of(arm: str, condition: str, traces: list[Trace], base: list[Trace]) -> dict[str, Any]:
    """Numbers of an arm under a condition."""
    members = np.flatnonzero(traces[0]["condition"] == condition)
    accuracy = mean_accuracy(traces, members)
    row: dict[str, Any] = {
        "arm": arm,
        "condition": condition,
        "best_accuracy": accuracy.max(),
        "last_accuracy_best_lr": accuracy[:, -1].max(),
        "last_accuracy_mean_lr": accuracy[:, -1].mean(),
    }
    each = best_accuracies(traces, members) - best_accuracies(base, members)
    row["delta_accuracy"] = row["best_accuracy"] - mean_accuracy(base, members).max()
    row["se_accuracy"] = each.std(ddof=1) / len(each) ** 0.5
    for limit in KLS:
        value = frontier(traces, members, limit)
        each = np.array(
            [frontier(traces, m[None], limit) - frontier(base, m[None], limit) for m in members]
        )
        row[f"reward_kl{limit:g}"] = value
        row[f"delta_kl{limit:g}"] = value - frontier(base, members, limit)
        row[f"se_kl{limit:g}"] = each.std(ddof=1) / len(each) ** 0.5
        points = frontier(traces, members, limit, False) - frontier(base, members, limit, False)
        row[f"points_delta_kl{limit:g}"] = points
    if condition != "flips 0":
        for fit in FITS:
            row[f"flips_at_fit{fit:g}"] = flips_at(traces, members, fit)
    return row


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path(__file__).parent / "runs")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "gates_selection.csv"
    )
    parser.add_argument("--seeds", default="100-101-102")
    parser.add_argument("--lrs", default="", help="of all arms, with commas between")
    parser.add_argument("arms", nargs="*")
    args = parser.parse_args()
    wanted = set(args.lrs.split(",")) - {""}
    found: dict[str, dict[str, Trace]] = {}
    for path in sorted(args.runs.glob(f"*_constant_main_s{args.seeds}.npz")):
        match = re.match(r"(\w+)_lr([\d.e-]+)_beta0.1_", path.name)
        if match and (not wanted or match[2] in wanted):
            found.setdefault(match[1], {})[match[2]] = load(path)
    arms = args.arms or sorted(found)
    rows = []
    for condition in ("flips 0", "flips 30"):
        for arm in arms:
            own, base = (list(found[name].values()) for name in (arm, BASELINE))
            rows.append({**row_of(arm, condition, own, base), "lrs": " ".join(found[arm])})
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    for row in rows:
        line = [f"{row['arm']:6} {row['condition']:8}"]
        line += [f"acc {row['best_accuracy']:.3f}"]
        line += [f"{row['delta_accuracy']:+.3f}({row['se_accuracy']:.3f})"]
        line += [f"last {row['last_accuracy_best_lr']:.3f}"]
        line += [
            f"| {row[f'reward_kl{k:g}']:.3f} {row[f'delta_kl{k:g}']:+.3f}({row[f'se_kl{k:g}']:.3f})"
            for k in KLS
        ]
        line += ["| points"] + [f"{row[f'points_delta_kl{k:g}']:+.3f}" for k in KLS]
        line += [f"| {row.get(f'flips_at_fit{f:g}', np.nan):.3f}" for f in FITS]
        print(" ".join(line), "|", row["lrs"])


if __name__ == "__main__":
    main()
