"""Does the interval of the noise rate hold the true rate, also where the model has hardly learned?

Usage: python recipes/benchmarks/noise_rate_coverage/bench.py [--out DIR] [--quick]
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch
from margins import FAMILIES, draw

from poprisk_integrations.core.noise_rate import estimate_noise_rate
from poprisk_integrations.core.untrained_margins import UntrainedMargins

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import result_name, write_csv

RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
AUCS = (0.52, 0.6, 0.68, 0.75, 0.85, 0.95)
PAIRS = (200, 1000, 5000)
DRAWS = 100
BATCH = 16  # pairs per step


def cell(task):
    """One row: what the intervals of many draws are worth."""
    family, auc, pairs, rate, draws = task
    torch.set_num_threads(1)
    place = (list(FAMILIES).index(family), round(1000 * auc), pairs, round(100 * rate))
    covered, told, low, high, rates = [], [], [], [], []
    for number in range(draws):
        random = np.random.default_rng((7, *place, number))
        margins = draw(family, auc, pairs, rate, random)
        record = UntrainedMargins(pairs)
        record.record(torch.arange(pairs), torch.as_tensor(margins), torch.arange(pairs) // BATCH)
        estimate = estimate_noise_rate(record)
        covered.append(estimate.low <= rate <= estimate.high)
        told.append(estimate.informative)
        low.append(estimate.low)
        high.append(estimate.high)
        if estimate.rate is not None:
            rates.append(estimate.rate)
    covered, told = np.array(covered), np.array(told)
    return {
        "family": family,
        "auc": auc,
        "pairs": pairs,
        "rate": rate,
        "draws": draws,
        "coverage": round(float(covered.mean()), 3),
        "told": round(float(told.mean()), 3),
        "coverage_where_told": round(float(covered[told].mean()), 3) if told.any() else "",
        "mean_low": round(float(np.mean(low)), 3),
        "mean_high": round(float(np.mean(high)), 3),
        "mean_rate_where_told": round(float(np.mean(rates)), 3) if rates else "",
    }


def verdict(rows):
    """By the rule of the README."""
    missed = [row for row in rows if row["coverage"] < 0.9]
    often = [row for row in rows if row["told"] >= 0.5]
    misled = [row for row in often if row["coverage_where_told"] < 0.9]
    print(
        f"{len(rows)} cells; coverage below 0.90 in {len(missed)} (smallest "
        f"{min(row['coverage'] for row in rows)}); told in at least half of the draws in "
        f"{len(often)}, of which with coverage below 0.90 where told: {len(misled)}."
    )
    for row in missed + [row for row in misled if row not in missed]:
        print({name: row[name] for name in row if name != "draws"})


def draw_figure(rows, path):
    """Families by rates; in each field coverage in %, coloured by how often a rate is told."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    rates, aucs, pairs = (sorted({row[k] for row in rows}) for k in ("rate", "auc", "pairs"))
    figure = Figure(figsize=(2.6 * len(rates) + 1, 1.5 * len(families) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(families), len(rates), squeeze=False)
    for (i, family), (j, rate) in product(enumerate(families), enumerate(rates)):
        axis = axes[i][j]
        told = np.zeros((len(pairs), len(aucs)))
        for row in rows:
            if (row["family"], row["rate"]) != (family, rate):
                continue
            y, x = pairs.index(row["pairs"]), aucs.index(row["auc"])
            told[y, x] = row["told"]
            bad = row["coverage"] < 0.9
            axis.text(
                x, y, f"{100 * row['coverage']:.0f}", ha="center", va="center", fontsize=7,
                color="#D55E00" if bad else "black", fontweight="bold" if bad else "normal",
            )  # fmt: skip
        image = axis.imshow(told, vmin=0, vmax=1, cmap="Blues", aspect="auto", alpha=0.7)
        axis.set_xticks(range(len(aucs)), [f"{auc:g}" for auc in aucs], fontsize=6)
        axis.set_yticks(range(len(pairs)), pairs if j == 0 else [], fontsize=6)
        if i == 0:
            axis.set_title(f"{100 * rate:.0f} % wrong", fontsize=9)
        if j == 0:
            axis.set_ylabel(f"{family}\npairs", fontsize=8)
        if i == len(families) - 1:
            axis.set_xlabel("AUC of the margins", fontsize=7)
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.5)
    bar.set_label("share of draws in which a rate is told", fontsize=8)
    figure.suptitle(
        "Coverage of the 95 % interval in % (orange: below 90). Pale fields: the margins do not "
        "tell, the interval starts at 0.",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    grid = [FAMILIES, AUCS, PAIRS, RATES, (DRAWS,)]
    if args.quick:
        grid = [("gaussian", "laplace"), (0.6, 0.95), (200,), (0.0, 0.3), (4,)]
    tasks = list(product(*grid))
    if args.quick:
        rows = [cell(task) for task in tasks]
    else:
        with ProcessPoolExecutor(args.jobs) as pool:
            rows = list(pool.map(cell, tasks, chunksize=4))
    table = args.out / f"{result_name()}.csv"
    write_csv(table, rows)
    draw_figure(rows, table.with_suffix(".png"))
    verdict(rows)


if __name__ == "__main__":
    main()
