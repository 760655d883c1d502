"""Means and paired differences of the arms, the rule of README.md applied, and the picture."""

from pathlib import Path

import numpy as np
from benchmarks.harness.figures import COLOURS, legend, plt, save
from benchmarks.harness.provenance import read_csv
from benchmarks.harness.tables import interval

__all__ = ["GROUPS", "draw", "ranking_against_flips", "summary_rows", "verdict"]

GROUPS = {  # of the summary: condition, setting and schedule that are averaged over rates
    "30 % wrong": ("flips 30", "flips", "linear"),
    "30 % wrong, constant rate": ("flips 30", "flips", "constant"),
    "none wrong": ("flips 0", "flips", "linear"),
    "none wrong, constant rate": ("flips 0", "flips", "constant"),
    "320 pairs, 30 % wrong": ("flips 30", "few", "linear"),
    "320 pairs, none wrong": ("flips 0", "few", "linear"),
    "longer wins": ("length", "structured", "linear"),
    "a bad annotator": ("annotators", "structured", "linear"),
}


def summary_rows(rows: list[dict]) -> list[dict]:
    """Mean accuracy of each arm and group, and its paired differences to two of them."""
    found = []
    for group, where in GROUPS.items():
        own = [r for r in rows if (r["condition"], r["setting"], r["schedule"]) == where]
        cells = {(r["arm"], r["lr"], r["seed"]): float(r["accuracy"]) for r in own}
        for arm in dict.fromkeys(r["arm"] for r in own):
            keys = [(lr, seed) for name, lr, seed in cells if name == arm]
            values = [cells[(arm, *key)] for key in keys]
            rates = sorted({lr for lr, _ in keys}, key=float)
            by_rate = [np.mean([cells[(arm, *k)] for k in keys if k[0] == lr]) for lr in rates]
            row = {
                "group": group,
                "arm": arm,
                "accuracy": f"{np.mean(values):.4f}",
                "worst_rate": f"{min(by_rate):.4f}",
            }
            for base in ("plain", "hold-out"):
                paired = {k: cells[(arm, *k)] - cells[(base, *k)] for k in keys}
                # A seed has the same pairs at all rates, so its rates are one observation.
                seeds = {seed for _, seed in keys}
                by_seed = {("", s): np.mean([paired[k] for k in keys if k[1] == s]) for s in seeds}
                mean, low, high = interval(by_seed)
                row |= {f"minus_{base}": f"{mean:.4f}", f"{base}_low": f"{low:.4f}"}
                row |= {f"{base}_high": f"{high:.4f}"}
                worst = [np.mean([paired[k] for k in keys if k[0] == lr]) for lr in rates]
                row[f"{base}_worst_rate"] = f"{min(worst):.4f}"
            for name in ("auc", "precision"):
                known = [float(r[name]) for r in own if r["arm"] == arm and r[name] != ""]
                row[name] = f"{np.mean(known):.3f}" if known else ""
            found.append(row)
    return found


def verdict(summary: list[dict]) -> list[str]:
    """The decision rule of the README, applied."""
    lines = []
    for row in summary:
        if row["arm"] not in ("drop", "mean of folds", "drop, mean of folds"):
            continue
        lines.append(
            f"{row['group']}, {row['arm']}: {float(row['accuracy']):.3f}; minus plain "
            f"{float(row['minus_plain']):+.3f} [{float(row['plain_low']):+.3f}, "
            f"{float(row['plain_high']):+.3f}], minus hold-out {float(row['minus_hold-out']):+.3f} "
            f"[{float(row['hold-out_low']):+.3f}, {float(row['hold-out_high']):+.3f}]"
        )
    return lines


def ranking_against_flips(rows: list[dict]) -> list[str]:
    """AUC of structured noise minus that of random flips at the same rates, by seed.

    That of random flips is of the part on rankings: the same references, prompts and samples.
    """
    (table,) = (Path(__file__).parent / "results").glob("ranking_*.csv")
    lrs = {row["lr"] for row in rows}

    def by_seed(some: list[dict]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for r in some:
            if r["lr"] in lrs:
                found.setdefault(str(r["seed"]), []).append(float(r["auc"]))
        return {seed: float(np.mean(values)) for seed, values in found.items()}

    same = {"ranking": "4 folds", "condition": "flips 30", "setting": "flips"}
    flips, lines = by_seed([r for r in read_csv(table) if same.items() <= r.items()]), []
    for group in ("longer wins", "a bad annotator"):
        where = GROUPS[group]
        own = by_seed([r for r in rows if r["arm"] == "mean of folds" and _where(r) == where])
        paired = {("", s): value - flips[s] for s, value in own.items() if s in flips}
        if paired:
            mean, low, high = interval(paired)
            lines.append(
                f"{group}: AUC {np.mean(list(own.values())):.3f}, minus random flips {mean:+.3f} "
                f"[{low:+.3f}, {high:+.3f}]"
            )
    return lines


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy over learning rate in each group; means over seeds, and the seeds."""
    groups = [g for g, w in GROUPS.items() if any(_where(r) == w for r in rows)]
    columns = min(4, len(groups)) or 1
    lines = -(-len(groups) // columns) or 1
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.1 * columns + 0.6, 2.7 * lines + 0.7), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    arms = list(dict.fromkeys(r["arm"] for r in rows))
    for axis, group in zip(axes.flat, groups, strict=False):
        own = [r for r in rows if _where(r) == GROUPS[group]]
        rates = sorted({float(r["lr"]) for r in own})
        for place, arm in enumerate(arms):
            found = [
                [float(r["accuracy"]) for r in own if r["arm"] == arm and float(r["lr"]) == lr]
                for lr in rates
            ]
            shift = 1.03 ** (place - len(arms) / 2)
            at = [lr * shift for lr in rates]
            colour = COLOURS[place % len(COLOURS)]
            axis.plot(at, [np.mean(v) for v in found], "o-", color=colour, label=arm, ms=4, lw=1.3)
            for x, values in zip(at, found, strict=True):
                axis.scatter([x] * len(values), values, color=colour, s=6, alpha=0.35, lw=0)
        axis.set(title=group, xscale="log", xlabel="learning rate")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("clean held-out accuracy")
    legend(figure, axes.flat[0], loc="lower center", ncols=min(len(arms), 6))
    save(figure, path)


def _where(row: dict) -> tuple[str, str, str]:
    return row["condition"], row["setting"], row["schedule"]
