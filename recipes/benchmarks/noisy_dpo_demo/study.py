"""Runs `poprisk demo` for several seeds; one CSV row per arm, a plot, and the verdicts.

Resumable: finished seeds are read back from the CSV.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from benchmarks.harness.figures import plt, save
from benchmarks.harness.provenance import hardware, read_csv, write_csv

from poprisk_integrations.cli.main import main as poprisk

TAKES = ("seeds",)
KEYS = (
    "optimizer",
    "learning_rate",
    "stop",
    "stopped",
    "steps",
    "accuracy",
    "accuracy_se",
    "peak_accuracy",
    "swapped_fitted",
    "clean_fitted",
    "drift",
)
COLORS = {"AdamW": "#d45500", "PopRiskAdamW": "#0072b2"}


def demo(seed: int, quick: bool) -> list[dict]:
    """The arms of one demo."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quick"] if quick else []
        status = poprisk(["demo", "--out", folder, "--seed", str(seed), "--quiet", *flags])
        if status:
            raise SystemExit(status)
        results = json.loads(Path(folder, "results.json").read_text())
    return [{"seed": seed, **{key: arm[key] for key in KEYS}} for arm in results["arms"]]


def main(args: argparse.Namespace) -> list[str]:
    """Run missing seeds, write the CSV after each, draw; the verdicts."""
    path = args.out / f"{hardware()}.csv"
    rows: list[dict] = list(read_csv(path)) if path.exists() else []
    for seed in args.seeds or [1, 2, 3][: 1 if args.quick else None]:
        if any(int(r["seed"]) == seed for r in rows):
            continue
        rows += [{k: str(v) for k, v in row.items()} for row in demo(seed, args.quick)]
        write_csv(path, rows)
        print(f"seed {seed} done", flush=True)
    counted = [r for r in rows if int(r["seed"]) > 0 and r["stop"] == "False"]
    draw(counted, path.with_suffix(".png"))
    return list(verdicts(counted))


def verdicts(rows: list[dict]) -> Iterator[str]:
    """The decision rule of the README, applied."""
    seeds = sorted({r["seed"] for r in rows})
    best, spread = {}, {}
    for name in COLORS:
        final = [
            [float(r["accuracy"]) for r in rows if (r["optimizer"], r["seed"]) == (name, seed)]
            for seed in seeds
        ]
        best[name] = np.array([max(values) for values in final])
        spread[name] = np.array([max(values) - min(values) for values in final])
    gain = best["PopRiskAdamW"] - best["AdamW"]
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else float("nan")
    by_arm = {(r["optimizer"], r["seed"], r["learning_rate"]): r for r in rows}
    gated = {k[1:]: r for k, r in by_arm.items() if k[0] == "PopRiskAdamW"}
    spares = all(
        float(r["swapped_fitted"]) < float(by_arm[("AdamW", *k)]["swapped_fitted"])
        and float(r["clean_fitted"]) >= 0.95
        for k, r in gated.items()
    )
    robust = bool((spread["PopRiskAdamW"] < spread["AdamW"]).all())
    yield (
        f"best against best: {gain.mean():+.4f} (standard error {error:.4f}, {len(gain)} seeds); "
        f"better optimum: {'yes' if gain.mean() > 2 * error else 'no'}"
    )
    yield (
        f"spread over learning rates: PopRiskAdamW {spread['PopRiskAdamW'].mean():.3f}, AdamW "
        f"{spread['AdamW'].mean():.3f}; robust to the learning rate: {'yes' if robust else 'no'}"
    )
    yield f"spares wrong labels: {'yes' if spares else 'no'}"


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy, swapped labels fitted and drift at the last step against the learning rate."""
    panels = (
        ("accuracy", "clean held-out accuracy"),
        ("swapped_fitted", "swapped labels fitted"),
        ("drift", "drift from the reference"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, panels, strict=True):
        for name, color in COLORS.items():
            rates = sorted({float(r["learning_rate"]) for r in rows})
            values = [
                [
                    float(r[key])
                    for r in rows
                    if r["optimizer"] == name and float(r["learning_rate"]) == rate
                ]
                for rate in rates
            ]
            axis.plot(rates, [np.mean(v) for v in values], "o-", color=color, label=name)
            for rate, value in zip(rates, values, strict=True):
                axis.scatter([rate] * len(value), value, color=color, s=10, alpha=0.5, lw=0)
        axis.set_xscale("log")
        axis.set_xticks(rates, [f"{rate:.3g}" for rate in rates])
        axis.minorticks_off()
        axis.set(title=title, xlabel="learning rate")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(frameon=False)
    save(figure, path, dpi=130)
