"""Digits with 30 % wrong labels, stopped without validation data (Lightning).

Usage: python recipes/lightning-stop-noisy-digits/train.py [--out DIR] [--epochs N]
"""

import argparse

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from poprisk_integrations.lightning import PopRiskEarlyStopping


class Classifier(L.LightningModule):
    """An MLP that is large enough to learn every wrong label by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def noisy_digits(flips: float = 0.3) -> tuple[TensorDataset, TensorDataset]:
    """1,200 images with wrong labels to train on, the rest with right ones to look at."""
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels))
    x, y = (images[order] / 16).float(), labels[order]
    wrong = (y + torch.randint(1, 10, y.shape)) % 10
    noisy = torch.where(torch.rand(len(y)) < flips, wrong, y)
    return TensorDataset(x[:1200], noisy[:1200]), TensorDataset(x[1200:], y[1200:])


def main() -> None:
    """Train to the stop, and report the accuracy of the best weights on right labels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="lightning_noisy_digits")
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    L.seed_everything(0, verbose=False)
    train, clean = noisy_digits()
    model = Classifier()
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[
            PopRiskEarlyStopping(),  # the line that this is about
            ModelCheckpoint(dirpath=f"{args.out}/checkpoints"),
        ],
        logger=CSVLogger(args.out, name="", version=""),
        accelerator="cpu",
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))
    x, y = clean.tensors
    accuracy = float((model.net(x).argmax(-1) == y).float().mean())
    print(f"stopped at epoch {trainer.current_epoch}: {accuracy:.1%} of clean images right")
    print(f"the picture of why: poprisk report {args.out}")


if __name__ == "__main__":
    main()
