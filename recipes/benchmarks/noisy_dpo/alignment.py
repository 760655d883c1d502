"""Does a pair's gradient agree with the others' of its batch, and does that tell wrong labels?

Usage: python recipes/benchmarks/noisy_dpo/alignment.py [--runs DIR]

Trains one epoch with AdamW; before each step, from per-pair gradients g_i:
    a_i = <g_i, mean_{j != i} g_j> / (|g_i| |mean_{j != i} g_j|)
in the output head, and in all parameters; and the same with Adam's mean in place of the others'.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from arms import A1, Arm, Context
from gates import Margins, in_pieces
from grid import SELECTION, task_of
from torch import Tensor
from training import BATCH, train

from poprisk_integrations.core.ranking_auc import ranking_auc

FEATURES = ("head", "all", "head, mean", "all, mean")


def others(g: Tensor) -> Tensor:
    """Cosine of each pair's gradient with the mean of the others'. g (M, B, ...) -> (M, B)."""
    g = g.flatten(2)
    rest = g.sum(1, keepdim=True) - g
    return torch.cosine_similarity(g, rest, dim=2)


class Recorder:
    """A backward pass that keeps the alignments of all steps, in the order of the visits."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.found: list[Tensor] = []  # each (M, B, features)
        self.means: dict[str, Tensor] = {}

    def __call__(
        self, arm: Arm, params: dict[str, Tensor], margins: Margins, context: Context
    ) -> Tensor:
        """As `in_pieces`, a pair a piece."""
        grads: dict[str, Tensor] = {}
        h = in_pieces(arm, params, margins, context, BATCH, grads)
        each = {"head": grads["head"], "all": torch.cat([g.flatten(2) for g in grads.values()], 2)}
        found = [others(each["head"]), others(each["all"])]
        for name, g in each.items():
            g = g.flatten(2)
            mean = self.means.setdefault(name, torch.zeros_like(g[:, 0]))
            found.append(torch.cosine_similarity(g, mean[:, None], dim=2))
            mean.lerp_(g.mean(1), 0.1)
        self.rows.append(context.rows)
        self.found.append(torch.stack(found, 2))
        return h


def fitted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Logistic regression with a constant, by Newton steps."""
    w = np.zeros(x.shape[1] + 1)
    x = np.c_[x, np.ones(len(x))]
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(len(w))
        w -= np.linalg.solve(hessian, x.T @ (p - y) + 1e-3 * w)
    return w


def auc(score: np.ndarray, flipped: np.ndarray) -> float:
    return ranking_auc(torch.tensor(score), torch.tensor(flipped))


def combined(features: list[np.ndarray], flipped: list[np.ndarray]) -> np.ndarray:
    """AUC of a logistic regression on each seed, fitted on the others."""
    found = []
    for place in range(len(features)):
        rest = [k for k in range(len(features)) if k != place]
        x, y = (np.concatenate([v[k] for k in rest]) for v in (features, flipped))
        centre, scale = x.mean(0), x.std(0) + 1e-12
        w = fitted((x - centre) / scale, y)
        found.append(auc(((features[place] - centre) / scale) @ w[:-1], flipped[place]))
    return np.array(found)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path(__file__).parent / "runs")
    args = parser.parse_args()
    task = task_of("main", SELECTION, args.runs, False)
    for lr in (1e-4, 3e-4, 1e-3):
        recorder = Recorder()
        run = train(task, replace(A1, backward=recorder), lr, epochs=(1,))
        rows, found = torch.cat(recorder.rows, 1).numpy(), torch.cat(recorder.found, 1).numpy()
        noisy = np.flatnonzero(run["condition"] == "flips 30")
        flipped = [run["flipped"][m, rows[m]] for m in noisy]
        h = [run["ledger"][m, rows[m]][:, None] for m in noisy]
        late = np.arange(rows.shape[1]) >= rows.shape[1] // 3
        for name, part in (("all steps", late | True), ("last two thirds", late)):
            y = [f[part] for f in flipped]
            base = np.array([auc(-x[part, 0], f) for x, f in zip(h, y, strict=True)])
            print(f"lr {lr:g}, {name}: -h {base.mean():.3f} {base.round(3)}")
            for place, feature in enumerate(FEATURES):
                a = [found[m][:, place : place + 1] for m in noisy]
                alone = np.array([auc(-x[part, 0], f) for x, f in zip(a, y, strict=True)])
                both = combined([np.c_[i, j][part] for i, j in zip(h, a, strict=True)], y)
                time = np.arange(rows.shape[1])[:, None] / rows.shape[1]
                more = [np.c_[i, j, i * time, j * time][part] for i, j in zip(h, a, strict=True)]
                gain = combined(more, y)
                print(
                    f"  {feature}: -a {alone.mean():.3f}, h and a {both.mean():.3f} "
                    f"({(both - base).mean():+.3f}, by seed {(both - base).round(3)}), "
                    f"with time {gain.mean():.3f} ({(gain - base).mean():+.3f})"
                )


if __name__ == "__main__":
    main()
