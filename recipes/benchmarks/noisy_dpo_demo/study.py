"""Runs `poprisk demo` for several seeds; one CSV row per arm, a plot, and the verdicts.

Resumable: finished seeds are read back from the CSV, and finished demos from `traces/`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from benchmarks.harness.figures import plt, save
from benchmarks.harness.provenance import hardware, read_csv, write_csv
from benchmarks.harness.tables import interval

from poprisk_integrations.cli.main import main as poprisk

TAKES = ("seeds", "traces")
SEEDS = [1, 2, 3, 4, 5]
FEWEST = 3
KEYS = ("trainings", "accuracy", "accuracy_se", "swapped_fitted", "clean_fitted", "drift",
        "peak_accuracy", "peak_epoch")  # fmt: skip
ARMS = {"plain": "#d55e00", "held out": "#009e73", "ours": "#0072b2", "folds": "#222222"}
COMPARED = (("folds", "plain"), ("folds", "held out"), ("ours", "plain"), ("ours", "held out"))


def demo(seed: int, quick: bool, folder: Path) -> list[dict]:
    """The arms of one demo, which is kept in `folder`."""
    path = folder / "results.json"
    if not path.exists():
        flags = ["--quick"] if quick else []
        status = poprisk(["demo", "--out", str(folder), "--seed", str(seed), "--quiet", *flags])
        if status:
            raise SystemExit(status)
    results = json.loads(path.read_text())
    judged = {
        "auc": results["suspects"]["auc"],
        "rate": results["noise"]["rate"],
        "fold_epochs": " ".join(map(str, results["fold_epochs"])),
    }
    return [
        {"seed": seed, "arm": name, **{key: arm[key] for key in KEYS}, **judged}
        for name, arm in results["arms"].items()
    ]


def main(args: argparse.Namespace) -> list[str]:
    """Run missing seeds, write the CSV after each, draw; the verdicts."""
    path = args.out / f"{hardware()}.csv"
    rows: list[dict] = list(read_csv(path)) if path.exists() else []
    for seed in args.seeds or SEEDS[: 1 if args.quick else None]:
        if any(int(r["seed"]) == seed for r in rows):
            continue
        here = args.out if args.quick else Path(__file__).parent
        traces = args.traces or here / "traces"
        new = demo(seed, args.quick, traces / f"seed-{seed}")
        rows += [{k: "" if v is None else str(v) for k, v in row.items()} for row in new]
        write_csv(path, rows)
        print(f"seed {seed} done", flush=True)
    counted = [r for r in rows if int(r["seed"]) > 0]
    draw(counted, path.with_suffix(".png"))
    return verdicts(counted)


def verdicts(rows: list[dict]) -> list[str]:
    """The decision rule of the README, applied."""
    accuracy = {(r["arm"], r["seed"]): float(r["accuracy"]) for r in rows}
    seeds = sorted({seed for _, seed in accuracy})
    lines = [
        f"{arm}: {np.mean([accuracy[arm, s] for s in seeds]):.4f} for "
        f"{np.mean([float(r['trainings']) for r in rows if r['arm'] == arm]):.1f} trainings"
        for arm in ARMS
    ]
    for arm, base in COMPARED:
        mean, low, high = interval({("", s): accuracy[arm, s] - accuracy[base, s] for s in seeds})
        word = "ahead" if low > 0 else "behind" if high < 0 else "level"
        if len(seeds) < FEWEST:
            word = f"no verdict from {len(seeds)} of {FEWEST} seeds"
        lines.append(f"{arm} minus {base}: {mean:+.4f} [{low:+.4f}, {high:+.4f}], {word}")
    auc = np.mean([float(r["auc"]) for r in rows if r["arm"] == "folds"])
    return [*lines, f"AUC for swapped labels: {auc:.3f}; {len(seeds)} seeds"]


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy and swapped labels fitted of each arm; a line joins the arms of a seed."""
    panels = (
        ("accuracy", "clean held-out accuracy"),
        ("swapped_fitted", "swapped labels fitted"),
        ("trainings", "price, in trainings of the first"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    places = range(len(ARMS))
    for axis, (key, title) in zip(axes, panels, strict=True):
        by_seed = [
            [float(r[key]) for arm in ARMS for r in rows if (r["arm"], r["seed"]) == (arm, seed)]
            for seed in sorted({r["seed"] for r in rows})
        ]
        for values in by_seed:
            axis.plot(places, values, color="#bbbbbb", lw=1)
        axis.scatter(places, np.mean(by_seed, 0), color=list(ARMS.values()), s=60, zorder=3)
        axis.set_xticks(places, ["AdamW", "held out", "PopRisk-\nDPOTrainer", "mean of\nfolds"])
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
    save(figure, path, dpi=130)
