"""Validation-free stop against hold-out, train-to-end and the oracle on noisy digits.

Usage: python recipes/benchmarks/stop_digits/bench.py [--out DIR] [--quick]
Resumable: finished cells are read back from the CSV.
"""

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core import StoppingRule
from poprisk_integrations.diagnostics import GradientWindow

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import hardware, read_csv, write_csv

OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "PopRiskAdamW": partial(PopRiskAdamW, false_open_rate=0.05),
}
FLIPS, LRS, BATCH, TRAIN, TEST = (0.0, 0.2, 0.4), (1e-3, 3e-3), 32, 800, 500


def load(flip: float, seed: int):
    """Training set, noisy and clean test labels; flips go to another class, exact count."""
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(y))[: TRAIN + TEST]
    x, clean = torch.tensor(x[order] / 16.0, dtype=torch.float32), y[order].copy()
    noisy = clean.copy()
    for part in (np.arange(TRAIN), TRAIN + np.arange(TEST)):
        chosen = rng.choice(part, round(flip * len(part)), replace=False)
        noisy[chosen] = (noisy[chosen] + rng.integers(1, 10, len(chosen))) % 10
    return x, torch.tensor(noisy), torch.tensor(clean)


def train(optimizer_name: str, lr: float, x, y, rows, seed: int, epochs: int, evaluate):
    """One run on the given rows; returns the evaluation per epoch and the epoch of the stop."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = OPTIMIZERS[optimizer_name](model.parameters(), lr=lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = len(rows) // BATCH
    window, rule = GradientWindow(steps=per_epoch, epoch_steps=per_epoch), StoppingRule()
    history, stop = [evaluate(model)], None
    for epoch in range(1, epochs + 1):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for i in range(per_epoch):
            batch = order[i * BATCH : (i + 1) * BATCH]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            window.add(list(model.parameters()))
            optimizer.step()
            step = (epoch - 1) * per_epoch + i + 1
            measured = judged(window) if window.is_full else {}
            decision = rule.update(step=step, lr=lr, reused=epoch > 1, **measured)
            if decision.stop and stop is None:
                stop = step / per_epoch
        history.append(evaluate(model))
    return history, stop


def judged(window: GradientWindow) -> dict[str, float]:
    """What the rule wants to know of a window that is full."""
    closed = window.close()
    return {
        "ratio": closed.ratio,
        "ratio_se": closed.ratio_se,
        "noise": float(closed.noise.sum()),
    }


def evaluator(x, noisy, clean, held=None):
    """Noisy test loss, clean test accuracy and (if rows are held out) the held-out loss."""
    test = slice(TRAIN, TRAIN + TEST)

    @torch.no_grad()
    def evaluate(model):
        logits = model(x[test])
        loss = float(nn.functional.cross_entropy(logits, noisy[test]))
        accuracy = float((logits.argmax(-1) == clean[test]).float().mean())
        if held is None:
            return loss, accuracy
        return loss, accuracy, float(nn.functional.cross_entropy(model(x[held]), noisy[held]))

    return evaluate


def cell(optimizer: str, lr: float, flip: float, seed: int, epochs: int) -> list[dict]:
    """All rules of one (optimizer, learning rate, flip rate, seed)."""
    x, noisy, clean = load(flip, seed)
    everything = torch.arange(TRAIN)
    history, stop = train(
        optimizer, lr, x, noisy, everything, seed, epochs, evaluator(x, noisy, clean)
    )
    best = min(range(len(history)), key=lambda e: history[e][0])
    # The stop falls on a step; the metrics are those of the epoch's end that follows it.
    stopped = epochs if stop is None else min(epochs, int(np.ceil(stop)))

    fit, held = everything[:-80], everything[-80:]
    partial, _ = train(optimizer, lr, x, noisy, fit, seed, epochs, evaluator(x, noisy, clean, held))
    kept, waited = 0, 0
    for epoch in range(1, epochs + 1):
        kept, waited = (epoch, 0) if partial[epoch][2] < partial[kept][2] else (kept, waited + 1)
        if waited == 5:
            break
    chosen = {
        "poprisk stop": (history, stopped),
        "hold-out 10 %": (partial, kept),
        "train to end": (history, epochs),
        "oracle": (history, best),
    }
    return [
        {
            "optimizer": optimizer,
            "lr": lr,
            "flip": flip,
            "seed": seed,
            "rule": rule,
            "epoch": epoch,
            "stopped": int(stop is not None) if rule == "poprisk stop" else "",
            "noisy_loss": round(run[epoch][0], 5),
            "clean_accuracy": round(run[epoch][1], 4),
            "regret": round(run[epoch][0] - history[best][0], 5),
        }
        for rule, (run, epoch) in chosen.items()
    ]


def main() -> None:
    """Run missing cells, write the CSV after each, draw and print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="one cell, few epochs, for tests")
    args = parser.parse_args()
    seeds, epochs = (range(1), 12) if args.quick else (range(5), 120)
    cells = list(itertools.product(OPTIMIZERS, LRS, FLIPS, seeds))[: 1 if args.quick else None]
    path = args.out / f"{hardware()}.csv"
    rows: list[dict] = list(read_csv(path)) if path.exists() else []
    for optimizer, lr, flip, seed in cells:
        key = (optimizer, str(lr), str(flip), str(seed))
        if any((r["optimizer"], r["lr"], r["flip"], r["seed"]) == key for r in rows):
            continue
        rows += [
            {k: str(v) for k, v in row.items()} for row in cell(optimizer, lr, flip, seed, epochs)
        ]
        write_csv(path, rows)
        print(*key, flush=True)
    draw(rows, path.with_suffix(".png"))
    for line in verdicts(rows):
        print(line)


