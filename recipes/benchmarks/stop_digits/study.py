"""Validation-free stop against hold-out, train-to-end and the oracle on noisy digits.

`--part window_length`: regret with windows of a third, half and a whole epoch, on seeds of their
own. Resumable: finished cells are read back from the CSV.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarks.harness.figures import plt, save
from benchmarks.harness.provenance import hardware, read_csv, write_csv
from benchmarks.harness.tables import interval, word
from sklearn.datasets import load_digits
from torch import Tensor, nn

from poprisk_integrations import PopRiskAdamW
from poprisk_integrations.core import StoppingRule
from poprisk_integrations.diagnostics import GradientWindow

TAKES = ("part",)
PARTS = ("window_length",)
OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "PopRiskAdamW": partial(PopRiskAdamW, false_open_rate=0.05),
}
COLOURS = {"AdamW": "#4f81bd", "PopRiskAdamW": "#c0504d"}
RULES = ("poprisk stop", "hold-out 10 %", "train to end")
FLIPS, LRS, BATCH, TRAIN, TEST = (0.0, 0.2, 0.4), (1e-3, 3e-3), 32, 800, 500
HELD, PATIENCE = 80, 5
WINDOWS = (8, 12, 25)  # steps; of the part on window length

Evaluate = Callable[[nn.Module], tuple[float, ...]]


def load(flip: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, noisy and clean labels of training and test set; flips to another class, exact."""
    rng = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(y))[: TRAIN + TEST]
    x, clean = torch.tensor(x[order] / 16.0, dtype=torch.float32), y[order].copy()
    noisy = clean.copy()
    for part in (np.arange(TRAIN), TRAIN + np.arange(TEST)):
        chosen = rng.choice(part, round(flip * len(part)), replace=False)
        noisy[chosen] = (noisy[chosen] + rng.integers(1, 10, len(chosen))) % 10
    return x, torch.tensor(noisy), torch.tensor(clean)


class Watcher:
    """A gradient window and the stopping rule it feeds; `stop` is the step at which it fired."""

    def __init__(self, steps: int, per_epoch: int, **options: int) -> None:
        self.window, self.rule = GradientWindow(steps=steps, **options), StoppingRule()
        self.per_epoch = per_epoch
        self.stop: int | None = None

    def __call__(self, model: nn.Module, step: int, lr: float) -> None:
        """After the backward pass of a step, counted from 1."""
        self.window.add(list(model.parameters()))
        measured = {}
        if self.window.is_full:
            closed = self.window.close()
            measured = {
                "ratio": closed.ratio,
                "ratio_se": closed.ratio_se,
                "noise": float(closed.noise.sum()),
            }
        reused = step - self.window.steps >= self.per_epoch  # by the window's first step
        decision = self.rule.update(step=step, lr=lr, reused=reused, **measured)
        if decision.stop and self.stop is None:
            self.stop = step


