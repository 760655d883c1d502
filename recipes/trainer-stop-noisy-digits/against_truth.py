"""The estimated test loss of this recipe's run beside the true one, which the run never sees.

Usage: python recipes/trainer-stop-noisy-digits/against_truth.py [--out PNG] [--seed N] [--epochs N]
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib
import torch
from torch import nn
from train import Classifier, noisy_digits
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback

WRONG = 0.3  # of the labels
TRUE, ESTIMATED, TRAINING = "#222222", "#D55E00", "#0072B2"


class Truth(TrainerCallback):
    """Loss and accuracy on images never trained on, twice per epoch.

    Their labels are wrong as often as those that are trained on: the expectation over the wrong
    ones is exact.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor, every: int) -> None:
        self.x, self.y, self.every = x, y, every
        self.rows: list[dict] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.every:
            return
        with torch.no_grad():
            logits = model(self.x)["logits"]
        losses = -nn.functional.log_softmax(logits, dim=-1)
        right = losses.gather(1, self.y[:, None])[:, 0]
        wrong = (losses.sum(dim=1) - right) / (losses.shape[1] - 1)
        is_right = (logits.argmax(dim=-1) == self.y).double()
        accuracy = (1 - WRONG) * is_right + WRONG * (1 - is_right) / (losses.shape[1] - 1)
        self.rows.append(
            {
                "step": state.global_step,
                "loss": float(((1 - WRONG) * right + WRONG * wrong).mean()),
                "accuracy": float(accuracy.mean()),
                "clean_accuracy": float(is_right.mean()),
            }
        )


def run(seed: int, epochs: int) -> tuple[list[dict], list[dict]]:
    """Windows of a run that only watches, and the truth."""
    set_seed(seed)
    rows, x, y = noisy_digits(WRONG)
    model = Classifier()
    watch, truth = PopRiskEarlyStoppingCallback(criterion="risk", action="monitor"), Truth(x, y, 19)
    with tempfile.TemporaryDirectory() as directory:
        args = TrainingArguments(
            directory,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=seed,
        )
        Trainer(model, args, train_dataset=rows, callbacks=[watch, truth]).train()
    return watch.history, truth.rows


def draw(windows: list[dict], truth: list[dict], path: Path) -> None:
    """Loss and accuracy over the epochs: estimated with its 90 % band, true, training."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    per_epoch = windows[0]["step"] / windows[0]["epoch"]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        ends = [row["epoch"] for row in windows]
        middles = [(a + b) / 2 for a, b in zip([0.0, *ends[:-1]], ends, strict=True)]
        value = [row[f"estimated_test_{name}"] for row in windows]
        error = [1.645 * row[f"estimated_test_{name}_se"] for row in windows]
        low, high = ([v + s * e for v, e in zip(value, error, strict=True)] for s in (-1, 1))
        axis.plot(
            [row["step"] / per_epoch for row in truth],
            [row[name] for row in truth],
            color=TRUE,
            lw=2,
            label="true, on images never seen",
        )
        axis.fill_between(middles, low, high, color=ESTIMATED, alpha=0.18, lw=0)
        axis.plot(middles, value, color=ESTIMATED, marker="o", ms=3, label="estimated (90 %)")
        train = [row[f"train_{name}"] for row in windows]
        axis.plot(middles, train, color=TRAINING, ls="--", label="training")
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss, nats per example")
    axes[1].set_ylabel("accuracy, wrong labels included")
    axes[0].legend(fontsize=8, framealpha=0.9, edgecolor="none")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train, print the mean error, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("against_truth.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    windows, truth = run(args.seed, args.epochs)
    of_middle = {row["step"]: row for row in truth}
    for name in ("loss", "accuracy"):
        pairs = [
            (row[f"estimated_test_{name}"], row[f"estimated_test_{name}_se"],
             of_middle[row["step"] - 19][name])
            for row in windows
        ]  # fmt: skip
        error = sum(abs(value - true) for value, _, true in pairs) / len(pairs)
        inside = sum(abs(value - true) <= 1.645 * se for value, se, true in pairs)
        print(f"{name}: mean error {error:.3f}; {inside} of {len(pairs)} bands hold the truth")
    draw(windows, truth, args.out)


if __name__ == "__main__":
    main()
