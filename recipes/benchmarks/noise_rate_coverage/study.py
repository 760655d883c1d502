"""Does the interval of the noise rate hold the true rate, also where the model has hardly learned?

Margins of pairs whose labels are partly wrong, in families that a model's margins may be of.
"""

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from benchmarks.harness.figures import plt, save
from benchmarks.harness.provenance import result_name, write_csv

from poprisk_integrations.core.noise_rate import UntrainedMargins, estimate_noise_rate

__all__ = ["FAMILIES", "draw"]

TAKES = ()
RATES = (0.0, 0.1, 0.2, 0.3, 0.4)
AUCS = (0.52, 0.6, 0.68, 0.75, 0.85, 0.95)
PAIRS = (200, 1000, 5000)
DRAWS = 100
BATCH = 16  # pairs per step
COVERED, OFTEN = 0.9, 0.5  # of the decision rule

Values = np.ndarray
Family = Callable[[float, Values, np.random.Generator], Values]


def _gaussian(signal: float, z: Values, random: np.random.Generator) -> Values:
    """Right labels N(mu, 1): the logistic curve is exact."""
    return signal + z


def _logistic(signal: float, z: Values, random: np.random.Generator) -> Values:
    """The logistic curve is exact, the margins have a peak at zero and long tails."""
    size = np.abs(z) * random.uniform(0, 1, len(z))
    right = random.uniform(0, 1, len(z)) < 1 / (1 + np.exp(-4 * signal * size))
    return np.where(right, size, -size)


def _laplace(signal: float, z: Values, random: np.random.Generator) -> Values:
    """Heavy tails: beyond mu a larger margin is no surer one."""
    return signal + random.laplace(0, 1, len(z))


def _student(signal: float, z: Values, random: np.random.Generator) -> Values:
    """Heavier tails (three degrees of freedom): the largest margins are the least sure."""
    return signal + random.standard_t(3, len(z))


def _uneven(signal: float, z: Values, random: np.random.Generator) -> Values:
    """Scales that differ from pair to pair, as with the length of the answers."""
    return np.exp(0.5 * random.standard_normal(len(z))) * (signal + z)


def _unsignalled(signal: float, z: Values, random: np.random.Generator) -> Values:
    """Three tenths of the pairs carry no signal."""
    return np.where(random.uniform(0, 1, len(z)) < 0.3, 0.0, signal) + z


def _learning(signal: float, z: Values, random: np.random.Generator) -> Values:
    """A first epoch: size, signal and certainty grow from nothing."""
    time = (np.arange(len(z)) + 0.5) / len(z)
    return np.sqrt(time) * (1.5 * signal * np.sqrt(time) + z)


FAMILIES: dict[str, Family] = {
    "gaussian": _gaussian,
    "logistic": _logistic,
    "laplace": _laplace,
    "student": _student,
    "uneven": _uneven,
    "unsignalled": _unsignalled,
    "learning": _learning,
}


def draw(family: str, auc: float, pairs: int, rate: float, random: np.random.Generator) -> Values:
    """Margins in the order of training, each label wrong with probability `rate`.

    `auc` is the probability that a right label has a larger margin than a wrong one: the signal.
    """
    clean = FAMILIES[family](_signal(family, auc), random.standard_normal(pairs), random)
    return np.where(random.uniform(0, 1, pairs) < rate, -clean, clean)


@cache
def _signal(family: str, auc: float) -> float:
    """The strength that gives the AUC, by halving an interval on one large sample."""
    low, high = 0.0, 20.0
    for _ in range(24):
        middle = (low + high) / 2
        random = np.random.default_rng(0)
        clean = FAMILIES[family](middle, random.standard_normal(100_000), random)
        clean = random.permutation(clean)
        found = np.mean(clean[::2] > -clean[1::2])
        low, high = (middle, high) if found < auc else (low, middle)
    return (low + high) / 2


def cell(task: tuple[str, float, int, float, int]) -> dict:
    """One row: what the intervals of many draws are worth."""
    family, auc, pairs, rate, draws = task
    torch.set_num_threads(1)
    place = (list(FAMILIES).index(family), round(1000 * auc), pairs, round(100 * rate))
    found = []
    for number in range(draws):
        random = np.random.default_rng((7, *place, number))
        margins = draw(family, auc, pairs, rate, random)
        record = UntrainedMargins(pairs)
        record.record(torch.arange(pairs), torch.as_tensor(margins), torch.arange(pairs) // BATCH)
        found.append(estimate_noise_rate(record))
    covered = np.array([one.low <= rate <= one.high for one in found])
    told = np.array([one.informative for one in found])
    rates = [one.rate for one in found if one.rate is not None]
    return {
        "family": family,
        "auc": auc,
        "pairs": pairs,
        "rate": rate,
        "draws": draws,
        "coverage": round(float(covered.mean()), 3),
        "told": round(float(told.mean()), 3),
        "coverage_where_told": round(float(covered[told].mean()), 3) if told.any() else "",
        "mean_low": round(float(np.mean([one.low for one in found])), 3),
        "mean_high": round(float(np.mean([one.high for one in found])), 3),
        "mean_rate_where_told": round(float(np.mean(rates)), 3) if rates else "",
    }


def verdict(rows: list[dict]) -> Iterator[str]:
    """By the rule of the README."""
    missed = [row for row in rows if row["coverage"] < COVERED]
    often = [row for row in rows if row["told"] >= OFTEN]
    misled = [row for row in often if row["coverage_where_told"] < COVERED]
    yield (
        f"{len(rows)} cells; coverage below {COVERED} in {len(missed)} (smallest "
        f"{min(row['coverage'] for row in rows)}); told in at least half of the draws in "
        f"{len(often)}, of which with coverage below {COVERED} where told: {len(misled)}."
    )
    for row in missed + [row for row in misled if row not in missed]:
        yield str({name: row[name] for name in row if name != "draws"})


def draw_figure(rows: list[dict], path: Path) -> None:
    """Families by rates; in each field coverage in %, coloured by how often a rate is told."""
    families = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    rates, aucs, pairs = (sorted({row[k] for row in rows}) for k in ("rate", "auc", "pairs"))
    figure, axes = plt.subplots(
        len(families),
        len(rates),
        figsize=(2.6 * len(rates) + 1, 1.5 * len(families) + 1),
        squeeze=False,
        layout="constrained",
    )
    for (i, family), (j, rate) in product(enumerate(families), enumerate(rates)):
        axis = axes[i][j]
        told = np.zeros((len(pairs), len(aucs)))
        for row in rows:
            if (row["family"], row["rate"]) != (family, rate):
                continue
            y, x = pairs.index(row["pairs"]), aucs.index(row["auc"])
            told[y, x] = row["told"]
            bad = row["coverage"] < COVERED
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
    save(figure, path, dpi=110)


def main(args: argparse.Namespace) -> list[str]:
    """Draw, estimate, write the CSV, draw the picture."""
    grid = [FAMILIES, AUCS, PAIRS, RATES, (DRAWS,)]
    if args.quick:
        grid = [("gaussian", "laplace"), (0.6, 0.95), (200,), (0.0, 0.3), (4,)]
    tasks = list(product(*grid))
    if args.jobs == 1:
        rows = [cell(task) for task in tasks]
    else:
        with ProcessPoolExecutor(args.jobs) as pool:
            rows = list(pool.map(cell, tasks, chunksize=4))
    table = args.out / f"{result_name()}.csv"
    write_csv(table, rows)
    draw_figure(rows, table.with_suffix(".png"))
    return list(verdict(rows))