def train(
    optimizer_name: str,
    lr: float,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    seed: int,
    epochs: int,
    watchers: list[Watcher],
    evaluate: Evaluate,
) -> list[tuple[float, ...]]:
    """One run on the given rows; the evaluation before it and after each epoch."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = OPTIMIZERS[optimizer_name](model.parameters(), lr=lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    history, step = [evaluate(model)], 0
    for _ in range(epochs):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for batch in order[: len(rows) // BATCH * BATCH].split(BATCH):
            step += 1
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            for watcher in watchers:
                watcher(model, step, lr)
            optimizer.step()
        history.append(evaluate(model))
    return history


def evaluator(x: Tensor, noisy: Tensor, clean: Tensor, held: Tensor | None = None) -> Evaluate:
    """Noisy test loss, clean test accuracy and (if rows are held out) the held-out loss."""
    test = slice(TRAIN, TRAIN + TEST)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> tuple[float, ...]:
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
    rows, per_epoch = torch.arange(TRAIN), TRAIN // BATCH
    watcher = Watcher(per_epoch, per_epoch, epoch_steps=per_epoch)
    run = partial(train, optimizer, lr, x, noisy)
    history = run(rows, seed, epochs, [watcher], evaluator(x, noisy, clean))
    losses = [loss for loss, *_ in history]
    # The stop falls on a step; the metrics are those of the epoch's end that follows it.
    stopped = epochs if watcher.stop is None else -(-watcher.stop // per_epoch)

    fit, held = rows[:-HELD], rows[-HELD:]
    unseen = run(fit, seed, epochs, [], evaluator(x, noisy, clean, held))
    kept, waited = 0, 0
    for epoch in range(1, epochs + 1):
        kept, waited = (epoch, 0) if unseen[epoch][2] < unseen[kept][2] else (kept, waited + 1)
        if waited == PATIENCE:
            break
    chosen = {
        "poprisk stop": (history, stopped),
        "hold-out 10 %": (unseen, kept),
        "train to end": (history, epochs),
        "oracle": (history, losses.index(min(losses))),
    }
    return [
        {
            "optimizer": optimizer,
            "lr": lr,
            "flip": flip,
            "seed": seed,
            "rule": rule,
            "epoch": epoch,
            "stopped": int(watcher.stop is not None) if rule == "poprisk stop" else "",
            "noisy_loss": round(found[epoch][0], 5),
            "clean_accuracy": round(found[epoch][1], 4),
            "regret": round(found[epoch][0] - min(losses), 5),
        }
        for rule, (found, epoch) in chosen.items()
    ]


def window_lengths(lr: float, flip: float, seed: int, epochs: int) -> list[dict]:
    """One AdamW run that windows of several lengths watch."""
    x, noisy, clean = load(flip, seed)
    per_epoch = TRAIN // BATCH
    watchers = [Watcher(steps, per_epoch) for steps in WINDOWS]
    rows = torch.arange(TRAIN)
    history = train("AdamW", lr, x, noisy, rows, seed, epochs, watchers, evaluator(x, noisy, clean))
    losses = [loss for loss, *_ in history]
    return [
        {
            "lr": lr,
            "flip": flip,
            "seed": seed,
            "window_steps": steps,
            "stopped": int(watcher.stop is not None),
            "epoch": epochs if watcher.stop is None else watcher.stop / per_epoch,
            "oracle_epoch": losses.index(min(losses)),
            "regret": round(
                losses[epochs if watcher.stop is None else -(-watcher.stop // per_epoch)]
                - min(losses),
                5,
            ),
        }
        for steps, watcher in zip(WINDOWS, watchers, strict=True)
    ]


def main(args: argparse.Namespace) -> list[str]:
    """Run missing cells, write the CSV after each, draw; the verdicts."""
    if args.part == "window_length":
        return _window_length(args)
    seeds, epochs = (range(1), 12) if args.quick else (range(5), 120)
    cells = list(itertools.product(OPTIMIZERS, LRS, FLIPS, seeds))[: 1 if args.quick else None]
    path = args.out / f"{hardware()}.csv"
    rows: list[dict] = list(read_csv(path)) if path.exists() else []
    done = {(r["optimizer"], r["lr"], r["flip"], r["seed"]) for r in rows}
    for one in cells:
        if tuple(map(str, one)) in done:
            continue
        rows += [{k: str(v) for k, v in row.items()} for row in cell(*one, epochs)]
        write_csv(path, rows)
        print(*one, flush=True)
    draw(rows, path.with_suffix(".png"))
    return list(verdicts(rows))


def _window_length(args: argparse.Namespace) -> list[str]:
    grid = list(itertools.product(LRS, (0.2, 0.4), (100, 101, 102)))[: 1 if args.quick else None]
    rows = []
    for one in grid:
        rows += window_lengths(*one, 3 if args.quick else 60)
        print(*one, flush=True)
    write_csv(args.out / f"window_length_{hardware()}.csv", rows)
    lines = []
    for steps in WINDOWS:
        part = [r for r in rows if r["window_steps"] == steps]
        regret, stops = (np.mean([r[name] for r in part]) for name in ("regret", "stopped"))
        lines.append(f"{steps} steps: regret {regret:.3f}, {stops:.0%} stop")
    return lines


def verdicts(rows: list[dict]) -> Iterator[str]:
    """The decision rule of the README, applied; then the same numbers for each optimizer."""
    for names in (list(OPTIMIZERS), *([name] for name in OPTIMIZERS)):
        for flip in sorted({r["flip"] for r in rows}, key=float):
            part = [r for r in rows if r["flip"] == flip and r["optimizer"] in names]
            if part:
                yield verdict(part, f"{' and '.join(names)}, {float(flip):.0%} flipped")


def verdict(rows: list[dict], name: str) -> str:
    """Mean regrets and the paired bootstrap interval of stop against hold-out."""
    ours, held, end = (
        {
            (r["optimizer"], r["lr"], r["seed"]): float(r["regret"])
            for r in rows
            if r["rule"] == rule
        }
        for rule in RULES
    )
    keys = sorted(ours)
    mean, low, high = interval({("", key): ours[key] - held[key] for key in keys})
    means = [np.mean([found[key] for key in keys]) for found in (ours, held, end)]
    return (
        f"{name}: regret stop {means[0]:.3f}, hold-out {means[1]:.3f}, train to end "
        f"{means[2]:.3f}; stop - hold-out {mean:+.3f} [{low:+.3f}, {high:+.3f}]: "
        f"{word(-high, -low)}"
    )


def draw(rows: list[dict], path: Path) -> None:
    """Regret per rule and flip rate: one dot a run, a bar at the mean."""
    flips = sorted({r["flip"] for r in rows}, key=float)
    figure, axes = plt.subplots(
        1, len(flips), figsize=(3.6 * len(flips), 3.8), sharey=True, layout="constrained"
    )
    axes = np.atleast_1d(axes)
    for axis, flip in zip(axes, flips, strict=True):
        for place, rule in enumerate(RULES):
            for shift, (name, color) in zip((-0.15, 0.15), COLOURS.items(), strict=True):
                values = [
                    max(float(r["regret"]), 1e-4)
                    for r in rows
                    if (r["rule"], r["flip"], r["optimizer"]) == (rule, flip, name)
                ]
                if values:
                    at = place + shift
                    axis.scatter([at] * len(values), values, s=12, color=color, alpha=0.6, lw=0)
                    axis.hlines(np.mean(values), at - 0.12, at + 0.12, color)
        axis.set_xticks(range(len(RULES)), ["poprisk\nstop", "hold-out\n10 %", "train\nto end"])
        axis.set(title=f"{float(flip):.0%} of labels flipped", yscale="log")
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("regret in noisy test loss (nats)")
    for name, color in COLOURS.items():
        axes[0].plot([], [], color=color, label=name)
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path, dpi=130)
