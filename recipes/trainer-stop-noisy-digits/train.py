"""Digits with 30 % wrong labels, stopped without validation data (Hugging Face Trainer).

Usage: python recipes/trainer-stop-noisy-digits/train.py [--out DIR] [--epochs N]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from poprisk_integrations.huggingface import PopRiskEarlyStoppingCallback


class Classifier(nn.Module):
    """An MLP that is large enough to learn every wrong label by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def noisy_digits(flips: float = 0.3):
    """1,200 images with wrong labels to train on, the rest with right ones to look at."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels))
    x, y = (images[order] / 16).float(), labels[order]
    wrong = (y + torch.randint(1, 10, y.shape)) % 10
    noisy = torch.where(torch.rand(len(y)) < flips, wrong, y)
    rows = [{"x": a, "labels": b} for a, b in zip(x[:1200], noisy[:1200], strict=True)]
    return rows, x[1200:], y[1200:]


def main() -> None:
    """Train to the stop, and report the accuracy of the best weights on right labels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="trainer_noisy_digits")
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    set_seed(0)
    rows, x, y = noisy_digits()
    model = Classifier()
    trainer = Trainer(
        model,
        TrainingArguments(
            args.out,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            max_grad_norm=0.0,
            save_strategy="no",  # the best weights are kept in memory
            logging_steps=200,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        callbacks=[PopRiskEarlyStoppingCallback()],  # the line that this is about
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    with torch.no_grad():
        accuracy = float((model(x)["logits"].argmax(-1) == y).float().mean())
    print(f"stopped at epoch {trainer.state.epoch:.0f}: {accuracy:.1%} of clean images right")
    print(f"the picture of why: poprisk report {args.out}")


if __name__ == "__main__":
    main()
