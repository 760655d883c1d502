"""Do margins of models that never saw a pair tell wrong labels better than those of one epoch?

Usage: python recipes/benchmarks/noisy_dpo/cross_fit.py [--runs DIR] [--lr LR] [--quick]

Two folds: AdamW with DPO's loss on one half, margins of the other half after each of some epochs,
as `cross_fit_flip_report` does it. One row per condition, seed and epoch: AUC of -margin for wrong
labels, and the noise rate that these margins give. Epoch 0 stands for margins of a single run taken
before a pair was trained on, with the same learning rate, over its first epoch.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from arms import A1
from estimates import estimate_of
from grid import FRESH, SELECTION, task_of
from rows import detection_auc
from training import BATCH, log_ratio_margins, train

sys.path.insert(0, str(Path(__file__).parents[1]))
from reporting import write_csv

EPOCHS = (1, 2, 3, 5, 8)


def rows_of(task, epochs: tuple[int, ...], lr: float, beta: float = 0.1) -> list[dict]:
    """All members side by side, fold by fold."""
    n = task.prompts.shape[1]
    half = n // 2
    margins = {epoch: torch.full((len(task.seeds), n), torch.nan) for epoch in epochs}
    member = torch.arange(len(task.seeds))[:, None]
    orders = [
        torch.randperm(n, generator=torch.Generator().manual_seed(60_000 + seed))
        for seed in task.seeds
    ]
    order = torch.stack(orders)
    for fold in (0, 1):
        held, kept = (
            order[:, fold * half : (fold + 1) * half],
            order[:, (1 - fold) * half :][:, :half],
        )
        params = {name: p.clone().requires_grad_() for name, p in task.reference.items()}
        optimizer = A1.optimizer(list(params.values()), lr, BATCH, half)
        generator = torch.Generator().manual_seed(61_000 + fold)
        for epoch in range(1, epochs[-1] + 1):
            mixed = kept[member, torch.rand(kept.shape, generator=generator).argsort(1)]
            for i in range(half // BATCH):
                rows = mixed[:, i * BATCH : (i + 1) * BATCH]
                h = beta * log_ratio_margins(params, task, member, rows)
                torch.nn.functional.softplus(-h).mean(1).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            if epoch in epochs:
                with torch.no_grad():
                    found = beta * log_ratio_margins(params, task, member, held)
                margins[epoch][member, held] = found
    first = train(task, A1, lr, beta=beta, epochs=(1,))["ledger"]
    both = {0: torch.from_numpy(first), **margins}
    return [row for epoch, found in both.items() for row in _judged(task, epoch, found, lr)]


def _judged(task, epoch: int, margins: torch.Tensor, lr: float) -> list[dict]:
    rows = []
    for place, seed in enumerate(task.seeds):
        found, flipped = margins[place], task.flipped[place].numpy()
        estimate = estimate_of(found)
        rows.append(
            {
                "condition": task.conditions[place],
                "seed": seed,
                "lr": lr,
                "epoch": epoch,
                "noise_rate": round(float(task.noise_rate[place]), 4),
                "auc": round(detection_auc(found.numpy(), flipped), 4),
                "e_hat": round(estimate.reference_rate, 4),
                "e_low": round(estimate.low, 3),
                "e_high": round(estimate.high, 3),
                "agreement": round(1 - estimate.upper_bound, 4),
            }
        )
    return rows


def main() -> None:
    """Train, write the CSV, print the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path(__file__).parent / "runs")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs, little data")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cross_fit.csv"
    )
    args = parser.parse_args()
    seeds = (100,) if args.quick else SELECTION + FRESH
    args.runs.mkdir(parents=True, exist_ok=True)
    rows = []
    for group in ("main", "rates"):
        task = task_of(group, seeds, args.runs, args.quick)
        rows += rows_of(task, EPOCHS[:2] if args.quick else EPOCHS, args.lr)
    write_csv(args.out, rows)
    for condition in sorted({row["condition"] for row in rows}):
        for epoch in sorted({row["epoch"] for row in rows}):
            chosen = [r for r in rows if (r["condition"], r["epoch"]) == (condition, epoch)]
            error = np.mean([abs(r["e_hat"] - r["noise_rate"]) for r in chosen])
            auc = np.mean([r["auc"] for r in chosen])
            print(f"{condition}, epoch {epoch}: AUC {auc:.3f}, error of the rate {error:.3f}")


if __name__ == "__main__":
    main()
