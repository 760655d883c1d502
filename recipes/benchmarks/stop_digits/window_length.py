"""Regret of the stop with windows of a third, half and a whole epoch, on seeds of their own.

Usage: python recipes/benchmarks/stop_digits/window_length.py [--out DIR]
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from bench import BATCH, LRS, TRAIN, evaluator, judged, load
from torch import nn

from poprisk_integrations.core import StoppingRule
from poprisk_integrations.diagnostics import GradientWindow

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import hardware, write_csv

WINDOWS, EPOCHS = (8, 12, 25), 60


def cell(lr: float, flip: float, seed: int) -> list[dict]:
    """One AdamW run that all windows watch."""
    x, noisy, clean = load(flip, seed)
    evaluate = evaluator(x, noisy, clean)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    watchers = {steps: (GradientWindow(steps=steps), StoppingRule()) for steps in WINDOWS}
    stops: dict[int, float] = {}
    losses, per_epoch = [evaluate(model)[0]], TRAIN // BATCH
    for epoch in range(EPOCHS):
        order = torch.randperm(TRAIN, generator=generator)
        for i in range(per_epoch):
            rows = order[i * BATCH : (i + 1) * BATCH]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), noisy[rows]).backward()
            step = epoch * per_epoch + i + 1
            for steps, (window, rule) in watchers.items():
                window.add(list(model.parameters()))
                measured = judged(window) if window.is_full else {}
                reused = step - steps >= per_epoch  # by the window's first step
                if rule.update(step=step, lr=lr, reused=reused, **measured).stop:
                    stops.setdefault(steps, step / per_epoch)
            optimizer.step()
        losses.append(evaluate(model)[0])
    return [
        {
            "lr": lr,
            "flip": flip,
            "seed": seed,
            "window_steps": steps,
            "stopped": int(steps in stops),
            "epoch": stops.get(steps, EPOCHS),
            "oracle_epoch": int(np.argmin(losses)),
            "regret": round(losses[int(np.ceil(stops.get(steps, EPOCHS)))] - min(losses), 5),
        }
        for steps in WINDOWS
    ]


def main() -> None:
    """Run all cells, write the CSV, print the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows = []
    for lr, flip, seed in product(LRS, (0.2, 0.4), (100, 101, 102)):
        rows += cell(lr, flip, seed)
        print(rows[-3:], flush=True)
    write_csv(args.out / f"window_length_{hardware()}.csv", rows)
    for steps in WINDOWS:
        part = [r for r in rows if r["window_steps"] == steps]
        regret = np.mean([r["regret"] for r in part])
        print(f"{steps} steps: regret {regret:.3f}, {sum(r['stopped'] for r in part)} of 12 stop")


if __name__ == "__main__":
    main()