def verdicts(rows: list[dict]) -> list[str]:
    """The decision rule of the README, applied; then the same numbers for each optimizer."""
    lines = []
    for flip in sorted({float(r["flip"]) for r in rows}):
        lines.append(verdict([r for r in rows if float(r["flip"]) == flip], f"flip {flip:.0%}"))
    for name in OPTIMIZERS:
        for flip in sorted({float(r["flip"]) for r in rows}):
            part = [r for r in rows if float(r["flip"]) == flip and r["optimizer"] == name]
            if part:
                lines.append(verdict(part, f"{name}, flip {flip:.0%}"))
    return lines


def verdict(rows: list[dict], name: str) -> str:
    """Mean regrets and the paired bootstrap interval of stop against hold-out."""
    by_rule = {
        rule: {
            (r["optimizer"], r["lr"], r["seed"]): float(r["regret"])
            for r in rows
            if r["rule"] == rule
        }
        for rule in ("poprisk stop", "hold-out 10 %", "train to end")
    }
    keys = sorted(by_rule["poprisk stop"])
    ours, held, end = (np.array([by_rule[rule][k] for k in keys]) for rule in by_rule)
    draws = np.random.default_rng(0).integers(0, len(keys), (10_000, len(keys)))
    low, high = np.quantile((ours - held)[draws].mean(1), [0.025, 0.975])
    word = "better" if high < 0 else "worse" if low > 0 else "level"
    return (
        f"{name}: regret stop {ours.mean():.3f}, hold-out {held.mean():.3f}, "
        f"train to end {end.mean():.3f}; stop - hold-out {(ours - held).mean():+.3f} "
        f"[{low:+.3f}, {high:+.3f}]: {word}"
    )


def draw(rows: list[dict], path: Path) -> None:
    """Regret per rule and flip rate: one dot a run, a bar at the mean."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    flips = sorted({r["flip"] for r in rows}, key=float)
    rules = ["poprisk stop", "hold-out 10 %", "train to end"]
    colors = {"AdamW": "#4f81bd", "PopRiskAdamW": "#c0504d"}
    figure, axes = plt.subplots(
        1, len(flips), figsize=(3.6 * len(flips), 3.8), sharey=True, layout="constrained"
    )
    for axis, flip in zip(np.atleast_1d(axes), flips, strict=True):
        for place, rule in enumerate(rules):
            for shift, (name, color) in zip((-0.15, 0.15), colors.items(), strict=True):
                values = [
                    max(float(r["regret"]), 1e-4)
                    for r in rows
                    if (r["rule"], r["flip"], r["optimizer"]) == (rule, flip, name)
                ]
                if values:
                    at = np.full(len(values), place + shift)
                    axis.scatter(at, values, s=12, color=color, alpha=0.6, lw=0)
                    axis.hlines(np.mean(values), place + shift - 0.12, place + shift + 0.12, color)
        axis.set_xticks(range(len(rules)), ["poprisk\nstop", "hold-out\n10 %", "train\nto end"])
        axis.set(title=f"{float(flip):.0%} of labels flipped", yscale="log")
        axis.grid(axis="y", alpha=0.3)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("regret in noisy test loss (nats)")
    for name, color in colors.items():
        first.plot([], [], color=color, label=name)
    first.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
